//! Following a path to write to, as far as is safe: not through a symbolic link that another user
//! has made where every user can make one, and not into another user's pipe. The kernel has these
//! rules as `fs.protected_symlinks` and `fs.protected_fifos`, but not everywhere, and the second
//! only for a writer that would create the file.
//!
//! A path that names an inherited descriptor (`/dev/stdout`, `/dev/fd/3`) becomes that descriptor,
//! with its position: it is written, not opened a second time. A descriptor that this process
//! opened itself cannot be named: it may be the memory of the guest.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::storage::StorageError;
use crate::storage::error::shown;

/// The same limit as the kernel's.
const MOST_LINKS: usize = 40;

/// The target of a path.
#[derive(Debug)]
pub(super) enum Followed {
    /// An inherited descriptor of this process, and its number.
    Descriptor(File, u32),
    /// A path without links. It may not exist yet.
    Path(PathBuf),
}

/// The target of a path, not yet opened.
enum Led {
    /// The number of a descriptor of this process, and its path.
    Descriptor(u32, PathBuf),
    Path(PathBuf),
}

/// Why a path cannot be followed.
struct Walk<'n> {
    /// The path's name for messages.
    name: &'n str,
    /// Whether links that other users made are refused.
    checks: bool,
}

/// Follows a path. `name` is its name for messages.
pub(super) fn follow(path: &Path, name: &str) -> Result<Followed, StorageError> {
    let walk = Walk { name, checks: true };
    match walk.follow(path)? {
        Led::Path(path) => Ok(Followed::Path(path)),
        Led::Descriptor(number, path) => {
            let taken = walk.take(number, &path)?;
            Ok(Followed::Descriptor(taken, number))
        }
    }
}

/// Refuses to read a path that names a descriptor which this process did not inherit.
///
/// ```
/// use std::os::fd::AsRawFd as _;
/// use std::path::Path;
/// use xsr_save_restore::storage::file::check_readable;
///
/// check_readable(Path::new("/etc/hostname"))?;
/// check_readable(Path::new("/dev/stdin"))?;
/// let own = std::fs::File::open("/dev/null")?;
/// let name = format!("/dev/fd/{}", own.as_raw_fd());
/// assert!(check_readable(Path::new(&name)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`StorageError::Unsupported`]: the descriptor is not open, or this process opened it.
pub fn check_readable(path: &Path) -> Result<(), StorageError> {
    let walk = Walk {
        name: &shown(path),
        checks: false,
    };
    match walk.follow(path) {
        Ok(Led::Descriptor(number, _)) => walk.inherited(number).map(drop),
        // Opening it reports what is wrong with it.
        Ok(Led::Path(_)) | Err(_) => Ok(()),
    }
}

/// How an inherited descriptor was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
}

impl Inherited {
    /// How descriptor `number` was opened. A descriptor that this process opened itself is closed
    /// on exec, which an inherited one cannot be.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unsupported`]: it is not open, or this process opened it.
    pub fn of(number: u32) -> Result<Self, StorageError> {
        let name = format!("descriptor {number}");
        let walk = Walk {
            name: &name,
            checks: false,
        };
        let flags = walk.inherited(number)?;
        let access = flags & OFlag::O_ACCMODE;
        Ok(Self {
            readable: access != OFlag::O_WRONLY,
            writable: access != OFlag::O_RDONLY,
        })
    }
}

/// Whether a path ends in a slash or a dot, and so can only name a directory.
fn names_directory(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.")
}

