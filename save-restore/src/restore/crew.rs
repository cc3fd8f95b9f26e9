//! Who places the pieces of a guest's memory: the thread that reads the stream, and
//! others beside it.
//!
//! Pieces are numbered as they come. At most [`IN_FLIGHT`] bytes of them are on their
//! way at a time. One that names a page which another on its way names, too, waits until
//! that is in place: of a page that comes twice the later version stays, though nothing
//! in the stream says where a pass over memory ends. Where no more may be on their way,
//! the reading thread places one itself.
//!
//! Where bytes come in order and pages are mapped, the reading thread reads straight into
//! the mapping, and there are no pieces: the others only unmap.
//!
//! What goes wrong first in the order of the stream is what counts: whichever piece
//! fails, those before it are placed, and are asked.

use std::cmp;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_xen_backend::ForeignPages;

use crate::error::RestoreError;
use crate::restore::place::{Contents, Piece, Placer};

/// Bytes of pieces that are on their way at a time: read, or mapped, or to be read from
/// a file. Besides, one piece is being read, and each thread that reads from a file has
/// a buffer for one.
const IN_FLIGHT: usize = 16 << 20;

/// Pages of a piece that is written: small enough for a processor's cache.
const PIECE_WRITTEN: usize = 256;

/// Pages of a piece that is mapped: as many as a record of Xen's, since mappings are
/// costly.
const PIECE_MAPPED: usize = 1024;

/// Mappings that wait to be unmapped by others, at most.
const UNMAPPING: usize = 4;

/// A piece on its way.
struct UnderWay {
    number: u64,
    /// Its pages, ascending.
    pfns: Vec<Pfn>,
}

#[derive(Default)]
struct State {
    /// Pieces that came so far.
    count: u64,
    /// Pieces that nobody has begun to place.
    waiting: VecDeque<(u64, Piece)>,
    /// Those, and those that somebody is placing.
    under_way: Vec<UnderWay>,
    /// The first, in the order of the stream, that could not be placed, and why.
    failed: Option<(u64, RestoreError)>,
    /// Buffers that are not in use.
    spare: Vec<Vec<u8>>,
}

/// The pieces, and what is known of them.
pub(super) struct Crew<'r> {
    pub(super) placer: Placer<'r>,
    /// Mappings that are done with, on their way to being unmapped.
    unmapping: AtomicUsize,
    state: Mutex<State>,
    /// A piece is no longer on its way.
    placed: Condvar,
}

impl<'r> Crew<'r> {
    pub(super) fn new(placer: Placer<'r>) -> Self {
        Self {
            placer,
            unmapping: AtomicUsize::new(0),
            state: Mutex::default(),
            placed: Condvar::new(),
        }
    }

    /// Most pages of a piece.
    pub(super) fn piece_pages(&self) -> usize {
        match self.placer.writes() {
            true => PIECE_WRITTEN,
            false => PIECE_MAPPED,
        }
    }

