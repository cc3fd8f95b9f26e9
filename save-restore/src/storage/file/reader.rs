//! Reading a file at any place.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::SeekFrom as SeekTo;
use rustix::io::Errno;

use crate::storage::{StorageError, StorageReader};

/// A file, or a block device, that is read at any place.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    name: String,
    length: u64,
}

impl FileReader {
    /// Reads this file. Moves its position; a descriptor that shares it with others (stdin) must be
    /// opened anew for this.
    ///
    /// # Errors
    ///
    /// [`StorageError::Io`] if its length cannot be determined: it is a pipe, for example.
    pub fn new(mut file: File, name: impl Into<String>) -> Result<Self, StorageError> {
        let name = name.into();
        let mut length = || -> io::Result<u64> {
            let found = file.metadata()?;
            match found.is_file() {
                true => Ok(found.len()),
                false => file.seek(SeekFrom::End(0)),
            }
        };
        let length = length().map_err(StorageError::io("measuring", &name))?;
        Ok(Self { file, name, length })
    }

    /// The file, for a source that shares its position.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// `None` if there are no more holes, or no more data.
    fn seek(&self, to: SeekTo) -> Result<Option<u64>, Errno> {
        match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl StorageReader for FileReader {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, StorageError> {
        loop {
            match self.file.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map_err(StorageError::io("reading", &self.name)),
            }
        }
    }

    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>, StorageError> {
        if offset >= self.length {
            return Ok(None);
        }
        let failed = || StorageError::io("looking for holes in", &self.name);
        // Other threads move the position meanwhile; each uses the answer of its own call.
        let start = match self.seek(SeekTo::Data(offset)) {
            Ok(Some(start)) => start,
            Ok(None) => return Ok(None),
            // A block device or a file system that does not support this.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..self.length)),
            Err(errno) => return Err(failed()(errno)),
        };
        let end = self.seek(SeekTo::Hole(start)).map_err(failed())?;
        let end = end.unwrap_or(self.length).min(self.length);
        Ok(Some(start..end).filter(|data| data.start < data.end))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}
