//! When a live save stops sending what the guest goes on writing, and suspends it.
//!
//! C implementation: `xg_sr_save.c:simple_precopy_policy` and the `precopy_policy`
//! callback of `xenguest.h`.

use std::time::{Duration, Instant};

use xsr_format::frame::PAGE_SIZE;

/// What a policy decides from. Pages are pfns: a page sent twice counts twice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrecopyStats {
    /// Passes that have been sent; 0 before the first.
    pub iteration: u32,
    /// Pages sent in all passes.
    pub pages_sent: u64,
    /// Pages to be sent in the next pass, where that is known: all of them before the
    /// first; `None` after a pass, before the dirty log has been read.
    pub dirty_count: Option<u64>,
    /// Pages the guest dirtied per second during the last pass; 0 before there was
    /// one.
    pub dirty_pages_per_second: f64,
    /// Octets the sink took per second in all passes; 0 before the first.
    pub octets_per_second: f64,
    /// Since the first pass began.
    pub elapsed: Duration,
}

impl PrecopyStats {
    /// How long the guest would stand still if it were suspended now: as long as it
    /// takes to send what is dirty. `None` while that is not known.
    pub fn estimated_downtime(&self) -> Option<Duration> {
        let pages = u32::try_from(self.dirty_count?).unwrap_or(u32::MAX);
        if self.iteration == 0 || self.octets_per_second <= 0.0 {
            return None;
        }
        let seconds = f64::from(pages) * PAGE_SIZE as f64 / self.octets_per_second;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrecopyDecision {
    /// Send what is dirty while the guest runs on (C: `XGS_POLICY_CONTINUE_PRECOPY`).
    Continue,
    /// Suspend the guest and send the rest (C: `XGS_POLICY_STOP_AND_COPY`).
    StopAndCopy,
    /// Give up; the guest runs on (C: `XGS_POLICY_ABORT`).
    Abort,
}

/// Decides when precopy ends. Asked before each pass, and again after it, before the
/// dirty log is read (then [`PrecopyStats::dirty_count`] is `None`).
pub trait PrecopyPolicy {
    /// What comes next.
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision;
}

/// Xen's own: stop when fewer than 50 pages are dirty, or after five passes.
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

/// What [`TargetPolicy`] does when its time is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTimeout {
    /// Suspend the guest whatever is still dirty.
    StopAndCopy,
    /// Give up; the guest runs on.
    Cancel,
}

/// Stop when the guest would stand still no longer than asked for; after a time, do
/// what was asked for that case.
#[derive(Clone, Copy, Debug)]
pub struct TargetPolicy {
    /// How long the guest may stand still.
    pub max_downtime: Duration,
    /// How long precopy may take; `None` for as long as it needs.
    pub timeout: Option<Duration>,
    /// What to do then.
    pub on_timeout: OnTimeout,
}

impl PrecopyPolicy for TargetPolicy {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        let fits = stats
            .estimated_downtime()
            .is_some_and(|downtime| downtime <= self.max_downtime);
        if fits || (stats.iteration > 0 && stats.dirty_count == Some(0)) {
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

/// Keeps the figures between passes.
#[derive(Debug)]
pub(super) struct Meter {
    begun: Instant,
    pass_begun: Instant,
    sending: Duration,
    octets: u64,
    stats: PrecopyStats,
}

impl Meter {
    /// Before the first pass, which sends all `pages`.
    pub(super) fn new(pages: u64) -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            pass_begun: now,
            sending: Duration::ZERO,
            octets: 0,
            stats: PrecopyStats {
                iteration: 0,
                pages_sent: 0,
                dirty_count: Some(pages),
                dirty_pages_per_second: 0.0,
                octets_per_second: 0.0,
                elapsed: Duration::ZERO,
            },
        }
    }

    /// The figures now.
    pub(super) fn stats(&mut self) -> &PrecopyStats {
        self.stats.elapsed = self.begun.elapsed();
        &self.stats
    }

    /// A pass begins.
    pub(super) fn begin(&mut self) {
        self.pass_begun = Instant::now();
    }

    /// A pass of `pages` has been sent, `octets` of their contents.
    pub(super) fn sent(&mut self, pages: u64, octets: u64) {
        self.sending += self.pass_begun.elapsed();
        self.octets += octets;
        self.stats.iteration += 1;
        self.stats.pages_sent += pages;
        self.stats.dirty_count = None;
        self.stats.octets_per_second = per_second(self.octets, self.sending);
    }

    /// The dirty log has been read: `pages` were written since the last pass began.
    pub(super) fn dirty(&mut self, pages: u64) {
        self.stats.dirty_count = Some(pages);
        self.stats.dirty_pages_per_second = per_second(pages, self.pass_begun.elapsed());
    }
}

fn per_second(count: u64, time: Duration) -> f64 {
    // Exact up to 2^53, which is more than the octets of any guest.
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
            dirty_pages_per_second: 100.0,
            octets_per_second: 4096.0 * 1000.0,
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
            max_downtime: Duration::from_millis(100),
            timeout: Some(Duration::from_secs(4)),
            on_timeout,
        };
        let mut policies = [policy(OnTimeout::StopAndCopy), policy(OnTimeout::Cancel)];
        for (iteration, dirty, expected) in [
            // Before the first pass nothing is known of the sink.
            (0, Some(1), [Continue, Continue]),
            (1, None, [Continue, Continue]),
            // 1000 pages a second: 100 take 100 ms.
            (1, Some(100), [StopAndCopy, StopAndCopy]),
            (1, Some(101), [Continue, Continue]),
            (4, Some(101), [StopAndCopy, Abort]),
            (4, None, [StopAndCopy, Abort]),
            (4, Some(100), [StopAndCopy, StopAndCopy]),
        ] {
            let stats = stats(iteration, dirty);
            let decisions = policies.each_mut().map(|policy| policy.decide(&stats));
            assert_eq!(decisions, expected, "{iteration} {dirty:?}");
        }
        let mut patient = TargetPolicy {
            timeout: None,
            ..policy(OnTimeout::Cancel)
        };
        assert_eq!(patient.decide(&stats(1000, Some(101))), Continue);
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
        assert!(stats.octets_per_second > 0.0 && stats.dirty_pages_per_second > 0.0);
        assert!(stats.estimated_downtime().unwrap() < Duration::from_secs(1));
    }
}
