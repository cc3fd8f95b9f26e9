//! The libxc stream: rules, order, sources of every temper, agreement of the readers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod misplaced;
mod order;
mod property;
mod review;
mod round_trip;
mod rules;
mod sources;
