//! Worker threads that write page data into guest memory, with the help of the thread that reads
//! the stream.
//!
//! Pieces are numbered as they come. At most [`IN_FLIGHT`] bytes of them are in flight. A piece
//! that names the same page as another piece in flight waits until the other is in place: if a page
//! comes twice, the later version must stay, although nothing in the stream says where a pass over
//! memory ends. When no more pieces may be in flight, the reading thread places one itself.
//!
//! If bytes come in order and pages are mapped, the reading thread reads straight into the mapping,
//! and there are no pieces: the workers only unmap.
//!
//! The reported error is the first one in the order of the stream: whichever piece fails, those
//! before it are placed and checked.

use std::cmp;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_xen_backend::ForeignPages;

use crate::error::RestoreError;
use crate::restore::place::{Contents, Piece, Placer};

/// Bytes of pieces in flight: read, or mapped, or to be read from a file. In addition, one piece is
/// being read, and each thread that reads from a file has a buffer for one.
const IN_FLIGHT: usize = 16 << 20;

/// Pages of a piece that is written: few enough for a processor's cache.
const PIECE_WRITTEN: usize = 256;

/// Pages of a piece that is mapped: as many as a record of Xen's, since mappings are expensive.
const PIECE_MAPPED: usize = 1024;

/// The most mappings that wait for a worker to unmap them.
const UNMAPPING: usize = 4;

/// A piece in flight.
struct UnderWay {
    number: u64,
    /// Its pages, ascending.
    pfns: Vec<Pfn>,
}

#[derive(Default)]
struct State {
    /// Number of pieces so far.
    count: u64,
    /// Pieces that wait to be placed.
    waiting: VecDeque<(u64, Piece)>,
    /// Pieces that wait, and pieces that are being placed.
    under_way: Vec<UnderWay>,
    /// The first piece, in the order of the stream, that could not be placed, and why.
    failed: Option<(u64, RestoreError)>,
    /// Buffers that are not in use.
    spare: Vec<Vec<u8>>,
}

/// The pieces and their state.
pub(super) struct Crew<'r> {
    pub(super) placer: Placer<'r>,
    /// Mappings that are waiting to be unmapped.
    unmapping: AtomicUsize,
    state: Mutex<State>,
    /// A piece is no longer in flight.
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

    /// The most pages of a piece.
    pub(super) fn piece_pages(&self) -> usize {
        match self.placer.writes() {
            true => PIECE_WRITTEN,
            false => PIECE_MAPPED,
        }
    }

    /// The most pieces in flight.
    pub(super) fn window(&self) -> usize {
        IN_FLIGHT / (self.piece_pages() * PAGE_SIZE)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No thread panics in the middle of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `bytes`, with arbitrary contents.
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
        // Pieces after a failure are not needed.
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

    /// Places a waiting piece, if there is one.
    fn work(&self) {
        let first = self.lock().waiting.pop_front();
        if let Some((number, piece)) = first {
            self.place_numbered(number, piece);
        }
    }

    /// Places a waiting piece, or waits until other threads have placed one.
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

    /// Waits until all pieces so far are placed.
    ///
    /// # Errors
    ///
    /// The first failure in the order of the stream; it is returned only once.
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

/// Marks a piece as no longer in flight when dropped, whatever became of it.
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

/// The crew from the reading thread's view.
pub(super) struct Hands<'a, 'scope> {
    pub(super) crew: &'scope Crew<'scope>,
    /// The scope of the worker threads, if there are any.
    pub(super) scope: Option<&'a rayon::Scope<'scope>>,
}

impl Hands<'_, '_> {
    /// Whether there are worker threads.
    pub(super) fn many(&self) -> bool {
        self.scope.is_some()
    }

    /// Places a piece, now or later.
    ///
    /// # Errors
    ///
    /// The failure of this piece, or of the first one before it that failed.
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
    /// Unmaps pages that are no longer needed, on a worker thread if one keeps up.
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
