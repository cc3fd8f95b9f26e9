//! The output file of an `xl save`.
//!
//! xl truncates FILE at once, and makes it readable for all. So it is given another name in the
//! same directory, of a file that exists already and is private to its owner. That file is renamed
//! to FILE once xl has succeeded. Pipes and devices are opened by xl.
//!
//! xl itself destroys the domain. What it has written may then be all that is left of the domain,
//! so it is removed only if it is certainly not an image.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, bail};

use super::child::hold_signals;
use super::fifo::Fifo;
use super::words::Words;
use crate::args::Backend;
use crate::backend::Hypervisor;
use crate::cmd::save::AT_FREEZE_NEEDS_FILE;
use crate::exit::{Aftermath, BadUsage};
use crate::file::is_dash;
use crate::output::{Existing, Output, OutputPlan};
use crate::pack::{self, Packing};
use crate::text::shown_path;

/// The output that xl writes to.
#[derive(Debug)]
pub(super) struct Target {
    output: Output,
    /// The pipe that xl writes to, if the output is packed.
    fifo: Option<Fifo>,
    /// The final name of the file, an absolute path.
    pub(super) path: PathBuf,
}

impl Target {
    /// Prepare the output that `arguments` name, and replace it in them by the one that xl writes
    /// to. `None` if there is no file: xl reports that.
    ///
    /// # Errors
    ///
    /// As [`Output::open`]; the mapped layout is wanted in what is not a file.
    pub(super) fn prepare(
        words: &Words,
        arguments: &mut [OsString],
        mapped: bool,
        at_freeze: bool,
        packing: Option<&Packing>,
    ) -> Result<Option<Self>> {
        let [domain, file, ..] = words.positions[..] else {
            return Ok(None);
        };
        let domain = arguments[domain].clone();
        let path = PathBuf::from(&arguments[file]);
        let output = Output::open_for_xl(&OutputPlan {
            path: &path,
            inputs: &[],
            existing: Existing::Replace,
            only_copy: !words.keeps,
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
        let path = std::path::absolute(&path)?;
        Ok(Some(Self { output, fifo, path }))
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
        let written = match (self.fifo.take(), self.output.temporary()) {
            (Some(fifo), temporary) => match packed(fifo, succeeded) {
                // Nothing has a name that could be given up.
                Ok(_) if temporary.is_none() => return ended,
                Ok(written) => written,
                Err(error) => {
                    let after = self.output.aftermath();
                    let domain = match succeeded {
                        true => "; xl has ended well: `xl list` says whether the domain is there",
                        false => "",
                    };
                    return Err(Aftermath::of(error, format!("{after}{domain}")));
                }
            },
            (None, None) => return ended,
            (None, Some(temporary)) => written(temporary),
        };
        match written {
            Written::Nothing if succeeded => {
                bail!("xl says that it has saved the domain, but has written nothing")
            }
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
        let after = self.output.aftermath();
        drop(self.output);
        match ended {
            Err(error) => Err(Aftermath::of(error, after)),
            Ok(ended) => {
                tracing::warn!("xl has failed: {after}");
                Ok(ended)
            }
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

/// What xl has written into a pipe, once it has been packed.
///
/// # Errors
///
/// The output failed, which may be why xl has.
fn packed(fifo: Fifo, succeeded: bool) -> Result<Written> {
    let Fifo { packer, .. } = fifo;
    if !succeeded {
        packer.image_failed();
    }
    match packer.finish() {
        Ok(packed) if packed.is_whole => Ok(Written::Image),
        Ok(_) => Ok(Written::Something),
        Err(error) if pack::is_cancelled(&error) => Ok(Written::Something),
        Err(error) => Err(error),
    }
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
    Some(crate::cmd::save::least_bytes(&info))
}
