//! The bytes of one link: those of the connection below, or those of TLS on it.

use std::io::{self, Read as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::migrate::connection::{Connection, ConnectionError, Peer, Received, Wait, Waits};

use super::frame::LONGEST;

/// How much one read of the connection takes.
const READ: usize = 128 << 10;

/// How much encrypted data one read takes: less than [`READ`] when it is decrypted.
const READ_ENCRYPTED: usize = READ / 2;

/// What has arrived on a link and is not a whole frame yet.
#[derive(Debug)]
pub(super) struct Inbox {
    room: Vec<u8>,
    from: usize,
    to: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            room: vec![0; LONGEST + READ],
            from: 0,
            to: 0,
        }
    }

    /// The bytes that have not been consumed.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.room[self.from..self.to]
    }

    /// These first bytes are done with.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.from += bytes.min(self.to - self.from);
    }

    /// Room for more: at least [`READ`] bytes if no more than one incomplete frame is here.
    fn room(&mut self) -> &mut [u8] {
        self.room.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        &mut self.room[self.to..]
    }

    fn filled(&mut self, bytes: usize) {
        self.to += bytes;
    }
}

/// TLS on a connection.
#[derive(Debug)]
struct Tls {
    session: Mutex<rustls::Connection>,
    /// The reading thread's.
    arrived: Mutex<Vec<u8>>,
    /// The writing thread's.
    written: Mutex<Vec<u8>>,
}

/// A link's transport. One thread reads and another one writes.
#[derive(Debug)]
pub struct Wire {
    connection: Box<dyn Connection>,
    tls: Option<Tls>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A violation of TLS, or a peer that is not the right one.
fn refused(error: rustls::Error) -> ConnectionError {
    ConnectionError::Lost(io::Error::new(io::ErrorKind::InvalidData, error))
}

impl Wire {
    /// A link without encryption: for a connection that is encrypted otherwise, such as one through
    /// ssh.
    pub fn plain(connection: Box<dyn Connection>) -> Self {
        Self {
            connection,
            tls: None,
        }
    }

    /// A link with TLS; both ends authenticate within the time of `wait`, however slowly bytes
    /// come.
    ///
    /// # Errors
    ///
    /// As [`Connection::read`] and [`Connection::write`]; the peer is refused, or refuses this end.
    pub(super) fn encrypted(
        connection: Box<dyn Connection>,
        mut session: rustls::Connection,
        wait: &Wait<'_>,
    ) -> Result<Self, ConnectionError> {
        // What is written at once is a frame.
        session.set_buffer_limit(None);
        let mut room = vec![0; READ_ENCRYPTED];
        let waits = Waits::together(wait, &*connection);
        while session.is_handshaking() {
            send(&*connection, &mut session, waits)?;
            if !session.is_handshaking() {
                break;
            }
            let read = connection.read(&mut room, &waits.next(&*connection));
            let n = match read.map_err(|error| waits.words(error))? {
                Received::Closed => {
                    return Err(ConnectionError::Lost(io::ErrorKind::UnexpectedEof.into()));
                }
                Received::Bytes(n) => n,
            };
            let mut rest = &room[..n];
            while !rest.is_empty() {
                if session.read_tls(&mut rest).map_err(ConnectionError::Lost)? == 0 {
                    return Err(ConnectionError::Lost(io::ErrorKind::UnexpectedEof.into()));
                }
                if let Err(error) = session.process_new_packets() {
                    // The peer learns why, if it still listens.
                    let told = send(&*connection, &mut session, waits);
                    tracing::debug!(?told, "an alert");
                    return Err(refused(error));
                }
            }
        }
        send(&*connection, &mut session, waits)?;
        Ok(Self {
            connection,
            tls: Some(Tls {
                session: Mutex::new(session),
                arrived: Mutex::new(room),
                written: Mutex::default(),
            }),
        })
    }

    /// The peer of the connection below.
    pub(super) fn peer(&self) -> Peer {
        self.connection.peer()
    }

