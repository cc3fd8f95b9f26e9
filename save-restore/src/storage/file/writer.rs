//! Writing a file under a temporary name.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, copy_file_range, ioctl_ficlone, renameat_with};
use rustix::io::Errno;
use xsr_format::frame::PAGE_SIZE;

use super::leftover::Temporary;
use super::slots::Slots;
use super::steps::{Step, Steps};
use super::{directory, not_found, sync_directory};
use crate::storage::error::shown;
use crate::storage::{
    Create, Durability, Existing, Shape, StorageError, StorageReader, StorageWriter,
};

/// Shared ranges must be multiples of this.
const BLOCK: u64 = PAGE_SIZE as u64;

/// A file that is being written.
#[derive(Debug)]
pub struct FileWriter {
    /// `None` once the file has its name.
    temporary: Option<Temporary>,
    to: PathBuf,
    create: Create,
    name: String,
    steps: Arc<dyn Steps>,
}

impl FileWriter {
    pub(super) fn new(
        temporary: Temporary,
        to: PathBuf,
        create: &Create,
        name: String,
        steps: Arc<dyn Steps>,
    ) -> Self {
        Self {
            temporary: Some(temporary),
            to,
            create: *create,
            name,
            steps,
        }
    }

    fn file(&self) -> io::Result<&File> {
        let temporary = self.temporary.as_ref();
        let file = temporary.map(|temporary| &temporary.file);
        file.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    fn slots(&self) -> Result<Slots<'_>, StorageError> {
        if self.create.shape == Shape::Stream {
            return Err(StorageError::Unsupported {
                name: self.name.clone(),
                what: "was created as a stream, which is written from its start to its end",
            });
        }
        self.open_slots("writing")
    }

    fn open_slots(&self, doing: &'static str) -> Result<Slots<'_>, StorageError> {
        let file = self.file();
        Ok(Slots {
            file: file.map_err(StorageError::io(doing, &self.name))?,
            name: &self.name,
            steps: &*self.steps,
        })
    }

    /// Gives the file its name, in one step.
    fn rename(&self, from: &Path) -> io::Result<()> {
        self.steps.before(Step::Rename)?;
        if self.create.existing == Existing::Replace {
            return fs::rename(from, &self.to);
        }
        let new = || -> io::Result<()> {
            self.steps.before(Step::RenameNew)?;
            let flags = RenameFlags::NOREPLACE;
            Ok(renameat_with(CWD, from, CWD, &self.to, flags)?)
        };
        match new() {
            Err(error) if is_unsupported(&error) => self.link(from),
            renamed => renamed,
        }
    }

    /// The same on a file system without a rename that preserves an existing file: adds a second
    /// name instead.
    fn link(&self, from: &Path) -> io::Result<()> {
        let linked = self.steps.before(Step::Link);
        match linked.and_then(|()| fs::hard_link(from, &self.to)) {
            Ok(()) => {
                if let Err(error) = fs::remove_file(from) {
                    tracing::warn!("{} stays: {error}", shown(from));
                }
                Ok(())
            }
            // It has no second names either: a file that appears between these two calls is
            // replaced.
            Err(error) if is_unsupported(&error) => match fs::symlink_metadata(&self.to) {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(error) if not_found(&error) => fs::rename(from, &self.to),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        }
    }
}

/// Whether the error means that a file system does not have a call. Those without second names
/// (vfat) return EPERM.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::PERM | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
    )
}

