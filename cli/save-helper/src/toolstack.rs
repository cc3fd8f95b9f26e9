//! libxl as the engine's toolstack: each call is a message.

use std::io;

use xsr_format::frame::Gfn;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, CheckpointToolstack, ColoRestoreToolstack, ColoToolstack,
    Epoch, MissingStaticData, NextEpoch, RestoreToolstack, SaveToolstack, ToolstackError, Turn,
};
use xsr_xen_backend::DomId;

use crate::args::Callbacks;
use crate::backend::StandIn;
use crate::wire::{Wire, number};

/// libxl, at the other end of the wire.
pub(crate) struct Libxl<'w> {
    pub(crate) wire: &'w Wire,
    pub(crate) callbacks: Callbacks,
    pub(crate) domid: DomId,
    /// The guest that the helper suspends and resumes along with libxl. None on Xen.
    pub(crate) guest: Option<Box<dyn StandIn + 'w>>,
}

impl std::fmt::Debug for Libxl<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Libxl")
            .field("callbacks", &self.callbacks)
            .finish_non_exhaustive()
    }
}

/// Checks an answer: `fine` says whether it means success.
fn check(
    what: &'static str,
    answer: io::Result<i32>,
    fine: impl FnOnce(i32) -> bool,
) -> Result<(), ToolstackError> {
    let answer = answer.map_err(|e| ToolstackError::new(what, e))?;
    match fine(answer) {
        true => Ok(()),
        false => Err(failed(what, answer)),
    }
}

fn failed(what: &'static str, answer: i32) -> ToolstackError {
    ToolstackError::new(what, format!("libxl says that it failed ({answer})"))
}

impl Libxl<'_> {
    fn expect(&self, what: &'static str, number: u16) -> Result<(), ToolstackError> {
        match self.callbacks.has(number) {
            true => Ok(()),
            false => Err(ToolstackError::new(
                what,
                "libxl has no callback for it in CBFLAGS",
            )),
        }
    }
}

impl SaveToolstack for Libxl<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "suspending the guest";
        self.expect(WHAT, number::SUSPEND)?;
        check(WHAT, self.wire.suspend(), |answer| answer != 0)?;
        match &self.guest {
            Some(guest) => guest.suspend(),
            None => Ok(()),
        }
    }

    /// libxl resumes the guest itself after a failed save, or when the image is a copy.
    fn resume(&mut self) -> Result<(), ToolstackError> {
        tracing::debug!("libxl resumes or destroys the guest");
        Ok(())
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        const WHAT: &str = "switching the device model's log-dirty mode";
        self.expect(WHAT, number::SWITCH_QEMU_LOGDIRTY)?;
        let answer = self.wire.switch_qemu_logdirty(self.domid.0, on);
        check(WHAT, answer, |answer| answer == 0)
    }
}

/// What libxl does at each checkpoint, on either side.
const CHECKPOINT: &str = "dealing with a checkpoint";

impl CheckpointToolstack for Libxl<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "letting the guest run on after a checkpoint";
        self.expect(WHAT, number::POSTCOPY)?;
        check(WHAT, self.wire.postcopy(), |answer| answer > 0)?;
        match &mut self.guest {
            Some(guest) => guest.run_on(),
            None => Ok(()),
        }
    }

    /// libxl writes its own records of the checkpoint, and waits for the interval. It answers 0
    /// both when it has failed and when this was the last checkpoint. libxc treats both as the end,
    /// and neither as a failure of its own.
    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.expect(CHECKPOINT, number::CHECKPOINT)?;
        tracing::debug!(?epoch, "checkpoint");
        next(CHECKPOINT, self.wire.checkpoint())
    }
}

/// Whether another checkpoint follows.
fn next(what: &'static str, answer: io::Result<i32>) -> Result<NextEpoch, ToolstackError> {
    match answer.map_err(|e| ToolstackError::new(what, e))? {
        1.. => Ok(NextEpoch::Continue),
        0 => Ok(NextEpoch::Finish),
        answer => Err(failed(what, answer)),
    }
}

/// What COLO does while both guests run.
const WAIT: &str = "waiting for a new checkpoint";

impl ColoToolstack for Libxl<'_> {
    fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError> {
        self.expect(WAIT, number::WAIT_CHECKPOINT)?;
        next(WAIT, self.wire.wait_checkpoint())
    }
}

/// libxl does not say how many bytes of the stream it has read itself.
fn arrival(turn: Result<Turn, ToolstackError>) -> Result<Arrival, ToolstackError> {
    Ok(match turn? {
        Turn::Done => Arrival::Whole { bytes: 0 },
        Turn::Lost => Arrival::Lost,
    })
}

/// What libxl says about the sender.
fn turn(what: &'static str, answer: io::Result<i32>) -> Result<Turn, ToolstackError> {
    match answer.map_err(|e| ToolstackError::new(what, e))? {
        1 => Ok(Turn::Done),
        2 => Ok(Turn::Lost),
        answer => Err(failed(what, answer)),
    }
}

impl ColoRestoreToolstack for Libxl<'_> {
    fn postcopy(&mut self) -> Result<Turn, ToolstackError> {
        const WHAT: &str = "letting the secondary run";
        self.expect(WHAT, number::POSTCOPY)?;
        let turn = turn(WHAT, self.wire.postcopy())?;
        match &mut self.guest {
            Some(guest) if turn == Turn::Done => guest.run_on()?,
            _ => {}
        }
        Ok(turn)
    }

    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError> {
        self.expect(WAIT, number::WAIT_CHECKPOINT)?;
        arrival(turn(WAIT, self.wire.wait_checkpoint()))
    }

    fn suspend(&mut self) -> Result<Turn, ToolstackError> {
        const WHAT: &str = "suspending the secondary";
        self.expect(WHAT, number::SUSPEND)?;
        let turn = turn(WHAT, self.wire.suspend())?;
        match &self.guest {
            Some(guest) if turn == Turn::Done => guest.suspend()?,
            _ => {}
        }
        Ok(turn)
    }
}

impl CheckpointRestoreToolstack for Libxl<'_> {
    /// libxl reads its own records of the checkpoint. It does not say how many bytes they take, so
    /// offsets reported after them count only what libxc reads.
    fn checkpoint(&mut self, _offset: u64) -> Result<Arrival, ToolstackError> {
        self.expect(CHECKPOINT, number::CHECKPOINT)?;
        arrival(turn(CHECKPOINT, self.wire.checkpoint()))
    }
}

impl RestoreToolstack for Libxl<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        const WHAT: &str = "making up for missing static data";
        // Older libxls do not ask.
        if !self.callbacks.has(number::STATIC_DATA_DONE) {
            return Ok(());
        }
        let bits = u32::from(missing.cpuid) | u32::from(missing.msr) << 1;
        check(WHAT, self.wire.static_data_done(bits), |answer| answer == 0)
    }

    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        let frame = |gfn: Option<Gfn>| gfn.map_or(0, |gfn| gfn.0);
        self.wire
            .restore_results(frame(store_gfn), frame(console_gfn))
            .map_err(|e| ToolstackError::new("saying where the rings are", e))
    }
}
