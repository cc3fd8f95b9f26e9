//! Copy of an image with changed records: a closure keeps, drops or replaces each item, or inserts
//! records next to it.
//!
//! The source may be of version 2 or 3, of either byte order and in any layer; the copy has the
//! same layers and is what [`transcode`](crate::transcode) writes: version 3, little endian. So a
//! record that is inserted is always encoded little endian, whatever the source is.

use std::io::Read;

use thiserror::Error;

use crate::detect::Detected;
use crate::record::page_data::Entries;
use crate::record::{Record, RecordKind};
use crate::transcode::{CopyBytes, ImageSink, Layer, Summary, TranscodeError, Transcoder};
use crate::walk::{Content, Step, Walk};
use crate::wrapper::libxl::LibxlRecord;
use crate::wrapper::xl::XlHeader;

/// An item of the source, for the closure to decide about. The headers of the libxl and libxc
/// streams are not among them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Item<'a> {
    /// xl's header.
    XlHeader(&'a XlHeader),
    /// A record of the libxl stream.
    Libxl(&'a LibxlRecord),
    /// A record of the libxc stream. Its `raw` bytes are in the byte order of the source, its
    /// `body` has values.
    Record(&'a Record<'a>),
    /// A PAGE_DATA record, by its entries.
    PageData(Entries<'a>),
}

/// What to do with an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Copy it.
    Keep,
    /// Leave it out.
    Drop,
    /// Write these instead.
    Replace(Vec<NewItem>),
    /// Write these, then the item.
    InsertBefore(Vec<NewItem>),
    /// Write the item, then these.
    InsertAfter(Vec<NewItem>),
}

/// An item that is not in the source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NewItem {
    /// xl's header, only instead of another one.
    XlHeader(XlHeader),
    /// A record of the libxl stream, only next to another one.
    Libxl(LibxlRecord),
    /// A record of the libxc stream, only next to another one.
    Record {
        /// Its type.
        kind: RecordKind,
        /// Its body, little endian, without padding.
        body: Vec<u8>,
    },
}

/// Why an image could not be rewritten.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The source is invalid, the sink failed, or a record cannot be written.
    #[error(transparent)]
    Transcode(#[from] TranscodeError),
    /// The closure wants an item in a place where another layer is being written.
    #[error("a new {new} cannot be written beside a {beside}")]
    Layer {
        /// The new item.
        new: &'static str,
        /// The item of the source.
        beside: &'static str,
    },
}

impl NewItem {
    const fn layer(&self) -> &'static str {
        match self {
            Self::XlHeader(_) => "xl header",
            Self::Libxl(_) => "libxl record",
            Self::Record { .. } => "libxc record",
        }
    }
}

/// Copies an image, with the changes that `edit` wants. `walk` must not have taken a step.
///
/// The order of records in the copy is up to `edit`. To know that a restorer would accept the
/// copy, read it.
///
/// ```
/// use xsr_format::rewrite::{Edit, Item, NewItem, rewrite};
/// use xsr_format::transcode::copy_bytes;
/// use xsr_format::{Body, ReadOptions, RecordKind, Walk};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// // Adds an optional record at the end of the static data.
/// let note = NewItem::Record { kind: RecordKind(0x8000_0001), body: b"moved".to_vec() };
/// let mut copy = Vec::new();
/// let mut walk = Walk::open(&image[..], ReadOptions::default())?;
/// rewrite(&mut walk, &mut copy, copy_bytes, |item| match item {
///     Item::Record(record) if matches!(record.body, Body::StaticDataEnd) => {
///         Edit::InsertAfter(vec![note.clone()])
///     }
///     _ => Edit::Keep,
/// })?;
/// assert_eq!(copy.len(), image.len() + 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// See [`RewriteError`]. What has been written is then useless.
pub fn rewrite<R: Read, W: ImageSink>(
    walk: &mut Walk<R>,
    sink: &mut W,
    copy: CopyBytes<R, W>,
    mut edit: impl FnMut(Item<'_>) -> Edit,
) -> Result<Summary, RewriteError> {
    let to = match walk.detected() {
        Detected::Xl => Layer::Xl,
        Detected::Libxl => Layer::Libxl,
        _ => Layer::Libxc,
    };
    let mut out = Transcoder::new(sink, to);
    while let Some(step) = walk.next_step().map_err(TranscodeError::from)? {
        out.at(step.position.offset);
        let (wanted, beside) = match &step.content {
            Content::XlHeader(header) => (edit(Item::XlHeader(header)), "xl header"),
            Content::LibxlRecord(record) => (edit(Item::Libxl(record)), "libxl record"),
            Content::Record(record) => (edit(Item::Record(record)), "libxc record"),
            Content::PageData(body) => (edit(Item::PageData(body.entries())), "libxc record"),
            Content::LibxlHeader(_) | Content::Headers(..) => (Edit::Keep, "header"),
        };
        match wanted {
            Edit::Keep => copied(&mut out, step, copy)?,
            Edit::Drop => {}
            Edit::Replace(new) => inserted(&mut out, new, beside)?,
            Edit::InsertBefore(new) => {
                inserted(&mut out, new, beside)?;
                copied(&mut out, step, copy)?;
            }
            Edit::InsertAfter(new) => {
                copied(&mut out, step, copy)?;
                inserted(&mut out, new, beside)?;
            }
        }
    }
    Ok(out.finish()?)
}

fn copied<R: Read, W: ImageSink>(
    out: &mut Transcoder<'_, W>,
    step: Step<'_, R>,
    copy: CopyBytes<R, W>,
) -> Result<(), TranscodeError> {
    match step.content {
        Content::XlHeader(header) => out.xl_header(header),
        content => out.content(content, copy),
    }
}

fn inserted<W: ImageSink>(
    out: &mut Transcoder<'_, W>,
    new: Vec<NewItem>,
    beside: &'static str,
) -> Result<(), RewriteError> {
    for new in new {
        if new.layer() != beside {
            let new = new.layer();
            return Err(RewriteError::Layer { new, beside });
        }
        match new {
            NewItem::XlHeader(header) => out.xl_header(&header)?,
            NewItem::Libxl(record) => out.libxl_record(&record)?,
            NewItem::Record { kind, body } => out.new_record(kind, &body)?,
        }
    }
    Ok(())
}
