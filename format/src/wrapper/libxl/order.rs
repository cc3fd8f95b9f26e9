//! Which record may come where in a libxl stream.
//!
//! The specification asks only that END be last. Enforced is that and what a
//! restorer cannot do without; emulator records may come before LIBXC_CONTEXT as
//! well as after it (libxl writes them after).
//!
//! | rule | why |
//! |---|---|
//! | nothing after END | the stream belongs to someone else from there |
//! | LIBXC_CONTEXT once | a second would restore a second guest into the first |
//! | END after LIBXC_CONTEXT | there would be no guest |
//! | CHECKPOINT_END only in a checkpoint, END and LIBXC_CONTEXT not in one | the libxc layer waits for the records of its checkpoint, up to CHECKPOINT_END |
//! | CHECKPOINT_STATE only between checkpoints | COLO's control words, which nobody else waits for |
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
        /// The record that came.
        kind: LibxlRecordKind,
    },
    /// A second LIBXC_CONTEXT.
    #[error("LIBXC_CONTEXT for the second time")]
    Repeated,
    /// END with no guest before it.
    #[error("END although no LIBXC_CONTEXT has come: there is no guest in this stream")]
    Incomplete,
    /// A record that belongs into a checkpoint.
    #[error("{kind} outside a checkpoint of the libxc stream")]
    NotInCheckpoint {
        /// The record that came.
        kind: LibxlRecordKind,
    },
    /// A record that does not belong into a checkpoint.
    #[error("{kind} inside a checkpoint, expected emulator records and CHECKPOINT_END")]
    InCheckpoint {
        /// The record that came.
        kind: LibxlRecordKind,
    },
    /// CHECKPOINT_STATE in a stream without checkpoints.
    #[error("CHECKPOINT_STATE in a stream that has had no checkpoint")]
    NotCheckpointed,
}

/// The state machine.
#[derive(Clone, Debug, Default)]
pub struct LibxlOrder {
    libxc_seen: bool,
    checkpointed: bool,
    in_checkpoint: bool,
    ended: bool,
}

impl LibxlOrder {
    /// At the start of a stream, after its header.
    pub fn new() -> Self {
        Self::default()
    }

    /// The libxc layer has come to a CHECKPOINT and hands over: what follows, up to
    /// CHECKPOINT_END, belongs to that checkpoint.
    pub fn begin_checkpoint(&mut self) {
        self.checkpointed = true;
        self.in_checkpoint = true;
    }

    /// Whether END has come.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Take the next record.
    ///
    /// # Errors
    ///
    /// It is out of place; the state is as before then.
    pub fn admit(&mut self, kind: LibxlRecordKind) -> Result<(), LibxlOrderError> {
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
