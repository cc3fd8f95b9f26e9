//! The descriptor of the suspend image or migration stream.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use xsr_save_restore::inherited::inherited_stream;

/// The stream that xenopsd left open for this process, to be written (`save`) or read.
///
/// Anything except a socket or a pipe must be read-only or opened with O_APPEND, as the published
/// emu-managers require: xenopsd opens a suspend image in this way. (On a block device the flag has
/// no effect: writes go to the descriptor's current offset.)
///
/// # Errors
///
/// The descriptor is not open, or not in the right mode.
pub(crate) fn open(fd: i32, save: bool) -> Result<OwnedFd> {
    let stream = inherited_stream(fd).with_context(|| format!("-fd {fd}"))?;
    let flags = OFlag::from_bits_retain(fcntl(&stream, FcntlArg::F_GETFL)?);
    let access = flags & OFlag::O_ACCMODE;
    if !waits(&stream)? && access != OFlag::O_RDONLY && !flags.contains(OFlag::O_APPEND) {
        bail!("-fd {fd} is open for writing without O_APPEND");
    }
    match (save, access) {
        (true, OFlag::O_RDONLY) => bail!("-fd {fd} is open for reading only"),
        (false, OFlag::O_WRONLY) => bail!("-fd {fd} is open for writing only"),
        _ => {}
    }
    Ok(stream)
}

/// Whether it is a pipe or socket, which xenopsd opens for a migration, and not an image.
///
/// # Errors
///
/// Its type could not be determined.
pub(crate) fn waits(stream: &OwnedFd) -> Result<bool> {
    let kind = SFlag::from_bits_truncate(fstat(stream)?.st_mode) & SFlag::S_IFMT;
    Ok(kind == SFlag::S_IFSOCK || kind == SFlag::S_IFIFO)
}
