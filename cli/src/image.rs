//! Walks an image from its first byte to its last, through all its layers: xl header, libxl stream,
//! libxc stream.
//!
//! In a file, unneeded page data are skipped by seeking; a pipe is read forwards.

use std::io::Read;

use anyhow::Context as _;
use xsr_format::error::Place;
use xsr_format::fields::{self, pv};
use xsr_format::frame::Pfn;
use xsr_format::guest_image::GuestImage;
use xsr_format::image::{DomainHeader, ImageHeader};
use xsr_format::read::ReadOptions;
use xsr_format::record::Record;
use xsr_format::record::page_data::Entries;
use xsr_format::record::pv::PvInfo;
use xsr_format::walk::{Content, Step, Walk};
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use crate::file::Input;

/// Offset and length of a record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    /// Number in its stream, from 0.
    pub(crate) index: u64,
    /// Bytes from the start of the image.
    pub(crate) offset: u64,
    /// Bytes in the body, without padding.
    pub(crate) length: u64,
}

/// What a walk finds.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// The xl header.
    Xl(&'a XlHeader),
    /// The header of a libxl stream.
    Libxl(LibxlHeader),
    /// The headers of a libxc stream.
    Libxc(ImageHeader, DomainHeader),
    /// A record of the libxl stream.
    LibxlRecord(At, &'a LibxlRecord),
    /// A record of the libxc stream, other than PAGE_DATA.
    Record(At, &'a Record<'a>),
    /// PAGE_DATA.
    Pages(At, Entries<'a>),
}

impl At {
    /// The offset of the first page's contents, in a PAGE_DATA record with these entries.
    pub(crate) fn page_data(&self, entries: Entries<'_>) -> u64 {
        // Record header, head, entries.
        self.offset + 8 + 8 + 8 * entries.len() as u64
    }
}

/// The start_info page: vcpu 0 of a suspended PV guest holds its pfn in edx.
pub(crate) fn start_info(guest: &GuestImage) -> Option<Pfn> {
    let (layout, name) = match guest.pv_info()? {
        PvInfo::Bits64 => (&pv::VCPU_CONTEXT_64, "user_regs.rdx"),
        PvInfo::Bits32 => (&pv::VCPU_CONTEXT_32, "user_regs.edx"),
    };
    let context = &guest.vcpus().get(&0)?.basic;
    let field = fields::fields(layout, context).find(|field| field.name == name)?;
    match field.value {
        fields::Value::Hex(pfn) => Some(Pfn(pfn)),
        _ => None,
    }
}

/// How to read an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    /// Tolerate reserved fields that are not zero.
    pub(crate) lenient: bool,
}

/// The function that is called with each event.
type Visitor<'v> = &'v mut dyn FnMut(Event<'_>) -> anyhow::Result<()>;

/// The result of a walk, up to the end of the image or its first error.
#[derive(Debug)]
pub(crate) struct Walked {
    /// What the records say about the guest; `None` if the walk ended before the libxc stream.
    pub(crate) guest: Option<GuestImage>,
    /// The number of bytes walked.
    pub(crate) bytes: u64,
}

impl Reading {
    /// Walk an image to its end.
    ///
    /// # Errors
    ///
    /// The image is bad, cannot be read, or `visit` failed.
    pub(crate) fn over(self, input: &Input, visit: Visitor<'_>) -> anyhow::Result<Walked> {
        let mut walked = Walked {
            guest: None,
            bytes: 0,
        };
        self.walk(input, visit, &mut walked)?;
        Ok(walked)
    }

    /// As [`Reading::over`], but `walked` is also set if the image turns out to be bad.
    ///
    /// # Errors
    ///
    /// As for [`Reading::over`].
    pub(crate) fn walk(
        self,
        input: &Input,
        visit: Visitor<'_>,
        walked: &mut Walked,
    ) -> anyhow::Result<()> {
        let options = ReadOptions {
            lenient: self.lenient,
            offset: 0,
        };
        let file = &input.file;
        let result = match input.length {
            Some(_) => Walk::open_seeking(file, options)
                .map_err(anyhow::Error::new)
                .and_then(|mut walk| steps(&mut walk, visit, walked)),
            None => Walk::open(file, options)
                .map_err(anyhow::Error::new)
                .and_then(|mut walk| steps(&mut walk, visit, walked)),
        };
        result
            .map_err(|error| input.blame(error))
            .with_context(|| input.name.clone())
    }
}

/// Walk on to the end.
fn steps<R: Read>(
    walk: &mut Walk<R>,
    visit: Visitor<'_>,
    walked: &mut Walked,
) -> anyhow::Result<()> {
    let result = each_step(walk, visit);
    walked.bytes = walk.offset();
    walked.guest = walk.take_guest();
    result
}

fn each_step<R: Read>(walk: &mut Walk<R>, visit: Visitor<'_>) -> anyhow::Result<()> {
    while let Some(Step { position, content }) = walk.next_step()? {
        let at = |length: u64| At {
            index: match position.place {
                Place::Record { index, .. } | Place::LibxlRecord { index, .. } => index,
                _ => 0,
            },
            offset: position.offset,
            length,
        };
        match content {
            Content::XlHeader(header) => visit(Event::Xl(header))?,
            Content::LibxlHeader(header) => visit(Event::Libxl(header))?,
            Content::LibxlRecord(record) => {
                visit(Event::LibxlRecord(at(record.body_bytes()), &record))?;
            }
            Content::Headers(image, domain) => visit(Event::Libxc(image, domain))?,
            Content::PageData(body) => {
                visit(Event::Pages(at(body.length().into()), body.entries()))?;
            }
            Content::Record(record) => {
                visit(Event::Record(at(record.raw.len() as u64), &record))?;
            }
        }
    }
    Ok(())
}
