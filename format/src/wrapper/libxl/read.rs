//! Reading a libxl stream: record by record, forwards, and not one octet too many,
//! because the libxc layer reads on where a record ends.
//!
//! C implementation: `libxl_stream_read.c`.

use std::io::{self, Read};

use zerocopy::{FromZeros, IntoBytes};

use super::record::WireLibxlRecordHeader;
use super::{
    LibxlError, LibxlHeader, LibxlOrder, LibxlRecord, LibxlRecordKind, WireLibxlHeader,
    reserved_zero,
};
use crate::read::ReadOptions;
use crate::record::padding;
use crate::wrapper::{Reading, Source, WrapperErrorCause, WrapperReadError};

/// Reads the records of a libxl stream.
///
/// After [`LibxlRecord::LibxcContext`] the caller reads the libxc stream from
/// [`LibxlReader::source_mut`] and says with [`LibxlReader::advance`] how many octets
/// that were. After libxc's END the records go on here; at a libxc CHECKPOINT the
/// caller says [`LibxlReader::begin_checkpoint`], takes records up to
/// [`LibxlRecord::CheckpointEnd`] and goes back to the libxc stream.
#[derive(Debug)]
pub struct LibxlReader<R> {
    source: Source<R>,
    header: LibxlHeader,
    order: LibxlOrder,
    lenient: bool,
    /// Number of the next record.
    index: u64,
    failed: bool,
}

impl<R: Read> LibxlReader<R> {
    /// Read the header.
    ///
    /// # Errors
    ///
    /// What is wrong with the header, or with the source.
    pub fn new(source: R, options: ReadOptions) -> Result<Self, WrapperReadError> {
        let mut source = Source {
            inner: source,
            offset: options.offset,
        };
        let mut wire = WireLibxlHeader::new_zeroed();
        let header = source.fill(wire.as_mut_bytes()).and_then(|()| {
            LibxlHeader::decode(&wire, options.lenient).map_err(WrapperErrorCause::from)
        });
        let header = header.map_err(|cause| WrapperReadError {
            reading: Reading::LibxlHeader,
            offset: options.offset,
            cause,
        })?;
        Ok(Self {
            source,
            header,
            order: LibxlOrder::new(),
            lenient: options.lenient,
            index: 0,
            failed: false,
        })
    }

    /// The header.
    pub fn header(&self) -> LibxlHeader {
        self.header
    }

    /// Octets of the file that have been consumed, those before the stream included.
    pub fn offset(&self) -> u64 {
        self.source.offset
    }

    /// The source, which stands right behind what was read.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source.inner
    }

    /// Give the source back.
    pub fn into_source(self) -> R {
        self.source.inner
    }

    /// Count `octets` that somebody else read from the source.
    pub fn advance(&mut self, octets: u64) {
        self.source.offset = self.source.offset.saturating_add(octets);
    }

    /// The libxc layer has read a CHECKPOINT: the next records belong to it.
    pub fn begin_checkpoint(&mut self) {
        self.order.begin_checkpoint();
    }

    /// The next record, or `None` after END.
    ///
    /// # Errors
    ///
    /// The source failed, the stream is truncated, or a rule is broken; where, the
    /// error says. After an error there is no going on.
    pub fn next_record(&mut self) -> Result<Option<LibxlRecord>, WrapperReadError> {
        if self.order.ended() && !self.failed {
            return Ok(None);
        }
        let offset = self.source.offset;
        let index = self.index;
        let mut kind = None;
        let result = match self.failed {
            false => self.read_record(&mut kind),
            true => Err(WrapperErrorCause::Io(io::Error::other(
                "the stream failed earlier and cannot be followed",
            ))),
        };
        self.index = self.index.saturating_add(1);
        result.map(Some).map_err(|cause| {
            self.failed = true;
            WrapperReadError {
                reading: Reading::LibxlRecord { index, kind },
                offset,
                cause,
            }
        })
    }

    fn read_record(
        &mut self,
        seen: &mut Option<LibxlRecordKind>,
    ) -> Result<LibxlRecord, WrapperErrorCause> {
        let mut wire = WireLibxlRecordHeader::new_zeroed();
        self.source.fill(wire.as_mut_bytes())?;
        let kind = LibxlRecordKind(wire.kind.get(self.header.order));
        *seen = Some(kind);
        let length = wire.length.get(self.header.order);
        LibxlRecord::check_header(kind, u64::from(length))?;
        self.order.admit(kind).map_err(LibxlError::from)?;
        let body = self.source.take(length as usize)?;
        let mut pad = [0; 8];
        let pad_length = usize::try_from(padding(u64::from(length))).unwrap_or(0);
        self.source
            .fill(pad.get_mut(..pad_length).unwrap_or_default())?;
        let at = u64::from(length).saturating_add(8);
        let value = u64::from_be_bytes(pad);
        reserved_zero(self.lenient, "padding after the body", at, value)?;
        let order = self.header.order;
        Ok(LibxlRecord::decode(kind, body, order, self.lenient)?)
    }
}
