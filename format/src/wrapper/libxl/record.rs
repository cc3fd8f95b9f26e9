//! Record types of the libxl stream.
//!
//! Specification: libxl migration stream, "Record Overview", "Emulator Records",
//! "Records". C implementation: `libxl_stream_read.c:process_record`.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{LibxlError, MAX_BODY, reserved_zero};
use crate::byte_order::ByteOrder;
use crate::wire::U32;

/// A record's header. The body follows, padded with zeros to a multiple of 8.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | type |
/// | 4–7 | length of the body, without padding |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireLibxlRecordHeader {
    pub(super) kind: U32,
    pub(super) length: U32,
}

/// The start of both emulator records.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | emulator id |
/// | 4–7 | index of this emulator for the domain |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireEmulatorHeader {
    id: U32,
    index: U32,
}

/// The body of CHECKPOINT_STATE.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | control id |
/// | 4–7 | padding, zero |
///
/// libxl writes a body of 4 bytes, which the record's padding of zeros completes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireCheckpointState {
    id: U32,
    padding: U32,
}

const _: () = {
    assert!(size_of::<WireLibxlRecordHeader>() == 8);
    assert!(size_of::<WireEmulatorHeader>() == 8);
    assert!(size_of::<WireCheckpointState>() == 8);
};

/// The type of a record. Open: every value can be represented.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LibxlRecordKind(pub u32);

impl LibxlRecordKind {
    /// The end of the stream.
    pub const END: Self = Self(0);
    /// A libxc stream follows.
    pub const LIBXC_CONTEXT: Self = Self(1);
    /// Xenstore keys and values of an emulator.
    pub const EMULATOR_XENSTORE_DATA: Self = Self(2);
    /// The state of an emulator.
    pub const EMULATOR_CONTEXT: Self = Self(3);
    /// The end of a checkpoint.
    pub const CHECKPOINT_END: Self = Self(4);
    /// COLO's control word.
    pub const CHECKPOINT_STATE: Self = Self(5);

    /// The name, as the specification spells it; `None` for an undefined kind.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::END => "END",
            Self::LIBXC_CONTEXT => "LIBXC_CONTEXT",
            Self::EMULATOR_XENSTORE_DATA => "EMULATOR_XENSTORE_DATA",
            Self::EMULATOR_CONTEXT => "EMULATOR_CONTEXT",
            Self::CHECKPOINT_END => "CHECKPOINT_END",
            Self::CHECKPOINT_STATE => "CHECKPOINT_STATE",
            _ => return None,
        })
    }

    /// Whether a restorer that does not know this type may skip it (bit 31).
    pub const fn is_optional(self) -> bool {
        self.0 >> 31 != 0
    }
}

impl LibxlRecordKind {
    /// A little-endian record of this kind without a body.
    pub fn empty_record(self) -> [u8; 8] {
        zerocopy::transmute!(WireLibxlRecordHeader {
            kind: U32::new(self.0, ByteOrder::Little),
            length: U32::new(0, ByteOrder::Little),
        })
    }
}

impl fmt::Display for LibxlRecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None if self.is_optional() => write!(f, "optional type {:#010x}", self.0),
            None => write!(f, "unknown type {:#010x}", self.0),
        }
    }
}

impl fmt::Debug for LibxlRecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LibxlRecordKind({:#x}, {self})", self.0)
    }
}

/// A program that emulates devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EmulatorId {
    /// Unknown, in a stream that the legacy converter made.
    Unknown,
    /// Xen's own fork of qemu, dropped in Xen 4.21.
    QemuTraditional,
    /// Qemu.
    QemuUpstream,
}

impl EmulatorId {
    /// The value in the stream.
    pub const fn value(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::QemuTraditional => 1,
            Self::QemuUpstream => 2,
        }
    }

    /// The emulator with this value.
    pub const fn from_value(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Unknown),
            1 => Some(Self::QemuTraditional),
            2 => Some(Self::QemuUpstream),
            _ => None,
        }
    }
}

