//! Images as files: where one is read from, and how one is written so that it is
//! there whole or not at all.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{FcntlArg, fcntl};
use tempfile::NamedTempFile;

use crate::exit::BadUsage;
use crate::feed::{self, Feed};
use crate::left::Left;
use crate::peel;

/// What stands for stdin or stdout.
fn is_dash(path: &Path) -> bool {
    path.as_os_str() == OsStr::new("-")
}

/// An image that is open for reading.
#[derive(Debug)]
pub(crate) struct Input {
    /// What to read from. Never buffered: others read on where a reader stopped.
    pub(crate) file: File,
    /// What a person calls it.
    pub(crate) name: String,
    /// Its length in octets, for a file that can be sought in and stands at its start;
    /// `None` for a pipe, and for what somebody has read a part of.
    pub(crate) length: Option<u64>,
    /// Where it came from, if that was a file with a name.
    path: Option<PathBuf>,
    /// Who takes off what stands around it, if anything does.
    feed: Option<Feed>,
}

impl Input {
    /// Open a file, or stdin for `-`. What stands around the image (a compression, another
    /// toolstack's header, the legacy form) is taken off as it is read.
    pub(crate) fn open(path: &Path, lenient: bool) -> anyhow::Result<Self> {
        Self::open_as_it_is(path)?.unwrapped(lenient)
    }

    /// Open a file, or stdin for `-`, and leave on it what stands around the image.
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
        let file = File::open(path).with_context(|| name.clone())?;
        let mut input = Self::plain(file, name)?;
        input.path = input.length.is_some().then(|| path.to_owned());
        Ok(input)
    }

    /// As [`Input::open`], for who reads it more than once: what is wrapped is unwrapped
    /// into a temporary file that nobody else sees.
    pub(crate) fn open_seekable(path: &Path, lenient: bool) -> anyhow::Result<Self> {
        let input = Self::open(path, lenient)?;
        let Some(feed) = &input.feed else {
            return Ok(input);
        };
        let name = || input.name.clone();
        let mut file = tempfile::tempfile().with_context(name)?;
        io::copy(&mut &input.file, &mut file).with_context(name)?;
        feed.finish(&input.file).with_context(name)?;
        file.rewind().with_context(name)?;
        let layers = feed.layers.join(", ");
        tracing::info!("{}: unwrapped into a temporary file: {layers}", input.name);
        Self::plain(file, input.name.clone())
    }

    /// Take off what stands around the image, if anything does.
    pub(crate) fn unwrapped(self, lenient: bool) -> anyhow::Result<Self> {
        let prefix =
            feed::peek(&self.file, self.length.is_some()).with_context(|| self.name.clone())?;
        if !peel::is_wrapped(&prefix) {
            return Ok(self);
        }
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
        })
    }

    /// What was taken off, outermost first.
    pub(crate) fn layers(&self) -> &[String] {
        self.feed.as_ref().map_or(&[], |feed| &feed.layers)
    }

    /// The XML that libvirt kept with the image.
    pub(crate) fn libvirt_xml(&self) -> Option<&[u8]> {
        self.feed.as_ref()?.libvirt_xml.as_deref()
    }

    /// The image has been read to its end: whether what stood around it is good to its end,
    /// too. How many octets are behind the image, if that is known.
    pub(crate) fn finish(&self, octets: u64) -> anyhow::Result<Option<u64>> {
        match (&self.feed, self.length) {
            (Some(feed), _) => feed.finish(&self.file).map(Some),
            (None, Some(length)) => Ok(Some(length.saturating_sub(octets))),
            (None, None) => Ok(None),
        }
    }

    /// Reading the image failed: with this, or because what stood around it is bad.
    pub(crate) fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        match &self.feed {
            Some(feed) => feed.blame(&self.file, error),
            None => error,
        }
    }

    /// What comes over a connection, as it is.
    pub(crate) fn of_connection(file: File, name: String) -> Self {
        Self {
            file,
            name,
            length: None,
            path: None,
            feed: None,
        }
    }

    fn plain(mut file: File, name: String) -> anyhow::Result<Self> {
        let metadata = file.metadata().with_context(|| name.clone())?;
        if metadata.is_dir() {
            bail!("{name}: is a directory, not an image");
        }
        if metadata.file_type().is_fifo() {
            widen(&file);
        }
        let length = match metadata.is_file() && file.stream_position()? == 0 {
            true => Some(metadata.len()),
            false => None,
        };
        Ok(Self {
            file,
            name,
            length,
            path: None,
            feed: None,
        })
    }

    /// Whether [`Input::again`] works.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.length.is_some() || self.path.is_some()
    }

    /// The same file, sought to its start. (Unless something was taken off, both stand at
    /// one place: who has read from the one before must seek again.)
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
        })
    }

    /// The length; an error where the file cannot be read a second time.
    pub(crate) fn seekable(&self, why: &str) -> anyhow::Result<u64> {
        self.length.ok_or_else(|| {
            let why = format!("{}: {why}; give it as a file", self.name);
            anyhow::Error::new(BadUsage(why))
        })
    }
}

