//! Populating a guest: memory for pages when the stream first names them, and giving back the pages
//! that the stream finally marks as absent.
//!
//! C implementation: `xg_sr_restore.c:populate_pfns`, which gives nothing back.

use xsr_format::frame::{Gfn, Mfn, PageEntry, PageType, Pfn};
use xsr_xen_backend::Domain;

use crate::bitmap::PfnBitmap;
use crate::error::RestoreError;
use crate::restore::RestoreStats;
use crate::restore::ahead::Plan;

/// log2 of the pages in a 2 MiB superpage.
const SUPERPAGE_ORDER: u8 = 9;
const SUPERPAGE: usize = 1 << SUPERPAGE_ORDER;
/// Pages in a 2 MiB superpage.
pub(super) const SUPERPAGE_PAGES: u64 = 1 << SUPERPAGE_ORDER;

/// log2 of the pages in a 1 GiB superpage.
const GIB_ORDER: u8 = 18;
/// Pages in a 1 GiB superpage.
pub(super) const GIB_PAGES: u64 = 1 << GIB_ORDER;

/// The most 2 MiB superpages that are requested at a time, if it is known that they will be needed.
const SUPERPAGES: usize = 64;

/// The most pages that are given back at a time.
const RELEASE_BATCH: usize = 1024;

/// Which pfns are populated, and which of these will be given back.
#[derive(Debug, Default)]
pub(super) struct Populated {
    pfns: PfnBitmap,
    /// pfns that are absent by the stream's last entry so far.
    absent: PfnBitmap,
    /// The planned superpages, if the whole stream could be looked at.
    plan: Option<Plan>,
}

impl Populated {
    pub(super) fn new(plan: Option<Plan>) -> Self {
        Self {
            plan,
            ..Self::default()
        }
    }

    /// Records whether the stream's entry marks a page as absent. A guest gives pages back while it
    /// is being saved (XTAB after contents), and a page table that is sent later is marked as
    /// absent at first: only the last entry counts.
    ///
    /// `tables`: the guest's page tables may populate a page that the stream has only ever marked
    /// as absent.
    pub(super) fn note(&mut self, entry: PageEntry, tables: bool) {
        if entry.page_type != PageType::XTAB {
            self.absent.remove(entry.pfn);
        } else if tables || self.pfns.finds(entry.pfn) {
            // Without page tables, a stream that marks large pfns as absent costs no memory.
            self.absent.insert(entry.pfn);
        }
    }

