//! Storage of images: files and pipes today; an object store can be another one.
//!
//! | layer | is |
//! |---|---|
//! | [`Storage`] | names and their images |
//! | [`StorageWriter`] | an image that is being written, visible only once it is complete |
//! | [`StorageReader`] | an image that is read at any place, by any number of threads |
//! | [`StorageCursor`] | an opened image of either kind with a read position |
//!
//! An image appears completely or not at all: nothing is visible under its name before
//! [`StorageWriter::commit`], and dropping the writer removes what was written. A pipe or a device
//! cannot guarantee that; [`StorageWriter::is_straight`] identifies its writer.
//!
//! An image has a [`Shape`]: a *stream* is written from its first byte to its last; *slots* are
//! written at any place, in any order, by several threads. Only files support slots.
//!
//! ```
//! use std::io::Write as _;
//! use xsr_save_restore::storage::{
//!     Create, Durability, Opened, Storage, StorageName, file::FileStorage,
//! };
//!
//! let directory = tempfile::tempdir()?;
//! let storage = FileStorage::new(directory.path());
//! let name: StorageName = "web.save".parse()?;
//!
//! let mut writer = storage.create(&name, &Create::stream())?;
//! writer.write_all(b"an image")?;
//! assert!(storage.list()?.is_empty(), "it is not visible yet");
//! writer.commit(Durability::Durable)?;
//!
//! let Opened::Random(reader) = storage.open(&name)? else {
//!     panic!("a file can be read at any place");
//! };
//! let mut bytes = [0; 5];
//! reader.read_exact_at(&mut bytes, 3)?;
//! assert_eq!(&bytes, b"image");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cursor;
mod error;
pub mod file;
pub mod onto;
pub mod pipe;
#[doc(hidden)]
pub mod testing;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::str::FromStr;

pub use cursor::StorageCursor;
pub use error::StorageError;

/// The name of an image in a storage: the name of a file, without a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorageName(OsString);

impl StorageName {
    /// Creates a name.
    ///
    /// # Errors
    ///
    /// [`StorageError::BadName`] if it is empty, `.` or `..`, longer than 255 bytes, or contains a
    /// slash or a zero byte.
    pub fn new(name: impl Into<OsString>) -> Result<Self, StorageError> {
        /// `NAME_MAX`.
        const LONGEST: usize = 255;
        let name = name.into();
        let bytes = name.as_bytes();
        let bad = matches!(bytes, b"" | b"." | b"..")
            || bytes.len() > LONGEST
            || bytes.iter().any(|byte| matches!(byte, 0 | b'/'));
        match bad {
            true => Err(StorageError::BadName {
                name: error::shown(&name),
            }),
            false => Ok(Self(name)),
        }
    }

    /// The name.
    pub fn as_os_str(&self) -> &OsStr {
        &self.0
    }
}

impl FromStr for StorageName {
    type Err = StorageError;

    fn from_str(name: &str) -> Result<Self, StorageError> {
        Self::new(name)
    }
}

impl fmt::Display for StorageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&error::shown(&self.0))
    }
}

/// How an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// From the first byte to the last, with [`Write`].
    Stream,
    /// At any place, with [`StorageWriter::write_all_at`].
    Slots,
}

/// What happens to an existing image of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// The new one replaces it at the commit.
    Replace,
    /// It is kept, and the new one is refused: when it is created, or at the commit if the other
    /// has appeared in between.
    Refuse,
}

/// How to create an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Create {
    /// How it is written.
    pub shape: Shape,
    /// What happens to an existing image of the same name.
    pub existing: Existing,
}

impl Create {
    /// A stream that replaces an existing image.
    pub const fn stream() -> Self {
        Self {
            shape: Shape::Stream,
            existing: Existing::Replace,
        }
    }

    /// Slots that replace an existing image.
    pub const fn slots() -> Self {
        Self {
            shape: Shape::Slots,
            ..Self::stream()
        }
    }

    /// Sets how an existing image is treated.
    pub const fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }
}

/// What a complete image survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The end of this process, however it ends.
    Process,
    /// A power cut, too: the image is on the disk before the commit returns.
    Durable,
}