impl fmt::Display for EmulatorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown emulator",
            Self::QemuTraditional => "qemu traditional",
            Self::QemuUpstream => "qemu upstream",
        })
    }
}

/// One of a domain's emulators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmulatorInstance {
    /// The program.
    pub id: EmulatorId,
    /// Index of the emulator.
    pub index: u32,
}

/// Checked xenstore keys and values. Keys are relative to the device model's part of the new
/// domain's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XenstoreData {
    raw: Vec<u8>,
}

impl XenstoreData {
    /// Checks bytes from a stream: NUL-terminated strings, keys and values in turn. Values are not
    /// inspected.
    ///
    /// # Errors
    ///
    /// The last string has no terminator, a value is missing, or a key has a character that
    /// xenstore does not accept.
    pub fn parse(raw: Vec<u8>) -> Result<Self, LibxlError> {
        if let Some(&got) = raw.last().filter(|last| **last != 0) {
            let length = raw.len() as u64;
            return Err(LibxlError::XenstoreNotTerminated { length, got });
        }
        let strings = raw.iter().filter(|byte| **byte == 0).count() as u64;
        if strings & 1 != 0 {
            return Err(LibxlError::XenstoreOdd { got: strings });
        }
        let data = Self { raw };
        for (pair, (key, _)) in data.iter().enumerate() {
            let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(byte);
            if key.is_empty() || !key.iter().all(good) {
                const SHOWN: usize = 64;
                let key = key.get(..SHOWN).unwrap_or(key).to_vec();
                let pair = pair as u64;
                return Err(LibxlError::XenstoreKey { pair, key });
            }
        }
        Ok(data)
    }

    /// Encodes keys and values.
    ///
    /// # Errors
    ///
    /// A key or value contains a NUL; same as [`XenstoreData::parse`].
    pub fn from_pairs<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, LibxlError> {
        let mut raw = Vec::new();
        for (pair, (key, value)) in pairs.into_iter().enumerate() {
            if key.contains('\0') || value.contains('\0') {
                let pair = pair as u64;
                return Err(LibxlError::XenstoreNul { pair });
            }
            for string in [key, value] {
                raw.extend_from_slice(string.as_bytes());
                raw.push(0);
            }
        }
        Self::parse(raw)
    }

    /// Keys and values, without NULs.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut strings = self
            .raw
            .split_inclusive(|byte| *byte == 0)
            .map(|string| string.strip_suffix(&[0]).unwrap_or(string));
        std::iter::from_fn(move || Some((strings.next()?, strings.next()?)))
    }

    /// The bytes, encoded as in the stream.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

/// COLO's control words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CheckpointState {
    /// The secondary is out of sync: take a new checkpoint (primary → secondary).
    New,
    /// The secondary is suspended (secondary → primary).
    Suspended,
    /// The secondary is ready (secondary → primary).
    Ready,
    /// The secondary is resumed (secondary → primary).
    Resumed,
}

impl CheckpointState {
    /// The value in the stream.
    pub const fn value(self) -> u32 {
        match self {
            Self::New => 0,
            Self::Suspended => 1,
            Self::Ready => 2,
            Self::Resumed => 3,
        }
    }

    /// The state with this value.
    pub const fn from_value(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::New),
            1 => Some(Self::Suspended),
            2 => Some(Self::Ready),
            3 => Some(Self::Resumed),
            _ => None,
        }
    }
}

