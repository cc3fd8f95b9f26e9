//! Reading a libxc stream record by record: never more octets than the stream has,
//! never backwards, never more memory than a record needs.
//!
//! libxl hands its file descriptor to the libxc layer and takes it back after END
//! or CHECKPOINT, so a reader that swallowed one octet too many would break both.
//! The octets of PAGE_DATA are handed on, not kept.
//!
//! Specification: libxc migration stream. C implementation:
//! `xg_sr_common.c:read_record`, `xg_sr_restore.c`.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{DecodeError, Length, Place, Position, ReadError, ReadErrorCause, Reserved};
use crate::frame::{PAGE_SIZE, Page, WirePageEntry};
use crate::image::{DomainHeader, ImageHeader, WireDomainHeader, WireImageHeader};
use crate::order::Order;
use crate::record::page_data::{Entries, WirePageDataHead};
use crate::record::{Body, Context, MAX_BODY, Record, RecordKind, WireRecordHeader, padding};

/// How to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Tolerate reserved fields and padding that are not zero, and nothing else.
    pub lenient: bool,
    /// Octets of the file that came before, so that positions are right.
    pub offset: u64,
}

/// What both the streaming and the in-memory reader know of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    pub(crate) image: ImageHeader,
    pub(crate) domain: DomainHeader,
    pub(crate) order: Order,
    pub(crate) lenient: bool,
}

impl Decoder {
    /// Decode the two headers.
    pub(crate) fn new(
        image: &WireImageHeader,
        domain: &WireDomainHeader,
        lenient: bool,
    ) -> Result<Self, DecodeError> {
        let image = ImageHeader::decode(image, lenient)?;
        let domain = DomainHeader::decode(domain, image.order, lenient)?;
        Ok(Self {
            image,
            domain,
            order: Order::new(image.version, domain.guest_type),
            lenient,
        })
    }

    pub(crate) fn context(&self) -> Context {
        Context {
            order: self.image.order,
            guest_width: self.order.guest_width(),
            lenient: self.lenient,
        }
    }

    pub(crate) fn kind(&self, header: &WireRecordHeader) -> RecordKind {
        RecordKind(header.kind.get(self.image.order))
    }

    /// Check a record's header against the limits and the order.
    pub(crate) fn admit(&mut self, header: &WireRecordHeader) -> Result<u32, DecodeError> {
        let kind = self.kind(header);
        let length = header.length.get(self.image.order);
        if length > MAX_BODY {
            return Err(DecodeError::BodyTooLong {
                got: length,
                max: MAX_BODY,
            });
        }
        if kind.name().is_none() && !kind.is_optional() {
            return Err(DecodeError::UnknownMandatory { kind: kind.0 });
        }
        self.order.admit(kind)?;
        if kind == RecordKind::PAGE_DATA && (length as usize) < WirePageDataHead::OCTETS {
            return Err(DecodeError::BodyLength {
                expected: Length::AtLeast(WirePageDataHead::OCTETS as u64),
                got: u64::from(length),
            });
        }
        Ok(length)
    }

    /// Decode the body of any record but PAGE_DATA, and take note of it.
    pub(crate) fn body<'a>(
        &mut self,
        kind: RecordKind,
        raw: &'a [u8],
        pad: &[u8],
    ) -> Result<Record<'a>, DecodeError> {
        Reserved {
            lenient: self.lenient,
            structure: "record",
        }
        .zero(
            "padding after the body",
            (raw.len() as u64).saturating_add(WIRE_HEADER),
            as_number(pad),
        )?;
        let body = Body::decode(kind, raw, self.context())?;
        let record = Record { kind, raw, body };
        self.order.note(&record);
        Ok(record)
    }

    pub(crate) fn entries<'a>(
        &self,
        wire: &'a [WirePageEntry],
        length: u32,
    ) -> Result<(Entries<'a>, u64), DecodeError> {
        Entries::check(wire, length, self.order.max_pfn(), self.context())
    }
}

/// Octets of padding, at most 7, as one number, to be shown.
pub(crate) fn as_number(pad: &[u8]) -> u64 {
    pad.iter()
        .fold(0, |number, octet| number << 8 | u64::from(*octet))
}

