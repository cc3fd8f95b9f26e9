//! Where a save writes to, with a count of what has been written.

use std::io::{self, Write};

use xsr_save_restore::sink::PageSink;
use xsr_xen_backend::Gather;

/// An image from its first byte on.
#[derive(Debug)]
pub(crate) struct ImageSink<S> {
    sink: S,
    octets: u64,
}

impl<S: PageSink> ImageSink<S> {
    /// Write to where the sink stands.
    pub(crate) fn new(sink: S) -> Self {
        Self { sink, octets: 0 }
    }

    /// Bytes written so far.
    pub(crate) fn octets(&self) -> u64 {
        self.octets
    }
}

impl<S: PageSink> Write for ImageSink<S> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let n = self.sink.write(octets)?;
        self.octets += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl<S: PageSink> PageSink for ImageSink<S> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.sink.write_gather(list)?;
        self.octets += list.len() as u64;
        Ok(())
    }
}
