//! Precopy policies: when a live save stops sending what the guest keeps writing, and suspends it.
//!
//! C implementation: `xg_sr_save.c:simple_precopy_policy` and the `precopy_policy` callback of
//! `xenguest.h`.

use std::time::{Duration, Instant};

use xsr_format::frame::PAGE_SIZE;

/// The figures for a policy's decision. Pages are pfns: a page sent twice counts twice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrecopyStats {
    /// Passes that have been sent; 0 before the first.
    pub iteration: u32,
    /// Pages sent in all passes.
    pub pages_sent: u64,
    /// Pages to be sent in the next pass, if that is known: all of them before the first; `None`
    /// after a pass, before the dirty log has been read.
    pub dirty_count: Option<u64>,
    /// The most pages that will be dirty if the guest is suspended now: the number of dirty pages,
    /// if it is known. After a pass, the number sent in that pass, since as many became dirty in
    /// the one before; more if it took longer than the one before. `None` after the first.
    pub expected_dirty: Option<u64>,
    /// Whether each pass is still markedly (a tenth) smaller than the one before it.
    pub shrinking: bool,
    /// Pages the guest dirtied per second during the last pass; 0 before there was
    /// one.
    pub dirty_pages_per_second: f64,
    /// Bytes the sink took per second, in the last pass or over the last few, whichever
    /// is less; 0 before the first.
    pub bytes_per_second: f64,
    /// Time since the first pass began.
    pub elapsed: Duration,
}

impl PrecopyStats {
    /// How long the guest would be paused if it were suspended now: the time to send what is, or is
    /// expected to be, dirty then. `None` while that is unknown. Does not include the time to
    /// suspend, for registers and devices, and for the other side.
    pub fn estimated_downtime(&self) -> Option<Duration> {
        let pages = u32::try_from(self.expected_dirty?).unwrap_or(u32::MAX);
        if self.iteration == 0 || self.bytes_per_second <= 0.0 {
            return None;
        }
        let seconds = f64::from(pages) * PAGE_SIZE as f64 / self.bytes_per_second;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// A policy's decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrecopyDecision {
    /// Send what is dirty while the guest runs (C: `XGS_POLICY_CONTINUE_PRECOPY`).
    Continue,
    /// Suspend the guest and send the rest (C: `XGS_POLICY_STOP_AND_COPY`).
    StopAndCopy,
    /// Give up; the guest continues to run (C: `XGS_POLICY_ABORT`).
    Abort,
}

/// Decides when precopy ends. Called before each pass, and again after it, before the dirty log is
/// read (then [`PrecopyStats::dirty_count`] is `None`).
pub trait PrecopyPolicy {
    /// Returns the decision.
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision;
}

/// Xen's own policy: stop when fewer than 50 pages are dirty, or after five passes.
#[derive(Clone, Copy, Debug, Default)]
pub struct XenPolicy;

impl XenPolicy {
    const MAX_ITERATIONS: u32 = 5;
    const TARGET_DIRTY_COUNT: u64 = 50;
}

impl PrecopyPolicy for XenPolicy {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        let few = stats
            .dirty_count
            .is_some_and(|count| count < Self::TARGET_DIRTY_COUNT);
        match few || stats.iteration >= Self::MAX_ITERATIONS {
            true => PrecopyDecision::StopAndCopy,
            false => PrecopyDecision::Continue,
        }
    }
}

/// What [`TargetPolicy`] does after its time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTimeout {
    /// Suspend the guest, whatever is still dirty.
    StopAndCopy,
    /// Give up; the guest continues to run.
    Cancel,
}

/// Stops when the estimated downtime is no longer than requested; does what was requested after a
/// time-out.
///
/// It decides after a pass, when its duration is known. Half of the requested downtime is for
/// memory, the rest for what no estimate includes and for bad luck. When passes no longer shrink,
/// so that waiting gains nothing, all of it is for memory.
#[derive(Clone, Copy, Debug)]
pub struct TargetPolicy {
    /// How long the guest may be paused.
    pub max_downtime: Duration,
    /// How long precopy may take; `None` for no limit.
    pub timeout: Option<Duration>,
    /// What to do after that time.
    pub on_timeout: OnTimeout,
}

/// 300 ms, which other hypervisors allow and most programs do not notice. After five minutes the
/// rest is sent, however long it takes.
impl Default for TargetPolicy {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            timeout: Some(Duration::from_secs(300)),
            on_timeout: OnTimeout::StopAndCopy,
        }
    }
}

impl TargetPolicy {
    /// Whether the rest may be sent with the guest suspended.
    fn fits(&self, stats: &PrecopyStats) -> bool {
        let room = match stats.shrinking {
            true => self.max_downtime / 2,
            false => self.max_downtime,
        };
        match stats.dirty_count {
            // Dirty pages are sent before the guest is suspended, and that may take long.
            Some(pages) => stats.iteration > 0 && pages == 0,
            None => stats
                .estimated_downtime()
                .is_some_and(|downtime| downtime <= room),
        }
    }
}

