//! Detection of legacy streams, and of whether a 32-bit or a 64-bit toolstack wrote one.
//!
//! A legacy stream has no header. It begins with `p2m_size`, an `unsigned long` of the toolstack
//! that wrote it: 4 or 8 bytes. So bytes 4–7 are either the upper half of `p2m_size` or the first
//! word of what follows it:
//!
//! | toolstack | bytes 4–7 | values |
//! |---|---|---|
//! | 64-bit | `p2m_size` bits 32–63 | 0 |
//! | 32-bit, PV guest | mark of the extended info | 0xFFFFFFFF |
//! | 32-bit, HVM guest | first chunk: a page count | 1 to 1024 |
//! | 32-bit, HVM guest | first chunk: another kind | −1 to −20; 0 would mean no pages |
//!
//! The specification tells the two apart by whether bytes 4–7 are zero, "since p2m_size < 2^32".
//! This code does not rely on that. The saver took the size from `xc_domain_maximum_gpfn`, which
//! returned an `int`, and refused to save beyond [`MAX_P2M_SIZE`], because an entry of a page batch
//! has 28 bits for the pfn. So each reading is checked in full. Bytes that no saver can have
//! written under either reading are refused, and the error shows both readings. No bytes are valid
//! under both: one requires bytes 4–7 to be zero, the other requires that they are not.
//!
//! Legacy streams are little endian: only x86 wrote them. Specification: libxc migration stream,
//! "Legacy Images". C implementation (as of Xen 4.4): `tools/libxc/xc_domain_save.c`;
//! `tools/python/scripts/convert-legacy-stream`, which does not detect the width but takes it as an
//! option.

use std::fmt;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;
use crate::wire::U32;

/// The largest `p2m_size` that the legacy saver accepted, in pages (1 TiB).
pub const MAX_P2M_SIZE: u32 = 0x0fff_ffff;

/// Maximum number of pages in one batch.
pub const MAX_BATCH: u32 = 1024;

/// The lowest existing chunk marker.
const LAST_CHUNK: i32 = -20;

/// Number of bytes that detection needs.
pub const BYTES: usize = 8;

/// The first bytes of a legacy stream.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | `p2m_size` bits 0–31 |
/// | 4–7 | `p2m_size` bits 32–63, or what follows it |
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireLegacyStart {
    low: U32,
    high: U32,
}

const _: () = assert!(size_of::<WireLegacyStart>() == BYTES);

/// The width of the `unsigned long` of the toolstack that wrote a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToolstackWidth {
    /// 4 bytes.
    Bits32,
    /// 8 bytes.
    Bits64,
}

impl ToolstackWidth {
    /// Bytes in an `unsigned long`.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::Bits32 => 4,
            Self::Bits64 => 8,
        }
    }
}

impl fmt::Display for ToolstackWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bits32 => "32-bit toolstack",
            Self::Bits64 => "64-bit toolstack",
        })
    }
}

/// The start of a legacy stream, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LegacyStart {
    /// The width of the toolstack that wrote it.
    pub width: ToolstackWidth,
    /// Number of guest frames, 1 to [`MAX_P2M_SIZE`].
    pub p2m_size: u32,
}

/// Bytes that no legacy saver wrote.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LegacyDetectError {
    /// Neither reading is possible.
    #[error(
        "no legacy stream: as a 64-bit toolstack's it would have a p2m_size of {as_64:#x}, \
         as a 32-bit toolstack's a p2m_size of {as_32:#x} and then {next:#010x}; expected \
         a p2m_size of 1 to {MAX_P2M_SIZE:#x}, and after a 32-bit one 0xffffffff, a page \
         count of 1 to {MAX_BATCH} or a chunk of -1 to {LAST_CHUNK}"
    )]
    Impossible {
        /// `p2m_size` if a 64-bit toolstack wrote it.
        as_64: u64,
        /// `p2m_size` if a 32-bit toolstack wrote it.
        as_32: u32,
        /// In that case, the word after it.
        next: u32,
    },
}

