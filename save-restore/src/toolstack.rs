//! What the engine asks of whoever drives it: libxl through its save helper, a
//! toolstack of its own, or nobody but the domain itself.
//!
//! The contracts are those of libxl's callbacks (`xenguest.h`, `save_callbacks` and
//! `restore_callbacks`).

use std::time::{Duration, Instant};

use thiserror::Error;
use xsr_format::frame::Gfn;
use xsr_xen_backend::{BackendError, Domain, ShutdownReason};

use crate::guest::older_policy;

pub use crate::guest::older_policy::OlderGuest;

/// A callback that failed.
#[derive(Debug, Error)]
#[error("{what}: {cause}")]
pub struct ToolstackError {
    /// What was asked.
    pub what: &'static str,
    /// Why it failed.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl ToolstackError {
    /// `what` failed because of `cause`.
    pub fn new(
        what: &'static str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let cause = cause.into();
        Self { what, cause }
    }
}

/// What a save asks.
///
/// libxl's callbacks answer with an integer, of which 1 is success (but 0 for
/// `switch_qemu_logdirty`); here `Ok` is success, and what failed is said.
pub trait SaveToolstack {
    /// Suspend the guest (C: `suspend`). Asked once in a plain save, after precopy if
    /// there was any.
    ///
    /// When this returns, the guest's kernel has answered, the domain has shut down
    /// with reason "suspend", its vcpus do not run, and its devices are quiet: the
    /// backends have finished their requests, and a device model has stopped and
    /// written what it had to write, so that the dirty log, read after this, is
    /// complete. Waiting for the guest and giving up on it (libxl: after 60 s) is the
    /// toolstack's.
    ///
    /// # Errors
    ///
    /// The guest does not answer, or not with a suspend. It may be asleep all the
    /// same: the save looks, and asks for [`SaveToolstack::resume`] then.
    fn suspend(&mut self) -> Result<(), ToolstackError>;

    /// Undo [`SaveToolstack::suspend`]: devices and guest run on where they were (C:
    /// `libxl_domain_resume` with `suspend_cancel`, which libxl does by itself when a
    /// save has failed). Asked at most once for each suspend, of a guest that has
    /// suspended: also where [`SaveToolstack::suspend`] failed after it had.
    ///
    /// # Errors
    ///
    /// The domain is still suspended then, and the save says so.
    fn resume(&mut self) -> Result<(), ToolstackError>;

    /// Switch the device model's log-dirty mode (C: `switch_qemu_logdirty`): while it
    /// is on, pages the device model writes are dirty as those the guest writes are.
    /// Asked for HVM and PVH guests only: on before memory is read, off again at the
    /// end, whatever happened between. When this returns, the device model has
    /// acknowledged it. A guest without a device model has nothing to do.
    ///
    /// # Errors
    ///
    /// On: the save fails, and does not ask for off (nor does Xen's): a toolstack that fails
    /// here leaves the mode off. Off: the save is what it is; the device model may go on
    /// marking pages, which costs time only.
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError>;
}

/// One checkpoint, complete in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Epoch {
    /// Its number, from 1. Memory that was sent before the guest suspended for the
    /// first time belongs to the first, but is not counted here.
    pub number: u64,
    /// pfns sent while the guest was suspended.
    pub pfns: u64,
    /// Pages sent with contents while the guest was suspended.
    pub pages: u64,
    /// When the guest was asked to suspend.
    pub asked: Instant,
    /// From asking the guest to suspend until it ran on; under COLO, which asks before that,
    /// 0.
    pub suspended_for: Duration,
    /// Bytes of it that were sent only then
    /// ([`Checkpoints::buffer_bytes`](crate::save::Checkpoints::buffer_bytes)).
    pub buffered_bytes: u64,
}

/// What comes behind a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextEpoch {
    /// It is time for another one (C: 1).
    Continue,
    /// That was the last: the guest is protected no longer, and runs on (C: 0).
    Finish,
}

