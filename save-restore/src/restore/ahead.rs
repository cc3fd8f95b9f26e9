//! Superpages that a stream will fill, found by looking ahead in a stream that is a file: only the
//! heads of its records and their lists of pages are read.
//!
//! The C implementation knows only the current batch (`xg_sr_restore.c:populate_pfns`).

use std::collections::{BTreeMap, BTreeSet};

use xsr_format::frame::{PageType, Pfn};
use xsr_format::read::{Incoming, ReadOptions, RecordReader};

use crate::bitmap::PfnBitmap;
use crate::restore::MAX_PFN;
use crate::restore::populate::{GIB_PAGES, SUPERPAGE_PAGES};
use crate::source::{HEADERS, LookAhead};

/// The superpages of a stream that have not been requested from Xen yet, by their first pfns.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    gibs: BTreeSet<Pfn>,
    runs: BTreeSet<Pfn>,
}

impl Plan {
    /// Reads on to the end of a stream that has just begun, for a guest that may have `max_pages`
    /// pages.
    ///
    /// A page counts if the stream's last entry for it has contents: a page that is given back in
    /// the end would break its superpage.
    ///
    /// If the stream cannot be read to the end, or names more pages than the guest may have (so
    /// that no stream makes the set larger than that of the populated pages), the plan covers what
    /// came before. The restore reports the error later.
    pub(super) fn of(ahead: LookAhead, max_pages: u64) -> Self {
        // The look ahead does not report errors of the stream.
        let options = ReadOptions {
            lenient: true,
            offset: 0,
        };
        let mut pfns = PfnBitmap::default();
        let mut left = max_pages;
        if let Ok(mut reader) = RecordReader::seeking(ahead, options) {
            debug_assert_eq!(reader.offset(), HEADERS);
            'stream: while let Ok(Some(incoming)) = reader.next_record() {
                let Incoming::PageData(body) = incoming else {
                    continue;
                };
                for entry in body.entries().iter() {
                    if entry.page_type == PageType::XTAB {
                        pfns.remove(entry.pfn);
                    } else if entry.page_type.is_populated() && !pfns.contains(entry.pfn) {
                        if left == 0 || entry.pfn > MAX_PFN {
                            break 'stream;
                        }
                        left -= 1;
                        pfns.insert(entry.pfn);
                    }
                }
            }
        }
        Self::from_pages(&pfns)
    }

    fn from_pages(pfns: &PfnBitmap) -> Self {
        let runs: BTreeSet<Pfn> = pfns.whole_runs().collect();
        let mut in_gib: BTreeMap<Pfn, u64> = BTreeMap::new();
        for run in &runs {
            *in_gib.entry(first_of(*run, GIB_PAGES)).or_default() += SUPERPAGE_PAGES;
        }
        in_gib.retain(|_, pages| *pages == GIB_PAGES);
        Self {
            gibs: in_gib.into_keys().collect(),
            runs,
        }
    }

    /// The first pfn of the planned 1 GiB page that contains `pfn`. Each is returned only once.
    pub(super) fn take_gib(&mut self, pfn: Pfn) -> Option<Pfn> {
        self.gibs.take(&first_of(pfn, GIB_PAGES))
    }

    /// The 1 GiB page that [`Plan::take_gib`] returned is populated: removes its 2 MiB pages.
    pub(super) fn gib_is_there(&mut self, first: Pfn) {
        let end = Pfn(first.0 + GIB_PAGES);
        self.runs.retain(|run| *run < first || *run >= end);
    }

    /// The first pfn of the planned 2 MiB page that contains `pfn`, if there is one, and those of
    /// the next planned ones: `most` in all. Each is returned only once.
    pub(super) fn take_runs(&mut self, pfn: Pfn, most: usize) -> Vec<Pfn> {
        let first = first_of(pfn, SUPERPAGE_PAGES);
        if !self.runs.contains(&first) {
            return Vec::new();
        }
        let runs = self.runs.range(first..);
        let runs = runs.take_while(|run| !self.gibs.contains(&first_of(**run, GIB_PAGES)));
        let runs: Vec<Pfn> = runs.take(most).copied().collect();
        for run in &runs {
            self.runs.remove(run);
        }
        runs
    }

    /// Runs that were taken but not requested; they stay planned.
    pub(super) fn put_back(&mut self, runs: &[Pfn]) {
        self.runs.extend(runs);
    }
}

/// The first pfn of the aligned run of `pages` that contains `pfn`.
fn first_of(pfn: Pfn, pages: u64) -> Pfn {
    Pfn(pfn.0 - pfn.0 % pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ranges: &[(u64, u64)]) -> Plan {
        let mut pfns = PfnBitmap::default();
        for pfn in ranges.iter().flat_map(|(first, end)| *first..*end) {
            pfns.insert(Pfn(pfn));
        }
        Plan::from_pages(&pfns)
    }

    #[test]
    fn whole_aligned_runs_are_planned_and_said_once() {
        assert_eq!(plan(&[(1, 512), (513, 1024)]), Plan::default());
        assert_eq!(plan(&[(1, GIB_PAGES)]).gibs.len(), 0);
        assert_eq!(plan(&[(1, GIB_PAGES)]).runs.len(), 511);
        assert_eq!(plan(&[(512, GIB_PAGES + 512)]).gibs.len(), 0);

        let mut plan = plan(&[(0, 100), (GIB_PAGES - 512, 2 * GIB_PAGES + 1)]);
        let first = Pfn(GIB_PAGES);
        assert_eq!(plan.take_gib(Pfn(GIB_PAGES - 1)), None);
        assert_eq!(plan.take_gib(Pfn(GIB_PAGES + 7)), Some(first));
        assert_eq!(plan.take_gib(first), None);
        let runs = |firsts: &[u64]| {
            firsts
                .iter()
                .map(|n| Pfn(GIB_PAGES + n))
                .collect::<Vec<_>>()
        };
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES + 513), 1), runs(&[512]));
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES + 514), 9), []);
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES), 3), runs(&[0, 1024, 1536]));
        plan.put_back(&runs(&[1024, 1536]));
        assert_eq!(
            plan.take_runs(Pfn(GIB_PAGES + 1025), 2),
            runs(&[1024, 1536])
        );
        let below = [Pfn(GIB_PAGES - 512)];
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES - 1), 1), below);
        assert_eq!(plan.take_runs(Pfn(2 * GIB_PAGES), 1), []);
        plan.gib_is_there(first);
        assert_eq!(plan, Plan::default());
    }

    #[test]
    fn runs_of_a_gib_that_is_still_to_be_asked_for_are_left_to_it() {
        let mut plan = plan(&[(GIB_PAGES - 1024, 2 * GIB_PAGES)]);
        let below = [Pfn(GIB_PAGES - 1024), Pfn(GIB_PAGES - 512)];
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES - 1000), 64), below);
        assert_eq!(plan.take_gib(Pfn(GIB_PAGES)), Some(Pfn(GIB_PAGES)));
        assert_eq!(plan.take_runs(Pfn(GIB_PAGES), 64).len(), 64);
    }
}
