//! The guardian: the small process that xenopsd starts, which starts the engine and outlives it.
//!
//! On a restore xenopsd waits without limit for a `result:` or `error:` line. An engine that is
//! killed, for example by the kernel when memory runs out, cannot write one, so the guardian does.
//! It also forwards the signals that ask the program to end, and exits with the engine's exit code.
//! If a save's engine can no longer clean up, the guardian does: it resumes the guest and switches
//! its dirty log off.
//!
//! | the engine ends with | it has told xenopsd itself |
//! |---|---|
//! | exit code 0, 1 or 2 | yes |
//! | any other exit code (101: a panic), a signal | no |
//! | unknown (SIGCHLD is ignored) | if its last note says so |
//!
//! The engine holds one end of a pipe as long as it lives, and writes to it what it is about to do.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use xsr_save_restore::inherited::inherited;
use xsr_save_restore::signals::{EndingSignals, SignalNumber};

use crate::args::{Args, Mode};
use crate::line::Line;
use crate::{FAILED, Open, REFUSED, log, toolstack};

/// The first word of the engine's command line. The other two are the guardian's pid and the
/// descriptor of its pipe.
const ENGINE: &str = "-engine";
/// This program, even if its file has been replaced since it started.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// How long xenopsd may take to read the lines before the last one.
const TELLING: Duration = Duration::from_secs(60);

/// A note from the engine to its guardian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// A save that xenopsd did not ask to be live is: dirty logs may be on from now on.
    Live,
    /// xenopsd is about to be asked to suspend the guest: from now on the guest may be suspended.
    Suspending,
    /// xenopsd is about to be told the result: the guest may now be its business, or run elsewhere.
    Result,
    /// xenopsd needs no further line.
    Told,
}

impl Note {
    const ALL: [Self; 4] = [Self::Live, Self::Suspending, Self::Result, Self::Told];

    fn byte(self) -> u8 {
        match self {
            Self::Live => b'l',
            Self::Suspending => b's',
            Self::Result => b'r',
            Self::Told => b't',
        }
    }
}

/// The engine's link to its guardian.
#[derive(Debug)]
pub(crate) struct Link {
    pid: u32,
    notes: File,
}

impl Link {
    pub(crate) fn note(&self, note: Note) {
        if let Err(error) = (&self.notes).write_all(&[note.byte()]) {
            tracing::debug!(%error, "the guardian has gone");
        }
    }

    /// Makes the engine end in good order if the guardian is killed.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the guardian has already gone.
    pub(crate) fn follow(&self) -> io::Result<()> {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        match std::os::unix::process::parent_id() == self.pid {
            true => Ok(()),
            false => Err(io::Error::other("the process that started it has gone")),
        }
    }
}

/// The link, if `words` are an engine's. Removes the engine's own words from `words`.
pub(crate) fn take_engine(words: &mut Vec<String>) -> Option<Link> {
    match &words[..] {
        [first, pid, notes, ..] if first == ENGINE => {
            let link = Link {
                pid: pid.parse().ok()?,
                notes: inherited(notes.parse().ok()?).ok()?.into(),
            };
            words.drain(..3);
            Some(link)
        }
        _ => None,
    }
}

/// What is known of an engine that has ended.
#[derive(Debug)]
struct Ended {
    /// `None` if the kernel does not report it.
    status: Option<ExitStatus>,
    notes: Vec<Note>,
}

/// Starts the engine with `words`, whose meaning is `args`, and waits until it has ended; returns
/// the exit code. `None` if it could not be started: the caller then does the work itself.
pub(crate) fn watch(
    args: &Args,
    words: &[String],
    control_out: &OwnedFd,
    open: Open,
) -> Option<ExitCode> {
    let started = start(words);
    let (mut engine, notes, signals, ending) = match started {
        Ok(started) => started,
        Err(error) => {
            log::say(format_args!(
                "the engine is not a process of its own: {error}"
            ));
            return None;
        }
    };
    let (how, noted) = match wait(&mut engine, notes, &signals, ending) {
        Ok(ended) => match ended.status {
            Some(status) => match status.code() {
                Some(0) => return Some(ExitCode::SUCCESS),
                Some(code) if code == i32::from(REFUSED) => return Some(REFUSED.into()),
                Some(code) if code == i32::from(FAILED) => return Some(FAILED.into()),
                _ => (how(status), ended.notes),
            },
            None if ended.notes.contains(&Note::Told) => {
                return Some(match ended.notes.contains(&Note::Result) {
                    true => ExitCode::SUCCESS,
                    false => FAILED.into(),
                });
            }
            None => ("it is unknown how".to_owned(), ended.notes),
        },
        // Without the engine's notes, it is unknown where the guest is.
        Err(error) => (
            format!("it cannot be waited for: {error}"),
            vec![Note::Result],
        ),
    };
    log::say(format_args!("the engine ended unexpectedly: {how}"));
    let what_of_it = undo(args, &noted, open);
    let text = format!("the engine ended unexpectedly: {how}{what_of_it}");
    let told = tell(control_out, &Line::Error(&text).encode(), TELLING);
    if let Err(error) = told {
        log::say(format_args!("xenopsd does not hear: {error}"));
    }
    Some(FAILED.into())
}

