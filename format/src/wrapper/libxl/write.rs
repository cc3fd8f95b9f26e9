//! Writer of libxl streams.
//!
//! C implementation: `libxl_stream_write.c`.

use std::io::{self, Write};

use zerocopy::IntoBytes;

use super::record::WireLibxlRecordHeader;
use super::{LibxlError, LibxlHeader, LibxlOrder, LibxlRecord};
use crate::record::zeros;
use crate::wire::U32;
use crate::wrapper::WrapperWriteError;

/// Writer of the records of a libxl stream. It refuses those that a reader would refuse in that
/// place.
///
/// ```
/// use xsr_format::byte_order::ByteOrder;
/// use xsr_format::wrapper::libxl::LibxlHeader;
/// use xsr_format::{LibxlRecord, LibxlWriter};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let header = LibxlHeader { order: ByteOrder::Little, legacy_converted: false };
/// let mut stream = LibxlWriter::new(Vec::new(), header)?;
/// stream.write(&LibxlRecord::LibxcContext)?;
/// stream.sink_mut().extend_from_slice(&image);
/// stream.write(&LibxlRecord::End)?;
/// assert!(stream.into_sink().starts_with(b"LibxlFmt"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LibxlWriter<W> {
    sink: W,
    header: LibxlHeader,
    order: LibxlOrder,
}

impl<W: Write> LibxlWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn new(mut sink: W, header: LibxlHeader) -> io::Result<Self> {
        sink.write_all(header.encode().as_bytes())?;
        Ok(Self {
            sink,
            header,
            order: LibxlOrder::new(),
        })
    }

    /// The sink, for writing the libxc stream after [`LibxlRecord::LibxcContext`].
    pub fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// Returns the sink.
    pub fn into_sink(self) -> W {
        self.sink
    }

    /// Called when the libxc layer has written a CHECKPOINT: the next records belong to it.
    pub fn begin_checkpoint(&mut self) {
        self.order.begin_checkpoint();
    }

    /// Writes a record, padded with zeros.
    ///
    /// # Errors
    ///
    /// The sink's error; a record that is out of place or too long; or a record in
    /// [`LibxlRecord::Optional`] that is not optional.
    pub fn write(&mut self, record: &LibxlRecord) -> Result<(), WrapperWriteError> {
        Self::write_to(&mut self.sink, self.header, &mut self.order, record)
    }

    /// Writes a record to another sink, to which the bytes of this writer's own sink have gone.
    pub(crate) fn write_aside(
        &mut self,
        record: &LibxlRecord,
        sink: &mut impl Write,
    ) -> Result<(), WrapperWriteError> {
        Self::write_to(sink, self.header, &mut self.order, record)
    }

    fn write_to(
        sink: &mut impl Write,
        header: LibxlHeader,
        place: &mut LibxlOrder,
        record: &LibxlRecord,
    ) -> Result<(), WrapperWriteError> {
        let order = header.order;
        let kind = record.kind();
        let (words, rest) = record.encode(order);
        let words = words.as_ref().map(IntoBytes::as_bytes).unwrap_or_default();
        let length = Self::admit(place, record, rest.len().saturating_add(words.len()))
            .map_err(|cause| WrapperWriteError::Libxl { kind, cause })?;
        let header = WireLibxlRecordHeader {
            kind: U32::new(kind.0, order),
            length: U32::new(length, order),
        };
        sink.write_all(&[header.as_bytes(), words].concat())?;
        sink.write_all(rest)?;
        sink.write_all(zeros(u64::from(length)))?;
        Ok(())
    }

    /// Checks that the record may come here. Returns its length for the header.
    fn admit(
        place: &mut LibxlOrder,
        record: &LibxlRecord,
        length: usize,
    ) -> Result<u32, LibxlError> {
        let kind = record.kind();
        if let LibxlRecord::Optional { kind, .. } = record
            && !kind.is_optional()
        {
            return Err(LibxlError::UnknownMandatory { kind: kind.0 });
        }
        let length = LibxlRecord::check_header(kind, length as u64)?;
        place.admit(kind)?;
        Ok(length)
    }
}
