//! Records of HVM and PVH guests: HVM_PARAMS. (HVM_CONTEXT is Xen's own blob.)
//!
//! Specification: "HVM_PARAMS". C implementation: `xg_sr_save_x86_hvm.c`,
//! `xg_sr_restore_x86_hvm.c`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, elements, head};
use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, Reserved};
use crate::wire::{U32, U64};

/// The head of HVM_PARAMS.
///
/// | octets | field |
/// |---|---|
/// | 0–3 | count |
/// | 4–7 | reserved, zero |
/// | 8… | count × (u64 index, u64 value) |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireHvmParamsHead {
    pub(crate) count: U32,
    pub(crate) reserved: U32,
}

/// One parameter, encoded as in the stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireHvmParam {
    pub(crate) index: U64,
    pub(crate) value: U64,
}

/// One HVM parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvmParam {
    /// `HVM_PARAM_*`.
    pub index: u64,
    /// Its value.
    pub value: u64,
}

/// HVM_PARAMS. Readers accept an empty list (erratum 1); writers never write one.
#[derive(Clone, Copy, Debug)]
pub struct HvmParams<'a> {
    entries: &'a [WireHvmParam],
    order: ByteOrder,
}

impl<'a> HvmParams<'a> {
    pub(crate) fn decode(body: &'a [u8], context: Context) -> Result<Self, DecodeError> {
        let order = context.order;
        let (wire, rest) = head::<WireHvmParamsHead>(body)?;
        Reserved {
            lenient: context.lenient,
            structure: "HVM_PARAMS",
        }
        .zero("reserved bytes", 4, u64::from(wire.reserved.get(order)))?;
        let count = wire.count.get(order);
        let expected = Length::Exactly(u64::from(count).saturating_mul(16).saturating_add(8));
        let bytes = u64::from(count).saturating_mul(16);
        Context::length(body.len(), rest.len() as u64 == bytes, expected)?;
        let entries = elements::<WireHvmParam>(rest, expected)?;
        Ok(Self { entries, order })
    }

    /// The parameters, in the order of the stream.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = HvmParam> + 'a {
        let order = self.order;
        self.entries.iter().map(move |entry| HvmParam {
            index: entry.index.get(order),
            value: entry.value.get(order),
        })
    }
}
