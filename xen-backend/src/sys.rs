//! Xen's structures and numbers, from its public headers: what is the same in all
//! versions in `common`, what differs in one module for each domctl interface version.
//!
//! `cargo xtask bindings` makes the files below; the compiler checks every size and
//! offset in them, and a test here compares them with the headers where those are
//! installed.

#![allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    dead_code,
    clippy::unnecessary_operation,
    clippy::identity_op,
    reason = "the names are Xen's, and a new version brings what nothing uses yet"
)]

pub(crate) mod common;
pub(crate) mod v12;
pub(crate) mod v13;
pub(crate) mod v14;
pub(crate) mod v15;
pub(crate) mod v16;
pub(crate) mod v17;
pub(crate) mod v18;

#[cfg(test)]
mod tests;
