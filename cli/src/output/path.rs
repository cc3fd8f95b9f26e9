//! A path to write to, followed as far as it may be: not through a link that another user has
//! made where everybody can make one, not into another user's pipe. The kernel has these rules
//! as `fs.protected_symlinks` and `fs.protected_fifos`, but not everywhere, and the second only
//! for who would create the file.
//!
//! A path that is a name of an inherited descriptor (`/dev/stdout`, `/dev/fd/3`) becomes that
//! descriptor, with its position: it is to be written, not opened a second time. A descriptor that
//! this process opened itself has no such name: it may be the memory of the guest.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Error, Result, bail};
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::exit::BadUsage;
use crate::text::shown_path;

/// As many as the kernel follows.
const MOST_LINKS: usize = 40;

/// What a path leads to.
#[derive(Debug)]
pub(super) enum Found {
    /// An inherited descriptor of this process, and its number.
    Descriptor(File, u32),
    /// A path without links. There may be nothing there yet.
    Path(PathBuf),
}

/// What a path leads to, not yet opened.
enum Led {
    /// The number of a descriptor of this process, and its path.
    Descriptor(u32, PathBuf),
    Path(PathBuf),
}

/// Follow a path.
///
/// # Errors
///
/// What the file system says; [`BadUsage`] for a link that is not to be followed.
pub(super) fn find(path: &Path) -> Result<Found> {
    match walk(path, true)? {
        Led::Path(path) => Ok(Found::Path(path)),
        Led::Descriptor(number, path) => Ok(Found::Descriptor(take(number, &path)?, number)),
    }
}

/// Refuse to read a path that names a descriptor that was not inherited.
///
/// # Errors
///
/// The descriptor is not open, or this process opened it.
pub(crate) fn check_input(path: &Path) -> Result<()> {
    match walk(path, false) {
        Ok(Led::Descriptor(number, _)) => inherited(number).map(drop),
        // Opening it tells what is wrong with it.
        Ok(Led::Path(_)) | Err(_) => Ok(()),
    }
}

/// The flags of a descriptor that this process was started with. One that it opened itself is
/// closed on exec, which an inherited one cannot be.
///
/// # Errors
///
/// It is not open, or this process opened it.
pub(crate) fn inherited(number: u32) -> Result<OFlag> {
    let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
        bail!("is not open");
    };
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    let flags = OFlag::from_bits_retain(flags.context("the kernel does not tell its flags")?);
    if flags.contains(OFlag::O_CLOEXEC) {
        bail!("is not open");
    }
    Ok(flags)
}

/// Whether a path ends in a slash or a dot, and so can name a directory only.
fn names_directory(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.")
}

/// Follow a path as [`find`] does; `check` refuses links that other users made.
fn walk(path: &Path, check: bool) -> Result<Led> {
    let mut directory_only = names_directory(path);
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
        if left.is_empty()
            && let Some(number) = own_descriptor(&next)
        {
            return Ok(Led::Descriptor(number, next));
        }
        let found = match fs::symlink_metadata(&next) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if directory_only {
                    bail!("is not a directory");
                }
                return Ok(Led::Path(rest(next, left)));
            }
            Err(e) => return Err(e.into()),
        };
        if found.is_symlink() {
            if check {
                check_link(&next, &found, &directory, left.is_empty())?;
            }
            links += 1;
            if links > MOST_LINKS {
                bail!("too many symbolic links");
            }
            let target = fs::read_link(&next)?;
            check_magic(&next, &target)?;
            directory_only |= left.is_empty() && names_directory(&target);
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
    if directory_only && !directory.is_dir() {
        bail!("is not a directory");
    }
    Ok(Led::Path(done))
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
    // A thread has the descriptors of its process.
    let is_own = Path::new("/proc/self/task").join(process).exists();
    is_own.then(|| number.parse().ok()).flatten()
}

/// Refuse a link of `/proc` that leads to what its text does not name: a pipe or a removed file
/// of another process, the root of a container. (The kernel follows such a link by itself.)
fn check_magic(link: &Path, target: &Path) -> Result<()> {
    if !link.starts_with("/proc") {
        return Ok(());
    }
    let target = link.parent().unwrap_or(link).join(target);
    let led = fs::metadata(link)?;
    match fs::metadata(target) {
        Ok(named) if (named.dev(), named.ino()) == (led.dev(), led.ino()) => Ok(()),
        _ => bail!("{} has no name outside /proc", shown_path(link)),
    }
}

/// A descriptor that this process was started with.
fn take(number: u32, path: &Path) -> Result<File> {
    let flags = inherited(number)?;
    let standard = match number {
        0 => Some(io::stdin().as_fd().try_clone_to_owned()),
        1 => Some(io::stdout().as_fd().try_clone_to_owned()),
        2 => Some(io::stderr().as_fd().try_clone_to_owned()),
        _ => None,
    };
    if let Some(file) = standard {
        return Ok(file?.into());
    }
    let raw = i32::try_from(number).context("names no descriptor")?;
    let opened = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(own, raw, PidfdGetfdFlags::empty()));
    match opened {
        Ok(file) => Ok(file.into()),
        // Where that is not allowed: what has no position may be opened a second time.
        Err(_) if !fs::metadata(path)?.is_file() && flags & OFlag::O_ACCMODE != OFlag::O_RDONLY => {
            Ok(OpenOptions::new().write(true).open(path)?)
        }
        Err(error) => bail!("cannot be written ({error}): name the file, or redirect stdout to it"),
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
