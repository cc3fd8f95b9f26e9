//! Decompresses files as they are read, with the rules of gzip, zstd, lz4 and xz: consecutive
//! frames, skippable frames and padding are valid. Memory is limited to a window of the compressor,
//! at most [`MAX_WINDOW`], however large the contents claim to be.
//!
//! | what follows the last frame | gzip | zstd, lz4 | xz |
//! |---|---|---|---|
//! | another frame | read | read | read |
//! | zeros up to the end | padding | padding | padding, of a multiple of 4 |
//! | anything else | ignored, with a warning | damaged | damaged |
//!
//! (zstd and lz4 themselves reject padding. A block device has it after a file.)

use std::fmt;
use std::io::{self, BufRead as _, ErrorKind, Read};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Error, Result};
use flate2::bufread::GzDecoder;
use lz4_flex::frame::FrameDecoder as Lz4Decoder;
use lzma_rust2::XzReader;
use xsr_format::detect::Compression;

use super::Source;
use super::packed::{Packed, Progress};
use super::zstd::{self, ZstdFrame};
use crate::exit::{self, BadImage};
use crate::text::Count;

/// The largest window allowed, which `xz -9` and `zstd --ultra -22` use (64 and 128 MiB).
pub(super) const MAX_WINDOW: u64 = 128 << 20;

/// How much padding is read. A block device may have any amount.
const MAX_PADDING: u64 = 16 << 20;

/// Notes about the data, for the reader of the image.
pub(crate) type Notes = Arc<Mutex<Vec<String>>>;

/// Add a note.
pub(super) fn note(notes: &Notes, text: String) {
    notes
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(text);
}

/// What is wrong with compressed data.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wrong {
    Truncated,
    Checksum,
    Window,
    Dictionary,
    Behind,
    XzPadding,
    Data,
}

/// The error about compressed data.
#[derive(Debug)]
struct Damage {
    compression: Compression,
    wrong: Wrong,
    /// The compressed bytes that had been used.
    at: u64,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            compression,
            wrong,
            at,
        } = self;
        match wrong {
            Wrong::Truncated => write!(
                f,
                "its {compression} data end too early, at byte {at:#x}; the file is truncated: \
                 copy it again from where it came"
            ),
            Wrong::Checksum => write!(
                f,
                "a checksum of its {compression} data is wrong, before byte {at:#x}; the file is \
                 damaged: copy it again from where it came"
            ),
            Wrong::Window => write!(
                f,
                "its {compression} data want more than {} MiB of memory: decompress it first: {} \
                 FILE | …",
                MAX_WINDOW >> 20,
                exit::decompressor(*compression)
            ),
            Wrong::Dictionary => write!(
                f,
                "its {compression} data were compressed with a dictionary: decompress it first, \
                 with that"
            ),
            Wrong::Behind => write!(
                f,
                "what follows its {compression} data, at byte {at:#x}, is neither {compression} \
                 data nor padding; the file is damaged, or something was appended to it"
            ),
            Wrong::XzPadding => write!(
                f,
                "the padding behind its xz data, up to byte {at:#x}, is not a multiple of 4 bytes; \
                 the file is truncated or damaged"
            ),
            Wrong::Data => write!(
                f,
                "its {compression} data are damaged, before byte {at:#x}: copy it again from \
                 where it came"
            ),
        }
    }
}

impl std::error::Error for Damage {}

/// Whether an error is about damaged compressed data.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn std::error::Error + Send + Sync>::is::<Damage>)
}

/// The memory for the windows of all layers of compression, at most [`MAX_WINDOW`] together.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows(Arc<AtomicU64>);

/// One layer's share.
#[derive(Debug)]
struct Window {
    all: Windows,
    bytes: u64,
}

impl Window {
    /// The largest window possible for this layer.
    fn most(&self) -> u64 {
        let others = self.all.0.load(Ordering::Relaxed) - self.bytes;
        MAX_WINDOW.saturating_sub(others)
    }

