//! Test support for code that uses a connection: a connection in memory with faults at every call
//! and a clock of its own, and the contract that every implementation of
//! [`Connection`](super::connection::Connection) passes.
//!
//! Nothing here waits for real time to pass, unless a test cancels a call from another thread.

mod contract;
mod fake;

pub use contract::{Pair, contract};
pub use fake::{FakeConnection, Fault, Faulty};
