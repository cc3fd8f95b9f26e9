//! Steps through a whole file of any readable format: the wrappers around the libxc stream, the
//! stream itself, and the hand-overs between them, as one sequence.
//!
//! | file | steps |
//! |---|---|
//! | of `xl save` | xl header, then the steps of a libxl stream |
//! | libxl stream | libxl header, records up to END; after LIBXC_CONTEXT a libxc stream |
//! | libxc stream | libxc headers, libxc records up to END |
//!
//! In a checkpointed stream (Remus, COLO) the libxc layer pauses at each CHECKPOINT. libxl records
//! follow up to CHECKPOINT_END, for COLO a CHECKPOINT_STATE after it, and then libxc records again,
//! without headers. In a bare libxc stream, the records just continue.
//!
//! Nothing is read beyond a step, so the source may be a pipe. After the last step the source is
//! positioned after the last record.
//!
//! Specification: libxl migration stream, "LIBXC_CONTEXT"; libxc migration stream,
//! "CHECKPOINT". C implementation: `libxl_stream_read.c`,
//! `xg_sr_restore.c:handle_checkpoint`.

use std::io::{self, Read, Seek};
use std::mem;

use zerocopy::IntoBytes;

use crate::detect::{Detected, detect};
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::guest_image::GuestImage;
use crate::image::{DomainHeader, GuestType, ImageHeader};
use crate::read::{Incoming, PageDataBody, ReadOptions, RecordReader};
use crate::record::{Record, RecordKind, WireRecordHeader};
use crate::source::{Skip, fill, skip_by_reading, skip_by_seeking};
use crate::wrapper::libxl::read::LibxlState;
use crate::wrapper::libxl::{LibxlError, LibxlHeader, LibxlRecord, LibxlRecordKind, MAX_BODY};
use crate::wrapper::xl::XlHeader;

/// Minimum number of bytes that a record of the libxl stream counts towards those that are kept: a
/// record of eight bytes takes more memory than that.
const LEAST_KEPT: u64 = 512;

/// An item of a file, with its position.
#[derive(Debug)]
pub struct Step<'w, R> {
    /// Its position.
    pub position: Position,
    /// Number of the record in its stream, from 0; 0 for headers.
    pub index: u64,
    /// Bytes in the record's body, without padding; for headers, all their bytes.
    pub length: u64,
    /// The item.
    pub content: Content<'w, R>,
}

impl<'w, R> Step<'w, R> {
    fn header(place: Place, offset: u64, length: u64, content: Content<'w, R>) -> Self {
        Self {
            position: Position { place, offset },
            index: 0,
            length,
            content,
        }
    }

    fn libxl_record(position: Position, record: LibxlRecord) -> Self {
        Self {
            position,
            index: match position.place {
                Place::LibxlRecord { index, .. } => index,
                _ => 0,
            },
            length: record.body_bytes(),
            content: Content::LibxlRecord(record),
        }
    }
}

