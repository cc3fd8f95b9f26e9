//! The state of a session: its links, what each of them sends next, and what ends the session. No
//! I/O and no clock of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::{Answer, Malformed, SLOTS};
use super::incoming::Incoming;
use super::outgoing::{LinkId, Outgoing, Piece};
use crate::progress::Cancel;

/// A link carries a frame at least this often.
pub(super) const ALIVE: Duration = Duration::from_secs(1);

/// A link on which nothing arrives for so long is lost, if it is not taken up again.
pub(super) const SILENCE_FOR_GOOD: Duration = Duration::from_secs(30);

/// How long an acknowledgement may wait for another one.
pub(super) const ACKNOWLEDGE: Duration = Duration::from_millis(1);

/// So many chunks are acknowledged at once.
const ACKNOWLEDGE_CHUNKS: u64 = 2;

/// So many attempts to make a link fit into the time that a session without a link has left.
const ATTEMPTS: u32 = 3;

/// The shortest time for an attempt to make a link.
const SHORTEST: Duration = Duration::from_millis(500);

/// How long a session that is dropped waits while the peer acknowledges nothing.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// How long it waits in all while the peer acknowledges something now and then: twice as long as a
/// window takes at 1 MiB/s.
const LINGER_IN_ALL: Duration = Duration::from_secs(32);

/// How long a session waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// How long the session may have no link. Zero: it ends with its last link.
    pub(super) reconnect: Duration,
    /// The same, while the domain is suspended.
    pub(super) suspended: Duration,
    /// A link on which nothing has arrived for so long is lost.
    pub(super) silence: Duration,
}

/// Why a session is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// It has no link any more, in words.
    Lost(String),
    /// The peer has discarded it.
    Aborted,
    /// The peer has violated the protocol.
    Malformed(Malformed),
    /// This end has closed it.
    Closed,
}

/// A link of the session.
#[derive(Debug)]
struct Link {
    id: LinkId,
    /// Stops its threads.
    cancel: Cancel,
    heard: Instant,
    wrote: Instant,
    /// Whether it has carried this end's bye or abort.
    told: bool,
}

/// What a link sends next.
#[derive(Debug)]
pub(super) enum Job {
    Chunk(u64, Arc<Piece>),
    Acknowledge {
        received: u64,
        read: u64,
    },
    Alive,
    Bye,
    /// The link ends after this.
    Abort,
}

/// A link that wakes up so much late may make up for it.
const LATE: Duration = Duration::from_millis(20);

/// How much may be sent, over all links together.
#[derive(Clone, Copy, Debug)]
struct Rate {
    bytes_per_second: u64,
    /// No chunk is sent before this.
    from: Instant,
}

/// How this end leaves the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    Bye,
    Abort,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) out: Outgoing,
    pub(super) incoming: Incoming,
    links: BTreeMap<u8, Link>,
    next_id: LinkId,
    limits: Limits,
    /// Since when there has been no link.
    without: Option<Instant>,
    /// Why the last link was lost.
    why: String,
    /// When the domain was suspended.
    suspended: Option<Instant>,
    /// For how long there was no link since then, until the newest link was made.
    spent: Duration,
    /// No link is taken up and no chunk is sent again.
    sealed: bool,
    /// The only link on which chunks are sent, once sealed.
    only: Option<LinkId>,
    over: Option<Over>,
    /// The peer has said bye.
    bye: bool,
    leaving: Option<Leaving>,
    /// What was acknowledged last, and since when there has been more to acknowledge.
    said: (u64, u64),
    unsaid: Option<Instant>,
    rate: Option<Rate>,
}

impl State {
    pub(super) fn new(limits: Limits, most: u64, now: Instant) -> Self {
        Self {
            out: Outgoing::new(most),
            incoming: Incoming::default(),
            links: BTreeMap::new(),
            next_id: 0,
            limits,
            without: Some(now),
            why: "no link was made".to_owned(),
            suspended: None,
            spent: Duration::ZERO,
            sealed: false,
            only: None,
            over: None,
            bye: false,
            leaving: None,
            said: (0, 0),
            unsaid: None,
            rate: None,
        }
    }

