//! The chunks of one direction, from the process that writes them to their acknowledgement.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::frame::{CHUNK, CHUNKS, Malformed, WINDOW};

/// What the process may have in transit at first, in bytes.
const AT_FIRST: u64 = 2 << 20;

/// By how much that grows at a time.
const STEP: u64 = 1 << 20;

/// The contents of a chunk in this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// At most [`CHUNK`] bytes.
    Bytes(Vec<u8>),
    /// The end of the stream.
    End,
}

impl Piece {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::End => 0,
        }
    }
}

/// A link, for as long as the session exists: never used again for another one.
pub(super) type LinkId = u64;

/// A chunk that the peer has not read completely.
#[derive(Debug)]
struct Sent {
    /// Until the peer has acknowledged its arrival, or it is discarded.
    piece: Option<Arc<Piece>>,
    length: usize,
    /// The link that has taken it.
    on: Option<LinkId>,
}

/// The chunks that this end sends.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The beginning of the next chunk.
    filling: Vec<u8>,
    /// Chunks from `first` on.
    chunks: VecDeque<Sent>,
    /// The first chunk that the peer has not read completely.
    first: u64,
    /// The first chunk whose arrival is not acknowledged.
    received: u64,
    /// Chunks that no link has taken.
    waiting: BTreeSet<u64>,
    /// Bytes in `filling` and `chunks`.
    held: u64,
    /// The most that this end has in transit, in bytes.
    most: u64,
    /// The peer's window in bytes.
    window: u64,
    /// How much of it is used.
    used: u64,
    ended: bool,
    discarded: bool,
}

impl Outgoing {
    /// At most so many bytes are in transit, whatever window the peer has.
    pub(super) fn new(most: u64) -> Self {
        let most = most.clamp(CHUNK as u64, WINDOW);
        Self {
            filling: Vec::new(),
            chunks: VecDeque::new(),
            first: 0,
            received: 0,
            waiting: BTreeSet::new(),
            held: 0,
            most,
            window: AT_FIRST.min(most),
            used: AT_FIRST.min(most),
            ended: false,
            discarded: false,
        }
    }

    /// The peer's window: at least a chunk, and no more than this end uses.
    pub(super) fn set_window(&mut self, window: u64) {
        self.window = window.clamp(CHUNK as u64, self.most);
        self.used = self.used.min(self.window);
    }

    /// Whether the process has written the end.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The number of the next chunk.
    fn next(&self) -> u64 {
        self.first + self.chunks.len() as u64
    }

    /// How many bytes the process may write now.
    pub(super) fn room(&self) -> usize {
        if self.ended || self.discarded || self.chunks.len() as u64 >= CHUNKS - 2 {
            return 0;
        }
        usize::try_from(self.used.saturating_sub(self.held)).unwrap_or(usize::MAX)
    }

    /// Takes bytes of the process, as many as there is room for.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        let mut rest = &bytes[..taken];
        while !rest.is_empty() {
            let step = rest.len().min(CHUNK - self.filling.len());
            self.filling.extend_from_slice(&rest[..step]);
            rest = &rest[step..];
            if self.filling.len() == CHUNK {
                self.seal();
            }
        }
        self.held += taken as u64;
        taken
    }

    /// Takes the end of the stream. A second call does nothing.
    pub(super) fn end(&mut self) {
        if !self.ended {
            self.seal();
            self.ended = true;
            self.append(Piece::End);
        }
    }

    /// Makes a chunk of what was written last.
    fn seal(&mut self) {
        if !self.filling.is_empty() {
            let bytes = std::mem::take(&mut self.filling);
            self.append(Piece::Bytes(bytes));
        }
    }

    fn append(&mut self, piece: Piece) {
        let number = self.next();
        self.chunks.push_back(Sent {
            length: piece.len(),
            piece: (!self.discarded).then(|| Arc::new(piece)),
            on: None,
        });
        if !self.discarded {
            self.waiting.insert(number);
        }
    }

    /// Whether a link has something to send.
    pub(super) fn is_waiting(&self) -> bool {
        let some = !self.waiting.is_empty() || !self.filling.is_empty();
        some && !self.discarded
    }

    /// The next chunk for a link.
    pub(super) fn take(&mut self, link: LinkId) -> Option<(u64, Arc<Piece>)> {
        if self.waiting.is_empty() {
            self.seal();
        }
        let number = self.waiting.pop_first()?;
        let sent = self.chunk(number)?;
        sent.on = Some(link);
        let piece = sent.piece.clone()?;
        Some((number, piece))
    }

    fn chunk(&mut self, number: u64) -> Option<&mut Sent> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.chunks.get_mut(index)
    }

    /// The peer has acknowledged chunks. An acknowledgement that is older than another one has no
    /// effect, because they may travel on different links. Returns whether there is news.
    pub(super) fn acknowledged(&mut self, received: u64, read: u64) -> Result<bool, Malformed> {
        if received > self.next() {
            return Err(Malformed::NotSent(received));
        }
        if read > received {
            return Err(Malformed::NotSent(read));
        }
        let before = (self.received, self.first);
        while self.received < received {
            let number = self.received;
            self.received += 1;
            self.waiting.remove(&number);
            if let Some(sent) = self.chunk(number) {
                sent.piece = None;
                sent.on = None;
            }
        }
        while self.first < read {
            let Some(sent) = self.chunks.pop_front() else {
                break;
            };
            self.first += 1;
            self.held -= sent.length as u64;
        }
        Ok(before != (self.received, self.first))
    }

    /// A link is lost: what it had taken and the peer has not acknowledged waits for another link,
    /// if anything may be sent again.
    pub(super) fn lost(&mut self, link: LinkId, again: bool) {
        for number in self.received..self.next() {
            let Some(sent) = self.chunk(number).filter(|sent| sent.on == Some(link)) else {
                continue;
            };
            sent.on = None;
            if again && sent.piece.is_some() {
                self.waiting.insert(number);
            }
        }
    }

    /// The number of chunks that have not arrived at the peer's end of the session and are to.
    pub(super) fn unarrived(&self) -> u64 {
        match self.discarded {
            true => 0,
            false => self.next() - self.received + u64::from(!self.filling.is_empty()),
        }
    }

    /// Whether all that was written has arrived at the peer's end of the session.
    pub(super) fn has_arrived(&self) -> bool {
        self.filling.is_empty() && self.received == self.next()
    }

    /// Whether the peer's process has read all that was written.
    pub(super) fn is_read(&self) -> bool {
        self.filling.is_empty() && self.chunks.is_empty()
    }

    /// Nothing that no link has taken is sent any more, and nothing is sent again.
    pub(super) fn discard(&mut self) {
        self.discarded = true;
        self.waiting.clear();
        self.filling = Vec::new();
        for sent in &mut self.chunks {
            sent.piece = None;
        }
    }

    /// Uses more of the peer's window, if the network holds the process up: there is no room, and
    /// all that was written is on its way and has not arrived.
    pub(super) fn grow(&mut self) {
        let on_its_way = !self.is_waiting() && self.received < self.next();
        if self.used < self.window && self.room() == 0 && on_its_way {
            self.used = self.window.min(self.used + STEP);
        }
    }
}

#[cfg(test)]
#[path = "outgoing/tests.rs"]
mod tests;
