//! A set of pfns.

use std::collections::BTreeMap;

use xsr_format::frame::Pfn;

const WORDS: usize = 512;
const PFNS_PER_CHUNK: u64 = 64 * WORDS as u64;

/// Words that hold the bits of 512 pfns: 2 MiB.
const RUN_WORDS: usize = 8;

/// The most pfns that a chunk holds as a list; a longer list would take twice as many bytes.
const MOST_LISTED: usize = 512;

/// Which of 32768 pfns are in the set.
#[derive(Clone, Debug)]
enum Chunk {
    /// These, ascending.
    Few(Vec<u16>),
    /// Those whose bit is set.
    Many(Box<[u64; WORDS]>),
}

impl Chunk {
    fn contains(&self, at: u16) -> bool {
        match self {
            Self::Few(list) => list.binary_search(&at).is_ok(),
            Self::Many(words) => words[usize::from(at / 64)] >> (at % 64) & 1 == 1,
        }
    }

    /// Inserts a pfn; returns whether it is new.
    fn insert(&mut self, at: u16) -> bool {
        match self {
            Self::Few(list) => match list.binary_search(&at) {
                Ok(_) => false,
                Err(_) if list.len() == MOST_LISTED => {
                    let mut words = self.words();
                    words[usize::from(at / 64)] |= 1 << (at % 64);
                    *self = Self::Many(words);
                    true
                }
                Err(place) => {
                    list.insert(place, at);
                    true
                }
            },
            Self::Many(words) => {
                let word = &mut words[usize::from(at / 64)];
                let new = *word >> (at % 64) & 1 == 0;
                *word |= 1 << (at % 64);
                new
            }
        }
    }

    fn remove(&mut self, at: u16) {
        match self {
            Self::Few(list) => {
                if let Ok(place) = list.binary_search(&at) {
                    list.remove(place);
                }
            }
            Self::Many(words) => words[usize::from(at / 64)] &= !(1 << (at % 64)),
        }
    }

    /// The chunk as bits.
    fn words(&self) -> Box<[u64; WORDS]> {
        match self {
            Self::Few(list) => {
                let mut words = Box::new([0; WORDS]);
                for at in list {
                    words[usize::from(at / 64)] |= 1 << (at % 64);
                }
                words
            }
            Self::Many(words) => words.clone(),
        }
    }
}

/// A set of pfns. Takes at most 4 KiB for each 32768 pfns of which one is in the set (1/32768 of
/// the memory they number), and some hundred bytes where there are few, however large the pfns are.
#[derive(Clone, Debug, Default)]
pub(crate) struct PfnBitmap {
    chunks: BTreeMap<u64, Chunk>,
    /// The last chunk that was looked up and does not exist: streams name a million absent pfns in
    /// a row.
    missing: Option<u64>,
}

impl PfnBitmap {
    fn place(pfn: Pfn) -> (u64, u16) {
        let at = u16::try_from(pfn.0 % PFNS_PER_CHUNK).expect("below 32768");
        (pfn.0 / PFNS_PER_CHUNK, at)
    }

    /// Inserts `pfn`; returns whether it was not there before.
    pub(crate) fn insert(&mut self, pfn: Pfn) -> bool {
        let (chunk, at) = Self::place(pfn);
        if self.missing == Some(chunk) {
            self.missing = None;
        }
        let chunk = self.chunks.entry(chunk);
        chunk.or_insert_with(|| Chunk::Few(Vec::new())).insert(at)
    }

    /// Removes `pfn`.
    pub(crate) fn remove(&mut self, pfn: Pfn) {
        let (chunk, at) = Self::place(pfn);
        if self.missing == Some(chunk) {
            return;
        }
        match self.chunks.get_mut(&chunk) {
            Some(chunk) => chunk.remove(at),
            None => self.missing = Some(chunk),
        }
    }

    /// As [`PfnBitmap::contains`], but faster for many absent pfns in a row.
    pub(crate) fn finds(&mut self, pfn: Pfn) -> bool {
        let (chunk, at) = Self::place(pfn);
        if self.missing == Some(chunk) {
            return false;
        }
        let found = self.chunks.get(&chunk).map(|chunk| chunk.contains(at));
        if found.is_none() {
            self.missing = Some(chunk);
        }
        found.unwrap_or_default()
    }

    /// Whether `pfn` is in the set.
    pub(crate) fn contains(&self, pfn: Pfn) -> bool {
        let (chunk, at) = Self::place(pfn);
        let chunk = self.chunks.get(&chunk);
        chunk.is_some_and(|chunk| chunk.contains(at))
    }

    /// The first pfns of the aligned runs of 512 pfns that are in the set completely, ascending.
    pub(crate) fn whole_runs(&self) -> impl Iterator<Item = Pfn> + '_ {
        let chunks = self.chunks.iter();
        // A chunk with a whole run has more pfns than a list, or a list that is exactly one run.
        let many = chunks.filter(|(_, chunk)| match chunk {
            Chunk::Few(list) => list.len() == MOST_LISTED,
            Chunk::Many(_) => true,
        });
        many.flat_map(|(number, chunk)| {
            let words = chunk.words();
            let runs = (0_u64..).zip(words.chunks_exact(RUN_WORDS));
            let whole = runs.filter(|(_, words)| words.iter().all(|word| *word == u64::MAX));
            let pfn = |(run, _)| Pfn(number * PFNS_PER_CHUNK + run * 64 * RUN_WORDS as u64);
            whole.map(pfn).collect::<Vec<_>>()
        })
    }

    /// The pfns in both sets, ascending.
    pub(crate) fn common<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Pfn> + 'a {
        self.chunks.iter().flat_map(move |(number, chunk)| {
            let theirs = other.chunks.get(number);
            let words = theirs.into_iter().flat_map(move |theirs| {
                let (ours, theirs) = (chunk.words(), theirs.words());
                let both = ours.into_iter().zip(*theirs);
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
    fn few_and_many_are_one_set() {
        let mut set = PfnBitmap::default();
        let pfns = || (0..3 * MOST_LISTED as u64).map(|n| Pfn(n * 21 % 32_768));
        for (pfn, before) in pfns().zip(0..) {
            assert!(!set.contains(pfn) && set.insert(pfn) && !set.insert(pfn));
            let listed = matches!(set.chunks[&0], Chunk::Few(_));
            assert_eq!(listed, before < MOST_LISTED, "{before}");
            assert!(pfns().take(before + 1).all(|pfn| set.contains(pfn)));
        }
        let one = Pfn(PFNS_PER_CHUNK + 7);
        set.insert(one);
        set.remove(one);
        assert!(!set.contains(one) && !set.finds(one));
        let all = set.common(&set).count();
        assert_eq!(all, 3 * MOST_LISTED);
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
