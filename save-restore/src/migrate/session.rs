//! A session between two hosts: one [`Connection`] over several links, which may break and return.
//!
//! `docs/session.md` specifies what the two ends exchange, and by which rules the guarantees of
//! `docs/migration.md` hold over it.
//!
//! | file | what it holds |
//! |---|---|
//! | `frame.rs` | the bytes of a link |
//! | `outgoing.rs`, `incoming.rs` | the chunks of each direction: window, order, acknowledgement |
//! | `state.rs` | the links, what each sends next, and what ends the session |
//! | `wire.rs` | the transport of a link |
//! | `tls.rs`, `directory.rs` | TLS on a link: one-time keys, or a directory with certificates |
//! | `tcp.rs` | links over TCP |
//! | `compress.rs` | compression, and when it is worth its time |
//! | `link.rs` | the two threads of a link |
//! | `figures.rs` | what it has carried, and what limits it |
//! | `make.rs` | how the two ends make a session and take up a link again |

mod compress;
mod directory;
mod figures;
mod frame;
mod incoming;
mod link;
mod make;
mod outgoing;
mod state;
mod tcp;
mod tls;
mod wire;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use xsr_xen_backend::Gather;

use super::connection::{
    Connection, ConnectionError, Delivery, Peer, Received, Stage, Wait, copy_gather,
};
use crate::descriptor::Limit;
use crate::pace::Pace;
use crate::progress::Cancel;
pub use compress::Compression;
use compress::Policy;
pub use directory::KeyDirectory;
use figures::Carried;
pub use figures::{SessionFigures, SessionLimit, SessionMonitor};
pub use make::{Dial, Server, SessionError, SessionRequest};
use state::{LINGER, Over, State};
pub use tcp::{SessionListener, TcpDial};
pub use tls::{ClientTls, KeyError, OneTimeKey, ServerTls};
pub use wire::Wire;

/// How long a call waits before it looks at its limits again.
const LOOK: Duration = Duration::from_millis(20);

/// What all threads of a session share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something has changed for the process that reads and writes.
    process: Condvar,
    /// Something has changed for the links.
    links: Condvar,
    /// The session is dropped, and its threads end.
    dropped: AtomicBool,
    /// No more links are taken: an attempt to make one ends.
    closed: Cancel,
    made: Instant,
    policy: Policy,
    carried: Carried,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }

    fn wait<'s>(
        &self,
        on: &Condvar,
        state: MutexGuard<'s, State>,
        limit: Duration,
    ) -> MutexGuard<'s, State> {
        let waited = on.wait_timeout(state, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes every thread.
    fn wake(&self) {
        self.process.notify_all();
        self.links.notify_all();
    }
}

/// One end of a session.
///
/// Dropping it closes it in order, as long as the peer takes what was written: it waits 2 s for a
/// sign of that, and 30 s after "go", but 32 s at most in all. A session of which something was not
/// read is aborted once what was written has arrived.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    peer: Peer,
}

/// Why a call fails on a session that is over.
fn lost(over: &Over) -> ConnectionError {
    let why = match over {
        Over::Lost(why) => format!("no link of the session is left: {why}"),
        Over::Aborted => "the other end has discarded the session".to_owned(),
        Over::Malformed(malformed) => malformed.to_string(),
        Over::Closed => "the session is closed".to_owned(),
    };
    ConnectionError::Lost(io::Error::new(io::ErrorKind::ConnectionReset, why))
}

impl Session {
    /// Waits until something changes, no longer than the limit of the call.
    fn pause<'s>(
        &self,
        state: MutexGuard<'s, State>,
        limit: &Limit<'_>,
        wait: &Wait<'_>,
        writing: bool,
    ) -> Result<MutexGuard<'s, State>, ConnectionError> {
        let now = Instant::now();
        let due = limit.ends(limit.began, writing);
        let left = due.map_or(LOOK, |due| due.saturating_duration_since(now));
        if left.is_zero() {
            return Err(ConnectionError::TimedOut(limit.reached(writing)));
        }
        let state = self
            .shared
            .wait(&self.shared.process, state, left.min(LOOK));
        wait.check()?;
        Ok(state)
    }
}

