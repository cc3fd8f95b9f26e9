//! `xsr cat`: the stream inside an image, byte for byte.
//!
//! The stream is checked as it is copied, because its end can only be found by reading it.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::rc::Rc;

use anyhow::{Context as _, Error, Result};
use xsr_format::byte_order::ByteOrder;
use xsr_format::detect::Detected;
use xsr_format::error::WriteError;
use xsr_format::frame::PageEntry;
use xsr_format::layout::Mapped;
use xsr_format::layout::leading_pads;
use xsr_format::read::{EndedAfter, PageDataBody, ReadOptions};
use xsr_format::record::MAX_BATCH;
use xsr_format::transcode::Layer;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::xl::XlHeader;
use xsr_format::write::page_data_head;
use xsr_save_restore::storage::StorageCursor;

use crate::args::images::{CatArgs, CatLayer};
use crate::exit::{BadUsage, Code};
use crate::file::Input;
use crate::mapped::{self, InOrder};
use crate::output::{Existing, Output, OutputPlan, Sink};
use crate::terminal::Terminal;

/// The most bytes of a step that are copied. No header has more.
const MOST_KEPT: usize = 17 << 20;

/// The bytes of a step, as in the file. A long record's body is only in the step itself.
#[derive(Debug, Default)]
pub(super) struct Raw {
    head: Vec<u8>,
    /// The last eight bytes.
    last: [u8; 8],
    bytes: usize,
}

impl Raw {
    fn push(&mut self, read: &[u8]) {
        let room = MOST_KEPT.saturating_sub(self.head.len());
        self.head.extend(&read[..read.len().min(room)]);
        let new = &read[read.len().saturating_sub(self.last.len())..];
        self.last.rotate_left(new.len());
        let from = self.last.len() - new.len();
        self.last[from..].copy_from_slice(new);
        self.bytes += read.len();
    }

    /// Writes the bytes of the step, whose parsed contents are `content`.
    pub(super) fn write<R: Read>(
        &self,
        content: &Content<'_, R>,
        sink: &mut Sink<'_>,
    ) -> io::Result<()> {
        if self.bytes == self.head.len() {
            return sink.write_all(&self.head);
        }
        let Some((start, body)) = content.blob() else {
            return Err(io::Error::other("a header is too long"));
        };
        let pad = self.bytes - start - body.len();
        sink.write_all(&self.head[..start])?;
        sink.write_all(body)?;
        sink.write_all(&self.last[self.last.len() - pad..])
    }
}

/// An image, and a copy of what has been read from it since the copy was last taken.
pub(super) struct Heard<'f> {
    image: &'f StorageCursor,
    raw: Rc<RefCell<Raw>>,
}

impl<'f> Heard<'f> {
    /// A reader of an image, and the buffer in which the bytes read are collected.
    pub(super) fn new(image: &'f StorageCursor) -> (Self, Rc<RefCell<Raw>>) {
        let raw = Rc::default();
        let heard = Self {
            image,
            raw: Rc::clone(&raw),
        };
        (heard, raw)
    }

    /// The image itself, for reads that need no copy.
    pub(super) fn image(&self) -> &'f StorageCursor {
        self.image
    }
}

impl Read for Heard<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.image.read(room)?;
        if let Some(read) = room.get(..n) {
            self.raw.borrow_mut().push(read);
        }
        Ok(n)
    }
}

/// The bytes of a PAGE_DATA record before its pages, without the pads of the mapped layout. Returns
/// `None` if there are no pads.
pub(super) fn without_pads<R: Read>(
    body: &PageDataBody<'_, R>,
) -> Result<Option<Vec<u8>>, WriteError> {
    let entries = body.entries();
    let pads = leading_pads(entries.iter());
    // The mapped layout is little endian, and its batches are no longer than a plain stream's.
    let is_mapped = body.byte_order() == ByteOrder::Little;
    if pads == 0 || !is_mapped || entries.len() - pads > MAX_BATCH {
        return Ok(None);
    }
    let real: Vec<PageEntry> = entries.iter().skip(pads).collect();
    page_data_head(&real).map(Some)
}

/// Write the stream inside an image.
pub(crate) fn run(args: &CatArgs, terminal: &Terminal) -> Result<Code> {
    let input = Input::open_as_it_is(&args.file)?;
    let output = Output::open(&OutputPlan {
        path: &args.output,
        inputs: &[&args.file],
        existing: Existing::forced(args.overwrite.force),
        only_copy: false,
    })?;
    let input = input.unwrapped(args.lenient)?;
    let layer = match args.layer {
        CatLayer::Libxc => Layer::Libxc,
        CatLayer::Libxl => Layer::Libxl,
        CatLayer::Xl => Layer::Xl,
        CatLayer::Config => {
            output.fill(|sink| configuration(args, &input, sink))?;
            return Ok(Code::Fine);
        }
    };
    let _bar = input.follow(terminal, "copying");
    output.fill(|sink| {
        let bytes = cat(args, layer, &input, sink)
            .map_err(|error| input.blame(error))
            .with_context(|| input.name.clone())?;
        input.finish(bytes).with_context(|| input.name.clone())
    })?;
    Ok(Code::Fine)
}

