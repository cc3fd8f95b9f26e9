//! Two hosts: what a sender and a receiver say to each other, and over what.
//!
//! - [`messages`]: every byte that either end says, for a plain migration, Remus and COLO.

pub mod messages;
