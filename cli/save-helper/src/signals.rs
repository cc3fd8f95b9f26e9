//! The signals that ask the save helper to stop. libxl sends SIGTERM. A save is broken off in
//! good order then, its dirty log off; a restore just ends, for libxl destroys the domain.
//!
//! Every other signal that would end a save ([`EndingSignals`]: SIGINT when the user interrupts xl,
//! SIGHUP when the terminal goes) does the same, so that no dirty log stays on after xl is gone.
//! It is the same request however often it comes: a helper that ended at once would leave the
//! guest to libxl as it is. A signal that was ignored when the helper began (`nohup xl save`)
//! stays ignored, except SIGTERM, which is libxl's.
//!
//! C implementation: `setup_signals` and `save_signal_handler` in
//! `libxl_save_helper.c`.

use std::io;
use std::process;
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::signals::{EndingSignals, SignalNumber};

use crate::FAILED;

/// From now on, signals cancel. To be called before there are other threads, which would get
/// them instead. A file that may not grow any further is an error of the write, and no signal.
pub(crate) fn cancel_on_signals(cancel: &Cancel) -> io::Result<()> {
    let ending = EndingSignals::of_process()?;
    let mut signals = ending.set();
    // A signal that is blocked arrives even where it is ignored.
    signals.add(Signal::SIGTERM);
    let cancel = cancel.clone();
    on_signal(&signals, move |signal| {
        if signal == Signal::SIGTERM.into() || ending.ask(signal) {
            cancel.cancel();
        }
    })
}

/// SIGTERM ends the process, whether whoever started it has blocked or ignored it.
pub(crate) fn end_on_sigterm() -> io::Result<()> {
    let signals = SigSet::from(Signal::SIGTERM);
    if EndingSignals::of_process()?.is_ignored(Signal::SIGTERM.into()) {
        return on_signal(&signals, |_| process::exit(FAILED.into()));
    }
    Ok(signals.thread_unblock()?)
}

/// Block `signals`, and call `act` for each one that arrives, on a thread of its own.
fn on_signal(signals: &SigSet, act: impl Fn(SignalNumber) + Send + 'static) -> io::Result<()> {
    signals.thread_block()?;
    let arrived = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)?;
    let waiting = move || {
        loop {
            match arrived.read_signal() {
                Ok(Some(signal)) => act(SignalNumber::new(signal.ssi_signo)),
                Ok(None) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "signals are not heard any more");
                    return;
                }
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(waiting)?;
    Ok(())
}
