//! Callbacks from the engine to its caller: libxl through its save helper, another toolstack, or
//! [`DirectToolstack`], which uses only the domain itself.
//!
//! The contracts are those of libxl's callbacks (`xenguest.h`, `save_callbacks` and
//! `restore_callbacks`).

use std::io;
use std::time::{Duration, Instant};

use thiserror::Error;
use xsr_format::frame::Gfn;
use xsr_xen_backend::suspend::{SUSPEND_TIMEOUT, SuspendError, suspend_within};
use xsr_xen_backend::{BackendError, Domain, Errno, ShutdownReason};

use crate::guest::older_policy;
use crate::progress::{Cancel, Cancelled};

pub use crate::guest::older_policy::OlderGuest;

/// A callback that failed.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct ToolstackError {
    /// What the callback should have done.
    pub what: &'static str,
    /// Why it failed.
    #[source]
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

/// Callbacks of a save.
///
/// libxl's callbacks return an integer, of which 1 is success (but 0 for `switch_qemu_logdirty`).
/// Here `Ok` is success, and the error names what failed.
pub trait SaveToolstack {
    /// Suspends the guest (C: `suspend`). Called once in a plain save, after precopy if there was
    /// any.
    ///
    /// When this returns, the guest's kernel has answered, the domain has shut down with reason
    /// "suspend", its vcpus do not run, and its devices are quiet: the backends have finished their
    /// requests, and a device model has stopped and written what it had to write, so that the dirty
    /// log, read after this, is complete. The toolstack has to wait for the guest and to give up on
    /// it (libxl: after 60 s).
    ///
    /// # Errors
    ///
    /// The guest does not answer, or not with a suspend. It may be suspended all the same: the save
    /// checks that, and then calls [`SaveToolstack::resume`].
    fn suspend(&mut self) -> Result<(), ToolstackError>;

    /// Undoes [`SaveToolstack::suspend`]: devices and guest continue where they were (C:
    /// `libxl_domain_resume` with `suspend_cancel`, which libxl does by itself when a save has
    /// failed). Called at most once for each suspend, for a guest that has suspended, even if
    /// [`SaveToolstack::suspend`] failed afterwards.
    ///
    /// # Errors
    ///
    /// The domain is still suspended then, and the save reports that.
    fn resume(&mut self) -> Result<(), ToolstackError>;

    /// Switches the device model's log-dirty mode (C: `switch_qemu_logdirty`): while it is on,
    /// pages that the device model writes are dirty like those that the guest writes. Called for
    /// HVM and PVH guests only: on before memory is read, off again at the end, whatever happened
    /// in between. When this returns, the device model has acknowledged it. Nothing to do for a
    /// guest without a device model.
    ///
    /// # Errors
    ///
    /// On: the save fails, and does not switch the mode off (nor does Xen's): a toolstack that
    /// fails here leaves the mode off. Off: the save is not affected; the device model may continue
    /// to mark pages, which only costs time.
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError>;
}

/// One checkpoint, complete in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Epoch {
    /// Its number, from 1. Memory that was sent before the guest suspended for the first time
    /// belongs to the first, but is not counted here.
    pub number: u64,
    /// pfns sent while the guest was suspended.
    pub pfns: u64,
    /// Pages sent with contents while the guest was suspended.
    pub pages: u64,
    /// When the guest was asked to suspend.
    pub asked: Instant,
    /// Time from asking the guest to suspend until it ran again; 0 under COLO, which calls
    /// [`CheckpointToolstack::checkpoint`] before that.
    pub suspended_for: Duration,
    /// Bytes of it that were sent only after that
    /// ([`Checkpoints::buffer_bytes`](crate::save::Checkpoints::buffer_bytes)).
    pub buffered_bytes: u64,
}

/// What follows a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextEpoch {
    /// It is time for another one (C: 1).
    Continue,
    /// That was the last: the guest is no longer protected, and continues to run (C: 0).
    Finish,
}

