//! Requests to stop, made by a signal, while a domain is saved, restored or migrated. The work is
//! then cancelled in good order: the guest continues, and nothing incomplete is left.
//! `interrupt/signals.rs` has the signals, `left.rs` a list of what would be left.

mod signals;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xsr_save_restore::migrate::checkpoints::StopRequest;
use xsr_save_restore::progress::{Cancel, Cancelled};

pub(crate) use self::signals::{Ask, Requests, end_where_it_stands, next, say};

/// How often a wait checks for a request to stop, in milliseconds.
const LOOK: u16 = 50;

/// How long a connection may be silent, after a request to stop, before it is cut. A slow
/// connection may first have to carry a record or a buffer.
const GRACE: Duration = Duration::from_secs(30);

/// The interrupt state of this process.
static PROCESS: OnceLock<Interrupt> = OnceLock::new();

/// From now on, signals ask this process to stop. Call this before anything else, because another
/// thread would receive the signals instead.
///
/// # Errors
///
/// The signals could not be blocked, or no thread could be started to wait for them.
pub(crate) fn listen() -> anyhow::Result<()> {
    let interrupt = PROCESS.get_or_init(Interrupt::new).clone();
    signals::listen(interrupt)
}

/// Whether the user has asked to stop, and how that takes effect.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    cancel: Cancel,
    cut: Cancel,
    /// Whether cancelling needs a protocol on the connection, which takes a moment.
    graceful: Arc<AtomicBool>,
    /// Why it is too late to stop.
    deaf: Arc<OnceLock<String>>,
    /// Whether SIGHUP is ignored.
    without_hangup: Arc<AtomicBool>,
    /// Bytes written to and read from the connection.
    carried: Arc<AtomicU64>,
}

impl Interrupt {
    /// One that no signal sets.
    fn new() -> Self {
        Self {
            cancel: Cancel::new(),
            cut: Cancel::new(),
            graceful: Arc::default(),
            deaf: Arc::default(),
            without_hangup: Arc::default(),
            carried: Arc::default(),
        }
    }

    /// The one that this process's signals set.
    pub(crate) fn of_process() -> anyhow::Result<Self> {
        Ok(PROCESS.get_or_init(Self::new).clone())
    }

    /// The same, with SIGHUP ignored, because a session may be disconnected.
    pub(crate) fn catch_without_hangup() -> anyhow::Result<Self> {
        let interrupt = Self::of_process()?;
        interrupt.without_hangup.store(true, Ordering::Relaxed);
        Ok(interrupt)
    }

    /// One for a test, which sets it itself.
    #[cfg(test)]
    pub(crate) fn catch() -> anyhow::Result<Self> {
        Ok(Self::new())
    }

    fn ignores_hangup(&self) -> bool {
        self.without_hangup.load(Ordering::Relaxed)
    }

    /// A first signal has asked to stop.
    fn asked(&self) {
        self.cancel.cancel();
        // See `takes_its_time`.
        fence(Ordering::SeqCst);
        match self.graceful.load(Ordering::Relaxed) {
            true => self.cut_when_still(),
            false => self.cut.cancel(),
        }
    }

    /// The message for the user who has asked to stop.
    fn announcement(&self) -> String {
        match self.deaf.get() {
            None => "interrupting: ending in good order".to_owned(),
            Some(why) => format!("too late to interrupt: {why}"),
        }
    }

    /// From now on it is too late to stop, because of `why`. The user is told when they ask to
    /// stop, or now if they have asked before in vain.
    pub(crate) fn too_late(&self, why: String) {
        // The first reason stays, because nothing after it can be stopped.
        if self.deaf.set(why).is_ok() && self.cancel.is_cancelled() {
            say(&self.announcement());
        }
    }

    /// The token of a request to stop, for waits.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The token for work that must not be cut off in the middle. It is set together with
    /// [`Interrupt::cancel`] or, once [`Interrupt::takes_its_time`], when the connection has been
    /// silent for a while after that.
    pub(crate) fn cut(&self) -> &Cancel {
        &self.cut
    }

    /// The counter of the connection's bytes: while it grows, waiting makes sense.
    pub(crate) fn carried(&self) -> &AtomicU64 {
        &self.carried
    }

    /// The work is being cancelled: cut the connection once it has been silent for a while.
    pub(crate) fn cut_when_still(&self) {
        let (cut, carried) = (self.cut.clone(), Arc::clone(&self.carried));
        let late = thread::Builder::new().spawn(move || {
            until_still(&carried, || thread::sleep(GRACE));
            cut.cancel();
        });
        if late.is_err() {
            self.cut.cancel();
        }
    }

    /// Wait for a call that cannot be interrupted, such as connecting to a host that does not
    /// answer. It runs on a thread of its own, which is abandoned if the user asks to stop.
    ///
    /// # Errors
    ///
    /// `Interrupted` when the user asks to stop; `TimedOut` after `limit`; the call's own error.
    pub(crate) fn wait_for<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (done, answer) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("connect".to_owned())
            .spawn(move || {
                if done.send(call()).is_err() {
                    tracing::debug!("connected, but too late: the attempt had been given up");
                }
            })?;
        let until = Instant::now().checked_add(limit);
        loop {
            if until.is_some_and(|until| Instant::now() >= until) {
                let why = format!("it has not answered in {} s", limit.as_secs_f64());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            if self.cancel.is_cancelled() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
            }
            match answer.recv_timeout(Duration::from_millis(LOOK.into())) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the thread that connects panicked"));
                }
            }
        }
    }

    /// Wait until there is something to read, or the end. If it is too late to stop, wait without
    /// limit.
    ///
    /// # Errors
    ///
    /// `Interrupted` when the user asks to stop; poll's error.
    pub(crate) fn wait_readable(&self, fd: impl AsFd) -> io::Result<()> {
        loop {
            if self.deaf.get().is_none() && self.cancel.is_cancelled() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
            }
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(LOOK)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl StopRequest for Interrupt {
    fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    fn takes_its_time(&self) -> io::Result<()> {
        self.graceful.store(true, Ordering::Relaxed);
        // A request sets `cancel` and then reads `graceful`; this function does the reverse. So at
        // least one of them sees the other's store.
        fence(Ordering::SeqCst);
        match self.cancel.is_cancelled() {
            true => Err(io::Error::other(Cancelled)),
            false => Ok(()),
        }
    }
}

/// Wait until nothing has been carried during one `wait`.
fn until_still(carried: &AtomicU64, mut wait: impl FnMut()) {
    let mut before = carried.load(Ordering::Relaxed);
    loop {
        wait();
        let now = carried.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_waited_for() {
        let carried = AtomicU64::new(7);
        let mut waits = 0;
        until_still(&carried, || {
            waits += 1;
            if waits < 4 {
                carried.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert_eq!(waits, 4);
    }

    #[test]
    fn who_has_been_asked_to_stop_begins_nothing_that_takes_its_time() {
        let interrupt = Interrupt::catch().unwrap();
        interrupt.takes_its_time().unwrap();
        interrupt.cancel().cancel();
        let error = interrupt.takes_its_time().unwrap_err();
        assert!(Cancelled::is(&error), "{error}");
    }
}
