//! What a session has carried, and what has held up the process that writes to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Session, Shared};

/// What this end has sent, and how long that took.
#[derive(Debug, Default)]
pub(super) struct Carried {
    /// Bytes on the links, before TLS.
    wire: AtomicU64,
    /// Bytes of the stream; what was sent twice counts twice.
    stream: AtomicU64,
    /// Nanoseconds for making frames of chunks, of all links.
    packing: AtomicU64,
    /// Nanoseconds for writing them.
    writing: AtomicU64,
    /// Nanoseconds that the process has waited while chunks had not arrived.
    by_links: AtomicU64,
    /// Nanoseconds that it has waited because the peer's process had not read what had arrived.
    by_peer: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Carried {
    /// A link has written so many bytes.
    pub(super) fn wrote(&self, bytes: usize) {
        add(&self.wire, bytes as u64);
    }

    /// They were a chunk of so many bytes of the stream.
    pub(super) fn chunk(&self, bytes: usize, packing: Duration, writing: Duration) {
        add(&self.stream, bytes as u64);
        add(&self.packing, nanoseconds(packing));
        add(&self.writing, nanoseconds(writing));
    }

    /// The process has waited for room, because of the links or because of the peer's process.
    pub(super) fn held(&self, by_peer: bool, time: Duration) {
        let counter = match by_peer {
            true => &self.by_peer,
            false => &self.by_links,
        };
        add(counter, nanoseconds(time));
    }
}

/// What a session has carried until now. The difference of two tells about the time between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionFigures {
    /// The number of links now.
    pub links: usize,
    /// Bytes that this end has written to its links, before TLS.
    pub wire_bytes: u64,
    /// Bytes of the stream that they stand for. What was sent twice counts twice.
    pub stream_bytes: u64,
    /// Time for making frames of the stream, which is mostly compression, of all links together.
    pub packing: Duration,
    /// Time for writing them to the links, of all links together.
    pub writing: Duration,
    /// Time that the process which writes to the session has waited for the links.
    pub held_by_links: Duration,
    /// Time that it has waited for the process at the other end.
    pub held_by_peer: Duration,
}

/// What limits how fast a session carries bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionLimit {
    /// The process at this end, which writes less than the session could carry.
    Writer,
    /// Compression.
    Compressor,
    /// The links.
    Link,
    /// The process at the other end, which reads more slowly.
    Peer,
}

impl SessionFigures {
    /// What has limited the session since `before`, which was `elapsed` ago: what the process has
    /// waited for, if it has waited for at least half of the time. It has waited for compression if
    /// that took longer than writing, and a good part of the time.
    pub fn limit_since(&self, before: &Self, elapsed: Duration) -> SessionLimit {
        let links = self.held_by_links.saturating_sub(before.held_by_links);
        let peer = self.held_by_peer.saturating_sub(before.held_by_peer);
        let packing = self.packing.saturating_sub(before.packing);
        let writing = self.writing.saturating_sub(before.writing);
        if links + peer < elapsed / 2 {
            SessionLimit::Writer
        } else if peer > links {
            SessionLimit::Peer
        } else if packing > writing && packing >= links / 2 {
            SessionLimit::Compressor
        } else {
            SessionLimit::Link
        }
    }
}

/// Tells what a session carries, while others use it. It does not keep the session open.
#[derive(Clone, Debug)]
pub struct SessionMonitor(Arc<Shared>);

impl SessionMonitor {
    /// The figures until now.
    pub fn figures(&self) -> SessionFigures {
        let carried = &self.0.carried;
        let bytes = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let time = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        SessionFigures {
            links: self.0.lock().links(),
            wire_bytes: bytes(&carried.wire),
            stream_bytes: bytes(&carried.stream),
            packing: time(&carried.packing),
            writing: time(&carried.writing),
            held_by_links: time(&carried.by_links),
            held_by_peer: time(&carried.by_peer),
        }
    }
}

impl Session {
    /// What tells how much it carries.
    pub fn monitor(&self) -> SessionMonitor {
        SessionMonitor(Arc::clone(&self.shared))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_for_longest_is_the_limit() {
        let second = Duration::from_secs(1);
        let figures = |links: u64, peer: u64, packing: u64, writing: u64| SessionFigures {
            held_by_links: Duration::from_millis(links),
            held_by_peer: Duration::from_millis(peer),
            packing: Duration::from_millis(packing),
            writing: Duration::from_millis(writing),
            ..SessionFigures::default()
        };
        for (now, limit) in [
            (figures(0, 0, 900, 0), SessionLimit::Writer),
            (figures(300, 100, 900, 0), SessionLimit::Writer),
            (figures(100, 600, 900, 0), SessionLimit::Peer),
            (figures(600, 100, 900, 300), SessionLimit::Compressor),
            (figures(600, 100, 300, 900), SessionLimit::Link),
            (figures(600, 100, 30, 10), SessionLimit::Link),
        ] {
            assert_eq!(now.limit_since(&figures(0, 0, 0, 0), second), limit);
            // What was before does not count.
            assert_eq!(now.limit_since(&now, second), SessionLimit::Writer);
        }
    }
}
