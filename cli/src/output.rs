//! The output of an image, a core or an export.
//!
//! [`FileStorage`] implements writing a file: under a temporary name, and completely or not at all.
//! This file decides what a command may write, before any work begins: whether the output would
//! overwrite the command's input or an existing file, and whether it keeps data at all.

mod room;

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, bail};
use nix::sys::stat::{major, minor};
use xsr_format::transcode::CopyError;
use xsr_save_restore::storage::file::{Begun, FileStorage, Kept, Target};
use xsr_save_restore::storage::pipe::StraightWriter;
use xsr_save_restore::storage::{
    Create, Durability, Shape, StorageCursor, StorageError, StorageWriter,
};

pub(crate) use self::room::Room;
use crate::backend::phase;
use crate::exit::{Aftermath, BadUsage, NotDurable, WriteFailed};
use crate::file::is_dash;
use crate::left;
use crate::painter::Follower;
use crate::terminal::Terminal;
use crate::text::shown_path;

/// Where a command writes, and what it may overwrite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutputPlan<'p> {
    /// The path; `-` is stdout.
    pub(crate) path: &'p Path,
    /// The command's inputs; `-` is stdin. The output must not be one of them.
    pub(crate) inputs: &'p [&'p Path],
    /// What to do with an existing file or block device of that name.
    pub(crate) existing: Existing,
    /// The guest is destroyed once the output is complete, so the output must keep data.
    pub(crate) only_copy: bool,
}

/// What to do with an existing file or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Replace it.
    Replace,
    /// Keep it, and refuse the command.
    Refuse,
}

impl Existing {
    /// According to `--force`.
    pub(crate) fn forced(force: bool) -> Self {
        match force {
            true => Self::Replace,
            false => Self::Refuse,
        }
    }
}

impl From<Existing> for xsr_save_restore::storage::Existing {
    fn from(existing: Existing) -> Self {
        match existing {
            Existing::Replace => Self::Replace,
            Existing::Refuse => Self::Refuse,
        }
    }
}

/// An output that is being written.
#[derive(Debug)]
pub(crate) struct Output {
    writer: Begun,
    /// The writer's open file, for writing pages from where they are mapped.
    file: File,
    /// Its name for the user.
    name: String,
    /// For a file: its directory.
    directory: Option<PathBuf>,
    /// For a file: whether one of its name exists.
    replaces: bool,
}

/// The program that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Us,
    Xl,
}

/// Why the mapped layout needs a regular file.
const NO_SLOTS: &str = "the mapped layout is for a regular file, in which pages have places: name \
                        one, or take --layout stream";

fn refuse<T>(why: &str) -> Result<T> {
    Err(Error::new(BadUsage(why.to_owned())))
}

/// A storage error, without the output's name, which the context adds.
fn unnamed(error: StorageError) -> Error {
    match error {
        StorageError::Refused { why, .. } => Error::new(BadUsage(why)),
        StorageError::Exists { .. } => {
            Error::new(BadUsage("exists already: --force replaces it".to_owned()))
        }
        StorageError::Unsupported { what, .. } => Error::msg(what),
        StorageError::Io { doing, source, .. } => Error::new(source).context(format!("{doing} it")),
        other => Error::new(other),
    }
}

impl Output {
    /// Prepare to write. If this fails, nothing has been written.
    ///
    /// # Errors
    ///
    /// [`BadUsage`] if the plan would lose something; the file system's error.
    pub(crate) fn open(plan: &OutputPlan<'_>) -> Result<Self> {
        let name = match is_dash(plan.path) {
            true => "stdout".to_owned(),
            false => shown_path(plan.path),
        };
        if is_dash(plan.path) {
            check_stdout(plan)?;
        }
        let named = name.clone();
        Self::open_as(plan, name, By::Us, Create::stream()).context(named)
    }

