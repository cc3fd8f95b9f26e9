//! The migration protocol: every byte that either end sends besides the image itself.
//!
//! The messages are those of `xl migrate`, `xl remus` and `xl migrate-receive`, so that either end
//! may be an xl. The *image* is what `xl save` writes: xl header, libxl stream, and in it the libxc
//! stream. Each read takes the bytes of one message and no more, because the image follows on the
//! same connection.
//!
//! # Plain migration
//!
//! ```text
//!  sender                                   receiver
//!            ◄── Banner ────────────────────
//!            ──► image ─────────────────────►  makes the domain, paused
//!            ◄── Ready ─────────────────────
//!  renames
//!            ──► Go ────────────────────────►  renames, unpauses
//!            ◄── Report, Status 0 ──────────
//!  destroys
//!                      or, if the receiver failed after Ready,
//!            ◄── Report, Status ≠ 0 ────────
//!                                              destroys its copy
//!            ◄── Go ────────────────────────
//!  resumes
//! ```
//!
//! # Remus
//!
//! ```text
//!  sender                                   receiver
//!            ◄── Banner ────────────────────
//!            ──► image ─────────────────────►  makes the domain, paused
//!            ──► CHECKPOINT (libxc) ────────►
//!            ──► emulators (libxl) ─────────►
//!            ──► CHECKPOINT_END (libxl) ────►  this checkpoint is complete
//!            ──► changed pages … CHECKPOINT_END ►  and so on
//!
//!                      the sender takes its domain back
//!            ──► Withdrawal::Remus, end of the stream ►  destroys its copy
//!            ◄── Report, Status ≠ 0, Go ────
//!                      or the receiver failed
//!            ◄── Report, Status ≠ 0, Go, Reason ─
//!                      or the receiver lost the sender, and took over
//!            ◄── Report, Status 0 ──────────
//! ```
//!
//! xl's receiver says nothing after the banner, and xl's sender reads nothing: Remus has no
//! acknowledgement. Our receiver adds the reports, which an xl sender does not read, and the reason over a
//! socket only.
//!
//! # COLO
//!
//! ```text
//!  primary                                  secondary
//!            ◄── Banner ────────────────────
//!            ──► image … CHECKPOINT_END ────►  applies the checkpoint
//!            ◄── CHECKPOINT_STATE ready ────
//!  resumes                                     runs
//!            ◄── CHECKPOINT_STATE resumed ──
//!            ──► CHECKPOINT_STATE new ──────►
//!  suspends                                    suspends
//!            ◄── CHECKPOINT_STATE suspended ─
//!            ◄── CHECKPOINT_DIRTY_PFN_LIST ──
//!            ──► changed pages … CHECKPOINT_END ►  and so on
//!
//!                      the primary takes its domain back
//!            ──► Withdrawal::ColoBetween or ColoWithin ►  destroys its copy
//! ```
//!
//! The fixed messages have no specification. C implementation: `tools/xl/xl.h`,
//! `tools/xl/xl_migrate.c`. CHECKPOINT_END and CHECKPOINT_STATE: libxl migration stream,
//! `tools/libs/light/libxl_sr_stream_format.h`. CHECKPOINT_DIRTY_PFN_LIST: libxc migration stream,
//! `tools/libs/guest/xg_sr_restore.c:send_checkpoint_dirty_pfn_list`.
//!
//! ```
//! use xsr_save_restore::migrate::messages::{Message, Outcome, Status};
//!
//! let mut said = Vec::new();
//! Message::Report.write(&mut said)?;
//! Status::SUCCESS.write(&mut said)?;
//! assert_eq!(Outcome::read(&mut said.as_slice())?, Outcome::Runs);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::io::{self, Read, Write};

use thiserror::Error;

use crate::progress::Cancelled;
use crate::text::shown;

mod checkpoint;
mod last_words;

pub use checkpoint::{ColoWord, Withdrawal};
pub use last_words::LastWords;

/// A message of fixed bytes. All except the banner end in NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The receiver is ready for the image.
    Banner,
    /// The receiver has all of the image, and asks whether it may run the domain.
    Ready,
    /// The end that had the domain releases it: the sender to the receiver, or a receiver that
    /// failed and has destroyed its copy to the sender.
    Go,
    /// The receiver reports. A [`Status`] follows.
    Report,
}

impl Message {
    /// All messages.
    pub const ALL: [Self; 4] = [Self::Banner, Self::Ready, Self::Go, Self::Report];

