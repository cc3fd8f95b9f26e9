//! A guest at work: writes to its memory, page tables that change, pages given back
//! and taken again, at a rate and in proportions that the caller chooses.
//!
//! All chance comes from a seed, and pages are chosen by pfn, so that the same
//! workload does the same to equal guests on different machines. Each operation is
//! done with the domain's state held: the guest stands still for whoever holds it,
//! and a suspend waits for the operation under way. What a suspending kernel does
//! to its memory comes after.

mod background;
mod pv;

use std::ops::AddAssign;
use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use xsr_format::frame::{Gfn, Mfn, Pfn};

use self::pv::PvView;
use super::MockHost;
use super::domain::MockDomain;
use super::error::MockError;
use super::guest::SPECIAL_PAGES;
use super::random::{SplitMix64, mix};
use super::state::State;
use crate::error::BackendError;
use crate::pages::ENTRIES_PER_TABLE;
use crate::{DomId, GuestKind, ShutdownReason};

pub use self::background::BackgroundWorkload;

/// Words of a page that one operation writes: a line of the cache.
const WORDS_PER_WRITE: usize = 8;

/// Operations between which the domain's state is let go of.
const BATCH: u64 = 64;

/// What a workload does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// What its choices are made from.
    pub seed: u64,
    /// Operations per second, when it runs in the background. At most one page is
    /// written by each, but for what page tables and p2m take.
    pub rate: u32,
    /// Pages it writes to and moves about, chosen at random from those that hold
    /// data; all of them where there are fewer.
    pub working_set: u64,
    /// Of 1000 operations, how many change page tables. None do in an HVM guest.
    pub table_permille: u16,
    /// Of 1000 operations, how many give a page back or take one.
    pub balloon_permille: u16,
    /// How the guest shuts down by itself, if it does.
    #[serde(default)]
    pub end: Option<WorkloadEnd>,
}

/// A guest's own end: it asks Xen to shut it down (`SCHEDOP_shutdown`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadEnd {
    /// Operations that it does before.
    pub after: u64,
    /// What it tells Xen. It does not suspend without being asked.
    pub reason: ShutdownReason,
}

impl WorkloadSpec {
    /// Plain writes only, to `working_set` pages, `rate` a second.
    pub const fn writes(seed: u64, rate: u32, working_set: u64) -> Self {
        Self {
            seed,
            rate,
            working_set,
            table_permille: 0,
            balloon_permille: 0,
            end: None,
        }
    }

    fn check(&self) -> Result<(), MockError> {
        let problem = if self.table_permille.saturating_add(self.balloon_permille) > 1000 {
            "the parts of a workload are more than the whole"
        } else if self.working_set == 0 {
            "a workload needs a page to work on"
        } else if self.rate == 0 {
            "a workload does something each second"
        } else if (self.end).is_some_and(|end| end.reason == ShutdownReason::Suspend) {
            "a guest suspends when it is asked to, and not by itself"
        } else {
            return Ok(());
        };
        Err(MockError::BadSpec(problem.to_owned()))
    }
}

/// What a workload has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkloadCounts {
    /// Writes to data.
    pub writes: u64,
    /// Changes of page tables.
    pub table_updates: u64,
    /// Pages given back.
    pub given_back: u64,
    /// Pages taken.
    pub taken: u64,
    /// Operations for which there was no page, or no memory.
    pub idle: u64,
}

impl WorkloadCounts {
    const NONE: Self = Self {
        writes: 0,
        table_updates: 0,
        given_back: 0,
        taken: 0,
        idle: 0,
    };

    /// All operations.
    pub const fn operations(&self) -> u64 {
        self.writes + self.table_updates + self.given_back + self.taken + self.idle
    }
}

impl AddAssign for WorkloadCounts {
    fn add_assign(&mut self, more: Self) {
        self.writes += more.writes;
        self.table_updates += more.table_updates;
        self.given_back += more.given_back;
        self.taken += more.taken;
        self.idle += more.idle;
    }
}

/// Where a PV guest has a page mapped.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    /// A level-1 table.
    table: Mfn,
    /// An entry of it.
    index: usize,
    /// While the page is given back: the entry's flags.
    flags: u64,
}

/// A page of the working set.
#[derive(Debug)]
struct WorkPage {
    pfn: u64,
    /// Its frame; `None` while it is given back.
    mfn: Option<Mfn>,
    /// PV: every entry that maps it.
    mapped: Vec<Mapping>,
}