    /// Replaces the share by another, unless that is too large. Returns whether it fits.
    fn take(&mut self, bytes: u64) -> bool {
        let fits = bytes <= self.most();
        if fits {
            self.all.0.fetch_sub(self.bytes, Ordering::Relaxed);
            self.all.0.fetch_add(bytes, Ordering::Relaxed);
            self.bytes = bytes;
        }
        fits
    }
}

/// The dictionary size in the header of the first block of xz data; `None` if there is no such
/// header.
fn xz_dictionary(head: &[u8]) -> Option<u64> {
    /// The length of the stream's header.
    const STREAM: usize = 12;
    const LZMA2: u8 = 0x21;
    let [_, flags, rest @ ..] = head.get(STREAM..)? else {
        return None;
    };
    let mut fields = rest.iter().copied();
    // Sizes, in a variable-length encoding.
    for _ in 0..(flags >> 6).count_ones() {
        fields.find(|byte| byte & 0x80 == 0)?;
    }
    for _ in 0..=flags & 3 {
        let (filter, properties) = (fields.next()?, fields.next()?);
        let first = fields.clone().next();
        for _ in 0..properties {
            fields.next()?;
        }
        if filter == LZMA2 {
            let bits = first?;
            return match bits {
                0..40 => Some(u64::from(2 | bits & 1) << (bits / 2 + 11)),
                _ => Some(u32::MAX.into()),
            };
        }
    }
    None
}

/// The contents of a compressed source, and how many bytes of it have been used.
///
/// # Errors
///
/// The compression is not supported.
pub(super) fn decompressed(
    compression: Compression,
    source: Source,
    notes: &Notes,
    windows: &Windows,
) -> Result<(Source, Arc<Progress>)> {
    if compression == Compression::Bzip2 {
        let command = exit::decompressor(compression);
        return Err(Error::new(BadImage(format!(
            "compressed with {compression}, which neither libvirt's xl driver nor xapi offers; \
             decompress it first: {command} FILE | …"
        ))));
    }
    let (packed, progress) = Packed::new(source);
    let frames = Frames {
        compression,
        progress: Arc::clone(&progress),
        notes: Arc::clone(notes),
        now: Now::Between(packed),
        any: false,
        window: Window {
            all: windows.clone(),
            bytes: 0,
        },
    };
    Ok((Box::new(frames), progress))
}

/// Consecutive frames of one compression.
struct Frames {
    compression: Compression,
    progress: Arc<Progress>,
    notes: Notes,
    now: Now,
    /// Whether a frame has been read.
    any: bool,
    window: Window,
}

/// The reading state.
enum Now {
    Between(Packed),
    Gzip(GzDecoder<Packed>),
    Zstd(ZstdFrame),
    Lz4(Box<Lz4Decoder<Packed>>),
    Lz4Legacy(Lz4Legacy),
    Xz(Box<XzReader<Packed>>),
    Over,
}

impl Now {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(frame) => frame.read(room),
            Self::Zstd(frame) => frame.read(room),
            Self::Lz4(frame) => frame.read(room),
            Self::Lz4Legacy(frame) => frame.read(room),
            Self::Xz(frame) => frame.read(room),
            Self::Between(_) | Self::Over => Ok(0),
        }
    }

    /// The state after a frame.
    fn behind(self) -> Self {
        Self::Between(match self {
            Self::Gzip(frame) => frame.into_inner(),
            Self::Zstd(frame) => frame.into_inner(),
            Self::Lz4(frame) => frame.into_inner(),
            Self::Lz4Legacy(frame) => frame.packed,
            Self::Xz(frame) => frame.into_inner(),
            Self::Between(packed) => packed,
            Self::Over => return Self::Over,
        })
    }
}

const ZSTD: [u8; 4] = *b"\x28\xb5\x2f\xfd";
const LZ4: [u8; 4] = *b"\x04\x22\x4d\x18";
const LZ4_LEGACY: [u8; 4] = *b"\x02\x21\x4c\x18";
const XZ: &[u8] = b"\xfd7zXZ\0";
/// The number of bytes that contain a frame's window size.
const ZSTD_HEAD: usize = 18;
const XZ_HEAD: usize = 64;
/// The magic of a skippable frame, without its first byte (0x50 to 0x5f).
const SKIPPED: [u8; 3] = *b"\x2a\x4d\x18";

