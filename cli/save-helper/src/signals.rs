//! Signals that stop the save helper. libxl sends SIGTERM. A save is then cancelled, and its
//! dirty log turned off. A restore just ends, because libxl destroys the domain.
//!
//! Every other signal that would end a save ([`EndingSignals`]: SIGINT when the user interrupts xl,
//! SIGHUP when the terminal is closed) does the same, so that no dirty log stays on after xl is gone. A
//! second signal changes nothing: if the helper ended at once, libxl would be left with the guest
//! as it is. A signal that was ignored when the helper began (`nohup xl save`) stays ignored,
//! except SIGTERM, which is libxl's.
//!
//! C implementation: `setup_signals` and `save_signal_handler` in `libxl_save_helper.c`.

use std::io;
use std::process;

use nix::sys::signal::{SigSet, Signal};
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::signals::{EndingSignals, on_signal};

use crate::FAILED;

/// From now on, signals cancel the work. Call this before other threads start, because they would
/// receive the signals instead. A write beyond the file size limit becomes an error instead of a
/// signal.
pub(crate) fn cancel_on_signals(cancel: &Cancel) -> io::Result<()> {
    let ending = EndingSignals::of_process()?;
    let mut signals = ending.set();
    // Waiting for blocked signals also returns an ignored one.
    signals.add(Signal::SIGTERM);
    let cancel = cancel.clone();
    on_signal(&signals, move |signal| {
        if signal == Signal::SIGTERM.into() || ending.ask(signal) {
            cancel.cancel();
        }
    })
}

/// SIGTERM ends the process, even if the parent process has blocked or ignored it.
pub(crate) fn end_on_sigterm() -> io::Result<()> {
    let signals = SigSet::from(Signal::SIGTERM);
    if EndingSignals::of_process()?.is_ignored(Signal::SIGTERM.into()) {
        return on_signal(&signals, |_| process::exit(FAILED.into()));
    }
    Ok(signals.thread_unblock()?)
}
