//! A suspend image in a file or on a disk, into which a guest is saved while it runs.
//!
//! A live save that appends what the guest writes again has no limit, and xapi's suspend VDI has one
//! (1.26 times the VM's memory and 100 MiB). So each page gets a slot, as in the mapped layout
//! (`docs/mapped.md`), and goes to it each time. What is written is a stream that the published
//! programs read; the index of the layout is left out, because xenopsd appends its own records.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use xsr_save_restore::save::mapped::{MappedImage, MappedOptions};
use xsr_save_restore::storage::file::SharedFileWriter;

/// The file or disk, from the position at which the stream begins.
#[derive(Debug)]
pub(crate) struct Disk(SharedFileWriter);

impl Disk {
    /// The one behind xenopsd's descriptor; `None` for a pipe or socket, and for a file that cannot
    /// be opened again for reading.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be looked at.
    pub(crate) fn of(stream: &OwnedFd) -> Result<Option<Self>> {
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        let writer = SharedFileWriter::from_position(file, "the suspend image");
        Ok(writer.context("-fd")?.map(Self))
    }

    /// An image on it.
    pub(crate) fn image(&self) -> MappedImage<'_> {
        let mut options = MappedOptions::default();
        options.without_index = true;
        MappedImage::new(&self.0, options)
    }

    /// The image is complete and ends at this byte, where xenopsd continues.
    ///
    /// # Errors
    ///
    /// The position could not be set.
    pub(crate) fn end_at(self, end: u64) -> Result<()> {
        self.0
            .end_at(end)
            .context("seeking to the end of the stream")
    }
}
