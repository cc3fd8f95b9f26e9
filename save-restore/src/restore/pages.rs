//! PAGE_DATA records in a restore: populates their pages, and those that page tables name, and cuts
//! the contents into pieces for the worker threads.
//!
//! Everything that decides which frame a page gets happens here, on the thread that reads the
//! stream, in its order. So the result does not depend on the threads.
//!
//! C implementation: `xg_sr_restore.c:process_page_data`.

use std::ops::Range;

use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, Page, PageEntry, Pfn};
use xsr_format::read::PageDataBody;
use xsr_format::record::MAX_BATCH;
use xsr_xen_backend::{Access, Domain, ForeignPages};

use crate::error::RestoreError;
use crate::guest::pv::pagetable;
use crate::restore::ahead::Plan;
use crate::restore::crew::Hands;
use crate::restore::place::{Contents, Piece, Placer, read_failed};
use crate::restore::populate::Populated;
use crate::restore::{Guest, MAX_PFN, RestoreStats};
use crate::source::{PageSource, read_whole};

/// The most pages that are mapped at a time for a comparison.
const COMPARED: usize = 1024;

/// The memory of a guest that is being restored.
pub(super) struct PageRestore<'r> {
    domain: &'r dyn Domain,
    pub(super) guest: Guest<'r>,
    placer: Placer<'r>,
    populated: Populated,
    pub(super) stats: RestoreStats,
    /// After VERIFY: compare instead of writing.
    pub(super) verify: bool,
}

/// Pages that are populated at once: as many as a record can hold the contents of.
const POPULATED: usize = 1 << 15;

impl<'r> PageRestore<'r> {
    pub(super) fn new(domain: &'r dyn Domain, guest: Guest<'r>, plan: Option<Plan>) -> Self {
        let p2m = match &guest {
            Guest::Pv(pv) => Some(pv.p2m.clone()),
            Guest::Hvm(_) => None,
        };
        Self {
            domain,
            guest,
            placer: Placer::new(domain, p2m),
            populated: Populated::new(plan),
            stats: RestoreStats::default(),
            verify: false,
        }
    }