/// Detects the toolstack's width from the first eight bytes of a legacy stream. Call it only for
/// bytes that no other format begins with.
///
/// # Errors
///
/// No legacy saver can have written the bytes.
pub fn detect(first: [u8; BYTES]) -> Result<LegacyStart, LegacyDetectError> {
    const LE: ByteOrder = ByteOrder::Little;
    let wire: WireLegacyStart = zerocopy::transmute!(first);
    let (low, high) = (wire.low.get(LE), wire.high.get(LE));
    let possible_size = (1..=MAX_P2M_SIZE).contains(&low);
    let marker = i32::from_le_bytes(high.to_le_bytes());
    let possible_next = (1..=MAX_BATCH).contains(&high) || (LAST_CHUNK..0).contains(&marker);
    let width = match high {
        0 if possible_size => ToolstackWidth::Bits64,
        _ if possible_size && possible_next => ToolstackWidth::Bits32,
        _ => {
            return Err(LegacyDetectError::Impossible {
                as_64: u64::from_le_bytes(first),
                as_32: low,
                next: high,
            });
        }
    };
    Ok(LegacyStart {
        width,
        p2m_size: low,
    })
}

/// Whether some bytes, preferably many, are the start of a legacy stream: checks the first eight
/// bytes, and whether what follows is possible. This tells streams from other files that begin with
/// numbers.
///
/// | next | checked |
/// |---|---|
/// | extended info | its length, and the name of its first block |
/// | a batch | its entries: type, pfn below the guest's size, in ascending order |
/// | another chunk | nothing |
/// | frames of the p2m | whether the first is within the guest |
pub fn detect_in(prefix: &[u8]) -> Option<LegacyStart> {
    let start = detect(*prefix.first_chunk()?).ok()?;
    let rest = prefix.get(start.width.bytes()..)?;
    can_follow(start, rest).then_some(start)
}

/// Whether these bytes can follow the size of such a stream. Missing bytes are assumed to be valid.
fn can_follow(start: LegacyStart, rest: &[u8]) -> bool {
    /// Enough for the contexts of a vcpu, and some unknown blocks.
    const MAX_EXTENDED_INFO: u32 = 1 << 20;
    let word = |at: usize| {
        let end = at.checked_add(4)?;
        Some(u32::from_le_bytes(rest.get(at..end)?.try_into().ok()?))
    };
    let long = start.width.bytes();
    let Some(first) = word(0) else {
        return true;
    };
    match first {
        u32::MAX => {
            let upper = match start.width {
                ToolstackWidth::Bits32 => None,
                ToolstackWidth::Bits64 => word(4),
            };
            let length = word(long).unwrap_or(0);
            let name_at = long.saturating_add(4);
            let name = match length {
                0 => &[],
                _ => rest.get(name_at..).unwrap_or_default(),
            };
            let name = name.get(..4).unwrap_or(name);
            upper.is_none_or(|upper| upper == u32::MAX)
                && length <= MAX_EXTENDED_INFO
                && name.iter().all(u8::is_ascii_graphic)
        }
        1..=MAX_BATCH => {
            let entries = rest.get(4..).unwrap_or_default().chunks_exact(long);
            let count = usize::try_from(first).unwrap_or(0);
            // Savers went through the pfns in ascending order.
            let mut lowest = 0;
            entries.take(count).all(|entry| {
                let Some(pfn) = can_be_entry(entry, start.p2m_size) else {
                    return false;
                };
                let ascends = pfn.is_none_or(|pfn| pfn >= lowest);
                lowest = pfn.map_or(lowest, |pfn| pfn.saturating_add(1));
                ascends
            })
        }
        // The end of a stream without a page.
        0 => false,
        // Another chunk.
        0xffff_ffec.. => true,
        // Frames of the p2m: a PV guest without extended info (Xen 3.0).
        frame => {
            let upper = match start.width {
                ToolstackWidth::Bits32 => None,
                ToolstackWidth::Bits64 => word(4),
            };
            frame < start.p2m_size && upper.is_none_or(|upper| upper == 0)
        }
    }
}

