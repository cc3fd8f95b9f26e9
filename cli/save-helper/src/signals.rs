//! The signals that ask the save helper to stop. libxl sends SIGTERM. A save is broken off in
//! good order then, its dirty log off; a restore just ends, for libxl destroys the domain.
//!
//! Whatever else would end a save (SIGINT when the user interrupts xl, SIGHUP when the terminal
//! goes) does the same, so that no dirty log stays on behind an xl that is gone. It is the same
//! request however often it comes: a helper that ended at once would leave the guest to libxl as
//! it is. A signal that was ignored when the helper began (`nohup xl save`) stays ignored, except
//! SIGTERM, which is libxl's.
//!
//! C implementation: `setup_signals` and `save_signal_handler` in
//! `libxl_save_helper.c`.

use std::fs;
use std::io;
use std::process;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use xsr_save_restore::progress::Cancel;

use crate::FAILED;

/// Those that end a process which does not expect them, but for SIGTERM.
const OTHERS: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGXCPU,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// Which signals are ignored, as a mask. Where that cannot be read, none is taken to be.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

fn is_ignored(signal: Signal, ignored: u64) -> bool {
    ignored >> (signal as u32 - 1) & 1 == 1
}

/// From now on, signals cancel. To be called before there are other threads, which would get
/// them instead. A file that may not grow any further is an error of the write, and no signal.
pub(crate) fn cancel_on_signals(cancel: &Cancel) -> io::Result<()> {
    let ignored = ignored();
    let heard = OTHERS.into_iter().filter(|s| !is_ignored(*s, ignored));
    let mut signals: SigSet = heard.collect();
    // A signal that is blocked arrives even where it is ignored.
    signals.add(Signal::SIGTERM);
    let mut blocked = signals;
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_block()?;
    let cancel = cancel.clone();
    on_signal(signals, move || cancel.cancel())
}

/// SIGTERM ends the process, whether whoever started it has blocked or ignored it.
pub(crate) fn end_on_sigterm() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    if is_ignored(Signal::SIGTERM, ignored()) {
        signals.thread_block()?;
        return on_signal(signals, || process::exit(FAILED.into()));
    }
    Ok(signals.thread_unblock()?)
}

fn on_signal(signals: SigSet, act: impl Fn() + Send + 'static) -> io::Result<()> {
    let waiting = move || {
        // `wait` fails for an invalid set only.
        while signals.wait().is_ok() {
            act();
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(waiting)?;
    Ok(())
}
