//! Walks an image from its first byte to its last, through all its layers: xl header, libxl stream,
//! libxc stream.
//!
//! In a file, unneeded page data are skipped by seeking; a pipe is read forwards.

use anyhow::Context as _;
use xsr_format::fields::{self, pv};
use xsr_format::frame::Pfn;
use xsr_format::guest_image::GuestImage;
use xsr_format::read::ReadOptions;
use xsr_format::record::pv::PvInfo;
use xsr_format::walk::{Step, Walk};
use xsr_save_restore::storage::StorageCursor;

use crate::backend::phase;
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

/// An item of a file.
pub(crate) type FileStep<'w, 'f> = Step<'w, &'f StorageCursor>;

impl At {
    /// Where a step is.
    pub(crate) fn of(step: &FileStep<'_, '_>) -> Self {
        Self {
            index: step.index,
            offset: step.position.offset,
            length: step.length,
        }
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

/// The function that is called with each step.
type Visitor<'v> = &'v mut dyn FnMut(FileStep<'_, '_>) -> anyhow::Result<()>;

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
        let image = &input.image;
        let opened = match input.length {
            Some(_) => Walk::open_seeking(image, options),
            None => Walk::open(image, options),
        };
        opened
            .map_err(anyhow::Error::new)
            .and_then(|mut walk| steps(&mut walk, visit, walked))
            .map_err(|error| input.blame(error))
            .with_context(|| input.name.clone())
    }
}

/// Walk on to the end.
fn steps(
    walk: &mut Walk<&StorageCursor>,
    visit: Visitor<'_>,
    walked: &mut Walked,
) -> anyhow::Result<()> {
    let result = each_step(walk, visit);
    walked.bytes = walk.offset();
    walked.guest = walk.take_guest();
    result
}

fn each_step(walk: &mut Walk<&StorageCursor>, visit: Visitor<'_>) -> anyhow::Result<()> {
    while let Some(step) = walk.next_step()? {
        phase("image-step");
        visit(step)?;
    }
    Ok(())
}
