//! Decompression of pages that Remus sent as differences: runs of words to copy over the old page.
//!
//! | marker byte | meaning |
//! |---|---|
//! | 0x00, first of a page | the page has not changed |
//! | 0x80, first of a page | the whole page, 4096 bytes, follows |
//! | 0x01–0x7F | that many words (of 4 bytes) follow |
//! | 0x81–0xFF | that many words, less 0x80, are unchanged |
//!
//! A difference is relative to the page as it was last sent, which the sender kept in a cache of
//! 8192 pages. Pages outside the cache were sent whole. Keeping the same cache here is enough to
//! undo the differences, since the stream determines the order in which pages enter and leave it.
//!
//! C implementation: `tools/libxc/xc_compression.c` (Xen 4.5).

use std::collections::{BTreeMap, HashMap};

use super::error::LegacyError;
use crate::frame::{PAGE_SIZE, Page, Pfn};

/// Number of pages that the sender remembers (`DELTA_CACHE_SIZE`).
pub(super) const CACHE_PAGES: usize = 8192;

const FLAG_SKIP: u8 = 0x80;
const UNCHANGED: u8 = 0x00;
const WHOLE: u8 = 0x80;
const WORD: usize = 4;

/// The pages that the sender remembers, the most recently used last.
#[derive(Debug, Default)]
pub(super) struct PageCache {
    pages: HashMap<Pfn, (u64, Box<Page>)>,
    /// Ordered by last use.
    used: BTreeMap<u64, Pfn>,
    now: u64,
}

impl PageCache {
    /// The page as it was last sent.
    pub(super) fn get(&self, pfn: Pfn) -> Option<&Page> {
        self.pages.get(&pfn).map(|(_, page)| &**page)
    }

    /// Records that a page was sent.
    pub(super) fn put(&mut self, pfn: Pfn, page: &Page) {
        self.now = self.now.saturating_add(1);
        let evicted = match self.pages.remove(&pfn) {
            Some((time, room)) => {
                self.used.remove(&time);
                Some(room)
            }
            None if self.pages.len() >= CACHE_PAGES => self.evict(),
            None => None,
        };
        let mut room = evicted.unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
        room.copy_from_slice(page);
        self.pages.insert(pfn, (self.now, room));
        self.used.insert(self.now, pfn);
    }

    /// Forgets a page that has become a page table: the sender does not remember those.
    pub(super) fn forget(&mut self, pfn: Pfn) {
        if let Some((time, _)) = self.pages.remove(&pfn) {
            self.used.remove(&time);
        }
    }

    fn evict(&mut self) -> Option<Box<Page>> {
        let (_, pfn) = self.used.pop_first()?;
        self.pages.remove(&pfn).map(|(_, room)| room)
    }
}