    /// From now on links send no more chunks than this.
    pub(super) fn limit_rate(&mut self, bytes_per_second: u64, now: Instant) {
        self.rate = Some(Rate {
            bytes_per_second,
            from: now,
        });
    }

    /// A chunk was sent, in so many bytes.
    pub(super) fn sent(&mut self, bytes: usize, now: Instant) {
        if let Some(rate) = &mut self.rate {
            let takes = Duration::from_secs_f64(bytes as f64 / rate.bytes_per_second as f64);
            let late = now.checked_sub(LATE).unwrap_or(now);
            rate.from = rate.from.max(late) + takes;
        }
    }

    pub(super) fn over(&self) -> Option<&Over> {
        self.over.as_ref()
    }

    /// Whether an end that is dropped gives up what has not arrived: the peer has acknowledged
    /// nothing for `idle`, and this end has waited for `waited` in all.
    pub(super) fn gives_up(&self, idle: Duration, waited: Duration) -> bool {
        let linger = match self.sealed {
            true => LINGER.max(self.limits.silence),
            false => LINGER,
        };
        idle >= linger || waited >= LINGER_IN_ALL
    }

    /// Whether the peer has closed its end, and reads no more.
    pub(super) fn peer_left(&self) -> bool {
        self.bye
    }

    pub(super) fn is_connected(&self) -> bool {
        !self.links.is_empty()
    }

    pub(super) fn links(&self) -> usize {
        self.links.len()
    }

    pub(super) fn set_silence(&mut self, limit: Duration) {
        self.limits.silence = limit;
    }

    /// Whether a lost link is taken up again.
    pub(super) fn reconnects(&self) -> bool {
        !self.limits.reconnect.is_zero()
    }

    /// Whether a link may be added.
    pub(super) fn is_open(&self) -> bool {
        self.over.is_none() && !self.sealed && self.leaving.is_none() && !self.bye
    }

    /// A slot below `wanted` without a link.
    pub(super) fn free_slot(&self, wanted: u8) -> Option<u8> {
        (0..wanted.min(SLOTS)).find(|slot| !self.links.contains_key(slot))
    }

    /// Adds a link, in the place of the one that has its slot. The peer has received all chunks
    /// before `received`.
    pub(super) fn attach(
        &mut self,
        slot: u8,
        received: u64,
        window: u64,
        now: Instant,
    ) -> Result<(LinkId, Cancel), Answer> {
        if !self.is_open() {
            return Err(Answer::TooLate);
        }
        if let Some(old) = self.links.get(&slot).map(|link| link.id) {
            self.replace(old, now);
        }
        self.out.set_window(window);
        if let Err(malformed) = self.out.acknowledged(received, 0) {
            self.end(Over::Malformed(malformed));
            return Err(Answer::TooLate);
        }
        let id = self.next_id;
        self.next_id += 1;
        let cancel = Cancel::new();
        let link = Link {
            id,
            cancel: cancel.clone(),
            heard: now,
            wrote: now,
            told: false,
        };
        self.links.insert(slot, link);
        let without = self.without.take().zip(self.suspended);
        if let Some((without, suspended)) = without {
            // Links that return and are lost again do not keep the domain suspended for ever.
            self.spent += now.saturating_duration_since(without.max(suspended));
        }
        Ok((id, cancel))
    }

    /// A link is replaced: as [`Self::lose`], but the session goes on with the new link.
    fn replace(&mut self, id: LinkId, now: Instant) {
        let limit = std::mem::replace(&mut self.limits.reconnect, Duration::MAX);
        self.lose(id, "another link took its place", now);
        self.limits.reconnect = limit;
    }

    fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        self.links.values_mut().find(|link| link.id == id)
    }

    /// Whether the link still belongs to the session.
    pub(super) fn has(&self, id: LinkId) -> bool {
        self.links.values().any(|link| link.id == id)
    }

    /// Something has arrived on the link.
    pub(super) fn heard(&mut self, id: LinkId, now: Instant) {
        if let Some(link) = self.link(id) {
            link.heard = now;
        }
    }

    /// A chunk has arrived. Returns whether the process has more to read.
    pub(super) fn arrived(&mut self, number: u64, piece: Piece, id: LinkId, now: Instant) -> bool {
        if self.over.is_some() || !self.has(id) {
            return false;
        }
        let arrived = self.incoming.arrived(number, piece, id);
        // A chunk that comes again was not acknowledged where the peer could hear it.
        self.unsaid.get_or_insert(now);
        match arrived {
            Ok(more) => more,
            Err(malformed) => {
                self.end(Over::Malformed(malformed));
                true
            }
        }
    }

    /// The process has read some bytes.
    pub(super) fn read(&mut self, now: Instant) {
        if self.incoming.acknowledgement() != self.said {
            self.unsaid.get_or_insert(now);
        }
    }

    /// The peer has acknowledged chunks.
    pub(super) fn acknowledged(&mut self, received: u64, read: u64, id: LinkId) {
        if self.over.is_some() || !self.has(id) {
            return;
        }
        if let Err(malformed) = self.out.acknowledged(received, read) {
            self.end(Over::Malformed(malformed));
        }
    }

    /// The peer has said bye, or has aborted the session.
    pub(super) fn peer_leaves(&mut self, id: LinkId, aborts: bool) {
        if self.over.is_some() || !self.has(id) {
            return;
        }
        match aborts {
            true => self.end(Over::Aborted),
            // An end that leaves first does not wait for the end of what the other one writes.
            false if self.leaving.is_none() && !self.incoming.has_end() => {
                self.end(Over::Malformed(Malformed::ByeWithoutEnd));
            }
            false => self.bye = true,
        }
    }

    /// The peer has sent bytes that are no frame.
    pub(super) fn violated(&mut self, malformed: Malformed, id: LinkId) {
        if self.has(id) {
            self.end(Over::Malformed(malformed));
        }
    }

    /// A link has ended, or has to end.
    pub(super) fn lose(&mut self, id: LinkId, why: &str, now: Instant) {
        let Some(slot) = self.links.iter().find(|(_, link)| link.id == id) else {
            return;
        };
        let slot = *slot.0;
        tracing::debug!(link = id, why, "a link of the session has ended");
        if let Some(link) = self.links.remove(&slot) {
            link.cancel.cancel();
        }
        if self.over.is_some() {
            return;
        }
        self.out.lost(id, !self.sealed);
        // An acknowledgement may have been lost with it.
        self.said = (0, 0);
        self.unsaid.get_or_insert(now);
        if self.links.is_empty() {
            self.without = Some(now);
            why.clone_into(&mut self.why);
        }
        let ends = match self.sealed {
            true => self.only == Some(id) || self.links.is_empty(),
            false => self.links.is_empty() && !self.reconnects(),
        };
        // After a bye, links end in order.
        if ends && !self.bye {
            self.end(Over::Lost(why.to_owned()));
        }
    }

    fn end(&mut self, over: Over) {
        self.over.get_or_insert(over);
        self.out.discard();
    }

    /// The domain is suspended from now on, or runs.
    pub(super) fn set_suspended(&mut self, suspended: bool, now: Instant) {
        match suspended {
            true => _ = self.suspended.get_or_insert(now),
            false => {
                self.suspended = None;
                self.spent = Duration::ZERO;
            }
        }
    }

    /// From now on no link is taken up and no chunk is sent again, and everything goes over one
    /// link: the one on which the newest chunk came, if it exists. Without a link the session is
    /// over.
    pub(super) fn seal(&mut self) {
        if self.sealed {
            return;
        }
        self.sealed = true;
        // Its only link is not taken up again: a short outage must not end it.
        self.limits.silence = self.limits.silence.max(SILENCE_FOR_GOOD);
        let newest = self.incoming.newest_from().filter(|id| self.has(*id));
        let first = self.links.values().next().map(|link| link.id);
        self.only = newest.or(first);
        if self.only.is_none() && !self.bye {
            self.end(Over::Lost(self.why.clone()));
        }
    }

    /// Discards what no link has taken, and tells the peer. What has arrived can be read.
    pub(super) fn abandon(&mut self) {
        self.sealed = true;
        self.out.discard();
        self.leaving = Some(Leaving::Abort);
        if self.links.is_empty() && !self.bye {
            self.end(Over::Lost(self.why.clone()));
        }
    }

    /// Says bye on every link.
    pub(super) fn say_bye(&mut self) {
        self.leaving.get_or_insert(Leaving::Bye);
    }

    /// Ends it and all of its links.
    pub(super) fn close(&mut self) {
        self.end(Over::Closed);
        for link in self.links.values() {
            link.cancel.cancel();
        }
        self.links.clear();
    }

    /// Ends what has lasted too long. Returns whether anything has changed.
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        if self.over.is_some() {
            return false;
        }
        let silence = self.limits.silence;
        let silent = |link: &&Link| now.saturating_duration_since(link.heard) >= silence;
        let lost: Vec<LinkId> = self.links.values().filter(silent).map(|l| l.id).collect();
        for id in &lost {
            let why = format!("nothing was heard for {} s", silence.as_secs_f64());
            self.lose(*id, &why, now);
        }
        self.out.grow();
        if !self.bye && self.deadline().is_some_and(|end| now >= end) {
            self.end(Over::Lost(self.why.clone()));
            return true;
        }
        !lost.is_empty()
    }

    /// How long an attempt to make a link may last: where the session has no link, the time that it
    /// still waits has room for several.
    pub(super) fn attempt(&self, now: Instant, usual: Duration) -> Duration {
        let left = self
            .deadline()
            .map(|end| end.saturating_duration_since(now));
        left.map_or(usual, |left| (left / ATTEMPTS).clamp(SHORTEST, usual))
    }

    /// When a session without a link ends.
    fn deadline(&self) -> Option<Instant> {
        let without = self.without?;
        let end = without.checked_add(self.limits.reconnect);
        let Some(suspended) = self.suspended else {
            return end;
        };
        let left = self.limits.suspended.saturating_sub(self.spent);
        let sooner = without.max(suspended).checked_add(left);
        match (end, sooner) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// What the link sends now; `None` if nothing yet.
    pub(super) fn job(&mut self, id: LinkId, now: Instant) -> Option<Job> {
        let over = self.over.is_some();
        let leaving = self.leaving;
        let link = self.link(id)?;
        if over || leaving == Some(Leaving::Abort) {
            let told = std::mem::replace(&mut link.told, true);
            return (!told).then_some(Job::Abort);
        }
        if link.told {
            return None;
        }
        let carries = !self.sealed || self.only == Some(id);
        if carries && let Some((received, read)) = self.acknowledge(now) {
            self.wrote(id, now);
            return Some(Job::Acknowledge { received, read });
        }
        let due = self.rate.is_none_or(|rate| now >= rate.from);
        if carries
            && due
            && let Some((number, piece)) = self.out.take(id)
        {
            self.wrote(id, now);
            return Some(Job::Chunk(number, piece));
        }
        let link = self.link(id)?;
        if leaving == Some(Leaving::Bye) {
            link.told = true;
            return Some(Job::Bye);
        }
        if now.saturating_duration_since(link.wrote) >= ALIVE {
            link.wrote = now;
            return Some(Job::Alive);
        }
        None
    }

    fn wrote(&mut self, id: LinkId, now: Instant) {
        if let Some(link) = self.link(id) {
            link.wrote = now;
        }
    }

    /// The acknowledgement that is due.
    fn acknowledge(&mut self, now: Instant) -> Option<(u64, u64)> {
        let since = self.unsaid?;
        let (received, read) = self.incoming.acknowledgement();
        let many = received - self.said.0 >= ACKNOWLEDGE_CHUNKS
            || read - self.said.1 >= ACKNOWLEDGE_CHUNKS
            || self.leaving.is_some();
        if !many && now.saturating_duration_since(since) < ACKNOWLEDGE {
            return None;
        }
        self.unsaid = None;
        self.said = (received, read);
        Some((received, read))
    }

    /// How long a link with nothing to send may wait.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        let pause = match self.unsaid {
            Some(_) => ACKNOWLEDGE,
            None => ALIVE / 4,
        };
        match self.rate {
            Some(rate) if rate.from > now => pause.min(rate.from - now),
            _ => pause,
        }
    }
}

#[cfg(test)]
#[path = "state/tests.rs"]
mod tests;
