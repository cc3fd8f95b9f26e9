//! Signals that end a process without a handler, treated as a request to stop.
//!
//! A save that ends in the middle leaves its guest suspended, so a program that drives the engine
//! listens for all of them: it blocks [`EndingSignals::set`] before it starts a thread, reads them
//! from a signalfd, drops those for which [`EndingSignals::ask`] is false, and sets a
//! [`Cancel`](crate::progress::Cancel) for the rest.
//!
//! | signals | |
//! |---|---|
//! | SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGUSR1, SIGALRM, SIGRTMIN to SIGRTMAX, … | a request |
//! | SIGSEGV, SIGBUS, SIGABRT and others of a crash | a request if another process sends them |
//! | SIGXFSZ | blocked, and no request: the write fails with EFBIG |
//! | SIGCHLD, SIGURG, SIGWINCH, SIGPIPE, and those that stop and continue a process | left alone |
//! | SIGKILL, SIGSTOP | cannot be caught |
//! | those that were ignored when the process began | stay ignored |
//!
//! The kernel ends a process that crashes, even if it blocks the signal.

use std::fmt;
use std::fs;
use std::io;
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals whose default action does not end a process, and SIGPIPE, which Rust's runtime
/// ignores.
const LEFT_ALONE: [Signal; 8] = [
    Signal::SIGCHLD,
    Signal::SIGCONT,
    Signal::SIGPIPE,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGURG,
    Signal::SIGWINCH,
];

/// A signal, by its number: real-time signals have no name in `nix`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalNumber(u32);

impl SignalNumber {
    /// The signal with this number, from 1 to 64, as in `ssi_signo` of a signalfd.
    pub fn new(number: u32) -> Self {
        Self(number)
    }

    /// Its number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Its name; `None` for a real-time signal.
    pub fn named(self) -> Option<Signal> {
        Signal::try_from(i32::try_from(self.0).ok()?).ok()
    }
}

impl From<Signal> for SignalNumber {
    fn from(signal: Signal) -> Self {
        Self((signal as i32).unsigned_abs())
    }
}

impl fmt::Display for SignalNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.named() {
            Some(signal) => signal.fmt(f),
            None => write!(f, "signal {}", self.0),
        }
    }
}

/// The signals that end a process, except those that were ignored when it began: by `nohup`, or by
/// a shell that runs a job in the background.
#[derive(Clone, Copy, Debug)]
pub struct EndingSignals {
    /// Bit n - 1 is signal n.
    ignored: u64,
}

impl EndingSignals {
    /// Those of this process, which must not have changed its ignored signals since it began.
    ///
    /// Where no `/proc` is mounted (an empty root), the ignored signals cannot be determined, and
    /// every signal counts as not ignored.
    ///
    /// # Errors
    ///
    /// `/proc/self/status` exists but cannot be read, or does not list the ignored signals.
    pub fn of_process() -> io::Result<Self> {
        let status = match fs::read_to_string("/proc/self/status") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::debug!("no /proc: signals that were ignored cannot be told apart");
                return Ok(Self { ignored: 0 });
            }
            status => status?,
        };
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let missing = || io::Error::other("/proc/self/status has no SigIgn");
        Ok(Self {
            ignored: ignored.ok_or_else(missing)?,
        })
    }

    /// The signals to block and to read. [`EndingSignals::ask`] decides which of them are requests:
    /// an ignored real-time signal is in this set, because a set cannot leave it out.
    pub fn set(self) -> SigSet {
        let mut set = SigSet::all();
        for signal in Signal::iterator() {
            if LEFT_ALONE.contains(&signal) || self.is_ignored(signal.into()) {
                set.remove(signal);
            }
        }
        // Added even if it is ignored: either way a write reports that the file may not grow.
        set.add(Signal::SIGXFSZ);
        set
    }

    /// Whether `signal`, which has arrived, asks the process to stop.
    pub fn ask(self, signal: SignalNumber) -> bool {
        let named = signal.named();
        let end = named.is_none_or(|s| s != Signal::SIGXFSZ && !LEFT_ALONE.contains(&s));
        end && !self.is_ignored(signal)
    }

    /// Whether `signal` was ignored when the process began.
    pub fn is_ignored(self, signal: SignalNumber) -> bool {
        let bit = signal.0.checked_sub(1).and_then(|n| 1_u64.checked_shl(n));
        bit.is_some_and(|bit| self.ignored & bit != 0)
    }
}

/// Blocks `signals`, and calls `act` for each one that arrives, on a thread of its own. Must be
/// called before other threads exist, which would otherwise get the signals.
///
/// # Errors
///
/// The kernel has no descriptor or no thread left.
pub fn on_signal(signals: &SigSet, act: impl Fn(SignalNumber) + Send + 'static) -> io::Result<()> {
    signals.thread_block()?;
    let arrived = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)?;
    let waiting = move || {
        loop {
            match arrived.read_signal() {
                Ok(Some(signal)) => act(SignalNumber::new(signal.ssi_signo)),
                Ok(None) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "signals are not heard any more");
                    return;
                }
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(waiting)?;
    Ok(())
}

/// What a child process of a shell should ignore so that a signal to the whole process group does
/// not end it before the process that started it: numbers for `trap ''`. Without the signals of a
/// crash, of a timer or of a limit, which a process causes itself.
pub fn sent_to_groups() -> impl Iterator<Item = u32> {
    const NAMED: [Signal; 8] = [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGTERM,
        Signal::SIGIO,
        Signal::SIGPWR,
    ];
    // libc's own signals, from 32 on, are below 35.
    let named = NAMED.map(|signal| SignalNumber::from(signal).get());
    named.into_iter().chain(35..=64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_a_process_is_a_request() {
        let none = EndingSignals { ignored: 0 };
        let asks: Vec<u32> = (1..=64)
            .filter(|n| none.ask(SignalNumber::new(*n)))
            .collect();
        // signal(7), without SIGKILL and SIGSTOP, which never arrive.
        let mut expected = vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 19];
        expected.extend([24, 26, 27, 29, 30, 31]);
        expected.extend(32..=64);
        assert_eq!(asks, expected);
        for signal in [Signal::SIGSTKFLT, Signal::SIGUSR2, Signal::SIGXFSZ] {
            assert!(none.set().contains(signal), "{signal}");
        }
        for signal in LEFT_ALONE {
            assert!(!none.set().contains(signal), "{signal}");
        }
    }

    #[test]
    fn an_ignored_signal_is_no_request() {
        let ignored = EndingSignals {
            ignored: 1 << 63 | 1,
        };
        assert!(!ignored.ask(Signal::SIGHUP.into()) && !ignored.ask(SignalNumber::new(64)));
        assert!(!ignored.set().contains(Signal::SIGHUP));
        assert!(ignored.ask(Signal::SIGINT.into()) && ignored.ask(SignalNumber::new(63)));
    }

    #[test]
    fn signals_are_called_by_their_names() {
        assert_eq!(SignalNumber::from(Signal::SIGTERM).to_string(), "SIGTERM");
        assert_eq!(SignalNumber::new(40).to_string(), "signal 40");
    }
}
