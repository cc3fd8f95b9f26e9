//! The small process that xenopsd starts, which starts the engine and outlives it.
//!
//! On a restore xenopsd waits without limit for a `result:` or `error:` line. An engine that is
//! killed, by the kernel when memory runs out for example, cannot write one, so this process does.
//! It also hands on the signals that ask for an end, and exits as the engine exits.
//!
//! | the engine ends by | it has said so itself |
//! |---|---|
//! | exit code 0, 1 or 2 | yes |
//! | any other exit code (101: a panic), a signal | no |

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, ExitStatus};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use xsr_save_restore::signals::{EndingSignals, SignalNumber};

use crate::line::Line;
use crate::{FAILED, REFUSED, log};

/// The first word of the engine's command line. The second is the guardian's pid.
const ENGINE: &str = "-engine";
/// This program, even if its file has been replaced meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Whether `words` are those of the engine. If so, the guardian's pid, and its words are removed.
pub(crate) fn take_engine(words: &mut Vec<String>) -> Option<u32> {
    match &words[..] {
        [first, pid, ..] if first == ENGINE => {
            let pid = pid.parse().ok()?;
            words.drain(..2);
            Some(pid)
        }
        _ => None,
    }
}

/// In the engine: end in good order if the guardian is killed.
///
/// # Errors
///
/// The kernel refuses; the guardian has gone already.
pub(crate) fn follow(guardian: u32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    match std::os::unix::process::parent_id() == guardian {
        true => Ok(()),
        false => Err(io::Error::other("the process that started it has gone")),
    }
}

/// Start the engine with `words`, and wait until it has ended; the exit code. `None` if it could
/// not be started: the caller does its work itself.
pub(crate) fn watch(words: &[String], control_out: &OwnedFd) -> Option<ExitCode> {
    let started = start(words);
    let (mut engine, signals, ending) = match started {
        Ok(started) => started,
        Err(error) => {
            log::say(format_args!(
                "the engine is not a process of its own: {error}"
            ));
            return None;
        }
    };
    let code = match wait(&mut engine, &signals, ending) {
        Ok(status) => match status.code() {
            Some(0) => return Some(ExitCode::SUCCESS),
            Some(code) if code == i32::from(REFUSED) => return Some(REFUSED.into()),
            Some(code) if code == i32::from(FAILED) => return Some(FAILED.into()),
            _ => how(status),
        },
        Err(error) => format!("it cannot be waited for: {error}"),
    };
    let text = format!("the engine ended unexpectedly: {code}");
    log::say(&text);
    let told = control_out
        .try_clone()
        .and_then(|fd| std::fs::File::from(fd).write_all(&Line::Error(&text).encode()));
    if let Err(error) = told {
        log::say(format_args!("xenopsd does not hear: {error}"));
    }
    Some(FAILED.into())
}

fn start(words: &[String]) -> io::Result<(Child, SignalFd, EndingSignals)> {
    let ending = EndingSignals::of_process()?;
    let mut set = ending.set();
    set.add(Signal::SIGCHLD);
    set.add(Signal::SIGTERM);
    // Before the engine can end. The engine itself begins with no signal blocked.
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    let engine = Command::new(THIS_PROGRAM)
        .arg0("xsr-emu-manager")
        .arg(ENGINE)
        .arg(std::process::id().to_string())
        .args(words.iter().map(OsString::from))
        .spawn()?;
    Ok((engine, signals, ending))
}

/// Wait for the engine, and hand signals on to it.
fn wait(engine: &mut Child, signals: &SignalFd, ending: EndingSignals) -> io::Result<ExitStatus> {
    loop {
        // A pid stays the engine's until this has returned its status.
        if let Some(status) = engine.try_wait()? {
            return Ok(status);
        }
        let number = match signals.read_signal() {
            Ok(Some(signal)) => SignalNumber::new(signal.ssi_signo),
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if number == Signal::SIGTERM.into() || ending.ask(number) {
            let pid = i32::try_from(engine.id()).map_err(io::Error::other)?;
            kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        }
    }
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
