//! The stream of a protected domain: one connection, to which the engine and the libxl layer write
//! in turn.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use xsr_xen_backend::Gather;

use super::super::connection::{Connection, ConnectionWriter, TcpConnection, Wait};
use crate::sink::{FdSink, PageSink};

/// A stream, and whether everything written to it has been sent.
#[derive(Debug)]
pub struct CheckpointStream<'a> {
    to: To<'a>,
    bytes: Cell<u64>,
    failed: Cell<bool>,
    /// The current limit for silence.
    silence: Cell<Duration>,
}

/// The destination of the stream.
#[derive(Clone, Copy, Debug)]
enum To<'a> {
    Connection(&'a dyn Connection, ConnectionWriter<'a>),
    /// Discards everything.
    Null(&'a File),
}

impl<'a> CheckpointStream<'a> {
    /// Write to a connection. `wait` limits each write.
    pub fn new(connection: &'a dyn Connection, wait: Wait<'a>) -> Self {
        let writer = ConnectionWriter::new(connection, wait);
        Self::over(To::Connection(connection, writer))
    }

    /// Discard everything.
    pub fn to_nothing(null: &'a File) -> Self {
        Self::over(To::Null(null))
    }

    fn over(to: To<'a>) -> Self {
        Self {
            to,
            bytes: Cell::new(0),
            failed: Cell::new(false),
            silence: Cell::new(TcpConnection::SILENCE_WAITING),
        }
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether a write has failed: the other end has only a part of it, and nothing can be written
    /// after that.
    pub fn failed(&self) -> bool {
        self.failed.get()
    }

    /// Everything sent so far is complete. Until the next write, the other end is waited for.
    pub(super) fn waits(&self) {
        self.bear(TcpConnection::SILENCE_WAITING);
    }

    fn bear(&self, silence: Duration) {
        if self.silence.replace(silence) != silence
            && let To::Connection(connection, _) = self.to
            && let Err(error) = connection.give_up_on_silence(silence)
        {
            tracing::warn!(%error, "the time limit for silence could not be set");
        }
    }

    /// Write, and record the result.
    fn write_with(
        &self,
        write: impl FnOnce(&mut dyn PageSink) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.bear(TcpConnection::SILENCE_SENDING);
        let written = match self.to {
            To::Connection(_, mut writer) => write(&mut writer),
            To::Null(null) => write(&mut FdSink::new(null)),
        };
        match &written {
            Ok(n) => self.bytes.set(self.bytes.get() + *n as u64),
            Err(_) => self.failed.set(true),
        }
        written
    }
}

impl Write for &CheckpointStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_with(|sink| sink.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl PageSink for &CheckpointStream<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        let written = self.write_with(|sink| sink.write_gather(list).map(|()| list.len()));
        written.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::{getsockopt, sockopt};

    use super::*;

    #[test]
    fn silence_is_borne_for_longer_while_something_is_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let connection = TcpConnection::new(socket).unwrap();
        let stream = CheckpointStream::new(&connection, Wait::forever());
        let seconds = || {
            let socket = connection.read_fd().unwrap();
            getsockopt(&socket, sockopt::TcpUserTimeout).unwrap() / 1000
        };
        for _ in 0..2 {
            (&stream).write_all(b"a checkpoint").unwrap();
            assert_eq!(seconds(), 120);
            stream.waits();
            assert_eq!(seconds(), 30);
        }
        (&stream).write_gather(&Gather::new()).unwrap();
        assert_eq!(seconds(), 120);
        assert_eq!(stream.bytes(), 24);
    }
}
