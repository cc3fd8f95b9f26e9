//! Migration: two hosts, what they say to each other, and which of them has the domain.
//!
//! - [`send`], [`receive`]: a migration from its beginning to its end. The caller brings a
//!   connection and a domain.
//! - [`ownership`]: which host has the domain, at each moment and after each failure, as state
//!   machines that a test explores exhaustively. `send` and `receive` do what they say.
//! - [`protect`], [`standby`]: the same for a domain that is kept at another host, under Remus and
//!   COLO. [`checkpoints`]: what is sent meanwhile.
//! - [`Observer`]: what hears of the course of a migration, to show it.
//! - [`messages`]: every byte that either end says, for a plain migration, Remus and COLO.
//! - [`connection`]: what they say it over, as a trait; pipes, Unix sockets and TCP.
//! - [`testing`]: a connection in memory with faults at every call, and the contract that every
//!   connection keeps.
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
pub mod standby;
#[doc(hidden)]
pub mod testing;

pub use drive::{BoxError, Cause};
pub use observe::{Event, Observer, Step};

#[cfg(test)]
mod tests;
