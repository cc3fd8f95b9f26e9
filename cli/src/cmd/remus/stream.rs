//! Where the stream of a protected domain goes: one descriptor, to which the engine and
//! the libxl layer around it write in turn.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use xsr_save_restore::pace::Pace;
use xsr_save_restore::sink::PageSink;
use xsr_xen_backend::Gather;

use crate::cmd::save::sink::ImageSink;
use crate::interrupt::Interrupt;
use crate::transport::Silence;

/// A stream, and whether all that was written to it has gone out.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    sink: RefCell<ImageSink<'a>>,
    failed: Cell<bool>,
    file: &'a File,
    silence: Cell<Silence>,
    pace: Arc<Pace>,
}

impl<'a> Stream<'a> {
    /// Write to where the file stands, until somebody cuts it off, who is shown what moves, or
    /// until the other end takes too little of it: nothing for so long, or, while the guest is
    /// suspended, less than [`Pace`] says.
    pub(super) fn new(
        file: &'a File,
        interrupt: &Interrupt,
        patience: Duration,
    ) -> io::Result<Self> {
        let (cut, carried) = (interrupt.cut().clone(), interrupt.carried());
        let pace = Arc::new(Pace::new(patience));
        let sink = ImageSink::watched(file, cut, carried, Arc::clone(&pace))?;
        Ok(Self {
            sink: RefCell::new(sink),
            failed: Cell::new(false),
            file,
            silence: Cell::new(Silence::Waiting),
            pace,
        })
    }

    /// What the other end has to keep, told when the guest is suspended and when it runs on.
    pub(super) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Octets written so far.
    pub(super) fn octets(&self) -> u64 {
        self.sink.borrow().octets()
    }

    /// Whether a write has failed: the other end has no more than a part of it, and nothing
    /// can be written behind that.
    pub(super) fn failed(&self) -> bool {
        self.failed.get()
    }

    /// What was sent is complete, and the other end is waited for, until something is written
    /// again.
    pub(super) fn waits(&self) {
        self.now(Silence::Waiting);
    }

    fn now(&self, silence: Silence) {
        if self.silence.replace(silence) != silence {
            silence.bear(self.file);
        }
    }

    fn look<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.failed.set(true);
        }
        result
    }
}

impl Write for &Stream<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.now(Silence::Sending);
        self.look(self.sink.borrow_mut().write(octets))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.look(self.sink.borrow_mut().flush())
    }
}

impl PageSink for &Stream<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.now(Silence::Sending);
        self.look(self.sink.borrow_mut().write_gather(list))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    use nix::sys::socket::{getsockopt, sockopt};

    use super::*;

    #[test]
    fn silence_is_borne_for_longer_while_something_is_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let file = File::from(OwnedFd::from(socket));
        let patience = Duration::from_secs(60);
        let stream = Stream::new(&file, &Interrupt::catch().unwrap(), patience).unwrap();
        let seconds = || getsockopt(&file, sockopt::TcpUserTimeout).unwrap() / 1000;
        for _ in 0..2 {
            (&stream).write_all(b"a checkpoint").unwrap();
            assert_eq!(seconds(), 120);
            stream.waits();
            assert_eq!(seconds(), 30);
        }
        (&stream).write_gather(&Gather::new()).unwrap();
        assert_eq!(seconds(), 120);
    }
}
