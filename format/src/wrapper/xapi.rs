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
//! There is no specification. Implementation: `ocaml/xenopsd/lib/suspend_image.ml` of
//! xen-api; numbers are little endian.

use std::fmt;
use std::io::{self, Read};

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::libxl::{LibxlHeader, LibxlRecordKind, MAX_BODY};
use crate::byte_order::ByteOrder;
use crate::error::{Place, ReadError, ReadErrorCause};
use crate::image::{DomainHeader, ImageHeader, WireImageHeader};
use crate::legacy::convert::Summary;
use crate::legacy::{Checkpoints, Converted, LegacyOptions, LegacyReader, Target};
use crate::record::{RecordKind, WireRecordHeader, padding};
use crate::source::{fill, fill_behind, fill_growing};
use crate::wire::{U32, U64};

/// The first octets of such a file.
pub const MAGIC: [u8; 15] = *b"XenSavedDomv2-\n";

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

/// The type of a record.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct XapiKind(pub u64);

impl XapiKind {
    /// What xenopsd keeps: time, word size, the VM.
    pub const XENOPS: Self = Self(0x000f);
    /// A libxc stream.
    pub const LIBXC: Self = Self(0x00f0);
    /// A legacy libxc stream.
    pub const LIBXC_LEGACY: Self = Self(0x00f2);
    /// State of qemu traditional.
    pub const QEMU_TRAD: Self = Self(0x0f00);
    /// State of qemu.
    pub const QEMU_XEN: Self = Self(0x0f01);
    /// The end.
    pub const END_OF_IMAGE: Self = Self(0xffff);

    /// The name, as xenopsd has it; `None` for what it does not define.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0x000f => "Xenops",
            0x00f0 => "Libxc",
            0x00f1 => "Libxl",
            0x00f2 => "Libxc_legacy",
            0x0f00 => "Qemu_trad",
            0x0f01 => "Qemu_xen",
            0x0f10 => "Demu",
            0x0f11 => "Varstored",
            0x0f12 => "Swtpm0",
            0x0f13 => "Swtpm",
            0xffff => "End_of_image",
            _ => return None,
        })
    }
}

impl fmt::Display for XapiKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "unknown type {:#x}", self.0),
        }
    }
}

impl fmt::Debug for XapiKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XapiKind({:#x}, {self})", self.0)
    }
}

/// A rule of xapi's images that some octets break.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum XapiError {
    /// The first octets are not xapi's.
    #[error("magic is {:?}, expected {:?}", got.escape_ascii().to_string(), MAGIC.escape_ascii().to_string())]
    Magic {
        /// What came.
        got: [u8; 15],
    },
    /// A record of no known type.
    #[error("record has {kind}; a newer xapi made this image, or it is damaged")]
    Unknown {
        /// Its type.
        kind: XapiKind,
    },
    /// A body that is longer than any is.
    #[error("{kind} has {got} octets, expected at most {MAX_RECORD}")]
    TooLong {
        /// Of what.
        kind: XapiKind,
        /// What came.
        got: u64,
    },
    /// A second libxc stream.
    #[error("{kind} although a libxc stream came before")]
    Repeated {
        /// The record.
        kind: XapiKind,
    },
    /// No libxc stream.
    #[error("End_of_image although no libxc stream has come: there is no guest in this image")]
    Incomplete,
}

/// A record that was read, or that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XapiRecord {
    /// Its type.
    pub kind: XapiKind,
    /// Where it begins.
    pub offset: u64,
    /// Length of the body, as its header says.
    pub length: u64,
}

/// An image of xapi, read as a libxl stream.
#[derive(Debug)]
pub struct XapiSource<R> {
    source: Inner<R>,
    lenient: bool,
    offset: u64,
    ready: Vec<u8>,
    at: usize,
    /// Octets that go through.
    through: u64,
    stage: Stage,
    records: Vec<XapiRecord>,
    libxc_seen: bool,
    legacy: Option<Summary>,
}

/// Where octets come from.
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
    LibxcHeaders,
    Libxc(ByteOrder),
    Done,
    Failed,
}

