//! One frame of zstd, with its checksum verified.

use std::io::{self, Read};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::compression::MAX_WINDOW;
use super::packed::Packed;

/// A frame.
pub(super) struct ZstdFrame {
    packed: Packed,
    decoder: Box<FrameDecoder>,
}

impl ZstdFrame {
    /// Read the header of a frame.
    pub(super) fn begin(mut packed: Packed) -> io::Result<Self> {
        let mut decoder = Box::new(FrameDecoder::new());
        decoder.set_max_window_size(MAX_WINDOW);
        decoder.reset(&mut packed).map_err(error)?;
        Ok(Self { packed, decoder })
    }

    /// What follows the frame.
    pub(super) fn into_inner(self) -> Packed {
        self.packed
    }

    /// Verifies the checksum at the end of the frame.
    fn check(&self) -> io::Result<()> {
        let expected = self.decoder.get_checksum_from_data();
        match expected.is_none() || expected == self.decoder.get_calculated_checksum() {
            true => Ok(()),
            false => Err(io::Error::other("checksum")),
        }
    }
}

/// The window size in a frame's header (RFC 8878, 3.1.1.1); 0 if the header is truncated.
pub(super) fn window(head: &[u8]) -> u64 {
    const MAGIC: usize = 4;
    let Some([descriptor, rest @ ..]) = head.get(MAGIC..) else {
        return 0;
    };
    let Some(window) = rest.first() else { return 0 };
    if descriptor & 1 << 5 == 0 {
        let base = 1_u64 << (10 + (window >> 3));
        return base + base / 8 * u64::from(window & 7);
    }
    // A single segment: the window holds all of the contents.
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let length = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let Some(field) = rest.get(dictionary..dictionary + length) else {
        return 0;
    };
    let mut bytes = [0; 8];
    bytes[..length].copy_from_slice(field);
    u64::from_le_bytes(bytes).saturating_add(if length == 2 { 256 } else { 0 })
}

fn error(error: impl std::fmt::Display) -> io::Error {
    // The decoder's message is meant for its developers; it is not shown.
    io::Error::other(error.to_string())
}

impl Read for ZstdFrame {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(room);
            }
            if self.decoder.is_finished() {
                return self.check().map(|()| 0);
            }
            self.decoder
                .decode_blocks(&mut self.packed, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(error)?;
        }
    }
}