/// A guest's work. One per domain at a time: it keeps count of what is mapped where.
#[derive(Debug)]
pub struct Workload {
    domain: MockDomain,
    spec: WorkloadSpec,
    random: SplitMix64,
    /// Pages that can be written.
    present: Vec<WorkPage>,
    /// Pages that were given back, those the guest began without among them.
    absent: Vec<WorkPage>,
    /// Least number of pages kept.
    keep: usize,
    pv: Option<PvView>,
    counts: WorkloadCounts,
}

impl MockHost {
    /// Work for a guest, which has its memory and its kernel's tables in place.
    /// Looks through all of its page tables.
    ///
    /// # Errors
    ///
    /// [`MockError::BadSpec`] for parts above the whole, no rate or no working set;
    /// ESRCH; EINVAL for a PV guest that has not published its p2m, and for a guest
    /// without a page of data.
    pub fn workload(&self, domid: DomId, spec: &WorkloadSpec) -> Result<Workload, MockError> {
        spec.check()?;
        let domain = self.mock_domain(domid)?;
        let mut workload = Workload {
            random: SplitMix64::new(mix(spec.seed)),
            spec: spec.clone(),
            present: Vec::new(),
            absent: Vec::new(),
            keep: 0,
            pv: None,
            counts: WorkloadCounts::default(),
            domain: domain.clone(),
        };
        domain.look("workload", |state| workload.find_pages(state))?;
        Ok(workload)
    }
}

impl Workload {
    /// Choose the working set.
    fn find_pages(&mut self, state: &State) -> Result<(), Errno> {
        let (mut present, absent) = match self.domain.dom.kind {
            GuestKind::Pv => {
                let view = PvView::new(&self.domain, state)?;
                let pages = view.data_pages(&self.domain, state);
                self.pv = Some(view);
                pages
            }
            GuestKind::Hvm | GuestKind::Pvh => (self.translated_pages(), Vec::new()),
        };
        self.random.shuffle(&mut present);
        let working_set = usize::try_from(self.spec.working_set).unwrap_or(usize::MAX);
        present.truncate(working_set);
        if present.is_empty() {
            return Err(Errno::EINVAL);
        }
        self.keep = present.len().div_ceil(2);
        self.present = present;
        self.absent = absent;
        // Who only writes to pages has no need to know where they are mapped.
        let moves = self.spec.table_permille > 0 || self.spec.balloon_permille > 0;
        if let Some(view) = self.pv.as_ref().filter(|_| moves) {
            view.find_mappings(&self.domain, &mut self.present);
        }
        Ok(())
    }

    fn translated_pages(&self) -> Vec<WorkPage> {
        let domain = &self.domain;
        let end = domain
            .machine
            .max_gfn(domain.dom.domid)
            .map_or(0, |n| n + 1);
        (0..end)
            .filter(|pfn| !SPECIAL_PAGES.contains(pfn))
            .filter_map(|pfn| {
                let (mfn, _) = domain.resolve(Gfn(pfn))?;
                Some(WorkPage {
                    pfn,
                    mfn: Some(mfn),
                    mapped: Vec::new(),
                })
            })
            .collect()
    }

    /// What it has done so far.
    pub fn counts(&self) -> WorkloadCounts {
        self.counts
    }

    /// The pages it may write to at present, ascending.
    pub fn working_set(&self) -> Vec<Pfn> {
        let mut pfns: Vec<Pfn> = self.present.iter().map(|page| Pfn(page.pfn)).collect();
        pfns.sort_unstable();
        pfns
    }

    /// Do `operations` operations now, on this thread. Says how many were done:
    /// fewer, or none, where the guest does not run, or shuts down.
    ///
    /// # Errors
    ///
    /// ESRCH when the domain is gone; what the hypervisor refuses a guest that keeps
    /// its rules is a fault of the mock's, and ends the work: EINVAL, EBUSY.
    pub fn step(&mut self, operations: u64) -> Result<u64, BackendError> {
        let mut done = 0;
        while done < operations {
            let mut batch = BATCH.min(operations - done);
            let domain = self.domain.clone();
            if let Some(end) = self.spec.end {
                batch = batch.min(end.after.saturating_sub(self.counts.operations()));
                if batch == 0 {
                    if domain.shut_down(end.reason)? {
                        // Whoever resumes it finds it at work as before.
                        self.spec.end = None;
                    }
                    break;
                }
            }
            let ran = domain.look("workload", |state| {
                if !MockDomain::runs(state) {
                    return Ok(false);
                }
                for _ in 0..batch {
                    let counts = self.operate(state)?;
                    self.counts += counts;
                }
                Ok(true)
            })?;
            if !ran {
                break;
            }
            done += batch;
        }
        Ok(done)
    }

