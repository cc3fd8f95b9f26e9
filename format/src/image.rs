//! The image header and the domain header, with which a libxc stream starts.
//!
//! Specification: libxc migration stream, "Image Header" and "Domain Header".
//! C implementation: `xg_sr_save.c:write_headers`, `xg_sr_restore.c:read_headers`.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Reserved};
use crate::frame::PAGE_SHIFT;
use crate::wire::{U16, U32, U64};

/// The image header, encoded as in the stream; always big endian.
///
/// | octets | field |
/// |---|---|
/// | 0–7 | marker, all bits set |
/// | 8–11 | id, `XENF` |
/// | 12–15 | version |
/// | 16–17 | options: bit 0 endianness of all that follows, others zero |
/// | 18–23 | reserved, zero |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireImageHeader {
    marker: U64,
    id: U32,
    version: U32,
    options: U16,
    reserved1: U16,
    reserved2: U32,
}

const _: () = assert!(size_of::<WireImageHeader>() == ImageHeader::BYTES);

/// The version of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Xen 4.6 to 4.13: static data ends at the first memory record.
    V2,
    /// Xen 4.14 and later: static data ends with a STATIC_DATA_END record.
    V3,
}

impl Version {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }
}

/// The image header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageHeader {
    /// Version 2 or 3.
    pub version: Version,
    /// The byte order of everything that follows.
    pub order: ByteOrder,
}

impl ImageHeader {
    /// Length in the stream.
    pub const BYTES: usize = 24;
    /// The first eight bytes.
    pub const MARKER: u64 = u64::MAX;
    /// The identifier, `XENF`.
    pub const ID: u32 = 0x5845_4e46;

    const OPTION_BIG_ENDIAN: u16 = 1;

    /// Decodes a header; `lenient` tolerates reserved bits.
    ///
    /// # Errors
    ///
    /// A wrong marker, identifier or version; a reserved bit that is set.
    pub(crate) fn decode(wire: &WireImageHeader, lenient: bool) -> Result<Self, DecodeError> {
        const BE: ByteOrder = ByteOrder::Big;
        let marker = wire.marker.get(BE);
        if marker != Self::MARKER {
            return Err(DecodeError::ImageMarker { got: marker });
        }
        let id = wire.id.get(BE);
        if id != Self::ID {
            return Err(DecodeError::ImageId { got: id });
        }
        let version = match wire.version.get(BE) {
            2 => Version::V2,
            3 => Version::V3,
            got => return Err(DecodeError::ImageVersion { got }),
        };
        let options = wire.options.get(BE);
        Reserved {
            lenient,
            structure: "image header",
        }
        .zero(
            "options bits 1–15",
            16,
            u64::from(options & !Self::OPTION_BIG_ENDIAN),
        )?
        .zero("reserved bytes", 18, u64::from(wire.reserved1.get(BE)))?
        .zero("reserved bytes", 20, u64::from(wire.reserved2.get(BE)))?;
        let order = match options & Self::OPTION_BIG_ENDIAN {
            0 => ByteOrder::Little,
            _ => ByteOrder::Big,
        };
        Ok(Self { version, order })
    }

    /// Encodes the header.
    pub(crate) fn encode(self) -> WireImageHeader {
        const BE: ByteOrder = ByteOrder::Big;
        let options = match self.order {
            ByteOrder::Little => 0,
            ByteOrder::Big => Self::OPTION_BIG_ENDIAN,
        };
        WireImageHeader {
            marker: U64::new(Self::MARKER, BE),
            id: U32::new(Self::ID, BE),
            version: U32::new(self.version.number(), BE),
            options: U16::new(options, BE),
            reserved1: U16::new(0, BE),
            reserved2: U32::new(0, BE),
        }
    }
}

/// The domain header, encoded as in the stream.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | guest type |
/// | 4–5 | page shift, 12 |
/// | 6–7 | reserved, zero |
/// | 8–11 | Xen major |
/// | 12–15 | Xen minor |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireDomainHeader {
    guest_type: U32,
    page_shift: U16,
    reserved: U16,
    xen_major: U32,
    xen_minor: U32,
}

const _: () = assert!(size_of::<WireDomainHeader>() == DomainHeader::BYTES);
const _: () = assert!(DomainHeader::SHIFT as u32 == PAGE_SHIFT);

/// The type of a guest. Open: a value without a name is kept and can be inspected, but a restorer
/// refuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestType(pub u32);

impl GuestType {
    /// x86 PV.
    pub const X86_PV: Self = Self(1);
    /// x86 HVM, and PVH, which is saved as HVM.
    pub const X86_HVM: Self = Self(2);
}

impl fmt::Display for GuestType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::X86_PV => f.write_str("x86 PV"),
            Self::X86_HVM => f.write_str("x86 HVM"),
            Self(other) => write!(f, "unknown guest type {other:#x}"),
        }
    }
}

/// The domain header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainHeader {
    /// PV, HVM, or a type unknown to this version.
    pub guest_type: GuestType,
    /// Major version of the Xen that saved the domain; 0 if a converter made the stream from a
    /// legacy one.
    pub xen_major: u32,
    /// Minor version, or the converter's version.
    pub xen_minor: u32,
}

impl DomainHeader {
    /// Length in the stream.
    pub const BYTES: usize = 16;

    /// Page shift of every x86 stream.
    const SHIFT: u16 = 12;

    /// Decodes a header; `lenient` tolerates reserved bits.
    ///
    /// # Errors
    ///
    /// A page shift other than 12; a guest type of 0, which the specification
    /// reserves; a reserved bit that is set.
    pub(crate) fn decode(
        wire: &WireDomainHeader,
        order: ByteOrder,
        lenient: bool,
    ) -> Result<Self, DecodeError> {
        let guest_type = GuestType(wire.guest_type.get(order));
        if guest_type.0 == 0 {
            return Err(DecodeError::GuestTypeReserved);
        }
        let page_shift = wire.page_shift.get(order);
        if page_shift != Self::SHIFT {
            return Err(DecodeError::PageShift { got: page_shift });
        }
        Reserved {
            lenient,
            structure: "domain header",
        }
        .zero("reserved bytes", 6, u64::from(wire.reserved.get(order)))?;
        Ok(Self {
            guest_type,
            xen_major: wire.xen_major.get(order),
            xen_minor: wire.xen_minor.get(order),
        })
    }

    /// Encodes the header.
    pub(crate) fn encode(self, order: ByteOrder) -> WireDomainHeader {
        WireDomainHeader {
            guest_type: U32::new(self.guest_type.0, order),
            page_shift: U16::new(Self::SHIFT, order),
            reserved: U16::new(0, order),
            xen_major: U32::new(self.xen_major, order),
            xen_minor: U32::new(self.xen_minor, order),
        }
    }

    /// Whether a converter made this stream from a legacy image.
    pub const fn is_converted(self) -> bool {
        self.xen_major == 0
    }
}
