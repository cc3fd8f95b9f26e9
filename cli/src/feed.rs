//! A pipe fed with the plain image of a wrapped or legacy one: a thread removes the wrappers and
//! writes the rest into the pipe. So everything that reads images from a descriptor reads these
//! too, unchanged.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Error, Result};
use nix::fcntl::{SpliceFFlags, tee};
use xsr_format::error::ReadError;
use xsr_save_restore::RestoreError;
use xsr_save_restore::storage::{StorageCursor, file};

use crate::exit::{self, Code};
use crate::interrupt::Interrupt;
use crate::origin::Origin;
use crate::peel::{self, Found, Peeled, Source, TELLING, Used, Wanted};

/// Bytes per copy.
const STEP: usize = 256 << 10;

/// The thread that feeds a pipe.
#[derive(Debug)]
pub(crate) struct Feed {
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
    /// Set when the rest is not needed.
    stop: Arc<AtomicBool>,
    /// The wrappers that were removed, outermost first.
    pub(crate) layers: Vec<String>,
    /// What another toolstack kept with the image.
    pub(crate) origin: Option<Origin>,
    /// What is found while the image is read.
    pub(crate) found: Found,
    /// Bytes before the image.
    before: u64,
    /// Whether a compression was removed: its checksum may be at its end.
    is_compressed: bool,
    /// How many bytes of the outermost compression have been used.
    pub(crate) used: Option<Used>,
    /// What was found after the image.
    behind: Mutex<Behind>,
}

/// The bytes after the end of an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Behind {
    /// How many bytes.
    pub(crate) bytes: u64,
    /// The first of them, [`TELLING`] at most.
    pub(crate) start: Vec<u8>,
}

impl Behind {
    fn add(&mut self, bytes: &[u8]) {
        let wanted = TELLING.saturating_sub(self.start.len()).min(bytes.len());
        self.start.extend_from_slice(&bytes[..wanted]);
        self.bytes += bytes.len() as u64;
    }
}

impl Feed {
    /// Remove the wrappers of the image in `source`. Returns the pipe to read it from.
    pub(crate) fn start(source: Source, wanted: Wanted) -> Result<(StorageCursor, Self)> {
        Self::of(peel::peel(source, wanted)?)
    }

    /// The same for a connection, on which nothing after the image is read.
    pub(crate) fn start_migration(source: Source) -> Result<(StorageCursor, Self)> {
        Self::of(peel::peel_migration(source)?)
    }

    fn of(peeled: Peeled) -> Result<(StorageCursor, Self)> {
        let Peeled {
            mut source,
            layers,
            origin,
            found,
            before,
            packed,
            used,
        } = peeled;
        let is_compressed = !packed.is_empty();
        let (from, to) = nix::unistd::pipe().context("making a pipe")?;
        let (from, mut to) = (File::from(from), File::from(to));
        let from = StorageCursor::new(file::opened(from, "a pipe")?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || {
                let pumped = pump(&mut source, &mut to, &stopped);
                // If compressed data turn out to be damaged, that is why the image inside is bad.
                match pumped {
                    Err(error) if exit::code_of(&error) != Code::BadImage => Err(error),
                    pumped => peel::drain(&packed, &stopped).and(pumped),
                }
            })
            .context("starting a thread")?;
        let feed = Self {
            thread: Mutex::new(Some(thread)),
            stop,
            layers,
            origin,
            found,
            before,
            is_compressed,
            used,
            behind: Mutex::default(),
        };
        Ok((from, feed))
    }

    /// Called when the reader has reached the end of the image: reads the rest of the file and
    /// discards it, because the checksum of a compression comes last. Returns what follows the
    /// image.
    ///
    /// # Errors
    ///
    /// The thread's error; a signal asked to stop.
    pub(crate) fn finish(&self, mut pipe: &StorageCursor) -> Result<Behind> {
        let interrupt = Interrupt::of_process()?;
        let mut room = vec![0; 64 << 10];
        loop {
            let waited = pipe
                .stream_descriptor()
                .map_or(Ok(()), |fd| interrupt.wait_readable(fd));
            if let Err(error) = waited {
                self.stop();
                return Err(match error.kind() {
                    io::ErrorKind::Interrupted => RestoreError::Aborted.into(),
                    _ => error.into(),
                });
            }
            match pipe.read(&mut room) {
                Ok(0) => break,
                Ok(n) => self.behind().add(&room[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.join()?;
        Ok(self.behind().clone())
    }

    fn behind(&self) -> MutexGuard<'_, Behind> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of bytes before the image in the file, if only a header was removed; `None` if
    /// the bytes read are not the file's.
    pub(crate) fn header_bytes(&self) -> Option<u64> {
        (self.layers == ["libvirt"]).then_some(self.before)
    }

    /// Stop: no more is needed than what has been read.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The cause of `error`, which occurred while the image was read: the thread's error, or
    /// damaged compressed data, which may show only at their end. If it is neither, its offset is
    /// changed to one in the innermost compression's contents, or in the file if there is none.
    pub(crate) fn blame(&self, pipe: &StorageCursor, mut error: Error) -> Error {
        if self.is_over() {
            return error;
        }
        let is_bad_image = exit::code_of(&error) == Code::BadImage;
        if !is_bad_image || !self.is_compressed {
            self.stop();
        }
        match self.finish(pipe) {
            Err(why) if is_bad_image || exit::code_of(&why) == Code::BadImage => return why,
            // The command itself failed, or a signal asked to stop.
            Err(_) => return error,
            Ok(_) => {}
        }
        if let Some(error) = error.downcast_mut::<ReadError>() {
            error.position.offset += self.before;
        } else if let Some(RestoreError::Stream(error)) = error.downcast_mut() {
            error.position.offset += self.before;
        }
        error
    }

    /// Whether the thread has ended and its error been returned.
    fn is_over(&self) -> bool {
        let thread = self.thread.lock();
        thread.unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn join(&self) -> Result<()> {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match thread.map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::msg("the thread that reads the image panicked")),
        }
    }
}

fn pump(source: &mut Source, pipe: &mut File, stop: &AtomicBool) -> Result<()> {
    let mut room = vec![0; STEP];
    while !stop.load(Ordering::Relaxed) {
        let n = match source.read(&mut room) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(peel::unwrapped(e)),
        };
        match pipe.write_all(&room[..n]) {
            // The reader has closed the pipe.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            other => other.context("writing into a pipe")?,
        }
    }
    Ok(())
}

/// The first bytes of a stored image or a pipe, without consuming them; none for anything else.
pub(crate) fn peek(image: &StorageCursor) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(start) = image.again() {
        start.take(TELLING as u64).read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    match image.stream_descriptor() {
        Some(fd) => peek_pipe(fd),
        None => Ok(bytes),
    }
}

/// A pipe may hold only a part of them, and more a moment later.
fn peek_pipe(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    const TRIES: u32 = 100;
    let mut bytes = Vec::new();
    for _ in 0..TRIES {
        let (from, to) = nix::unistd::pipe()?;
        match tee(fd, to.as_fd(), TELLING, SpliceFFlags::empty()) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            // Not a pipe: it is read without peeking.
            Err(_) => return Ok(Vec::new()),
        }
        drop(to);
        bytes.clear();
        File::from(from).read_to_end(&mut bytes)?;
        if bytes.len() >= TELLING || bytes.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(bytes)
}
