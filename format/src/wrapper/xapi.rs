//! The suspend images of xapi (`XenSavedDomv2-`): records, of which one holds a libxc stream
//! and others what the emulators keep.
//!
//! [`XapiSource`] reads one as a libxl stream: whoever reads those reads these through it.
//!
//! | record | becomes |
//! |---|---|
//! | Libxc | LIBXC_CONTEXT and the libxc stream, octet for octet |
//! | Libxc_legacy | LIBXC_CONTEXT and the legacy stream as one of version 3 |
//! | Qemu_trad, Qemu_xen | EMULATOR_CONTEXT |
//! | End_of_image | END |
//! | others (Xenops, Demu, Varstored, …) | nothing; they are counted |
//!
//! XenServer before 6.5 had an older form (`XenSavedDomain`): a legacy stream without records
//! around it, and of an HVM guest the device model's state behind it.
//!
//! There is no specification. Implementation: `ocaml/xenopsd/lib/suspend_image.ml` of
//! xen-api; numbers are little endian. The older form: `suspend` in `ocaml/xenops/domain.ml`
//! as of XenServer 6.2; its one number is big endian.

use std::io::{self, Read};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::libxl::{LibxlHeader, LibxlRecordKind, MAX_BODY};
use crate::byte_order::ByteOrder;
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::image::{DomainHeader, ImageHeader, WireImageHeader};
use crate::legacy::convert::Summary;
use crate::legacy::{Checkpoints, Converted, LegacyGuest, LegacyOptions, LegacyReader, Target};
use crate::record::{RecordKind, WireRecordHeader, padding, zeros};
use crate::source::{fill, fill_behind, fill_growing};
use crate::wire::{U32, U64};

mod kind;

pub use kind::{XapiError, XapiKind, XapiRecord};

/// The first bytes of such a file.
pub const MAGIC: [u8; 15] = *b"XenSavedDomv2-\n";

/// The first bytes of an image of XenServer before 6.5: a legacy stream follows, of an HVM
/// guest then [`LEGACY_QEMU_MAGIC`], a big-endian length, and the device model's state.
pub const LEGACY_MAGIC: [u8; 15] = *b"XenSavedDomain\n";

/// What stands before the device model's state in an image of XenServer before 6.5.
pub const LEGACY_QEMU_MAGIC: [u8; 22] = *b"QemuDeviceModelRecord\n";

/// The longest Xenops record that is kept to be shown.
const MAX_DESCRIPTION: u64 = 1 << 20;

/// The longest record that is read, other than the libxc stream.
const MAX_RECORD: u64 = MAX_BODY as u64 - 8;

/// A record's header.
///
/// | octets | field |
/// |---|---|
/// | 0–7 | type |
/// | 8–15 | length of the body; of no meaning for a libxc stream |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireXapiHeader {
    kind: U64,
    length: U64,
}

/// An image of xapi, read as a libxl stream.
#[derive(Debug)]
pub struct XapiSource<R> {
    source: Inner<R>,
    lenient: bool,
    offset: u64,
    ready: Vec<u8>,
    at: usize,
    /// Bytes that go through.
    through: u64,
    /// The structure of the inner stream that they belong to, and its number.
    inner: Position,
    inner_index: u64,
    stage: Stage,
    records: Vec<XapiRecord>,
    libxc_seen: bool,
    legacy: Option<Summary>,
    /// The first record, if it is Xenops.
    description: Option<Vec<u8>>,
    /// Whether it is an image of XenServer before 6.5.
    old: bool,
}

/// Where bytes come from.
#[derive(Debug)]
enum Inner<R> {
    Plain(R),
    /// Through a converter, up to the end of the legacy stream.
    Legacy(Box<Converted<R>>),
    /// A legacy stream could not be begun.
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
    /// Behind the legacy stream of an HVM guest, before XenServer 6.5.
    LegacyQemu,
    LibxcHeaders,
    Libxc(ByteOrder),
    Done,
    Failed,
}

