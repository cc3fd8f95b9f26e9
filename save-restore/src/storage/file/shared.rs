//! Slots in a file or block device that another program has opened and continues to write
//! afterwards.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};

use super::slots::Slots;
use super::steps::NoFaults;
use crate::storage::{Durability, Shape, StorageError, StorageReader, StorageWriter};

/// A file that another program has opened, has begun to write, and continues to write at the
/// position that both share. Dropping the writer before [`end_at`](Self::end_at) cuts the file
/// where it ended before; the position has not changed.
#[derive(Debug)]
pub struct SharedFileWriter {
    /// The other program's open file.
    shared: File,
    /// The same file, opened for reading and writing.
    own: File,
    name: String,
    /// Its length when it was opened.
    begun: u64,
    /// Where the image begins: offsets count from there.
    base: u64,
    /// It is a block device: its length is fixed, and old data lie behind the position.
    is_device: bool,
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
        match shared.metadata()?.is_file() {
            true => Self::opened(shared, name.into(), 0),
            false => Ok(None),
        }
    }

    /// The writer of an image that begins at the position of `shared`: of a regular file that ends
    /// there, or of a block device. `None` if `shared` is anything else, or cannot be opened again
    /// for reading and writing.
    ///
    /// The flags of `shared` do not matter: the image is also written at any place if the other
    /// program appends (`O_APPEND`).
    ///
    /// # Errors
    ///
    /// The descriptor cannot be looked at.
    pub fn from_position(shared: File, name: impl Into<String>) -> io::Result<Option<Self>> {
        let kind = shared.metadata()?.file_type();
        match kind.is_file() || kind.is_block_device() {
            true => {
                let base = (&shared).stream_position()?;
                Self::opened(shared, name.into(), base)
            }
            false => Ok(None),
        }
    }

    fn opened(shared: File, name: String, base: u64) -> io::Result<Option<Self>> {
        let found = shared.metadata()?;
        let is_device = found.file_type().is_block_device();
        let begun = (&shared).stream_position()?;
        if !is_device && begun != found.len() {
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
            name,
            begun,
            base,
            is_device,
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
        (&self.shared).seek(SeekFrom::Start(self.base + end))?;
        self.has_ended = true;
        Ok(())
    }

    /// The place of an offset in the image.
    fn at(&self, offset: u64) -> u64 {
        self.base.saturating_add(offset)
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
            && !self.is_device
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

    fn is_blank(&self) -> bool {
        !self.is_device
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.slots().write_all_at(bytes, self.at(offset))
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.slots().read_exact_at(buffer, self.at(offset))
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        let range = self.at(range.start)..self.at(range.end);
        match self.is_device {
            // To discard a range of a device does not make it read as zeros.
            true => self.slots().zero(range),
            false => self.slots().punch(range),
        }
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        match self.is_device {
            true => Ok(()),
            false => self.slots().set_length(self.at(length)),
        }
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

    /// A file in place of a block device: it is longer than the image, and full of old data.
    fn device(bytes: u64) -> (tempfile::NamedTempFile, SharedFileWriter) {
        let mut device = tempfile::NamedTempFile::new().unwrap();
        device.write_all(b"head").unwrap();
        let writer = SharedFileWriter::from_position(device.as_file().try_clone().unwrap(), "disk");
        let mut writer = writer.unwrap().unwrap();
        writer.is_device = true;
        let old = vec![0xaa; usize::try_from(bytes).unwrap()];
        writer.own.write_all_at(&old, 4).unwrap();
        (device, writer)
    }

    #[test]
    fn an_image_on_a_device_begins_at_the_position_and_leaves_the_rest() {
        let (mut device, writer) = device(1 << 20);
        assert!(!writer.is_blank());
        writer.write_all_at(b"page", 100).unwrap();
        writer.punch(96..200_000).unwrap();
        let mut back = [7; 2];
        writer.read_exact_at(&mut back, 98).unwrap();
        assert_eq!(back, [0; 2]);
        writer.set_length(5).unwrap();
        writer.end_at(300_000).unwrap();
        device.write_all(b"END").unwrap();
        let whole = std::fs::read(device.path()).unwrap();
        assert_eq!(whole.len(), 4 + (1 << 20), "its length is fixed");
        assert_eq!(whole[..4], *b"head");
        assert!(whole[4..100].iter().all(|byte| *byte == 0xaa));
        assert!(whole[100..200_004].iter().all(|byte| *byte == 0));
        assert!(whole[200_004..300_004].iter().all(|byte| *byte == 0xaa));
        assert_eq!(whole[300_004..300_007], *b"END");
        // An image that is given up leaves the position.
        let (mut device, writer) = self::device(4096);
        writer.write_all_at(b"page", 100).unwrap();
        drop(writer);
        assert_eq!(device.stream_position().unwrap(), 4);
        assert_eq!(std::fs::metadata(device.path()).unwrap().len(), 4100);
    }

    #[test]
    fn the_other_program_may_append() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("suspend");
        let mut appending = File::options()
            .append(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        appending.write_all(b"head").unwrap();
        let open = |file: &File| {
            SharedFileWriter::from_position(file.try_clone().unwrap(), "suspend")
                .unwrap()
                .unwrap()
        };
        let writer = open(&appending);
        assert!(writer.is_blank());
        writer.write_all_at(b"b", 1).unwrap();
        writer.write_all_at(b"a", 0).unwrap();
        writer.set_length(3).unwrap();
        writer.end_at(3).unwrap();
        appending.write_all(b"END").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"headab\0END");
        // Given up, it ends where it ended before.
        let writer = open(&appending);
        writer.set_length(1 << 20).unwrap();
        drop(writer);
        assert_eq!(std::fs::read(&path).unwrap(), b"headab\0END");
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
