//! Record types of the libxc stream, and their bodies as typed values that borrow from the stream's
//! bytes.
//!
//! Specification: libxc migration stream, "Records". C implementation:
//! `xg_sr_stream_format.h`.

pub mod dirty_pfns;
pub mod hvm;
pub mod page_data;
pub mod pv;
pub mod x86;

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length};
use crate::frame::{PAGE_SIZE, Page};
use crate::order::OrderError;
use crate::wire::U32;

/// Maximum size of a body, as in Xen's reader (`REC_LENGTH_MAX`).
pub const MAX_BODY: u32 = 128 << 20;

/// Maximum number of pages in a PAGE_DATA record that this crate writes (Xen's `MAX_BATCH_SIZE`).
/// Readers accept what fits in [`MAX_BODY`].
pub const MAX_BATCH: usize = 1024;

/// The header of a record, encoded as in the stream.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | type |
/// | 4–7 | body length in octets, without the padding to a multiple of 8 |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireRecordHeader {
    /// The type.
    pub(crate) kind: U32,
    /// Bytes in the body.
    pub(crate) length: U32,
}

const _: () = assert!(size_of::<WireRecordHeader>() == 8);

/// The type of a record. Open: a value without a name is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordKind(pub u32);

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl RecordKind {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// Every kind the format defines, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The specification's name, if it has one.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// The last record.
    END = 0x00, "END";
    /// A batch of pages.
    PAGE_DATA = 0x01, "PAGE_DATA";
    /// Width and page-table levels of a PV guest.
    X86_PV_INFO = 0x02, "X86_PV_INFO";
    /// Location of a PV guest's p2m.
    X86_PV_P2M_FRAMES = 0x03, "X86_PV_P2M_FRAMES";
    /// Registers of a PV vcpu.
    X86_PV_VCPU_BASIC = 0x04, "X86_PV_VCPU_BASIC";
    /// More state of a PV vcpu.
    X86_PV_VCPU_EXTENDED = 0x05, "X86_PV_VCPU_EXTENDED";
    /// XSAVE area of a PV vcpu.
    X86_PV_VCPU_XSAVE = 0x06, "X86_PV_VCPU_XSAVE";
    /// The shared info page of a PV guest.
    SHARED_INFO = 0x07, "SHARED_INFO";
    /// The TSC.
    X86_TSC_INFO = 0x08, "X86_TSC_INFO";
    /// Xen's state of an HVM guest.
    HVM_CONTEXT = 0x09, "HVM_CONTEXT";
    /// Parameters of an HVM guest.
    HVM_PARAMS = 0x0a, "HVM_PARAMS";
    /// A blob of the toolstack; deprecated, never written.
    TOOLSTACK = 0x0b, "TOOLSTACK";
    /// MSRs of a PV vcpu.
    X86_PV_VCPU_MSRS = 0x0c, "X86_PV_VCPU_MSRS";
    /// From here on, pages are sent again for comparison.
    VERIFY = 0x0d, "VERIFY";
    /// Everything before is one consistent state.
    CHECKPOINT = 0x0e, "CHECKPOINT";
    /// The secondary's dirty pages; only on the back channel.
    CHECKPOINT_DIRTY_PFN_LIST = 0x0f, "CHECKPOINT_DIRTY_PFN_LIST";
    /// Static data is complete. Version 3.
    STATIC_DATA_END = 0x10, "STATIC_DATA_END";
    /// CPUID leaves. Version 3.
    X86_CPUID_POLICY = 0x11, "X86_CPUID_POLICY";
    /// MSRs of the CPU policy. Version 3.
    X86_MSR_POLICY = 0x12, "X86_MSR_POLICY";
}

impl RecordKind {
    const OPTIONAL: u32 = 1 << 31;

    /// Whether a restorer that does not know the record may skip it.
    pub const fn is_optional(self) -> bool {
        self.0 & Self::OPTIONAL != 0
    }
}

impl RecordKind {
    /// A little-endian record of this kind without a body.
    pub fn empty_record(self) -> [u8; 8] {
        zerocopy::transmute!(WireRecordHeader {
            kind: U32::new(self.0, ByteOrder::Little),
            length: U32::new(0, ByteOrder::Little),
        })
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.is_optional()) {
            (Some(name), _) => f.write_str(name),
            (None, true) => write!(f, "optional record {:#010x}", self.0),
            (None, false) => write!(f, "unknown record {:#010x}", self.0),
        }
    }
}

impl fmt::Debug for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordKind({:#x}, {self})", self.0)
    }
}

/// Number of bytes that pad a body of this length to a multiple of 8: 0–7.
pub const fn padding(length: u64) -> u64 {
    length.wrapping_neg() & 7
}

/// The bytes that pad a body of this length: zeros.
pub(crate) const fn zeros(length: u64) -> &'static [u8] {
    match padding(length) {
        1 => &[0; 1],
        2 => &[0; 2],
        3 => &[0; 3],
        4 => &[0; 4],
        5 => &[0; 5],
        6 => &[0; 6],
        7 => &[0; 7],
        _ => &[],
    }
}

/// Any record except PAGE_DATA, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Its type.
    pub kind: RecordKind,
    /// Its body, without padding.
    pub raw: &'a [u8],
    /// Its decoded body.
    pub body: Body<'a>,
}