impl Write for FileWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.steps.before(Step::Write)?;
        let most = self.steps.most(bytes.len());
        let mut file = self.file()?;
        file.write(&bytes[..most])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for FileWriter {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn shape(&self) -> Shape {
        self.create.shape
    }

    fn is_straight(&self) -> bool {
        false
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.slots()?.write_all_at(bytes, offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.slots()?.read_exact_at(buffer, offset)
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.slots()?.punch(range)
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.slots()?.set_length(length)
    }

    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: Range<u64>,
        to: u64,
    ) -> Result<(), StorageError> {
        let file = self.slots()?.file;
        let cannot = |what| {
            let name = self.name.clone();
            Err(StorageError::Unsupported { name, what })
        };
        let Some(source) = base.descriptor() else {
            return cannot("cannot share room with an image that is not a file");
        };
        if range.end > base.length() || range.start > range.end {
            return Err(StorageError::Truncated {
                name: base.name(),
                offset: base.length(),
                missing: usize::try_from(range.end.saturating_sub(base.length()))
                    .unwrap_or(usize::MAX),
            });
        }
        let aligned = |offset: u64| offset.is_multiple_of(BLOCK);
        if !aligned(range.start)
            || !aligned(to)
            || !(aligned(range.end) || range.end == base.length())
        {
            return cannot("can share only ranges that are multiples of 4096 bytes");
        }
        match self.shares_room(source) {
            Ok(true) => {}
            Ok(false) => {
                return cannot(
                    "is on a file system that cannot share room between files (XFS with \
                     reflinks and Btrfs can), or on another one than the image to share with",
                );
            }
            Err(error) => return Err(StorageError::io("writing", &self.name)(error)),
        }
        let share = || -> io::Result<()> {
            self.steps.before(Step::Clone)?;
            let (mut from, mut to) = (range.start, to);
            while from < range.end {
                let left = usize::try_from(range.end - from).unwrap_or(usize::MAX);
                // If the kernel can share, as was determined before, this shares.
                match copy_file_range(source, Some(&mut from), file, Some(&mut to), left) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Ok(())
        };
        share().map_err(StorageError::io(
            "sharing the room of another image with",
            &self.name,
        ))
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.open_slots("syncing")?.sync()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file().ok().map(|file| file.as_fd())
    }

    fn commit(mut self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        self.give_name(durability)
    }
}

impl FileWriter {
    /// Whether the file can share space with this one: they are on one file system, which supports
    /// it. Tried with two files of one block, because `copy_file_range` copies if it cannot share.
    fn shares_room(&self, source: BorrowedFd<'_>) -> io::Result<bool> {
        let at = directory(&self.to);
        let ours = rustix::fs::fstat(self.file()?)?;
        let same_device = rustix::fs::fstat(source)?.st_dev == ours.st_dev;
        let to = tempfile::tempfile_in(at)?;
        let shared = if same_device {
            let from = tempfile::tempfile_in(at)?;
            from.write_all_at(&[1; PAGE_SIZE], 0)?;
            ioctl_ficlone(&to, &from)
        } else {
            // Another subvolume, perhaps, which the image itself shows.
            ioctl_ficlone(&to, source)
        };
        match shared {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {
                Ok(false)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the file visible, in one step. If that fails, it still has its temporary name.
    pub(super) fn give_name(&mut self, durability: Durability) -> Result<(), StorageError> {
        if durability == Durability::Durable {
            self.sync()?;
        }
        let Some(mut temporary) = self.temporary.take() else {
            let error = io::ErrorKind::BrokenPipe;
            return Err(StorageError::io("writing", &self.name)(error));
        };
        let mut rename = || self.rename(&temporary.path);
        let renamed = match &mut temporary.registered {
            Some(registered) => registered.settle(&mut rename),
            None => rename(),
        };
        if let Err(error) = renamed {
            self.temporary = Some(temporary);
            let name = self.name.clone();
            return Err(match error.kind() {
                io::ErrorKind::AlreadyExists => StorageError::Exists { name },
                _ => StorageError::io("naming", name)(error),
            });
        }
        if durability == Durability::Process {
            return Ok(());
        }
        sync_directory(directory(&self.to), &*self.steps).map_err(|source| {
            StorageError::NotDurable {
                name: self.name.clone(),
                source,
            }
        })
    }

    /// As [`StorageWriter::commit`], for data that must not be lost: a file that cannot get its
    /// name keeps its temporary one.
    ///
    /// # Errors
    ///
    /// The error, and where the file is.
    pub fn commit_or_keep(mut self, durability: Durability) -> Result<(), Box<Kept>> {
        self.give_name(durability).map_err(|error| {
            let at = self.keep().unwrap_or_else(|| self.to.clone());
            Box::new(Kept { error, at })
        })
    }

    /// Leaves the data under the temporary name, and returns it; `None` if the file has its own
    /// name.
    pub fn keep(&mut self) -> Option<PathBuf> {
        let kept = self.temporary.take()?;
        Some(kept.path)
    }

    /// The temporary name; `None` once the file has its own.
    pub fn temporary(&self) -> Option<&Path> {
        let temporary = self.temporary.as_ref();
        temporary.map(|temporary| temporary.path.as_path())
    }
}

/// A complete file that could not be given its name.
#[derive(Debug)]
pub struct Kept {
    /// The error.
    pub error: StorageError,
    /// Where the file is.
    pub at: PathBuf,
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            temporary.remove(&*self.steps);
        }
    }
}
