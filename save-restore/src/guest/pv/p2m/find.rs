//! Finding the p2m of a PV guest: from shared_info through the guest's own tables to the frames
//! that hold it.
//!
//! C implementation: `xg_sr_save_x86_pv.c:map_p2m_list`, `map_p2m_tree`.

use xsr_format::frame::{PAGE_SIZE, Page, Pfn};
use xsr_format::record::pv::PvInfo;
use xsr_xen_backend::{Domain, M2p};

use super::{Tables, bad, each, entries_per_frame, word};
use crate::error::{GuestError, SaveError};
use crate::guest::GoOn;
use crate::guest::pv::layout::{cr3_to_frame, shared_info};
use crate::guest::pv::pagetable::pte_frame;

/// The location of a p2m.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The last pfn of the guest.
    pub(super) max_pfn: Pfn,
    /// mfns of the leaves, in order.
    pub(super) leaves: Vec<u64>,
}

impl Place {
    /// Finds the p2m that `shared` (the shared_info page) describes. `go_on` is called after each
    /// batch.
    pub(super) fn find(
        domain: &dyn Domain,
        m2p: &M2p,
        info: PvInfo,
        shared: &Page,
        go_on: &mut GoOn<'_>,
    ) -> Result<Self, SaveError> {
        let end = shared_info::MAX_PFN.get(info, shared);
        let Some(max_pfn) = end.checked_sub(1).map(Pfn) else {
            return Err(bad("shared_info's max_pfn", end));
        };
        if u32::try_from(max_pfn.0).is_err() {
            return Err(GuestError::TooLarge { max_pfn }.into());
        }
        let finder = Finder {
            domain,
            m2p,
            info,
            max_pfn,
        };
        let (max_pfn, leaves) = match shared_info::P2M_CR3.get(info, shared) {
            0 => finder.tree(shared_info::FRAME_LIST_LIST.get(info, shared), go_on)?,
            cr3 => finder.list(cr3, shared_info::P2M_VADDR.get(info, shared), go_on)?,
        };
        Ok(Self { max_pfn, leaves })
    }
}

/// Xen's part of a guest's address space, which cannot hold a p2m.
const fn hypervisor_range(info: PvInfo) -> (u64, u64) {
    match info {
        PvInfo::Bits64 => (0xffff_8000_0000_0000, 0xffff_87ff_ffff_ffff),
        PvInfo::Bits32 => (0xf580_0000, 0xffff_ffff),
    }
}

struct Finder<'a> {
    domain: &'a dyn Domain,
    m2p: &'a M2p,
    info: PvInfo,
    max_pfn: Pfn,
}

