//! xenopsd as the engine's toolstack: each question is a line.

use std::path::PathBuf;

use xsr_format::frame::Gfn;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::toolstack::{
    MissingStaticData, OlderGuest, RestoreToolstack, SaveToolstack, ToolstackError, make_up_for,
};
use xsr_xen_backend::Domain;

use crate::backend::StandIn;
use crate::control::{Control, End};
use crate::qmp::{self, Limits};

/// xenopsd, during a save.
pub(crate) struct Saving<'c> {
    pub(crate) control: &'c Control,
    /// Where qemu's dirty log is switched, if the save is live and there is a qemu.
    pub(crate) qmp: Option<PathBuf>,
    /// The dirty log may be on.
    pub(crate) logging: bool,
    /// What a domain needs that xenopsd cannot suspend itself. On Xen: nothing.
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
        self.control.suspend().map_err(failed(WHAT))?;
        match &self.guest {
            Some(guest) => guest.suspend(),
            None => Ok(()),
        }
    }

    /// xenopsd resumes the guest itself, once it knows that the save has failed.
    fn resume(&mut self) -> Result<(), ToolstackError> {
        tracing::debug!("xenopsd resumes or destroys the guest");
        Ok(())
    }

    /// Switched off only by [`Saving::give_up`]: when a save is complete, qemu has stopped for
    /// good and xenopsd is connected to it.
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        let (Some(qmp), true) = (&self.qmp, on) else {
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
    /// The save has failed: the guest runs on, and qemu must not go on marking pages.
    pub(crate) fn give_up(&mut self) {
        if let (true, Some(qmp)) = (self.logging, &self.qmp)
            && let Err(error) = qmp::switch_dirty_log(qmp, false, Limits::BRIEF, &Cancel::new())
        {
            tracing::warn!("qemu's dirty log could not be switched off: {error:#}");
        }
    }
}

/// xenopsd, during a restore: it has prepared the domain, and waits for the result.
pub(crate) struct Restoring<'d> {
    pub(crate) domain: &'d dyn Domain,
    /// Of the VM's CPU, for an image that says nothing of it.
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

    /// Said by the `result:` line, when everything else is done.
    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        Ok(())
    }
}
