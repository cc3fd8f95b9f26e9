//! Test support: the contract of every [`Storage`](super::Storage), and a storage that fails on
//! request.

mod contract;
mod fake;

pub use contract::{Broken, run};
pub use fake::{FakeStorage, Fault};
