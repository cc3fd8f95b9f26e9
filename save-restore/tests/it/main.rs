//! Tests of the engine against the mock machine: one binary, so that it is linked once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod balloon;
mod cancel;
mod checkpointed;
mod colo;
mod common;
mod cpu;
mod digest;
mod failures;
mod faults;
mod hypercalls;
mod live;
mod mapped;
mod matrix;
mod moving;
mod pipeline;
mod real_images;
mod round_trip;
mod schedules;
mod stored;
mod superpages;
mod survivor;
