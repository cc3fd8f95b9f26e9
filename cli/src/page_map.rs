//! Page map: the final type of each pfn in an image, and the offset of its contents in the file. A
//! pfn may occur many times in a stream; its last version counts.
//!
//! Neighbours are kept as one run, so that the map of an ordinary image is small whatever the size
//! of the guest. Runs are packed, so that even the map of a malicious image takes only eight bytes
//! for each page in the image.

use std::collections::BTreeMap;

use xsr_format::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};

use self::block::Block;
use crate::exit::BadImage;

mod block;

const PAGE: u64 = PAGE_SIZE as u64;

/// Neighbouring pfns of one type, whose contents (if their type has any) are contiguous in the
/// file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First pfn.
    pub(crate) first: u64,
    /// Last pfn.
    pub(crate) last: u64,
    /// Their type.
    pub(crate) page_type: PageType,
    /// The offset of the first one's contents in the file; meaningless for a type without data.
    pub(crate) offset: u64,
}

impl Run {
    /// Number of pfns.
    pub(crate) fn pages(&self) -> u64 {
        self.last - self.first + 1
    }

    /// The offset of the contents of `pfn`, which is in the run.
    pub(crate) fn offset_of(&self, pfn: u64) -> Option<u64> {
        let into = (pfn - self.first) * PAGE;
        self.page_type.has_data().then_some(self.offset + into)
    }

    /// The part of the run from `first` to `last`, both of which are in it.
    pub(crate) fn part(&self, first: u64, last: u64) -> Self {
        Self {
            first,
            last,
            page_type: self.page_type,
            offset: self.offset + (first - self.first) * PAGE,
        }
    }

    /// Whether `next` continues this run.
    fn goes_on_with(&self, next: &Self) -> bool {
        self.last + 1 == next.first
            && self.page_type == next.page_type
            && (!self.page_type.has_data() || self.offset + self.pages() * PAGE == next.offset)
    }
}

/// The runs of one batch of entries, whose page data begins at `offset`.
pub(crate) fn runs_of(
    entries: impl Iterator<Item = PageEntry>,
    offset: u64,
) -> impl Iterator<Item = Run> {
    let mut next_data = offset;
    let mut entries = entries
        .map(move |entry| {
            let run = Run {
                first: entry.pfn.0,
                last: entry.pfn.0,
                page_type: entry.page_type,
                offset: next_data,
            };
            next_data += PAGE * u64::from(entry.page_type.has_data());
            run
        })
        .peekable();
    std::iter::from_fn(move || {
        let mut run = entries.next()?;
        while let Some(next) = entries.next_if(|next| run.goes_on_with(next)) {
            run.last = next.last;
        }
        Some(run)
    })
}

/// The most bytes that all maps of a command may take for pages without contents in the image.
const MOST_WITHOUT_CONTENTS: u64 = 64 << 20;
/// Bytes that a block takes besides its runs: its map entry, and the allocator's overhead.
const BLOCK: u64 = 120;

/// Every pfn an image mentions, as [`Run`]s: at most eight bytes for each page with contents,
/// and [`MOST_WITHOUT_CONTENTS`] for all others.
#[derive(Clone, Debug)]
pub(crate) struct PageMap {
    /// Blocks by the first pfn of their range, which ends where the next block's begins. Pfn 0 is
    /// in the range of the first block. No run is in two ranges.
    blocks: BTreeMap<u64, Block>,
    /// Bytes in all blocks.
    bytes: u64,
    /// Pages with contents so far.
    pages: u64,
    /// The most bytes for all other pages.
    without_contents: u64,
}

impl Default for PageMap {
    fn default() -> Self {
        Self {
            blocks: BTreeMap::new(),
            bytes: 0,
            pages: 0,
            without_contents: MOST_WITHOUT_CONTENTS,
        }
    }
}

