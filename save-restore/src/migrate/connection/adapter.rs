//! Adapters that let the engine read and write a stream over a connection.

use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::EndedAfter;
use xsr_xen_backend::{ForeignPages, Gather};

use super::fd::{Limit, failed};
use super::{Connection, ConnectionError, Received, Wait};
use crate::back_channel::BackChannel;
use crate::descriptor::Descriptor;
use crate::pace::Overdue;
use crate::progress::Cancel;
use crate::sink::PageSink;
use crate::source::{Extent, LookAhead, PageSource, copy_pages};

/// How long the calls of an adapter may wait: one call as `each` says, all calls together until a
/// time on the connection's clock.
#[derive(Clone, Copy, Debug)]
pub(in crate::migrate) struct Waits<'a> {
    each: Wait<'a>,
    /// The start, and how long.
    within: Option<(Duration, Duration)>,
}

impl<'a> Waits<'a> {
    /// All calls together may take what `wait` gives to one.
    pub(in crate::migrate) fn together(wait: &Wait<'a>, connection: &dyn Connection) -> Self {
        Self {
            each: Wait {
                at_most: None,
                ..*wait
            },
            within: wait.at_most.map(|limit| (connection.clock(), limit)),
        }
    }

    /// How long the next call may wait.
    pub(in crate::migrate) fn next(self, connection: &dyn Connection) -> Wait<'a> {
        let Some((since, limit)) = self.within else {
            return self.each;
        };
        let left = since
            .saturating_add(limit)
            .saturating_sub(connection.clock());
        let limit = self.each.at_most.map_or(left, |limit| limit.min(left));
        self.each.at_most(limit)
    }

    /// Limits all calls together to this time, from now on.
    fn within(&mut self, limit: Duration, connection: &dyn Connection) {
        self.within = Some((connection.clock(), limit));
    }

    /// The error of a call; it names the limit of all calls together if that was reached.
    pub(in crate::migrate) fn words(self, error: ConnectionError) -> ConnectionError {
        use ConnectionError::TimedOut;
        match (error, self.within) {
            (TimedOut(Overdue::NoAnswer(_)), Some((_, limit))) => {
                TimedOut(Overdue::NoAnswer(limit))
            }
            (TimedOut(Overdue::NothingTaken(of_call)), Some((_, limit)))
                if self.each.idle != Some(of_call) =>
            {
                TimedOut(Overdue::NothingTaken(limit))
            }
            (error, _) => error,
        }
    }
}

/// Reads from a connection. Takes no more bytes than it was asked for.
///
/// Errors are [`io::Error`]s that hold a [`ConnectionError`], or
/// [`Cancelled`](crate::progress::Cancelled).
pub struct ConnectionReader<'a> {
    connection: &'a dyn Connection,
    waits: Waits<'a>,
    /// Reads pages straight into the guest's memory.
    direct: Option<Descriptor<BorrowedFd<'a>>>,
    bytes: u64,
}

impl fmt::Debug for ConnectionReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionReader")
            .field("connection", &self.connection)
            .field("waits", &self.waits)
            .finish_non_exhaustive()
    }
}

impl<'a> ConnectionReader<'a> {
    /// A reader of which each read waits as `wait` says.
    ///
    /// # Errors
    ///
    /// The descriptor's type could not be determined.
    pub fn new(connection: &'a dyn Connection, wait: Wait<'a>) -> io::Result<Self> {
        let direct = match connection.read_fd() {
            Some(fd) => Some(Descriptor::cancellable(fd, Cancel::new(), false)?),
            None => None,
        };
        Ok(Self {
            connection,
            waits: Waits {
                each: wait,
                within: None,
            },
            direct,
            bytes: 0,
        })
    }

    /// The number of bytes that have been read.
    pub const fn bytes_read(&self) -> u64 {
        self.bytes
    }

    /// Limits all reads together to this time, from now on, so that a peer that sends a byte now
    /// and then cannot make a message last for ever.
    pub fn within(mut self, limit: Duration) -> Self {
        self.restart(limit);
        self
    }

