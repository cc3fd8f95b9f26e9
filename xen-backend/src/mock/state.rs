//! State of one domain of the mock machine.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use xsr_format::frame::{Gfn, Mfn};

use super::dirty::DirtyLog;
use super::error::MockError;
use super::memory::Words;
use super::sharing::{Changes, Held, Lock, Range};
use super::store::{Saved, Store};
use super::workload::Workload;
use crate::domain_store::LockHolder;
use crate::{DomId, DomainSettings, GuestKind, ShutdownReason, TscInfo, Uuid};

/// The page-table roots of a PV vcpu that has a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Roots {
    /// The frame of the kernel's top-level table.
    pub(super) kernel: u64,
    /// The frame of the user's top-level table (64-bit guests).
    pub(super) user: Option<u64>,
}

/// One vcpu.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Vcpu {
    pub(super) online: bool,
    /// PV: the page tables its context holds references to.
    pub(super) roots: Option<Roots>,
}

/// The small state of a domain, as `state.json` holds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) domid: DomId,
    /// Distinguishes it from an earlier domain with the same number.
    #[serde(default)]
    pub(super) born: u64,
    /// Empty for a domain that was not given one.
    pub(super) name: String,
    #[serde(default)]
    pub(super) uuid: Uuid,
    pub(super) kind: GuestKind,
    /// Bytes in the guest's word.
    pub(super) width: u8,
    pub(super) max_pages: u64,
    pub(super) pauses: u32,
    /// Whether any vcpu has ever run.
    pub(super) has_run: bool,
    pub(super) shutdown: Option<ShutdownReason>,
    /// PV, while suspended: the xenstore and console frames that the guest had.
    pub(super) suspended_rings: Option<[u64; 2]>,
    /// The frame of shared_info.
    pub(super) shared_info: u64,
    /// The first frame of the grant table ([`super::grants`]).
    pub(super) grant_table: u64,
    /// Further pages of Xen's, lent to the guest for publishing its p2m.
    #[serde(default)]
    pub(super) lent: Vec<u64>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) tsc: TscInfo,
    /// Translated: HVM parameters by index.
    pub(super) hvm_params: Vec<u64>,
    /// The settings that it was created with.
    #[serde(default)]
    pub(super) settings: DomainSettings,
    #[serde(default)]
    pub(super) placement: Placement,
    /// It does not answer requests to suspend.
    #[serde(default)]
    pub(super) ignores_suspend: bool,
}

/// Where and how much the vcpus of a domain may run. Nothing on the machine depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Placement {
    /// For each vcpu whose hard affinity has been set, a bit for each processor, from bit 0 of
    /// byte 0 on.
    pub affinity: BTreeMap<u32, Vec<u8>>,
    /// Of the credit scheduler.
    pub weight: u16,
    /// Of the credit scheduler, in percent of a processor; 0 for none.
    pub cap: u16,
}

impl Default for Placement {
    /// As the scheduler makes it.
    fn default() -> Self {
        Self {
            affinity: BTreeMap::new(),
            weight: 256,
            cap: 0,
        }
    }
}

impl Record {
    /// Its name; `None` if it was not given one.
    pub(super) fn given_name(&self) -> Option<&str> {
        Some(self.name.as_str()).filter(|name| !name.is_empty())
    }

    /// Its name, or the default if it has none.
    pub(super) fn shown_name(&self) -> String {
        let given = self.given_name().map(str::to_owned);
        given.unwrap_or_else(|| format!("domain-{}", self.domid.0))
    }

    /// Whether `mfn` is one of Xen's own pages that is lent to the domain.
    pub(super) fn borrows(&self, mfn: Mfn) -> bool {
        self.shared_info == mfn.0 || self.grant_table == mfn.0 || self.lent.contains(&mfn.0)
    }
}

