//! Where a save writes to: a file descriptor, with a count of what has been written.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use xsr_save_restore::pace::Pace;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::sink::{FdSink, PageSink};
use xsr_xen_backend::Gather;

/// An image from its first octet on.
#[derive(Debug)]
pub(crate) struct ImageSink<'a> {
    sink: FdSink<&'a File>,
    octets: u64,
}

impl<'a> ImageSink<'a> {
    /// Write to where the file stands, until somebody cancels.
    pub(crate) fn new(file: &'a File, cancel: Cancel) -> io::Result<Self> {
        Ok(Self {
            sink: FdSink::cancellable(file, cancel)?,
            octets: 0,
        })
    }

    /// The same, to a peer that has to keep this pace.
    pub(crate) fn paced(file: &'a File, cancel: Cancel, pace: Arc<Pace>) -> io::Result<Self> {
        let Self { sink, octets } = Self::new(file, cancel)?;
        let sink = sink.keep_pace(pace);
        Ok(Self { sink, octets })
    }

    /// The same, with the bytes counted there as they go out.
    pub(crate) fn watched(
        file: &'a File,
        cancel: Cancel,
        carried: Arc<AtomicU64>,
        pace: Arc<Pace>,
    ) -> io::Result<Self> {
        let Self { sink, octets } = Self::paced(file, cancel, pace)?;
        let sink = sink.count_in(carried);
        Ok(Self { sink, octets })
    }

    /// Octets written so far.
    pub(crate) fn octets(&self) -> u64 {
        self.octets
    }
}

impl Write for ImageSink<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let n = self.sink.write(octets)?;
        self.octets += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl PageSink for ImageSink<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.sink.write_gather(list)?;
        self.octets += list.len() as u64;
        Ok(())
    }
}