    /// The same for a file that is written at any offset.
    ///
    /// # Errors
    ///
    /// As [`Output::open`]; [`BadUsage`] if it is not a file.
    pub(crate) fn open_slots(plan: &OutputPlan<'_>) -> Result<Self> {
        let name = shown_path(plan.path);
        let slots = Create::slots();
        let opened = Self::open_as(plan, name.clone(), By::Us, slots).map_err(|error| match error
            .downcast_ref()
        {
            Some(StorageError::Unsupported { .. }) => Error::new(BadUsage(NO_SLOTS.to_owned())),
            _ => error,
        });
        opened.context(name)
    }

    /// The same for a file that xl writes.
    ///
    /// # Errors
    ///
    /// As [`Output::open`].
    pub(crate) fn open_for_xl(plan: &OutputPlan<'_>) -> Result<Self> {
        let name = shown_path(plan.path);
        let named = name.clone();
        Self::open_as(plan, name, By::Xl, Create::stream()).context(named)
    }

    fn open_as(plan: &OutputPlan<'_>, name: String, by: By, create: Create) -> Result<Self> {
        let target = match is_dash(plan.path) {
            true => Target::of_descriptor(io::stdout().as_fd().try_clone_to_owned()?.into(), "-"),
            false => Target::find(plan.path),
        };
        let target = target.map_err(unnamed)?;
        if target.descriptor() == Some(1) {
            check_stdout(plan)?;
        }
        if let Some(found) = target.found() {
            check_inputs(plan, found)?;
            check_device(plan, found)?;
        }
        let replaces = target.found().is_some();
        let directory = match target.path() {
            Some(path) => path.parent().unwrap_or(Path::new("/")).to_owned(),
            None => PathBuf::new(),
        };
        let mut storage = FileStorage::new(&directory).cleanup(Arc::new(left::Files));
        if by == By::Xl {
            storage = storage.written_by_another();
            let is_file = |found: &Metadata| found.file_type().is_file();
            if target.path().is_some() && target.found().is_none_or(is_file) {
                crate::xl::child::hold_signals()?;
            }
        }
        for (path, bytes) in target.left_by_another() {
            if bytes > 0 {
                tracing::warn!(
                    "{}: a save through xl that was killed has left it; if `xsr verify` says that \
                     it is good, it may be all that there is of its domain",
                    shown_path(&path)
                );
            }
        }
        let create = create.existing(plan.existing.into());
        let begun = storage.write(target, &create).map_err(|error| match error {
            error @ StorageError::Unsupported { .. } if create.shape == Shape::Slots => {
                Error::new(error)
            }
            error => unnamed(error),
        });
        match begun? {
            Begun::File(writer) => {
                phase("output-made");
                Ok(Self {
                    file: file_of(&writer)?,
                    writer: Begun::File(writer),
                    name,
                    directory: Some(directory),
                    replaces,
                })
            }
            Begun::Straight(writer) => {
                let output = Self::straight(writer, name)?;
                match output.file.is_terminal() {
                    true => refuse("is a terminal, which an image would garble: name a file"),
                    false => Ok(output),
                }
            }
        }
    }

    fn straight(writer: StraightWriter, name: String) -> Result<Self> {
        Ok(Self {
            file: file_of(&writer)?,
            writer: Begun::Straight(writer),
            name,
            directory: None,
            replaces: false,
        })
    }

    /// An inherited descriptor, of any kind.
    ///
    /// # Errors
    ///
    /// Its metadata cannot be read.
    pub(crate) fn of_descriptor(file: File, name: String) -> Result<Self> {
        let writer = StraightWriter::new(file, &name).map_err(unnamed)?;
        Self::straight(writer, name)
    }

    /// The storage's writer.
    pub(crate) fn writer(&self) -> &dyn StorageWriter {
        match &self.writer {
            Begun::File(writer) => writer,
            Begun::Straight(writer) => writer,
        }
    }

