//! The live part of a save: the dirty log, precopy passes, stop-and-copy.
//!
//! C implementation: `xg_sr_save.c:send_domain_memory_live`, `send_memory_live`,
//! `suspend_and_send_dirty`, `verify_frames`.

use std::time::Instant;

use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::{BackendError, DirtyBitmap, DirtyRead, Domain};

use crate::error::SaveError;
use crate::guest::{GuestSave, Out};
use crate::progress::Phase;
use crate::save::precopy::{Meter, PrecopyDecision, PrecopyPolicy};
use crate::save::{Live, Run, Suspended, all_pages, guest_pages};

/// The dirty log, on. Off again on drop.
struct Logging<'a>(&'a dyn Domain);

impl<'a> Logging<'a> {
    /// Switch the log on. Where something else holds it (VRAM tracking, say), that is
    /// switched off first: it starts again by itself.
    fn start(domain: &'a dyn Domain) -> Result<Self, BackendError> {
        // From here on it is switched off: a call that fails may have done its work.
        let logging = Self(domain);
        if domain.enable_log_dirty().is_err() {
            domain.disable_log_dirty()?;
            domain.enable_log_dirty()?;
        }
        Ok(logging)
    }
}

impl Drop for Logging<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.disable_log_dirty() {
            tracing::warn!(%error, "the dirty log could not be switched off: the guest runs slower than it could");
        }
    }
}

impl Run<'_, '_> {
    /// Send memory while the guest runs, suspend it, send the rest; when it was asked
    /// to suspend.
    pub(super) fn live(
        &mut self,
        guest: &dyn GuestSave,
        out: &mut Out<'_>,
        suspended: &mut Suspended<'_>,
        live: Live<'_>,
    ) -> Result<Instant, SaveError> {
        let total = guest_pages(guest);
        guest.check_vm_state()?;
        let _logging = Logging::start(self.domain)?;
        let mut dirty = DirtyBitmap::new(total);
        let mut deferred = Some(DirtyBitmap::new(total));
        self.precopy(guest, out, &mut dirty, &mut deferred, live.policy)?;

        let stopped = self.suspend(suspended)?;
        self.domain.read_dirty(DirtyRead::CleanFinal, &mut dirty)?;
        if let Some(deferred) = deferred {
            dirty.merge(&deferred);
        }
        let rest = (dirty.iter(), dirty.count());
        self.send(guest, out, Phase::StopAndCopy, rest, &mut None)?;
        guest.check_vm_state()?;

        if live.verify {
            out.verify()?;
            let all = (all_pages(guest), total);
            self.send(guest, out, Phase::Verify, all, &mut None)?;
        }
        Ok(stopped)
    }

    /// Passes over what is dirty, the first over everything, until the policy says
    /// that it is enough.
    fn precopy(
        &mut self,
        guest: &dyn GuestSave,
        out: &mut Out<'_>,
        dirty: &mut DirtyBitmap,
        deferred: &mut Option<DirtyBitmap>,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<(), SaveError> {
        dirty.set_all();
        let mut meter = Meter::new(dirty.count());
        loop {
            let decision = policy.decide(meter.stats());
            let count = dirty.count();
            if count > 0 && decision != PrecopyDecision::Abort {
                let before = self.stats.pages;
                meter.begin();
                let pass = (dirty.iter(), count);
                self.send(guest, out, Phase::Precopy, pass, deferred)?;
                guest.check_vm_state()?;
                meter.sent(count, (self.stats.pages - before) * PAGE_SIZE as u64);
                self.stats.iterations += 1;
                self.progress.precopy(meter.stats());
            }
            let decision = match decision {
                PrecopyDecision::Continue => policy.decide(meter.stats()),
                other => other,
            };
            match decision {
                PrecopyDecision::Continue => {}
                PrecopyDecision::StopAndCopy => return Ok(()),
                PrecopyDecision::Abort => {
                    let iterations = self.stats.iterations;
                    return Err(SaveError::PolicyAborted { iterations });
                }
            }
            self.domain.read_dirty(DirtyRead::Clean, dirty)?;
            meter.dirty(dirty.count());
            self.progress.precopy(meter.stats());
        }
    }
}
