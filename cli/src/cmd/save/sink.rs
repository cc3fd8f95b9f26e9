//! The output of a save, with a count of the bytes written.

use std::io::{self, Write};

use xsr_save_restore::sink::PageSink;
use xsr_xen_backend::Gather;

/// An image from its first byte on.
#[derive(Debug)]
pub(crate) struct ImageSink<S> {
    sink: S,
    bytes: u64,
}

impl<S: PageSink> ImageSink<S> {
    /// Write to the sink's current position.
    pub(crate) fn new(sink: S) -> Self {
        Self { sink, bytes: 0 }
    }

    /// Bytes written so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<S: PageSink> Write for ImageSink<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.sink.write(bytes)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl<S: PageSink> PageSink for ImageSink<S> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.sink.write_gather(list)?;
        self.bytes += list.len() as u64;
        Ok(())
    }
}