/// The content of a [`Step`].
#[derive(Debug)]
pub enum Content<'w, R> {
    /// The header of a file that xl wrote, with the domain's configuration.
    XlHeader(&'w XlHeader),
    /// The header of the libxl stream.
    LibxlHeader(LibxlHeader),
    /// A record of the libxl stream.
    LibxlRecord(LibxlRecord),
    /// Both headers of the libxc stream.
    Headers(ImageHeader, DomainHeader),
    /// A PAGE_DATA record of the libxc stream, its pages still in the source. Pages that the caller
    /// does not read are skipped.
    PageData(PageDataBody<'w, R>),
    /// Any other record of the libxc stream.
    Record(Record<'w>),
}

impl<R: Read> Content<'_, R> {
    /// The largest part of the item's bytes that is in memory, unchanged, and the number of the
    /// item's bytes before it: the body of a record without its head, or the entries of PAGE_DATA.
    /// `None` for headers and for records of fixed length.
    pub fn blob(&self) -> Option<(usize, &[u8])> {
        /// Bytes in a record's header, in either stream, and in the heads of some bodies.
        const HEADER: usize = 8;
        const WITH_HEAD: usize = 16;
        match self {
            Self::Record(record) => Some((HEADER, record.raw)),
            Self::PageData(body) => Some((WITH_HEAD, body.entries().as_bytes())),
            Self::LibxlRecord(record) => match record {
                LibxlRecord::EmulatorContext { state, .. } => Some((WITH_HEAD, state)),
                LibxlRecord::EmulatorXenstoreData { data, .. } => {
                    Some((WITH_HEAD, data.as_bytes()))
                }
                LibxlRecord::Optional { body, .. } => Some((HEADER, body)),
                LibxlRecord::End
                | LibxlRecord::LibxcContext
                | LibxlRecord::CheckpointEnd
                | LibxlRecord::CheckpointState(_) => None,
            },
            Self::XlHeader(_) | Self::LibxlHeader(_) | Self::Headers(..) => None,
        }
    }
}

/// Reader of a file, step by step.
///
/// ```
/// use xsr_format::{Content, ReadOptions, Walk};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let mut walk = Walk::open(&image[..], ReadOptions::default())?;
/// let mut kinds = Vec::new();
/// while let Some(step) = walk.next_step()? {
///     if let Content::Record(record) = step.content {
///         kinds.push(record.kind.to_string());
///     }
/// }
/// assert_eq!(kinds, ["STATIC_DATA_END", "HVM_CONTEXT", "END"]);
/// assert_eq!(walk.offset(), image.len() as u64);
/// # Ok::<(), xsr_format::ReadError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Walk<R> {
    options: ReadOptions,
    skip: Skip<R>,
    detected: Detected,
    xl: Option<XlHeader>,
    libxl: Option<LibxlState>,
    guest: Option<GuestImage>,
    /// Bytes of libxl records that a restorer must keep.
    kept: u64,
    held: Held<R>,
    next: Next,
}

/// The layer that holds the source.
#[derive(Clone, Debug)]
enum Held<R> {
    /// The libxl layer, or none yet; bytes of the file consumed so far, and bytes that were read
    /// ahead, but not consumed.
    Source(R, u64, Vec<u8>),
    /// The libxc layer.
    Libxc(RecordReader<R>),
    /// None: the hand-over failed.
    Lost,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    XlHeader,
    /// After an xl header without the flag for a stream of version 2.
    NotVersion2,
    LibxlHeader,
    LibxlRecord,
    LibxcHeaders,
    LibxcRecord,
    /// A libxl record, while the libxc layer pauses at a CHECKPOINT.
    CheckpointRecord,
    /// After CHECKPOINT_END: a libxc record, or COLO's CHECKPOINT_STATE.
    Resumption,
    Nothing,
    Failed,
}

/// Number of bytes that distinguish readable files from all others.
const TELLING: usize = 8;

impl<R: Read> Walk<R> {
    /// Detects the format of `source` from its first eight bytes (fewer if it has no more). The
    /// source is only read forwards. It needs no buffer of its own, and must not have one if it is
    /// used after the last step.
    ///
    /// # Errors
    ///
    /// The source failed, or this version does not read its format ([`ReadErrorCause::Unreadable`]
    /// has the format).
    pub fn open(source: R, options: ReadOptions) -> Result<Self, ReadError> {
        Self::with_skip(source, options, skip_by_reading::<R>)
    }

    fn with_skip(mut source: R, options: ReadOptions, skip: Skip<R>) -> Result<Self, ReadError> {
        let start = |cause| ReadError::at(Place::Start, options.offset, cause);
        let known = first_bytes(&mut source).map_err(start)?;
        let detected = detect(&known);
        let next = match detected {
            Detected::Xl => Next::XlHeader,
            Detected::Libxl => Next::LibxlHeader,
            Detected::Libxc => Next::LibxcHeaders,
            other => return Err(start(ReadErrorCause::Unreadable(other))),
        };
        Ok(Self {
            options,
            skip,
            detected,
            xl: None,
            libxl: None,
            guest: None,
            kept: 0,
            held: Held::Source(source, options.offset, known),
            next,
        })
    }

    /// The file's format: [`Detected::Xl`], [`Detected::Libxl`] or [`Detected::Libxc`].
    pub fn detected(&self) -> Detected {
        self.detected
    }

    /// The xl header, after its step.
    pub fn xl(&self) -> Option<&XlHeader> {
        self.xl.as_ref()
    }

