//! The machine's page allocator. Like Xen's, it hands out short contiguous runs at frames unrelated
//! to the pfns. Memory is divided into blocks of 2 MiB, which are taken in a scrambled order within
//! each GiB; the runs of a block are taken in a scrambled order too. A new GiB is begun only when
//! the one below is used up, which keeps the machine's tables compact.
//!
//! C implementation: `xen/common/page_alloc.c`.

use std::collections::BTreeSet;

use xsr_format::frame::Mfn;

use super::frames::{Frame, Frames};
use super::memory::Words;
use super::random::{SplitMix64, mix};
use crate::DomId;

/// Frames in a block, which is an extent of order 9.
pub(super) const BLOCK_FRAMES: u64 = 512;

/// The same, as an index.
pub(super) const BLOCK_LEN: usize = 512;

/// Blocks in an extent of order 18.
const GIB_BLOCKS: u32 = 512;

/// Hands out frames and takes them back. The frame table records which frames are taken; the
/// allocator itself keeps only the number taken in each block.
#[derive(Debug)]
pub(super) struct Allocator {
    /// Frames taken, per block.
    taken: Words,
    /// The blocks in the order in which they are taken.
    order: Vec<u32>,
    /// The position of each block in `order`.
    rank: Vec<u32>,
    /// Ranks of blocks with some frames taken and some free.
    partial: BTreeSet<u32>,
    /// Ranks of blocks that are completely free.
    whole: BTreeSet<u32>,
    cursor: Option<Cursor>,
    seed: u64,
    max_run: usize,
}

/// The allocator's position in a block.
#[derive(Debug)]
struct Cursor {
    block: u32,
    /// The block's frames in the order in which they are taken.
    sequence: Vec<u16>,
    next: usize,
}

impl Allocator {
    /// The allocator of a machine whose blocks have `taken` frames in use.
    pub(super) fn new(taken: Words, seed: u64, max_run: usize) -> Self {
        let blocks = u32::try_from(taken.len()).expect("at most 2^32 blocks of 2 MiB");
        let mut order: Vec<u32> = (0..blocks).collect();
        let mut random = SplitMix64::new(mix(seed));
        for gib in order.chunks_mut(GIB_BLOCKS as usize) {
            random.shuffle(gib);
        }
        let mut rank = vec![0; order.len()];
        for (at, block) in (0_u32..).zip(&order) {
            rank[*block as usize] = at;
        }
        let mut allocator = Self {
            taken,
            order,
            rank,
            partial: BTreeSet::new(),
            whole: BTreeSet::new(),
            cursor: None,
            seed,
            max_run: max_run.max(1),
        };
        allocator.read_again();
        allocator
    }

    /// Recounts the frames taken, which another process may have changed.
    pub(super) fn read_again(&mut self) {
        self.cursor = None;
        self.partial.clear();
        self.whole.clear();
        for (block, _) in (0_u32..).zip(0..self.taken.len()) {
            let taken = self.taken(block);
            self.file(block, taken);
        }
    }

    /// The number of free frames, also if another process has changed it.
    pub(super) fn free_now(&self) -> u64 {
        let blocks = (0_u32..).zip(0..self.taken.len());
        blocks
            .map(|(block, _)| BLOCK_FRAMES.saturating_sub(self.taken(block)))
            .sum()
    }

    /// The first frame of each block that has frames taken.
    pub(super) fn taken_blocks(&self) -> impl Iterator<Item = Mfn> {
        (0..self.taken.len())
            .filter(|block| self.taken.get(*block) > 0)
            .map(|block| Mfn(block as u64 * BLOCK_FRAMES))
    }

    /// Take one frame for `frame.owner`.
    pub(super) fn take_page(&mut self, frames: &Frames, frame: Frame) -> Option<Mfn> {
        loop {
            let mut cursor = match self.cursor.take() {
                Some(cursor) => cursor,
                None => self.begin_block()?,
            };
            let first = u64::from(cursor.block) * BLOCK_FRAMES;
            while let Some(&within) = cursor.sequence.get(cursor.next) {
                cursor.next += 1;
                let mfn = Mfn(first + u64::from(within));
                if frames.get(mfn).is_some_and(|f| f.owner.is_none()) {
                    self.set_taken(cursor.block, self.taken(cursor.block) + 1);
                    frames.set(mfn, frame);
                    self.cursor = Some(cursor);
                    return Some(mfn);
                }
            }
            // All frames of the block have been handed out.
            self.set_taken(cursor.block, BLOCK_FRAMES);
        }
    }

