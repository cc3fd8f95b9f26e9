//! Conversion of a legacy stream to version 3, byte for byte as Xen's converter does it, where that
//! can handle the stream (`docs/legacy.md` says where it cannot).
//!
//! [`Converted`] is a source of bytes: a reader of version 3 can read a legacy stream through it,
//! or it can be copied to a file. It converts while it is read, from a pipe if need be, and does
//! not keep the contents of pages.
//!
//! A stream with checkpoints (Remus) becomes one without: pages in their order, so that the last
//! version counts, and the tail of the last complete checkpoint. Pages of a later checkpoint must
//! not get into the stream before it is complete. Either they wait in a spool that the caller
//! provides, or the caller has counted the complete checkpoints in advance ([`survey`]).
//!
//! Specification: libxc migration stream, "Legacy Images". C implementation: none; Xen's is
//! `tools/python/scripts/convert-legacy-stream`.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::detect::ToolstackWidth;
use super::error::LegacyError;
use super::items::{Item, QemuRecord};
use super::read::{LegacyGuest, LegacyOptions, LegacyReader};
use super::toolstack;
use crate::byte_order::ByteOrder;
use crate::error::{Place, ReadError, ReadErrorCause};
use crate::image::{DomainHeader, GuestType};
use crate::record::hvm::HvmParam;
use crate::wrapper::libxl::{
    EmulatorId, EmulatorInstance, LibxlHeader, LibxlRecord, LibxlWriter, XenstoreData,
};
use crate::write::{RecordWriter, page_data_head};

mod compressed;
mod tail;

use compressed::Assembly;
use tail::Tail;

/// Version of Xen's converter in the domain header: Xen 0.1.
const CONVERTER_VERSION: u32 = 1;

/// The wrapper around the converted stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A bare libxc stream.
    Libxc {
        /// Whether the device model's record follows it unchanged. libxc does not read it.
        device_model: bool,
    },
    /// A libxl stream.
    Libxl,
}

/// Temporary storage for pages of an incomplete checkpoint.
pub trait Spool: Read + Write + Seek + Send {}

impl<T: Read + Write + Seek + Send> Spool for T {}

/// What was converted so far, and what was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Complete checkpoints; 1 for an ordinary image.
    pub checkpoints: u32,
    /// Why the checkpoint after the last complete one is incomplete.
    pub incomplete: Option<String>,
    /// Entries for pages.
    pub entries: u64,
    /// Entries without meaning, left out.
    pub filler: u64,
    /// Bytes of transcendent memory, left out.
    pub tmem_bytes: u64,
    /// Pfns without memory that a PV tail lists, left out.
    pub unmapped: u64,
    /// Unknown blocks of the extended info, left out.
    pub unknown_blocks: u32,
    /// Whether pages are sent a second time, for comparison.
    pub verify: bool,
    /// Whether pages were sent as differences.
    pub compressed: bool,
    /// Bytes of the toolstack's records that a libxc stream has no place for, left out.
    pub toolstack_bytes: u64,
}

/// A legacy stream, read as one of version 3.
pub struct Converted<R> {
    reader: LegacyReader<R>,
    target: Target,
    writer: RecordWriter<Vec<u8>>,
    libxl: Option<LibxlWriter<Vec<u8>>>,
    /// Converted bytes, and how many have been read.
    ready: Vec<u8>,
    at: usize,
    stage: Stage,
    spool: Option<Box<dyn Spool>>,
    spooled: u64,
    tail: Tail,
    complete: Option<Tail>,
    assembly: Option<Assembly>,
    summary: Summary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Pieces,
    /// Bytes of the spool that are still to be read.
    Unspooling(u64),
    Done,
    Failed,
}

/// What [`Converted::next_part`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'c> {
    /// These bytes.
    Bytes(&'c [u8]),
    /// This many bytes are unchanged: take them with [`Converted::with_source`].
    Through(u64),
}

