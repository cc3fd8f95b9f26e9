//! The connection between two hosts, as a trait: an ordered byte stream in two directions.
//!
//! [`PipeConnection`] is a pair of descriptors (a command's stdin and stdout), [`UnixConnection`]
//! and [`TcpConnection`] are sockets; [`super::testing`] has one in memory with faults at every
//! call. [`ConnectionReader`] and [`ConnectionWriter`] adapt a connection to what the engine and
//! the [messages](super::messages) read from and write to.
//!
//! Guarantees of every implementation, checked by [`super::testing::contract`]:
//!
//! - Bytes arrive in order, all of them, each once. A read takes no more than fits its buffer.
//! - A call waits as its [`Wait`] says: until a time-out, or until another thread cancels it. The
//!   connection can be used after either, with another `Wait`; bytes that were taken by then stay
//!   taken.
//! - A peer that closed its end in order ([`Received::Closed`]) can be distinguished from a
//!   connection that is lost ([`ConnectionError::Lost`]), as far as the transport can tell.
//! - The layers above do not need a descriptor. If there is one, pages of a guest are sent from and
//!   read into its memory without a copy.
//!
//! ```
//! use std::time::Duration;
//! use xsr_save_restore::migrate::connection::{
//!     Connection as _, ConnectionReader, ConnectionWriter, Received, UnixConnection, Wait,
//! };
//! use xsr_save_restore::migrate::messages::Message;
//!
//! let (here, there) = std::os::unix::net::UnixStream::pair()?;
//! let mut receiver = UnixConnection::new(there)?;
//! let sender = UnixConnection::new(here)?;
//!
//! let wait = Wait::forever().at_most(Duration::from_secs(10));
//! Message::Banner.write(ConnectionWriter::new(&receiver, wait))?;
//! Message::Banner.read(ConnectionReader::new(&sender, wait)?)?;
//!
//! receiver.finish_writing()?;
//! assert_eq!(sender.read(&mut [0; 16], &wait)?, Received::Closed);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapter;
mod fd;
mod pipe;
mod tcp;
mod unix;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;
use xsr_xen_backend::Gather;

use crate::pace::{Overdue, Pace, ReadLimit};
use crate::progress::{Cancel, Cancelled};

#[cfg(feature = "session")]
pub(in crate::migrate) use adapter::Waits;
pub(super) use adapter::copy_gather;
pub use adapter::{ConnectionReader, ConnectionWriter};
pub use fd::{FdConnection, Transport};
pub use pipe::PipeConnection;
pub use tcp::TcpConnection;
pub use unix::UnixConnection;

/// A connection to the other end of a migration.
///
/// Dropping it closes it in order: what was written still arrives. A socket with unread input is
/// reset instead when it is dropped, and the peer may lose what it has not read yet: read to
/// [`Received::Closed`] first.
pub trait Connection: fmt::Debug + Send + Sync {
    /// Reads what has arrived: at least one byte, at most `room`.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the wait ended first. No byte has been taken then.
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError>;

    /// Copies the first bytes that have arrived to `room` without consuming them, and returns their
    /// number. Does not wait. Returns 0 also at the end of the stream.
    ///
    /// # Errors
    ///
    /// The connection is lost.
    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError>;

    /// Writes some of `bytes` and returns how many were taken: at least one if there are any.
    ///
    /// # Errors
    ///
    /// The connection is lost, the peer reads no more, or the wait ended first. No byte has been
    /// taken then, and none of them will ever arrive. A sender whose "go" failed resumes its
    /// domain, so a connection that delivered the "go" all the same would let the domain run twice.
    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError>;

    /// Writes a list of bytes and pages of a guest, all of it.
    ///
    /// # Errors
    ///
    /// As [`Self::write`]; an unknown part has been taken then.
    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError>;

    /// Announces that nothing more will be written. The peer reads what was written to its end, and
    /// what it still sends can be read. A second call does nothing.
    ///
    /// # Errors
    ///
    /// The operating system refuses. If the connection is already lost, that is not an error here.
    fn finish_writing(&mut self) -> Result<(), ConnectionError>;

    /// How far the written bytes have got, as far as the transport knows.
    fn delivery(&self) -> Delivery;

    /// Makes the transport itself treat the connection as lost after this long without a sign of
    /// life from the peer's host. Returns whether it can. A pipe cannot; a Unix socket does not
    /// need to.
    ///
    /// # Errors
    ///
    /// The operating system refuses.
    fn give_up_on_silence(&self, limit: Duration) -> Result<bool, ConnectionError>;

    /// Tells a connection that takes up lost links again what happens to the domain. Other
    /// connections have nothing to do.
    fn stage(&self, stage: Stage);

    /// The peer.
    fn peer(&self) -> Peer;

    /// Time since the connection was made, on the clock that its waits use.
    fn clock(&self) -> Duration;

    /// The descriptor from which the peer's bytes are read, if there is one.
    fn read_fd(&self) -> Option<BorrowedFd<'_>>;
}

impl<C: Connection + ?Sized> Connection for Box<C> {
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        (**self).read(room, wait)
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        (**self).peek(room)
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        (**self).write(bytes, wait)
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        (**self).write_gather(list, wait)
    }

    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        (**self).finish_writing()
    }

    fn delivery(&self) -> Delivery {
        (**self).delivery()
    }

    fn give_up_on_silence(&self, limit: Duration) -> Result<bool, ConnectionError> {
        (**self).give_up_on_silence(limit)
    }

    fn stage(&self, stage: Stage) {
        (**self).stage(stage);
    }

    fn peer(&self) -> Peer {
        (**self).peer()
    }

    fn clock(&self) -> Duration {
        (**self).clock()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).read_fd()
    }
}

