//! Reading the index of a mapped image, and finding pages by it.
//!
//! Specification: `docs/mapped.md`, "How a reader checks the index".

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use blake3::Hasher;
use zerocopy::FromBytes;

use super::index::{Footer, IndexEntry};
use super::room::Room;
use super::{BEFORE_ENTRIES, LayoutError, leading_pads};
use crate::byte_order::ByteOrder;
use crate::frame::{PAGE_SIZE, Page, PageEntry, Pfn, WirePageEntry};
use crate::record::RecordKind;
use crate::wire::U32;

const ORDER: ByteOrder = ByteOrder::Little;

/// The footer and the index of a mapped image, checked.
#[derive(Clone, Debug)]
pub struct Mapped {
    footer: Footer,
    entries: Vec<IndexEntry>,
    /// Stretches of the index in which pfns ascend.
    runs: Vec<Range<usize>>,
}

/// What an image says of a page, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// The page and its type.
    pub entry: PageEntry,
    /// Number of its record in the index.
    pub number: u64,
    /// Where its record begins.
    pub record: u64,
    /// Where its 4096 bytes are, if its type has data.
    pub data: Option<u64>,
}

impl Mapped {
    /// Read and check footer and index. `None` if there is no footer at the end of the file or in
    /// the xl header: the file is not mapped, or incomplete.
    ///
    /// # Errors
    ///
    /// The file could not be read, or what the footer or index says breaks a rule.
    pub fn open<R: Read + Seek>(source: &mut R) -> Result<Option<Self>, LayoutError> {
        let length = source.seek(SeekFrom::End(0))?;
        let Some(last) = length.checked_sub(Footer::BYTES as u64) else {
            return Ok(None);
        };
        let found = match read_footer(source, last, None)? {
            Some(found) => Some((found, last)),
            None => match Room::of(source)?.filter(|room| room.to <= length) {
                Some(room) => read_footer(source, room.footer(), Some(room))?
                    .map(|found| (found, room.footer())),
                None => None,
            },
        };
        let Some(((footer, bytes), at)) = found else {
            return Ok(None);
        };
        if footer.image_end > length {
            return Err(LayoutError::Footer {
                at,
                what: "that the stream ends at byte",
                got: footer.image_end,
                expected: length,
            });
        }
        let mut entries: Vec<IndexEntry> = Vec::new();
        let mut runs = Vec::new();
        let (mut from, mut pages) = (0, 0_u64);
        let mut before = footer.room.map_or(0, |room| room.to);
        let mut digest = Hasher::new();
        source.seek(SeekFrom::Start(footer.index_offset))?;
        let mut room = vec![0; IndexEntry::BYTES.saturating_mul(512)];
        let mut left = footer.records;
        while left > 0 {
            let step = usize::try_from(left).unwrap_or(512).min(512);
            left = left.saturating_sub(step as u64);
            let bytes = room.get_mut(..step.saturating_mul(IndexEntry::BYTES));
            let bytes = bytes.unwrap_or_default();
            source.read_exact(bytes)?;
            digest.update(bytes);
            let (chunks, _) = bytes.as_chunks::<{ IndexEntry::BYTES }>();
            for chunk in chunks {
                let number = entries.len();
                let decoded = IndexEntry::decode(chunk, before, footer.image_end);
                let entry = decoded.map_err(|broken| LayoutError::Entry {
                    number: number as u64,
                    at: footer
                        .index_offset
                        .saturating_add((number as u64).saturating_mul(IndexEntry::BYTES as u64)),
                    broken,
                })?;
                if entries
                    .last()
                    .is_some_and(|e| e.last_pfn >= entry.first_pfn)
                {
                    runs.push(from..number);
                    from = number;
                }
                before = entry.end();
                pages = pages.saturating_add(entry.pages.into());
                entries.push(entry);
            }
        }
        runs.push(from..entries.len());
        if pages != footer.pages {
            return Err(LayoutError::Footer {
                at,
                what: "that the number of pages is",
                got: footer.pages,
                expected: pages,
            });
        }
        match Footer::fits(&bytes, digest) {
            true => Ok(Some(Self {
                footer,
                entries,
                runs,
            })),
            false => Err(LayoutError::Digest { at }),
        }
    }