impl<R: Read> XapiSource<R> {
    /// Read the start of an image, whose first bytes, `known`, at most 15, have been read
    /// already.
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
        };
        if image.old {
            image.libxl_header(LibxlRecordKind::LIBXC_CONTEXT, 0);
            image.libxc_seen = true;
            image.stage = Stage::LegacyStart;
        }
        Ok(image)
    }

    /// Read the first record, which says what domain it is: what xenopsd keeps of it, an
    /// s-expression. `None` where the first record is another.
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

    /// Tolerate reserved fields that are not zero in a legacy stream. (Other streams go
    /// through as they are: whoever reads them judges them.)
    #[must_use]
    pub fn lenient(self, lenient: bool) -> Self {
        Self { lenient, ..self }
    }

    /// The records so far.
    pub fn records(&self) -> &[XapiRecord] {
        &self.records
    }

    /// What was converted of a legacy stream, once that is over; `None` before, and of an
    /// image without one.
    pub fn legacy(&self) -> Option<&Summary> {
        self.legacy.as_ref()
    }

    fn go_on(&mut self) -> Result<bool, ReadError> {
        // A header that is cut off belongs to no record yet.
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
            // It is read where all that goes through is.
            Stage::Legacy => Ok(()),
            Stage::LegacyQemu => self.legacy_qemu(),
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
            kind if kind.name().is_none() => return Err(XapiError::Unknown { kind }.into()),
            kind => self.blob(kind, length)?,
        }
        Ok(())
    }

    /// A record other than a stream.
    fn blob(&mut self, kind: XapiKind, length: u64) -> Result<(), ReadErrorCause> {
        let bytes = checked_length(kind, length)?;
        let mut body = Vec::new();
        fill_growing(&mut self.source, &mut body, length)?;
        self.offset = self.offset.saturating_add(length);
        let emulator = match kind {
            XapiKind::QEMU_TRAD => 1,
            XapiKind::QEMU_XEN => 2,
            XapiKind::XENOPS if self.records.len() == 1 && length <= MAX_DESCRIPTION => {
                self.description = Some(body);
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.emulator(emulator, bytes, body);
        Ok(())
    }

    /// An EMULATOR_CONTEXT with this state, of so many bytes ([`MAX_RECORD`] at most).
    fn emulator(&mut self, emulator: u32, bytes: u32, mut body: Vec<u8>) {
        self.libxl_header(LibxlRecordKind::EMULATOR_CONTEXT, bytes.saturating_add(8));
        for word in [emulator, 0] {
            let word = U32::new(word, ByteOrder::Little);
            self.ready.extend_from_slice(word.as_bytes());
        }
        self.ready.append(&mut body);
        self.ready.extend_from_slice(zeros(u64::from(bytes)));
    }

    /// The device model's state, as XenServer before 6.5 wrote it, and the end.
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
        let mut body = Vec::new();
        fill_growing(&mut self.source, &mut body, length)?;
        self.offset = self.offset.saturating_add(length);
        self.emulator(1, bytes, body);
        self.old_end();
        Ok(())
    }

    fn old_end(&mut self) {
        self.libxl_header(LibxlRecordKind::END, 0);
        self.stage = Stage::Done;
    }

    /// Put the converter before the source. The emulator's state is in a record of its own.
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

    /// The legacy stream is over: the source goes on with records.
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
        // Lenient: whoever reads the stream judges it.
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

/// The length of a record that is taken into memory.
fn checked_length(kind: XapiKind, length: u64) -> Result<u32, XapiError> {
    match u32::try_from(length) {
        Ok(bytes) if length <= MAX_RECORD => Ok(bytes),
        _ => Err(XapiError::TooLong { kind, got: length }),
    }
}

impl<R: Read> Read for XapiSource<R> {
    /// An error of the image comes as an [`io::Error`] that holds its [`ReadError`].
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
                    let needed = std::mem::take(&mut self.through);
                    let cause = ReadErrorCause::Truncated { needed };
                    let position = self.inner;
                    return Err(io::Error::other(ReadError { position, cause }));
                }
                self.through = self.through.saturating_sub(n as u64);
                self.offset = self.offset.saturating_add(n as u64);
                return Ok(n);
            }
            if !self.go_on().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
    }
}
