//! Images as files of a directory.
//!
//! A file is written under a temporary name beside its own, `.NAME.XXXXXX.partial`, readable by
//! its owner alone because it holds all of a guest's memory. The commit syncs it, renames it and
//! syncs the directory, so that its name stands for the old file or for the whole new one at
//! every moment. While it is written it is locked; temporary files without a lock are what a
//! killed process left behind, and are removed when the same name is written again.
//!
//! A name that is a symbolic link stands for the link's target: that is replaced, not the link.
//! A name that is a pipe, a socket or a device is written straight ([`super::pipe`]).

mod leftover;
mod path;
mod reader;
mod steps;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;

use self::path::Followed;
use self::steps::{NoFaults, Step, Steps};
use super::error::shown;
use super::pipe::{OnceReader, StraightWriter};
use super::{
    Create, Existing, Opened, Shape, Storage, StorageEntry, StorageError, StorageName,
    StorageWriter,
};

pub use reader::FileReader;
pub use writer::FileWriter;

/// Removes temporary files when a signal ends the program.
///
/// A [`FileStorage`] tells it of each temporary file while there is one. Both methods are called
/// around the system call in question, so that an implementation can hold a lock there: then no
/// signal finds a temporary file that it was not told of, or removes a file that has just got
/// its name.
pub trait Cleanup: std::fmt::Debug + Send + Sync {
    /// Calls `make`, which makes a temporary file for `to` and returns its path. The file is
    /// there until the returned value is dropped or settled.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    fn while_making(
        &self,
        to: &Path,
        make: &mut dyn FnMut() -> io::Result<PathBuf>,
    ) -> io::Result<Box<dyn Registered>>;
}

/// A temporary file that a [`Cleanup`] knows of. Dropping it says that the file is gone.
pub trait Registered: std::fmt::Debug + Send + Sync {
    /// Calls `keep`, after which the file is not temporary any more.
    fn settle(self: Box<Self>, keep: &mut dyn FnMut());
}

/// The files of a directory. See [the module](self) for how they are written.
#[derive(Clone, Debug)]
pub struct FileStorage {
    directory: PathBuf,
    cleanup: Option<Arc<dyn Cleanup>>,
    steps: Arc<dyn Steps>,
}

impl FileStorage {
    /// The files of this directory, which must exist by the time that one is created.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            cleanup: None,
            steps: Arc::new(NoFaults),
        }
    }

    /// The directory that a path is in, and the name that it has there.
    ///
    /// ```
    /// use std::path::Path;
    /// use xsr_save_restore::storage::file::FileStorage;
    ///
    /// let (storage, name) = FileStorage::at(Path::new("/srv/images/web.save"))?;
    /// assert_eq!(storage.directory(), "/srv/images");
    /// assert_eq!(name.to_string(), "web.save");
    /// # Ok::<(), xsr_save_restore::storage::StorageError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`StorageError::BadName`] if the path does not end in a name.
    pub fn at(path: &Path) -> Result<(Self, StorageName), StorageError> {
        let name = StorageName::new(path.file_name().unwrap_or_default())?;
        Ok((Self::new(directory(path)), name))
    }

    /// Has temporary files registered there while they exist.
    pub fn cleanup(mut self, cleanup: Arc<dyn Cleanup>) -> Self {
        self.cleanup = Some(cleanup);
        self
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of an image.
    pub fn path(&self, name: &StorageName) -> PathBuf {
        self.directory.join(name.as_os_str())
    }

    fn straight(
        file: File,
        create: &Create,
        name: String,
    ) -> Result<Box<dyn StorageWriter>, StorageError> {
        if create.shape == Shape::Slots {
            return Err(StorageError::Unsupported {
                name,
                what: "is not a regular file, and can only be written from its start to its end",
            });
        }
        Ok(Box::new(StraightWriter::new(file, name)?))
    }

    /// Opens what is there and is not a regular file.
    fn open_special(path: &Path, found: &Metadata, name: &str) -> Result<File, StorageError> {
        if found.file_type().is_fifo() || found.file_type().is_socket() {
            path::check_owner(found, name)?;
        }
        let open = || -> io::Result<File> {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(path)?;
            let opened = file.metadata()?;
            match (opened.dev(), opened.ino()) == (found.dev(), found.ino()) {
                true => Ok(file),
                false => Err(io::Error::other("another file has just taken its place")),
            }
        };
        open().map_err(StorageError::io("opening", name))
    }

    /// A file for the image, as [`Storage::create`] does it for a name that is not a pipe or a
    /// device.
    fn temporary(
        &self,
        to: PathBuf,
        create: &Create,
        name: String,
    ) -> Result<FileWriter, StorageError> {
        let made = leftover::temporary(&to, self.cleanup.as_deref(), &*self.steps)
            .map_err(StorageError::io("making a temporary file for", &name))?;
        Ok(FileWriter::new(
            made,
            to,
            create,
            name,
            Arc::clone(&self.steps),
        ))
    }
}

