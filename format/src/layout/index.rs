//! Index and footer of the mapped layout, encoded and decoded, each field checked before it is
//! used.
//!
//! Specification: `docs/mapped.md`, "Trailer", "How a reader checks the index".

use blake3::Hasher;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::room::Room;
use super::{
    ALIGNMENT, EntryError, LayoutError, MAX_ENTRIES, MAX_REAL, MAX_RECORDS, TRAILER_MAGIC, aligned,
    data_offset,
};
use crate::byte_order::ByteOrder;
use crate::frame::{PageEntry, Pfn};
use crate::wire::{U32, U64};
use crate::wrapper::xl::{XlError, XlHeader};

const ORDER: ByteOrder = ByteOrder::Little;

/// The first bytes of the footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"XSRmapFt";

/// The version that is written and read.
pub const VERSION: u32 = 1;

/// A flag of the footer: there are page digests.
const FLAG_PAGE_DIGESTS: u32 = 1;

/// A flag of the footer: entries do not stand in the order of a still save.
const FLAG_MOVED: u32 = 2;

/// The place of index and footer: after the image.
const PLACE_TRAILER: u32 = 1;

/// The place of index and footer: in the optional data of the xl header.
const PLACE_HEADER: u32 = 2;

/// The most blanks that make a configuration's length fit.
const MAX_BLANKS: u32 = 7;

/// Bytes of a page's digest.
pub const PAGE_DIGEST_BYTES: usize = 16;

/// Bytes of an END record, which follows the last PAGE_DATA record at least.
const END_BYTES: u64 = 8;

/// Bytes of the headers of a libxc stream.
const HEADERS: u64 = 40;

/// What the index says of a PAGE_DATA record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Where the record begins.
    pub offset: u64,
    /// The lowest pfn of its real entries.
    pub first_pfn: Pfn,
    /// The highest pfn of its real entries.
    pub last_pfn: Pfn,
    /// Number of entries, pads included.
    pub entries: u32,
    /// Number of pads.
    pub pads: u32,
    /// Number of entries that have data.
    pub pages: u32,
    /// BLAKE3 of the whole record.
    pub digest: [u8; 32],
}

/// An entry as it stands in the file; `docs/mapped.md` has the table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireIndexEntry {
    offset: U64,
    data_offset: U64,
    first_pfn: U64,
    last_pfn: U64,
    entries: U32,
    pads: U32,
    pages: U32,
    reserved: U32,
    digest: [u8; 32],
}

const _: () = assert!(size_of::<WireIndexEntry>() == IndexEntry::BYTES);

fn in_range(what: &'static str, got: u64, least: u64, most: u64) -> Result<(), EntryError> {
    match (least..=most).contains(&got) {
        true => Ok(()),
        false => Err(EntryError::Range {
            what,
            got,
            least,
            most,
        }),
    }
}

fn is_aligned(what: &'static str, got: u64, alignment: u64) -> Result<(), EntryError> {
    match got.is_multiple_of(alignment) {
        true => Ok(()),
        false => Err(EntryError::Unaligned {
            what,
            got,
            alignment,
        }),
    }
}

impl IndexEntry {
    /// Bytes in the file.
    pub const BYTES: usize = 80;

