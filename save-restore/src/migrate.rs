//! Migration: the protocol between two hosts, and which of them has the domain.
//!
//! - [`send`], [`receive`]: a migration from beginning to end. The caller provides a connection and
//!   a domain.
//! - [`ownership`]: which host has the domain, at each moment and after each failure, as state
//!   machines that a test explores exhaustively. `send` and `receive` carry out their actions.
//! - [`protect`], [`standby`]: the same for a domain that is protected by another host, under Remus
//!   and COLO. [`checkpoints`]: the checkpoints that are sent meanwhile.
//! - [`Observer`]: a trait for showing the progress of a migration.
//! - [`messages`]: every byte that the two ends exchange, for a plain migration, Remus and COLO.
//! - [`connection`]: the connection between them, as a trait; pipes, Unix sockets and TCP.
//! - `session`: a connection over several links, which may break and return (with the cargo feature
//!   `session`).
//! - [`testing`]: a connection in memory with faults at every call, and the contract that every
//!   connection must keep.
//!
//! `examples/migrate.rs` is a toolstack that migrates a domain between two mock machines.

pub mod checkpoints;
pub mod connection;
mod drive;
pub mod messages;
mod observe;
pub mod ownership;
pub mod protect;
pub mod receive;
pub mod send;
#[cfg(feature = "session")]
pub mod session;
pub mod standby;
#[doc(hidden)]
pub mod testing;

pub use drive::{BoxError, Cause};
pub use observe::{Event, Observer, Step};

#[cfg(test)]
mod tests;
