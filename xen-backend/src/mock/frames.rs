//! The machine's frame table: for each machine frame its owner and, for PV guests, the type that
//! Xen enforces and the number of references of that type.
//!
//! C implementation: `struct page_info` and `PGT_*` in `xen/arch/x86/include/asm/mm.h`.
//!
//! One word per frame:
//!
//! | bits | meaning |
//! |---|---|
//! | 0–25 | references of the current type |
//! | 26–28 | type: 0 none, 1–4 page table of that level, 5 descriptors, 6 writable |
//! | 29 | pinned |
//! | 30 | validated |
//! | 31 | level-2 table that holds Xen's entries of a 32-bit guest |
//! | 32 | owned |
//! | 33 | Xen's own page, lent to the owner (shared_info) |
//! | 36–47 | linear entries (> 0) or linear uses (< 0), signed |
//! | 48–63 | the owner's number |

use crate::Errno;
use xsr_format::frame::{Mfn, PageType};

use super::memory::Words;
use crate::DomId;

/// A use that Xen enforces for a frame, while there are references of that use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum FrameUse {
    /// Never used.
    #[default]
    None,
    /// A page table of level 1–4.
    Table(u8),
    /// A GDT or LDT page.
    Descriptors,
    /// Mapped writable.
    Writable,
}

impl FrameUse {
    const fn bits(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Table(level) => level as u64,
            Self::Descriptors => 5,
            Self::Writable => 6,
        }
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & 7 {
            1 => Self::Table(1),
            2 => Self::Table(2),
            3 => Self::Table(3),
            4 => Self::Table(4),
            5 => Self::Descriptors,
            6 => Self::Writable,
            _ => Self::None,
        }
    }
}

/// One entry of the frame table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Frame {
    /// Its owner; `None` for a free frame or one that Xen keeps.
    pub(super) owner: Option<DomId>,
    /// Its use, which is kept when `count` falls to zero.
    pub(super) used_as: FrameUse,
    /// References of that use.
    pub(super) count: u32,
    /// Pinned as a page table, which is one of the references.
    pub(super) pinned: bool,
    /// Its contents have been validated for its use.
    pub(super) validated: bool,
    /// A level-2 table that contains Xen's entries.
    pub(super) pae_xen_l2: bool,
    /// Xen's own, lent to the owner.
    pub(super) xen_heap: bool,
    /// Linear entries in it (> 0), or linear uses of it (< 0).
    pub(super) linear: i16,
}

const COUNT_MASK: u64 = (1 << 26) - 1;
const LINEAR_MASK: u64 = 0xfff;

impl Frame {
    /// The largest count an entry holds.
    pub(super) const MAX_COUNT: u32 = (1 << 26) - 1;
    /// The largest linear count, in either direction.
    pub(super) const MAX_LINEAR: i16 = 0x7ff;

    fn to_word(self) -> u64 {
        let owner = match self.owner {
            Some(domid) => (u64::from(domid.0) << 48) | (1 << 32),
            None => 0,
        };
        let linear = u64::from(self.linear.cast_unsigned()) & LINEAR_MASK;
        owner
            | (u64::from(self.count) & COUNT_MASK)
            | (self.used_as.bits() << 26)
            | (u64::from(self.pinned) << 29)
            | (u64::from(self.validated) << 30)
            | (u64::from(self.pae_xen_l2) << 31)
            | (u64::from(self.xen_heap) << 33)
            | (linear << 36)
    }

    fn from_word(word: u64) -> Self {
        let bit = |n: u32| word >> n & 1 == 1;
        let [low, high, ..] = (word >> 36 & LINEAR_MASK).to_le_bytes();
        // Sign-extend the twelve bits.
        let linear = (i16::from_le_bytes([low, high]) << 4) >> 4;
        let [.., o0, o1] = word.to_le_bytes();
        let [c0, c1, c2, c3, ..] = (word & COUNT_MASK).to_le_bytes();
        Self {
            owner: bit(32).then_some(DomId(u16::from_le_bytes([o0, o1]))),
            used_as: FrameUse::from_bits(word >> 26),
            count: u32::from_le_bytes([c0, c1, c2, c3]),
            pinned: bit(29),
            validated: bit(30),
            pae_xen_l2: bit(31),
            xen_heap: bit(33),
            linear,
        }
    }

