//! The engine that saves and restores Xen domains.
//!
//! [`SaveRequest`] turns a domain into a libxc stream, [`RestoreRequest`] a libxc stream into a domain.
//! What differs between PV and translated guests is in `guest`; the callbacks that the engine needs
//! from its caller are in [`toolstack`].
//!
//! C implementation: `tools/libs/guest/xg_sr_*.c`.

#![forbid(unsafe_code)]

pub mod back_channel;
mod bitmap;
mod descriptor;
pub mod error;
mod guest;
pub mod inherited;
pub mod migrate;
pub mod pace;
mod pipeline;
pub mod progress;
pub mod restore;
pub mod save;
pub mod signals;
pub mod sink;
pub mod source;
pub mod storage;
pub mod text;
pub mod toolstack;

pub use error::{RestoreError, SaveError};
pub use restore::{CpuCheck, RestoreRequest, Restored, Rings};
pub use save::{Live, SaveOptions, SaveRequest, Saved};

// An example is a module of the tests, and names this package as any other user does.
#[cfg(test)]
extern crate self as xsr_save_restore;
