//! What stands around an image, taken off: compressions, libvirt's header, xapi's records,
//! and the legacy form. What comes out is an image that the readers of version 2 and 3 take:
//! one of xl, a libxl stream, or a bare libxc stream.
//!
//! It is taken off as it is read, in bounded memory, however large what is inside claims to
//! be. Nothing is decompressed that nobody reads, and nothing in more than [`MAX_DEPTH`]
//! layers.

mod compression;

use std::io::{self, Cursor, Read};

use anyhow::{Context as _, Error, Result};
use xsr_format::detect::{Detected, detect};
use xsr_format::error::ReadError;
use xsr_format::legacy::convert::Summary;
use xsr_format::legacy::{Converted, LegacyOptions, LegacyReader, Target};
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::libvirt::LibvirtHeader;
use xsr_format::wrapper::xapi::XapiSource;
use xsr_format::wrapper::xl::XlHeader;

pub(crate) use self::compression::is_damage;
use crate::exit::BadImage;
use crate::text::Count;

/// How many layers there may be around an image.
const MAX_DEPTH: usize = 4;

/// Octets that tell what something is; of xl's header, what follows it too.
pub(crate) const TELLING: usize = 48;

/// Any source of octets.
pub(crate) type Source = Box<dyn Read + Send>;

/// An image without what stood around it.
pub(crate) struct Peeled {
    pub(crate) source: Source,
    /// What was taken off, outermost first; nothing for a plain image.
    pub(crate) layers: Vec<String>,
    /// The XML of libvirt, if that was around it.
    pub(crate) libvirt: Option<LibvirtHeader>,
}

/// Whether something that begins with these octets ([`TELLING`], or all there are) has
/// anything to be taken off.
pub(crate) fn is_wrapped(prefix: &[u8]) -> bool {
    match detect(prefix) {
        Detected::Libxl | Detected::Libxc | Detected::Empty | Detected::Unknown => false,
        // Behind xl's header may be a legacy stream. A header that is cut off is plain.
        Detected::Xl => prefix.get(32..40).is_some_and(|fields| {
            let flags = match fields {
                [1, 2, 3, 4, .., flags] => *flags,
                [_, _, _, _, flags, ..] => *flags,
                _ => return false,
            };
            flags & 2 == 0
        }),
        _ => true,
    }
}

/// Take off all that stands around an image.
///
/// # Errors
///
/// The source failed; a layer is damaged, or cannot be taken off.
pub(crate) fn peel(mut source: Source, lenient: bool) -> Result<Peeled> {
    let mut layers = Vec::new();
    let mut libvirt = None;
    let options = ReadOptions { lenient, offset: 0 };
    loop {
        let mut prefix = Vec::new();
        source
            .by_ref()
            .take(TELLING as u64)
            .read_to_end(&mut prefix)
            .map_err(unwrapped)?;
        let detected = detect(&prefix);
        let wrapped = is_wrapped(&prefix);
        let mut rest: Source = Box::new(Cursor::new(prefix).chain(source));
        if !wrapped {
            return Ok(Peeled {
                source: rest,
                layers,
                libvirt,
            });
        }
        if layers.len() == MAX_DEPTH {
            let what = layers.join(", ");
            return Err(bad(format!(
                "there are more than {MAX_DEPTH} layers around it: {what}"
            )));
        }
        match detected {
            Detected::Compressed(compression) => {
                layers.push(compression.to_string());
                source = compression::decompressed(compression, rest)?;
            }
            Detected::Libvirt => {
                let header = LibvirtHeader::read(&mut rest, options)?;
                layers.push("libvirt".to_owned());
                libvirt = Some(header);
                source = rest;
            }
            Detected::Xapi => {
                layers.push("xapi".to_owned());
                let xapi = XapiSource::behind(&[], rest)?.lenient(lenient);
                return Ok(Peeled {
                    source: Box::new(Noted(xapi, XapiSource::legacy)),
                    layers,
                    libvirt,
                });
            }
            Detected::Xl => {
                let header = XlHeader::read(&mut rest, options)?;
                let legacy = converted(rest, header.octets(), lenient, &mut layers)?;
                let header = Cursor::new(header.for_version_2().encode());
                return Ok(Peeled {
                    source: Box::new(header.chain(legacy)),
                    layers,
                    libvirt,
                });
            }
            _ => {
                return Ok(Peeled {
                    source: converted(rest, 0, lenient, &mut layers)?,
                    layers,
                    libvirt,
                });
            }
        }
    }
}

fn bad(what: String) -> Error {
    Error::new(BadImage(what))
}

/// A legacy stream as a libxl stream of today.
fn converted(
    source: Source,
    offset: u64,
    lenient: bool,
    layers: &mut Vec<String>,
) -> Result<Source> {
    let options = LegacyOptions {
        lenient,
        offset,
        ..LegacyOptions::default()
    };
    let reader = LegacyReader::new(source, options)?;
    layers.push(format!(
        "legacy stream of an {} guest, written by a {}",
        reader.guest(),
        reader.start().width
    ));
    let spool = tempfile::tempfile().context("making a temporary file for checkpoints")?;
    let converted = Converted::new(reader, Target::Libxl, Some(Box::new(spool)))?;
    Ok(Box::new(Noted(converted, |converted| {
        Some(converted.summary())
    })))
}

/// Says in the log, at the end, what could not be carried over.
struct Noted<S>(S, fn(&S) -> Option<&Summary>);

impl<S: Read> Read for Noted<S> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(room)?;
        if n == 0
            && !room.is_empty()
            && let Some(summary) = self.1(&self.0)
        {
            warn_of(summary);
        }
        Ok(n)
    }
}

/// Say in the log what a conversion had to leave out.
pub(crate) fn warn_of(summary: &Summary) {
    for warning in warnings(summary) {
        tracing::warn!("{warning}");
    }
}

fn warnings(summary: &Summary) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(why) = &summary.incomplete {
        let complete = Count(summary.checkpoints, "checkpoint");
        out.push(format!(
            "{complete} complete, the last of which counts; the next one is cut off: {why}"
        ));
    }
    if summary.tmem_octets > 0 {
        let octets = Count(summary.tmem_octets, "octet");
        out.push(format!(
            "{octets} of transcendent memory left out: Xen has had none since 4.13"
        ));
    }
    if summary.unknown_blocks > 0 {
        let blocks = Count(summary.unknown_blocks, "block");
        out.push(format!(
            "{blocks} of extended info left out that nobody knows"
        ));
    }
    out
}

/// An error that came through [`Read`], as what it was before.
pub(crate) fn unwrapped(error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<ReadError>()) {
        match error
            .into_inner()
            .map(|inner| inner.downcast::<ReadError>())
        {
            Some(Ok(inner)) => Error::new(*inner),
            Some(Err(other)) => Error::msg(other.to_string()),
            None => Error::msg("the source failed"),
        }
    } else if is_damage(&error) {
        bad(error.to_string())
    } else {
        Error::new(error)
    }
}
