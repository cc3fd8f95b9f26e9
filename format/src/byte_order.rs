//! Byte order, chosen at run time.
//!
//! Option bit 0 of the libxc image header, and of the libxl header, gives the byte order of the
//! rest of the stream, so nothing here is fixed at compile time.

use std::fmt;

/// Order of the bytes in a multi-byte field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// Least significant byte first: what every x86 Xen writes.
    Little,
    /// Most significant byte first.
    Big,
}

impl fmt::Display for ByteOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Little => "little endian",
            Self::Big => "big endian",
        })
    }
}
