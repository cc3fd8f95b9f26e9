//! Messages between checkpoints, under Remus and COLO: how a sender takes its domain back, and
//! the states of COLO.

use std::io::{self, Read, Write};

use xsr_format::record::RecordKind;
use xsr_format::wrapper::libxl::{CheckpointState, CheckpointStateRecord, LibxlRecordKind};

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
        let checkpoint = RecordKind::CHECKPOINT.empty_record();
        let end = LibxlRecordKind::CHECKPOINT_END.empty_record();
        match self {
            Self::Remus => {
                let unknown = LibxlRecordKind(Self::UNKNOWN).empty_record();
                [checkpoint, unknown, end].concat()
            }
            Self::ColoWithin => {
                let unknown = RecordKind(Self::UNKNOWN).empty_record();
                [unknown, checkpoint, end].concat()
            }
            Self::ColoBetween => ColoWord::Withdrawn.encode().to_vec(),
        }
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
    /// sender aborts a checkpoint just after another one, a CHECKPOINT of the libxc layer comes
    /// instead.
    pub const fn is_libxl_record(kind: u32) -> bool {
        kind == Self::UNKNOWN || kind == RecordKind::CHECKPOINT.0
    }

    /// Whether a libxc record of this type is a withdrawal.
    pub const fn is_libxc_record(kind: u32) -> bool {
        kind == Self::UNKNOWN
    }
}

/// A CHECKPOINT_STATE of COLO, or the primary's withdrawal instead of one. Both are a
/// [`CheckpointStateRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColoWord {
    /// The state that an end has reached.
    State(CheckpointState),
    /// The primary takes the domain back ([`Withdrawal::ColoBetween`]).
    Withdrawn,
}

impl ColoWord {
    /// Length on the wire.
    pub const BYTES: usize = CheckpointStateRecord::BYTES;

    /// Encodes it as libxl does.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let id = match self {
            Self::State(state) => state.value(),
            Self::Withdrawn => Withdrawal::UNKNOWN,
        };
        CheckpointStateRecord(id).encode()
    }

    /// Decodes a record.
    ///
    /// # Errors
    ///
    /// The record is not a CHECKPOINT_STATE with a known id.
    pub fn decode(record: [u8; Self::BYTES]) -> Result<Self, MessageError> {
        let known = CheckpointStateRecord::decode(record).and_then(|record| match record.0 {
            Withdrawal::UNKNOWN => Some(Self::Withdrawn),
            id => CheckpointState::from_value(id).map(Self::State),
        });
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