/// What a save with checkpoints asks, in the order of Remus:
/// [`SaveToolstack::suspend`], [`CheckpointToolstack::postcopy`],
/// [`CheckpointToolstack::checkpoint`], and so on.
pub trait CheckpointToolstack: SaveToolstack {
    /// Have guest and device model run on (C: `postcopy`; libxl: the checkpoint devices
    /// are told, then `libxl_domain_resume` with `suspend_cancel`). Asked once for each
    /// suspend, with all of the checkpoint, its CHECKPOINT record included, written to
    /// the sink or, the last of it, to the checkpoint buffer. When this returns, the
    /// domain is no longer shut down. What the guest sends out from now on is of the next
    /// epoch and must not leave the host before that is acknowledged.
    ///
    /// # Errors
    ///
    /// The save fails. The domain may be suspended or run: the save looks, and asks for
    /// [`SaveToolstack::resume`] if it is not known to run.
    fn postcopy(&mut self) -> Result<(), ToolstackError>;

    /// The guest runs, and `epoch` is in the stream, written and flushed: deal with it and wait until it is
    /// time for the next (C: `checkpoint`). libxl writes the device model's state and its
    /// own end of the checkpoint to the same descriptor here (nothing of the stream is
    /// written meanwhile), waits for the other side to acknowledge it, lets go the
    /// network packets and disk writes of that epoch, and sleeps for the interval.
    /// Cancelling that wait is the toolstack's.
    ///
    /// # Errors
    ///
    /// The save fails; the guest runs on. The other side may be lost, or may have taken
    /// over: which of them is to run is the toolstack's to decide.
    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError>;
}

/// What a save under COLO asks, in this order: [`SaveToolstack::suspend`],
/// [`CheckpointToolstack::checkpoint`] with the guest still suspended, so that both ends
/// have the same before either runs on (Finish is a failure there: C: 0),
/// [`CheckpointToolstack::postcopy`], [`ColoToolstack::wait_checkpoint`], and so on.
pub trait ColoToolstack: CheckpointToolstack {
    /// The guest runs at both ends: wait until they differ in what they send out, or for
    /// another reason to make them the same again (C: `wait_checkpoint`).
    ///
    /// # Errors
    ///
    /// As [`CheckpointToolstack::checkpoint`].
    fn wait_checkpoint(&mut self) -> Result<NextEpoch, ToolstackError>;
}

/// Static data that a stream did not hold, so that the toolstack must provide it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissingStaticData {
    /// No X86_CPUID_POLICY (C: `XGR_SDD_MISSING_CPUID`).
    pub cpuid: bool,
    /// No X86_MSR_POLICY (C: `XGR_SDD_MISSING_MSR`).
    pub msr: bool,
}

/// What a restore asks.
pub trait RestoreToolstack {
    /// Static data has arrived and been applied, all but what is missing (C:
    /// `static_data_done`), which is for the toolstack to make up for. Asked once,
    /// before any memory.
    ///
    /// # Errors
    ///
    /// The restore fails.
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError>;

    /// The guest is complete, and this is where its rings are: of xenstore and of the
    /// console; `None` where the stream named none (C: `restore_results`, with 0 for
    /// none). Frames are pfns of an HVM guest and mfns of a PV guest. Asked once, after
    /// everything else, with the domain still paused. [`Restored`](crate::Restored)
    /// says the same.
    ///
    /// # Errors
    ///
    /// The restore fails.
    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError>;
}

/// What a restorer knows of a checkpoint whose CHECKPOINT record it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// All that belongs to it is here (C: `XGR_CHECKPOINT_SUCCESS`).
    Whole {
        /// How many bytes of the source the toolstack has read for that, so that places
        /// in the stream are said right; 0 where somebody else reads them.
        bytes: u64,
    },
    /// The other side has gone, and some of it never came (C:
    /// `XGR_CHECKPOINT_FAILOVER`).
    Lost,
}

/// What a restore of a stream with checkpoints asks.
pub trait CheckpointRestoreToolstack: RestoreToolstack {
    /// The libxc layer has read a CHECKPOINT record and applied nothing of what came
    /// before it since the last (C: `checkpoint`). libxl reads its own records of that
    /// checkpoint here, the device model's state and its own end, from the same
    /// descriptor; nothing else reads from it meanwhile. With [`Arrival::Whole`] the
    /// checkpoint counts: it is applied, and the guest is this one from now on. `offset`
    /// bytes of the stream have been read so far, as far as the libxc layer knows.
    ///
    /// What a toolstack has buffered of the guest's disk writes belongs to the checkpoint
    /// that is acknowledged next: [`Arrival::Whole`] commits it, everything else discards
    /// it.
    ///
    /// # Errors
    ///
    /// The restore fails, and nobody takes over: what came is no checkpoint, and the other
    /// side may be well.
    fn checkpoint(&mut self, offset: u64) -> Result<Arrival, ToolstackError>;
}

