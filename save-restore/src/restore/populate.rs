//! Memory for a guest, as the stream first names its pages; and away again, where the
//! stream takes back what it said.
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

/// Most 2 MiB superpages that are asked for at a time, where it is known that they will
/// be needed.
const SUPERPAGES: usize = 64;

/// Most pages that are given back at a time.
const RELEASE_BATCH: usize = 1024;

/// Which pfns have memory already, and which of them are to lose it.
#[derive(Debug, Default)]
pub(super) struct Populated {
    pfns: PfnBitmap,
    /// pfns of which the stream's last word, so far, is that there is no page.
    absent: PfnBitmap,
    /// The superpages there are to be, where the whole stream could be looked at.
    plan: Option<Plan>,
}

impl Populated {
    pub(super) fn new(plan: Option<Plan>) -> Self {
        Self {
            plan,
            ..Self::default()
        }
    }

    /// Note what the stream says of a page. A guest gives pages back while it is being
    /// saved (XTAB behind contents), and a page table that is sent later shows as
    /// absent at first: only the last word counts.
    ///
    /// `tables`: the guest's page tables may still have a page populated that the
    /// stream only ever called absent.
    pub(super) fn note(&mut self, entry: PageEntry, tables: bool) {
        if entry.page_type != PageType::XTAB {
            self.absent.remove(entry.pfn);
        } else if tables || self.pfns.finds(entry.pfn) {
            // Elsewhere a stream that names far pfns as absent costs no memory.
            self.absent.insert(entry.pfn);
        }
    }

    /// The stream has ended: give back what has memory and is absent by its last
    /// word. Says how many pages that were.
    ///
    /// `frame` knows the frame of each pfn that has memory; `gone` is told of each
    /// that has none any more. `go_on` is asked before each batch.
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

    /// Get memory for those of `pfns` that have none. With a plan, the first page of a
    /// superpage brings the others with it, if the machine has such a superpage to give;
    /// without one, aligned runs of 512 among `pfns` become superpages.
    ///
    /// `set` is told the frame of each new page.
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

    /// Get memory for all of the superpage that `pfn` is planned to be part of. `false`
    /// where it is part of none, or the machine has none to give.
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
        // The next ones may do better when they are reached; the first has been.
        plan.put_back(runs.get(done.max(1)..).unwrap_or_default());
        for first in &runs[..done] {
            for pfn in first.0..first.0 + SUPERPAGE_PAGES {
                self.pfns.insert(Pfn(pfn));
            }
        }
        Ok(done > 0)
    }

    /// `pages` pages from `first` on are there.
    fn got(&mut self, first: Pfn, frame: Gfn, pages: u64, set: &mut impl FnMut(Pfn, Mfn)) {
        for i in 0..pages {
            self.pfns.insert(Pfn(first.0 + i));
            set(Pfn(first.0 + i), Mfn(frame.0 + i));
        }
    }
}

/// Ask for memory for 2 MiB superpages, given by their first pfns, with one call: for how
/// many of them, from the first on, there was some. `set` is told of each page.
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

/// The first pfn of a superpage, if `pfns` has just come to end with all of one.
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
