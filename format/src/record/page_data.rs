//! PAGE_DATA: a batch of pages. Its body can be large, so it is not kept as a whole: the entries
//! are checked first, the pages are passed on.
//!
//! Specification: "PAGE_DATA". C implementation: `xg_sr_save.c:write_batch`,
//! `xg_sr_restore.c:handle_page_data`.

use std::slice;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Context;
use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, Reserved};
use crate::frame::{PAGE_SIZE, PageEntry, Pfn, WirePageEntry};
use crate::wire::U32;

/// The head of PAGE_DATA.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | count, ≥ 1 |
/// | 4–7 | reserved, zero |
/// | 8… | count × u64 entry |
/// | … | 4096 octets for each entry whose type has data |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WirePageDataHead {
    count: U32,
    reserved: U32,
}

impl WirePageDataHead {
    /// Length in the stream.
    pub(crate) const BYTES: usize = 8;

    pub(crate) fn new(count: u32, order: ByteOrder) -> Self {
        Self {
            count: U32::new(count, order),
            reserved: U32::new(0, order),
        }
    }

    /// Checks the head against the body's length. Returns the size of the entries that follow.
    pub(crate) fn entry_bytes(
        &self,
        body_length: u32,
        context: Context,
    ) -> Result<u64, DecodeError> {
        let count = self.count.get(context.order);
        if count == 0 {
            return Err(DecodeError::PageCountZero);
        }
        Reserved {
            lenient: context.lenient,
            structure: "PAGE_DATA",
        }
        .zero(
            "reserved bytes",
            4,
            u64::from(self.reserved.get(context.order)),
        )?;
        let entries = u64::from(count).saturating_mul(8);
        let least = entries.saturating_add(Self::BYTES as u64);
        if u64::from(body_length) < least {
            return Err(DecodeError::BodyLength {
                expected: Length::AtLeast(least),
                got: u64::from(body_length),
            });
        }
        Ok(entries)
    }
}

/// The checked entries of a PAGE_DATA record.
#[derive(Clone, Copy, Debug)]
pub struct Entries<'a> {
    wire: &'a [WirePageEntry],
    order: ByteOrder,
}

impl<'a> Entries<'a> {
    /// Checks every entry and the length of the body. Returns the number of pages that follow.
    ///
    /// `max_pfn` is the last pfn that X86_PV_P2M_FRAMES announced, for a PV guest.
    pub(crate) fn check(
        wire: &'a [WirePageEntry],
        body_length: u32,
        max_pfn: Option<Pfn>,
        context: Context,
    ) -> Result<(Self, u64), DecodeError> {
        let mut pages: u64 = 0;
        for (index, raw) in wire.iter().enumerate() {
            let entry = raw.entry(context.order);
            let index = index as u64;
            if !entry.page_type.is_known() {
                return Err(DecodeError::PageTypeUnknown {
                    index,
                    pfn: entry.pfn,
                    got: entry.page_type,
                });
            }
            let reserved = raw.reserved(context.order);
            if reserved != 0 && !context.lenient {
                return Err(DecodeError::PageEntryReserved {
                    index,
                    pfn: entry.pfn,
                    got: reserved,
                });
            }
            if let Some(max) = max_pfn
                && entry.pfn > max
            {
                return Err(DecodeError::PageBeyondP2m {
                    index,
                    pfn: entry.pfn,
                    max,
                });
            }
            pages = pages.saturating_add(u64::from(entry.page_type.has_data()));
        }
        let expected = (wire.len() as u64)
            .saturating_mul(8)
            .saturating_add(WirePageDataHead::BYTES as u64)
            .saturating_add(pages.saturating_mul(PAGE_SIZE as u64));
        if u64::from(body_length) != expected {
            return Err(DecodeError::BodyLength {
                expected: Length::Exactly(expected),
                got: u64::from(body_length),
            });
        }
        let order = context.order;
        Ok((Self { wire, order }, pages))
    }

    /// Entries that [`Entries::check`] has already accepted.
    pub(crate) fn trusted(wire: &'a [WirePageEntry], context: Context) -> Self {
        let order = context.order;
        Self { wire, order }
    }

    /// Number of entries: 1 or more.
    pub fn len(&self) -> usize {
        self.wire.len()
    }

    /// Always false: a record has at least one entry.
    pub fn is_empty(&self) -> bool {
        self.wire.is_empty()
    }

    /// The entries as they stand in the stream.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.wire.as_bytes()
    }

    /// At most `most` entries, starting with the one at index `from`.
    pub(crate) fn part(self, from: usize, most: usize) -> Self {
        let (_, rest) = self.wire.split_at(from.min(self.wire.len()));
        let (wire, _) = rest.split_at(most.min(rest.len()));
        Self { wire, ..self }
    }

    /// The entries, in the order of the stream.
    pub fn iter(&self) -> EntriesIter<'a> {
        EntriesIter {
            wire: self.wire.iter(),
            order: self.order,
        }
    }
}

impl<'a> IntoIterator for Entries<'a> {
    type Item = PageEntry;
    type IntoIter = EntriesIter<'a>;

    fn into_iter(self) -> EntriesIter<'a> {
        self.iter()
    }
}

impl<'a> IntoIterator for &Entries<'a> {
    type Item = PageEntry;
    type IntoIter = EntriesIter<'a>;

    fn into_iter(self) -> EntriesIter<'a> {
        self.iter()
    }
}

/// Iterator over the entries of a PAGE_DATA record.
#[derive(Clone, Debug)]
pub struct EntriesIter<'a> {
    wire: slice::Iter<'a, WirePageEntry>,
    order: ByteOrder,
}

impl Iterator for EntriesIter<'_> {
    type Item = PageEntry;

    fn next(&mut self) -> Option<PageEntry> {
        Some(self.wire.next()?.entry(self.order))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.wire.size_hint()
    }
}

impl ExactSizeIterator for EntriesIter<'_> {}