impl<R: Read> Converted<R> {
    /// Converts what `reader` has not read yet. Without a spool, pages of a later checkpoint count
    /// at once, so the reader must stop after the last complete one.
    ///
    /// # Errors
    ///
    /// None here; errors of the stream are returned when it is read.
    pub fn new(
        reader: LegacyReader<R>,
        target: Target,
        spool: Option<Box<dyn Spool>>,
    ) -> Result<Self, ReadError> {
        let fail = |e: LegacyError| ReadError::at(Place::LegacyHead, 0, e);
        let libxl = match target {
            Target::Libxc { .. } => None,
            Target::Libxl => {
                let header = LibxlHeader {
                    order: ByteOrder::Little,
                    legacy_converted: true,
                };
                let writer = LibxlWriter::new(Vec::new(), header)
                    .and_then(
                        |mut writer| match writer.write(&LibxlRecord::LibxcContext) {
                            Ok(()) => Ok(writer),
                            Err(e) => Err(io::Error::other(e.to_string())),
                        },
                    )
                    .map_err(|e| fail(LegacyError::Unwritable(e.to_string())))?;
                Some(writer)
            }
        };
        let guest_type = match reader.guest() {
            LegacyGuest::Pv => GuestType::X86_PV,
            LegacyGuest::Hvm => GuestType::X86_HVM,
        };
        let domain = DomainHeader {
            guest_type,
            xen_major: 0,
            xen_minor: CONVERTER_VERSION,
        };
        let writer = RecordWriter::new(Vec::new(), domain).map_err(|e| fail(e.into()))?;
        let mut converted = Self {
            reader,
            target,
            writer,
            libxl,
            ready: Vec::new(),
            at: 0,
            stage: Stage::Pieces,
            spool,
            spooled: 0,
            tail: Tail::default(),
            complete: None,
            assembly: None,
            summary: Summary::default(),
        };
        if converted.reader.guest() == LegacyGuest::Hvm {
            converted
                .writer
                .static_data_end()
                .map_err(|e| fail(e.into()))?;
        }
        converted.collect();
        Ok(converted)
    }

    /// The reader of the legacy stream.
    pub fn reader(&self) -> &LegacyReader<R> {
        &self.reader
    }

    /// What was converted so far.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Returns the source.
    pub fn into_source(self) -> R {
        self.reader.into_source()
    }

