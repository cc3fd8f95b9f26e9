//! A writer of a mapped image that shares the pages which another image has already: on a file
//! system with reflinks, they take no room and are not written.
//!
//! Which pages these are is decided by what is written, and never by a log of what a guest has
//! changed: by the page digests of the other image, or by its contents where it has none. The new
//! image is whole by itself, and the other one can be removed.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use xsr_format::frame::{PAGE_SIZE, Page};
use xsr_format::layout::index::{IndexEntry, PAGE_DIGEST_BYTES};
use xsr_format::layout::write::page_digest;

use crate::storage::{Durability, Shape, StorageError, StorageReader, StorageWriter};

const PAGE: u64 = PAGE_SIZE as u64;

/// The first bytes of the BLAKE3 of a page.
type Digest = [u8; PAGE_DIGEST_BYTES];

/// What is known of the pages of an image with page digests: 28 bytes of memory for each.
#[derive(Default)]
pub struct BasePages {
    /// The offset of each page and its digest, in the order of the file.
    pages: Vec<(u64, Digest)>,
    /// Their positions above, in the order of their digests.
    by_digest: Vec<u32>,
}

impl fmt::Debug for BasePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BasePages")
            .field("pages", &self.pages.len())
            .finish_non_exhaustive()
    }
}

impl BasePages {
    /// The pages of an image with this index and these page digests, both in the order of the file.
    pub fn new(index: &[IndexEntry], digests: &[u8]) -> Self {
        let (digests, _) = digests.as_chunks();
        let offsets = index.iter().flat_map(|entry| {
            let data = entry.data_offset();
            (0..u64::from(entry.pages)).map(move |page| data.saturating_add(page * PAGE))
        });
        let pages: Vec<(u64, Digest)> = offsets.zip(digests.iter().copied()).collect();
        let count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        let mut by_digest: Vec<u32> = (0..count).collect();
        by_digest.sort_by_key(|at| pages[*at as usize].1);
        Self { pages, by_digest }
    }

    /// Where a page with these contents is: at this offset, if there are several.
    fn find(&self, page: &Page, offset: u64) -> Option<u64> {
        let digest = page_digest(page);
        if let Ok(at) = self
            .pages
            .binary_search_by_key(&offset, |(offset, _)| *offset)
            && self.pages[at].1 == digest
        {
            return Some(offset);
        }
        let digest_of = |at: &u32| self.pages[*at as usize].1;
        let at = self
            .by_digest
            .binary_search_by_key(&digest, digest_of)
            .ok()?;
        Some(self.pages[self.by_digest[at] as usize].0)
    }
}

/// How pages of the other image are recognised.
#[derive(Debug)]
pub enum Recognise {
    /// By their digests, at any place.
    Digests(BasePages),
    /// By their contents, which are read at the place that is written.
    Contents,
}

/// The writer.
#[derive(Debug)]
pub struct OntoWriter<'w> {
    to: &'w dyn StorageWriter,
    base: &'w dyn StorageReader,
    how: Recognise,
    shared: AtomicU64,
    written: AtomicU64,
}

impl<'w> OntoWriter<'w> {
    /// Writes to `to`, an empty image with slots, and shares what `base` has.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unsupported`]: the two cannot share; then `to` is empty still.
    pub fn new(
        to: &'w dyn StorageWriter,
        base: &'w dyn StorageReader,
        how: Recognise,
    ) -> Result<Self, StorageError> {
        // Only a trial tells whether the file system shares.
        to.clone_range(base, 0..base.length().min(PAGE), 0)?;
        to.set_length(0)?;
        Ok(Self {
            to,
            base,
            how,
            shared: AtomicU64::new(0),
            written: AtomicU64::new(0),
        })
    }

    /// How many pages were shared so far. A page that was sent again counts again.
    pub fn shared_pages(&self) -> u64 {
        self.shared.load(Ordering::Relaxed)
    }

    /// How many pages were written so far.
    pub fn written_pages(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Where the other image has these pages, which are written from `offset` on.
    fn found(&self, pages: &[Page], offset: u64) -> Result<Vec<Option<u64>>, StorageError> {
        let places = pages.iter().zip((offset..).step_by(PAGE_SIZE));
        match &self.how {
            Recognise::Digests(known) => {
                Ok(places.map(|(page, at)| known.find(page, at)).collect())
            }
            Recognise::Contents => {
                let left = self.base.length().saturating_sub(offset) / PAGE;
                let there = pages.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let mut contents = vec![0; there * PAGE_SIZE];
                self.base.read_exact_at(&mut contents, offset)?;
                let (contents, _) = contents.as_chunks::<PAGE_SIZE>();
                let is_same = |(at, (page, place)): (usize, (&Page, u64))| {
                    contents.get(at).filter(|own| *own == page).map(|_| place)
                };
                Ok(places.enumerate().map(is_same).collect())
            }
        }
    }

    /// Writes or shares pages.
    fn write_pages(&self, pages: &[Page], offset: u64) -> Result<(), StorageError> {
        let found = self.found(pages, offset)?;
        let places: Vec<(&Page, Option<u64>)> = pages.iter().zip(found).collect();
        let follows = |a: &(&Page, Option<u64>), b: &(&Page, Option<u64>)| match (a.1, b.1) {
            (Some(a), Some(b)) => a + PAGE == b,
            (a, b) => a.is_none() && b.is_none(),
        };
        let mut at = offset;
        for run in places.chunk_by(follows) {
            let count = run.len() as u64;
            match run.first().and_then(|(_, base)| *base) {
                Some(from) => {
                    self.to
                        .clone_range(self.base, from..from + count * PAGE, at)?;
                    self.shared.fetch_add(count, Ordering::Relaxed);
                }
                None => {
                    let first = usize::try_from((at - offset) / PAGE).unwrap_or(0);
                    let bytes = pages[first..first + run.len()].as_flattened();
                    self.to.write_all_at(bytes, at)?;
                    self.written.fetch_add(count, Ordering::Relaxed);
                }
            }
            at += count * PAGE;
        }
        Ok(())
    }
}

impl Write for OntoWriter<'_> {
    /// An image with slots has no order.
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for OntoWriter<'_> {
    fn name(&self) -> String {
        self.to.name()
    }

    fn shape(&self) -> Shape {
        self.to.shape()
    }

    fn is_straight(&self) -> bool {
        self.to.is_straight()
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        match bytes.as_chunks::<PAGE_SIZE>() {
            (pages, []) if offset.is_multiple_of(PAGE) => self.write_pages(pages, offset),
            _ => self.to.write_all_at(bytes, offset),
        }
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.to.read_exact_at(buffer, offset)
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.to.punch(range)
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.to.set_length(length)
    }

    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: Range<u64>,
        to: u64,
    ) -> Result<(), StorageError> {
        self.to.clone_range(base, range, to)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.to.sync()
    }

    /// What is written there would not be shared.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn commit(self: Box<Self>, _: Durability) -> Result<(), StorageError> {
        Err(StorageError::Unsupported {
            name: self.to.name(),
            what: "is committed by the caller that made its writer",
        })
    }
}