    /// Of a record at `offset` with so many pads before these entries.
    pub fn of(offset: u64, pads: u64, entries: &[PageEntry], digest: [u8; 32]) -> Self {
        let pfns = || entries.iter().map(|entry| entry.pfn);
        let pages = entries.iter().filter(|e| e.page_type.has_data()).count();
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            offset,
            first_pfn: pfns().min().unwrap_or(Pfn(0)),
            last_pfn: pfns().max().unwrap_or(Pfn(0)),
            entries: narrow(pads.saturating_add(entries.len() as u64)),
            pads: narrow(pads),
            pages: narrow(pages as u64),
            digest,
        }
    }

    /// Where the record's data begins.
    pub fn data_offset(&self) -> u64 {
        data_offset(self.offset, self.entries.into())
    }

    /// Where the record ends.
    pub fn end(&self) -> u64 {
        self.data_offset().saturating_add(self.data_bytes())
    }

    /// Bytes of page data.
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.pages).saturating_mul(ALIGNMENT)
    }

    /// The entry as it stands in the file.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let wire = WireIndexEntry {
            offset: U64::new(self.offset, ORDER),
            data_offset: U64::new(self.data_offset(), ORDER),
            first_pfn: U64::new(self.first_pfn.0, ORDER),
            last_pfn: U64::new(self.last_pfn.0, ORDER),
            entries: U32::new(self.entries, ORDER),
            pads: U32::new(self.pads, ORDER),
            pages: U32::new(self.pages, ORDER),
            reserved: U32::new(0, ORDER),
            digest: self.digest,
        };
        zerocopy::transmute!(wire)
    }

    /// Decode and check an entry of an image that ends at `image_end`, in which the record of the
    /// entry before this one ends at `before`.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn decode(
        bytes: &[u8; Self::BYTES],
        before: u64,
        image_end: u64,
    ) -> Result<Self, EntryError> {
        let wire: WireIndexEntry = zerocopy::transmute!(*bytes);
        let entry = Self {
            offset: wire.offset.get(ORDER),
            first_pfn: Pfn(wire.first_pfn.get(ORDER)),
            last_pfn: Pfn(wire.last_pfn.get(ORDER)),
            entries: wire.entries.get(ORDER),
            pads: wire.pads.get(ORDER),
            pages: wire.pages.get(ORDER),
            digest: wire.digest,
        };
        let least = before.max(HEADERS);
        if entry.offset < least {
            let got = entry.offset;
            return Err(EntryError::Before { got, least });
        }
        is_aligned("its record", entry.offset, 8)?;
        let entries = u64::from(entry.entries);
        in_range("number of entries", entries, 1, MAX_ENTRIES.into())?;
        let pads = u64::from(entry.pads);
        in_range("number of pads", pads, 0, entries.saturating_sub(1))?;
        let real = entries.saturating_sub(pads);
        in_range("number of real entries", real, 1, MAX_REAL.into())?;
        in_range("number of pages", entry.pages.into(), 0, real)?;
        let expected = entry.data_offset();
        let got = wire.data_offset.get(ORDER);
        in_range("offset of its data", got, expected, expected)?;
        if entry.pages > 0 {
            is_aligned("its data", expected, ALIGNMENT)?;
        }
        let most = image_end.saturating_sub(END_BYTES);
        if entry.end() > most {
            let got = entry.end();
            return Err(EntryError::Beyond { got, most });
        }
        let (first, last) = (entry.first_pfn.0, entry.last_pfn.0);
        in_range("highest pfn", last, first, PageEntry::MAX_PFN.0)?;
        in_range("reserved field", wire.reserved.get(ORDER).into(), 0, 0)?;
        Ok(entry)
    }
}

/// The end of a mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The bytes of the xl header in which index and footer are; `None` if they follow the image.
    pub room: Option<Room>,
    /// How many blanks the configuration got.
    pub blanks: u32,
    /// Where the image ends; with a room in the xl header, where the libxc stream ends.
    pub image_end: u64,
    /// Whether entries stand in another order than in a still save: a page that came or went
    /// during a live save has taken another's place.
    pub moved: bool,
    /// Where the index begins.
    pub index_offset: u64,
    /// Number of its entries.
    pub records: u64,
    /// Where the page digests begin, if there are any.
    pub page_digests: Option<u64>,
    /// Number of pages in the image.
    pub pages: u64,
    /// BLAKE3 of the page digests; zeros if there are none.
    pub page_digests_digest: [u8; 32],
    /// BLAKE3 of everything that is not page data.
    pub rest_digest: [u8; 32],
}

/// The footer as it stands in the file; `docs/mapped.md` has the table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireFooter {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    place: U32,
    blanks: U32,
    image_end: U64,
    index_offset: U64,
    records: U64,
    page_digests: U64,
    pages: U64,
    page_digests_digest: [u8; 32],
    rest_digest: [u8; 32],
    digest: [u8; 32],
}

const _: () = assert!(size_of::<WireFooter>() == Footer::BYTES);

fn place_of(room: Option<Room>) -> u32 {
    match room {
        None => PLACE_TRAILER,
        Some(_) => PLACE_HEADER,
    }
}

/// The footer's bytes before the digest of index and footer.
const DIGESTED: usize = 128;

impl Footer {
    /// Bytes in the file.
    pub const BYTES: usize = 160;

    /// The footer as it stands in the file, behind an index whose bytes `index` was given.
    pub fn encode(&self, mut index: Hasher) -> [u8; Self::BYTES] {
        let mut wire = WireFooter {
            magic: FOOTER_MAGIC,
            version: U32::new(VERSION, ORDER),
            flags: U32::new(
                (match self.page_digests {
                    Some(_) => FLAG_PAGE_DIGESTS,
                    None => 0,
                }) | match self.moved {
                    true => FLAG_MOVED,
                    false => 0,
                },
                ORDER,
            ),
            place: U32::new(place_of(self.room), ORDER),
            blanks: U32::new(self.blanks, ORDER),
            image_end: U64::new(self.image_end, ORDER),
            index_offset: U64::new(self.index_offset, ORDER),
            records: U64::new(self.records, ORDER),
            page_digests: U64::new(self.page_digests.unwrap_or(0), ORDER),
            pages: U64::new(self.pages, ORDER),
            page_digests_digest: self.page_digests_digest,
            rest_digest: self.rest_digest,
            digest: [0; 32],
        };
        if let Some((digested, _)) = wire.as_bytes().split_at_checked(DIGESTED) {
            index.update(digested);
        }
        wire.digest = index.finalize().into();
        zerocopy::transmute!(wire)
    }

