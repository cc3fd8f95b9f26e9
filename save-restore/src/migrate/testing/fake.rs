//! A connection in memory: deterministic, with a clock of its own and a fault at any call.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use xsr_xen_backend::Gather;

use crate::migrate::connection::{
    Connection, ConnectionError, Delivery, Peer, Received, Stage, Wait, copy_gather,
};
use crate::pace::{Overdue, Pace, ReadLimit};

/// A fault at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is lost, for both ends, when the call has transferred this many bytes. What
    /// had been written before still arrives. The call fails if it transferred none.
    Lose {
        /// Bytes of this call that are taken, and arrive.
        taken: usize,
    },
    /// The connection is lost in transit: the call takes its bytes as usual, but only this many
    /// arrive.
    Cut {
        /// Bytes of this call that arrive.
        arrive: usize,
    },
    /// The connection is lost, and bytes in transit do not arrive.
    Vanish,
    /// The call does nothing for this long.
    Stall(Duration),
    /// What the call writes takes this long to arrive.
    Late(Duration),
    /// The call transfers no more bytes than this.
    Short(usize),
}

/// A fault, and the call at which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faulty {
    /// Which call of this end, from 0: reads and writes count.
    pub call: u64,
    /// The fault.
    pub fault: Fault,
}

/// One end of a connection in memory.
///
/// Time passes only when both ends wait: then the clock advances to the next event. A pair from
/// [`Self::pair`] is for two threads; if one thread has both ends, use
/// [`Self::pair_in_one_thread`], whose calls never wait for the other end.
///
/// ```
/// use std::time::Duration;
/// use xsr_save_restore::migrate::connection::{Connection as _, ConnectionError, Wait};
/// use xsr_save_restore::migrate::testing::{FakeConnection, Fault, Faulty};
/// use xsr_save_restore::pace::Overdue;
///
/// let (here, there) = FakeConnection::pair_in_one_thread(1 << 16);
/// here.fail(Faulty { call: 1, fault: Fault::Cut { arrive: 2 } });
/// here.write(b"whole", &Wait::forever())?;
/// here.write(b"cut short", &Wait::forever())?;
/// assert!(matches!(here.write(b"more", &Wait::forever()), Err(ConnectionError::Lost(_))));
///
/// let mut room = [0; 16];
/// there.read(&mut room, &Wait::forever())?;
/// assert_eq!(&room[..7], b"wholecu");
/// assert!(matches!(there.read(&mut room, &Wait::forever()), Err(ConnectionError::Lost(_))));
///
/// // A minute passes at once.
/// let (here, _there) = FakeConnection::pair_in_one_thread(1 << 16);
/// let minute = Duration::from_secs(60);
/// let error = here.read(&mut room, &Wait::forever().idle(minute)).unwrap_err();
/// assert!(matches!(error, ConnectionError::TimedOut(Overdue::NothingSent(s)) if s == minute));
/// assert_eq!(here.clock(), minute);
/// # Ok::<(), ConnectionError>(())
/// ```
#[derive(Debug)]
pub struct FakeConnection {
    shared: Arc<Shared>,
    end: usize,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes that may be in transit to an end before a write has to wait.
    capacity: usize,
    peers: Peers,
}

/// Whether an end that is not in a call counts as waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peers {
    /// No: another thread has it, and will act.
    Work,
    /// Yes: the same thread has it.
    Wait,
    /// Yes, if the other end waits with a time-out.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the contract's own test"))]
    MayWork,
}

#[derive(Debug, Default)]
struct State {
    now: Duration,
    ends: [End; 2],
    lost: bool,
}

#[derive(Debug, Default)]
struct End {
    /// Bytes in transit to this end, and when they arrive. No piece is empty.
    inbox: VecDeque<(Duration, VecDeque<u8>)>,
    /// Their number.
    queued: usize,
    /// What it waits for, if it waits: a byte or room, and until when.
    waits: Option<(Waiting, Option<Duration>)>,
    /// It has announced that it writes no more.
    finished: bool,
    /// Its connection has been dropped.
    gone: bool,
    calls: u64,
    faults: Vec<Faulty>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Byte,
    Room,
    /// For a time to come.
    Time,
}

