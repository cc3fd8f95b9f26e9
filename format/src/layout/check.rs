//! Checking every digest of a mapped image.
//!
//! Specification: `docs/mapped.md`, "Trailer".

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};

use blake3::Hasher;

use super::find::{Head, Mapped};
use super::index::{IndexEntry, PAGE_DIGEST_BYTES};
use super::write::page_digest;
use super::{LayoutError, TRAILER_MAGIC, pfns};
use crate::frame::{PAGE_SIZE, Pfn};

/// How many damaged pages of a record are named.
const MOST_PAGES: usize = 8;

/// Bytes that are read at once.
const STEP: usize = 256 << 10;

/// Something that does not fit its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A PAGE_DATA record.
    Record {
        /// Number in the index, from 0.
        number: u64,
        /// What the index says of it.
        entry: IndexEntry,
        /// With page digests: the pages that do not fit theirs, and where they are; the first of
        /// them. None if it is the record's entries that do not fit.
        pages: Option<Vec<(Pfn, u64)>>,
    },
    /// Anything in the image that is not page data.
    Rest {
        /// Where the image ends.
        image_end: u64,
    },
    /// The page digests themselves.
    PageDigests {
        /// Where they begin.
        offset: u64,
    },
    /// The bytes before the index that do not belong to the image, which are known.
    Gap {
        /// Where they begin.
        offset: u64,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record {
                number,
                entry,
                pages,
            } => {
                let (from, to) = (entry.offset, entry.end());
                let pfns = pfns(entry.first_pfn, entry.last_pfn);
                write!(
                    f,
                    "PAGE_DATA number {number} (bytes {from:#x} to {to:#x}, {pfns}) does not fit its digest"
                )?;
                match pages.as_deref() {
                    None => Ok(()),
                    Some([]) => write!(f, ": its header, or a type or pfn, was changed"),
                    Some(pages) => {
                        write!(f, ": changed are")?;
                        for (i, (pfn, at)) in pages.iter().enumerate() {
                            let comma = if i == 0 { "" } else { "," };
                            write!(f, "{comma} pfn {pfn} at byte {at:#x}")?;
                        }
                        match pages.len() < MOST_PAGES {
                            true => Ok(()),
                            false => write!(f, " and perhaps more"),
                        }
                    }
                }
            }
            Self::Rest { image_end } => write!(
                f,
                "the headers and records other than PAGE_DATA (between bytes 0 and {image_end:#x}) do not fit their digest"
            ),
            Self::PageDigests { offset } => {
                write!(
                    f,
                    "the page digests at byte {offset:#x} do not fit their digest"
                )
            }
            Self::Gap { offset } => write!(
                f,
                "the bytes before the index, from {offset:#x} on, were changed"
            ),
        }
    }
}