    /// The xl header of the image as it was before it was mapped.
    ///
    /// # Errors
    ///
    /// The header's optional data is too long.
    pub fn plain_header(&self, header: &XlHeader) -> Result<XlHeader, XlError> {
        match self.room {
            Some(_) => header.without_tail(),
            None => header.without_blanks(self.blanks),
        }
    }

    /// Decode and check a footer that begins at byte `at`, which is the end of `room` if there is
    /// one. `None` if it is no footer.
    ///
    /// # Errors
    ///
    /// A version or flag that is unknown; a field that does not fit where the footer is.
    pub fn decode(
        bytes: &[u8; Self::BYTES],
        at: u64,
        room: Option<Room>,
    ) -> Result<Option<Self>, LayoutError> {
        let wire: WireFooter = zerocopy::transmute!(*bytes);
        if wire.magic != FOOTER_MAGIC {
            return Ok(None);
        }
        let known = |what, got: u32, most: u32, expected| match got <= most {
            true => Ok(()),
            false => Err(LayoutError::Unknown {
                at,
                what,
                got: got.into(),
                expected,
            }),
        };
        let version = wire.version.get(ORDER);
        if version != VERSION {
            return Err(LayoutError::Unknown {
                at,
                what: "version",
                got: version.into(),
                expected: "1",
            });
        }
        let flags = wire.flags.get(ORDER);
        known("flags", flags, FLAG_PAGE_DIGESTS | FLAG_MOVED, "0 to 3")?;
        let place = wire.place.get(ORDER);
        if place != place_of(room) {
            return Err(LayoutError::Unknown {
                at,
                what: "place",
                got: place.into(),
                expected: match room {
                    None => "1 for an index after the image",
                    Some(_) => "2 for an index in the xl header",
                },
            });
        }
        known("blanks", wire.blanks.get(ORDER), MAX_BLANKS, "0 to 7")?;
        let has_digests = flags & FLAG_PAGE_DIGESTS != 0;
        let footer = Self {
            room,
            blanks: wire.blanks.get(ORDER),
            image_end: wire.image_end.get(ORDER),
            moved: flags & FLAG_MOVED != 0,
            index_offset: wire.index_offset.get(ORDER),
            records: wire.records.get(ORDER),
            page_digests: has_digests.then_some(wire.page_digests.get(ORDER)),
            pages: wire.pages.get(ORDER),
            page_digests_digest: wire.page_digests_digest,
            rest_digest: wire.rest_digest,
        };
        footer.check(at, wire.page_digests.get(ORDER))?;
        Ok(Some(footer))
    }

    fn check(&self, at: u64, page_digests: u64) -> Result<(), LayoutError> {
        let same = |what, got: u64, expected: u64| match got == expected {
            true => Ok(()),
            false => Err(LayoutError::Footer {
                at,
                what,
                got,
                expected,
            }),
        };
        if self.records > MAX_RECORDS {
            let got = self.records;
            return Err(LayoutError::TooManyRecords { at, got });
        }
        let entries = self.records.saturating_mul(IndexEntry::BYTES as u64);
        let index = at.saturating_sub(entries);
        same("that the index begins at byte", self.index_offset, index)?;
        let first = match self.page_digests {
            Some(got) => {
                let bytes = self.pages.saturating_mul(PAGE_DIGEST_BYTES as u64);
                let digests = index.saturating_sub(bytes);
                same("that the page digests begin at byte", got, digests)?;
                digests
            }
            None => {
                same("that the page digests begin at byte", page_digests, 0)?;
                index
            }
        };
        if let Some(room) = self.room {
            if first < room.from {
                return Err(LayoutError::Footer {
                    at,
                    what: "that the index and page digests begin at byte",
                    got: first,
                    expected: room.from,
                });
            }
            return match self.image_end >= room.to {
                true => Ok(()),
                false => Err(LayoutError::Footer {
                    at,
                    what: "that the stream ends at byte",
                    got: self.image_end,
                    expected: room.to,
                }),
            };
        }
        let magic = TRAILER_MAGIC.len() as u64;
        let expected = aligned(self.image_end.saturating_add(magic));
        match first == expected {
            true => Ok(()),
            false => Err(LayoutError::Footer {
                at,
                what: "that the image ends at byte",
                got: self.image_end,
                // The last byte at which it can end.
                expected: first.saturating_sub(magic),
            }),
        }
    }

    /// Whether the digest in the footer fits it and the index, whose bytes `index` was given.
    pub(super) fn fits(bytes: &[u8; Self::BYTES], mut index: Hasher) -> bool {
        let (digested, digest) = bytes.split_at(DIGESTED);
        index.update(digested);
        index.finalize().as_slice() == digest
    }
}
