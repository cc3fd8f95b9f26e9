//! Pull parser for legacy streams. It only reads forwards, reads no byte beyond the stream, and
//! never uses more memory than a piece needs. Contents of pages are passed on, not kept.
//!
//! | part | encoding |
//! |---|---|
//! | p2m_size | long (4 or 8 bytes, the toolstack's width) |
//! | PV: extended info, optional | long, all ones; u32 length; blocks: name (4), u32 length, body |
//! | PV: frames of the p2m | longs, one for each 4096 bytes of the p2m |
//! | chunks | i32 marker; see [`chunk`](super::chunk) |
//! | PV: tail | u32 count, that many longs; vcpus; shared info page |
//! | HVM: tail | u64 × 3 pfns; u32 length, Xen's state; the device model's record |
//!
//! With Remus, chunks and tail repeat. C implementation: `tools/libxc/xc_domain_restore.c` (Xen
//! 4.5).

use std::fmt;
use std::io::{self, Read, Seek};

use super::chunk::Marker;
use super::detect::{BYTES, LegacyStart, MAX_P2M_SIZE, ToolstackWidth, detect};
use super::error::LegacyError;
use super::items::{ExtendedInfo, Item};
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::record::pv::PvInfo;
use crate::source::{Skip, fill, skip_by_reading, skip_by_seeking};

mod body;
mod head;
mod tail;

/// The type of guest in a legacy stream, which the stream itself hardly reveals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LegacyGuest {
    /// x86 PV.
    Pv,
    /// x86 HVM.
    Hvm,
}

impl fmt::Display for LegacyGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pv => "PV",
            Self::Hvm => "HVM",
        })
    }
}

/// How far to read a stream that may be checkpointed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpoints {
    /// Up to the chunk that marks the last checkpoint, or the end of the source.
    #[default]
    All,
    /// Up to this number of checkpoints, or the chunk that marks the last one.
    UpTo(u32),
}

/// Options for reading a legacy stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LegacyOptions {
    /// Tolerate non-zero reserved fields, but nothing else.
    pub lenient: bool,
    /// Bytes of the file before the stream, for correct positions.
    pub offset: u64,
    /// The toolstack's width, if known; otherwise it is detected.
    pub width: Option<ToolstackWidth>,
    /// The type of guest, if known; otherwise it is detected.
    pub guest: Option<LegacyGuest>,
    /// Whether an HVM tail ends with the device model's record.
    pub device_model: bool,
    /// How far to read.
    pub checkpoints: Checkpoints,
}

impl Default for LegacyOptions {
    fn default() -> Self {
        Self {
            lenient: false,
            offset: 0,
            width: None,
            guest: None,
            device_model: true,
            checkpoints: Checkpoints::All,
        }
    }
}

/// Reader of a legacy stream.
#[derive(Clone)]
pub struct LegacyReader<R> {
    source: R,
    skip: Skip<R>,
    options: LegacyOptions,
    /// Bytes that were read ahead for detection and not used yet.
    known: Vec<u8>,
    offset: u64,
    start: LegacyStart,
    guest: LegacyGuest,
    extended_info: bool,
    extended: ExtendedInfo,
    /// Vcpus that are present.
    vcpus: Vec<u32>,
    /// Index of the next chunk.
    index: u64,
    current: Position,
    /// Bytes of the current piece that the caller has not taken yet.
    left: u64,
    /// Whether an entry for a page has come.
    any_entry: bool,
    compressed: bool,
    compress_next: bool,
    last: bool,
    complete: u32,
    state: State,
    scratch: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    ExtendedInfo,
    P2mFrames,
    Body,
    /// In the body of a checkpoint that may not exist.
    MaybeBody,
    Unmapped,
    Vcpu(usize),
    SharedInfo,
    MagicPfns,
    HvmContext,
    Qemu,
    CheckpointEnd,
    Ended,
    Failed,
}

impl<R: Read> LegacyReader<R> {
    /// Reads the start of a stream. The source is only read forwards and needs no buffer.
    ///
    /// # Errors
    ///
    /// The source failed or ended, no legacy saver can have written the bytes, or the type of guest
    /// cannot be detected.
    pub fn new(source: R, options: LegacyOptions) -> Result<Self, ReadError> {
        Self::with_skip(&[], source, options, skip_by_reading::<R>)
    }

    /// Like [`LegacyReader::new`], if the first bytes of the stream (`known`, at most eight) have
    /// already been read to detect its format.
    ///
    /// # Errors
    ///
    /// Same as [`LegacyReader::new`].
    pub fn behind(known: &[u8], source: R, options: LegacyOptions) -> Result<Self, ReadError> {
        Self::with_skip(known, source, options, skip_by_reading::<R>)
    }

    /// Position of the piece that was read last.
    pub fn position(&self) -> Position {
        self.current
    }

