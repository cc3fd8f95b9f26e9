//! Where the stream of a protected domain goes: one descriptor, to which the engine and
//! the libxl layer around it write in turn.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Write};

use xsr_save_restore::sink::PageSink;
use xsr_xen_backend::Gather;

use crate::cmd::save::sink::ImageSink;
use crate::interrupt::Interrupt;

/// A stream, and whether all that was written to it has gone out.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    sink: RefCell<ImageSink<'a>>,
    failed: Cell<bool>,
}

impl<'a> Stream<'a> {
    /// Write to where the file stands, until somebody cuts it off, who is shown what moves.
    pub(super) fn new(file: &'a File, interrupt: &Interrupt) -> io::Result<Self> {
        let (cut, carried) = (interrupt.cut().clone(), interrupt.carried());
        Ok(Self {
            sink: RefCell::new(ImageSink::counting_in(file, cut, carried)?),
            failed: Cell::new(false),
        })
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

    fn look<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.failed.set(true);
        }
        result
    }
}

impl Write for &Stream<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.look(self.sink.borrow_mut().write(octets))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.look(self.sink.borrow_mut().flush())
    }
}

impl PageSink for &Stream<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        self.look(self.sink.borrow_mut().write_gather(list))
    }
}
