//! A save under COLO: the guest runs at both ends, and a checkpoint makes them the same
//! again.
//!
//! C implementation: the loop of `xg_sr_save.c:save` for `XC_STREAM_COLO`,
//! `colo_merge_secondary_dirty_bitmap`.

use std::io::Write;

use xsr_xen_backend::{DirtyBitmap, Domain, XenVersion};

use crate::back_channel::{self, BackChannel};
use crate::error::SaveError;
use crate::progress::{OnProgress, Phase};
use crate::save::checkpointed::CheckpointedStats;
use crate::save::precopy::PrecopyPolicy;
use crate::save::suspended::Suspended;
use crate::save::{Run, SaveOptions, with_guest};
use crate::sink::PageSink;
use crate::toolstack::{ColoToolstack, NextEpoch};

/// Save a domain as the primary of COLO, checkpoint after checkpoint, as
/// [`save_checkpointed`](crate::save_checkpointed) does, with two differences: the guest
/// stays suspended until the toolstack says that the other end has all of a checkpoint; and
/// to the pages of each but the first belong those that the secondary has written itself,
/// which it names over `back`.
///
/// After the last, the guest runs on, and the dirty log is off.
///
/// # Errors
///
/// As [`save_checkpointed`](crate::save_checkpointed); a PV guest; a list of the secondary's
/// that is none.
#[expect(
    clippy::too_many_arguments,
    reason = "those of save_checkpointed, and the back-channel"
)]
pub fn save_colo(
    domain: &dyn Domain,
    xen: XenVersion,
    toolstack: &mut dyn ColoToolstack,
    sink: &mut dyn PageSink,
    back: &mut dyn BackChannel,
    options: &SaveOptions,
    policy: &mut dyn PrecopyPolicy,
    progress: &mut OnProgress<'_>,
) -> Result<CheckpointedStats, SaveError> {
    let (_, stream, checkpoints) = with_guest(
        domain,
        toolstack,
        options,
        progress,
        |run, suspended| match run.kind.is_translated() {
            true => run.both(xen, suspended, sink, back, policy),
            false => Err(SaveError::ColoGuest),
        },
    )?;
    Ok(CheckpointedStats {
        stream,
        checkpoints,
    })
}

impl Run<'_, '_> {
    fn both(
        &mut self,
        xen: XenVersion,
        suspended: &mut Suspended<'_, dyn ColoToolstack + '_>,
        sink: &mut dyn PageSink,
        back: &mut dyn BackChannel,
        policy: &mut dyn PrecopyPolicy,
    ) -> Result<u64, SaveError> {
        let (mut guest, mut out, mut memory) = self.first_copy(xen, sink, policy)?;
        let guest = guest.as_mut();
        let mut number = 0;
        loop {
            let mut behind = None;
            let mut besides = |dirty: &mut DirtyBitmap| {
                // Before the first one the secondary has not run yet.
                if number > 0 {
                    behind = Some(back_channel::merge(back, number - 1, dirty)?);
                }
                Ok(())
            };
            let epoch = self.epoch(
                number + 1,
                guest,
                &mut out,
                suspended,
                &mut memory,
                &mut besides,
            )?;
            if let Some(behind) = behind {
                behind.look(back)?;
            }
            out.checkpoint()?;
            number += 1;
            out.sink_mut().flush()?;
            if suspended.checkpoint(&epoch)? == NextEpoch::Finish {
                return Err(SaveError::ColoEnded);
            }
            suspended.postcopy(self.domain)?;
            self.stats.suspended_for += epoch.asked.elapsed();
            self.report(Phase::Checkpoint)?;
            if suspended.wait_checkpoint()? == NextEpoch::Finish {
                return Ok(number);
            }
        }
    }
}