/// The body of a record; borrows from the bytes of the record.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// END.
    End,
    /// X86_PV_INFO.
    PvInfo(pv::PvInfo),
    /// X86_PV_P2M_FRAMES.
    P2mFrames(pv::P2mFrames<'a>),
    /// X86_PV_VCPU_BASIC, _EXTENDED, _XSAVE or _MSRS; the record's kind tells which.
    Vcpu(pv::VcpuState<'a>),
    /// SHARED_INFO: the page.
    SharedInfo(&'a Page),
    /// X86_TSC_INFO.
    TscInfo(x86::TscInfo),
    /// HVM_CONTEXT: Xen's list of typed records.
    HvmContext(&'a [u8]),
    /// HVM_PARAMS.
    HvmParams(hvm::HvmParams<'a>),
    /// VERIFY.
    Verify,
    /// CHECKPOINT.
    Checkpoint,
    /// STATIC_DATA_END.
    StaticDataEnd,
    /// X86_CPUID_POLICY.
    CpuidPolicy(x86::CpuidPolicy<'a>),
    /// X86_MSR_POLICY.
    MsrPolicy(x86::MsrPolicy<'a>),
    /// An optional record that the format does not define.
    Optional(&'a [u8]),
}

/// What decoding a body depends on, besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Byte order of the stream.
    pub order: ByteOrder,
    /// Width of the PV guest in bytes, known after X86_PV_INFO.
    pub guest_width: Option<u8>,
    /// Tolerate non-zero reserved fields.
    pub lenient: bool,
}

impl Context {
    pub(crate) fn length(got: usize, holds: bool, expected: Length) -> Result<(), DecodeError> {
        match holds {
            true => Ok(()),
            false => Err(DecodeError::BodyLength {
                expected,
                got: got as u64,
            }),
        }
    }
}

/// Splits `body` into a leading `T` and the rest; a length error if it is too short.
pub(crate) fn head<T>(body: &[u8]) -> Result<(&T, &[u8]), DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(body).map_err(|_| DecodeError::BodyLength {
        expected: Length::AtLeast(size_of::<T>() as u64),
        got: body.len() as u64,
    })
}

/// `body` as a single `T`.
pub(crate) fn whole<T>(body: &[u8]) -> Result<&T, DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_bytes(body).map_err(|_| DecodeError::BodyLength {
        expected: Length::Exactly(size_of::<T>() as u64),
        got: body.len() as u64,
    })
}

/// `body` as elements of `T`; the error is `expected` if its length is not a multiple of their
/// size.
pub(crate) fn elements<T>(body: &[u8], expected: Length) -> Result<&[T], DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    <[T]>::ref_from_bytes(body).map_err(|_| DecodeError::BodyLength {
        expected,
        got: body.len() as u64,
    })
}

impl<'a> Body<'a> {
    /// Decodes the body of a record of `kind` (any except PAGE_DATA, whose body is passed on in
    /// pieces).
    ///
    /// # Errors
    ///
    /// The rule that the body breaks; [`DecodeError::UnknownMandatory`] for an undefined kind; the
    /// error of [`Order`](crate::order) for a kind that no stream has.
    pub fn decode(kind: RecordKind, body: &'a [u8], context: Context) -> Result<Self, DecodeError> {
        let empty = || Context::length(body.len(), body.is_empty(), Length::Exactly(0));
        Ok(match kind {
            RecordKind::END => empty().map(|()| Self::End)?,
            RecordKind::X86_PV_INFO => Self::PvInfo(pv::PvInfo::decode(body, context)?),
            RecordKind::X86_PV_P2M_FRAMES => Self::P2mFrames(pv::P2mFrames::decode(body, context)?),
            RecordKind::X86_PV_VCPU_BASIC
            | RecordKind::X86_PV_VCPU_EXTENDED
            | RecordKind::X86_PV_VCPU_XSAVE
            | RecordKind::X86_PV_VCPU_MSRS => {
                Self::Vcpu(pv::VcpuState::decode(kind, body, context)?)
            }
            RecordKind::SHARED_INFO => Self::SharedInfo(whole::<Page>(body)?),
            RecordKind::X86_TSC_INFO => Self::TscInfo(x86::TscInfo::decode(body, context)?),
            RecordKind::HVM_CONTEXT => {
                Context::length(body.len(), !body.is_empty(), Length::AtLeast(1))?;
                Self::HvmContext(body)
            }
            RecordKind::HVM_PARAMS => Self::HvmParams(hvm::HvmParams::decode(body, context)?),
            RecordKind::TOOLSTACK => return Err(DecodeError::Deprecated),
            RecordKind::VERIFY => empty().map(|()| Self::Verify)?,
            RecordKind::CHECKPOINT => empty().map(|()| Self::Checkpoint)?,
            RecordKind::CHECKPOINT_DIRTY_PFN_LIST => {
                return Err(OrderError::BackChannel { kind }.into());
            }
            RecordKind::STATIC_DATA_END => empty().map(|()| Self::StaticDataEnd)?,
            RecordKind::X86_CPUID_POLICY => {
                Self::CpuidPolicy(x86::CpuidPolicy::decode(body, context)?)
            }
            RecordKind::X86_MSR_POLICY => Self::MsrPolicy(x86::MsrPolicy::decode(body, context)?),
            other if other.is_optional() => Self::Optional(body),
            other => return Err(DecodeError::UnknownMandatory { kind: other.0 }),
        })
    }
}

const _: () = assert!(PAGE_SIZE == size_of::<Page>());
