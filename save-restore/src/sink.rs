//! Where a stream goes: a file descriptor, to which pages are written straight from
//! the guest's memory, or anything else that takes octets.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use xsr_xen_backend::Gather;

use crate::descriptor::Descriptor;
use crate::pace::Pace;
use crate::progress::Cancel;

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
///
/// Its O_NONBLOCK is left as it is; where it is set, a full descriptor is waited for.
#[derive(Debug)]
pub struct FdSink<F> {
    descriptor: Descriptor<F>,
    /// Octets that the kernel has taken.
    carried: Arc<AtomicU64>,
}

impl<F: AsFd> FdSink<F> {
    /// Waits for a descriptor that is full for as long as it takes.
    pub fn new(fd: F) -> Self {
        Self::over(Descriptor::blocking(fd))
    }

    /// Stops waiting when `cancel` says so, within a fraction of 100 ms: a write then
    /// fails with [`Cancelled`](crate::progress::Cancelled), and an unknown part of it
    /// has been written. Files are written to without a look at whether they are slow.
    ///
    /// # Errors
    ///
    /// The descriptor is none that can be asked what it is.
    pub fn cancellable(fd: F, cancel: Cancel) -> io::Result<Self> {
        Ok(Self::over(Descriptor::cancellable(fd, cancel, true)?))
    }

    fn over(descriptor: Descriptor<F>) -> Self {
        let carried = Arc::default();
        Self {
            descriptor,
            carried,
        }
    }

    /// Have the octets that are written counted there, each time that the kernel takes some of
    /// them: whoever looks sees that something moves while a long write goes on.
    pub fn count_in(mut self, carried: Arc<AtomicU64>) -> Self {
        self.carried = carried;
        self
    }

    /// Have a write fail, with `TimedOut`, once the other end has broken these rules: it may be
    /// there and read nothing. Only of a sink that is [`cancellable`](Self::cancellable): the
    /// writes of others block.
    pub fn keep_pace(mut self, pace: Arc<Pace>) -> Self {
        self.descriptor.keep_pace(pace);
        self
    }

    fn write_all_of(&self, list: &Gather<'_>) -> io::Result<()> {
        let mut rest = list.unwritten();
        while !rest.is_empty() {
            let n = self
                .descriptor
                .write(|fd, call| rest.write_some(fd, call))?;
            self.carried.fetch_add(n as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl<F: AsFd> Write for FdSink<F> {
    /// All of `octets`, always.
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let mut list = Gather::new();
        list.push(octets);
        self.write_all_of(&list)?;
        Ok(octets.len())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_long_write_is_seen_to_move_before_it_ends() {
        let octets = vec![7; 8 << 20];
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let carried = Arc::new(AtomicU64::new(0));
        let sink = FdSink::cancellable(writer, Cancel::new()).unwrap();
        let mut sink = sink.count_in(Arc::clone(&carried));
        std::thread::scope(|scope| {
            let octets = &octets;
            let writing = scope.spawn(move || {
                let mut list = Gather::new();
                list.push(octets);
                sink.write_gather(&list).unwrap();
            });
            // What is in the socket by now is part of one list, of which most is still to come.
            reader.read_exact(&mut vec![0; 4 << 20]).unwrap();
            while carried.load(Ordering::Relaxed) < 4 << 20 {
                assert!(!writing.is_finished());
                std::thread::yield_now();
            }
            assert!(carried.load(Ordering::Relaxed) < 8 << 20);
            reader.read_exact(&mut vec![0; 4 << 20]).unwrap();
        });
        assert_eq!(carried.load(Ordering::Relaxed), 8 << 20);
    }
}
