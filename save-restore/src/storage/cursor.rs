//! An opened image with a read position, for everything that reads images with [`Read`] and
//! [`Seek`].

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use xsr_format::transcode::CopyError;

use super::{Opened, StorageError, StorageReader, StreamReader};

/// An opened image with a read position.
///
/// Clones share the position. An image that is read at any place has one, too: it starts at 0, and
/// is not that of a descriptor. Nothing is read ahead, so that another reader can continue where
/// this one stops.
///
/// ```
/// use std::io::{Read as _, Seek as _, SeekFrom};
/// use xsr_save_restore::storage::{StorageCursor, file};
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("web.save");
/// std::fs::write(&path, "an image")?;
/// let mut cursor = StorageCursor::new(file::open(&path)?)?;
/// assert_eq!(cursor.length(), Some(8));
/// cursor.seek(SeekFrom::Start(3))?;
/// let mut rest = String::new();
/// cursor.read_to_string(&mut rest)?;
/// assert_eq!((&*rest, cursor.position()), ("image", 8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct StorageCursor(Arc<Inner>);

#[derive(Debug)]
enum Inner {
    Random {
        reader: Arc<dyn StorageReader>,
        position: AtomicU64,
    },
    Once {
        reader: Mutex<Box<dyn StreamReader>>,
        /// The reader's descriptor, which can be used while another thread reads.
        descriptor: Option<OwnedFd>,
        name: String,
        position: AtomicU64,
    },
}

/// Bytes per copy that the kernel cannot make.
const STEP: usize = 256 << 10;

/// Bytes per copy that the kernel makes.
const KERNEL_STEP: usize = 1 << 30;

impl StorageCursor {
    /// A cursor at the start of an opened image.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`] if the descriptor of a pipe cannot be duplicated.
    pub fn new(opened: Opened) -> Result<Self, StorageError> {
        match opened {
            Opened::Random(reader) => Ok(Self::over(reader.into())),
            Opened::Once(reader) => {
                let name = reader.name();
                let descriptor = reader.descriptor().map(|fd| fd.try_clone_to_owned());
                let descriptor = descriptor
                    .transpose()
                    .map_err(StorageError::io("opening", &name))?;
                Ok(Self(Arc::new(Inner::Once {
                    reader: Mutex::new(reader),
                    descriptor,
                    name,
                    position: AtomicU64::new(0),
                })))
            }
        }
    }

    /// A cursor at the start of an image that may have other readers.
    pub fn over(reader: Arc<dyn StorageReader>) -> Self {
        Self(Arc::new(Inner::Random {
            reader,
            position: AtomicU64::new(0),
        }))
    }

    /// Another cursor for the same image, at its start; `None` if it can be read only once.
    pub fn again(&self) -> Option<Self> {
        self.reader().map(|reader| Self::over(Arc::clone(reader)))
    }

    /// The image's name for messages.
    pub fn name(&self) -> String {
        match &*self.0 {
            Inner::Random { reader, .. } => reader.name(),
            Inner::Once { name, .. } => name.clone(),
        }
    }

    /// The image's length in bytes; `None` if it can be read only once.
    pub fn length(&self) -> Option<u64> {
        self.reader().map(|reader| reader.length())
    }

    /// The offset of the byte that is read next.
    pub fn position(&self) -> u64 {
        self.position_cell().load(Ordering::Relaxed)
    }

    /// The reader of an image that is read at any place.
    pub fn reader(&self) -> Option<&Arc<dyn StorageReader>> {
        match &*self.0 {
            Inner::Random { reader, .. } => Some(reader),
            Inner::Once { .. } => None,
        }
    }

