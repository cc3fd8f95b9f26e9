//! Tests of blobs as named fields: against the compiler's offsets, on real images, and with
//! arbitrary bytes.

mod context;
mod cpu_policy;
mod differences;
mod layouts;
mod offsets;
mod real;