    /// The file to write to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its name for the user.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Show how much has been written, until the result is dropped. `total` bytes, if that is
    /// known.
    pub(crate) fn follow(
        &self,
        terminal: &Terminal,
        what: &'static str,
        total: Option<u64>,
    ) -> Option<Follower> {
        Follower::start(terminal, what, &self.file, total)
    }

    /// Whether it is the same file as stdout.
    pub(crate) fn is_stdout(&self) -> bool {
        let stdout = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let stdout = stdout.and_then(|stdout| stdout.metadata());
        match (self.file.metadata(), stdout) {
            (Ok(own), Ok(stdout)) => {
                (own.dev(), own.ino(), own.rdev()) == (stdout.dev(), stdout.ino(), stdout.rdev())
            }
            _ => false,
        }
    }

    /// Refuse `--json` if its document would go to the same file.
    ///
    /// # Errors
    ///
    /// [`BadUsage`].
    pub(crate) fn check_json(&self, json: bool) -> Result<()> {
        match json && self.is_stdout() {
            true => refuse("--json and the output would both go to stdout: give a file"),
            false => Ok(()),
        }
    }

    /// The state of the output after a failure.
    pub(crate) fn aftermath(&self) -> String {
        match &self.writer {
            Begun::File(_) if self.replaces => format!("{} is as it was before", self.name),
            Begun::File(_) => "no file was written".to_owned(),
            Begun::Straight(_) => format!("what {} got is incomplete", self.name),
        }
    }

    /// Refuse if there is certainly no room for this many bytes.
    ///
    /// # Errors
    ///
    /// The output, what it needs and what is free.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<()> {
        let directory = self.directory.as_deref();
        room::check(&self.file, directory, bytes).with_context(|| self.name.clone())
    }

    /// Do work that fills it. If it succeeds, the output is complete and durable. Also returns the
    /// number of bytes written.
    ///
    /// # Errors
    ///
    /// The work's error; [`WriteFailed`] if the output failed, however the work reports that. Both
    /// say what state the output is in. [`NotDurable`] as [`Output::finish`].
    pub(crate) fn fill<T>(self, work: impl FnOnce(&mut Sink<'_>) -> Result<T>) -> Result<(T, u64)> {
        let after = self.aftermath();
        let mut this = self;
        let (is_new, writer): (bool, &mut dyn StorageWriter) = match &mut this.writer {
            Begun::File(writer) => (true, writer),
            Begun::Straight(writer) => (false, writer),
        };
        let mut sink = Sink {
            writer,
            file: &this.file,
            bytes: 0,
            failed: None,
            is_new,
        };
        let done = work(&mut sink);
        let (bytes, failed) = (sink.bytes, sink.failed);
        let done = match (done, failed) {
            (Ok(done), _) => this.finish().map(|()| (done, bytes)),
            (Err(_), Some(error)) => Err(Error::new(WriteFailed {
                output: this.name.clone(),
                error,
            })),
            (Err(error), None) => Err(error),
        };
        done.map_err(|error| match error.is::<NotDurable>() {
            true => error,
            false => Aftermath::of(error, after),
        })
    }

    /// Whether it is a new file, in which data have offsets and what was not written is a hole.
    pub(crate) fn is_new_file(&self) -> bool {
        matches!(self.writer, Begun::File(_))
    }

    /// Its temporary name, if it has one.
    pub(crate) fn temporary(&self) -> Option<&Path> {
        match &self.writer {
            Begun::File(writer) => writer.temporary(),
            Begun::Straight(_) => None,
        }
    }

    /// Keep the file under its temporary name. Returns that.
    ///
    /// # Errors
    ///
    /// It has no temporary name.
    pub(crate) fn keep(self) -> Result<PathBuf> {
        let kept = match self.writer {
            Begun::File(mut writer) => writer.keep(),
            Begun::Straight(_) => None,
        };
        kept.with_context(|| format!("{} has no temporary name", self.name))
    }

    /// As [`Output::finish`], for data that must not be lost: if the file cannot be renamed, it
    /// stays under the temporary name.
    ///
    /// # Errors
    ///
    /// [`NotDurable`] as [`Output::finish`]; otherwise the failure, and where the file is.
    pub(crate) fn finish_or_keep(self) -> Result<()> {
        let Self { writer, name, .. } = self;
        let Begun::File(writer) = writer else {
            return Ok(());
        };
        phase("output-complete");
        let kept = writer.commit_or_keep(Durability::Durable);
        kept.map_err(|kept| {
            let Kept { error, at } = *kept;
            match error {
                StorageError::NotDurable { source, .. } => Error::new(NotDurable {
                    output: name,
                    error: source,
                }),
                error => Aftermath::of(
                    Error::new(WriteFailed {
                        output: name,
                        error: io_error(error),
                    }),
                    format!("the image is complete: it is {}", shown_path(&at)),
                ),
            }
        })
    }

    /// The output is complete: make it durable and give it its name.
    ///
    /// # Errors
    ///
    /// [`WriteFailed`]: the file was not renamed, and an existing file of that name is unchanged.
    /// [`NotDurable`]: the output is complete and has its name, but may not survive a power cut.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { writer, name, .. } = self;
        let committed = match writer {
            Begun::File(writer) => {
                phase("output-complete");
                let committed = Box::new(writer).commit(Durability::Durable);
                if matches!(committed, Ok(()) | Err(StorageError::NotDurable { .. })) {
                    phase("output-named");
                }
                committed
            }
            Begun::Straight(writer) => Box::new(writer).commit(Durability::Durable),
        };
        committed.map_err(|error| match error {
            StorageError::NotDurable { source, .. } => Error::new(NotDurable {
                output: name,
                error: source,
            }),
            error => Error::new(WriteFailed {
                output: name,
                error: io_error(error),
            }),
        })
    }
}

