//! Records of PV guests: X86_PV_INFO, X86_PV_P2M_FRAMES, X86_PV_VCPU_*.
//!
//! Specification: sections of those names. C implementation:
//! `xg_sr_save_x86_pv.c`, `xg_sr_restore_x86_pv.c`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, RecordKind, elements, head, whole};
use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, Reserved};
use crate::frame::{PAGE_SIZE, Pfn};
use crate::order::OrderError;
use crate::wire::{U16, U32, U64};

/// X86_PV_INFO, encoded as in the stream.
///
/// | octets | field |
/// |---|---|
/// | 0 | guest width in octets |
/// | 1 | page-table levels |
/// | 2–7 | reserved, zero |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WirePvInfo {
    width: u8,
    levels: u8,
    reserved1: U16,
    reserved2: U32,
}

const _: () = assert!(size_of::<WirePvInfo>() == 8);

/// X86_PV_INFO: the width of a PV guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PvInfo {
    /// 32 bits, three levels of page tables (PAE).
    Bits32,
    /// 64 bits, four levels.
    Bits64,
}

impl PvInfo {
    /// The guest with this width in bytes, 4 or 8.
    pub const fn from_width(width: u8) -> Option<Self> {
        match width {
            4 => Some(Self::Bits32),
            8 => Some(Self::Bits64),
            _ => None,
        }
    }

    /// Bytes in the guest's machine word: 4 or 8.
    pub const fn width(self) -> u8 {
        match self {
            Self::Bits32 => 4,
            Self::Bits64 => 8,
        }
    }

    /// Levels of page tables: 3 or 4.
    pub const fn levels(self) -> u8 {
        match self {
            Self::Bits32 => 3,
            Self::Bits64 => 4,
        }
    }

    pub(crate) fn decode(body: &[u8], context: Context) -> Result<Self, DecodeError> {
        let wire = whole::<WirePvInfo>(body)?;
        let info = match (wire.width, wire.levels) {
            (4, 3) => Self::Bits32,
            (8, 4) => Self::Bits64,
            (width, levels) => return Err(DecodeError::PvInfo { width, levels }),
        };
        Reserved {
            lenient: context.lenient,
            structure: "X86_PV_INFO",
        }
        .zero(
            "reserved bytes",
            2,
            u64::from(wire.reserved1.get(context.order)),
        )?
        .zero(
            "reserved bytes",
            4,
            u64::from(wire.reserved2.get(context.order)),
        )?;
        Ok(info)
    }

    pub(crate) fn encode(self) -> WirePvInfo {
        WirePvInfo {
            width: self.width(),
            levels: self.levels(),
            reserved1: U16::default(),
            reserved2: U32::default(),
        }
    }
}

/// The head of X86_PV_P2M_FRAMES.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | first pfn of the range |
/// | 4–7 | last pfn of the range, inclusive |
/// | 8… | u64 pfn of each p2m frame that covers the range |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireP2mHead {
    pub(crate) start: U32,
    pub(crate) end: U32,
}

/// X86_PV_P2M_FRAMES.
#[derive(Clone, Copy, Debug)]
pub struct P2mFrames<'a> {
    /// First pfn that the frames cover.
    pub start: Pfn,
    /// Last pfn that the frames cover, inclusive.
    pub end: Pfn,
    /// Index of the first listed frame in the whole p2m.
    pub first_frame: u64,
    frames: &'a [U64],
    order: ByteOrder,
}

/// Number of p2m frames that cover the inclusive range of pfns, for a guest of this width. Never
/// wraps, even if `end` is the last possible pfn.
pub const fn p2m_frame_count(start: u32, end: u32, info: PvInfo) -> u64 {
    let shift = match info {
        PvInfo::Bits32 => 10,
        PvInfo::Bits64 => 9,
    };
    // At most 2^23, so the sum cannot wrap.
    ((end >> shift) as u64)
        .saturating_sub((start >> shift) as u64)
        .saturating_add(1)
}

const _: () = assert!(PAGE_SIZE / 4 == 1 << 10 && PAGE_SIZE / 8 == 1 << 9);

