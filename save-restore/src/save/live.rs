//! The live part of a save: the dirty log, precopy passes, stop-and-copy.
//!
//! C implementation: `xg_sr_save.c:send_domain_memory_live`, `send_memory_live`,
//! `suspend_and_send_dirty`, `verify_frames`.

use std::ops::Range;
use std::time::Instant;

use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_xen_backend::{BackendError, DirtyBitmap, DirtyRead, Domain, Errno};

use crate::error::SaveError;
use crate::guest::{GuestSave, Out};
use crate::progress::Phase;
use crate::save::balloon::{self, Balloon, Besides};
use crate::save::mapped::Part;
use crate::save::precopy::{Meter, PrecopyDecision, PrecopyPolicy};
use crate::save::suspended::Suspended;
use crate::save::{Hook, Live, Notes, Run, again, all_pages, guest_pages};
use crate::toolstack::SaveToolstack;

/// The dirty log while it is on. Dropping it switches the log off.
struct Logging<'a>(&'a dyn Domain);

impl<'a> Logging<'a> {
    /// Switches the log on. If something else holds it (VRAM tracking, for example), that is
    /// switched off first: it starts again by itself.
    fn start(domain: &'a dyn Domain) -> Result<Self, BackendError> {
        // From here on the log is switched off on drop: a failed call may have switched it on.
        let logging = Self(domain);
        if domain.enable_log_dirty().is_err() {
            domain.disable_log_dirty()?;
            domain.enable_log_dirty()?;
        }
        Ok(logging)
    }

    /// Switch it off. A domain that has been destroyed meanwhile has none.
    fn off(&self) -> Result<(), BackendError> {
        match self.0.disable_log_dirty() {
            Err(error) if error.errno == Errno::ESRCH => Ok(()),
            result => result,
        }
    }
}

impl Drop for Logging<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.off() {
            tracing::warn!(%error, "the dirty log could not be switched off: the guest runs slower than it could");
        }
    }
}

/// The memory of a running guest: its log, and what has to be sent.
pub(super) struct LiveMemory<'a> {
    _logging: Logging<'a>,
    /// To be sent in the next pass.
    dirty: DirtyBitmap,
    /// To be sent once the guest is suspended.
    deferred: DirtyBitmap,
    /// pfns that the guest has got since the last pass, which the log may not report.
    grown: Range<u64>,
    /// Ballooning within its memory; `None` if the log reports it.
    balloon: Option<Balloon>,
}

impl<'a> LiveMemory<'a> {
    /// Logs from now on; all memory has to be sent.
    pub(super) fn start(
        domain: &'a dyn Domain,
        translated: bool,
        pfns: u64,
    ) -> Result<Self, BackendError> {
        let mut dirty = DirtyBitmap::new(pfns);
        dirty.set_all();
        // Its pages are counted before, so that what it takes after that is noticed.
        let balloon = Balloon::of(domain, translated, pfns)?;
        Ok(Self {
            _logging: Logging::start(domain)?,
            dirty,
            deferred: DirtyBitmap::new(pfns),
            grown: pfns..pfns,
            balloon,
        })
    }

    /// The guest has `pfns` pfns now.
    fn grow(&mut self, pfns: u64) {
        for set in [&mut self.dirty, &mut self.deferred] {
            balloon::grow(set, pfns);
        }
        if let Some(balloon) = &mut self.balloon {
            balloon.grow(pfns);
        }
        self.grown.end = self.grown.end.max(pfns);
    }

    /// Reads the log: what to send next.
    fn read(&mut self, domain: &dyn Domain, how: DirtyRead) -> Result<(), BackendError> {
        domain.read_dirty(how, &mut self.dirty)?;
        self.grown.clone().for_each(|pfn| self.dirty.set(Pfn(pfn)));
        self.grown.start = self.grown.end;
        Ok(())
    }
}