/// Whether a secondary under COLO goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was done (C: 1).
    Done,
    /// The primary has gone (C: 2): the guest here is all there is, as it is now.
    Lost,
}

/// What a restore under COLO asks, for each checkpoint:
/// [`CheckpointRestoreToolstack::checkpoint`], [`RestoreToolstack::restore_results`],
/// and then these three in order.
pub trait ColoRestoreToolstack: CheckpointRestoreToolstack {
    /// The guest is the checkpoint: have it run (C: `postcopy`). From the first time on its
    /// dirty pages are logged, which the toolstack has switched on.
    ///
    /// # Errors
    ///
    /// The restore fails; what runs is the toolstack's to stop.
    fn postcopy(&mut self) -> Result<Turn, ToolstackError>;

    /// Wait until the primary wants a new checkpoint (C: `wait_checkpoint`). It may say so
    /// in the stream, which nobody else reads meanwhile.
    ///
    /// # Errors
    ///
    /// As [`ColoRestoreToolstack::postcopy`].
    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError>;

    /// Suspend the guest (C: `suspend`). When this returns it does not write any more.
    ///
    /// # Errors
    ///
    /// As [`ColoRestoreToolstack::postcopy`].
    fn suspend(&mut self) -> Result<Turn, ToolstackError>;
}

/// No toolstack: suspends and resumes through the hypervisor alone, and has no
/// device model.
#[derive(Clone, Copy)]
pub struct DirectToolstack<'a>(pub &'a dyn Domain);

impl std::fmt::Debug for DirectToolstack<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DirectToolstack").finish_non_exhaustive()
    }
}

fn backend(what: &'static str) -> impl Fn(BackendError) -> ToolstackError {
    move |error| ToolstackError::new(what, error)
}

impl SaveToolstack for DirectToolstack<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "suspending the guest";
        self.0.suspend().map_err(|error| match self.0.info() {
            Ok(info) if info.paused && info.shutdown.is_none() => ToolstackError::new(
                WHAT,
                "it is paused, and a paused domain cannot suspend: unpause it first",
            ),
            _ => ToolstackError::new(WHAT, error),
        })
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "resuming the guest";
        // Xen would have a guest run on that has crashed or switched itself off.
        match self.0.info().map_err(backend(WHAT))?.shutdown {
            None | Some(ShutdownReason::Suspend) => self.0.resume().map_err(backend(WHAT)),
            Some(reason) => {
                let why = format!("it has shut down ({reason}), and is left as it is");
                Err(ToolstackError::new(WHAT, why))
            }
        }
    }

    fn switch_qemu_logdirty(&mut self, _on: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

/// Give a domain what its image does not hold of static data, as
/// [`RestoreToolstack::static_data_done`] has to. Without the MSRs it keeps Xen's default, which libxl
/// leaves it, too.
///
/// # Errors
///
/// The hypervisor refuses the CPU policy.
pub fn make_up_for(
    domain: &dyn Domain,
    missing: MissingStaticData,
    older: &OlderGuest,
) -> Result<(), ToolstackError> {
    if missing.cpuid {
        match &older.featureset {
            None => tracing::warn!(
                "the image holds no CPU policy (Xen before 4.14 wrote none): the guest gets this \
                 host's default, with what Xen 4.13 would have given it besides (RDRAND, HLE, RTM, \
                 MPX); of another processor's features, it may miss some"
            ),
            Some(_) => tracing::info!(
                "the image holds no CPU policy (Xen before 4.14 wrote none): the guest gets the \
                 toolstack's feature set"
            ),
        }
        older_policy::set(domain, older).map_err(backend("setting the CPU policy"))?;
    }
    Ok(())
}

impl CheckpointRestoreToolstack for DirectToolstack<'_> {
    /// There is nothing around the libxc stream.
    fn checkpoint(&mut self, _offset: u64) -> Result<Arrival, ToolstackError> {
        Ok(Arrival::Whole { bytes: 0 })
    }
}

impl RestoreToolstack for DirectToolstack<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        make_up_for(self.0, missing, &OlderGuest::default())
    }

    /// Nobody waits for the rings here: what [`crate::restore()`] returns names them.
    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        tracing::debug!(?store_gfn, ?console_gfn, "the guest is complete");
        Ok(())
    }
}