pub(crate) const WIRE_HEADER: u64 = size_of::<WireRecordHeader>() as u64;

/// Moves a source on by some octets; says how many it could.
pub(crate) type Skip<R> = fn(&mut R, u64, &mut Vec<u8>) -> io::Result<u64>;

/// Reads the records of a libxc stream.
#[derive(Clone)]
pub struct RecordReader<R> {
    source: R,
    skip: Skip<R>,
    decoder: Decoder,
    offset: u64,
    /// Number of the next record.
    index: u64,
    /// The record that is being read, or was read last.
    current: Position,
    /// The next record's header, where it has been looked at already.
    header: Option<WireRecordHeader>,
    /// Octets of page data that the caller has not taken yet.
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

/// What [`RecordReader::next_record`] found.
#[derive(Debug)]
pub enum Incoming<'r, R> {
    /// A batch of pages, to be read from the body.
    PageData(PageDataBody<'r, R>),
    /// Any other record, whole.
    Record(Record<'r>),
}

impl<R: Read> RecordReader<R> {
    /// Read the headers of a stream. The source is read forwards only, so a pipe
    /// will do; reads are exact, so it needs no buffer of its own (and must not
    /// have one, if somebody else reads on after END).
    ///
    /// # Errors
    ///
    /// What is wrong with the headers, or with the source.
    pub fn new(source: R, options: ReadOptions) -> Result<Self, ReadError> {
        Self::with_skip(source, options, skip_by_reading::<R>)
    }

    fn with_skip(source: R, options: ReadOptions, skip: Skip<R>) -> Result<Self, ReadError> {
        Self::behind(&[], source, options, skip)
    }

    /// As [`RecordReader::new`], where the first octets of the image header, `known`,
    /// have been read already, to find out what the source holds. The offset in
    /// `options` is where the image header begins.
    pub(crate) fn behind(
        known: &[u8],
        mut source: R,
        options: ReadOptions,
        skip: Skip<R>,
    ) -> Result<Self, ReadError> {
        let mut offset = options.offset;
        let mut image = WireImageHeader::new_zeroed();
        fill_behind(known, &mut source, image.as_mut_bytes())
            // Refuse what is no image before waiting for the rest of it.
            .and_then(|()| Ok(ImageHeader::decode(&image, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::ImageHeader, offset, cause))?;
        offset = offset.saturating_add(ImageHeader::OCTETS as u64);
        let mut domain = WireDomainHeader::new_zeroed();
        let decoder = fill(&mut source, domain.as_mut_bytes())
            .and_then(|()| Ok(Decoder::new(&image, &domain, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::DomainHeader, offset, cause))?;
        let current = Position {
            place: Place::DomainHeader,
            offset,
        };
        offset = offset.saturating_add(DomainHeader::OCTETS as u64);
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

    /// Octets of the file that have been consumed, those before the stream included.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the record that was read last begins; before the first, the domain
    /// header.
    pub fn position(&self) -> Position {
        self.current
    }

    /// Whether static data is complete: from the record on that ends it (v3), or
    /// that shows it to be over (v2).
    pub fn static_data_over(&self) -> bool {
        self.decoder.order.static_data_over()
    }

    /// Give the source back; it stands right behind what was read.
    pub fn into_source(self) -> R {
        self.source
    }

    /// The source: for who reads what comes between a CHECKPOINT and the records
    /// after it. Say with [`RecordReader::advance`] how much that was.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// Count `octets` that somebody else read from the source.
    pub fn advance(&mut self, octets: u64) {
        self.offset = self.offset.saturating_add(octets);
    }

    fn failed(&mut self, cause: impl Into<ReadErrorCause>) -> ReadError {
        self.state = State::Failed;
        ReadError {
            position: self.position(),
            cause: cause.into(),
        }
    }

    fn fill_body(&mut self, octets: u64) -> Result<(), ReadErrorCause> {
        fill_growing(&mut self.source, &mut self.body, octets)
    }

    /// The next record, or `None` after END. What the caller has not read of a
    /// PAGE_DATA body is skipped.
    ///
    /// # Errors
    ///
    /// The source failed, the stream is truncated, or a rule is broken; where, the
    /// error says. After an error there is no going on.
    pub fn next_record(&mut self) -> Result<Option<Incoming<'_, R>>, ReadError> {
        let next = self.next_record_at()?;
        Ok(next.map(|(_, incoming)| incoming))
    }

    /// As [`RecordReader::next_record`], with where the record begins.
    pub(crate) fn next_record_at(
        &mut self,
    ) -> Result<Option<(Position, Incoming<'_, R>)>, ReadError> {
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
        let octets = u64::from(length).saturating_add(pad);
        self.fill_body(octets).map_err(|cause| self.failed(cause))?;
        self.advance(octets);
        let position = self.position();
        let (raw, pad) = self
            .body
            .split_at_checked(length as usize)
            .unwrap_or_default();
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

    /// Look at the next record's header, which takes it from the source.
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

    /// Take the next eight octets if `is_other` says of them, read as the header of a
    /// libxc record, that they belong to another layer, which has to count them.
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
        fill(&mut self.source, head.as_mut_bytes()).map_err(|cause| self.failed(cause))?;
        self.advance(WirePageDataHead::OCTETS as u64);
        let octets = head
            .entry_octets(length, self.decoder.context())
            .map_err(|e| self.failed(e))?;
        self.fill_body(octets).map_err(|cause| self.failed(cause))?;
        self.advance(octets);
        let wire = <[WirePageEntry]>::ref_from_bytes(&self.body).unwrap_or_default();
        let checked = self.decoder.entries(wire, length).map(|(_, pages)| pages);
        let pages = checked.map_err(|e| self.failed(e))?;
        self.pending = pages.saturating_mul(PAGE_SIZE as u64);
        Ok(pages)
    }

    fn skip_pending(&mut self) -> Result<(), ReadError> {
        let octets = std::mem::take(&mut self.pending);
        if octets == 0 {
            return Ok(());
        }
        match (self.skip)(&mut self.source, octets, &mut self.scratch) {
            Ok(done) if done == octets => {
                self.advance(octets);
                Ok(())
            }
            Ok(done) => Err(self.failed(ReadErrorCause::Truncated {
                needed: octets.saturating_sub(done),
            })),
            Err(e) => Err(self.failed(ReadErrorCause::Io(e))),
        }
    }
}

impl<R: Read + Seek> RecordReader<R> {
    /// As [`RecordReader::new`], for a file: page data that the caller does not
    /// want is passed over without being read.
    ///
    /// # Errors
    ///
    /// As [`RecordReader::new`].
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

/// The body of a PAGE_DATA record, its entries read and checked, its pages still in
/// the source.
pub struct PageDataBody<'r, R> {
    reader: &'r mut RecordReader<R>,
    pages: u64,
    length: u32,
}

impl<R: Read> PageDataBody<'_, R> {
    /// The entries, in the order of the stream.
    pub fn entries(&self) -> Entries<'_> {
        let wire = <[WirePageEntry]>::ref_from_bytes(&self.reader.body).unwrap_or_default();
        Entries::trusted(wire, self.reader.decoder.context())
    }

    /// How many entries have data: pages that follow.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Length of the record's body in octets.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Pages that have not been read yet.
    pub fn pages_left(&self) -> u64 {
        self.reader.pending.div_euclid(PAGE_SIZE as u64)
    }

    /// Where the record begins.
    pub fn position(&self) -> Position {
        self.reader.position()
    }

    /// Read the next page. `false` where there is none left.
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

    /// Let `read` take the next `pages` pages (or all that are left, if fewer)
    /// straight from the source; it is told how many octets that is and must
    /// consume exactly so many.
    ///
    /// # Errors
    ///
    /// What `read` says; `UnexpectedEof` is reported as a truncated stream, which
    /// lacks at most all the octets that were left before the call.
    pub fn with_source<T>(
        &mut self,
        pages: u64,
        read: impl FnOnce(&mut R, u64) -> io::Result<T>,
    ) -> Result<T, ReadError> {
        let octets = pages
            .saturating_mul(PAGE_SIZE as u64)
            .min(self.reader.pending);
        match read(&mut self.reader.source, octets) {
            Ok(value) => {
                self.reader.pending = self.reader.pending.saturating_sub(octets);
                self.reader.advance(octets);
                Ok(value)
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let needed = self.reader.pending;
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

/// Fill `room` exactly.
pub(crate) fn fill(source: &mut impl Read, room: &mut [u8]) -> Result<(), ReadErrorCause> {
    let mut rest = room;
    while !rest.is_empty() {
        match source.read(rest) {
            Ok(0) => {
                let needed = rest.len() as u64;
                return Err(ReadErrorCause::Truncated { needed });
            }
            Ok(n) => {
                let Some(left) = rest.get_mut(n..) else {
                    return Err(ReadErrorCause::Io(broken_source()));
                };
                rest = left;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ReadErrorCause::Io(e)),
        }
    }
    Ok(())
}

/// Fill `room` exactly: first with `known`, which came from the source before, then
/// from the source.
pub(crate) fn fill_behind(
    known: &[u8],
    source: &mut impl Read,
    room: &mut [u8],
) -> Result<(), ReadErrorCause> {
    let (head, rest) = room.split_at_mut(known.len().min(room.len()));
    for (to, from) in head.iter_mut().zip(known) {
        *to = *from;
    }
    fill(source, rest)
}

/// Fill `body` with exactly `octets`. They come from the stream, so memory is
/// allocated as octets really arrive.
pub(crate) fn fill_growing(
    source: &mut impl Read,
    body: &mut Vec<u8>,
    octets: u64,
) -> Result<(), ReadErrorCause> {
    const STEP: usize = 1 << 20;
    body.clear();
    let mut left = octets;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
        let at = body.len();
        body.resize(at.saturating_add(step), 0);
        let (_, room) = body.split_at_mut(at);
        left = left.saturating_sub(step as u64);
        fill(source, room).map_err(|cause| cause.truncated_before(left))?;
    }
    Ok(())
}

/// What is wrong with a source that claims more octets than it had room for.
fn broken_source() -> io::Error {
    io::Error::other("the source claims to have read more than it was asked for")
}

pub(crate) fn skip_by_reading<R: Read>(
    source: &mut R,
    octets: u64,
    scratch: &mut Vec<u8>,
) -> io::Result<u64> {
    const STEP: usize = 256 << 10;
    scratch.resize(STEP, 0);
    let mut left = octets;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
        let room = scratch.get_mut(..step).unwrap_or_default();
        match source.read(room) {
            Ok(0) => break,
            Ok(n) if n > step => return Err(broken_source()),
            Ok(n) => left = left.saturating_sub(n as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(octets.saturating_sub(left))
}

pub(crate) fn skip_by_seeking<R: Read + Seek>(
    source: &mut R,
    octets: u64,
    _scratch: &mut Vec<u8>,
) -> io::Result<u64> {
    // A seek beyond the end succeeds, so the end is looked up each time: the file
    // may still be growing, or have shrunk.
    let at = source.stream_position()?;
    let end = source.seek(SeekFrom::End(0))?;
    let target = at.saturating_add(octets).min(end.max(at));
    source.seek(SeekFrom::Start(target))?;
    Ok(target.saturating_sub(at))
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
    use crate::write::RecordWriter;

    /// Of a body that is announced as the longest there may be, `come` octets.
    fn announced(come: usize) -> Vec<u8> {
        let domain = DomainHeader {
            guest_type: GuestType::X86_HVM,
            xen_major: 4,
            xen_minor: 17,
        };
        let mut octets = RecordWriter::new(Vec::new(), domain).unwrap().into_sink();
        octets.extend_from_slice(&RecordKind::HVM_CONTEXT.0.to_le_bytes());
        octets.extend_from_slice(&MAX_BODY.to_le_bytes());
        octets.resize(octets.len() + come, 0x11);
        octets
    }

    /// What is allocated depends on what comes, not on what is announced.
    #[test]
    fn memory_follows_the_octets_that_come() {
        for come in [0, 10, 5 << 20] {
            let octets = announced(come);
            let mut reader = RecordReader::new(&octets[..], ReadOptions::default()).unwrap();
            assert!(reader.next_record().unwrap_err().is_bad_image());
            let allowed = 2 * come + (2 << 20);
            assert!(reader.body.capacity() <= allowed, "{come}: {reader:?}");
        }
    }
}
