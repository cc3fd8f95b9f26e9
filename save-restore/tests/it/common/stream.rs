//! Sinks and sources that fail at a given point, and a source that returns one byte at a time.

use std::io::{self, Read, Write};

/// A fault of a read or a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upset {
    /// It fails with this errno, from now on.
    Errno(i32),
    /// It is interrupted by a signal, once.
    Interrupted,
    /// It moves one byte.
    Short,
    /// The end: a read returns nothing, a write takes nothing.
    End,
}

impl Upset {
    /// Whether the caller should continue as if nothing had happened.
    pub(crate) fn is_harmless(self) -> bool {
        matches!(self, Self::Interrupted | Self::Short)
    }

    fn of(self, all: usize) -> io::Result<usize> {
        match self {
            Self::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            Self::Interrupted => Err(io::ErrorKind::Interrupted.into()),
            Self::Short => Ok(all.min(1)),
            Self::End => Ok(0),
        }
    }
}

/// When the fault occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// In the n-th call, from 0.
    Call(usize),
    /// Once this many bytes have been transferred.
    Byte(usize),
}

/// A stream with one fault.
#[derive(Debug)]
pub(crate) struct Upsetting<S> {
    inner: S,
    upset: Option<(When, Upset)>,
    calls: usize,
    bytes: usize,
    done: bool,
}

impl<S> Upsetting<S> {
    pub(crate) fn new(inner: S, when: When, upset: Upset) -> Self {
        Self {
            upset: Some((when, upset)),
            ..Self::watching(inner)
        }
    }

    /// No fault.
    pub(crate) fn watching(inner: S) -> Self {
        Self {
            inner,
            upset: None,
            calls: 0,
            bytes: 0,
            done: false,
        }
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// Whether the fault has occurred.
    pub(crate) fn happened(&self) -> bool {
        self.done
    }

    pub(crate) fn into_inner(self) -> S {
        self.inner
    }

    /// Transfers bytes: as many of `all` as possible before the fault occurs.
    fn go(
        &mut self,
        all: usize,
        go: impl FnOnce(&mut S, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let call = self.calls;
        self.calls += 1;
        let mut room = all;
        if let Some((when, upset)) = self.upset {
            let now = match when {
                When::Call(at) => call == at,
                When::Byte(at) => {
                    let left = at.saturating_sub(self.bytes);
                    room = match self.done {
                        true => all,
                        false => room.min(left),
                    };
                    left == 0
                }
            };
            // A fault that ends a stream ends it for good.
            if now && !self.done || self.done && !upset.is_harmless() {
                self.done = true;
                room = upset.of(all)?;
            }
        }
        let moved = match room {
            0 => 0,
            room => go(&mut self.inner, room)?,
        };
        self.bytes += moved;
        Ok(moved)
    }
}

impl<W: Write> Write for Upsetting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.go(bytes.len(), |inner, room| inner.write(&bytes[..room]))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Upsetting<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.go(room.len(), |inner, n| inner.read(&mut room[..n]))
    }
}

/// Returns one byte at a time.
#[derive(Debug)]
pub(crate) struct OneByte<R>(pub(crate) R);

impl<R: Read> Read for OneByte<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let one = room.len().min(1);
        self.0.read(&mut room[..one])
    }
}
