//! Sources of a stream: a file descriptor, from which pages are read straight into the guest's
//! memory, or any other reader.

mod stored;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use xsr_format::frame::PAGE_SIZE;
use xsr_format::image::{DomainHeader, ImageHeader};
use xsr_format::read::EndedAfter;
use xsr_xen_backend::ForeignPages;

use crate::descriptor::Descriptor;
use crate::progress::{Cancel, Cancelled};
use crate::storage::StorageReader;
use crate::storage::file::FileReader;

pub use stored::StoredSource;

/// A source of a stream.
pub trait PageSource: Read {
    /// Fills pages of the guest (a range of indices) with exactly their size in bytes.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends; otherwise the error of the source.
    ///
    /// # Panics
    ///
    /// When a page of the range is not mapped for writing.
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()>;

    /// Returns the position of the next `bytes`, if any thread can read them at any time. They then
    /// count as read, and the source continues after them. `None` if they must be read in order, or
    /// if the source ends before; then its position is unchanged.
    ///
    /// # Errors
    ///
    /// The error of the source.
    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>>;

    /// Returns a separate reader for the stream whose two headers have just been read, from the
    /// first header to the end of the source. The source's own position does not change, whatever
    /// that reader does. `None` if the bytes can be read only once.
    ///
    /// # Errors
    ///
    /// The error of the source.
    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>>;
}

/// Bytes of the two headers.
pub(crate) const HEADERS: u64 = (ImageHeader::BYTES + DomainHeader::BYTES) as u64;

/// How much of a file is read at a time when looking ahead: at first (the head of a record and its
/// list of 1024 pages), and at most, if nothing is skipped in between.
const GLANCE: usize = 16 << 10;
const LONGEST_GLANCE: usize = 64 << 10;

/// A stored image with a read position of its own.
#[derive(Debug)]
pub struct LookAhead {
    image: Arc<dyn StorageReader>,
    offset: u64,
    cancel: Option<Cancel>,
    /// The part of the image that has been read, from this offset on.
    seen: Vec<u8>,
    seen_from: u64,
    /// How much to read next.
    glance: usize,
}

impl LookAhead {
    /// Looks ahead from an offset on.
    fn new(image: Arc<dyn StorageReader>, offset: u64, cancel: Option<Cancel>) -> Self {
        Self {
            image,
            offset,
            cancel,
            seen: Vec::new(),
            seen_from: offset,
            glance: GLANCE,
        }
    }

    /// The bytes at our position that have been read already.
    fn at_hand(&self) -> &[u8] {
        let at = self.offset.checked_sub(self.seen_from);
        let at = at.and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| self.seen.get(at..)).unwrap_or_default()
    }
}

impl Read for LookAhead {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            return Err(io::Error::other(Cancelled));
        }
        if self.at_hand().is_empty() {
            let on = self.offset == self.seen_from + self.seen.len() as u64;
            self.glance = match on {
                true => (self.glance * 2).min(LONGEST_GLANCE),
                false => GLANCE,
            };
            self.seen.resize(self.glance, 0);
            self.seen_from = self.offset;
            let read = self.image.read_at(&mut self.seen, self.offset);
            self.seen.truncate(*read.as_ref().unwrap_or(&0));
            read?;
        }
        let n = self.at_hand().read(room)?;
        self.offset += n as u64;
        Ok(n)
    }
}

impl Seek for LookAhead {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.offset.checked_add_signed(by),
            SeekFrom::End(by) => self.image.length().checked_add_signed(by),
        };
        self.offset = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

/// A range of bytes in a stored image.
#[derive(Clone, Debug)]
pub struct Extent {
    image: Arc<dyn StorageReader>,
    offset: u64,
}

impl Extent {
    fn new(image: Arc<dyn StorageReader>, offset: u64) -> Self {
        Self { image, offset }
    }

    /// Fills `room` from offset `at` of the extent.
    pub(crate) fn read_exact_at(&self, at: usize, room: &mut [u8]) -> io::Result<()> {
        Ok(self.image.read_exact_at(room, self.offset + at as u64)?)
    }

