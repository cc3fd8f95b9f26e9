//! What connections over descriptors share: how a call waits, and what an errno means.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use xsr_xen_backend::Gather;

use super::{ConnectionError, Received, Wait};
use crate::descriptor::Descriptor;
pub(super) use crate::descriptor::Limit;
use crate::progress::{Cancel, Cancelled};

impl<'a> Limit<'a> {
    /// What a wait says, from now on.
    pub(super) fn of(wait: &Wait<'a>) -> Self {
        let began = Instant::now();
        Self {
            idle: wait.idle,
            until: wait.at_most.and_then(|limit| began.checked_add(limit)),
            cancel: wait.cancel,
            began,
        }
    }
}

/// One or two descriptors.
#[derive(Debug)]
pub(super) struct Descriptors {
    from: Descriptor<OwnedFd>,
    /// `None` once nothing more will be written.
    to: Option<Descriptor<OwnedFd>>,
    made: Instant,
}

impl Descriptors {
    pub(super) fn new(from: OwnedFd, to: OwnedFd) -> io::Result<Self> {
        // What may cancel a call is named by each call.
        Ok(Self {
            from: Descriptor::cancellable(from, Cancel::new(), false)?,
            to: Some(Descriptor::cancellable(to, Cancel::new(), true)?),
            made: Instant::now(),
        })
    }

    pub(super) fn from(&self) -> &impl AsFd {
        &self.from
    }

    /// Where bytes are written to, unless that has been finished.
    pub(super) fn to(&self) -> Option<&impl AsFd> {
        self.to.as_ref()
    }

    /// Write nothing more: a pipe ends when it is closed.
    pub(super) fn close_writing(&mut self) {
        self.to = None;
    }

    pub(super) fn clock(&self) -> Duration {
        self.made.elapsed()
    }

    pub(super) fn read(
        &self,
        room: &mut [u8],
        wait: &Wait<'_>,
    ) -> Result<Received, ConnectionError> {
        if room.is_empty() {
            return Ok(Received::Bytes(0));
        }
        let limit = Limit::of(wait);
        let read = |fd: std::os::fd::BorrowedFd<'_>| Ok(nix::unistd::read(fd, room)?);
        match self.from.read_within(&limit, read) {
            Ok(0) => Ok(Received::Closed),
            Ok(n) => Ok(Received::Bytes(n)),
            Err(error) => Err(failed(error, false, &limit)),
        }
    }

    pub(super) fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        match self.from.peek(room) {
            Ok(n) => Ok(n.min(room.len())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(failed(error, false, &Limit::of(&Wait::forever()))),
        }
    }

    fn writer(&self) -> Result<&Descriptor<OwnedFd>, ConnectionError> {
        self.to.as_ref().ok_or_else(|| {
            let why = "it was said that nothing more would be written";
            ConnectionError::Local(io::Error::new(io::ErrorKind::InvalidInput, why))
        })
    }

    pub(super) fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        let writer = self.writer()?;
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut list = Gather::new();
        list.push(bytes);
        let mut rest = list.unwritten();
        let limit = Limit::of(wait);
        let written = writer.write_within(&limit, |fd, call| rest.write_some(fd, call));
        written.map_err(|error| failed(error, true, &limit))
    }

    pub(super) fn write_gather(
        &self,
        list: &Gather<'_>,
        wait: &Wait<'_>,
    ) -> Result<(), ConnectionError> {
        let writer = self.writer()?;
        let mut rest = list.unwritten();
        let mut limit = Limit::of(wait);
        while !rest.is_empty() {
            let written = writer.write_within(&limit, |fd, call| rest.write_some(fd, call));
            written.map_err(|error| failed(error, true, &limit))?;
            limit.began = Instant::now();
        }
        Ok(())
    }
}

/// What a failed call says of the connection.
pub(super) fn failed(error: io::Error, writing: bool, limit: &Limit<'_>) -> ConnectionError {
    if Cancelled::is(&error) {
        return ConnectionError::Cancelled;
    }
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
        // Only a wait that is over has no errno.
        return if error.kind() == io::ErrorKind::TimedOut {
            let waited = limit.began.elapsed();
            ConnectionError::TimedOut { writing, waited }
        } else {
            ConnectionError::Local(error)
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
