//! Page tables of PV guests: mfns in memory, pfns in the stream.
//!
//! C implementation: `xg_sr_save_x86_pv.c:normalise_pagetable`,
//! `xg_sr_restore_x86_pv.c:x86_pv_localise_page`.

use std::ops::RangeInclusive;

use xsr_format::frame::{Mfn, PAGE_SIZE, Page, Pfn};
use xsr_format::record::pv::PvInfo;

use crate::error::GuestError;

/// Entries of a table.
pub(crate) const ENTRIES: usize = PAGE_SIZE / 8;

const PRESENT: u64 = 1 << 0;
const SUPERPAGE: u64 = 1 << 7;
/// Bits 12–51: the frame.
const FRAME_MASK: u64 = ((1 << 52) - 1) & !(PAGE_SIZE as u64 - 1);

pub(crate) const fn pte_frame(pte: u64) -> u64 {
    (pte & FRAME_MASK) >> 12
}

const fn pte_with_frame(pte: u64, frame: u64) -> u64 {
    (pte & !FRAME_MASK) | ((frame << 12) & FRAME_MASK)
}

/// The slots of a table that hold Xen's own mappings, which Xen creates anew on the other side.
fn xen_slots(
    info: PvInfo,
    level: u8,
    entries: &[u64; ENTRIES],
    compat_first: Mfn,
) -> Option<RangeInclusive<usize>> {
    match (info, level) {
        // 0xffff8000'00000000 to 0xffff87ff'ffffffff.
        (PvInfo::Bits64, 4) => Some(256..=271),
        // The guest has four entries; the rest of the page is Xen's.
        (PvInfo::Bits32, 3) => Some(4..=511),
        // 0xf5800000 to 0xffffffff, in the level-2 table that maps the machine-to-physical table
        // there.
        (PvInfo::Bits32, 2) if pte_frame(entries[428]) == compat_first.0 => Some(428..=511),
        _ => None,
    }
}

/// A page table as the stream holds it: pfns instead of mfns, without Xen's mappings.
///
/// `pfn_of` returns the pfn of each mfn that is in the guest's p2m.
///
/// # Errors
///
/// An entry that maps a superpage or a frame that is not the guest's. If the guest has suspended,
/// another attempt does not help.
pub(crate) fn normalise(
    pfn: Pfn,
    level: u8,
    info: PvInfo,
    entries: &[u64; ENTRIES],
    compat_first: Mfn,
    pfn_of: impl Fn(Mfn) -> Option<Pfn>,
) -> Result<Box<Page>, GuestError> {
    if level > info.levels() {
        let levels = info.levels();
        return Err(GuestError::TableLevel { pfn, level, levels });
    }
    let xen = xen_slots(info, level, entries, compat_first);
    let mut out = Box::new([0; PAGE_SIZE]);
    for (index, (&pte, to)) in entries.iter().zip(out.as_chunks_mut().0).enumerate() {
        if xen.as_ref().is_some_and(|slots| slots.contains(&index)) {
            continue;
        }
        let mut value = pte;
        if pte & PRESENT != 0 {
            if level > 1 && pte & SUPERPAGE != 0 {
                return Err(GuestError::Superpage {
                    pfn,
                    level,
                    index,
                    pte,
                });
            }
            let frame = pte_frame(pte);
            let Some(target) = pfn_of(Mfn(frame)) else {
                return Err(GuestError::Pte {
                    pfn,
                    level,
                    index,
                    pte,
                    frame,
                });
            };
            value = pte_with_frame(pte, target.0);
        }
        *to = value.to_le_bytes();
    }
    Ok(out)
}

/// The pfns that the entries of a table in the stream name, in order.
pub(crate) fn frames_needed(table: &Page) -> impl Iterator<Item = Pfn> {
    table.as_chunks().0.iter().filter_map(|bytes| {
        let pte = u64::from_le_bytes(*bytes);
        (pte & PRESENT != 0).then(|| Pfn(pte_frame(pte)))
    })
}