impl Finder<'_> {
    fn check(&self, what: &'static str, mfn: u64) -> Result<u64, SaveError> {
        match mfn != 0 && mfn <= self.m2p.max_mfn().0 {
            true => Ok(mfn),
            false => Err(bad(what, mfn)),
        }
    }

    /// The leaves of a three-level tree, starting from its top frame.
    ///
    /// Identical trailing entries of the top cannot be real, because sharing would not survive the
    /// migration. They mean "nothing here", and the guest is treated as ending there.
    fn tree(&self, top: u64, go_on: &mut GoOn<'_>) -> Result<(Pfn, Vec<u64>), SaveError> {
        let fpp = entries_per_frame(self.info);
        let tops = self.max_pfn.0 / (fpp * fpp) + 1;
        if tops > fpp {
            return Err(bad(
                "shared_info's max_pfn, for a p2m tree,",
                self.max_pfn.0,
            ));
        }
        let top = self.check("shared_info's pfn_to_mfn_frame_list_list", top)?;
        let page = Tables::map(self.domain, &[top], go_on)?;
        let mids = each(0..tops, go_on, |i| {
            let mfn = word(&page, self.info, i).unwrap_or(0);
            self.check("an entry of the p2m frame list list", mfn)
        })?;
        let mut max_pfn = self.max_pfn;
        let last_distinct = last_distinct(&mids);
        max_pfn = max_pfn.min(Pfn((last_distinct + 1) * fpp * fpp - 1));
        let used = usize::try_from(max_pfn.0 / (fpp * fpp) + 1).unwrap_or(usize::MAX);
        let page = Tables::map(self.domain, &mids[..used.min(mids.len())], go_on)?;
        let leaves = each(0..=max_pfn.0 / fpp, go_on, |i| {
            let mfn = word(&page, self.info, i).unwrap_or(0);
            self.check("an entry of the p2m frame list", mfn)
        })?;
        Ok((max_pfn, leaves))
    }

    /// The leaves of a linear list at `vaddr` in the address space of `cr3`.
    fn list(
        &self,
        cr3: u64,
        vaddr: u64,
        go_on: &mut GoOn<'_>,
    ) -> Result<(Pfn, Vec<u64>), SaveError> {
        let info = self.info;
        let fpp = entries_per_frame(info);
        let mut max_pfn = self.max_pfn;
        let root = self.check("shared_info's p2m_cr3", cr3_to_frame(info, cr3))?;
        let end = |max_pfn: Pfn| vaddr.checked_add((max_pfn.0 / fpp + 1) * PAGE_SIZE as u64 - 1);
        let (low, high) = hypervisor_range(info);
        let fits = |end: u64| match info {
            PvInfo::Bits64 => is_canonical(vaddr) && is_canonical(end),
            PvInfo::Bits32 => end <= 0xffff_ffff,
        };
        let mut end_vaddr = end(max_pfn)
            .filter(|end| fits(*end) && (vaddr > high || *end < low))
            .ok_or_else(|| bad("shared_info's p2m_vaddr", vaddr))?;
        // From here on, only the bits that the levels translate count.
        let translated = match info {
            PvInfo::Bits64 => 0x0000_ffff_ffff_ffff,
            PvInfo::Bits32 => 0xffff_ffff,
        };
        let mut tables = vec![root];
        // The address at which the first of `tables` begins.
        let mut base = 0;
        for level in (1..=info.levels()).rev() {
            let shift = 3 + 9 * u32::from(level);
            let first = ((vaddr & translated) - base) >> shift;
            let last = ((end_vaddr & translated) - base) >> shift;
            let pages = Tables::map(self.domain, &tables, go_on)?;
            let next = each(first..=last, go_on, |i| {
                let pte = pages
                    .read_u64(usize::try_from(i).unwrap_or(usize::MAX))
                    .unwrap_or(0);
                self.check(
                    "a page-table entry on the way to the p2m list",
                    pte_frame(pte),
                )
            })?;
            if level == 2 {
                // As for the tree: identical trailing entries name one table of nothing. If all
                // entries are identical, they say nothing. (Xen compares the number of that entry
                // with an index that counts from the table's first entry. If the list does not
                // begin there, Xen cuts off the last table although it is a real one; we do not.)
                let keep = last_distinct(&next);
                if keep > 0 && keep + 1 < next.len() as u64 {
                    max_pfn = max_pfn.min(Pfn(keep * 512 * fpp - 1));
                    end_vaddr = end(max_pfn).unwrap_or(end_vaddr);
                }
            }
            base = ((vaddr & translated) >> shift) << shift;
            tables = next;
        }
        Ok((max_pfn, tables))
    }
}

const fn is_canonical(vaddr: u64) -> bool {
    let high = vaddr >> 47;
    high == 0 || high == (1 << 17) - 1
}

/// Index of the entry from which on all entries are identical.
fn last_distinct(entries: &[u64]) -> u64 {
    let mut start = 0;
    for (i, pair) in entries.windows(2).enumerate() {
        if pair[0] != pair[1] {
            start = i + 1;
        }
    }
    start as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_entries_that_are_the_same_are_found() {
        assert_eq!(last_distinct(&[]), 0);
        assert_eq!(last_distinct(&[1]), 0);
        assert_eq!(last_distinct(&[1, 1, 1]), 0);
        assert_eq!(last_distinct(&[1, 2, 3]), 2);
        assert_eq!(last_distinct(&[1, 2, 9, 9, 9]), 2);
        assert_eq!(last_distinct(&[9, 9, 1]), 2);
    }

    #[test]
    fn canonical_addresses() {
        assert!(is_canonical(0));
        assert!(is_canonical(0x7fff_ffff_ffff));
        assert!(!is_canonical(0x8000_0000_0000));
        assert!(!is_canonical(0xffff_7fff_ffff_ffff));
        assert!(is_canonical(0xffff_8000_0000_0000));
        assert!(is_canonical(u64::MAX));
    }
}
