//! Suspending the guest for a save, and resuming it.
//!
//! C implementation: `xg_sr_save.c:suspend_domain`.

use xsr_xen_backend::{Domain, DomainInfo, Errno, ShutdownReason};

use crate::error::{GuestError, SaveError};
use crate::text::chain;
use crate::toolstack::{
    CheckpointToolstack, ColoToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};

/// Why the guest cannot be resumed, if it has gone away: it has shut down by itself, or its domain
/// was destroyed.
pub(super) fn gone(domain: &dyn Domain) -> Option<GuestError> {
    match domain.info() {
        Ok(info) if info.dying => Some(GuestError::Destroyed),
        Ok(info) => match info.shutdown {
            None | Some(ShutdownReason::Suspend) => None,
            Some(reason) => Some(GuestError::ShutDown { reason }),
        },
        Err(error) if error.errno == Errno::ESRCH => Some(GuestError::Destroyed),
        Err(_) => None,
    }
}

/// Changes that a save has made to the domain, undone on drop: the device model's log-dirty mode is
/// switched off, and the guest is resumed if it was suspended.
pub(super) struct Suspended<'a, T: SaveToolstack + ?Sized> {
    toolstack: &'a mut T,
    logging: bool,
    active: bool,
}

impl<'a, T: SaveToolstack + ?Sized> Suspended<'a, T> {
    /// Nothing has been changed yet.
    pub(super) fn new(toolstack: &'a mut T) -> Self {
        Self {
            toolstack,
            logging: false,
            active: false,
        }
    }

    /// The device model marks pages.
    pub(super) fn logging_on(&mut self) -> Result<(), ToolstackError> {
        self.toolstack.switch_qemu_logdirty(true)?;
        self.logging = true;
        Ok(())
    }

    /// Suspends the guest.
    ///
    /// # Errors
    ///
    /// It is shut down already, and then nothing is done; or it does not suspend.
    pub(super) fn suspend(&mut self, domain: &dyn Domain) -> Result<(), SaveError> {
        match domain.info()?.shutdown {
            None => {}
            // The save has not suspended it, and must not resume it.
            Some(ShutdownReason::Suspend) => return Err(GuestError::AlreadySuspended.into()),
            Some(reason) => return Err(GuestError::ShutDown { reason }.into()),
        }
        let result = self.toolstack.suspend();
        let info = domain.info();
        if let Err(error) = result {
            // The call may have failed with the guest already suspended.
            self.active = info.is_ok_and(|info| info.shutdown == Some(ShutdownReason::Suspend));
            return Err(error.into());
        }
        self.active = true;
        match info?.shutdown {
            Some(ShutdownReason::Suspend) => Ok(()),
            // In any other state it is not suspended: there is nothing to undo.
            Some(reason) => {
                self.active = false;
                Err(GuestError::ShutDown { reason }.into())
            }
            None => {
                self.active = false;
                let state = "no shutdown".to_owned();
                Err(GuestError::NotSuspended { state }.into())
            }
        }
    }

    /// The device model no longer marks pages.
    pub(super) fn logging_off(&mut self) {
        if std::mem::take(&mut self.logging)
            && let Err(error) = self.toolstack.switch_qemu_logdirty(false)
        {
            // The image is unaffected; the device model merely continues to mark pages.
            let error = chain(&error);
            tracing::warn!(
                error,
                "the device model's log-dirty mode could not be switched off"
            );
        }
    }

    /// Resumes the guest, if it has been suspended.
    pub(super) fn resume(&mut self) -> Result<(), ToolstackError> {
        match std::mem::take(&mut self.active) {
            true => self.toolstack.resume(),
            false => Ok(()),
        }
    }

    /// Leaves the guest as it is: another program will resume or destroy it.
    pub(super) fn let_go(&mut self) {
        self.active = false;
    }
}

impl<T: CheckpointToolstack + ?Sized> Suspended<'_, T> {
    /// The guest's part of a checkpoint is over: it is resumed.
    ///
    /// # Errors
    ///
    /// The toolstack cannot resume it, or the guest is still suspended although the toolstack says
    /// otherwise. It will be resumed as after any other failure, unless it is known to run.
    pub(super) fn postcopy(&mut self, domain: &dyn Domain) -> Result<(), SaveError> {
        let asleep = |info: &DomainInfo| info.shutdown == Some(ShutdownReason::Suspend);
        let result = self.toolstack.postcopy();
        let info = domain.info();
        if let Err(error) = result {
            // If the state is unknown, one resume too many is better than none.
            self.active = info.as_ref().map_or(true, asleep);
            return Err(error.into());
        }
        self.active = info.as_ref().is_ok_and(asleep);
        info?;
        match self.active {
            true => Err(GuestError::StillSuspended.into()),
            false => Ok(()),
        }
    }

    /// A checkpoint is in the stream: waits, and returns whether there will be another.
    pub(super) fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.toolstack.checkpoint(epoch)
    }
}

impl<T: ColoToolstack + ?Sized> Suspended<'_, T> {
    /// The guest runs on both hosts: waits, and returns whether there will be another checkpoint.
    pub(super) fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        self.toolstack.wait_checkpoint()
    }
}

impl<T: SaveToolstack + ?Sized> Drop for Suspended<'_, T> {
    fn drop(&mut self) {
        self.logging_off();
        if let Err(error) = self.resume() {
            let error = chain(&error);
            tracing::error!(error, "the domain could not be resumed");
        }
    }
}