impl PageMap {
    /// Add a run, which replaces earlier versions of the same pfns.
    ///
    /// # Errors
    ///
    /// There are too many scattered pfns without contents to keep.
    pub(crate) fn insert(&mut self, run: Run) -> Result<(), BadImage> {
        if run.page_type.has_data() {
            self.pages += run.pages();
        }
        self.replace((run.first, run.last), Some(run));
        let taken = self.bytes + BLOCK * self.blocks.len() as u64;
        match taken <= 8 * self.pages + self.without_contents {
            true => Ok(()),
            false => Err(BadImage(
                "it names too many single pfns without contents (XTAB, XALLOC, BROKEN): no guest \
                 has memory with so many holes"
                    .to_owned(),
            )),
        }
    }

    /// As [`PageMap::insert`], for a caller that needs only [`PageMap::populated`]: pages without
    /// memory are dropped, so that an image of nothing else takes no space.
    ///
    /// # Errors
    ///
    /// As for [`PageMap::insert`].
    pub(crate) fn insert_populated(&mut self, run: Run) -> Result<(), BadImage> {
        if !run.page_type.is_populated() {
            self.replace((run.first, run.last), None);
            return Ok(());
        }
        self.insert(run)
    }

    /// Replace a range by `run`, which covers exactly that range.
    fn replace(&mut self, (first, last): (u64, u64), run: Option<Run>) {
        // The run goes into the block of its first pfn, whose range is extended to cover all of it.
        while first < last
            && let Some((&key, _)) = self.blocks.range(first + 1..=last).next_back()
            && let Some(mut block) = self.blocks.remove(&key)
        {
            self.bytes -= block.len() as u64;
            self.put(last + 1, block.split_behind(key, last));
        }
        let before = self.blocks.range_mut(..=first).next_back();
        let (key, block) = match before {
            Some((key, block)) => (*key, block),
            None => (0, self.blocks.entry(0).or_default()),
        };
        let bytes = block.len() as u64;
        block.replace(key, (first, last), run);
        let split = block.too_full(key, first).map(|last| {
            let behind = block.split_behind(key, last);
            (last + 1, behind)
        });
        self.bytes = self.bytes - bytes + block.len() as u64;
        if let Some((key, behind)) = split {
            self.put(key, behind);
        }
    }

    fn put(&mut self, key: u64, block: Block) {
        if !block.is_empty() {
            self.bytes += block.len() as u64;
            self.blocks.insert(key, block);
        }
    }

    /// The run that contains `pfn`.
    fn run_at(&self, pfn: u64) -> Option<Run> {
        let (key, block) = self.blocks.range(..=pfn).next_back()?;
        let run = block.runs(*key).find(|run| run.last >= pfn)?;
        (run.first <= pfn).then_some(run)
    }

    /// The type of a page and the offset of its contents.
    pub(crate) fn get(&self, pfn: Pfn) -> Option<(PageType, Option<u64>)> {
        let run = self.run_at(pfn.0)?;
        Some((run.page_type, run.offset_of(pfn.0)))
    }

    /// All runs, ascending, with contiguous neighbours joined.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        let mut runs = (self.blocks.iter())
            .flat_map(|(key, block)| block.runs(*key))
            .peekable();
        std::iter::from_fn(move || {
            let mut run = runs.next()?;
            while let Some(next) = runs.next_if(|next| run.goes_on_with(next)) {
                run.last = next.last;
            }
            Some(run)
        })
    }

    /// The number of pfns of each type that occurs.
    pub(crate) fn counts(&self) -> TypeCounts {
        let mut counts = TypeCounts::default();
        for run in self.runs() {
            counts.add(run.page_type, run.pages());
        }
        counts
    }

    /// The number of pages that a restore allocates.
    pub(crate) fn populated(&self) -> u64 {
        self.runs()
            .filter(|run| run.page_type.is_populated())
            .map(|run| run.pages())
            .sum()
    }
}

/// The number of entries of each type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TypeCounts([u64; 16]);

impl TypeCounts {
    /// Count `pages` more of a type.
    pub(crate) fn add(&mut self, page_type: PageType, pages: u64) {
        self.0[usize::from(page_type.nibble())] += pages;
    }

