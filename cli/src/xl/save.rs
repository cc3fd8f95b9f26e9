//! The output file of an `xl save`.
//!
//! xl truncates FILE at once, and makes it readable for all. So it is given another name in the
//! same directory, of a file that exists already and is private to its owner. That file is renamed
//! to FILE once xl has succeeded. Pipes and devices are opened by xl.
//!
//! xl itself destroys the domain. What it has written may then be all that is left of the domain,
//! so it is removed only if it is certainly not an image.
//!
//! A packed image is written by this process, which may fail after xl has written everything. So xl
//! leaves the domain paused (`-p`), and this process has xl destroy it once the image has its name,
//! or lets it run on.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use xsr_save_restore::error::SaveError;

use super::child::{self, hold_signals};
use super::domain::Domain;
use super::fifo::Fifo;
use super::words::Words;
use crate::args::Backend;
use crate::backend::Hypervisor;
use crate::cmd::save::AT_FREEZE_NEEDS_FILE;
use crate::exit::{Aftermath, BadUsage, NotDurable};
use crate::file::is_dash;
use crate::output::{Existing, Output, OutputPlan};
use crate::pack::{self, Packed, Packing};
use crate::text::shown_path;

/// The output that xl writes to.
#[derive(Debug)]
pub(super) struct Target {
    output: Output,
    /// The pipe that xl writes to, if the output is packed.
    fifo: Option<Fifo>,
    /// The domain, and what becomes of it then.
    domain: Domain,
    /// The final name of the file, an absolute path.
    pub(super) path: PathBuf,
}

impl Target {
    /// Prepare the output that `arguments` of `xl` name, and replace it in them by the one that xl
    /// writes to. `None` if there is no file: xl reports that.
    ///
    /// # Errors
    ///
    /// As [`Output::open`]; the mapped layout is wanted in what is not a file.
    pub(super) fn prepare(
        xl: &Path,
        words: &Words,
        arguments: &mut Vec<OsString>,
        mapped: bool,
        at_freeze: bool,
        packing: Option<&Packing>,
    ) -> Result<Option<Self>> {
        let [domain_at, file, ..] = words.positions[..] else {
            return Ok(None);
        };
        let domain = arguments[domain_at].clone();
        let path = PathBuf::from(&arguments[file]);
        let output = Output::open_for_xl(&OutputPlan {
            path: &path,
            inputs: &[],
            existing: Existing::Replace,
            only_copy: !words.copies && !words.pauses,
        })?;
        if mapped && !output.is_new_file() {
            return Err(Error::new(BadUsage(format!(
                "{}: the mapped layout is for a regular file, in which pages have places: name \
                 one, or give --layout stream",
                output.name()
            ))));
        }
        if at_freeze && !output.is_new_file() {
            return Err(Error::new(BadUsage(AT_FREEZE_NEEDS_FILE.to_owned())));
        }
        let fifo = match packing {
            Some(packing) => {
                // A signal must not end the process in the thread, either.
                hold_signals()?;
                Some(Fifo::start(packing, &output)?)
            }
            None => None,
        };
        match (&fifo, output.temporary()) {
            (Some(fifo), _) => arguments[file] = fifo.path.clone().into(),
            (None, Some(temporary)) => arguments[file] = temporary.as_os_str().to_owned(),
            (None, None) => check_truncated(&output)?,
        }
        if is_dash(&path) && fifo.is_none() {
            // xl has no notation for stdout.
            arguments[file] = "/dev/stdout".into();
        }
        // Zero pages take no space in slots, and their number is not known yet; nor is what
        // compression saves.
        if !words.force
            && !mapped
            && !packing.is_some_and(Packing::is_compressed)
            && let Some(bytes) = domain.to_str().and_then(least_bytes)
        {
            output.check_room(bytes)?;
        }
        if fifo.is_some() && !words.copies && !words.pauses {
            arguments.insert(domain_at, "-p".into());
        }
        let path = std::path::absolute(&path)?;
        Ok(Some(Self {
            output,
            fifo,
            domain: Domain::new(xl, domain, words),
            path,
        }))
    }

    /// Called on a request to stop: nothing is wanted of the image any more.
    pub(super) fn give_up(&self) {
        if let Some(fifo) = &self.fifo {
            fifo.give_up();
        }
    }

