//! The signals that ask this process to stop: a thread that waits for them, and what it does.
//!
//! | signal | means |
//! |---|---|
//! | the first of those that end a process ([`EndingSignals`]) | stop, in good order |
//! | any further one | the same request |
//! | SIGINT or SIGTERM, [`INSIST_AFTER`] after the user was told so | stop at once, whatever that leaves |
//!
//! SIGHUP never insists: a terminal that is closed sends it twice. A signal that was ignored when
//! this process began (by `nohup`, or by a shell that runs a job in the background) stays
//! ignored.

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
use xsr_xen_backend::mock::finish_answers;

use super::{Interrupt, LOOK};
use crate::exit::Code;
use crate::left;

/// How long after it was told the user is taken at their word.
pub(crate) const INSIST_AFTER: Duration = Duration::from_secs(1);

/// How long a command may go on after a request once it has undone what it did to a guest: it
/// may be waiting for a descriptor that nobody writes to.
const LAST_STEPS: Duration = Duration::from_millis(300);

/// How long stderr may take to have room for a message, in milliseconds.
const STDERR_WAIT: u16 = 500;

/// How the announcement ends.
const HARD_WAY: &str = "press Ctrl-C again to end at once, whatever that leaves";

/// What one more signal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Stop, in good order.
    First,
    /// The request that was made before.
    Same,
    /// Stop at once.
    Insists,
}

/// The requests so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Requests {
    asked: bool,
    /// When the user was told of the hard way out.
    announced: Option<Instant>,
}

impl Requests {
    /// `signal` has come.
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

    /// Tell the user that the work is being broken off, and of the hard way out. If that cannot
    /// be written there is none.
    pub(crate) fn announce(&mut self, what: &str) {
        if say(&format!("{what}; {HARD_WAY}")) {
            self.announced = Some(Instant::now());
        }
    }
}

/// From now on the signals do to this process what `interrupt` makes of them. To be called before
/// there are other threads, which would get them instead.
///
/// A file that may not grow any further (`ulimit -f`) is an error of the write from now on, and
/// no signal.
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
    // Since when there is no work any more that would have to be broken off in good order.
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

/// The next signal that has come, if any has.
fn next(arrived: &SignalFd) -> nix::Result<Option<SignalNumber>> {
    loop {
        match arrived.read_signal() {
            Ok(None) => return Ok(None),
            Ok(Some(info)) => return Ok(Some(SignalNumber::new(info.ssi_signo))),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Nothing has to be put right: end, as if nobody had waited for the signal; a command that
/// writes says what it has not written.
fn end_at_once(signal: SignalNumber, said: &[String]) {
    if !left::is_writer() {
        // What this process was started for is gone with it, and its parent sees the signal.
        if let Some(signal) = signal.named()
            && SigSet::from(signal).thread_unblock().is_ok()
        {
            // Rust's runtime has a handler for SIGSEGV and SIGBUS, which the first one removes.
            for _ in 0..2 {
                if let Err(errno) = raise(signal) {
                    tracing::debug!(%errno, "raising {signal}");
                }
            }
        }
        // As a shell has it.
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
    finish_answers();
    process::exit(code)
}

/// The hard way out.
fn end_where_it_stands() {
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

/// Write a line to stderr, whoever else writes there at this moment. Whether it was written: no
/// stderr that is closed or stalls holds anybody up.
pub(crate) fn say(text: &str) -> bool {
    let mut stderr = io::stderr();
    let start = match stderr.is_terminal() {
        // Over a progress bar.
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

/// Whether stderr was closed when this process began. The standard library has opened
/// `/dev/null` in its place then, for both reading and writing, which a redirection does not.
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
            // Nothing has been announced: there is no hard way out.
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