    /// The types that occur, ascending, and their counts.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageType, u64)> {
        (0_u8..)
            .zip(self.0)
            .filter(|(_, pages)| *pages > 0)
            .map(|(nibble, pages)| (PageType::from_nibble(nibble), pages))
    }

    /// The total number of entries.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(list: &[(u64, PageType)]) -> impl Iterator<Item = PageEntry> {
        list.iter().map(|&(pfn, page_type)| PageEntry {
            pfn: Pfn(pfn),
            page_type,
        })
    }

    const N: PageType = PageType::NOTAB;
    const T: PageType = PageType::L1TAB;
    const X: PageType = PageType::XTAB;

    #[test]
    fn a_batch_falls_into_runs_with_the_right_offsets() {
        let batch = [(4, N), (5, N), (6, X), (7, X), (8, T), (10, N)];
        let runs: Vec<Run> = runs_of(entries(&batch), 0x1000).collect();
        let spans: Vec<(u64, u64)> = runs.iter().map(|r| (r.first, r.last)).collect();
        assert_eq!(spans, [(4, 5), (6, 7), (8, 8), (10, 10)]);
        assert_eq!(runs[0].offset_of(5), Some(0x2000));
        assert_eq!(runs[1].offset_of(6), None);
        assert_eq!(runs[2].offset_of(8), Some(0x3000));
        assert_eq!(runs[3].offset_of(10), Some(0x4000));
    }

    /// Pseudo-random numbers below a bound.
    fn random() -> impl FnMut(u64) -> u64 {
        let mut state = 1_u64;
        move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        }
    }

    /// Compared with a plain map from pfn to last version, for batches that overlap in every way:
    /// in a few pfns, and in many blocks of them.
    #[test]
    fn the_last_word_counts() {
        for (pfns, most, compare_each) in [(60, 12, 1), (12_000, 12, 500), (12_000, 3000, 500)] {
            let mut random = random();
            let mut map = PageMap::default();
            let mut plain: BTreeMap<u64, (PageType, Option<u64>)> = BTreeMap::new();
            for round in 0..4000 {
                let first = random(pfns);
                // A long batch now and then, which removes whole blocks.
                let most = if round % 50 == 0 { most } else { most.min(12) };
                let page_type = [N, T, X][usize::try_from(random(3)).unwrap_or(0)];
                let batch: Vec<(u64, PageType)> = (first..=first + random(most))
                    .map(|pfn| (pfn, if random(8) == 0 { X } else { page_type }))
                    .collect();
                let mut at = round << 32;
                for &(pfn, page_type) in &batch {
                    let data = page_type.has_data();
                    plain.insert(pfn, (page_type, data.then_some(at)));
                    at += PAGE * u64::from(data);
                }
                for run in runs_of(entries(&batch), round << 32) {
                    map.insert(run).expect("few pages");
                }
                if round % 7 == 0 {
                    let (first, last) = (random(pfns), random(pfns / 8));
                    let last = first + last;
                    map.replace((first, last), None);
                    plain.retain(|pfn, _| !(first..=last).contains(pfn));
                }
                if round % compare_each != 0 {
                    continue;
                }
                let got: BTreeMap<u64, _> = map
                    .runs()
                    .flat_map(|run| {
                        (run.first..=run.last)
                            .map(move |pfn| (pfn, (run.page_type, run.offset_of(pfn))))
                    })
                    .collect();
                assert_eq!(got, plain, "round {round}");
                let pfn = random(pfns);
                assert_eq!(map.get(Pfn(pfn)), plain.get(&pfn).copied());
                let bytes: usize = map.blocks.values().map(Block::len).sum();
                assert_eq!(map.bytes, bytes as u64);
            }
            assert_eq!(map.counts().total(), plain.len() as u64);
            let populated = plain.values().filter(|(t, _)| t.is_populated()).count();
            assert_eq!(map.populated(), populated as u64);
            assert_eq!(map.get(Pfn(1 << 40)), None);
        }
    }

    /// Pages of one record each, with offsets in no order, over the widest range that x86 has:
    /// their memory, including the overhead of a block in map and allocator.
    #[test]
    fn scattered_pages_take_eight_bytes() {
        const PAGES: u64 = 1 << 16;
        // So few pages in so wide a range need four bytes of pfn each, for which a map has room.
        for (pfns, bytes) in [(2 * PAGES, 8), (1 << 40, 10)] {
            let mut random = random();
            let mut map = PageMap::default();
            for _ in 0..PAGES {
                let pfn = random(1 << 20) * (pfns >> 20).max(1) + random(pfns.min(1 << 20));
                let run = Run {
                    first: pfn % pfns,
                    last: pfn % pfns,
                    page_type: N,
                    offset: random(PAGES) * 4120,
                };
                map.insert(run).expect("pages with contents");
            }
            let held: usize = (map.blocks.values())
                .map(|block| block.capacity() + usize::try_from(BLOCK).unwrap_or(0))
                .sum();
            let pages = map.counts().total();
            assert!(held as u64 <= bytes * pages, "{held} for {pages}");
        }
    }

    /// Counts the runs that are decoded when this many pages are inserted, in the order that `pfn`
    /// gives.
    fn looked_at(pages: u64, pfn: impl Fn(u64) -> u64) -> u64 {
        let before = block::DECODED.get();
        let mut map = PageMap::default();
        for n in 0..pages {
            let run = Run {
                first: pfn(n),
                last: pfn(n),
                page_type: N,
                offset: n % 7 * 4120,
            };
            map.insert(run).expect("pages with contents");
        }
        assert_eq!(map.counts().total(), pages);
        block::DECODED.get() - before
    }

    #[test]
    fn many_pages_take_time_in_their_number() {
        const FEW: u64 = 1 << 14;
        // In any order, a part of one block; in ascending or descending order, hardly more than one
        // run.
        type Order = fn(u64) -> u64;
        let orders: [(Order, u64); 3] = [
            (|n| 2 * n, 12),
            (|n| (1 << 30) - 2 * n, 12),
            (|n| n * 0x9e37_79b1 % (1 << 32), 256),
        ];
        for (order, each) in orders {
            let (few, many) = (looked_at(FEW, order), looked_at(4 * FEW, order));
            assert!(many <= 5 * few, "{few}, then {many}");
            assert!(many <= each * 4 * FEW, "{many}");
        }
    }

    #[test]
    fn pages_that_are_not_there_take_a_bounded_amount() {
        let mut map = PageMap {
            without_contents: 1 << 20,
            ..PageMap::default()
        };
        let hole = |pfn: u64, page_type| Run {
            first: pfn,
            last: pfn,
            page_type,
            offset: 0,
        };
        // Every second page of a stretch is missing: two bytes each.
        for pfn in 0..1 << 17 {
            map.insert(hole(2 * pfn, X)).expect("not too many");
        }
        assert!(map.bytes < 3 << 17, "{}", map.bytes);
        let refused = (0..1 << 40)
            .step_by(1 << 15)
            .position(|pfn| map.insert(hole(pfn, PageType::XALLOC)).is_err());
        assert!(refused.is_some_and(|pages| pages > 1 << 16), "{refused:?}");
        let all = map.bytes + BLOCK * map.blocks.len() as u64;
        assert!(all <= (1 << 20) + 1024, "{all}");
    }

    #[test]
    fn pages_without_memory_are_forgotten_by_those_who_count_memory() {
        let (mut all, mut some) = (PageMap::default(), PageMap::default());
        let batches = [&[(1, N), (2, N), (3, X), (9, X)][..], &[(2, X), (9, T)]];
        for batch in batches {
            for run in runs_of(entries(batch), 0) {
                all.insert(run).expect("few pages");
                some.insert_populated(run).expect("few pages");
            }
        }
        assert_eq!((all.populated(), some.populated()), (2, 2));
        assert_eq!(some.runs().count(), 2);
    }

    #[test]
    fn neighbours_are_one_run() {
        let mut map = PageMap::default();
        for (first, offset) in [(0, 0), (2, 2 * PAGE), (1, PAGE)] {
            map.insert(Run {
                first,
                last: first,
                page_type: N,
                offset,
            })
            .expect("few pages");
        }
        assert_eq!(map.runs().count(), 1);
    }
}
