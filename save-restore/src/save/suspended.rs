//! The guest while it is suspended, and its way back.
//!
//! C implementation: `xg_sr_save.c:suspend_domain`.

use xsr_xen_backend::{Domain, DomainInfo, Errno, ShutdownReason};

use crate::error::{GuestError, SaveError};
use crate::toolstack::{
    CheckpointToolstack, ColoToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};

/// Why the guest will not go on, if it has gone away: it has shut down by itself, or its domain
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

/// What a save has changed of the domain, undone on drop: the device model's
/// log-dirty mode goes off, and the guest is resumed once it has been suspended.
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

    /// Have the guest suspend.
    ///
    /// # Errors
    ///
    /// It is down already, for which nothing is done; it does not suspend.
    pub(super) fn suspend(&mut self, domain: &dyn Domain) -> Result<(), SaveError> {
        match domain.info()?.shutdown {
            None => {}
            // Not our doing, and not ours to undo.
            Some(ShutdownReason::Suspend) => return Err(GuestError::AlreadySuspended.into()),
            Some(reason) => return Err(GuestError::ShutDown { reason }.into()),
        }
        let result = self.toolstack.suspend();
        let info = domain.info();
        if let Err(error) = result {
            // It may have failed with the guest already asleep.
            self.active = info.is_ok_and(|info| info.shutdown == Some(ShutdownReason::Suspend));
            return Err(error.into());
        }
        self.active = true;
        match info?.shutdown {
            Some(ShutdownReason::Suspend) => Ok(()),
            // Whatever this is, it is not asleep: there is nothing to undo.
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
            // The image is what it is; the device model merely goes on marking pages.
            tracing::warn!(%error, "the device model's log-dirty mode could not be switched off");
        }
    }

    /// Resume the guest, if it has been suspended.
    pub(super) fn resume(&mut self) -> Result<(), ToolstackError> {
        match std::mem::take(&mut self.active) {
            true => self.toolstack.resume(),
            false => Ok(()),
        }
    }

    /// Leave the guest as it is: it is somebody else's to resume or destroy.
    pub(super) fn let_go(&mut self) {
        self.active = false;
    }
}

impl<T: CheckpointToolstack + ?Sized> Suspended<'_, T> {
    /// The guest's part of a checkpoint is over: it runs on.
    ///
    /// # Errors
    ///
    /// The toolstack cannot have it run on; the guest is still asleep although the
    /// toolstack says otherwise. It will be resumed as after any other failure, unless
    /// it is known to run.
    pub(super) fn postcopy(&mut self, domain: &dyn Domain) -> Result<(), SaveError> {
        let asleep = |info: &DomainInfo| info.shutdown == Some(ShutdownReason::Suspend);
        let result = self.toolstack.postcopy();
        let info = domain.info();
        if let Err(error) = result {
            // Where nobody can tell, a resume too many is better than none.
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

    /// A checkpoint is in the stream: whether there will be another, once it is time.
    pub(super) fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.toolstack.checkpoint(epoch)
    }
}

impl<T: ColoToolstack + ?Sized> Suspended<'_, T> {
    /// The guest runs at both ends: whether there will be another checkpoint, once it is
    /// time.
    pub(super) fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        self.toolstack.wait_checkpoint()
    }
}

impl<T: SaveToolstack + ?Sized> Drop for Suspended<'_, T> {
    fn drop(&mut self) {
        self.logging_off();
        if let Err(error) = self.resume() {
            tracing::error!(%error, "the domain could not be resumed");
        }
    }
}
