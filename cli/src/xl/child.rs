//! A command that runs in our place: it has our stdin, stdout and stderr, and gets the
//! signals that we get.
//!
//! What asks to stop is not for xl while its save helper is at work: xl would end where it
//! stands, and leave a guest behind that is suspended, or half a domain. The helper gets
//! SIGTERM then; libxl breaks the work off for it, and has the guest run on or destroys what
//! was being restored. So that the terminal's keys do not reach xl either, it begins with
//! SIGINT and SIGHUP ignored.
//!
//! They are blocked here before there is a child, so that none can end this process and
//! leave the child to itself. A child begins with what its parent blocks, and nothing
//! safe lets it begin otherwise: so the child is this program under another name, which
//! unblocks them and then becomes the command.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};

use anyhow::{Context as _, Error, Result};
use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};

use super::HELPER;

/// Signals that are meant for whoever does the work.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Those of them that ask to stop.
const STOP: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// `si_code` of a signal that the kernel sends, say for a key of the terminal. All of
/// the terminal's foreground processes get such a one, the child too.
const SI_KERNEL: i32 = 0x80;

/// The name under which this program becomes the command that its arguments are.
pub(crate) const NAME: &str = "xsr-becomes";

/// This program, to become `command`, with none of the signals blocked that are here; its
/// environment can be added to.
fn becoming(command: impl IntoIterator<Item = OsString>) -> Command {
    let mut child = Command::new("/proc/self/exe");
    child.arg0(NAME).args(command);
    child
}

/// As [`becoming`], of xl: it does not hear SIGINT and SIGHUP.
pub(super) fn becoming_xl(command: impl IntoIterator<Item = OsString>) -> Command {
    let script = ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh"];
    becoming(script.into_iter().map(Into::into).chain(command))
}

/// Become the command that the arguments are. Only a failure returns.
pub(crate) fn become_it() -> Error {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        return Error::msg(format!("{NAME} wants a command"));
    };
    if let Err(error) = signals().thread_unblock() {
        return Error::new(error).context("unblocking signals");
    }
    let error = Command::new(&program).args(arguments).exec();
    Error::new(error).context(format!("starting {}", program.display()))
}

/// Those that are read here: of the child's end, too.
fn signals() -> SigSet {
    let mut signals: SigSet = PASSED_ON.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    signals
}

/// Run what [`becoming`] made to its end. To be called before there are other threads.
pub(super) fn run(command: &mut Command) -> Result<ExitStatus> {
    signals().thread_block().context("blocking signals")?;
    let arrived = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC)?;
    let mut child = command.spawn().context("starting xl")?;
    wait(&mut child, &arrived).context("waiting for xl")
}

fn wait(child: &mut Child, arrived: &SignalFd) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let signal = match arrived.read_signal() {
            Ok(Some(signal)) => signal,
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
        let signal_is = Signal::try_from(number)?;
        if signal_is == Signal::SIGCHLD {
            continue;
        }
        // It has not been waited for, so that the number is still its own.
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let passed_on = match STOP.contains(&signal_is) {
            true => stop(pid),
            false if signal.ssi_code == SI_KERNEL => Ok(()),
            false => signal::kill(pid, signal_is).map_err(Error::new),
        };
        passed_on.with_context(|| format!("passing {signal_is} on"))?;
    }
}

/// Have xl's save helper break its work off; have xl end, where there is none at work.
fn stop(xl: Pid) -> Result<()> {
    match helper_of(xl) {
        Some(helper) => {
            tracing::info!("asking {HELPER} to stop");
            match pidfd_send_signal(&helper, rustix::process::Signal::TERM) {
                // It has just ended: there is nothing to break off.
                Err(rustix::io::Errno::SRCH) => Ok(()),
                sent => Ok(sent?),
            }
        }
        None => Ok(signal::kill(xl, Signal::SIGTERM)?),
    }
}

/// The save helper that `xl` has started, if one is at work.
fn helper_of(xl: Pid) -> Option<OwnedFd> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter(|number| is_helper(*number, xl))
        .find_map(|number| {
            let pid = rustix::process::Pid::from_raw(number)?;
            let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            // The number may have become another's before there was a handle.
            is_helper(number, xl).then_some(handle)
        })
}

fn is_helper(number: i32, parent: Pid) -> bool {
    // `NUMBER (NAME) STATE PARENT …`
    let Ok(stat) = fs::read_to_string(format!("/proc/{number}/stat")) else {
        return false;
    };
    let Some((name, rest)) = stat.rsplit_once(") ") else {
        return false;
    };
    let named = name
        .split_once(" (")
        .is_some_and(|(_, name)| name == HELPER);
    named && rest.split(' ').nth(1) == Some(&*parent.to_string())
}