/// An image in the list of a storage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StorageEntry {
    /// Its name.
    pub name: StorageName,
    /// Its length in bytes.
    pub length: u64,
}

/// A place for images.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Starts an image. Nothing is visible under its name before the commit.
    ///
    /// # Errors
    ///
    /// [`StorageError::Exists`] with [`Existing::Refuse`]; [`StorageError::Unsupported`] for a
    /// shape that the storage or this name does not support; [`StorageError::Refused`] if writing
    /// there would be unsafe; [`StorageError::Io`].
    fn create(
        &self,
        name: &StorageName,
        create: &Create,
    ) -> Result<Box<dyn StorageWriter>, StorageError>;

    /// Opens an image for reading.
    ///
    /// # Errors
    ///
    /// [`StorageError::NotFound`]; [`StorageError::Io`].
    fn open(&self, name: &StorageName) -> Result<Opened, StorageError>;

    /// The complete images, in ascending order of their names.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`].
    fn list(&self) -> Result<Vec<StorageEntry>, StorageError>;

    /// Removes an image. Whether a reader that has it open can continue depends on the storage:
    /// with files it can.
    ///
    /// # Errors
    ///
    /// [`StorageError::NotFound`]; [`StorageError::Io`], and the image still exists.
    fn remove(&self, name: &StorageName) -> Result<(), StorageError>;
}

/// An image that was opened for reading.
#[derive(Debug)]
pub enum Opened {
    /// It can be read at any place.
    Random(Box<dyn StorageReader>),
    /// It can be read once, from its start: a pipe or a terminal.
    Once(Box<dyn StreamReader>),
}

/// An image that is being written.
///
/// A stream is appended to with [`Write`]; the position of slots starts at 0 and only [`Write`]
/// moves it. Dropping a writer abandons the image and removes it, unless the writer [is
/// straight](Self::is_straight). After an error a writer can only be dropped.
pub trait StorageWriter: Write + fmt::Debug + Send + Sync {
    /// The image's name for messages.
    fn name(&self) -> String;

    /// How it is written.
    fn shape(&self) -> Shape;

    /// Whether bytes arrive as soon as they are written: in a pipe or a device, where they cannot
    /// be removed again.
    fn is_straight(&self) -> bool;

    /// Whether bytes that have not been written read as zeros. On a device they are what was there
    /// before.
    fn is_blank(&self) -> bool {
        true
    }

    /// Writes all of `bytes` at `offset`; a gap between the end and `offset` becomes a hole.
    /// Several threads may do this at once, in ranges that do not overlap.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unsupported`] for a stream; [`StorageError::Io`].
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError>;

    /// Reads back what was written, filling `buffer` from `offset`.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unsupported`] for a stream; [`StorageError::Truncated`] if the image is
    /// shorter; [`StorageError::Io`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError>;

    /// Makes a range read as zeros, and frees its space if the storage can. The length of the image
    /// does not change.
    ///
    /// # Errors
    ///
    /// As [`Self::write_all_at`].
    fn punch(&self, range: Range<u64>) -> Result<(), StorageError>;

    /// Sets the length of the image: cuts it, or adds a hole.
    ///
    /// # Errors
    ///
    /// As [`Self::write_all_at`].
    fn set_length(&self, length: u64) -> Result<(), StorageError>;

    /// Clones a range of an image of the same storage to `to` without a copy: both share the space
    /// until one of them changes. The range, unless it ends at the end of `base`, and `to` are
    /// multiples of 4096.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unsupported`] if the storage, or this image, cannot; nothing has changed
    /// then. [`StorageError::Io`].
    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: Range<u64>,
        to: u64,
    ) -> Result<(), StorageError>;

    /// Waits until everything written so far is on the disk: after a power cut it exists if
    /// anything that is written later does.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`].
    fn sync(&self) -> Result<(), StorageError>;

    /// The descriptor, if there is one, for writing pages from where they are mapped. Its position
    /// is that of [`Write`].
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Completes the image: makes it visible under its name, in one step.
    ///
    /// # Errors
    ///
    /// [`StorageError::Exists`] and [`StorageError::Io`]: what was under the name is unchanged.
    /// [`StorageError::NotDurable`]: the image is visible, and the caller must not rely on its
    /// surviving a power cut.
    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError>;
}

