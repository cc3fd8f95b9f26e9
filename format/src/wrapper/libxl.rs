//! The libxl stream, version 2: a header and six kinds of record. One of them passes the source to
//! the libxc layer and takes it back.
//!
//! ```text
//! header | LIBXC_CONTEXT -> libxc stream -> [EMULATOR_XENSTORE_DATA] [EMULATOR_CONTEXT] | END
//!                             ↑ at each libxc CHECKPOINT: emulator records, CHECKPOINT_END ↩
//! ```
//!
//! [`LibxlReader`] and [`LibxlWriter`] are in [`mod@read`] and [`mod@write`]. This module has the
//! header, the records and the rules of their order.
//!
//! Specification: libxl migration stream, revision 2. C implementation:
//! `tools/libs/light/libxl_sr_stream_format.h`.

use std::fmt;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::wire::{U32, U64};

mod order;
pub mod read;
pub mod record;
pub mod write;

pub(crate) use order::LibxlOrder;
pub use order::LibxlOrderError;
pub use read::LibxlReader;
pub use record::{
    CheckpointState, CheckpointStateRecord, EmulatorId, EmulatorInstance, LibxlRecord,
    LibxlRecordKind, XenstoreData,
};
pub use write::LibxlWriter;

/// Maximum size of a body that is read or written. libxl has no limit of its own. The libxc
/// stream's limit is far above any device model's state (tens of MiB, if it contains video memory).
pub const MAX_BODY: u32 = 128 << 20;

/// The header, encoded as in the stream; always big endian.
///
/// | octets | field |
/// |---|---|
/// | 0–7 | ident, `LibxlFmt` |
/// | 8–11 | version, 2 |
/// | 12–15 | options: bit 0 endianness, bit 1 made by the legacy converter, others zero |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireLibxlHeader {
    ident: U64,
    version: U32,
    options: U32,
}

const _: () = assert!(size_of::<WireLibxlHeader>() == LibxlHeader::BYTES);

/// The header of a libxl stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LibxlHeader {
    /// The byte order of the records' fields; the libxc stream has its own.
    pub order: ByteOrder,
    /// Whether the legacy converter made this stream.
    pub legacy_converted: bool,
}

impl LibxlHeader {
    /// Length in the stream.
    pub const BYTES: usize = 16;
    /// The first eight bytes, `LibxlFmt`.
    pub const IDENT: u64 = u64::from_be_bytes(*b"LibxlFmt");
    /// The only version.
    pub const VERSION: u32 = 2;

    const OPTION_BIG_ENDIAN: u32 = 1 << 0;
    const OPTION_LEGACY: u32 = 1 << 1;

    /// Decodes a header; `lenient` tolerates reserved bits.
    ///
    /// # Errors
    ///
    /// A wrong identifier or version; a reserved bit that is set.
    pub(crate) fn decode(wire: &WireLibxlHeader, lenient: bool) -> Result<Self, LibxlError> {
        const BE: ByteOrder = ByteOrder::Big;
        let ident = wire.ident.get(BE);
        if ident != Self::IDENT {
            return Err(LibxlError::Ident { got: ident });
        }
        let version = wire.version.get(BE);
        if version != Self::VERSION {
            return Err(LibxlError::Version { got: version });
        }
        let options = wire.options.get(BE);
        let reserved = options & !(Self::OPTION_BIG_ENDIAN | Self::OPTION_LEGACY);
        reserved_zero(lenient, "stream header: options bits 2–31", 12, reserved)?;
        Ok(Self {
            order: match options & Self::OPTION_BIG_ENDIAN {
                0 => ByteOrder::Little,
                _ => ByteOrder::Big,
            },
            legacy_converted: options & Self::OPTION_LEGACY != 0,
        })
    }

    /// Encodes the header.
    pub(crate) fn encode(self) -> WireLibxlHeader {
        const BE: ByteOrder = ByteOrder::Big;
        let order = match self.order {
            ByteOrder::Little => 0,
            ByteOrder::Big => Self::OPTION_BIG_ENDIAN,
        };
        let legacy = match self.legacy_converted {
            false => 0,
            true => Self::OPTION_LEGACY,
        };
        WireLibxlHeader {
            ident: U64::new(Self::IDENT, BE),
            version: U32::new(Self::VERSION, BE),
            options: U32::new(order | legacy, BE),
        }
    }
}