    /// Bytes of the file consumed so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The toolstack's width, and the guest's number of frames.
    pub fn start(&self) -> LegacyStart {
        self.start
    }

    /// The type of guest.
    pub fn guest(&self) -> LegacyGuest {
        self.guest
    }

    /// Width and page tables of a PV guest, once its extended info has been read.
    ///
    /// Without extended info, the guest has the toolstack's width, as restorers assume.
    pub fn pv_info(&self) -> PvInfo {
        match (self.extended.guest_width, self.start.width) {
            (Some(8), _) | (None, ToolstackWidth::Bits64) => PvInfo::Bits64,
            _ => PvInfo::Bits32,
        }
    }

    /// Number of complete checkpoints.
    pub fn complete(&self) -> u32 {
        self.complete
    }

    /// Returns the source.
    pub fn into_source(self) -> R {
        self.source
    }

    /// Bytes of the current piece (contents of pages, compressed data) that have not been taken.
    /// The next call of [`LegacyReader::next_item`] skips them.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Takes bytes of the current piece. Returns 0 if none are left.
    ///
    /// # Errors
    ///
    /// The source failed or ended.
    pub fn read_left(&mut self, room: &mut [u8]) -> Result<usize, ReadError> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let (room, _) = room.split_at_mut(room.len().min(most));
        if room.is_empty() {
            return Ok(0);
        }
        loop {
            let cause = match self.source.read(room) {
                Ok(0) => ReadErrorCause::Truncated { needed: self.left },
                Ok(n) if n <= room.len() => {
                    self.count(n as u64);
                    return Ok(n);
                }
                Ok(_) => ReadErrorCause::Io(io::Error::other(
                    "the source claims to have read more than it was asked for",
                )),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => ReadErrorCause::Io(e),
            };
            return Err(self.failed(cause));
        }
    }

    /// Lets `read` take bytes of the current piece directly from the source: at most the number
    /// that it is given. `read` returns how many it has taken.
    ///
    /// # Errors
    ///
    /// The error of `read`; a truncated stream if `read` takes none.
    pub fn with_source(
        &mut self,
        read: impl FnOnce(&mut R, u64) -> io::Result<u64>,
    ) -> Result<u64, ReadError> {
        match read(&mut self.source, self.left) {
            Ok(0) if self.left > 0 => {
                let needed = self.left;
                Err(self.failed(ReadErrorCause::Truncated { needed }))
            }
            Ok(n) => {
                self.count(n.min(self.left));
                Ok(n)
            }
            Err(e) => Err(self.failed(ReadErrorCause::Io(e))),
        }
    }

    /// Counts bytes of the current piece as taken.
    fn count(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
        self.offset = self.offset.saturating_add(bytes);
    }

    fn failed(&mut self, cause: impl Into<ReadErrorCause>) -> ReadError {
        self.state = State::Failed;
        ReadError {
            position: self.current,
            cause: cause.into(),
        }
    }

    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    ///
    /// The source failed, the stream is truncated, or a rule is broken; the error contains the
    /// position. After an error the reader cannot continue.
    pub fn next_item(&mut self) -> Result<Option<Item>, ReadError> {
        if let Err(cause) = self.pass_over_left() {
            return Err(self.failed(cause));
        }
        if self.state == State::Ended {
            return Ok(None);
        }
        let place = match self.state {
            State::ExtendedInfo | State::P2mFrames => Place::LegacyHead,
            State::Body | State::MaybeBody => Place::LegacyChunk {
                index: self.index,
                marker: None,
            },
            _ => Place::LegacyTail,
        };
        self.current = Position {
            place,
            offset: self.offset,
        };
        match self.read_item() {
            Ok(item) => Ok(item),
            Err(cause) => Err(self.failed(cause)),
        }
    }

    fn read_item(&mut self) -> Result<Option<Item>, ReadErrorCause> {
        let item = match self.state {
            State::ExtendedInfo => self.extended_info()?,
            State::P2mFrames => self.p2m_frames()?,
            State::Body => self.chunk()?,
            State::MaybeBody => {
                if !self.more_to_come()? {
                    self.state = State::Ended;
                    return Ok(None);
                }
                self.state = State::Body;
                self.chunk()?
            }
            State::Unmapped => self.unmapped()?,
            State::Vcpu(index) => self.vcpu(index)?,
            State::SharedInfo => self.shared_info()?,
            State::MagicPfns => self.magic_pfns()?,
            State::HvmContext => self.hvm_context()?,
            State::Qemu => self.qemu()?,
            State::CheckpointEnd => self.checkpoint_end(),
            State::Ended => return Ok(None),
            State::Failed => {
                return Err(ReadErrorCause::Io(io::Error::other(
                    "the stream failed earlier and cannot be followed",
                )));
            }
        };
        Ok(Some(item))
    }

    /// Whether the source has another byte, which is kept for later.
    fn more_to_come(&mut self) -> Result<bool, ReadErrorCause> {
        let mut byte = [0];
        match fill(&mut self.source, &mut byte) {
            Ok(()) => {
                self.known.extend_from_slice(&byte);
                Ok(true)
            }
            Err(ReadErrorCause::Truncated { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn checkpoint_end(&mut self) -> Item {
        self.complete = self.complete.saturating_add(1);
        self.compressed |= self.compress_next;
        let through = match self.options.checkpoints {
            Checkpoints::All => self.last,
            Checkpoints::UpTo(limit) => self.last || self.complete >= limit,
        };
        self.state = match through {
            true => State::Ended,
            false => State::MaybeBody,
        };
        Item::CheckpointEnd
    }

    fn pass_over_left(&mut self) -> Result<(), ReadErrorCause> {
        let bytes = self.left;
        if bytes > 0 {
            self.pass_over(bytes)?;
            self.left = 0;
        }
        Ok(())
    }

    /// Skips bytes of the source, of which none has been read ahead.
    fn pass_over(&mut self, bytes: u64) -> Result<(), ReadErrorCause> {
        let done =
            (self.skip)(&mut self.source, bytes, &mut self.scratch).map_err(ReadErrorCause::Io)?;
        self.offset = self.offset.saturating_add(done);
        match bytes.saturating_sub(done) {
            0 => Ok(()),
            needed => Err(ReadErrorCause::Truncated { needed }),
        }
    }

    /// Fills `room`, first with bytes that were read ahead, then from the source.
    fn fill(&mut self, room: &mut [u8]) -> Result<(), ReadErrorCause> {
        let known = self.known.len().min(room.len());
        let (head, rest) = room.split_at_mut(known);
        for (to, from) in head.iter_mut().zip(self.known.drain(..known)) {
            *to = from;
        }
        fill(&mut self.source, rest)?;
        self.offset = self.offset.saturating_add(room.len() as u64);
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ReadErrorCause> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, ReadErrorCause> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, ReadErrorCause> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// Reads an `unsigned long` of the toolstack.
    fn long(&mut self) -> Result<u64, ReadErrorCause> {
        match self.start.width {
            ToolstackWidth::Bits32 => Ok(self.u32()?.into()),
            ToolstackWidth::Bits64 => self.u64(),
        }
    }

    /// Size of an `unsigned long`.
    fn long_bytes(&self) -> u64 {
        match self.start.width {
            ToolstackWidth::Bits32 => 4,
            ToolstackWidth::Bits64 => 8,
        }
    }

    /// Reads this many longs.
    fn longs(&mut self, count: u64) -> Result<Vec<u64>, ReadErrorCause> {
        let bytes = self.blob(count.saturating_mul(self.long_bytes()))?;
        let numbers = match self.start.width {
            ToolstackWidth::Bits32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|long| u32::from_le_bytes(*long).into())
                .collect(),
            ToolstackWidth::Bits64 => bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|long| u64::from_le_bytes(*long))
                .collect(),
        };
        Ok(numbers)
    }

    /// Reads this many bytes; memory grows as they arrive.
    fn blob(&mut self, bytes: u64) -> Result<Vec<u8>, ReadErrorCause> {
        const STEP: usize = 1 << 20;
        let mut blob = Vec::new();
        let mut left = bytes;
        while left > 0 {
            let step = usize::try_from(left).unwrap_or(STEP).min(STEP);
            left = left.saturating_sub(step as u64);
            let at = blob.len();
            blob.resize(at.saturating_add(step), 0);
            let (_, room) = blob.split_at_mut(at);
            self.fill(room)
                .map_err(|cause| cause.truncated_before(left))?;
        }
        Ok(blob)
    }

    fn range(what: &'static str, got: u64, min: u64, max: u64) -> Result<u64, LegacyError> {
        match (min..=max).contains(&got) {
            true => Ok(got),
            false => Err(LegacyError::Range {
                what,
                got,
                min,
                max,
            }),
        }
    }
}

impl<R: Read + Seek> LegacyReader<R> {
    /// Like [`LegacyReader::new`], for a file: contents of pages that are not taken are skipped
    /// without being read.
    ///
    /// # Errors
    ///
    /// Same as [`LegacyReader::new`].
    pub fn seeking(source: R, options: LegacyOptions) -> Result<Self, ReadError> {
        Self::with_skip(&[], source, options, skip_by_seeking::<R>)
    }
}

impl<R> fmt::Debug for LegacyReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegacyReader")
            .field("start", &self.start)
            .field("guest", &self.guest)
            .field("offset", &self.offset)
            .field("current", &self.current)
            .field("left", &self.left)
            .field("complete", &self.complete)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
