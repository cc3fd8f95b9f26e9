//! Ballooning during a live save: memory that a translated guest gives back or takes meanwhile, on
//! a Xen whose dirty log does not report it (ballooning, memory hotplug).
//!
//! Such a Xen adds a page that the guest takes without marking it in the log, and does not log the
//! guest's writes to that page either until the log is read. Without the work here, a page that was
//! absent when it was sent stays absent in the image, and a page that was given back and taken
//! again keeps its old contents.
//!
//! The number of the guest's pages can be observed, and which pfns have one:
//!
//! - When the log has been switched on, all pfns are queried once: from then on it is known which
//!   of them have no page.
//! - While the guest runs, its number of pages is checked after each batch with pages, and after
//!   every 16 without.
//! - A pfn that is sent with a page and had none before is sent once more after the next reading of
//!   the log, which makes Xen log the guest's writes to it.
//! - Before the log is read, the pfns without a page are queried again if anything has changed, and
//!   in any case when the guest is suspended. That costs one call for 1024 absent pfns, about a
//!   thousand for the hole below 4 GiB. The other pfns are queried, too, if pages were given back.
//! - If pages were both given back and taken since, a page may have gone and come back at its pfn.
//!   Nothing reveals which one, so all memory is sent again. The same if more pages were taken than
//!   have been found.
//!
//! The pfns are queried before the log is read: what the guest takes after that query is found by
//! the next one, and its writes to what it took before are logged from then on.
//!
//! One case remains: a page that the guest gives back and takes again, at the same pfn, while the
//! number of its pages is the same at each check, and without writing to the page before. Linux
//! clears pages before it gives them back, which the log reports.
//!
//! C implementation: none; Xen's own engine relies on the hypervisor (98fccdf0ac).

use xsr_format::frame::{Gfn, PageEntry, PageType, Pfn};
use xsr_xen_backend::{BackendError, DirtyBitmap, Domain};

use crate::error::SaveError;
use crate::pipeline;
use crate::save::{Run, batches, go_on};

/// The number of batches without pages between two checks.
const LOOK_BATCHES: u32 = 16;

/// The number of the guest's pages, and how it has changed since the last reading of the log.
#[derive(Clone, Copy, Debug)]
struct Count {
    /// At the last check.
    pages: u64,
    /// At the last reading.
    settled: u64,
    /// The sum of all increases between two checks.
    taken: u64,
    /// Whether the number has decreased between two checks.
    given_back: bool,
    /// Whether it changed while the pfns were queried.
    moved_meanwhile: bool,
    /// Batches since the last check.
    batches: u32,
}

impl Count {
    fn of(pages: u64) -> Self {
        Self {
            pages,
            settled: pages,
            taken: 0,
            given_back: false,
            moved_meanwhile: false,
            batches: 0,
        }
    }

    fn has_moved(&self) -> bool {
        self.taken > 0 || self.given_back || self.moved_meanwhile
    }

    /// Returns the changes so far, and starts counting again.
    fn settle(&mut self) -> Self {
        std::mem::replace(self, Self::of(self.pages))
    }

    /// Returns the changes since [`Self::settle`]; the next reading queries again because of them.
    fn keep_moving(&mut self) -> Self {
        let meanwhile = *self;
        self.moved_meanwhile = self.has_moved();
        self.taken = 0;
        self.given_back = false;
        meanwhile
    }

    fn look(&mut self, domain: &dyn Domain) -> Result<(), BackendError> {
        let now = domain.info()?.tot_pages;
        self.taken += now.saturating_sub(self.pages);
        self.given_back |= now < self.pages;
        self.pages = now;
        self.batches = 0;
        Ok(())
    }

    /// Counts a batch. Single batches without pages take almost no time.
    fn batch(&mut self, domain: &dyn Domain, has_pages: bool) -> Result<(), BackendError> {
        self.batches += 1;
        if has_pages || self.batches >= LOOK_BATCHES {
            self.look(domain)?;
        }
        Ok(())
    }
}

/// Which pfns have a page, and what has been observed.
pub(super) struct Balloon {
    /// The pfns that had no page when they were last queried or sent.
    absent: DirtyBitmap,
    /// Pfns that have got a page since the last reading of the log, and have been sent with it.
    appeared: DirtyBitmap,
    count: Count,
}

impl Balloon {
    /// For a domain whose log is off and about to be switched on; `None` if the log reports
    /// everything.
    pub(super) fn of(
        domain: &dyn Domain,
        translated: bool,
        pfns: u64,
    ) -> Result<Option<Self>, BackendError> {
        // The p2m of a PV guest shows it, and changes of the p2m are logged.
        if !translated || domain.logs_new_pages()? {
            return Ok(None);
        }
        Ok(Some(Self {
            absent: DirtyBitmap::new(pfns),
            appeared: DirtyBitmap::new(pfns),
            count: Count::of(domain.info()?.tot_pages),
        }))
    }

    /// There may be `pfns` pfns now; the new ones are sent in any case.
    pub(super) fn grow(&mut self, pfns: u64) {
        grow(&mut self.absent, pfns);
        grow(&mut self.appeared, pfns);
    }