/// Read all of a mapped image and check every digest of it, those of pages included.
///
/// # Errors
///
/// The file could not be read, or ends before the index says; `report`'s error.
pub fn check<R: Read + Seek, E: From<LayoutError>>(
    mapped: &Mapped,
    source: &mut R,
    mut report: impl FnMut(Damage) -> Result<(), E>,
) -> Result<(), E> {
    let io = |e: io::Error| E::from(LayoutError::Io(e));
    let footer = mapped.footer();
    let mut buffer = vec![0; STEP];
    let mut rest = Hasher::new();
    let mut digests_digest = Hasher::new();
    let mut at = 0;
    let mut digests_at = footer.page_digests;
    source.seek(SeekFrom::Start(0)).map_err(io)?;
    if let Some(room) = footer.room {
        read_through(source, room.from, &mut buffer, |bytes| {
            rest.update(bytes);
        })
        .map_err(io)?;
        at = room.to;
        source.seek(SeekFrom::Start(at)).map_err(io)?;
    }
    for (number, entry) in mapped.entries().iter().enumerate() {
        let before = entry.offset.saturating_sub(at);
        read_through(source, before, &mut buffer, |bytes| {
            rest.update(bytes);
        })
        .map_err(io)?;
        let head = Head::read(source, entry).map_err(io)?;
        let mut digest = Hasher::new();
        digest.update(&head.bytes);
        let expected = match &mut digests_at {
            Some(at) => {
                let bytes = u64::from(entry.pages).saturating_mul(PAGE_DIGEST_BYTES as u64);
                let mut table = Vec::new();
                source.seek(SeekFrom::Start(*at)).map_err(io)?;
                read_through(source, bytes, &mut buffer, |bytes| {
                    table.extend_from_slice(bytes);
                })
                .map_err(io)?;
                digests_digest.update(&table);
                *at = at.saturating_add(bytes);
                source
                    .seek(SeekFrom::Start(entry.data_offset()))
                    .map_err(io)?;
                Some(table)
            }
            None => None,
        };
        let expected = expected.as_deref().map(|table| table.as_chunks().0);
        let mut damaged = expected.map(|_| Vec::new());
        let mut index: usize = 0;
        read_through(source, entry.data_bytes(), &mut buffer, |bytes| {
            digest.update(bytes);
            let (Some(expected), Some(damaged)) = (expected, &mut damaged) else {
                return;
            };
            let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
            for page in pages {
                if expected.get(index) != Some(&page_digest(page)) && damaged.len() < MOST_PAGES {
                    damaged.push(index);
                }
                index = index.saturating_add(1);
            }
        })
        .map_err(io)?;
        at = entry.end();
        let fits = digest.finalize().as_slice() == entry.digest;
        if !fits || damaged.as_ref().is_some_and(|pages| !pages.is_empty()) {
            report(Damage::Record {
                number: number as u64,
                entry: *entry,
                pages: damaged.map(|pages| named(&head, entry, &pages)),
            })?;
        }
    }
    let before = footer.image_end.saturating_sub(at);
    read_through(source, before, &mut buffer, |bytes| {
        rest.update(bytes);
    })
    .map_err(io)?;
    if rest.finalize().as_slice() != footer.rest_digest {
        let image_end = footer.image_end;
        report(Damage::Rest { image_end })?;
    }
    let trailer = footer.page_digests.unwrap_or(footer.index_offset);
    let (offset, magic) = match footer.room {
        None => (footer.image_end, TRAILER_MAGIC.as_slice()),
        Some(room) => (room.from, &[][..]),
    };
    let mut gap = Vec::new();
    let length = trailer.saturating_sub(offset);
    source.seek(SeekFrom::Start(offset)).map_err(io)?;
    read_through(source, length, &mut buffer, |bytes| {
        gap.extend_from_slice(bytes);
    })
    .map_err(io)?;
    let zeros = gap.strip_prefix(magic);
    if !zeros.is_some_and(|zeros| zeros.iter().all(|byte| *byte == 0)) {
        report(Damage::Gap { offset })?;
    }
    if let Some(offset) = footer.page_digests
        && digests_digest.finalize().as_slice() != footer.page_digests_digest
    {
        report(Damage::PageDigests { offset })?;
    }
    Ok(())
}

/// Which pages these are, by their number among those with data.
fn named(head: &Head, entry: &IndexEntry, indices: &[usize]) -> Vec<(Pfn, u64)> {
    let with_data: Vec<Pfn> = head
        .entries()
        .filter(|page| page.page_type.has_data())
        .map(|page| page.pfn)
        .collect();
    let named = indices.iter().filter_map(|index| {
        let bytes = (*index as u64).saturating_mul(PAGE_SIZE as u64);
        let pfn = with_data.get(*index)?;
        Some((*pfn, entry.data_offset().saturating_add(bytes)))
    });
    named.collect()
}

/// Read so many bytes, in pieces that are whole pages except for the last.
fn read_through<R: Read>(
    source: &mut R,
    bytes: u64,
    room: &mut [u8],
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(STEP).min(room.len());
        let piece = room.get_mut(..step).unwrap_or_default();
        source.read_exact(piece)?;
        each(piece);
        left = left.saturating_sub(step as u64);
    }
    Ok(())
}
