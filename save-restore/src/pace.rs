//! How long a save or restore bears with a peer that takes or sends too little.
//!
//! | limit | rule |
//! |---|---|
//! | [`Pace`], always | the peer takes at least one byte in each `patience` |
//! | [`Pace`], while a guest is suspended | the peer has taken N bytes `patience` + N / [`Pace::BYTES_PER_SECOND`] after the guest was suspended |
//! | [`ReadLimit`] | the peer sends at least one byte in each limit |
//!
//! The second rule ends what the first one lets pass: a peer that takes a few bytes now and then
//! while the guest stands still.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How fast a peer has to take what it is sent.
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
    /// What a peer takes on average, at least, while a guest is suspended: 1 MiB/s.
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

    /// The guest runs on.
    pub fn resumed(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Suspension>> {
        self.suspended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer has taken so many bytes.
    pub(crate) fn took(&self, bytes: u64) {
        if let Some(suspension) = self.lock().as_mut() {
            suspension.taken = suspension.taken.saturating_add(bytes);
        }
    }

    /// When the peer has to have taken more, under the second rule.
    pub(crate) fn due(&self) -> Option<Instant> {
        let suspension = (*self.lock())?;
        let seconds = suspension.taken / Self::BYTES_PER_SECOND;
        let rest = suspension.taken % Self::BYTES_PER_SECOND * 1000 / Self::BYTES_PER_SECOND;
        let earned = Duration::from_secs(seconds) + Duration::from_millis(rest);
        suspension.since.checked_add(self.patience + earned)
    }

    /// The peer has broken one of the rules.
    pub(crate) fn broken(&self) -> io::Error {
        let overdue = self.due().is_some_and(|due| Instant::now() >= due);
        let why = match (overdue, *self.lock()) {
            (true, Some(Suspension { since, taken })) => format!(
                "the other end takes what it is sent too slowly: {taken} bytes in {} s, and the \
                 domain is suspended meanwhile (at least 1 MiB/s after {} s)",
                since.elapsed().as_secs(),
                self.patience.as_secs_f64()
            ),
            _ => format!(
                "the other end has taken nothing for {} s",
                self.patience.as_secs_f64()
            ),
        };
        io::Error::new(io::ErrorKind::TimedOut, why)
    }
}

/// How long a peer may send nothing. It can be lifted while a read waits.
#[derive(Debug)]
pub struct ReadLimit(AtomicU64);

impl ReadLimit {
    /// No limit.
    const LIFTED: u64 = u64::MAX;

    /// A read fails with `TimedOut` that has waited for so long.
    pub fn new(limit: Duration) -> Self {
        let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(Self::LIFTED);
        Self(AtomicU64::new(milliseconds))
    }

    /// From now on a read waits for as long as it takes.
    pub fn lift(&self) {
        self.0.store(Self::LIFTED, Ordering::Relaxed);
    }

    fn limit(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            Self::LIFTED => None,
            milliseconds => Some(Duration::from_millis(milliseconds)),
        }
    }

    /// When a read that began then is given up.
    pub(crate) fn due(&self, began: Instant) -> Option<Instant> {
        began.checked_add(self.limit()?)
    }

    /// The peer has been silent for too long.
    pub(crate) fn broken(&self) -> io::Error {
        let seconds = self.limit().unwrap_or_default().as_secs_f64();
        let why = format!("the other end has sent nothing for {seconds} s");
        io::Error::new(io::ErrorKind::TimedOut, why)
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
        // Another suspension begins anew.
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
