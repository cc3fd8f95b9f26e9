//! Writing the mapped layout: pads, holes, digests, and the trailer with index and footer.
//!
//! Specification: `docs/mapped.md`, "Where page data lies", "Trailer".

use std::io::{self, Write};

use blake3::Hasher;

use super::index::{Footer, IndexEntry, PAGE_DIGEST_BYTES};
use super::room::Room;
use super::{MAX_RECORDS, TRAILER_MAGIC, aligned, pads};
use crate::error::WriteError;
use crate::frame::{PAGE_SIZE, Page, PageEntry};
use crate::transcode::ImageSink;
use crate::wrapper::xl::XlHeader;
use crate::write::padded_page_data_head;

/// A sink in which bytes can be left out.
pub trait SparseWrite: Write {
    /// Moves on by `bytes` bytes, which read as zeros afterwards. The last thing that is written
    /// to the sink is never left out.
    ///
    /// # Errors
    ///
    /// The sink's error.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

/// Holes are zeros.
impl SparseWrite for Vec<u8> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        self.resize(self.len().saturating_add(bytes), 0);
        Ok(())
    }
}

/// Writes an image in the mapped layout, from its first byte.
///
/// What is written with [`Write`] goes to the sink as it is, except page data: after
/// [`ImageSink::page_data`], the next bytes are the record's pages, of which those that are
/// zero become holes.
#[derive(Debug)]
pub struct MappedWriter<W> {
    sink: W,
    offset: u64,
    blanks: u32,
    rest: Hasher,
    record: Option<Record>,
    /// The part of a page that has come.
    partial: Vec<u8>,
    index: Vec<IndexEntry>,
    page_digests: Option<Vec<u8>>,
    pages: u64,
    zero_pages: u64,
}

/// A record whose pages are still to come.
#[derive(Debug)]
struct Record {
    entry: IndexEntry,
    digest: Hasher,
    pages_left: u32,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Length of the image in bytes.
    pub image_bytes: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Number of pages.
    pub pages: u64,
    /// Of those, pages of zeros.
    pub zero_pages: u64,
}

impl<W: SparseWrite> MappedWriter<W> {
    /// A writer onto a sink that stands at the start of an empty file. Page digests take 16 bytes
    /// of memory for each page until the end.
    pub fn new(sink: W, page_digests: bool) -> Self {
        Self {
            sink,
            offset: 0,
            blanks: 0,
            rest: Hasher::new(),
            record: None,
            partial: Vec::new(),
            index: Vec::new(),
            page_digests: page_digests.then(Vec::new),
            pages: 0,
            zero_pages: 0,
        }
    }

    /// The sink.
    pub fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// Begins a PAGE_DATA record with these entries, at most 1024. The contents of those that
    /// have data must follow.
    ///
    /// # Errors
    ///
    /// The sink's error; entries that no record can have; the stream is not at a multiple of 8;
    /// too many records for an index.
    fn begin_record(&mut self, entries: &[PageEntry]) -> Result<(), WriteError> {
        if self.record.is_some() || !self.partial.is_empty() {
            return Err(WriteError::Bug("a record begins inside another's pages"));
        }
        if !self.offset.is_multiple_of(8) {
            let why = "the stream does not begin at a multiple of 8, and there is no configuration to pad";
            return Err(WriteError::Io(io::Error::other(why)));
        }
        if self.index.len() as u64 >= MAX_RECORDS {
            let why = "the image has more PAGE_DATA records than the mapped layout can index";
            return Err(WriteError::Io(io::Error::other(why)));
        }
        let has_data = || entries.iter().filter(|e| e.page_type.has_data());
        let pads = match has_data().next() {
            None => 0,
            Some(_) => pads(self.offset, entries.len() as u64),
        };
        let head = padded_page_data_head(pads, entries)?;
        let pages = u32::try_from(has_data().count());
        let pages = pages.map_err(|_| WriteError::Bug("a record has more than 2^32 pages"))?;
        // The digest comes with the pages.
        let entry = IndexEntry::of(self.offset, pads, entries, [0; 32]);
        let mut digest = Hasher::new();
        digest.update(&head);
        self.sink.write_all(&head)?;
        self.offset = self.offset.saturating_add(head.len() as u64);
        self.record = Some(Record {
            entry,
            digest,
            pages_left: pages,
        });
        self.end_record();
        Ok(())
    }