/// Writes a line as soon as the pipe has room. xenopsd reads lines at any time, unless it hangs:
/// the guardian must not hang with it.
fn tell(pipe: &OwnedFd, line: &[u8], limit: Duration) -> io::Result<()> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            // A pipe with room has room for a whole line, and no other process writes to it.
            Ok(_) => return File::from(pipe.try_clone()?).write_all(line),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Cleans up after an engine that was killed; returns what to add to the message.
fn undo(args: &Args, noted: &[Note], open: Open) -> &'static str {
    let Mode::Save { live } = args.mode else {
        return "";
    };
    if noted.contains(&Note::Result) {
        // xenopsd may have the result, and the guest may run elsewhere by now.
        return "";
    }
    let live = live || noted.contains(&Note::Live);
    let suspended = noted.contains(&Note::Suspending);
    match toolstack::undo_save(args, live, suspended, open) {
        Ok(()) => "; the guest runs on",
        Err(error) => {
            log::say(format_args!("cleaning up after the engine: {error:#}"));
            ""
        }
    }
}

fn start(words: &[String]) -> io::Result<(Child, PipeReader, SignalFd, EndingSignals)> {
    let ending = EndingSignals::of_process()?;
    let mut set = ending.set();
    set.add(Signal::SIGTERM);
    // The engine itself starts with no signal blocked.
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    let (notes, its_notes) = io::pipe()?;
    fcntl(&its_notes, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let engine = Command::new(THIS_PROGRAM)
        .arg0("xsr-emu-manager")
        .arg(ENGINE)
        .arg(std::process::id().to_string())
        .arg(its_notes.as_raw_fd().to_string())
        .args(words.iter().map(OsString::from))
        .spawn()?;
    Ok((engine, notes, signals, ending))
}

/// Waits for the engine, and forwards signals to it.
fn wait(
    engine: &mut Child,
    mut pipe: PipeReader,
    signals: &SignalFd,
    ending: EndingSignals,
) -> io::Result<Ended> {
    let mut notes = Vec::new();
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(pipe.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [signal, noted] = fds.map(|fd| fd.any().unwrap_or(false));
        if noted {
            let mut room = [0; 16];
            match pipe.read(&mut room) {
                // The engine's end of the pipe is closed: the engine has ended, or is about to.
                Ok(0) => break,
                Ok(n) => notes.extend(
                    Note::ALL
                        .into_iter()
                        .filter(|note| room[..n].contains(&note.byte())),
                ),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !signal {
            continue;
        }
        let number = match signals.read_signal() {
            Ok(Some(signal)) => SignalNumber::new(signal.ssi_signo),
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if number == Signal::SIGTERM.into() || ending.ask(number) {
            // The engine holds its end of the pipe, so this pid is still the engine's.
            let pid = i32::try_from(engine.id()).map_err(io::Error::other)?;
            kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        }
    }
    let status = match engine.wait() {
        Ok(status) => Some(status),
        // SIGCHLD is ignored, and the kernel has reaped it.
        Err(error) if error.raw_os_error() == Some(Errno::ECHILD as i32) => None,
        Err(error) => return Err(error),
    };
    Ok(Ended { status, notes })
}

/// How the engine ended, for the `error:` line.
fn how(status: ExitStatus) -> String {
    let signal = status.signal().map(|signal| {
        let name = Signal::try_from(signal);
        name.map_or_else(|_| signal.to_string(), |name| name.to_string())
    });
    match (signal, status.code()) {
        (Some(signal), _) if signal == "SIGKILL" => {
            "killed by SIGKILL; did dom0 run out of memory?".to_owned()
        }
        (Some(signal), _) => format!("killed by {signal}"),
        (None, Some(101)) => "it panicked; syslog has the message".to_owned(),
        (None, code) => format!("exit code {}", code.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use nix::fcntl::OFlag;

    use super::*;

    /// A pipe without room for a byte.
    fn full() -> (PipeReader, OwnedFd) {
        let (from, to) = io::pipe().unwrap();
        let to = OwnedFd::from(to);
        fcntl(&to, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while nix::unistd::write(&to, &[b'.'; 4096]).is_ok() {}
        fcntl(&to, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        (from, to)
    }

    #[test]
    fn a_pipe_that_nothing_reads_does_not_stop_the_guardian() {
        let (_from, to) = full();
        let error = tell(&to, b"error:x\n", Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_line_is_written_once_there_is_room_and_an_error_once_the_pipe_is_closed() {
        let (mut from, to) = full();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            from.read_to_end(&mut all).unwrap();
            all
        });
        tell(&to, b"error:x\n", TELLING).unwrap();
        drop(to);
        assert!(reader.join().unwrap().ends_with(b"error:x\n"));
        let (from, to) = full();
        drop(from);
        let error = tell(&to, b"error:x\n", TELLING).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