impl PrecopyPolicy for TargetPolicy {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        if self.fits(stats) {
            return PrecopyDecision::StopAndCopy;
        }
        match self.timeout {
            Some(timeout) if stats.elapsed >= timeout => match self.on_timeout {
                OnTimeout::StopAndCopy => PrecopyDecision::StopAndCopy,
                OnTimeout::Cancel => PrecopyDecision::Abort,
            },
            _ => PrecopyDecision::Continue,
        }
    }
}

/// Keeps the figures across passes.
#[derive(Debug)]
pub(super) struct Meter {
    begun: Instant,
    pass_begun: Instant,
    /// The duration of the pass in which the pages of this one became dirty.
    pass_before: Duration,
    /// Pages of the last pass.
    last_pass: Option<u64>,
    /// Of all passes, each counting half as much as the one after it.
    sending: Duration,
    bytes: u64,
    stats: PrecopyStats,
}

impl Meter {
    /// The state before the first pass, which sends all `pages`.
    pub(super) fn new(pages: u64) -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            pass_begun: now,
            pass_before: Duration::ZERO,
            last_pass: None,
            sending: Duration::ZERO,
            bytes: 0,
            stats: PrecopyStats {
                iteration: 0,
                pages_sent: 0,
                dirty_count: Some(pages),
                expected_dirty: Some(pages),
                shrinking: true,
                dirty_pages_per_second: 0.0,
                bytes_per_second: 0.0,
                elapsed: Duration::ZERO,
            },
        }
    }

    /// The current figures.
    pub(super) fn stats(&mut self) -> &PrecopyStats {
        self.stats.elapsed = self.begun.elapsed();
        &self.stats
    }

    /// A pass begins.
    pub(super) fn begin(&mut self) {
        self.pass_begun = Instant::now();
    }

    /// A pass of `pages` has been sent, `bytes` of their contents.
    pub(super) fn sent(&mut self, pages: u64, bytes: u64) {
        self.sent_in(self.pass_begun.elapsed(), pages, bytes);
    }

    fn sent_in(&mut self, took: Duration, pages: u64, bytes: u64) {
        self.sending = self.sending / 2 + took;
        self.bytes = self.bytes / 2 + bytes;
        let lately = per_second(self.bytes, self.sending);
        // A pass of pages without contents says nothing about the sink.
        self.stats.bytes_per_second = match bytes {
            0 => lately,
            bytes => lately.min(per_second(bytes, took)),
        };
        self.stats.expected_dirty = (self.stats.iteration > 0).then(|| {
            let before = self.pass_before.as_nanos().max(1);
            let longer = u128::from(pages) * took.as_nanos() / before;
            u64::try_from(longer).unwrap_or(u64::MAX).max(pages)
        });
        self.pass_before = took;
        self.last_pass = Some(pages);
        self.stats.iteration += 1;
        self.stats.pages_sent += pages;
        self.stats.dirty_count = None;
    }

    /// The dirty log has been read: `pages` were written since the last pass began.
    pub(super) fn dirty(&mut self, pages: u64) {
        self.pass_before = self.pass_begun.elapsed();
        self.dirty_in(self.pass_before, pages);
    }

    fn dirty_in(&mut self, time: Duration, pages: u64) {
        self.stats.dirty_count = Some(pages);
        self.stats.expected_dirty = Some(pages);
        self.stats.shrinking = self
            .last_pass
            .is_none_or(|last| pages < last.saturating_sub(last / 10));
        self.stats.dirty_pages_per_second = per_second(pages, time);
    }
}

