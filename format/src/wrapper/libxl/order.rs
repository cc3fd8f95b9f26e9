//! Order of the records in a libxl stream.
//!
//! The specification requires only that END be last. This module enforces that, and what a restorer
//! needs. Emulator records may come before or after LIBXC_CONTEXT (libxl writes them after).
//!
//! | rule | why |
//! |---|---|
//! | nothing after END | what follows does not belong to the stream |
//! | LIBXC_CONTEXT once | a second would restore a second guest into the first |
//! | END after LIBXC_CONTEXT | there would be no guest |
//! | CHECKPOINT_END only in a checkpoint | it ends the records of one |
//! | END, LIBXC_CONTEXT not in a checkpoint | the libxc layer waits for CHECKPOINT_END
//! | CHECKPOINT_STATE only between checkpoints | COLO's control words, read only there |
//!
//! C implementation: `in_checkpoint`, `in_checkpoint_state` and
//! `process_record` in `libxl_stream_read.c`.

use thiserror::Error;

use super::LibxlRecordKind;

/// A record that is out of place.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LibxlOrderError {
    /// A record after END.
    #[error("{kind} after END, expected nothing")]
    AfterEnd {
        /// The record.
        kind: LibxlRecordKind,
    },
    /// A second LIBXC_CONTEXT.
    #[error("LIBXC_CONTEXT for the second time")]
    Repeated,
    /// END without a guest before it.
    #[error("END although no LIBXC_CONTEXT has come: there is no guest in this stream")]
    Incomplete,
    /// A record that belongs in a checkpoint.
    #[error("{kind} outside a checkpoint of the libxc stream")]
    NotInCheckpoint {
        /// The record.
        kind: LibxlRecordKind,
    },
    /// A record that does not belong in a checkpoint.
    #[error("{kind} inside a checkpoint, expected emulator records and CHECKPOINT_END")]
    InCheckpoint {
        /// The record.
        kind: LibxlRecordKind,
    },
    /// CHECKPOINT_STATE in a stream without checkpoints.
    #[error("CHECKPOINT_STATE in a stream that has had no checkpoint")]
    NotCheckpointed,
}

/// The state machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct LibxlOrder {
    libxc_seen: bool,
    checkpointed: bool,
    in_checkpoint: bool,
    ended: bool,
}

impl LibxlOrder {
    /// The state at the start of a stream, after its header.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Called when the libxc layer has reached a CHECKPOINT: the records up to CHECKPOINT_END
    /// belong to that checkpoint.
    pub(crate) fn begin_checkpoint(&mut self) {
        self.checkpointed = true;
        self.in_checkpoint = true;
    }

    /// Whether END has come.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Checks and notes the next record.
    ///
    /// # Errors
    ///
    /// It is out of place; the state is then unchanged.
    pub(crate) fn admit(&mut self, kind: LibxlRecordKind) -> Result<(), LibxlOrderError> {
        use LibxlRecordKind as Kind;
        if self.ended {
            return Err(LibxlOrderError::AfterEnd { kind });
        }
        match kind {
            Kind::END | Kind::LIBXC_CONTEXT | Kind::CHECKPOINT_STATE if self.in_checkpoint => {
                return Err(LibxlOrderError::InCheckpoint { kind });
            }
            Kind::END if !self.libxc_seen => return Err(LibxlOrderError::Incomplete),
            Kind::END => self.ended = true,
            Kind::LIBXC_CONTEXT if self.libxc_seen => return Err(LibxlOrderError::Repeated),
            Kind::LIBXC_CONTEXT => self.libxc_seen = true,
            Kind::CHECKPOINT_END if !self.in_checkpoint => {
                return Err(LibxlOrderError::NotInCheckpoint { kind });
            }
            Kind::CHECKPOINT_END => self.in_checkpoint = false,
            Kind::CHECKPOINT_STATE if !self.checkpointed => {
                return Err(LibxlOrderError::NotCheckpointed);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