impl State {
    /// Whether a waiting end could continue now.
    fn could_go_on(&self, end: usize, what: Waiting, capacity: usize) -> bool {
        let peer = &self.ends[1 - end];
        if what == Waiting::Time {
            return false;
        }
        self.lost
            || match what {
                Waiting::Byte => match self.ends[end].inbox.front() {
                    Some((arrives, _)) => *arrives <= self.now,
                    None => peer.finished || peer.gone,
                },
                _ => peer.gone || peer.queued < capacity,
            }
    }
}

/// A call that has begun: the state, its faults, and the time at which it times out.
type Call<'s> = (MutexGuard<'s, State>, Vec<Fault>, Option<Duration>);

fn lost() -> ConnectionError {
    ConnectionError::Lost(io::ErrorKind::ConnectionReset.into())
}

/// How long a call may wait on the connection's clock, and which limit is then reached. For a
/// [`Pace`](crate::pace::Pace) that is its patience: the rest uses another clock.
fn limit(wait: &Wait<'_>, writing: bool) -> Option<(Duration, Overdue)> {
    let silence = if writing {
        wait.pace.map(Pace::patience)
    } else {
        wait.silence.and_then(ReadLimit::limit)
    };
    let idle = wait.idle.into_iter().chain(silence).min().map(|limit| {
        let overdue = if writing {
            Overdue::NothingTaken(limit)
        } else {
            Overdue::NothingSent(limit)
        };
        (limit, overdue)
    });
    let at_most = wait.at_most.map(|limit| {
        let overdue = if writing {
            Overdue::NothingTaken(limit)
        } else {
            Overdue::NoAnswer(limit)
        };
        (limit, overdue)
    });
    idle.into_iter().chain(at_most).min_by_key(|limit| limit.0)
}

fn timed_out(wait: &Wait<'_>, writing: bool) -> ConnectionError {
    let overdue = limit(wait, writing).map(|(_, overdue)| overdue);
    ConnectionError::TimedOut(overdue.unwrap_or(Overdue::NoAnswer(Duration::ZERO)))
}

impl FakeConnection {
    /// Two ends for two threads; `capacity`: the bytes that may be in transit in each direction.
    pub fn pair(capacity: usize) -> (Self, Self) {
        Self::ends(capacity, Peers::Work)
    }

    /// Two ends that one thread uses in turn. A call that would wait for the other end waits for
    /// its time-out on the clock of the connection, and fails at once if it has none.
    pub fn pair_in_one_thread(capacity: usize) -> (Self, Self) {
        Self::ends(capacity, Peers::Wait)
    }

    /// Two ends for one thread or two. A time-out comes at once, unless the other end acts before;
    /// a call without a time-out waits until the other end acts.
    #[cfg(test)]
    pub(super) fn pair_for_contract(capacity: usize) -> (Self, Self) {
        Self::ends(capacity, Peers::MayWork)
    }

