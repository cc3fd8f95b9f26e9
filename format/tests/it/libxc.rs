//! The libxc stream: rules, order, sources of every temper, agreement of the readers.

mod misplaced;
mod order;
mod property;
mod review;
mod round_trip;
mod rules;
mod sources;