/// Callbacks of a save with checkpoints, in the order of Remus: [`SaveToolstack::suspend`],
/// [`CheckpointToolstack::postcopy`], [`CheckpointToolstack::checkpoint`], and so on.
pub trait CheckpointToolstack: SaveToolstack {
    /// Resumes guest and device model (C: `postcopy`; libxl: the checkpoint devices are told, then
    /// `libxl_domain_resume` with `suspend_cancel`). Called once for each suspend, when all of the
    /// checkpoint, its CHECKPOINT record included, has been written to the sink or, the last of it,
    /// to the checkpoint buffer. When this returns, the domain is no longer shut down. The guest's
    /// output from now on belongs to the next epoch and must not leave the host before that is
    /// acknowledged.
    ///
    /// # Errors
    ///
    /// The save fails. The domain may be suspended or run: the save checks that, and calls
    /// [`SaveToolstack::resume`] if the domain is not known to run.
    fn postcopy(&mut self) -> Result<(), ToolstackError>;

    /// Handles `epoch`, which is in the stream, written and flushed, while the guest runs, and
    /// waits until it is time for the next (C: `checkpoint`). libxl writes the device model's state
    /// and its own end of the checkpoint to the same descriptor here (the save writes nothing
    /// meanwhile), waits for the other side to acknowledge it, releases the network packets and
    /// disk writes of that epoch, and sleeps for the interval. The toolstack has to handle a
    /// cancellation of that wait.
    ///
    /// # Errors
    ///
    /// The save fails; the guest continues to run. The other side may be lost, or may have taken
    /// over: the toolstack decides which of the two should run.
    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError>;
}

/// Callbacks of a save under COLO, in this order: [`SaveToolstack::suspend`],
/// [`CheckpointToolstack::checkpoint`] with the guest still suspended, so that both ends are equal
/// before either runs (Finish is a failure there: C: 0), [`CheckpointToolstack::postcopy`],
/// [`ColoToolstack::wait_checkpoint`], and so on.
pub trait ColoToolstack: CheckpointToolstack {
    /// Waits, while the guest runs on both hosts, until their output differs, or for another reason
    /// to make them equal again (C: `wait_checkpoint`).
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

/// Callbacks of a restore.
pub trait RestoreToolstack {
    /// Static data has arrived and been applied, except what is missing (C: `static_data_done`),
    /// which the toolstack has to provide. Called once, before any memory.
    ///
    /// # Errors
    ///
    /// The restore fails.
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError>;

    /// The guest is complete, with these frames for its xenstore and console rings; `None` if the
    /// stream named none (C: `restore_results`, with 0 for none). Frames are pfns of an HVM guest
    /// and mfns of a PV guest. Called once, after everything else, with the domain still paused.
    /// [`Restored`](crate::Restored) contains the same.
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

/// What a restorer knows about a checkpoint whose CHECKPOINT record it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// All that belongs to it has arrived (C: `XGR_CHECKPOINT_SUCCESS`).
    Whole {
        /// How many bytes of the source the toolstack has read for that, so that positions in the
        /// stream are reported correctly; 0 if another process reads them.
        bytes: u64,
    },
    /// The other side is lost, and a part of the checkpoint never came (C:
    /// `XGR_CHECKPOINT_FAILOVER`).
    Lost,
}

/// Callbacks of a restore of a stream with checkpoints.
pub trait CheckpointRestoreToolstack: RestoreToolstack {
    /// The libxc layer has read a CHECKPOINT record and has applied nothing since the last one (C:
    /// `checkpoint`). libxl reads its own records of that checkpoint here, the device model's state
    /// and its own end, from the same descriptor, which has no other reader meanwhile. With
    /// [`Arrival::Whole`] the checkpoint counts: it is applied, and is the guest from now on.
    /// `offset` bytes of the stream have been read so far, as far as the libxc layer knows.
    ///
    /// The guest's disk writes that a toolstack has buffered belong to the checkpoint that is
    /// acknowledged next: [`Arrival::Whole`] commits them, everything else discards them.
    ///
    /// # Errors
    ///
    /// The restore fails, and does not take over: what came is not a checkpoint, and the other side
    /// may still be alive.
    fn checkpoint(&mut self, offset: u64) -> Result<Arrival, ToolstackError>;
}

/// Whether a secondary under COLO continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was done (C: 1).
    Done,
    /// The primary is lost (C: 2): the guest here, in its present state, is the only one.
    Lost,
}