impl<'r> Run<'r, '_> {
    /// Sends memory while the guest runs, suspends it, and sends the rest; returns when the guest
    /// was asked to suspend.
    pub(super) fn live<T: SaveToolstack + ?Sized>(
        &mut self,
        guest: &mut dyn GuestSave,
        out: &mut Out<'_>,
        suspended: &mut Suspended<'_, T>,
        live: Live<'_>,
        hook: Hook<'_, '_>,
    ) -> Result<Instant, SaveError> {
        let mut memory = self.log(guest)?;
        self.begin_memory(true, guest)?;
        self.precopy(guest, out, &mut memory, live.policy)?;
        let none = &mut |_: &mut DirtyBitmap| Ok(());
        let stopped = self.stop_and_copy(guest, out, suspended, &mut memory, none, hook)?;
        if live.verify {
            out.verify()?;
            let all = (all_pages(guest), guest_pages(guest));
            self.send(guest, out, Phase::Verify, all, Notes::default())?;
        }
        Ok(stopped)
    }

    /// Logs what the guest writes from now on.
    pub(super) fn log(&mut self, guest: &dyn GuestSave) -> Result<LiveMemory<'r>, SaveError> {
        let translated = self.kind.is_translated();
        let mut memory = LiveMemory::start(self.domain, translated, guest_pages(guest))?;
        if let Some(balloon) = &mut memory.balloon {
            self.first_look(balloon)?;
        }
        Ok(memory)
    }

    /// Reads the log: what to send next, including what the log does not report.
    fn read(
        &mut self,
        memory: &mut LiveMemory<'_>,
        how: DirtyRead,
        suspended: bool,
    ) -> Result<(), SaveError> {
        let besides = match &mut memory.balloon {
            Some(balloon) => self.settle(balloon, suspended)?,
            None => Besides::Nothing,
        };
        memory.read(self.domain, how)?;
        besides.mark(&mut memory.dirty);
        Ok(())
    }

    /// Follows a guest that moves the tables that describe its memory.
    fn follow(
        &mut self,
        guest: &mut dyn GuestSave,
        out: &mut Out<'_>,
        memory: &mut LiveMemory<'_>,
        running: bool,
    ) -> Result<(), SaveError> {
        if self.check_vm_state(guest, running)? {
            // In slots it is written in the place of what it was before.
            self.begin(Part::Start);
            guest.start_of_stream(out)?;
            memory.grow(guest_pages(guest));
        }
        Ok(())
    }

    /// Passes over the dirty pages, the first over everything, until the policy ends them.
    pub(super) fn precopy(
        &mut self,
        guest: &mut dyn GuestSave,
        out: &mut Out<'_>,
        memory: &mut LiveMemory<'_>,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<(), SaveError> {
        let mut meter = Meter::new(memory.dirty.count());
        loop {
            let decision = policy.decide(meter.stats());
            let count = memory.dirty.count();
            if decision != PrecopyDecision::Abort {
                let before = self.stats.pages;
                meter.begin();
                if count > 0 {
                    let pass = (memory.dirty.iter(), count);
                    let notes = Notes {
                        deferred: Some(&mut memory.deferred),
                        balloon: memory.balloon.as_mut(),
                        hook: None,
                    };
                    self.send(guest, out, Phase::Precopy, pass, notes)?;
                }
                self.follow(guest, out, memory, true)?;
                // An empty pass counts too: a policy that waits for a number of passes gets it also
                // from an idle guest.
                meter.sent(count, (self.stats.pages - before) * PAGE_SIZE as u64);
                self.sync_pass()?;
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
            self.read(memory, DirtyRead::Clean, false)?;
            meter.dirty(memory.dirty.count());
            self.progress.precopy(meter.stats());
        }
    }

    /// Suspend the guest, begin what `hook` does, and send what is dirty, what had to wait for this,
    /// and what `besides` marks; when it was asked to suspend.
    pub(super) fn stop_and_copy<T: SaveToolstack + ?Sized>(
        &mut self,
        guest: &mut dyn GuestSave,
        out: &mut Out<'_>,
        suspended: &mut Suspended<'_, T>,
        memory: &mut LiveMemory<'_>,
        besides: &mut dyn FnMut(&mut DirtyBitmap) -> Result<(), SaveError>,
        hook: Hook<'_, '_>,
    ) -> Result<Instant, SaveError> {
        if let Some(balloon) = &mut memory.balloon {
            balloon.look(self.domain)?;
        }
        let stopped = self.suspend(suspended)?;
        if let Some(hook) = hook {
            hook.begin()?;
        }
        self.follow(guest, out, memory, false)?;
        self.read(memory, DirtyRead::CleanFinal, true)?;
        self.stats.deferred += memory.deferred.count();
        memory.dirty.merge(&memory.deferred);
        memory.deferred.clear_all();
        besides(&mut memory.dirty)?;
        let rest = (memory.dirty.iter(), memory.dirty.count());
        let notes = Notes {
            deferred: None,
            balloon: memory.balloon.as_mut(),
            hook: again(hook),
        };
        self.send(guest, out, Phase::StopAndCopy, rest, notes)?;
        Ok(stopped)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use xsr_xen_backend::mock::{HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::*;

    #[test]
    fn a_domain_that_is_gone_logs_nothing_and_one_that_is_there_is_asked() {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let domid = host.create_domain(GuestKind::Pvh, 1, 256).unwrap();
        let domain = host.domain(domid).unwrap();
        let logging = Logging::start(domain.as_ref()).unwrap();
        logging.off().unwrap();
        domain.destroy().unwrap();
        assert_eq!(domain.disable_log_dirty().unwrap_err().errno, Errno::ESRCH);
        logging.off().unwrap();
    }
}
