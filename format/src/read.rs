//! Streaming reader of libxc streams, record by record. It never reads beyond the stream or
//! backwards, and never uses more memory than a record needs.
//!
//! libxl passes its file descriptor to the libxc layer and takes it back after END or CHECKPOINT,
//! so a reader that consumed one byte too many would break both. The bytes of PAGE_DATA are passed
//! on, not kept.
//!
//! Specification: libxc migration stream. C implementation:
//! `xg_sr_common.c:read_record`, `xg_sr_restore.c`.

use std::fmt;
use std::io::{self, Read, Seek};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::byte_order::ByteOrder;
use crate::decoder::{Decoder, WIRE_HEADER};
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::frame::{PAGE_SIZE, Page, WirePageEntry};
use crate::image::{DomainHeader, ImageHeader, WireDomainHeader, WireImageHeader};
use crate::record::page_data::{Entries, WirePageDataHead};
use crate::record::{Record, RecordKind, WireRecordHeader, padding};
pub use crate::source::EndedAfter;
use crate::source::{Skip, fill, fill_behind, fill_growing, skip_by_reading, skip_by_seeking};

/// Maximum size of a body buffer that is kept for the next record.
const KEPT_BODY: usize = 1 << 20;

/// Options for reading a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Tolerate non-zero reserved fields and padding, but nothing else.
    pub lenient: bool,
    /// Bytes of the file before the stream, for correct positions.
    pub offset: u64,
}

/// Streaming reader of the records of a libxc stream.
///
/// ```
/// use xsr_format::{Incoming, PAGE_SIZE, ReadOptions, RecordReader};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let mut reader = RecordReader::new(&image[..], ReadOptions::default())?;
/// let mut page = [0; PAGE_SIZE];
/// while let Some(incoming) = reader.next_record()? {
///     if let Incoming::PageData(mut body) = incoming {
///         while body.read_page(&mut page)? {
///             assert_eq!(page, [0x90; PAGE_SIZE]);
///         }
///     }
/// }
/// # Ok::<(), xsr_format::ReadError>(())
/// ```
#[derive(Clone)]
pub struct RecordReader<R> {
    source: R,
    skip: Skip<R>,
    decoder: Decoder,
    offset: u64,
    /// Index of the next record.
    index: u64,
    /// The record that is being read, or was read last.
    current: Position,
    /// The next record's header, if it has been peeked at.
    header: Option<WireRecordHeader>,
    /// Bytes of page data that the caller has not taken yet.
    pending: u64,
    body: Vec<u8>,
    scratch: Vec<u8>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Records,
    Ended,
    Failed,
}