/// Whether this can be an entry of a batch: a type in the upper four bits of the lower word, the
/// pfn below it. Returns the pfn, which an entry without meaning does not have.
fn can_be_entry(entry: &[u8], p2m_size: u32) -> Option<Option<u32>> {
    const FILLER: u32 = 0xf000_0000;
    let (low, high) = entry.split_first_chunk()?;
    let low = u32::from_le_bytes(*low);
    let pfn = low & MAX_P2M_SIZE;
    // Types 5 to 8 do not exist.
    let is_type = !(5..=8).contains(&(low >> 28));
    let is_filler = low == FILLER;
    let possible = is_type && high.iter().all(|byte| *byte == 0);
    match (possible, is_filler) {
        (false, _) => None,
        (true, true) => Some(None),
        (true, false) => (pfn < p2m_size).then_some(Some(pfn)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn bytes(low: u32, high: u32) -> [u8; BYTES] {
        (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
    }

    /// From the review of the format's draft B: "the legacy 32/64-bit test relies on p2m_size <
    /// 2^32, which the interface truncates to an int anyway". Tests both sides of each limit, and
    /// that errors contain both readings.
    #[test]
    fn the_legacy_32_64_bit_test_relies_on_p2m_size() {
        let found = |low, high| detect(bytes(low, high)).map(|start| (start.width, start.p2m_size));
        let impossible = |low, high| {
            Err(LegacyDetectError::Impossible {
                as_64: u64::from(high) << 32 | u64::from(low),
                as_32: low,
                next: high,
            })
        };
        for size in [1, 0x8000, MAX_P2M_SIZE] {
            assert_eq!(found(size, 0), Ok((ToolstackWidth::Bits64, size)));
            // Extended info of a PV guest; first and last chunk; shortest and longest batch.
            for next in [u32::MAX, 0xffff_fffe, 0xffff_ffec, 1, MAX_BATCH] {
                assert_eq!(found(size, next), Ok((ToolstackWidth::Bits32, size)));
            }
            // Not a chunk, not a batch; and sizes from 2^32 on under the other reading.
            for next in [
                0xffff_ffeb,
                i32::MIN.cast_unsigned(),
                MAX_BATCH + 1,
                0x7fff_ffff,
            ] {
                assert_eq!(found(size, next), impossible(size, next));
            }
        }
        // No pages; more than a batch entry can name; more than fits in an int.
        for size in [0, MAX_P2M_SIZE + 1, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            for next in [0, 1, u32::MAX] {
                assert_eq!(found(size, next), impossible(size, next));
            }
        }
    }

    fn start_of(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn what_cannot_follow_the_size_is_no_legacy_stream() {
        let good: [&[u32]; 8] = [
            // 64-bit toolstack: a batch of two; extended info; a chunk; frames of the p2m.
            &[0x1000, 0, 2, 0x10, 0, 0xf000_0fff, 0],
            &[0x1000, 0, u32::MAX, u32::MAX, 8 + 0x1430, 0x7570_6376],
            &[0x1000, 0, 0xffff_fff9, 1, 2, 3],
            &[0x1000, 0, 0xfff, 0, 7, 0],
            // 32-bit toolstack: a batch that is longer than the bytes given; extended info.
            &[0x1000, 1024, 0x10, 0x9000_0020, 0xf000_0000],
            &[0x1000, u32::MAX, 8 + 0xaf0, 0x7570_6376],
            &[0x1000, u32::MAX, 0],
            // Cut off.
            &[0x1000, 0],
        ];
        for words in good {
            assert!(detect_in(&start_of(words)).is_some(), "{words:x?}");
        }
        let bad: [&[u32]; 10] = [
            // Text in UTF-32.
            &[0xfeff, 0x31, 0xd, 0xa, 0x30, 0x30],
            &[0x1000, 0, 0, 0, 0],
            &[0x1000, 0, 0x1000, 0],
            &[0x1000, 0, 0xfff, 1],
            // A zip archive (a pfn far beyond the guest), whose magic is checked before.
            &[0x0403_4b50, 20, 0x0da8_0008, 0x5c00_2fd9],
            &[0x1000, 0, 2, 0x10, 1],
            &[0x1000, 0, 2, 0x1000, 0],
            &[0x1000, 0, 1, 0x5000_0001, 0],
            &[0x1000, 0, u32::MAX, 0, 8 + 0x1430, 0x7570_6376],
            &[0x1000, u32::MAX, 12, 0x0101_0101],
        ];
        for words in bad {
            assert_eq!(detect_in(&start_of(words)), None, "{words:x?}");
        }
    }

    #[test]
    fn the_error_names_both_readings() {
        let error = detect(bytes(0x1234_5678, 0x0abc_def0)).unwrap_err();
        let text = error.to_string();
        for part in [
            "0xabcdef012345678",
            "0x12345678",
            "0x0abcdef0",
            "0xfffffff",
            "1024",
            "-20",
        ] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
}
