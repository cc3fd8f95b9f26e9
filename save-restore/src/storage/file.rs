//! Storage of images as files of a directory.
//!
//! A file is written under a temporary name beside its own, `.NAME.XXXXXX.partial`, readable only
//! by its owner because it holds all of a guest's memory. The commit syncs it, renames it and syncs
//! the directory, so that its name always refers to the old file or to the complete new one. While
//! it is written it is locked. Temporary files without a lock were left by a killed process, and
//! are removed when the same name is written again.
//!
//! A name that is a symbolic link refers to the link's target: that is replaced, not the link. A
//! name that is a pipe, a socket or a device is written straight ([`super::pipe`]).

mod leftover;
mod path;
mod reader;
mod shared;
mod slots;
mod steps;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;
use rustix::fs::OFlags;

use self::leftover::WrittenBy;
use self::path::Followed;
use self::steps::{NoFaults, Step, Steps};
use super::error::shown;
use super::pipe::{OnceReader, StraightWriter};
use super::{
    Create, Existing, Opened, Shape, Storage, StorageEntry, StorageError, StorageName,
    StorageWriter,
};

pub use path::{Inherited, check_readable};
pub use reader::FileReader;
pub use shared::SharedFileWriter;
pub use writer::{FileWriter, Kept};

/// Removes temporary files when a signal ends the program.
///
/// A [`FileStorage`] registers each temporary file here while it exists. Both methods are called
/// around the system call in question, so that an implementation can hold a lock meanwhile. Then no
/// signal finds an unregistered temporary file, or removes a file that has just got its name.
pub trait Cleanup: std::fmt::Debug + Send + Sync {
    /// Calls `make`, which creates a temporary file for `to` and returns its path. The file exists
    /// until the returned value is dropped or settled.
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

/// A temporary file that a [`Cleanup`] knows. Dropping this says that the file is gone.
pub trait Registered: std::fmt::Debug + Send + Sync {
    /// Calls `keep`, after which the file is no longer temporary, unless that fails: then it stays
    /// registered.
    ///
    /// # Errors
    ///
    /// Those of `keep`.
    fn settle(&mut self, keep: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()>;
}

/// The files of a directory. See [the module](self) for how they are written.
#[derive(Clone, Debug)]
pub struct FileStorage {
    directory: PathBuf,
    written_by: WrittenBy,
    cleanup: Option<Arc<dyn Cleanup>>,
    steps: Arc<dyn Steps>,
}

/// The target of a path to write to: looked up, but not written yet.
///
/// It comes between the name that a user gives and [`FileStorage::write`], so that a command can
/// refuse to overwrite a file, for example the one that it reads.
///
/// ```
/// use xsr_save_restore::storage::file::Target;
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("web.save");
/// assert!(Target::find(&path)?.found().is_none());
/// std::fs::write(&path, "an image")?;
/// let target = Target::find(&path)?;
/// assert_eq!(target.found().map(|found| found.len()), Some(8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Target {
    /// Its name for messages.
    name: String,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Descriptor {
        file: File,
        number: Option<u32>,
        found: Metadata,
    },
    Path {
        path: PathBuf,
        found: Option<Metadata>,
    },
}

impl Target {
    /// Follows a path.
    ///
    /// # Errors
    ///
    /// [`StorageError::Refused`]: another user may have put a link or a pipe there.
    /// [`StorageError::Unsupported`]: nothing can be written there. [`StorageError::Io`].
    pub fn find(path: &Path) -> Result<Self, StorageError> {
        let name = shown(path);
        let path = match path::follow(path, &name)? {
            Followed::Descriptor(file, number) => {
                let this = Self::of_descriptor(file, name)?;
                return Ok(this.numbered(number));
            }
            Followed::Path(path) => path,
        };
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => Some(found),
            Err(error) if not_found(&error) => None,
            Err(error) => return Err(StorageError::io("looking at", name)(error)),
        };
        if let Some(found) = &found {
            let kind = found.file_type();
            if kind.is_dir() {
                let what = "is a directory";
                return Err(StorageError::Unsupported { name, what });
            }
            if kind.is_fifo() || kind.is_socket() {
                path::check_owner(found, &name)?;
            }
        }
        let place = Place::Path { path, found };
        Ok(Self { name, place })
    }

    /// A descriptor, which is written from its current position.
    ///
    /// # Errors
    ///
    /// [`StorageError::Refused`] if it was not opened for writing; [`StorageError::Io`].
    pub fn of_descriptor(file: File, name: impl Into<String>) -> Result<Self, StorageError> {
        let name = name.into();
        let flags = rustix::fs::fcntl_getfl(&file);
        let flags = flags.map_err(StorageError::io("looking at", &name))?;
        if flags & OFlags::ACCMODE == OFlags::RDONLY {
            let why = "is not open for writing".to_owned();
            return Err(StorageError::Refused { name, why });
        }
        let found = file.metadata();
        let found = found.map_err(StorageError::io("looking at", &name))?;
        let place = Place::Descriptor {
            file,
            number: None,
            found,
        };
        Ok(Self { name, place })
    }

    fn numbered(mut self, own: u32) -> Self {
        if let Place::Descriptor { number, .. } = &mut self.place {
            *number = Some(own);
        }
        self
    }

    /// Its name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The existing file, if there is one.
    pub fn found(&self) -> Option<&Metadata> {
        match &self.place {
            Place::Descriptor { found, .. } => Some(found),
            Place::Path { found, .. } => found.as_ref(),
        }
    }

