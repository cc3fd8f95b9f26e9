//! The bytes of one link: those of the connection below, or those of TLS on it.

use std::io;

use crate::migrate::connection::{Connection, ConnectionError, Peer, Received, Wait};

use super::frame::LONGEST;

/// How much one read of the connection takes.
const READ: usize = 128 << 10;

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

/// A link's transport. One thread reads and another one writes.
#[derive(Debug)]
pub struct Wire {
    connection: Box<dyn Connection>,
}

impl Wire {
    /// A link without encryption: for a connection that is encrypted otherwise, such as one through
    /// ssh.
    pub fn plain(connection: Box<dyn Connection>) -> Self {
        Self { connection }
    }

    /// The peer of the connection below.
    pub(super) fn peer(&self) -> Peer {
        self.connection.peer()
    }

    /// Reads what has arrived. Returns whether it has not ended.
    pub(super) fn read(&self, to: &mut Inbox, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        match self.connection.read(to.room(), wait)? {
            Received::Closed => Ok(false),
            Received::Bytes(n) => {
                to.filled(n);
                Ok(true)
            }
        }
    }

    /// Reads until this many bytes are here.
    pub(super) fn read_whole(
        &self,
        to: &mut Inbox,
        bytes: usize,
        wait: &Wait<'_>,
    ) -> Result<(), ConnectionError> {
        while to.bytes().len() < bytes {
            if !self.read(to, wait)? {
                return Err(ConnectionError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    /// Writes all of it.
    pub(super) fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<(), ConnectionError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = self.connection.write(rest, wait)?;
            rest = &rest[written..];
        }
        Ok(())
    }
}