    /// The descriptor of an image that is read once, if there is one, to wait for bytes or to read
    /// them. Its position is that of the cursor.
    pub fn stream_descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Inner::Random { .. } => None,
            Inner::Once { descriptor, .. } => descriptor.as_ref().map(|fd| fd.as_fd()),
        }
    }

    /// Reads into `buffer` from `offset`; the position does not change. Returns how many bytes were
    /// read; at and after the end it is 0.
    ///
    /// # Errors
    ///
    /// `NotSeekable` if the image can be read only once; the storage's error.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.random()?.read_at(buffer, offset)?)
    }

    /// Fills `buffer` from `offset`; the position does not change.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if the image ends before; otherwise as [`Self::read_at`].
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        Ok(self.random()?.read_exact_at(buffer, offset)?)
    }

    /// Copies `bytes`, or as many as there are, from the position on into a file: in the kernel
    /// where possible. Returns how many.
    ///
    /// # Errors
    ///
    /// [`CopyError`] says whether reading or writing failed.
    pub fn copy_to(&self, to: &File, bytes: u64) -> Result<u64, CopyError> {
        let copied = match &*self.0 {
            Inner::Random { reader, .. } => match reader.descriptor() {
                Some(from) => copy_in_kernel(from, self.position(), to, bytes),
                None => 0,
            },
            Inner::Once {
                descriptor: Some(from),
                position,
                ..
            } => {
                let from = from.try_clone().map_err(CopyError::Read)?;
                let from = File::from(from);
                // With splice where the kernel can. Reading a pipe does not fail.
                let copied = io::copy(&mut (&from).take(bytes), &mut &*to);
                let copied = copied.map_err(CopyError::Write)?;
                position.fetch_add(copied, Ordering::Relaxed);
                return Ok(copied);
            }
            Inner::Once { .. } => 0,
        };
        self.position_cell().fetch_add(copied, Ordering::Relaxed);
        Ok(copied + self.copy_by_hand(to, bytes - copied)?)
    }

    fn copy_by_hand(&self, mut to: &File, bytes: u64) -> Result<u64, CopyError> {
        let mut from = self;
        let mut room = Vec::new();
        let mut done = 0;
        while done < bytes {
            let step = usize::try_from(bytes - done).map_or(STEP, |left| left.min(STEP));
            room.resize(step, 0);
            match from.read(&mut room) {
                Ok(0) => break,
                Ok(n) => {
                    to.write_all(&room[..n]).map_err(CopyError::Write)?;
                    done += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CopyError::Read(error)),
            }
        }
        Ok(done)
    }

    fn position_cell(&self) -> &AtomicU64 {
        match &*self.0 {
            Inner::Random { position, .. } | Inner::Once { position, .. } => position,
        }
    }

    fn random(&self) -> io::Result<&dyn StorageReader> {
        match &*self.0 {
            Inner::Random { reader, .. } => Ok(&**reader),
            Inner::Once { .. } => Err(io::ErrorKind::NotSeekable.into()),
        }
    }
}

impl Read for &StorageCursor {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = match &*self.0 {
            Inner::Random { reader, position } => {
                reader.read_at(room, position.load(Ordering::Relaxed))?
            }
            Inner::Once { reader, .. } => reader
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(room)?,
        };
        self.position_cell().fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

impl Seek for &StorageCursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let reader = self.random()?;
        let to = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.position().checked_add_signed(by),
            SeekFrom::End(by) => reader.length().checked_add_signed(by),
        };
        let to = to.ok_or(io::ErrorKind::InvalidInput)?;
        self.position_cell().store(to, Ordering::Relaxed);
        Ok(to)
    }
}

impl Read for StorageCursor {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        (&*self).read(room)
    }
}

impl Seek for StorageCursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        (&*self).seek(to)
    }
}

/// Copies as much as the kernel can between these two files; what failed, if something did, shows
/// when the rest is copied by hand.
///
/// Between files of one file system, the kernel may share the blocks. Pipes, sockets and other file
/// systems take sendfile; a call that has copied something is not exchanged for the other.
fn copy_in_kernel(from: BorrowedFd<'_>, offset: u64, to: &File, bytes: u64) -> u64 {
    let copied = repeat(offset, bytes, |at, step| {
        rustix::fs::copy_file_range(from, Some(at), to, None, step)
    });
    if copied > 0 {
        return copied;
    }
    repeat(offset, bytes, |at, step| {
        rustix::fs::sendfile(to, from, Some(at), step)
    })
}

/// Repeats a call, which advances the offset, until everything is copied, or until it copies
/// nothing. Returns how many bytes were copied.
fn repeat(
    offset: u64,
    bytes: u64,
    mut call: impl FnMut(&mut u64, usize) -> rustix::io::Result<usize>,
) -> u64 {
    let mut at = offset;
    while at - offset < bytes {
        let left = bytes - (at - offset);
        let step = usize::try_from(left).map_or(KERNEL_STEP, |left| left.min(KERNEL_STEP));
        match call(&mut at, step) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    at - offset
}
