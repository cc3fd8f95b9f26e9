//! Writing and reading back an open file at any place.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::steps::{Step, Steps};
use crate::storage::StorageError;

/// An open file that is written at any place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots<'w> {
    pub(super) file: &'w File,
    /// Its name for messages.
    pub(super) name: &'w str,
    pub(super) steps: &'w dyn Steps,
}

impl Slots<'_> {
    pub(super) fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        let write = || -> io::Result<()> {
            let mut done = 0;
            while done < bytes.len() {
                self.steps.before(Step::Write)?;
                let most = self.steps.most(bytes.len() - done);
                let at = offset
                    .checked_add(done as u64)
                    .ok_or(io::ErrorKind::FileTooLarge)?;
                match self.file.write_at(&bytes[done..done + most], at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => done += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        write().map_err(StorageError::io("writing", self.name))
    }

    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.saturating_add(done as u64);
            let read = self.steps.before(Step::Read);
            match read.and_then(|()| self.file.read_at(&mut buffer[done..], at)) {
                Ok(0) => {
                    return Err(StorageError::Truncated {
                        name: self.name.to_owned(),
                        offset: at,
                        missing: buffer.len() - done,
                    });
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StorageError::io("reading", self.name)(error)),
            }
        }
        Ok(())
    }

    pub(super) fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        let punch = || -> io::Result<()> {
            self.steps.before(Step::Punch)?;
            // Beyond the end there is a hole already.
            let range = range.start..range.end.min(self.file.metadata()?.len());
            if range.is_empty() {
                return Ok(());
            }
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            loop {
                match fallocate(self.file, how, range.start, range.end - range.start) {
                    // A signal that a handler has caught.
                    Err(Errno::INTR) => {}
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => return self.write_zeros(range),
                    result => return Ok(result?),
                }
            }
        };
        punch().map_err(StorageError::io("writing", self.name))
    }

    /// Writes zeros.
    pub(super) fn zero(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.steps
            .before(Step::Punch)
            .and_then(|()| self.write_zeros(range))
            .map_err(StorageError::io("writing", self.name))
    }

    pub(super) fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.steps
            .before(Step::SetLength)
            .and_then(|()| self.file.set_len(length))
            .map_err(StorageError::io("writing", self.name))
    }

    pub(super) fn sync(&self) -> Result<(), StorageError> {
        self.steps
            .before(Step::Sync)
            .and_then(|()| self.file.sync_data())
            .map_err(StorageError::io("syncing", self.name))
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let zeros = [0; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let n = left.min(zeros.len());
            self.file.write_all_at(&zeros[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }
}
