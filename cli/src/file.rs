//! Image input: a file, a pipe, or stdin, with its wrappers removed.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek as _, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::fcntl::{FcntlArg, fcntl};
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;
use xsr_format::wrapper::vhd::{self, Vhd, VhdError};
use xsr_save_restore::storage::{Opened, StorageCursor, file};

use crate::backend::phase;
use crate::exit::{self, BadImage, BadUsage};
use crate::feed::{self, Behind, Feed};
use crate::origin::Origin;
use crate::painter::Follower;
use crate::peel::{self, Kept, LeftOut, TELLING, Wanted};
use crate::terminal::Terminal;

/// Whether the path is `-`, for stdin or stdout.
pub(crate) fn is_dash(path: &Path) -> bool {
    path.as_os_str() == OsStr::new("-")
}

/// An image that is open for reading.
#[derive(Debug)]
pub(crate) struct Input {
    /// The image. Never buffered, because other readers go on where one stops.
    pub(crate) image: StorageCursor,
    /// Its name for the user, not escaped: output that shows it must escape it.
    pub(crate) name: String,
    /// Its length in bytes, for a seekable file at its start; `None` for a pipe, and for a file
    /// that has been partly read.
    pub(crate) length: Option<u64>,
    /// Its path, if it is a file with a name.
    path: Option<PathBuf>,
    /// The thread that removes the wrappers, if there are any.
    feed: Option<Feed>,
    /// The file that this thread reads, and its length, if it is not `image` itself.
    outer: Option<(StorageCursor, u64)>,
    /// Keeps the position of a file that is stdin.
    _stdin: Option<StdinPosition>,
}

impl Input {
    /// Open a file, or stdin for `-`. Wrappers of the image (a compression, another toolstack's
    /// header, the legacy form) are removed as it is read.
    pub(crate) fn open(path: &Path, lenient: bool) -> anyhow::Result<Self> {
        Self::open_as_it_is(path)?.unwrapped(lenient)
    }

    /// Open a file, or stdin for `-`, and keep the wrappers.
    pub(crate) fn open_as_it_is(path: &Path) -> anyhow::Result<Self> {
        if is_dash(path) {
            let stdin = io::stdin();
            if stdin.is_terminal() {
                return Err(anyhow::Error::new(BadUsage(
                    "stdin is a terminal: pipe an image in, or name a file".to_owned(),
                )));
            }
            let file: File = stdin.as_fd().try_clone_to_owned().context("stdin")?.into();
            let mut input = Self::plain(file::opened(file, "stdin")?, "stdin".to_owned())?;
            if input.length.is_some() {
                input._stdin = Some(StdinPosition(input.image.clone()));
            }
            return Ok(input);
        }
        let name = path.display().to_string();
        let mut input = Self::plain(file::open(path)?, name)?;
        input.path = input.length.is_some().then(|| path.to_owned());
        phase("image-open");
        Ok(input)
    }

    /// As [`Input::open`], for a caller that reads it more than once: a wrapped image is unwrapped
    /// into an unnamed temporary file, with a progress bar.
    pub(crate) fn open_seekable(
        path: &Path,
        lenient: bool,
        terminal: &Terminal,
    ) -> anyhow::Result<Self> {
        let input = Self::open(path, lenient)?;
        let Some(feed) = &input.feed else {
            return Ok(input);
        };
        let name = || input.name.clone();
        let mut file = tempfile::tempfile().with_context(name)?;
        // Checked while it is copied: of a bad image, only the part before the error is kept.
        let failed = Cell::new(None);
        let source = Tee {
            from: &input.image,
            to: &file,
            failed: &failed,
        };
        let what = "unpacking";
        let bar = match input.follow(terminal, what) {
            None => Follower::start(terminal, what, &file, None),
            bar => bar,
        };
        let options = ReadOptions { lenient, offset: 0 };
        let walked = Walk::open(source, options).and_then(|mut walk| {
            while walk.next_step()?.is_some() {}
            Ok(())
        });
        drop(bar);
        if let Some(error) = failed.take() {
            let place = std::env::temp_dir();
            return Err(anyhow::Error::new(error)).with_context(|| {
                format!(
                    "writing a temporary file in {} for the contents of {} (TMPDIR names another \
                     directory)",
                    place.display(),
                    input.name
                )
            });
        }
        walked
            .map_err(|error| input.blame(error.into()))
            .with_context(name)?;
        feed.finish(&input.image).with_context(name)?;
        file.rewind().with_context(name)?;
        let layers = feed.layers.join(", ");
        tracing::info!("{}: unwrapped into a temporary file: {layers}", input.name);
        Self::plain(file::opened(file, "a temporary file")?, input.name.clone())
    }

