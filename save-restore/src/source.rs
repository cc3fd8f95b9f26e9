//! Where a stream comes from: a file descriptor, from which pages are read straight
//! into the guest's memory, or anything else that gives bytes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use xsr_format::frame::PAGE_SIZE;
use xsr_format::image::{DomainHeader, ImageHeader};
use xsr_format::read::EndedAfter;
use xsr_xen_backend::ForeignPages;

use crate::descriptor::Descriptor;
use crate::progress::{Cancel, Cancelled};

/// Gives a stream.
pub trait PageSource: Read {
    /// Fill pages of the guest (a range of indices) with exactly as many bytes.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends; what the source says otherwise.
    ///
    /// # Panics
    ///
    /// When a page of the range is not mapped for writing.
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()>;

    /// Where the next `bytes` stand, if they are there to be read at any time and by
    /// any thread: then they count as read, and the source goes on behind them.
    /// `None` where they must be read in order, or where the source ends before; then
    /// it stands where it stood.
    ///
    /// # Errors
    ///
    /// What the source says.
    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>>;

    /// A reader of its own for the stream whose two headers have just been read, from the
    /// first of them to the end of the source. The source stands where it stood, and
    /// stays there whatever that reader does. `None` where bytes can be read only once.
    ///
    /// # Errors
    ///
    /// What the source says.
    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>>;
}

/// Bytes of the two headers.
pub(crate) const HEADERS: u64 = (ImageHeader::BYTES + DomainHeader::BYTES) as u64;

/// How much of a file is read at a time, to be looked at: at first (the head of a record and
/// its list of 1024 pages), and at most, where nothing is left out in between.
const GLANCE: usize = 16 << 10;
const LONGEST_GLANCE: usize = 64 << 10;

/// A file with a place of its own in it.
#[derive(Debug)]
pub struct LookAhead {
    file: Arc<File>,
    offset: u64,
    cancel: Option<Cancel>,
    /// What has been read of the file, from this offset on.
    seen: Vec<u8>,
    seen_from: u64,
    /// How much to read next.
    glance: usize,
}

impl LookAhead {
    /// To look at what stands from an offset on.
    fn new(file: Arc<File>, offset: u64, cancel: Option<Cancel>) -> Self {
        Self {
            file,
            offset,
            cancel,
            seen: Vec::new(),
            seen_from: offset,
            glance: GLANCE,
        }
    }

    /// What has been read and stands at our place.
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
            let read = self.file.read_at(&mut self.seen, self.offset);
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
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.offset = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

/// Bytes of a file.
#[derive(Clone, Debug)]
pub struct Extent {
    file: Arc<File>,
    offset: u64,
}

impl Extent {
    /// Fill `room` from `at` bytes into it.
    pub(crate) fn read_exact_at(&self, at: usize, room: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(room, self.offset + at as u64)
    }

    /// Fill a range of `pages`, whose page 0 is the first of the extent.
    pub(crate) fn read_pages(&self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        let mut at = range.start * PAGE_SIZE;
        let end = range.end * PAGE_SIZE;
        while at < end {
            let offset = self.offset + at as u64;
            match pages.read_some_at(self.file.as_fd(), offset, at..end) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(e) if e.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Whether a descriptor is a file, of which any part can be read at any time.
#[derive(Debug)]
enum Positioned {
    Unknown,
    No,
    Yes(Arc<File>),
}

impl Positioned {
    fn file(&mut self, fd: &impl AsFd) -> io::Result<Option<&Arc<File>>> {
        if let Self::Unknown = self {
            // Stands where the descriptor stands, for good: they share a description.
            let file = File::from(fd.as_fd().try_clone_to_owned()?);
            *self = match file.metadata()?.is_file() {
                true => Self::Yes(Arc::new(file)),
                false => Self::No,
            };
        }
        Ok(match self {
            Self::Yes(file) => Some(file),
            Self::Unknown | Self::No => None,
        })
    }
}

/// A file descriptor: pages are not copied in user space.
///
/// Its O_NONBLOCK is left as it is; where it is set, an empty descriptor is waited for.
#[derive(Debug)]
pub struct FdSource<F> {
    descriptor: Descriptor<F>,
    positioned: Positioned,
}

impl<F: AsFd> FdSource<F> {
    /// Waits for bytes for as long as it takes.
    pub fn new(fd: F) -> Self {
        Self::over(Descriptor::blocking(fd))
    }

    /// Stops waiting when `cancel` says so, within a fraction of 100 ms: a read then
    /// fails with [`Cancelled`]. A pipe or socket must have
    /// no other reader meanwhile. Files are read without a look at whether they are
    /// slow.
    ///
    /// # Errors
    ///
    /// The descriptor is none that can be asked what it is.
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
        let Some(file) = self.positioned.file(&self.descriptor)? else {
            return Ok(None);
        };
        self.descriptor.check()?;
        let mut stands = &**file;
        let offset = stands.stream_position()?;
        let end = offset.saturating_add(bytes);
        // What the file does not have, whoever reads in order finds missing.
        if end > file.metadata()?.len() {
            return Ok(None);
        }
        stands.seek(SeekFrom::Start(end))?;
        Ok(Some(Extent {
            file: Arc::clone(file),
            offset,
        }))
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        let Some(file) = self.positioned.file(&self.descriptor)? else {
            return Ok(None);
        };
        let mut stands = &**file;
        let Some(offset) = stands.stream_position()?.checked_sub(HEADERS) else {
            return Ok(None);
        };
        let cancel = self.descriptor.cancel().cloned();
        Ok(Some(LookAhead::new(Arc::clone(file), offset, cancel)))
    }
}

/// Fill `room`. Where the source ends before, the error says how far it came.
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

/// As [`PageSource::read_pages`], through a page of our own.
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

/// Anything that gives bytes: pages are copied once.
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
