//! Compression by zstd in frames of 64 KiB of contents, with a table of them at the end (zstd's
//! seekable format): any zstd reads it, and a reader that knows the table decompresses any part
//! alone.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::thread;

use zstd_safe::{CCtx, CParameter};

/// Bytes of contents in a frame; the last may have fewer.
pub(crate) const FRAME: usize = 64 << 10;
/// Frames for each thread that are compressed at a time.
const AHEAD: usize = 8;
/// zstd's own default.
const LEVEL: i32 = 3;

/// The magic of a skippable frame, and of the table's footer.
const SKIPPABLE: u32 = 0x184d_2a5e;
const SEEKABLE: u32 = 0x8f92_eab1;
/// The most frames of a table: its length has 32 bits.
const MAX_FRAMES: usize = 0x0800_0000;

/// A compressed frame.
struct Frame {
    contents: u32,
    packed: Vec<u8>,
}

/// Compresses what is written to it.
pub(crate) struct Compressing<W> {
    sink: W,
    threads: usize,
    waiting: Vec<u8>,
    /// The compressed and the plain length of each frame.
    table: Vec<(u32, u32)>,
}

impl<W: Write> Compressing<W> {
    pub(crate) fn new(sink: W, threads: NonZeroUsize) -> Self {
        Self {
            sink,
            threads: threads.get(),
            waiting: Vec::with_capacity(threads.get() * AHEAD * FRAME),
            table: Vec::new(),
        }
    }

    /// Compresses and writes what is waiting. The frames do not depend on the number of threads.
    fn compress(&mut self) -> io::Result<()> {
        let share = self
            .waiting
            .len()
            .div_ceil(FRAME)
            .div_ceil(self.threads)
            .max(1);
        let shares = self.waiting.chunks(share * FRAME);
        let packed = thread::scope(|scope| {
            let started = shares.map(|share| {
                let thread = thread::Builder::new().name("zstd".to_owned());
                // Where there is no thread left, this one does it.
                let started = thread.spawn_scoped(scope, || frames(share));
                started.map_err(|_| frames(share))
            });
            let started: Vec<_> = started.collect();
            let ended = started.into_iter().map(|started| match started {
                Ok(thread) => match thread.join() {
                    Ok(frames) => frames,
                    Err(_) => Err(io::Error::other("a thread that compresses has panicked")),
                },
                Err(frames) => frames,
            });
            ended.collect::<io::Result<Vec<_>>>()
        })?;
        for frame in packed.into_iter().flatten() {
            self.sink.write_all(&frame.packed)?;
            let length = u32::try_from(frame.packed.len()).map_err(io::Error::other)?;
            self.table.push((length, frame.contents));
        }
        self.waiting.clear();
        Ok(())
    }

    /// Writes what is waiting and the table.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        /// Of an entry, and of the footer.
        const ENTRY: usize = 8;
        const FOOTER: usize = 9;
        self.compress()?;
        // More than 8 TiB have none: readers of the frames do not need it.
        if self.table.len() <= MAX_FRAMES {
            let count = u32::try_from(self.table.len()).map_err(io::Error::other)?;
            let length = self.table.len() * ENTRY + FOOTER;
            let length = u32::try_from(length).map_err(io::Error::other)?;
            let mut table = Vec::new();
            table.extend(SKIPPABLE.to_le_bytes());
            table.extend(length.to_le_bytes());
            for (packed, contents) in &self.table {
                table.extend(packed.to_le_bytes());
                table.extend(contents.to_le_bytes());
            }
            table.extend(count.to_le_bytes());
            // No checksums in the table: each frame has its own.
            table.push(0);
            table.extend(SEEKABLE.to_le_bytes());
            self.sink.write_all(&table)?;
        }
        Ok(self.sink)
    }
}

/// Compresses these bytes, a frame for each [`FRAME`] of them.
fn frames(bytes: &[u8]) -> io::Result<Vec<Frame>> {
    let failed = |code| io::Error::other(zstd_safe::get_error_name(code));
    let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
    for parameter in [
        CParameter::CompressionLevel(LEVEL),
        CParameter::ChecksumFlag(true),
    ] {
        context.set_parameter(parameter).map_err(failed)?;
    }
    let pieces = bytes.chunks(FRAME).map(|piece| {
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(piece.len()));
        context.compress2(&mut packed, piece).map_err(failed)?;
        let contents = u32::try_from(piece.len()).map_err(io::Error::other)?;
        Ok(Frame { contents, packed })
    });
    pieces.collect()
}

impl<W: Write> Write for Compressing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.threads * AHEAD * FRAME;
        if self.waiting.len() == room {
            self.compress()?;
        }
        let bytes = &bytes[..bytes.len().min(room - self.waiting.len())];
        self.waiting.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(contents: &[u8], threads: usize) -> Vec<u8> {
        let threads = NonZeroUsize::new(threads).expect("not zero");
        let mut sink = Compressing::new(Vec::new(), threads);
        for piece in contents.chunks(10_000) {
            sink.write_all(piece).expect("memory");
        }
        sink.finish().expect("memory")
    }

    /// The frames that a table names, each decompressed alone.
    #[test]
    fn the_table_finds_each_frame_and_the_bytes_do_not_depend_on_threads() {
        for bytes in [0, 1, FRAME, FRAME + 1, 40 * FRAME + 7] {
            let contents: Vec<u8> = (0..bytes)
                .map(|i| u8::try_from(i / 13 % 256).unwrap())
                .collect();
            let file = packed(&contents, 1);
            assert!(file == packed(&contents, 3), "{bytes}");
            let word = |at: usize| {
                let word = file[at..at + 4].try_into().expect("four bytes");
                u32::from_le_bytes(word) as usize
            };
            let end = file.len();
            assert_eq!((word(end - 4), file[end - 5]), (SEEKABLE as usize, 0));
            let count = word(end - 9);
            assert_eq!(count, bytes.div_ceil(FRAME));
            let table = end - 9 - 8 * count;
            assert_eq!(word(table - 8), SKIPPABLE as usize);
            assert_eq!(word(table - 4), 8 * count + 9);
            let (mut at, mut from) = (0, 0);
            for entry in (table..end - 9).step_by(8) {
                let (length, plain) = (word(entry), word(entry + 4));
                let mut frame = Vec::with_capacity(plain);
                zstd_safe::decompress(&mut frame, &file[at..at + length]).expect("a frame");
                assert!(frame == contents[from..from + plain]);
                (at, from) = (at + length, from + plain);
            }
            assert_eq!((at, from), (table - 8, bytes));
        }
    }
}
