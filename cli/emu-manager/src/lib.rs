//! The program `xsr-emu-manager`: it replaces the `emu-manager` of XCP-ng and XenServer, so that
//! xapi suspends, resumes and migrates VMs with our engine.
//!
//! xenopsd starts it for each save and restore, passes it the descriptor of the suspend image or
//! migration stream, and talks to it over two pipes. The published programs start a `xenguest` for
//! the memory; this one contains the engine.
//!
//! It is a separate package so that cargo leaves out everything that a Xen host does not need,
//! above all the mock machine. Tests run `xsr-emu-manager-mock`, which the feature `test-backend`
//! adds.
//!
//! The other end is `ocaml/xenopsd/xc/emu_manager.ml` and `domain.ml` of xen-api.

#![forbid(unsafe_code)]

mod args;
mod backend;
mod compress;
mod control;
mod disk;
mod guardian;
mod job;
mod line;
mod log;
#[cfg(feature = "test-backend")]
mod mock;
mod platform;
mod policy;
mod progress;
mod qmp;
mod settings;
mod stream;
mod toolstack;

use std::fs::File;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::signal::Signal;
use xsr_save_restore::inherited::inherited;
use xsr_save_restore::signals::{EndingSignals, on_signal};

use crate::args::{Args, Mode, Request};
use crate::backend::Backend;
use crate::control::{Control, End};
use crate::guardian::Link;
use crate::line::Line;

/// Exit code: the command line, or something that it names, is bad.
const REFUSED: u8 = 1;
/// Exit code: the save or restore failed.
const FAILED: u8 = 2;

/// Opens a hypervisor.
type Open = fn() -> anyhow::Result<Box<dyn Backend>>;

/// Does what xenopsd asks, on the Xen of this machine.
#[must_use]
pub fn main() -> ExitCode {
    run(backend::open)
}

/// Does what xenopsd asks, on the mock machine that the environment names.
#[cfg(feature = "test-backend")]
#[must_use]
pub fn main_on_mock() -> ExitCode {
    run(mock::open)
}

fn run(open: Open) -> ExitCode {
    let words = std::env::args_os().skip(1);
    let mut words: Vec<String> = words.map(|w| w.to_string_lossy().into_owned()).collect();
    let guardian = guardian::take_engine(&mut words);
    match args::parse(&words) {
        Ok(Request::Print(text)) => print(&text),
        Ok(Request::Work(args)) => work(&args, &words, guardian, open),
        Err(text) => refuse(args::control_out(&words), &text),
    }
}

/// Prints the text that the user or xenopsd has asked for.
fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => REFUSED.into(),
    }
}

/// Reports a bad command line to the user, and to xenopsd if it can be reached.
fn refuse(control_out: Option<i32>, text: &str) -> ExitCode {
    log::say(text);
    let told = control_out.map(|fd| {
        let line = Line::Error(text).encode();
        inherited(fd).and_then(|fd| File::from(fd).write_all(&line))
    });
    if let Some(Err(error)) = told {
        log::say(format_args!("xenopsd does not hear: {error}"));
    }
    REFUSED.into()
}

fn work(args: &Args, words: &[String], guardian: Option<Link>, open: Open) -> ExitCode {
    log::about(args.domid);
    let control_out = match inherited(args.control_out) {
        Ok(fd) => fd,
        Err(error) => {
            log::say(format_args!("-controloutfd {}: {error}", args.control_out));
            return REFUSED.into();
        }
    };
    if guardian.is_none()
        && let Some(code) = guardian::watch(args, words, &control_out, open)
    {
        return code;
    }
    let restore = matches!(args.mode, Mode::Restore { .. });
    let control = Control::new(File::from(control_out), restore, guardian);
    log::install(&control, args.debug);
    let stream = match begin(args, &control) {
        Ok(stream) => stream,
        Err(error) => {
            control.failed(&format!("{error:#}"));
            return REFUSED.into();
        }
    };
    let Err(error) = job::run(args, stream, &control, open) else {
        return ExitCode::SUCCESS;
    };
    match control.end() {
        Some(End::Aborted) => {
            // On a restore that has begun, xenopsd waits for a line even if it has cancelled the
            // task (`domain.ml`, the reader thread that waits for a result). On a save, and before
            // that, it watches for the end of the pipe.
            match control.restore_begun() {
                true => control.failed(&End::Aborted.text()),
                false => control.silent(),
            }
            return ExitCode::SUCCESS;
        }
        Some(end) => control.failed(&end.text()),
        None => {
            let words = format!("{error:#}");
            tracing::error!("{} of {} failed: {words}", args.what(), args.domid);
            control.failed(&words);
        }
    }
    FAILED.into()
}

/// Starts listening to xenopsd and to signals; returns the stream.
fn begin(args: &Args, control: &Arc<Control>) -> anyhow::Result<std::os::fd::OwnedFd> {
    let ending = EndingSignals::of_process()?;
    let mut signals = ending.set();
    // A blocked signal arrives even if the process ignores it.
    signals.add(Signal::SIGTERM);
    let ended = Arc::clone(control);
    on_signal(&signals, move |signal| {
        if signal == Signal::SIGTERM.into() || ending.ask(signal) {
            ended.end_with(End::Signal);
        }
    })?;
    control.follow_guardian()?;
    let control_in = inherited(args.control_in)
        .map_err(|error| anyhow::anyhow!("-controlinfd {}: {error}", args.control_in))?;
    let stream = stream::open(args.stream, !matches!(args.mode, Mode::Restore { .. }))?;
    control.listen(File::from(control_in))?;
    Ok(stream)
}
