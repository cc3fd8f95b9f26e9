//! A path to write to, followed as far as it may be: not through a link that another user has
//! made where everybody can make one, not into another user's pipe. The kernel has these rules
//! as `fs.protected_symlinks` and `fs.protected_fifos`, but not everywhere, and the second only
//! for who would create the file.
//!
//! A path that is a name of an open descriptor (`/dev/stdout`, `/dev/fd/3`) becomes that
//! descriptor, with its position: it is to be written, not opened a second time.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Error, Result, bail};
use nix::unistd::geteuid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::exit::BadUsage;
use crate::text::shown_path;

/// As many as the kernel follows.
const MOST_LINKS: usize = 40;

/// What a path leads to.
#[derive(Debug)]
pub(super) enum Found {
    /// An open file of this process.
    Descriptor(File),
    /// A path without links. There may be nothing there yet.
    Path(PathBuf),
}

/// Follow a path.
///
/// # Errors
///
/// What the file system says; [`BadUsage`] for a link that is not to be followed.
pub(super) fn find(path: &Path) -> Result<Found> {
    let path = std::path::absolute(path)?;
    // Components still to be followed, the next one last.
    let mut left = components(&path);
    let mut done = PathBuf::from("/");
    let mut links = 0;
    // Who may put something into the directory that `done` is.
    let mut directory = fs::symlink_metadata("/")?;
    while let Some(name) = left.pop() {
        if name == ".." {
            done.pop();
            directory = fs::symlink_metadata(&done)?;
            continue;
        }
        let next = done.join(&name);
        if next == Path::new("/proc") {
            return process(&rest(next, left));
        }
        let found = match fs::symlink_metadata(&next) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Found::Path(rest(next, left)));
            }
            Err(e) => return Err(e.into()),
        };
        if found.is_symlink() {
            check_link(&next, &found, &directory, left.is_empty())?;
            links += 1;
            if links > MOST_LINKS {
                bail!("too many symbolic links");
            }
            let target = fs::read_link(&next)?;
            if target.is_absolute() {
                done = PathBuf::from("/");
                directory = fs::symlink_metadata("/")?;
            }
            left.extend(components(&target));
        } else {
            done = next;
            directory = found;
        }
    }
    Ok(Found::Path(done))
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

/// A path below `/proc`, which may be the name of a descriptor of this process.
fn process(path: &Path) -> Result<Found> {
    let below = path.strip_prefix("/proc").unwrap_or(path);
    let parts: Vec<_> = below.iter().filter_map(|part| part.to_str()).collect();
    let own = std::process::id().to_string();
    let number = match parts[..] {
        [process, "fd", number] if ["self", "thread-self", &own].contains(&process) => number,
        ["self" | "thread-self", "task", _, "fd", number] => number,
        _ => {
            return Ok(Found::Descriptor(
                OpenOptions::new().write(true).open(path)?,
            ));
        }
    };
    let number = number.parse().context("names no descriptor")?;
    let opened = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
    match opened {
        Ok(file) => Ok(Found::Descriptor(file.into())),
        Err(rustix::io::Errno::BADF) => bail!("is not open"),
        // Where that is not allowed: at least the same file.
        Err(_) => Ok(Found::Descriptor(
            OpenOptions::new().write(true).open(path)?,
        )),
    }
}

/// Whether somebody whom the caller must trust anyway owns it.
fn is_trusted(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == geteuid().as_raw()
}

/// Whether others may put something into a directory.
fn is_shared(directory: &Metadata) -> bool {
    directory.mode() & 0o1022 != 0
}

/// `last`: the link stands where the file is to be, so that following it has another file
/// replaced.
fn check_link(path: &Path, link: &Metadata, directory: &Metadata, last: bool) -> Result<()> {
    let foreign = !is_trusted(link);
    if foreign && (last || (is_shared(directory) && link.uid() != directory.uid())) {
        let why = format!(
            "{} is a link of another user (uid {}), and is not followed: name the file itself",
            shown_path(path),
            link.uid()
        );
        return Err(Error::new(BadUsage(why)));
    }
    Ok(())
}

/// Whether a FIFO or socket may be written to: the guest's memory is for its owner.
pub(super) fn check_owner(found: &Metadata) -> Result<()> {
    if is_trusted(found) {
        return Ok(());
    }
    let why = format!(
        "is a pipe or socket of another user (uid {}): redirect stdout to it, if that is meant",
        found.uid()
    );
    Err(Error::new(BadUsage(why)))
}

/// The directory that a file is in.
pub(super) fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
