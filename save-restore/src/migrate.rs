//! Two hosts: what a sender and a receiver say to each other, and over what.
//!
//! - [`messages`]: every byte that either end says, for a plain migration, Remus and COLO.
//! - [`connection`]: what they say it over, as a trait; pipes, Unix sockets and TCP.
//! - [`ownership`]: which host has the domain, at each moment and after each failure, as state
//!   machines that a test explores exhaustively.
//! - [`testing`]: a connection in memory with faults at every call, and the contract that every
//!   connection keeps.

pub mod connection;
pub mod messages;
pub mod ownership;
#[doc(hidden)]
pub mod testing;
