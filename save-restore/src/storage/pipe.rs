//! Pipes, sockets, terminals and devices: written straight, and read once.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileTypeExt as _;

use rustix::pipe::fcntl_setpipe_size;

use super::{Durability, Shape, StorageError, StorageReader, StorageWriter, StreamReader};

/// Requested capacity of a pipe: larger means fewer switches between the two processes.
const PIPE_BYTES: usize = 1 << 20;

/// Increases a pipe's capacity from the initial 64 KiB, if that is allowed.
fn widen(file: &File) -> io::Result<()> {
    if file.metadata()?.file_type().is_fifo()
        && let Err(error) = fcntl_setpipe_size(file, PIPE_BYTES)
    {
        tracing::debug!(%error, "the pipe keeps its size");
    }
    Ok(())
}

/// Writes straight to a descriptor: written bytes cannot be taken back.
///
/// ```
/// use std::fs::File;
/// use std::io::{Read as _, Write as _};
/// use xsr_save_restore::storage::pipe::StraightWriter;
/// use xsr_save_restore::storage::{Durability, StorageWriter as _};
///
/// let (mut reader, writer) = std::io::pipe()?;
/// let file = File::from(std::os::fd::OwnedFd::from(writer));
/// let mut writer = Box::new(StraightWriter::new(file, "stdout")?);
/// writer.write_all(b"an image")?;
/// assert!(writer.is_straight());
/// // A pipe keeps nothing: there is nothing to make durable.
/// writer.commit(Durability::Durable)?;
/// let mut arrived = String::new();
/// reader.read_to_string(&mut arrived)?;
/// assert_eq!(arrived, "an image");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StraightWriter {
    file: File,
    name: String,
}

impl StraightWriter {
    /// Writes to this descriptor, from its current position.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`] if the type of the descriptor cannot be determined.
    pub fn new(file: File, name: impl Into<String>) -> Result<Self, StorageError> {
        let name = name.into();
        widen(&file).map_err(StorageError::io("opening", &name))?;
        Ok(Self { file, name })
    }

    fn unsupported<T>(&self) -> Result<T, StorageError> {
        Err(StorageError::Unsupported {
            name: self.name.clone(),
            what: "can only be written from its start to its end",
        })
    }
}

impl Write for StraightWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for StraightWriter {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn shape(&self) -> Shape {
        Shape::Stream
    }

    fn is_straight(&self) -> bool {
        true
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> Result<(), StorageError> {
        self.unsupported()
    }

    fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), StorageError> {
        self.unsupported()
    }

    fn punch(&self, _: Range<u64>) -> Result<(), StorageError> {
        self.unsupported()
    }

    fn set_length(&self, _: u64) -> Result<(), StorageError> {
        self.unsupported()
    }

    fn clone_range(
        &self,
        _: &dyn StorageReader,
        _: Range<u64>,
        _: u64,
    ) -> Result<(), StorageError> {
        self.unsupported()
    }

    fn sync(&self) -> Result<(), StorageError> {
        match self.file.sync_all() {
            // A pipe or a terminal has nothing to sync.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => result.map_err(StorageError::io("syncing", &self.name)),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        match durability {
            Durability::Process => Ok(()),
            Durability::Durable => self.sync(),
        }
    }
}

/// Reads straight from a descriptor, each byte once, without reading ahead: another reader can
/// continue where this one stops.
#[derive(Debug)]
pub struct OnceReader {
    file: File,
    name: String,
}

impl OnceReader {
    /// Reads from this descriptor, from its current position.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`] if the type of the descriptor cannot be determined.
    pub fn new(file: File, name: impl Into<String>) -> Result<Self, StorageError> {
        let name = name.into();
        widen(&file).map_err(StorageError::io("opening", &name))?;
        Ok(Self { file, name })
    }
}

impl Read for OnceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl StreamReader for OnceReader {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}
