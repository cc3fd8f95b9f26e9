//! Compressed and encrypted output: a pipe that takes a plain image, and a thread that writes it
//! packed. So everything that writes images to a descriptor, xl among it, writes these too. The
//! other direction is `peel.rs`.

mod zstd;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Error, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};
use xsr_save_restore::progress::{Cancel, Cancelled};
use xsr_save_restore::sink::FdSink;

use self::zstd::Compressing;
use crate::age::{self, Encrypting, Recipient};
use crate::args::images::LayoutArg;
use crate::args::{ImageCompressionArg, PackArgs};
use crate::exit::{BadUsage, WriteFailed};
use crate::file::widen;
use crate::output::Output;

/// Bytes per read.
const STEP: usize = 256 << 10;

/// How an image is packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    is_compressed: bool,
    recipients: Vec<Recipient>,
}

impl Packing {
    /// As the command line says; `None` for a plain image.
    ///
    /// # Errors
    ///
    /// [`BadUsage`]: a recipient is none; the mapped layout cannot be packed.
    pub(crate) fn of(args: &PackArgs, layout: LayoutArg) -> Result<Option<Self>> {
        let recipients = args.encrypt_to.iter().map(|text| {
            Recipient::parse(text)
                .map_err(|why| Error::new(BadUsage(format!("--encrypt-to: {why}"))))
        });
        let packing = Self {
            is_compressed: args.compress.is_some(),
            recipients: recipients.collect::<Result<_>>()?,
        };
        let given = match (packing.is_compressed, packing.is_encrypted()) {
            (true, _) => "--compress",
            (false, true) => "--encrypt-to",
            (false, false) => return Ok(None),
        };
        if layout == LayoutArg::Mapped {
            return Err(Error::new(BadUsage(format!(
                "{given} does not go with --layout mapped (nor with --onto, which implies it), in \
                 which each page has its place in the file: packed pages have none. Drop one of them"
            ))));
        }
        Ok(Some(packing))
    }

    /// The same from words of a command line that xl runs: an option and its value.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of).
    pub(crate) fn of_words(
        words: &[(&'static str, OsString)],
        is_mapped: bool,
    ) -> Result<Option<Self>> {
        let mut args = PackArgs::default();
        for (option, value) in words {
            match (*option, value.to_str()) {
                ("--compress", Some("zstd")) => args.compress = Some(ImageCompressionArg::Zstd),
                ("--compress", _) => {
                    return Err(Error::new(BadUsage("--compress: expected zstd".to_owned())));
                }
                (_, value) => args.encrypt_to.push(value.unwrap_or_default().to_owned()),
            }
        }
        Self::of(
            &args,
            match is_mapped {
                true => LayoutArg::Mapped,
                false => LayoutArg::Stream,
            },
        )
    }

    /// Whether the output is smaller than the image, by an unknown amount.
    pub(crate) fn is_compressed(&self) -> bool {
        self.is_compressed
    }

    fn is_encrypted(&self) -> bool {
        !self.recipients.is_empty()
    }

    /// Begins to write to this output. `cancel` ends that.
    ///
    /// # Errors
    ///
    /// There is no pipe or thread left for it.
    pub(crate) fn start(&self, output: &Output, cancel: Cancel) -> Result<Packer> {
        let (from, to) = io::pipe().context("making a pipe")?;
        let (from, to) = (OwnedFd::from(from), File::from(OwnedFd::from(to)));
        let from = File::from(from);
        widen(&from);
        let job = self.job(output, cancel)?;
        Packer::start(job, from, to, output)
    }

    /// The same for an image that xl writes into a pipe: xl destroys the domain once it has written
    /// all, so this must not fail after that for want of room, and tells whether the image is whole.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub(crate) fn start_for_xl(
        &self,
        from: File,
        to: File,
        output: &Output,
        cancel: Cancel,
    ) -> Result<Packer> {
        let mut job = self.job(output, cancel)?;
        job.for_xl = true;
        Packer::start(job, from, to, output)
    }

    fn job(&self, output: &Output, cancel: Cancel) -> Result<Job> {
        Ok(Job {
            packing: self.clone(),
            file: output.file().try_clone().context("the output")?,
            is_new_file: output.is_new_file(),
            cancel,
            failed: Arc::default(),
            for_xl: false,
        })
    }
}

/// What has been written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    /// Bytes of the output.
    pub(crate) bytes: u64,
    /// For xl: whether all of an image was among the contents.
    pub(crate) is_whole: bool,
}

