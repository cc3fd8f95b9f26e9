//! Where an image, a core or an export is written to.
//!
//! A file appears whole or not at all: it is written under a temporary name beside its own, made
//! durable, and renamed. Pipes, devices and stdout are written straight. An output is looked at
//! before any work begins: whether it would overwrite what the command reads, or a file that is
//! there; whether it is somebody else's link or pipe; whether it keeps anything at all.

mod leftover;
mod path;
mod room;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _, Seek as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};

use xsr_xen_backend::mock::phase;

use self::leftover::Temporary;
use self::path::Found;
pub(crate) use self::path::{check_input, inherited};
use crate::exit::{Aftermath, BadUsage, WriteFailed};
use crate::file::{is_dash, widen};
use crate::left::Left;
use crate::painter::Follower;
use crate::terminal::Terminal;
use crate::text::shown_path;

/// Where a command is to write, and what it may overwrite for that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'p> {
    /// The path; `-` is stdout.
    pub(crate) path: &'p Path,
    /// What the command reads; `-` is stdin. The output must be none of it.
    pub(crate) inputs: &'p [&'p Path],
    /// What becomes of an existing file or block device of that name.
    pub(crate) existing: Existing,
    /// A guest is given up once the output is complete: it must be something that keeps it.
    pub(crate) only_copy: bool,
}

/// What becomes of an existing file or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It is replaced.
    Replace,
    /// It stays, and the command is refused.
    Refuse,
}

impl Existing {
    /// What `--force` says.
    pub(crate) fn forced(force: bool) -> Self {
        match force {
            true => Self::Replace,
            false => Self::Refuse,
        }
    }
}

/// Something that is being written.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    /// What a person calls it.
    name: String,
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
        /// Whether there is a file of its name.
        replaces: bool,
    },
    /// A pipe, a device, or stdout: what is written is written.
    Straight,
}

fn refuse<T>(why: &str) -> Result<T> {
    Err(Error::new(BadUsage(why.to_owned())))
}

impl Output {
    /// Get ready to write. Nothing has been written when this fails.
    ///
    /// # Errors
    ///
    /// [`BadUsage`] if the plan would lose something; what the file system says.
    pub(crate) fn open(plan: &Plan<'_>) -> Result<Self> {
        let name = match is_dash(plan.path) {
            true => "stdout".to_owned(),
            false => shown_path(plan.path),
        };
        if is_dash(plan.path) {
            check_stdout(plan)?;
        }
        let named = name.clone();
        Self::open_as(plan, name, Temporary::Ours).context(named)
    }

    /// The same, for a file that xl writes.
    ///
    /// # Errors
    ///
    /// As [`Output::open`].
    pub(crate) fn open_for_xl(plan: &Plan<'_>) -> Result<Self> {
        let name = shown_path(plan.path);
        let named = name.clone();
        Self::open_as(plan, name, Temporary::Xls).context(named)
    }

