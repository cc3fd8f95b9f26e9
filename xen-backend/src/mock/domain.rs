//! A handle on a domain of the mock machine: its life cycle and its memory.
//!
//! C implementation: `xen/common/{domain,domctl,memory}.c`, `xen/arch/x86/domctl.c`.

use std::ops::Range;
use std::sync::Arc;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, PageType};

use super::before::Before;
use super::error::MockError;
use super::frames::{Frame, FrameUse};
use super::machine::Machine;
use super::memory;
use super::phases::phase;
use super::state::{Dom, MAX_PFNS, State, Writing};
use crate::error::{BackendError, MapError};
use crate::pages::{Access, ForeignPages};
use crate::suspend::Withdrawn;
use crate::{
    DomId, Domain, DomainControl, DomainInfo, GuestKind, GuestMemory, GuestRole, ShutdownReason,
    XenVersion,
};

/// The most frames of one `getpageframeinfo3`.
const MAX_TYPE_BATCH: usize = 1024;

/// A handle on one domain of a [`super::MockHost`].
#[derive(Clone, Debug)]
pub(super) struct MockDomain {
    pub(super) machine: Arc<Machine>,
    pub(super) dom: Arc<Dom>,
}

impl MockDomain {
    pub(super) fn fail(&self, op: &'static str, errno: Errno) -> BackendError {
        let error = BackendError::domain(op, self.dom.domid, errno);
        match errno {
            // Of a machine in memory, only a lock can make it fail so.
            Errno::ETIMEDOUT => error.explained(
                "a lock of the mock host could not be taken: another process has it, which may be \
                 stopped",
            ),
            _ => error,
        }
    }

    /// Suspend the guest, which a guest without drivers for Xen does only if it is `forced` to. Returns
    /// whether it has.
    pub(super) fn stop_for_suspend(&self, forced: bool) -> Result<bool, BackendError> {
        phase("suspending");
        self.catch_up()?;
        let suspended = self.change("suspend", |state| {
            if state.record.shutdown.is_some() {
                return Err(Errno::EBUSY);
            }
            let awake = state.record.vcpus.iter().any(|vcpu| vcpu.online);
            if state.record.pauses > 0 || !awake {
                return Err(Errno::ETIMEDOUT);
            }
            if state.record.ignores_suspend && !forced {
                return Ok(false);
            }
            self.suspend_guest(state)?;
            state.record.shutdown = Some(ShutdownReason::Suspend);
            Ok(true)
        })?;
        if suspended {
            phase("suspended");
        }
        Ok(suspended)
    }

    fn alive(&self) -> Result<(), Errno> {
        match self.dom.is_gone() {
            true => Err(Errno::ESRCH),
            false => Ok(()),
        }
    }

    /// The same, for a caller that does not hold the state's lock.
    fn alive_now(&self, op: &'static str) -> Result<(), BackendError> {
        match self.dom.is_gone_now() {
            Ok(true) => Err(self.fail(op, Errno::ESRCH)),
            Ok(false) => Ok(()),
            Err(error) => Err(self.unknown(op, &error)),
        }
    }

    /// The failure of `op` because the domain's state is not known.
    fn unknown(&self, op: &'static str, error: &MockError) -> BackendError {
        self.fail(op, errno_of(error)).explained(error.to_string())
    }

