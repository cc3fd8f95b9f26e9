//! A connection over a Unix socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};

use super::fd::{Descriptors, FdConnection, Transport};
use super::{Delivery, Peer};

/// A stream socket of this host.
pub type UnixConnection = FdConnection<Unix>;

/// The state of a Unix socket.
#[derive(Debug)]
pub struct Unix {
    peer: Peer,
}

impl UnixConnection {
    /// A connection over a connected socket.
    ///
    /// # Errors
    ///
    /// The operating system refuses to copy the descriptor, or to name the peer.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(&stream, sockopt::PeerCredentials)?;
        let to = OwnedFd::from(stream);
        Ok(Self {
            descriptors: Descriptors::new(to.try_clone()?, to)?,
            transport: Unix {
                peer: Peer::Process {
                    pid: credentials.pid(),
                    uid: credentials.uid(),
                    gid: credentials.gid(),
                },
            },
        })
    }
}

impl Transport for Unix {
    /// The kernel counts unread bytes (SIOCOUTQ), but no safe call reads that count.
    fn delivery(&self, _: &Descriptors) -> Delivery {
        Delivery::Unknown
    }

    fn give_up_on_silence(&self, _: &Descriptors, _: Duration) -> io::Result<bool> {
        Ok(false)
    }

    fn peer(&self) -> Peer {
        self.peer.clone()
    }
}
