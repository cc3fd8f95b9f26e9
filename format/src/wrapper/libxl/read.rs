//! Reader of libxl streams, record by record. It reads forwards and no byte beyond a record,
//! because the libxc layer continues there.
//!
//! C implementation: `libxl_stream_read.c`.

use std::io::{self, Read};

use zerocopy::{FromZeros, IntoBytes};

use super::record::WireLibxlRecordHeader;
use super::{
    LibxlError, LibxlHeader, LibxlOrder, LibxlRecord, LibxlRecordKind, WireLibxlHeader,
    reserved_zero,
};
use crate::decoder::as_number;
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::read::ReadOptions;
use crate::record::{padding, zeros};
use crate::source::{fill, fill_behind, fill_growing};

/// State of a libxl reader without the source, which is passed to the libxc layer and taken back.
#[derive(Clone, Debug)]
pub(crate) struct LibxlState {
    header: LibxlHeader,
    pub(crate) order: LibxlOrder,
    lenient: bool,
    /// Bytes of the file consumed so far.
    pub(crate) offset: u64,
    /// Index of the next record.
    index: u64,
    failed: bool,
}

impl LibxlState {
    /// Reads the header, whose first bytes (`known`) have already been read.
    pub(crate) fn new(
        known: &[u8],
        source: &mut impl Read,
        options: ReadOptions,
    ) -> Result<Self, ReadError> {
        let mut wire = WireLibxlHeader::new_zeroed();
        let header = fill_behind(known, source, wire.as_mut_bytes())
            .and_then(|()| Ok(LibxlHeader::decode(&wire, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::LibxlHeader, options.offset, cause))?;
        Ok(Self {
            header,
            order: LibxlOrder::new(),
            lenient: options.lenient,
            offset: options.offset.saturating_add(LibxlHeader::BYTES as u64),
            index: 0,
            failed: false,
        })
    }

    pub(crate) fn header(&self) -> LibxlHeader {
        self.header
    }

    /// Reads the next record, whose first bytes (`known`) have already been read, but not counted.
    /// Also returns its position.
    pub(crate) fn next_record(
        &mut self,
        known: &[u8],
        source: &mut impl Read,
    ) -> Result<(Position, LibxlRecord), ReadError> {
        let mut position = Position {
            place: Place::LibxlRecord {
                index: self.index,
                kind: None,
            },
            offset: self.offset,
        };
        let result = match self.failed {
            false => self.read_record(known, source, &mut position.place),
            true => Err(ReadErrorCause::Io(io::Error::other(
                "the stream failed earlier and cannot be followed",
            ))),
        };
        self.index = self.index.saturating_add(1);
        match result {
            Ok(record) => Ok((position, record)),
            Err(cause) => {
                self.failed = true;
                Err(ReadError { position, cause })
            }
        }
    }

    fn read_record(
        &mut self,
        known: &[u8],
        source: &mut impl Read,
        place: &mut Place,
    ) -> Result<LibxlRecord, ReadErrorCause> {
        let mut wire = WireLibxlRecordHeader::new_zeroed();
        fill_behind(known, source, wire.as_mut_bytes())?;
        let order = self.header.order;
        let kind = LibxlRecordKind(wire.kind.get(order));
        *place = Place::LibxlRecord {
            index: self.index,
            kind: Some(kind),
        };
        let length = u64::from(wire.length.get(order));
        LibxlRecord::check_header(kind, length)?;
        self.order.admit(kind).map_err(LibxlError::from)?;
        let mut body = Vec::new();
        let pad_length = padding(length);
        fill_growing(source, &mut body, length)
            .map_err(|cause| cause.truncated_before(pad_length))?;
        let mut pad = [0; 8];
        let (room, _) = pad.split_at_mut(zeros(length).len());
        fill(source, room)?;
        let at = length.saturating_add(size_of::<WireLibxlRecordHeader>() as u64);
        self.offset = self.offset.saturating_add(at).saturating_add(pad_length);
        let value = as_number(room);
        reserved_zero(self.lenient, "padding after the body", at, value)?;
        Ok(LibxlRecord::decode(kind, body, order, self.lenient)?)
    }
}

/// Reader of the records of a libxl stream.
///
/// After [`LibxlRecord::LibxcContext`] the caller reads the libxc stream from
/// [`LibxlReader::source_mut`], and passes the number of bytes to [`LibxlReader::advance`]. After
/// libxc's END the libxl records continue. At a libxc CHECKPOINT the caller calls
/// [`LibxlReader::begin_checkpoint`], reads records up to [`LibxlRecord::CheckpointEnd`], and
/// returns to the libxc stream. ([`Walk`](crate::walk::Walk) does all that.)
///
/// ```
/// use xsr_format::byte_order::ByteOrder;
/// use xsr_format::read::{ReadOptions, RecordReader};
/// use xsr_format::wrapper::libxl::LibxlHeader;
/// use xsr_format::{LibxlReader, LibxlRecord, LibxlWriter};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let libxc = doc::image();
/// let header = LibxlHeader { order: ByteOrder::Little, legacy_converted: false };
/// let mut stream = LibxlWriter::new(Vec::new(), header)?;
/// stream.write(&LibxlRecord::LibxcContext)?;
/// stream.sink_mut().extend(&libxc);
/// stream.write(&LibxlRecord::End)?;
/// let stream = stream.into_sink();
///
/// let mut records = Vec::new();
/// let mut reader = LibxlReader::new(&stream[..], ReadOptions::default())?;
/// while let Some(record) = reader.next_record()? {
///     if let LibxlRecord::LibxcContext = record {
///         let mut libxc = RecordReader::new(reader.source_mut(), ReadOptions::default())?;
///         while libxc.next_record()?.is_some() {}
///         let bytes = libxc.offset();
///         reader.advance(bytes);
///     }
///     records.push(record);
/// }
/// assert!(matches!(records[..], [LibxlRecord::LibxcContext, LibxlRecord::End]));
/// assert_eq!(reader.offset(), stream.len() as u64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LibxlReader<R> {
    source: R,
    state: LibxlState,
}

impl<R: Read> LibxlReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// An error in the header, or of the source.
    pub fn new(mut source: R, options: ReadOptions) -> Result<Self, ReadError> {
        let state = LibxlState::new(&[], &mut source, options)?;
        Ok(Self { source, state })
    }

    /// The header.
    pub fn header(&self) -> LibxlHeader {
        self.state.header
    }

    /// Bytes of the file consumed so far, including those before the stream.
    pub fn offset(&self) -> u64 {
        self.state.offset
    }

    /// The source, positioned immediately after what was read.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// Returns the source.
    pub fn into_source(self) -> R {
        self.source
    }

    /// Counts `bytes` that the caller has read from the source.
    pub fn advance(&mut self, bytes: u64) {
        self.state.offset = self.state.offset.saturating_add(bytes);
    }

    /// Called when the libxc layer has read a CHECKPOINT: the next records belong to it.
    pub fn begin_checkpoint(&mut self) {
        self.state.order.begin_checkpoint();
    }

    /// The next record, or `None` after END.
    ///
    /// # Errors
    ///
    /// The source failed, the stream is truncated, or a rule is broken; the error contains the
    /// position. After an error the reader cannot continue.
    pub fn next_record(&mut self) -> Result<Option<LibxlRecord>, ReadError> {
        if self.state.order.ended() && !self.state.failed {
            return Ok(None);
        }
        let (_, record) = self.state.next_record(&[], &mut self.source)?;
        Ok(Some(record))
    }
}
