//! The signal thread: waits for the signals that ask this process to stop, and acts on them.
//!
//! | signal | meaning |
//! |---|---|
//! | the first of those that end a process ([`EndingSignals`]) | stop, in good order |
//! | any further one | the same request |
//! | SIGINT or SIGTERM, [`INSIST_AFTER`] after the announcement | stop at once, without cleanup |
//!
//! A further SIGHUP never stops at once, because a closing terminal sends it twice. A signal that
//! was ignored when this process began (by `nohup`, or by a shell that runs a job in the
//! background) stays ignored.

use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{major, minor};
use xsr_save_restore::signals::{EndingSignals, SignalNumber};

use super::{Interrupt, LOOK};
use crate::exit::Code;
use crate::left;

/// How long after the announcement a further signal ends the process at once.
pub(crate) const INSIST_AFTER: Duration = Duration::from_secs(1);

/// How long a command may go on after a request once it has undone its changes to a guest. It may
/// be waiting for a descriptor that is never written to.
const LAST_STEPS: Duration = Duration::from_millis(300);

/// How long to wait until stderr can take a message, in milliseconds.
const STDERR_WAIT: u16 = 500;

/// The end of the announcement.
const HARD_WAY: &str = "press Ctrl-C again to end at once without cleaning up";

/// The meaning of one more signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Stop, in good order.
    First,
    /// The same request again.
    Same,
    /// Stop at once.
    Insists,
}

/// The requests so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Requests {
    asked: bool,
    /// When the user was told how to end at once.
    announced: Option<Instant>,
}

impl Requests {
    /// Take note of `signal`.
    pub(crate) fn hear(&mut self, signal: SignalNumber, now: Instant) -> Ask {
        let insists = matches!(signal.named(), Some(Signal::SIGINT | Signal::SIGTERM))
            && self
                .announced
                .is_some_and(|then| now.saturating_duration_since(then) >= INSIST_AFTER);
        match (std::mem::replace(&mut self.asked, true), insists) {
            (false, _) => Ask::First,
            (true, false) => Ask::Same,
            (true, true) => Ask::Insists,
        }
    }

    /// Tell the user that the work is being cancelled, and how to end at once. If this cannot be
    /// written, ending at once stays unavailable.
    pub(crate) fn announce(&mut self, what: &str) {
        if say(&format!("{what}; {HARD_WAY}")) {
            self.announced = Some(Instant::now());
        }
    }
}

/// From now on, signals act through `interrupt`. Call this before other threads start, because they
/// would receive the signals instead.
///
/// From now on a write beyond the file size limit (`ulimit -f`) is an error instead of a signal.
pub(super) fn listen(interrupt: Interrupt) -> Result<()> {
    let ending = EndingSignals::of_process().context("reading signals")?;
    ending.set().thread_block().context("blocking signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let arrived = SignalFd::with_flags(&ending.set(), flags).context("waiting for signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Err(errno) = answer(&interrupt, &arrived, ending) {
                tracing::error!(%errno, "signals are not heard any more");
            }
        })
        .context("starting the signal thread")?;
    Ok(())
}

