//! Removes the wrappers of an image: compressions, XVA archives, libvirt's header, xapi's records,
//! and the legacy form. The result is an image that the readers of version 2 and 3 accept: an xl image, a libxl
//! stream, or a bare libxc stream.
//!
//! They are removed as the image is read, in bounded memory, however large the contents claim to
//! be. Nothing is decompressed before it is read, and at most [`MAX_DEPTH`] layers are removed.

mod compression;
mod foreign;
mod kept;
mod packed;
mod xva;
mod zstd;

use std::io::{self, Cursor, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::detect::{Detected, detect};
use xsr_format::error::{Place, Position, ReadError, ReadErrorCause};
use xsr_format::legacy::convert::Summary;
use xsr_format::legacy::{
    Checkpoints, Converted, LegacyGuest, LegacyOptions, LegacyReader, Target,
};
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::libvirt::LibvirtHeader;
use xsr_format::wrapper::xapi::{XapiKind, XapiSource};
use xsr_format::wrapper::xend::XendHeader;
use xsr_format::wrapper::xl::{self, XlHeader};
use xsr_save_restore::RestoreError;
use xsr_xen_backend::GuestKind;

use self::compression::{Notes, Windows, is_damage};
pub(crate) use self::foreign::{by_its_end, unreadable};
pub(crate) use self::kept::Kept;
use self::packed::Packed;
use self::xva::Xva;
use crate::age::{self, AgeError};
use crate::exit::{BadImage, BadUsage};
use crate::origin::Origin;
use crate::text::Count;

/// The most layers around an image.
const MAX_DEPTH: usize = 4;

/// Bytes needed to detect a format, including what follows xl's header.
pub(crate) const TELLING: usize = 48;

/// Any source of bytes.
pub(crate) type Source = Box<dyn Read + Send>;

/// An image without its wrappers.
pub(crate) struct Peeled {
    pub(crate) source: Source,
    /// The wrappers that were removed, outermost first; none for a plain image.
    pub(crate) layers: Vec<String>,
    /// What another toolstack kept with the image.
    pub(crate) origin: Option<Origin>,
    /// What is found while the image is read.
    pub(crate) found: Found,
    /// Bytes before the image, in the contents of the innermost compression.
    pub(crate) before: u64,
    /// The contents of the compressions, outermost first, which must be read to their end, where
    /// the checksum may be.
    pub(crate) packed: Vec<Unpacked>,
    /// How many bytes of the outermost compression have been used.
    pub(crate) used: Option<Used>,
}

/// How many compressed bytes have been used, without those that a decompressor has read ahead.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    /// Bytes before them in the file.
    before: u64,
    progress: Arc<packed::Progress>,
}

impl Used {
    /// The position in the file.
    pub(crate) fn position(&self) -> u64 {
        self.before + self.progress.used()
    }
}

/// The contents of a compression. They can be read further after a layer inside has stopped.
#[derive(Clone)]
pub(crate) struct Unpacked(Arc<Mutex<Source>>);

impl Read for Unpacked {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let mut source = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        source.read(room)
    }
}

/// Read compressed data to their end and discard them, the innermost first.
///
/// # Errors
///
/// They are damaged, or could not be read.
pub(crate) fn drain(packed: &[Unpacked], stop: &AtomicBool) -> Result<()> {
    let mut room = vec![0; 64 << 10];
    for packed in packed.iter().rev() {
        let mut packed = packed.clone();
        while !stop.load(Ordering::Relaxed) {
            match packed.read(&mut room) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(unwrapped(e)),
            }
        }
    }
    Ok(())
}

/// What the reader of an image wants.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    /// Tolerate reserved fields that are not zero.
    pub(crate) lenient: bool,
    /// Keep the records of an image of xapi that have no place in a libxl stream.
    pub(crate) records: bool,
}

impl From<bool> for Wanted {
    fn from(lenient: bool) -> Self {
        Self {
            lenient,
            records: false,
        }
    }
}

/// What is found in the layers while the image is read through them. Complete once it has been
/// read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// State that the image inside has no place for.
    left_out: Arc<Mutex<Vec<LeftOut>>>,
    notes: Notes,
    /// What is kept of an image of xapi, if it is to be written again as one.
    kept: Option<Kept>,
}