/// The directory that a path is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn not_found(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

impl Storage for FileStorage {
    fn create(
        &self,
        name: &StorageName,
        create: &Create,
    ) -> Result<Box<dyn StorageWriter>, StorageError> {
        let path = self.path(name);
        let name = shown(&path);
        let path = match path::follow(&path, &name)? {
            Followed::Descriptor(file) => return Self::straight(file, create, name),
            Followed::Path(path) => path,
        };
        match fs::symlink_metadata(&path) {
            Err(error) if not_found(&error) => {}
            Err(error) => return Err(StorageError::io("looking at", name)(error)),
            Ok(found) => {
                let kind = found.file_type();
                if kind.is_dir() {
                    let error = io::Error::from(io::ErrorKind::IsADirectory);
                    return Err(StorageError::io("writing", name)(error));
                }
                let replaced = kind.is_file() || kind.is_block_device();
                if replaced && create.existing == Existing::Refuse {
                    return Err(StorageError::Exists { name });
                }
                if !kind.is_file() {
                    let file = Self::open_special(&path, &found, &name)?;
                    return Self::straight(file, create, name);
                }
            }
        }
        Ok(Box::new(self.temporary(path, create, name)?))
    }

    fn open(&self, name: &StorageName) -> Result<Opened, StorageError> {
        let path = self.path(name);
        let name = shown(&path);
        let file = File::open(&path).map_err(|error| match not_found(&error) {
            true => StorageError::NotFound { name: name.clone() },
            false => StorageError::io("opening", &name)(error),
        })?;
        let found = file.metadata();
        let found = found.map_err(StorageError::io("looking at", &name))?;
        let kind = found.file_type();
        if kind.is_dir() {
            let error = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(StorageError::io("reading", name)(error));
        }
        match kind.is_file() || kind.is_block_device() {
            true => Ok(Opened::Random(Box::new(FileReader::new(file, name)?))),
            false => Ok(Opened::Once(Box::new(OnceReader::new(file, name)?))),
        }
    }

    fn list(&self) -> Result<Vec<StorageEntry>, StorageError> {
        let listing = || -> io::Result<Vec<StorageEntry>> {
            let mut listed = Vec::new();
            for entry in fs::read_dir(&self.directory)? {
                let entry = entry?;
                let name = entry.file_name();
                if leftover::is_temporary(&name) {
                    continue;
                }
                let found = match fs::metadata(entry.path()) {
                    Ok(found) => found,
                    // Removed since, or a link that leads nowhere.
                    Err(error) if not_found(&error) => continue,
                    Err(error) => return Err(error),
                };
                if let (true, Ok(name)) = (found.is_file(), StorageName::new(name)) {
                    let length = found.len();
                    listed.push(StorageEntry { name, length });
                }
            }
            listed.sort();
            Ok(listed)
        };
        listing().map_err(StorageError::io("listing", shown(&self.directory)))
    }

    fn remove(&self, name: &StorageName) -> Result<(), StorageError> {
        let path = self.path(name);
        let name = shown(&path);
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => found,
            Err(error) if not_found(&error) => return Err(StorageError::NotFound { name }),
            Err(error) => return Err(StorageError::io("looking at", name)(error)),
        };
        if !found.is_file() && !found.is_symlink() {
            return Err(StorageError::Unsupported {
                name,
                what: "is not a regular file, and is not removed",
            });
        }
        self.steps
            .before(Step::Remove)
            .and_then(|()| fs::remove_file(&path))
            .map_err(StorageError::io("removing", &name))?;
        sync_directory(&self.directory, &*self.steps)
            .map_err(|source| StorageError::NotDurable { name, source })
    }
}

/// Makes the names of a directory durable.
fn sync_directory(directory: &Path, steps: &dyn Steps) -> io::Result<()> {
    steps.before(Step::SyncDirectory)?;
    match File::open(directory)?.sync_all() {
        // Some network file systems have no such call, and need none.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}
