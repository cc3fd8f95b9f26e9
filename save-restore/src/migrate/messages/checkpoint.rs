//! Messages between checkpoints, under Remus and COLO: how a sender takes its domain back, the
//! states of COLO, and the list of pages that a secondary has written.

use std::io::{self, Read, Write};

use thiserror::Error;
use xsr_format::frame::Pfn;
use xsr_format::record::{MAX_BODY, RecordKind};
use xsr_format::wrapper::libxl::{CheckpointState, LibxlRecordKind};

use super::MessageError;

/// How a sender of checkpoints takes its domain back, so that the receiver does not run the last
/// checkpoint when the sender hangs up. xl has no message for this. So the sender sends a
/// checkpoint that no receiver can apply: xl fails at it and destroys its copy, as our receiver
/// does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawal {
    /// Under Remus, between two checkpoints: a CHECKPOINT, a libxl record of type 0x7fffffff,
    /// a CHECKPOINT_END.
    Remus,
    /// Under COLO, while the secondary waits for a CHECKPOINT_STATE: one with the id 0x7fffffff.
    ColoBetween,
    /// Under COLO, while the secondary waits for a checkpoint's records: a libxc record of type
    /// 0x7fffffff, a CHECKPOINT, a CHECKPOINT_END.
    ColoWithin,
}

impl Withdrawal {
    /// The type or id that no receiver knows, and that no receiver may skip.
    pub const UNKNOWN: u32 = 0x7fff_ffff;

    /// The bytes to send.
    pub fn bytes(self) -> Vec<u8> {
        const CHECKPOINT: u32 = RecordKind::CHECKPOINT.0;
        const CHECKPOINT_END: u32 = LibxlRecordKind::CHECKPOINT_END.0;
        let kinds = match self {
            Self::Remus => [CHECKPOINT, Self::UNKNOWN, CHECKPOINT_END],
            Self::ColoWithin => [Self::UNKNOWN, CHECKPOINT, CHECKPOINT_END],
            Self::ColoBetween => return ColoWord::record(Self::UNKNOWN).to_vec(),
        };
        // Records without a body: the type, and a length of 0.
        let heads = kinds.map(|kind| u64::from(kind).to_le_bytes());
        heads.as_flattened().to_vec()
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The writer's error. The receiver may then run its copy.
    pub fn write(self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&self.bytes())?;
        to.flush()
    }

    /// Whether a libxl record of this type, at the end of a checkpoint, is a withdrawal. If the
    /// sender broke a checkpoint off just after another one, a CHECKPOINT of the libxc layer is
    /// read there.
    pub const fn is_libxl_record(kind: u32) -> bool {
        kind == Self::UNKNOWN || kind == RecordKind::CHECKPOINT.0
    }

    /// Whether a libxc record of this type is a withdrawal.
    pub const fn is_libxc_record(kind: u32) -> bool {
        kind == Self::UNKNOWN
    }
}

/// A CHECKPOINT_STATE of COLO, or the primary's withdrawal instead of one.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | type, 5, little endian |
/// | 4–7 | length of the body: 4 as libxl writes it, or 8 as the specification has it |
/// | 8–11 | id |
/// | 12–15 | zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColoWord {
    /// The state that an end has reached.
    State(CheckpointState),
    /// The primary takes the domain back ([`Withdrawal::ColoBetween`]).
    Withdrawn,
}

impl ColoWord {
    /// Length on the wire.
    pub const BYTES: usize = 16;

    fn record(id: u32) -> [u8; Self::BYTES] {
        let mut record = [0; Self::BYTES];
        let words = [LibxlRecordKind::CHECKPOINT_STATE.0, 4, id];
        for (place, word) in record.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        record
    }

    /// Encodes it as libxl does.
    pub fn encode(self) -> [u8; Self::BYTES] {
        Self::record(match self {
            Self::State(state) => state.value(),
            Self::Withdrawn => Withdrawal::UNKNOWN,
        })
    }

    /// Decodes a record.
    ///
    /// # Errors
    ///
    /// The record is not a CHECKPOINT_STATE with a known id.
    pub fn decode(record: [u8; Self::BYTES]) -> Result<Self, MessageError> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| record[at + i]));
        let known = match (word(0), word(4), word(8), word(12)) {
            (5, 4 | 8, Withdrawal::UNKNOWN, 0) => Some(Self::Withdrawn),
            (5, 4 | 8, id, 0) => CheckpointState::from_value(id).map(Self::State),
            _ => None,
        };
        known.ok_or_else(|| MessageError::Record {
            expected: "CHECKPOINT_STATE",
            got: format!("\"{}\"", record.escape_ascii()),
        })
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The writer's error.
    pub fn write(self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&self.encode())?;
        to.flush()
    }

    /// Reads one, and not a byte after it.
    ///
    /// # Errors
    ///
    /// The other end hung up or sent something else, or the reader failed.
    pub fn read(mut from: impl Read) -> Result<Self, MessageError> {
        let expected = "CHECKPOINT_STATE";
        let mut record = [0; Self::BYTES];
        from.read_exact(&mut record).map_err(|cause| {
            if cause.kind() == io::ErrorKind::UnexpectedEof {
                MessageError::HungUp { expected }
            } else {
                MessageError::Waiting { expected, cause }
            }
        })?;
        Self::decode(record)
    }
}

/// The head of COLO's CHECKPOINT_DIRTY_PFN_LIST. The pfns follow, 8 bytes each;
/// [`xsr_format::write::dirty_pfn_list`] encodes the whole record.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | type, 0xf, little endian |
/// | 4–7 | length of the body |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PfnListHead {
    /// How many bytes follow: a multiple of 8, and at most as many as a record may have.
    pub body_bytes: u32,
}

/// A record that is not a list of pfns.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PfnListError {
    /// The record has another type.
    #[error("the record is {0}, expected CHECKPOINT_DIRTY_PFN_LIST")]
    Kind(RecordKind),
    /// No list has this length.
    #[error("the record has {0} bytes, expected a multiple of 8, at most {MAX_BODY}")]
    Length(u32),
}

impl PfnListHead {
    /// Length on the wire.
    pub const BYTES: usize = 8;

    /// Decodes a head.
    ///
    /// # Errors
    ///
    /// The head has another type, or a length that no list has.
    pub fn decode(head: [u8; Self::BYTES]) -> Result<Self, PfnListError> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| head[at + i]));
        let (kind, body_bytes) = (RecordKind(word(0)), word(4));
        if kind != RecordKind::CHECKPOINT_DIRTY_PFN_LIST {
            return Err(PfnListError::Kind(kind));
        }
        if body_bytes > MAX_BODY || !body_bytes.is_multiple_of(8) {
            return Err(PfnListError::Length(body_bytes));
        }
        Ok(Self { body_bytes })
    }

    /// The pfns in a body.
    pub fn pfns(body: &[u8]) -> impl ExactSizeIterator<Item = Pfn> {
        let (pfns, _) = body.as_chunks::<8>();
        pfns.iter().map(|pfn| Pfn(u64::from_le_bytes(*pfn)))
    }
}
