//! What a restore reads from: a file descriptor, with a count of what has been read
//! from it.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use xsr_format::frame::PAGE_SIZE;
use xsr_save_restore::pace::ReadLimit;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::source::{Extent, FdSource, LookAhead, PageSource};
use xsr_xen_backend::ForeignPages;

/// An image from its first octet on.
#[derive(Debug)]
pub(crate) struct ImageSource<'a> {
    source: FdSource<&'a File>,
    offset: u64,
}

impl<'a> ImageSource<'a> {
    /// Read from where the file stands, until somebody cancels.
    pub(crate) fn new(file: &'a File, cancel: Cancel) -> io::Result<Self> {
        Ok(Self {
            source: FdSource::cancellable(file, cancel)?,
            offset: 0,
        })
    }

    /// The same, and until the other end has sent nothing for too long.
    pub(crate) fn limited(
        file: &'a File,
        cancel: Cancel,
        limit: &Arc<ReadLimit>,
    ) -> io::Result<Self> {
        let Self { source, offset } = Self::new(file, cancel)?;
        let source = source.give_up_after(Arc::clone(limit));
        Ok(Self { source, offset })
    }

    /// Octets read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

impl Read for ImageSource<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(room)?;
        self.offset += n as u64;
        Ok(n)
    }
}

impl PageSource for ImageSource<'_> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let octets = (range.len() * PAGE_SIZE) as u64;
        self.source.read_pages(pages, range)?;
        self.offset += octets;
        Ok(())
    }

    fn take_extent(&mut self, octets: u64) -> io::Result<Option<Extent>> {
        let taken = self.source.take_extent(octets)?;
        if taken.is_some() {
            self.offset += octets;
        }
        Ok(taken)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        self.source.look_ahead()
    }
}