    /// Take an extent of order 9 or 18, aligned to its size, for `owner`.
    pub(super) fn take_extent(&mut self, frames: &Frames, order: u8, owner: DomId) -> Option<Mfn> {
        let (block, blocks) = match order {
            9 => (self.order[*self.whole.first()? as usize], 1),
            18 => (self.free_gib()?, GIB_BLOCKS),
            _ => return None,
        };
        let frame = Frame {
            owner: Some(owner),
            ..Frame::default()
        };
        let first = u64::from(block) * BLOCK_FRAMES;
        for taken in block..block + blocks {
            self.set_taken(taken, BLOCK_FRAMES);
        }
        for mfn in first..first + u64::from(blocks) * BLOCK_FRAMES {
            frames.set(Mfn(mfn), frame);
        }
        Some(Mfn(first))
    }

    /// Take a frame back. The caller is responsible for its contents.
    pub(super) fn give_back(&mut self, frames: &Frames, mfn: Mfn) {
        let Ok(block) = u32::try_from(mfn.0 / BLOCK_FRAMES) else {
            return;
        };
        if self.cursor.as_ref().is_some_and(|c| c.block == block) {
            self.cursor = None;
        }
        frames.set(mfn, Frame::default());
        self.set_taken(block, self.taken(block).saturating_sub(1));
    }

    fn begin_block(&mut self) -> Option<Cursor> {
        let rank = self.partial.first().or_else(|| self.whole.first())?;
        let block = self.order[*rank as usize];
        Some(Cursor {
            block,
            sequence: self.sequence(block),
            next: 0,
        })
    }

    /// The order in which the frames of `block` are taken.
    fn sequence(&self, block: u32) -> Vec<u16> {
        let mut random = SplitMix64::new(self.seed ^ mix(u64::from(block)));
        let mut runs: Vec<std::ops::Range<u16>> = Vec::new();
        let block_end = 512_u16;
        let mut start = 0;
        while start < block_end {
            let len = u16::try_from(1 + random.below(self.max_run)).unwrap_or(u16::MAX);
            let end = start.saturating_add(len).min(block_end);
            runs.push(start..end);
            start = end;
        }
        random.shuffle(&mut runs);
        runs.into_iter().flatten().collect()
    }

    /// The first block of the lowest GiB that is completely free.
    fn free_gib(&self) -> Option<u32> {
        let blocks = self.rank.len();
        (0..blocks / GIB_BLOCKS as usize)
            .map(|gib| gib * GIB_BLOCKS as usize)
            .find(|first| (*first..first + GIB_BLOCKS as usize).all(|b| self.taken.get(b) == 0))
            .and_then(|first| u32::try_from(first).ok())
    }

    fn taken(&self, block: u32) -> u64 {
        self.taken.get(block as usize)
    }

    fn set_taken(&mut self, block: u32, taken: u64) {
        self.taken.set(block as usize, taken);
        self.file(block, taken);
    }