    /// The libxl header, after its step.
    pub fn libxl(&self) -> Option<LibxlHeader> {
        self.libxl.as_ref().map(LibxlState::header)
    }

    /// The guest as described by the libxc records so far, available from the step of the libxc
    /// headers on. Excludes records read after [`Walk::into_libxc`].
    pub fn guest(&self) -> Option<&GuestImage> {
        self.guest.as_ref()
    }

    /// Like [`Walk::guest`], for callers that keep it.
    pub fn take_guest(&mut self) -> Option<GuestImage> {
        self.guest.take()
    }

    /// The libxc layer, from the step of its headers to that of its END: for its headers and
    /// [`RecordReader::static_data_over`].
    pub fn libxc(&self) -> Option<&RecordReader<R>> {
        match &self.held {
            Held::Libxc(reader) => Some(reader),
            Held::Source(..) | Held::Lost => None,
        }
    }

    /// Bytes of the file consumed so far.
    pub fn offset(&self) -> u64 {
        match &self.held {
            Held::Source(_, offset, _) => *offset,
            Held::Libxc(reader) => reader.offset(),
            Held::Lost => self.options.offset,
        }
    }

    fn options_at(&self, offset: u64) -> ReadOptions {
        ReadOptions {
            offset,
            ..self.options
        }
    }

