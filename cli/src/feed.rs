//! An image that is wrapped or of the legacy form, as a pipe from which the plain image can
//! be read: a thread takes off what stands around it and writes the rest into the pipe. So
//! whatever reads images from a descriptor reads these too, and needs not know.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Error, Result};
use nix::fcntl::{SpliceFFlags, tee};
use xsr_format::error::ReadError;
use xsr_save_restore::RestoreError;

use crate::file::widen;
use crate::origin::Origin;
use crate::peel::{self, Found, Peeled, Source, TELLING};

/// Octets that are moved at once.
const STEP: usize = 256 << 10;

/// The thread that feeds a pipe.
#[derive(Debug)]
pub(crate) struct Feed {
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
    /// Nobody wants the rest.
    stop: Arc<AtomicBool>,
    /// What was taken off, outermost first.
    pub(crate) layers: Vec<String>,
    /// What another toolstack kept with it.
    pub(crate) origin: Option<Origin>,
    /// What is found while it is read.
    pub(crate) found: Found,
    /// Bytes before the image.
    before: u64,
}

impl Feed {
    /// Take off what stands around the image in `source`; the pipe to read it from.
    pub(crate) fn start(source: Source, lenient: bool) -> Result<(File, Self)> {
        Self::of(peel::peel(source, lenient)?)
    }

    /// The same of a connection, on which nothing behind the image is read.
    pub(crate) fn start_migration(source: Source) -> Result<(File, Self)> {
        Self::of(peel::peel_migration(source)?)
    }

    fn of(peeled: Peeled) -> Result<(File, Self)> {
        let Peeled {
            mut source,
            layers,
            origin,
            found,
            before,
        } = peeled;
        let (from, to) = nix::unistd::pipe().context("making a pipe")?;
        let (from, mut to) = (File::from(from), File::from(to));
        widen(&from);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || pump(&mut source, &mut to, &stopped))
            .context("starting a thread")?;
        let feed = Self {
            thread: Mutex::new(Some(thread)),
            stop,
            layers,
            origin,
            found,
            before,
        };
        Ok((from, feed))
    }

    /// The reader has come to the end of the image: is the rest of what was wrapped around it
    /// good, too? How many octets are behind the image, counted up to [`STEP`].
    ///
    /// # Errors
    ///
    /// What the thread stumbled over.
    pub(crate) fn finish(&self, mut pipe: &File) -> Result<u64> {
        let mut room = vec![0; 64 << 10];
        let mut behind = 0_u64;
        loop {
            match pipe.read(&mut room) {
                Ok(0) => break,
                Ok(n) => behind += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
            if behind > STEP as u64 {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        self.join().map(|()| behind)
    }

    /// Reading the image failed with `error`: was that the thread's fault? If not, its place is
    /// made that in what the innermost compression holds: the file, if there is none.
    pub(crate) fn blame(&self, pipe: &File, mut error: Error) -> Error {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(why) = self.finish(pipe) {
            return why;
        }
        if let Some(error) = error.downcast_mut::<ReadError>() {
            error.position.offset += self.before;
        } else if let Some(RestoreError::Stream(error)) = error.downcast_mut() {
            error.position.offset += self.before;
        }
        error
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
            // Nobody reads on.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            other => other.context("writing into a pipe")?,
        }
    }
    Ok(())
}

/// The first octets of what can be read from a file or a pipe, without taking them; nothing
/// of what is neither.
pub(crate) fn peek(file: &File, seekable: bool) -> io::Result<Vec<u8>> {
    let mut octets = vec![0; TELLING];
    if seekable {
        use std::os::unix::fs::FileExt;
        let mut n = 0;
        while n < octets.len() {
            match file.read_at(&mut octets[n..], n as u64) {
                Ok(0) => break,
                Ok(more) => n += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        octets.truncate(n);
        return Ok(octets);
    }
    peek_pipe(file)
}

/// A pipe may have a part of them only, and more a moment later.
fn peek_pipe(file: &File) -> io::Result<Vec<u8>> {
    const TRIES: u32 = 100;
    let mut octets = Vec::new();
    for _ in 0..TRIES {
        let (from, to) = nix::unistd::pipe()?;
        match tee(file, to.as_fd(), TELLING, SpliceFFlags::empty()) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            // No pipe: it is read as it is.
            Err(_) => return Ok(Vec::new()),
        }
        drop(to);
        octets.clear();
        File::from(from).read_to_end(&mut octets)?;
        if octets.len() >= TELLING || octets.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(octets)
}
