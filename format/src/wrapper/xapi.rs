//! Suspend images of xapi (`XenSavedDomv2-`): records, of which one contains a libxc stream and
//! others the state of emulators.
//!
//! [`XapiSource`] presents an image as a libxl stream, so any reader of those can read it.
//!
//! | record | becomes |
//! |---|---|
//! | Libxc | LIBXC_CONTEXT and the libxc stream, byte for byte |
//! | Libxc_legacy | LIBXC_CONTEXT and the legacy stream, converted to version 3 |
//! | Qemu_trad, Qemu_xen | EMULATOR_CONTEXT |
//! | End_of_image | END |
//! | others (Xenops, Demu, Varstored, …) | nothing, but they are counted |
//!
//! XenServer before 6.5 had an older format (`XenSavedDomain`): a bare legacy stream, and for an
//! HVM guest the device model's state after it.
//!
//! A specification does not exist. Implementation: `ocaml/xenopsd/lib/suspend_image.ml` of xen-api;
//! numbers are little endian. The older format: `suspend` in `ocaml/xenops/domain.ml` as of
//! XenServer 6.2; its only number is big endian.

use std::fmt;
use std::io::{self, Read, Write};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::libxl::{LibxlHeader, LibxlRecordKind, MAX_BODY};
use crate::byte_order::ByteOrder;
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::image::{DomainHeader, ImageHeader, WireImageHeader};
use crate::legacy::convert::Summary;
use crate::legacy::{Checkpoints, Converted, LegacyGuest, LegacyOptions, LegacyReader, Target};
use crate::record::{RecordKind, WireRecordHeader, padding, zeros};
use crate::source::{fill, fill_behind, fill_growing, skip_by_reading};
use crate::wire::{U32, U64};

mod kind;

pub use kind::{XapiError, XapiKind, XapiRecord};

/// The magic at the start of such a file.
pub const MAGIC: [u8; 15] = *b"XenSavedDomv2-\n";

/// The magic of an image from XenServer before 6.5. A legacy stream follows, and for an HVM guest
/// [`LEGACY_QEMU_MAGIC`], a big-endian length, and the device model's state.
pub const LEGACY_MAGIC: [u8; 15] = *b"XenSavedDomain\n";

/// The magic before the device model's state in an image from XenServer before 6.5.
pub const LEGACY_QEMU_MAGIC: [u8; 22] = *b"QemuDeviceModelRecord\n";

/// Maximum size of a Xenops record that is kept for display.
const MAX_DESCRIPTION: u64 = 1 << 20;

/// Maximum size of a record, except the libxc stream.
const MAX_RECORD: u64 = MAX_BODY as u64 - 8;

/// The most bytes of a device model's state that xenopsd reads.
pub const MAX_QEMU_STATE: u64 = 1 << 20;

/// The most records of an image, of which each is listed. xenopsd writes fewer than ten.
const MAX_RECORDS: usize = 1024;

/// A record's header.
///
/// | bytes | field |
/// |---|---|
/// | 0–7 | type |
/// | 8–15 | length of the body; meaningless for a libxc stream |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireXapiHeader {
    kind: U64,
    length: U64,
}

/// The header of a record. A body of `length` bytes follows, without padding; after
/// [`XapiKind::LIBXC`] a libxc stream, whose length is 0 here.
pub fn record_header(kind: XapiKind, length: u64) -> [u8; 16] {
    zerocopy::transmute!(WireXapiHeader {
        kind: U64::new(kind.0, ByteOrder::Little),
        length: U64::new(length, ByteOrder::Little),
    })
}

/// Where the bodies of records go that have no place in a libxl stream.
struct Aside(Option<Box<dyn Write + Send>>);

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Aside" } else { "nowhere" })
    }
}