impl Frames {
    fn damage(&self, wrong: Wrong) -> io::Error {
        let damage = Damage {
            compression: self.compression,
            wrong,
            at: self.progress.used(),
        };
        io::Error::new(ErrorKind::InvalidData, damage)
    }

    /// The meaning of a decompressor's error.
    fn judged(&self, error: io::Error) -> io::Error {
        if let Some(age) = self.progress.encryption() {
            return age.into();
        }
        if error.kind() == ErrorKind::Interrupted || self.progress.failed() || is_damage(&error) {
            return error;
        }
        let text = error.to_string().to_ascii_lowercase();
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        self.damage(match error.kind() {
            ErrorKind::OutOfMemory => Wrong::Window,
            ErrorKind::UnexpectedEof => Wrong::Truncated,
            _ if self.progress.ran_out() => Wrong::Truncated,
            _ if says(&["window_size is too big", "window_size bigger"]) => Wrong::Window,
            _ if says(&["dictionary", "dictnotprovided"]) => Wrong::Dictionary,
            _ if says(&["checksum", "crc"]) => Wrong::Checksum,
            _ => Wrong::Data,
        })
    }

    /// Begin the next frame, or end.
    fn begin(&mut self, mut packed: Packed) -> io::Result<Now> {
        loop {
            let head = packed.peek(8)?;
            if head.is_empty() {
                return Ok(Now::Over);
            }
            let begins = |magic: &[u8]| head.starts_with(magic);
            match self.compression {
                Compression::Gzip if begins(b"\x1f\x8b") => {
                    return Ok(Now::Gzip(GzDecoder::new(packed)));
                }
                Compression::Xz if begins(XZ) => {
                    /// The decoder's memory in addition to its dictionary.
                    const REST: u64 = 1 << 20;
                    let wanted = xz_dictionary(packed.peek(XZ_HEAD)?);
                    let wanted = wanted.map_or(self.window.most(), |dictionary| dictionary + REST);
                    if !self.window.take(wanted) {
                        return Err(self.damage(Wrong::Window));
                    }
                    let kib = u32::try_from(wanted >> 10).unwrap_or(u32::MAX);
                    let frame = XzReader::new_mem_limit(packed, false, kib);
                    return Ok(Now::Xz(Box::new(frame)));
                }
                Compression::Zstd | Compression::Lz4 => match head.first_chunk::<4>() {
                    Some(&ZSTD) => {
                        if !self.window.take(zstd::window(packed.peek(ZSTD_HEAD)?)) {
                            return Err(self.damage(Wrong::Window));
                        }
                        return Ok(Now::Zstd(ZstdFrame::begin(packed)?));
                    }
                    Some(&LZ4) => return Ok(Now::Lz4(Box::new(Lz4Decoder::new(packed)))),
                    Some(&LZ4_LEGACY) => {
                        packed.consume(4);
                        return Ok(Now::Lz4Legacy(Lz4Legacy::new(packed)));
                    }
                    Some([0x50..=0x5f, rest @ ..]) if *rest == SKIPPED => {
                        self.skip(&mut packed)?;
                        continue;
                    }
                    Some(_) => {}
                    // A truncated magic.
                    None if [ZSTD, LZ4].iter().any(|magic| magic.starts_with(head)) => {
                        return Err(self.damage(Wrong::Truncated));
                    }
                    None => {}
                },
                Compression::Xz if head.len() < XZ.len() && XZ.starts_with(head) => {
                    return Err(self.damage(Wrong::Truncated));
                }
                _ => {}
            }
            return match self.any {
                true => self.behind_the_last(packed),
                false => Err(self.damage(Wrong::Data)),
            };
        }
    }

    /// Skip a skippable frame of zstd or lz4.
    fn skip(&mut self, packed: &mut Packed) -> io::Result<()> {
        let length = match packed.peek(8)? {
            [_, _, _, _, length @ ..] => length.first_chunk().copied(),
            _ => None,
        };
        let whole = match length {
            Some(length) => packed.skip(8 + u64::from(u32::from_le_bytes(length)))?,
            None => false,
        };
        match whole {
            true => {
                self.any = true;
                Ok(())
            }
            false => Err(self.damage(Wrong::Truncated)),
        }
    }

