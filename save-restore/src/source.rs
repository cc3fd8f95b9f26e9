//! Where a stream comes from: a file descriptor, from which pages are read straight
//! into the guest's memory, or anything else that gives octets.

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;

use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::ForeignPages;

use crate::descriptor::Descriptor;
use crate::progress::Cancel;

/// Gives a stream.
pub trait PageSource: Read {
    /// Fill pages of the guest (a range of indices) with exactly as many octets.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends; what the source says otherwise.
    ///
    /// # Panics
    ///
    /// When a page of the range is not mapped for writing.
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()>;
}

/// A file descriptor: pages are not copied in user space.
///
/// Its O_NONBLOCK is left as it is; where it is set, an empty descriptor is waited for.
#[derive(Debug)]
pub struct FdSource<F>(Descriptor<F>);

impl<F: AsFd> FdSource<F> {
    /// Waits for octets for as long as it takes.
    pub fn new(fd: F) -> Self {
        Self(Descriptor::blocking(fd))
    }

    /// Stops waiting when `cancel` says so, within a fraction of 100 ms: a read then
    /// fails with [`Cancelled`](crate::progress::Cancelled). A pipe or socket must have
    /// no other reader meanwhile. Files are read without a look at whether they are
    /// slow.
    ///
    /// # Errors
    ///
    /// The descriptor is none that can be asked what it is.
    pub fn cancellable(fd: F, cancel: Cancel) -> io::Result<Self> {
        Ok(Self(Descriptor::cancellable(fd, cancel, false)?))
    }
}

impl<F: AsFd> Read for FdSource<F> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(|fd| Ok(nix::unistd::read(fd, room)?))
    }
}

impl<F: AsFd> PageSource for FdSource<F> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let mut at = range.start * PAGE_SIZE;
        let end = range.end * PAGE_SIZE;
        while at < end {
            match self.0.read(|fd| pages.read_some_from(fd, at..end))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => at += n,
            }
        }
        Ok(())
    }
}

/// Anything that gives octets: pages are copied once.
#[derive(Debug)]
pub struct CopySource<R>(pub R);

impl<R: Read> Read for CopySource<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

impl<R: Read> PageSource for CopySource<R> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let mut page = [0; PAGE_SIZE];
        for index in range {
            self.0.read_exact(&mut page)?;
            pages
                .page(index)
                .expect("caller mapped it")
                .copy_from(&page);
        }
        Ok(())
    }
}

impl<S: PageSource + ?Sized> PageSource for &mut S {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        (**self).read_pages(pages, range)
    }
}
