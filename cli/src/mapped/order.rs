//! The pages of a mapped image in the order of a still save, if the image has them in another
//! order.

use std::io::{self, Read as _, Write};

use xsr_format::error::WriteError;
use xsr_format::frame::{PAGE_SIZE, PageEntry};
use xsr_format::layout::{LayoutError, Mapped};
use xsr_format::record::MAX_BATCH;
use xsr_format::transcode::{CopyError, ImageSink};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::storage::StorageCursor;

use super::own_position;
use crate::file::Input;

/// The pages, and the offset of each in the file.
#[derive(Debug)]
pub(crate) struct InOrder<'f> {
    image: &'f StorageCursor,
    /// Ascending by pfn.
    words: Vec<(PageEntry, u64)>,
    written: bool,
}

impl<'f> InOrder<'f> {
    /// The pages of an image with this index; `None` if they are in order already.
    ///
    /// # Errors
    ///
    /// As [`Mapped::in_order`].
    pub(crate) fn of(input: &'f Input, index: &Mapped) -> Result<Option<Self>, LayoutError> {
        if !index.footer().moved {
            return Ok(None);
        }
        let words = index.in_order(&mut own_position(&input.image)?)?;
        Ok(Some(Self {
            image: &input.image,
            words,
            written: false,
        }))
    }

    /// Writes all page records, on the first call: for each, calls `head` with its entries, and
    /// then `data` with its pages, in pieces.
    ///
    /// # Errors
    ///
    /// Those of `head` and `data`; [`CopyError::Read`] if the file cannot be read.
    pub(crate) fn write<S: ?Sized, E: From<CopyError>>(
        &mut self,
        sink: &mut S,
        mut head: impl FnMut(&mut S, &[PageEntry]) -> Result<(), E>,
        mut data: impl FnMut(&mut S, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if std::mem::replace(&mut self.written, true) {
            return Ok(());
        }
        let group = |word: &(PageEntry, u64)| word.0.pfn.0 / MAX_BATCH as u64;
        let mut room = Vec::new();
        for batch in self.words.chunk_by(|a, b| group(a) == group(b)) {
            let entries: Vec<PageEntry> = batch.iter().map(|(entry, _)| *entry).collect();
            head(sink, &entries)?;
            let places = batch.iter().filter(|(entry, _)| entry.page_type.has_data());
            let places: Vec<u64> = places.map(|(_, at)| *at).collect();
            for run in places.chunk_by(|a, b| a + PAGE_SIZE as u64 == *b) {
                room.resize(run.len() * PAGE_SIZE, 0);
                let read = self.image.read_exact_at(&mut room, run[0]);
                read.map_err(CopyError::Read)?;
                data(sink, &room)?;
            }
        }
        Ok(())
    }
}

/// A sink that writes the pages in order, in whatever order they come.
#[derive(Debug)]
pub(crate) struct Reordered<'f, W> {
    pub(crate) sink: W,
    pub(crate) pages: InOrder<'f>,
}

impl<W: ImageSink> Write for Reordered<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// A failure to write the pages in order.
struct Failed(WriteError);

impl From<CopyError> for Failed {
    fn from(error: CopyError) -> Self {
        let (CopyError::Read(error) | CopyError::Write(error)) = error;
        Self(WriteError::Io(error))
    }
}

impl<W: ImageSink> ImageSink for Reordered<'_, W> {
    fn xl_header(&mut self, header: &XlHeader) -> io::Result<()> {
        self.sink.xl_header(header)
    }

    fn emulator_context(&mut self, state: &[u8]) -> io::Result<bool> {
        self.sink.emulator_context(state)
    }

    /// Writes all page records in place of the first.
    fn page_data(&mut self, _: &[PageEntry]) -> Result<(), WriteError> {
        let head = |sink: &mut W, entries: &[PageEntry]| sink.page_data(entries).map_err(Failed);
        let data = |sink: &mut W, bytes: &[u8]| {
            let written = sink.write_all(bytes);
            written.map_err(|error| Failed(WriteError::Io(error)))
        };
        let written = self.pages.write(&mut self.sink, head, data);
        written.map_err(|Failed(error)| error)
    }
}

/// Skips the pages of a record, which [`Reordered`] reads elsewhere.
pub(crate) fn pass_over<W>(
    source: &mut &StorageCursor,
    bytes: u64,
    _: &mut Reordered<'_, W>,
) -> Result<u64, CopyError> {
    io::copy(&mut source.take(bytes), &mut io::sink()).map_err(CopyError::Read)
}
