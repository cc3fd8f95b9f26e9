//! A connection over a Unix socket.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use xsr_xen_backend::Gather;

use super::fd::Descriptors;
use super::{Connection, ConnectionError, Delivery, Peer, Received, Wait};

/// A stream socket of this host.
#[derive(Debug)]
pub struct UnixConnection {
    descriptors: Descriptors,
    peer: Peer,
}

impl UnixConnection {
    /// Over a socket that is connected.
    ///
    /// # Errors
    ///
    /// The operating system refuses to copy the descriptor, or to say who the peer is.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(&stream, sockopt::PeerCredentials)?;
        let to = OwnedFd::from(stream);
        Ok(Self {
            descriptors: Descriptors::new(to.try_clone()?, to)?,
            peer: Peer::Process {
                pid: credentials.pid(),
                uid: credentials.uid(),
                gid: credentials.gid(),
            },
        })
    }
}

/// Shut down the writing half of a socket.
pub(super) fn finish(descriptors: &Descriptors) -> Result<(), ConnectionError> {
    let Some(to) = descriptors.to() else {
        return Ok(());
    };
    match shutdown(to.as_fd().as_raw_fd(), Shutdown::Write) {
        // One that is lost has come to its end.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(ConnectionError::Local(errno.into())),
    }
}

impl Connection for UnixConnection {
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
        finish(&self.descriptors)?;
        self.descriptors.close_writing();
        Ok(())
    }

    /// The kernel counts what was not read (SIOCOUTQ), but there is no safe call that asks it.
    fn delivery(&self) -> Delivery {
        Delivery::Unknown
    }

    fn give_up_on_silence(&self, _: Duration) -> Result<bool, ConnectionError> {
        Ok(false)
    }

    fn peer(&self) -> Peer {
        self.peer.clone()
    }

    fn clock(&self) -> Duration {
        self.descriptors.clock()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.descriptors.from().as_fd())
    }
}