    /// Permission to write memory by its frames.
    fn writing(&self, op: &'static str) -> Result<Writing<'_>, BackendError> {
        let writing = self.dom.write();
        let writing = writing.map_err(|error| self.unknown(op, &error))?;
        writing.ok_or_else(|| self.fail(op, Errno::ESRCH))
    }

    /// Write `bytes` to the domain's frames from `first` on. Must be called without the state's
    /// lock.
    pub(super) fn write_own(
        &self,
        op: &'static str,
        first: Mfn,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        let _writing = self.writing(op)?;
        let written = self.machine.write_frames(first, 0, bytes);
        written.map_err(|errno| self.fail(op, errno))
    }

    /// Read the domain's state.
    pub(super) fn look<T>(
        &self,
        op: &'static str,
        look: impl FnOnce(&State) -> Result<T, Errno>,
    ) -> Result<T, BackendError> {
        let state = self.dom.lock();
        let state = state.map_err(|error| self.unknown(op, &error))?;
        self.alive()
            .and_then(|()| look(&state))
            .map_err(|errno| self.fail(op, errno))
    }

    /// Change the domain's state and save the result. If either fails, the earlier state is
    /// restored.
    pub(super) fn change<T>(
        &self,
        op: &'static str,
        change: impl FnOnce(&mut State) -> Result<T, Errno>,
    ) -> Result<T, BackendError> {
        let state = self.dom.lock();
        let mut state = state.map_err(|error| self.unknown(op, &error))?;
        self.alive().map_err(|errno| self.fail(op, errno))?;
        let before = Before::of(self, &state).map_err(|errno| self.fail(op, errno))?;
        self.dom.changes();
        change(&mut state)
            .and_then(|out| match self.machine.store.save_record(&state.record) {
                Ok(()) => Ok(out),
                Err(error) => Err(storage_errno(&error)),
            })
            .inspect_err(|_| before.put_back(self, &mut state))
            .map_err(|errno| self.fail(op, errno))
    }

    /// Save a blob of the domain, as part of a change.
    pub(super) fn put_blob(
        &self,
        state: &mut State,
        name: &str,
        blob: Vec<u8>,
    ) -> Result<(), Errno> {
        // In memory first: a rollback restores the blobs that differ there.
        state.blobs.insert(name.to_owned(), blob);
        self.machine
            .store
            .save_blob(self.dom.domid, name, &state.blobs[name])
            .map_err(|error| storage_errno(&error))
    }

    /// The result of getdomaininfo.
    pub(super) fn info_of(&self, state: &State) -> DomainInfo {
        let record = &state.record;
        DomainInfo {
            domid: record.domid,
            uuid: record.uuid,
            kind: record.kind,
            shutdown: record.shutdown,
            paused: record.pauses > 0,
            dying: false,
            max_vcpu_id: u32::try_from(record.vcpus.len()).map_or(u32::MAX, |n| n - 1),
            tot_pages: self.machine.tot_pages(record.domid),
            max_pages: record.max_pages,
            shared_info_frame: match record.kind {
                GuestKind::Pv => Gfn(record.shared_info),
                // It has no gfn in the guest.
                _ => Gfn::INVALID,
            },
        }
    }

    /// The machine frame of `gfn`, if it is the domain's.
    pub(super) fn resolve(&self, gfn: Gfn) -> Option<(Mfn, Frame)> {
        let mfn = match self.dom.kind.is_translated() {
            true => self.dom.p2m_get(gfn)?,
            false => Mfn(gfn.0),
        };
        Some((mfn, self.machine.frames.owned(mfn, self.dom.domid)?))
    }

    /// The pfn of a frame that is known by its gfn and its mfn.
    fn pfn_of(&self, gfn: Gfn, mfn: Mfn) -> Option<u64> {
        match self.dom.kind.is_translated() {
            true => Some(gfn.0),
            false => self.machine.m2p(mfn),
        }
    }

    /// The machine frame of `gfn`, to be mapped with `access`.
    pub(super) fn map_one(&self, gfn: Gfn, access: Access) -> Result<Mfn, Errno> {
        let (mfn, frame) = self.resolve(gfn).ok_or(Errno::EINVAL)?;
        let unmappable = self.machine.config.unmappable;
        if unmappable.is_some() && unmappable == self.pfn_of(gfn, mfn) {
            return Err(Errno::EINVAL);
        }
        if access == Access::Write
            && !self.dom.kind.is_translated()
            && frame.used_as != FrameUse::Writable
        {
            self.machine.frames.update(mfn, |frame| {
                if frame.used_as != FrameUse::Writable && frame.count > 0 {
                    return Err(Errno::EINVAL);
                }
                Ok(Frame {
                    used_as: FrameUse::Writable,
                    validated: true,
                    ..frame
                })
            })?;
        }
        Ok(mfn)
    }

    /// Adds `2^order` pages from `gfn` on. `false`: there is no memory for them, or one of the pfns
    /// has a page or is beyond the machine's limit.
    pub(super) fn populate_extent(&self, order: u8, gfn: &mut Gfn) -> Result<bool, Errno> {
        let (machine, domid, first) = (&self.machine, self.dom.domid, gfn.0);
        let pages = 1_u64 << order;
        let translated = self.dom.kind.is_translated();
        let Some(end) = first.checked_add(pages) else {
            return Ok(false);
        };
        if translated
            && (end > MAX_PFNS as u64
                || (first..end).any(|pfn| self.dom.p2m_get(Gfn(pfn)).is_some()))
        {
            return Ok(false);
        }
        let allocated = machine.allocate(order, domid);
        let Some(mfn) = allocated.map_err(|error| storage_errno(&error))? else {
            return Ok(false);
        };
        for (mfn, pfn) in (mfn.0..).map(Mfn).zip(first..end) {
            match translated {
                true => self.dom.p2m_set(pfn, mfn),
                false => machine.set_m2p(mfn, pfn),
            }
        }
        if translated {
            let logs = machine.config.logs_new_pages();
            self.dom.dirty.added(first..end, logs);
        }
        if !translated {
            *gfn = Gfn(mfn.0);
        }
        machine.count_pages(domid, pages, gfn.0 + pages - 1);
        Ok(true)
    }
}

/// The errno for a failure of the mock host's own files and locks, which is logged.
pub(super) fn storage_errno(error: &MockError) -> Errno {
    tracing::error!(%error, "the mock host could not read or keep its state");
    errno_of(error)
}

/// The errno for a failure of the mock host's own files and locks.
pub(super) fn errno_of(error: &MockError) -> Errno {
    match error {
        MockError::Busy { .. } => Errno::ETIMEDOUT,
        _ => Errno::EIO,
    }
}

impl Domain for MockDomain {
    fn guest_role(&self) -> GuestRole<'_> {
        match self.dom.kind {
            GuestKind::Pv => GuestRole::Pv(self),
            GuestKind::Hvm | GuestKind::Pvh => GuestRole::Hvm(self),
        }
    }
}

