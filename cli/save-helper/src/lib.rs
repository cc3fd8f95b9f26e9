//! The program `xsr-save-helper`: replaces Xen's `libxl-save-helper`, so that an unmodified
//! `xl save`, `xl restore`, `xl migrate` or libvirt uses our engine:
//!
//! ```text
//! LIBXL_SAVE_HELPER=/usr/bin/xsr-save-helper xl save …
//! ```
//!
//! libxl starts it, hands it the descriptor of the stream, and answers its questions over two
//! pipes. It is of no use to a person.
//!
//! It is a package of its own so that cargo leaves out what a Xen host does not need, above all the
//! mock machine. Tests run `xsr-save-helper-mock`, which the feature `test-backend` adds.
//!
//! C implementation: `tools/libs/light/libxl_save_helper.c`.

#![forbid(unsafe_code)]

mod args;
mod at_freeze;
mod backend;
mod environment;
mod job;
mod log;
mod mapped;
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

/// The exit code of `exit(-1)`: the helper could not work at all.
const FAILED: u8 = 255;
/// Names the file to create at the start (`cli/src/xl/child.rs`).
const BEGAN: &str = "XSR_HELPER_BEGAN";
/// The exit code of `exit(-2)`: libxl is gone.
const NO_REPLY: u8 = 254;

/// Do libxl's job on Xen.
#[must_use]
pub fn main() -> ExitCode {
    run(backend::open)
}

/// Do libxl's job on the mock machine that the environment names.
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
        Err(error) => tracing::error!("{error:#}"),
    }
    match wire.lost() {
        Some(Lost::Reply) => NO_REPLY.into(),
        Some(Lost::Request) => FAILED.into(),
        None if wire.is_complete() => ExitCode::SUCCESS,
        None => FAILED.into(),
    }
}

/// Print the text that the user asked for.
fn say(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tell the `xsr` that started xl that a helper has begun: xl's work after a helper must not be
/// interrupted. The file is new: an existing file is never touched.
fn announce() {
    if let Some(path) = std::env::var_os(BEGAN)
        && let Err(error) = File::create_new(&path)
        // Created by an earlier helper of the same xl.
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        log::say(format_args!("{BEGAN}: {}: {error}", path.display()));
    }
}

/// Tell libxl the result. The reason has been logged before.
fn complete(wire: &Wire, outcome: &Outcome) {
    tracing::debug!("complete r={} errno={}", outcome.retval, outcome.errno);
    if let Err(error) = wire.complete(outcome.retval, outcome.errno) {
        // `Wire::lost` keeps this error and decides the exit code.
        log::say(error);
    }
}