fn per_second(count: u64, time: Duration) -> f64 {
    // Exact up to 2^53, which is more than the bytes of any guest.
    let count = count as f64;
    match time.as_secs_f64() {
        0.0 => 0.0,
        seconds => count / seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(iteration: u32, dirty_count: Option<u64>) -> PrecopyStats {
        PrecopyStats {
            iteration,
            pages_sent: 1000,
            dirty_count,
            expected_dirty: dirty_count.or((iteration > 1).then_some(101)),
            shrinking: true,
            dirty_pages_per_second: 100.0,
            bytes_per_second: 4096.0 * 1000.0,
            elapsed: Duration::from_secs(u64::from(iteration)),
        }
    }

    #[test]
    fn xens_policy_is_xens() {
        use PrecopyDecision::{Continue, StopAndCopy};
        for (iteration, dirty, expected) in [
            (0, Some(100_000), Continue),
            (1, None, Continue),
            (1, Some(50), Continue),
            (1, Some(49), StopAndCopy),
            (4, Some(50), Continue),
            (5, None, StopAndCopy),
            (0, Some(49), StopAndCopy),
        ] {
            let decision = XenPolicy.decide(&stats(iteration, dirty));
            assert_eq!(decision, expected, "{iteration} {dirty:?}");
        }
    }

    #[test]
    fn the_target_policy_stops_when_the_rest_fits() {
        use PrecopyDecision::{Abort, Continue, StopAndCopy};
        let policy = |on_timeout| TargetPolicy {
            max_downtime: Duration::from_millis(200),
            timeout: Some(Duration::from_secs(4)),
            on_timeout,
        };
        let mut policies = [policy(OnTimeout::StopAndCopy), policy(OnTimeout::Cancel)];
        let behind = |iteration, expected, shrinking| PrecopyStats {
            expected_dirty: expected,
            shrinking,
            ..stats(iteration, None)
        };
        for (stats, expected) in [
            // Before the first pass, and directly after it, nothing is known about the guest.
            (stats(0, Some(1)), [Continue, Continue]),
            (behind(1, None, true), [Continue, Continue]),
            // Dirty pages are sent first, however few.
            (stats(1, Some(1)), [Continue, Continue]),
            (stats(1, Some(0)), [StopAndCopy, StopAndCopy]),
            // 1000 pages a second: 100 take 100 ms, half of what is allowed.
            (behind(2, Some(100), true), [StopAndCopy, StopAndCopy]),
            (behind(2, Some(101), true), [Continue, Continue]),
            (behind(2, Some(200), false), [StopAndCopy, StopAndCopy]),
            (behind(2, Some(201), false), [Continue, Continue]),
            (stats(4, Some(101)), [StopAndCopy, Abort]),
            (behind(4, Some(201), false), [StopAndCopy, Abort]),
            (behind(4, Some(100), true), [StopAndCopy, StopAndCopy]),
        ] {
            let decisions = policies.each_mut().map(|policy| policy.decide(&stats));
            assert_eq!(decisions, expected, "{stats:?}");
        }
        let mut patient = TargetPolicy {
            timeout: None,
            ..policy(OnTimeout::Cancel)
        };
        assert_eq!(patient.decide(&stats(1000, Some(101))), Continue);
    }

    #[test]
    fn the_meter_expects_what_the_passes_have_shown() {
        let mut meter = Meter::new(1000);
        let pages = |n: u64| n * PAGE_SIZE as u64;
        let ms = Duration::from_millis;
        meter.sent_in(ms(1000), 1000, pages(1000));
        let first = *meter.stats();
        assert_eq!((first.expected_dirty, first.dirty_count), (None, None));
        assert_eq!(first.bytes_per_second, 4_096_000.0);
        meter.pass_before = ms(1000);
        meter.dirty_in(ms(1000), 400);
        let dirty = *meter.stats();
        assert_eq!((dirty.expected_dirty, dirty.shrinking), (Some(400), true));
        assert_eq!(dirty.estimated_downtime(), Some(ms(400)));
        assert_eq!(dirty.dirty_pages_per_second, 400.0);
        // A pass as fast as the one before: no more than was sent in it.
        meter.sent_in(ms(500), 400, pages(400));
        let second = *meter.stats();
        assert_eq!(second.expected_dirty, Some(400));
        // 800 pages a second, although 900 over both.
        assert_eq!(second.bytes_per_second, 800.0 * 4096.0);
        assert_eq!(second.estimated_downtime(), Some(ms(500)));
        // A sink that stalls: the guest has had twice the time.
        meter.pass_before = ms(500);
        meter.dirty_in(ms(500), 380);
        assert!(!meter.stats().shrinking, "by a twentieth only");
        meter.sent_in(ms(1000), 380, pages(380));
        let third = *meter.stats();
        assert_eq!(third.expected_dirty, Some(760));
        assert_eq!(third.estimated_downtime(), Some(ms(2000)));
        // Only absent pages: the sink is not slower because of them.
        let before = third.bytes_per_second;
        meter.sent_in(ms(1), 10, 0);
        assert!(meter.stats().bytes_per_second > before / 3.0);
    }

    #[test]
    fn the_meter_counts_passes() {
        let mut meter = Meter::new(1000);
        assert_eq!(meter.stats().dirty_count, Some(1000));
        assert_eq!(meter.stats().estimated_downtime(), None);
        meter.begin();
        std::hint::black_box((0..100_000_u64).sum::<u64>());
        meter.sent(1000, 4_096_000);
        assert_eq!(meter.stats().dirty_count, None);
        meter.dirty(10);
        let stats = *meter.stats();
        assert_eq!((stats.iteration, stats.pages_sent), (1, 1000));
        assert!(stats.bytes_per_second > 0.0 && stats.dirty_pages_per_second > 0.0);
        assert!(stats.estimated_downtime().unwrap() < Duration::from_secs(1));
    }
}
