//! Compression of chunks by zstd, and when it is worth its time.

use std::sync::Mutex;
use std::time::Duration;

use zstd_safe::{CCtx, CParameter, DCtx};

use super::frame::{CHUNK, Contents, Malformed};

/// How a session compresses what it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// With zstd at level 1, while that is faster than sending what would be saved.
    Auto,
    /// With zstd at this level, always.
    Zstd(i32),
}

/// How many chunks are compressed to find out whether that is worth it.
const PROBE: u32 = 8;

/// After so many bytes without compression, chunks are compressed again to find out.
const PROBE_EVERY: usize = 64 << 20;

/// The weight of a new measurement.
const WEIGHT: f64 = 1.0 / 16.0;

/// An average that forgets.
#[derive(Clone, Copy, Debug, Default)]
struct Average(Option<f64>);

impl Average {
    fn add(&mut self, value: f64) {
        self.0 = Some(match self.0 {
            None => value,
            Some(average) => average + (value - average) * WEIGHT,
        });
    }
}

/// What is known of the time that a link and the compressor take.
#[derive(Debug)]
struct Measured {
    on: bool,
    /// Chunks that are still compressed to find out.
    probing: u32,
    /// Bytes sent as they are, since the last probe.
    plain: usize,
    /// Nanoseconds that writing a byte takes.
    write: Average,
    /// Nanoseconds that compressing a byte takes.
    compress: Average,
    /// Bytes that are left of a byte.
    ratio: Average,
}

/// Decides whether the chunks of a session are compressed.
#[derive(Debug)]
pub(super) struct Policy {
    how: Compression,
    measured: Mutex<Measured>,
}

impl Policy {
    pub(super) const fn new(how: Compression) -> Self {
        const NONE: Average = Average(None);
        Self {
            how,
            measured: Mutex::new(Measured {
                on: false,
                probing: PROBE,
                plain: 0,
                write: NONE,
                compress: NONE,
                ratio: NONE,
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Measured> {
        let measured = self.measured.lock();
        measured.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether zeroes are replaced by their number.
    fn shortens(&self) -> bool {
        self.how != Compression::None
    }

    /// The level at which a chunk of so many bytes is compressed, if it is.
    fn level(&self, bytes: usize) -> Option<i32> {
        match self.how {
            Compression::None => return None,
            Compression::Zstd(level) => return Some(level),
            Compression::Auto => {}
        }
        let mut measured = self.lock();
        if measured.on {
            return Some(1);
        }
        if measured.probing == 0 {
            measured.plain += bytes;
            if measured.plain < PROBE_EVERY {
                return None;
            }
            measured.plain = 0;
            measured.probing = PROBE;
        }
        measured.probing -= 1;
        Some(1)
    }

    /// Compressing `bytes` took so long and left `left` of them.
    fn compressed(&self, bytes: usize, left: usize, took: Duration) {
        if self.how != Compression::Auto || bytes < CHUNK / 4 {
            return;
        }
        let mut measured = self.lock();
        let bytes = bytes as f64;
        measured.compress.add(took.as_secs_f64() * 1e9 / bytes);
        measured.ratio.add(left as f64 / bytes);
    }

    /// Writing so many bytes took so long.
    pub(super) fn written(&self, bytes: usize, took: Duration) {
        if self.how != Compression::Auto || bytes < CHUNK / 16 {
            return;
        }
        let mut measured = self.lock();
        measured.write.add(took.as_secs_f64() * 1e9 / bytes as f64);
        let (Some(write), Some(compress), Some(ratio)) =
            (measured.write.0, measured.compress.0, measured.ratio.0)
        else {
            return;
        };
        // The kernel sends while the next chunk is compressed: the slower of the two counts.
        let with = compress.max(ratio * write);
        let was = measured.on;
        measured.on = match was {
            true => write > with,
            false => write > with * 1.2,
        };
        if measured.on != was {
            tracing::debug!(on = measured.on, write, compress, ratio, "compression");
        }
    }
}

/// The compressor of a link.
pub(super) struct Compressor {
    context: CCtx<'static>,
    room: Vec<u8>,
}

impl Compressor {
    pub(super) fn new() -> Self {
        Self {
            context: CCtx::create(),
            room: vec![0; CHUNK],
        }
    }

    /// The contents of a chunk, in the form in which they travel.
    pub(super) fn pack<'a>(&'a mut self, bytes: &'a [u8], policy: &Policy) -> Contents<'a> {
        if policy.shortens() && bytes.iter().all(|byte| *byte == 0) {
            return Contents::Zeroes(bytes.len());
        }
        let Some(level) = policy.level(bytes.len()) else {
            return Contents::Plain(bytes);
        };
        let begun = std::time::Instant::now();
        // A frame that does not fit is not shorter than the contents.
        let most = bytes.len().saturating_sub(1).min(self.room.len());
        let set = self
            .context
            .set_parameter(CParameter::CompressionLevel(level));
        let made = set.and_then(|_| self.context.compress2(&mut self.room[..most], bytes));
        let left = made.unwrap_or(bytes.len());
        policy.compressed(bytes.len(), left, begun.elapsed());
        match left < bytes.len() {
            true => Contents::Zstd {
                length: bytes.len(),
                frame: &self.room[..left],
            },
            false => Contents::Plain(bytes),
        }
    }
}

/// The decompressor of a link.
pub(super) struct Decompressor(DCtx<'static>);

impl Decompressor {
    pub(super) fn new() -> Self {
        Self(DCtx::create())
    }

    /// The contents of a chunk, of which `length` is stated: at most [`CHUNK`].
    pub(super) fn unpack(
        &mut self,
        number: u64,
        length: usize,
        frame: &[u8],
    ) -> Result<Vec<u8>, Malformed> {
        let mut bytes = vec![0; length.min(CHUNK)];
        match self.0.decompress(&mut bytes[..], frame) {
            Ok(n) if n == length => Ok(bytes),
            _ => Err(Malformed::Compressed(number)),
        }
    }
}

#[cfg(test)]
#[path = "compress/tests.rs"]
mod tests;
