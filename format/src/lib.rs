//! The Xen domain save image format: conversion between bytes and typed values.
//!
//! Pure: `Read`, `Write` and slices; no files, no threads, no Xen calls.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

pub mod byte_order;
pub mod core_dump;
pub mod cpu_policy;
mod decoder;
pub mod detect;
pub mod error;
pub mod fields;
pub mod frame;
pub mod guest_image;
pub mod image;
pub mod layout;
pub mod legacy;
pub mod order;
pub mod read;
pub mod record;
pub mod slice;
mod source;
pub mod transcode;
pub mod walk;
pub mod wire;
pub mod wrapper;
pub mod write;