/// Write the configuration kept with an image, unchanged: libvirt's XML, xend's or xapi's
/// s-expression, xl's JSON or text.
fn configuration(args: &CatArgs, input: &Input, sink: &mut Sink<'_>) -> Result<()> {
    let mut text = match input.origin() {
        Some(origin) => origin.text.clone().into_bytes(),
        None => {
            let options = ReadOptions {
                lenient: args.lenient,
                offset: 0,
            };
            let mut walk = Walk::open(&input.image, options)
                .map_err(|error| input.blame(error.into()))
                .with_context(|| input.name.clone())?;
            let header = match walk.detected() {
                Detected::Xl => {
                    let first = walk.next_step().map(drop);
                    first.with_context(|| input.name.clone())?;
                    walk.xl()
                }
                _ => None,
            };
            let index = mapped::usable_index(input, args.lenient);
            let header = header.map(|header| plain_header(index.as_ref(), header));
            let header = header.transpose()?;
            match header.as_ref().and_then(XlHeader::config) {
                Some(config) => config.strip_suffix(&[0]).unwrap_or(config).to_vec(),
                None => {
                    let why = format!("{}: it contains no configuration", input.name);
                    return Err(Error::new(BadUsage(why)));
                }
            }
        }
    };
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    Ok(sink.write_all(&text)?)
}

/// The xl header without what the mapped layout has added to it.
fn plain_header(index: Option<&Mapped>, header: &XlHeader) -> Result<XlHeader> {
    match index {
        Some(index) => Ok(index.footer().plain_header(header)?),
        None => Ok(header.clone()),
    }
}

fn cat(args: &CatArgs, wanted: Layer, input: &Input, sink: &mut Sink<'_>) -> Result<u64> {
    let options = ReadOptions {
        lenient: args.lenient,
        offset: 0,
    };
    let index = mapped::usable_index(input, args.lenient);
    let mut moved = match &index {
        Some(index) => InOrder::of(input, index).map_err(|error| mapped::bad_index(&error))?,
        None => None,
    };
    let (source, heard) = Heard::new(&input.image);
    let mut walk = Walk::open(source, options)?;
    let has = match walk.detected() {
        Detected::Xl => Layer::Xl,
        Detected::Libxl => Layer::Libxl,
        _ => Layer::Libxc,
    };
    if wanted > has {
        let why = "the image has no such layer: convert --to adds one";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    while let Some(step) = walk.next_step()? {
        let layer = match &step.content {
            Content::XlHeader(_) => Layer::Xl,
            Content::LibxlHeader(_) | Content::LibxlRecord(_) => Layer::Libxl,
            Content::Headers(..) | Content::PageData(_) | Content::Record(_) => Layer::Libxc,
        };
        let raw = heard.take();
        let instead = match &step.content {
            Content::XlHeader(header) if index.is_some() => {
                Some(plain_header(index.as_ref(), header)?.encode())
            }
            Content::PageData(_) if moved.is_some() => Some(Vec::new()),
            Content::PageData(body) => without_pads(body)?,
            _ => None,
        };
        match instead {
            _ if layer > wanted => {}
            Some(bytes) => sink.write_all(&bytes)?,
            None => raw.write(&step.content, sink)?,
        }
        if let Content::PageData(mut body) = step.content {
            let pages = body.pages_left();
            if let Some(moved) = &mut moved {
                let head = |sink: &mut Sink<'_>, entries: &[PageEntry]| {
                    Ok(sink.write_all(&page_data_head(entries)?)?)
                };
                let data = |sink: &mut Sink<'_>, bytes: &[u8]| Ok(sink.write_all(bytes)?);
                moved.write::<_, Error>(sink, head, data)?;
                body.with_source(pages, |source, bytes| {
                    let passed = io::copy(&mut source.image.take(bytes), &mut io::sink())?;
                    match passed == bytes {
                        true => Ok(()),
                        false => Err(EndedAfter(passed).into()),
                    }
                })?;
                continue;
            }
            let copied = body.with_source(pages, |source, bytes| {
                let copied = sink.copy(source.image, bytes)?;
                match copied == bytes {
                    true => Ok(()),
                    false => Err(EndedAfter(copied).into()),
                }
            });
            copied?;
        }
    }
    Ok(walk.offset())
}
