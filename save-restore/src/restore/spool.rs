//! Storage for the records of one checkpoint until it is complete: in memory, and beyond a limit in
//! a temporary file without a name, which has a limit of its own.
//!
//! C implementation: the array of records in `xg_sr_restore.c:buffer_record`, which has no limit.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use xsr_xen_backend::ForeignPages;

use crate::error::RestoreError;
use crate::restore::checkpoint::CheckpointOptions;
use crate::source::{Extent, LookAhead, PageSource, copy_pages};

/// Bytes in order: written first, then read.
#[derive(Debug)]
pub(super) struct Spool {
    memory: Vec<u8>,
    limit: usize,
    directory: PathBuf,
    file: Option<File>,
    in_file: u64,
    /// The maximum size of the file.
    file_limit: u64,
    /// Bytes that have been read again.
    read: u64,
}

impl Spool {
    pub(super) fn new(options: &CheckpointOptions, file_limit: u64) -> Self {
        Self {
            memory: Vec::new(),
            limit: options.memory_bytes,
            directory: options.directory.clone(),
            file: None,
            in_file: 0,
            file_limit,
            read: 0,
        }
    }

    /// Bytes that are kept.
    pub(super) fn len(&self) -> u64 {
        self.memory.len() as u64 + self.in_file
    }

    /// The bytes in the file.
    pub(super) fn in_file(&self) -> u64 {
        self.in_file
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.limit.saturating_sub(self.memory.len());
        // Once the file holds something, everything that follows goes there.
        let here = match self.in_file {
            0 => bytes.len().min(room),
            _ => 0,
        };
        let (here, there) = bytes.split_at(here);
        self.memory.extend_from_slice(here);
        if there.is_empty() {
            return Ok(());
        }
        if there.len() as u64 > self.file_limit.saturating_sub(self.in_file) {
            return Err(io::Error::other(format!(
                "it has more than the {} bytes in memory and {} in the file that a checkpoint \
                 may have here",
                self.limit, self.file_limit
            )));
        }
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(&self.directory)?),
        };
        file.write_all_at(there, self.in_file)?;
        self.in_file += there.len() as u64;
        Ok(())
    }

    /// Forgets what is kept. Memory and file stay allocated, but empty.
    fn clear(&mut self) -> io::Result<()> {
        self.memory.clear();
        self.read = 0;
        if std::mem::take(&mut self.in_file) > 0
            && let Some(file) = &self.file
        {
            file.set_len(0)?;
        }
        Ok(())
    }
}

impl Read for Spool {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let in_memory = self.memory.len() as u64;
        let n = match usize::try_from(self.read) {
            Ok(at) if self.read < in_memory => (&self.memory[at..]).read(room)?,
            _ => match &self.file {
                Some(file) => file.read_at(room, self.read - in_memory)?,
                None => 0,
            },
        };
        self.read += n as u64;
        Ok(n)
    }
}

impl PageSource for Spool {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        copy_pages(self, pages, range)
    }

    fn take_extent(&mut self, _: u64) -> io::Result<Option<Extent>> {
        Ok(None)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        Ok(None)
    }
}

/// A source that also keeps everything that is read, once that is requested.
#[derive(Debug)]
pub(super) struct Tap<S> {
    source: S,
    pub(super) spool: Spool,
    keeping: bool,
    /// The error of writing the spool.
    failed: Option<io::Error>,
}

impl<S> Tap<S> {
    pub(super) fn new(source: S, spool: Spool) -> Self {
        Self {
            source,
            spool,
            keeping: false,
            failed: None,
        }
    }

    /// Keeps what is read from now on, and forgets what was kept before.
    pub(super) fn keep(&mut self) -> Result<(), RestoreError> {
        self.keeping = true;
        self.spool.clear().map_err(|error| self.spill(error))
    }

    /// The error of keeping bytes, if reading failed for that reason and not because of the source.
    pub(super) fn failed(&mut self) -> Option<RestoreError> {
        let error = self.failed.take()?;
        Some(self.spill(error))
    }

    pub(super) fn into_source(self) -> S {
        self.source
    }

    fn spill(&self, cause: io::Error) -> RestoreError {
        RestoreError::Spill {
            directory: self.spool.directory.display().to_string(),
            cause,
        }
    }
}

impl<S: Read> Read for Tap<S> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(room)?;
        if self.keeping
            && let Err(error) = self.spool.append(&room[..n])
        {
            self.failed = Some(error);
            return Err(io::Error::other("the checkpoint could not be kept"));
        }
        Ok(n)
    }
}

impl<S: PageSource> PageSource for Tap<S> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        match self.keeping {
            true => copy_pages(self, pages, range),
            false => self.source.read_pages(pages, range),
        }
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        match self.keeping {
            true => Ok(None),
            false => self.source.take_extent(bytes),
        }
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        Ok(None)
    }
}
