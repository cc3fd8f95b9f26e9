//! SIGTERM is how libxl tells its helper to stop. A save is broken off in good order
//! then, its dirty log off; a restore just ends, for libxl destroys the domain.
//!
//! SIGINT reaches the helper, too, when somebody interrupts xl: a save treats it the
//! same, so that no dirty log stays on behind an xl that is gone.
//!
//! C implementation: `setup_signals` and `save_signal_handler` in
//! `libxl_save_helper.c`.

use std::io;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use xsr_save_restore::progress::Cancel;

/// From now on, SIGTERM, SIGINT and SIGHUP cancel. To be called before there are
/// other threads, which would get them instead.
pub(crate) fn cancel_on_signals(cancel: &Cancel) -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let cancel = cancel.clone();
    let waiting = move || {
        // `wait` fails for an invalid set only.
        while signals.wait().is_ok() {
            cancel.cancel();
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(waiting)?;
    Ok(())
}

/// SIGTERM ends the process, whatever whoever started it has blocked.
pub(crate) fn end_on_sigterm() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    Ok(signals.thread_unblock()?)
}