/// A whole CHECKPOINT_STATE record, header included, whose id may be unknown: the ends of COLO
/// exchange such records on their own.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | type, 5, little endian |
/// | 4–7 | length of the body: 4 as libxl writes it, or 8 as the specification has it |
/// | 8–11 | id |
/// | 12–15 | zero |
///
/// ```
/// use xsr_format::wrapper::libxl::{CheckpointState, CheckpointStateRecord};
///
/// let bytes = CheckpointStateRecord(CheckpointState::Ready.value()).encode();
/// assert_eq!(bytes, [5, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
/// assert_eq!(CheckpointStateRecord::decode(bytes), Some(CheckpointStateRecord(2)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointStateRecord(
    /// The id: that of a [`CheckpointState`], or any other.
    pub u32,
);

impl CheckpointStateRecord {
    /// Length on the wire.
    pub const BYTES: usize = 16;

    /// The record as libxl writes it.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let words = [LibxlRecordKind::CHECKPOINT_STATE.0, 4, self.0, 0];
        zerocopy::transmute!(words.map(|word| U32::new(word, ByteOrder::Little)))
    }

    /// The record in these bytes; `None` if they are another one.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let words: [U32; 4] = zerocopy::transmute!(bytes);
        match words.map(|word| word.get(ByteOrder::Little)) {
            [kind, 4 | 8, id, 0] if kind == LibxlRecordKind::CHECKPOINT_STATE.0 => Some(Self(id)),
            _ => None,
        }
    }
}

/// A complete record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibxlRecord {
    /// The end of the stream.
    End,
    /// The source is at the first byte of a libxc stream.
    LibxcContext,
    /// Xenstore keys and values of an emulator.
    EmulatorXenstoreData {
        /// The emulator they belong to.
        emulator: EmulatorInstance,
        /// Keys and values.
        data: XenstoreData,
    },
    /// The state of an emulator, in its own format.
    EmulatorContext {
        /// The emulator it belongs to.
        emulator: EmulatorInstance,
        /// The state.
        state: Vec<u8>,
    },
    /// The end of a checkpoint: the source goes back to the libxc layer.
    CheckpointEnd,
    /// COLO's control word.
    CheckpointState(CheckpointState),
    /// An optional record (bit 31 of the type).
    Optional {
        /// Its type.
        kind: LibxlRecordKind,
        /// Its body.
        body: Vec<u8>,
    },
}

impl LibxlRecord {
    /// Length of its body, without padding.
    pub fn body_bytes(&self) -> u64 {
        const WHOSE: u64 = 8;
        let with_emulator = |length: usize| WHOSE.saturating_add(length as u64);
        match self {
            Self::End | Self::LibxcContext | Self::CheckpointEnd => 0,
            Self::EmulatorXenstoreData { data, .. } => with_emulator(data.as_bytes().len()),
            Self::EmulatorContext { state, .. } => with_emulator(state.len()),
            Self::CheckpointState(_) => 8,
            Self::Optional { body, .. } => body.len() as u64,
        }
    }

    /// The type.
    pub const fn kind(&self) -> LibxlRecordKind {
        match self {
            Self::End => LibxlRecordKind::END,
            Self::LibxcContext => LibxlRecordKind::LIBXC_CONTEXT,
            Self::EmulatorXenstoreData { .. } => LibxlRecordKind::EMULATOR_XENSTORE_DATA,
            Self::EmulatorContext { .. } => LibxlRecordKind::EMULATOR_CONTEXT,
            Self::CheckpointEnd => LibxlRecordKind::CHECKPOINT_END,
            Self::CheckpointState(_) => LibxlRecordKind::CHECKPOINT_STATE,
            Self::Optional { kind, .. } => *kind,
        }
    }