/// The open file that a writer writes to.
fn file_of(writer: &dyn StorageWriter) -> io::Result<File> {
    let file = writer.descriptor().ok_or(io::ErrorKind::Unsupported)?;
    Ok(file.try_clone_to_owned()?.into())
}

/// The system's error.
fn io_error(error: StorageError) -> io::Error {
    match error {
        StorageError::Exists { .. } => io::Error::new(
            io::ErrorKind::AlreadyExists,
            "another file has just got its name: --force replaces it",
        ),
        other => other.into(),
    }
}

/// Refuse if stdout was closed when the command began. The descriptor is now `/dev/null` of Rust's
/// runtime.
fn check_stdout(plan: &OutputPlan<'_>) -> Result<()> {
    if !xsr_stdio::stdout_was_closed() {
        return Ok(());
    }
    match (plan.only_copy, plan.inputs) {
        (true, _) => refuse(
            "stdout is closed: the domain would be destroyed and its image lost; -c or -p keeps \
             the domain",
        ),
        // A save after which the domain still exists.
        (false, []) => Ok(()),
        (false, _) => bail!("stdout is closed"),
    }
}

/// Refuse an output that is one of the command's inputs.
fn check_inputs(plan: &OutputPlan<'_>, output: &Metadata) -> Result<()> {
    let identity = identity(output);
    if identity.is_none() {
        return Ok(());
    }
    for input in plan.inputs {
        let found = match is_dash(input) {
            true => File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata(),
            false => fs::metadata(input),
        };
        // If an input does not exist, its reader reports that.
        if found.is_ok_and(|found| self::identity(&found) == identity) {
            return refuse(&format!(
                "is the same file as the input {}: give another name",
                match is_dash(input) {
                    true => "stdin".to_owned(),
                    false => shown_path(input),
                }
            ));
        }
    }
    Ok(())
}

/// Identifies a file that keeps data; `None` for other kinds.
fn identity(found: &Metadata) -> Option<(bool, u64, u64)> {
    let kind = found.file_type();
    match (kind.is_file(), kind.is_block_device()) {
        (true, _) => Some((true, found.dev(), found.ino())),
        (_, true) => match behind_loop(Path::new("/sys/dev/block"), found.rdev()) {
            // A loop device keeps its data in a file.
            Some(file) => identity(&file),
            _ => Some((false, found.rdev(), 0)),
        },
        _ => None,
    }
}