    /// The next bytes, or `None` at the end. Returned bytes count as taken; unchanged bytes must be
    /// taken before the next call.
    ///
    /// # Errors
    ///
    /// An error of the legacy stream or of its source.
    pub fn next_part(&mut self) -> Result<Option<Part<'_>>, ReadError> {
        while self.at >= self.ready.len() {
            self.ready.clear();
            self.at = 0;
            if self.goes_through() {
                return Ok(Some(Part::Through(self.reader.left())));
            }
            if !self.go_on()? {
                return Ok(None);
            }
        }
        let bytes = self.ready.get(self.at..).unwrap_or_default();
        self.at = self.ready.len();
        Ok(Some(Part::Bytes(bytes)))
    }

    /// Lets `read` take unchanged bytes directly from the source, at most the number passed to it.
    /// `read` returns the number it has taken.
    ///
    /// # Errors
    ///
    /// Same as [`LegacyReader::with_source`].
    pub fn with_source(
        &mut self,
        read: impl FnOnce(&mut R, u64) -> io::Result<u64>,
    ) -> Result<u64, ReadError> {
        match self.goes_through() {
            true => self.reader.with_source(read),
            false => Ok(0),
        }
    }

    /// Whether the next bytes are page contents that can be passed on unread.
    fn goes_through(&self) -> bool {
        self.stage == Stage::Pieces
            && self.reader.left() > 0
            && self.assembly.is_none()
            && !self.spooling()
    }

    /// Whether the checkpoint being converted may turn out incomplete, and so not count.
    fn spooling(&self) -> bool {
        self.spool.is_some() && self.complete.is_some()
    }

    /// Makes more bytes ready. Returns `false` at the end.
    fn go_on(&mut self) -> Result<bool, ReadError> {
        let result = match self.stage {
            Stage::Pieces => self.piece(),
            Stage::Unspooling(left) => self.unspool(left),
            Stage::Done => return Ok(false),
            Stage::Failed => {
                let cause = io::Error::other("the stream failed earlier and cannot be followed");
                return Err(self.failed(ReadErrorCause::Io(cause)));
            }
        };
        match result {
            Ok(()) => Ok(true),
            Err(Failure::Reader(error)) => {
                if self.is_merely_incomplete(&error) {
                    self.summary.incomplete = Some(error.to_string());
                    return match self.finish() {
                        Ok(()) => Ok(true),
                        Err(cause) => Err(self.failed(cause)),
                    };
                }
                self.stage = Stage::Failed;
                Err(error)
            }
            Err(Failure::Cause(cause)) => Err(self.failed(cause)),
        }
    }

    /// Whether an earlier checkpoint is complete and only the current one was cut off, as happens
    /// when the sender dies: Remus exists for this case.
    fn is_merely_incomplete(&self, error: &ReadError) -> bool {
        self.spooling() && matches!(error.cause, ReadErrorCause::Truncated { .. })
    }

    fn failed(&mut self, cause: ReadErrorCause) -> ReadError {
        self.stage = Stage::Failed;
        ReadError {
            position: self.reader.position(),
            cause,
        }
    }

    /// Converts the next piece.
    fn piece(&mut self) -> Result<(), Failure> {
        if self.reader.left() > 0 {
            // Contents that can be passed on have been taken; what is left must be decoded.
            self.contents()?;
        } else {
            match self.reader.next_item().map_err(Failure::Reader)? {
                Some(item) => self.item(item)?,
                None => return Ok(self.finish()?),
            }
        }
        Ok(self.collect_or_spool()?)
    }

    fn item(&mut self, item: Item) -> Result<(), ReadErrorCause> {
        match item {
            Item::ExtendedInfo(info) => self.summary.unknown_blocks = info.unknown_blocks,
            Item::P2mFrames(frames) => {
                let info = self.reader.pv_info();
                let last = self.reader.start().p2m_size.saturating_sub(1);
                self.writer.pv_info(info).map_err(LegacyError::from)?;
                self.writer.static_data_end().map_err(LegacyError::from)?;
                self.writer
                    .p2m_frames(info, 0, last, &frames)
                    .map_err(LegacyError::from)?;
            }
            Item::Batch(batch) => {
                self.summary.filler = self.summary.filler.saturating_add(batch.filler.into());
                let entries = batch.entries.len() as u64;
                self.summary.entries = self.summary.entries.saturating_add(entries);
                match &mut self.assembly {
                    Some(assembly) => {
                        assembly.expect(batch)?;
                        assembly.write_complete(&mut self.writer)?;
                    }
                    // Xen's converter writes a record here that no restorer accepts.
                    None if batch.entries.is_empty() => {}
                    None => {
                        let head = page_data_head(&batch.entries).map_err(LegacyError::from)?;
                        self.writer.sink_mut().extend_from_slice(&head);
                    }
                }
            }
            Item::Compressed { .. } => {
                self.summary.compressed = true;
                self.assembly.get_or_insert_default();
            }
            Item::Verify => self.summary.verify = true,
            Item::Tmem { bytes } => {
                self.summary.tmem_bytes = self.summary.tmem_bytes.saturating_add(bytes);
            }
            Item::TscInfo(info) => self.writer.tsc_info(info).map_err(LegacyError::from)?,
            Item::BodyEnd => {
                if let Some(assembly) = &mut self.assembly {
                    assembly.body_end()?;
                }
            }
            Item::Unmapped { count } => {
                self.summary.unmapped = self.summary.unmapped.saturating_add(count.into());
            }
            Item::Toolstack(record) => self.toolstack(&record)?,
            Item::HvmParam(param) => self.tail.params.push(param),
            Item::MagicPfns(params) => self.tail.magic = Some(params),
            Item::Vcpu(vcpu) => self.tail.vcpus.push(vcpu),
            Item::SharedInfo(page) => self.tail.shared_info = Some(page),
            Item::HvmContext(context) => self.tail.context = context,
            Item::Qemu(record) => self.tail.qemu = Some(record),
            Item::VcpuInfo(_) | Item::LastCheckpoint => {}
            // From the next checkpoint on.
            Item::EnableCompression => self.tail.compress_next = true,
            Item::CheckpointEnd => self.checkpoint_end()?,
        }
        Ok(())
    }

    fn toolstack(&mut self, record: &[u8]) -> Result<(), ReadErrorCause> {
        if record.is_empty() {
            return Ok(());
        }
        match self.target {
            Target::Libxl => {
                let width: ToolstackWidth = self.reader.start().width;
                let data = toolstack::xenstore_data(record, width)?;
                self.tail.xenstore.extend_from_slice(data.as_bytes());
            }
            Target::Libxc { .. } => {
                let bytes = record.len() as u64;
                self.summary.toolstack_bytes = self.summary.toolstack_bytes.saturating_add(bytes);
            }
        }
        Ok(())
    }

    /// Converts contents of pages that are compressed or may not count.
    fn contents(&mut self) -> Result<(), Failure> {
        const STEP: usize = 256 << 10;
        let most = usize::try_from(self.reader.left())
            .unwrap_or(STEP)
            .min(STEP);
        let mut bytes = vec![0; most];
        let got = self.reader.read_left(&mut bytes).map_err(Failure::Reader)?;
        bytes.truncate(got);
        match &mut self.assembly {
            Some(assembly) => {
                assembly.take(&bytes, &mut self.writer)?;
                let left = self.reader.left();
                assembly.chunk_part(left)?;
            }
            None => self.writer.sink_mut().extend_from_slice(&bytes),
        }
        Ok(())
    }

    fn checkpoint_end(&mut self) -> Result<(), ReadErrorCause> {
        let tail = std::mem::take(&mut self.tail);
        if tail.compress_next {
            self.assembly.get_or_insert_default();
        }
        self.summary.checkpoints = self.reader.complete();
        self.commit()?;
        self.complete = Some(tail);
        Ok(())
    }

    /// Makes the contents of the spool count.
    fn commit(&mut self) -> Result<(), ReadErrorCause> {
        self.collect_or_spool()?;
        let Some(spool) = &mut self.spool else {
            return Ok(());
        };
        let bytes = std::mem::take(&mut self.spooled);
        spool.seek(SeekFrom::Start(0)).map_err(ReadErrorCause::Io)?;
        if bytes > 0 {
            self.stage = Stage::Unspooling(bytes);
        }
        Ok(())
    }

    fn unspool(&mut self, left: u64) -> Result<(), Failure> {
        const STEP: usize = 1 << 20;
        let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
        let mut bytes = vec![0; step];
        if let Some(spool) = &mut self.spool {
            spool.read_exact(&mut bytes).map_err(ReadErrorCause::Io)?;
        }
        self.ready.extend_from_slice(&bytes);
        let left = left.saturating_sub(step as u64);
        self.stage = Stage::Unspooling(left);
        if left == 0 {
            self.stage = Stage::Pieces;
            if let Some(spool) = &mut self.spool {
                spool.seek(SeekFrom::Start(0)).map_err(ReadErrorCause::Io)?;
            }
        }
        Ok(())
    }

    /// Moves the writer's output to the ready bytes.
    fn collect(&mut self) {
        if let Some(libxl) = &mut self.libxl {
            self.ready.append(libxl.sink_mut());
        }
        self.ready.append(self.writer.sink_mut());
    }

    fn collect_or_spool(&mut self) -> Result<(), ReadErrorCause> {
        let spooling = self.spooling();
        match &mut self.spool {
            Some(spool) if spooling => {
                let bytes = self.writer.sink_mut();
                spool.write_all(bytes).map_err(ReadErrorCause::Io)?;
                self.spooled = self.spooled.saturating_add(bytes.len() as u64);
                bytes.clear();
            }
            _ => self.collect(),
        }
        Ok(())
    }

    /// Ends the stream with the tail of the last complete checkpoint.
    fn finish(&mut self) -> Result<(), ReadErrorCause> {
        // Drop what belongs to no complete checkpoint.
        self.writer.sink_mut().clear();
        self.stage = Stage::Done;
        let Some(tail) = self.complete.take() else {
            return Err(ReadErrorCause::Bug(
                "the stream is over and no checkpoint is complete",
            ));
        };
        tail.write(&mut self.writer, self.reader.pv_info())?;
        self.collect();
        let mut last = Vec::new();
        match (self.target, &mut self.libxl) {
            (Target::Libxl, Some(libxl)) => {
                for record in tail.libxl_records()? {
                    // Not twice as much for a few bytes of padding.
                    let bytes = usize::try_from(record.body_bytes()).unwrap_or(0);
                    libxl.sink_mut().reserve_exact(bytes.saturating_add(16));
                    libxl
                        .write(&record)
                        .map_err(|e| LegacyError::Unwritable(e.to_string()))?;
                }
                last = std::mem::take(libxl.sink_mut());
            }
            (Target::Libxc { device_model: true }, _) => {
                if let Some(record) = tail.qemu {
                    record.write(&mut last)?;
                }
            }
            _ => {}
        }
        // The device model's state may be long: no second copy stays.
        self.ready.extend_from_slice(&last);
        Ok(())
    }
}