    /// The footer.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The entries of the index, in the order of the file.
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// What the image says of a page in the end. `None` if it does not mention it. Reads the
    /// head of one record, at most 12,296 bytes, for each run of ascending pfns in the index, of
    /// which a still save has one.
    ///
    /// # Errors
    ///
    /// The file could not be read; a record is not what the index says.
    pub fn find<R: Read + Seek>(
        &self,
        source: &mut R,
        pfn: Pfn,
    ) -> Result<Option<PagePlace>, LayoutError> {
        for run in self.runs.iter().rev() {
            let entries = self.entries.get(run.clone()).unwrap_or_default();
            let in_run = entries.partition_point(|entry| entry.last_pfn < pfn);
            let Some(entry) = entries.get(in_run).filter(|e| e.first_pfn <= pfn) else {
                continue;
            };
            let number = run.start.saturating_add(in_run) as u64;
            let head = read_head(source, number, entry)?;
            let mut data = entry.data_offset();
            let mut found = None;
            // Pads have the pfn of the entry that follows them, so that the last one counts.
            for page in head.entries() {
                let has_data = page.page_type.has_data();
                if page.pfn == pfn {
                    found = Some(PagePlace {
                        entry: page,
                        number,
                        record: entry.offset,
                        data: has_data.then_some(data),
                    });
                }
                if has_data {
                    data = data.saturating_add(PAGE_SIZE as u64);
                }
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

impl Mapped {
    /// What the image says of each page in the end, in ascending order of pfns: the page with its
    /// type, and where its contents are if it has any. Reads the heads of all records. Takes 24
    /// bytes of memory for each entry of the image.
    ///
    /// # Errors
    ///
    /// The file could not be read; a record is not what the index says.
    pub fn in_order<R: Read + Seek>(
        &self,
        source: &mut R,
    ) -> Result<Vec<(PageEntry, u64)>, LayoutError> {
        let mut words: Vec<(PageEntry, u64)> = Vec::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let head = read_head(source, number as u64, entry)?;
            let mut data = entry.data_offset();
            for page in head.entries().skip(entry.pads as usize) {
                words.push((page, data));
                if page.page_type.has_data() {
                    data = data.saturating_add(PAGE_SIZE as u64);
                }
            }
        }
        // Those of one pfn keep their order: the last one counts.
        words.reverse();
        words.sort_by_key(|(page, _)| page.pfn);
        words.dedup_by_key(|(page, _)| page.pfn);
        Ok(words)
    }
}

/// The footer that begins at `at`, if there is one, and its bytes.
fn read_footer<R: Read + Seek>(
    source: &mut R,
    at: u64,
    room: Option<Room>,
) -> Result<Option<(Footer, [u8; Footer::BYTES])>, LayoutError> {
    source.seek(SeekFrom::Start(at))?;
    let mut bytes = [0; Footer::BYTES];
    source.read_exact(&mut bytes)?;
    let footer = Footer::decode(&bytes, at, room)?;
    Ok(footer.map(|footer| (footer, bytes)))
}

/// Read the contents of a page that [`Mapped::find`] has found.
///
/// # Errors
///
/// The file could not be read.
pub fn read_page<R: Read + Seek>(source: &mut R, data: u64) -> io::Result<Page> {
    let mut page = [0; PAGE_SIZE];
    source.seek(SeekFrom::Start(data))?;
    source.read_exact(&mut page)?;
    Ok(page)
}

/// The head of a PAGE_DATA record: everything before its data.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) bytes: Vec<u8>,
}

impl Head {
    /// Read the head of the record of an index entry.
    pub(super) fn read<R: Read>(source: &mut R, entry: &IndexEntry) -> io::Result<Self> {
        // Checked to be small: at most 1535 entries.
        let bytes = entry.data_offset().saturating_sub(entry.offset);
        let mut bytes = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        source.read_exact(&mut bytes)?;
        Ok(Self { bytes })
    }

    /// The entries, pads among them.
    pub(super) fn entries(&self) -> impl Iterator<Item = PageEntry> + '_ {
        let bytes = self.bytes.get(BEFORE_ENTRIES..);
        let wire = <[WirePageEntry]>::ref_from_bytes(bytes.unwrap_or_default());
        let wire = wire.unwrap_or_default();
        wire.iter().map(|raw| raw.entry(ORDER))
    }

    /// Whether it is what the index says.
    fn check(&self, number: u64, entry: &IndexEntry) -> Result<(), LayoutError> {
        let same = |what, got: u64, expected: u64| match got == expected {
            true => Ok(()),
            false => Err(LayoutError::Record {
                number,
                offset: entry.offset,
                what,
                got,
                expected,
            }),
        };
        let field = |at: usize| {
            let bytes = self.bytes.get(at..).unwrap_or_default();
            U32::read_from_prefix(bytes).map_or(0, |(field, _)| u64::from(field.get(ORDER)))
        };
        same("type", field(0), RecordKind::PAGE_DATA.0.into())?;
        let length = entry.end().saturating_sub(entry.offset).saturating_sub(8);
        same("length", field(4), length)?;
        same("count", field(8), entry.entries.into())?;
        let pads = leading_pads(self.entries());
        same("number of pads", pads as u64, entry.pads.into())?;
        let (mut first, mut last, mut pages) = (u64::MAX, 0, 0_u64);
        for page in self.entries().skip(pads) {
            first = first.min(page.pfn.0);
            last = last.max(page.pfn.0);
            pages = pages.saturating_add(page.page_type.has_data().into());
        }
        same("number of pages", pages, entry.pages.into())?;
        same("lowest pfn", first, entry.first_pfn.0)?;
        same("highest pfn", last, entry.last_pfn.0)
    }
}

fn read_head<R: Read + Seek>(
    source: &mut R,
    number: u64,
    entry: &IndexEntry,
) -> Result<Head, LayoutError> {
    source.seek(SeekFrom::Start(entry.offset))?;
    let head = Head::read(source, entry)?;
    head.check(number, entry)?;
    Ok(head)
}