    /// Reads what has arrived. Returns whether it has not ended.
    pub(super) fn read(&self, to: &mut Inbox, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        let Some(tls) = &self.tls else {
            return match self.connection.read(to.room(), wait)? {
                Received::Closed => Ok(false),
                Received::Bytes(n) => {
                    to.filled(n);
                    Ok(true)
                }
            };
        };
        let waits = Waits::together(wait, &*self.connection);
        let mut arrived = locked(&tls.arrived);
        let mut found = decrypted(&mut locked(&tls.session), to)?;
        while !found.any && !found.closed {
            let wait = waits.next(&*self.connection);
            let read = self.connection.read(&mut arrived, &wait);
            let n = match read.map_err(|error| waits.words(error))? {
                Received::Closed => return Ok(false),
                Received::Bytes(n) => n,
            };
            let mut rest = &arrived[..n];
            // After the end of TLS it takes nothing.
            while !rest.is_empty() && !found.closed {
                let mut session = locked(&tls.session);
                session.read_tls(&mut rest).map_err(ConnectionError::Lost)?;
                session.process_new_packets().map_err(refused)?;
                // TLS keeps only a little for later.
                let more = decrypted(&mut session, to)?;
                found.any |= more.any;
                found.closed |= more.closed;
            }
        }
        Ok(found.any)
    }

    /// Reads until this many bytes are here, within the time of `wait`.
    pub(super) fn read_whole(
        &self,
        to: &mut Inbox,
        bytes: usize,
        wait: &Wait<'_>,
    ) -> Result<(), ConnectionError> {
        let waits = Waits::together(wait, &*self.connection);
        while to.bytes().len() < bytes {
            let read = self.read(to, &waits.next(&*self.connection));
            if !read.map_err(|error| waits.words(error))? {
                return Err(ConnectionError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    /// Ends TLS, but not the connection.
    #[cfg(test)]
    pub(super) fn close_tls(&self) -> Result<(), ConnectionError> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let mut bytes = Vec::new();
        let mut session = locked(&tls.session);
        session.send_close_notify();
        encrypted(&mut session, &mut bytes)?;
        let waits = Waits::together(&Wait::forever(), &*self.connection);
        write_all(&*self.connection, &bytes, waits)
    }

    /// Writes all of it.
    pub(super) fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<(), ConnectionError> {
        let waits = Waits::together(wait, &*self.connection);
        let Some(tls) = &self.tls else {
            return write_all(&*self.connection, bytes, waits);
        };
        let mut written = locked(&tls.written);
        written.clear();
        {
            let mut session = locked(&tls.session);
            let all = session.writer().write_all(bytes);
            all.map_err(ConnectionError::Local)?;
            encrypted(&mut session, &mut written)?;
        }
        write_all(&*self.connection, &written, waits)
    }
}

/// What [`decrypted`] has found.
#[derive(Clone, Copy, Debug, Default)]
struct Decrypted {
    /// There was something.
    any: bool,
    /// The peer has ended TLS: it sends no more.
    closed: bool,
}

/// Moves what has been decrypted.
fn decrypted(
    session: &mut rustls::Connection,
    to: &mut Inbox,
) -> Result<Decrypted, ConnectionError> {
    let mut found = Decrypted::default();
    loop {
        let room = to.room();
        if room.is_empty() {
            return Ok(found);
        }
        match session.reader().read(room) {
            Ok(0) => {
                found.closed = true;
                return Ok(found);
            }
            Ok(n) => {
                to.filled(n);
                found.any = true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            Err(error) => return Err(ConnectionError::Lost(error)),
        }
    }
}

/// Appends what TLS has to send.
fn encrypted(session: &mut rustls::Connection, to: &mut Vec<u8>) -> Result<(), ConnectionError> {
    while session.wants_write() {
        session.write_tls(to).map_err(ConnectionError::Local)?;
    }
    Ok(())
}

/// Sends what TLS has to send.
fn send(
    connection: &dyn Connection,
    session: &mut rustls::Connection,
    waits: Waits<'_>,
) -> Result<(), ConnectionError> {
    let mut room = Vec::new();
    encrypted(session, &mut room)?;
    write_all(connection, &room, waits)
}

fn write_all(
    connection: &dyn Connection,
    mut bytes: &[u8],
    waits: Waits<'_>,
) -> Result<(), ConnectionError> {
    while !bytes.is_empty() {
        let written = connection.write(bytes, &waits.next(connection));
        let written = written.map_err(|error| waits.words(error))?;
        bytes = &bytes[written..];
    }
    Ok(())
}
