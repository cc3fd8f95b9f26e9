//! Carries the packets of two TUN devices from one to the other, as a link would: with a rate, a
//! delay, losses and reordering, and with cuts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The most that waits for its turn in one direction. A router drops what comes after.
const QUEUE: Duration = Duration::from_millis(50);

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quality {
    /// Bits per second.
    pub(super) rate: u64,
    pub(super) delay: Duration,
    /// Packets in a thousand that are lost.
    pub(super) lost: u64,
    /// Packets in a thousand that come 3 ms later than their turn.
    pub(super) late: u64,
}

/// What happens to packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Mode {
    Pass,
    /// They are dropped without a word.
    Vanish,
    /// A packet of TCP is answered with a reset.
    Reset,
}

/// A packet and its turn.
type Due = Reverse<(Instant, u64, Vec<u8>)>;

#[derive(Debug)]
pub(super) struct Relay {
    mode: AtomicU8,
    /// Bytes that have passed from the first device to the second.
    carried: AtomicU64,
    /// Packets that were lost or late.
    hurt: AtomicU64,
    over: AtomicBool,
    quality: Quality,
}

impl Relay {
    pub(super) fn start(here: File, there: File, quality: Quality) -> Arc<Self> {
        let relay = Arc::new(Self {
            mode: (Mode::Pass as u8).into(),
            carried: 0.into(),
            hurt: 0.into(),
            over: false.into(),
            quality,
        });
        let (here, there) = (Arc::new(here), Arc::new(there));
        for (from, to, back) in [
            (Arc::clone(&here), Arc::clone(&there), false),
            (there, here, true),
        ] {
            let (queue, queued) = channel();
            let (reads, writes) = (Arc::clone(&relay), Arc::clone(&relay));
            thread::spawn(move || reads.read(&from, &queue, back));
            thread::spawn(move || writes.write(&to, &queued, back));
        }
        relay
    }

    pub(super) fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Relaxed);
    }

    /// The bytes that have passed from the first device to the second.
    pub(super) fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// The packets that were lost or late.
    pub(super) fn hurt(&self) -> u64 {
        self.hurt.load(Ordering::Relaxed)
    }

    fn read(&self, mut from: &File, queue: &Sender<Due>, back: bool) {
        let mut room = vec![0; 1 << 16];
        let mut free = Instant::now();
        let mut chance = Chance(if back { 7 } else { 1 });
        let mut number = 0;
        while !self.over.load(Ordering::Relaxed) {
            let mut events = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut events, PollTimeout::from(50_u8)), Ok(1..)) {
                continue;
            }
            // A device that is not up yet has an error.
            let Ok(n) = from.read(&mut room) else {
                thread::yield_now();
                continue;
            };
            let packet = &room[..n];
            let mode = self.mode.load(Ordering::Relaxed);
            if mode == Mode::Reset as u8
                && let Some(reset) = reset(packet)
            {
                // A device that is gone takes no answer.
                drop(from.write(&reset));
            }
            let now = Instant::now();
            free = free.max(now);
            if mode != Mode::Pass as u8 || free - now > QUEUE {
                continue;
            }
            free += Duration::from_nanos(n as u64 * 8 * 1_000_000_000 / self.quality.rate);
            let mut due = free + self.quality.delay;
            if chance.of(self.quality.lost) {
                self.hurt.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if chance.of(self.quality.late) {
                self.hurt.fetch_add(1, Ordering::Relaxed);
                due += Duration::from_millis(3);
            }
            number += 1;
            if queue.send(Reverse((due, number, packet.to_vec()))).is_err() {
                return;
            }
        }
    }

    fn write(&self, mut to: &File, queued: &Receiver<Due>, back: bool) {
        let mut waiting = BinaryHeap::new();
        while !self.over.load(Ordering::Relaxed) {
            let now = Instant::now();
            let turn = waiting.peek().map(|Reverse((due, ..)): &Due| *due);
            if turn.is_some_and(|due| due <= now) {
                let Some(Reverse((_, _, packet))) = waiting.pop() else {
                    continue;
                };
                if self.mode.load(Ordering::Relaxed) == Mode::Pass as u8
                    && to.write(&packet).is_ok()
                    && !back
                {
                    self.carried
                        .fetch_add(packet.len() as u64, Ordering::Relaxed);
                }
                continue;
            }
            let pause = turn.map_or(Duration::from_millis(50), |due| due - now);
            match queued.recv_timeout(pause) {
                Ok(packet) => waiting.push(packet),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Ends a relay when it is dropped.
#[derive(Debug)]
pub(super) struct Ending(pub(super) Arc<Relay>);

/// Random numbers that are the same in each run.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn of(&mut self, per_mille: u64) -> bool {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % 1000 < per_mille
    }
}

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    words.sum()
}

fn checksum(mut sum: u32) -> [u8; 2] {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// The reset that answers a packet of TCP over IPv4, as a router or a host without the connection
/// sends it.
fn reset(packet: &[u8]) -> Option<Vec<u8>> {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    if packet.len() < 40 || packet[0] >> 4 != 4 || packet[9] != 6 {
        return None;
    }
    let (ip, tcp) = packet.split_at(usize::from(packet[0] & 15) * 4);
    let flags = *tcp.get(13)?;
    if flags & RST != 0 || tcp.len() < 20 {
        return None;
    }
    let field = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
    let data = tcp.len() - usize::from(tcp[12] >> 4) * 4;
    let after = field(4).wrapping_add(data as u32 + u32::from(flags & SYN != 0));
    let (number, acknowledged, flags) = match flags & ACK {
        0 => (0, after, RST | ACK),
        _ => (field(8), 0, RST),
    };
    let mut answer = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    answer.extend_from_slice(&ip[16..20]);
    answer.extend_from_slice(&ip[12..16]);
    answer.extend_from_slice(&tcp[2..4]);
    answer.extend_from_slice(&tcp[0..2]);
    answer.extend_from_slice(&u32::to_be_bytes(number));
    answer.extend_from_slice(&u32::to_be_bytes(acknowledged));
    answer.extend_from_slice(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
    let header = checksum(sum(&answer[..20]));
    answer[10..12].copy_from_slice(&header);
    // The pseudo header: addresses, protocol 6, 20 bytes.
    let whole = checksum(sum(&answer[12..]) + 6 + 20);
    answer[36..38].copy_from_slice(&whole);
    Some(answer)
}