/// Localises a table of the stream, in place: mfns instead of pfns.
///
/// # Errors
///
/// An entry with a pfn for which `mfn_of` has no mfn.
pub(crate) fn localise(
    pfn: Pfn,
    level: u8,
    table: &mut Page,
    mfn_of: impl Fn(Pfn) -> Option<Mfn>,
) -> Result<(), GuestError> {
    for (index, bytes) in table.as_chunks_mut().0.iter_mut().enumerate() {
        let pte = u64::from_le_bytes(*bytes);
        if pte & PRESENT == 0 {
            continue;
        }
        let frame = pte_frame(pte);
        let Some(mfn) = mfn_of(Pfn(frame)) else {
            return Err(GuestError::Pte {
                pfn,
                level,
                index,
                pte,
                frame,
            });
        };
        *bytes = pte_with_frame(pte, mfn.0).to_le_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: Pfn = Pfn(7);
    const COMPAT: Mfn = Mfn(0xc0ffee);

    fn plus_100(mfn: Mfn) -> Option<Pfn> {
        (mfn.0 < 1000).then_some(Pfn(mfn.0 + 100))
    }

    fn entry(table: &Page, index: usize) -> u64 {
        u64::from_le_bytes(table.as_chunks().0[index])
    }

    #[test]
    fn flags_stay_and_frames_change_there_and_back() {
        let mut entries = [0; ENTRIES];
        entries[0] = 1 << 63 | 5 << 12 | 0x67;
        entries[511] = 999 << 12 | 0x1;
        // An entry that is not present may hold anything.
        entries[1] = 0xdead_beef_0000 & !1;
        let mut table = normalise(TABLE, 1, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap();
        assert_eq!(entry(&table, 0), 1 << 63 | 105 << 12 | 0x67);
        assert_eq!(entry(&table, 511), 1099 << 12 | 0x1);
        assert_eq!(entry(&table, 1), entries[1]);
        assert_eq!(
            frames_needed(&table).collect::<Vec<_>>(),
            [Pfn(105), Pfn(1099)]
        );
        localise(TABLE, 1, &mut table, |pfn| Some(Mfn(pfn.0 - 100))).unwrap();
        assert_eq!(entry(&table, 0), entries[0]);
        assert_eq!(entry(&table, 511), entries[511]);
    }

    #[test]
    fn xen_mappings_are_left_out() {
        let entries = [5 << 12 | 1; ENTRIES];
        let l4 = normalise(TABLE, 4, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap();
        for (index, expected) in [
            (255, 105 << 12 | 1),
            (256, 0),
            (271, 0),
            (272, 105 << 12 | 1),
        ] {
            assert_eq!(entry(&l4, index), expected, "level 4, entry {index}");
        }
        let l3 = normalise(TABLE, 3, PvInfo::Bits32, &entries, COMPAT, plus_100).unwrap();
        assert_eq!(entry(&l3, 3), 105 << 12 | 1);
        assert!((4..512).all(|i| entry(&l3, i) == 0));

        let plain = normalise(TABLE, 2, PvInfo::Bits32, &entries, COMPAT, plus_100).unwrap();
        assert_eq!(entry(&plain, 428), 105 << 12 | 1);
        let mut with_xen = entries;
        with_xen[428] = COMPAT.0 << 12 | 1;
        let l2 = normalise(TABLE, 2, PvInfo::Bits32, &with_xen, COMPAT, plus_100).unwrap();
        assert_eq!(entry(&l2, 427), 105 << 12 | 1);
        assert!((428..512).all(|i| entry(&l2, i) == 0));
        // In a 64-bit guest, all of level 3 belongs to the guest.
        let l3 = normalise(TABLE, 3, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap();
        assert_eq!(entry(&l3, 511), 105 << 12 | 1);
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        let mut entries = [0; ENTRIES];
        entries[3] = 5000 << 12 | 1;
        let error = normalise(TABLE, 2, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap_err();
        assert!(
            matches!(
                error,
                GuestError::Pte {
                    pfn: TABLE,
                    level: 2,
                    index: 3,
                    frame: 5000,
                    ..
                }
            ),
            "{error}"
        );
        entries[3] = 5 << 12 | SUPERPAGE | 1;
        let error = normalise(TABLE, 2, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap_err();
        assert!(
            matches!(error, GuestError::Superpage { index: 3, .. }),
            "{error}"
        );
        // In a level-1 entry the same bit is PAT.
        normalise(TABLE, 1, PvInfo::Bits64, &entries, COMPAT, plus_100).unwrap();
        let error = normalise(TABLE, 4, PvInfo::Bits32, &entries, COMPAT, plus_100).unwrap_err();
        assert!(
            matches!(
                error,
                GuestError::TableLevel {
                    level: 4,
                    levels: 3,
                    ..
                }
            ),
            "{error}"
        );
        let mut table = Box::new([0; PAGE_SIZE]);
        table[..8].copy_from_slice(&(9_u64 << 12 | 1).to_le_bytes());
        let error = localise(TABLE, 1, &mut table, |_| None).unwrap_err();
        assert!(
            matches!(
                error,
                GuestError::Pte {
                    index: 0,
                    frame: 9,
                    ..
                }
            ),
            "{error}"
        );
    }
}