/// A piece of state that the image inside has no place for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LeftOut {
    /// Its record in the original image.
    pub(crate) record: String,
    /// What it is, in words.
    pub(crate) what: &'static str,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Found {
    /// State left out so far.
    pub(crate) fn left_out(&self) -> Vec<LeftOut> {
        self.left_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What is kept of an image of xapi.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Notes so far.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Whether data that begin with these bytes ([`TELLING`], or all there are) have a wrapper to
/// remove.
pub(crate) fn is_wrapped(prefix: &[u8]) -> bool {
    match detect(prefix) {
        Detected::Libxl
        | Detected::Libxc
        | Detected::Empty
        | Detected::Foreign(_)
        | Detected::Unknown => false,
        // A legacy stream may follow xl's header. A truncated header is treated as plain.
        Detected::Xl => xl::begins_legacy(prefix),
        _ => true,
    }
}

/// Whether data that begin with these bytes are not an image at all.
pub(crate) fn is_foreign(prefix: &[u8]) -> bool {
    matches!(
        detect(prefix),
        Detected::Empty | Detected::Foreign(_) | Detected::Unknown
    )
}

/// Remove all wrappers of an image.
///
/// # Errors
///
/// The source failed; a layer is damaged, or cannot be removed; the contents are not an image.
pub(crate) fn peel(source: Source, wanted: Wanted) -> Result<Peeled> {
    peel_up_to(source, wanted, Checkpoints::All)
}

/// The same for a connection on which the sender continues after the image: of a legacy stream, not
/// a byte after the first checkpoint is read.
pub(crate) fn peel_migration(source: Source) -> Result<Peeled> {
    peel_up_to(source, Wanted::default(), Checkpoints::UpTo(1))
}

fn peel_up_to(mut source: Source, wanted: Wanted, checkpoints: Checkpoints) -> Result<Peeled> {
    let Wanted { lenient, records } = wanted;
    let mut layers: Vec<String> = Vec::new();
    let mut origin = None;
    let mut before = 0;
    let mut found = Found::default();
    let mut packed: Vec<Unpacked> = Vec::new();
    let mut used: Option<Used> = None;
    let windows = Windows::default();
    let mut legacy = LegacyOptions {
        lenient,
        checkpoints,
        ..LegacyOptions::default()
    };
    let options = ReadOptions { lenient, offset: 0 };
    loop {
        let mut prefix = Vec::new();
        source
            .by_ref()
            .take(TELLING as u64)
            .read_to_end(&mut prefix)
            .map_err(unwrapped)?;
        let detected = detect(&prefix);
        let foreign = is_foreign(&prefix);
        let wrapped = is_wrapped(&prefix);
        if prefix.is_empty()
            && let Some(layer) = layers.last()
        {
            return Err(match before {
                0 => bad(format!(
                    "its {layer} data hold nothing: the file was empty when it was compressed"
                )),
                before => nothing_behind(layer, before),
            });
        }
        let mut rest: Source = Box::new(Cursor::new(prefix).chain(source));
        if foreign {
            let inside = layers.last().map(|layer| (String::as_str(layer), before));
            return Err(unreadable(&mut rest, inside));
        }
        let done = |source, layers, origin, found, before, packed, used| Peeled {
            source,
            layers,
            origin,
            found,
            before,
            packed,
            used,
        };
        if !wrapped {
            return Ok(done(rest, layers, origin, found, before, packed, used));
        }
        if layers.len() == MAX_DEPTH {
            let what = layers.join(", ");
            return Err(bad(format!(
                "there are more than {MAX_DEPTH} layers around it: {what}"
            )));
        }
        legacy.offset = before;
        match detected {
            Detected::Compressed(compression) => {
                layers.push(compression.to_string());
                let notes = &found.notes;
                let (inside, progress) =
                    compression::decompressed(compression, rest, notes, &windows)?;
                used.get_or_insert(Used { before, progress });
                let inside = Unpacked(Arc::new(Mutex::new(inside)));
                packed.push(inside.clone());
                source = Box::new(inside);
                before = 0;
            }
            Detected::Xva => {
                layers.push("XVA".to_owned());
                source = Box::new(Xva::open(rest, &found.notes)?);
                before = 0;
            }
            Detected::Encrypted => {
                layers.push("age".to_owned());
                let identities = age::identities();
                if identities.is_empty() {
                    let why = "it is encrypted with age: give the file with an identity for it: \
                               --identity FILE";
                    return Err(Error::new(BadUsage(why.to_owned())));
                }
                let (rest, progress) = Packed::new(rest);
                let inside = age::decrypt(rest, identities).map_err(unwrapped)?;
                used.get_or_insert(Used { before, progress });
                let inside = Unpacked(Arc::new(Mutex::new(Box::new(inside))));
                packed.push(inside.clone());
                source = Box::new(inside);
                before = 0;
            }
            Detected::Libvirt => {
                let header = LibvirtHeader::read(&mut rest, options)?;
                layers.push("libvirt".to_owned());
                before += header.bytes();
                origin = Some(Origin::of_libvirt(header.xml()));
                source = rest;
            }
            Detected::Xend => {
                let header = XendHeader::read(&mut rest)?;
                layers.push("xend".to_owned());
                legacy.offset = before + header.bytes();
                let own = Origin::of_xend(header.config());
                // A stream of Xen 3.0 does not say which kind of guest it holds.
                legacy.guest = own.kind.map(legacy_guest);
                let converted = converted(rest, legacy, &mut layers)?;
                return Ok(done(
                    converted,
                    layers,
                    Some(own),
                    found,
                    before,
                    packed,
                    used,
                ));
            }
            Detected::Xapi | Detected::XapiLegacy => {
                let name = match detected {
                    Detected::XapiLegacy => "xapi (XenServer before 6.5)",
                    _ => "xapi",
                };
                layers.push(name.to_owned());
                let mut xapi = XapiSource::behind(&[], rest)?.lenient(lenient);
                if records {
                    found.kept = Some(Kept::default());
                }
                if let Some(kept) = &found.kept {
                    xapi = xapi.copying_aside(Box::new(kept.clone()));
                }
                if let Some(record) = xapi.description()? {
                    origin = Some(Origin::of_xapi(record));
                    if let Some(kept) = &found.kept {
                        kept.set_description(record);
                    }
                }
                let source = Box::new(Xapi {
                    source: Noted(xapi, XapiSource::legacy),
                    left_out: Arc::clone(&found.left_out),
                    kept: found.kept.clone(),
                    seen: 0,
                });
                return Ok(done(source, layers, origin, found, before, packed, used));
            }
            Detected::Xl => {
                let header = XlHeader::read(&mut rest, options)?;
                legacy.offset = before + header.bytes();
                let converted = converted(rest, legacy, &mut layers)?;
                let header = Cursor::new(header.for_version_2().encode());
                let source = Box::new(header.chain(converted));
                return Ok(done(source, layers, origin, found, before, packed, used));
            }
            _ => {
                let converted = converted(rest, legacy, &mut layers)?;
                return Ok(done(converted, layers, origin, found, before, packed, used));
            }
        }
    }
}

/// The kind of legacy stream for a guest.
fn legacy_guest(kind: GuestKind) -> LegacyGuest {
    match kind {
        GuestKind::Pv => LegacyGuest::Pv,
        GuestKind::Hvm | GuestKind::Pvh => LegacyGuest::Hvm,
    }
}

/// The error for a file that ends after a layer.
fn nothing_behind(layer: &str, before: u64) -> Error {
    /// The shortest that could follow: the header of a libxl stream.
    const NEEDED: u64 = 16;
    let what = format!("the file ends after the {layer} header (byte {before})");
    let position = Position {
        place: Place::LibxlHeader,
        offset: before,
    };
    let cause = ReadErrorCause::Truncated { needed: NEEDED };
    Error::new(ReadError { position, cause }).context(what)
}

/// Notes which of xapi's records have no place in the resulting stream.
struct Xapi {
    source: Noted<XapiSource<Source>>,
    left_out: Arc<Mutex<Vec<LeftOut>>>,
    kept: Option<Kept>,
    /// The number of records inspected.
    seen: usize,
}

impl Read for Xapi {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let result = self.source.read(room);
        let records = self.source.0.records();
        if let Some(new) = records.get(self.seen..).filter(|new| !new.is_empty()) {
            let without_place = new.iter().filter_map(|record| {
                if let Some(kept) = &self.kept
                    && record.kind.is_device_state()
                {
                    kept.add(record);
                    return None;
                }
                let what = match record.kind {
                    XapiKind::DEMU => "state of a virtual GPU",
                    XapiKind::VARSTORED => "UEFI variables",
                    XapiKind::SWTPM | XapiKind::SWTPM0 => "state of a virtual TPM",
                    XapiKind::LIBXL => "a libxl record",
                    _ => return None,
                };
                Some(LeftOut {
                    record: record.kind.to_string(),
                    what,
                    offset: record.offset,
                    bytes: record.length,
                })
            });
            self.left_out
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(without_place);
            self.seen = records.len();
        }
        result
    }
}

