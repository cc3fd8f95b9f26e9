//! What an image says of each pfn in the end: its type, and where in the file its
//! contents are. A pfn may come many times in a stream; the last word counts.
//!
//! Neighbours are kept as one run, so that the map of an ordinary image is small
//! whatever the size of the guest.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use xsr_format::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};

const PAGE: u64 = PAGE_SIZE as u64;

/// Neighbouring pfns of one type, whose contents (if their type has any) stand one
/// behind the other in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First pfn.
    pub(crate) first: u64,
    /// Last pfn.
    pub(crate) last: u64,
    /// Their type.
    pub(crate) page_type: PageType,
    /// Where the contents of the first are in the file; of no meaning for a type
    /// without data.
    pub(crate) offset: u64,
}

impl Run {
    /// Number of pfns.
    pub(crate) fn pages(&self) -> u64 {
        self.last - self.first + 1
    }

    /// Where the contents of `pfn`, one of the run, are.
    pub(crate) fn offset_of(&self, pfn: u64) -> Option<u64> {
        let into = (pfn - self.first) * PAGE;
        self.page_type.has_data().then_some(self.offset + into)
    }

    /// The part of the run from `first` to `last`, both in it.
    pub(crate) fn part(&self, first: u64, last: u64) -> Self {
        Self {
            first,
            last,
            page_type: self.page_type,
            offset: self.offset + (first - self.first) * PAGE,
        }
    }

    /// Whether `next` carries on where this one ends.
    fn goes_on_with(&self, next: &Self) -> bool {
        self.last + 1 == next.first
            && self.page_type == next.page_type
            && (!self.page_type.has_data() || self.offset + self.pages() * PAGE == next.offset)
    }
}

/// A run without its first pfn, which is its key in [`PageMap`]: a third less than a [`Run`],
/// because an image can hold millions.
#[derive(Clone, Copy, Debug)]
struct Rest {
    last: u64,
    /// The offset, and the type in the lowest four bits.
    place: u64,
}

impl Rest {
    fn of(run: &Run) -> Self {
        Self {
            last: run.last,
            place: run.offset << 4 | u64::from(run.page_type.nibble()),
        }
    }

    fn behind(self, first: u64) -> Run {
        let [nibble, ..] = self.place.to_le_bytes();
        Run {
            first,
            last: self.last,
            page_type: PageType::from_nibble(nibble & 0xf),
            offset: self.place >> 4,
        }
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

/// Every pfn an image mentions, as [`Run`]s.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageMap {
    /// By first pfn; runs do not overlap.
    runs: BTreeMap<u64, Rest>,
}

impl PageMap {
    /// Take note of what the stream says now; earlier words on the same pfns are
    /// forgotten.
    pub(crate) fn insert(&mut self, run: Run) {
        self.clear(run.first..=run.last);
        let mut run = run;
        if let Some((first, before)) = self.runs.range(..run.first).next_back()
            && let before = before.behind(*first)
            && before.goes_on_with(&run)
        {
            run.first = before.first;
            run.offset = before.offset;
        }
        if let Some(behind) = self.runs.get(&(run.last + 1))
            && let behind = behind.behind(run.last + 1)
            && run.goes_on_with(&behind)
        {
            self.runs.remove(&behind.first);
            run.last = behind.last;
        }
        self.put(run);
    }

    /// As [`PageMap::insert`], for a caller that asks only for [`PageMap::populated`]: pages without
    /// memory are forgotten, so that an image of nothing but those takes none.
    pub(crate) fn insert_populated(&mut self, run: Run) {
        match run.page_type.is_populated() {
            true => self.insert(run),
            false => self.clear(run.first..=run.last),
        }
    }

    fn put(&mut self, run: Run) {
        self.runs.insert(run.first, Rest::of(&run));
    }

