//! Links over TCP: the listener of a server, and the dialler of a client.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::make::HANDSHAKE;
use super::{ClientTls, ServerTls};
use super::{Dial, LOOK, Server, Session, SessionError, Wire};
use crate::migrate::connection::{ConnectionError, TcpConnection};
use crate::progress::Cancel;

/// The most handshakes at a time.
const HANDSHAKES: usize = 8;

/// Prepares a connection for a link.
fn connection(stream: TcpStream) -> io::Result<Box<TcpConnection>> {
    // A few lost packets do not halve its rate. Not every kernel has it.
    if let Err(error) = setsockopt(&stream, sockopt::TcpCongestion, &"bbr".into()) {
        tracing::debug!(%error, "no BBR");
    }
    TcpConnection::new(stream).map(Box::new)
}

/// Connects to a server over TCP and TLS, at any of several addresses.
#[derive(Debug)]
pub struct TcpDial {
    addresses: Vec<SocketAddr>,
    tls: ClientTls,
}

impl TcpDial {
    /// The address that answers first is used.
    pub const fn new(addresses: Vec<SocketAddr>, tls: ClientTls) -> Self {
        Self { addresses, tls }
    }

    fn connect(&self, limit: Duration, cancel: &Cancel) -> io::Result<TcpStream> {
        let (streams, made) = mpsc::channel();
        for address in self.addresses.clone() {
            let streams = streams.clone();
            let connect = move || {
                // If another address was faster, this one is not needed.
                let _unneeded = streams.send(TcpStream::connect_timeout(&address, limit));
            };
            let name = "session-connect".to_owned();
            thread::Builder::new().name(name).spawn(connect)?;
        }
        drop(streams);
        let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
        loop {
            match made.recv_timeout(LOOK) {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = error,
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(failed),
                Err(mpsc::RecvTimeoutError::Timeout) if cancel.is_cancelled() => {
                    return Err(ConnectionError::Cancelled.into());
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Dial for TcpDial {
    fn dial(&self, limit: Duration, cancel: &Cancel) -> io::Result<Wire> {
        let begun = Instant::now();
        let stream = self.connect(limit, cancel)?;
        let left = limit.saturating_sub(begun.elapsed()).min(HANDSHAKE);
        let secured = self.tls.secure(connection(stream)?, left, cancel);
        Ok(secured?)
    }
}

/// Listens for the links of one session.
#[derive(Debug)]
pub struct SessionListener {
    listener: TcpListener,
}

impl SessionListener {
    /// Listens at the first free port of the range; port 0 is any free one.
    ///
    /// # Errors
    ///
    /// No port is free, or the address is not one of this host.
    pub fn bind(address: IpAddr, ports: RangeInclusive<u16>) -> io::Result<Self> {
        let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for port in ports {
            match TcpListener::bind((address, port)) {
                Ok(listener) => return Ok(Self { listener }),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for a client. After that it goes on to take links of the session, in the background,
    /// until the session takes no more. At most 8 clients are in their handshake at a time.
    ///
    /// # Errors
    ///
    /// The token was set, the time is over, or the operating system's error. A client that is
    /// refused is not an error.
    pub fn accept(
        self,
        server: Arc<Server>,
        tls: ServerTls,
        limit: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<Session, SessionError> {
        let (sessions, made) = mpsc::channel();
        self.listener
            .set_nonblocking(true)
            .map_err(SessionError::Connecting)?;
        let gone = Cancel::new();
        let accepting = Accepting {
            listener: self.listener,
            server,
            tls,
            sessions,
            gone: gone.clone(),
            at_work: Arc::default(),
        };
        let name = "session-listen".to_owned();
        let started = thread::Builder::new()
            .name(name)
            .spawn(move || accepting.run());
        started.map_err(SessionError::Connecting)?;
        let begun = Instant::now();
        loop {
            let over = limit.is_some_and(|limit| begun.elapsed() >= limit);
            match made.recv_timeout(LOOK) {
                Ok(session) => return Ok(session),
                Err(mpsc::RecvTimeoutError::Timeout) if !over && !cancel.is_cancelled() => {}
                Err(_) => {
                    gone.cancel();
                    return Err(SessionError::Connecting(match over {
                        true => io::ErrorKind::TimedOut.into(),
                        false => ConnectionError::Cancelled.into(),
                    }));
                }
            }
        }
    }
}

/// Takes connections until the session takes no more links.
struct Accepting {
    listener: TcpListener,
    server: Arc<Server>,
    tls: ServerTls,
    sessions: mpsc::Sender<Session>,
    /// No session is wanted any more.
    gone: Cancel,
    at_work: Arc<AtomicUsize>,
}

impl Accepting {
    fn run(self) {
        while !self.gone.is_cancelled() && self.server.is_open() {
            let mut events = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut events, PollTimeout::from(100_u8)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return tracing::warn!(%error, "listening for links"),
            }
            match self.listener.accept() {
                Ok((stream, peer)) => self.take(stream, peer),
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be taken");
                    // Perhaps there are too many descriptors: not again at once.
                    thread::park_timeout(LOOK);
                }
            }
        }
    }

    /// Begins a handshake, if there are not too many.
    fn take(&self, stream: TcpStream, peer: SocketAddr) {
        if self.at_work.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES {
            self.at_work.fetch_sub(1, Ordering::Relaxed);
            return tracing::debug!(%peer, "too many handshakes: closed");
        }
        let (server, tls) = (Arc::clone(&self.server), self.tls.clone());
        let (sessions, gone) = (self.sessions.clone(), self.gone.clone());
        let at_work = Arc::clone(&self.at_work);
        let handshake = move || {
            let cancel = Cancel::new();
            let made = stream
                .set_nonblocking(false)
                .and_then(|()| connection(stream))
                .map_err(SessionError::Connecting)
                .and_then(|connection| Ok(tls.secure(connection, HANDSHAKE, &cancel)?))
                .and_then(|wire| server.admit(wire, &cancel));
            at_work.fetch_sub(1, Ordering::Relaxed);
            match made {
                Ok(None) => {}
                Ok(Some(session)) if gone.is_cancelled() => drop(session),
                // Without a receiver, the session is dropped.
                Ok(Some(session)) => drop(sessions.send(session)),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::info!(%peer, %error, cause, "a client was refused");
                }
            }
        };
        let name = "session-greet".to_owned();
        if let Err(error) = thread::Builder::new().name(name).spawn(handshake) {
            self.at_work.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "a connection could not be served");
        }
    }
}
