//! The mapped layout: page data at multiples of 4096 in the file, holes for zero pages, an index
//! and digests after the image or in the xl header.
//!
//! Specification: `docs/mapped.md`. C implementation: none. To Xen's own readers such an image is
//! an ordinary one: the padding is PAGE_DATA entries of type XTAB, and nothing looks behind END.

pub mod check;
pub mod find;
pub mod index;
mod room;
pub mod write;

use std::io;

use thiserror::Error;

use crate::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};

pub use self::find::{Mapped, PagePlace};
pub use self::room::Room;
pub use self::write::{MappedWriter, SparseWrite};

/// What page data is aligned to, in bytes.
pub const ALIGNMENT: u64 = PAGE_SIZE as u64;

/// The most real entries of a PAGE_DATA record.
pub const MAX_REAL: u32 = 1024;

/// The most entries of a PAGE_DATA record, pads included: 1024 and 511.
pub const MAX_ENTRIES: u32 = 1535;

/// The most entries of an index: those of a guest of 16 TiB.
pub const MAX_RECORDS: u64 = 1 << 22;

/// Bytes of a PAGE_DATA record before its entries: record header, count, reserved.
const BEFORE_ENTRIES: usize = 16;

/// Bytes of one entry.
const ENTRY: u64 = 8;

/// The first bytes behind the image.
pub const TRAILER_MAGIC: [u8; 8] = *b"XSRmapTr";

/// How many pad entries a PAGE_DATA record at `offset` needs before its `real` entries, so that
/// its data is aligned. `offset` is a multiple of 8.
///
/// ```
/// # use xsr_format::layout::pads;
/// assert_eq!(pads(2224, 1024), 232);
/// assert_eq!(pads(4096, 1024), 510);
/// assert_eq!(pads(4096, 1022), 0);
/// ```
pub const fn pads(offset: u64, real: u64) -> u64 {
    (data_offset(offset, real).wrapping_neg() >> 3) & 511
}

/// Where the data of a PAGE_DATA record at `offset` with so many entries begins. Saturates, so
/// that an offset from a file can be asked about.
pub const fn data_offset(offset: u64, entries: u64) -> u64 {
    offset
        .saturating_add(BEFORE_ENTRIES as u64)
        .saturating_add(entries.saturating_mul(ENTRY))
}

/// The next multiple of [`ALIGNMENT`] from `offset` on.
const fn aligned(offset: u64) -> u64 {
    offset.saturating_add(ALIGNMENT - 1) & !(ALIGNMENT - 1)
}

/// How many of a record's first entries are pads.
///
/// They are of type XTAB and have the pfn of the first real entry. A record of a plain stream has
/// none.
pub fn leading_pads(entries: impl IntoIterator<Item = PageEntry>) -> usize {
    let mut entries = entries.into_iter();
    let Some(first) = entries.next() else {
        return 0;
    };
    if first.page_type != PageType::XTAB {
        return 0;
    }
    let mut equal: usize = 1;
    for entry in entries {
        if entry == first {
            equal = equal.saturating_add(1);
            continue;
        }
        return match entry.pfn == first.pfn {
            true => equal,
            false => equal.saturating_sub(1),
        };
    }
    equal.saturating_sub(1)
}

/// Why the index of a mapped image cannot be used.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// The file could not be read.
    #[error("reading failed")]
    Io(#[from] io::Error),
    /// A field of the footer that this version does not understand.
    #[error(
        "the footer at byte {at:#x} says {what} {got:#x}, expected {expected}: a newer xsr made this file, or it is damaged"
    )]
    Unknown {
        /// Where the footer begins.
        at: u64,
        /// Which field.
        what: &'static str,
        /// What it has.
        got: u64,
        /// What this version knows.
        expected: &'static str,
    },
    /// The footer says that something is where it cannot be.
    #[error("the footer at byte {at:#x} says {what} {got:#x}, expected {expected:#x}")]
    Footer {
        /// Where the footer begins.
        at: u64,
        /// Which field.
        what: &'static str,
        /// What it has.
        got: u64,
        /// What it must have.
        expected: u64,
    },
    /// More entries than an index may have.
    #[error(
        "the footer at byte {at:#x} says that the index has {got} entries, expected at most {MAX_RECORDS}"
    )]
    TooManyRecords {
        /// Where the footer begins.
        at: u64,
        /// What it has.
        got: u64,
    },
    /// An entry of the index that breaks a rule.
    #[error("entry {number} of the index (at byte {at:#x}): {broken}")]
    Entry {
        /// Number of the entry, from 0.
        number: u64,
        /// Where it begins.
        at: u64,
        /// The rule.
        broken: EntryError,
    },
    /// The digest of index and footer does not fit them.
    #[error(
        "the digest of index and footer (footer at byte {at:#x}) does not fit: they are damaged"
    )]
    Digest {
        /// Where the footer begins.
        at: u64,
    },
    /// A record that is not what the index says of it.
    #[error(
        "PAGE_DATA at byte {offset:#x} (entry {number} of the index): {what} is {got:#x}, but the index says {expected:#x}"
    )]
    Record {
        /// Number of the entry, from 0.
        number: u64,
        /// Where the record begins.
        offset: u64,
        /// What differs.
        what: &'static str,
        /// What the record has.
        got: u64,
        /// What the index has.
        expected: u64,
    },
    /// The stream has the mapped layout, but nothing is behind it, or a trailer without its end.
    #[error(
        "page data is mapped, but the index and footer that belong after the image, from byte {image_end:#x} on, are {}: the file was cut off, or was never finished",
        match trailer { true => "incomplete", false => "missing" }
    )]
    FooterMissing {
        /// Where the image ends.
        image_end: u64,
        /// Whether a trailer begins there.
        trailer: bool,
    },
}

impl LayoutError {
    /// Whether the file is to blame, not the source it was read from.
    pub fn is_bad_image(&self) -> bool {
        match self {
            Self::Io(e) => e.kind() == io::ErrorKind::UnexpectedEof,
            _ => true,
        }
    }
}

/// A rule that an entry of the index breaks.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EntryError {
    /// The record begins before it can.
    #[error(
        "its record begins at byte {got:#x}, expected {least:#x} or later: the index is unsorted, or records overlap"
    )]
    Before {
        /// What it says.
        got: u64,
        /// Where the record before it ends.
        least: u64,
    },
    /// The record goes on where the image is over.
    #[error(
        "its record ends at byte {got:#x}, expected at most {most:#x}, which is where the image ends"
    )]
    Beyond {
        /// What it says.
        got: u64,
        /// The last byte there can be.
        most: u64,
    },
    /// A number that is not in its range.
    #[error("{what} is {got:#x}, expected {least:#x} to {most:#x}")]
    Range {
        /// Which field.
        what: &'static str,
        /// What it says.
        got: u64,
        /// The least there can be.
        least: u64,
        /// The most there can be.
        most: u64,
    },
    /// An offset that is not aligned.
    #[error("{what} is at byte {got:#x}, expected a multiple of {alignment}")]
    Unaligned {
        /// What is not.
        what: &'static str,
        /// Where it is.
        got: u64,
        /// What it is to be a multiple of.
        alignment: u64,
    },
}

/// A range of pfns, both in it, as a person reads it.
fn pfns(first: Pfn, last: Pfn) -> String {
    match first == last {
        true => format!("pfn {first}"),
        false => format!("pfns {first} to {last}"),
    }
}