/// Name of the blob that holds the HVM context.
pub(super) const HVM_CONTEXT: &str = "hvm-context";
/// Name of the blob that holds the CPUID leaves.
pub(super) const CPUID_LEAVES: &str = "cpuid-leaves";
/// Name of the blob that holds the MSRs of the CPU policy.
pub(super) const POLICY_MSRS: &str = "policy-msrs";
/// The mutable state of a domain, under its lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) record: Record,
    /// Contexts and policy by name.
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
}

/// A domain.
#[derive(Debug)]
pub(super) struct Dom {
    pub(super) domid: DomId,
    pub(super) kind: GuestKind,
    /// Translated guests: mfn + 1 of each pfn, 0 if it has none.
    pub(super) p2m: Option<Words>,
    /// Set once this process knows that the domain is destroyed.
    gone: AtomicBool,
    born: u64,
    store: Arc<Store>,
    /// The change count that `state` corresponds to.
    seen: AtomicU64,
    /// The guest's dirty log, kept only while this process has the host open.
    pub(super) dirty: DirtyLog,
    /// Work done in steps while the log is on, and the time of the last step.
    pub(super) stepped: Mutex<Option<(Workload, Instant)>>,
    /// The holder of the domain's lock, if it is this process.
    pub(super) holder: Mutex<Option<LockHolder>>,
    state: Mutex<State>,
    /// Keeps this process's threads from freeing memory that one of them writes by its frames.
    memory: RwLock<()>,
    /// The number of [`Writing`] of this process, which share one lock.
    writers: Mutex<usize>,
}

/// Permission to write a domain's memory by its frames ([`Dom::write`]).
#[derive(Debug)]
#[must_use = "dropping it lets the domain lose its frames"]
pub(super) struct Writing<'d> {
    dom: &'d Dom,
    _threads: RwLockReadGuard<'d, ()>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut writers = self.dom.writers();
        *writers -= 1;
        if *writers == 0 {
            let range = Range::Memory(self.dom.domid);
            self.dom.store.locks.give_back(range);
        }
    }
}

/// Keeps a domain's memory from being written ([`Dom::freeze`]).
#[derive(Debug)]
#[must_use = "dropping it lets the memory be written"]
pub(super) struct Frozen<'d> {
    _held: Held<'d>,
    _threads: RwLockWriteGuard<'d, ()>,
}

/// A guard of a domain's state.
#[derive(Debug)]
pub(super) struct Locked<'d> {
    /// Keeps out other processes. Declared before `state`, which keeps out threads, so that it is
    /// dropped first.
    _held: Held<'d>,
    state: MutexGuard<'d, State>,
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// The number of pfns that a translated guest can have: 1 TiB of guest memory.
pub(super) const MAX_PFNS: usize = 1 << 28;

impl Dom {
    /// A domain with this state, which corresponds to the change count `seen`: at a different count
    /// it is read again on its next use. `p2m` is for a translated domain.
    pub(super) fn new(store: &Arc<Store>, saved: Saved, p2m: Option<Words>, seen: u64) -> Self {
        let Saved { record, blobs } = saved;
        Self {
            domid: record.domid,
            kind: record.kind,
            p2m,
            gone: AtomicBool::new(false),
            born: record.born,
            store: Arc::clone(store),
            seen: AtomicU64::new(seen),
            dirty: DirtyLog::default(),
            stepped: Mutex::new(None),
            holder: Mutex::new(None),
            state: Mutex::new(State { record, blobs }),
            memory: RwLock::new(()),
            writers: Mutex::new(0),
        }
    }

