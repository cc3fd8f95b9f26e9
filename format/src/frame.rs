//! Basic types that all crates of the project share: frame numbers, page types, and the PAGE_DATA
//! entry that combines both.
//!
//! Specification: libxc migration stream, "PAGE_DATA". C implementation:
//! `xg_sr_stream_format.h` (`PAGE_DATA_PFN_MASK`, `PAGE_DATA_TYPE_MASK`),
//! `xen/include/public/domctl.h` (`XEN_DOMCTL_PFINFO_*`).

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::wire::U64;

/// Bytes in a page; x86 streams have no other page size.
pub const PAGE_SIZE: usize = 4096;

/// log2 of [`PAGE_SIZE`], as the domain header states it.
pub const PAGE_SHIFT: u32 = 12;

/// The contents of one page.
pub type Page = [u8; PAGE_SIZE];

macro_rules! frame_number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The value for "no frame" (all bits set).
            pub const INVALID: Self = Self(u64::MAX);

            /// The frame `n` further on, if it exists.
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(frame) => Some(Self(frame)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

frame_number!(
    /// A guest pseudo-physical frame number, which streams use.
    Pfn
);
frame_number!(
    /// A guest frame number, which hypercalls take: the pfn of an HVM guest, the mfn of a PV guest.
    Gfn
);
frame_number!(
    /// A machine frame number: the page's place in the host's memory.
    Mfn
);

/// The type of a page: the PFINFO nibble (bits 28–31 of Xen's
/// `XEN_DOMCTL_PFINFO_*`, bits 60–63 of a PAGE_DATA entry).
///
/// Open: all sixteen values can be represented; [`PageType::is_known`] is true for the assigned
/// ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageType(u8);

impl PageType {
    /// An ordinary page.
    pub const NOTAB: Self = Self(0x0);
    /// A level-1 page table.
    pub const L1TAB: Self = Self(0x1);
    /// A level-2 page table.
    pub const L2TAB: Self = Self(0x2);
    /// A level-3 page table.
    pub const L3TAB: Self = Self(0x3);
    /// A level-4 page table.
    pub const L4TAB: Self = Self(0x4);
    /// A pinned level-1 page table.
    pub const L1TAB_PINNED: Self = Self(0x9);
    /// A pinned level-2 page table.
    pub const L2TAB_PINNED: Self = Self(0xa);
    /// A pinned level-3 page table.
    pub const L3TAB_PINNED: Self = Self(0xb);
    /// A pinned level-4 page table.
    pub const L4TAB_PINNED: Self = Self(0xc);
    /// A page whose memory is broken: no data.
    pub const BROKEN: Self = Self(0xd);
    /// Allocate the page, send no data.
    pub const XALLOC: Self = Self(0xe);
    /// No page here: no data, nothing to allocate.
    pub const XTAB: Self = Self(0xf);

    /// The type with this value; only the low four bits count.
    pub const fn from_nibble(nibble: u8) -> Self {
        Self(nibble & 0xf)
    }

    /// The value, 0–15.
    pub const fn nibble(self) -> u8 {
        self.0
    }

    /// Whether the format assigns a meaning to this value (5–8 have none).
    pub const fn is_known(self) -> bool {
        !matches!(self.0, 5..=8)
    }

    /// Whether a PAGE_DATA record carries 4096 bytes for such an entry.
    pub const fn has_data(self) -> bool {
        matches!(self.0, 0..=4 | 9..=12)
    }

    /// Whether a restorer allocates memory for such an entry.
    pub const fn is_populated(self) -> bool {
        matches!(self.0, 0..=4 | 9..=12 | 0xe)
    }

    /// The level of the page table, 1–4, or `None` for anything else.
    pub const fn table_level(self) -> Option<u8> {
        match self.0 {
            1..=4 => Some(self.0),
            9..=12 => Some(self.0 & 0x7),
            _ => None,
        }
    }

    /// The type of a page table of this level, 1–4.
    pub const fn table(level: u8, pinned: bool) -> Option<Self> {
        match (level, pinned) {
            (1..=4, false) => Some(Self(level)),
            (1..=4, true) => Some(Self(level | 0x8)),
            _ => None,
        }
    }

    /// Whether the page is a pinned page table.
    pub const fn is_pinned(self) -> bool {
        matches!(self.0, 9..=12)
    }

    /// The name, as the specification spells it, without its prefix.
    pub const fn name(self) -> &'static str {
        match self.0 {
            0x0 => "NOTAB",
            0x1 => "L1TAB",
            0x2 => "L2TAB",
            0x3 => "L3TAB",
            0x4 => "L4TAB",
            0x9 => "L1TAB (pinned)",
            0xa => "L2TAB (pinned)",
            0xb => "L3TAB (pinned)",
            0xc => "L4TAB (pinned)",
            0xd => "BROKEN",
            0xe => "XALLOC",
            0xf => "XTAB",
            _ => "unknown",
        }
    }
}

impl fmt::Debug for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageType({:#x}, {})", self.0, self.name())
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_known() {
            true => f.write_str(self.name()),
            false => write!(f, "unknown type {:#x}", self.0),
        }
    }
}

/// One entry of a PAGE_DATA record, encoded as in the stream.
///
/// | bits | meaning |
/// |---|---|
/// | 0–51 | pfn |
/// | 52–59 | reserved, zero |
/// | 60–63 | page type |
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub(crate) struct WirePageEntry(U64);

/// One entry of a PAGE_DATA record: a pfn and its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageEntry {
    /// The page's pfn, at most 2^52 − 1.
    pub pfn: Pfn,
    /// The page's type.
    pub page_type: PageType,
}

impl PageEntry {
    /// The largest pfn an entry can hold.
    pub const MAX_PFN: Pfn = Pfn((1 << 52) - 1);
}

impl WirePageEntry {
    const TYPE_SHIFT: u32 = 60;

    /// Encodes `entry`. Bits of the pfn above [`PageEntry::MAX_PFN`] are lost; the caller must
    /// check.
    pub(crate) const fn new(entry: PageEntry, order: ByteOrder) -> Self {
        let pfn = entry.pfn.0 & PageEntry::MAX_PFN.0;
        let page_type = (entry.page_type.nibble() as u64) << Self::TYPE_SHIFT;
        Self(U64::new(pfn | page_type, order))
    }

    /// The reserved bits 52–59, shifted down: zero in a valid stream.
    pub(crate) const fn reserved(self, order: ByteOrder) -> u8 {
        ((self.0.get(order) >> 52) & 0xff) as u8
    }

    /// The pfn and the type; [`PageType::is_known`] may be false for the type.
    pub(crate) const fn entry(self, order: ByteOrder) -> PageEntry {
        let raw = self.0.get(order);
        PageEntry {
            pfn: Pfn(raw & PageEntry::MAX_PFN.0),
            page_type: PageType::from_nibble((raw >> Self::TYPE_SHIFT) as u8),
        }
    }
}

impl fmt::Debug for WirePageEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WirePageEntry({:?})", self.0)
    }
}
