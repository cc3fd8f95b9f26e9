//! A running guest's operations on its memory, with the hypervisor's part in them. The caller holds
//! the domain's state, and the guest runs, unless noted.
//!
//! C implementation: `guest_remove_page` and `populate_physmap` in
//! `xen/common/memory.c`, `paging_mark_dirty` in `xen/arch/x86/mm/paging.c`.

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn};

use super::domain::MockDomain;
use super::state::State;
use crate::ShutdownReason;
use crate::error::BackendError;

impl MockDomain {
    /// Whether the guest executes.
    pub(super) fn runs(state: &State) -> bool {
        let record = &state.record;
        let awake = record.vcpus.iter().any(|vcpu| vcpu.online);
        record.pauses == 0 && record.shutdown.is_none() && awake
    }

    /// The guest shuts down (`SCHEDOP_shutdown`). Returns whether it did: it may not be executing.
    /// The caller does not hold its state.
    pub(super) fn shut_down(&self, reason: ShutdownReason) -> Result<bool, BackendError> {
        self.change("shutdown", |state| {
            let runs = Self::runs(state);
            if runs {
                state.record.shutdown = Some(reason);
            }
            Ok(runs)
        })
    }

    /// Log the guest's write to a frame of a PV guest.
    pub(super) fn mark_frame(&self, mfn: Mfn) {
        // Xen's own pages have no pfn, and are not logged.
        if let Some(pfn) = self.machine.m2p(mfn) {
            self.dom.dirty.mark(pfn);
        }
    }

    /// A PV guest stores the u64 at `index` of a frame that it may write.
    pub(super) fn guest_store(&self, mfn: Mfn, index: usize, value: u64) {
        self.machine.store_word(mfn, index, value);
        self.mark_frame(mfn);
    }

    /// Give back the page at `pfn`, whose frame is `mfn` (`XENMEM_decrease_reservation`). EINVAL
    /// for a frame that is not the guest's; EBUSY while it has references.
    pub(super) fn decrease_reservation(&self, pfn: u64, mfn: Mfn) -> Result<(), Errno> {
        let frame = self.machine.frames.owned(mfn, self.dom.domid);
        let frame = frame.filter(|frame| !frame.xen_heap);
        if frame.ok_or(Errno::EINVAL)?.count > 0 {
            return Err(Errno::EBUSY);
        }
        self.dom.p2m_clear(pfn);
        self.machine.free_page(mfn, self.dom.domid)
    }

    /// Take a page for `pfn` (`XENMEM_populate_physmap`). ENOMEM if the domain or the machine has
    /// no pages left, or if the pfn already has a frame.
    pub(super) fn increase_reservation(&self, state: &State, pfn: u64) -> Result<Mfn, Errno> {
        let mut gfn = Gfn(pfn);
        if self.machine.tot_pages(self.dom.domid) >= state.record.max_pages
            || !self.populate_extent(0, &mut gfn)?
        {
            return Err(Errno::ENOMEM);
        }
        self.resolve(gfn).map(|(mfn, _)| mfn).ok_or(Errno::EINVAL)
    }
}