/// Decodes the contents of page `pfn` from the front of `bytes` into `page`; `base` is the old
/// page. Returns how many bytes that took, or `None` if there are not enough.
///
/// # Errors
///
/// Runs that do not add up to a page; a difference without a base.
pub(super) fn decode(
    bytes: &[u8],
    pfn: Pfn,
    base: Option<&Page>,
    page: &mut Page,
) -> Result<Option<usize>, LegacyError> {
    let Some((first, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    match *first {
        UNCHANGED => {
            page.copy_from_slice(base.ok_or(LegacyError::NoBase { pfn })?);
            return Ok(Some(1));
        }
        WHOLE => {
            let Some(whole) = rest.first_chunk::<PAGE_SIZE>() else {
                return Ok(None);
            };
            page.copy_from_slice(whole);
            return Ok(Some(PAGE_SIZE.saturating_add(1)));
        }
        _ => {}
    }
    let mut left = bytes;
    let mut at = 0_usize;
    while at < PAGE_SIZE {
        let Some((marker, behind)) = left.split_first() else {
            return Ok(None);
        };
        let run = usize::from(marker & !FLAG_SKIP).saturating_mul(WORD);
        if run == 0 {
            return Err(LegacyError::EmptyRun { pfn });
        }
        let end = at.saturating_add(run);
        let Some(room) = page.get_mut(at..end) else {
            let bytes = end as u64;
            return Err(LegacyError::RunOverPage { pfn, bytes });
        };
        if marker & FLAG_SKIP == 0 {
            let Some((run, behind)) = behind.split_at_checked(run) else {
                return Ok(None);
            };
            room.copy_from_slice(run);
            left = behind;
        } else {
            let base = base.ok_or(LegacyError::NoBase { pfn })?;
            for (to, from) in room.iter_mut().zip(base.iter().skip(at)) {
                *to = *from;
            }
            left = behind;
        }
        at = end;
    }
    Ok(Some(bytes.len().saturating_sub(left.len())))
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )]

    use super::*;

    const P: Pfn = Pfn(7);

    fn decoded(
        bytes: &[u8],
        base: Option<&Page>,
    ) -> Result<Option<(usize, Box<Page>)>, LegacyError> {
        let mut page = Box::new([0xee; PAGE_SIZE]);
        let used = decode(bytes, P, base, &mut page)?;
        Ok(used.map(|used| (used, page)))
    }

    #[test]
    fn runs_are_copied_and_skipped() {
        let base: Page = std::array::from_fn(|i| u8::try_from(i % 251).unwrap());
        // Two words, skip 127 words seven times, then the rest, 133 words, in two runs.
        let mut bytes = vec![2];
        bytes.extend([0xaa; 8]);
        bytes.extend([0xff; 7]);
        bytes.push(127);
        bytes.extend([0xbb; 508]);
        bytes.push(0x80 | 6);
        let (used, page) = decoded(&bytes, Some(&base)).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        let mut expected = base;
        expected[..8].fill(0xaa);
        expected[8 + 7 * 508..8 + 8 * 508].fill(0xbb);
        assert_eq!(*page, expected);
        // Bytes of the next page are left alone; with too few bytes, more are awaited.
        bytes.extend([1, 2, 3]);
        assert_eq!(decoded(&bytes, Some(&base)).unwrap().unwrap().0, used);
        for short in 0..used {
            assert_eq!(decoded(&bytes[..short], Some(&base)), Ok(None), "{short}");
        }
        assert_eq!(decoded(&bytes, None), Err(LegacyError::NoBase { pfn: P }));
    }

    #[test]
    fn whole_and_unchanged_pages() {
        let base = [5; PAGE_SIZE];
        let whole = [&[0x80][..], &[9; PAGE_SIZE]].concat();
        let (used, page) = decoded(&whole, None).unwrap().unwrap();
        assert_eq!((used, *page), (4097, [9; PAGE_SIZE]));
        let (used, page) = decoded(&[0, 1], Some(&base)).unwrap().unwrap();
        assert_eq!((used, *page), (1, base));
        assert_eq!(decoded(&[0], None), Err(LegacyError::NoBase { pfn: P }));
    }

    #[test]
    fn runs_that_make_no_page_are_refused() {
        let base = [0; PAGE_SIZE];
        for marker in [0x00, 0x80] {
            let bytes = [0x81, marker, 1, 1];
            let error = LegacyError::EmptyRun { pfn: P };
            assert_eq!(decoded(&bytes, Some(&base)), Err(error));
        }
        let bytes = [0xff; 9];
        let error = LegacyError::RunOverPage {
            pfn: P,
            bytes: 9 * 508,
        };
        assert_eq!(decoded(&bytes, Some(&base)), Err(error));
    }

    /// The least recently used page is evicted first.
    #[test]
    fn the_cache_is_the_senders() {
        let mut cache = PageCache::default();
        for pfn in 0..CACHE_PAGES as u64 {
            cache.put(Pfn(pfn), &[1; PAGE_SIZE]);
        }
        cache.put(Pfn(0), &[2; PAGE_SIZE]);
        cache.put(Pfn(1 << 20), &[3; PAGE_SIZE]);
        assert_eq!(cache.get(Pfn(0)), Some(&[2; PAGE_SIZE]));
        assert_eq!(cache.get(Pfn(1)), None);
        assert!(cache.get(Pfn(2)).is_some());
        cache.forget(Pfn(2));
        cache.put(Pfn(2 << 20), &[4; PAGE_SIZE]);
        assert!(cache.get(Pfn(3)).is_some(), "there was room");
        assert_eq!(cache.get(Pfn(2)), None);
    }
}