/// The result of [`RecordReader::next_record`].
#[derive(Debug)]
pub enum Incoming<'r, R> {
    /// A batch of pages, which are read through the body.
    PageData(PageDataBody<'r, R>),
    /// Any other record, complete.
    Record(Record<'r>),
}

impl<R: Read> RecordReader<R> {
    /// Reads the headers of a stream. The source is only read forwards, so it may be a pipe. Reads
    /// are exact, so the source needs no buffer of its own, and must not have one if it is used
    /// after END.
    ///
    /// # Errors
    ///
    /// An error in the headers, or of the source.
    pub fn new(source: R, options: ReadOptions) -> Result<Self, ReadError> {
        Self::with_skip(source, options, skip_by_reading::<R>)
    }

    fn with_skip(source: R, options: ReadOptions, skip: Skip<R>) -> Result<Self, ReadError> {
        Self::behind(&[], source, options, skip)
    }

    /// Like [`RecordReader::new`], if the first bytes of the image header (`known`) have already
    /// been read to detect the format. The offset in `options` is that of the image header.
    pub(crate) fn behind(
        known: &[u8],
        mut source: R,
        options: ReadOptions,
        skip: Skip<R>,
    ) -> Result<Self, ReadError> {
        let mut offset = options.offset;
        let mut image = WireImageHeader::new_zeroed();
        fill_behind(known, &mut source, image.as_mut_bytes())
            // Refuse other formats before waiting for more bytes.
            .and_then(|()| Ok(ImageHeader::decode(&image, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::ImageHeader, offset, cause))?;
        offset = offset.saturating_add(ImageHeader::BYTES as u64);
        let mut domain = WireDomainHeader::new_zeroed();
        let decoder = fill(&mut source, domain.as_mut_bytes())
            .and_then(|()| Ok(Decoder::new(&image, &domain, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::DomainHeader, offset, cause))?;
        let current = Position {
            place: Place::DomainHeader,
            offset,
        };
        offset = offset.saturating_add(DomainHeader::BYTES as u64);
        Ok(Self {
            source,
            skip,
            decoder,
            offset,
            index: 0,
            current,
            header: None,
            pending: 0,
            body: Vec::new(),
            scratch: Vec::new(),
            state: State::Records,
        })
    }

    /// The image header.
    pub fn image(&self) -> ImageHeader {
        self.decoder.image
    }

    /// The domain header.
    pub fn domain(&self) -> DomainHeader {
        self.decoder.domain
    }

    /// Bytes of the file consumed so far, including those before the stream.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Position of the record that was read last, or of the domain header before the first.
    pub fn position(&self) -> Position {
        self.current
    }

    /// Whether static data is complete: true from the record on that ends it (v3), or that shows
    /// that it has ended (v2).
    pub fn static_data_over(&self) -> bool {
        self.decoder.order.static_data_over()
    }

    /// Returns the source, positioned immediately after what was read.
    pub fn into_source(self) -> R {
        self.source
    }

    /// The source, for reading what comes between a CHECKPOINT and the following records. Call
    /// [`RecordReader::advance`] with the number of bytes read.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// Returns a reader with the same state and another source, whose bytes are read as if they
    /// came next here. For records that are kept and read a second time, and for wrapping a source
    /// in another.
    ///
    /// Call it between two records. Page data that was not taken is not expected from the new
    /// source.
    pub fn onto<T: Read>(&self, source: T) -> RecordReader<T> {
        RecordReader {
            source,
            skip: skip_by_reading::<T>,
            decoder: self.decoder.clone(),
            offset: self.offset.saturating_add(self.pending),
            index: self.index,
            current: self.current,
            header: self.header,
            pending: 0,
            body: Vec::new(),
            scratch: Vec::new(),
            state: self.state,
        }
    }

    /// Counts `bytes` that the caller has read from the source.
    pub fn advance(&mut self, bytes: u64) {
        self.offset = self.offset.saturating_add(bytes);
    }

    fn failed(&mut self, cause: impl Into<ReadErrorCause>) -> ReadError {
        self.state = State::Failed;
        ReadError {
            position: self.position(),
            cause: cause.into(),
        }
    }

    fn fill_body(&mut self, bytes: u64) -> Result<(), ReadErrorCause> {
        fill_growing(&mut self.source, &mut self.body, bytes)
    }

    /// The next record, or `None` after END. Skips what the caller has not read of a PAGE_DATA
    /// body.
    ///
    /// # Errors
    ///
    /// The source failed, the stream is truncated, or a rule is broken; the error contains the
    /// position. After an error the reader cannot continue.
    pub fn next_record(&mut self) -> Result<Option<Incoming<'_, R>>, ReadError> {
        let next = self.next_record_at()?;
        Ok(next.map(|(_, incoming)| incoming))
    }

    /// Like [`RecordReader::next_record`], with the record's position.
    ///
    /// # Errors
    ///
    /// Same as [`RecordReader::next_record`].
    pub fn next_record_at(&mut self) -> Result<Option<(Position, Incoming<'_, R>)>, ReadError> {
        match self.state {
            State::Records => {}
            State::Ended => return Ok(None),
            State::Failed => {
                let cause = io::Error::other("the stream failed earlier and cannot be followed");
                return Err(self.failed(ReadErrorCause::Io(cause)));
            }
        }
        let header = self.peek()?;
        self.header = None;
        self.advance(WIRE_HEADER);
        if self.body.capacity() > KEPT_BODY {
            self.body = Vec::new();
        }
        let index = self.index;
        let kind = self.decoder.kind(&header);
        self.current.place = Place::Record {
            index,
            kind: Some(kind),
        };
        self.index = self.index.saturating_add(1);
        let length = self.decoder.admit(&header).map_err(|e| self.failed(e))?;
        if kind == RecordKind::PAGE_DATA {
            let pages = self.page_data_head(length)?;
            let position = self.position();
            let body = PageDataBody {
                reader: self,
                pages,
                length,
            };
            return Ok(Some((position, Incoming::PageData(body))));
        }
        let pad = padding(u64::from(length));
        let bytes = u64::from(length).saturating_add(pad);
        self.fill_body(bytes).map_err(|cause| self.failed(cause))?;
        self.advance(bytes);
        let position = self.position();
        let Some((raw, pad)) = self.body.split_at_checked(length as usize) else {
            self.state = State::Failed;
            let cause = ReadErrorCause::Bug("a record's body is shorter than its length");
            return Err(ReadError { position, cause });
        };
        match self.decoder.body(kind, raw, pad) {
            Ok(record) => {
                if kind == RecordKind::END {
                    self.state = State::Ended;
                }
                Ok(Some((position, Incoming::Record(record))))
            }
            Err(e) => {
                self.state = State::Failed;
                Err(ReadError {
                    position,
                    cause: e.into(),
                })
            }
        }
    }

    /// Reads the next record's header from the source and remembers it.
    fn peek(&mut self) -> Result<WireRecordHeader, ReadError> {
        if let Some(header) = self.header {
            return Ok(header);
        }
        self.skip_pending()?;
        self.current = Position {
            place: Place::Record {
                index: self.index,
                kind: None,
            },
            offset: self.offset,
        };
        let mut header = WireRecordHeader::new_zeroed();
        fill(&mut self.source, header.as_mut_bytes()).map_err(|cause| self.failed(cause))?;
        self.header = Some(header);
        Ok(header)
    }

    /// Takes the next eight bytes if `is_other` returns true for them, read as a libxc record
    /// header: they belong to another layer, which must count them.
    pub(crate) fn take_header_if(
        &mut self,
        is_other: impl FnOnce(&WireRecordHeader) -> bool,
    ) -> Result<Option<WireRecordHeader>, ReadError> {
        let header = self.peek()?;
        if !is_other(&header) {
            return Ok(None);
        }
        self.header = None;
        Ok(Some(header))
    }

    fn page_data_head(&mut self, length: u32) -> Result<u64, ReadError> {
        let mut head = WirePageDataHead::new_zeroed();
        // A truncated stream lacks the rest of the record, including padding.
        let whole = u64::from(length).saturating_add(padding(u64::from(length)));
        let rest = whole.saturating_sub(WirePageDataHead::BYTES as u64);
        fill(&mut self.source, head.as_mut_bytes())
            .map_err(|cause| self.failed(cause.truncated_before(rest)))?;
        self.advance(WirePageDataHead::BYTES as u64);
        let bytes = head
            .entry_bytes(length, self.decoder.context())
            .map_err(|e| self.failed(e))?;
        let rest = rest.saturating_sub(bytes);
        self.fill_body(bytes)
            .map_err(|cause| self.failed(cause.truncated_before(rest)))?;
        self.advance(bytes);
        let Ok(wire) = <[WirePageEntry]>::ref_from_bytes(&self.body) else {
            let bug = "page entries are not of eight bytes each";
            return Err(self.failed(ReadErrorCause::Bug(bug)));
        };
        let checked = self.decoder.entries(wire, length).map(|(_, pages)| pages);
        let pages = checked.map_err(|e| self.failed(e))?;
        self.pending = pages.saturating_mul(PAGE_SIZE as u64);
        Ok(pages)
    }

    fn skip_pending(&mut self) -> Result<(), ReadError> {
        let bytes = std::mem::take(&mut self.pending);
        if bytes == 0 {
            return Ok(());
        }
        match (self.skip)(&mut self.source, bytes, &mut self.scratch) {
            Ok(done) if done == bytes => {
                self.advance(bytes);
                Ok(())
            }
            Ok(done) => Err(self.failed(ReadErrorCause::Truncated {
                needed: bytes.saturating_sub(done),
            })),
            Err(e) => Err(self.failed(ReadErrorCause::Io(e))),
        }
    }
}

impl<R: Read + Seek> RecordReader<R> {
    /// Like [`RecordReader::new`], for a file: page data that the caller does not want is skipped
    /// without being read.
    ///
    /// # Errors
    ///
    /// Same as [`RecordReader::new`].
    pub fn seeking(source: R, options: ReadOptions) -> Result<Self, ReadError> {
        Self::with_skip(source, options, skip_by_seeking::<R>)
    }
}

impl<R> fmt::Debug for RecordReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordReader")
            .field("offset", &self.offset)
            .field("current", &self.current)
            .field("pending", &self.pending)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// The body of a PAGE_DATA record. Its entries have been read and checked; its pages are still in
/// the source.
pub struct PageDataBody<'r, R> {
    reader: &'r mut RecordReader<R>,
    pages: u64,
    length: u32,
}

impl<R: Read> PageDataBody<'_, R> {
    /// The entries, in the order of the stream.
    pub fn entries(&self) -> Entries<'_> {
        // `page_data_head` has already parsed this body as entries, or failed.
        let wire = <[WirePageEntry]>::ref_from_bytes(&self.reader.body).unwrap_or_default();
        Entries::trusted(wire, self.reader.decoder.context())
    }

    /// Number of entries with data, and so of pages that follow.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Length of the record's body in bytes.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Bytes of the file before the first page: the offset of its contents.
    pub fn pages_offset(&self) -> u64 {
        let head = WIRE_HEADER.saturating_add(WirePageDataHead::BYTES as u64);
        let entries = (self.reader.body.len() as u64).saturating_add(head);
        self.position().offset.saturating_add(entries)
    }

    /// The byte order of the stream.
    pub fn byte_order(&self) -> ByteOrder {
        self.reader.image().order
    }

    /// Pages that have not been read yet.
    pub fn pages_left(&self) -> u64 {
        self.reader.pending.div_euclid(PAGE_SIZE as u64)
    }

    /// Position of the record.
    pub fn position(&self) -> Position {
        self.reader.position()
    }

    /// Reads the next page. Returns `false` if none is left.
    ///
    /// # Errors
    ///
    /// The source failed or ended.
    pub fn read_page(&mut self, page: &mut Page) -> Result<bool, ReadError> {
        let reader = &mut *self.reader;
        if reader.pending == 0 {
            return Ok(false);
        }
        let behind = reader.pending.saturating_sub(PAGE_SIZE as u64);
        fill(&mut reader.source, page)
            .map_err(|cause| reader.failed(cause.truncated_before(behind)))?;
        reader.pending = behind;
        reader.advance(PAGE_SIZE as u64);
        Ok(true)
    }

    /// Lets `read` take the next `pages` pages (or all that are left, if fewer) directly from the
    /// source. `read` is given the number of bytes and must consume exactly that many.
    ///
    /// # Errors
    ///
    /// The error of `read`; `UnexpectedEof` is reported as a truncated stream, which lacks the
    /// bytes that were left before the call, minus those of an [`EndedAfter`] inside the error.
    pub fn with_source<T>(
        &mut self,
        pages: u64,
        read: impl FnOnce(&mut R, u64) -> io::Result<T>,
    ) -> Result<T, ReadError> {
        let bytes = pages
            .saturating_mul(PAGE_SIZE as u64)
            .min(self.reader.pending);
        match read(&mut self.reader.source, bytes) {
            Ok(value) => {
                self.reader.pending = self.reader.pending.saturating_sub(bytes);
                self.reader.advance(bytes);
                Ok(value)
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let ended = e.get_ref().and_then(|e| e.downcast_ref::<EndedAfter>());
                let read = ended.map_or(0, |ended| ended.0);
                let needed = self.reader.pending.saturating_sub(read);
                Err(self.reader.failed(ReadErrorCause::Truncated { needed }))
            }
            Err(e) => Err(self.reader.failed(ReadErrorCause::Io(e))),
        }
    }
}

