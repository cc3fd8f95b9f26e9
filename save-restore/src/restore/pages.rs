//! PAGE_DATA on its way into the guest: memory, mapping, contents.
//!
//! C implementation: `xg_sr_restore.c:process_page_data`.

use std::ops::Range;

use xsr_format::frame::{Gfn, PAGE_SIZE, PageEntry, Pfn};
use xsr_format::read::PageDataBody;
use xsr_xen_backend::{Access, Domain, ForeignPages};

use crate::error::RestoreError;
use crate::guest::pv::pagetable;
use crate::restore::populate::Populated;
use crate::restore::{Guest, MAX_PFN, RestoreStats};
use crate::source::PageSource;

/// Most pages that are mapped at a time: a record may hold more.
const STEP: usize = 1024;

/// The memory of a guest that is being restored.
pub(super) struct PageRestore<'r> {
    domain: &'r dyn Domain,
    pub(super) guest: Guest,
    populated: Populated,
    pub(super) stats: RestoreStats,
    /// VERIFY has come: compare, do not write.
    pub(super) verify: bool,
}

impl<'r> PageRestore<'r> {
    pub(super) fn new(domain: &'r dyn Domain, guest: Guest) -> Self {
        Self {
            domain,
            guest,
            populated: Populated::default(),
            stats: RestoreStats::default(),
            verify: false,
        }
    }

    /// Take one PAGE_DATA record.
    ///
    /// # Errors
    ///
    /// The stream, memory, or a page table that names a pfn which cannot be.
    pub(super) fn batch<S: PageSource>(
        &mut self,
        mut body: PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        let count = body.entries().len();
        for first in (0..count).step_by(STEP) {
            let entries = body.entries();
            let step: Vec<PageEntry> = entries.iter().skip(first).take(STEP).collect();
            self.step(&step, &mut body)?;
        }
        Ok(())
    }

    fn step<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        body: &mut PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        if let Some(entry) = entries.iter().find(|entry| entry.pfn > MAX_PFN) {
            return Err(RestoreError::PfnRange {
                pfn: entry.pfn,
                max: MAX_PFN,
            });
        }
        let with_memory = entries.iter().filter(|e| e.page_type.is_populated());
        self.populate(with_memory.map(|entry| entry.pfn))?;
        let tables = matches!(self.guest, Guest::Pv(_));
        for entry in entries {
            self.populated.note(*entry, tables);
        }
        if let Guest::Pv(pv) = &mut self.guest {
            for entry in entries {
                pv.p2m.set_page_type(entry.pfn, entry.page_type);
            }
        }
        self.stats.pfns += entries.len() as u64;

        let with_data: Vec<PageEntry> = entries
            .iter()
            .copied()
            .filter(|entry| entry.page_type.has_data())
            .collect();
        if with_data.is_empty() {
            return Ok(());
        }
        let gfns: Vec<Gfn> = with_data.iter().map(|entry| self.gfn(entry.pfn)).collect();
        let pages = self.domain.map(&gfns, Access::Write)?.all_mapped()?;
        if self.verify {
            self.compare(&with_data, &pages, body)?;
        } else {
            self.fill(&with_data, &pages, body)?;
        }
        self.stats.pages += with_data.len() as u64;
        Ok(())
    }

    fn populate(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<(), RestoreError> {
        let Self {
            domain,
            guest,
            populated,
            stats,
            ..
        } = self;
        populated.populate(*domain, pfns, stats, |pfn, mfn| {
            if let Guest::Pv(pv) = guest {
                pv.p2m.set_mfn(pfn, mfn);
            }
        })
    }

    /// The stream has ended: give back the pages that the guest gave back while it was
    /// being saved, so that it has those it had when it suspended.
    pub(super) fn release_absent(&mut self) -> Result<(), RestoreError> {
        let Self {
            domain,
            guest,
            populated,
            ..
        } = self;
        let released = match guest {
            Guest::Hvm(_) => populated.release_absent(*domain, |pfn| Gfn(pfn.0), |_| {})?,
            Guest::Pv(pv) => {
                let mut gone = Vec::new();
                let frame = |pfn| pv.p2m.mfn(pfn).map_or(Gfn::INVALID, |mfn| Gfn(mfn.0));
                let released = populated.release_absent(*domain, frame, |pfn| gone.push(pfn))?;
                gone.into_iter().for_each(|pfn| pv.p2m.clear_mfn(pfn));
                released
            }
        };
        self.stats.released = released;
        Ok(())
    }

    /// The frame of a pfn that has memory.
    fn gfn(&self, pfn: Pfn) -> Gfn {
        match &self.guest {
            Guest::Hvm(_) => Gfn(pfn.0),
            Guest::Pv(pv) => pv.p2m.mfn(pfn).map_or(Gfn::INVALID, |mfn| Gfn(mfn.0)),
        }
    }

    /// Whether the page's contents are not the same on every machine.
    fn needs_localising(&self, entry: &PageEntry) -> bool {
        matches!(self.guest, Guest::Pv(_)) && entry.page_type.table_level().is_some()
    }

    /// Read the contents of `entries` into `pages`: straight from the source where
    /// they are the same on every machine.
    fn fill<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        pages: &ForeignPages,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            if self.needs_localising(entry) {
                let contents = self.table(entry, body)?;
                pages.page(at).expect("mapped").copy_from(&contents);
                at += 1;
                continue;
            }
            let run = entries[at..]
                .iter()
                .take_while(|entry| !self.needs_localising(entry))
                .count();
            let range: Range<usize> = at..at + run;
            at = range.end;
            body.with_source(run as u64, |source, _| source.read_pages(pages, range))?;
        }
        Ok(())
    }

    /// Read a page table and turn it into one of this machine. It may name pages
    /// that have not come yet: they get their memory now.
    fn table<S: PageSource>(
        &mut self,
        entry: &PageEntry,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<Box<[u8; PAGE_SIZE]>, RestoreError> {
        let mut contents = Box::new([0; PAGE_SIZE]);
        body.read_page(&mut contents)?;
        let level = entry.page_type.table_level().unwrap_or(0);
        let max_pfn = match &self.guest {
            Guest::Pv(pv) => pv.max_pfn(),
            Guest::Hvm(_) => return Ok(contents),
        };
        let needed: Vec<Pfn> = pagetable::frames_needed(&contents)
            .filter(|pfn| *pfn <= max_pfn)
            .collect();
        self.populate(needed.into_iter())?;
        if let Guest::Pv(pv) = &self.guest {
            // Beyond the p2m there is no frame, and `localise` says so.
            pagetable::localise(entry.pfn, level, &mut contents, |pfn| pv.p2m.mfn(pfn))?;
        }
        Ok(contents)
    }

    /// Verify mode: compare what comes with what the guest has.
    fn compare<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        pages: &ForeignPages,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        let mut contents = Box::new([0; PAGE_SIZE]);
        for (entry, (_, page)) in entries.iter().zip(pages.iter()) {
            if self.needs_localising(entry) {
                contents = self.table(entry, body)?;
            } else {
                body.read_page(&mut contents)?;
            }
            if *page.to_page() != *contents {
                tracing::error!(pfn = %entry.pfn, page_type = %entry.page_type, "page differs");
                self.stats.verify_mismatches += 1;
            }
        }
        Ok(())
    }
}
