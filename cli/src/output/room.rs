//! Checks for free space before a guest is suspended for a save.
//!
//! An image is refused only if the answer is certain. File systems that compress, share or reserve
//! blocks cannot tell what they will take, and get only a warning.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use anyhow::{Result, bail};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;
use rustix::fs::{StatVfs, fstatfs, fstatvfs};

use crate::text::{shown_path, size};

/// File systems on which a byte written takes a byte: ext2 to ext4, XFS, JFS, FAT, exFAT, tmpfs.
const PLAIN: [i64; 6] = [
    0xef53,
    0x5846_5342,
    0x3153_464a,
    0x4d44,
    0x2011_bab0,
    0x0102_1994,
];

/// Refuse if this many bytes certainly do not fit. `directory`: a new file's directory.
pub(super) fn check(file: &File, directory: Option<&Path>, bytes: u64) -> Result<()> {
    let found = file.metadata()?;
    if found.file_type().is_block_device() {
        let mut device = file;
        let at = device.stream_position()?;
        let length = device.seek(SeekFrom::End(0))?;
        device.seek(SeekFrom::Start(at))?;
        return match length.saturating_sub(at) < bytes {
            true => too_little("the device", length.saturating_sub(at), bytes),
            false => Ok(()),
        };
    }
    if !found.is_file() {
        return Ok(());
    }
    let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if limit < bytes {
        return too_little("the limit for a file's length (`ulimit -f`)", limit, bytes);
    }
    // Without an answer, the output is not refused.
    let Some(room) = Room::of(file).filter(|room| room.free < bytes) else {
        return Ok(());
    };
    let place = directory.map_or_else(|| "its file system".to_owned(), shown_path);
    if room.is_exact {
        return too_little(&place, room.free, bytes);
    }
    tracing::warn!(
        "{place} has {} free, and the image will have {} at least",
        size(room.free),
        size(bytes)
    );
    Ok(())
}

/// The free space of a file system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// For this process, in bytes.
    pub(crate) free: u64,
    /// Whether a byte written certainly takes a byte.
    pub(crate) is_exact: bool,
}

impl Room {
    /// The space of the file system that has this file or directory; `None` if it does not tell, or
    /// has no limit.
    pub(crate) fn of(file: &File) -> Option<Self> {
        let (kind, room) = (fstatfs(file).ok()?, fstatvfs(file).ok()?);
        Some(Self {
            free: free(&room)?,
            is_exact: PLAIN.contains(&kind.f_type),
        })
    }
}

/// The free bytes for this process; `None` if there is no limit.
fn free(room: &StatVfs) -> Option<u64> {
    if room.f_blocks == 0 {
        return None;
    }
    let blocks = match geteuid().is_root() {
        true => room.f_bfree,
        false => room.f_bavail,
    };
    blocks.checked_mul(room.f_frsize)
}

fn too_little(place: &str, free: u64, bytes: u64) -> Result<()> {
    bail!(
        "{place} has {} free, and the image will have {} at least: make room, or try all the \
         same with --force",
        size(free),
        size(bytes)
    )
}
