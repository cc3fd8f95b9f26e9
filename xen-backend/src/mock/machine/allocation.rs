//! Allocation of the machine's frames, among all processes that have it open.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, MutexGuard, PoisonError};

use xsr_format::frame::Mfn;

use super::super::allocator::{Allocator, BLOCK_FRAMES};
use super::super::error::MockError;
use super::super::frames::{Frame, Frames};
use super::super::memory::Words;
use super::super::sharing::{Changes, Held, Lock, Range};
use super::super::state::{Dom, Record};
use super::super::store::Store;
use super::{COUNTERS, INVALID_M2P, Machine, pages_counter, punch};
use crate::DomId;

/// The allocator, and this process's knowledge of it.
#[derive(Debug)]
pub(super) struct Allocation {
    allocator: Allocator,
    /// The change count that `allocator` corresponds to.
    seen: u64,
    /// The number of [`AllocatorHeld`]; while it is not zero, no other process changes the
    /// allocator.
    holders: usize,
}

impl Allocation {
    pub(super) const fn new(allocator: Allocator, seen: u64) -> Self {
        Self {
            allocator,
            seen,
            holders: 0,
        }
    }
}

/// A guard of the allocator.
pub(super) struct Allocating<'m> {
    store: &'m Store,
    /// Keeps out other processes. Declared before `allocation`, which keeps out threads, so that it
    /// is dropped first.
    _held: Option<Held<'m>>,
    /// Whether a change has been counted.
    counted: bool,
    allocation: MutexGuard<'m, Allocation>,
}

impl Deref for Allocating<'_> {
    type Target = Allocator;

    fn deref(&self) -> &Allocator {
        &self.allocation.allocator
    }
}

/// For a change, which is counted first.
impl DerefMut for Allocating<'_> {
    fn deref_mut(&mut self) -> &mut Allocator {
        if !std::mem::replace(&mut self.counted, true) {
            self.allocation.seen = self.store.changed(Changes::Allocator);
        }
        &mut self.allocation.allocator
    }
}

/// Keeps other processes from taking or giving back frames, so that many can be taken with one
/// lock.
pub(in super::super) struct AllocatorHeld<'m>(&'m Machine);

impl Drop for AllocatorHeld<'_> {
    fn drop(&mut self) {
        let mut allocation = self.0.allocation();
        allocation.holders -= 1;
        if allocation.holders == 0 {
            self.0.store.locks.give_back(Range::Allocator);
        }
    }
}

impl Machine {
    fn allocation(&self) -> MutexGuard<'_, Allocation> {
        let allocation = self.allocation.lock();
        allocation.unwrap_or_else(PoisonError::into_inner)
    }

    /// The allocator; no other process changes it meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Locks::hold`](super::super::sharing::Locks::hold).
    pub(super) fn allocator(&self) -> Result<Allocating<'_>, MockError> {
        let mut allocation = self.allocation();
        let held = match allocation.holders {
            0 => {
                let held = self.store.locks.hold(Range::Allocator)?;
                self.refresh_allocator(&mut allocation);
                Some(held)
            }
            _ => None,
        };
        Ok(Allocating {
            store: &self.store,
            _held: held,
            counted: false,
            allocation,
        })
    }

    /// Keeps other processes from the allocator until the result is dropped.
    ///
    /// # Errors
    ///
    /// As [`Locks::hold`](super::super::sharing::Locks::hold).
    pub(in super::super) fn hold_allocator(&self) -> Result<AllocatorHeld<'_>, MockError> {
        let mut allocation = self.allocation();
        if allocation.holders == 0 {
            self.store.locks.wait(Range::Allocator, Lock::Alone)?;
            self.refresh_allocator(&mut allocation);
        }
        allocation.holders += 1;
        Ok(AllocatorHeld(self))
    }

    /// The number of free frames at this moment.
    pub(in super::super) fn free_pages(&self) -> u64 {
        self.allocation().allocator.free_now()
    }

    /// The first frame of each block that has frames taken, at this moment.
    pub(super) fn taken_blocks(&self) -> Vec<Mfn> {
        self.allocation().allocator.taken_blocks().collect()
    }

    /// Reads the frames taken again, if another process has changed them.
    fn refresh_allocator(&self, allocation: &mut Allocation) {
        let now = self.store.count(Changes::Allocator);
        if allocation.seen != now {
            allocation.allocator.read_again();
            allocation.seen = now;
        }
    }
}

/// Repair the tables after a process did not close the host: free frames without an owner, and
/// recount the frames taken and the pages of each domain.
pub(super) fn recount(
    frames: &Frames,
    taken: &Words,
    m2p: &Words,
    counters: &Words,
    memory: &File,
    domains: &BTreeMap<DomId, Arc<Dom>>,
) -> Result<(), MockError> {
    let mut lent: BTreeMap<DomId, Record> = BTreeMap::new();
    for (domid, dom) in domains {
        lent.insert(*domid, dom.lock()?.record.clone());
    }
    let mut pages: BTreeMap<DomId, u64> = BTreeMap::new();
    for block in 1..taken.len() {
        let first = block as u64 * BLOCK_FRAMES;
        let mut count = 0;
        for mfn in (first..first + BLOCK_FRAMES).map(Mfn) {
            let Some(frame) = frames.get(mfn) else {
                continue;
            };
            let Some(owner) = frame.owner else { continue };
            let kept = lent
                .get(&owner)
                .is_some_and(|record| !frame.xen_heap || record.borrows(mfn));
            if !kept {
                if let Err(errno) = punch(memory, mfn, 1) {
                    tracing::error!(%errno, %mfn, "a frame left behind could not be cleared");
                    // Keep it allocated: it may hold a dead guest's data.
                    count += 1;
                    continue;
                }
                frames.set(mfn, Frame::default());
                if let Ok(index) = usize::try_from(mfn.0) {
                    m2p.set(index, INVALID_M2P);
                }
                continue;
            }
            count += 1;
            if !frame.xen_heap {
                *pages.entry(owner).or_default() += 1;
            }
        }
        taken.set(block, count);
    }
    for domid in (0..=u16::MAX).map(DomId) {
        let at = pages_counter(domid);
        if domains.contains_key(&domid) {
            counters.set(at, pages.get(&domid).copied().unwrap_or(0));
        } else {
            (at..at + COUNTERS)
                .filter(|counter| counters.get(*counter) != 0)
                .for_each(|counter| counters.set(counter, 0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::mock::sharing::Changes;
    use crate::mock::{HostConfig, MockHost};

    #[test]
    fn a_change_is_counted_before_it_is_made() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a host");
        let count = || host.machine.store.count(Changes::Allocator);
        let mut allocator = host.machine.allocator().expect("the allocator");
        let before = count();
        assert!(allocator.taken_blocks().count() > 0);
        assert_eq!(count(), before, "only looked at");
        for _ in 0..2 {
            // The first step of any change.
            let _: &mut _ = &mut *allocator;
            assert_eq!(count(), before + 1);
        }
    }
}
