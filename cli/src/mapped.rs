//! The index of a mapped image, or why it cannot be used.
//!
//! Images from a pipe, and wrapped or compressed ones, are read as streams, without an index.

mod order;

use std::io;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::layout::{ALIGNMENT, LayoutError, Mapped, TRAILER_MAGIC, leading_pads};
use xsr_format::read::ReadOptions;
use xsr_format::record::page_data::Entries;
use xsr_format::walk::{Content, Walk};
use xsr_save_restore::storage::StorageCursor;

use crate::exit::{self, BadImage};
use crate::file::Input;
use crate::image::{At, FileStep};
use crate::text::Count;

/// A reader of an image with its own position.
///
/// # Errors
///
/// `NotSeekable` if the image can be read only once.
pub(crate) fn own_position(image: &StorageCursor) -> io::Result<StorageCursor> {
    image
        .again()
        .ok_or_else(|| io::ErrorKind::NotSeekable.into())
}

/// The index of an image; `None` if it need not have one. It has been compared with the heads of
/// all records, so it does not say anything else than the stream.
///
/// # Errors
///
/// The file is mapped, and its index is missing, breaks a rule or contradicts the stream. The
/// message names the option that reads the image without it.
pub(crate) fn index_of(input: &Input, lenient: bool) -> Result<Option<Mapped>> {
    let index = uncompared_index_of(input, lenient)?;
    if let Some(index) = &index {
        let compared = compare(index, &input.image, lenient);
        compared.with_context(|| input.name.clone())?;
    }
    Ok(index)
}

/// The same, for a reader that compares it with the stream itself, or with no more than one record.
///
/// # Errors
///
/// The file is mapped, and its index is missing or breaks a rule.
pub(crate) fn uncompared_index_of(input: &Input, lenient: bool) -> Result<Option<Mapped>> {
    let found = match read_index(input, lenient) {
        Ok(found) => return Ok(found),
        Err(LayoutError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => error.into(),
        Err(error) => bad_index(&error),
    };
    Err(found).with_context(|| input.name.clone())
}

pub(crate) use order::{InOrder, Reordered, pass_over};

/// The error for commands that have `--ignore-index`.
pub(crate) fn bad_index(error: &LayoutError) -> Error {
    let error = exit::words_of(error);
    Error::new(BadImage(format!(
        "{error}; --ignore-index reads the image as a stream"
    )))
}

/// The index, for commands that read any stream and can do without it. `None` also if it is bad or
/// contradicts the stream.
pub(crate) fn usable_index(input: &Input, lenient: bool) -> Option<Mapped> {
    input.length?;
    let index = Mapped::open(&mut input.image.again()?).ok()??;
    compare(&index, &input.image, lenient).ok()?;
    Some(index)
}

/// Compares an index with the head of each record.
///
/// # Errors
///
/// The stream has other records. (The reader of a stream that is bad itself reports that.)
fn compare(index: &Mapped, image: &StorageCursor, lenient: bool) -> Result<(), BadImage> {
    let options = ReadOptions { lenient, offset: 0 };
    let Some(image) = image.again() else {
        return Ok(());
    };
    let Ok(mut walk) = Walk::open_seeking(&image, options) else {
        return Ok(());
    };
    let mut compared = Compared::new(index);
    loop {
        match walk.next_step() {
            Ok(Some(step)) => compared.step(&step)?,
            Ok(None) => return compared.end(walk.offset()),
            Err(_) => return Ok(()),
        }
    }
}

/// A description of a mapped image's layout.
pub(crate) fn words(mapped: &Mapped) -> String {
    let footer = mapped.footer();
    let digests = match footer.page_digests {
        Some(_) => "digests of records and pages",
        None => "digests of records",
    };
    let records = Count(footer.records, "PAGE_DATA record");
    format!("mapped layout, index of {records}, {digests}")
}

/// The same for JSON.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MappedFacts {
    index_offset: u64,
    records: u64,
    pages: u64,
    page_digests: bool,
}

impl MappedFacts {
    /// The facts of an index.
    pub(crate) fn of(mapped: &Mapped) -> Self {
        let footer = mapped.footer();
        Self {
            index_offset: footer.index_offset,
            records: footer.records,
            pages: footer.pages,
            page_digests: footer.page_digests.is_some(),
        }
    }
}

fn read_index(input: &Input, lenient: bool) -> Result<Option<Mapped>, LayoutError> {
    let Some(length) = input.length else {
        return Ok(None);
    };
    match Mapped::open(&mut own_position(&input.image)?)? {
        Some(mapped) => Ok(Some(mapped)),
        None => unfinished(&input.image, length, lenient).map_or(Ok(None), Err),
    }
}

