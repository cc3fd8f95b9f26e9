//! The command `xsr-save-helper`: stands in for Xen's `libxl-save-helper`, so that
//! an unmodified `xl save`, `xl restore`, `xl migrate` or libvirt uses our engine:
//!
//! ```text
//! LIBXL_SAVE_HELPER=/usr/bin/xsr-save-helper xl save …
//! ```
//!
//! libxl starts it, hands it the descriptor of the stream, and answers its questions
//! over two pipes. It is of no use to people.
//!
//! C implementation: `tools/libs/light/libxl_save_helper.c`.

#![forbid(unsafe_code)]

mod args;
mod environment;
mod job;
mod log;
mod progress;
mod signals;
mod toolstack;
mod wire;

use std::process::ExitCode;
use std::sync::Arc;

use crate::args::Args;
use crate::job::Outcome;
use crate::wire::{Lost, Wire};

/// What `exit(-1)` is to a parent: the helper cannot do its work at all.
const FAILED: u8 = 255;
/// Names the file to make (`cli/src/xl/child.rs`).
const BEGAN: &str = "XSR_HELPER_BEGAN";
/// What `exit(-2)` is: libxl has gone away.
const NO_REPLY: u8 = 254;

fn main() -> ExitCode {
    announce();
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            log::say(format_args!("{error}\n{}", args::USAGE));
            return FAILED.into();
        }
    };
    let wire = Arc::new(Wire::stdio());
    log::install(&wire);
    tracing::debug!("starting {}", args.what());
    match job::run(&args, &wire) {
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

/// Leave word that this helper has begun, where xsr has started xl and wants to know: what
/// xl does behind a helper must not be broken off.
fn announce() {
    if let Some(path) = std::env::var_os(BEGAN)
        && let Err(error) = std::fs::write(&path, [])
    {
        log::say(format_args!("{}: {error}", path.display()));
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
