//! What a restore reads from: a file descriptor, with a count of what has been read
//! from it.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use xsr_format::detect::{Detected, detect};
use xsr_format::frame::PAGE_SIZE;
use xsr_save_restore::pace::ReadLimit;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::source::{Extent, FdSource, LookAhead, PageSource};
use xsr_xen_backend::ForeignPages;

use crate::file::Input;
use crate::peel;

/// An image from its first octet on.
#[derive(Debug)]
pub(crate) struct ImageSource<'a> {
    source: FdSource<&'a File>,
    offset: u64,
    /// What has been read before, to see what comes.
    known: Cursor<Vec<u8>>,
}

impl<'a> ImageSource<'a> {
    /// Read from where the file stands, until somebody cancels.
    pub(crate) fn new(file: &'a File, cancel: Cancel) -> io::Result<Self> {
        Ok(Self {
            source: FdSource::cancellable(file, cancel)?,
            offset: 0,
            known: Cursor::default(),
        })
    }

    /// The same, where these octets of the image have been read already.
    pub(crate) fn behind(self, known: Vec<u8>) -> Self {
        let known = Cursor::new(known);
        Self { known, ..self }
    }

    /// The same, and until the other end has sent nothing for too long.
    pub(crate) fn limited(
        file: &'a File,
        cancel: Cancel,
        limit: &Arc<ReadLimit>,
    ) -> io::Result<Self> {
        let new = Self::new(file, cancel)?;
        let source = new.source.give_up_after(Arc::clone(limit));
        Ok(Self { source, ..new })
    }

    /// Octets read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

/// The image of a sender that writes the legacy form, Xen 4.5 or before, behind xl's header: as
/// one of today. `None` for an image that is of today; then what was read of it to see that.
///
/// # Errors
///
/// The sender says nothing for too long, or hangs up; the stream is bad.
pub(crate) fn of_old_sender(
    input: &Input,
    cancel: Cancel,
    limit: &Arc<ReadLimit>,
) -> Result<(Option<Input>, Vec<u8>)> {
    let mut known = Vec::new();
    let own = input.file.try_clone()?;
    let mut source = FdSource::cancellable(own, cancel)?.give_up_after(Arc::clone(limit));
    source
        .by_ref()
        .take(peel::TELLING as u64)
        .read_to_end(&mut known)?;
    if detect(&known) != Detected::Xl || !peel::is_wrapped(&known) {
        return Ok((None, known));
    }
    let whole = Cursor::new(known).chain(source);
    let converted = Input::converted_from(Box::new(whole), &input.name)?;
    Ok((Some(converted), Vec::new()))
}

impl Read for ImageSource<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = match self.known.read(room)? {
            0 => self.source.read(room)?,
            n => n,
        };
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
