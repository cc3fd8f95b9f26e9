//! Saves in the mapped layout (docs/mapped.md, place 2) into a file that xl has opened.
//!
//! xl has written its header before it starts the helper, and libxl appends records afterwards. So
//! the helper writes the header again, with room for the index in its optional data, and leaves the
//! descriptor's position where the libxc stream ends.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::libxl::{LibxlReader, LibxlRecord};
use xsr_format::wrapper::xl::{MAX_OPTIONAL_DATA, XlHeader};
use xsr_save_restore::save::mapped::{MappedImage, MappedOptions};
use xsr_save_restore::storage::file::SharedFileWriter;

/// The most bytes before the libxc stream: xl's header, and the beginning of the libxl stream.
const MOST: u64 = XlHeader::FIXED_BYTES as u64 + MAX_OPTIONAL_DATA as u64 + AFTER_HEADER;

/// Bytes between xl's header and the libxc stream: the libxl header, and a `LIBXC_CONTEXT` record.
const AFTER_HEADER: u64 = 24;

/// A file to which xl saves a domain.
#[derive(Debug)]
pub(crate) struct Target {
    writer: SharedFileWriter,
    header: XlHeader,
    /// What xl has written after the header.
    rest: Vec<u8>,
}

impl Target {
    /// The file of this descriptor; the reason if the layout cannot be used there.
    pub(crate) fn of(stream: &OwnedFd) -> Result<Result<Self, &'static str>> {
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        let Some(writer) = SharedFileWriter::open(file, "the image")? else {
            return Ok(Err("the image does not go to the end of a regular file"));
        };
        let Some(begun) = writer.begun(MOST).context("reading what xl has written")? else {
            return Ok(Err("the image does not begin with an xl header"));
        };
        Ok(match parts(&begun) {
            Some((header, rest)) => Ok(Self {
                header,
                rest: rest.to_vec(),
                writer,
            }),
            None => Err("what precedes the stream was not written by xl save"),
        })
    }

    /// The image in this file.
    pub(crate) fn image(&self, options: MappedOptions) -> Result<MappedImage<'_>> {
        let image = MappedImage::new(&self.writer, options);
        image.set_header(self.header.clone());
        image.sink().write_all(&self.rest)?;
        Ok(image)
    }

    /// The image is complete, and ends at this byte: libxl continues there.
    pub(crate) fn end_at(self, end: u64) -> Result<()> {
        self.writer.end_at(end).context("seeking to the end")
    }
}

/// xl's header and what follows it, if nothing else precedes the libxc stream.
fn parts(begun: &[u8]) -> Option<(XlHeader, &[u8])> {
    let options = ReadOptions::default();
    let header = XlHeader::read(begun, options).ok()?;
    header.config()?;
    let rest = begun.get(usize::try_from(header.bytes()).ok()?..)?;
    let mut stream = rest;
    let mut libxl = LibxlReader::new(&mut stream, options).ok()?;
    let first = libxl.next_record().ok()??;
    let is_context = matches!(first, LibxlRecord::LibxcContext);
    (is_context && stream.is_empty()).then_some((header, rest))
}
