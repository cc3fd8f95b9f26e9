//! The file of an `xl save`.
//!
//! xl truncates FILE before anything is sure, and makes it readable for all. So it is given
//! another name beside it, with a file that is there already and is for its owner alone, which
//! gets the name FILE once xl has succeeded. Pipes and devices are xl's to write.
//!
//! xl destroys the domain on its own. What it has written may then be all that there is of the
//! domain: it is never removed unless it is certainly no image.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, bail};
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};

use super::words::Words;
use crate::args::Backend;
use crate::backend::Hypervisor;
use crate::exit::{Aftermath, BadUsage, WriteFailed};
use crate::file::is_dash;
use crate::output::{Existing, Kept, Output, Plan};
use crate::text::shown_path;

/// Where xl is to write.
#[derive(Debug)]
pub(super) struct Target {
    output: Output,
}

impl Target {
    /// Get ready for what `arguments` ask for, and put into them what xl is to write to.
    ///
    /// # Errors
    ///
    /// As [`Output::open`]. `None` where there is no file: that is for xl to complain of.
    pub(super) fn prepare(words: &Words, arguments: &mut [OsString]) -> Result<Option<Self>> {
        let [domain, file, ..] = words.positions[..] else {
            return Ok(None);
        };
        let domain = arguments[domain].clone();
        let path = PathBuf::from(&arguments[file]);
        let output = Output::open_for_xl(&Plan {
            path: &path,
            inputs: &[],
            existing: Existing::Replace,
            only_copy: !words.keeps,
        })?;
        match output.temporary() {
            Some(temporary) => arguments[file] = temporary.as_os_str().to_owned(),
            None => check_truncated(&output)?,
        }
        if is_dash(&path) {
            // xl has no name for stdout.
            arguments[file] = "/dev/stdout".into();
        }
        if !words.force
            && let Some(bytes) = domain.to_str().and_then(least_bytes)
        {
            output.check_room(bytes)?;
        }
        Ok(Some(Self { output }))
    }

    /// xl has ended, and says that it has succeeded, or not.
    ///
    /// # Errors
    ///
    /// xl's; the file could not get its name.
    pub(super) fn finish<T>(self, ended: Result<T>, succeeded: bool) -> Result<T> {
        let name = self.output.name().to_owned();
        let written = match self.output.temporary() {
            None => return ended,
            Some(temporary) => written(temporary),
        };
        match written {
            Written::Nothing if succeeded => {
                bail!("xl says that it has saved the domain, but has written nothing")
            }
            Written::Image | Written::Something if succeeded => {
                let named = self.output.finish_or_keep();
                return match named {
                    Ok(()) => ended,
                    Err(Kept { error, at }) => {
                        let error = Error::new(WriteFailed {
                            output: name,
                            error,
                        });
                        let after = format!("the image is complete: it is {}", shown_path(&at));
                        Err(Aftermath::of(error, after))
                    }
                };
            }
            // xl was killed once it had saved the domain, perhaps even destroyed it.
            Written::Image => {
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

/// Whether something would be lost of an output that xl opens itself: anew, from its start, even
/// where it is a descriptor of this process.
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
    /// No image, or a part of one.
    Something,
    /// All of an image.
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
    match is_whole(&file) {
        Ok(true) => Written::Image,
        _ => Written::Something,
    }
}

/// Whether a file has an image from its first byte to its last record.
fn is_whole(file: &std::fs::File) -> Result<bool> {
    let mut walk = Walk::open(file, ReadOptions::default())?;
    let mut pages = false;
    while let Some(step) = walk.next_step()? {
        if let Content::PageData(mut body) = step.content {
            pages = true;
            let left = body.pages_left();
            body.with_source(left, |source, bytes| {
                let skipped = io::copy(&mut io::Read::take(&mut *source, bytes), &mut io::sink())?;
                match skipped == bytes {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            })?;
        }
    }
    Ok(pages)
}

/// As many bytes as the domain's image will have at least, where this process can ask.
fn least_bytes(domain: &str) -> Option<u64> {
    let host = Hypervisor::direct(&Backend::Xen).ok()?;
    let info = host.check(host.find(domain).ok()?).ok()?;
    Some(crate::cmd::save::least_bytes(&info))
}
