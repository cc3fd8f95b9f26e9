//! A compressed migration stream, between two hosts that both run this program.
//!
//! | bytes | |
//! |---|---|
//! | 0–7 | `XSRzstd1`: neither a libxc stream nor a legacy one begins with it |
//! | | chunks, each of which is its length N (4 bytes, little endian, not 0) and a zstd frame of N bytes with 1 byte to 1 MiB of the stream |
//! | | 4 bytes: zero, the end |
//!
//! The receiver reads exactly that, because xenopsd's records follow.

use std::io::{self, Read, Write};
use std::ops::Range;

use xsr_save_restore::source::{Extent, LookAhead, PageSource};
use xsr_xen_backend::ForeignPages;
use zstd_safe::{CCtx, CParameter, DCtx, compress_bound};

/// What such a stream begins with.
const MAGIC: [u8; 8] = *b"XSRzstd1";
/// The most bytes of the stream in a chunk.
const CHUNK: usize = 1 << 20;
/// The fastest of zstd's ordinary levels: the guest is suspended while the last pass is compressed.
const LEVEL: i32 = 1;

fn failed(what: &str, code: usize) -> io::Error {
    let why = zstd_safe::get_error_name(code);
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {why}"))
}

/// Compresses what is written to it. It must be [finished](Self::finish).
pub(crate) struct Compressor<W> {
    to: W,
    context: CCtx<'static>,
    plain: Vec<u8>,
    /// The length of a chunk, and its frame.
    packed: Vec<u8>,
    has_begun: bool,
}

impl<W: Write> Compressor<W> {
    pub(crate) fn new(to: W) -> Self {
        Self {
            to,
            context: CCtx::create(),
            plain: Vec::with_capacity(CHUNK),
            packed: vec![0; 4 + compress_bound(CHUNK)],
            has_begun: false,
        }
    }

    /// Writes what has come as a chunk.
    fn put(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.to.write_all(&MAGIC)?;
        }
        if self.plain.is_empty() {
            return Ok(());
        }
        let (length, frame) = self.packed.split_at_mut(4);
        let set = self
            .context
            .set_parameter(CParameter::CompressionLevel(LEVEL));
        let packed = set.and_then(|_| self.context.compress2(frame, &self.plain));
        let packed = packed.map_err(|code| failed("compressing the stream", code))?;
        let bytes = u32::try_from(packed).map_err(io::Error::other)?;
        length.copy_from_slice(&bytes.to_le_bytes());
        self.to.write_all(&self.packed[..4 + packed])?;
        self.plain.clear();
        Ok(())
    }

    /// Writes the rest and the end.
    ///
    /// # Errors
    ///
    /// The sink's.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.put()?;
        self.to.write_all(&[0; 4])
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.plain.len());
        self.plain.extend_from_slice(&bytes[..taken]);
        if self.plain.len() == CHUNK {
            self.put()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// A stream whose first bytes have been read to find out what it is.
pub(crate) struct Begun<S> {
    first: [u8; MAGIC.len()],
    /// Those of them that are still to be read.
    left: Range<usize>,
    source: S,
}

impl<S: Read> Begun<S> {
    /// Reads the first bytes. Of a stream that ends within them, there are fewer.
    ///
    /// # Errors
    ///
    /// The source's.
    pub(crate) fn new(mut source: S) -> io::Result<Self> {
        let mut first = [0; MAGIC.len()];
        let mut have = 0;
        while have < first.len() {
            match source.read(&mut first[have..]) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            first,
            left: 0..have,
            source,
        })
    }

    pub(crate) fn is_compressed(&self) -> bool {
        self.first == MAGIC
    }

    /// The rest, of a compressed stream.
    pub(crate) fn decompressed(self) -> Decompressor<S> {
        Decompressor {
            from: self.source,
            context: DCtx::create(),
            packed: Vec::new(),
            plain: Vec::with_capacity(CHUNK),
            at: 0,
            has_ended: false,
        }
    }
}

impl<S: Read> Read for Begun<S> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.left.is_empty() {
            return self.source.read(room);
        }
        let n = (&self.first[self.left.clone()]).read(room)?;
        self.left.start += n;
        Ok(n)
    }
}

/// Pages come long after the first bytes.
impl<S: PageSource> PageSource for Begun<S> {
    fn read_pages(&mut self, pages: &ForeignPages, range: Range<usize>) -> io::Result<()> {
        self.source.read_pages(pages, range)
    }

    fn take_extent(&mut self, bytes: u64) -> io::Result<Option<Extent>> {
        self.source.take_extent(bytes)
    }

    fn look_ahead(&mut self) -> io::Result<Option<LookAhead>> {
        self.source.look_ahead()
    }
}

/// The contents of a compressed stream.
pub(crate) struct Decompressor<R> {
    from: R,
    context: DCtx<'static>,
    packed: Vec<u8>,
    plain: Vec<u8>,
    /// How much of it has been read.
    at: usize,
    has_ended: bool,
}