/// Whether a file without a footer has page data only where the mapped layout has them, and is
/// followed by nothing or by an incomplete trailer.
fn unfinished(image: &StorageCursor, length: u64, lenient: bool) -> Option<LayoutError> {
    let options = ReadOptions { lenient, offset: 0 };
    let mut padded = false;
    // The reader of the stream reports its errors.
    let mut walk = Walk::open_seeking(image.again()?, options).ok()?;
    while let Some(step) = walk.next_step().ok()? {
        let Content::PageData(body) = step.content else {
            continue;
        };
        if body.pages() == 0 {
            continue;
        }
        if !body.pages_offset().is_multiple_of(ALIGNMENT) {
            return None;
        }
        padded |= leading_pads(body.entries().iter()) > 0;
    }
    let image_end = walk.offset();
    let mut start = TRAILER_MAGIC;
    let read = image.read_at(&mut start, image_end).ok()?;
    let trailer = read > 0;
    let ours = TRAILER_MAGIC.starts_with(&start[..read]) && image_end <= length;
    (padded && ours).then_some(LayoutError::FooterMissing { image_end, trailer })
}

/// Compares the records of a walk with the index.
#[derive(Debug)]
pub(crate) struct Compared<'m> {
    mapped: &'m Mapped,
    next: usize,
    /// Where the last record of the libxc stream ends.
    stream_end: u64,
}

impl<'m> Compared<'m> {
    pub(crate) fn new(mapped: &'m Mapped) -> Self {
        Self {
            mapped,
            next: 0,
            stream_end: 0,
        }
    }

    /// Called for each item of the file.
    ///
    /// # Errors
    ///
    /// The index has another record next.
    pub(crate) fn step(&mut self, step: &FileStep<'_, '_>) -> Result<(), BadImage> {
        match &step.content {
            Content::PageData(body) => self.pages(At::of(step), body.entries())?,
            Content::Record(_) => self.record(At::of(step)),
            _ => {}
        }
        Ok(())
    }

    /// Called for each PAGE_DATA record.
    fn pages(&mut self, at: At, entries: Entries<'_>) -> Result<(), BadImage> {
        let offset = at.offset;
        let differs = |what: &str, got: u64, expected: u64| match got == expected {
            true => Ok(()),
            false => Err(BadImage(format!(
                "PAGE_DATA at byte {offset:#x}: {what} is {got:#x}, but entry {} of the index says \
                 {expected:#x}; --ignore-index reads the image as a stream",
                self.next
            ))),
        };
        let Some(entry) = self.mapped.entries().get(self.next) else {
            return Err(self.missing());
        };
        differs("its offset", offset, entry.offset)?;
        differs("its length", 8 + at.length, entry.end() - entry.offset)?;
        differs("its count", entries.len() as u64, entry.entries.into())?;
        let pads = leading_pads(entries.iter());
        differs("its number of pads", pads as u64, entry.pads.into())?;
        let pfns = || entries.iter().skip(pads).map(|entry| entry.pfn.0);
        let (first, last) = (entry.first_pfn.0, entry.last_pfn.0);
        differs("its lowest pfn", pfns().min().unwrap_or(0), first)?;
        differs("its highest pfn", pfns().max().unwrap_or(0), last)?;
        self.next += 1;
        Ok(())
    }

    /// Called for each record of the libxc stream that is not PAGE_DATA.
    fn record(&mut self, at: At) {
        self.stream_end = (at.offset + 8).saturating_add(at.length.next_multiple_of(8));
    }

    /// Called at the end of the image.
    ///
    /// # Errors
    ///
    /// The index has another end, or more records.
    pub(crate) fn end(&self, bytes: u64) -> Result<(), BadImage> {
        let footer = self.mapped.footer();
        let bytes = match footer.room {
            None => bytes,
            // libxl's records follow.
            Some(_) => self.stream_end,
        };
        if self.next != self.mapped.entries().len() {
            return Err(self.missing());
        }
        match footer.image_end == bytes {
            true => Ok(()),
            false => Err(BadImage(format!(
                "the image ends at byte {bytes:#x}, but the index says at {:#x}; --ignore-index \
                 reads the image as a stream",
                footer.image_end
            ))),
        }
    }

    fn missing(&self) -> BadImage {
        BadImage(format!(
            "the index has {} PAGE_DATA records, but the image has {}; --ignore-index reads the \
             image as a stream",
            self.mapped.entries().len(),
            match self.next < self.mapped.entries().len() {
                true => format!("only {}", self.next),
                false => "more".to_owned(),
            }
        ))
    }
}
