//! The chunks of the other direction, from their arrival to the process that reads them.

use std::collections::{BTreeMap, VecDeque};

use super::frame::{CHUNKS, Malformed, WINDOW};
use super::outgoing::{LinkId, Piece};

/// The chunks that this end receives.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// The first chunk that has not arrived.
    expected: u64,
    /// The first chunk that the process has not read completely.
    read: u64,
    /// Chunks behind the first one that has not arrived.
    early: BTreeMap<u64, Piece>,
    /// Chunks for the process.
    ready: VecDeque<Vec<u8>>,
    /// What the process has read of the first of them.
    at: usize,
    /// Bytes in `early` and `ready`.
    held: u64,
    /// The number of the chunk that is the end.
    end: Option<u64>,
    /// The link on which the last chunk came that was put into its place.
    from: Option<LinkId>,
}

impl Incoming {
    /// The first chunk that has not arrived, and the first that the process has not read
    /// completely.
    pub(super) fn acknowledgement(&self) -> (u64, u64) {
        (self.expected, self.read)
    }

    /// The link on which the newest chunk in order came.
    pub(super) fn newest_from(&self) -> Option<LinkId> {
        self.from
    }

    /// A chunk has arrived. Returns whether the process has more to read.
    pub(super) fn arrived(
        &mut self,
        number: u64,
        piece: Piece,
        link: LinkId,
    ) -> Result<bool, Malformed> {
        if number < self.expected || self.early.contains_key(&number) {
            return Ok(false);
        }
        if self.end.is_some_and(|end| number > end) {
            return Err(Malformed::AfterEnd(number));
        }
        let after_all = self
            .early
            .last_key_value()
            .is_none_or(|last| *last.0 < number);
        if piece == Piece::End && !after_all {
            return Err(Malformed::AfterEnd(number));
        }
        let held = self.held + piece.len() as u64;
        if number - self.read >= CHUNKS || held > WINDOW {
            return Err(Malformed::BeyondWindow(number));
        }
        if piece == Piece::End {
            self.end = Some(number);
        }
        self.held = held;
        self.early.insert(number, piece);
        let before = self.expected;
        while let Some(piece) = self.early.remove(&self.expected) {
            self.expected += 1;
            self.from = Some(link);
            match piece {
                Piece::Bytes(bytes) => self.ready.push_back(bytes),
                Piece::End => self.skip_end(),
            }
        }
        Ok(before != self.expected)
    }

    /// The end counts as read once all chunks before it are.
    fn skip_end(&mut self) {
        if self.is_over() {
            self.read = self.expected;
        }
    }

    /// Gives bytes to the process; 0 if none are there.
    pub(super) fn take(&mut self, room: &mut [u8]) -> usize {
        let mut taken = 0;
        while taken < room.len() {
            let Some(front) = self.ready.front() else {
                break;
            };
            let step = (front.len() - self.at).min(room.len() - taken);
            room[taken..taken + step].copy_from_slice(&front[self.at..self.at + step]);
            taken += step;
            self.at += step;
            if self.at == front.len() {
                self.held -= front.len() as u64;
                self.at = 0;
                self.read += 1;
                self.ready.pop_front();
                self.skip_end();
            }
        }
        taken
    }

    /// Copies the first bytes.
    pub(super) fn peek(&self, room: &mut [u8]) -> usize {
        let bytes = self.ready.iter().flatten().skip(self.at);
        let mut copied = 0;
        for (place, byte) in room.iter_mut().zip(bytes) {
            *place = *byte;
            copied += 1;
        }
        copied
    }

    /// Whether the process has read all, up to the end.
    pub(super) fn is_over(&self) -> bool {
        self.ready.is_empty() && self.has_end()
    }

    /// Whether everything up to the end has arrived.
    pub(super) fn has_end(&self) -> bool {
        self.end.is_some_and(|end| self.expected > end)
    }

    /// Whether bytes are here that the process has not read.
    pub(super) fn is_unread(&self) -> bool {
        !(self.ready.is_empty() && self.early.is_empty())
    }
}

#[cfg(test)]
#[path = "incoming/tests.rs"]
mod tests;
