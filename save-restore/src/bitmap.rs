//! A set of pfns.

use std::collections::BTreeMap;

use xsr_format::frame::Pfn;

const WORDS: usize = 512;
const PFNS_PER_CHUNK: u64 = 64 * WORDS as u64;

/// A set of pfns. Takes 4 KiB for each 32768 pfns of which one is in the set
/// (1/32768 of the memory they stand for), however large the pfns are.
#[derive(Clone, Debug, Default)]
pub(crate) struct PfnBitmap {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
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
        let chunk = self
            .chunks
            .entry(chunk)
            .or_insert_with(|| Box::new([0; WORDS]));
        let new = chunk[word] & bit == 0;
        chunk[word] |= bit;
        new
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
}