/// An image that is read at any place.
pub trait StorageReader: fmt::Debug + Send + Sync {
    /// The image's name for messages.
    fn name(&self) -> String;

    /// Its length in bytes, when it was opened.
    fn length(&self) -> u64;

    /// Reads into `buffer` from `offset`; returns how many bytes were read. These may be fewer than
    /// `buffer` has room for; at and after the end it is 0.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`].
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, StorageError>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    ///
    /// [`StorageError::Truncated`] if the image ends before; [`StorageError::Io`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.saturating_add(done as u64);
            match self.read_at(&mut buffer[done..], at)? {
                0 => {
                    return Err(StorageError::Truncated {
                        name: self.name(),
                        offset: at,
                        missing: buffer.len() - done,
                    });
                }
                n => done += n,
            }
        }
        Ok(())
    }

    /// The first range at or after `offset` that holds data; `None` if there are only holes up to
    /// the end. Everything outside such ranges reads as zeros. A storage that does not know about
    /// holes reports everything as data.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`].
    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>, StorageError>;

    /// The descriptor, if there is one, for reading pages to where they are mapped. Its position
    /// has no meaning.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

/// An image that is read once, from its start.
pub trait StreamReader: Read + fmt::Debug + Send {
    /// The image's name for messages.
    fn name(&self) -> String;

    /// The descriptor, if there is one, for reading pages to where they are mapped. Its position is
    /// that of [`Read`].
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

/// A range of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Bytes that were written.
    Data(Range<u64>),
    /// Zeros that take no space.
    Hole(Range<u64>),
}

/// The data and the holes of an image, from its start to its end.
///
/// ```
/// use xsr_save_restore::storage::{
///     Create, Durability, Opened, Segment, Storage, file::FileStorage, segments,
/// };
///
/// let directory = tempfile::tempdir()?;
/// let storage = FileStorage::new(directory.path());
/// let name = "sparse.save".parse()?;
/// let writer = storage.create(&name, &Create::slots())?;
/// writer.write_all_at(&[1; 4096], 1 << 20)?;
/// writer.commit(Durability::Process)?;
/// let Opened::Random(reader) = storage.open(&name)? else {
///     panic!("a file can be read at any place");
/// };
/// let mut data = 0;
/// for segment in segments(&*reader) {
///     if let Segment::Data(range) = segment? {
///         data += range.end - range.start;
///     }
/// }
/// assert!(data >= 4096 && data <= reader.length());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn segments(reader: &dyn StorageReader) -> Segments<'_> {
    Segments {
        reader,
        offset: 0,
        next: None,
    }
}

/// The iterator that [`segments`] returns. It ends after an error.
#[derive(Debug)]
pub struct Segments<'r> {
    reader: &'r dyn StorageReader,
    offset: u64,
    /// Data after a hole that was returned.
    next: Option<Range<u64>>,
}

impl Iterator for Segments<'_> {
    type Item = Result<Segment, StorageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(data) = self.next.take() {
            return Some(Ok(Segment::Data(data)));
        }
        let (start, length) = (self.offset, self.reader.length());
        if start >= length {
            return None;
        }
        // A range that does not advance would cause an endless loop.
        let data = match self.reader.data_from(start) {
            Ok(data) => data
                .filter(|data| data.start >= start && data.start < data.end && data.start < length),
            Err(error) => {
                self.offset = length;
                return Some(Err(error));
            }
        };
        let Some(data) = data else {
            self.offset = length;
            return Some(Ok(Segment::Hole(start..length)));
        };
        let data = data.start..data.end.min(length);
        self.offset = data.end;
        if data.start == start {
            return Some(Ok(Segment::Data(data)));
        }
        let hole = start..data.start;
        self.next = Some(data);
        Some(Ok(Segment::Hole(hole)))
    }
}