impl DomainControl for MockDomain {
    fn xen_version(&self) -> Result<XenVersion, BackendError> {
        Ok(self.machine.config.xen_version)
    }

    fn info(&self) -> Result<DomainInfo, BackendError> {
        self.look("getdomaininfo", |state| Ok(self.info_of(state)))
    }

    fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError> {
        self.look("getvcpuinfo", |state| {
            let vcpu = usize::try_from(vcpu).map_err(|_| Errno::EINVAL)?;
            let vcpu = state.record.vcpus.get(vcpu).ok_or(Errno::EINVAL)?;
            Ok(vcpu.online)
        })
    }

    fn pause(&self) -> Result<(), BackendError> {
        self.change("pausedomain", |state| {
            state.record.pauses = state.record.pauses.checked_add(1).ok_or(Errno::EUSERS)?;
            Ok(())
        })?;
        phase("paused");
        Ok(())
    }

    fn unpause(&self) -> Result<(), BackendError> {
        self.change("unpausedomain", |state| {
            let pauses = state.record.pauses.checked_sub(1).ok_or(Errno::EINVAL)?;
            if pauses == 0 && state.record.shutdown.is_none() {
                if self.dom.kind == GuestKind::Pv && !state.record.has_run {
                    self.wake_guest(state)?;
                }
                state.record.has_run = true;
            }
            state.record.pauses = pauses;
            Ok(())
        })?;
        phase("unpaused");
        Ok(())
    }

    fn request_suspend(&self) -> Result<bool, BackendError> {
        self.stop_for_suspend(false)
    }

    /// A guest of the mock answers at once, or never.
    fn withdraw_suspend(&self) -> Result<Withdrawn, BackendError> {
        Ok(Withdrawn::TakenBack)
    }

    fn resume(&self) -> Result<(), BackendError> {
        self.change("resumedomain", |state| {
            match state.record.shutdown {
                None => return Err(Errno::EINVAL),
                Some(ShutdownReason::Suspend) => self.resume_guest(state)?,
                Some(_) => {}
            }
            state.record.shutdown = None;
            Ok(())
        })?;
        phase("resumed");
        Ok(())
    }

    fn destroy(&self) -> Result<(), BackendError> {
        const OP: &str = "destroydomain";
        self.alive_now(OP)?;
        phase("destroying");
        self.machine
            .remove_domain(&self.dom)
            .map_err(|error| self.unknown(OP, &error))?;
        phase("destroyed");
        Ok(())
    }

    fn alloc_unbound_port(&self, _remote: DomId) -> Result<u32, BackendError> {
        self.look("alloc_unbound", |state| {
            // Two-level event channels: one bit for each in the words of shared_info.
            let ports = match state.record.width {
                4 => 1024,
                _ => 4096,
            };
            self.machine
                .take_port(self.dom.domid, ports)
                .ok_or(Errno::ENOSPC)
        })
    }
}

