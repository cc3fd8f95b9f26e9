//! A request to stop, by a signal, while a domain is being saved, restored or migrated: the work
//! is broken off in good order, so that the guest runs on and nothing half made stays.
//! `interrupt/signals.rs` has the signals, `left.rs` what would be left.

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
use xsr_save_restore::progress::{Cancel, Cancelled};

pub(crate) use self::signals::{Ask, Requests, say};

/// How long a wait goes on before it looks whether somebody asked to stop, in
/// milliseconds.
const LOOK: u16 = 50;

/// How long a connection may carry nothing at all before work that is broken off in good order
/// is cut off: a slow one has a record or a buffer to carry before.
const GRACE: Duration = Duration::from_secs(30);

/// That of this process.
static PROCESS: OnceLock<Interrupt> = OnceLock::new();

/// Have the signals ask this process to stop, from now on. To be called first of all: another
/// thread would get them instead.
///
/// # Errors
///
/// The signals could not be blocked, or there is no thread to wait for them.
pub(crate) fn listen() -> anyhow::Result<()> {
    let interrupt = PROCESS.get_or_init(Interrupt::new).clone();
    signals::listen(interrupt)
}

/// Whether somebody asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    cancel: Cancel,
    cut: Cancel,
    /// Whether there is an order in which to break off that takes a moment.
    graceful: Arc<AtomicBool>,
    /// Why nothing can be stopped any more.
    deaf: Arc<OnceLock<String>>,
    /// Whether SIGHUP does nothing.
    without_hangup: Arc<AtomicBool>,
    /// How much the connection has carried: bytes written and heard.
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

    /// What the signals ask of this process.
    pub(crate) fn of_process() -> anyhow::Result<Self> {
        Ok(PROCESS.get_or_init(Self::new).clone())
    }

    /// The same, and a session may break off: SIGHUP does nothing.
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

    /// A signal has asked, for the first time.
    fn asked(&self) {
        self.cancel.cancel();
        // See `takes_its_time`.
        fence(Ordering::SeqCst);
        match self.graceful.load(Ordering::Relaxed) {
            true => self.cut_when_still(),
            false => self.cut.cancel(),
        }
    }

    /// What to tell the user who has asked.
    fn announcement(&self) -> String {
        match self.deaf.get() {
            None => "interrupting: ending in good order".to_owned(),
            Some(why) => format!("too late to interrupt: {why}"),
        }
    }

    /// From now on nothing can be broken off, because of `why`: whoever asks is told, and so is
    /// whoever has asked already and was not heard.
    pub(crate) fn too_late(&self, why: String) {
        // The first reason stays: nothing comes after it that could be stopped.
        if self.deaf.set(why).is_ok() && self.cancel.is_cancelled() {
            say(&self.announcement());
        }
    }

    /// The token, for whoever waits.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The token for whoever must not be cut off in the midst of something: set when
    /// somebody asks to stop, or, once [`Interrupt::takes_its_time`], when the connection has
    /// carried nothing for a moment after that.
    pub(crate) fn cut(&self) -> &Cancel {
        &self.cut
    }

    /// Where what the connection carries is counted: as long as that grows it is worth
    /// waiting for.
    pub(crate) fn carried(&self) -> &AtomicU64 {
        &self.carried
    }

    /// The work is being broken off: the connection is cut once it has carried nothing for a
    /// moment.
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

    /// From now on there is an order in which to break off.
    ///
    /// # Errors
    ///
    /// [`Cancelled`]: somebody has asked to stop before, and what they have had cut off may be
    /// cut at any moment from now on: nothing may be begun that wants that order.
    pub(crate) fn takes_its_time(&self) -> io::Result<()> {
        self.graceful.store(true, Ordering::Relaxed);
        // Whoever asks says so, and then looks at what was stored here; this end does it the
        // other way round: one of the two sees what the other has done.
        fence(Ordering::SeqCst);
        match self.cancel.is_cancelled() {
            true => Err(io::Error::other(Cancelled)),
            false => Ok(()),
        }
    }

    /// Wait for so long, or until the user asks to stop.
    pub(crate) fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.cancel.is_cancelled() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(Duration::from_millis(LOOK.into())));
        }
    }

    /// Wait for a call that nothing can break off, such as a connect to a host that does
    /// not answer: on a thread of its own, which is left behind if somebody asks to stop.
    ///
    /// # Errors
    ///
    /// `Interrupted` when the user asks to stop; `TimedOut` after `limit`; the call's own.
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
                    tracing::debug!("connected, but nobody waits for it any more");
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

    /// Wait until there is something to read, or nothing will come any more. As long as
    /// it takes, where it is too late to stop.
    ///
    /// # Errors
    ///
    /// `Interrupted` when somebody asks to stop; what poll says.
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

/// Wait as long as something is carried from one end of a wait to the other.
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
