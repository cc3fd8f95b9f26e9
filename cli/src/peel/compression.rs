//! Compressed files, decompressed as they are read. However large the contents claim to be,
//! no more memory is taken than a window of the compressor: [`MAX_WINDOW`] at most.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Error, Result};
use flate2::bufread::MultiGzDecoder;
use lz4_flex::frame::FrameDecoder as Lz4Decoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use xsr_format::detect::Compression;

use super::Source;
use crate::exit::BadImage;

/// The largest window that is allowed: what `xz -9` and `zstd --ultra -22` use (64 and
/// 128 MiB).
const MAX_WINDOW: u64 = 128 << 20;

/// A source of which it is known whether it failed itself.
struct Watched {
    source: Source,
    failed: Arc<AtomicBool>,
}

impl Read for Watched {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let result = self.source.read(room);
        if let Err(e) = &result
            && e.kind() != ErrorKind::Interrupted
        {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }
}

/// What a decompressor does not like.
#[derive(Debug)]
struct Damage {
    compression: Compression,
    why: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { compression, why } = self;
        write!(f, "its {compression} data are damaged or cut off: {why}")
    }
}

impl std::error::Error for Damage {}

/// Whether an error says that compressed data are damaged.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn std::error::Error + Send + Sync>::is::<Damage>)
}

/// Tells failures of the source from damage.
struct Judged<D> {
    decoder: D,
    failed: Arc<AtomicBool>,
    compression: Compression,
}

impl<D: Read> Read for Judged<D> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.decoder.read(room) {
            Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
            Err(e) if self.failed.load(Ordering::Relaxed) => Err(e),
            Err(e) => Err(io::Error::new(
                ErrorKind::InvalidData,
                Damage {
                    compression: self.compression,
                    why: e.to_string(),
                },
            )),
            other => other,
        }
    }
}

/// What is in a compressed source.
///
/// # Errors
///
/// A compression that is not read here.
pub(super) fn decompressed(compression: Compression, source: Source) -> Result<Source> {
    let failed = Arc::new(AtomicBool::new(false));
    let watched = BufReader::with_capacity(
        256 << 10,
        Watched {
            source,
            failed: Arc::clone(&failed),
        },
    );
    let decoder: Source = match compression {
        Compression::Gzip => Box::new(MultiGzDecoder::new(watched)),
        Compression::Zstd => Box::new(ZstdFrames::new(watched)),
        Compression::Lz4 => Box::new(Lz4Decoder::new(watched)),
        Compression::Xz => {
            let kib = u32::try_from(MAX_WINDOW >> 10).unwrap_or(u32::MAX);
            Box::new(XzReader::new_mem_limit(watched, true, kib))
        }
        Compression::Bzip2 => {
            let command = compression.command();
            return Err(Error::new(BadImage(format!(
                "compressed with {compression}, which neither libvirt's xl driver nor xapi \
                 offers; decompress it first: {command} FILE | …"
            ))));
        }
    };
    Ok(Box::new(Judged {
        decoder,
        failed,
        compression,
    }))
}

/// Frames of zstd, one behind the other, and those between that decoders skip.
struct ZstdFrames {
    source: BufReader<Watched>,
    decoder: Box<FrameDecoder>,
    in_frame: bool,
}

impl ZstdFrames {
    fn new(source: BufReader<Watched>) -> Self {
        let mut decoder = Box::new(FrameDecoder::new());
        decoder.set_max_window_size(MAX_WINDOW);
        Self {
            source,
            decoder,
            in_frame: false,
        }
    }

    /// Begin the next frame; `false` where there is none.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let octets = u64::from(length);
                    let skipped =
                        io::copy(&mut self.source.by_ref().take(octets), &mut io::sink())?;
                    if skipped < octets {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::other(e.to_string())),
            }
        }
    }

    /// The frame is over: is it what was compressed?
    fn check(&self) -> io::Result<()> {
        let expected = self.decoder.get_checksum_from_data();
        match expected.is_none() || expected == self.decoder.get_calculated_checksum() {
            true => Ok(()),
            false => Err(io::Error::other("the checksum of a frame is wrong")),
        }
    }
}

impl Read for ZstdFrames {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame {
                if !self.next_frame()? {
                    return Ok(0);
                }
                self.in_frame = true;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(room);
            }
            if self.decoder.is_finished() {
                self.check()?;
                self.in_frame = false;
                continue;
            }
            self.decoder
                .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(|e| io::Error::other(e.to_string()))?;
        }
    }
}
