//! Conversion of a stream of version 2 or 3, in either byte order, to what Xen writes today:
//! version 3, little endian, bare or in a libxl or xl wrapper.
//!
//! Records keep their order and their blobs; only what depends on the byte order and the version is
//! rewritten. A version 2 stream gets a STATIC_DATA_END where version 2 implies it. The caller
//! chooses how the contents of pages are copied from source to sink. Pads of the mapped layout are
//! dropped; the sink decides whether to add its own.
//!
//! Legacy streams have a converter of their own: [`legacy::convert`](crate::legacy::convert).
//!
//! Specification: libxc migration stream, "STATIC_DATA_END"; libxl migration stream.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::byte_order::ByteOrder;
use crate::error::{ReadError, WriteError};
use crate::frame::PageEntry;
use crate::image::{DomainHeader, Version};
use crate::layout::leading_pads;
use crate::read::{EndedAfter, PageDataBody};
use crate::record::hvm::HvmParam;
use crate::record::pv::PvInfo;
use crate::record::{Body, MAX_BATCH, Record, RecordKind};
use crate::walk::{Content, Walk};
use crate::wrapper::WrapperWriteError;
use crate::wrapper::libxl::{LibxlHeader, LibxlRecord, LibxlRecordKind, LibxlWriter};
use crate::wrapper::xl::XlHeader;
use crate::write::{RecordWriter, long_p2m_frames, long_record, page_data_head};

/// The wrapper around a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layer {
    /// Nothing: a bare libxc stream.
    Libxc,
    /// A libxl stream.
    Libxl,
    /// A libxl stream after xl's header.
    Xl,
}

/// Copies up to this number of bytes from a source to a sink. Returns how many were copied.
pub type CopyBytes<R, W> = fn(&mut R, u64, &mut W) -> Result<u64, CopyError>;

/// Destination of a converted image. The methods define its layout; the defaults write the stream
/// layout.
pub trait ImageSink: Write {
    /// Writes xl's header.
    ///
    /// # Errors
    ///
    /// The sink's error, or a header that cannot be written.
    fn xl_header(&mut self, header: &XlHeader) -> io::Result<()> {
        self.write_all(&header.encode())
    }

    /// Writes a PAGE_DATA record up to its pages, which follow.
    ///
    /// # Errors
    ///
    /// The sink's error, or entries that no record can have.
    fn page_data(&mut self, entries: &[PageEntry]) -> Result<(), WriteError> {
        let head = page_data_head(entries)?;
        Ok(self.write_all(&head)?)
    }

    /// Writes the state of an emulator beside a bare libxc stream, which has no place for it.
    /// Returns whether it did: by default, the state is left out.
    ///
    /// # Errors
    ///
    /// The sink's error, or a state that it refuses.
    fn emulator_context(&mut self, _state: &[u8]) -> io::Result<bool> {
        Ok(false)
    }
}

impl ImageSink for Vec<u8> {}

/// The failed end of a copy.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The source could not be read.
    #[error("reading failed")]
    Read(#[source] io::Error),
    /// The sink could not be written.
    #[error("writing failed")]
    Write(#[source] io::Error),
}

/// What was converted, and what was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records of the libxc stream.
    pub records: u64,
    /// Entries for pages.
    pub entries: u64,
    /// Records of the libxl stream that were left out, because a bare libxc stream has no place for
    /// them.
    pub dropped: u64,
    /// The first of those, at most [`MAX_NAMED`].
    pub named: Vec<Dropped>,
}

/// How many of the records that were left out are named.
pub const MAX_NAMED: usize = 64;

/// A record of the libxl stream that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Its kind.
    pub kind: LibxlRecordKind,
    /// Offset in the image.
    pub offset: u64,
    /// Length of its body in bytes.
    pub bytes: u64,
}

/// Why a conversion failed.
#[derive(Debug, Error)]
pub enum TranscodeError {
    /// The source is invalid, or failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The sink failed.
    #[error("writing failed")]
    Write(#[source] io::Error),
    /// A record cannot be written.
    #[error(transparent)]
    Record(WriteError),
    /// A record of the libxl stream cannot be written.
    #[error(transparent)]
    Libxl(WrapperWriteError),
    /// xl's header is requested, but there is no configuration for it.
    #[error("an xl image begins with the domain's configuration, and there is none")]
    NoConfiguration,
}

impl From<WriteError> for TranscodeError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Io(e) => Self::Write(e),
            other => Self::Record(other),
        }
    }
}

