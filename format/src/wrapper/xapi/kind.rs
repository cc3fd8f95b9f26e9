//! Record types of xapi's images, and their errors.
//!
//! Implementation: `ocaml/xenopsd/lib/suspend_image.ml` of xen-api.

use std::fmt;

use thiserror::Error;

use super::{LEGACY_QEMU_MAGIC, MAGIC, MAX_RECORD};

/// The type of a record.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct XapiKind(pub u64);

impl XapiKind {
    /// xenopsd's state: time, word size, the VM.
    pub const XENOPS: Self = Self(0x000f);
    /// A libxc stream.
    pub const LIBXC: Self = Self(0x00f0);
    /// A libxl stream, which xenopsd never writes.
    pub const LIBXL: Self = Self(0x00f1);
    /// A legacy libxc stream.
    pub const LIBXC_LEGACY: Self = Self(0x00f2);
    /// State of qemu traditional.
    pub const QEMU_TRAD: Self = Self(0x0f00);
    /// State of qemu.
    pub const QEMU_XEN: Self = Self(0x0f01);
    /// State of a virtual GPU.
    pub const DEMU: Self = Self(0x0f10);
    /// UEFI variables.
    pub const VARSTORED: Self = Self(0x0f11);
    /// State of a virtual TPM.
    pub const SWTPM0: Self = Self(0x0f12);
    /// State of a virtual TPM.
    pub const SWTPM: Self = Self(0x0f13);
    /// The end.
    pub const END_OF_IMAGE: Self = Self(0xffff);

    /// Whether it is the state of a device that a libxl stream has no record for.
    pub const fn is_device_state(self) -> bool {
        matches!(
            self,
            Self::DEMU | Self::VARSTORED | Self::SWTPM0 | Self::SWTPM
        )
    }

    /// The name in xenopsd; `None` for an undefined kind.
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

/// A broken rule of xapi's images.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum XapiError {
    /// The first bytes are not xapi's.
    #[error("magic is {:?}, expected {:?}", got.escape_ascii().to_string(), MAGIC.escape_ascii().to_string())]
    Magic {
        /// The value found.
        got: [u8; 15],
    },
    /// A record of no known type.
    #[error("record has {kind}; a newer xapi made this image, or it is damaged")]
    Unknown {
        /// Its type.
        kind: XapiKind,
    },
    /// A body that is too long.
    #[error("{kind} has {got} bytes, expected at most {MAX_RECORD}")]
    TooLong {
        /// The record's type.
        kind: XapiKind,
        /// The value found.
        got: u64,
    },
    /// More records than an image can have.
    #[error("more than {max} records")]
    TooMany {
        /// The most.
        max: usize,
    },
    /// A second libxc stream.
    #[error("{kind} although a libxc stream came before")]
    Repeated {
        /// The record.
        kind: XapiKind,
    },
    /// A second record with the state of the same device.
    #[error("{kind} although a record of this type came before")]
    RepeatedState {
        /// The record.
        kind: XapiKind,
    },
    /// The legacy stream of an HVM guest is not followed by a device model's state.
    #[error(
        "device model's signature is {:?}, expected {:?}",
        got.escape_ascii().to_string(), LEGACY_QEMU_MAGIC.escape_ascii().to_string()
    )]
    LegacyQemu {
        /// The value found.
        got: [u8; 22],
    },
    /// An image without a libxc stream.
    #[error("End_of_image although no libxc stream has come: there is no guest in this image")]
    Incomplete,
}

/// A record that has been read or started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XapiRecord {
    /// Its type.
    pub kind: XapiKind,
    /// Its offset.
    pub offset: u64,
    /// Length of the body, from its header.
    pub length: u64,
}
