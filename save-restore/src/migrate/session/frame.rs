//! The bytes of a link: hello, welcome and frames, as `docs/session.md` specifies them.

use std::time::Duration;

use thiserror::Error;

/// The version of the protocol.
pub(super) const VERSION: u8 = 1;

/// Follows the version in a hello and in a welcome.
const MAGIC: [u8; 7] = *b"xsrlink";

/// The most bytes that a chunk has.
pub(super) const CHUNK: usize = 128 << 10;

/// The number of links that a session may have.
pub(super) const SLOTS: u8 = 16;

/// The most bytes that the chunks in transit may have in total, and that the peer announces.
pub(super) const WINDOW: u64 = 16 << 20;

/// The most chunks that may be in transit.
pub(super) const CHUNKS: u64 = 4096;

/// The length of a frame's header.
pub(super) const HEADER: usize = 16;

/// The length of the contents, before compressed ones and in the place of zeroes.
const LENGTH: usize = 4;

/// The longest frame.
pub(super) const LONGEST: usize = HEADER + LENGTH + CHUNK;

/// A violation of the session's protocol by the peer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum Malformed {
    #[error("what arrived is not a session of xsr")]
    Magic,
    #[error("the other end speaks version {0} of the session, and this end version 1")]
    Version(u8),
    #[error("a reserved byte is not zero")]
    Reserved,
    #[error("purpose {0} of a link is unknown")]
    Purpose(u8),
    #[error("slot {0} of a link does not exist")]
    Slot(u8),
    #[error("answer {0} to a link is unknown")]
    Answer(u8),
    #[error("a frame of kind {kind} and form {form} is unknown")]
    Kind { kind: u8, form: u8 },
    #[error("a frame of kind {kind} and form {form} has {length} bytes")]
    Length { kind: u8, form: u8, length: u32 },
    #[error("a frame without a number has the number {0}")]
    Number(u64),
    #[error("a chunk has {0} bytes")]
    Contents(u32),
    #[error("the contents of chunk {0} cannot be decompressed")]
    Compressed(u64),
    #[error("chunk {0} is beyond the window")]
    BeyondWindow(u64),
    #[error("chunk {0} follows the end")]
    AfterEnd(u64),
    #[error("an acknowledgement names chunk {0}, which was not sent")]
    NotSent(u64),
    #[error("the other end has left without the end of what it sends")]
    ByeWithoutEnd,
}

/// The token of a session.
#[derive(Clone, Copy)]
pub(super) struct Token(pub(super) [u8; 32]);

impl Token {
    /// Whether both are the same, in a time that does not depend on where they differ.
    pub(super) fn is(&self, other: &Self) -> bool {
        let pairs = self.0.iter().zip(&other.0);
        let differ = pairs.fold(0, |differ, (a, b)| differ | (a ^ b));
        std::hint::black_box(differ) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Why a client connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For a new session.
    New,
    /// For a link of an existing session.
    Join,
}

/// What a client sends first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) slot: u8,
    /// For how long a session without a link is kept.
    pub(super) limit: Duration,
    pub(super) token: Token,
    /// The first chunk that has not arrived.
    pub(super) received: u64,
    pub(super) window: u64,
}

/// Reads `N` bytes at an offset.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

fn zero(bytes: &[u8]) -> Result<(), Malformed> {
    match bytes.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(Malformed::Reserved),
    }
}

fn version(bytes: &[u8]) -> Result<(), Malformed> {
    match bytes[1..8] == MAGIC {
        false => Err(Malformed::Magic),
        true if bytes[0] != VERSION => Err(Malformed::Version(bytes[0])),
        true => Ok(()),
    }
}

impl Hello {
    pub(super) const LENGTH: usize = 64;

    pub(super) fn bytes(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = VERSION;
        bytes[1..8].copy_from_slice(&MAGIC);
        bytes[8] = match self.purpose {
            Purpose::New => 0,
            Purpose::Join => 1,
        };
        bytes[9] = self.slot;
        let limit = u32::try_from(self.limit.as_millis()).unwrap_or(u32::MAX);
        bytes[12..16].copy_from_slice(&limit.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.token.0);
        bytes[48..56].copy_from_slice(&self.received.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.window.to_le_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        version(bytes)?;
        zero(&bytes[10..12])?;
        Ok(Self {
            purpose: match bytes[8] {
                0 => Purpose::New,
                1 => Purpose::Join,
                other => return Err(Malformed::Purpose(other)),
            },
            slot: match bytes[9] {
                slot if slot < SLOTS => slot,
                other => return Err(Malformed::Slot(other)),
            },
            limit: Duration::from_millis(u32_at(bytes, 12).into()),
            token: Token(field(bytes, 16)),
            received: u64_at(bytes, 48),
            window: u64_at(bytes, 56),
        })
    }
}

/// What a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Accepted,
    UnknownVersion,
    NoSuchSession,
    AlreadyThere,
    TooLate,
}

/// The answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Welcome {
    pub(super) answer: Answer,
    /// The first chunk that has not arrived.
    pub(super) received: u64,
    pub(super) window: u64,
}

impl Welcome {
    pub(super) const LENGTH: usize = 32;

    /// An answer that is not a yes.
    pub(super) const fn refusal(answer: Answer) -> Self {
        Self {
            answer,
            received: 0,
            window: 0,
        }
    }

