//! Saving under COLO: the guest runs on both hosts, and a checkpoint makes them identical again.
//!
//! C implementation: the loop of `xg_sr_save.c:save` for `XC_STREAM_COLO`,
//! `colo_merge_secondary_dirty_bitmap`.

use std::io::Write;

use xsr_xen_backend::{DirtyBitmap, XenVersion};

use crate::back_channel::{self, BackChannel};
use crate::error::SaveError;
use crate::progress::Phase;
use crate::save::Run;
use crate::save::precopy::PrecopyPolicy;
use crate::save::suspended::Suspended;
use crate::sink::PageSink;
use crate::toolstack::{ColoToolstack, NextEpoch};

impl Run<'_, '_> {
    pub(super) fn both(
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