/// Callbacks of a restore under COLO, for each checkpoint:
/// [`CheckpointRestoreToolstack::checkpoint`], [`RestoreToolstack::restore_results`], and then
/// these three in order.
pub trait ColoRestoreToolstack: CheckpointRestoreToolstack {
    /// Runs the guest, which equals the checkpoint (C: `postcopy`). From the first call on, its
    /// dirty pages are logged; the toolstack has switched that on.
    ///
    /// # Errors
    ///
    /// The restore fails; the toolstack has to stop what runs.
    fn postcopy(&mut self) -> Result<Turn, ToolstackError>;

    /// Waits until the primary wants a new checkpoint (C: `wait_checkpoint`). The primary may say
    /// so in the stream, which has no other reader meanwhile.
    ///
    /// # Errors
    ///
    /// As [`ColoRestoreToolstack::postcopy`].
    fn wait_checkpoint(&mut self) -> Result<Arrival, ToolstackError>;

    /// Suspends the guest (C: `suspend`). When this returns, the guest no longer writes.
    ///
    /// # Errors
    ///
    /// As [`ColoRestoreToolstack::postcopy`].
    fn suspend(&mut self) -> Result<Turn, ToolstackError>;
}

/// No toolstack: suspends and resumes through the hypervisor alone, and has no device model.
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

/// Suspends a guest without a toolstack. It has `limit` for it; `cancel` ends the wait.
///
/// # Errors
///
/// The guest is paused, or does not suspend ([`SuspendError`]); the cause is [`Cancelled`] if the
/// wait was ended.
pub fn suspend_guest(
    domain: &dyn Domain,
    limit: Duration,
    cancel: &Cancel,
) -> Result<(), ToolstackError> {
    const WHAT: &str = "suspending the guest";
    let suspended = suspend_within(domain, limit, &|| cancel.is_cancelled());
    suspended.map_err(|error| match (error, domain.info()) {
        (SuspendError::GivenUp, _) => ToolstackError::new(WHAT, io::Error::other(Cancelled)),
        // It was, or has been meanwhile.
        (error, Ok(info)) if info.paused && info.shutdown.is_none() && is_silence(&error) => {
            ToolstackError::new(
                WHAT,
                "it is paused, and a paused domain cannot suspend: unpause it first",
            )
        }
        (error, _) => ToolstackError::new(WHAT, error),
    })
}

/// Whether the guest has not answered.
fn is_silence(error: &SuspendError) -> bool {
    match error {
        SuspendError::Unanswered(_) => true,
        SuspendError::Backend(error) => error.errno == Errno::ETIMEDOUT,
        _ => false,
    }
}

impl SaveToolstack for DirectToolstack<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        suspend_guest(self.0, SUSPEND_TIMEOUT, &Cancel::new())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        const WHAT: &str = "resuming the guest";
        // Xen would also resume a guest that has crashed or shut down.
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

/// Gives a domain the static data that its image does not hold, as required of
/// [`RestoreToolstack::static_data_done`]. Without the MSRs the domain keeps Xen's default, as with
/// libxl.
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
    /// The libxc stream has no wrapper.
    fn checkpoint(&mut self, _offset: u64) -> Result<Arrival, ToolstackError> {
        Ok(Arrival::Whole { bytes: 0 })
    }
}

impl RestoreToolstack for DirectToolstack<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        make_up_for(self.0, missing, &OlderGuest::default())
    }

    /// No caller waits for the rings here: [`RestoreRequest`](crate::RestoreRequest) returns their frames.
    fn restore_results(
        &mut self,
        store_gfn: Option<Gfn>,
        console_gfn: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        tracing::debug!(?store_gfn, ?console_gfn, "the guest is complete");
        Ok(())
    }
}
