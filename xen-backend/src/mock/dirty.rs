//! The dirty log of the mock machine: the pages that a guest writes.
//!
//! It is off at first. Everything that writes on the guest's behalf marks the page: its stores,
//! page tables that the hypervisor changes for it, tables that come into or go out of use. Foreign
//! mappings mark nothing. Whether the physmap does depends on the mocked version of Xen
//! ([`HostConfig::logs_new_pages`](super::HostConfig)): an older one does not report a page that a
//! translated guest takes, and maps it writable, so that the guest's writes to it are not logged
//! until the log has been read.
//!
//! C implementation: `xen/arch/x86/mm/paging.c`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::Errno;

use super::MockHost;
use super::domain::MockDomain;
use super::error::MockError;
use super::phases::phase;
use super::workload::Workload;
use crate::error::BackendError;
use crate::{DirtyBitmap, DirtyRead, DirtyStats, DomId, GuestKind, LogDirty};

/// Words of a leaf of the log. Xen's own leaves are a page, too.
const LEAF_WORDS: usize = 512;
/// Pfns of a leaf.
const LEAF_PFNS: u64 = 64 * LEAF_WORDS as u64;

/// The contents of the log.
#[derive(Debug, Default)]
struct Log {
    /// By pfn / [`LEAF_PFNS`].
    leaves: BTreeMap<u64, Box<[u64; LEAF_WORDS]>>,
    dirty_count: u64,
    /// Pfns that have been given a page since the log was last read: writes to them do not fault.
    fresh: BTreeSet<u64>,
}

impl Log {
    fn mark(&mut self, pfn: u64) {
        let leaf = self.leaves.entry(pfn / LEAF_PFNS);
        let leaf = leaf.or_insert_with(|| Box::new([0; LEAF_WORDS]));
        let within = pfn % LEAF_PFNS;
        let bit = 1 << (within % 64);
        let word = usize::try_from(within / 64).expect("less than the leaf's words");
        let word = &mut leaf[word];
        self.dirty_count += u64::from(*word & bit == 0);
        *word |= bit;
    }
}

/// A domain's log: `None` while it is off. Locked after the domain's state.
#[derive(Debug, Default)]
pub(super) struct DirtyLog(Mutex<Option<Log>>);

impl DirtyLog {
    fn lock(&self) -> MutexGuard<'_, Option<Log>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enable the log. EINVAL if it is on.
    fn enable(&self) -> Result<(), Errno> {
        let mut log = self.lock();
        match *log {
            Some(_) => Err(Errno::EINVAL),
            None => {
                *log = Some(Log::default());
                Ok(())
            }
        }
    }

    fn disable(&self) {
        *self.lock() = None;
    }

    /// The guest has written `pfn`. Called after the write, so that a reader that clears the mark
    /// in between reads the new contents.
    pub(super) fn mark(&self, pfn: u64) {
        if let Some(log) = &mut *self.lock()
            && !log.fresh.contains(&pfn)
        {
            log.mark(pfn);
        }
    }

    /// A translated guest has been given pages at `pfns`; `logs`: the hypervisor marks them.
    pub(super) fn added(&self, pfns: Range<u64>, logs: bool) {
        if let Some(log) = &mut *self.lock() {
            if logs {
                pfns.clone().for_each(|pfn| log.mark(pfn));
            }
            log.fresh.extend(pfns);
        }
    }

    /// Read the log, and clear it if `forget`: in whole leaves, like Xen, even if `out` covers only
    /// part of one. EINVAL if it is off.
    fn read(&self, forget: bool, out: &mut DirtyBitmap) -> Result<u64, Errno> {
        let mut log = self.lock();
        let log = log.as_mut().ok_or(Errno::EINVAL)?;
        out.clear_all();
        let pfns = out.pfns();
        for (n, leaf) in &log.leaves {
            out.copy_words(n * LEAF_PFNS, leaf.as_slice());
        }
        let count = log.dirty_count;
        if forget {
            log.leaves.retain(|n, _| n * LEAF_PFNS >= pfns);
            log.dirty_count = 0;
            log.fresh.clear();
        }
        Ok(count)
    }
}

impl LogDirty for MockDomain {
    fn enable_log_dirty(&self) -> Result<(), BackendError> {
        self.look("enable_logdirty", |_| {
            if self.dom.kind == GuestKind::Pv && !self.machine.config.shadow_paging {
                return Err(Errno::EOPNOTSUPP);
            }
            self.dom.dirty.enable()
        })?;
        if let Some(stepped) = &self.machine.config.stepped {
            let host = MockHost {
                machine: Arc::clone(&self.machine),
            };
            let work = host.workload(self.dom.domid, &stepped.work);
            let work = work.map_err(|error| {
                tracing::error!(%error, "work in steps");
                self.fail("enable_logdirty", Errno::EINVAL)
            });
            let work = work.inspect_err(|_| self.dom.dirty.disable())?;
            *self.stepped() = Some((work, Instant::now()));
        }
        self.step()?;
        phase("log-dirty-on");
        Ok(())
    }

    fn disable_log_dirty(&self) -> Result<(), BackendError> {
        self.look("shadow_off", |_| {
            self.dom.dirty.disable();
            Ok(())
        })?;
        // The work and the domain refer to each other.
        let work = self.stepped().take();
        drop(work);
        Ok(())
    }