    /// Remove the wrappers of the image, if there are any.
    pub(crate) fn unwrapped(self, wanted: impl Into<Wanted>) -> anyhow::Result<Self> {
        let wanted = wanted.into();
        let prefix = feed::peek(&self.image).with_context(|| self.name.clone())?;
        if prefix.starts_with(&vhd::MAGIC) && self.length.is_some() {
            return self.out_of_a_vhd(wanted);
        }
        if !peel::is_wrapped(&prefix) {
            return match peel::is_foreign(&prefix) {
                true => Err(self.foreign().context(self.name)),
                false => Ok(self),
            };
        }
        let outer = self.length.map(|length| (self.image.clone(), length));
        let Self {
            image, name, path, ..
        } = self;
        let (image, feed) = Feed::start(Box::new(image), wanted).with_context(|| name.clone())?;
        Ok(Self {
            image,
            name,
            length: None,
            path,
            feed: Some(feed),
            outer,
            _stdin: self._stdin,
        })
    }

    /// The image on the disk in a dynamic VHD, as xapi exports suspend VDIs.
    fn out_of_a_vhd(self, wanted: Wanted) -> anyhow::Result<Self> {
        let name = || self.name.clone();
        let disk = match Vhd::open(self.image.clone()) {
            Ok(disk) => disk,
            Err(VhdError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(anyhow::Error::new(error).context(name()));
            }
            Err(error) => {
                (&self.image).rewind().with_context(name)?;
                let why = format!("it cannot be read as a VHD ({})", exit::words_of(&error));
                return Err(self.foreign().context(why).context(name()));
            }
        };
        let Self { name, path, .. } = self;
        let (image, mut feed) =
            Feed::start(Box::new(disk), wanted).with_context(|| name.clone())?;
        feed.layers.insert(0, "VHD".to_owned());
        Ok(Self {
            image,
            name,
            length: None,
            path,
            feed: Some(feed),
            outer: None,
            _stdin: self._stdin,
        })
    }

    /// Show how far it has been read, until the result is dropped.
    pub(crate) fn follow(&self, terminal: &Terminal, what: &'static str) -> Option<Follower> {
        let (image, length) = match (&self.outer, self.length) {
            (Some((image, length)), _) => (image.clone(), *length),
            (None, Some(length)) => (self.image.clone(), length),
            (None, None) => return None,
        };
        // A decompressor reads far ahead of the work: all of a small file at once.
        match self.feed.as_ref().and_then(|feed| feed.used.clone()) {
            Some(used) => {
                let position = move || Some(used.position());
                Follower::start_at(terminal, what, position, Some(length))
            }
            None => {
                let position = move || Some(image.position());
                Follower::start_at(terminal, what, position, Some(length))
            }
        }
    }

    /// The wrappers that were removed, outermost first.
    pub(crate) fn layers(&self) -> &[String] {
        self.feed.as_ref().map_or(&[], |feed| &feed.layers)
    }

    /// What another toolstack kept with the image.
    pub(crate) fn origin(&self) -> Option<&Origin> {
        self.feed.as_ref()?.origin.as_ref()
    }

    /// State beside the image that the image has no place for. Complete once the image has been
    /// read to its end.
    pub(crate) fn left_out(&self) -> Vec<LeftOut> {
        self.feed
            .as_ref()
            .map_or_else(Vec::new, |feed| feed.found.left_out())
    }