/// What happens to the domain, for a connection that takes up lost links again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It is suspended: a lost link is waited for no longer than the domain may be suspended.
    Suspended,
    /// The next message is "go", or "go" has been read: from now on no link is taken up and nothing
    /// is sent again, and a link that is lost is the loss of the connection. If there is no link at
    /// this moment, the connection is lost.
    LetGo,
    /// It is about to run again at the sender: nothing that is still in this process is delivered.
    TakenBack,
}

/// How long one call on a connection may wait.
///
/// ```
/// use std::time::Duration;
/// use xsr_save_restore::migrate::connection::Wait;
/// use xsr_save_restore::progress::Cancel;
///
/// let cancel = Cancel::new();
/// let wait = Wait::forever()
///     .idle(Duration::from_secs(60))
///     .at_most(Duration::from_secs(600))
///     .unless(&cancel);
/// # let _ = wait;
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait<'a> {
    pub(crate) idle: Option<Duration>,
    pub(crate) at_most: Option<Duration>,
    pub(crate) cancel: Option<&'a Cancel>,
    pub(crate) pace: Option<&'a Pace>,
    pub(crate) silence: Option<&'a ReadLimit>,
    pub(crate) carried: Option<&'a AtomicU64>,
}

impl<'a> Wait<'a> {
    /// Without a limit.
    pub const fn forever() -> Self {
        Self {
            idle: None,
            at_most: None,
            cancel: None,
            pace: None,
            silence: None,
            carried: None,
        }
    }

    /// At most this long without a byte transferred. Each byte starts the time again.
    pub const fn idle(self, limit: Duration) -> Self {
        Self {
            idle: Some(limit),
            ..self
        }
    }

    /// At most this long in total, whatever is transferred.
    pub const fn at_most(self, limit: Duration) -> Self {
        Self {
            at_most: Some(limit),
            ..self
        }
    }

    /// Until another thread cancels. The call then ends within a fraction of 100 ms.
    pub const fn unless(self, cancel: &'a Cancel) -> Self {
        Self {
            cancel: Some(cancel),
            ..self
        }
    }

    /// The peer must take what is written at this pace.
    pub const fn keeping(self, pace: &'a Pace) -> Self {
        Self {
            pace: Some(pace),
            ..self
        }
    }

    /// A read waits at most this long for its first byte. The limit can be lifted while it waits.
    pub const fn silent_for(self, limit: &'a ReadLimit) -> Self {
        Self {
            silence: Some(limit),
            ..self
        }
    }

    /// Adds the bytes that a call transfers, in either direction, to this counter as they go, so
    /// that another thread sees progress during a long write.
    pub const fn counting(self, carried: &'a AtomicU64) -> Self {
        Self {
            carried: Some(carried),
            ..self
        }
    }

    /// This many more bytes have been transferred.
    pub(crate) fn count(&self, bytes: usize) {
        if let Some(carried) = self.carried {
            carried.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Fails if the wait has been cancelled.
    pub(crate) fn check(&self) -> Result<(), ConnectionError> {
        if self.cancel.is_some_and(Cancel::is_cancelled) {
            Err(ConnectionError::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// This many bytes, at least one.
    Bytes(usize),
    /// The peer has closed its end in order, and all that it had written has been read.
    ///
    /// On a pipe from a command, the command closed it: ssh does that also when its own connection
    /// is lost. Its exit code distinguishes the two.
    Closed,
}

/// Why a call on a connection failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The transport reports that the peer cannot be reached any more, or the peer's end ended
    /// without closing in order (a reset).
    #[error("the connection is lost")]
    Lost(#[source] io::Error),
    /// The peer reads no more. It is unknown whether its end was closed in order.
    #[error("the other end reads no more")]
    NotRead(#[source] io::Error),
    /// The [`Wait`] is over; the peer may still be alive.
    #[error(transparent)]
    TimedOut(Overdue),
    /// Another thread cancelled the call.
    #[error("cancelled")]
    Cancelled,
    /// The connection is intact: the operating system refused the call.
    #[error("using the connection")]
    Local(#[source] io::Error),
}

impl ConnectionError {
    /// The connection error that an adapter put into an [`io::Error`].
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<ConnectionError> for io::Error {
    /// With the kind that the engine checks; [`Cancelled`] if that is the reason.
    fn from(error: ConnectionError) -> Self {
        let kind = match &error {
            ConnectionError::Cancelled => return Self::other(Cancelled),
            ConnectionError::TimedOut(_) => io::ErrorKind::TimedOut,
            ConnectionError::Lost(cause)
            | ConnectionError::NotRead(cause)
            | ConnectionError::Local(cause) => cause.kind(),
        };
        Self::new(kind, error)
    }
}

/// How far the written bytes have got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The transport cannot tell.
    Unknown,
    /// Some of them are still on this host or in transit.
    Pending,
    /// The kernel of the peer's host has acknowledged all of them. The peer may not have read them.
    AtPeerHost,
    /// The process at the other end of the descriptor has read all of them. With a command such as
    /// ssh that process is the command, not the engine on the other host.
    Read,
}

/// The peer of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// A process of this host, as it was when it connected (SO_PEERCRED).
    Process {
        /// Its process id.
        pid: i32,
        /// Its user id.
        uid: u32,
        /// Its group id.
        gid: u32,
    },
    /// A host. The address does not prove who sent from it.
    Address(SocketAddr),
    /// A command, or another peer that has only a name.
    Named(String),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, uid, .. } => write!(f, "process {pid} of user {uid}"),
            Self::Address(address) => write!(f, "tcp:{address}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
#[path = "connection/tests.rs"]
mod tests;