    /// The stream has ended: gives back populated pages that are absent by their last entry.
    /// Returns how many pages that were.
    ///
    /// `frame` returns the frame of a populated pfn; `gone` is called for each pfn that has lost
    /// its frame. `go_on` is called before each batch.
    pub(super) fn release_absent(
        &mut self,
        domain: &dyn Domain,
        frame: impl Fn(Pfn) -> Gfn,
        mut gone: impl FnMut(Pfn),
        go_on: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<u64, RestoreError> {
        let pfns: Vec<Pfn> = self.pfns.common(&self.absent).collect();
        for pfns in pfns.chunks(RELEASE_BATCH) {
            go_on()?;
            let gfns: Vec<Gfn> = pfns.iter().map(|pfn| frame(*pfn)).collect();
            let done = domain.release(&gfns)?;
            if let (Some(pfn), Some(gfn)) = (pfns.get(done), gfns.get(done)) {
                return Err(RestoreError::NotReleased {
                    pfn: *pfn,
                    gfn: *gfn,
                });
            }
            for pfn in pfns {
                self.pfns.remove(*pfn);
                gone(*pfn);
            }
        }
        Ok(pfns.len() as u64)
    }

    /// Populates those of `pfns` that are not populated. With a plan, the first page of a superpage
    /// populates all of it, if Xen has such a superpage; without one, aligned runs of 512 among
    /// `pfns` become superpages.
    ///
    /// `set` is called with the frame of each new page.
    pub(super) fn populate(
        &mut self,
        domain: &dyn Domain,
        pfns: impl Iterator<Item = Pfn>,
        stats: &mut RestoreStats,
        mut set: impl FnMut(Pfn, Mfn),
    ) -> Result<(), RestoreError> {
        let mut single: Vec<Gfn> = Vec::new();
        let mut runs: Vec<Pfn> = Vec::new();
        for pfn in pfns {
            if self.pfns.contains(pfn) || self.planned(domain, pfn, stats, &mut set)? {
                continue;
            }
            self.pfns.insert(pfn);
            single.push(Gfn(pfn.0));
            if self.plan.is_none()
                && let Some(first) = superpage(&single)
            {
                single.truncate(single.len() - SUPERPAGE);
                runs.push(Pfn(first.0));
            }
        }
        let done = superpages(domain, &runs, stats, &mut set)?;
        for first in &runs[done..] {
            single.extend((first.0..first.0 + SUPERPAGE_PAGES).map(Gfn));
        }
        if single.is_empty() {
            return Ok(());
        }
        let mut frames = single.clone();
        let done = domain.populate(0, &mut frames)?;
        if let Some(missing) = single.get(done) {
            let info = domain.info()?;
            return Err(RestoreError::NoMemory {
                pfn: Pfn(missing.0),
                tot_pages: info.tot_pages,
                max_pages: info.max_pages,
            });
        }
        stats.small_pages += single.len() as u64;
        for (pfn, frame) in single.iter().zip(&frames) {
            set(Pfn(pfn.0), Mfn(frame.0));
        }
        Ok(())
    }

    /// Populates the whole superpage that is planned for `pfn`. `false` if none is planned, or Xen
    /// has none.
    fn planned(
        &mut self,
        domain: &dyn Domain,
        pfn: Pfn,
        stats: &mut RestoreStats,
        set: &mut impl FnMut(Pfn, Mfn),
    ) -> Result<bool, RestoreError> {
        let Some(plan) = &mut self.plan else {
            return Ok(false);
        };
        if let Some(first) = plan.take_gib(pfn) {
            let mut frame = [Gfn(first.0)];
            if domain.populate(GIB_ORDER, &mut frame)? == 1 {
                plan.gib_is_there(first);
                stats.superpages_1gib += 1;
                self.got(first, frame[0], GIB_PAGES, set);
                return Ok(true);
            }
        }
        let runs = plan.take_runs(pfn, SUPERPAGES);
        let done = superpages(domain, &runs, stats, set)?;
        // The next ones may succeed when they are reached; the first one has had its attempt.
        plan.put_back(runs.get(done.max(1)..).unwrap_or_default());
        for first in &runs[..done] {
            for pfn in first.0..first.0 + SUPERPAGE_PAGES {
                self.pfns.insert(Pfn(pfn));
            }
        }
        Ok(done > 0)
    }

    /// `pages` pages from `first` on are populated.
    fn got(&mut self, first: Pfn, frame: Gfn, pages: u64, set: &mut impl FnMut(Pfn, Mfn)) {
        for i in 0..pages {
            self.pfns.insert(Pfn(first.0 + i));
            set(Pfn(first.0 + i), Mfn(frame.0 + i));
        }
    }
}

/// Requests memory for 2 MiB superpages, given by their first pfns, with one call. Returns how many
/// of them, from the first on, got memory. `set` is called for each page.
fn superpages(
    domain: &dyn Domain,
    runs: &[Pfn],
    stats: &mut RestoreStats,
    set: &mut impl FnMut(Pfn, Mfn),
) -> Result<usize, RestoreError> {
    if runs.is_empty() {
        return Ok(0);
    }
    let mut frames: Vec<Gfn> = runs.iter().map(|first| Gfn(first.0)).collect();
    let done = domain.populate(SUPERPAGE_ORDER, &mut frames)?;
    for (first, frame) in runs.iter().zip(&frames).take(done) {
        stats.superpages_2mib += 1;
        for i in 0..SUPERPAGE_PAGES {
            set(Pfn(first.0 + i), Mfn(frame.0 + i));
        }
    }
    Ok(done)
}

/// The first pfn of a superpage, if `pfns` ends with exactly all of its pages.
fn superpage(pfns: &[Gfn]) -> Option<Gfn> {
    let last = pfns.last()?;
    if last.0 % SUPERPAGE as u64 != SUPERPAGE as u64 - 1 {
        return None;
    }
    let run = pfns.get(pfns.len().checked_sub(SUPERPAGE)?..)?;
    let first = *run.first()?;
    let whole = run.iter().zip(first.0..).all(|(gfn, pfn)| gfn.0 == pfn);
    whole.then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(range: std::ops::Range<u64>) -> Vec<Gfn> {
        range.map(Gfn).collect()
    }

    #[test]
    fn a_superpage_is_512_pages_in_a_row_and_aligned() {
        assert_eq!(superpage(&[]), None);
        assert_eq!(superpage(&run(0..511)), None);
        assert_eq!(superpage(&run(0..512)), Some(Gfn(0)));
        assert_eq!(superpage(&run(1..513)), None);
        assert_eq!(superpage(&run(1..512)), None);
        assert_eq!(superpage(&run(100..1024)), Some(Gfn(512)));
        let mut gap = run(0..512);
        gap[7] = Gfn(9999);
        assert_eq!(superpage(&gap), None);
    }
}