/// An image of xapi, presented as a libxl stream.
///
/// ```
/// use std::io::Read as _;
/// use xsr_format::detect::{Detected, detect};
/// use xsr_format::wrapper::xapi::{MAGIC, XapiKind, XapiSource};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let libxc = doc::image();
/// let record = |kind: XapiKind, length: usize| [kind.0.to_le_bytes(), (length as u64).to_le_bytes()];
/// let mut image = MAGIC.to_vec();
/// image.extend(record(XapiKind::LIBXC, 0).concat());
/// image.extend(&libxc);
/// image.extend(record(XapiKind::END_OF_IMAGE, 0).concat());
/// assert_eq!(detect(&image), Detected::Xapi);
///
/// let mut source = XapiSource::behind(&[], &image[..])?;
/// let mut libxl = Vec::new();
/// source.read_to_end(&mut libxl)?;
/// assert_eq!(detect(&libxl), Detected::Libxl);
/// let kinds: Vec<XapiKind> = source.records().iter().map(|record| record.kind).collect();
/// assert_eq!(kinds, [XapiKind::LIBXC, XapiKind::END_OF_IMAGE]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct XapiSource<R> {
    source: Inner<R>,
    lenient: bool,
    offset: u64,
    ready: Vec<u8>,
    at: usize,
    /// Number of bytes that are passed on unchanged.
    through: u64,
    /// The padding that follows them.
    pad: &'static [u8],
    /// The structure of the inner stream that they belong to, and its index.
    inner: Position,
    inner_index: u64,
    stage: Stage,
    records: Vec<XapiRecord>,
    libxc_seen: bool,
    legacy: Option<Summary>,
    /// The first record, if it is Xenops.
    description: Option<Vec<u8>>,
    /// Whether the image is from XenServer before 6.5.
    old: bool,
    aside: Aside,
}

/// Where bytes come from.
#[derive(Debug)]
enum Inner<R> {
    Plain(R),
    /// A converter, up to the end of the legacy stream.
    Legacy(Box<Converted<R>>),
    /// The legacy stream could not be started.
    Lost,
}

impl<R: Read> Read for Inner<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(room),
            Self::Legacy(converted) => converted.read(room),
            Self::Lost => Err(io::Error::other("the source was lost with a legacy stream")),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Records,
    LegacyStart,
    Legacy,
    /// After the legacy stream of an HVM guest, before XenServer 6.5.
    LegacyQemu,
    /// After the device model's state, before XenServer 6.5.
    OldEnd,
    LibxcHeaders,
    Libxc(ByteOrder),
    Done,
    Failed,
}

impl<R: Read> XapiSource<R> {
    /// Reads the start of an image, whose first bytes (`known`, at most 15) have already been read.
    ///
    /// # Errors
    ///
    /// The source failed or ended; the first bytes are not xapi's.
    pub fn behind(known: &[u8], mut source: R) -> Result<Self, ReadError> {
        let mut magic = [0; MAGIC.len()];
        fill_behind(known, &mut source, &mut magic)
            .and_then(|()| match magic {
                MAGIC | LEGACY_MAGIC => Ok(()),
                got => Err(XapiError::Magic { got }.into()),
            })
            .map_err(|cause| ReadError::at(Place::XapiRecord { kind: None }, 0, cause))?;
        let header = LibxlHeader {
            order: ByteOrder::Little,
            legacy_converted: false,
        };
        let mut image = Self {
            source: Inner::Plain(source),
            lenient: false,
            offset: MAGIC.len() as u64,
            ready: header.encode().as_bytes().to_vec(),
            at: 0,
            through: 0,
            pad: &[],
            inner: Position {
                place: Place::DomainHeader,
                offset: 0,
            },
            inner_index: 0,
            stage: Stage::Records,
            records: Vec::new(),
            libxc_seen: false,
            legacy: None,
            description: None,
            old: magic == LEGACY_MAGIC,
            aside: Aside(None),
        };
        if image.old {
            image.libxl_header(LibxlRecordKind::LIBXC_CONTEXT, 0);
            image.libxc_seen = true;
            image.stage = Stage::LegacyStart;
        }
        Ok(image)
    }

    /// Reads the first record, which describes the domain: xenopsd's state, an s-expression. `None`
    /// if the first record is another.
    ///
    /// # Errors
    ///
    /// The source failed or ended, or a rule is broken.
    pub fn description(&mut self) -> Result<Option<&[u8]>, ReadError> {
        if self.records.is_empty() && self.stage == Stage::Records {
            self.go_on()?;
        }
        Ok(self.description.as_deref())
    }

