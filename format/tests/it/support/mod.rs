//! What the tests of the libxc stream share: a builder of streams that owes nothing
//! to the crate's own writer, and drivers that reduce what a reader says to values
//! that can be compared.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "each test binary uses a part of this; a test fails by panicking"
)]

pub(crate) mod build;
pub(crate) mod drive;
pub(crate) mod images;
pub(crate) mod mapped;
pub(crate) mod mutate;