/// The work of the thread.
#[derive(Debug)]
struct Job {
    packing: Packing,
    file: File,
    is_new_file: bool,
    cancel: Cancel,
    /// Set if the image is not complete: then the output must not look complete.
    failed: Arc<AtomicBool>,
    for_xl: bool,
}

impl Job {
    fn run(&self, from: &File) -> io::Result<Packed> {
        let reserve = match self.for_xl && self.is_new_file {
            true => Some(self.file.try_clone()?),
            false => None,
        };
        let sink = Counted {
            sink: FdSink::cancellable(&self.file, self.cancel.clone())?,
            bytes: 0,
            reserve: reserve.map(Reserve::new),
        };
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let sealed = match self.packing.is_encrypted() {
            true => Sealed::Age(Box::new(age::encrypt(sink, &self.packing.recipients)?)),
            false => Sealed::Plain(sink),
        };
        let (sealed, is_whole) = match self.packing.is_compressed {
            true => {
                let mut sink = Compressing::new(sealed, threads);
                let is_whole = self.pump(from, &mut sink)?;
                (sink.finish()?, is_whole)
            }
            false => {
                let mut sink = sealed;
                let is_whole = self.pump(from, &mut sink)?;
                (sink, is_whole)
            }
        };
        let mut counted = match sealed {
            Sealed::Age(sink) => sink.finish()?,
            Sealed::Plain(sink) => sink,
        };
        if counted.reserve.take().is_some() {
            // Gives back what was reserved and not needed.
            self.file.set_len(counted.bytes)?;
        }
        Ok(Packed {
            bytes: counted.bytes,
            is_whole,
        })
    }

    /// Copies until all writers have closed the pipe. Returns whether that was a whole image, if it
    /// is xl that writes.
    fn pump(&self, from: &File, to: &mut impl Write) -> io::Result<bool> {
        let mut tee = Tee {
            from,
            to,
            error: None,
        };
        let is_whole = self.for_xl && is_whole(&mut tee).unwrap_or(false);
        if let Some(error) = tee.error {
            return Err(error);
        }
        let mut room = vec![0; STEP];
        loop {
            match tee.read(&mut room) {
                Ok(0) if self.failed.load(Ordering::Relaxed) && !is_whole => {
                    return Err(io::Error::other(Cancelled));
                }
                Ok(0) => return Ok(is_whole),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(tee.error.unwrap_or(error)),
            }
        }
    }
}

/// A pipe whose contents are copied as they are read.
struct Tee<'w, W> {
    from: &'w File,
    to: &'w mut W,
    /// Why they could not be copied.
    error: Option<io::Error>,
}

impl<W: Write> Read for Tee<'_, W> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let bytes = self.from.read(room)?;
        if let Err(error) = self.to.write_all(&room[..bytes]) {
            self.error = Some(error);
            return Err(io::Error::other("the output failed"));
        }
        Ok(bytes)
    }
}

/// Waits until xl has opened the pipe, which it could not do without a reader: then its writes fail.
fn wait_for_writer(mut from: &File) {
    let mut room = vec![0; STEP];
    // Nothing comes if xl has ended.
    while from
        .read(&mut room)
        .is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
    {}
}