impl<R: Read> XapiSource<R> {
    /// Read the start of an image, whose first octets, `known`, at most 15, have been read
    /// already.
    ///
    /// # Errors
    ///
    /// The source failed or ended; the first octets are not xapi's.
    pub fn behind(known: &[u8], mut source: R) -> Result<Self, ReadError> {
        let mut magic = [0; MAGIC.len()];
        fill_behind(known, &mut source, &mut magic)
            .and_then(|()| match magic {
                MAGIC => Ok(()),
                got => Err(XapiError::Magic { got }.into()),
            })
            .map_err(|cause| ReadError::at(Place::XapiRecord { kind: None }, 0, cause))?;
        let header = LibxlHeader {
            order: ByteOrder::Little,
            legacy_converted: false,
        };
        Ok(Self {
            source: Inner::Plain(source),
            lenient: false,
            offset: MAGIC.len() as u64,
            ready: header.encode().as_bytes().to_vec(),
            at: 0,
            through: 0,
            stage: Stage::Records,
            records: Vec::new(),
            libxc_seen: false,
            legacy: None,
        })
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
        let offset = self.offset;
        let result = match self.stage {
            Stage::Records => self.record(),
            Stage::LibxcHeaders => self.libxc_headers(),
            Stage::Libxc(order) => self.libxc_record(order),
            Stage::LegacyStart => return self.legacy_start().map(|()| true),
            // It is read where all that goes through is.
            Stage::Legacy => Ok(()),
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
                Err(ReadError::at(Place::XapiRecord { kind }, offset, cause))
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
        if length > MAX_RECORD {
            return Err(XapiError::TooLong { kind, got: length }.into());
        }
        let mut body = Vec::new();
        fill_growing(&mut self.source, &mut body, length)?;
        self.offset = self.offset.saturating_add(length);
        let emulator = match kind {
            XapiKind::QEMU_TRAD => 1,
            XapiKind::QEMU_XEN => 2,
            _ => return Ok(()),
        };
        // Limited to far below u32::MAX.
        let octets = u32::try_from(length).unwrap_or(u32::MAX).saturating_add(8);
        self.libxl_header(LibxlRecordKind::EMULATOR_CONTEXT, octets);
        for word in [emulator, 0] {
            let word = U32::new(word, ByteOrder::Little);
            self.ready.extend_from_slice(word.as_bytes());
        }
        self.ready.append(&mut body);
        let pad = usize::try_from(padding(length)).unwrap_or(0);
        self.ready.resize(self.ready.len().saturating_add(pad), 0);
        Ok(())
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
        match std::mem::replace(&mut self.source, Inner::Lost) {
            Inner::Legacy(converted) => {
                self.offset = converted.reader().offset();
                self.legacy = Some(converted.summary().clone());
                self.source = Inner::Plain(converted.into_source());
            }
            other => self.source = other,
        }
        self.stage = Stage::Records;
    }

    fn libxc_headers(&mut self) -> Result<(), ReadErrorCause> {
        let mut image = WireImageHeader::new_zeroed();
        self.fill(image.as_mut_bytes())?;
        self.ready.extend_from_slice(image.as_bytes());
        // Lenient: whoever reads the stream judges it.
        let order = ImageHeader::decode(&image, true)?.order;
        self.through = DomainHeader::OCTETS as u64;
        self.stage = Stage::Libxc(order);
        Ok(())
    }

    fn libxc_record(&mut self, order: ByteOrder) -> Result<(), ReadErrorCause> {
        let mut wire = WireRecordHeader::new_zeroed();
        self.fill(wire.as_mut_bytes())?;
        self.ready.extend_from_slice(wire.as_bytes());
        let length = u64::from(wire.length.get(order));
        self.through = length.saturating_add(padding(length));
        if wire.kind.get(order) == RecordKind::END.0 {
            self.stage = Stage::Records;
        }
        Ok(())
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
                    let kind = Some(XapiKind::LIBXC);
                    let error = ReadError::at(Place::XapiRecord { kind }, self.offset, cause);
                    return Err(io::Error::other(error));
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
