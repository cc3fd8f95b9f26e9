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
//! - while the guest runs, its number of pages is looked at after each batch with pages. If it has
//!   changed when the log has been read, the pfns that the stream has as absent are asked for
//!   again (the others, too, if pages were given back), and those that have changed are sent
//!   again;
//! - if fewer pfns have turned up than pages were seen to be taken, then some pages came to
//!   pfns that the stream has as present. Nothing tells which: all memory is sent again;
//! - when the guest is suspended, the pfns that the stream has as absent are asked for again
//!   in any case: a page given back and another taken between two looks leave the number as
//!   it was. That costs one call for 1024 absent pfns, about a thousand for the hole below
//!   4 GiB.
//!
//! What remains is a page that the guest gives back and takes again, at the same pfn, between
//! two looks (a batch, so some milliseconds), without writing to it before: Linux clears
//! pages before it gives them back, which the log tells.
//!
//! C implementation: none; Xen's own engine relies on the hypervisor (98fccdf0ac).

use xsr_format::frame::{Gfn, PageEntry, PageType, Pfn};
use xsr_xen_backend::{BackendError, DirtyBitmap, Domain};

use crate::error::SaveError;
use crate::pipeline;
use crate::save::{Run, batches, go_on};

/// What the stream says of the guest's memory, and what has been seen of it since.
pub(super) struct Balloon {
    /// The pfns that the stream has as absent, of those that it has named.
    absent: DirtyBitmap,
    /// Pages that the guest had at the last look.
    pages: u64,
    /// Pages that it had when the stream was last put right.
    settled: u64,
    /// By how much its pages have become more since the stream was last put right.
    taken: u64,
    /// Whether they have become fewer since then.
    given_back: bool,
}

impl Balloon {
    /// For a domain whose log has just been switched on; `None` where the log tells
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
        let pages = domain.info()?.tot_pages;
        Ok(Some(Self {
            absent: DirtyBitmap::new(pfns),
            pages,
            settled: pages,
            taken: 0,
            given_back: false,
        }))
    }

    /// There may be `pfns` now.
    pub(super) fn grow(&mut self, pfns: u64) {
        grow(&mut self.absent, pfns);
    }

    /// `entries` are in the stream.
    pub(super) fn sent(&mut self, entries: &[PageEntry]) {
        for entry in entries {
            match entry.page_type {
                PageType::XTAB => self.absent.set(entry.pfn),
                _ => self.absent.clear(entry.pfn),
            }
        }
    }

    /// Look how many pages the guest has.
    pub(super) fn look(&mut self, domain: &dyn Domain) -> Result<(), BackendError> {
        let now = domain.info()?.tot_pages;
        self.taken += now.saturating_sub(self.pages);
        self.given_back |= now < self.pages;
        self.pages = now;
        Ok(())
    }

    fn has_moved(&self) -> bool {
        self.taken > 0 || self.given_back
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
    /// The log has just been read into `dirty`: put those pfns into it, too, of which the
    /// stream says something that is no longer so and the log does not tell.
    pub(super) fn settle(
        &mut self,
        balloon: &mut Balloon,
        dirty: &mut DirtyBitmap,
        suspended: bool,
    ) -> Result<(), SaveError> {
        let domain = self.domain;
        balloon.look(domain)?;
        if !suspended && !balloon.has_moved() {
            return Ok(());
        }
        let taken = std::mem::take(&mut balloon.taken);
        let mut given_back = std::mem::take(&mut balloon.given_back);
        let settled = std::mem::replace(&mut balloon.settled, balloon.pages);
        let absent = &balloon.absent;
        let found = self.ask_again(domain, absent, absent.iter(), dirty)?;
        // More pages have come than the guest has more.
        given_back |= settled + found > balloon.pages;
        if given_back {
            let present = (0..absent.pfns()).map(Pfn);
            let present = present.filter(|pfn| !absent.contains(*pfn));
            self.ask_again(domain, absent, present, dirty)?;
        }
        if taken > found {
            tracing::info!(
                taken,
                found,
                "the guest took memory while it was being saved: sending all of it again"
            );
            dirty.set_all();
        } else if found > 0 {
            tracing::debug!(found, "pages that the guest has taken");
        }
        Ok(())
    }
}

impl Run<'_, '_> {
    /// Put those of `pfns` into `dirty` of which the stream says what is not so; how many.
    fn ask_again(
        &mut self,
        domain: &dyn Domain,
        absent: &DirtyBitmap,
        pfns: impl Iterator<Item = Pfn>,
        dirty: &mut DirtyBitmap,
    ) -> Result<u64, SaveError> {
        let mut found = 0;
        pipeline::ordered(
            self.pool.as_ref(),
            batches(pfns),
            |pfns| changed(domain, absent, &pfns),
            |changed| {
                changed.iter().for_each(|pfn| dirty.set(*pfn));
                found += changed.len() as u64;
                go_on(self.progress.advance(0, 0))
            },
        )?;
        Ok(found)
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