    /// As [`Self::within`], replacing the previous limit: another message begins.
    pub fn restart(&mut self, limit: Duration) {
        self.waits.within(limit, self.connection);
    }
}

impl Read for ConnectionReader<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        let wait = self.waits.next(self.connection);
        let read = self.connection.read(room, &wait);
        Ok(match read.map_err(|error| self.waits.words(error))? {
            Received::Bytes(n) => {
                self.bytes += n as u64;
                n
            }
            Received::Closed => 0,
        })
    }
}

impl PageSource for ConnectionReader<'_> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let Some(direct) = &self.direct else {
            return copy_pages(self, pages, range);
        };
        let mut at = range.start * PAGE_SIZE;
        let end = range.end * PAGE_SIZE;
        while at < end {
            let wait = self.waits.next(self.connection);
            let limit = Limit::of(&wait);
            let read = direct.read_within(&limit, |fd| pages.read_some_from(fd, at..end));
            match read.map_err(|error| self.waits.words(failed(error, false)))? {
                0 => {
                    let read = at - range.start * PAGE_SIZE;
                    return Err(EndedAfter(read as u64).into());
                }
                n => {
                    wait.count(n);
                    self.bytes += n as u64;
                    at += n;
                }
            }
        }
        Ok(())
    }

    fn take_extent(&mut self, _: u64) -> io::Result<Option<Extent>> {
        Ok(None)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        Ok(None)
    }
}

impl BackChannel for ConnectionReader<'_> {
    fn look_ahead(&mut self) -> io::Result<Option<[u8; 8]>> {
        let mut bytes = [0; 8];
        let n = self.connection.peek(&mut bytes)?;
        Ok((n == bytes.len()).then_some(bytes))
    }
}

/// Writes to a connection.
///
/// Errors are as for [`ConnectionReader`].
#[derive(Clone, Copy)]
pub struct ConnectionWriter<'a> {
    connection: &'a dyn Connection,
    waits: Waits<'a>,
}

impl fmt::Debug for ConnectionWriter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionWriter")
            .field("connection", &self.connection)
            .field("waits", &self.waits)
            .finish()
    }
}

impl<'a> ConnectionWriter<'a> {
    /// A writer of which each write waits as `wait` says.
    pub fn new(connection: &'a dyn Connection, wait: Wait<'a>) -> Self {
        Self {
            connection,
            waits: Waits {
                each: wait,
                within: None,
            },
        }
    }

    /// Limits all writes together to this time, from now on.
    pub fn within(mut self, limit: Duration) -> Self {
        self.waits.within(limit, self.connection);
        self
    }
}

impl Write for ConnectionWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let wait = self.waits.next(self.connection);
        let written = self.connection.write(bytes, &wait);
        Ok(written.map_err(|error| self.waits.words(error))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl PageSink for ConnectionWriter<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        let wait = self.waits.next(self.connection);
        let written = self.connection.write_gather(list, &wait);
        Ok(written.map_err(|error| self.waits.words(error))?)
    }
}

/// Writes a list through [`Connection::write`], for connections without a descriptor.
///
/// # Errors
///
/// As [`Connection::write`].
pub(crate) fn copy_gather(
    connection: &dyn Connection,
    list: &Gather<'_>,
    wait: &Wait<'_>,
) -> Result<(), ConnectionError> {
    /// Preserves the error.
    struct Out<'a> {
        connection: &'a dyn Connection,
        waits: Waits<'a>,
        error: Option<ConnectionError>,
    }
    impl Write for Out<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let wait = self.waits.next(self.connection);
            self.connection.write(bytes, &wait).map_err(|error| {
                self.error = Some(self.waits.words(error));
                io::Error::other("see the error that is kept")
            })
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut out = Out {
        connection,
        waits: Waits::together(wait, connection),
        error: None,
    };
    match list.copy_to(&mut out) {
        Ok(()) => Ok(()),
        Err(error) => Err(out.error.unwrap_or(ConnectionError::Local(error))),
    }
}
