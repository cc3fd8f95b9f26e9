//! A command that runs in our place: it has our stdin, stdout and stderr, and gets the
//! signals that we get.

use std::process::{Child, Command, ExitStatus};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

/// Signals that are meant for whoever does the work.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// `si_code` of a signal that the kernel sends, say for a key of the terminal. All of
/// the terminal's foreground processes get such a one, the child too.
const SI_KERNEL: i32 = 0x80;

/// Run it to its end.
pub(super) fn run(command: &mut Command) -> Result<ExitStatus> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    // Not before: the child would begin with them blocked.
    wait(&mut child).with_context(|| format!("waiting for {program}"))
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    let mut signals: SigSet = PASSED_ON.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    signals.thread_block().context("blocking signals")?;
    let arrived = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    loop {
        // Looked at after the signal that tells of it was blocked, so that none is missed.
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
        if signal_is == Signal::SIGCHLD || signal.ssi_code == SI_KERNEL {
            continue;
        }
        // It has not been waited for, so that the number is still its own.
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        signal::kill(pid, signal_is).with_context(|| format!("passing {signal_is} on"))?;
    }
}