    /// The bytes on the connection.
    pub const fn bytes(self) -> &'static [u8] {
        match self {
            Self::Banner => b"xl migration receiver ready, send binary domain data.\n",
            Self::Ready => b"domain received, ready to unpause\0",
            Self::Go => b"domain is yours, you are cleared to unpause\0",
            Self::Report => b"my copy unpause results are as follows\0",
        }
    }

    /// Its name in error messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Banner => "banner",
            Self::Ready => "\"ready\"",
            Self::Go => "\"go\"",
            Self::Report => "report",
        }
    }

    /// Writes the message.
    ///
    /// # Errors
    ///
    /// The writer's error. The last byte of the message has not been written then, so the other end
    /// cannot act on it.
    pub fn write(self, mut to: impl Write) -> Result<(), MessageError> {
        let expected = self.name();
        let written = to.write_all(self.bytes()).and_then(|()| to.flush());
        written.map_err(|cause| MessageError::Sending { expected, cause })
    }

    /// Reads the message, and no byte after it.
    ///
    /// # Errors
    ///
    /// The other end sent something else, or its reason for failing ([`Reason`]); it hung up before
    /// or within the message; or the reader failed. A different message is detected at the first
    /// byte that differs, without waiting for the rest.
    pub fn read(self, from: impl Read) -> Result<(), MessageError> {
        self.read_or(from, |_| false)
    }

    /// As [`Self::read`]. Once a byte differs, `differs` is called with the reader. If it returns
    /// true, the following bytes are read for the error message, up to the message's length;
    /// `differs` has to limit how long that takes.
    pub(super) fn read_or<R: Read>(
        self,
        mut from: R,
        differs: impl FnOnce(&mut R) -> bool,
    ) -> Result<(), MessageError> {
        let (words, expected) = (self.bytes(), self.name());
        let mut room = [0; 64];
        let room = &mut room[..words.len()];
        let mut filled = 0;
        let mut hung_up = false;
        let mut differs = Some(differs);
        loop {
            if !words.starts_with(&room[..filled])
                && let Some(differs) = differs.take()
                && !differs(&mut from)
            {
                break;
            }
            if filled == words.len() || hung_up {
                break;
            }
            match from.read(&mut room[filled..]) {
                Ok(0) => hung_up = true,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The bytes received say more than the reason why no more came, unless it was
                // cancelled.
                Err(error) if differs.is_none() && !Cancelled::is(&error) => break,
                Err(cause) => return Err(MessageError::Waiting { expected, cause }),
            }
        }
        let got = &room[..filled];
        if got == words {
            return Ok(());
        }
        Err(if got.is_empty() {
            MessageError::HungUp { expected }
        } else if words.starts_with(got) {
            MessageError::CutShort { expected }
        } else if let Some(why) = Reason::read(got, from) {
            MessageError::PeerFailed { why }
        } else {
            let got = got.to_vec();
            MessageError::Other {
                expected,
                got,
                hung_up,
            }
        })
    }
}

/// Why a receiver failed: its last message over a socket, where the sender does not see its stderr.
/// Neither kind of sender expects these bytes, so that the migration fails; ours shows them to the
/// user.
///
/// One line: `xsr: failed: `, the reason, a line feed.
///
/// ```
/// use xsr_save_restore::migrate::messages::{Message, MessageError, Reason};
///
/// let mut said = Vec::new();
/// Reason::write("no memory", &mut said)?;
/// let error = Message::Ready.read(said.as_slice()).unwrap_err();
/// assert!(matches!(error, MessageError::PeerFailed { why } if why == "no memory"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Reason;

impl Reason {
    const BEGIN: &[u8] = b"xsr: failed: ";

    /// The most bytes of a line.
    pub const LONGEST: usize = 1024;

    /// Writes a reason. Characters that would control a terminal are escaped ([`shown`]), and a
    /// long reason is cut off.
    ///
    /// # Errors
    ///
    /// The writer's error.
    pub fn write(why: &str, mut to: impl Write) -> io::Result<()> {
        let mut line = Self::BEGIN.to_vec();
        let room = Self::LONGEST - Self::BEGIN.len() - 1;
        line.extend(shown(why).bytes().take(room));
        line.push(b'\n');
        to.write_all(&line)?;
        to.flush()
    }

    /// Reads the reason from what the other end sent, of which `said` has been read: to the end of
    /// its line, or until nothing more comes. `None` if it is not a reason.
    pub fn read(said: &[u8], mut from: impl Read) -> Option<String> {
        let mut line = said.to_vec();
        let mut byte = [0];
        let may_be = |line: &[u8]| {
            let known = line.len().min(Self::BEGIN.len());
            line.len() < Self::LONGEST && line[..known] == Self::BEGIN[..known]
        };
        while may_be(&line) && !line.ends_with(b"\n") {
            match from.read(&mut byte) {
                Ok(1..) => line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
            }
        }
        let why = String::from_utf8_lossy(line.strip_prefix(Self::BEGIN)?);
        Some(shown(why.trim_end()))
    }
}

