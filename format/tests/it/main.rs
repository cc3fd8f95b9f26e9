//! Tests of the library against real images, built streams and other programs. One binary, so that
//! it is linked only once.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod fields;
mod libxc;
mod mapped;
mod peer_convert;
mod peer_verify;
mod rewrite;
mod support;
mod survey;
mod truncation;
mod walk;
mod wrappers;
