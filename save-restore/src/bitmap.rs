//! A set of pfns.

use std::collections::BTreeMap;

use xsr_format::frame::Pfn;

const WORDS: usize = 512;
const PFNS_PER_CHUNK: u64 = 64 * WORDS as u64;

/// A set of pfns. Takes 4 KiB for each 32768 pfns of which one is in the set
/// (1/32768 of the memory they stand for), however large the pfns are.
#[derive(Clone, Debug, Default)]
pub struct PfnBitmap {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
    count: u64,
}

impl PfnBitmap {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    fn place(pfn: Pfn) -> (u64, usize, u64) {
        let word = (pfn.0 % PFNS_PER_CHUNK) / 64;
        let word = usize::try_from(word).expect("below 512");
        (pfn.0 / PFNS_PER_CHUNK, word, 1 << (pfn.0 % 64))
    }

    /// Whether `pfn` is in the set.
    pub fn contains(&self, pfn: Pfn) -> bool {
        let (chunk, word, bit) = Self::place(pfn);
        self.chunks.get(&chunk).is_some_and(|c| c[word] & bit != 0)
    }

    /// Put `pfn` in; whether it was not there before.
    pub fn insert(&mut self, pfn: Pfn) -> bool {
        let (chunk, word, bit) = Self::place(pfn);
        let chunk = self
            .chunks
            .entry(chunk)
            .or_insert_with(|| Box::new([0; WORDS]));
        let new = chunk[word] & bit == 0;
        chunk[word] |= bit;
        self.count += u64::from(new);
        new
    }

    /// How many pfns are in the set.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_put_in() {
        let mut set = PfnBitmap::new();
        assert!(set.is_empty());
        for pfn in [0, 63, 64, 32767, 32768, u64::MAX] {
            assert!(!set.contains(Pfn(pfn)));
            assert!(set.insert(Pfn(pfn)));
            assert!(!set.insert(Pfn(pfn)));
            assert!(set.contains(Pfn(pfn)));
        }
        assert_eq!(set.len(), 6);
        assert!(!set.contains(Pfn(1)));
        assert!(!set.contains(Pfn(1 << 40)));
    }
}
