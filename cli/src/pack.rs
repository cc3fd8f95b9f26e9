//! Compressed and encrypted output: a pipe that takes a plain image, and a thread that writes it
//! packed. So everything that writes images to a descriptor, xl among it, writes these too. The
//! other direction is `peel.rs`.

mod zstd;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Error, Result};
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};
use xsr_save_restore::progress::{Cancel, Cancelled};
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::source::FdSource;

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

    /// The same with a pipe that another process opens by name. `cancel` also ends the wait for
    /// what that writes.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub(crate) fn start_with_pipe(
        &self,
        from: File,
        to: File,
        output: &Output,
        cancel: Cancel,
    ) -> Result<Packer> {
        let mut job = self.job(output, cancel.clone())?;
        job.stop_reading = cancel;
        Packer::start(job, from, to, output)
    }

    fn job(&self, output: &Output, cancel: Cancel) -> Result<Job> {
        Ok(Job {
            packing: self.clone(),
            file: output.file().try_clone().context("the output")?,
            cancel,
            stop_reading: Cancel::new(),
            failed: Arc::default(),
        })
    }
}

/// What has been written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    /// Bytes of the output.
    pub(crate) bytes: u64,
    /// Bytes of the image that is in it.
    pub(crate) contents: u64,
}

/// The work of the thread.
#[derive(Debug)]
struct Job {
    packing: Packing,
    file: File,
    cancel: Cancel,
    /// Ends the wait for what comes out of the pipe.
    stop_reading: Cancel,
    /// Set if the image is not complete: then the output must not look complete.
    failed: Arc<AtomicBool>,
}

impl Job {
    fn run(&self, from: &File) -> io::Result<Packed> {
        let mut from = FdSource::cancellable(from, self.stop_reading.clone())?;
        let sink = Counted {
            sink: FdSink::cancellable(&self.file, self.cancel.clone())?,
            bytes: 0,
        };
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let mut sealed = match self.packing.is_encrypted() {
            true => Sealed::Age(Box::new(age::encrypt(sink, &self.packing.recipients)?)),
            false => Sealed::Plain(sink),
        };
        let contents;
        if self.packing.is_compressed {
            let mut sink = Compressing::new(sealed, threads);
            contents = self.pump(&mut from, &mut sink)?;
            sealed = sink.finish()?;
        } else {
            contents = self.pump(&mut from, &mut sealed)?;
        }
        let counted = match sealed {
            Sealed::Age(sink) => sink.finish()?,
            Sealed::Plain(sink) => sink,
        };
        Ok(Packed {
            bytes: counted.bytes,
            contents,
        })
    }

    /// Copies until all writers have closed the pipe. Returns the number of bytes.
    fn pump(&self, from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
        let mut room = vec![0; STEP];
        let mut all = 0;
        loop {
            match from.read(&mut room) {
                Ok(0) if self.failed.load(Ordering::Relaxed) => {
                    return Err(io::Error::other(Cancelled));
                }
                Ok(0) => return Ok(all),
                Ok(bytes) => {
                    to.write_all(&room[..bytes])?;
                    all += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits until another process has opened the pipe, which it could not do without a reader: then
/// its writes fail.
fn wait_for_writer(from: &File, cancel: Cancel) {
    let mut room = vec![0; STEP];
    // Ends with an error once the work is cancelled, and with nothing once all writers are gone.
    if let Ok(mut from) = FdSource::cancellable(from, cancel) {
        while from
            .read(&mut room)
            .is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
        {}
    }
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
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// A thread that packs what is written into a pipe. Dropping this gives the output up.
#[derive(Debug)]
pub(crate) struct Packer {
    /// The end of the pipe to write to.
    to: Option<File>,
    failed: Arc<AtomicBool>,
    /// The output's name.
    name: String,
    /// A pipe whose other end the thread closes when it ends.
    over: OwnedFd,
    thread: Option<JoinHandle<io::Result<Packed>>>,
}

impl Packer {
    fn start(job: Job, from: File, to: File, output: &Output) -> Result<Self> {
        let failed = Arc::clone(&job.failed);
        let (over, ends) = io::pipe().context("making a pipe")?;
        let thread = thread::Builder::new().name("pack".to_owned());
        let thread = thread.spawn(move || {
            let packed = job.run(&from);
            if packed.is_err() {
                wait_for_writer(&from, job.stop_reading);
            }
            drop(ends);
            packed
        });
        Ok(Self {
            to: Some(to),
            failed,
            name: output.name().to_owned(),
            over: over.into(),
            thread: Some(thread.context("starting a thread")?),
        })
    }

    /// The file to write the plain image to.
    ///
    /// # Errors
    ///
    /// It was [closed](Self::close).
    pub(crate) fn file(&self) -> Result<&File> {
        self.to.as_ref().context("the pipe is closed")
    }

    /// The same as an output, which must be dropped before [`finish`](Self::finish).
    ///
    /// # Errors
    ///
    /// There is no descriptor left for it.
    pub(crate) fn pipe(&self, name: String) -> Result<Output> {
        Output::of_descriptor(self.file()?.try_clone().context("the pipe")?, name)
    }

    /// The image is not complete: the output must not look complete.
    pub(crate) fn image_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// This process writes no more.
    pub(crate) fn close(&mut self) {
        self.to = None;
    }

    /// A descriptor whose other end is closed once all is written, or writing has failed.
    pub(crate) fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    /// Called when the image is complete: writes what is left.
    ///
    /// # Errors
    ///
    /// [`WriteFailed`].
    pub(crate) fn finish(mut self) -> Result<Packed> {
        self.close();
        let packed = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(packed)) => packed,
            // A guest may depend on what the caller does next.
            Some(Err(_)) => Err(io::Error::other(
                "the thread that packs the image has panicked",
            )),
            None => Err(io::Error::other(Cancelled)),
        };
        packed.map_err(|error| {
            Error::new(WriteFailed {
                output: std::mem::take(&mut self.name),
                error,
            })
        })
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

impl Drop for Packer {
    fn drop(&mut self) {
        self.image_failed();
    }
}

/// Whether the output did not fail, but was given up.
pub(crate) fn is_cancelled(error: &Error) -> bool {
    let cause = error.downcast_ref::<WriteFailed>();
    cause.is_some_and(|failed| Cancelled::is(&failed.error)) || error.is::<Cancelled>()
}