    /// A batch with these entries is in the stream.
    pub(super) fn sent(
        &mut self,
        domain: &dyn Domain,
        entries: &[PageEntry],
        has_pages: bool,
    ) -> Result<(), BackendError> {
        for entry in entries {
            let was_absent = self.absent.contains(entry.pfn);
            match (entry.page_type, was_absent) {
                (PageType::XTAB, false) => {
                    self.absent.set(entry.pfn);
                    self.count.given_back = true;
                }
                (PageType::XTAB, true) | (_, false) => {}
                (_, true) => {
                    self.absent.clear(entry.pfn);
                    self.appeared.set(entry.pfn);
                }
            }
        }
        self.count.batch(domain, has_pages)
    }

    /// Checks how many pages the guest has.
    pub(super) fn look(&mut self, domain: &dyn Domain) -> Result<(), BackendError> {
        self.count.look(domain)
    }
}

/// What must be sent in addition to the pages in the log.
#[derive(Debug)]
pub(super) enum Besides {
    /// Nothing.
    Nothing,
    /// These pfns.
    These(DirtyBitmap),
    /// All memory.
    All,
}

impl Besides {
    /// Marks it in `dirty`.
    pub(super) fn mark(&self, dirty: &mut DirtyBitmap) {
        match self {
            Self::Nothing => {}
            Self::These(pfns) => dirty.merge(pfns),
            Self::All => dirty.set_all(),
        }
    }
}

/// Makes room in `set` for `pfns` pfns.
pub(super) fn grow(set: &mut DirtyBitmap, pfns: u64) {
    if set.pfns() < pfns {
        let mut larger = DirtyBitmap::new(pfns);
        larger.merge(set);
        *set = larger;
    }
}

impl Run<'_, '_> {
    /// The log has just been switched on: queries all pfns.
    pub(super) fn first_look(&mut self, balloon: &mut Balloon) -> Result<(), SaveError> {
        let pfns = balloon.absent.pfns();
        self.ask_again(balloon, (0..pfns).map(Pfn))?;
        Ok(())
    }

    /// The log is about to be read: returns the pfns whose state in the stream is outdated without
    /// the log reporting it.
    pub(super) fn settle(
        &mut self,
        balloon: &mut Balloon,
        suspended: bool,
    ) -> Result<Besides, SaveError> {
        balloon.look(self.domain)?;
        let before = balloon.count.settle();
        let appeared = balloon.appeared.count();
        if !suspended && !before.has_moved() && appeared == 0 {
            return Ok(Besides::Nothing);
        }
        let mut besides = balloon.appeared.clone();
        balloon.appeared.clear_all();
        // A copy of the current state, which the answers change.
        let absent = balloon.absent.clone();
        let found = self.ask_again(balloon, absent.iter())?;
        let came = found.len() as u64 + appeared;
        // More pages have come than the increase in the guest's number of pages.
        let mut given_back = before.given_back || before.settled + came > before.pages;
        let mut gone = Vec::new();
        if given_back {
            let present = (0..absent.pfns()).map(Pfn);
            gone = self.ask_again(balloon, present.filter(|pfn| !absent.contains(*pfn)))?;
        }
        found.iter().chain(&gone).for_each(|pfn| besides.set(*pfn));
        // Changes in the meantime count, and make the next reading query again.
        let meanwhile = balloon.count.keep_moving();
        given_back |= meanwhile.given_back;
        let taken = before.taken + meanwhile.taken + came;
        if before.taken > came || given_back && taken > 0 {
            tracing::info!(
                before.taken,
                came,
                given_back,
                "the guest gave back and took memory while it was being saved: sending all of it \
                 again"
            );
            return Ok(Besides::All);
        }
        tracing::debug!(
            came,
            given_back,
            "pages that the guest has taken or given back"
        );
        Ok(Besides::These(besides))
    }

    /// Queries which of `pfns` have a page; returns those for which that has changed.
    fn ask_again(
        &mut self,
        balloon: &mut Balloon,
        pfns: impl Iterator<Item = Pfn>,
    ) -> Result<Vec<Pfn>, SaveError> {
        let domain = self.domain;
        let (absent, count) = (&balloon.absent, &mut balloon.count);
        let mut all = Vec::new();
        pipeline::ordered(
            self.pool.as_ref(),
            batches(pfns),
            |pfns| changed(domain, absent, &pfns),
            |changed| {
                all.extend(changed);
                count.batch(domain, false)?;
                go_on(self.progress.ask())
            },
        )?;
        for pfn in &all {
            match balloon.absent.contains(*pfn) {
                true => balloon.absent.clear(*pfn),
                false => balloon.absent.set(*pfn),
            }
        }
        Ok(all)
    }
}

/// Those of `pfns` that have a page although the stream says that they have none, or the reverse.
fn changed(domain: &dyn Domain, absent: &DirtyBitmap, pfns: &[Pfn]) -> Result<Vec<Pfn>, SaveError> {
    let gfns: Vec<Gfn> = pfns.iter().map(|pfn| Gfn(pfn.0)).collect();
    let mut types = vec![PageType::XTAB; gfns.len()];
    domain.page_types(&gfns, &mut types)?;
    let differs = |(pfn, page_type): (&Pfn, &PageType)| {
        let is_absent = *page_type == PageType::XTAB;
        (is_absent != absent.contains(*pfn)).then_some(*pfn)
    };
    Ok(pfns.iter().zip(&types).filter_map(differs).collect())
}