/// Whether an image is whole, from its first byte to its last record.
///
/// # Errors
///
/// It is not.
pub(crate) fn is_whole(source: impl Read) -> Result<bool> {
    let mut walk = Walk::open(source, ReadOptions::default())?;
    let mut pages = false;
    while let Some(step) = walk.next_step()? {
        if let Content::PageData(mut body) = step.content {
            pages = true;
            let left = body.pages_left();
            body.with_source(left, |source, bytes| {
                let skipped = io::copy(&mut Read::take(&mut *source, bytes), &mut io::sink())?;
                match skipped == bytes {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            })?;
        }
    }
    Ok(pages)
}

/// Room in a file beyond its end, so that what is held back can be written in any case.
struct Reserve {
    file: File,
    /// How far there is room.
    to: u64,
}

impl Reserve {
    /// More than is held back: in the pipe, in frames that wait for each other, and the table.
    const AHEAD: u64 = 64 << 20;
    /// How much is reserved at a time.
    const STEP: u64 = 32 << 20;

    fn new(file: File) -> Self {
        Self { file, to: 0 }
    }

    /// Ensures that there is room beyond this byte.
    fn beyond(&mut self, bytes: u64) -> io::Result<()> {
        if bytes + Self::AHEAD <= self.to {
            return Ok(());
        }
        let more = bytes + Self::AHEAD + Self::STEP - self.to;
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.to, more) {
            Ok(()) => {}
            // This file system does not reserve.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.to += more;
        Ok(())
    }
}

/// The outer layer.
enum Sealed<W> {
    Plain(W),
    Age(Box<Encrypting<W>>),
}

impl<W: Write> Write for Sealed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(sink) => sink.write(bytes),
            Self::Age(sink) => sink.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(sink) => sink.flush(),
            Self::Age(sink) => sink.flush(),
        }
    }
}

/// A sink with a count of its bytes.
struct Counted<W> {
    sink: W,
    bytes: u64,
    reserve: Option<Reserve>,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(reserve) = &mut self.reserve {
            reserve.beyond(self.bytes + bytes.len() as u64)?;
        }
        let written = self.sink.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// A thread that packs what is written into a pipe.
#[derive(Debug)]
pub(crate) struct Packer {
    /// The end of the pipe to write to.
    to: File,
    failed: Arc<AtomicBool>,
    /// The output's name.
    name: String,
    thread: JoinHandle<io::Result<Packed>>,
}

impl Packer {
    fn start(job: Job, from: File, to: File, output: &Output) -> Result<Self> {
        let failed = Arc::clone(&job.failed);
        let thread = thread::Builder::new().name("pack".to_owned());
        let thread = thread.spawn(move || {
            let packed = job.run(&from);
            if packed.is_err() && job.for_xl {
                wait_for_writer(&from);
            }
            packed
        });
        Ok(Self {
            to,
            failed,
            name: output.name().to_owned(),
            thread: thread.context("starting a thread")?,
        })
    }

    /// The file to write the plain image to.
    pub(crate) fn file(&self) -> &File {
        &self.to
    }

    /// The same as an output, which must be dropped before [`finish`](Self::finish).
    ///
    /// # Errors
    ///
    /// There is no descriptor left for it.
    pub(crate) fn pipe(&self, name: String) -> Result<Output> {
        Output::of_descriptor(self.to.try_clone().context("the pipe")?, name)
    }

    /// The image is not complete: unless it is whole nevertheless, the output must not look
    /// complete.
    pub(crate) fn image_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Called when the image is complete: writes what is left.
    ///
    /// # Errors
    ///
    /// [`WriteFailed`].
    pub(crate) fn finish(self) -> Result<Packed> {
        let Self {
            to, name, thread, ..
        } = self;
        drop(to);
        match thread.join() {
            Ok(packed) => packed.map_err(|error| {
                Error::new(WriteFailed {
                    output: name,
                    error,
                })
            }),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Called when writing the image failed: the reason, which may be the output.
    pub(crate) fn blame(self, error: Error) -> Error {
        self.image_failed();
        match self.finish() {
            Err(cause) if !is_cancelled(&cause) => cause,
            _ => error,
        }
    }
}

/// Whether the output did not fail, but was given up.
pub(crate) fn is_cancelled(error: &Error) -> bool {
    let cause = error.downcast_ref::<WriteFailed>();
    cause.is_some_and(|failed| Cancelled::is(&failed.error))
}