    /// Checks a record's header, so that an invalid one is refused before waiting for its body.
    pub(super) fn check_header(kind: LibxlRecordKind, length: u64) -> Result<u32, LibxlError> {
        use LibxlRecordKind as Kind;
        let field = match u32::try_from(length) {
            Ok(field) if field <= MAX_BODY => field,
            _ => {
                return Err(LibxlError::BodyTooLong {
                    got: length,
                    max: MAX_BODY,
                });
            }
        };
        let (good, expected) = match kind {
            Kind::END | Kind::LIBXC_CONTEXT | Kind::CHECKPOINT_END => (length == 0, "0"),
            Kind::EMULATOR_XENSTORE_DATA | Kind::EMULATOR_CONTEXT => (length >= 8, EMULATOR_LENGTH),
            Kind::CHECKPOINT_STATE => (
                matches!(length, 4 | 8),
                "8 bytes, or 4 as libxl writes them",
            ),
            kind if kind.is_optional() => return Ok(field),
            kind => return Err(LibxlError::UnknownMandatory { kind: kind.0 }),
        };
        match good {
            true => Ok(field),
            false => Err(LibxlError::BodyLength {
                expected,
                got: length,
            }),
        }
    }

    /// Decodes a body, without its padding.
    ///
    /// # Errors
    ///
    /// A length or value that is invalid for the kind; an unknown mandatory kind.
    pub fn decode(
        kind: LibxlRecordKind,
        mut body: Vec<u8>,
        order: ByteOrder,
        lenient: bool,
    ) -> Result<Self, LibxlError> {
        use LibxlRecordKind as Kind;
        Self::check_header(kind, body.len() as u64)?;
        Ok(match kind {
            Kind::END => Self::End,
            Kind::LIBXC_CONTEXT => Self::LibxcContext,
            Kind::CHECKPOINT_END => Self::CheckpointEnd,
            Kind::EMULATOR_XENSTORE_DATA => Self::EmulatorXenstoreData {
                emulator: take_emulator(&mut body, order)?,
                data: XenstoreData::parse(body)?,
            },
            Kind::EMULATOR_CONTEXT => Self::EmulatorContext {
                emulator: take_emulator(&mut body, order)?,
                state: body,
            },
            Kind::CHECKPOINT_STATE => {
                let mut wire = WireCheckpointState::new_zeroed();
                for (to, from) in wire.as_mut_bytes().iter_mut().zip(&body) {
                    *to = *from;
                }
                let padding = wire.padding.get(order);
                reserved_zero(lenient, "CHECKPOINT_STATE: padding", 12, padding)?;
                let got = wire.id.get(order);
                Self::CheckpointState(
                    CheckpointState::from_value(got)
                        .ok_or(LibxlError::UnknownCheckpointState { got })?,
                )
            }
            kind => Self::Optional { kind, body },
        })
    }

    /// The body in two parts, without padding: two words or none, and bytes.
    pub(super) fn encode(&self, order: ByteOrder) -> (Option<[U32; 2]>, &[u8]) {
        let words = |first: u32, second: u32| Some([first, second].map(|w| U32::new(w, order)));
        match self {
            Self::End | Self::LibxcContext | Self::CheckpointEnd => (None, &[]),
            Self::EmulatorXenstoreData { emulator, data } => {
                (words(emulator.id.value(), emulator.index), data.as_bytes())
            }
            Self::EmulatorContext { emulator, state } => {
                (words(emulator.id.value(), emulator.index), state)
            }
            Self::CheckpointState(state) => (words(state.value(), 0), &[]),
            Self::Optional { body, .. } => (None, body),
        }
    }
}

const EMULATOR_LENGTH: &str = "at least 8 bytes (the emulator's id and index)";

/// Takes the sub-header off the front of an emulator record.
fn take_emulator(body: &mut Vec<u8>, order: ByteOrder) -> Result<EmulatorInstance, LibxlError> {
    let Ok((wire, _)) = WireEmulatorHeader::read_from_prefix(body) else {
        return Err(LibxlError::BodyLength {
            expected: EMULATOR_LENGTH,
            got: body.len() as u64,
        });
    };
    body.drain(..size_of::<WireEmulatorHeader>());
    let got = wire.id.get(order);
    Ok(EmulatorInstance {
        id: EmulatorId::from_value(got).ok_or(LibxlError::UnknownEmulator { got })?,
        index: wire.index.get(order),
    })
}
