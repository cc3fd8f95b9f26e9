//! Memory that a translated guest gives back or takes while it is being saved live, on a
//! Xen whose dirty log says nothing of it (ballooning, memory hotplug).
//!
//! Such a Xen puts a page that the guest takes into its place without marking it, and the
//! guest's writes to that page are not logged either until the log is read. Without what is
//! done here, a page that was absent when it was sent stays absent in the image, and one
//! that went and came back keeps what it held before.
//!
//! What can be observed is the number of the guest's pages, and which pfns have one:
//!
//! - when the log has been switched on, all pfns are asked for once: from then on it is known
//!   which of them have no page;
//! - while the guest runs, its number of pages is looked at after each batch with pages, and
//!   after every 16 without;
//! - a pfn that is sent with a page and had none before goes out once more after the next
//!   reading of the log, which is what has Xen log the guest's writes to it;
//! - before the log is read, the pfns without a page are asked for again if anything has moved,
//!   and in any case when the guest is suspended: that costs one call for 1024 absent pfns,
//!   about a thousand for the hole below 4 GiB. The others are asked for, too, if pages were
//!   given back;
//! - if pages were both given back and taken since, a page may have gone and come back at its
//!   pfn. Nothing tells which: all memory is sent again. So it is if more pages were taken than
//!   have turned up.
//!
//! The pfns are asked for before the log is read: what the guest takes after that question is
//! found by the next one, and its writes to what it took before are logged from then on.
//!
//! What remains is a page that the guest gives back and takes again, at the same pfn, while
//! the number of its pages is the same at each look, and without writing to the page before:
//! Linux clears pages before it gives them back, which the log tells.
//!
//! C implementation: none; Xen's own engine relies on the hypervisor (98fccdf0ac).

use xsr_format::frame::{Gfn, PageEntry, PageType, Pfn};
use xsr_xen_backend::{BackendError, DirtyBitmap, Domain};

use crate::error::SaveError;
use crate::pipeline;
use crate::save::{Run, batches, go_on};

/// How many batches without pages go by from one look to the next.
const LOOK_BATCHES: u32 = 16;

/// How many pages the guest has, and how that has changed since the last reading of the log.
#[derive(Clone, Copy, Debug)]
struct Count {
    /// At the last look.
    pages: u64,
    /// At the last reading.
    settled: u64,
    /// By how much its pages have become more from one look to the next, in all.
    taken: u64,
    /// Whether they have become fewer from one look to the next.
    given_back: bool,
    /// Whether they changed while the pfns were asked for.
    moved_meanwhile: bool,
    /// Batches since the last look.
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

    /// What has been seen until now. Counts anew from here on.
    fn settle(&mut self) -> Self {
        std::mem::replace(self, Self::of(self.pages))
    }

    /// What has been seen since [`Self::settle`], for which the next reading asks again.
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

    /// A batch has gone by. Those without pages take no time, one by one.
    fn batch(&mut self, domain: &dyn Domain, has_pages: bool) -> Result<(), BackendError> {
        self.batches += 1;
        if has_pages || self.batches >= LOOK_BATCHES {
            self.look(domain)?;
        }
        Ok(())
    }
}

/// Which pfns have a page, and what has been seen of it.
pub(super) struct Balloon {
    /// The pfns without a page, when they were last asked for or sent.
    absent: DirtyBitmap,
    /// Those that have got one since the last reading of the log, and have been sent with it.
    appeared: DirtyBitmap,
    count: Count,
}

impl Balloon {
    /// For a domain whose log is off and about to be switched on; `None` where the log tells
    /// everything.
    pub(super) fn of(
        domain: &dyn Domain,
        translated: bool,
        pfns: u64,
    ) -> Result<Option<Self>, BackendError> {
        // The p2m of a PV guest tells, and its changes are logged.
        if !translated || domain.logs_new_pages()? {
            return Ok(None);
        }
        Ok(Some(Self {
            absent: DirtyBitmap::new(pfns),
            appeared: DirtyBitmap::new(pfns),
            count: Count::of(domain.info()?.tot_pages),
        }))
    }

    /// There may be `pfns` now, of which the new ones are sent in any case.
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

    /// Look how many pages the guest has.
    pub(super) fn look(&mut self, domain: &dyn Domain) -> Result<(), BackendError> {
        self.count.look(domain)
    }
}

/// What is to be sent besides that which the log names.
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
    /// Mark it in `dirty`.
    pub(super) fn mark(&self, dirty: &mut DirtyBitmap) {
        match self {
            Self::Nothing => {}
            Self::These(pfns) => dirty.merge(pfns),
            Self::All => dirty.set_all(),
        }
    }
}

/// Make room in `set` for `pfns` pfns.
pub(super) fn grow(set: &mut DirtyBitmap, pfns: u64) {
    if set.pfns() < pfns {
        let mut larger = DirtyBitmap::new(pfns);
        larger.merge(set);
        *set = larger;
    }
}

impl Run<'_, '_> {
    /// The log has just been switched on: ask for all pfns.
    pub(super) fn first_look(&mut self, balloon: &mut Balloon) -> Result<(), SaveError> {
        let pfns = balloon.absent.pfns();
        self.ask_again(balloon, (0..pfns).map(Pfn))?;
        Ok(())
    }

    /// The log is about to be read: of which pfns the stream says something that is no longer
    /// so and the log does not tell.
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
        // Known as they are now, while answers change what is known.
        let absent = balloon.absent.clone();
        let found = self.ask_again(balloon, absent.iter())?;
        let came = found.len() as u64 + appeared;
        // More pages have come than the guest has more.
        let mut given_back = before.given_back || before.settled + came > before.pages;
        let mut gone = Vec::new();
        if given_back {
            let present = (0..absent.pfns()).map(Pfn);
            gone = self.ask_again(balloon, present.filter(|pfn| !absent.contains(*pfn)))?;
        }
        found.iter().chain(&gone).for_each(|pfn| besides.set(*pfn));
        // What has moved in the meantime counts, and has the next reading ask again.
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

    /// Ask which of `pfns` have a page; those of which that has changed.
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

/// Those of `pfns` that have a page where the stream says that they have none, or the
/// other way round.
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