fn answer(interrupt: &Interrupt, arrived: &SignalFd, ending: EndingSignals) -> nix::Result<()> {
    let hangup = SignalNumber::from(Signal::SIGHUP);
    let mut requests = Requests::default();
    let mut first = SignalNumber::from(Signal::SIGTERM);
    // Since when there has been no work that must be cancelled in good order.
    let mut idle: Option<Instant> = None;
    loop {
        let timeout = match requests.asked {
            true => PollTimeout::from(LOOK),
            false => PollTimeout::NONE,
        };
        match poll(
            &mut [PollFd::new(arrived.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        while let Some(signal) = next(arrived)? {
            let unheard = signal == hangup && interrupt.ignores_hangup();
            if left::is_over() || unheard || !ending.ask(signal) {
                continue;
            }
            match requests.hear(signal, Instant::now()) {
                Ask::First => {
                    first = signal;
                    left::end_at_once(|said| end_at_once(signal, &said));
                    interrupt.asked();
                    requests.announce(&interrupt.announcement());
                }
                Ask::Same => {}
                Ask::Insists => end_where_it_stands(),
            }
        }
        if !requests.asked || left::is_over() || left::is_work() {
            idle = None;
        } else if idle.get_or_insert_with(Instant::now).elapsed() >= LAST_STEPS {
            left::end_at_once(|said| end_at_once(first, &said));
        }
    }
}

/// The next signal, if one has arrived.
pub(crate) fn next(arrived: &SignalFd) -> nix::Result<Option<SignalNumber>> {
    loop {
        match arrived.read_signal() {
            Ok(None) => return Ok(None),
            Ok(Some(info)) => return Ok(Some(SignalNumber::new(info.ssi_signo))),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Ends the process without cleanup, as the signal would have done. A command that writes reports
/// what it has not written.
fn end_at_once(signal: SignalNumber, said: &[String]) {
    if !left::is_writer() {
        // The command had no effects, so the parent process may see the signal itself.
        if let Some(signal) = signal.named()
            && SigSet::from(signal).thread_unblock().is_ok()
        {
            // Rust's runtime handles SIGSEGV and SIGBUS; the first one removes its handler.
            for _ in 0..2 {
                if let Err(errno) = raise(signal) {
                    tracing::debug!(%errno, "raising {signal}");
                }
            }
        }
        // As in a shell.
        end(i32::try_from(128 + signal.get()).unwrap_or(i32::MAX));
    }
    let said = match said {
        [] => String::new(),
        said => format!("; {}", said.join("; ")),
    };
    say(&format!("interrupted by {signal}{said}"));
    end(Code::Failed.number().into());
}

fn end(code: i32) -> ! {
    process::exit(code)
}

/// Ends the process at once, without cleanup.
pub(crate) fn end_where_it_stands() {
    let (said, undecided) = left::describe();
    let said = match said.as_slice() {
        [] => "nothing is left behind".to_owned(),
        said => said.join("\n     "),
    };
    say(&format!("ended at once: {said}"));
    let code = match undecided {
        true => Code::Undecided,
        false => Code::EndedAtOnce,
    };
    end(code.number().into());
}

/// Write a line to stderr, regardless of other writers. Returns whether it was written: a closed or
/// stalled stderr does not block.
pub(crate) fn say(text: &str) -> bool {
    let mut stderr = io::stderr();
    let start = match stderr.is_terminal() {
        // Overwrites a progress bar.
        true => "\r\x1b[K",
        false => "",
    };
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let room = poll(&mut fds, PollTimeout::from(STDERR_WAIT));
    let room = matches!(room, Ok(1..))
        && fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLOUT));
    if !room || is_closed(&stderr) {
        return false;
    }
    let line = format!("{start}xsr: {text}\n");
    stderr.write_all(line.as_bytes()).is_ok()
}

/// Whether stderr was closed when this process began. The standard library has then opened
/// `/dev/null` in its place, for both reading and writing, which a redirection does not.
fn is_closed(stderr: &io::Stderr) -> bool {
    let flags = fcntl(stderr, FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    let both_ways = flags.is_ok_and(|flags| flags & OFlag::O_ACCMODE == OFlag::O_RDWR);
    both_ways
        && fs::metadata("/proc/self/fd/2").is_ok_and(|about| {
            about.file_type().is_char_device()
                && (major(about.rdev()), minor(about.rdev())) == (1, 3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_late_sigint_or_sigterm_insists() {
        let begun = Instant::now();
        let after = |milliseconds| begun + Duration::from_millis(milliseconds);
        let stop = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].map(SignalNumber::from);
        let [_, sigint, sigterm] = stop;
        for first in stop {
            let mut requests = Requests::default();
            assert_eq!(requests.hear(first, begun), Ask::First);
            // Without an announcement, no signal ends at once.
            assert_eq!(requests.hear(sigint, after(5000)), Ask::Same);
            requests.announced = Some(after(5000));
            for signal in stop {
                assert_eq!(requests.hear(signal, after(5000)), Ask::Same);
                assert_eq!(requests.hear(signal, after(5999)), Ask::Same);
            }
            for signal in (1..=64).map(SignalNumber::new) {
                let insists = signal == sigint || signal == sigterm;
                let expected = if insists { Ask::Insists } else { Ask::Same };
                assert_eq!(requests.hear(signal, after(6000)), expected, "{signal}");
            }
        }
    }

    #[test]
    fn a_late_first_signal_does_not_insist() {
        let mut requests = Requests {
            asked: false,
            announced: None,
        };
        let late = Instant::now() + Duration::from_secs(3600);
        assert_eq!(requests.hear(Signal::SIGTERM.into(), late), Ask::First);
    }
}
