//! What the two ends of COLO say to each other beside the checkpoints: libxl's
//! CHECKPOINT_STATE, which the secondary sends over the other direction of the connection,
//! and the primary in the stream.
//!
//! ```text
//!  primary                                   secondary
//!  checkpoint ──► records, CHECKPOINT_END ──►  applies it
//!             ◄── SVM_READY ───────────────
//!  runs on                                     runs
//!             ◄── SVM_RESUMED ─────────────
//!             ──► NEW ─────────────────────►
//!  suspends                                    suspends
//!             ◄── SVM_SUSPENDED, its pages ─
//! ```
//!
//! Specification: libxl migration stream, "CHECKPOINT_STATE". C implementation:
//! `tools/libs/light/libxl_colo_save.c`, `libxl_colo_restore.c`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use xsr_format::wrapper::libxl::{CheckpointState, LibxlRecordKind};
use xsr_save_restore::back_channel::{BackChannel, FdBackChannel};

use crate::handshake;
use crate::interrupt::{Interrupt, readable_within};

/// Octets of a CHECKPOINT_STATE.
pub(crate) const STATE_OCTETS: usize = 16;

/// The id in a CHECKPOINT_STATE with which a primary takes its domain back: none that anybody
/// knows. xl's secondary, too, destroys its copy then.
const WITHDRAWAL: u32 = 0x7fff_ffff;

/// A record of the libxc layer that nobody knows, and nobody may skip: with it a primary
/// takes its domain back that is in the midst of a checkpoint.
pub(crate) const WITHDRAWAL_RECORD: u32 = 0x7fff_ffff;

fn record(id: u32) -> [u8; STATE_OCTETS] {
    let mut record = [0; STATE_OCTETS];
    let words = [LibxlRecordKind::CHECKPOINT_STATE.0, 4, id];
    for (place, word) in record.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    record
}

/// Say how far this end is, in the octets of libxl.
///
/// # Errors
///
/// What the sink says.
pub(crate) fn send(to: &mut impl Write, state: CheckpointState) -> io::Result<()> {
    to.write_all(&record(state.value()))?;
    to.flush()
}

/// Take the domain back that the other end runs, too, while it waits for a checkpoint.
///
/// # Errors
///
/// What the sink says. The other end may go on with its own then.
pub(crate) fn withdraw(to: &mut impl Write) -> io::Result<()> {
    to.write_all(&record(WITHDRAWAL))?;
    to.flush()
}

/// The same, with the other end in the midst of a checkpoint: one that cannot be applied.
///
/// # Errors
///
/// As [`withdraw`].
pub(crate) fn withdraw_within(to: &mut impl Write) -> io::Result<()> {
    const CHECKPOINT: u32 = 0xe;
    let kinds = [
        WITHDRAWAL_RECORD,
        CHECKPOINT,
        LibxlRecordKind::CHECKPOINT_END.0,
    ];
    handshake::without_bodies(to, kinds)
}

/// What a CHECKPOINT_STATE says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    State(CheckpointState),
    /// The primary takes its domain back.
    Withdrawn,
    /// It is none.
    Nonsense,
}

/// Understand a record.
pub(crate) fn said(octets: [u8; STATE_OCTETS]) -> Said {
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| octets[at + i]));
    // A body of 8 octets is the specification's, of which libxl writes the first 4.
    match (word(0), word(4), word(8), word(12)) {
        (5, 4 | 8, WITHDRAWAL, 0) => Said::Withdrawn,
        (5, 4 | 8, id, 0) => CheckpointState::from_value(id).map_or(Said::Nonsense, Said::State),
        _ => Said::Nonsense,
    }
}

/// What the primary hears of the secondary.
#[derive(Debug)]
pub(crate) struct Hearing<'a> {
    channel: FdBackChannel<&'a File>,
    from: &'a File,
    interrupt: Interrupt,
    /// How long an answer may take, and until when this one may.
    patience: Duration,
    until: Instant,
    /// What came since the last CHECKPOINT_STATE, but for the middle of what is long: the
    /// words with which an end gives up may be among it.
    since: Vec<u8>,
}

/// Octets that are kept of what came.
const KEPT: usize = 1 << 16;

impl<'a> Hearing<'a> {
    /// Hear until somebody cuts the connection, and no answer for longer than `patience`.
    pub(crate) fn new(
        from: &'a File,
        interrupt: Interrupt,
        patience: Duration,
    ) -> io::Result<Self> {
        Ok(Self {
            channel: FdBackChannel::cancellable(from, interrupt.cut().clone())?,
            from,
            interrupt,
            patience,
            until: Instant::now() + patience,
            since: Vec::new(),
        })
    }

    /// What came since the last state, the last of it.
    pub(crate) fn into_rest(self) -> Vec<u8> {
        self.since
    }