impl Connection for Session {
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        if room.is_empty() {
            return Ok(Received::Bytes(0));
        }
        wait.check()?;
        let limit = Limit::of(wait);
        let mut state = self.shared.lock();
        loop {
            let taken = state.incoming.take(room);
            if taken > 0 {
                state.read(Instant::now());
                drop(state);
                self.shared.links.notify_all();
                wait.count(taken);
                return Ok(Received::Bytes(taken));
            }
            if state.incoming.is_over() {
                return Ok(Received::Closed);
            }
            if let Some(over) = state.over() {
                return Err(lost(over));
            }
            // An answer to what has not arrived yet cannot come.
            let (by_links, since) = (!state.out.has_arrived(), Instant::now());
            state = self.pause(state, &limit, wait, false)?;
            if by_links {
                self.shared.carried.held(false, since.elapsed());
            }
        }
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        let state = self.shared.lock();
        let copied = state.incoming.peek(room);
        match state.over() {
            Some(over) if copied == 0 && !state.incoming.is_over() => Err(lost(over)),
            _ => Ok(copied),
        }
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        wait.check()?;
        let limit = Limit::of(wait);
        let mut state = self.shared.lock();
        loop {
            let now = Instant::now();
            if state.out.has_ended() {
                let why = "the writing end is already closed";
                let why = io::Error::new(io::ErrorKind::InvalidInput, why);
                return Err(ConnectionError::Local(why));
            }
            if let Some(over) = state.over() {
                return Err(lost(over));
            }
            if state.peer_left() {
                let why = io::ErrorKind::BrokenPipe.into();
                return Err(ConnectionError::NotRead(why));
            }
            if bytes.is_empty() {
                return Ok(0);
            }
            if let Some(pace) = wait.pace {
                let due = pace.due();
                state.set_suspended(due.is_some(), now);
                if due.is_some_and(|due| now >= due) {
                    return Err(ConnectionError::TimedOut(pace.broken()));
                }
            }
            let taken = state.out.write(bytes);
            if taken > 0 {
                drop(state);
                self.shared.links.notify_all();
                if let Some(pace) = wait.pace {
                    Pace::took(pace, taken as u64);
                }
                wait.count(taken);
                return Ok(taken);
            }
            let (by_peer, since) = (state.out.has_arrived(), now);
            state = self.pause(state, &limit, wait, true)?;
            self.shared.carried.held(by_peer, since.elapsed());
        }
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        copy_gather(self, list, wait)
    }

    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        self.shared.lock().out.end();
        self.shared.links.notify_all();
        Ok(())
    }

    fn delivery(&self) -> Delivery {
        let state = self.shared.lock();
        if state.out.is_read() {
            Delivery::Read
        } else if state.over().is_some() {
            Delivery::Unknown
        } else if state.out.has_arrived() {
            Delivery::AtPeerHost
        } else {
            Delivery::Pending
        }
    }

    /// A session that takes up lost links has a limit of its own.
    fn give_up_on_silence(&self, limit: Duration) -> Result<bool, ConnectionError> {
        let mut state = self.shared.lock();
        if !state.reconnects() {
            state.set_silence(limit);
        }
        Ok(true)
    }

    fn stage(&self, stage: Stage) {
        let mut state = self.shared.lock();
        match stage {
            Stage::Suspended => state.set_suspended(true, Instant::now()),
            Stage::LetGo => state.seal(),
            Stage::TakenBack => state.abandon(),
        }
        drop(state);
        self.shared.wake();
    }

    fn peer(&self) -> Peer {
        self.peer.clone()
    }

    fn clock(&self) -> Duration {
        self.shared.made.elapsed()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

impl Session {
    /// Closes it in order, as dropping it does, for a session that several threads share. Their
    /// calls fail from then on.
    pub fn close(&self) {
        self.leave();
        self.shared.dropped.store(true, Ordering::Relaxed);
        self.shared.lock().close();
        self.shared.wake();
    }

    /// Says that this end leaves, and waits until the peer knows.
    fn leave(&self) {
        let mut state = self.shared.lock();
        let unread = state.incoming.is_unread();
        if !unread {
            state.out.end();
        }
        self.shared.links.notify_all();
        // What was written arrives, such as the reason why this end leaves.
        let begun = Instant::now();
        let mut since = begun;
        let mut before = state.out.unarrived();
        while before > 0 && state.over().is_none() && !state.peer_left() {
            if state.gives_up(since.elapsed(), begun.elapsed()) {
                state.abandon();
                break;
            }
            state = self.shared.wait(&self.shared.process, state, LOOK);
            let now = state.out.unarrived();
            if now != before {
                (before, since) = (now, Instant::now());
            }
        }
        if unread {
            state.abandon();
        }
        state.say_bye();
        self.shared.links.notify_all();
        // A peer that knows closes its links.
        let since = Instant::now();
        while state.is_connected() && since.elapsed() < LINGER / 2 {
            state = self.shared.wait(&self.shared.process, state, LOOK);
        }
    }
}

#[cfg(test)]
#[path = "session/tests.rs"]
mod tests;