    /// Operations that its rate makes of a time.
    pub(super) fn operations_in(&self, time: Duration) -> u64 {
        let operations = time.as_nanos() * u128::from(self.spec.rate) / 1_000_000_000;
        u64::try_from(operations).unwrap_or(u64::MAX)
    }

    /// Run at the spec's rate on a thread of its own, while the domain runs, until
    /// the handle is dropped or the domain destroyed.
    pub fn run_in_background(self) -> BackgroundWorkload {
        BackgroundWorkload::start(self)
    }

    /// Do one operation, whose kind is drawn.
    fn operate(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let balloon = usize::from(self.spec.balloon_permille);
        let tables = balloon + usize::from(self.spec.table_permille);
        let draw = self.random.below(1000);
        if draw < balloon {
            self.balloon(state)
        } else if draw < tables && self.pv.is_some() {
            self.change_tables(state)
        } else {
            Ok(self.write())
        }
    }

    /// Write a line of a page.
    fn write(&mut self) -> WorkloadCounts {
        let at = self.random.below(self.present.len());
        let line = self.random.below(ENTRIES_PER_TABLE / WORDS_PER_WRITE);
        let page = &self.present[at];
        let Some(mfn) = page.mfn else {
            return WorkloadCounts {
                idle: 1,
                ..WorkloadCounts::NONE
            };
        };
        for word in 0..WORDS_PER_WRITE {
            let value = self.random.next();
            let machine = &self.domain.machine;
            machine.store_word(mfn, line * WORDS_PER_WRITE + word, value);
        }
        self.domain.dom.dirty.mark(page.pfn);
        WorkloadCounts {
            writes: 1,
            ..WorkloadCounts::NONE
        }
    }

    /// Give a page back, or take one.
    fn balloon(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let give = self.present.len() > self.keep;
        let take = !self.absent.is_empty();
        let coin = self.random.below(2) == 0;
        match (give, take) {
            (true, false) => self.give_back(state),
            (true, true) if coin => self.give_back(state),
            (_, true) => self.take(state),
            (false, false) => Ok(WorkloadCounts {
                idle: 1,
                ..WorkloadCounts::NONE
            }),
        }
    }

    /// As a balloon driver does: clear the page, take it out of page tables and p2m,
    /// give it back.
    fn give_back(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let at = self.random.below(self.present.len());
        self.give_back_page(state, at)
    }

    fn give_back_page(&mut self, state: &State, at: usize) -> Result<WorkloadCounts, Errno> {
        let mut page = self.present.swap_remove(at);
        let Some(mfn) = page.mfn.take() else {
            return Err(Errno::EINVAL);
        };
        for index in 0..ENTRIES_PER_TABLE {
            self.domain.machine.store_word(mfn, index, 0);
        }
        self.domain.dom.dirty.mark(page.pfn);
        if let Some(view) = &self.pv {
            view.unmap(&self.domain, state, &mut page)?;
            self.domain.set_p2m_entry(&view.p2m, page.pfn, None)?;
        }
        self.domain.decrease_reservation(page.pfn, mfn)?;
        self.absent.push(page);
        Ok(WorkloadCounts {
            given_back: 1,
            ..WorkloadCounts::NONE
        })
    }

    /// Take a page, put it where it was, and use it.
    fn take(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let at = self.random.below(self.absent.len());
        let mfn = match self.domain.increase_reservation(state, self.absent[at].pfn) {
            Ok(mfn) => mfn,
            // No memory is no fault: a guest lives with it.
            Err(Errno::ENOMEM) => {
                return Ok(WorkloadCounts {
                    idle: 1,
                    ..WorkloadCounts::NONE
                });
            }
            Err(errno) => return Err(errno),
        };
        let mut page = self.absent.swap_remove(at);
        page.mfn = Some(mfn);
        if let Some(view) = &self.pv {
            self.domain.set_p2m_entry(&view.p2m, page.pfn, Some(mfn))?;
            view.map(&self.domain, state, &page, mfn)?;
        }
        for index in 0..WORDS_PER_WRITE {
            let value = self.random.next();
            self.domain.machine.store_word(mfn, index, value);
        }
        self.domain.dom.dirty.mark(page.pfn);
        self.present.push(page);
        Ok(WorkloadCounts {
            taken: 1,
            ..WorkloadCounts::NONE
        })
    }
}

#[cfg(test)]
mod tests;