    /// Places the pieces that are read here.
    pub(super) fn placer(&self) -> Placer<'r> {
        self.placer.clone()
    }

    /// Processes one PAGE_DATA record. `ask` is called between the parts of a long one.
    ///
    /// # Errors
    ///
    /// An error of the stream; no memory; a page table that names an impossible pfn; the failure of
    /// a piece of an earlier record.
    pub(super) fn batch<S: PageSource>(
        &mut self,
        mut body: PageDataBody<'_, S>,
        hands: &Hands<'_, '_>,
        ask: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        // A record may have sixteen million entries, but its length limits those with contents:
        // only these are kept.
        if let Some(entry) = (body.entries().iter()).find(|entry| entry.pfn > MAX_PFN) {
            return Err(RestoreError::PfnRange {
                pfn: entry.pfn,
                max: MAX_PFN,
            });
        }
        let entries = body.entries();
        {
            let with_memory = entries.iter().filter(|e| e.page_type.is_populated());
            let mut with_memory = with_memory.map(|entry| entry.pfn).peekable();
            while with_memory.peek().is_some() {
                self.populate(with_memory.by_ref().take(POPULATED))?;
                if with_memory.peek().is_some() {
                    ask()?;
                }
            }
        }
        let tables = matches!(self.guest, Guest::Pv(_));
        for entry in entries.iter() {
            self.populated.note(entry, tables);
        }
        if let Guest::Pv(pv) = &mut self.guest {
            let mut p2m = pv.p2m.write();
            for entry in entries.iter() {
                p2m.set_page_type(entry.pfn, entry.page_type);
            }
        }
        self.stats.pfns += entries.len() as u64;

        let with_data = entries.iter().filter(|entry| entry.page_type.has_data());
        let with_data: Vec<PageEntry> = with_data.collect();
        // With one thread, or if bytes must be read in order, pages that are mapped are best read
        // straight into the mapping.
        let pieces = self.placer.writes()
            || hands.many() && body.with_source(0, |s, _| s.take_extent(0))?.is_some();
        let most = match self.verify {
            true => COMPARED,
            false => hands.crew.piece_pages(),
        };
        let mut since_asked = 0;
        for entries in with_data.chunks(most) {
            if since_asked >= MAX_BATCH {
                since_asked = 0;
                ask()?;
            }
            since_asked += entries.len();
            let gfns: Vec<Gfn> = self.gfns(entries);
            if self.verify {
                let pages = self.domain.map(&gfns, Access::Write)?.all_mapped()?;
                self.compare(entries, &pages, &mut body)?;
            } else if pieces {
                self.piece(entries, gfns, &mut body, hands)?;
            } else {
                let pages = self.domain.map(&gfns, Access::Write)?.all_mapped()?;
                self.fill(entries, &pages, &mut body)?;
                hands.unmap(pages);
            }
            self.stats.pages += entries.len() as u64;
        }
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
                pv.p2m.write().set_mfn(pfn, mfn);
            }
        })
    }

    /// The stream has ended: gives back the pages that the guest gave back while it was being
    /// saved, so that it has those it had when it was suspended.
    pub(super) fn release_absent(
        &mut self,
        go_on: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let Self {
            domain,
            guest,
            populated,
            ..
        } = self;
        let released = match guest {
            Guest::Hvm(_) => populated.release_absent(*domain, |pfn| Gfn(pfn.0), |_| {}, go_on)?,
            Guest::Pv(pv) => {
                let mut gone = Vec::new();
                let p2m = pv.p2m.read();
                let frame = |pfn| p2m.mfn(pfn).map_or(Gfn::INVALID, |mfn| Gfn(mfn.0));
                let released =
                    populated.release_absent(*domain, frame, |pfn| gone.push(pfn), go_on)?;
                drop(p2m);
                let mut p2m = pv.p2m.write();
                gone.into_iter().for_each(|pfn| p2m.clear_mfn(pfn));
                released
            }
        };
        self.stats.released = released;
        Ok(())
    }

    /// The frames of populated pages.
    fn gfns(&self, entries: &[PageEntry]) -> Vec<Gfn> {
        match &self.guest {
            Guest::Hvm(_) => entries.iter().map(|entry| Gfn(entry.pfn.0)).collect(),
            Guest::Pv(pv) => {
                let p2m = pv.p2m.read();
                let gfn = |entry: &PageEntry| p2m.mfn(entry.pfn).map_or(Gfn::INVALID, |m| Gfn(m.0));
                entries.iter().map(gfn).collect()
            }
        }
    }

    /// Submits the contents of `entries`, either read or as a position in a file.
    fn piece<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        gfns: Vec<Gfn>,
        body: &mut PageDataBody<'_, S>,
        hands: &Hands<'_, '_>,
    ) -> Result<(), RestoreError> {
        let position = body.position();
        let contents = body.with_source(entries.len() as u64, |source, bytes| {
            if hands.many()
                && let Some(extent) = source.take_extent(bytes)?
            {
                return Ok(Contents::Extent(extent));
            }
            let mut buffer = hands.crew.buffer(entries.len() * PAGE_SIZE);
            read_whole(source, &mut buffer)?;
            Ok(Contents::Bytes(buffer))
        })?;
        for (index, entry) in entries.iter().enumerate() {
            if self.placer.localises(entry) {
                let table = contents.page(index);
                let table = table.map_err(|e| read_failed(position, entries.len(), e))?;
                self.populate_named(entry, &table)?;
            }
        }
        hands.submit(Piece {
            entries: entries.to_vec(),
            gfns,
            contents,
            position,
        })
    }

    /// Reads the contents of `entries` into `pages`, straight from the source if they are the same
    /// on every machine.
    fn fill<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        pages: &ForeignPages,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            if self.placer.localises(entry) {
                let contents = self.page(entry, body)?;
                pages.page(at).expect("mapped").copy_from(&contents);
                at += 1;
                continue;
            }
            let run = entries[at..]
                .iter()
                .take_while(|entry| !self.placer.localises(entry))
                .count();
            let range: Range<usize> = at..at + run;
            at = range.end;
            body.with_source(run as u64, |source, _| source.read_pages(pages, range))?;
        }
        Ok(())
    }

    /// Reads a page and localises it.
    fn page<S: PageSource>(
        &mut self,
        entry: &PageEntry,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<Box<Page>, RestoreError> {
        let mut contents = Box::new([0; PAGE_SIZE]);
        body.read_page(&mut contents)?;
        if self.placer.localises(entry) {
            self.populate_named(entry, &contents)?;
            self.placer.localise(entry, &mut contents)?;
        }
        Ok(contents)
    }

    /// A page table of the stream may name pages that have not come yet: they are populated now. A
    /// pfn beyond the p2m has no frame, and never will.
    fn populate_named(&mut self, entry: &PageEntry, table: &Page) -> Result<(), RestoreError> {
        let max_pfn = match &self.guest {
            Guest::Pv(pv) => pv.max_pfn(),
            Guest::Hvm(_) => return Ok(()),
        };
        let named: Vec<Pfn> = pagetable::frames_needed(table).collect();
        if named.iter().any(|pfn| *pfn > max_pfn) {
            let level = entry.page_type.table_level().unwrap_or(0);
            let within = |pfn: Pfn| (pfn <= max_pfn).then_some(Mfn(pfn.0));
            pagetable::localise(entry.pfn, level, &mut table.clone(), within)?;
        }
        self.populate(named.into_iter())
    }

    /// Verify mode: compares the contents of the stream with the guest's.
    fn compare<S: PageSource>(
        &mut self,
        entries: &[PageEntry],
        pages: &ForeignPages,
        body: &mut PageDataBody<'_, S>,
    ) -> Result<(), RestoreError> {
        for (entry, (_, page)) in entries.iter().zip(pages.iter()) {
            let contents = self.page(entry, body)?;
            if *page.to_page() != *contents {
                tracing::error!(pfn = %entry.pfn, page_type = %entry.page_type, "page differs");
                self.stats.verify_mismatches += 1;
            }
        }
        Ok(())
    }
}