    /// Read padding, or reject what is not padding.
    fn behind_the_last(&mut self, mut packed: Packed) -> io::Result<Now> {
        let start = self.progress.used();
        let compression = self.compression;
        let mut zeros = 0_u64;
        let what = loop {
            let bytes = packed.peek(1)?;
            if bytes.is_empty() || zeros > MAX_PADDING {
                break None;
            }
            let count = bytes.iter().take_while(|byte| **byte == 0).count();
            let more = bytes.len() > count;
            packed.consume(count);
            zeros += count as u64;
            if more {
                break Some(());
            }
        };
        match (compression, what) {
            (Compression::Xz, _) if !zeros.is_multiple_of(4) && zeros <= MAX_PADDING => {
                return Err(self.damage(Wrong::XzPadding));
            }
            (Compression::Xz, Some(())) if zeros > 0 && packed.peek(6)?.starts_with(XZ) => {
                return Ok(Now::Between(packed));
            }
            (Compression::Gzip, Some(())) => {
                let text = format!(
                    "what follows the gzip data, at byte {start:#x}, is no gzip data and is \
                     ignored, as gzip does"
                );
                note(&self.notes, text);
            }
            (_, Some(())) => return Err(self.damage(Wrong::Behind)),
            (_, None) => {
                let bytes = Count(zeros, "byte");
                let more = if zeros > MAX_PADDING { " or more" } else { "" };
                let text = format!("{bytes}{more} of zeros after the {compression} data");
                note(&self.notes, text);
            }
        }
        Ok(Now::Over)
    }

    fn next(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match mem::replace(&mut self.now, Now::Over) {
                Now::Over => return Ok(0),
                Now::Between(packed) => self.now = self.begin(packed)?,
                mut frame => match frame.read(room)? {
                    0 => {
                        self.any = true;
                        self.now = frame.behind();
                    }
                    n => {
                        self.now = frame;
                        return Ok(n);
                    }
                },
            }
        }
    }
}

impl Read for Frames {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if room.is_empty() {
            return Ok(0);
        }
        self.next(room).map_err(|e| self.judged(e))
    }
}

/// LZ4's legacy format (`lz4 -l`, the kernel's): blocks of 8 MiB without checksums, up to the end
/// or to the magic of another frame.
struct Lz4Legacy {
    packed: Packed,
    block: Vec<u8>,
    at: usize,
}

impl Lz4Legacy {
    const BLOCK: usize = 8 << 20;
    /// The longest that a compressed block can be.
    const MOST: usize = Self::BLOCK + Self::BLOCK / 255 + 16;

    fn new(packed: Packed) -> Self {
        Self {
            packed,
            block: Vec::new(),
            at: 0,
        }
    }

    /// Read the next block. Returns whether there is one.
    fn more(&mut self) -> io::Result<bool> {
        let Some(length) = self.packed.peek(4)?.first_chunk::<4>().copied() else {
            return match self.packed.peek(1)? {
                [] => Ok(false),
                _ => Err(ErrorKind::UnexpectedEof.into()),
            };
        };
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        // A magic, or padding.
        if length > Self::MOST || length == 0 {
            return Ok(false);
        }
        self.packed.consume(4);
        let mut packed = Vec::new();
        let mut source = self.packed.by_ref().take(length as u64);
        if source.read_to_end(&mut packed)? < length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.block.resize(Self::BLOCK, 0);
        let n = lz4_flex::block::decompress_into(&packed, &mut self.block)
            .map_err(|e| io::Error::other(e.to_string()))?;
        self.block.truncate(n);
        self.at = 0;
        Ok(true)
    }
}

impl Read for Lz4Legacy {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.more()? {
                return Ok(0);
            }
        }
        let ready = &self.block[self.at..];
        let n = ready.len().min(room.len());
        room[..n].copy_from_slice(&ready[..n]);
        self.at += n;
        Ok(n)
    }
}
