//! Two hosts: what a sender and a receiver say to each other, and over what.
//!
//! - [`messages`]: every byte that either end says, for a plain migration, Remus and COLO.
//! - [`connection`]: what they say it over, as a trait; pipes, Unix sockets and TCP.
//! - [`testing`]: a connection in memory with faults at every call, and the contract that every
//!   connection keeps.

pub mod connection;
pub mod messages;
#[doc(hidden)]
pub mod testing;