    /// What was kept of an image of xapi, if [`Wanted`] said so.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.feed.as_ref()?.found.kept()
    }

    /// Anomalies in the wrappers of the image. Complete once the image has been read to its end.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.feed
            .as_ref()
            .map_or_else(Vec::new, |feed| feed.found.notes())
    }

    /// The error for a file that is not an image: it says what the file is.
    fn foreign(&self) -> anyhow::Error {
        const END: u64 = 512;
        let mut last = [0; 512];
        let at = self.length.and_then(|length| length.checked_sub(END));
        if let Some(at) = at
            && self.image.read_exact_at(&mut last, at).is_ok()
            && let Some(foreign) = peel::by_its_end(&last)
        {
            let why = format!("not a saved Xen domain: it is {}", exit::described(foreign));
            return anyhow::Error::new(BadImage(why));
        }
        let mut source: peel::Source = Box::new(self.image.clone());
        peel::unreadable(&mut source, None)
    }

    /// Called when the image of `bytes` bytes has been read to its end: checks that its wrappers
    /// are good to their end, too. Returns what follows the image, if that is known.
    pub(crate) fn finish(&self, bytes: u64) -> anyhow::Result<Option<Behind>> {
        let header = self.feed.as_ref().map(Feed::header_bytes);
        let (image, length, end) = match (header, &self.outer, self.length) {
            (Some(Some(header)), Some((image, length)), _) => (image, *length, header + bytes),
            (Some(_), ..) => {
                let feed = self.feed.as_ref();
                return feed.map(|feed| feed.finish(&self.image)).transpose();
            }
            (None, _, Some(length)) => (&self.image, length, bytes),
            (None, _, None) => return Ok(None),
        };
        // If only a header was removed, nothing after the image has to be read.
        if let Some(feed) = &self.feed {
            feed.stop();
            feed.finish(&self.image)?;
        }
        let mut start = vec![0; TELLING];
        let read = image.read_at(&mut start, end).unwrap_or(0);
        start.truncate(read);
        Ok(Some(Behind {
            bytes: length.saturating_sub(end),
            start,
        }))
    }

    /// The cause of `error`, which occurred while the image was read: the error itself, or a bad
    /// wrapper.
    pub(crate) fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        match &self.feed {
            Some(feed) => feed.blame(&self.image, error),
            None => error,
        }
    }

    /// A legacy image (Xen 4.5 and before) that arrives over a connection, converted as it is read.
    /// `source` is the connection from the image's first byte on.
    pub(crate) fn converted_from(source: peel::Source, name: &str) -> anyhow::Result<Self> {
        let (image, feed) = Feed::start_migration(source)?;
        Ok(Self {
            image,
            name: name.to_owned(),
            length: None,
            path: None,
            feed: Some(feed),
            outer: None,
            _stdin: None,
        })
    }

    fn plain(opened: Opened, name: String) -> anyhow::Result<Self> {
        let image = StorageCursor::new(opened)?;
        Ok(Self {
            length: image.length(),
            image,
            name,
            path: None,
            feed: None,
            outer: None,
            _stdin: None,
        })
    }

    /// Whether [`Input::again`] works.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.length.is_some() || self.path.is_some()
    }

    /// The same image, at its start.
    pub(crate) fn again(&self) -> anyhow::Result<Self> {
        if let (Some(path), Some(_)) = (&self.path, &self.feed) {
            return Self::open(path, false);
        }
        let image = self.image.again().ok_or(io::ErrorKind::NotSeekable);
        let image = image.map_err(io::Error::from);
        Ok(Self {
            image: image.with_context(|| self.name.clone())?,
            name: self.name.clone(),
            length: self.length,
            path: self.path.clone(),
            feed: None,
            outer: None,
            _stdin: None,
        })
    }

    /// The length, or an error if the file cannot be read a second time.
    pub(crate) fn seekable(&self, why: &str) -> anyhow::Result<u64> {
        self.length.ok_or_else(|| {
            let why = format!("{}: {why}; give it as a file", self.name);
            anyhow::Error::new(BadUsage(why))
        })
    }
}

/// Leaves stdin where the image has been read to, for the program that reads it next.
#[derive(Debug)]
struct StdinPosition(StorageCursor);

impl Drop for StdinPosition {
    fn drop(&mut self) {
        if let Some(fd) = self.0.reader().and_then(|reader| reader.descriptor())
            && let Err(error) = rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(self.0.position()))
        {
            tracing::debug!(%error, "stdin keeps its position");
        }
    }
}

/// A reader that keeps a copy of what is read in a file.
struct Tee<'f> {
    from: &'f StorageCursor,
    to: &'f File,
    /// Why the copy is not complete.
    failed: &'f Cell<Option<io::Error>>,
}

impl Read for Tee<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(room)?;
        if let Err(error) = self.to.write_all(&room[..n]) {
            let kind = error.kind();
            self.failed.set(Some(error));
            return Err(kind.into());
        }
        Ok(n)
    }
}

/// Let a pipe hold more than the default 64 KiB, so that the two processes switch less often. If
/// that is not allowed, it stays as it is.
pub(crate) fn widen(pipe: &File) {
    const BYTES: i32 = 1 << 20;
    if let Err(error) = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(BYTES)) {
        tracing::debug!(%error, "the pipe keeps its size");
    }
}