/// An image that is being written.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Under a temporary name in the directory it will stand in; removed on drop.
    Temporary {
        path: tempfile::TempPath,
        to: PathBuf,
        /// Removed by a signal, too.
        left: Left,
    },
    /// A pipe, a device, or stdout: what is written is written.
    Straight,
}

impl Output {
    /// Get ready to write to `path`; `-` is stdout.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        if is_dash(path) {
            let stdout = io::stdout();
            if stdout.is_terminal() {
                return Err(anyhow::Error::new(BadUsage(
                    "stdout is a terminal: an image would garble it; name a file".to_owned(),
                )));
            }
            let file = stdout.as_fd().try_clone_to_owned().context("stdout")?;
            return Self::straight(file.into());
        }
        Self::create_at(path).with_context(|| path.display().to_string())
    }

    fn straight(file: File) -> anyhow::Result<Self> {
        if file.metadata()?.file_type().is_fifo() {
            widen(&file);
        }
        let place = Place::Straight;
        Ok(Self { file, place })
    }

    fn create_at(path: &Path) -> anyhow::Result<Self> {
        let to = match fs::metadata(path) {
            Ok(found) if found.is_dir() => bail!("is a directory"),
            Ok(found) if is_stream(found.file_type()) || is_descriptor(path) => {
                return Self::straight(OpenOptions::new().write(true).open(path)?);
            }
            // What a link points to is replaced, not the link.
            Ok(_) => fs::canonicalize(path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(e) => return Err(e.into()),
        };
        let name = to.file_name().context("names no file")?;
        let mut prefix = OsStr::new(".").to_owned();
        prefix.push(name);
        prefix.push(".");
        // Readable by the owner alone: the image holds all of the guest's memory.
        let make = || {
            let mut temporary = tempfile::Builder::new();
            let temporary = temporary.prefix(&prefix).suffix(".partial");
            temporary.tempfile_in(directory(&to))
        };
        let (left, temporary) = Left::file(&to, make, NamedTempFile::path)
            .context("making a temporary file beside it")?;
        let (file, path) = NamedTempFile::into_parts(temporary);
        Ok(Self {
            file,
            place: Place::Temporary { path, to, left },
        })
    }

    /// What to write to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The image is complete: make it durable and give it its name.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let Place::Temporary { path, to, left } = self.place else {
            return match self.file.sync_all() {
                // A pipe or a terminal keeps nothing.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
                other => other.context("making the image durable"),
            };
        };
        let name = || to.display().to_string();
        self.file.sync_all().with_context(name)?;
        left.settle(|| path.persist(&to))
            .map_err(|e| e.error)
            .with_context(name)?;
        // The name is durable once the directory is.
        File::open(directory(&to))
            .and_then(|dir| dir.sync_all())
            .with_context(name)
    }
}

/// Let a pipe hold more than the 64 KiB it begins with: fewer turns between the two
/// processes. Where that is not allowed, it stays as it is.
pub(crate) fn widen(pipe: &File) {
    const OCTETS: i32 = 1 << 20;
    if let Err(error) = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(OCTETS)) {
        tracing::debug!(%error, "the pipe keeps its size");
    }
}

fn is_stream(kind: fs::FileType) -> bool {
    kind.is_fifo() || kind.is_char_device() || kind.is_block_device() || kind.is_socket()
}

/// Whether the path is a name for an open descriptor (`/dev/stdout`, `/dev/fd/3`):
/// who gave it wants the descriptor written, not a file replaced.
fn is_descriptor(path: &Path) -> bool {
    ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"]
        .iter()
        .any(|name| path.starts_with(name))
}

fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
