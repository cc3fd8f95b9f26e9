//! Time limits for a peer that takes or sends too little during a save or restore.
//!
//! | limit | rule |
//! |---|---|
//! | [`Pace`], always | the peer takes at least one byte in each `patience` |
//! | [`Pace`], guest suspended | N bytes take at most `patience` + N / [`Pace::BYTES_PER_SECOND`] |
//! | [`ReadLimit`] | the peer sends at least one byte in each limit |
//!
//! The second rule catches what the first one allows: a peer that takes a few bytes now and then
//! while the guest is suspended.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

/// A limit that a peer has reached, as a message for the user. An [`io::Error`] of the kind
/// `TimedOut` holds it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overdue {
    /// The peer has taken nothing for this long, or not all of a message.
    #[error("the other end has taken nothing for {} s", .0.as_secs_f64())]
    NothingTaken(Duration),
    /// The peer takes bytes, but too few of them while a guest is suspended.
    #[error(
        "the other end takes what it is sent too slowly: {bytes} bytes in {} s, and the domain is \
         suspended meanwhile (at least 1 MiB/s after {} s)",
        waited.as_secs(), patience.as_secs_f64()
    )]
    TooLittleTaken {
        /// The bytes it has taken since the guest was suspended.
        bytes: u64,
        /// The time since then.
        waited: Duration,
        /// The time after which [`Pace::BYTES_PER_SECOND`] applies.
        patience: Duration,
    },
    /// The peer has sent nothing for this long.
    #[error("the other end has sent nothing for {} s", .0.as_secs_f64())]
    NothingSent(Duration),
    /// The peer has not sent a whole answer in this time.
    #[error("the other end has not answered in {} s", .0.as_secs_f64())]
    NoAnswer(Duration),
}

impl From<Overdue> for io::Error {
    fn from(overdue: Overdue) -> Self {
        Self::new(io::ErrorKind::TimedOut, overdue)
    }
}

/// How fast a peer must take what it is sent.
#[derive(Debug)]
pub struct Pace {
    patience: Duration,
    suspended: Mutex<Option<Suspension>>,
}

/// A guest that is suspended until a peer has taken the rest.
#[derive(Clone, Copy, Debug)]
struct Suspension {
    since: Instant,
    taken: u64,
}

impl Pace {
    /// The average rate at which a peer must take bytes while a guest is suspended: 1 MiB/s.
    pub const BYTES_PER_SECOND: u64 = 1 << 20;

    /// For a guest that runs.
    pub const fn new(patience: Duration) -> Self {
        Self {
            patience,
            suspended: Mutex::new(None),
        }
    }

    /// How long a peer may take nothing.
    pub const fn patience(&self) -> Duration {
        self.patience
    }

    /// The guest has been suspended: the second rule holds from now on.
    pub fn suspended(&self) {
        let begun = Suspension {
            since: Instant::now(),
            taken: 0,
        };
        *self.lock() = Some(begun);
    }

    /// The guest runs again.
    pub fn resumed(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Suspension>> {
        self.suspended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer has taken this many bytes.
    pub(crate) fn took(&self, bytes: u64) {
        if let Some(suspension) = self.lock().as_mut() {
            suspension.taken = suspension.taken.saturating_add(bytes);
        }
    }

    /// The time by which the peer must have taken more, under the second rule.
    pub(crate) fn due(&self) -> Option<Instant> {
        let suspension = (*self.lock())?;
        let seconds = suspension.taken / Self::BYTES_PER_SECOND;
        let rest = suspension.taken % Self::BYTES_PER_SECOND * 1000 / Self::BYTES_PER_SECOND;
        let earned = Duration::from_secs(seconds) + Duration::from_millis(rest);
        suspension.since.checked_add(self.patience + earned)
    }

    /// Which of the rules the peer has broken.
    pub(crate) fn broken(&self) -> Overdue {
        let overdue = self.due().is_some_and(|due| Instant::now() >= due);
        match (overdue, *self.lock()) {
            (true, Some(Suspension { since, taken })) => Overdue::TooLittleTaken {
                bytes: taken,
                waited: since.elapsed(),
                patience: self.patience,
            },
            _ => Overdue::NothingTaken(self.patience),
        }
    }
}

/// How long a peer may send nothing. The limit can be lifted while a read waits.
#[derive(Debug)]
pub struct ReadLimit(AtomicU64);

impl ReadLimit {
    /// No limit.
    const LIFTED: u64 = u64::MAX;

    /// A read that has waited this long fails with `TimedOut`.
    pub fn new(limit: Duration) -> Self {
        let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(Self::LIFTED);
        Self(AtomicU64::new(milliseconds))
    }

    /// From now on a read waits without a limit.
    pub fn lift(&self) {
        self.0.store(Self::LIFTED, Ordering::Relaxed);
    }

    /// How long a read may wait now; `None` once it has been lifted.
    pub(crate) fn limit(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            Self::LIFTED => None,
            milliseconds => Some(Duration::from_millis(milliseconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_earns_time_only_while_the_guest_is_suspended() {
        let pace = Pace::new(Duration::from_secs(60));
        pace.took(1 << 30);
        assert_eq!(pace.due(), None);
        pace.suspended();
        let begun = pace.due().unwrap();
        pace.took(Pace::BYTES_PER_SECOND * 3 / 2);
        let earned = pace.due().unwrap().duration_since(begun);
        assert_eq!(earned, Duration::from_millis(1500));
        pace.resumed();
        assert_eq!(pace.due(), None);
        // A second suspension starts from zero.
        pace.suspended();
        assert!(pace.due().unwrap() >= begun);
        assert!(pace.due().unwrap() < begun + earned + Duration::from_secs(60));
    }

    #[test]
    fn the_rule_that_was_broken_is_said() {
        let patient = Pace::new(Duration::from_secs(60));
        patient.suspended();
        let said = patient.broken().to_string();
        assert_eq!(said, "the other end has taken nothing for 60 s");
        let strict = Pace::new(Duration::ZERO);
        strict.suspended();
        strict.took(7);
        while Instant::now() < strict.due().unwrap() {}
        let said = strict.broken().to_string();
        assert!(said.contains("too slowly: 7 bytes in 0 s"), "{said}");
    }
}
