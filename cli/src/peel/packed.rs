//! Buffered input of the decompressors. It counts the compressed bytes, and records whether they
//! ran out or the source failed.

use std::io::{self, BufRead, ErrorKind, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Source;
use crate::age::{self, AgeError};

/// Bytes per read.
const STEP: usize = 256 << 10;

/// How many compressed bytes have been used, and how they ended.
#[derive(Debug, Default)]
pub(super) struct Progress {
    used: AtomicU64,
    ran_out: AtomicBool,
    failed: AtomicBool,
    /// Why, if the source is encrypted and that is damaged.
    encryption: Mutex<Option<AgeError>>,
}

impl Progress {
    /// Compressed bytes used so far.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a decompressor asked for more than there was.
    pub(super) fn ran_out(&self) -> bool {
        self.ran_out.load(Ordering::Relaxed)
    }

    /// What is wrong with the encryption around the source. Decompressors wrap their errors.
    pub(super) fn encryption(&self) -> Option<AgeError> {
        let found = self.encryption.lock();
        found.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether reading the source failed. Its contents are not to blame then.
    pub(super) fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Buffered compressed bytes.
pub(super) struct Packed {
    source: Source,
    progress: Arc<Progress>,
    room: Vec<u8>,
    from: usize,
    to: usize,
}

impl Packed {
    pub(super) fn new(source: Source) -> (Self, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        let packed = Self {
            source,
            progress: Arc::clone(&progress),
            room: vec![0; STEP],
            from: 0,
            to: 0,
        };
        (packed, progress)
    }

    /// The next bytes, at least `count` of them unless fewer are left, without consuming them.
    pub(super) fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.to - self.from < count && self.more()? {}
        Ok(&self.room[self.from..self.to])
    }

    /// Read more into the buffer. Returns `false` at the end of the source.
    fn more(&mut self) -> io::Result<bool> {
        self.room.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        if self.to == self.room.len() {
            return Ok(false);
        }
        loop {
            match self.source.read(&mut self.room[self.to..]) {
                Ok(n) => {
                    self.to += n;
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => {
                    self.progress.failed.store(true, Ordering::Relaxed);
                    let mut found = self.progress.encryption.lock();
                    let found = found.as_deref_mut().ok();
                    if let (Some(found), Some(age)) = (found, age::error_in(&e)) {
                        *found = Some(age.clone());
                    }
                    return Err(e);
                }
            }
        }
    }

    /// Skip `count` bytes. Returns `false` if the source ends before.
    pub(super) fn skip(&mut self, count: u64) -> io::Result<bool> {
        Ok(io::copy(&mut self.by_ref().take(count), &mut io::sink())? == count)
    }
}

impl Read for Packed {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let n = ready.len().min(room.len());
        room[..n].copy_from_slice(&ready[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Packed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.from == self.to && !self.more()? {
            self.progress.ran_out.store(true, Ordering::Relaxed);
        }
        Ok(&self.room[self.from..self.to])
    }

    fn consume(&mut self, count: usize) {
        let count = count.min(self.to - self.from);
        self.from += count;
        let used = count as u64;
        self.progress.used.fetch_add(used, Ordering::Relaxed);
    }
}