    /// Fills a range of `pages`; page 0 is the first of the extent.
    pub(crate) fn read_pages(&self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let bytes = range.start * PAGE_SIZE..range.end * PAGE_SIZE;
        let Some(fd) = self.image.descriptor() else {
            return self.copy_pages(pages, range);
        };
        let offset = self.offset + bytes.start as u64;
        let wanted = bytes.len() as u64;
        match read_pages_at(fd, offset, pages, bytes)? == wanted {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// As [`Self::read_pages`], for a storage without descriptors.
    fn copy_pages(&self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let first = range.start;
        let mut room = vec![0; range.len() * PAGE_SIZE];
        self.read_exact_at(first * PAGE_SIZE, &mut room)?;
        for (page, index) in room.as_chunks::<PAGE_SIZE>().0.iter().zip(range) {
            let place = pages.page(index).expect("the caller mapped it");
            place.copy_from(page);
        }
        Ok(())
    }
}

/// Fills a range of the bytes of `pages` from `offset` in a file. Returns how many bytes there were.
fn read_pages_at(
    fd: BorrowedFd<'_>,
    offset: u64,
    pages: &ForeignPages,
    range: Range<usize>,
) -> io::Result<u64> {
    let mut at = range.start;
    while at < range.end {
        let done = (at - range.start) as u64;
        match pages.read_some_at(fd, offset + done, at..range.end) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if e.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Err(e) => return Err(e),
        }
    }
    Ok((at - range.start) as u64)
}

/// Whether a descriptor is a file, any part of which can be read at any time.
#[derive(Debug)]
enum Positioned {
    Unknown,
    No,
    Yes(Arc<FileReader>),
}

impl Positioned {
    fn reader(&mut self, fd: &impl AsFd) -> io::Result<Option<&Arc<FileReader>>> {
        if let Self::Unknown = self {
            // Shares its position with the descriptor: they are one open file.
            let file = File::from(fd.as_fd().try_clone_to_owned()?);
            *self = match file.metadata()?.is_file() {
                true => Self::Yes(Arc::new(FileReader::new(file, "the stream")?)),
                false => Self::No,
            };
        }
        Ok(match self {
            Self::Yes(reader) => Some(reader),
            Self::Unknown | Self::No => None,
        })
    }
}

/// A file descriptor: pages are not copied in user space.
///
/// Its O_NONBLOCK is not changed. If it is set and the descriptor is empty, reads wait.
#[derive(Debug)]
pub struct FdSource<F> {
    descriptor: Descriptor<F>,
    positioned: Positioned,
}

impl<F: AsFd> FdSource<F> {
    /// Waits for bytes without a limit.
    pub fn new(fd: F) -> Self {
        Self::over(Descriptor::blocking(fd))
    }

    /// Stops waiting when `cancel` is set, within a fraction of 100 ms: a read then fails with
    /// [`Cancelled`]. A pipe or socket must have no other reader meanwhile. Files are read without
    /// checking whether they are slow.
    ///
    /// # Errors
    ///
    /// The descriptor's type could not be determined.
    pub fn cancellable(fd: F, cancel: Cancel) -> io::Result<Self> {
        Ok(Self::over(Descriptor::cancellable(fd, cancel, false)?))
    }

    fn over(descriptor: Descriptor<F>) -> Self {
        Self {
            descriptor,
            positioned: Positioned::Unknown,
        }
    }
}

impl<F: AsFd> Read for FdSource<F> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.descriptor.read(|fd| Ok(nix::unistd::read(fd, room)?))
    }
}

impl<F: AsFd> PageSource for FdSource<F> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let mut at = range.start * PAGE_SIZE;
        let end = range.end * PAGE_SIZE;
        while at < end {
            match self
                .descriptor
                .read(|fd| pages.read_some_from(fd, at..end))?
            {
                0 => {
                    let read = at - range.start * PAGE_SIZE;
                    return Err(EndedAfter(read as u64).into());
                }
                n => at += n,
            }
        }
        Ok(())
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        let Some(reader) = self.positioned.reader(&self.descriptor)? else {
            return Ok(None);
        };
        self.descriptor.check()?;
        let mut file = reader.file();
        let offset = file.stream_position()?;
        let end = offset.saturating_add(bytes);
        // A reader in order reports the missing bytes.
        if end > file.metadata()?.len() {
            return Ok(None);
        }
        file.seek(SeekFrom::Start(end))?;
        let reader: Arc<FileReader> = Arc::clone(reader);
        Ok(Some(Extent::new(reader, offset)))
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        let Some(reader) = self.positioned.reader(&self.descriptor)? else {
            return Ok(None);
        };
        let mut file = reader.file();
        let Some(offset) = file.stream_position()?.checked_sub(HEADERS) else {
            return Ok(None);
        };
        let cancel = self.descriptor.cancel().cloned();
        let reader: Arc<FileReader> = Arc::clone(reader);
        Ok(Some(LookAhead::new(reader, offset, cancel)))
    }
}

/// Fills `room`. If the source ends before, the error says how many bytes came.
pub(crate) fn read_whole(source: &mut impl Read, room: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < room.len() {
        match source.read(&mut room[at..]) {
            Ok(0) => return Err(EndedAfter(at as u64).into()),
            Ok(n) => at += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// As [`PageSource::read_pages`], through a page buffer.
pub(crate) fn copy_pages(
    source: &mut impl Read,
    pages: &ForeignPages,
    range: Range<usize>,
) -> io::Result<()> {
    let mut page = [0; PAGE_SIZE];
    for (done, index) in range.enumerate() {
        read_whole(source, &mut page).map_err(|error| {
            match error.get_ref().and_then(|e| e.downcast_ref::<EndedAfter>()) {
                Some(EndedAfter(at)) => EndedAfter((done * PAGE_SIZE) as u64 + at).into(),
                None => error,
            }
        })?;
        let place = pages.page(index).expect("the caller mapped it");
        place.copy_from(&page);
    }
    Ok(())
}

/// Any reader: pages are copied once.
#[derive(Debug)]
pub struct CopySource<R>(pub R);

impl<R: Read> Read for CopySource<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

impl<R: Read> PageSource for CopySource<R> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        copy_pages(&mut self.0, pages, range)
    }

    fn take_extent(&mut self, _: u64) -> io::Result<Option<Extent>> {
        Ok(None)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        Ok(None)
    }
}

impl<S: PageSource + ?Sized> PageSource for &mut S {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        (**self).read_pages(pages, range)
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        (**self).take_extent(bytes)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        (**self).look_ahead()
    }
}
