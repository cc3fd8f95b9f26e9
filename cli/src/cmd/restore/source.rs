//! The input of a restore, with a count of the bytes read.

use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use xsr_format::detect::{Detected, detect};
use xsr_format::frame::PAGE_SIZE;
use xsr_save_restore::migrate::connection::{Connection, Received, Wait};
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::source::{Extent, LookAhead, PageSource, StoredSource};
use xsr_save_restore::storage::StorageCursor;
use xsr_xen_backend::ForeignPages;

use crate::file::Input;
use crate::peel;

/// An image from its first byte on.
pub(crate) struct ImageSource<'a> {
    source: Box<dyn PageSource + 'a>,
    offset: u64,
    /// Bytes that have been read before, to detect the format.
    known: Cursor<Vec<u8>>,
}

impl<'a> ImageSource<'a> {
    /// Read from the image's position on, until the user cancels.
    pub(crate) fn new(image: &'a StorageCursor, cancel: Cancel) -> io::Result<Self> {
        Ok(Self::over(StoredSource::new(image, cancel)?))
    }

    /// Read from another source.
    pub(crate) fn over(source: impl PageSource + 'a) -> Self {
        Self {
            source: Box::new(source),
            offset: 0,
            known: Cursor::default(),
        }
    }

    /// The same, with these bytes of the image already read.
    pub(crate) fn behind(self, known: Vec<u8>) -> Self {
        let known = Cursor::new(known);
        Self { known, ..self }
    }

    /// Bytes read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

/// A connection that is read by another thread.
struct OwnReader {
    connection: Arc<dyn Connection>,
    cancel: Cancel,
    idle: Duration,
}

impl Read for OwnReader {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let wait = Wait::forever().unless(&self.cancel).idle(self.idle);
        Ok(match self.connection.read(room, &wait)? {
            Received::Bytes(n) => n,
            Received::Closed => 0,
        })
    }
}

/// Converts the image of a sender that writes the legacy form (Xen 4.5 or before) after xl's
/// header. For an image in today's form returns `None`, and the bytes read so far.
///
/// # Errors
///
/// The sender is silent for too long, or hangs up; the stream is bad.
pub(crate) fn of_old_sender(
    connection: &Arc<dyn Connection>,
    from: &mut impl Read,
    name: &str,
    cancel: Cancel,
    idle: Duration,
) -> Result<(Option<Input>, Vec<u8>)> {
    let mut known = Vec::new();
    from.take(peel::TELLING as u64).read_to_end(&mut known)?;
    if detect(&known) != Detected::Xl || !peel::is_wrapped(&known) {
        return Ok((None, known));
    }
    let whole = Cursor::new(known).chain(OwnReader {
        connection: Arc::clone(connection),
        cancel,
        idle,
    });
    let converted = Input::converted_from(Box::new(whole), name)?;
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
        let bytes = (range.len() * PAGE_SIZE) as u64;
        self.source.read_pages(pages, range)?;
        self.offset += bytes;
        Ok(())
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        let taken = self.source.take_extent(bytes)?;
        if taken.is_some() {
            self.offset += bytes;
        }
        Ok(taken)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        self.source.look_ahead()
    }
}
