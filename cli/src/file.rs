//! Image input: a file, a pipe, or stdin, with its wrappers removed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, FileTypeExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{FcntlArg, fcntl};
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;
use xsr_format::wrapper::vhd::{self, Vhd, VhdError};
use xsr_save_restore::storage::file::check_readable;

use crate::exit::{self, BadImage, BadUsage};
use crate::feed::{self, Behind, Feed};
use crate::origin::Origin;
use crate::painter::Follower;
use crate::peel::{self, LeftOut, TELLING};
use crate::terminal::Terminal;

/// Whether the path is `-`, for stdin or stdout.
pub(crate) fn is_dash(path: &Path) -> bool {
    path.as_os_str() == OsStr::new("-")
}

/// An image that is open for reading.
#[derive(Debug)]
pub(crate) struct Input {
    /// The descriptor to read. Never buffered, because other readers go on where one stops.
    pub(crate) file: File,
    /// Its name for the user, not escaped: output that shows it must escape it.
    pub(crate) name: String,
    /// Its length in bytes, for a seekable file at its start; `None` for a pipe, and for a file
    /// that has been partly read.
    pub(crate) length: Option<u64>,
    /// Its path, if it is a file with a name.
    path: Option<PathBuf>,
    /// The thread that removes the wrappers, if there are any.
    feed: Option<Feed>,
    /// The file that this thread reads, and its length, if it is not `file` itself.
    outer: Option<(File, u64)>,
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
            let file = stdin.as_fd().try_clone_to_owned().context("stdin")?.into();
            return Self::plain(file, "stdin".to_owned());
        }
        let name = path.display().to_string();
        check_readable(path)?;
        let file = File::open(path).with_context(|| name.clone())?;
        let mut input = Self::plain(file, name)?;
        input.path = input.length.is_some().then(|| path.to_owned());
        Ok(input)
    }

    /// As [`Input::open`], for a caller that reads it more than once: a wrapped image is unwrapped
    /// into an unnamed temporary file.
    pub(crate) fn open_seekable(path: &Path, lenient: bool) -> anyhow::Result<Self> {
        let input = Self::open(path, lenient)?;
        let Some(feed) = &input.feed else {
            return Ok(input);
        };
        let name = || input.name.clone();
        let mut file = tempfile::tempfile().with_context(name)?;
        // Checked while it is copied: of a bad image, only the part before the error is kept.
        let source = Tee {
            from: &input.file,
            to: &file,
        };
        let options = ReadOptions { lenient, offset: 0 };
        Walk::open(source, options)
            .and_then(|mut walk| {
                while walk.next_step()?.is_some() {}
                Ok(())
            })
            .map_err(|error| input.blame(error.into()))
            .with_context(name)?;
        feed.finish(&input.file).with_context(name)?;
        file.rewind().with_context(name)?;
        let layers = feed.layers.join(", ");
        tracing::info!("{}: unwrapped into a temporary file: {layers}", input.name);
        Self::plain(file, input.name.clone())
    }

    /// Remove the wrappers of the image, if there are any.
    pub(crate) fn unwrapped(self, lenient: bool) -> anyhow::Result<Self> {
        let prefix =
            feed::peek(&self.file, self.length.is_some()).with_context(|| self.name.clone())?;
        if prefix.starts_with(&vhd::MAGIC) && self.length.is_some() {
            return self.out_of_a_vhd(lenient);
        }
        if !peel::is_wrapped(&prefix) {
            return match peel::is_foreign(&prefix) {
                true => Err(self.foreign().context(self.name)),
                false => Ok(self),
            };
        }
        let outer = self
            .length
            .and_then(|length| Some((self.file.try_clone().ok()?, length)));
        let Self {
            file, name, path, ..
        } = self;
        let (file, feed) = Feed::start(Box::new(file), lenient).with_context(|| name.clone())?;
        Ok(Self {
            file,
            name,
            length: None,
            path,
            feed: Some(feed),
            outer,
        })
    }

    /// The image on the disk in a dynamic VHD, as xapi exports suspend VDIs.
    fn out_of_a_vhd(self, lenient: bool) -> anyhow::Result<Self> {
        let name = || self.name.clone();
        let own = self.file.try_clone().with_context(name)?;
        let disk = match Vhd::open(own) {
            Ok(disk) => disk,
            Err(VhdError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(anyhow::Error::new(error).context(name()));
            }
            Err(error) => {
                (&self.file).rewind().with_context(name)?;
                let why = format!("it cannot be read as a VHD ({})", exit::words_of(&error));
                return Err(self.foreign().context(why).context(name()));
            }
        };
        let Self { name, path, .. } = self;
        let (file, mut feed) =
            Feed::start(Box::new(disk), lenient).with_context(|| name.clone())?;
        feed.layers.insert(0, "VHD".to_owned());
        Ok(Self {
            file,
            name,
            length: None,
            path,
            feed: Some(feed),
            outer: None,
        })
    }

    /// Show how far it has been read, until the result is dropped.
    pub(crate) fn follow(&self, terminal: &Terminal, what: &'static str) -> Option<Follower> {
        let (file, length) = match (&self.outer, self.length) {
            (Some((file, length)), _) => (file, *length),
            (None, Some(length)) => (&self.file, length),
            (None, None) => return None,
        };
        // A decompressor reads far ahead of the work: all of a small file at once.
        match self.feed.as_ref().and_then(|feed| feed.used.clone()) {
            Some(used) => {
                let position = move || Some(used.position());
                Follower::start_at(terminal, what, position, Some(length))
            }
            None => Follower::start(terminal, what, file, Some(length)),
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
            && self.file.read_exact_at(&mut last, at).is_ok()
            && let Some(foreign) = peel::by_its_end(&last)
        {
            let why = format!("not a saved Xen domain: it is {foreign}");
            return anyhow::Error::new(BadImage(why));
        }
        match self.file.try_clone() {
            Ok(file) => {
                let mut source: peel::Source = Box::new(file);
                peel::unreadable(&mut source, None)
            }
            Err(error) => error.into(),
        }
    }

    /// Called when the image of `bytes` bytes has been read to its end: checks that its wrappers
    /// are good to their end, too. Returns what follows the image, if that is known.
    pub(crate) fn finish(&self, bytes: u64) -> anyhow::Result<Option<Behind>> {
        let header = self.feed.as_ref().map(Feed::header_bytes);
        let (file, length, end) = match (header, &self.outer, self.length) {
            (Some(Some(header)), Some((file, length)), _) => (file, *length, header + bytes),
            (Some(_), ..) => {
                let feed = self.feed.as_ref();
                return feed.map(|feed| feed.finish(&self.file)).transpose();
            }
            (None, _, Some(length)) => (&self.file, length, bytes),
            (None, _, None) => return Ok(None),
        };
        // If only a header was removed, nothing after the image has to be read.
        if let Some(feed) = &self.feed {
            feed.stop();
            feed.finish(&self.file)?;
        }
        let mut start = vec![0; TELLING];
        let read = file.read_at(&mut start, end).unwrap_or(0);
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
            Some(feed) => feed.blame(&self.file, error),
            None => error,
        }
    }

    /// A legacy image (Xen 4.5 and before) that arrives over a connection, converted as it is read.
    /// `source` is the connection from the image's first byte on.
    pub(crate) fn converted_from(source: peel::Source, name: &str) -> anyhow::Result<Self> {
        let (file, feed) = Feed::start_migration(source)?;
        Ok(Self {
            file,
            name: name.to_owned(),
            length: None,
            path: None,
            feed: Some(feed),
            outer: None,
        })
    }

    fn plain(mut file: File, name: String) -> anyhow::Result<Self> {
        let metadata = file.metadata().with_context(|| name.clone())?;
        if metadata.is_dir() {
            bail!("{name}: is a directory, not an image");
        }
        if metadata.file_type().is_fifo() {
            widen(&file);
        }
        let is_block_device = metadata.file_type().is_block_device();
        let has_length = metadata.is_file() || is_block_device;
        let length = match has_length && file.stream_position()? == 0 {
            // Of a device, the metadata report length 0.
            true if is_block_device => {
                let end = file.seek(SeekFrom::End(0));
                let length = end.with_context(|| name.clone())?;
                file.rewind().with_context(|| name.clone())?;
                Some(length)
            }
            true => Some(metadata.len()),
            false => None,
        };
        Ok(Self {
            file,
            name,
            length,
            path: None,
            feed: None,
            outer: None,
        })
    }

    /// Whether [`Input::again`] works.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.length.is_some() || self.path.is_some()
    }

    /// The same file, at its start. (Unless wrappers were removed, both share one file offset: a
    /// reader of the first must seek again.)
    pub(crate) fn again(&self) -> anyhow::Result<Self> {
        if let (Some(path), Some(_)) = (&self.path, &self.feed) {
            return Self::open(path, false);
        }
        let mut file = self.file.try_clone().with_context(|| self.name.clone())?;
        file.rewind().with_context(|| self.name.clone())?;
        Ok(Self {
            file,
            name: self.name.clone(),
            length: self.length,
            path: self.path.clone(),
            feed: None,
            outer: None,
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

/// A reader that keeps a copy of what is read in a file.
struct Tee<'f> {
    from: &'f File,
    to: &'f File,
}

impl Read for Tee<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(room)?;
        let kept = self.to.write_all(&room[..n]);
        kept.map_err(|e| io::Error::new(e.kind(), format!("writing a temporary file: {e}")))?;
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
