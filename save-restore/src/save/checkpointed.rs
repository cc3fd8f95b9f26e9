//! Saving with checkpoints: one after the other, of a guest that runs between them (Remus).
//!
//! C implementation: the loop of `xg_sr_save.c:save` for `XC_STREAM_REMUS`.

use std::io::Write;
use std::time::Duration;

use xsr_xen_backend::{DirtyBitmap, XenVersion};

use crate::error::SaveError;
use crate::guest::{GuestSave, Out};
use crate::progress::Phase;
use crate::save::buffer::Hold;
use crate::save::live::LiveMemory;
use crate::save::precopy::PrecopyPolicy;
use crate::save::suspended::Suspended;
use crate::save::{Run, SaveStats};
use crate::sink::PageSink;
use crate::toolstack::{CheckpointToolstack, Epoch, NextEpoch};

/// Default for the bytes of a checkpoint that are kept while the guest is suspended: 64 MiB.
pub const BUFFER_BYTES: usize = 64 << 20;

/// How to take checkpoints.
pub struct Checkpoints<'a> {
    /// Decides when the guest is suspended for the first time.
    pub policy: &'a mut dyn PrecopyPolicy,
    /// Bytes of a checkpoint that are kept in memory while the guest is suspended, and sent once it
    /// runs ([`BUFFER_BYTES`] is a good number). Of a larger checkpoint, everything except the last
    /// part is sent with the guest suspended: no more than this is ever kept, so the guest waits if
    /// it writes faster than can be sent. 0: nothing is kept, as in Xen's own engine.
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
    /// Everything in the stream. The guest was suspended for [`SaveStats::suspended_for`] in all.
    pub stream: SaveStats,
    /// CHECKPOINT records.
    pub checkpoints: u64,
}

impl<'r> Run<'r, '_> {
    /// Takes checkpoints until the toolstack ends them; returns their number.
    pub(super) fn epochs<T: CheckpointToolstack + ?Sized>(
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

    /// Sends all memory while the guest runs. One log then covers all epochs: a write between two
    /// epochs belongs to the next.
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

    /// Suspends the guest and writes one checkpoint, except for its final CHECKPOINT record.
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
        let asked = self.stop_and_copy(guest, out, suspended, memory, besides, &mut None)?;
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
