//! Sinks for a stream: a file descriptor, to which pages are written straight from the guest's
//! memory, or any other writer.

use std::io::{self, Write};
use std::os::fd::AsFd;

use xsr_xen_backend::Gather;

use crate::descriptor::Descriptor;
use crate::progress::Cancel;

/// A sink for a stream.
pub trait PageSink: Write {
    /// Writes a list of bytes and pages, all of it.
    ///
    /// # Errors
    ///
    /// The sink's error; an unknown part has been written then.
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()>;
}

/// A file descriptor: pages are not copied in user space.
///
/// Its O_NONBLOCK is not changed. If it is set and the descriptor is full, writes wait.
#[derive(Debug)]
pub struct FdSink<F> {
    descriptor: Descriptor<F>,
}

impl<F: AsFd> FdSink<F> {
    /// Waits for a full descriptor without a limit.
    pub fn new(fd: F) -> Self {
        Self {
            descriptor: Descriptor::blocking(fd),
        }
    }

    /// Stops waiting when `cancel` is set, within a fraction of 100 ms: a write then fails with
    /// [`Cancelled`](crate::progress::Cancelled), and an unknown part of it has been written. Files
    /// are written without checking whether they are slow.
    ///
    /// # Errors
    ///
    /// The descriptor's type could not be determined.
    pub fn cancellable(fd: F, cancel: Cancel) -> io::Result<Self> {
        let descriptor = Descriptor::cancellable(fd, cancel, true)?;
        Ok(Self { descriptor })
    }

    fn write_all_of(&self, list: &Gather<'_>) -> io::Result<()> {
        let mut rest = list.unwritten();
        while !rest.is_empty() {
            self.descriptor
                .write(|fd, call| rest.write_some(fd, call))?;
        }
        Ok(())
    }
}

impl<F: AsFd> Write for FdSink<F> {
    /// Always writes all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut list = Gather::new();
        list.push(bytes);
        self.write_all_of(&list)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: AsFd> PageSink for FdSink<F> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.write_all_of(list)
    }
}

/// Any writer: pages are copied once.
#[derive(Debug)]
pub struct CopySink<W>(pub W);

impl<W: Write> Write for CopySink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
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