fn bad(what: String) -> Error {
    Error::new(BadImage(what))
}

/// Converts a legacy stream to today's libxl stream.
fn converted(source: Source, options: LegacyOptions, layers: &mut Vec<String>) -> Result<Source> {
    let reader = LegacyReader::new(source, options)?;
    layers.push(format!(
        "legacy stream of {} guest, written by a {}",
        match reader.guest() {
            LegacyGuest::Pv => "a PV",
            LegacyGuest::Hvm => "an HVM",
        },
        reader.start().width
    ));
    let spool = tempfile::tempfile().with_context(|| {
        format!(
            "making a temporary file for checkpoints in {} (TMPDIR names another directory)",
            std::env::temp_dir().display()
        )
    })?;
    let converted = Converted::new(reader, Target::Libxl, Some(Box::new(spool)))?;
    Ok(Box::new(Noted(converted, |converted| {
        Some(converted.summary())
    })))
}

/// Logs, at the end, what could not be carried over.
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

/// Log what a conversion had to leave out.
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
    if summary.tmem_bytes > 0 {
        let bytes = Count(summary.tmem_bytes, "byte");
        out.push(format!(
            "{bytes} of transcendent memory left out: Xen has had none since 4.13"
        ));
    }
    if summary.unknown_blocks > 0 {
        let blocks = Count(summary.unknown_blocks, "block");
        out.push(format!("{blocks} of unknown extended info left out"));
    }
    out
}

