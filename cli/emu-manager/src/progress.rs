//! Progress, as the percentage that xenopsd shows.

use std::time::{Duration, Instant};

use xsr_save_restore::progress::{Phase, Progress};

/// The least time between two progress lines to xenopsd.
const INTERVAL: Duration = Duration::from_millis(250);

/// The percentage that xenopsd was told last.
#[derive(Debug, Default)]
pub(crate) struct Percent {
    told: Option<(u8, Instant)>,
}

impl Percent {
    /// The percentage to send now; `None` if it has not grown, or if it is too early.
    pub(crate) fn next(&mut self, progress: &Progress) -> Option<u8> {
        let percent = percent(progress)?;
        match self.told {
            Some((before, _)) if percent <= before => return None,
            Some((_, when)) if when.elapsed() < INTERVAL && percent < 100 => return None,
            _ => {}
        }
        self.told = Some((percent, Instant::now()));
        Some(percent)
    }
}

/// The share of the bytes to send that have been sent, as far as is known now: pages that the guest
/// has written meanwhile must be sent again.
fn percent(progress: &Progress) -> Option<u8> {
    let left = match progress.phase {
        Phase::Precopy | Phase::Pages | Phase::StopAndCopy => {
            progress.bytes_total?.saturating_sub(progress.bytes_done)
        }
        Phase::Tail => 0,
        _ => return None,
    };
    let all = progress.bytes.saturating_add(left).max(1);
    // Only the line `result:` stands for 100.
    u8::try_from(progress.bytes.saturating_mul(100) / all)
        .ok()
        .map(|percent| percent.min(99))
}