    /// The number of the descriptor of this process that the path names, if it names one.
    pub fn descriptor(&self) -> Option<u32> {
        match &self.place {
            Place::Descriptor { number, .. } => *number,
            Place::Path { .. } => None,
        }
    }

    /// The path without links; `None` for a descriptor.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Descriptor { .. } => None,
            Place::Path { path, .. } => Some(path),
        }
    }

    /// Files that another program should have written for this path, and that are not in use: paths
    /// and lengths. Such a file may be the only copy of a guest.
    pub fn left_by_another(&self) -> Vec<(PathBuf, u64)> {
        self.path()
            .map(leftover::left_by_another)
            .unwrap_or_default()
    }
}

/// The result of [`FileStorage::write`].
#[derive(Debug)]
pub enum Begun {
    /// A file, under its temporary name.
    File(FileWriter),
    /// A pipe or a device, which is written straight.
    Straight(StraightWriter),
}

impl FileStorage {
    /// The files of this directory, which must exist when an image is created.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            written_by: WrittenBy::Us,
            cleanup: None,
            steps: Arc::new(NoFaults),
        }
    }

    /// The directory that contains a path, and its name there.
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

    /// Lets another program write the files, which continues when this process is killed. Their
    /// temporary names end in `.xl-partial`, and they are not removed as those of killed processes:
    /// such a file may be the only copy of a guest.
    pub const fn written_by_another(mut self) -> Self {
        self.written_by = WrittenBy::Another;
        self
    }

    /// Registers temporary files with `cleanup` while they exist.
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

    /// Starts to write the target of a path, wherever that is. [`Storage::create`] does so for the
    /// names of its directory.
    ///
    /// # Errors
    ///
    /// As [`Storage::create`].
    pub fn write(&self, target: Target, create: &Create) -> Result<Begun, StorageError> {
        let Target { name, place } = target;
        let (path, found) = match place {
            Place::Descriptor { file, .. } => return Self::straight(file, create, name),
            Place::Path { path, found } => (path, found),
        };
        let Some(found) = found else {
            return self.temporary(path, create, name).map(Begun::File);
        };
        let kind = found.file_type();
        let replaced = kind.is_file() || kind.is_block_device();
        if replaced && create.existing == Existing::Refuse {
            return Err(StorageError::Exists { name });
        }
        if kind.is_file() {
            return self.temporary(path, create, name).map(Begun::File);
        }
        let file = Self::open_special(&path, &found, &name)?;
        Self::straight(file, create, name)
    }

    fn straight(file: File, create: &Create, name: String) -> Result<Begun, StorageError> {
        if create.shape == Shape::Slots {
            return Err(StorageError::Unsupported {
                name,
                what: "is not a regular file, and can only be written from its start to its end",
            });
        }
        StraightWriter::new(file, name).map(Begun::Straight)
    }

    /// Opens an existing file that is not a regular file.
    fn open_special(path: &Path, found: &Metadata, name: &str) -> Result<File, StorageError> {
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

    /// A file for the image, as in [`Storage::create`] for a name that is not a pipe or a device.
    fn temporary(
        &self,
        to: PathBuf,
        create: &Create,
        name: String,
    ) -> Result<FileWriter, StorageError> {
        let cleanup = self.cleanup.as_deref();
        let made = leftover::temporary(&to, self.written_by, cleanup, &*self.steps)
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

/// The directory that contains a path.
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
        let target = Target::find(&self.path(name))?;
        Ok(match self.write(target, create)? {
            Begun::File(writer) => Box::new(writer),
            Begun::Straight(writer) => Box::new(writer),
        })
    }

    fn open(&self, name: &StorageName) -> Result<Opened, StorageError> {
        open(&self.path(name))
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
                    // Removed since, or a link to nowhere.
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

/// Opens the image at a path, which may also be a pipe, a device, or an inherited descriptor
/// (`/dev/stdin`).
///
/// # Errors
///
/// As [`Storage::open`]; [`StorageError::Unsupported`] for a directory, and for a descriptor that
/// this process did not inherit.
pub fn open(path: &Path) -> Result<Opened, StorageError> {
    path::check_readable(path)?;
    let name = shown(path);
    let file = File::open(path).map_err(|error| match not_found(&error) {
        true => StorageError::NotFound { name: name.clone() },
        false => StorageError::io("opening", &name)(error),
    })?;
    opened(file, name)
}

/// An open file, pipe or device as an image, from its current position on. It can be read at any
/// place only if that is its start.
///
/// # Errors
///
/// [`StorageError::Unsupported`] for a directory; [`StorageError::Io`].
pub fn opened(mut file: File, name: impl Into<String>) -> Result<Opened, StorageError> {
    let name = name.into();
    let found = file.metadata();
    let found = found.map_err(StorageError::io("looking at", &name))?;
    let kind = found.file_type();
    if kind.is_dir() {
        let what = "is a directory, not an image";
        return Err(StorageError::Unsupported { name, what });
    }
    let has_places = kind.is_file() || kind.is_block_device();
    match has_places && file.stream_position().is_ok_and(|at| at == 0) {
        true => Ok(Opened::Random(Box::new(FileReader::new(file, name)?))),
        false => Ok(Opened::Once(Box::new(OnceReader::new(file, name)?))),
    }
}

/// Makes the names of a directory durable.
fn sync_directory(directory: &Path, steps: &dyn Steps) -> io::Result<()> {
    steps.before(Step::SyncDirectory)?;
    match File::open(directory)?.sync_all() {
        // Some network file systems do not have this call, and do not need it.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}