/// The original error of one that has passed through [`Read`].
pub(crate) fn unwrapped(error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<ReadError>()) {
        match error
            .into_inner()
            .map(|inner| inner.downcast::<ReadError>())
        {
            Some(Ok(inner)) => match &inner.cause {
                ReadErrorCause::Io(cause) if xva::is_broken(cause) => bad(cause.to_string()),
                _ => Error::new(*inner),
            },
            Some(Err(other)) => Error::msg(other.to_string()),
            None => Error::msg("the source failed"),
        }
    } else if error
        .get_ref()
        .is_some_and(|inner| inner.is::<RestoreError>())
    {
        // A signal asked to stop.
        Error::new(RestoreError::Aborted)
    } else if let Some(age) = age::error_in(&error) {
        match age {
            AgeError::NoIdentity => Error::new(BadUsage(age.to_string())),
            _ => bad(age.to_string()),
        }
    } else if is_damage(&error) || xva::is_broken(&error) {
        bad(error.to_string())
    } else {
        Error::new(error)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A small file of a large image is read at once, but used gradually.
    #[test]
    fn what_a_decompressor_has_read_ahead_is_not_used() {
        // The head of a libxc stream, and zeros.
        let mut image = vec![0xff; 8];
        image.extend_from_slice(b"XENF\0\0\0\x03");
        image.resize(64 << 20, 0);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&image).expect("memory");
        let packed = packed.finish().expect("memory");
        let length = packed.len() as u64;
        let mut peeled = peel(Box::new(Cursor::new(packed)), Wanted::default()).expect("a stream");
        let used = peeled.used.clone().expect("a compression");
        let mut half = (&mut peeled.source).take(32 << 20);
        io::copy(&mut half, &mut io::sink()).expect("gzip");
        let at = used.position();
        assert!(at > length / 3 && at < length * 2 / 3, "{at} of {length}");
        io::copy(&mut peeled.source, &mut io::sink()).expect("gzip");
        assert_eq!(used.position(), length);
    }
}