    /// The next step, or `None` after the last.
    ///
    /// # Errors
    ///
    /// The source failed, the file is truncated, or a rule is broken (including those of
    /// [`GuestImage::apply`]); the error contains the position. After an error the walk cannot
    /// continue.
    pub fn next_step(&mut self) -> Result<Option<Step<'_, R>>, ReadError> {
        // Overwritten on success.
        match mem::replace(&mut self.next, Next::Failed) {
            Next::XlHeader => self.xl_header().map(Some),
            Next::NotVersion2 => self.not_version_2().map(Some),
            Next::LibxlHeader => self.libxl_header().map(Some),
            Next::LibxlRecord => self.libxl_record().map(Some),
            Next::LibxcHeaders => self.libxc_headers().map(Some),
            Next::LibxcRecord => self.libxc_record().map(Some),
            Next::CheckpointRecord => self.checkpoint_record(&[]).map(Some),
            Next::Resumption => self.resumption().map(Some),
            Next::Nothing => {
                self.next = Next::Nothing;
                Ok(None)
            }
            Next::Failed => Err(self.cannot_go_on()),
        }
    }

    fn cannot_go_on(&self) -> ReadError {
        self.out_of_turn("the file failed earlier and cannot be followed")
    }

    /// The error for a request that is not possible in this state; the image is not to blame.
    fn out_of_turn(&self, why: &'static str) -> ReadError {
        let cause = ReadErrorCause::Io(io::Error::other(why));
        ReadError::at(Place::End, self.offset(), cause)
    }

    /// Takes the source from the libxl layer, or from the libxc layer after its END.
    fn take_source(&mut self) -> Result<(R, u64, Vec<u8>), ReadError> {
        match mem::replace(&mut self.held, Held::Lost) {
            Held::Source(source, offset, known) => Ok((source, offset, known)),
            Held::Libxc(reader) => {
                let offset = reader.offset();
                Ok((reader.into_source(), offset, Vec::new()))
            }
            Held::Lost => Err(self.cannot_go_on()),
        }
    }

    fn xl_header(&mut self) -> Result<Step<'_, R>, ReadError> {
        let (mut source, start, known) = self.take_source()?;
        let header = XlHeader::read_behind(&known, &mut source, self.options_at(start))?;
        let offset = start.saturating_add(header.bytes());
        self.held = Held::Source(source, offset, Vec::new());
        self.next = match header.is_stream_v2() {
            true => Next::LibxlHeader,
            false => Next::NotVersion2,
        };
        let length = header.bytes();
        let content = Content::XlHeader(self.xl.insert(header));
        Ok(Step::header(Place::XlHeader, start, length, content))
    }

    /// The file is not a stream of version 2, so it must be a legacy one: detect it.
    fn not_version_2(&mut self) -> Result<Step<'_, R>, ReadError> {
        let (mut source, offset, _) = self.take_source()?;
        let cause = match first_bytes(&mut source) {
            Ok(known) => ReadErrorCause::Unreadable(detect(&known)),
            Err(cause) => cause,
        };
        Err(ReadError::at(Place::Start, offset, cause))
    }

    fn libxl_header(&mut self) -> Result<Step<'_, R>, ReadError> {
        let (mut source, start, known) = self.take_source()?;
        let state = LibxlState::new(&known, &mut source, self.options_at(start))?;
        let header = state.header();
        self.held = Held::Source(source, state.offset, Vec::new());
        self.libxl = Some(state);
        self.next = Next::LibxlRecord;
        let length = LibxlHeader::BYTES as u64;
        let content = Content::LibxlHeader(header);
        Ok(Step::header(Place::LibxlHeader, start, length, content))
    }

    fn libxl_record(&mut self) -> Result<Step<'_, R>, ReadError> {
        let (mut source, offset, known) = self.take_source()?;
        let Some(state) = &mut self.libxl else {
            return Err(self.cannot_go_on());
        };
        state.offset = offset;
        let result = state.next_record(&known, &mut source);
        self.held = Held::Source(source, state.offset, Vec::new());
        let (position, record) = result?;
        let bytes = self.offset().saturating_sub(offset).max(LEAST_KEPT);
        self.kept = self.kept.saturating_add(bytes);
        // A single record may be this long, but a restorer keeps all of them.
        if self.kept > u64::from(MAX_BODY) {
            let cause = LibxlError::RecordsTooLong { max: MAX_BODY }.into();
            return Err(ReadError { position, cause });
        }
        self.next = match record {
            LibxlRecord::LibxcContext => Next::LibxcHeaders,
            LibxlRecord::End => Next::Nothing,
            _ => Next::LibxlRecord,
        };
        Ok(Step::libxl_record(position, record))
    }

    fn libxc_headers(&mut self) -> Result<Step<'_, R>, ReadError> {
        let (source, start, known) = self.take_source()?;
        let options = self.options_at(start);
        let reader = RecordReader::behind(&known, source, options, self.skip)?;
        let content = Content::Headers(reader.image(), reader.domain());
        self.guest = Some(GuestImage::new(reader.domain().guest_type));
        self.held = Held::Libxc(reader);
        self.next = Next::LibxcRecord;
        let length = (ImageHeader::BYTES as u64).saturating_add(DomainHeader::BYTES as u64);
        Ok(Step::header(Place::ImageHeader, start, length, content))
    }

    fn libxc_record(&mut self) -> Result<Step<'_, R>, ReadError> {
        let in_libxl = self.libxl.is_some();
        let gone = self.cannot_go_on();
        let Held::Libxc(reader) = &mut self.held else {
            return Err(gone);
        };
        let Some((position, incoming)) = reader.next_record_at()? else {
            return Err(gone);
        };
        let applied = match (&mut self.guest, &incoming) {
            (Some(guest), Incoming::PageData(body)) => guest.apply_pages(body.entries().iter()),
            (Some(guest), Incoming::Record(record)) => guest.apply(record),
            (None, _) => Ok(()),
        };
        if let Err(e) = applied {
            let cause = e.into();
            return Err(ReadError { position, cause });
        }
        self.next = Next::LibxcRecord;
        let index = match position.place {
            Place::Record { index, .. } => index,
            _ => 0,
        };
        let (length, content) = match incoming {
            Incoming::PageData(body) => (u64::from(body.length()), Content::PageData(body)),
            Incoming::Record(record) => {
                match record.kind {
                    RecordKind::END if in_libxl => self.next = Next::LibxlRecord,
                    RecordKind::END => self.next = Next::Nothing,
                    RecordKind::CHECKPOINT => {
                        if let Some(state) = &mut self.libxl {
                            state.order.begin_checkpoint();
                            self.next = Next::CheckpointRecord;
                        }
                    }
                    _ => {}
                }
                (record.raw.len() as u64, Content::Record(record))
            }
        };
        Ok(Step {
            position,
            index,
            length,
            content,
        })
    }

    /// A libxl record, read from the source of the paused libxc layer.
    fn checkpoint_record(&mut self, known: &[u8]) -> Result<Step<'_, R>, ReadError> {
        let gone = self.cannot_go_on();
        let (Held::Libxc(reader), Some(state)) = (&mut self.held, &mut self.libxl) else {
            return Err(gone);
        };
        let start = reader.offset();
        state.offset = start;
        let result = state.next_record(known, reader.source_mut());
        reader.advance(state.offset.saturating_sub(start));
        let (position, record) = result?;
        self.next = match record {
            LibxlRecord::CheckpointEnd | LibxlRecord::CheckpointState(_) => Next::Resumption,
            _ => Next::CheckpointRecord,
        };
        Ok(Step::libxl_record(position, record))
    }

    /// CHECKPOINT_STATE has the same number as a record that only PV guests have. COLO is for HVM
    /// guests, so it is clear which layer the record belongs to.
    fn resumption(&mut self) -> Result<Step<'_, R>, ReadError> {
        let gone = self.cannot_go_on();
        let (Held::Libxc(reader), Some(state)) = (&mut self.held, &self.libxl) else {
            return Err(gone);
        };
        let order = state.header().order;
        let is_hvm = reader.domain().guest_type == GuestType::X86_HVM;
        let header = reader.take_header_if(|header: &WireRecordHeader| {
            is_hvm && header.kind.get(order) == LibxlRecordKind::CHECKPOINT_STATE.0
        })?;
        match header {
            Some(header) => self.checkpoint_record(header.as_bytes()),
            None => self.libxc_record(),
        }
    }

    /// Checks that nothing follows the last step: for files, which must end there. Reads one more
    /// byte. Call it after [`Walk::next_step`] has returned `None`.
    ///
    /// # Errors
    ///
    /// [`ReadErrorCause::Trailing`] if something follows; the source failed; the last step has not
    /// been reached.
    pub fn expect_end(&mut self) -> Result<(), ReadError> {
        if self.next != Next::Nothing {
            return Err(self.out_of_turn("the last record has not been read yet"));
        }
        let (mut source, offset, _) = self.take_source()?;
        let mut byte = [0];
        let read = read_up_to(&mut source, &mut byte);
        self.held = Held::Source(source, offset, Vec::new());
        let at = |cause| ReadError::at(Place::End, offset, cause);
        match read {
            Ok(0) => Ok(()),
            Ok(_) => Err(at(ReadErrorCause::Trailing)),
            Err(e) => Err(at(ReadErrorCause::Io(e))),
        }
    }

    /// Walks to the libxc stream and returns its reader, for a restorer or another caller that
    /// handles the records and the wrapper separately. Some steps may have been taken before;
    /// nothing of the skipped ones is lost (see [`Around`]).
    ///
    /// # Errors
    ///
    /// Same as [`Walk::next_step`]; the libxc stream has ended or is paused at a checkpoint.
    pub fn into_libxc(mut self) -> Result<(RecordReader<R>, Around<R>), ReadError> {
        let mut before = Vec::new();
        while !matches!(self.held, Held::Libxc(_)) {
            match self.next_step()? {
                Some(Step {
                    content: Content::LibxlRecord(record),
                    ..
                }) => {
                    // Optional records are not kept.
                    if !matches!(record, LibxlRecord::Optional { .. }) {
                        before.push(record);
                    }
                }
                Some(_) => {}
                None => return Err(self.out_of_turn("the libxc stream is over")),
            }
        }
        if self.next != Next::LibxcRecord {
            return Err(self.out_of_turn("the libxc stream is over, or pauses at a checkpoint"));
        }
        match mem::replace(&mut self.held, Held::Lost) {
            Held::Libxc(reader) => Ok((reader, Around { walk: self, before })),
            Held::Source(..) | Held::Lost => Err(self.cannot_go_on()),
        }
    }

    /// Returns the source, positioned after the last record if the last step has been taken; before
    /// the first step, eight bytes in (or at the end). `None` after some errors.
    pub fn into_source(self) -> Option<R> {
        match self.held {
            Held::Source(source, ..) => Some(source),
            Held::Libxc(reader) => Some(reader.into_source()),
            Held::Lost => None,
        }
    }
}