    /// Pieces that may be on their way at a time.
    pub(super) fn window(&self) -> usize {
        IN_FLIGHT / (self.piece_pages() * PAGE_SIZE)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `bytes`, with anything in it.
    pub(super) fn buffer(&self, bytes: usize) -> Vec<u8> {
        let mut buffer = self.lock().spare.pop().unwrap_or_default();
        buffer.resize(bytes, 0);
        buffer
    }

    fn place_now(&self, mut piece: Piece) -> Result<(), RestoreError> {
        let mut buffer = match &piece.contents {
            Contents::Bytes(_) => Vec::new(),
            Contents::Extent(_) => self.buffer(0),
        };
        let result = self.placer.place(&mut piece, &mut buffer);
        if let Contents::Bytes(bytes) = piece.contents {
            buffer = bytes;
        }
        self.lock().spare.push(buffer);
        result
    }

    fn place_numbered(&self, number: u64, piece: Piece) {
        let _done = Done { crew: self, number };
        let comes_later = |failed: &Option<(u64, RestoreError)>| {
            failed.as_ref().is_some_and(|(first, _)| *first < number)
        };
        // Nobody will ask for what is behind a failure.
        if comes_later(&self.lock().failed) {
            return;
        }
        if let Err(error) = self.place_now(piece) {
            let mut state = self.lock();
            if !comes_later(&state.failed) {
                state.failed = Some((number, error));
            }
        }
    }

    /// Place a piece that waits, if there is one.
    fn work(&self) {
        let first = self.lock().waiting.pop_front();
        if let Some((number, piece)) = first {
            self.place_numbered(number, piece);
        }
    }

    /// Do something for pieces to get on, or wait until others have.
    fn help<'s>(&'s self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        match state.waiting.pop_front() {
            Some((number, piece)) => {
                drop(state);
                self.place_numbered(number, piece);
                self.lock()
            }
            None => self
                .placed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Have every piece placed that has come so far.
    ///
    /// # Errors
    ///
    /// Why the first one, in the order of the stream, could not be: said once.
    pub(super) fn finish(&self) -> Result<(), RestoreError> {
        let mut state = self.lock();
        while !state.under_way.is_empty() {
            state = self.help(state);
        }
        match state.failed.take() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

/// A piece that is no longer on its way once this drops, whatever became of it.
struct Done<'a, 'r> {
    crew: &'a Crew<'r>,
    number: u64,
}

impl Drop for Done<'_, '_> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        state.under_way.retain(|piece| piece.number != self.number);
        self.crew.placed.notify_all();
    }
}

/// The crew as the reading thread has it.
pub(super) struct Hands<'a, 'scope> {
    pub(super) crew: &'scope Crew<'scope>,
    /// Where the other threads are; `None` where there is no other.
    pub(super) scope: Option<&'a rayon::Scope<'scope>>,
}

impl Hands<'_, '_> {
    /// Whether there are other threads.
    pub(super) fn many(&self) -> bool {
        self.scope.is_some()
    }

    /// Have a piece placed, now or soon.
    ///
    /// # Errors
    ///
    /// Why this piece, or the first of those before it, could not be.
    pub(super) fn submit(&self, piece: Piece) -> Result<(), RestoreError> {
        let crew = self.crew;
        let Some(scope) = self.scope else {
            return crew.place_now(piece);
        };
        let mut pfns: Vec<Pfn> = piece.entries.iter().map(|entry| entry.pfn).collect();
        pfns.sort_unstable();
        let mut state = crew.lock();
        loop {
            if state.failed.is_some() {
                drop(state);
                return crew.finish();
            }
            let shared = || {
                state
                    .under_way
                    .iter()
                    .any(|piece| share(&piece.pfns, &pfns))
            };
            if state.under_way.len() < crew.window() && !shared() {
                break;
            }
            state = crew.help(state);
        }
        let number = state.count;
        state.count += 1;
        state.under_way.push(UnderWay { number, pfns });
        state.waiting.push_back((number, piece));
        drop(state);
        scope.spawn(|_| crew.work());
        Ok(())
    }
}

impl<'scope> Hands<'_, 'scope> {
    /// Unmap pages that are done with, on another thread where there is one that keeps up.
    pub(super) fn unmap(&self, pages: ForeignPages) {
        let crew = self.crew;
        let Some(scope) = self.scope else {
            return drop(pages);
        };
        if crew.unmapping.fetch_add(1, Ordering::Relaxed) < UNMAPPING {
            scope.spawn(move |_| {
                drop(pages);
                crew.unmapping.fetch_sub(1, Ordering::Relaxed);
            });
        } else {
            crew.unmapping.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether two ascending lists have a page in common.
fn share(one: &[Pfn], other: &[Pfn]) -> bool {
    let apart = |one: &[Pfn], other: &[Pfn]| one.last() < other.first();
    if apart(one, other) || apart(other, one) {
        return false;
    }
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        match a.cmp(b) {
            cmp::Ordering::Less => one.next(),
            cmp::Ordering::Greater => other.next(),
            cmp::Ordering::Equal => return true,
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_share_what_is_in_both() {
        let pfns = |list: &[u64]| list.iter().copied().map(Pfn).collect::<Vec<_>>();
        for (one, other, expected) in [
            (&[][..], &[][..], false),
            (&[1], &[], false),
            (&[1, 2, 3], &[4, 5], false),
            (&[1, 3, 5], &[2, 4, 6], false),
            (&[1, 3, 5], &[2, 4, 5], true),
            (&[1, 1, 9], &[0, 9], true),
            (&[7], &[7], true),
        ] {
            let (one, other) = (pfns(one), pfns(other));
            assert_eq!(share(&one, &other), expected, "{one:?} {other:?}");
            assert_eq!(share(&other, &one), expected, "{other:?} {one:?}");
        }
    }
}