impl Walk<'_> {
    fn cannot<T>(&self, what: &'static str) -> Result<T, StorageError> {
        let name = self.name.to_owned();
        Err(StorageError::Unsupported { name, what })
    }

    fn refuse<T>(&self, why: String) -> Result<T, StorageError> {
        let name = self.name.to_owned();
        Err(StorageError::Refused { name, why })
    }

    fn look(&self, path: &Path) -> Result<Metadata, StorageError> {
        fs::symlink_metadata(path).map_err(self.failed())
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> StorageError {
        StorageError::io("following the path", self.name)
    }

    fn follow(&self, path: &Path) -> Result<Led, StorageError> {
        let mut directory_only = names_directory(path);
        let path = std::path::absolute(path).map_err(self.failed())?;
        // Components still to be followed, the next one last.
        let mut left = components(&path);
        let mut done = PathBuf::from("/");
        let mut links = 0;
        // The metadata of the directory `done`.
        let mut directory = self.look(Path::new("/"))?;
        while let Some(part) = left.pop() {
            if part == ".." {
                done.pop();
                directory = self.look(&done)?;
                continue;
            }
            let next = done.join(&part);
            if left.is_empty()
                && let Some(number) = own_descriptor(&next)
            {
                return Ok(Led::Descriptor(number, next));
            }
            let found = match fs::symlink_metadata(&next) {
                Ok(found) => found,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if directory_only {
                        return self.cannot("is not a directory");
                    }
                    return Ok(Led::Path(rest(next, left)));
                }
                Err(error) => return Err(self.failed()(error)),
            };
            if !found.is_symlink() {
                done = next;
                directory = found;
                continue;
            }
            if self.checks {
                self.check_link(&next, &found, &directory, left.is_empty())?;
            }
            links += 1;
            if links > MOST_LINKS {
                return self.cannot("has too many symbolic links");
            }
            let target = fs::read_link(&next).map_err(self.failed())?;
            self.check_magic(&next, &target)?;
            directory_only |= left.is_empty() && names_directory(&target);
            if target.is_absolute() {
                done = PathBuf::from("/");
                directory = self.look(Path::new("/"))?;
            }
            left.extend(components(&target));
        }
        if directory_only && !directory.is_dir() {
            return self.cannot("is not a directory");
        }
        Ok(Led::Path(done))
    }

    /// The flags of an inherited descriptor.
    fn inherited(&self, number: u32) -> Result<OFlag, StorageError> {
        const NOT_OPEN: &str = "is not open";
        let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
            return self.cannot(NOT_OPEN);
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        match flags.map(OFlag::from_bits_retain) {
            None => self.cannot("cannot be used: the kernel does not tell how it was opened"),
            Some(flags) if flags.contains(OFlag::O_CLOEXEC) => self.cannot(NOT_OPEN),
            Some(flags) => Ok(flags),
        }
    }

    /// An inherited descriptor.
    fn take(&self, number: u32, path: &Path) -> Result<File, StorageError> {
        let flags = self.inherited(number)?;
        let standard = match number {
            0 => Some(io::stdin().as_fd().try_clone_to_owned()),
            1 => Some(io::stdout().as_fd().try_clone_to_owned()),
            2 => Some(io::stderr().as_fd().try_clone_to_owned()),
            _ => None,
        };
        if let Some(file) = standard {
            return Ok(file.map_err(self.failed())?.into());
        }
        let Ok(raw) = i32::try_from(number) else {
            return self.cannot("is not open");
        };
        let opened = pidfd_open(getpid(), PidfdFlags::empty())
            .and_then(|own| pidfd_getfd(own, raw, PidfdGetfdFlags::empty()));
        if let Ok(file) = opened {
            return Ok(file.into());
        }
        // If that is not allowed: a file without a position may be opened a second time.
        let is_file = fs::metadata(path).map_err(self.failed())?.is_file();
        if is_file || flags & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return self.cannot("cannot be written: name the file, or redirect stdout to it");
        }
        let opened = OpenOptions::new().write(true).open(path);
        opened.map_err(self.failed())
    }

    /// Refuses a link of `/proc` whose target differs from its text: a pipe or a removed file of
    /// another process, the root of a container. (The kernel follows such a link by itself.)
    fn check_magic(&self, link: &Path, target: &Path) -> Result<(), StorageError> {
        if !link.starts_with("/proc") {
            return Ok(());
        }
        let target = link.parent().unwrap_or(link).join(target);
        let led = fs::metadata(link).map_err(self.failed())?;
        match fs::metadata(target) {
            Ok(named) if (named.dev(), named.ino()) == (led.dev(), led.ino()) => Ok(()),
            _ => self.cannot("leads to what has no name outside /proc"),
        }
    }

    /// `last`: the link is the last component, so that following it replaces another file.
    fn check_link(
        &self,
        path: &Path,
        link: &Metadata,
        directory: &Metadata,
        last: bool,
    ) -> Result<(), StorageError> {
        let of_the_directory = link.uid() == directory.uid();
        if is_trusted(link) || !last && (!is_shared(directory) || of_the_directory) {
            return Ok(());
        }
        self.refuse(format!(
            "leads through {}, a link of another user (uid {}), which is not followed: name the \
             file itself",
            shown(path),
            link.uid()
        ))
    }
}

/// The components of a path, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    });
    names.collect()
}

fn rest(path: PathBuf, left: Vec<OsString>) -> PathBuf {
    left.into_iter()
        .rev()
        .fold(path, |path, name| path.join(name))
}

/// The number of the descriptor of this process that a path without links names.
fn own_descriptor(path: &Path) -> Option<u32> {
    let below = path.strip_prefix("/proc").ok()?;
    let parts: Vec<_> = below.iter().filter_map(|part| part.to_str()).collect();
    let (process, number) = match parts[..] {
        [process, "fd", number] | [process, "task", _, "fd", number] => (process, number),
        _ => return None,
    };
    // A thread shares the descriptors of its process.
    let is_own = Path::new("/proc/self/task").join(process).exists();
    is_own.then(|| number.parse().ok()).flatten()
}

/// Whether its owner is a user whom the caller has to trust anyway.
fn is_trusted(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == geteuid().as_raw()
}

/// Whether other users may create files in a directory.
fn is_shared(directory: &Metadata) -> bool {
    directory.mode() & 0o1022 != 0
}

/// Whether a pipe or socket may be written to: only the guest's owner may read its memory.
pub(super) fn check_owner(found: &Metadata, name: &str) -> Result<(), StorageError> {
    if is_trusted(found) {
        return Ok(());
    }
    let walk = Walk { name, checks: true };
    walk.refuse(format!(
        "is a pipe or socket of another user (uid {}): redirect stdout to it if that is meant",
        found.uid()
    ))
}
