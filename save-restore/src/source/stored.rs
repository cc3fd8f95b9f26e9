//! The source of a stream that is an image in a storage.

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::EndedAfter;
use xsr_xen_backend::ForeignPages;

use super::{Extent, FdSource, HEADERS, LookAhead, PageSource, copy_pages, read_pages_at};
use crate::progress::{Cancel, Cancelled};
use crate::storage::{StorageCursor, StorageReader};

/// An image in a storage, from the cursor's position on.
///
/// Any storage works. If there is a descriptor, pages are not copied in user space.
///
/// ```
/// use std::io::Read as _;
/// use xsr_save_restore::progress::Cancel;
/// use xsr_save_restore::source::StoredSource;
/// use xsr_save_restore::storage::{StorageCursor, file};
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("web.save");
/// std::fs::write(&path, "an image")?;
/// let cursor = StorageCursor::new(file::open(&path)?)?;
/// let mut source = StoredSource::new(&cursor, Cancel::default())?;
/// let mut all = String::new();
/// source.read_to_string(&mut all)?;
/// assert_eq!(all, "an image");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StoredSource<'c> {
    cursor: &'c StorageCursor,
    cancel: Cancel,
    /// The image, if it can be read only once and has a descriptor.
    stream: Option<FdSource<BorrowedFd<'c>>>,
}

impl<'c> StoredSource<'c> {
    /// Reads from the cursor's position on. When `cancel` is set, reads fail with [`Cancelled`],
    /// waiting for a pipe included.
    ///
    /// # Errors
    ///
    /// The descriptor's type could not be determined.
    pub fn new(cursor: &'c StorageCursor, cancel: Cancel) -> io::Result<Self> {
        let stream = cursor
            .stream_descriptor()
            .map(|fd| FdSource::cancellable(fd, cancel.clone()))
            .transpose()?;
        Ok(Self {
            cursor,
            cancel,
            stream,
        })
    }

    fn check(&self) -> io::Result<()> {
        match self.cancel.is_cancelled() {
            true => Err(io::Error::other(Cancelled)),
            false => Ok(()),
        }
    }

    fn advance(&self, bytes: u64) -> io::Result<u64> {
        let offset = i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        io::Seek::seek(&mut &*self.cursor, io::SeekFrom::Current(offset))
    }

    fn reader(&self) -> Option<&Arc<dyn StorageReader>> {
        self.cursor.reader()
    }
}

impl Read for StoredSource<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if let Some(stream) = &mut self.stream {
            return stream.read(room);
        }
        self.check()?;
        let mut cursor = self.cursor;
        cursor.read(room)
    }
}

impl PageSource for StoredSource<'_> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        if let Some(stream) = &mut self.stream {
            return stream.read_pages(pages, range);
        }
        let Some(fd) = self.reader().and_then(|reader| reader.descriptor()) else {
            return copy_pages(self, pages, range);
        };
        self.check()?;
        let bytes = range.start * PAGE_SIZE..range.end * PAGE_SIZE;
        let wanted = bytes.len() as u64;
        let read = read_pages_at(fd, self.cursor.position(), pages, bytes)?;
        self.advance(read)?;
        match read == wanted {
            true => Ok(()),
            false => Err(EndedAfter(read).into()),
        }
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        if let Some(stream) = &mut self.stream {
            return stream.take_extent(bytes);
        }
        let Some(reader) = self.reader() else {
            return Ok(None);
        };
        self.check()?;
        let offset = self.cursor.position();
        // A reader in order reports the missing bytes.
        if offset.saturating_add(bytes) > reader.length() {
            return Ok(None);
        }
        let extent = Extent::new(Arc::clone(reader), offset);
        self.advance(bytes)?;
        Ok(Some(extent))
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        if let Some(stream) = &mut self.stream {
            return stream.look_ahead();
        }
        let offset = self.cursor.position().checked_sub(HEADERS);
        let (Some(reader), Some(offset)) = (self.reader(), offset) else {
            return Ok(None);
        };
        let cancel = Some(self.cancel.clone());
        Ok(Some(LookAhead::new(Arc::clone(reader), offset, cancel)))
    }
}
