//! Tests of the wrappers around a libxc stream: the xl header, the libxl stream, and format
//! detection.

mod detect;
mod failure;
mod libxl;
mod libxl_rules;
mod xapi;
mod xl;

use std::io::{self, Read};

use crate::support::images::{self, Image};

use xsr_format::read::ReadOptions;

const STRICT: ReadOptions = ReadOptions {
    lenient: false,
    offset: 0,
};
const LENIENT: ReadOptions = ReadOptions {
    lenient: true,
    offset: 0,
};

/// A source that counts the bytes taken and requested, and returns one byte at a time with
/// occasional interruptions.
#[derive(Debug)]
struct Counting<'a> {
    bytes: &'a [u8],
    taken: usize,
    /// The farthest byte that fitted in any read's buffer.
    asked: usize,
    calls: usize,
}

impl<'a> Counting<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            taken: 0,
            asked: 0,
            calls: 0,
        }
    }
}

impl Read for Counting<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.calls += 1;
        if self.calls.is_multiple_of(7) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.asked = self.asked.max(self.taken + room.len());
        match (room.first_mut(), self.bytes.get(self.taken)) {
            (Some(to), Some(from)) => {
                *to = *from;
                self.taken += 1;
                Ok(1)
            }
            _ => Ok(0),
        }
    }
}

/// A source that fails.
#[derive(Debug)]
struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// All available images.
fn all_images() -> impl Iterator<Item = Image> {
    let shared = images::shared();
    let shared = shared.into_iter().map(|path| images::load(&path));
    images::committed().into_iter().chain(shared)
}