    fn open_as(plan: &Plan<'_>, name: String, whose: Temporary) -> Result<Self> {
        if is_dash(plan.path) {
            let file = io::stdout().as_fd().try_clone_to_owned()?.into();
            return Self::descriptor(plan, file, name);
        }
        let path = match path::find(plan.path)? {
            Found::Descriptor(file, number) => {
                if number == 1 {
                    check_stdout(plan)?;
                }
                return Self::descriptor(plan, file, name);
            }
            Found::Path(path) => path,
        };
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => Some(found),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e.into()),
        };
        if let Some(found) = &found {
            check_inputs(plan, found)?;
            let kind = found.file_type();
            if kind.is_dir() {
                bail!("is a directory");
            }
            let replaced = kind.is_file() || kind.is_block_device();
            if replaced && plan.existing == Existing::Refuse {
                return refuse("exists already: --force replaces it");
            }
            if kind.is_fifo() || kind.is_socket() {
                path::check_owner(found)?;
            }
            if !kind.is_file() {
                check_device(plan, found)?;
                let file = OpenOptions::new()
                    .write(true)
                    .custom_flags(OFlag::O_NOFOLLOW.bits())
                    .open(&path)?;
                let opened = file.metadata()?;
                if (opened.dev(), opened.ino()) != (found.dev(), found.ino()) {
                    bail!("another file has just taken its place");
                }
                return Self::straight(file, name);
            }
        }
        if matches!(whose, Temporary::Xls) {
            crate::xl::child::hold_signals()?;
        }
        let (left, file, temporary) = leftover::temporary(&path, whose)?;
        phase("output-made");
        let place = Place::Temporary {
            path: temporary,
            left,
            to: path,
            replaces: found.is_some(),
        };
        Ok(Self { file, name, place })
    }

    /// What this process has open already.
    fn descriptor(plan: &Plan<'_>, file: File, name: String) -> Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        if flags & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return refuse("is not open for writing");
        }
        let found = file.metadata()?;
        check_inputs(plan, &found)?;
        check_device(plan, &found)?;
        Self::straight(file, name)
    }

    fn straight(file: File, name: String) -> Result<Self> {
        if file.is_terminal() {
            return refuse("is a terminal, which an image would garble: name a file");
        }
        if file.metadata()?.file_type().is_fifo() {
            widen(&file);
        }
        let place = Place::Straight;
        Ok(Self { file, name, place })
    }

    /// A descriptor that this process was given, for whatever it is.
    pub(crate) fn of_descriptor(file: File, name: String) -> Self {
        let place = Place::Straight;
        Self { file, name, place }
    }

    /// What to write to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What a person calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Show how far writing it is, for as long as the answer is there; `total` bytes, if that is
    /// known.
    pub(crate) fn follow(
        &self,
        terminal: &Terminal,
        what: &'static str,
        total: Option<u64>,
    ) -> Option<Follower> {
        Follower::start(terminal, what, &self.file, total)
    }

    /// Whether it goes where results go, too.
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

    /// Refuse where results as JSON would go to the same place.
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

    /// What there is under its name when the work fails.
    pub(crate) fn aftermath(&self) -> String {
        match &self.place {
            Place::Temporary { replaces: true, .. } => format!("{} is as it was before", self.name),
            Place::Temporary { .. } => "no file was written".to_owned(),
            Place::Straight => format!("what {} got is incomplete", self.name),
        }
    }

    /// Refuse where there is certainly no room for so many bytes.
    ///
    /// # Errors
    ///
    /// The output, what it needs and what is free.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<()> {
        let directory = match &self.place {
            Place::Temporary { to, .. } => Some(path::directory(to)),
            Place::Straight => None,
        };
        room::check(&self.file, directory, bytes).with_context(|| self.name.clone())
    }

    /// Do work that fills it; where that succeeds, the output is complete and durable. Also says
    /// how many bytes were written.
    ///
    /// # Errors
    ///
    /// What the work says; [`WriteFailed`] if it was the output that failed, whatever the work
    /// took it for. Either says what there is under the output's name.
    pub(crate) fn fill<T>(self, work: impl FnOnce(&mut Sink<'_>) -> Result<T>) -> Result<(T, u64)> {
        let mut sink = Sink {
            file: &self.file,
            bytes: 0,
            failed: None,
            is_new: matches!(self.place, Place::Temporary { .. }),
        };
        let done = work(&mut sink);
        let (bytes, failed) = (sink.bytes, sink.failed);
        let after = self.aftermath();
        let done = match (done, failed) {
            (Ok(done), _) => self.finish().map(|()| (done, bytes)),
            (Err(_), Some(error)) => Err(Error::new(WriteFailed {
                output: self.name.clone(),
                error,
            })),
            (Err(error), None) => Err(error),
        };
        done.map_err(|error| Aftermath::of(error, after))
    }

    /// Its temporary name, if it has one.
    pub(crate) fn temporary(&self) -> Option<&Path> {
        match &self.place {
            Place::Temporary { path, .. } => Some(path),
            Place::Straight => None,
        }
    }

    /// Leave what there is under its temporary name; which that is.
    ///
    /// # Errors
    ///
    /// It has none.
    pub(crate) fn keep(self) -> Result<PathBuf> {
        match self.place {
            Place::Temporary { path, .. } => Ok(path.keep()?),
            Place::Straight => bail!("{} has no temporary name", self.name),
        }
    }

    /// As [`Output::finish`], of what must not be lost: where it cannot get its name, it stays
    /// under the temporary one.
    ///
    /// # Errors
    ///
    /// What failed, and where the file is.
    pub(crate) fn finish_or_keep(self) -> Result<(), Kept> {
        let Place::Temporary { path, to, .. } = self.place else {
            return Ok(());
        };
        let kept = |error, at: &Path| Kept {
            error,
            at: at.to_owned(),
        };
        if let Err(error) = self.file.sync_all() {
            let at = path.keep().map_err(|e| kept(e.error, &e.path))?;
            return Err(kept(error, &at));
        }
        if let Err(failed) = path.persist(&to) {
            let at = failed.path.keep().map_err(|e| kept(e.error, &e.path))?;
            return Err(kept(failed.error, &at));
        }
        File::open(path::directory(&to))
            .and_then(|dir| dir.sync_all())
            .map_err(|error| kept(error, &to))
    }

    /// The output is complete: make it durable and give it its name.
    ///
    /// # Errors
    ///
    /// [`WriteFailed`]: an existing file of its name is as it was.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { file, name, place } = self;
        let failed = |error| {
            let output = name.clone();
            Error::new(WriteFailed { output, error })
        };
        let synced = match file.sync_all() {
            // A pipe or a terminal keeps nothing.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other,
        };
        synced.map_err(failed)?;
        if let Place::Temporary { path, to, left, .. } = place {
            phase("output-complete");
            left.settle(|| path.persist(&to))
                .map_err(|e| failed(e.error))?;
            phase("output-named");
            // The name is durable once the directory is.
            File::open(path::directory(&to))
                .and_then(|dir| dir.sync_all())
                .map_err(failed)?;
        }
        Ok(())
    }
}