    /// Moves a record into the index once all of its pages have come.
    fn end_record(&mut self) {
        if let Some(record) = self.record.take_if(|record| record.pages_left == 0) {
            let digest = record.digest.finalize().into();
            self.index.push(IndexEntry {
                digest,
                ..record.entry
            });
        }
    }

    /// Writes whole pages, no more than are left of the record.
    fn write_pages(&mut self, pages: &[Page]) -> io::Result<()> {
        let bug = || io::Error::other(WriteError::Bug("more pages than the record has"));
        let done = u32::try_from(pages.len()).map_err(|_| bug())?;
        let record = self.record.as_mut().ok_or_else(bug)?;
        record.pages_left = record.pages_left.checked_sub(done).ok_or_else(bug)?;
        record.digest.update(pages.as_flattened());
        for page in pages {
            if let Some(digests) = &mut self.page_digests {
                digests.extend_from_slice(&page_digest(page));
            }
        }
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let bytes = run.as_flattened();
            match run.first().is_some_and(is_zero) {
                true => {
                    self.sink.skip(bytes.len() as u64)?;
                    self.zero_pages = self.zero_pages.saturating_add(run.len() as u64);
                }
                false => self.sink.write_all(bytes)?,
            }
            self.offset = self.offset.saturating_add(bytes.len() as u64);
        }
        self.pages = self.pages.saturating_add(pages.len() as u64);
        self.end_record();
        Ok(())
    }

    /// Takes bytes of page data, as many as there are pages left; how many.
    fn take_data(&mut self, bytes: &[u8], pages_left: u32) -> io::Result<usize> {
        if self.partial.is_empty() {
            let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
            let most = pages.len().min(pages_left as usize);
            if let Some((pages, _)) = pages.split_at_checked(most)
                && !pages.is_empty()
            {
                self.write_pages(pages)?;
                return Ok(pages.as_flattened().len());
            }
        }
        let missing = PAGE_SIZE.saturating_sub(self.partial.len());
        let taken = bytes.get(..missing).unwrap_or(bytes);
        self.partial.extend_from_slice(taken);
        if let Ok(page) = Page::try_from(self.partial.as_slice()) {
            self.partial.clear();
            self.write_pages(&[page])?;
        }
        Ok(taken.len())
    }

    /// The image is complete: writes the trailer. The sink is not synced.
    ///
    /// # Errors
    ///
    /// The sink's error; the last record's pages have not all come.
    pub fn finish(mut self) -> Result<(W, Written), WriteError> {
        if self.record.is_some() {
            return Err(WriteError::Bug("the image ends inside a record's pages"));
        }
        let trailer = Trailer {
            room: None,
            blanks: self.blanks,
            image_end: self.offset,
            moved: false,
            index: &self.index,
            page_digests: self.page_digests.as_deref(),
            rest_digest: self.rest.finalize().into(),
        };
        self.sink.write_all(&TRAILER_MAGIC)?;
        let written = self.offset.saturating_add(TRAILER_MAGIC.len() as u64);
        self.sink.skip(trailer.offset().saturating_sub(written))?;
        self.sink
            .write_all(trailer.page_digests.unwrap_or_default())?;
        let index = trailer.encode_index();
        self.sink.write_all(&index)?;
        self.sink.write_all(&trailer.encode_footer(&index))?;
        self.sink.flush()?;
        let written = Written {
            image_bytes: trailer.image_end,
            file_bytes: trailer.length(),
            pages: self.pages,
            zero_pages: self.zero_pages,
        };
        Ok((self.sink, written))
    }
}

