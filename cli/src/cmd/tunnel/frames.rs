//! What the two ends of a tunnel tell each other over their session, and the pump that carries a
//! descriptor.
//!
//! A frame is a header of 8 bytes (kind, three reserved bytes, length in 4 bytes, little endian) and
//! a body. docs/session.md has the table.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xsr_save_restore::migrate::connection::{
    ConnectionError, ConnectionReader, ConnectionWriter, Wait,
};
use xsr_save_restore::migrate::session::Session;
use xsr_save_restore::progress::Cancel;

/// The most bytes of a body.
const LONGEST: usize = 64 << 10;

const HEADER: usize = 8;

/// How often a pump looks whether it has something else to do.
const LOOK: Duration = Duration::from_millis(20);

const DATA: u8 = 1;
const END: u8 = 2;
const ERRORS: u8 = 3;
const UNREAD: u8 = 4;
const EXIT: u8 = 5;

/// What one end tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// For COMMAND's stdin, or from its stdout.
    Data(&'a [u8]),
    /// There is no more of that.
    End,
    /// From COMMAND's stderr.
    Errors(&'a [u8]),
    /// What this end gets as data is not read any more.
    Unread,
    /// COMMAND has ended, and all of its output was sent.
    Exit(u8),
}

impl<'a> Frame<'a> {
    /// Its header and its body.
    fn parts(&'a self) -> ([u8; HEADER], &'a [u8]) {
        let (kind, body) = match self {
            Self::Data(bytes) => (DATA, *bytes),
            Self::End => (END, &[][..]),
            Self::Errors(bytes) => (ERRORS, *bytes),
            Self::Unread => (UNREAD, &[][..]),
            Self::Exit(code) => (EXIT, std::slice::from_ref(code)),
        };
        let mut header = [0; HEADER];
        header[0] = kind;
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        header[4..].copy_from_slice(&length.to_le_bytes());
        (header, body)
    }

    /// The length of the body that a header announces.
    fn length(header: [u8; HEADER]) -> io::Result<usize> {
        let [kind, a, b, c, length @ ..] = header;
        let length = u32::from_le_bytes(length);
        let known = match kind {
            DATA | ERRORS => (1..=LONGEST).contains(&(length as usize)),
            END | UNREAD => length == 0,
            EXIT => length == 1,
            _ => false,
        };
        match known && [a, b, c] == [0; 3] {
            true => Ok(length as usize),
            false => Err(malformed(&format!(
                "a frame of kind {kind} with {length} bytes"
            ))),
        }
    }

    fn of(kind: u8, body: &'a [u8]) -> io::Result<Self> {
        Ok(match (kind, body) {
            (DATA, _) => Self::Data(body),
            (END, _) => Self::End,
            (ERRORS, _) => Self::Errors(body),
            (UNREAD, _) => Self::Unread,
            (EXIT, [code]) => Self::Exit(*code),
            _ => return Err(malformed("a frame of an unknown kind")),
        })
    }
}

fn malformed(what: &str) -> io::Error {
    let why = format!("the other end of the tunnel sends {what}");
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Writes frames. Each is written whole, whichever thread writes it.
#[derive(Debug)]
pub(super) struct Speaker {
    session: Arc<Session>,
    one: Mutex<Vec<u8>>,
}

impl Speaker {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            one: Mutex::default(),
        }
    }

    pub(super) fn say(&self, frame: &Frame<'_>, wait: Wait<'_>) -> io::Result<()> {
        let (header, body) = frame.parts();
        let mut bytes = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.clear();
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(body);
        ConnectionWriter::new(&*self.session, wait).write_all(&bytes)
    }
}

/// Reads frames.
#[derive(Debug)]
pub(super) struct Hearing<'s> {
    session: &'s Session,
    wait: Wait<'s>,
    body: Vec<u8>,
}

impl<'s> Hearing<'s> {
    pub(super) fn new(session: &'s Session, wait: Wait<'s>) -> Self {
        Self {
            session,
            wait,
            body: Vec::new(),
        }
    }

