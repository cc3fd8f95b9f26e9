//! Where a stream comes from: a file descriptor, from which pages are read straight
//! into the guest's memory, or anything else that gives octets.

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;

use nix::errno::Errno;
use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::ForeignPages;

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
#[derive(Debug)]
pub struct FdSource<F>(pub F);

impl<F: AsFd> Read for FdSource<F> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::read(&self.0, room) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

impl<F: AsFd> PageSource for FdSource<F> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        pages.read_exact_from(self.0.as_fd(), range)
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