    /// Tolerates non-zero reserved fields in a legacy stream. (Other streams are passed on
    /// unchanged, and their reader decides.)
    #[must_use]
    pub fn lenient(self, lenient: bool) -> Self {
        Self { lenient, ..self }
    }

    /// Copies the bodies of records that have no place in a libxl stream
    /// ([`XapiKind::is_device_state`]) to `aside`, one after the other. [`records`](Self::records)
    /// has their lengths. There is one of each type at most, of at most 128 MiB.
    #[must_use]
    pub fn copying_aside(self, aside: Box<dyn Write + Send>) -> Self {
        Self {
            aside: Aside(Some(aside)),
            ..self
        }
    }

    /// The records read so far.
    pub fn records(&self) -> &[XapiRecord] {
        &self.records
    }

    /// The summary of converting a legacy stream, after its end; `None` before, and for an image
    /// without one.
    pub fn legacy(&self) -> Option<&Summary> {
        self.legacy.as_ref()
    }

    fn go_on(&mut self) -> Result<bool, ReadError> {
        // The header being read does not belong to a record yet.
        let known = match self.stage {
            Stage::Records => self.records.len(),
            _ => self.records.len().saturating_sub(1),
        };
        let (offset, stage) = (self.offset, self.stage);
        let result = match stage {
            Stage::Records => self.record(),
            Stage::LibxcHeaders => self.libxc_headers(),
            Stage::Libxc(order) => self.libxc_record(order),
            Stage::LegacyStart => return self.legacy_start().map(|()| true),
            // The caller reads it with the other bytes that are passed on.
            Stage::Legacy => Ok(()),
            Stage::LegacyQemu => self.legacy_qemu(),
            Stage::OldEnd => {
                self.old_end();
                Ok(())
            }
            Stage::Done => return Ok(false),
            Stage::Failed => Err(ReadErrorCause::Io(io::Error::other(
                "the image failed earlier and cannot be followed",
            ))),
        };
        match result {
            Ok(()) => Ok(true),
            Err(cause) => {
                self.stage = Stage::Failed;
                self.ready.clear();
                self.at = 0;
                let kind = self.records.get(known).map(|record| record.kind);
                let place = match stage {
                    Stage::LibxcHeaders => Place::ImageHeader,
                    Stage::Libxc(_) => Place::Record {
                        index: self.inner_index,
                        kind: None,
                    },
                    _ => Place::XapiRecord { kind },
                };
                Err(ReadError::at(place, offset, cause))
            }
        }
    }

    fn fill(&mut self, room: &mut [u8]) -> Result<(), ReadErrorCause> {
        fill(&mut self.source, room)?;
        self.offset = self.offset.saturating_add(room.len() as u64);
        Ok(())
    }

    fn libxl_header(&mut self, kind: LibxlRecordKind, length: u32) {
        for word in [kind.0, length] {
            let word = U32::new(word, ByteOrder::Little);
            self.ready.extend_from_slice(word.as_bytes());
        }
    }

    fn record(&mut self) -> Result<(), ReadErrorCause> {
        const LE: ByteOrder = ByteOrder::Little;
        let offset = self.offset;
        let mut wire = WireXapiHeader::new_zeroed();
        self.fill(wire.as_mut_bytes())?;
        let kind = XapiKind(wire.kind.get(LE));
        let length = wire.length.get(LE);
        if self.records.len() >= MAX_RECORDS {
            return Err(XapiError::TooMany { max: MAX_RECORDS }.into());
        }
        // A caller that keeps these bodies has room for one of each type.
        let repeated = self.records.iter().any(|record| record.kind == kind);
        self.records.push(XapiRecord {
            kind,
            offset,
            length,
        });
        match kind {
            XapiKind::LIBXC | XapiKind::LIBXC_LEGACY if self.libxc_seen => {
                return Err(XapiError::Repeated { kind }.into());
            }
            XapiKind::LIBXC => {
                self.libxc_seen = true;
                self.libxl_header(LibxlRecordKind::LIBXC_CONTEXT, 0);
                self.stage = Stage::LibxcHeaders;
            }
            XapiKind::LIBXC_LEGACY => {
                self.libxc_seen = true;
                self.libxl_header(LibxlRecordKind::LIBXC_CONTEXT, 0);
                self.stage = Stage::LegacyStart;
            }
            XapiKind::END_OF_IMAGE if !self.libxc_seen => {
                return Err(XapiError::Incomplete.into());
            }
            XapiKind::END_OF_IMAGE => {
                self.libxl_header(LibxlRecordKind::END, 0);
                self.stage = Stage::Done;
            }
            kind if kind.is_device_state() && repeated => {
                return Err(XapiError::RepeatedState { kind }.into());
            }
            kind if kind.name().is_none() => return Err(XapiError::Unknown { kind }.into()),
            kind => self.blob(kind, length)?,
        }
        Ok(())
    }