    /// Waits for the next frame.
    pub(super) fn next(&mut self) -> Result<Frame<'_>> {
        let mut header = [0; HEADER];
        let mut reader = ConnectionReader::new(self.session, self.wait).context(LOST)?;
        let read = reader.read_exact(&mut header).and_then(|()| {
            self.body.resize(Frame::length(header)?, 0);
            reader.read_exact(&mut self.body)
        });
        read.map_err(in_words).context(LOST)?;
        Frame::of(header[0], &self.body).context(LOST)
    }
}

const LOST: &str = "the tunnel is lost";

/// The end of the stream without an exit code is the loss of the other end.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof if ConnectionError::of(&error).is_none() => {
            io::Error::new(error.kind(), "the other end has ended without an exit code")
        }
        _ => error,
    }
}

/// What the threads of an end tell each other.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// The data that the other end sends are not read here: it is to be told.
    pub(super) unread: AtomicBool,
    /// The other end does not read what this end sends as data.
    pub(super) refused: AtomicBool,
}

/// Carries what a descriptor yields, to its end and beyond: a loss of the session does not stop a
/// command that writes.
#[derive(Debug)]
pub(super) struct Pump {
    pub(super) speaker: Arc<Speaker>,
    pub(super) flags: Arc<Flags>,
    /// It carries COMMAND's stderr.
    pub(super) errors: bool,
    /// Everything was carried.
    pub(super) ended: Arc<AtomicBool>,
    /// It is to end.
    pub(super) done: Cancel,
}

impl Pump {
    pub(super) fn run(self, from: File) {
        let mut from = Some(from);
        let mut told = self.errors;
        let mut lost = false;
        let mut room = vec![0; LONGEST];
        while !self.done.is_cancelled() {
            if !told && self.flags.unread.load(Ordering::Relaxed) {
                told = true;
                self.say(&mut lost, &Frame::Unread);
            }
            if !self.errors && self.flags.refused.load(Ordering::Relaxed) {
                from = None;
            }
            let Some(file) = from.as_mut() else {
                self.ended.store(true, Ordering::Relaxed);
                std::thread::park_timeout(LOOK);
                continue;
            };
            match some(file, &mut room) {
                None => {}
                Some(0) => {
                    from = None;
                    if !self.errors {
                        self.say(&mut lost, &Frame::End);
                    }
                }
                Some(n) if self.errors => self.say(&mut lost, &Frame::Errors(&room[..n])),
                Some(n) => self.say(&mut lost, &Frame::Data(&room[..n])),
            }
        }
    }

    /// Says something, unless the session is lost. The thread that reads the session reports that.
    fn say(&self, lost: &mut bool, frame: &Frame<'_>) {
        if *lost {
            return;
        }
        if let Err(error) = self.speaker.say(frame, Wait::forever().unless(&self.done)) {
            tracing::debug!(%error, "nothing more is carried");
            *lost = true;
        }
    }
}

/// Reads what is there. `None` if nothing is yet; a descriptor that cannot be read is at its end.
fn some(file: &mut File, room: &mut [u8]) -> Option<usize> {
    let mut events = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match poll(&mut events, PollTimeout::from(20_u8)) {
        Ok(0) | Err(Errno::EINTR) => return None,
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(%error, "waiting for bytes to carry");
            return Some(0);
        }
    }
    match file.read(room) {
        Ok(n) => Some(n),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            tracing::warn!(%error, "reading bytes to carry");
            Some(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_is_written_and_nothing_else() {
        for frame in [
            Frame::Data(b"image"),
            Frame::End,
            Frame::Errors(b"xl: oops"),
            Frame::Unread,
            Frame::Exit(7),
        ] {
            let (header, body) = frame.parts();
            assert_eq!(Frame::length(header).unwrap(), body.len());
            assert_eq!(Frame::of(header[0], body).unwrap(), frame);
        }
        for bad in [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [DATA, 0, 0, 0, 0, 0, 0, 0],
            [DATA, 0, 0, 0, 1, 0, 1, 0],
            [DATA, 0, 1, 0, 1, 0, 0, 0],
            [END, 0, 0, 0, 1, 0, 0, 0],
            [UNREAD, 0, 0, 0, 1, 0, 0, 0],
            [EXIT, 0, 0, 0, 0, 0, 0, 0],
            [EXIT, 0, 0, 0, 4, 0, 0, 0],
            [6, 0, 0, 0, 0, 0, 0, 0],
        ] {
            let error = Frame::length(bad).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
    }
}