    fn read_dirty(
        &self,
        how: DirtyRead,
        out: &mut DirtyBitmap,
    ) -> Result<DirtyStats, BackendError> {
        let op = match how {
            DirtyRead::Peek => "logdirty_peek",
            DirtyRead::Clean | DirtyRead::CleanFinal => "logdirty_clean",
        };
        phase("read-dirty");
        self.catch_up()?;
        // While the state is held, the guest is stopped, as on Xen.
        let stats = self.look(op, |state| {
            let stopped = state.record.pauses > 0 || state.record.shutdown.is_some();
            if how == DirtyRead::CleanFinal && !stopped {
                return Err(Errno::EINVAL);
            }
            let dirty_count = self.dom.dirty.read(how.forgets(), out)?;
            let fault_count = match self.dom.kind {
                // With shadow paging, pages are mapped read-only, so each first write is a fault.
                GuestKind::Pv => dirty_count,
                GuestKind::Hvm | GuestKind::Pvh => 0,
            };
            Ok(DirtyStats {
                dirty_count,
                fault_count,
            })
        })?;
        if how.forgets() {
            self.step()?;
        }
        Ok(stats)
    }

    fn logs_new_pages(&self) -> Result<bool, BackendError> {
        Ok(self.machine.config.logs_new_pages())
    }
}

impl MockDomain {
    fn stepped(&self) -> MutexGuard<'_, Option<(Workload, Instant)>> {
        let stepped = self.dom.stepped.lock();
        stepped.unwrap_or_else(PoisonError::into_inner)
    }

    /// Do one step of the guest's work, if the guest runs and its steps are counted.
    pub(super) fn step(&self) -> Result<(), BackendError> {
        if let (Some((work, _)), Some(operations)) = (&mut *self.stepped(), self.counted()) {
            work.step(operations)?;
        }
        Ok(())
    }

    /// Do the work that is due by now, if the guest runs and its steps are timed.
    pub(super) fn catch_up(&self) -> Result<(), BackendError> {
        if let (Some((work, last)), None) = (&mut *self.stepped(), self.counted()) {
            let now = Instant::now();
            work.step(work.operations_in(now - *last))?;
            *last = now;
        }
        Ok(())
    }

    fn counted(&self) -> Option<u64> {
        self.machine.config.stepped.as_ref()?.operations
    }
}

impl MockHost {
    /// Simulate another user of the domain's log, such as VRAM tracking for a guest's screen, or a
    /// save that died: enabling the log fails with EINVAL until it has been disabled. This lasts at
    /// most until the process ends.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL if the log is on.
    pub fn hold_log_dirty(&self, domid: DomId) -> Result<(), MockError> {
        Ok(self.mock_domain(domid)?.enable_log_dirty()?)
    }

    /// Whether the domain's dirty log is on.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn is_log_dirty(&self, domid: DomId) -> Result<bool, MockError> {
        let domain = self.mock_domain(domid)?;
        Ok(domain.look("log_dirty", |_| Ok(domain.dom.dirty.lock().is_some()))?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::DomainControl as _;
    use crate::mock::{GuestSpec, HostConfig, Stepped, WorkloadSpec};

    /// The numbers of dirty pages in three reads of the log: after `time`, after the guest has run
    /// as long again and suspended, and after it has been suspended for as long.
    fn dirty_after(operations: Option<u64>, time: Duration) -> [u64; 3] {
        let config = HostConfig {
            stepped: Some(Stepped {
                work: WorkloadSpec::writes(1, 1_000_000, 100_000),
                operations,
            }),
            ..HostConfig::default()
        };
        let host = MockHost::ephemeral(&config).unwrap();
        let spec = GuestSpec::new("steps", GuestKind::Pvh, 64);
        let domain = host.mock_domain(host.create_guest(&spec).unwrap()).unwrap();
        domain.enable_log_dirty().unwrap();
        let mut bitmap = DirtyBitmap::new(64 << 8);
        let wait = || {
            let begun = Instant::now();
            while begun.elapsed() < time {
                std::hint::spin_loop();
            }
        };
        let mut read = |how| {
            domain.read_dirty(how, &mut bitmap).unwrap();
            bitmap.count()
        };
        wait();
        let first = read(DirtyRead::Clean);
        wait();
        domain.suspend().unwrap();
        let suspended = read(DirtyRead::Peek);
        wait();
        [first, suspended, read(DirtyRead::CleanFinal)]
    }

    #[test]
    fn timed_steps_are_what_a_rate_makes_of_the_time_and_counted_ones_are_not() {
        let [first, suspended, asleep] = dirty_after(None, Duration::from_millis(5));
        // At least 5000 writes to 16384 pages, with some pages written twice.
        assert!(first >= 4000, "{first}");
        assert!(suspended >= 4000, "{suspended}");
        assert_eq!(suspended, asleep);
        assert_eq!(dirty_after(Some(0), Duration::from_millis(5)), [0; 3]);
        let [first, suspended, asleep] = dirty_after(Some(64), Duration::ZERO);
        assert!((50..=64).contains(&first), "{first}");
        assert!((50..=64).contains(&suspended), "{suspended}");
        assert_eq!(suspended, asleep);
    }
}
