//! A path to write to, followed as far as is safe: not through a symbolic link that another user
//! has made where everybody can make one, and not into another user's pipe. The kernel has these
//! rules as `fs.protected_symlinks` and `fs.protected_fifos`, but not everywhere, and the second
//! only for a writer that would create the file.
//!
//! A path that names an open descriptor (`/dev/stdout`, `/dev/fd/3`) becomes that descriptor,
//! with its position: it is to be written, not opened a second time.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use nix::unistd::geteuid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::storage::StorageError;
use crate::storage::error::shown;

/// As many as the kernel follows.
const MOST_LINKS: usize = 40;

/// What a path leads to.
#[derive(Debug)]
pub(super) enum Followed {
    /// An open file of this process.
    Descriptor(File),
    /// A path without links. There may be nothing there yet.
    Path(PathBuf),
}

/// Follows a path. `name` is what a person calls it.
pub(super) fn follow(path: &Path, name: &str) -> Result<Followed, StorageError> {
    let failed = || StorageError::io("following the path", name);
    let path = std::path::absolute(path).map_err(failed())?;
    // Components still to be followed, the next one last.
    let mut left = components(&path);
    let mut done = PathBuf::from("/");
    let mut links = 0;
    // Of the directory that `done` is.
    let mut directory = fs::symlink_metadata("/").map_err(failed())?;
    while let Some(part) = left.pop() {
        if part == ".." {
            done.pop();
            directory = fs::symlink_metadata(&done).map_err(failed())?;
            continue;
        }
        let next = done.join(&part);
        if next == Path::new("/proc") {
            return process(&rest(next, left)).map_err(failed());
        }
        let found = match fs::symlink_metadata(&next) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Followed::Path(rest(next, left)));
            }
            Err(error) => return Err(failed()(error)),
        };
        if !found.is_symlink() {
            done = next;
            directory = found;
            continue;
        }
        check_link(&next, name, &found, &directory, left.is_empty())?;
        links += 1;
        if links > MOST_LINKS {
            return Err(failed()(io::Error::from(rustix::io::Errno::LOOP)));
        }
        let target = fs::read_link(&next).map_err(failed())?;
        if target.is_absolute() {
            done = PathBuf::from("/");
            directory = fs::symlink_metadata("/").map_err(failed())?;
        }
        left.extend(components(&target));
    }
    Ok(Followed::Path(done))
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

/// A path below `/proc`, which may name a descriptor of this process.
fn process(path: &Path) -> io::Result<Followed> {
    let again = || {
        let file = OpenOptions::new().write(true).open(path)?;
        Ok(Followed::Descriptor(file))
    };
    let below = path.strip_prefix("/proc").unwrap_or(path);
    let parts: Vec<_> = below.iter().filter_map(|part| part.to_str()).collect();
    let own = std::process::id().to_string();
    let number = match parts[..] {
        [process, "fd", number] if ["self", "thread-self", &own].contains(&process) => number,
        ["self" | "thread-self", "task", _, "fd", number] => number,
        _ => return again(),
    };
    let Ok(number) = number.parse() else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let opened = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
    match opened {
        Ok(file) => Ok(Followed::Descriptor(file.into())),
        Err(rustix::io::Errno::BADF) => Err(rustix::io::Errno::BADF.into()),
        // Where that is not allowed: at least the same file.
        Err(_) => again(),
    }
}

/// Whether its owner is a user whom the caller has to trust anyway.
fn is_trusted(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == geteuid().as_raw()
}

/// Whether other users may put something into a directory.
fn is_shared(directory: &Metadata) -> bool {
    directory.mode() & 0o1022 != 0
}

/// `last`: the link stands where the file is to be, so that following it has another file
/// replaced.
fn check_link(
    path: &Path,
    name: &str,
    link: &Metadata,
    directory: &Metadata,
    last: bool,
) -> Result<(), StorageError> {
    let of_the_directory = link.uid() == directory.uid();
    if is_trusted(link) || !last && (!is_shared(directory) || of_the_directory) {
        return Ok(());
    }
    Err(StorageError::Refused {
        name: name.to_owned(),
        why: format!(
            "leads through {}, a link of another user (uid {}), which is not followed: name the \
             file itself",
            shown(path),
            link.uid()
        ),
    })
}

/// Whether a pipe or socket may be written to: the guest's memory is for its owner.
pub(super) fn check_owner(found: &Metadata, name: &str) -> Result<(), StorageError> {
    if is_trusted(found) {
        return Ok(());
    }
    Err(StorageError::Refused {
        name: name.to_owned(),
        why: format!(
            "is a pipe or socket of another user (uid {}): redirect stdout to it if that is meant",
            found.uid()
        ),
    })
}