/// The file of a loop device, or of the device that a partition is part of; `None` for any other.
/// `devices` is a directory with a link for each block device.
fn behind_loop(devices: &Path, device: u64) -> Option<Metadata> {
    let device = devices.join(format!("{}:{}", major(device), minor(device)));
    let whole = match device.join("partition").exists() {
        true => device.canonicalize().ok()?.parent()?.to_owned(),
        false => device,
    };
    let file = fs::read_to_string(whole.join("loop/backing_file")).ok()?;
    fs::metadata(file.trim_end_matches('\n')).ok()
}

/// The major number of memory devices: null, zero, full, random.
const MEMORY_DEVICES: u64 = 1;

/// Refuse to destroy a guest for a device that does not keep data.
fn check_device(plan: &OutputPlan<'_>, output: &Metadata) -> Result<()> {
    let device = output.rdev();
    // Writing to /dev/full fails, so nothing is lost.
    let lost = output.file_type().is_char_device()
        && major(device) == MEMORY_DEVICES
        && minor(device) != 7;
    if !lost || !plan.only_copy {
        return Ok(());
    }
    let what = match minor(device) {
        3 => "is /dev/null,",
        _ => "is a device",
    };
    refuse(&format!(
        "{what} which keeps nothing: the domain would be destroyed and its image lost; -c or -p \
         keeps the domain"
    ))
}

/// Zeros per write, if holes are not possible.
const ZEROS: usize = 1 << 20;

/// Writes to an output, counts the bytes, and remembers a failure.
#[derive(Debug)]
pub(crate) struct Sink<'o> {
    writer: &'o mut dyn StorageWriter,
    /// Its open file.
    file: &'o File,
    bytes: u64,
    failed: Option<io::Error>,
    is_new: bool,
}

/// A copy of an error.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

impl Sink<'_> {
    /// The file, for other ways of writing.
    pub(crate) fn file(&self) -> &File {
        self.file
    }

    /// Whether it may have holes: it is a new file that only this command writes, from its start.
    pub(crate) fn takes_holes(&self) -> bool {
        self.is_new
    }

    /// Whether writing to it has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Skip `bytes`, which read as zeros and take no space. Only if it takes holes; something must
    /// be written after the last hole.
    pub(crate) fn leave_hole(&mut self, bytes: u64) -> io::Result<()> {
        let by = i64::try_from(bytes).map_err(io::Error::other)?;
        let mut file = self.file;
        let moved = file.seek(SeekFrom::Current(by));
        self.remember(moved)?;
        self.bytes += bytes;
        Ok(())
    }

    /// Write `bytes` zeros.
    pub(crate) fn write_zeros(&mut self, bytes: u64) -> io::Result<()> {
        let mut zeros =
            BufWriter::with_capacity(ZEROS.min(bytes.try_into().unwrap_or(ZEROS)), self);
        io::copy(&mut io::repeat(0).take(bytes), &mut zeros)?;
        zeros.flush()
    }

    fn remember<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            self.failed.get_or_insert_with(|| copy_of(error));
        }
        result
    }

    /// Copy `bytes`, or as many as there are, from an image, in the kernel where possible.
    pub(crate) fn copy(&mut self, source: &StorageCursor, bytes: u64) -> io::Result<u64> {
        match source.copy_to(self.file, bytes) {
            Ok(copied) => {
                self.bytes += copied;
                Ok(copied)
            }
            Err(CopyError::Write(error)) => self.remember(Err(error)),
            Err(CopyError::Read(error)) => Err(error),
        }
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        phase("output-written");
        let result = self.writer.write(bytes);
        let n = match result {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            result => self.remember(result)?,
        };
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