impl<'a> P2mFrames<'a> {
    pub(crate) fn decode(body: &'a [u8], context: Context) -> Result<Self, DecodeError> {
        let order = context.order;
        let info = context
            .guest_width
            .and_then(PvInfo::from_width)
            .ok_or(OrderError::Needs {
                kind: RecordKind::X86_PV_P2M_FRAMES,
                missing: RecordKind::X86_PV_INFO,
            })?;
        let (wire, rest) = head::<WireP2mHead>(body)?;
        let (start, end) = (wire.start.get(order), wire.end.get(order));
        if start > end {
            return Err(DecodeError::P2mRange { start, end });
        }
        let count = p2m_frame_count(start, end, info);
        let expected = Length::Exactly(count.saturating_mul(8).saturating_add(8));
        Context::length(
            body.len(),
            rest.len() as u64 == count.saturating_mul(8),
            expected,
        )?;
        let frames = elements::<U64>(rest, expected)?;
        let shift = match info {
            PvInfo::Bits32 => 10,
            PvInfo::Bits64 => 9,
        };
        Ok(Self {
            start: Pfn(u64::from(start)),
            end: Pfn(u64::from(end)),
            first_frame: u64::from(start >> shift),
            frames,
            order,
        })
    }

    /// Whether the body is encoded as current writers encode it.
    pub(crate) fn is_little_endian(&self) -> bool {
        self.order == ByteOrder::Little
    }

    /// The pfns of the p2m's frames, in order.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = Pfn> + 'a {
        let order = self.order;
        self.frames.iter().map(move |pfn| Pfn(pfn.get(order)))
    }
}

/// The head of X86_PV_VCPU_*.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | vcpu id |
/// | 4–7 | reserved, zero |
/// | 8… | the blob |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireVcpuHead {
    pub(crate) vcpu: U32,
    pub(crate) reserved: U32,
}

/// X86_PV_VCPU_{BASIC,EXTENDED,XSAVE,MSRS}: one of Xen's blobs for one vcpu.
#[derive(Clone, Copy, Debug)]
pub struct VcpuState<'a> {
    /// The vcpu.
    pub vcpu: u32,
    /// The blob. If it is empty, which readers accept (erratum 1), it is ignored.
    pub state: &'a [u8],
}

/// Bytes of `vcpu_guest_context` for a guest of this width.
pub const fn vcpu_basic_bytes(info: PvInfo) -> usize {
    match info {
        PvInfo::Bits32 => 0xaf0,
        PvInfo::Bits64 => 0x1430,
    }
}

/// Maximum size of an XSAVE area; that of a processor with AMX has 11 KiB.
const MAX_XSAVE: usize = 1 << 20;

/// The length that a blob of this kind must have, without its head. Does not apply to empty blobs,
/// which erratum 1 tolerates.
pub(crate) fn vcpu_state_length(kind: RecordKind, info: PvInfo, len: usize) -> Option<Length> {
    let basic = vcpu_basic_bytes(info);
    match kind {
        RecordKind::X86_PV_VCPU_BASIC if len != basic => Some(Length::Exactly(basic as u64)),
        RecordKind::X86_PV_VCPU_EXTENDED if len > 128 => Some(Length::AtMost(128)),
        RecordKind::X86_PV_VCPU_XSAVE if len < 16 => Some(Length::AtLeast(16)),
        RecordKind::X86_PV_VCPU_XSAVE if len > MAX_XSAVE => Some(Length::AtMost(MAX_XSAVE as u64)),
        RecordKind::X86_PV_VCPU_MSRS if !len.is_multiple_of(16) => Some(Length::MultipleOf(16)),
        _ => None,
    }
}

impl<'a> VcpuState<'a> {
    pub(crate) fn decode(
        kind: RecordKind,
        body: &'a [u8],
        context: Context,
    ) -> Result<Self, DecodeError> {
        let order = context.order;
        let info = context
            .guest_width
            .and_then(PvInfo::from_width)
            .ok_or(OrderError::Needs {
                kind,
                missing: RecordKind::X86_PV_INFO,
            })?;
        let (wire, state) = head::<WireVcpuHead>(body)?;
        Reserved {
            lenient: context.lenient,
            structure: kind.name().unwrap_or("vcpu record"),
        }
        .zero("reserved bytes", 4, u64::from(wire.reserved.get(order)))?;
        if !state.is_empty()
            && let Some(expected) = vcpu_state_length(kind, info, state.len())
        {
            return Err(DecodeError::BlobLength {
                kind,
                expected,
                got: state.len() as u64,
            });
        }
        Ok(Self {
            vcpu: wire.vcpu.get(order),
            state,
        })
    }
}
