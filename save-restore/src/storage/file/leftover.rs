//! Temporary files, and their removal after a killed process.
//!
//! A temporary file is locked (`flock`) while it is in use. One that is not locked is removed by
//! the next writer of the same name; otherwise a job that is killed each night would fill the disk.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use rustix::fs::{FlockOperation, flock};
use tempfile::NamedTempFile;

use super::steps::{Step, Steps};
use super::{Cleanup, Registered, directory};
use crate::storage::error::shown;

/// Suffixes of temporary names; the second is for files that another program writes.
const SUFFIX: &str = ".partial";
const FOREIGN_SUFFIX: &str = ".xl-partial";
/// Characters before it that make the name unique.
const RANDOM: usize = 6;
/// The most bytes of the image's name in it: with the rest it must not exceed a name's limit.
const LONGEST_STEM: usize = 200;
/// The age after which another program's empty file is treated as abandoned: a program that has
/// begun to save a guest writes at once.
const DEAD_AFTER: Duration = Duration::from_secs(3600);
/// How often another process may treat the new file as left over.
const TRIES: usize = 5;

/// A temporary file.
#[derive(Debug)]
pub(super) struct Temporary {
    /// Locked.
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) registered: Option<Box<dyn Registered>>,
}

/// The program that writes a temporary file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WrittenBy {
    /// This process: if it leaves a file behind, the guest still runs.
    Us,
    /// Another program, which continues when this process is killed. A leftover file may be the
    /// only copy of a guest: it is not removed, unless it has been empty for long.
    Another,
}

impl WrittenBy {
    fn suffix(self) -> &'static str {
        match self {
            Self::Us => SUFFIX,
            Self::Another => FOREIGN_SUFFIX,
        }
    }
}

/// `.NAME.`
fn prefix(to: &Path) -> io::Result<OsString> {
    let name = to.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let name = name.as_bytes();
    let stem = &name[..name.len().min(LONGEST_STEM)];
    Ok(OsString::from_vec([b".", stem, b"."].concat()))
}

/// Creates a temporary file beside the final one, after removing those that were left for the same
/// name.
pub(super) fn temporary(
    to: &Path,
    by: WrittenBy,
    cleanup: Option<&dyn Cleanup>,
    steps: &dyn Steps,
) -> io::Result<Temporary> {
    let prefix = prefix(to)?;
    remove_left_behind(directory(to), &prefix, steps);
    for _ in 0..TRIES {
        let mut file = None;
        let mut make = || -> io::Result<PathBuf> {
            steps.before(Step::Make)?;
            let made = tempfile::Builder::new()
                .prefix(&prefix)
                .suffix(by.suffix())
                .rand_bytes(RANDOM)
                .tempfile_in(directory(to))?;
            let (made, path) = NamedTempFile::keep(made)?;
            file = Some(made);
            Ok(path)
        };
        let (path, registered) = match cleanup {
            None => (make()?, None),
            Some(cleanup) => {
                let mut path = PathBuf::new();
                let registered = cleanup.while_making(to, &mut || {
                    path = make()?;
                    Ok(path.clone())
                })?;
                (path, Some(registered))
            }
        };
        let Some(file) = file else {
            return Err(io::Error::other("the clean-up made no file"));
        };
        let temporary = Temporary {
            file,
            path,
            registered,
        };
        if temporary.take(steps)? {
            return Ok(temporary);
        }
    }
    let why = "temporary files are removed as soon as they are made";
    Err(io::Error::new(io::ErrorKind::ResourceBusy, why))
}

impl Temporary {
    /// Locks it; false if another process has treated it as left over.
    fn take(&self, steps: &dyn Steps) -> io::Result<bool> {
        let locked = steps
            .before(Step::Lock)
            .and_then(|()| Ok(flock(&self.file, FlockOperation::LockExclusive)?));
        if let Err(error) = locked {
            // Not every file system has locks.
            tracing::debug!(%error, "the temporary file cannot be locked");
        }
        let found = self.file.metadata();
        let there = found.map(|found| found.nlink() > 0);
        there.inspect_err(|_| self.remove(steps))
    }

    /// Removes it, if possible.
    pub(super) fn remove(&self, steps: &dyn Steps) {
        let removed = steps
            .before(Step::Remove)
            .and_then(|()| fs::remove_file(&self.path));
        if let Err(error) = removed {
            tracing::warn!("{} stays: {error}", shown(&self.path));
        }
    }
}

/// Removes what killed processes have left for this name, as far as possible.
fn remove_left_behind(directory: &Path, prefix: &OsStr, steps: &dyn Steps) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let ours = is_of(&name, prefix, SUFFIX);
        if (ours || is_of(&name, prefix, FOREIGN_SUFFIX))
            && let Some((locked, bytes)) = unlocked(&path)
            && (ours || bytes == 0 && is_dead(&locked))
            && steps.before(Step::Remove).is_ok()
            && fs::remove_file(&path).is_ok()
        {
            tracing::info!(
                "{}: removed, {bytes} bytes that a killed command has left",
                shown(&path)
            );
        }
    }
}

/// Whether a file has not been written for so long that it is abandoned.
fn is_dead(file: &File) -> bool {
    let written = file.metadata().and_then(|found| found.modified());
    let age = written.ok().and_then(|written| written.elapsed().ok());
    age.is_some_and(|age| age > DEAD_AFTER)
}

/// The part between the name and the suffix of a temporary name.
fn is_unique_part(part: &[u8]) -> bool {
    part.len() == RANDOM && part.iter().all(u8::is_ascii_alphanumeric)
}

fn is_of(name: &OsStr, prefix: &OsStr, suffix: &str) -> bool {
    name.as_bytes()
        .strip_prefix(prefix.as_bytes())
        .and_then(|rest| rest.strip_suffix(suffix.as_bytes()))
        .is_some_and(is_unique_part)
}

/// The files that another program should have written for this name and that are not in use: paths
/// and lengths.
pub(super) fn left_by_another(to: &Path) -> Vec<(PathBuf, u64)> {
    let Ok(prefix) = prefix(to) else {
        return Vec::new();
    };
    let entries = fs::read_dir(directory(to)).into_iter().flatten().flatten();
    entries
        .filter(|entry| is_of(&entry.file_name(), &prefix, FOREIGN_SUFFIX))
        .filter_map(|entry| {
            let (_locked, bytes) = unlocked(&entry.path())?;
            Some((entry.path(), bytes))
        })
        .collect()
}

/// Whether a file has the temporary name of any image.
pub(super) fn is_temporary(name: &OsStr) -> bool {
    let name = name.as_bytes().strip_prefix(b".").and_then(|rest| {
        let own = rest.strip_suffix(SUFFIX.as_bytes());
        own.or_else(|| rest.strip_suffix(FOREIGN_SUFFIX.as_bytes()))
    });
    name.and_then(|name| name.rsplit(|byte| *byte == b'.').next())
        .is_some_and(is_unique_part)
}

/// A file of the caller's that is not locked: now locked, and its length.
fn unlocked(path: &Path) -> Option<(File, u64)> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .ok()?;
    let found = file.metadata().ok()?;
    let own = found.is_file() && found.uid() == geteuid().as_raw();
    if !own || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return None;
    }
    // Still the file of that name: with the lock held, its writer will not take it over.
    let named = fs::symlink_metadata(path).ok()?;
    let same = (named.dev(), named.ino()) == (found.dev(), found.ino());
    if !same {
        return None;
    }
    Some((file, found.len()))
}
