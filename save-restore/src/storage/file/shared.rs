//! Slots in a file that another program has opened and continues to write afterwards.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use super::slots::Slots;
use super::steps::NoFaults;
use crate::storage::{Durability, Shape, StorageError, StorageReader, StorageWriter};

/// A file that another program has opened, has begun to write, and continues to write at the
/// position that both share. Dropping the writer before [`end_at`](Self::end_at) cuts the file
/// where it ended before.
#[derive(Debug)]
pub struct SharedFileWriter {
    /// The other program's open file.
    shared: File,
    /// The same file, opened for reading and writing.
    own: File,
    name: String,
    /// Its length when it was opened.
    begun: u64,
    has_ended: bool,
}

impl SharedFileWriter {
    /// The writer of a regular file whose position is its end; `None` if `shared` is anything else,
    /// or cannot be opened again for reading and writing.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be looked at.
    pub fn open(shared: File, name: impl Into<String>) -> io::Result<Option<Self>> {
        let found = shared.metadata()?;
        if !found.is_file() {
            return Ok(None);
        }
        let begun = (&shared).stream_position()?;
        if begun != found.len() {
            return Ok(None);
        }
        let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
        let own = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(own) => own,
            Err(error) => {
                tracing::debug!(%error, "the file cannot be opened for reading and writing");
                return Ok(None);
            }
        };
        let same = own.metadata()?;
        if (same.dev(), same.ino()) != (found.dev(), found.ino()) {
            return Ok(None);
        }
        Ok(Some(Self {
            shared,
            own,
            name: name.into(),
            begun,
            has_ended: false,
        }))
    }

    /// What the other program has written, if it is at most `most` bytes.
    ///
    /// # Errors
    ///
    /// The file could not be read.
    pub fn begun(&self, most: u64) -> io::Result<Option<Vec<u8>>> {
        if self.begun > most {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(self.begun).map_err(io::Error::other)?];
        self.own.read_exact_at(&mut bytes, 0)?;
        Ok(Some(bytes))
    }

    /// The image is complete, and ends at this byte, where the other program continues.
    ///
    /// # Errors
    ///
    /// The position could not be set.
    pub fn end_at(mut self, end: u64) -> io::Result<()> {
        (&self.shared).seek(SeekFrom::Start(end))?;
        self.has_ended = true;
        Ok(())
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            file: &self.own,
            name: &self.name,
            steps: &NoFaults,
        }
    }
}

impl Drop for SharedFileWriter {
    fn drop(&mut self) {
        if !self.has_ended
            && let Err(error) = self.own.set_len(self.begun)
        {
            tracing::warn!(%error, "{} could not be cut", self.name);
        }
    }
}

impl Write for SharedFileWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.shared.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for SharedFileWriter {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn shape(&self) -> Shape {
        Shape::Slots
    }

    fn is_straight(&self) -> bool {
        true
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.slots().write_all_at(bytes, offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.slots().read_exact_at(buffer, offset)
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.slots().punch(range)
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.slots().set_length(length)
    }

    fn clone_range(
        &self,
        _: &dyn StorageReader,
        _: Range<u64>,
        _: u64,
    ) -> Result<(), StorageError> {
        Err(StorageError::Unsupported {
            name: self.name.clone(),
            what: "is written by another program, too, and cannot share room with an image",
        })
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.slots().sync()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.as_fd())
    }

    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        match durability {
            Durability::Process => Ok(()),
            Durability::Durable => self.sync(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_other_program_continues_where_the_image_ends() {
        let mut theirs = tempfile::NamedTempFile::new().unwrap();
        theirs.write_all(b"begun").unwrap();
        let open = |file: &File| {
            SharedFileWriter::open(file.try_clone().unwrap(), "web.save")
                .unwrap()
                .unwrap()
        };
        // Xen's xl opens it for writing only.
        let shared = File::options()
            .append(false)
            .write(true)
            .open(theirs.path());
        let mut shared = shared.unwrap();
        shared.seek(SeekFrom::End(0)).unwrap();
        let writer = open(&shared);
        assert_eq!(writer.begun(5).unwrap().unwrap(), b"begun");
        assert!(writer.begun(4).unwrap().is_none());
        writer.write_all_at(b"page", 8192).unwrap();
        drop(writer);
        assert_eq!(std::fs::read(theirs.path()).unwrap(), b"begun");
        let writer = open(&shared);
        writer.write_all_at(b"longer beginning", 0).unwrap();
        writer.end_at(16).unwrap();
        shared.write_all(b", the rest").unwrap();
        let whole = std::fs::read(theirs.path()).unwrap();
        assert_eq!(whole, b"longer beginning, the rest");
    }

    #[test]
    fn a_pipe_and_a_file_with_more_behind_the_position_have_no_slots() {
        let (_reader, writer) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        assert!(SharedFileWriter::open(pipe, "pipe").unwrap().is_none());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123").unwrap();
        file.seek(SeekFrom::Start(2)).unwrap();
        assert!(SharedFileWriter::open(file, "file").unwrap().is_none());
    }
}