impl From<WrapperWriteError> for TranscodeError {
    fn from(error: WrapperWriteError) -> Self {
        match error {
            WrapperWriteError::Io(e) => Self::Write(e),
            other @ WrapperWriteError::Libxl { .. } => Self::Libxl(other),
        }
    }
}

/// Converts all of `walk`. If `to` requests xl's header, writes `xl`, or else that of the source.
///
/// # Errors
///
/// The source is invalid or failed, the sink failed, or a record has no form in version 3. What has
/// been written is then useless.
///
/// ```
/// use xsr_format::transcode::{Layer, copy_bytes, transcode};
/// use xsr_format::{ReadOptions, Walk, XlHeader};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let mut walk = Walk::open(&image[..], ReadOptions::default())?;
/// let header = XlHeader::new("{\"c_info\": {\"type\": \"pvh\", \"name\": \"web\"}}")?;
/// let mut xl_image = Vec::new();
/// transcode(&mut walk, &mut xl_image, Layer::Xl, Some(&header), copy_bytes)?;
/// assert!(xl_image.starts_with(b"Xen saved domain"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn transcode<R: Read, W: ImageSink>(
    walk: &mut Walk<R>,
    sink: &mut W,
    to: Layer,
    xl: Option<&XlHeader>,
    copy: CopyBytes<R, W>,
) -> Result<Summary, TranscodeError> {
    let mut out = Transcoder::new(sink, to);
    let mut xl_written = false;
    while let Some(step) = walk.next_step()? {
        if to == Layer::Xl && !xl_written {
            let own = match &step.content {
                Content::XlHeader(header) => Some(*header),
                _ => None,
            };
            let header = xl.or(own).ok_or(TranscodeError::NoConfiguration)?;
            out.xl_header(header)?;
            xl_written = true;
        }
        out.at(step.position.offset);
        out.content(step.content, copy)?;
    }
    out.finish()
}

/// A [`CopyBytes`] for any source and sink, through a buffer.
///
/// # Errors
///
/// The error of the source or the sink.
pub fn copy_bytes<R: Read, W: Write>(
    source: &mut R,
    bytes: u64,
    sink: &mut W,
) -> Result<u64, CopyError> {
    let mut room = [0; 16 << 10];
    let wanted = usize::try_from(bytes).map_or(room.len(), |bytes| bytes.min(room.len()));
    let room = room.get_mut(..wanted).unwrap_or_default();
    let read = loop {
        match source.read(room) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other.map_err(CopyError::Read)?,
        }
    };
    let room = room.get(..read).unwrap_or_default();
    sink.write_all(room).map_err(CopyError::Write)?;
    Ok(read as u64)
}

/// A record with more bytes than this goes from the reader's buffer to the sink without a copy.
const MAX_COPIED: usize = 1 << 20;

pub(crate) struct Transcoder<'s, W> {
    sink: &'s mut W,
    to: Layer,
    libxl: Option<LibxlWriter<Vec<u8>>>,
    libxc: Option<RecordWriter<Vec<u8>>>,
    /// The STATIC_DATA_END implied by a version 2 stream is still to be written.
    implied_end: bool,
    info: PvInfo,
    /// The source has no libxl stream, so a new one is created.
    own_libxl: bool,
    /// Offset in the source of the record that is being converted.
    at: u64,
    summary: Summary,
}

impl<'s, W: ImageSink> Transcoder<'s, W> {
    pub(crate) fn new(sink: &'s mut W, to: Layer) -> Self {
        Self {
            sink,
            to,
            libxl: None,
            libxc: None,
            implied_end: false,
            info: PvInfo::Bits64,
            own_libxl: false,
            at: 0,
            summary: Summary::default(),
        }
    }

    /// Sets the offset in the source of the item that comes next.
    pub(crate) fn at(&mut self, offset: u64) {
        self.at = offset;
    }