    /// Forget a range.
    fn clear(&mut self, range: RangeInclusive<u64>) {
        let (first, last) = range.into_inner();
        if let Some(before) = self.run_at(first)
            && before.first < first
        {
            self.put(before.part(before.first, first - 1));
            self.put(before.part(first, before.last));
        }
        if let Some(behind) = self.run_at(last)
            && behind.last > last
        {
            self.put(behind.part(behind.first, last));
            self.put(behind.part(last + 1, behind.last));
        }
        let covered: Vec<u64> = self.runs.range(first..=last).map(|(at, _)| *at).collect();
        for at in covered {
            self.runs.remove(&at);
        }
    }

    /// The run that holds `pfn`.
    fn run_at(&self, pfn: u64) -> Option<Run> {
        let (first, run) = self.runs.range(..=pfn).next_back()?;
        (run.last >= pfn).then(|| run.behind(*first))
    }

    /// The type of a page and where its contents are.
    pub(crate) fn get(&self, pfn: Pfn) -> Option<(PageType, Option<u64>)> {
        let run = self.run_at(pfn.0)?;
        Some((run.page_type, run.offset_of(pfn.0)))
    }

    /// All runs, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        self.runs.iter().map(|(first, run)| run.behind(*first))
    }

    /// How many pfns have the type, for each type that occurs.
    pub(crate) fn counts(&self) -> TypeCounts {
        let mut counts = TypeCounts::default();
        for run in self.runs() {
            counts.add(run.page_type, run.pages());
        }
        counts
    }

    /// How many pages a restorer allocates.
    pub(crate) fn populated(&self) -> u64 {
        self.runs()
            .filter(|run| run.page_type.is_populated())
            .map(|run| run.pages())
            .sum()
    }
}

/// How many entries there are of each type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TypeCounts([u64; 16]);

impl TypeCounts {
    /// Count `pages` more of a type.
    pub(crate) fn add(&mut self, page_type: PageType, pages: u64) {
        self.0[usize::from(page_type.nibble())] += pages;
    }

    /// The types that occur, ascending, and how often.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageType, u64)> {
        (0_u8..)
            .zip(self.0)
            .filter(|(_, pages)| *pages > 0)
            .map(|(nibble, pages)| (PageType::from_nibble(nibble), pages))
    }

    /// All entries.
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

    /// Against a plain map from pfn to what was said last, for batches that overlap
    /// in every way.
    #[test]
    fn the_last_word_counts() {
        let mut state = 1_u64;
        let mut random = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        let mut map = PageMap::default();
        let mut plain: BTreeMap<u64, (PageType, Option<u64>)> = BTreeMap::new();
        for round in 0..2000 {
            let first = random(60);
            let page_type = [N, T, X][usize::try_from(random(3)).unwrap_or(0)];
            let batch: Vec<(u64, PageType)> = (first..=first + random(12))
                .map(|pfn| (pfn, if random(8) == 0 { X } else { page_type }))
                .collect();
            let mut at = round << 20;
            for &(pfn, page_type) in &batch {
                let data = page_type.has_data();
                plain.insert(pfn, (page_type, data.then_some(at)));
                at += PAGE * u64::from(data);
            }
            for run in runs_of(entries(&batch), round << 20) {
                map.insert(run);
            }
            let got: BTreeMap<u64, _> = map
                .runs()
                .flat_map(|run| {
                    (run.first..=run.last)
                        .map(move |pfn| (pfn, (run.page_type, run.offset_of(pfn))))
                })
                .collect();
            assert_eq!(got, plain, "round {round}");
        }
        assert_eq!(map.counts().total(), plain.len() as u64);
        let populated = plain.values().filter(|(t, _)| t.is_populated()).count();
        assert_eq!(map.populated(), populated as u64);
        assert_eq!(map.get(Pfn(1 << 40)), None);
    }

    #[test]
    fn pages_without_memory_are_forgotten_by_those_who_count_memory() {
        let (mut all, mut some) = (PageMap::default(), PageMap::default());
        let batches = [&[(1, N), (2, N), (3, X), (9, X)][..], &[(2, X), (9, T)]];
        for batch in batches {
            for run in runs_of(entries(batch), 0) {
                all.insert(run);
                some.insert_populated(run);
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
            });
        }
        assert_eq!(map.runs().count(), 1);
    }
}
