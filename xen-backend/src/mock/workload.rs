//! Workloads of mock guests: writes to memory, page tables that change, pages given back and taken
//! again, at a rate and in proportions that the caller chooses.
//!
//! All randomness comes from a seed, and pages are chosen by pfn, so the same workload does the
//! same to equal guests on different machines. The domain's state is held during each operation:
//! the guest is stopped while another thread holds it, and a suspend waits for the current
//! operation. A suspending kernel's own writes come after that.

mod background;
mod pv;

use std::ops::AddAssign;
use std::time::Duration;

use crate::Errno;
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

/// Words of a page that one operation writes: a cache line.
const WORDS_PER_WRITE: usize = 8;

/// Operations after which the domain's state is released.
const BATCH: u64 = 64;

/// Specification of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// The seed of its choices.
    pub seed: u64,
    /// Operations per second, if it runs in the background. Each writes at most one page, not
    /// counting changes of page tables and p2m.
    pub rate: u32,
    /// Pages that it writes to and moves, chosen at random from those that hold data; all of these
    /// if there are fewer.
    pub working_set: u64,
    /// The number of operations in 1000 that change page tables. Zero in an HVM guest.
    pub table_permille: u16,
    /// The number of operations in 1000 that give a page back or take one.
    pub balloon_permille: u16,
    /// The guest's own shutdown, if any.
    #[serde(default)]
    pub end: Option<WorkloadEnd>,
}

/// The shutdown of a guest by itself, by a request to Xen (`SCHEDOP_shutdown`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadEnd {
    /// Operations before it.
    pub after: u64,
    /// The reason that it gives Xen. A guest does not suspend without a request.
    pub reason: ShutdownReason,
}

impl WorkloadSpec {
    /// Only plain writes, to `working_set` pages, `rate` per second.
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

/// Counts of a workload's operations.
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
    /// Operations that found no page or no memory.
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

/// A place where a PV guest has a page mapped.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    /// A level-1 table.
    table: Mfn,
    /// The index of an entry in it.
    index: usize,
    /// The entry's flags, kept while the page is given back.
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

/// A guest's workload. At most one per domain, because it tracks the mappings of pages.
#[derive(Debug)]
pub struct Workload {
    domain: MockDomain,
    spec: WorkloadSpec,
    random: SplitMix64,
    /// Pages that can be written.
    present: Vec<WorkPage>,
    /// Pages that were given back, including those missing from the start.
    absent: Vec<WorkPage>,
    /// The least number of present pages.
    keep: usize,
    pv: Option<PvView>,
    counts: WorkloadCounts,
}

impl MockHost {
    /// A workload for a guest, which must have its memory and its kernel's tables. Searches all of
    /// its page tables.
    ///
    /// # Errors
    ///
    /// [`MockError::BadSpec`] for proportions that exceed the whole, a rate of zero or an empty
    /// working set; ESRCH; EINVAL for a PV guest that has not published its p2m, and for a guest
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
        // A workload that only writes to pages does not need their mappings.
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

    /// The operations done so far.
    pub fn counts(&self) -> WorkloadCounts {
        self.counts
    }

    /// The pages that it may currently write to, in ascending order.
    pub fn working_set(&self) -> Vec<Pfn> {
        let mut pfns: Vec<Pfn> = self.present.iter().map(|page| Pfn(page.pfn)).collect();
        pfns.sort_unstable();
        pfns
    }

    /// Do `operations` operations now, on this thread. Returns how many were done: fewer, or none,
    /// if the guest does not run or shuts down.
    ///
    /// # Errors
    ///
    /// ESRCH if the domain is gone. EINVAL or EBUSY if the hypervisor refuses an operation,
    /// although the guest keeps the rules: this is a bug in the mock, and ends the work.
    pub fn step(&mut self, operations: u64) -> Result<u64, BackendError> {
        let mut done = 0;
        while done < operations {
            let mut batch = BATCH.min(operations - done);
            let domain = self.domain.clone();
            if let Some(end) = self.spec.end {
                batch = batch.min(end.after.saturating_sub(self.counts.operations()));
                if batch == 0 {
                    if domain.shut_down(end.reason)? {
                        // After a resume, it works as before.
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

    /// Operations due in this time at its rate.
    pub(super) fn operations_in(&self, time: Duration) -> u64 {
        let operations = time.as_nanos() * u128::from(self.spec.rate) / 1_000_000_000;
        u64::try_from(operations).unwrap_or(u64::MAX)
    }

    /// Run at the specified rate on a separate thread, while the domain runs, until the handle is
    /// dropped or the domain is destroyed.
    pub fn run_in_background(self) -> BackgroundWorkload {
        BackgroundWorkload::start(self)
    }

    /// Do one operation of a random kind.
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

    /// Write a cache line of a page.
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

    /// Act like a balloon driver: clear the page, remove it from page tables and p2m, and give it
    /// back.
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

    /// Take a page, map it where the old one was mapped, and use it.
    fn take(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let at = self.random.below(self.absent.len());
        let mfn = match self.domain.increase_reservation(state, self.absent[at].pfn) {
            Ok(mfn) => mfn,
            // Lack of memory is not an error: a guest copes with it.
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
