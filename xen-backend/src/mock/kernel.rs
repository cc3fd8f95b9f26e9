//! A PV guest's kernel during a suspend and a resume. The mock executes no code, so it does the
//! kernel's work itself. [`super::wake`] has the work after a restore.
//!
//! C implementation: Linux, `drivers/xen/manage.c`, `arch/x86/xen/suspend_pv.c`.

use crate::Errno;
use xsr_format::frame::Mfn;

use super::domain::MockDomain;
use super::layout::{StartInfoLayout, VcpuLayout, read_word};
use super::pv::blob_name;
use super::state::State;
use crate::{GuestKind, VcpuBlob};

/// The result of the suspend hypercall, in eax, in a restored guest.
const SUSPENDED: u64 = 0;
/// Its result in a guest whose suspend was cancelled.
const SUSPEND_CANCELLED: u64 = 1;

impl MockDomain {
    /// Suspend: replace the mfns of the xenstore and console rings by their pfns, and call the
    /// hypervisor. ETIMEDOUT if the guest is in no state to answer.
    pub(super) fn suspend_guest(&self, state: &mut State) -> Result<(), Errno> {
        if state.record.kind != GuestKind::Pv {
            return Ok(());
        }
        let width = state.record.width;
        let start_info = self.start_info(state).ok_or(Errno::ETIMEDOUT)?;
        let rings = self.rings(width, start_info)?;
        let mut pfns = [0; 2];
        for (pfn, mfn) in pfns.iter_mut().zip(rings.map(Mfn)) {
            let owned = self.machine.frames.owned(mfn, self.dom.domid);
            *pfn = owned.and(self.machine.m2p(mfn)).ok_or(Errno::ETIMEDOUT)?;
        }
        self.set_rings(width, start_info, pfns)?;
        state.record.suspended_rings = Some(rings);
        self.set_eax(state, SUSPENDED)
    }

    /// Continue after the suspend was cancelled.
    pub(super) fn resume_guest(&self, state: &mut State) -> Result<(), Errno> {
        if state.record.kind != GuestKind::Pv {
            return Ok(());
        }
        let start_info = self.start_info(state).ok_or(Errno::EINVAL)?;
        let rings = state.record.suspended_rings.ok_or(Errno::EINVAL)?;
        self.set_rings(state.record.width, start_info, rings)?;
        state.record.suspended_rings = None;
        self.set_eax(state, SUSPEND_CANCELLED)
    }

    fn is_mine(&self, mfn: u64) -> bool {
        self.machine
            .frames
            .owned(Mfn(mfn), self.dom.domid)
            .is_some()
    }

    /// The frame of start_info, which a suspending guest passes in edx.
    pub(super) fn start_info(&self, state: &State) -> Option<Mfn> {
        let layout = VcpuLayout::of(state.record.width);
        let context = state.blobs.get(&blob_name(0, VcpuBlob::Basic))?;
        let mfn = layout.get(context, layout.dx);
        self.is_mine(mfn).then_some(Mfn(mfn))
    }

    fn set_eax(&self, state: &mut State, value: u64) -> Result<(), Errno> {
        let layout = VcpuLayout::of(state.record.width);
        let name = blob_name(0, VcpuBlob::Basic);
        let mut context = state.blobs.get(&name).cloned().ok_or(Errno::EINVAL)?;
        layout.set(&mut context, layout.ax, value);
        self.put_blob(state, &name, context)
    }

    /// The frames of the xenstore and console rings in start_info.
    pub(super) fn rings(&self, width: u8, start_info: Mfn) -> Result<[u64; 2], Errno> {
        let layout = StartInfoLayout::of(width);
        let page = self.machine.read_frame(start_info)?;
        Ok([layout.store_mfn, layout.console_mfn]
            .map(|field| read_word(page.as_slice(), field, layout.width)))
    }

    /// Set the frames of the rings in start_info.
    pub(super) fn set_rings(
        &self,
        width: u8,
        start_info: Mfn,
        rings: [u64; 2],
    ) -> Result<(), Errno> {
        let layout = StartInfoLayout::of(width);
        for (field, ring) in [layout.store_mfn, layout.console_mfn]
            .into_iter()
            .zip(rings)
        {
            let bytes = &ring.to_le_bytes()[..layout.width];
            self.machine.write_frames(start_info, field, bytes)?;
        }
        self.mark_frame(start_info);
        Ok(())
    }
}