impl<W: SparseWrite> Write for MappedWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        if let Some(record) = &self.record {
            let left = record.pages_left;
            return self.take_data(bytes, left);
        }
        let n = self.sink.write(bytes)?;
        let written = bytes.get(..n);
        let written = written.ok_or_else(|| {
            let why = "the sink claims to have written more than it was given";
            io::Error::other(WriteError::Bug(why))
        })?;
        self.rest.update(written);
        self.offset = self.offset.saturating_add(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl<W: SparseWrite> ImageSink for MappedWriter<W> {
    fn xl_header(&mut self, header: &XlHeader) -> io::Result<()> {
        let (header, blanks) = header.aligned().map_err(io::Error::other)?;
        self.blanks = blanks;
        self.write_all(&header.encode())
    }

    fn page_data(&mut self, entries: &[PageEntry]) -> Result<(), WriteError> {
        self.begin_record(entries)
    }
}

/// The bytes of a PAGE_DATA record before its data: so many pads, then these entries.
///
/// # Errors
///
/// Entries that no record can have.
pub fn record_head(pads: u64, entries: &[PageEntry]) -> Result<Vec<u8>, WriteError> {
    padded_page_data_head(pads, entries)
}

/// Page digests, index and footer of a mapped image.
#[derive(Clone, Copy, Debug)]
pub struct Trailer<'t> {
    /// The bytes of the xl header that hold them; `None` if they follow the image.
    pub room: Option<Room>,
    /// How many blanks the configuration got.
    pub blanks: u32,
    /// Where the image ends.
    pub image_end: u64,
    /// Whether pages stand in another order than in a still save.
    pub moved: bool,
    /// The entries of the index, in the order of the file.
    pub index: &'t [IndexEntry],
    /// The digests of all pages, one after the other, if there are any.
    pub page_digests: Option<&'t [u8]>,
    /// All bytes of the image that are not in a record of the index.
    pub rest_digest: [u8; 32],
}

impl Trailer<'_> {
    /// Where it begins, after the magic and zeros: with the page digests, if there are any.
    pub fn offset(&self) -> u64 {
        match self.room {
            None => aligned(self.image_end.saturating_add(TRAILER_MAGIC.len() as u64)),
            Some(room) => room.footer().saturating_sub(self.before_footer()),
        }
    }

    /// Whether it fits into its room.
    pub fn fits(&self) -> bool {
        let fits = |room: Room| room.footer().checked_sub(self.before_footer()) >= Some(room.from);
        self.room.is_none_or(fits)
    }

    /// Bytes of page digests and index.
    fn before_footer(&self) -> u64 {
        let digests = self.page_digests.unwrap_or_default().len() as u64;
        digests.saturating_add((self.index.len() as u64).saturating_mul(IndexEntry::BYTES as u64))
    }

    /// Where the index begins.
    pub fn index_offset(&self) -> u64 {
        let digests = self.page_digests.unwrap_or_default().len() as u64;
        self.offset().saturating_add(digests)
    }

    /// Where the footer begins.
    pub fn footer_offset(&self) -> u64 {
        let index = (self.index.len() as u64).saturating_mul(IndexEntry::BYTES as u64);
        self.index_offset().saturating_add(index)
    }

    /// The length of the file; with a room, of what precedes the end of the libxc stream.
    pub fn length(&self) -> u64 {
        if self.room.is_some() {
            return self.image_end;
        }
        self.footer_offset().saturating_add(Footer::BYTES as u64)
    }

    /// The index as it stands in the file.
    pub fn encode_index(&self) -> Vec<u8> {
        self.index.iter().flat_map(IndexEntry::encode).collect()
    }

    /// The footer, after that index.
    pub fn encode_footer(&self, index: &[u8]) -> [u8; Footer::BYTES] {
        let mut digest = Hasher::new();
        digest.update(index);
        let page_digests_digest = match self.page_digests {
            Some(digests) => blake3::hash(digests).into(),
            None => [0; 32],
        };
        let pages = self.index.iter().map(|entry| u64::from(entry.pages));
        let footer = Footer {
            room: self.room,
            blanks: self.blanks,
            image_end: self.image_end,
            moved: self.moved,
            index_offset: self.index_offset(),
            records: self.index.len() as u64,
            page_digests: self.page_digests.map(|_| self.offset()),
            pages: pages.fold(0, u64::saturating_add),
            page_digests_digest,
            rest_digest: self.rest_digest,
        };
        footer.encode(digest)
    }
}

/// The BLAKE3 digest of these pieces, one after the other.
pub fn digest(pieces: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Hasher::new();
    for piece in pieces {
        hasher.update(piece);
    }
    hasher.finalize().into()
}

/// Whether a page holds nothing but zeros.
pub fn is_zero(page: &Page) -> bool {
    *page == [0; PAGE_SIZE]
}

/// The digest of a page.
pub fn page_digest(page: &Page) -> [u8; PAGE_DIGEST_BYTES] {
    let mut digest = [0; PAGE_DIGEST_BYTES];
    let mut hasher = Hasher::new();
    hasher.update(page).finalize_xof().fill(&mut digest);
    digest
}
