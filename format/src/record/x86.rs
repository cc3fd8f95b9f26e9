//! Records common to x86 guests: X86_TSC_INFO, X86_CPUID_POLICY, X86_MSR_POLICY.
//!
//! Specification: sections of those names. C implementation:
//! `xg_sr_common_x86.c`; layouts of `xen_cpuid_leaf_t` and `xen_msr_entry_t` in
//! `xen/include/public/arch-x86/xen.h`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, elements, whole};
use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, Reserved};
use crate::wire::{U32, U64};

/// X86_TSC_INFO, encoded as in the stream.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | mode |
/// | 4–7 | kHz |
/// | 8–15 | nsec |
/// | 16–19 | incarnation |
/// | 20–23 | reserved, zero |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireTscInfo {
    mode: U32,
    khz: U32,
    nsec: U64,
    incarnation: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<WireTscInfo>() == 24);

/// X86_TSC_INFO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TscInfo {
    /// Mode 0–3.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Elapsed time in nanoseconds.
    pub nsec: u64,
    /// Counts migrations.
    pub incarnation: u32,
}

impl TscInfo {
    /// The last mode that any Xen has had.
    const MAX_MODE: u32 = 3;

    pub(crate) fn decode(body: &[u8], context: Context) -> Result<Self, DecodeError> {
        let order = context.order;
        let wire = whole::<WireTscInfo>(body)?;
        Reserved {
            lenient: context.lenient,
            structure: "X86_TSC_INFO",
        }
        .zero("reserved bytes", 20, u64::from(wire.reserved.get(order)))?;
        let mode = wire.mode.get(order);
        if mode > Self::MAX_MODE {
            return Err(DecodeError::TscMode { got: mode });
        }
        Ok(Self {
            mode,
            khz: wire.khz.get(order),
            nsec: wire.nsec.get(order),
            incarnation: wire.incarnation.get(order),
        })
    }

    pub(crate) fn encode(self, order: ByteOrder) -> WireTscInfo {
        WireTscInfo {
            mode: U32::new(self.mode, order),
            khz: U32::new(self.khz, order),
            nsec: U64::new(self.nsec, order),
            incarnation: U32::new(self.incarnation, order),
            reserved: U32::new(0, order),
        }
    }
}

/// A CPUID leaf, encoded as in the stream: six u32.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireCpuidLeaf([U32; 6]);

const _: () = assert!(size_of::<WireCpuidLeaf>() == CpuidPolicy::LEAF_BYTES);

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// Input eax.
    pub leaf: u32,
    /// Input ecx, or 0xffffffff if the leaf has no subleaves.
    pub subleaf: u32,
    /// Output eax.
    pub eax: u32,
    /// Output ebx.
    pub ebx: u32,
    /// Output ecx.
    pub ecx: u32,
    /// Output edx.
    pub edx: u32,
}

impl CpuidLeaf {
    /// The leaf, encoded as in the stream.
    pub fn encode(self, order: ByteOrder) -> [u8; CpuidPolicy::LEAF_BYTES] {
        let Self {
            leaf,
            subleaf,
            eax,
            ebx,
            ecx,
            edx,
        } = self;
        let fields = [leaf, subleaf, eax, ebx, ecx, edx];
        zerocopy::transmute!(WireCpuidLeaf(fields.map(|field| U32::new(field, order))))
    }
}

/// X86_CPUID_POLICY: one or more leaves.
#[derive(Clone, Copy, Debug)]
pub struct CpuidPolicy<'a> {
    leaves: &'a [WireCpuidLeaf],
    order: ByteOrder,
}

impl<'a> CpuidPolicy<'a> {
    /// Bytes of a leaf.
    pub const LEAF_BYTES: usize = 24;

    pub(crate) fn decode(body: &'a [u8], context: Context) -> Result<Self, DecodeError> {
        let expected = Length::MultipleOf(Self::LEAF_BYTES as u64);
        Context::length(body.len(), !body.is_empty(), expected)?;
        Ok(Self {
            leaves: elements(body, expected)?,
            order: context.order,
        })
    }

    /// The leaves, in the order of the stream.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = CpuidLeaf> + 'a {
        let order = self.order;
        self.leaves.iter().map(move |wire| {
            let [leaf, subleaf, eax, ebx, ecx, edx] = wire.0.map(|field| field.get(order));
            CpuidLeaf {
                leaf,
                subleaf,
                eax,
                ebx,
                ecx,
                edx,
            }
        })
    }
}

/// An MSR of the policy, encoded as in the stream.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | index |
/// | 4–7 | flags, zero |
/// | 8–15 | value |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireMsr {
    index: U32,
    flags: U32,
    value: U64,
}

const _: () = assert!(size_of::<WireMsr>() == MsrPolicy::ENTRY_BYTES);

/// One MSR of the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrEntry {
    /// The MSR.
    pub index: u32,
    /// Flags. Xen has defined none so far, and refuses a policy that sets one.
    pub flags: u32,
    /// Its value.
    pub value: u64,
}

impl MsrEntry {
    /// The entry, encoded as in the stream.
    pub fn encode(self, order: ByteOrder) -> [u8; MsrPolicy::ENTRY_BYTES] {
        let Self {
            index,
            flags,
            value,
        } = self;
        zerocopy::transmute!(WireMsr {
            index: U32::new(index, order),
            flags: U32::new(flags, order),
            value: U64::new(value, order),
        })
    }
}

/// X86_MSR_POLICY: one or more MSRs.
#[derive(Clone, Copy, Debug)]
pub struct MsrPolicy<'a> {
    entries: &'a [WireMsr],
    order: ByteOrder,
}

impl<'a> MsrPolicy<'a> {
    /// Bytes of an entry.
    pub const ENTRY_BYTES: usize = 16;

    pub(crate) fn decode(body: &'a [u8], context: Context) -> Result<Self, DecodeError> {
        let expected = Length::MultipleOf(Self::ENTRY_BYTES as u64);
        Context::length(body.len(), !body.is_empty(), expected)?;
        Ok(Self {
            entries: elements(body, expected)?,
            order: context.order,
        })
    }

    /// The MSRs, in the order of the stream.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = MsrEntry> + 'a {
        let order = self.order;
        self.entries.iter().map(move |wire| MsrEntry {
            index: wire.index.get(order),
            flags: wire.flags.get(order),
            value: wire.value.get(order),
        })
    }
}