/// An error of the reader, which has a position, or of the conversion.
enum Failure {
    Reader(ReadError),
    Cause(ReadErrorCause),
}

impl<E: Into<ReadErrorCause>> From<E> for Failure {
    fn from(cause: E) -> Self {
        Self::Cause(cause.into())
    }
}

impl<R: Read> Read for Converted<R> {
    /// An error of the legacy stream is returned as an [`io::Error`] that holds its [`ReadError`].
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        loop {
            if self.at < self.ready.len() {
                let bytes = self.ready.get(self.at..).unwrap_or_default();
                let n = bytes.len().min(room.len());
                for (to, from) in room.iter_mut().zip(bytes) {
                    *to = *from;
                }
                self.at = self.at.saturating_add(n);
                return Ok(n);
            }
            self.ready.clear();
            self.at = 0;
            if self.goes_through() {
                return self.reader.read_left(room).map_err(io::Error::other);
            }
            if !self.go_on().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
    }
}

impl<R> fmt::Debug for Converted<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Converted")
            .field("reader", &self.reader)
            .field("target", &self.target)
            .field("stage", &self.stage)
            .field("summary", &self.summary)
            .finish_non_exhaustive()
    }
}

/// The result of reading a legacy file once, without the contents of its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Complete checkpoints: at least 1.
    pub complete: u32,
    /// Why the checkpoint after these is incomplete, if there is one.
    pub incomplete: Option<String>,
}

/// Reads a legacy stream to its end to count its complete checkpoints.
///
/// # Errors
///
/// Same as [`LegacyReader::next_item`], except if only a checkpoint after the first is cut off.
pub fn survey<R: Read + Seek>(source: R, options: LegacyOptions) -> Result<Survey, ReadError> {
    let mut reader = LegacyReader::seeking(source, options)?;
    loop {
        match reader.next_item() {
            Ok(Some(_)) => {}
            Ok(None) => {
                return Ok(Survey {
                    complete: reader.complete(),
                    incomplete: None,
                });
            }
            Err(error) => {
                let cut = matches!(error.cause, ReadErrorCause::Truncated { .. });
                return match reader.complete() {
                    complete @ 1.. if cut => Ok(Survey {
                        complete,
                        incomplete: Some(error.to_string()),
                    }),
                    _ => Err(error),
                };
            }
        }
    }
}
