//! The pipe of ours into which xl saves a domain whose image is compressed or encrypted: a FIFO,
//! because xl opens its output by name.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;
use xsr_save_restore::progress::Cancel;

use crate::file::widen;
use crate::output::Output;
use crate::pack::{Packer, Packing};

/// A FIFO, and the thread that writes what comes out of it to the output.
#[derive(Debug)]
pub(super) struct Fifo {
    pub(super) packer: Packer,
    pub(super) path: PathBuf,
    /// Where it is, as long as xl may open it.
    _directory: TempDir,
}

impl Fifo {
    /// Makes one that only this user can open.
    ///
    /// # Errors
    ///
    /// There is no room for it.
    pub(super) fn start(packing: &Packing, output: &Output) -> Result<Self> {
        let directory = tempfile::tempdir().context("making a temporary directory")?;
        let path = directory.path().join("image");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).context("making a FIFO")?;
        let (from, to) = ends(&path).context("opening the FIFO")?;
        widen(&from);
        let packer = packing.start_for_xl(from, to, output, Cancel::new())?;
        Ok(Self {
            packer,
            path,
            _directory: directory,
        })
    }
}

/// Both ends, for this process alone: the reader sees the end once xl, too, has closed its own.
fn ends(path: &Path) -> Result<(File, File)> {
    // Without a writer, opening would wait.
    let mut reads = OpenOptions::new();
    let reads = reads.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let from = reads.open(path)?;
    let to = OpenOptions::new().write(true).open(path)?;
    let flags = OFlag::from_bits_truncate(fcntl(from.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(from.as_fd(), FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok((from, to))
}