    fn ends(capacity: usize, peers: Peers) -> (Self, Self) {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            capacity: capacity.max(1),
            peers,
        });
        let other = Arc::clone(&shared);
        (
            Self { shared, end: 0 },
            Self {
                shared: other,
                end: 1,
            },
        )
    }

    /// Makes a call of this end fail. Faults add up.
    pub fn fail(&self, faulty: Faulty) {
        self.state().ends[self.end].faults.push(faulty);
    }

    /// How many calls this end has made: a test that counts them once can make each fail in turn.
    pub fn calls(&self) -> u64 {
        self.state().ends[self.end].calls
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, and returns its faults.
    fn call(&self, state: &mut State) -> Vec<Fault> {
        let end = &mut state.ends[self.end];
        let call = end.calls;
        end.calls += 1;
        let faults = end.faults.iter().filter(|faulty| faulty.call == call);
        faults.map(|faulty| faulty.fault).collect()
    }

    /// Waits until the end can continue (true) or the time has come (false).
    fn wait<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        what: Waiting,
        until: Option<Duration>,
        wait: &Wait<'_>,
    ) -> Result<(MutexGuard<'s, State>, bool), ConnectionError> {
        let capacity = self.shared.capacity;
        let result = loop {
            if let Err(error) = wait.check() {
                break Err(error);
            }
            if state.could_go_on(self.end, what, capacity) {
                break Ok(true);
            }
            if until.is_some_and(|until| until <= state.now) {
                break Ok(false);
            }
            state.ends[self.end].waits = Some((what, until));
            let peer = &state.ends[1 - self.end];
            let peer_waits = match peer.waits {
                // An end whose time has come is about to continue.
                Some((what, until)) => {
                    !state.could_go_on(1 - self.end, what, capacity)
                        && until.is_none_or(|until| until > state.now)
                }
                None => match self.shared.peers {
                    Peers::Work => peer.gone,
                    Peers::Wait => true,
                    Peers::MayWork => peer.gone || until.is_some(),
                },
            };
            if peer_waits {
                // Nothing happens before the first of these.
                let deadlines = state.ends.iter().filter_map(|end| end.waits?.1);
                let arrivals = state.ends.iter().filter_map(|end| {
                    let (arrives, _) = end.inbox.front()?;
                    (*arrives > state.now).then_some(*arrives)
                });
                if let Some(next) = deadlines.chain(arrivals).min() {
                    state.now = state.now.max(next);
                    self.shared.changed.notify_all();
                    continue;
                }
                if wait.cancel.is_none() {
                    let why = io::Error::other("both ends wait for ever");
                    break Err(ConnectionError::Local(why));
                }
            }
            self.shared.changed.notify_all();
            // A cancellation does not wake this end.
            const LOOK: Duration = Duration::from_millis(5);
            let waited = self.shared.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.ends[self.end].waits = None;
        result.map(|done| (state, done))
    }

    /// Begins a call, with the faults at its beginning.
    fn begin<'s>(&'s self, wait: &Wait<'_>, writing: bool) -> Result<Call<'s>, ConnectionError> {
        wait.check()?;
        let mut state = self.state();
        let began = state.now;
        let limit = limit(wait, writing).map(|(limit, _)| limit);
        let until = limit.map(|limit| began.saturating_add(limit));
        let faults = self.call(&mut state);
        for fault in &faults {
            match fault {
                Fault::Stall(time) => {
                    let end = began.saturating_add(*time);
                    let over = until.is_some_and(|until| until < end);
                    let to = until.map_or(end, |until| until.min(end));
                    (state, _) = self.wait(state, Waiting::Time, Some(to), wait)?;
                    if over {
                        return Err(timed_out(wait, writing));
                    }
                }
                Fault::Vanish => {
                    state.lost = true;
                    for end in &mut state.ends {
                        end.inbox.clear();
                        end.queued = 0;
                    }
                }
                Fault::Lose { .. } | Fault::Cut { .. } if !writing => state.lost = true,
                _ => {}
            }
        }
        self.shared.changed.notify_all();
        Ok((state, faults, until))
    }

    /// At most this many bytes at one call.
    fn shortened(faults: &[Fault], bytes: usize) -> usize {
        let short = faults.iter().filter_map(|fault| match fault {
            Fault::Short(most) => Some((*most).max(1)),
            _ => None,
        });
        short.min().map_or(bytes, |most| bytes.min(most))
    }
}

