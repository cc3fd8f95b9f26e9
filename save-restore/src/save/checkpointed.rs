//! A save that never ends by itself: checkpoint after checkpoint of a guest that runs
//! on between them (Remus).
//!
//! C implementation: the loop of `xg_sr_save.c:save` for `XC_STREAM_REMUS`.

use std::io::Write;
use std::time::Duration;

use xsr_xen_backend::{DirtyBitmap, Domain, XenVersion};

use crate::error::SaveError;
use crate::guest::{GuestSave, Out};
use crate::progress::{OnProgress, Phase};
use crate::save::buffer::{EpochBuffer, Hold};
use crate::save::live::LiveMemory;
use crate::save::precopy::PrecopyPolicy;
use crate::save::suspended::Suspended;
use crate::save::{Run, SaveOptions, SaveStats, with_guest};
use crate::sink::PageSink;
use crate::toolstack::{CheckpointToolstack, Epoch, NextEpoch};

/// Bytes of a checkpoint that are kept while the guest is suspended, where nobody says:
/// 64 MiB.
pub const BUFFER_BYTES: usize = 64 << 20;

/// How to take checkpoints.
pub struct Checkpoints<'a> {
    /// Decides when the guest is suspended for the first time.
    pub policy: &'a mut dyn PrecopyPolicy,
    /// Bytes of a checkpoint that are kept in memory while the guest is suspended, and
    /// sent once it runs on ([`BUFFER_BYTES`] is a good number). Of a checkpoint that is
    /// larger all but the last part is sent with the guest suspended: no more than this is
    /// ever kept, and a guest that writes faster than can be sent is held up by it. 0:
    /// nothing is kept, as in Xen's own engine.
    pub buffer_bytes: usize,
}

impl std::fmt::Debug for Checkpoints<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoints")
            .field("buffer_bytes", &self.buffer_bytes)
            .finish_non_exhaustive()
    }
}

/// What a save with checkpoints did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointedStats {
    /// All that is in the stream. The guest was suspended for
    /// [`SaveStats::suspended_for`] in all.
    pub stream: SaveStats,
    /// CHECKPOINT records.
    pub checkpoints: u64,
}

/// Save a domain again and again, as a stream of checkpoints: its memory once while it
/// runs, until the policy says that the rest may be sent with the guest suspended; then in
/// each epoch what it has written since the one before, its registers and devices, and
/// a CHECKPOINT record. The guest runs between epochs, and `toolstack` says when the
/// next is due, and which was the last.
///
/// After the last, the guest runs on, and the dirty log is off. The stream ends behind
/// the CHECKPOINT record, without an END, as that of Xen does: END would say that what
/// came before it is whole, and the other side could not tell it from a migration. To
/// a restorer the stream just breaks off, and it takes over with the last checkpoint:
/// a toolstack that wants only one of both to run sees to it that the other side has
/// gone before it answers [`NextEpoch::Finish`].
///
/// # Errors
///
/// As [`save_live`](crate::save_live): whatever fails, in any epoch, the guest runs on
/// where it was, nothing logs dirty pages, nothing stays mapped. Checkpoints that are
/// complete in the stream remain of use. Unless it is the sink that fails, the stream ends
/// between two records, and whoever has the sink can go on with it.
pub fn save_checkpointed(
    domain: &dyn Domain,
    xen: XenVersion,
    toolstack: &mut dyn CheckpointToolstack,
    sink: &mut dyn PageSink,
    options: &SaveOptions,
    how: Checkpoints<'_>,
    progress: &mut OnProgress<'_>,
) -> Result<CheckpointedStats, SaveError> {
    let hold = Hold::new(how.buffer_bytes);
    let mut buffer = EpochBuffer::new(sink, &hold);
    let result = with_guest(domain, toolstack, options, progress, |run, suspended| {
        run.epochs(xen, suspended, &mut buffer, &hold, how.policy)
    });
    match result {
        Ok((_, stream, checkpoints)) => Ok(CheckpointedStats {
            stream,
            checkpoints,
        }),
        Err(cause) => {
            // Who stops it does not wait for what is kept, which is whole records.
            if !matches!(cause, SaveError::Stream(_) | SaveError::Aborted)
                && let Err(error) = buffer.flush()
            {
                // Then it is a sink that failed, and the caller has seen it.
                tracing::debug!(%error, "the end of the stream could not be written");
            }
            Err(cause)
        }
    }
}

impl<'r> Run<'r, '_> {
    /// How many checkpoints were taken until the toolstack said that it is enough.
    fn epochs<T: CheckpointToolstack + ?Sized>(
        &mut self,
        xen: XenVersion,
        suspended: &mut Suspended<'_, T>,
        sink: &mut dyn PageSink,
        hold: &Hold,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<u64, SaveError> {
        let (mut guest, mut out, mut memory) = self.first_copy(xen, sink, policy)?;
        let guest = guest.as_mut();
        let mut number = 0;
        loop {
            number += 1;
            hold.begin();
            let mut epoch =
                self.epoch(number, guest, &mut out, suspended, &mut memory, &mut |_| {
                    Ok(())
                })?;
            out.checkpoint()?;
            let asked = epoch.asked;
            suspended.postcopy(self.domain)?;
            epoch.suspended_for = asked.elapsed();
            self.stats.suspended_for += epoch.suspended_for;
            epoch.buffered_bytes = hold.end();
            self.report(Phase::Checkpoint)?;
            out.sink_mut().flush()?;
            if suspended.checkpoint(&epoch)? == NextEpoch::Finish {
                return Ok(number);
            }
        }
    }

    /// Send all memory while the guest runs, with one log for all epochs behind it: a write
    /// between two of them is in the next.
    pub(super) fn first_copy<'s>(
        &mut self,
        xen: XenVersion,
        sink: &'s mut dyn PageSink,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<(Box<dyn GuestSave + 'r>, Out<'s>, LiveMemory<'r>), SaveError> {
        let (mut guest, mut out) = self.head(xen, sink)?;
        let mut memory = self.log(guest.as_ref())?;
        self.precopy(guest.as_mut(), &mut out, &mut memory, policy)?;
        Ok((guest, out, memory))
    }

    /// Suspend the guest and write one checkpoint, but for the CHECKPOINT record behind it.
    pub(super) fn epoch<T: CheckpointToolstack + ?Sized>(
        &mut self,
        number: u64,
        guest: &mut dyn GuestSave,
        out: &mut Out<'_>,
        suspended: &mut Suspended<'_, T>,
        memory: &mut LiveMemory<'_>,
        besides: &mut dyn FnMut(&mut DirtyBitmap) -> Result<(), SaveError>,
    ) -> Result<Epoch, SaveError> {
        let before = self.stats;
        let asked = self.stop_and_copy(guest, out, suspended, memory, besides)?;
        self.report(Phase::Tail)?;
        guest.end_of_checkpoint(out)?;
        self.still_suspended()?;
        Ok(Epoch {
            number,
            pfns: self.stats.pfns - before.pfns,
            pages: self.stats.pages - before.pages,
            asked,
            suspended_for: Duration::ZERO,
            buffered_bytes: 0,
        })
    }
}
