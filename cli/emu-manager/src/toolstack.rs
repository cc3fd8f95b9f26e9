//! xenopsd as the engine's toolstack: each request to it is a line.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use xsr_format::frame::Gfn;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::text::chain;
use xsr_save_restore::toolstack::{
    DirectToolstack, MissingStaticData, OlderGuest, RestoreToolstack, SaveToolstack,
    ToolstackError, make_up_for,
};
use xsr_xen_backend::{Domain, ShutdownReason};

use crate::Open;
use crate::args::Args;
use crate::backend::StandIn;
use crate::control::{Control, End};
use crate::qmp::{self, Limits};

/// xenopsd during a save. Dropping this switches qemu's dirty log off, unless the save is
/// [complete](Saving::complete).
pub(crate) struct Saving<'c> {
    pub(crate) control: &'c Control,
    pub(crate) domain: &'c dyn Domain,
    /// The socket of the domain's qemu, if it has one.
    pub(crate) qmp: Option<PathBuf>,
    /// Whether the guest runs while it is saved.
    pub(crate) live: bool,
    /// How long the guest may take to suspend after xenopsd has given up.
    pub(crate) late_suspend: Duration,
    /// Whether qemu's dirty log may be on.
    pub(crate) logging: bool,
    /// What suspends a domain that xenopsd cannot suspend itself. `None` on Xen.
    pub(crate) guest: Option<Box<dyn StandIn + 'c>>,
}

impl std::fmt::Debug for Saving<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Saving")
            .field("qmp", &self.qmp)
            .field("logging", &self.logging)
            .finish_non_exhaustive()
    }
}

fn failed(what: &'static str) -> impl Fn(End) -> ToolstackError {
    move |end| ToolstackError::new(what, end.text())
}

impl SaveToolstack for Saving<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "suspending the guest";
        if let Err(end) = self.control.suspend() {
            if self.control.is_asked() {
                self.wait_for_late_suspend();
            }
            return Err(failed(WHAT)(end));
        }
        match &self.guest {
            Some(guest) => guest.suspend(),
            None => Ok(()),
        }
    }

    /// xenopsd does not resume the guest after a failed save: it destroys a domain that it finds
    /// suspended (`xenops_server.ml`, `VM_check_state`), and leaves a running one alone. So the
    /// guest is resumed before xenopsd is told.
    fn resume(&mut self) -> Result<(), ToolstackError> {
        let resumed = resume(self.domain, self.qmp.as_deref());
        match &resumed {
            Ok(()) => tracing::info!("the save is not complete: the guest runs on"),
            Err(error) => tracing::error!("the guest is still suspended: {}", chain(error)),
        }
        resumed
    }

    /// Only `Drop` switches it off: when a save is complete, qemu has stopped for good and xenopsd
    /// is connected to it.
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        let (Some(qmp), true, true) = (&self.qmp, self.live, on) else {
            return Ok(());
        };
        self.logging = true;
        let switched = qmp::switch_dirty_log(qmp, true, Limits::PATIENT, self.control.cancel());
        switched.map_err(|error| {
            ToolstackError::new("switching qemu's dirty log on", format!("{error:#}"))
        })
    }
}

impl Saving<'_> {
    /// The guest has been asked to suspend, and does not know that the save was given up. Waits
    /// until it has suspended, so that it can be resumed; otherwise xenopsd would shut it down.
    fn wait_for_late_suspend(&self) {
        let until = Instant::now() + self.late_suspend;
        while Instant::now() < until
            && matches!(self.domain.info(), Ok(info) if info.shutdown.is_none())
        {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The guest is suspended before its memory is written: the dirty log of its qemu, if that is
    /// on, is of no use.
    pub(crate) fn stand_still(&mut self) {
        self.live = false;
        self.logging &= !self.switched_off();
    }

    /// Switches qemu's dirty log off if it may be on; returns whether it is off.
    fn switched_off(&self) -> bool {
        let (true, Some(qmp)) = (self.logging, &self.qmp) else {
            return true;
        };
        let switched = qmp::switch_dirty_log(qmp, false, Limits::BRIEF, &Cancel::new());
        if let Err(error) = &switched {
            tracing::warn!("qemu's dirty log could not be switched off: {error:#}");
        }
        switched.is_ok()
    }

    /// xenopsd has the result: the guest and qemu are its business from now on.
    pub(crate) fn complete(mut self) {
        self.logging = false;
    }
}

impl Drop for Saving<'_> {
    /// The guest keeps running, and qemu must stop marking pages.
    fn drop(&mut self) {
        self.switched_off();
    }
}

/// Resumes a suspended guest, and the qemu that xenopsd has stopped.
///
/// xenopsd does the same in `Domain.resume`, but only when it is asked to.
fn resume(domain: &dyn Domain, qmp: Option<&Path>) -> Result<(), ToolstackError> {
    // A guest with a stopped qemu is better than none: its memory is not lost.
    if let Some(qmp) = qmp
        && let Err(error) = qmp::run_on(qmp, Limits::BRIEF)
    {
        tracing::error!("qemu may still be stopped: {error:#}; restart the VM if it hangs");
    }
    DirectToolstack(domain).resume()
}

/// Undoes a save whose process was killed: resumes the guest if that process may have `suspended`
/// it, and switches its dirty log off.
///
/// # Errors
///
/// The guest has shut down for another reason, or the hypervisor or qemu refuses.
pub(crate) fn undo_save(args: &Args, live: bool, suspended: bool, open: Open) -> Result<()> {
    let backend = open()?;
    let domain = backend.host().domain(args.domid)?;
    let domain = domain.as_ref();
    let qmp = args.qemu.then(|| backend.qmp_socket(args.domid));
    let resumed = match domain.info()?.shutdown {
        Some(ShutdownReason::Suspend) if suspended => {
            resume(domain, qmp.as_deref()).map_err(anyhow::Error::from)
        }
        Some(reason) => Err(anyhow::anyhow!("the guest has shut down ({reason})")),
        None => Ok(()),
    };
    if live {
        // Both are tried, and the guest's state is what counts.
        if let Err(error) = domain.disable_log_dirty() {
            tracing::warn!("switching the dirty log off: {error}");
        }
        if let Some(qmp) = &qmp
            && let Err(error) = qmp::switch_dirty_log(qmp, false, Limits::BRIEF, &Cancel::new())
        {
            tracing::warn!("switching qemu's dirty log off: {error}");
        }
    }
    resumed
}

/// xenopsd during a restore: it has prepared the domain, and waits for the result.
pub(crate) struct Restoring<'d> {
    pub(crate) domain: &'d dyn Domain,
    /// The VM's CPU features, for an image that does not contain them.
    pub(crate) older: OlderGuest,
}

impl std::fmt::Debug for Restoring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restoring").finish_non_exhaustive()
    }
}

impl RestoreToolstack for Restoring<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        make_up_for(self.domain, missing, &self.older)
    }

    /// The line `result:` reports the frames, once everything else is done.
    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        Ok(())
    }
}