    /// Writes an item of the source, except xl's header.
    pub(crate) fn content<R: Read>(
        &mut self,
        content: Content<'_, R>,
        copy: CopyBytes<R, W>,
    ) -> Result<(), TranscodeError> {
        match content {
            Content::XlHeader(_) => Ok(()),
            Content::LibxlHeader(header) => self.libxl_header(header.legacy_converted),
            Content::LibxlRecord(record) => self.libxl_record(&record),
            Content::Headers(image, domain) => self.headers(image.version, domain),
            Content::PageData(body) => self.page_data(body, copy),
            Content::Record(record) => self.record(&record),
        }
    }

    pub(crate) fn xl_header(&mut self, header: &XlHeader) -> Result<(), TranscodeError> {
        let header = header.for_version_2();
        self.sink.xl_header(&header).map_err(TranscodeError::Write)
    }

    /// Writes a record that is not in the source: its body is little endian.
    pub(crate) fn new_record(
        &mut self,
        kind: RecordKind,
        body: &[u8],
    ) -> Result<(), TranscodeError> {
        self.summary.records = self.summary.records.saturating_add(1);
        self.libxc()?.record(kind, &[body])?;
        self.deliver()
    }

    /// Ends the copy, after the last item.
    pub(crate) fn finish(self) -> Result<Summary, TranscodeError> {
        self.sink.flush().map_err(TranscodeError::Write)?;
        Ok(self.summary)
    }

    /// Passes the output of both writers to the sink.
    fn deliver(&mut self) -> Result<(), TranscodeError> {
        let libxl = self.libxl.as_mut().map(LibxlWriter::sink_mut);
        let libxc = self.libxc.as_mut().map(RecordWriter::sink_mut);
        for made in [libxl, libxc].into_iter().flatten() {
            self.sink.write_all(made).map_err(TranscodeError::Write)?;
            made.clear();
        }
        Ok(())
    }

    fn libxl_header(&mut self, legacy_converted: bool) -> Result<(), TranscodeError> {
        if self.to >= Layer::Libxl {
            let header = LibxlHeader {
                order: ByteOrder::Little,
                legacy_converted,
            };
            let writer = LibxlWriter::new(Vec::new(), header).map_err(TranscodeError::Write)?;
            self.libxl = Some(writer);
        }
        self.deliver()
    }

    pub(crate) fn libxl_record(&mut self, record: &LibxlRecord) -> Result<(), TranscodeError> {
        match &mut self.libxl {
            Some(_) if record.body_bytes() > MAX_COPIED as u64 => {
                self.deliver()?;
                if let Some(libxl) = &mut self.libxl {
                    libxl.write_aside(record, self.sink)?;
                }
            }
            Some(libxl) => libxl.write(record)?,
            None if matches!(record, LibxlRecord::End | LibxlRecord::LibxcContext) => {}
            None => {
                self.deliver()?;
                if let LibxlRecord::EmulatorContext { state, .. } = record
                    && (self.sink.emulator_context(state)).map_err(TranscodeError::Write)?
                {
                    return Ok(());
                }
                self.summary.dropped = self.summary.dropped.saturating_add(1);
                if self.summary.named.len() < MAX_NAMED {
                    self.summary.named.push(Dropped {
                        kind: record.kind(),
                        offset: self.at,
                        bytes: record.body_bytes(),
                    });
                }
            }
        }
        self.deliver()
    }

    fn headers(&mut self, version: Version, domain: DomainHeader) -> Result<(), TranscodeError> {
        if self.to >= Layer::Libxl && self.libxl.is_none() {
            self.own_libxl = true;
            self.libxl_header(domain.is_converted())?;
            self.libxl_record(&LibxlRecord::LibxcContext)?;
        }
        self.implied_end = version < Version::V3;
        self.libxc = Some(RecordWriter::new(Vec::new(), domain)?);
        self.deliver()
    }

    /// The libxc writer, which exists after the headers.
    fn libxc(&mut self) -> Result<&mut RecordWriter<Vec<u8>>, TranscodeError> {
        self.libxc.as_mut().ok_or_else(|| {
            TranscodeError::Write(io::Error::other("a record came before the headers"))
        })
    }

    fn static_data_ends(&mut self) -> Result<(), TranscodeError> {
        if std::mem::take(&mut self.implied_end) {
            self.libxc()?.static_data_end()?;
        }
        Ok(())
    }

