//! SIGINT, SIGTERM and SIGHUP (a session that breaks off) while a domain is being saved,
//! restored or migrated: the work is broken off in good order, so that the guest runs on
//! and nothing half-made stays. A second signal ends the process where it stands.

use std::io;
use std::os::fd::AsFd;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use xsr_save_restore::progress::Cancel;

/// What a shell shows for a process that SIGINT killed.
const KILLED: i32 = 128 + 2;

/// How long a wait goes on before it looks whether somebody asked to stop, in
/// milliseconds.
const LOOK: u16 = 50;

/// Whether somebody asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    cancel: Cancel,
    /// Said to whoever asks at a time when nothing can be stopped.
    deaf: Arc<OnceLock<String>>,
    told: Arc<AtomicBool>,
}

impl Interrupt {
    /// Catch the signals from now on. To be called before there are other
    /// threads, which would get them instead.
    pub(crate) fn catch() -> anyhow::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGHUP);
        signals.thread_block().context("blocking signals")?;
        let interrupt = Self {
            cancel: Cancel::new(),
            deaf: Arc::default(),
            told: Arc::default(),
        };
        let asked = interrupt.clone();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                // `wait` fails for an invalid set only.
                while signals.wait().is_ok() {
                    asked.signal();
                }
            })
            .context("starting the signal thread")?;
        Ok(interrupt)
    }

    fn signal(&self) {
        if self.told.swap(true, Ordering::Relaxed) {
            process::exit(KILLED);
        }
        self.cancel.cancel();
        if let Some(why) = self.deaf.get() {
            tracing::warn!("{why}");
        }
    }

    /// From now on nothing can be broken off: who asks is told `why`. Who has asked
    /// already was not heard, and a second signal still ends the process.
    pub(crate) fn too_late(&self, why: String) {
        // The first reason stays: nothing comes after it that could be stopped.
        self.deaf.get_or_init(|| why);
    }

    /// The token, for whoever waits.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Wait for a call that nothing can break off, such as a connect to a host that does
    /// not answer: on a thread of its own, which is left behind if somebody asks to stop.
    ///
    /// # Errors
    ///
    /// `Interrupted` when somebody asks to stop; what the call says.
    pub(crate) fn wait_for<T: Send + 'static>(
        &self,
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
        loop {
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
