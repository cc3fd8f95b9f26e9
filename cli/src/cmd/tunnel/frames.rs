//! The frames that the two ends of a tunnel exchange over their session, and the pump that carries
//! what a descriptor yields.
//!
//! A frame is a header of 8 bytes (kind, three reserved bytes, length in 4 bytes, little endian)
//! and a body. docs/session.md has the table.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
    saying: Mutex<Saying>,
}

#[derive(Debug, Default)]
struct Saying {
    bytes: Vec<u8>,
    /// No frame can follow: COMMAND's exit code was the last one, or one was written in part.
    over: bool,
}

impl Speaker {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            saying: Mutex::default(),
        }
    }

    pub(super) fn say(&self, frame: &Frame<'_>, wait: Wait<'_>) -> io::Result<()> {
        let (header, body) = frame.parts();
        let mut saying = self.saying.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut saying.over, true) {
            let why = "nothing follows the last frame of a tunnel";
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, why));
        }
        saying.bytes.clear();
        saying.bytes.extend_from_slice(&header);
        saying.bytes.extend_from_slice(body);
        ConnectionWriter::new(&*self.session, wait).write_all(&saying.bytes)?;
        saying.over = matches!(frame, Frame::Exit(_));
        Ok(())
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

/// What the other threads of an end tell a pump. The pump waits for it, and for its descriptor.
#[derive(Debug)]
pub(super) struct Orders {
    unread: AtomicBool,
    refused: AtomicBool,
    finish: AtomicBool,
    end: Cancel,
    bell: PipeWriter,
    heard: PipeReader,
}

impl Orders {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let (heard, bell) = io::pipe()?;
        Ok(Arc::new(Self {
            unread: false.into(),
            refused: false.into(),
            finish: false.into(),
            end: Cancel::new(),
            bell,
            heard,
        }))
    }

    /// What the other end sends as data is not read here: tell it.
    pub(super) fn unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
        self.ring();
    }

    /// The other end does not read what this end sends as data: close the descriptor.
    pub(super) fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
        self.ring();
    }

    /// COMMAND has ended: report when everything that it has written is carried.
    pub(super) fn finish(&self) {
        self.finish.store(true, Ordering::Relaxed);
        self.ring();
    }

    /// Close the descriptor and end.
    pub(super) fn end(&self) {
        self.end.cancel();
        self.ring();
    }

    /// An end gives few orders, so the pipe has room.
    fn ring(&self) {
        if let Err(error) = (&self.bell).write_all(&[0]) {
            tracing::warn!(%error, "a thread of the tunnel could not be woken");
        }
    }

    /// Waits for an order, or until the descriptor can be read. Returns whether it can.
    fn wait(&self, from: Option<&File>) -> io::Result<bool> {
        let heard = PollFd::new(self.heard.as_fd(), PollFlags::POLLIN);
        let from = from.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
        let mut events: Vec<PollFd<'_>> = [heard].into_iter().chain(from).collect();
        match poll(&mut events, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        let [order, readable] =
            [0, 1].map(|n| events.get(n).is_some_and(|e| e.any() == Some(true)));
        if order {
            let _rung = (&self.heard).read(&mut [0; 16])?;
        }
        Ok(readable && !order)
    }
}

/// How far a pump has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carried {
    /// Everything that COMMAND had written when it ended.
    Own,
    /// Everything: the descriptor is at its end, or is not wanted any more.
    All,
}

/// Carries what a descriptor yields. After the loss of the session it reads on and discards, so
/// that a command that writes is not ended by that.
#[derive(Debug)]
pub(super) struct Pump {
    pub(super) speaker: Arc<Speaker>,
    pub(super) orders: Arc<Orders>,
    /// It carries COMMAND's stderr.
    pub(super) errors: bool,
}

impl Pump {
    /// Runs until it is told to end. `report` is called once for each value.
    ///
    /// # Errors
    ///
    /// The descriptor could not be read to its end.
    pub(super) fn run(self, from: File, report: impl Fn(Carried)) -> io::Result<()> {
        let orders = &*self.orders;
        let mut from = Some(from);
        let mut told = self.errors;
        let mut lost = false;
        // How many bytes COMMAND had written when it ended that are not carried yet.
        let mut own = None;
        let [mut own_reported, mut all_reported] = [false; 2];
        let mut room = vec![0; LONGEST];
        while !orders.end.is_cancelled() {
            if !told && orders.unread.load(Ordering::Relaxed) {
                told = true;
                self.say(&mut lost, &Frame::Unread);
            }
            if !self.errors && orders.refused.load(Ordering::Relaxed) {
                from = None;
            }
            if own.is_none() && orders.finish.load(Ordering::Relaxed) {
                own = from.as_ref().map(rustix::io::ioctl_fionread).transpose()?;
                own = own.or(Some(0));
            }
            if from.is_none() {
                own = own.map(|_| 0);
            }
            if own == Some(0) && !std::mem::replace(&mut own_reported, true) {
                report(Carried::Own);
            }
            if from.is_none() && !std::mem::replace(&mut all_reported, true) {
                report(Carried::All);
            }
            if !orders.wait(from.as_ref())? {
                continue;
            }
            let read = from.as_mut().map(|file| file.read(&mut room));
            match read.unwrap_or(Ok(0)) {
                Ok(0) => {
                    from = None;
                    if !self.errors {
                        self.say(&mut lost, &Frame::End);
                    }
                }
                Ok(n) => {
                    let bytes = &room[..n];
                    self.say(
                        &mut lost,
                        &match self.errors {
                            true => Frame::Errors(bytes),
                            false => Frame::Data(bytes),
                        },
                    );
                    own = own.map(|own| own.saturating_sub(n as u64));
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Says something, unless the session is lost. The thread that reads the session reports that.
    fn say(&self, lost: &mut bool, frame: &Frame<'_>) {
        if *lost {
            return;
        }
        let wait = Wait::forever().unless(&self.orders.end);
        if let Err(error) = self.speaker.say(frame, wait) {
            tracing::debug!(%error, "nothing more is carried");
            *lost = true;
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