/// A complete file that could not be given its name.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) error: io::Error,
    /// Where it is.
    pub(crate) at: PathBuf,
}

/// Whether stdout was closed when the command began. What is open there now is the `/dev/null` of
/// Rust's runtime.
fn check_stdout(plan: &Plan<'_>) -> Result<()> {
    if !xsr_stdio::stdout_was_closed() {
        return Ok(());
    }
    match (plan.only_copy, plan.inputs) {
        (true, _) => refuse(
            "stdout is closed: the domain would be destroyed and its image lost; -c or -p keeps \
             the domain",
        ),
        // A save after which the domain is still there.
        (false, []) => Ok(()),
        (false, _) => bail!("stdout is closed"),
    }
}

/// Whether the output is something that the command reads.
fn check_inputs(plan: &Plan<'_>, output: &Metadata) -> Result<()> {
    let identity = identity(output);
    if identity.is_none() {
        return Ok(());
    }
    for input in plan.inputs {
        let found = match is_dash(input) {
            true => File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata(),
            false => fs::metadata(input),
        };
        // An input that is not there is for its reader to complain of.
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

/// What makes two files one, where that matters: those that keep what is written to them.
fn identity(found: &Metadata) -> Option<(bool, u64, u64)> {
    let kind = found.file_type();
    match (kind.is_file(), kind.is_block_device()) {
        (true, _) => Some((true, found.dev(), found.ino())),
        (_, true) => Some((false, found.rdev(), 0)),
        _ => None,
    }
}

/// The major number of the devices of memory: null, zero, full, random.
const MEMORY_DEVICES: u64 = 1;

/// Whether a guest would be given up for a device that keeps nothing.
fn check_device(plan: &Plan<'_>, output: &Metadata) -> Result<()> {
    let device = output.rdev();
    // Writing to /dev/full fails, so that nothing is lost for it.
    let lost = output.file_type().is_char_device()
        && major(device) == MEMORY_DEVICES
        && minor(device) != 7;
    if !lost || !plan.only_copy {
        return Ok(());
    }
    let what = match (minor(device), is_dash(plan.path)) {
        (3, true) => "is /dev/null,",
        (3, false) => "is /dev/null,",
        _ => "is a device",
    };
    refuse(&format!(
        "{what} which keeps nothing: the domain would be destroyed and its image lost; -c or -p \
         keeps the domain"
    ))
}

/// Writes to an output, counts, and remembers what failed.
#[derive(Debug)]
pub(crate) struct Sink<'o> {
    file: &'o File,
    bytes: u64,
    failed: Option<io::Error>,
    is_new: bool,
}

/// The same error again.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

impl Sink<'_> {
    /// The file, for whoever writes to it in another way.
    pub(crate) fn file(&self) -> &File {
        self.file
    }

    /// Whether there may be holes in it: it is a new file of this command alone, which is written
    /// from its start.
    pub(crate) fn takes_holes(&self) -> bool {
        self.is_new
    }

    /// Whether writing to it has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    fn remember<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            self.failed.get_or_insert_with(|| copy_of(error));
        }
        result
    }

    /// Copy so many bytes, or as many as there are, from a file; by the kernel where it can.
    pub(crate) fn copy(&mut self, source: &File, bytes: u64) -> io::Result<u64> {
        let mut sink = self.file;
        match io::copy(&mut source.take(bytes), &mut sink) {
            Ok(copied) => {
                self.bytes += copied;
                Ok(copied)
            }
            Err(error) if reads(source) => self.remember(Err(error)),
            Err(error) => Err(error),
        }
    }
}

/// Whether a file can be read from where it stands: then it was not what failed while it was
/// copied. (The kernel does not say which of the two did.)
fn reads(mut source: &File) -> bool {
    match source.stream_position() {
        Ok(at) => source.read_at(&mut [0], at).is_ok(),
        // A pipe: reading it does not fail.
        Err(_) => true,
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.file;
        let result = file.write(bytes);
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
