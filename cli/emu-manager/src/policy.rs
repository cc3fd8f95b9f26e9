//! The policy that decides when a live migration suspends the guest.

use std::time::Duration;

use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats, TargetPolicy};

/// As many passes as the stock emu-manager makes.
const PASSES: u32 = 5;
/// How long precopy may take after the first pass.
const LIMIT: Duration = Duration::from_secs(300);

/// Suspends the guest when the remaining pages can be sent within the allowed downtime; otherwise
/// after 5 passes, but not before 5 minutes have passed since the end of the first one.
///
/// The first pass does not count: it sends all memory, which takes longer than 5 minutes for a
/// large VM on xapi's migration network. If it counted, everything that the guest had written
/// meanwhile would be sent with the guest suspended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MigrationPolicy {
    target: TargetPolicy,
    limit: Duration,
    /// The duration of the first pass.
    first_pass: Option<Duration>,
}

impl MigrationPolicy {
    /// A policy that allows this downtime; `None` for the default.
    pub(crate) fn new(max_downtime: Option<Duration>) -> Self {
        let default = TargetPolicy::default();
        Self {
            target: TargetPolicy {
                max_downtime: max_downtime.unwrap_or(default.max_downtime),
                timeout: None,
                ..default
            },
            limit: LIMIT,
            first_pass: None,
        }
    }
}

impl PrecopyPolicy for MigrationPolicy {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        let since_first_pass = match stats.iteration {
            0 => Duration::ZERO,
            _ => stats
                .elapsed
                .saturating_sub(*self.first_pass.get_or_insert(stats.elapsed)),
        };
        match self.target.decide(stats) {
            PrecopyDecision::Continue
                if stats.iteration >= PASSES && since_first_pass >= self.limit =>
            {
                PrecopyDecision::StopAndCopy
            }
            decision => decision,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::{self, Write};

    use xsr_save_restore::save::precopy::OnTimeout;
    use xsr_save_restore::sink::PageSink;
    use xsr_save_restore::toolstack::DirectToolstack;
    use xsr_save_restore::{Live, SaveRequest};
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, Workload, WorkloadSpec};
    use xsr_xen_backend::{Gather, GuestKind, Host as _};

    use super::*;

    fn decisions(stats: &[(u32, u64)]) -> Vec<PrecopyDecision> {
        let mut policy = MigrationPolicy::new(None);
        let decide = |(iteration, seconds): &(u32, u64)| {
            policy.decide(&PrecopyStats {
                iteration: *iteration,
                pages_sent: 1 << 24,
                dirty_count: None,
                expected_dirty: (*iteration > 1).then_some(1 << 20),
                shrinking: true,
                dirty_pages_per_second: 1e5,
                bytes_per_second: 1e8,
                elapsed: Duration::from_secs(*seconds),
            })
        };
        stats.iter().map(decide).collect()
    }

    #[test]
    fn a_first_pass_that_takes_longer_than_the_limit_does_not_end_precopy() {
        use PrecopyDecision::{Continue, StopAndCopy};
        // 5 passes are enough only 5 minutes after the first one.
        let large = [(1, 2400), (2, 3000), (3, 3600), (4, 4200), (5, 4800)];
        let stop_at_5 = [Continue, Continue, Continue, Continue, StopAndCopy];
        assert_eq!(decisions(&large), stop_at_5);
        let small = [(1, 10), (5, 50), (6, 309), (7, 310)];
        let stop_in_time = [Continue, Continue, Continue, StopAndCopy];
        assert_eq!(decisions(&small), stop_in_time);
    }

    /// A sink so slow that the guest writes something during each batch.
    struct Slow {
        guest: Workload,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl PageSink for Slow {
        fn write_gather(&mut self, _: &Gather<'_>) -> io::Result<()> {
            self.guest.step(100).map(drop).map_err(io::Error::other)
        }
    }

    fn passes(policy: &mut dyn PrecopyPolicy) -> u32 {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let domid = host
            .create_guest(&GuestSpec::new("large", GuestKind::Pvh, 16))
            .unwrap();
        let domain = host.domain(domid).unwrap();
        let spec = WorkloadSpec::writes(7, 1000, 1024);
        let mut sink = Slow {
            guest: host.workload(domid, &spec).unwrap(),
        };
        let mut toolstack = DirectToolstack(domain.as_ref());
        let saved = SaveRequest::new(domain.as_ref(), host.xen_version().unwrap())
            .live(Live {
                policy,
                verify: false,
            })
            .write_stream(&mut toolstack, &mut sink)
            .unwrap();
        let passes = saved.stats().iterations;
        saved.keep_suspended();
        passes
    }

    #[test]
    fn a_guest_that_never_meets_the_target_gets_five_passes() {
        let none = TargetPolicy {
            max_downtime: Duration::ZERO,
            timeout: Some(Duration::ZERO),
            on_timeout: OnTimeout::StopAndCopy,
        };
        assert_eq!(passes(&mut none.clone()), 1, "what a limit of xsr's does");
        let mut policy = MigrationPolicy {
            limit: Duration::ZERO,
            ..MigrationPolicy::new(Some(Duration::ZERO))
        };
        assert_eq!(passes(&mut policy), 5);
    }
}