    pub(super) fn bytes(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = VERSION;
        bytes[1..8].copy_from_slice(&MAGIC);
        bytes[8] = match self.answer {
            Answer::Accepted => 0,
            Answer::UnknownVersion => 1,
            Answer::NoSuchSession => 2,
            Answer::AlreadyThere => 3,
            Answer::TooLate => 4,
        };
        bytes[16..24].copy_from_slice(&self.received.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.window.to_le_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8; Self::LENGTH]) -> Result<Self, Malformed> {
        version(bytes)?;
        zero(&bytes[9..16])?;
        Ok(Self {
            answer: match bytes[8] {
                0 => Answer::Accepted,
                1 => Answer::UnknownVersion,
                2 => Answer::NoSuchSession,
                3 => Answer::AlreadyThere,
                4 => Answer::TooLate,
                other => return Err(Malformed::Answer(other)),
            },
            received: u64_at(bytes, 16),
            window: u64_at(bytes, 24),
        })
    }
}

/// The form in which the contents of a chunk travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contents<'a> {
    /// As they are.
    Plain(&'a [u8]),
    /// Compressed, and their length.
    Zstd { length: usize, frame: &'a [u8] },
    /// This many zeroes.
    Zeroes(usize),
    /// The end of the stream.
    End,
}

/// A frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    Chunk {
        number: u64,
        contents: Contents<'a>,
    },
    /// All chunks before `received` have arrived; the process has read those before `read`.
    Acknowledged {
        received: u64,
        read: u64,
    },
    Alive,
    Bye,
    Abort,
}

/// The kind, the form, the length of the body and the number of a frame.
#[derive(Clone, Copy)]
struct Header {
    kind: u8,
    form: u8,
    length: u32,
    number: u64,
}

impl Header {
    fn read(bytes: &[u8; HEADER]) -> Result<Self, Malformed> {
        let header = Self {
            kind: bytes[0],
            form: bytes[1],
            length: u32_at(bytes, 4),
            number: u64_at(bytes, 8),
        };
        zero(&bytes[2..4])?;
        header.check()?;
        Ok(header)
    }

    /// Whether a frame may look like this, before its body has arrived.
    fn check(self) -> Result<(), Malformed> {
        let Self {
            kind,
            form,
            length,
            number,
        } = self;
        let bytes = length as usize;
        let right = match (kind, form) {
            (1, 0) => bytes > 0 && bytes <= CHUNK,
            (1, 1) => bytes > LENGTH && bytes < LENGTH + CHUNK,
            (1, 2) => bytes == LENGTH,
            (1, 3) => bytes == 0,
            (2, 0) => bytes == 8,
            (3..=5, 0) if number != 0 => return Err(Malformed::Number(number)),
            (3..=5, 0) => bytes == 0,
            _ => return Err(Malformed::Kind { kind, form }),
        };
        match right {
            true => Ok(()),
            false => Err(Malformed::Length { kind, form, length }),
        }
    }
}

/// The length of the contents, which stand before them.
fn stated(body: &[u8]) -> Result<usize, Malformed> {
    let length = u32_at(body, 0);
    match length as usize {
        bytes if bytes > 0 && bytes <= CHUNK => Ok(bytes),
        _ => Err(Malformed::Contents(length)),
    }
}

impl<'a> Frame<'a> {
    /// The first frame of `bytes`, and its length; `None` if more bytes are needed. A header that
    /// is wrong is refused before its body has arrived.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::read(header)?;
        let length = header.length as usize;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let number = header.number;
        let chunk = |contents| Self::Chunk { number, contents };
        let frame = match (header.kind, header.form) {
            (1, 0) => chunk(Contents::Plain(body)),
            (1, 1) => {
                let contents = stated(body)?;
                let frame = &body[LENGTH..];
                // Such a chunk would have been sent as it is.
                if frame.len() >= contents {
                    return Err(Malformed::Compressed(number));
                }
                chunk(Contents::Zstd {
                    length: contents,
                    frame,
                })
            }
            (1, 2) => chunk(Contents::Zeroes(stated(body)?)),
            (1, _) => chunk(Contents::End),
            (2, _) => Self::Acknowledged {
                received: number,
                read: u64_at(body, 0),
            },
            (3, _) => Self::Alive,
            (4, _) => Self::Bye,
            _ => Self::Abort,
        };
        Ok(Some((frame, HEADER + length)))
    }

    /// Appends the frame's bytes.
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        let mut header = |kind, form, length: usize, number: u64| {
            // At most `LENGTH + CHUNK`.
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            to.extend_from_slice(&[kind, form, 0, 0]);
            to.extend_from_slice(&length.to_le_bytes());
            to.extend_from_slice(&number.to_le_bytes());
        };
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
        match *self {
            Self::Chunk { number, contents } => match contents {
                Contents::Plain(bytes) => {
                    header(1, 0, bytes.len(), number);
                    to.extend_from_slice(bytes);
                }
                Contents::Zstd {
                    length: contents,
                    frame,
                } => {
                    header(1, 1, LENGTH + frame.len(), number);
                    to.extend_from_slice(&length(contents));
                    to.extend_from_slice(frame);
                }
                Contents::Zeroes(contents) => {
                    header(1, 2, LENGTH, number);
                    to.extend_from_slice(&length(contents));
                }
                Contents::End => header(1, 3, 0, number),
            },
            Self::Acknowledged { received, read } => {
                header(2, 0, 8, received);
                to.extend_from_slice(&read.to_le_bytes());
            }
            Self::Alive => header(3, 0, 0, 0),
            Self::Bye => header(4, 0, 0, 0),
            Self::Abort => header(5, 0, 0, 0),
        }
    }
}

#[cfg(test)]
#[path = "frame/tests.rs"]
mod tests;