impl<R: Read> Decompressor<R> {
    /// Reads the next chunk, or the end.
    fn next(&mut self) -> io::Result<()> {
        let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
        self.plain.clear();
        self.at = 0;
        let mut length = [0; 4];
        self.exactly(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 {
            self.has_ended = true;
            return Ok(());
        }
        if length > compress_bound(CHUNK) {
            return Err(bad("a chunk of the compressed stream is too long"));
        }
        self.packed.resize(length, 0);
        let mut packed = std::mem::take(&mut self.packed);
        let read = self.exactly(&mut packed);
        self.packed = packed;
        read?;
        let unpacked = self.context.decompress(&mut self.plain, &self.packed[..]);
        unpacked.map_err(|code| failed("decompressing the stream", code))?;
        match self.plain.is_empty() {
            true => Err(bad("a chunk of the compressed stream is empty")),
            false => Ok(()),
        }
    }

    fn exactly(&mut self, room: &mut [u8]) -> io::Result<()> {
        self.from
            .read_exact(room)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(error.kind(), "the compressed stream ends inside a chunk")
                }
                _ => error,
            })
    }

    /// Reads the end, which follows the last byte of the stream.
    ///
    /// # Errors
    ///
    /// The source's; there is more.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        if self.at == self.plain.len() && !self.has_ended {
            self.next()?;
        }
        match self.has_ended {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the compressed stream has more than a libxc stream",
            )),
        }
    }
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.at == self.plain.len() && !self.has_ended {
            self.next()?;
        }
        let n = (&self.plain[self.at..]).read(room)?;
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// Bytes that zstd makes shorter, but not by much.
    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 26) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    fn packed(contents: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut compressor = Compressor::new(&mut out);
        compressor.write_all(contents).unwrap();
        compressor.finish().unwrap();
        out
    }

    fn unpacked(mut from: &[u8]) -> io::Result<Vec<u8>> {
        let begun = Begun::new(&mut from)?;
        assert!(begun.is_compressed());
        let mut contents = Vec::new();
        let mut decompressor = begun.decompressed();
        decompressor.read_to_end(&mut contents)?;
        decompressor.finish()?;
        Ok(contents)
    }

    #[test]
    fn what_was_written_is_read_and_nothing_behind_it() {
        for count in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
            let contents = bytes(count);
            let packed = packed(&contents);
            assert!(packed.len() <= 16 + count * 9 / 10 + 64, "{count}");
            assert!(unpacked(&packed).unwrap() == contents, "{count}");
            let mut behind = packed.clone();
            behind.extend(b"xenopsd");
            let mut rest = &behind[..];
            let mut decompressor = Begun::new(&mut rest).unwrap().decompressed();
            // The reader of a libxc stream stops where that does.
            let mut read = vec![0; count];
            decompressor.read_exact(&mut read).unwrap();
            decompressor.finish().unwrap();
            assert_eq!(rest, b"xenopsd", "{count}");
        }
    }

    #[test]
    fn a_plain_stream_is_read_as_it_is() {
        for count in [0, 3, 7, 8, 40] {
            let contents = bytes(count);
            let mut begun = Begun::new(&contents[..]).unwrap();
            assert!(!begun.is_compressed());
            let mut read = Vec::new();
            begun.read_to_end(&mut read).unwrap();
            assert_eq!(read, contents);
        }
    }

    #[test]
    fn a_stream_that_is_cut_or_damaged_or_goes_on_is_an_error() {
        let contents = bytes(1000);
        let whole = packed(&contents);
        for end in 8..whole.len() {
            let error = unpacked(&whole[..end]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
        let with = |length: u32, frame: &[u8]| {
            let chunk = [&length.to_le_bytes(), frame].concat();
            let stream = [&MAGIC[..], &chunk, &[0; 4]].concat();
            unpacked(&stream).unwrap_err().to_string()
        };
        assert!(with(u32::MAX, &[]).contains("too long"));
        assert!(with(3, b"tea").contains("decompressing the stream"));
        let frame = |contents: &[u8]| {
            let mut out = Vec::with_capacity(compress_bound(contents.len()));
            zstd_safe::compress(&mut out, contents, LEVEL).unwrap();
            out
        };
        let empty = frame(&[]);
        let length = u32::try_from(empty.len()).unwrap();
        assert!(with(length, &empty).contains("is empty"));
        // More than a chunk may have: it is not unpacked.
        let large = frame(&vec![0; CHUNK + 1]);
        let length = u32::try_from(large.len()).unwrap();
        assert!(with(length, &large).contains("decompressing the stream"));

        let mut decompressor = Begun::new(&whole[..]).unwrap().decompressed();
        decompressor.read_exact(&mut [0; 999]).unwrap();
        let error = decompressor.finish().unwrap_err();
        assert!(error.to_string().contains("more than a libxc stream"));
    }
}
