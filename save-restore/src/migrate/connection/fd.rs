//! Connections over descriptors: how a call waits, what an errno means, and most of [`Connection`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use xsr_xen_backend::Gather;

use super::{Connection, ConnectionError, Delivery, Peer, Received, Stage, Wait};
use crate::descriptor::Descriptor;
pub(super) use crate::descriptor::Limit;
use crate::progress::{Cancel, Cancelled};

impl<'a> Limit<'a> {
    /// The limit for a wait that begins now.
    pub(in crate::migrate) fn of(wait: &Wait<'a>) -> Self {
        Self {
            idle: wait.idle,
            at_most: wait.at_most,
            cancel: wait.cancel,
            pace: wait.pace,
            silence: wait.silence,
            began: Instant::now(),
        }
    }
}

/// A connection over one descriptor or two: pipes, a Unix socket, a TCP connection.
#[derive(Debug)]
pub struct FdConnection<T> {
    pub(super) descriptors: Descriptors,
    pub(super) transport: T,
}

/// What differs between connections over descriptors.
pub trait Transport: fmt::Debug + Send + Sync {
    /// As [`Connection::delivery`].
    fn delivery(&self, descriptors: &Descriptors) -> Delivery;

    /// As [`Connection::give_up_on_silence`].
    ///
    /// # Errors
    ///
    /// The operating system refuses.
    fn give_up_on_silence(&self, descriptors: &Descriptors, limit: Duration) -> io::Result<bool>;

    /// As [`Connection::peer`].
    fn peer(&self) -> Peer;
}

impl<T: Transport> Connection for FdConnection<T> {
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        self.descriptors.read(room, wait)
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        self.descriptors.peek(room)
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        self.descriptors.write(bytes, wait)
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        self.descriptors.write_gather(list, wait)
    }

    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        self.descriptors.finish_writing()
    }

    fn delivery(&self) -> Delivery {
        self.transport.delivery(&self.descriptors)
    }

    fn give_up_on_silence(&self, limit: Duration) -> Result<bool, ConnectionError> {
        let done = self.transport.give_up_on_silence(&self.descriptors, limit);
        done.map_err(ConnectionError::Local)
    }

    /// Nothing is ever taken up or sent again.
    fn stage(&self, _: Stage) {}

    fn peer(&self) -> Peer {
        self.transport.peer()
    }

    fn clock(&self) -> Duration {
        self.descriptors.made.elapsed()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.descriptors.from.as_fd())
    }
}

/// One or two descriptors.
#[derive(Debug)]
pub struct Descriptors {
    from: Descriptor<OwnedFd>,
    /// `None` once nothing more will be written.
    to: Option<Descriptor<OwnedFd>>,
    made: Instant,
}

impl Descriptors {
    pub(super) fn new(from: OwnedFd, to: OwnedFd) -> io::Result<Self> {
        // Each call names its own cancel token.
        Ok(Self {
            from: Descriptor::cancellable(from, Cancel::new(), false)?,
            to: Some(Descriptor::cancellable(to, Cancel::new(), true)?),
            made: Instant::now(),
        })
    }

    /// The descriptor that is read.
    pub(super) fn from(&self) -> &impl AsFd {
        &self.from
    }

    /// The descriptor that is written, unless writing has been finished.
    pub(super) fn to(&self) -> Option<&impl AsFd> {
        self.to.as_ref()
    }

    /// Ends writing.
    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        let Some(to) = self.to.take() else {
            return Ok(());
        };
        match shutdown(to.as_fd().as_raw_fd(), Shutdown::Write) {
            // A pipe ends when it is closed; a lost socket has already ended.
            Ok(()) | Err(Errno::ENOTSOCK | Errno::ENOTCONN) => Ok(()),
            Err(errno) => Err(ConnectionError::Local(errno.into())),
        }
    }

    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        if room.is_empty() {
            return Ok(Received::Bytes(0));
        }
        let limit = Limit::of(wait);
        let read = |fd: BorrowedFd<'_>| Ok(nix::unistd::read(fd, room)?);
        match self.from.read_within(&limit, read) {
            Ok(0) => Ok(Received::Closed),
            Ok(n) => {
                wait.count(n);
                Ok(Received::Bytes(n))
            }
            Err(error) => Err(failed(error, false)),
        }
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        match self.from.peek(room) {
            Ok(n) => Ok(n.min(room.len())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(failed(error, false)),
        }
    }

    fn writer(&self) -> Result<&Descriptor<OwnedFd>, ConnectionError> {
        self.to.as_ref().ok_or_else(|| {
            let why = "the writing end is already closed";
            ConnectionError::Local(io::Error::new(io::ErrorKind::InvalidInput, why))
        })
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        let writer = self.writer()?;
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut list = Gather::new();
        list.push(bytes);
        let mut rest = list.unwritten();
        let limit = Limit::of(wait);
        let written = writer.write_within(&limit, |fd, call| rest.write_some(fd, call));
        let written = written.map_err(|error| failed(error, true))?;
        wait.count(written);
        Ok(written)
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        let writer = self.writer()?;
        let mut rest = list.unwritten();
        let limit = Limit::of(wait);
        while !rest.is_empty() {
            let written = writer.write_within(&limit, |fd, call| rest.write_some(fd, call));
            wait.count(written.map_err(|error| failed(error, true))?);
        }
        Ok(())
    }
}

/// What a failed call means for the connection.
pub(super) fn failed(error: io::Error, writing: bool) -> ConnectionError {
    if Cancelled::is(&error) {
        return ConnectionError::Cancelled;
    }
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
        let overdue = error.get_ref().and_then(|why| why.downcast_ref());
        return match overdue {
            Some(overdue) => ConnectionError::TimedOut(*overdue),
            None => ConnectionError::Local(error),
        };
    };
    match errno {
        Errno::EPIPE if writing => ConnectionError::NotRead(error),
        Errno::ECONNRESET
        | Errno::ECONNABORTED
        | Errno::ECONNREFUSED
        | Errno::EPIPE
        | Errno::ETIMEDOUT
        | Errno::EHOSTUNREACH
        | Errno::EHOSTDOWN
        | Errno::ENETUNREACH
        | Errno::ENETDOWN
        | Errno::ENETRESET
        | Errno::ENOTCONN => ConnectionError::Lost(error),
        _ => ConnectionError::Local(error),
    }
}
