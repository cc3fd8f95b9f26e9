//! Assembly of compressed checkpoints: batches are announced first. Their contents follow later, in
//! one run of bytes that is cut into chunks at any point.

use std::collections::VecDeque;
use std::mem;

use super::{LegacyError, RecordWriter};
use crate::frame::{PAGE_SIZE, Page, Pfn};
use crate::legacy::compress::{PageCache, decode};
use crate::legacy::items::{Batch, MAX_PENDING_PAGES};

/// Batches that wait for their contents.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    cache: PageCache,
    waiting: VecDeque<Batch>,
    /// Contents of the first waiting batch that have arrived.
    pages: Vec<Box<Page>>,
    /// Number of pages without contents.
    lacking: usize,
    /// Bytes of an incomplete page.
    carry: Vec<u8>,
}

impl Assembly {
    /// Adds an announced batch.
    pub(super) fn expect(&mut self, batch: Batch) -> Result<(), LegacyError> {
        let pages = usize::try_from(batch.pages).unwrap_or(usize::MAX);
        self.lacking = self.lacking.saturating_add(pages);
        if self.lacking > MAX_PENDING_PAGES {
            return Err(LegacyError::TooManyPending);
        }
        for entry in &batch.entries {
            if entry.page_type.table_level().is_some() {
                self.cache.forget(entry.pfn);
            }
        }
        if !batch.entries.is_empty() {
            self.waiting.push_back(batch);
        }
        Ok(())
    }

    /// The first page without contents, and whether the sender remembers it.
    fn next_page(&self) -> Option<(Pfn, bool)> {
        let batch = self.waiting.front()?;
        let entry = batch
            .entries
            .iter()
            .filter(|entry| entry.page_type.has_data())
            .nth(self.pages.len())?;
        Some((entry.pfn, entry.page_type.table_level().is_none()))
    }

    /// Takes contents that have arrived.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        writer: &mut RecordWriter<Vec<u8>>,
    ) -> Result<(), LegacyError> {
        let mut buffer = mem::take(&mut self.carry);
        buffer.extend_from_slice(bytes);
        let mut rest = buffer.as_slice();
        while let Some((pfn, remembered)) = self.next_page() {
            let mut page = Box::new([0; PAGE_SIZE]);
            let Some(used) = decode(rest, pfn, self.cache.get(pfn), &mut page)? else {
                break;
            };
            let (_, behind) = rest.split_at(used);
            rest = behind;
            if remembered {
                self.cache.put(pfn, &page);
            }
            self.pages.push(page);
            self.lacking = self.lacking.saturating_sub(1);
            self.write_complete(writer)?;
        }
        self.carry = rest.to_vec();
        Ok(())
    }

    /// Writes the complete batches at the front.
    pub(super) fn write_complete(
        &mut self,
        writer: &mut RecordWriter<Vec<u8>>,
    ) -> Result<(), LegacyError> {
        while let Some(batch) = self.waiting.front() {
            if (self.pages.len() as u64) < batch.pages {
                break;
            }
            let pages: Vec<&Page> = self.pages.iter().map(|page| &**page).collect();
            writer.page_data(&batch.entries, &pages)?;
            self.pages.clear();
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Checks a part of a chunk, of which `left` bytes are still to come.
    pub(super) fn chunk_part(&self, left: u64) -> Result<(), LegacyError> {
        match self.lacking == 0 && !self.carry.is_empty() {
            true => Err(LegacyError::CompressedTooLong {
                left: left.saturating_add(self.carry.len() as u64),
            }),
            false => Ok(()),
        }
    }

    /// Checks that no page lacks its contents at the end of the body.
    pub(super) fn body_end(&self) -> Result<(), LegacyError> {
        match self.lacking {
            0 => Ok(()),
            pages => Err(LegacyError::CompressedMissing {
                pages: pages as u64,
            }),
        }
    }
}
