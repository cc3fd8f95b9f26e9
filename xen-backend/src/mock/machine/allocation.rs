//! Allocation of the machine's frames, among all processes that have it open.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, MutexGuard, PoisonError};

use xsr_format::frame::Mfn;

use super::super::allocator::{Allocator, BLOCK_FRAMES};
use super::super::frames::{Frame, Frames};
use super::super::memory::Words;
use super::super::sharing::{Changes, Held, Range};
use super::super::state::Dom;
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
    allocation: MutexGuard<'m, Allocation>,
}

impl Deref for Allocating<'_> {
    type Target = Allocator;

    fn deref(&self) -> &Allocator {
        &self.allocation.allocator
    }
}

impl DerefMut for Allocating<'_> {
    fn deref_mut(&mut self) -> &mut Allocator {
        &mut self.allocation.allocator
    }
}

impl Drop for Allocating<'_> {
    fn drop(&mut self) {
        if self.allocation.allocator.take_changed() {
            self.allocation.seen = self.store.changed(Changes::Allocator);
        }
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

    pub(super) fn allocator(&self) -> Allocating<'_> {
        let mut allocation = self.allocation();
        let held = (allocation.holders == 0).then(|| {
            let held = self.store.locks.hold(Range::Allocator);
            self.refresh_allocator(&mut allocation);
            held
        });
        Allocating {
            store: &self.store,
            _held: held,
            allocation,
        }
    }

    /// Keeps other processes from the allocator until the result is dropped.
    pub(in super::super) fn hold_allocator(&self) -> AllocatorHeld<'_> {
        let mut allocation = self.allocation();
        if allocation.holders == 0 {
            self.store.locks.wait(Range::Allocator);
            self.refresh_allocator(&mut allocation);
        }
        allocation.holders += 1;
        AllocatorHeld(self)
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
) {
    let mut pages: BTreeMap<DomId, u64> = BTreeMap::new();
    for block in 1..taken.len() {
        let first = block as u64 * BLOCK_FRAMES;
        let mut count = 0;
        for mfn in (first..first + BLOCK_FRAMES).map(Mfn) {
            let Some(frame) = frames.get(mfn) else {
                continue;
            };
            let Some(owner) = frame.owner else { continue };
            let kept = domains
                .get(&owner)
                .is_some_and(|dom| !frame.xen_heap || dom.lock().record.borrows(mfn));
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
}
