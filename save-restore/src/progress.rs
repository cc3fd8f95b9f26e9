//! Progress events of the engine, and cancellation.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::save::precopy::PrecopyStats;

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Querying the domain and mapping its tables.
    Setup,
    /// Memory of a running guest: one of the passes of a live save.
    Precopy,
    /// Waiting for the guest to suspend.
    Suspend,
    /// Memory of a suspended guest: all of it in a still save or a restore.
    Pages,
    /// The memory that a live save still has to send once the guest is suspended.
    StopAndCopy,
    /// All memory a second time, for the restorer to compare.
    Verify,
    /// Registers, devices, everything else.
    Tail,
    /// A checkpoint is in the stream, and the guest runs until it is time for the next one.
    Checkpoint,
}

/// How far the engine is.
///
/// A *pass* goes once over some pages: a phase with memory in it has one, precopy has as many as
/// needed. The figures of a pass start from zero with it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Completed passes over the memory of a running guest; 0 except in a live save.
    pub iteration: u32,
    /// pfns processed in this pass.
    pub pages_done: u64,
    /// pfns in this pass. `None` in a restore, because a stream does not say, and while the engine
    /// looks at the guest's tables, which is not part of a pass.
    pub pages_total: Option<u64>,
    /// Bytes of page contents transferred in this pass.
    pub bytes_done: u64,
    /// The most that it can be (a pfn may have no contents); `None` in a restore.
    pub bytes_total: Option<u64>,
    /// Bytes of page contents transferred in all passes.
    pub bytes: u64,
    /// Bytes of page contents per second, over the last second or two; 0 while it is unknown.
    pub bytes_per_second: f64,
    /// Pages the guest wrote per second, when its dirty log was last read; 0 before.
    pub dirty_pages_per_second: f64,
    /// Pages that were dirty then; `None` before, and if there is no dirty log.
    pub dirty_count: Option<u64>,
    /// Time until this pass is complete, at the rate so far.
    pub estimated_time: Option<Duration>,
    /// How long the guest would be paused if it were suspended instead of sending this pass. Known
    /// in precopy, after the first pass.
    pub estimated_downtime: Option<Duration>,
    /// Time since the save or restore began.
    pub elapsed: Duration,
}

impl Progress {
    /// Whether this is the last event of a pass.
    pub fn pass_is_complete(&self) -> bool {
        self.pages_total == Some(self.pages_done)
    }
}

/// Called with the engine's progress at the beginning of each phase and pass, and after each record
/// of pages. `Break` stops the save or restore: it fails as aborted, with the same guarantee as
/// after any other failure.
pub type OnProgress<'a> = dyn FnMut(&Progress) -> ControlFlow<()> + 'a;

/// Stops a save or restore from another thread, also while it waits for a descriptor whose other
/// end has stalled. All clones are one token.
///
/// It takes effect where the token is checked: give it to the sink or source
/// ([`crate::sink::FdSink::cancellable`], [`crate::source::FdSource::cancellable`]) and answer a
/// progress event with [`Cancel::check`].
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A token that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the token. It cannot be reset.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the token is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// `Break` once the token is set.
    pub fn check(&self) -> ControlFlow<()> {
        match self.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// The error of a sink or source that has stopped waiting, inside an [`std::io::Error`].
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("cancelled")]
pub struct Cancelled;

