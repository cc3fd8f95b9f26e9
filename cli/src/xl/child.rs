//! Runs a command in our place: it has our stdin, stdout and stderr, and receives our signals.
//!
//! A request to stop does not go to xl while its save helper is at work: xl would end at once, and
//! leave a suspended guest or an incomplete domain. Instead the helper gets SIGTERM. libxl then
//! cancels the work, and resumes the guest or destroys the domain being restored. Once the helper
//! of a save or migration has ended, xl is left alone, because it only has to resume or destroy the
//! guest. Further signals are the same request, until the user insists (`interrupt/signals.rs`):
//! then xl is killed.
//!
//! Signals that a terminal, a `timeout` or a service manager sends to a whole process group must
//! not reach xl either, so it starts with them ignored: a terminal's signals always, the others
//! only if it restores nothing, because then it leaves nothing running that should receive them.
//!
//! Every signal that would end a process ([`EndingSignals`]) is blocked here before there is a
//! child, so that none can end this process and leave the child alone. A child inherits its
//! parent's blocked signals, and there is no safe way to start it otherwise. So the child is this
//! program under another name, which unblocks the signals and then becomes the command. A signal
//! that was ignored when this process began, for example by `nohup`, stays ignored.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Error, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use xsr_save_restore::at_freeze::FrozenGuest;
use xsr_save_restore::signals::{EndingSignals, SignalNumber, sent_to_groups};
use xsr_xen_backend::domain_store::DomainLock;

use super::{BACKEND_VARIABLE, HELPER, HELPER_VARIABLE};
use crate::exit;
use crate::interrupt::{Ask, Requests, end_where_it_stands, next, say};

/// Names the file that our helper creates when it begins, so that we know it has run.
pub(crate) const BEGAN: &str = "XSR_HELPER_BEGAN";

/// Names the file that our helper writes before it runs the program of `--at-freeze`, so that we
/// know that the program must be told how the save ended.
const FROZEN: &str = "XSR_HELPER_FROZEN";
/// The name under which this program becomes the command in its arguments.
pub(crate) const NAME: &str = "xsr-becomes";

/// A command that runs this program, which becomes `sh` with a script and its arguments. This way
/// the child starts with no signal blocked, although it inherits what its parent blocks. It ignores
/// the signals that are sent to process groups; if `restores`, only those of a terminal's keys and
/// end. A pipe that is closed is an error to it: `xl save` would die of the signal (only `xl
/// migrate` ignores it), and leave the guest suspended.
pub(crate) fn deaf(script: &str, restores: bool) -> Command {
    let ignored = match restores {
        true => "INT HUP QUIT".to_owned(),
        false => {
            Vec::from_iter(sent_to_groups().map(|number| number.to_string())).join(" ") + " PIPE"
        }
    };
    let mut child = Command::new("/proc/self/exe");
    let script = format!("trap '' {ignored}; {script}");
    child.arg0(NAME).args(["sh", "-c", &script, "sh"]);
    child
}

/// A command that runs `sh` with a script, with no signal blocked and none ignored but those that
/// this process was started with.
pub(crate) fn plain(script: &str) -> Command {
    let mut child = Command::new("/proc/self/exe");
    child.arg0(NAME).args(["sh", "-c", script]);
    child
}

/// Become the command in the arguments. Returns only on failure.
pub(crate) fn become_it() -> Error {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        return Error::msg(format!("{NAME} wants a command"));
    };
    if let Err(error) = SigSet::all().thread_unblock() {
        return Error::new(error).context("unblocking signals");
    }
    let error = Command::new(&program).args(arguments).exec();
    Error::new(error).context(format!("starting {}", program.display()))
}

/// The signals read here, including the one for the child's end.
fn signals(ending: EndingSignals) -> SigSet {
    let mut signals = ending.set();
    signals.add(Signal::SIGCHLD);
    signals
}

/// Keep signals from ending this process until [`run`] reads them, because it has created a file
/// that must be removed. Call this before other threads start.
pub(crate) fn hold_signals() -> Result<()> {
    let ending = EndingSignals::of_process().context("reading signals")?;
    let blocked = signals(ending).thread_block();
    blocked.context("blocking signals")
}

