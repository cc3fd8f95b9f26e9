//! Temporary files, and those that a killed command has left behind.
//!
//! A temporary file is locked while it is in use, so that the next command that writes to the
//! same name can tell: one that nobody has locked is removed. Otherwise a job that is killed each
//! night would fill the disk.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use rustix::fs::{FlockOperation, flock};
use tempfile::{NamedTempFile, TempPath};

use super::path::directory;
use crate::left::Left;
use crate::text::shown_path;

/// Who writes a temporary file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temporary {
    /// This process: a file that is left has a guest that runs.
    Ours,
    /// xl, which goes on when this process is killed, and destroys the guest: a file that is
    /// left may be all that there is of it.
    Xls,
}

impl Temporary {
    fn suffix(self) -> &'static str {
        match self {
            Self::Ours => ".partial",
            Self::Xls => ".xl-partial",
        }
    }
}

/// Characters between the name and the suffix that make a temporary name unique.
const RANDOM: usize = 6;
/// How often another command may take the new file for a left-over one.
const TRIES: usize = 5;

/// `.NAME.`
fn prefix(to: &Path) -> Option<OsString> {
    let mut prefix = OsStr::new(".").to_owned();
    prefix.push(to.file_name()?);
    prefix.push(".");
    Some(prefix)
}

/// A new temporary file beside the one that it will become: `.NAME.XXXXXX.partial`, for its
/// owner alone, because it holds all of a guest's memory. Those that were left behind for the
/// same name are removed.
pub(super) fn temporary(to: &Path, whose: Temporary) -> Result<(Left, File, TempPath)> {
    let prefix = prefix(to).context("names no file")?;
    look_for_left(to, &prefix);
    for _ in 0..TRIES {
        let make = || {
            tempfile::Builder::new()
                .prefix(&prefix)
                .suffix(whose.suffix())
                .rand_bytes(RANDOM)
                .tempfile_in(directory(to))
        };
        let (left, temporary) = Left::file(to, make, NamedTempFile::path)
            .context("making a temporary file beside it")?;
        let (file, path) = NamedTempFile::into_parts(temporary);
        if let Err(error) = flock(&file, FlockOperation::LockExclusive) {
            tracing::debug!(%error, "the temporary file cannot be locked");
        }
        // Another command may have seen it before it was locked.
        if file.metadata()?.nlink() > 0 {
            return Ok((left, file, path));
        }
    }
    bail!("temporary files beside it are removed as soon as they are made")
}

/// Remove what killed commands have left for this name. Where that fails, it stays.
fn look_for_left(to: &Path, prefix: &OsStr) {
    let Ok(entries) = fs::read_dir(directory(to)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let xls = is_temporary(&name, prefix, Temporary::Xls);
        let xls = xls.then(|| is_unlocked(&entry.path())).flatten();
        if xls.is_some_and(|(_, bytes)| bytes > 0) {
            tracing::warn!(
                "{}: a save through xl that was killed has left it; if `xsr verify` says that it \
                 is good, it may be all that there is of its domain",
                shown_path(&entry.path())
            );
        }
        if is_temporary(&name, prefix, Temporary::Ours)
            && let Some(bytes) = remove_unlocked(&entry.path())
        {
            tracing::info!(
                "{}: removed, {} that a killed command has left",
                shown_path(&entry.path()),
                crate::text::size(bytes)
            );
        }
    }
}

fn is_temporary(name: &OsStr, prefix: &OsStr, whose: Temporary) -> bool {
    let middle = name
        .as_bytes()
        .strip_prefix(prefix.as_bytes())
        .and_then(|rest| rest.strip_suffix(whose.suffix().as_bytes()));
    middle.is_some_and(|middle| {
        middle.len() == RANDOM && middle.iter().all(u8::is_ascii_alphanumeric)
    })
}

/// A file of the caller's that nobody has locked: locked, and its length.
fn is_unlocked(path: &Path) -> Option<(File, u64)> {
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
    // Still the file of that name: with the lock held, its owner will not take it over.
    let named = fs::symlink_metadata(path).ok()?;
    if (named.dev(), named.ino()) != (found.dev(), found.ino()) {
        return None;
    }
    Some((file, found.len()))
}

/// Remove a file of the caller's that nobody has locked; its length.
fn remove_unlocked(path: &Path) -> Option<u64> {
    let (_locked, bytes) = is_unlocked(path)?;
    fs::remove_file(path).ok()?;
    Some(bytes)
}