    /// The state, for as long as the guard lives; no other process changes it meanwhile. No caller
    /// panics during a change, so the state is valid even if the lock is poisoned.
    ///
    /// # Errors
    ///
    /// [`MockError::Busy`]; another process has changed the state and it cannot be read: what this
    /// process knows must neither be used nor written back.
    pub(super) fn lock(&self) -> Result<Locked<'_>, MockError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let held = self.store.locks.hold(Range::State(self.domid))?;
        self.refresh(&mut state)?;
        Ok(Locked { _held: held, state })
    }

    /// Reads the state again, if another process has changed it. After a failure the next use tries
    /// again.
    fn refresh(&self, state: &mut State) -> Result<(), MockError> {
        let now = self.store.count(Changes::State(self.domid));
        if self.seen.load(Ordering::Acquire) == now || self.is_gone() {
            return Ok(());
        }
        match self.store.load_domain(self.domid)? {
            Some(Saved { record, blobs }) if record.born == self.born => {
                *state = State { record, blobs };
            }
            _ => self.gone.store(true, Ordering::Release),
        }
        self.seen.store(now, Ordering::Release);
        Ok(())
    }

    /// Permission to write memory of the domain by its frames: while the result lives, the domain
    /// keeps them. `None` if the domain is destroyed. Must not be called with the state locked, nor
    /// the state be locked while the result lives.
    ///
    /// # Errors
    ///
    /// As [`Dom::lock`].
    pub(super) fn write(&self) -> Result<Option<Writing<'_>>, MockError> {
        loop {
            if self.is_gone_now()? {
                return Ok(None);
            }
            let threads = self.memory.read().unwrap_or_else(PoisonError::into_inner);
            let mut writers = self.writers();
            if *writers == 0 {
                let range = Range::Memory(self.domid);
                self.store.locks.wait(range, Lock::Shared)?;
            }
            *writers += 1;
            drop(writers);
            let writing = Writing {
                dom: self,
                _threads: threads,
            };
            // A destruction is counted before it waits for the memory.
            let now = self.store.count(Changes::State(self.domid));
            if self.seen.load(Ordering::Acquire) == now && !self.is_gone() {
                return Ok(Some(writing));
            }
        }
    }

    fn writers(&self) -> MutexGuard<'_, usize> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing writes the domain's memory by its frames. Must be called with the state
    /// locked, after [`Dom::changes`].
    ///
    /// # Errors
    ///
    /// [`MockError::Busy`].
    pub(super) fn freeze(&self) -> Result<Frozen<'_>, MockError> {
        let threads = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let held = self.store.locks.hold(Range::Memory(self.domid))?;
        Ok(Frozen {
            _held: held,
            _threads: threads,
        })
    }

    /// Counts a change of the state. Must be called with the state locked, before it is written.
    pub(super) fn changes(&self) {
        let now = self.store.changed(Changes::State(self.domid));
        self.seen.store(now, Ordering::Release);
    }

    /// Marks the domain as destroyed. Must be called with the state locked, after [`Dom::changes`].
    pub(super) fn goes(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Whether the domain was destroyed when this process last locked it.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether the domain is destroyed, by this process or another one.
    ///
    /// # Errors
    ///
    /// As [`Dom::lock`].
    pub(super) fn is_gone_now(&self) -> Result<bool, MockError> {
        let counted = self.store.count(Changes::State(self.domid));
        if self.seen.load(Ordering::Acquire) != counted {
            drop(self.lock()?);
        }
        Ok(self.is_gone())
    }

    /// Whether `record` is of this domain, and not of an earlier one with its number.
    pub(super) fn is(&self, record: &Record) -> bool {
        self.born == record.born && self.domid == record.domid
    }

    /// The frame of a translated guest's `pfn`; `None` if it has none.
    pub(super) fn p2m_get(&self, pfn: Gfn) -> Option<Mfn> {
        let p2m = self.p2m.as_ref()?;
        let index = usize::try_from(pfn.0).ok().filter(|i| *i < p2m.len())?;
        p2m.get(index).checked_sub(1).map(Mfn)
    }

    /// Put `mfn` at `pfn` of a translated guest.
    pub(super) fn p2m_set(&self, pfn: u64, mfn: Mfn) {
        if let (Some(p2m), Ok(index)) = (&self.p2m, usize::try_from(pfn)) {
            p2m.set(index, mfn.0 + 1);
        }
    }

    /// Remove the frame at `pfn` of a translated guest.
    pub(super) fn p2m_clear(&self, pfn: u64) {
        if let (Some(p2m), Ok(index)) = (&self.p2m, usize::try_from(pfn)) {
            p2m.set(index, 0);
        }
    }
}