impl Connection for FakeConnection {
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        if room.is_empty() {
            return Ok(Received::Bytes(0));
        }
        let (state, faults, until) = self.begin(wait, false)?;
        let (mut state, ready) = self.wait(state, Waiting::Byte, until, wait)?;
        let now = state.now;
        if !ready {
            return Err(timed_out(wait, false));
        }
        let most = Self::shortened(&faults, room.len());
        let end = &mut state.ends[self.end];
        let mut n = 0;
        while n < most
            && let Some((arrives, bytes)) = end.inbox.front_mut()
            && *arrives <= now
        {
            let step = bytes.len().min(most - n);
            for (place, byte) in room[n..n + step].iter_mut().zip(bytes.drain(..step)) {
                *place = byte;
            }
            if bytes.is_empty() {
                end.inbox.pop_front();
            }
            n += step;
        }
        end.queued -= n;
        let result = match n {
            0 if state.lost => Err(lost()),
            0 => Ok(Received::Closed),
            n => Ok(Received::Bytes(n)),
        };
        wait.count(n);
        self.shared.changed.notify_all();
        result
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        let state = self.state();
        let here = state.ends[self.end].inbox.iter();
        let here = here.take_while(|(arrives, _)| *arrives <= state.now);
        let mut n = 0;
        for (byte, place) in here.flat_map(|(_, bytes)| bytes).zip(room) {
            *place = *byte;
            n += 1;
        }
        Ok(n)
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        if self.state().ends[self.end].finished {
            let why = io::ErrorKind::InvalidInput.into();
            return Err(ConnectionError::Local(why));
        }
        if bytes.is_empty() {
            return Ok(0);
        }
        let (state, faults, until) = self.begin(wait, true)?;
        let (mut state, ready) = self.wait(state, Waiting::Room, until, wait)?;
        let now = state.now;
        if state.lost {
            return Err(lost());
        }
        if state.ends[1 - self.end].gone {
            let why = io::ErrorKind::BrokenPipe.into();
            return Err(ConnectionError::NotRead(why));
        }
        if !ready {
            return Err(timed_out(wait, true));
        }
        let late = faults.iter().find_map(|fault| match fault {
            Fault::Late(time) => Some(*time),
            _ => None,
        });
        let fault = |of: fn(&Fault) -> Option<usize>| faults.iter().find_map(of);
        let taken = fault(|fault| match fault {
            Fault::Lose { taken } => Some(*taken),
            _ => None,
        });
        let arrive = fault(|fault| match fault {
            Fault::Cut { arrive } => Some(*arrive),
            _ => None,
        });
        let peer = &mut state.ends[1 - self.end];
        let room = self.shared.capacity.saturating_sub(peer.queued);
        let n = Self::shortened(&faults, bytes.len().min(room));
        let n = taken.map_or(n, |taken| taken.min(n));
        // Bytes arrive in order: none before those that are late.
        let last = peer.inbox.back().map_or(now, |last| last.0);
        let arrives = (now + late.unwrap_or_default()).max(last);
        let lost_here = taken.is_some() || arrive.is_some();
        let arrive = arrive.map_or(n, |arrive| arrive.min(n));
        if arrive > 0 {
            let bytes = bytes[..arrive].iter().copied().collect();
            peer.inbox.push_back((arrives, bytes));
            peer.queued += arrive;
        }
        state.lost |= lost_here;
        self.shared.changed.notify_all();
        wait.count(n);
        match n {
            0 => Err(lost()),
            n => Ok(n),
        }
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        copy_gather(self, list, wait)
    }

    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        self.state().ends[self.end].finished = true;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn delivery(&self) -> Delivery {
        if self.state().ends[1 - self.end].inbox.is_empty() {
            Delivery::Read
        } else {
            Delivery::Pending
        }
    }

    fn give_up_on_silence(&self, _: Duration) -> Result<bool, ConnectionError> {
        Ok(false)
    }

    /// Nothing is ever taken up or sent again.
    fn stage(&self, _: Stage) {}

    fn peer(&self) -> Peer {
        Peer::Named(format!("end {}", 1 - self.end))
    }

    fn clock(&self) -> Duration {
        self.state().now
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Drop for FakeConnection {
    fn drop(&mut self) {
        self.state().ends[self.end].gone = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
#[path = "fake/tests.rs"]
mod tests;
