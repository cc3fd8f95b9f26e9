//! The program `xsr-save-helper`: stands in for Xen's `libxl-save-helper`, so that
//! an unmodified `xl save`, `xl restore`, `xl migrate` or libvirt uses our engine:
//!
//! ```text
//! LIBXL_SAVE_HELPER=/usr/bin/xsr-save-helper xl save …
//! ```
//!
//! libxl starts it, hands it the descriptor of the stream, and answers its questions
//! over two pipes. People have no use for it.
//!
//! A package of its own, so that cargo keeps everything out of it that a Xen host does not
//! need: the mock machine first of all. Tests run `xsr-save-helper-mock`, which the feature
//! `test-backend` adds.
//!
//! C implementation: `tools/libs/light/libxl_save_helper.c`.

#![forbid(unsafe_code)]

mod args;
mod backend;
mod environment;
mod job;
mod log;
#[cfg(feature = "test-backend")]
mod mock;
mod progress;
mod signals;
mod toolstack;
mod wire;

use std::fs::File;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use crate::args::{Args, Asked};
use crate::backend::Backend;
use crate::job::Outcome;
use crate::wire::{Lost, Wire};

/// What `exit(-1)` is to a parent: the helper cannot do its work at all.
const FAILED: u8 = 255;
/// Names the file to make when it begins (`cli/src/xl/child.rs`).
const BEGAN: &str = "XSR_HELPER_BEGAN";
/// What `exit(-2)` is: libxl has gone away.
const NO_REPLY: u8 = 254;

/// Do what libxl asks, on the Xen of this machine.
#[must_use]
pub fn main() -> ExitCode {
    run(backend::open)
}

/// Do what libxl asks, on the mock machine that the environment names.
#[cfg(feature = "test-backend")]
#[must_use]
pub fn main_on_mock() -> ExitCode {
    run(mock::open)
}

fn run(open: fn() -> anyhow::Result<Box<dyn Backend>>) -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(Asked::Of(args)) => args,
        Ok(Asked::Say(text)) => return say(&text),
        Err(error) => {
            log::say(format_args!("{error}\n{}", args::USAGE));
            return FAILED.into();
        }
    };
    announce();
    let wire = Arc::new(Wire::stdio());
    log::install(&wire);
    tracing::debug!("starting {}", args.what());
    match job::run(&args, &wire, open) {
        Ok(outcome) => complete(&wire, &outcome),
        Err(error) => tracing::error!("{}", job::words(&error)),
    }
    match wire.lost() {
        Some(Lost::Reply) => NO_REPLY.into(),
        Some(Lost::Request) => FAILED.into(),
        None if wire.is_complete() => ExitCode::SUCCESS,
        None => FAILED.into(),
    }
}

/// Print what a person has asked for.
fn say(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tell the `xsr` that started xl that a helper has begun: what xl does after a helper has
/// ended must not be broken off. The file is new: one that exists is never touched.
fn announce() {
    if let Some(path) = std::env::var_os(BEGAN)
        && let Err(error) = File::create_new(&path)
        // A second helper of the same xl.
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        log::say(format_args!("{BEGAN}: {}: {error}", path.display()));
    }
}

/// Tell libxl how it ended. It has been told why before.
fn complete(wire: &Wire, outcome: &Outcome) {
    tracing::debug!("complete r={} errno={}", outcome.retval, outcome.errno);
    if let Err(error) = wire.complete(outcome.retval, outcome.errno) {
        // `Wire::lost` has it, and with it the exit code.
        log::say(error);
    }
}