    /// Reads a record other than a stream.
    fn blob(&mut self, kind: XapiKind, length: u64) -> Result<(), ReadErrorCause> {
        let bytes = checked_length(kind, length)?;
        match kind {
            XapiKind::QEMU_TRAD => self.emulator(1, kind, bytes),
            XapiKind::QEMU_XEN => self.emulator(2, kind, bytes),
            XapiKind::XENOPS if self.records.len() == 1 && length <= MAX_DESCRIPTION => {
                let mut body = Vec::new();
                fill_growing(&mut self.source, &mut body, length)?;
                self.offset = self.offset.saturating_add(length);
                self.description = Some(body);
            }
            kind => {
                let skipped = match &mut self.aside.0 {
                    Some(aside) if kind.is_device_state() => {
                        io::copy(&mut (&mut self.source).take(length), aside)
                    }
                    _ => skip_by_reading(&mut self.source, length, &mut Vec::new()),
                };
                let skipped = skipped.map_err(ReadErrorCause::Io)?;
                self.offset = self.offset.saturating_add(skipped);
                let needed = length.saturating_sub(skipped);
                if needed > 0 {
                    return Err(ReadErrorCause::Truncated { needed });
                }
            }
        }
        Ok(())
    }

    /// Begins an EMULATOR_CONTEXT with the state of `bytes` bytes that follows ([`MAX_RECORD`] at
    /// most). It may be long, so it is passed through.
    fn emulator(&mut self, emulator: u32, kind: XapiKind, bytes: u32) {
        self.libxl_header(LibxlRecordKind::EMULATOR_CONTEXT, bytes.saturating_add(8));
        for word in [emulator, 0] {
            let word = U32::new(word, ByteOrder::Little);
            self.ready.extend_from_slice(word.as_bytes());
        }
        self.through = u64::from(bytes);
        self.pad = zeros(u64::from(bytes));
        self.inner = Position {
            place: Place::XapiRecord { kind: Some(kind) },
            offset: self.records.last().map_or(self.offset, |r| r.offset),
        };
    }

    /// Reads the device model's state, as XenServer before 6.5 wrote it, and the end.
    fn legacy_qemu(&mut self) -> Result<(), ReadErrorCause> {
        let mut magic = [0; LEGACY_QEMU_MAGIC.len()];
        self.fill(&mut magic)?;
        if magic != LEGACY_QEMU_MAGIC {
            return Err(XapiError::LegacyQemu { got: magic }.into());
        }
        let mut length = [0; 4];
        self.fill(&mut length)?;
        let length = u64::from(u32::from_be_bytes(length));
        let kind = XapiKind::QEMU_TRAD;
        let bytes = checked_length(kind, length)?;
        self.emulator(1, kind, bytes);
        self.stage = Stage::OldEnd;
        Ok(())
    }

    fn old_end(&mut self) {
        self.libxl_header(LibxlRecordKind::END, 0);
        self.stage = Stage::Done;
    }

    /// Puts the converter in front of the source. The emulator's state is in a record of its own.
    fn legacy_start(&mut self) -> Result<(), ReadError> {
        self.stage = Stage::Failed;
        let Inner::Plain(source) = std::mem::replace(&mut self.source, Inner::Lost) else {
            return Ok(());
        };
        let options = LegacyOptions {
            lenient: self.lenient,
            offset: self.offset,
            device_model: false,
            checkpoints: Checkpoints::UpTo(1),
            ..LegacyOptions::default()
        };
        let reader = LegacyReader::new(source, options)?;
        let target = Target::Libxc {
            device_model: false,
        };
        self.source = Inner::Legacy(Box::new(Converted::new(reader, target, None)?));
        self.stage = Stage::Legacy;
        Ok(())
    }

