//! The commands, run as users run them: one binary, so that they are linked once.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod bare;
mod beside;
mod bounds;
mod checkpoint;
mod colo;
mod common;
mod convert;
mod cpu;
mod direct;
mod domains;
mod foreign;
mod golden;
mod handshake;
mod images;
mod json;
mod legacy;
mod mapped;
mod mapped_header;
mod migrate;
mod network;
mod onto;
mod outputs;
mod packed;
mod peer;
mod plan;
mod progress;
mod remus;
mod rework;
mod session;
mod shown;
mod signals;
mod suspend;
mod terminal;
mod through_xl;
mod tunnel;
mod verdict;
