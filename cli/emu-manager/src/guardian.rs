//! The small process that xenopsd starts, which starts the engine and outlives it.
//!
//! On a restore xenopsd waits without limit for a `result:` or `error:` line. An engine that is
//! killed, by the kernel when memory runs out for example, cannot write one, so this process does.
//! It also hands on the signals that ask for an end, and exits as the engine exits. After a save
//! it undoes what the engine cannot undo any more: the guest runs on, and its writes are no longer
//! logged.
//!
//! | the engine ends by | it has said so itself |
//! |---|---|
//! | exit code 0, 1 or 2 | yes |
//! | any other exit code (101: a panic), a signal | no |
//! | unknown (SIGCHLD is ignored) | if its last note says so |
//!
//! The engine holds one end of a pipe as long as it lives, and notes in it what it is about to do.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, ExitStatus};

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

/// The first word of the engine's command line. The others are the guardian's pid and the
/// descriptor of its pipe.
const ENGINE: &str = "-engine";
/// This program, even if its file has been replaced meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// What the engine notes for its guardian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// xenopsd is asked to suspend the guest: from now on it may be suspended.
    Suspending,
    /// xenopsd is told the result: from now on the guest may be its business, or run elsewhere.
    Result,
    /// Nothing more has to be said.
    Told,
}

impl Note {
    const ALL: [Self; 3] = [Self::Suspending, Self::Result, Self::Told];

    fn byte(self) -> u8 {
        match self {
            Self::Suspending => b's',
            Self::Result => b'r',
            Self::Told => b't',
        }
    }
}

/// In the engine: what connects it with its guardian.
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

    /// End in good order if the guardian is killed.
    ///
    /// # Errors
    ///
    /// The kernel refuses; the guardian has gone already.
    pub(crate) fn follow(&self) -> io::Result<()> {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        match std::os::unix::process::parent_id() == self.pid {
            true => Ok(()),
            false => Err(io::Error::other("the process that started it has gone")),
        }
    }
}

/// Whether `words` are those of the engine. If so, its link, and its words are removed.
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

/// What is known of the engine once it has ended.
#[derive(Debug)]
struct Ended {
    /// `None` if the kernel does not tell.
    status: Option<ExitStatus>,
    notes: Vec<Note>,
}

/// Start the engine with `words`, which mean `args`, and wait until it has ended; the exit code.
/// `None` if it could not be started: the caller does its work itself.
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
        // Without its notes, it is unknown where the guest is.
        Err(error) => (
            format!("it cannot be waited for: {error}"),
            vec![Note::Result],
        ),
    };
    log::say(format_args!("the engine ended unexpectedly: {how}"));
    let what_of_it = undo(args, &noted, open);
    let text = format!("the engine ended unexpectedly: {how}{what_of_it}");
    let told = control_out
        .try_clone()
        .and_then(|fd| File::from(fd).write_all(&Line::Error(&text).encode()));
    if let Err(error) = told {
        log::say(format_args!("xenopsd does not hear: {error}"));
    }
    Some(FAILED.into())
}

/// Undo what an engine has left that was killed; what to add to the message.
fn undo(args: &Args, noted: &[Note], open: Open) -> &'static str {
    let Mode::Save { live } = args.mode else {
        return "";
    };
    if noted.contains(&Note::Result) {
        // xenopsd may have the result, and the guest may run elsewhere by now.
        return "";
    }
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
    // The engine itself begins with no signal blocked.
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

/// Wait for the engine, and hand signals on to it.
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
                // The kernel has closed its end: it has ended, or is about to.
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
            // It holds its end of the pipe, so this pid is still the engine's.
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

/// How it ended, for the `error:` line.
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