impl GuestMemory for MockDomain {
    fn maximum_gfn(&self) -> Result<Option<Gfn>, BackendError> {
        self.look("maximum_gpfn", |state| {
            Ok(self.machine.max_gfn(state.record.domid).map(Gfn))
        })
    }

    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError> {
        const OP: &str = "getpageframeinfo3";
        self.alive_now(OP)?;
        if gfns.len() > MAX_TYPE_BATCH {
            return Err(self.fail(OP, Errno::E2BIG));
        }
        if gfns.len() != out.len() {
            return Err(self.fail(OP, Errno::EINVAL));
        }
        for (gfn, out) in gfns.iter().zip(out) {
            *out = match self.resolve(*gfn) {
                Some((_, frame)) => frame.page_type(),
                None => PageType::XTAB,
            };
        }
        Ok(())
    }

    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError> {
        const OP: &str = "mmapbatch";
        phase("map");
        // Mapping for writing may change the frames' types.
        let _writing = match access {
            Access::Write => Some(self.writing(OP)?),
            Access::Read => self.alive_now(OP).map(|()| None)?,
        };
        memory::map_frames(&self.machine.memory, gfns, access, |_, gfn| {
            self.map_one(gfn, access)
        })
        .map(|pages| pages.counted_by(&self.machine.mapped))
        .map_err(|errno| self.fail(OP, errno))
    }

    fn write_pages(&self, gfns: &[Gfn], contents: &[u8]) -> Result<Vec<MapError>, BackendError> {
        const OP: &str = "write_pages";
        phase("write");
        let _writing = self.writing(OP)?;
        if contents.len() != gfns.len() * PAGE_SIZE {
            return Err(self.fail(OP, Errno::EINVAL));
        }
        let mut failed = Vec::new();
        // Contiguous machine frames are written together: the first frame, and the range of bytes
        // in the contents.
        let mut runs: Vec<(Mfn, Range<usize>)> = Vec::new();
        for (index, &gfn) in gfns.iter().enumerate() {
            let bytes = index * PAGE_SIZE..(index + 1) * PAGE_SIZE;
            match (self.map_one(gfn, Access::Write), runs.last_mut()) {
                (Err(errno), _) => failed.push(MapError { index, gfn, errno }),
                (Ok(mfn), Some((first, run)))
                    if run.end == bytes.start
                        && first.0 + (run.len() / PAGE_SIZE) as u64 == mfn.0 =>
                {
                    run.end = bytes.end;
                }
                (Ok(mfn), _) => runs.push((mfn, bytes)),
            }
        }
        for (first, bytes) in runs {
            self.machine
                .write_frames(first, 0, &contents[bytes])
                .map_err(|errno| self.fail(OP, errno))?;
        }
        Ok(failed)
    }

    /// The machine's memory is a file: the kernel does not clear pages that are written whole, but
    /// does clear those that a mapping faults in.
    fn writing_is_cheaper(&self) -> bool {
        true
    }

    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError> {
        const OP: &str = "populate_physmap";
        phase("populate");
        self.look(OP, |state| {
            if !matches!(order, 0 | 9 | 18) {
                return Err(Errno::EINVAL);
            }
            let pages = 1_u64 << order;
            if frames.iter().any(|pfn| !pfn.0.is_multiple_of(pages)) {
                return Err(Errno::EINVAL);
            }
            let record = &state.record;
            let room = record
                .max_pages
                .saturating_sub(self.machine.tot_pages(record.domid));
            let extents = usize::try_from(room / pages).unwrap_or(usize::MAX);
            let mut done = 0;
            let held = self.machine.hold_allocator();
            let _held = held.map_err(|error| storage_errno(&error))?;
            for gfn in frames.iter_mut().take(extents) {
                if !self.populate_extent(order, gfn)? {
                    break;
                }
                done += 1;
            }
            Ok(done)
        })
    }

    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError> {
        self.look("decrease_reservation", |_| {
            let held = self.machine.hold_allocator();
            let _held = held.map_err(|error| storage_errno(&error))?;
            for (done, gfn) in gfns.iter().enumerate() {
                let Some((mfn, _)) = self.resolve(*gfn) else {
                    return Ok(done);
                };
                match self.decrease_reservation(gfn.0, mfn) {
                    Ok(()) => {}
                    // Xen's own frame, or one with references.
                    Err(Errno::EINVAL | Errno::EBUSY) => return Ok(done),
                    Err(errno) => return Err(errno),
                }
            }
            Ok(gfns.len())
        })
    }
}
