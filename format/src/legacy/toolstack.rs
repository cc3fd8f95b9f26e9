//! libxl's record in a legacy toolstack chunk: where qemu has mapped its memory. A libxl stream of
//! version 2 stores this as xenstore data.
//!
//! | bytes | field |
//! |---|---|
//! | 0–3 | version, 1 |
//! | 4–7 | number of regions |
//! | … | regions: u64 phys_offset, u64 start_addr, u64 size, u32 length of name, name with NUL |
//!
//! A 64-bit toolstack also counts four bytes of padding that its compiler put at the end of the
//! structure. The name begins in this padding, and four stray bytes follow.
//!
//! C implementation: `libxl__toolstack_save` in `tools/libxl/libxl_dom.c` (Xen 4.5);
//! `convert-legacy-stream`.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::detect::ToolstackWidth;
use super::error::LegacyError;
use crate::byte_order::ByteOrder;
use crate::error::ReadErrorCause;
use crate::wire::{U32, U64};
use crate::wrapper::libxl::XenstoreData;

/// The header of the record.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | version |
/// | 4–7 | regions |
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHead {
    version: U32,
    count: U32,
}

/// The header of each region.
///
/// | bytes | field |
/// |---|---|
/// | 0–7 | phys_offset |
/// | 8–15 | start_addr |
/// | 16–23 | size |
/// | 24–27 | length of the name with its NUL |
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRegion {
    phys_offset: U64,
    start_addr: U64,
    size: U64,
    name_length: U32,
}

const _: () = {
    assert!(size_of::<WireHead>() == 8);
    assert!(size_of::<WireRegion>() == 28);
};

/// Converts such a record to xenstore keys and values.
///
/// # Errors
///
/// Another version, a record that is too short or too long, or an invalid name.
pub(super) fn xenstore_data(
    record: &[u8],
    width: ToolstackWidth,
) -> Result<XenstoreData, ReadErrorCause> {
    const LE: ByteOrder = ByteOrder::Little;
    let length = |what, expected: u64, got: &[u8]| LegacyError::ToolstackLength {
        what,
        expected,
        got: got.len() as u64,
    };
    let (head, mut rest) =
        WireHead::read_from_prefix(record).map_err(|_| length("head", 8, record))?;
    let version = head.version.get(LE);
    if version != 1 {
        return Err(LegacyError::ToolstackVersion { got: version }.into());
    }
    let mut raw = Vec::new();
    for region in 0..head.count.get(LE) {
        let (wire, behind) =
            WireRegion::read_from_prefix(rest).map_err(|_| length("head of a region", 28, rest))?;
        let name_length = wire.name_length.get(LE) as usize;
        let stray = match width {
            ToolstackWidth::Bits32 => 0,
            ToolstackWidth::Bits64 => 4,
        };
        let whole = name_length.saturating_add(stray);
        let (name, behind) = behind
            .split_at_checked(whole)
            .and_then(|(name, behind)| Some((name.get(..name_length)?, behind)))
            .ok_or_else(|| length("name of a region", whole as u64, behind))?;
        rest = behind;
        let name = name
            .strip_suffix(&[0])
            .filter(|name| !name.contains(&0))
            .ok_or(LegacyError::ToolstackName { region })?;
        let root = format!("physmap/{:x}", wire.phys_offset.get(LE));
        let (start, size) = (wire.start_addr.get(LE), wire.size.get(LE));
        for (key, value) in [
            ("start_addr", format!("{start:x}").as_bytes()),
            ("size", format!("{size:x}").as_bytes()),
            ("name", name),
        ] {
            raw.extend_from_slice(format!("{root}/{key}\0").as_bytes());
            raw.extend_from_slice(value);
            raw.push(0);
        }
    }
    if !rest.is_empty() {
        return Err(length("end", 0, rest).into());
    }
    Ok(XenstoreData::parse(raw)?)
}
