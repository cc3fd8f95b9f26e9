//! A set of pfns.

use std::collections::BTreeMap;

use xsr_format::frame::Pfn;

const WORDS: usize = 512;
const PFNS_PER_CHUNK: u64 = 64 * WORDS as u64;

/// Words that stand for 512 pfns: 2 MiB.
const RUN_WORDS: usize = 8;

/// A set of pfns. Takes 4 KiB for each 32768 pfns of which one is in the set
/// (1/32768 of the memory they stand for), however large the pfns are.
#[derive(Clone, Debug, Default)]
pub(crate) struct PfnBitmap {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
    /// A chunk that was looked for last and is not there: streams name a million absent pfns
    /// in a row.
    missing: Option<u64>,
}

impl PfnBitmap {
    fn place(pfn: Pfn) -> (u64, usize, u64) {
        let word = (pfn.0 % PFNS_PER_CHUNK) / 64;
        let word = usize::try_from(word).expect("below 512");
        (pfn.0 / PFNS_PER_CHUNK, word, 1 << (pfn.0 % 64))
    }

    /// Put `pfn` in; whether it was not there before.
    pub(crate) fn insert(&mut self, pfn: Pfn) -> bool {
        let (chunk, word, bit) = Self::place(pfn);
        if self.missing == Some(chunk) {
            self.missing = None;
        }
        let chunk = self
            .chunks
            .entry(chunk)
            .or_insert_with(|| Box::new([0; WORDS]));
        let new = chunk[word] & bit == 0;
        chunk[word] |= bit;
        new
    }

    /// Take `pfn` out.
    pub(crate) fn remove(&mut self, pfn: Pfn) {
        let (chunk, word, bit) = Self::place(pfn);
        if self.missing == Some(chunk) {
            return;
        }
        match self.chunks.get_mut(&chunk) {
            Some(chunk) => chunk[word] &= !bit,
            None => self.missing = Some(chunk),
        }
    }

    /// As [`PfnBitmap::contains`], quicker for many in a row that are not there.
    pub(crate) fn finds(&mut self, pfn: Pfn) -> bool {
        let (chunk, word, bit) = Self::place(pfn);
        if self.missing == Some(chunk) {
            return false;
        }
        let found = self.chunks.get(&chunk).map(|chunk| chunk[word] & bit != 0);
        if found.is_none() {
            self.missing = Some(chunk);
        }
        found.unwrap_or_default()
    }

    /// Whether `pfn` is in the set.
    pub(crate) fn contains(&self, pfn: Pfn) -> bool {
        let (chunk, word, bit) = Self::place(pfn);
        let chunk = self.chunks.get(&chunk);
        chunk.is_some_and(|chunk| chunk[word] & bit != 0)
    }

    /// The first pfns of the runs of 512 pfns, aligned, that are in the set whole;
    /// ascending.
    pub(crate) fn whole_runs(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.chunks.iter().flat_map(|(number, chunk)| {
            let runs = (0_u64..).zip(chunk.chunks_exact(RUN_WORDS));
            let whole = runs.filter(|(_, words)| words.iter().all(|word| *word == u64::MAX));
            whole.map(move |(run, _)| Pfn(number * PFNS_PER_CHUNK + run * 64 * RUN_WORDS as u64))
        })
    }

    /// The pfns in both sets, ascending.
    pub(crate) fn common<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Pfn> + 'a {
        self.chunks.iter().flat_map(move |(number, chunk)| {
            let theirs = other.chunks.get(number);
            let words = theirs.into_iter().flat_map(move |theirs| {
                let both = chunk.iter().zip(theirs.iter());
                (0_u64..).zip(both.map(|(one, other)| one & other))
            });
            words.flat_map(move |(word, bits)| {
                let first = number * PFNS_PER_CHUNK + word * 64;
                (0..64)
                    .filter(move |bit| bits >> bit & 1 == 1)
                    .map(move |bit| Pfn(first + bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pfn_is_new_once() {
        let mut set = PfnBitmap::default();
        for pfn in [0, 63, 64, 32767, 32768, u64::MAX] {
            assert!(set.insert(Pfn(pfn)));
            assert!(!set.insert(Pfn(pfn)));
        }
        assert_eq!(set.chunks.len(), 3, "0–32767, 32768–65535, the last");
    }

    #[test]
    fn what_was_missing_is_found_once_it_is_there() {
        let mut set = PfnBitmap::default();
        for pfn in [5, 40_000].map(Pfn) {
            assert!(!set.finds(pfn) && !set.finds(pfn));
            set.remove(pfn);
            assert!(set.insert(pfn));
            assert!(set.finds(pfn) && set.contains(pfn));
            assert!(!set.finds(Pfn(pfn.0 + 1)) && !set.finds(Pfn(pfn.0 + 100_000)));
            assert!(set.finds(pfn));
            set.remove(Pfn(pfn.0 + 100_000));
            set.remove(pfn);
            assert!(!set.finds(pfn) && !set.contains(pfn));
        }
    }

    #[test]
    fn runs_are_aligned_and_whole() {
        let mut set = PfnBitmap::default();
        let edge = PFNS_PER_CHUNK - 512;
        for pfn in (1..1024)
            .chain(edge..edge + 1024)
            .chain(1 << 40..(1 << 40) + 511)
        {
            set.insert(Pfn(pfn));
        }
        let runs = |set: &PfnBitmap| set.whole_runs().map(|pfn| pfn.0).collect::<Vec<_>>();
        assert_eq!(runs(&set), [512, edge, edge + 512]);
        set.remove(Pfn(edge));
        assert_eq!(runs(&set), [512, edge + 512]);
    }

    #[test]
    fn what_two_sets_share_comes_in_order() {
        let set = |pfns: &[u64]| {
            let mut set = PfnBitmap::default();
            pfns.iter().for_each(|pfn| {
                set.insert(Pfn(*pfn));
            });
            set
        };
        let mut one = set(&[7, 0, 63, 64, 40_000, 1 << 40, u64::MAX]);
        let other = set(&[64, 63, 1, 1 << 40, 32_768, u64::MAX]);
        let common = |one: &PfnBitmap| one.common(&other).map(|pfn| pfn.0).collect::<Vec<_>>();
        assert_eq!(common(&one), [63, 64, 1 << 40, u64::MAX]);
        assert!(one.contains(Pfn(64)) && !one.contains(Pfn(65)));
        one.remove(Pfn(64));
        one.remove(Pfn(1 << 50));
        assert!(!one.contains(Pfn(64)));
        assert_eq!(common(&one), [63, 1 << 40, u64::MAX]);
    }
}
