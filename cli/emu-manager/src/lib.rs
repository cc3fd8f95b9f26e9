//! The program `xsr-emu-manager`: stands in for the `emu-manager` of XCP-ng and XenServer, so that
//! xapi suspends, resumes and migrates a VM with our engine.
//!
//! xenopsd starts it for each save and restore, hands it the descriptor of the suspend image or
//! migration stream, and talks to it over two pipes. The published programs start a `xenguest` for
//! the memory; this one has the engine inside.
//!
//! A package of its own, so that cargo keeps everything out of it that a Xen host does not
//! need: the mock machine first of all. Tests run `xsr-emu-manager-mock`, which the feature
//! `test-backend` adds.
//!
//! The other end: `ocaml/xenopsd/xc/emu_manager.ml` and `domain.ml` of xen-api.

#![forbid(unsafe_code)]

mod args;
mod backend;
mod control;
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

/// Exit code: the command line or what it names is bad.
const REFUSED: u8 = 1;
/// Exit code: the save or restore failed.
const FAILED: u8 = 2;

/// Opens a hypervisor.
type Open = fn() -> anyhow::Result<Box<dyn Backend>>;

/// Do what xenopsd asks, on the Xen of this machine.
#[must_use]
pub fn main() -> ExitCode {
    run(backend::open)
}

/// Do what xenopsd asks, on the mock machine that the environment names.
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

/// Print what a person or xenopsd has asked for.
fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => REFUSED.into(),
    }
}

/// The command line is bad: tell a person, and xenopsd if it can be reached.
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
            control.failed(&job::words(&error));
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
            // that, it goes by the end of the pipe.
            match control.restore_begun() {
                true => control.failed(&End::Aborted.text()),
                false => control.silent(),
            }
            return ExitCode::SUCCESS;
        }
        Some(end) => control.failed(&end.text()),
        None => {
            let words = job::words(&error);
            tracing::error!("{} of {} failed: {words}", args.what(), args.domid);
            control.failed(&words);
        }
    }
    FAILED.into()
}

/// Listen to xenopsd and to signals; the stream.
fn begin(args: &Args, control: &Arc<Control>) -> anyhow::Result<std::os::fd::OwnedFd> {
    let ending = EndingSignals::of_process()?;
    let mut signals = ending.set();
    // A signal that is blocked arrives even where it is ignored.
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
