//! A connection over TCP, and when it is treated as lost.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::fstat;

use super::fd::{Descriptors, FdConnection, Transport};
use super::{Delivery, Peer};

/// An idle connection is probed after this many seconds, then `PROBES` times, `INTERVAL` seconds
/// apart, and then it is lost.
const IDLE: u32 = 10;
const INTERVAL: u32 = 5;
const PROBES: u32 = 4;

/// A TCP connection. A host that has silently disappeared is noticed after
/// [`Self::SILENCE_WAITING`] at first; see
/// [`give_up_on_silence`](super::Connection::give_up_on_silence).
pub type TcpConnection = FdConnection<Tcp>;

/// The state of a TCP connection.
#[derive(Debug)]
pub struct Tcp {
    peer: Peer,
}

impl TcpConnection {
    /// The time limit for an end that waits for an answer and has sent little.
    pub const SILENCE_WAITING: Duration = Duration::from_secs(30);

    /// The time limit for an end that sends much. Linux cannot distinguish a lost host from a peer
    /// that reads nothing, such as a receiver that applies a checkpoint.
    pub const SILENCE_SENDING: Duration = Duration::from_secs(120);

    /// A connection over a connected socket.
    ///
    /// # Errors
    ///
    /// The operating system refuses an option, or no longer knows the peer's address.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        let peer = Peer::Address(stream.peer_addr()?);
        // The peer waits for short messages.
        stream.set_nodelay(true)?;
        setsockopt(&stream, sockopt::KeepAlive, &true)?;
        setsockopt(&stream, sockopt::TcpKeepIdle, &IDLE)?;
        setsockopt(&stream, sockopt::TcpKeepInterval, &INTERVAL)?;
        setsockopt(&stream, sockopt::TcpKeepCount, &PROBES)?;
        let to = OwnedFd::from(stream);
        let descriptors = Descriptors::new(to.try_clone()?, to)?;
        let transport = Tcp { peer };
        transport.give_up_on_silence(&descriptors, Self::SILENCE_WAITING)?;
        Ok(Self {
            descriptors,
            transport,
        })
    }
}

/// Bytes that a TCP socket has sent or will send, and that the peer's kernel has not acknowledged:
/// `tx_queue` in /proc/net/tcp, in the line of the socket with this inode.
fn unacknowledged(table: &str, inode: u64) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if fields.get(9)?.parse() != Ok(inode) {
            return None;
        }
        let (queued, _) = fields.get(4)?.split_once(':')?;
        u64::from_str_radix(queued, 16).ok()
    })
}

impl Transport for Tcp {
    /// Read from the kernel's table of this network namespace: intended for the few moments at
    /// which the answer decides something.
    fn delivery(&self, descriptors: &Descriptors) -> Delivery {
        let Ok(stat) = fstat(descriptors.from()) else {
            return Delivery::Unknown;
        };
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        let queued = tables.into_iter().find_map(|path| {
            let table = fs::read_to_string(path).ok()?;
            unacknowledged(&table, stat.st_ino)
        });
        match queued {
            None => Delivery::Unknown,
            Some(0) => Delivery::AtPeerHost,
            Some(_) => Delivery::Pending,
        }
    }

    /// TCP_USER_TIMEOUT. Linux applies it to an idle connection, too, whatever the number of probes
    /// is.
    fn give_up_on_silence(&self, descriptors: &Descriptors, limit: Duration) -> io::Result<bool> {
        let milliseconds = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        // 0 would be the kernel's default.
        let milliseconds = milliseconds.max(1);
        let socket = descriptors.from().as_fd();
        setsockopt(&socket, sockopt::TcpUserTimeout, &milliseconds)?;
        Ok(true)
    }

    fn peer(&self) -> Peer {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::net::TcpListener;

    use nix::sys::socket::getsockopt;

    use super::*;
    use crate::migrate::connection::Connection as _;

    #[test]
    fn silence_is_borne_for_as_long_as_was_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let connection = TcpConnection::new(stream).unwrap();
        let timeout = || {
            let socket = connection.read_fd().unwrap();
            getsockopt(&socket, sockopt::TcpUserTimeout).unwrap()
        };
        assert_eq!(timeout(), 30_000);
        for (limit, milliseconds) in [
            (TcpConnection::SILENCE_SENDING, 120_000),
            (Duration::ZERO, 1),
            (TcpConnection::SILENCE_WAITING, 30_000),
        ] {
            assert!(connection.give_up_on_silence(limit).unwrap());
            assert_eq!(timeout(), milliseconds);
        }
        let socket = connection.read_fd().unwrap();
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepIdle).unwrap(), IDLE);
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepCount).unwrap(), PROBES);
    }

    #[test]
    fn what_is_unacknowledged_is_read_from_the_line_of_the_socket() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   \
                     uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     \
                     0        0 26612 1 0 100 0 0 10 0\n   \
                     1: 0100007F:1F90 0100007F:8B2C 01 0000001A:00000003 01:00000014 00000000     \
                     0        0 31337 2 0 20 4 30 10 -1\n";
        assert_eq!(unacknowledged(table, 26612), Some(0));
        assert_eq!(unacknowledged(table, 31337), Some(26));
        assert_eq!(unacknowledged(table, 1), None);
        assert_eq!(unacknowledged("", 1), None);
    }
}
