//! Output layouts of `xsr convert`: stream and mapped.

use std::io::{self, Read as _, Write};

use xsr_format::error::WriteError;
use xsr_format::frame::PageEntry;
use xsr_format::layout::SparseWrite;
use xsr_format::layout::index::Footer;
use xsr_format::transcode::{CopyError, ImageSink};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::storage::StorageCursor;

use crate::output::Sink;

/// Bytes per copy.
const STEP: usize = 256 << 10;

/// The stream layout, without what the mapped layout has added to the xl header.
#[derive(Debug)]
pub(super) struct Stream<'s, 'o> {
    pub(super) sink: &'s mut Sink<'o>,
    /// The footer of a mapped image that is converted.
    pub(super) footer: Option<Footer>,
}

impl Write for Stream<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl ImageSink for Stream<'_, '_> {
    fn xl_header(&mut self, header: &XlHeader) -> io::Result<()> {
        let header = plain_header(self.footer, header)?;
        self.write_all(&header.encode())
    }
}

/// The xl header without what the mapped layout has added to it.
fn plain_header(footer: Option<Footer>, header: &XlHeader) -> io::Result<XlHeader> {
    match footer {
        Some(footer) => footer.plain_header(header).map_err(io::Error::other),
        None => Ok(header.clone()),
    }
}

/// An image that is mapped anew, perhaps from a mapped one.
#[derive(Debug)]
pub(super) struct Remapped<W> {
    pub(super) sink: W,
    /// The footer of a mapped image that is converted.
    pub(super) footer: Option<Footer>,
}

impl<W: Write> Write for Remapped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl<W: ImageSink> ImageSink for Remapped<W> {
    fn xl_header(&mut self, header: &XlHeader) -> io::Result<()> {
        self.sink.xl_header(&plain_header(self.footer, header)?)
    }

    fn page_data(&mut self, entries: &[PageEntry]) -> Result<(), WriteError> {
        self.sink.page_data(entries)
    }
}

/// The mapped layout: a new file in which page data have fixed places.
#[derive(Debug)]
pub(super) struct Slots<'s, 'o> {
    pub(super) sink: &'s mut Sink<'o>,
    /// Whether zero pages are holes.
    pub(super) sparse: bool,
}

impl Write for Slots<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl SparseWrite for Slots<'_, '_> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        match self.sparse {
            true => self.sink.leave_hole(bytes),
            false => self.sink.write_zeros(bytes),
        }
    }
}

/// From file to file, in the kernel where possible.
pub(super) fn copy_to_stream(
    source: &mut &StorageCursor,
    bytes: u64,
    to: &mut Stream<'_, '_>,
) -> Result<u64, CopyError> {
    super::copy_bytes(source, bytes, to.sink)
}

/// From a file to a writer that inspects the bytes.
pub(super) fn copy_through<W: ImageSink>(
    source: &mut &StorageCursor,
    bytes: u64,
    to: &mut W,
) -> Result<u64, CopyError> {
    let mut room = vec![0; STEP.min(usize::try_from(bytes).unwrap_or(STEP))];
    let mut done = 0;
    while done < bytes {
        let step = room
            .len()
            .min(usize::try_from(bytes - done).unwrap_or(STEP));
        let n = match source.read(&mut room[..step]) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(CopyError::Read(e)),
        };
        to.write_all(&room[..n]).map_err(CopyError::Write)?;
        done += n as u64;
    }
    Ok(done)
}