    /// Called after xl has ended, with its result and whether it succeeded. Sets `is_kept` if there
    /// is an image now.
    ///
    /// # Errors
    ///
    /// xl's error; the file could not be renamed.
    pub(super) fn finish<T>(
        mut self,
        ended: Result<T>,
        succeeded: bool,
        is_kept: &mut bool,
    ) -> Result<T> {
        if let Some(fifo) = self.fifo.take() {
            return self.finish_packed(fifo, ended, succeeded, is_kept);
        }
        let Some(temporary) = self.output.temporary() else {
            return ended;
        };
        let written = written(temporary);
        match written {
            Written::Nothing if succeeded => return Err(Error::new(NothingWritten)),
            Written::Image | Written::Something if succeeded => {
                // If it cannot be given its name, it stays under the other one.
                *is_kept = true;
                return self.output.finish_or_keep().and(ended);
            }
            // xl was killed after it had saved the domain, and perhaps destroyed it.
            Written::Image => {
                *is_kept = true;
                let after = format!(
                    "xl failed after the image was complete: it is {}; `xl list` says whether \
                     the domain is there, too",
                    shown_path(&self.output.keep()?)
                );
                return match ended {
                    Err(error) => Err(Aftermath::of(error, after)),
                    Ok(ended) => {
                        tracing::warn!("{after}");
                        Ok(ended)
                    }
                };
            }
            Written::Nothing | Written::Something => {}
        }
        xl_failed(self.output, ended)
    }

    /// The same for an image that this process writes from what xl has written into a pipe.
    fn finish_packed<T>(
        self,
        fifo: Fifo,
        ended: Result<T>,
        succeeded: bool,
        is_kept: &mut bool,
    ) -> Result<T> {
        let Self { output, domain, .. } = self;
        if !succeeded {
            let why = match (fifo.finish(false), ended) {
                // That may be why xl has failed.
                (Err(error), Err(xls)) if !pack::is_cancelled(&error) => {
                    error.context(format!("{xls:#}"))
                }
                (Err(error), Ok(_)) if !pack::is_cancelled(&error) => error,
                (_, ended) => return xl_failed(output, ended),
            };
            return Err(Aftermath::of_guest(why, output.aftermath()));
        }
        let _left = domain.left();
        let file = output.name().to_owned();
        let after = output.aftermath();
        let packed = fifo.finish(true);
        // Writing what is still in memory may take long.
        let done = child::hear_while(
            "the image is given its name before this ends",
            || match packed.and_then(checked) {
                Ok(()) => output.finish(),
                Err(error) => {
                    drop(output);
                    Err(error)
                }
            },
        );
        let what = "what is left to do for the domain is done before this ends";
        match done {
            Ok(()) => {
                *is_kept = true;
                child::hear_while(what, || domain.destroy(&file))?;
                ended
            }
            Err(error) => {
                let is_nothing = error.is::<NothingWritten>();
                let fate = match is_nothing {
                    // xl has not touched it.
                    true => domain.fate(),
                    false => child::hear_while(what, || domain.unpause()),
                };
                let (error, after) = match error.is::<NotDurable>() {
                    true => {
                        *is_kept = true;
                        (
                            error,
                            format!("{fate}; do not restore {file}, which it has left behind"),
                        )
                    }
                    false => (error, format!("{fate}, {after}")),
                };
                let error = match pack::is_cancelled(&error) {
                    true => Error::new(SaveError::Aborted),
                    false => error,
                };
                Err(Aftermath::of_guest(error, after))
            }
        }
    }
}

/// xl succeeds, and there is no image.
#[derive(Debug)]
struct NothingWritten;

impl fmt::Display for NothingWritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("xl says that it has saved the domain, but has written nothing")
    }
}

impl std::error::Error for NothingWritten {}

/// Whether there was an image to pack at all.
fn checked(packed: Packed) -> Result<()> {
    match packed.contents {
        0 => Err(Error::new(NothingWritten)),
        _ => Ok(()),
    }
}

/// xl has failed, and printed why: removes what it has written.
fn xl_failed<T>(output: Output, ended: Result<T>) -> Result<T> {
    let after = output.aftermath();
    drop(output);
    match ended {
        Err(error) => Err(Aftermath::of(error, after)),
        Ok(ended) => {
            tracing::warn!("xl has failed: {after}");
            Ok(ended)
        }
    }
}

/// Refuses an output that would lose data when xl opens it: xl truncates it, even if it is a
/// descriptor of this process.
fn check_truncated(output: &Output) -> Result<()> {
    let found = output.file().metadata()?;
    if found.is_file() && found.len() > 0 {
        return Err(Error::new(BadUsage(format!(
            "{} is a file that is not empty, which xl would truncate: name another file",
            output.name()
        ))));
    }
    Ok(())
}

/// What xl has written.
enum Written {
    Nothing,
    /// No image, or an incomplete one.
    Something,
    /// A complete image.
    Image,
}

fn written(path: &Path) -> Written {
    let Ok(file) = std::fs::File::open(path) else {
        return Written::Nothing;
    };
    match file.metadata() {
        Ok(found) if found.len() > 0 => {}
        _ => return Written::Nothing,
    }
    match pack::is_whole(&file) {
        Ok(true) => Written::Image,
        _ => Written::Something,
    }
}

/// The least size of the domain's image in bytes, if this process can ask for it.
fn least_bytes(domain: &str) -> Option<u64> {
    let host = Hypervisor::direct(&Backend::Xen).ok()?;
    let info = host.check(host.find(domain).ok()?).ok()?;
    Some(crate::cmd::save::least_bytes(info.tot_pages))
}
