//! Suspend images of xapi, as `convert --to xapi` writes them.
//!
//! | record | contents |
//! |---|---|
//! | Xenops | that of the source, byte for byte; for other sources one without a VM, as xenopsd allows |
//! | Libxc | the libxc stream |
//! | Qemu_trad | the device model's state, also that of upstream qemu, as xenopsd writes it |
//! | Varstored, Swtpm, … | those of the source, in their order |
//! | End_of_image | |
//!
//! xenopsd reads the records in any order, except that the first must be Xenops.
//!
//! Implementation: `ocaml/xenopsd/xc/domain.ml` of xen-api (`suspend`, `restore_common`).

use std::io::{self, ErrorKind, Read as _, Write};

use anyhow::{Context as _, Error, Result};
use xsr_format::error::WriteError;
use xsr_format::frame::PageEntry;
use xsr_format::transcode::{CopyError, ImageSink, Layer};
use xsr_format::wrapper::xapi::{MAGIC, MAX_QEMU_STATE, XapiKind, record_header};
use xsr_format::write::page_data_head;
use xsr_save_restore::storage::StorageCursor;

use crate::exit::BadUsage;
use crate::file::Input;
use crate::output::Sink;
use crate::peel::Kept;
use crate::text::Count;

/// What xenopsd requires of a Xenops record, and no more: it uses nothing of it in a restore. The
/// time is not the current one, so that the same image is always converted to the same bytes.
const DESCRIPTION: &[u8] = b"((time 19700101T00:00:00Z)(word_size 64))";

/// A suspend image that is being written.
pub(super) struct SuspendImage<'s, 'o> {
    sink: &'s mut Sink<'o>,
    /// Whether the Libxc record has begun.
    begun: bool,
    /// Whether there is a device model's state.
    has_emulator: bool,
}

impl<'s, 'o> SuspendImage<'s, 'o> {
    /// Begins an image with the Xenops record of the source, if that has one.
    pub(super) fn begin(sink: &'s mut Sink<'o>, kept: Option<&Kept>) -> io::Result<Self> {
        sink.write_all(&MAGIC)?;
        let own = kept.and_then(Kept::description);
        let description = own.as_deref().unwrap_or(DESCRIPTION);
        sink.write_all(&record_header(XapiKind::XENOPS, description.len() as u64))?;
        sink.write_all(description)?;
        Ok(Self {
            sink,
            begun: false,
            has_emulator: false,
        })
    }

    /// Ends the image, after the libxc stream and the emulator's state.
    pub(super) fn finish(self, kept: Option<&Kept>) -> Result<()> {
        if let Some(kept) = kept {
            let (records, mut bodies) = kept.records().context("reading a temporary file")?;
            for (kind, bytes) in records {
                self.sink.write_all(&record_header(kind, bytes))?;
                let copied = io::copy(&mut (&mut bodies).take(bytes), self.sink)?;
                if copied < bytes {
                    let error = io::Error::from(ErrorKind::UnexpectedEof);
                    return Err(Error::new(error).context("reading a temporary file"));
                }
            }
        }
        self.sink
            .write_all(&record_header(XapiKind::END_OF_IMAGE, 0))?;
        Ok(())
    }

    fn begin_libxc(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            self.sink.write_all(&record_header(XapiKind::LIBXC, 0))?;
        }
        Ok(())
    }
}

impl Write for SuspendImage<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            self.begin_libxc()?;
        }
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl ImageSink for SuspendImage<'_, '_> {
    fn page_data(&mut self, entries: &[PageEntry]) -> Result<(), WriteError> {
        Ok(self.write_all(&page_data_head(entries)?)?)
    }

    fn emulator_context(&mut self, state: &[u8]) -> io::Result<bool> {
        if std::mem::replace(&mut self.has_emulator, true) {
            return Ok(false);
        }
        let bytes = state.len() as u64;
        if bytes > MAX_QEMU_STATE {
            let why = format!(
                "the device model's state has {bytes} bytes, and xenopsd refuses more than \
                 {MAX_QEMU_STATE}"
            );
            return Err(io::Error::other(why));
        }
        self.sink
            .write_all(&record_header(XapiKind::QEMU_TRAD, bytes))?;
        self.sink.write_all(state)?;
        Ok(true)
    }
}

/// From file to file, in the kernel where possible.
pub(super) fn copy_through(
    source: &mut &StorageCursor,
    bytes: u64,
    to: &mut SuspendImage<'_, '_>,
) -> Result<u64, CopyError> {
    super::copy_bytes(source, bytes, to.sink)
}

/// Checks the options that a suspend image cannot have.
pub(super) fn check(mapped: bool, has_config: bool) -> Result<()> {
    let why = match (mapped, has_config) {
        (true, _) => {
            "a suspend image of xapi has no mapped layout, because its stream may begin at any \
             byte: leave --layout out"
        }
        (_, true) => {
            "a suspend image of xapi has no place for --config: xapi keeps its own of the VM"
        }
        (false, false) => return Ok(()),
    };
    Err(Error::new(BadUsage(why.to_owned())))
}

/// What the image has no place for, in words; records of a libxl stream are named elsewhere.
pub(super) fn losses(input: &Input, own: Layer) -> Vec<String> {
    let mut out: Vec<String> = (input.left_out().iter())
        .map(|left| {
            let bytes = Count(left.bytes, "byte");
            format!(
                "{} ({}, {bytes} at byte {:#x}) is left out: xenopsd would refuse the image",
                left.record, left.what, left.offset
            )
        })
        .collect();
    let configuration = match input.origin() {
        Some(origin) if origin.toolstack == "xapi" => None,
        Some(origin) => Some(origin.words()),
        None => (own == Layer::Xl).then_some("xl's configuration"),
    };
    if let Some(what) = configuration {
        out.push(format!(
            "not carried over: {what}; the VM that xapi resumes from the image keeps its own record"
        ));
    }
    out
}
