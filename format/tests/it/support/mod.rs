//! Shared parts of the tests of the libxc stream: a builder of streams that is independent of the
//! crate's own writer, and drivers that reduce a reader's results to comparable values.

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