impl<R> fmt::Debug for PageDataBody<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageDataBody")
            .field("reader", &self.reader)
            .field("pages", &self.pages)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )]

    use super::*;
    use crate::image::GuestType;
    use crate::record::MAX_BODY;
    use crate::write::RecordWriter;

    /// A stream with a body of the maximum length, of which only `come` bytes exist.
    fn announced(come: usize) -> Vec<u8> {
        let domain = DomainHeader {
            guest_type: GuestType::X86_HVM,
            xen_major: 4,
            xen_minor: 17,
        };
        let mut bytes = RecordWriter::new(Vec::new(), domain).unwrap().into_sink();
        bytes.extend_from_slice(&RecordKind::HVM_CONTEXT.0.to_le_bytes());
        bytes.extend_from_slice(&MAX_BODY.to_le_bytes());
        bytes.resize(bytes.len() + come, 0x11);
        bytes
    }

    /// Allocation depends on the bytes that arrive, not on the announced length.
    #[test]
    fn memory_follows_the_bytes_that_come() {
        for come in [0, 10, 5 << 20] {
            let bytes = announced(come);
            let mut reader = RecordReader::new(&bytes[..], ReadOptions::default()).unwrap();
            assert!(reader.next_record().unwrap_err().is_bad_image());
            let allowed = 2 * come + (2 << 20);
            assert!(reader.body.capacity() <= allowed, "{come}: {reader:?}");
        }
    }
}
