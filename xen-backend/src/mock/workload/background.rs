//! A workload on a separate thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Errno;

use super::Workload;
use crate::error::BackendError;

/// The pause between bursts of work, in which other threads can get the domain's state.
const PAUSE: Duration = Duration::from_millis(1);

/// The most time that a burst makes up for, so that a delayed thread does not dirty a second's
/// worth of memory at once.
const CATCH_UP: Duration = Duration::from_millis(20);

/// A running workload. Dropping it stops it, and waits for the current operation.
///
/// It rests while the domain is paused or suspended, and continues after that; it ends when the
/// domain is destroyed.
#[derive(Debug)]
pub struct BackgroundWorkload {
    /// Dropped to stop the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<Result<Workload, BackendError>>>,
    operations: Arc<AtomicU64>,
}

impl BackgroundWorkload {
    pub(super) fn start(workload: Workload) -> Self {
        let (stop, stopped) = channel();
        let operations = Arc::new(AtomicU64::new(workload.counts.operations()));
        let count = Arc::clone(&operations);
        let thread = thread::spawn(move || {
            let mut workload = workload;
            let mut last = Instant::now();
            // Operations due, in billionths; the remainder of a burst is carried over to the next.
            let mut due: u128 = 0;
            loop {
                match stopped.recv_timeout(PAUSE) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(workload),
                }
                let now = Instant::now();
                let passed = now.duration_since(last).min(CATCH_UP);
                last = now;
                due += passed.as_nanos() * u128::from(workload.spec.rate);
                let operations = u64::try_from(due / 1_000_000_000).unwrap_or(u64::MAX);
                due %= 1_000_000_000;
                match workload.step(operations) {
                    Ok(_) => {}
                    // The work ends with the guest.
                    Err(error) if error.errno == Errno::ESRCH => return Ok(workload),
                    Err(error) => return Err(error),
                }
                count.store(workload.counts.operations(), Ordering::Relaxed);
            }
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
            operations,
        }
    }

    /// Operations done so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    fn join(&mut self) -> Option<Result<Workload, BackendError>> {
        drop(self.stop.take());
        let thread = self.thread.take()?;
        Some(
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        )
    }

    /// Stop it.
    ///
    /// # Errors
    ///
    /// The error that ended it earlier: see [`Workload::step`].
    ///
    /// # Panics
    ///
    /// If its thread panicked.
    pub fn stop(mut self) -> Result<Workload, BackendError> {
        self.join().expect("joined here or in drop, once")
    }
}

impl Drop for BackgroundWorkload {
    fn drop(&mut self) {
        drop(self.stop.take());
        match self.thread.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(_))) => {}
            Some(Ok(Err(error))) => tracing::error!(%error, "the workload failed"),
            Some(Err(_)) => tracing::error!("the workload panicked"),
        }
    }
}