    /// The type that `getpageframeinfo3` returns for a frame of the guest. A table without
    /// references has been invalidated and counts as an ordinary page.
    pub(super) fn page_type(&self) -> PageType {
        if self.xen_heap {
            return PageType::XTAB;
        }
        match self.used_as {
            FrameUse::Table(level) if self.pinned || self.validated => {
                PageType::table(level, self.pinned).unwrap_or(PageType::NOTAB)
            }
            _ => PageType::NOTAB,
        }
    }
}

/// The frame table.
#[derive(Debug)]
pub(super) struct Frames {
    words: Words,
}

impl Frames {
    /// The frame table in its state file.
    pub(super) fn new(words: Words) -> Self {
        Self { words }
    }

    /// The number of the machine's frames.
    pub(super) fn len(&self) -> u64 {
        self.words.len() as u64
    }

    fn index(&self, mfn: Mfn) -> Option<usize> {
        usize::try_from(mfn.0)
            .ok()
            .filter(|i| *i < self.words.len())
    }

    /// The entry of `mfn`; `None` if there is no such frame.
    pub(super) fn get(&self, mfn: Mfn) -> Option<Frame> {
        Some(Frame::from_word(self.words.get(self.index(mfn)?)))
    }

    /// The entry of `mfn`, if it is a frame of `domid`.
    pub(super) fn owned(&self, mfn: Mfn, domid: DomId) -> Option<Frame> {
        self.get(mfn).filter(|frame| frame.owner == Some(domid))
    }

    /// Replace the entry of `mfn`, which must exist.
    pub(super) fn set(&self, mfn: Mfn, frame: Frame) {
        if let Some(index) = self.index(mfn) {
            self.words.set(index, frame.to_word());
        }
    }

    /// Change the entry of `mfn` atomically; `change` may be called several times. EINVAL if there
    /// is no such frame. Returns the earlier entry.
    pub(super) fn update(
        &self,
        mfn: Mfn,
        change: impl Fn(Frame) -> Result<Frame, Errno>,
    ) -> Result<Frame, Errno> {
        let index = self.index(mfn).ok_or(Errno::EINVAL)?;
        let mut word = self.words.get(index);
        loop {
            let old = Frame::from_word(word);
            let new = change(old)?;
            match self.words.exchange(index, word, new.to_word()) {
                Ok(()) => return Ok(old),
                Err(now) => word = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_entry_survives_its_word(
            owner in proptest::option::of(any::<u16>()),
            used_as in 0_u64..7,
            count in 0..=Frame::MAX_COUNT,
            flags in any::<[bool; 4]>(),
            linear in -Frame::MAX_LINEAR..=Frame::MAX_LINEAR,
        ) {
            let [pinned, validated, pae_xen_l2, xen_heap] = flags;
            let frame = Frame {
                owner: owner.map(DomId),
                used_as: FrameUse::from_bits(used_as),
                count, pinned, validated, pae_xen_l2, xen_heap, linear,
            };
            prop_assert_eq!(Frame::from_word(frame.to_word()), frame);
        }
    }

    #[test]
    fn the_word_zero_is_a_free_frame() {
        assert_eq!(Frame::from_word(0), Frame::default());
    }

    #[test]
    fn a_table_without_references_counts_as_an_ordinary_page() {
        let mut frame = Frame {
            owner: Some(DomId(1)),
            used_as: FrameUse::Table(3),
            count: 1,
            validated: true,
            ..Frame::default()
        };
        assert_eq!(frame.page_type(), PageType::L3TAB);
        frame.pinned = true;
        assert_eq!(frame.page_type(), PageType::L3TAB_PINNED);
        frame = Frame {
            count: 0,
            pinned: false,
            validated: false,
            ..frame
        };
        assert_eq!(frame.page_type(), PageType::NOTAB);
    }
}