impl<R: Read + Seek> Walk<R> {
    /// Like [`Walk::open`], for a file: page data that is not wanted is skipped without being read.
    ///
    /// # Errors
    ///
    /// Same as [`Walk::open`].
    pub fn open_seeking(source: R, options: ReadOptions) -> Result<Self, ReadError> {
        Self::with_skip(source, options, skip_by_seeking::<R>)
    }
}

/// The wrapper around a libxc stream that the caller has taken over ([`Walk::into_libxc`]).
#[derive(Debug)]
pub struct Around<R> {
    walk: Walk<R>,
    before: Vec<LibxlRecord>,
}

impl<R: Read> Around<R> {
    /// The file's format.
    pub fn detected(&self) -> Detected {
        self.walk.detected
    }

    /// The xl header, if the file has one.
    pub fn xl(&self) -> Option<&XlHeader> {
        self.walk.xl()
    }

    /// The libxl header, if the file has one.
    pub fn libxl(&self) -> Option<LibxlHeader> {
        self.walk.libxl()
    }

    /// The libxl records before the libxc stream that [`Walk::into_libxc`] skipped, including
    /// LIBXC_CONTEXT as the last.
    pub fn before(&self) -> &[LibxlRecord] {
        &self.before
    }

    /// Takes these records out, because they may be long.
    pub fn take_before(&mut self) -> Vec<LibxlRecord> {
        mem::take(&mut self.before)
    }

