//! Xen's structures and constants, from its public headers: `common` for those that are the same in
//! all versions, and one module for each domctl interface version.
//!
//! `cargo xtask bindings` generates these files. The compiler checks every size and offset in them,
//! and a test compares them with the headers if those are installed.

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
