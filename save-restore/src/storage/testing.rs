//! For tests: what every [`Storage`](super::Storage) must do, and a storage that fails when it
//! is told to.

mod contract;
mod fake;

pub use contract::{Broken, run};
pub use fake::{FakeStorage, Fault};
