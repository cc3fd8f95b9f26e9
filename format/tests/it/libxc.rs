//! Tests of the libxc stream: rules, order, badly behaved sources, agreement of the readers.

mod misplaced;
mod order;
mod property;
mod review;
mod round_trip;
mod rules;
mod sources;
