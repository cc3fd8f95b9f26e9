//! Header of a file saved by libvirt's xl driver (`virsh save`), with the domain's XML. A libxl
//! stream (version 2 of the header) or a legacy one (version 1) follows.
//!
//! A specification does not exist. C implementation: `libxlSavefileHeader` in libvirt's
//! `src/libxl/libxl_conf.h`, `libxlDoDomainSave` and `libxlDomainSaveImageOpen`.

use std::io::Read;

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::error::{Place, ReadError, ReadErrorCause};
use crate::read::ReadOptions;
use crate::source::{fill, fill_behind, fill_growing};
use crate::wire::U32;

/// The magic at the start of such a file.
pub const MAGIC: [u8; 16] = *b"libvirt-xml\n \0 \r";

/// Maximum size of the XML. libvirt has no limit; a domain's XML has a few kilobytes.
pub const MAX_XML: u32 = 16 << 20;

/// The fixed part, encoded as in the file.
///
/// | bytes | field |
/// |---|---|
/// | 0–15 | magic |
/// | 16–19 | version, 1 or 2 |
/// | 20–23 | length of the XML that follows, its NUL included |
/// | 24–63 | reserved, zero |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireLibvirt {
    version: U32,
    xml_length: U32,
    reserved: [U32; 10],
}

const _: () = assert!(MAGIC.len() + size_of::<WireLibvirt>() == LibvirtHeader::FIXED_BYTES);

/// A broken rule of libvirt's header.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LibvirtError {
    /// The first bytes are not libvirt's.
    #[error("magic is {:?}, expected {:?}", got.escape_ascii().to_string(), MAGIC.escape_ascii().to_string())]
    Magic {
        /// The value found.
        got: [u8; 16],
    },
    /// An unknown version.
    #[error("version is {got}, expected 1 or 2; a newer libvirt made this file, or it is damaged")]
    Version {
        /// The value found.
        got: u32,
    },
    /// No XML, or an implausible amount.
    #[error("the XML has {got} bytes, expected 1 to {MAX_XML}")]
    XmlLength {
        /// The value found.
        got: u32,
    },
    /// A reserved word that is not zero.
    #[error("reserved bytes at {at} are {got:#x}, expected 0")]
    Reserved {
        /// Its offset in the header.
        at: u64,
        /// The value found.
        got: u32,
    },
}

/// libvirt's header.
///
/// ```
/// use std::io::Read;
///
/// use xsr_format::wrapper::libvirt::LibvirtHeader;
/// use xsr_format::{ReadOptions, Walk};
///
/// /// The XML that libvirt keeps with a domain, and a reader of the image after it.
/// fn open(mut source: impl Read) -> Result<(Vec<u8>, Walk<impl Read>), xsr_format::ReadError> {
///     let header = LibvirtHeader::read(&mut source, ReadOptions::default())?;
///     let options = ReadOptions { offset: header.bytes(), ..ReadOptions::default() };
///     Ok((header.xml().to_vec(), Walk::open(source, options)?))
/// }
/// # assert!(open(&b"no image"[..]).is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtHeader {
    version: u32,
    /// Including its terminator.
    xml: Vec<u8>,
    /// Its length.
    xml_length: u32,
}

impl LibvirtHeader {
    /// Length of the part before the XML.
    pub const FIXED_BYTES: usize = 64;

    /// A header for a libxl stream.
    ///
    /// # Errors
    ///
    /// XML that is too long.
    pub fn new(xml: &str) -> Result<Self, LibvirtError> {
        let bytes = xml.len().saturating_add(1);
        let xml_length = match u32::try_from(bytes) {
            Ok(length) if length <= MAX_XML => length,
            Ok(got) => return Err(LibvirtError::XmlLength { got }),
            // Report the largest value of the field.
            Err(_) => return Err(LibvirtError::XmlLength { got: u32::MAX }),
        };
        let mut xml = xml.as_bytes().to_vec();
        xml.push(0);
        Ok(Self {
            version: 2,
            xml,
            xml_length,
        })
    }

    /// Reads the header from the start of a file: exactly its bytes.
    ///
    /// # Errors
    ///
    /// The source failed or ended, or a rule is broken.
    pub fn read(mut source: impl Read, options: ReadOptions) -> Result<Self, ReadError> {
        Self::read_behind(&[], &mut source, options)
    }

    /// Like [`LibvirtHeader::read`], if the first bytes (`known`, at most 16) have already been
    /// read.
    ///
    /// # Errors
    ///
    /// Same as [`LibvirtHeader::read`].
    pub fn read_behind(
        known: &[u8],
        source: &mut impl Read,
        options: ReadOptions,
    ) -> Result<Self, ReadError> {
        Self::read_from(known, source, options.lenient)
            .map_err(|cause| ReadError::at(Place::LibvirtHeader, options.offset, cause))
    }

    fn read_from(
        known: &[u8],
        source: &mut impl Read,
        lenient: bool,
    ) -> Result<Self, ReadErrorCause> {
        const LE: ByteOrder = ByteOrder::Little;
        let mut magic = [0; MAGIC.len()];
        fill_behind(known, source, &mut magic)?;
        if magic != MAGIC {
            return Err(LibvirtError::Magic { got: magic }.into());
        }
        let mut wire = WireLibvirt::new_zeroed();
        fill(source, wire.as_mut_bytes())?;
        let version = wire.version.get(LE);
        if !matches!(version, 1 | 2) {
            return Err(LibvirtError::Version { got: version }.into());
        }
        let length = wire.xml_length.get(LE);
        if !(1..=MAX_XML).contains(&length) {
            return Err(LibvirtError::XmlLength { got: length }.into());
        }
        for (at, word) in (24_u64..).step_by(4).zip(wire.reserved) {
            let got = word.get(LE);
            if got != 0 && !lenient {
                return Err(LibvirtError::Reserved { at, got }.into());
            }
        }
        let mut xml = Vec::new();
        fill_growing(source, &mut xml, u64::from(length))?;
        Ok(Self {
            version,
            xml,
            xml_length: length,
        })
    }

    /// The bytes of the header; reserved bytes are zero.
    pub fn encode(&self) -> Vec<u8> {
        const LE: ByteOrder = ByteOrder::Little;
        let mut wire = WireLibvirt::new_zeroed();
        wire.version = U32::new(self.version, LE);
        wire.xml_length = U32::new(self.xml_length, LE);
        [&MAGIC, wire.as_bytes(), &self.xml].concat()
    }

    /// Length of the header with its XML, which is the offset of the stream.
    pub fn bytes(&self) -> u64 {
        (self.xml.len() as u64).saturating_add(Self::FIXED_BYTES as u64)
    }

    /// Whether a libxl stream version 2 follows; if not, a legacy stream does.
    pub fn is_stream_v2(&self) -> bool {
        self.version == 2
    }

    /// The XML, without its terminator.
    pub fn xml(&self) -> &[u8] {
        self.xml.strip_suffix(&[0]).unwrap_or(&self.xml)
    }
}
