//! Blobs as named fields: against the compiler's offsets, against real images, and
//! with bytes that nobody meant.

mod context;
mod cpu_policy;
mod differences;
mod layouts;
mod offsets;
mod real;
