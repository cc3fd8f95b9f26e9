//! The command `xsr`.
#![forbid(unsafe_code)]
fn main() {}