    /// What it says in the place of anything else when it has come to its end: it is heard to
    /// that. [`Self::into_rest`] has it, too.
    pub(crate) fn given_up(&mut self) -> Option<io::Error> {
        let report = handshake::report_in(&self.since)?;
        self.until = Instant::now() + self.patience;
        let mut octet = [0];
        while handshake::status(&self.since[report..]).is_none() {
            // What broke the connection matters less than what had begun to be said.
            match self.read(&mut octet) {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
            if handshake::report_in(&self.since) != Some(report) {
                return None;
            }
        }
        Some(io::Error::other(
            match handshake::status(&self.since[report..]) {
                Some(status) => handshake::status_words(status),
                None => {
                    "the other end began to say what became of its domain, and hung up".to_owned()
                }
            },
        ))
    }

    /// Hear how far the secondary is. What follows is part of the same answer.
    ///
    /// # Errors
    ///
    /// It hung up, or is not there, or says something else, or nothing for too long.
    pub(crate) fn expect(&mut self, state: CheckpointState) -> io::Result<()> {
        self.until = Instant::now() + self.patience;
        let mut octets = [0; STATE_OCTETS];
        self.read_exact(&mut octets).map_err(|error| match error {
            error if error.kind() == io::ErrorKind::UnexpectedEof => {
                io::Error::new(error.kind(), "the other end hung up")
            }
            error => error,
        })?;
        if said(octets) != Said::State(state) {
            return Err(io::Error::other(format!(
                "the other end said {:?} where it had to say that its domain is {state:?}",
                octets.escape_ascii().to_string()
            )));
        }
        self.since.clear();
        Ok(())
    }
}

impl Read for Hearing<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while !self.interrupt.cut().is_cancelled() {
            let left = self.until.saturating_duration_since(Instant::now());
            if readable_within(Some(self.from), left)? {
                break;
            }
            if left.is_zero() {
                let seconds = self.patience.as_secs();
                let why = format!("the other end has not answered in {seconds} s");
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
        }
        let n = self.channel.read(room)?;
        self.interrupt.has_carried(n);
        self.since.extend_from_slice(&room[..n]);
        let long = self.since.len().saturating_sub(KEPT);
        self.since.drain(..long);
        Ok(n)
    }
}

impl BackChannel for Hearing<'_> {
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>> {
        self.channel.look_ahead()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::os::fd::OwnedFd;
    use std::sync::atomic::Ordering;

    use super::*;

    /// What a primary hears that has so much patience, and is then hung up on.
    fn hearing<T>(
        octets: &[u8],
        patience: Duration,
        of: impl Fn(&mut Hearing<'_>) -> T,
    ) -> (T, u64) {
        let (from, mut to) = io::pipe().unwrap();
        to.write_all(octets).unwrap();
        // Who has patience gets to the end.
        let open = (patience == Duration::ZERO).then_some(to);
        let from = File::from(OwnedFd::from(from));
        let interrupt = Interrupt::catch().unwrap();
        let mut hearing = Hearing::new(&from, interrupt.clone(), patience).unwrap();
        let heard = of(&mut hearing);
        drop(open);
        (heard, interrupt.carried().load(Ordering::Relaxed))
    }

    #[test]
    fn what_is_heard_moves_and_what_is_not_ends_the_wait() {
        let ready = record(CheckpointState::Ready.value());
        let patience = Duration::from_secs(60);
        let expect = |hearing: &mut Hearing<'_>| hearing.expect(CheckpointState::Ready);
        let (heard, carried) = hearing(&ready, patience, expect);
        heard.unwrap();
        assert_eq!(carried, 16);
        // In the midst of a word, too.
        for said in [0, 7] {
            let (heard, carried) = hearing(&ready[..said], Duration::ZERO, expect);
            let error = heard.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert_eq!(carried, said as u64);
        }
    }

    #[test]
    fn an_end_that_gives_up_is_heard_out() {
        let report = b"my copy unpause results are as follows\0";
        let said = |status: &[u8]| [report, status, b"domain is yours"].concat();
        let failed = "the other end has failed (status 1)";
        for (octets, expected) in [
            (said(&[1]), failed),
            (said(&[0]), "the other end runs the domain"),
            (report.to_vec(), "and hung up"),
            (report[..16].to_vec(), "and hung up"),
        ] {
            let (why, _) = hearing(&octets, Duration::from_secs(60), |hearing| {
                hearing.expect(CheckpointState::Ready).unwrap_err();
                hearing.given_up().unwrap().to_string()
            });
            assert!(why.contains(expected), "{why}");
            // In the place of a list's header.
            let (why, _) = hearing(&octets, Duration::from_secs(60), |hearing| {
                hearing.read_exact(&mut [0; 8]).unwrap();
                hearing.given_up().unwrap().to_string()
            });
            assert!(why.contains(expected), "{why}");
        }
        let state = record(CheckpointState::Resumed.value());
        let (why, _) = hearing(&state, Duration::from_secs(60), |hearing| {
            hearing.expect(CheckpointState::Ready).unwrap_err();
            hearing.given_up()
        });
        assert!(why.is_none());
    }

    #[test]
    fn states_are_octets_of_libxl() {
        let mut to = Vec::new();
        send(&mut to, CheckpointState::Resumed).unwrap();
        assert_eq!(to, [5, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        let octets: [u8; 16] = to.try_into().unwrap();
        assert_eq!(said(octets), Said::State(CheckpointState::Resumed));
        for (at, octet) in [(0, 6), (4, 5), (8, 4), (12, 1)] {
            let mut other = octets;
            other[at] = octet;
            assert_eq!(said(other), Said::Nonsense);
        }
        let mut to = Vec::new();
        withdraw(&mut to).unwrap();
        assert_eq!(said(to.try_into().unwrap()), Said::Withdrawn);
    }
}
