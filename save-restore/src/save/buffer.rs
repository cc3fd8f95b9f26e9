//! The checkpoint buffer: keeps in memory what an epoch sends while the guest is suspended, and
//! writes it to the sink once the guest runs again.
//!
//! C implementation: none; Xen's engine writes all of a checkpoint with the guest suspended.

use std::cell::Cell;
use std::io::{self, Write};

use xsr_xen_backend::Gather;

use crate::sink::PageSink;

/// In front of a sink: keeps what is written while [`Hold`] says so, up to a limit.
pub(super) struct EpochBuffer<'s, 'h> {
    sink: &'s mut dyn PageSink,
    hold: &'h Hold,
    kept: Vec<u8>,
}

/// Whether written bytes are kept, and how many have been.
#[derive(Debug)]
pub(super) struct Hold {
    /// The most bytes that are kept.
    limit: usize,
    on: Cell<bool>,
    /// Bytes of this epoch that were kept until the guest ran.
    kept: Cell<u64>,
}

impl Hold {
    /// Keeps at most `limit` bytes; none if that is 0.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            on: Cell::new(false),
            kept: Cell::new(0),
        }
    }

    /// The guest is about to be suspended.
    pub(super) fn begin(&self) {
        self.on.set(self.limit > 0);
        self.kept.set(0);
    }

    /// The guest runs. Flushing the sink then sends what was kept; returns how many bytes that
    /// were.
    pub(super) fn end(&self) -> u64 {
        self.on.set(false);
        self.kept.get()
    }
}

impl<'s, 'h> EpochBuffer<'s, 'h> {
    pub(super) fn new(sink: &'s mut dyn PageSink, hold: &'h Hold) -> Self {
        Self {
            sink,
            hold,
            kept: Vec::new(),
        }
    }

    /// Whether `bytes` more are kept. Bytes that do not fit go straight to the sink, after
    /// everything before them: the guest then waits for the slower sink.
    fn keeps(&mut self, bytes: usize) -> io::Result<bool> {
        if !self.hold.on.get() {
            return Ok(false);
        }
        if self.kept.len() + bytes > self.hold.limit {
            self.drain()?;
        }
        if bytes > self.hold.limit {
            return Ok(false);
        }
        let whole = self.kept.len() + bytes;
        if whole > self.kept.capacity() {
            // Doubles the room each time, but never beyond the limit.
            let room = (2 * whole).min(self.hold.limit);
            self.kept.reserve_exact(room - self.kept.len());
        }
        self.hold.kept.set(whole as u64);
        Ok(true)
    }

    fn drain(&mut self) -> io::Result<()> {
        self.sink.write_all(&self.kept)?;
        self.kept.clear();
        self.hold.kept.set(0);
        Ok(())
    }
}

impl Write for EpochBuffer<'_, '_> {
    /// All of `bytes`, always.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.keeps(bytes.len())? {
            true => self.kept.extend_from_slice(bytes),
            false => self.sink.write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    /// Writes everything that is kept.
    fn flush(&mut self) -> io::Result<()> {
        self.drain()?;
        self.sink.flush()
    }
}

impl PageSink for EpochBuffer<'_, '_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        match self.keeps(list.len())? {
            true => list.copy_to(&mut self.kept),
            false => self.sink.write_gather(list),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::sink::CopySink;

    #[test]
    fn what_is_kept_goes_out_in_order_and_never_exceeds_the_limit() {
        let hold = Hold::new(8);
        let mut sink = CopySink(Vec::new());
        let mut buffer = EpochBuffer::new(&mut sink, &hold);
        buffer.write_all(b"ab").unwrap();
        hold.begin();
        buffer.write_all(b"cdef").unwrap();
        buffer.write_all(b"ghij").unwrap();
        assert_eq!(
            (&*buffer.kept, buffer.kept.capacity()),
            (&b"cdefghij"[..], 8)
        );
        // One byte too many: everything before it is written first.
        buffer.write_all(b"k").unwrap();
        assert_eq!(buffer.kept, b"k");
        // More than the buffer can hold.
        buffer.write_all(b"0123456789").unwrap();
        assert_eq!(buffer.kept, b"");
        buffer.write_all(b"l").unwrap();
        assert_eq!(hold.end(), 1);
        buffer.flush().unwrap();
        buffer.write_all(b"m").unwrap();
        assert_eq!(sink.0, b"abcdefghijk0123456789lm");
    }

    #[test]
    fn without_a_limit_nothing_is_kept() {
        let hold = Hold::new(0);
        let mut sink = CopySink(Vec::new());
        let mut buffer = EpochBuffer::new(&mut sink, &hold);
        hold.begin();
        buffer.write_all(b"a").unwrap();
        assert_eq!((buffer.kept.capacity(), hold.end()), (0, 0));
        assert_eq!(sink.0, b"a");
    }
}