    /// Ends the legacy stream: the source continues with records.
    fn legacy_end(&mut self) {
        let mut is_hvm = false;
        match std::mem::replace(&mut self.source, Inner::Lost) {
            Inner::Legacy(converted) => {
                is_hvm = converted.reader().guest() == LegacyGuest::Hvm;
                self.offset = converted.reader().offset();
                self.legacy = Some(converted.summary().clone());
                self.source = Inner::Plain(converted.into_source());
            }
            other => self.source = other,
        }
        match (self.old, is_hvm) {
            (false, _) => self.stage = Stage::Records,
            (true, true) => self.stage = Stage::LegacyQemu,
            (true, false) => self.old_end(),
        }
    }

    fn libxc_headers(&mut self) -> Result<(), ReadErrorCause> {
        let mut image = WireImageHeader::new_zeroed();
        self.fill(image.as_mut_bytes())?;
        self.ready.extend_from_slice(image.as_bytes());
        // Lenient: the stream's reader decides.
        let order = ImageHeader::decode(&image, true)?.order;
        self.through = DomainHeader::BYTES as u64;
        self.inner = Position {
            place: Place::DomainHeader,
            offset: self.offset,
        };
        self.stage = Stage::Libxc(order);
        Ok(())
    }

    fn libxc_record(&mut self, order: ByteOrder) -> Result<(), ReadErrorCause> {
        let offset = self.offset;
        let mut wire = WireRecordHeader::new_zeroed();
        self.fill(wire.as_mut_bytes())?;
        let place = Place::Record {
            index: self.inner_index,
            kind: Some(RecordKind(wire.kind.get(order))),
        };
        self.inner = Position { place, offset };
        self.inner_index = self.inner_index.saturating_add(1);
        self.ready.extend_from_slice(wire.as_bytes());
        let length = u64::from(wire.length.get(order));
        self.through = length.saturating_add(padding(length));
        if wire.kind.get(order) == RecordKind::END.0 {
            self.stage = Stage::Records;
        }
        Ok(())
    }
}

/// The length of a record that is read into memory.
fn checked_length(kind: XapiKind, length: u64) -> Result<u32, XapiError> {
    match u32::try_from(length) {
        Ok(bytes) if length <= MAX_RECORD => Ok(bytes),
        _ => Err(XapiError::TooLong { kind, got: length }),
    }
}

impl<R: Read> Read for XapiSource<R> {
    /// An error of the image is returned as an [`io::Error`] that holds its [`ReadError`].
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        loop {
            let ready = self.ready.get(self.at..).unwrap_or_default();
            if !ready.is_empty() {
                let n = ready.len().min(room.len());
                for (to, from) in room.iter_mut().zip(ready) {
                    *to = *from;
                }
                self.at = self.at.saturating_add(n);
                return Ok(n);
            }
            self.ready.clear();
            self.at = 0;
            if self.stage == Stage::Legacy {
                match self.source.read(room) {
                    Ok(0) => self.legacy_end(),
                    Err(e) if e.kind() != io::ErrorKind::Interrupted => {
                        self.stage = Stage::Failed;
                        return Err(e);
                    }
                    other => return other,
                }
                continue;
            }
            if self.through > 0 {
                let most = usize::try_from(self.through).unwrap_or(usize::MAX);
                let (room, _) = room.split_at_mut(room.len().min(most));
                let n = self.source.read(room)?;
                if n == 0 {
                    self.stage = Stage::Failed;
                    self.pad = &[];
                    let needed = std::mem::take(&mut self.through);
                    let cause = ReadErrorCause::Truncated { needed };
                    let position = self.inner;
                    return Err(io::Error::other(ReadError { position, cause }));
                }
                self.through = self.through.saturating_sub(n as u64);
                self.offset = self.offset.saturating_add(n as u64);
                return Ok(n);
            }
            let pad = std::mem::take(&mut self.pad);
            if !pad.is_empty() {
                self.ready.extend_from_slice(pad);
                continue;
            }
            if !self.go_on().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
    }
}