impl Cancelled {
    /// Whether `error` holds a [`Cancelled`].
    pub fn is(error: &std::io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

/// Bytes per second over the last second or two.
#[derive(Debug)]
struct Speed {
    /// When a stretch began, and the bytes until then: the stretch before, and this one.
    before: (Instant, u64),
    this: (Instant, u64),
}

impl Speed {
    const STRETCH: Duration = Duration::from_secs(1);

    fn new(now: Instant) -> Self {
        Self {
            before: (now, 0),
            this: (now, 0),
        }
    }

    fn at(&mut self, now: Instant, bytes: u64) -> f64 {
        if now - self.this.0 >= Self::STRETCH {
            self.before = self.this;
            self.this = (now, bytes);
        }
        let (then, so_far) = self.before;
        match (now - then).as_secs_f64() {
            0.0 => 0.0,
            // Exact up to 2^53, which is more than any guest transfers in a second.
            seconds => (bytes - so_far) as f64 / seconds,
        }
    }
}

/// Keeps the figures and reports them.
pub(crate) struct Reporter<'r, 'p> {
    tell: &'r mut OnProgress<'p>,
    begun: Instant,
    speed: Speed,
    now: Progress,
}

impl<'r, 'p> Reporter<'r, 'p> {
    pub(crate) fn new(tell: &'r mut OnProgress<'p>) -> Self {
        let begun = Instant::now();
        Self {
            tell,
            begun,
            speed: Speed::new(begun),
            now: Progress {
                phase: Phase::Setup,
                iteration: 0,
                pages_done: 0,
                pages_total: None,
                bytes_done: 0,
                bytes_total: None,
                bytes: 0,
                bytes_per_second: 0.0,
                dirty_pages_per_second: 0.0,
                dirty_count: None,
                estimated_time: None,
                estimated_downtime: None,
                elapsed: Duration::ZERO,
            },
        }
    }

    /// The figures of precopy, for the events from now on.
    pub(crate) fn precopy(&mut self, stats: &PrecopyStats) {
        self.now.iteration = stats.iteration;
        if stats.iteration > 0 && stats.dirty_count.is_some() {
            self.now.dirty_count = stats.dirty_count;
            self.now.dirty_pages_per_second = stats.dirty_pages_per_second;
            self.now.estimated_downtime = stats.estimated_downtime();
        }
    }

    /// A phase begins. One with memory has a pass, over this many pfns with at most this many
    /// bytes, if that is known.
    pub(crate) fn begin(&mut self, phase: Phase, pass: Option<(u64, u64)>) -> ControlFlow<()> {
        self.now.phase = phase;
        self.now.pages_done = 0;
        self.now.bytes_done = 0;
        self.now.pages_total = pass.map(|(pages, _)| pages);
        self.now.bytes_total = pass.map(|(_, bytes)| bytes);
        if phase != Phase::Precopy {
            self.now.estimated_downtime = None;
        }
        self.tell()
    }

    /// This many more pfns, and bytes of contents, have been processed.
    pub(crate) fn advance(&mut self, pages: u64, bytes: u64) -> ControlFlow<()> {
        self.now.pages_done += pages;
        self.now.bytes_done += bytes;
        self.now.bytes += bytes;
        self.tell()
    }

    /// Whether to go on, in work that is not part of the preceding pass; that pass is not reported
    /// as complete a second time.
    pub(crate) fn ask(&mut self) -> ControlFlow<()> {
        let pages_total = self.now.pages_total.take();
        let told = self.tell();
        self.now.pages_total = pages_total;
        told
    }

    fn tell(&mut self) -> ControlFlow<()> {
        let now = Instant::now();
        self.now.elapsed = now - self.begun;
        self.now.bytes_per_second = self.speed.at(now, self.now.bytes);
        self.now.estimated_time = self.now.bytes_total.and_then(|total| {
            let left = total.saturating_sub(self.now.bytes_done);
            Duration::try_from_secs_f64(left as f64 / self.now.bytes_per_second).ok()
        });
        (self.tell)(&self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_two_seconds() {
        let begun = Instant::now();
        let mut speed = Speed::new(begun);
        let mut at = |tenths: u64, bytes| {
            let now = begun + Duration::from_millis(tenths * 100);
            speed.at(now, bytes)
        };
        assert_eq!(at(0, 0), 0.0);
        assert_eq!(at(5, 1000), 2000.0);
        assert_eq!(at(10, 2000), 2000.0);
        assert_eq!(at(20, 3000), 1000.0, "since 1 s");
        assert_eq!(at(25, 3000), 1000.0 / 1.5);
        // No more bytes come.
        assert_eq!(at(30, 3000), 0.0);
        assert_eq!(at(400, 3000), 0.0);
    }

    #[test]
    fn a_pass_has_figures_of_its_own() {
        let mut seen = Vec::new();
        let mut tell = |progress: &Progress| {
            seen.push(*progress);
            match seen.len() {
                5 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let mut reporter = Reporter::new(&mut tell);
        assert!(
            reporter
                .begin(Phase::Precopy, Some((10, 40_960)))
                .is_continue()
        );
        assert!(reporter.advance(10, 4096).is_continue());
        let stats = PrecopyStats {
            iteration: 1,
            pages_sent: 10,
            dirty_count: Some(3),
            expected_dirty: Some(3),
            shrinking: true,
            dirty_pages_per_second: 5.0,
            bytes_per_second: 12_288.0,
            elapsed: Duration::from_secs(1),
        };
        reporter.precopy(&stats);
        assert!(reporter.ask().is_continue());
        assert!(
            reporter
                .begin(Phase::Precopy, Some((3, 12_288)))
                .is_continue()
        );
        assert!(reporter.begin(Phase::Suspend, None).is_break());
        let [first, complete, asked, second, suspend] = seen[..] else {
            panic!("{seen:?}");
        };
        assert_eq!(
            (first.estimated_time, first.pass_is_complete()),
            (None, false)
        );
        assert!(!asked.pass_is_complete() && asked.bytes_done == 4096);
        assert!(complete.pass_is_complete() && complete.estimated_time.is_some());
        assert_eq!((complete.bytes_done, complete.bytes), (4096, 4096));
        assert_eq!((second.bytes_done, second.bytes), (0, 4096));
        assert_eq!((second.dirty_count, second.iteration), (Some(3), 1));
        assert_eq!(second.estimated_downtime, Some(Duration::from_secs(1)));
        assert_eq!(
            (suspend.pages_total, suspend.estimated_downtime),
            (None, None)
        );
    }

    #[test]
    fn clones_of_a_token_are_one() {
        let token = Cancel::new();
        let other = token.clone();
        assert!(token.check().is_continue());
        other.cancel();
        assert!(token.is_cancelled() && token.check().is_break());
        assert!(Cancelled::is(&std::io::Error::other(Cancelled)));
        assert!(!Cancelled::is(&std::io::Error::other("full")));
    }
}