    /// Reads the libxl records of a checkpoint, up to CHECKPOINT_END. Returns them without
    /// CHECKPOINT_END and optional ones, and the total size of all. The libxc layer has just read a
    /// CHECKPOINT, which ends `offset` bytes into the file; `source` is positioned after it. A bare
    /// libxc stream has none.
    ///
    /// # Errors
    ///
    /// Same as [`Walk::next_step`]; the records to keep have more than [`MAX_BODY`] bytes.
    pub fn checkpoint(
        &mut self,
        source: &mut impl Read,
        offset: u64,
    ) -> Result<(Vec<LibxlRecord>, u64), ReadError> {
        let mut records = Vec::new();
        let mut kept = 0_u64;
        let Some(state) = &mut self.walk.libxl else {
            return Ok((records, 0));
        };
        state.offset = offset;
        state.order.begin_checkpoint();
        loop {
            let begins = state.offset;
            let (position, record) = state.next_record(&[], source)?;
            match record {
                LibxlRecord::CheckpointEnd => break,
                LibxlRecord::Optional { .. } => {}
                record => {
                    // A single record may be this long, but a sender must not repeat them.
                    let bytes = state.offset.saturating_sub(begins).max(LEAST_KEPT);
                    kept = kept.saturating_add(bytes);
                    if kept > u64::from(MAX_BODY) {
                        let cause = LibxlError::CheckpointTooLong { max: MAX_BODY }.into();
                        return Err(ReadError { position, cause });
                    }
                    records.push(record);
                }
            }
        }
        Ok((records, state.offset.saturating_sub(offset)))
    }

    /// Continues after the END of the libxc stream, with the libxl records that follow. `offset`
    /// bytes of the file have been consumed ([`RecordReader::offset`]).
    pub fn resume(self, source: R, offset: u64) -> Walk<R> {
        let mut walk = self.walk;
        walk.next = match walk.libxl {
            Some(_) => Next::LibxlRecord,
            None => Next::Nothing,
        };
        walk.held = Held::Source(source, offset, Vec::new());
        walk
    }
}

/// Reads the first eight bytes, or all there are.
fn first_bytes(source: &mut impl Read) -> Result<Vec<u8>, ReadErrorCause> {
    let mut bytes = [0; TELLING];
    let read = read_up_to(source, &mut bytes).map_err(ReadErrorCause::Io)?;
    Ok(bytes.into_iter().take(read).collect())
}

/// Fills `room` as far as the source goes.
fn read_up_to(source: &mut impl Read, room: &mut [u8]) -> io::Result<usize> {
    let whole = room.len();
    match fill(source, room) {
        Ok(()) => Ok(whole),
        Err(ReadErrorCause::Truncated { needed }) => {
            let missing = usize::try_from(needed).unwrap_or(whole);
            Ok(whole.saturating_sub(missing))
        }
        Err(ReadErrorCause::Io(e)) => Err(e),
        Err(other) => Err(io::Error::other(other.to_string())),
    }
}