    fn file(&mut self, block: u32, taken: u64) {
        let rank = self.rank[block as usize];
        let (whole, partial) = match taken {
            0 => (true, false),
            BLOCK_FRAMES => (false, false),
            _ => (false, true),
        };
        for (set, member) in [(&mut self.whole, whole), (&mut self.partial, partial)] {
            if member {
                set.insert(rank);
            } else {
                set.remove(&rank);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use proptest::prelude::*;

    use super::*;

    const OWNER: DomId = DomId(7);

    fn words(len: usize) -> Words {
        let file = File::from(memfd_create("words", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        Words::map(&file, len).expect("mapped")
    }

    /// A machine of `blocks` blocks, the first of them Xen's.
    fn machine(blocks: usize, seed: u64, max_run: usize) -> (Frames, Allocator) {
        let taken = words(blocks);
        taken.set(0, BLOCK_FRAMES);
        let frames = Frames::new(words(blocks * BLOCK_LEN));
        (frames, Allocator::new(taken, seed, max_run))
    }

    fn owned() -> Frame {
        Frame {
            owner: Some(OWNER),
            ..Frame::default()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pages(usize),
        Extent,
        /// Give back every n-th frame.
        GiveBack(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1_usize..900).prop_map(Step::Pages),
            Just(Step::Extent),
            (1_usize..7).prop_map(Step::GiveBack),
        ];
        proptest::collection::vec(step, 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever is taken and given back, no frame is handed out twice, none belongs to Xen, the
        /// count of free frames is correct, and in the end all frames can be taken again.
        #[test]
        fn no_frame_is_lost_or_had_twice(
            steps in steps(),
            seed in any::<u64>(),
            max_run in 1_usize..40,
        ) {
            const BLOCKS: usize = 5;
            let all = (BLOCKS as u64 - 1) * BLOCK_FRAMES;
            let (frames, mut allocator) = machine(BLOCKS, seed, max_run);
            prop_assert_eq!(allocator.free_now(), all);
            let mut had: BTreeSet<u64> = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Pages(count) => {
                        for _ in 0..count {
                            let Some(mfn) = allocator.take_page(&frames, owned()) else {
                                prop_assert_eq!(had.len() as u64, all, "only a full machine refuses");
                                break;
                            };
                            prop_assert!(mfn.0 >= BLOCK_FRAMES, "not Xen's");
                            prop_assert!(had.insert(mfn.0), "not had before");
                        }
                    }
                    Step::Extent => {
                        if let Some(first) = allocator.take_extent(&frames, 9, OWNER) {
                            prop_assert!(first.0.is_multiple_of(BLOCK_FRAMES));
                            for mfn in first.0..first.0 + BLOCK_FRAMES {
                                prop_assert!(had.insert(mfn), "not had before");
                            }
                        }
                    }
                    Step::GiveBack(every) => {
                        let back: Vec<u64> = had.iter().copied().step_by(every).collect();
                        for mfn in back {
                            had.remove(&mfn);
                            allocator.give_back(&frames, Mfn(mfn));
                        }
                    }
                }
                prop_assert_eq!(allocator.free_now(), all - had.len() as u64);
            }
            for mfn in std::mem::take(&mut had) {
                allocator.give_back(&frames, Mfn(mfn));
            }
            for _ in 0..BLOCKS - 1 {
                prop_assert!(allocator.take_extent(&frames, 9, OWNER).is_some());
            }
            prop_assert_eq!(allocator.free_now(), 0);
        }
    }

    #[test]
    fn runs_are_short_and_out_of_order() {
        for (max_run, fewest_runs) in [(1, 500), (32, 25), (512, 1)] {
            let (frames, mut allocator) = machine(4, 3, max_run);
            let taken: Vec<u64> = (0..512)
                .map(|_| allocator.take_page(&frames, owned()).expect("room").0)
                .collect();
            let runs = taken.chunk_by(|a, b| a + 1 == *b).count();
            assert!(runs >= fewest_runs, "{runs} runs of at most {max_run}");
            // Two runs may happen to be adjacent, but only occasionally.
            let longest = taken.chunk_by(|a, b| a + 1 == *b).map(<[u64]>::len).max();
            assert!(longest <= Some(3 * max_run), "{longest:?} for {max_run}");
        }
    }

    #[test]
    fn a_gib_is_aligned_and_all_free() {
        let (frames, mut allocator) = machine(3 * BLOCK_LEN, 3, 32);
        allocator.take_page(&frames, owned()).expect("room");
        // The first GiB holds Xen and the page.
        for expected in [Some(Mfn(1 << 18)), Some(Mfn(2 << 18)), None] {
            assert_eq!(allocator.take_extent(&frames, 18, OWNER), expected);
        }
    }

    #[test]
    fn a_count_that_is_too_low_is_put_right() {
        let (frames, mut allocator) = machine(2, 3, 32);
        (0..BLOCK_FRAMES).for_each(|_| {
            allocator.take_page(&frames, owned()).expect("room");
        });
        // The state after a process was killed between updates of the two tables.
        allocator.set_taken(1, BLOCK_FRAMES - 3);
        assert_eq!(allocator.take_page(&frames, owned()), None);
        assert_eq!(allocator.free_now(), 0);
    }
}
