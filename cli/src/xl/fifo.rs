//! The pipe of ours into which xl saves a domain whose image is compressed or encrypted: a FIFO,
//! because xl opens its output by name.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;
use xsr_save_restore::progress::{Cancel, Cancelled};

use super::child::hear_until;
use crate::file::widen;
use crate::output::Output;
use crate::pack::{Packed, Packer, Packing};

/// A FIFO, and the thread that writes what comes out of it to the output.
#[derive(Debug)]
pub(super) struct Fifo {
    packer: Packer,
    cancel: Cancel,
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
        let cancel = Cancel::new();
        let packer = packing.start_with_pipe(from, to, output, cancel.clone())?;
        Ok(Self {
            packer,
            cancel,
            path,
            _directory: directory,
        })
    }

    /// Nothing is wanted of the image any more: xl's writes fail, and it lets the domain run on.
    pub(super) fn give_up(&self) {
        self.packer.image_failed();
        self.cancel.cancel();
    }

    /// Called after xl has ended: waits until all that it has written is packed, if it succeeded,
    /// and otherwise gives the output up. So does a signal that asks to stop.
    ///
    /// # Errors
    ///
    /// The output failed or was given up ([`is_cancelled`](crate::pack::is_cancelled)); signals
    /// cannot be read.
    pub(super) fn finish(mut self, succeeded: bool) -> Result<Packed> {
        if !succeeded {
            self.give_up();
        }
        self.packer.close();
        let what = "interrupting: the image is given up";
        let heard = hear_until(self.packer.over(), what, || self.give_up());
        if heard.is_err() {
            self.give_up();
        }
        let Self { packer, cancel, .. } = self;
        let packed = packer.finish();
        heard?;
        // The request may have come when all was written already.
        match packed {
            Ok(_) if cancel.is_cancelled() => Err(Error::new(Cancelled)),
            packed => packed,
        }
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