/// Why a message could not be sent or received.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Writing failed: the other end does not have all of the message.
    #[error("sending the {expected}")]
    Sending {
        /// The message.
        expected: &'static str,
        /// The error of the connection.
        #[source]
        cause: io::Error,
    },
    /// Reading failed.
    #[error("waiting for the {expected}")]
    Waiting {
        /// The message.
        expected: &'static str,
        /// The error of the connection.
        #[source]
        cause: io::Error,
    },
    /// The end of the stream came before the first byte.
    #[error("the other end hung up where its {expected} was expected")]
    HungUp {
        /// The message.
        expected: &'static str,
    },
    /// The end of the stream came before the last byte.
    #[error("the other end hung up inside its {expected}")]
    CutShort {
        /// The message.
        expected: &'static str,
    },
    /// Other bytes came.
    #[error(
        "the other end said \"{}\"{} where its {expected} was expected",
        got.escape_ascii(),
        if *hung_up { ", then hung up," } else { "" }
    )]
    Other {
        /// The message.
        expected: &'static str,
        /// The bytes received, no more than the message has.
        got: Vec<u8>,
        /// Whether the stream ended before that length.
        hung_up: bool,
    },
    /// The receiver sent something before it was told to go.
    #[error("the other end has hung up or said more than it was asked, before it was told to go")]
    TooEarly,
    /// The receiver reports why it failed.
    #[error("the other end has failed: {why}")]
    PeerFailed {
        /// The reason in its words; one line.
        why: String,
    },
    /// The receiver failed, and did not report that its copy is gone.
    #[error("the other end failed (status {status}), and did not say that its copy is gone")]
    NotGivenBack {
        /// The status that it reported.
        status: u8,
        /// The error in place of [`Message::Go`].
        #[source]
        cause: Box<MessageError>,
    },
    /// The end of the conversation contains no report.
    #[error("the other end did not say what became of its copy")]
    NoReport,
    /// A record that is not the expected one.
    #[error("the other end sent {got}, expected {expected}")]
    Record {
        /// The expected record.
        expected: &'static str,
        /// What came instead.
        got: String,
    },
}

/// The receiver's status after [`Message::Report`]: 0 if the domain runs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// The receiver runs the domain.
    pub const SUCCESS: Self = Self(0);
    /// The receiver does not run it. xl sends a libxl error code instead; a sender only checks
    /// whether it is 0.
    pub const FAILED: Self = Self(1);

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The writer's error.
    pub fn write(self, mut to: impl Write) -> Result<(), MessageError> {
        let expected = "status";
        let written = to.write_all(&[self.0]).and_then(|()| to.flush());
        written.map_err(|cause| MessageError::Sending { expected, cause })
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// The other end hung up; the reader failed.
    pub fn read(mut from: impl Read) -> Result<Self, MessageError> {
        let expected = "status";
        let mut status = [0];
        from.read_exact(&mut status).map_err(|cause| {
            if cause.kind() == io::ErrorKind::UnexpectedEof {
                MessageError::HungUp { expected }
            } else {
                MessageError::Waiting { expected, cause }
            }
        })?;
        Ok(Self(status[0]))
    }
}

/// Which end has the domain, according to the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The receiver runs it.
    Runs,
    /// The sender has it: the receiver failed, and has destroyed its copy.
    GivenBack {
        /// Not 0.
        status: u8,
    },
}

impl Outcome {
    /// Reads what a sender receives after [`Message::Go`].
    ///
    /// # Errors
    ///
    /// It is unknown whether the receiver runs the domain.
    pub fn read(mut from: impl Read) -> Result<Self, MessageError> {
        Message::Report.read(&mut from)?;
        match Status::read(&mut from)? {
            Status::SUCCESS => Ok(Self::Runs),
            Status(status) => {
                Message::Go
                    .read(&mut from)
                    .map_err(|cause| MessageError::NotGivenBack {
                        status,
                        cause: Box::new(cause),
                    })?;
                Ok(Self::GivenBack { status })
            }
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runs => f.write_str("the other end runs the domain"),
            Self::GivenBack { status } => write!(
                f,
                "the other end has failed (status {status}); what it printed says why"
            ),
        }
    }
}

#[cfg(test)]
#[path = "messages/tests.rs"]
mod tests;
