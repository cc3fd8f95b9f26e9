//! Where a stream goes: a file descriptor, to which pages are written straight from
//! the guest's memory, or anything else that takes octets.

use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use xsr_xen_backend::Gather;

/// Takes a stream.
pub trait PageSink: Write {
    /// Write a list of octets and pages, all of it.
    ///
    /// # Errors
    ///
    /// What the sink says; an unknown part has been written then.
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()>;
}

/// A file descriptor: pages are not copied in user space.
#[derive(Debug)]
pub struct FdSink<F>(pub F);

impl<F: AsFd> Write for FdSink<F> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(&self.0, octets) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: AsFd> PageSink for FdSink<F> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        list.write_to(self.0.as_fd())
    }
}

/// Anything that takes octets: pages are copied once.
#[derive(Debug)]
pub struct CopySink<W>(pub W);

impl<W: Write> Write for CopySink<W> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.0.write(octets)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write> PageSink for CopySink<W> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        list.copy_to(&mut self.0)
    }
}

impl<S: PageSink + ?Sized> PageSink for &mut S {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        (**self).write_gather(list)
    }
}
