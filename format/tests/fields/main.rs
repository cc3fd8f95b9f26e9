//! Blobs as named fields: against the compiler's offsets, against real images, and
//! with octets that nobody meant.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test fails by panicking"
)]

mod context;
mod cpu_policy;
mod differences;
#[path = "../support/images.rs"]
#[allow(dead_code, reason = "shared with tests that need all of it")]
mod images;
mod layouts;
mod offsets;
mod real;
