//! Progress messages for libxl, with the words and steps of Xen's own engine, so that xl's progress
//! looks as usual.
//!
//! C implementation: `xc_report_progress_single` and `xc_report_progress_step` as `xg_sr_save.c`
//! calls them.

use std::ops::ControlFlow;

use xsr_save_restore::progress::{Phase, Progress};

use crate::args::StreamType;
use crate::log;
use crate::wire::Wire;

/// Bytes of page data between two steps.
const STEP: u64 = 4 << 20;

/// Reports a save's progress to libxl.
#[derive(Debug)]
pub(crate) struct Steps<'w> {
    wire: &'w Wire,
    stream: StreamType,
    last: Option<(Phase, u32)>,
    /// Checkpoints so far.
    checkpoints: u64,
    /// Bytes done in this pass at the last step.
    told: u64,
}

impl<'w> Steps<'w> {
    pub(crate) fn new(wire: &'w Wire, stream: StreamType) -> Self {
        Self {
            wire,
            stream,
            last: None,
            checkpoints: 0,
            told: 0,
        }
    }

    /// Report that a point has been reached.
    pub(crate) fn single(&self, what: &str) {
        self.step(what, 0, 0);
    }

    fn step(&self, what: &str, done: u64, total: u64) {
        // The wire notes that libxl is gone, and cancels the work.
        if let Err(error) = self.wire.progress(what, done, total) {
            log::say(format_args!("{what}: {error}"));
        }
    }

    /// One event of the engine.
    pub(crate) fn event(&mut self, progress: &Progress) -> ControlFlow<()> {
        let now = (progress.phase, progress.iteration);
        let before = self.last.replace(now);
        if before != Some(now) {
            self.told = 0;
            match progress.phase {
                Phase::Setup => self.single("Start of stream"),
                // A stream with checkpoints has no end.
                Phase::Tail if self.stream == StreamType::Plain => self.single("End of stream"),
                Phase::Checkpoint => self.checkpoints += 1,
                _ => {}
            }
            if before.is_some_and(|(phase, _)| phase == Phase::Suspend) {
                self.single("Domain now suspended");
            }
        }
        let what = match progress.phase {
            Phase::Pages => Some("Frames".to_owned()),
            Phase::StopAndCopy if self.checkpoints > 0 => Some("Checkpointed save".to_owned()),
            Phase::Precopy | Phase::StopAndCopy => {
                Some(format!("Frames iteration {}", progress.iteration))
            }
            Phase::Verify => Some("Frames verify".to_owned()),
            _ => None,
        };
        if let (Some(what), Some(total)) = (what, progress.pages_total)
            && (progress.bytes_done >= self.told + STEP || progress.pass_is_complete())
        {
            self.told = progress.bytes_done;
            self.step(&what, progress.pages_done, total);
        }
        self.wire.cancel().check()
    }
}