impl fmt::Display for LibxlHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libxl stream version {}, {}", Self::VERSION, self.order)?;
        match self.legacy_converted {
            true => f.write_str(", converted from a legacy stream"),
            false => Ok(()),
        }
    }
}

/// A broken rule of the libxl stream.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LibxlError {
    /// The first eight bytes are not libxl's.
    #[error("ident is {got:#018x}, expected 0x4c6962786c466d74 (LibxlFmt)")]
    Ident {
        /// The value found.
        got: u64,
    },
    /// A version that does not exist.
    #[error("version is {got}, expected 2")]
    Version {
        /// The value found.
        got: u32,
    },
    /// A reserved field or padding that is not zero.
    #[error("{field} (byte {at} of it) must be zero, got {got:#x}")]
    ReservedNotZero {
        /// The structure and its field.
        field: &'static str,
        /// Offset of the field in the header or the record.
        at: u64,
        /// The value found.
        got: u64,
    },
    /// A body that is too long.
    #[error("body length is {got}, expected at most {max} bytes")]
    BodyTooLong {
        /// The value found.
        got: u64,
        /// The limit.
        max: u32,
    },
    /// The records of a checkpoint are too long in total.
    #[error("the records of this checkpoint have more than {max} bytes")]
    CheckpointTooLong {
        /// The limit.
        max: u32,
    },
    /// The records around the libxc stream are too long in total.
    #[error(
        "the records up to here have more than {max} bytes, which is more than a restore keeps"
    )]
    RecordsTooLong {
        /// The limit.
        max: u32,
    },
    /// A body of the wrong length for its kind.
    #[error("body length is {got}, expected {expected}")]
    BodyLength {
        /// The length that the kind requires.
        expected: &'static str,
        /// The value found.
        got: u64,
    },
    /// A mandatory record that the specification does not define.
    #[error(
        "record type {kind:#010x} is mandatory and unknown; a newer libxl made this image, or it is damaged"
    )]
    UnknownMandatory {
        /// Its type.
        kind: u32,
    },
    /// An emulator that the specification does not define.
    #[error(
        "emulator id is {got:#x}, expected 0 (unknown), 1 (qemu traditional) or 2 (qemu upstream)"
    )]
    UnknownEmulator {
        /// The value found.
        got: u32,
    },
    /// Xenstore data without a terminator.
    #[error("xenstore data of {length} bytes must end in NUL, got {got:#04x}")]
    XenstoreNotTerminated {
        /// Length of the data.
        length: u64,
        /// The last byte.
        got: u8,
    },
    /// Xenstore data with a key but no value.
    #[error("xenstore data has {got} strings, expected an even number (keys and values)")]
    XenstoreOdd {
        /// Number of strings.
        got: u64,
    },
    /// A key that xenstore would not accept.
    #[error(
        "xenstore key {pair} is {:?}, expected one or more ASCII letters, digits or any of -/_@",
        key.escape_ascii().to_string()
    )]
    XenstoreKey {
        /// Index of the pair.
        pair: u64,
        /// Its key, possibly truncated.
        key: Vec<u8>,
    },
    /// A string with a NUL inside.
    #[error("xenstore pair {pair} has a NUL inside its key or its value")]
    XenstoreNul {
        /// Index of the pair.
        pair: u64,
    },
    /// A CHECKPOINT_STATE that the specification does not define.
    #[error("control id is {got:#x}, expected 0 to 3")]
    UnknownCheckpointState {
        /// The value found.
        got: u32,
    },
    /// A record that is out of place.
    #[error(transparent)]
    Order(#[from] LibxlOrderError),
}

/// Requires `got` to be zero, unless lenient.
fn reserved_zero(
    lenient: bool,
    field: &'static str,
    at: u64,
    got: impl Into<u64>,
) -> Result<(), LibxlError> {
    match got.into() {
        0 => Ok(()),
        _ if lenient => Ok(()),
        got => Err(LibxlError::ReservedNotZero { field, at, got }),
    }
}
