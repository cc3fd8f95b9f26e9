//! Search for the page-table entry that made the hypervisor refuse a vcpu of a PV guest: Xen
//! validates all tables below the vcpu's root, and returns only EINVAL.
//!
//! C: `promote_l4_table` and the functions below it in `xen/arch/x86/mm.c`.

use std::collections::BTreeSet;

use xsr_format::frame::{Gfn, Mfn, Pfn};
use xsr_format::record::pv::PvInfo;
use xsr_xen_backend::{Access, Domain, M2p, PvGuest};

use crate::error::{GuestError, RestoreError};
use crate::guest::pv::p2m::NewP2m;

/// Bits of an entry.
const PRESENT: u64 = 1;
const RW: u64 = 1 << 1;
const SUPERPAGE: u64 = 1 << 7;
/// The frame of an entry: bits 12 to 51.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Entries of a 64-bit top table that belong to the hypervisor.
const XENS: std::ops::Range<usize> = 256..272;

/// The most tables that the search looks at: those of a guest of 32 GiB.
const MOST_TABLES: usize = 1 << 14;

/// The first entry below `root` that no hypervisor accepts; `None` if there is none, or if none was
/// found within the limit.
pub(crate) fn table(
    (domain, guest): (&dyn Domain, &dyn PvGuest),
    p2m: &NewP2m,
    info: PvInfo,
    vcpu: u32,
    root: Pfn,
) -> Result<Option<GuestError>, RestoreError> {
    let m2p = guest.m2p()?;
    let mut seen = BTreeSet::new();
    let mut level_pfns = vec![root];
    for level in (1..=info.levels()).rev() {
        let mut below = Vec::new();
        for pfn in level_pfns {
            if seen.len() > MOST_TABLES || !seen.insert((level, pfn)) {
                continue;
            }
            let Some(mfn) = p2m.mfn(pfn) else {
                continue;
            };
            let pages = domain.map(&[Gfn(mfn.0)], Access::Read)?.all_mapped()?;
            let Some(page) = pages.page(0) else {
                continue;
            };
            for (index, entry) in page.read_entries().into_iter().enumerate() {
                let xens = level == 4 && XENS.contains(&index);
                if entry & PRESENT == 0 || xens {
                    continue;
                }
                match judge(p2m, &m2p, level, entry) {
                    Ok(Some(target)) => below.push(target),
                    Ok(None) => {}
                    Err(target) => {
                        return Ok(Some(GuestError::Table {
                            vcpu,
                            pfn,
                            level,
                            index,
                            target,
                        }));
                    }
                }
            }
        }
        level_pfns = below;
    }
    Ok(None)
}

/// The table that an entry of a table of `level` refers to; `None` for a page; the fault if any.
fn judge(p2m: &NewP2m, m2p: &M2p, level: u8, entry: u64) -> Result<Option<Pfn>, String> {
    let frame = Mfn((entry & FRAME) >> 12);
    if let Some(pfn) = p2m.released(frame) {
        return Err(format!(
            "pfn {pfn}, of which the image says in the end that the guest has no such page"
        ));
    }
    let pfn = m2p.pfn(frame).filter(|pfn| p2m.mfn(*pfn) == Some(frame));
    let Some(pfn) = pfn else {
        // The lowest level may map a granted frame or one of the hypervisor's.
        return match level {
            1 => Ok(None),
            _ => Err(format!(
                "frame {frame}, which does not belong to the guest (the value {entry:#018x} is as the \
                 image has it, unless that page is said to be a page table)"
            )),
        };
    };
    let page_type = p2m.page_type(pfn);
    let table = page_type.table_level();
    match level {
        1 if table.is_some() && entry & RW != 0 => {
            Err(format!("pfn {pfn}, which is a page table, as writable"))
        }
        1 => Ok(None),
        2 if entry & SUPERPAGE != 0 => Err(format!("pfn {pfn} as a superpage")),
        _ if table == Some(level - 1) => Ok(Some(pfn)),
        _ => {
            let is = match table {
                Some(table) => format!("a page table of level {table}"),
                None => "no page table".to_owned(),
            };
            Err(format!(
                "pfn {pfn}, which is {is} in the image and must be one of level {}",
                level - 1
            ))
        }
    }
}
