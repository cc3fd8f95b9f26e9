//! SIGINT, SIGTERM and SIGHUP (a session that breaks off) while a domain is being saved or restored: the work is broken
//! off in good order, so that the guest runs on and nothing half-made stays. A second
//! signal ends the process where it stands.

use std::ops::ControlFlow;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};

/// What a shell shows for a process that SIGINT killed.
const KILLED: i32 = 128 + 2;

/// Whether somebody asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    asked: Arc<AtomicBool>,
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
        let asked = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&asked);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                // `wait` fails for an invalid set only.
                while signals.wait().is_ok() {
                    if flag.swap(true, Ordering::Relaxed) {
                        process::exit(KILLED);
                    }
                }
            })
            .context("starting the signal thread")?;
        Ok(Self { asked })
    }

    /// `Break` once somebody has asked to stop.
    pub(crate) fn check(&self) -> ControlFlow<()> {
        match self.asked.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