    fn page_data<R: Read>(
        &mut self,
        mut body: PageDataBody<'_, R>,
        copy: CopyBytes<R, W>,
    ) -> Result<(), TranscodeError> {
        self.static_data_ends()?;
        self.deliver()?;
        self.summary.records = self.summary.records.saturating_add(1);
        let pads = leading_pads(body.entries().iter());
        let entries = body.entries().len();
        let real = entries.saturating_sub(pads) as u64;
        self.summary.entries = self.summary.entries.saturating_add(real);
        // Readers accept larger batches than a writer may write.
        for at in (pads..entries).step_by(MAX_BATCH) {
            let batch: Vec<_> = body.entries().part(at, MAX_BATCH).iter().collect();
            self.sink.page_data(&batch)?;
            let pages = batch.iter().filter(|e| e.page_type.has_data()).count() as u64;
            let sink = &mut *self.sink;
            let mut failed = None;
            let copied = body.with_source(pages, |source, bytes| {
                let mut left = bytes;
                while left > 0 {
                    match copy(source, left, sink) {
                        Ok(0) => return Err(EndedAfter(bytes.saturating_sub(left)).into()),
                        Ok(n) => left = left.saturating_sub(n),
                        Err(CopyError::Read(error)) => return Err(error),
                        Err(CopyError::Write(error)) => {
                            failed = Some(error);
                            return Err(io::ErrorKind::Other.into());
                        }
                    }
                }
                Ok(())
            });
            // The reader reports any failure as one of its source.
            if let Some(error) = failed {
                return Err(TranscodeError::Write(error));
            }
            copied?;
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), TranscodeError> {
        self.summary.records = self.summary.records.saturating_add(1);
        let (kind, raw, info) = (record.kind, record.raw, self.info);
        match record.body {
            Body::End => {
                self.libxc()?.end()?;
                self.deliver()?;
                if self.own_libxl {
                    self.libxl_record(&LibxlRecord::End)?;
                }
            }
            Body::PvInfo(info) => {
                self.info = info;
                self.libxc()?.pv_info(info)?;
            }
            Body::P2mFrames(frames) => {
                self.static_data_ends()?;
                self.deliver()?;
                // It may be 64 MiB long.
                match frames.is_little_endian() {
                    true => long_record(self.sink, kind, raw)?,
                    false => long_p2m_frames(self.sink, &frames)?,
                }
            }
            Body::Vcpu(vcpu) => {
                self.libxc()?
                    .vcpu_state(kind, info, vcpu.vcpu, vcpu.state)?;
            }
            Body::SharedInfo(page) => self.libxc()?.shared_info(page)?,
            Body::TscInfo(tsc) => self.libxc()?.tsc_info(tsc)?,
            Body::HvmContext(context) => self.libxc()?.hvm_context(context)?,
            Body::HvmParams(params) => {
                let params: Vec<HvmParam> = params.iter().collect();
                self.libxc()?.hvm_params(&params)?;
            }
            Body::Verify => self.libxc()?.verify()?,
            Body::Checkpoint => {
                self.libxc()?.checkpoint()?;
                if let Some(libxl) = &mut self.libxl
                    && !self.own_libxl
                {
                    libxl.begin_checkpoint();
                }
            }
            Body::StaticDataEnd => self.libxc()?.static_data_end()?,
            Body::CpuidPolicy(policy) => {
                let leaves = policy.iter().map(|leaf| leaf.encode(ByteOrder::Little));
                let leaves: Vec<u8> = leaves.flatten().collect();
                self.libxc()?.cpuid_policy(&leaves)?;
            }
            Body::MsrPolicy(policy) => {
                let entries = policy.iter().map(|msr| msr.encode(ByteOrder::Little));
                let entries: Vec<u8> = entries.flatten().collect();
                self.libxc()?.msr_policy(&entries)?;
            }
            Body::Optional(_) if raw.len() > MAX_COPIED => {
                self.deliver()?;
                long_record(self.sink, kind, raw)?;
            }
            // Its contents are unknown.
            Body::Optional(_) => self.libxc()?.record(kind, &[raw])?,
        }
        self.deliver()
    }
}
