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
use std::time::Duration;

use xsr_format::wrapper::libxl::{CheckpointState, LibxlRecordKind};
use xsr_save_restore::back_channel::{BackChannel, FdBackChannel};
use xsr_save_restore::progress::Cancel;

use crate::handshake;

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
    /// What came since the last CHECKPOINT_STATE, but for the middle of what is long: the
    /// words with which an end gives up may be among it.
    since: Vec<u8>,
}

/// Octets that are kept of what came.
const KEPT: usize = 1 << 16;

impl<'a> Hearing<'a> {
    /// Hear until somebody cancels.
    pub(crate) fn new(from: &'a File, cancel: Cancel) -> io::Result<Self> {
        Ok(Self {
            channel: FdBackChannel::cancellable(from, cancel)?,
            since: Vec::new(),
        })
    }

    /// What came since the last state, the last of it.
    pub(crate) fn into_rest(self) -> Vec<u8> {
        self.since
    }

    /// Hear how far the secondary is.
    ///
    /// # Errors
    ///
    /// It hung up, or is not there, or says something else.
    pub(crate) fn expect(&mut self, state: CheckpointState) -> io::Result<()> {
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
        let n = self.channel.read(room)?;
        self.since.extend_from_slice(&room[..n]);
        let long = self.since.len().saturating_sub(KEPT);
        self.since.drain(..long);
        Ok(n)
    }
}

impl BackChannel for Hearing<'_> {
    fn has_more_within(&mut self, time: Duration) -> io::Result<bool> {
        self.channel.has_more_within(time)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

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