/// How xl ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// The domain that the program of `--at-freeze` was run for.
    pub(super) frozen: Option<FrozenGuest>,
    /// Whether it was killed because the user insisted.
    pub(super) killed: bool,
}

/// Whether xl still has something to do before it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    /// It cleans up.
    InOrder,
    /// It has been killed.
    Ended,
}

/// Run xl to its end, with `helper` as its save helper and `settings` in the helper's environment.
/// `lock` names xl while that runs. `on_request` is called on the first request to stop. Call this
/// before other threads start.
pub(super) fn run(
    xl: impl IntoIterator<Item = OsString>,
    helper: &Path,
    settings: impl IntoIterator<Item = (&'static str, OsString)>,
    restores: bool,
    lock: Option<&DomainLock>,
    on_request: &dyn Fn(),
) -> Result<Ended> {
    let ending = EndingSignals::of_process().context("reading signals")?;
    let signals = signals(ending);
    signals.thread_block().context("blocking signals")?;
    let arrived = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let scratch = tempfile::tempdir().context("making a temporary directory")?;
    let [began, frozen] = ["began", "frozen"].map(|name| scratch.path().join(name));
    let mut command = deaf("exec \"$@\"", restores);
    command.args(xl);
    command
        .env(HELPER_VARIABLE, helper)
        .env(BEGAN, &began)
        .env(FROZEN, &frozen);
    command.envs(settings);
    // The helper uses this variable differently.
    command.env_remove(BACKEND_VARIABLE);
    let mut child = command.spawn().context("starting xl")?;
    // xl works on the domain, even after this process has been killed.
    if let Some(lock) = lock {
        name_in_lock(lock, child.id());
    }
    let stop = |xl| {
        on_request();
        stop(xl, restores, &began)
    };
    // What is left to do for the domain is done by this process. xl's own number stays in use until
    // the lock names another one.
    let ended = || lock.map_or((), |lock| name_in_lock(lock, std::process::id()));
    let ended = wait(&mut child, &arrived, ending, &stop, &ended).context("waiting for xl")?;
    let about = fs::read(&frozen).ok();
    Ok(Ended {
        frozen: about.and_then(|about| FrozenGuest::from_bytes(&about)),
        ..ended
    })
}

/// Records the process `pid` as the holder of the domain's lock.
fn name_in_lock(lock: &DomainLock, pid: u32) {
    if let Err(error) = lock.pass_to(pid) {
        let error = Error::new(error);
        tracing::warn!(
            "the lock of the domain does not name process {pid}: {}",
            exit::words(error.chain())
        );
    }
}

fn wait(
    child: &mut Child,
    arrived: &SignalFd,
    ending: EndingSignals,
    stop: &dyn Fn(Pid) -> Result<Stopping>,
    ended: &dyn Fn(),
) -> Result<Ended> {
    let mut requests = Requests::default();
    let mut killed = false;
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    loop {
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        if waitid(Id::Pid(pid), look)? != WaitStatus::StillAlive {
            ended();
            return Ok(Ended {
                status: child.wait()?,
                frozen: None,
                killed,
            });
        }
        let signal = match arrived.read_signal() {
            Ok(Some(signal)) => signal,
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let signal = SignalNumber::new(signal.ssi_signo);
        // The child's end is not a request.
        if !ending.ask(signal) {
            continue;
        }
        // The child has not been waited for, so its process id cannot have been reused.
        let passing = || format!("passing {signal} on");
        match requests.hear(signal, Instant::now()) {
            Ask::First => {
                if stop(pid).with_context(passing)? == Stopping::InOrder {
                    requests.announce("interrupting: xl ends in good order");
                }
            }
            Ask::Same => {}
            Ask::Insists => {
                signal::kill(pid, Signal::SIGKILL).with_context(passing)?;
                killed = true;
            }
        }
    }
}

/// Hear signals until the other end of the pipe `over` is closed. The first request to stop calls
/// `stop`; if the user insists, the process ends where it stands, and says what is left
/// ([`crate::left`]).
///
/// # Errors
///
/// Signals cannot be read.
pub(super) fn hear_until(
    over: BorrowedFd<'_>,
    announcement: &str,
    mut stop: impl FnMut(),
) -> Result<()> {
    let ending = EndingSignals::of_process().context("reading signals")?;
    ending.set().thread_block().context("blocking signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let arrived = SignalFd::with_flags(&ending.set(), flags).context("waiting for signals")?;
    let mut requests = Requests::default();
    loop {
        let mut fds = [
            PollFd::new(over, PollFlags::POLLIN),
            PollFd::new(arrived.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::new(errno).context("waiting for signals")),
        }
        let is_over = fds[0].any() == Some(true);
        while let Some(signal) = next(&arrived).context("reading signals")? {
            if !ending.ask(signal) {
                continue;
            }
            match requests.hear(signal, Instant::now()) {
                Ask::First => {
                    stop();
                    requests.announce(announcement);
                }
                Ask::Same => {}
                Ask::Insists => end_where_it_stands(),
            }
        }
        if is_over {
            return Ok(());
        }
    }
}

/// Do `work`, and hear signals meanwhile in a thread: a request to stop is answered by
/// `announcement`, and a user who insists ends the process where it stands.
pub(super) fn hear_while<T>(announcement: &str, work: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let ends = io::pipe().and_then(|(over, ends)| {
            let thread = thread::Builder::new().name("signals".to_owned());
            thread.spawn_scoped(scope, move || {
                if let Err(error) = hear_until(over.as_fd(), announcement, || {}) {
                    tracing::warn!("{error:#}");
                }
            })?;
            Ok(ends)
        });
        let ends = ends.inspect_err(|error| tracing::info!(%error, "signals are not heard"));
        let done = work();
        drop(ends);
        done
    })
}

/// Run one of xl's short commands to its end, whatever signals arrive. It prints what is wrong.
///
/// # Errors
///
/// It could not be run, or failed.
pub(super) fn run_briefly(xl: &OsStr, words: &[&OsStr]) -> Result<()> {
    let mut command = deaf("exec \"$@\"", false);
    let status = command.arg(xl).args(words).status();
    let shown = || {
        let words = words.iter().map(|word| word.to_string_lossy());
        format!("`xl {}`", Vec::from_iter(words).join(" "))
    };
    let status = status.with_context(|| format!("running {}", shown()))?;
    ensure!(status.success(), "{} has failed ({status})", shown());
    Ok(())
}

/// Tell the user what is left after xl has been killed.
pub(super) fn say_what_is_left() {
    say(
        "ended at once: xl has been killed. The domain may be suspended here (migrated: as \
         NAME--migratedaway), half made (NAME--incoming, or paused), or gone: see `xl list`. An \
         image that was being written is not complete",
    );
}

/// The program of `--at-freeze` cannot be told how the save ended, because xl has been killed.
pub(super) fn say_that_program_was_not_told() {
    say(NOT_TOLD);
}

/// It has been run, and does not learn how the save ended.
pub(super) const NOT_TOLD: &str =
    "the program of --at-freeze was not told how the save ended: remove its snapshot";

/// Make xl's save helper cancel its work. End xl if no helper has begun, or if xl has restored a
/// domain and stays until the domain's end.
fn stop(xl: Pid, restores: bool, began: &Path) -> Result<Stopping> {
    match helper_of(xl) {
        Some(helper) => {
            tracing::info!("asking {HELPER} to stop");
            match pidfd_send_signal(&helper, rustix::process::Signal::TERM) {
                // It has just ended: there is nothing to cancel.
                Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(Stopping::InOrder),
                Err(errno) => Err(errno.into()),
            }
        }
        None if restores => {
            signal::kill(xl, Signal::SIGTERM)?;
            Ok(Stopping::InOrder)
        }
        None if began.exists() => {
            tracing::warn!(
                "the save helper has ended, and xl does what is left to be done for the \
                 domain: that cannot be broken off"
            );
            Ok(Stopping::InOrder)
        }
        // xl ignores SIGTERM, for which it has no handler anyway: SIGKILL has the same effect.
        None => {
            signal::kill(xl, Signal::SIGKILL)?;
            Ok(Stopping::Ended)
        }
    }
}

/// The save helper that `xl` has started, if one is running.
fn helper_of(xl: Pid) -> Option<OwnedFd> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter(|number| is_helper(*number, xl))
        .find_map(|number| {
            let pid = rustix::process::Pid::from_raw(number)?;
            let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            // The number may have been reused before the handle was opened.
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
