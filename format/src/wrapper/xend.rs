//! Header of a file saved by xend (`xm save`, Xen 3.0 to 4.4): the domain's configuration as an
//! s-expression. A legacy stream follows, and for an HVM guest the device model's state up to the
//! end of the file, which the legacy reader handles.
//!
//! | bytes | field |
//! |---|---|
//! | 0–15 | magic, `LinuxGuestRecord` |
//! | 16–19 | length of the configuration, a signed number, big endian |
//! | 20– | the configuration |
//!
//! A specification does not exist. Implementation: `tools/python/xen/xend/XendCheckpoint.py` as of
//! Xen 4.4.

use std::io::Read;

use thiserror::Error;

use crate::error::{Place, ReadError, ReadErrorCause};
use crate::source::{fill, fill_growing};

/// The magic at the start of such a file.
pub const MAGIC: [u8; 16] = *b"LinuxGuestRecord";

/// Maximum size of the configuration. Those of xend have a few kilobytes.
pub const MAX_CONFIG: u32 = 16 << 20;

/// A broken rule of xend's header.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum XendError {
    /// The first bytes are not xend's.
    #[error("magic is {:?}, expected {:?}", got.escape_ascii().to_string(), MAGIC.escape_ascii().to_string())]
    Magic {
        /// The value found.
        got: [u8; 16],
    },
    /// No configuration, or more than xend would write.
    #[error("the configuration has {got} bytes, expected 1 to {MAX_CONFIG}")]
    ConfigLength {
        /// The value found.
        got: u32,
    },
}

/// xend's header.
///
/// ```
/// use xsr_format::wrapper::xend::{MAGIC, XendHeader};
///
/// let config = b"(domain (name web))";
/// let mut image = MAGIC.to_vec();
/// image.extend(u32::try_from(config.len())?.to_be_bytes());
/// image.extend(config);
/// image.extend(b"the legacy stream");
///
/// let mut source = &image[..];
/// let header = XendHeader::read(&mut source)?;
/// assert_eq!(header.config(), config);
/// // The legacy reader continues here, at this offset of the file.
/// assert_eq!(source, b"the legacy stream");
/// assert_eq!(header.bytes(), 39);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XendHeader {
    config: Vec<u8>,
}

impl XendHeader {
    /// Length of the part before the configuration.
    pub const FIXED_BYTES: usize = 20;

    /// Reads the header from the start of a file: exactly its bytes.
    ///
    /// # Errors
    ///
    /// The source failed or ended, or a rule is broken.
    pub fn read(mut source: impl Read) -> Result<Self, ReadError> {
        Self::read_from(&mut source).map_err(|cause| ReadError::at(Place::XendHeader, 0, cause))
    }

    fn read_from(source: &mut impl Read) -> Result<Self, ReadErrorCause> {
        let mut magic = [0; MAGIC.len()];
        fill(source, &mut magic)?;
        if magic != MAGIC {
            return Err(XendError::Magic { got: magic }.into());
        }
        let mut length = [0; 4];
        fill(source, &mut length)?;
        let length = u32::from_be_bytes(length);
        if !(1..=MAX_CONFIG).contains(&length) {
            return Err(XendError::ConfigLength { got: length }.into());
        }
        let mut config = Vec::new();
        fill_growing(source, &mut config, u64::from(length))?;
        Ok(Self { config })
    }

    /// The configuration: an s-expression.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Length of the header with the configuration, which is the offset of the stream.
    pub fn bytes(&self) -> u64 {
        (self.config.len() as u64).saturating_add(Self::FIXED_BYTES as u64)
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )]

    use super::*;

    fn file(length: i32, config: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &length.to_be_bytes(), config].concat()
    }

    #[test]
    fn the_header_is_read_and_not_one_byte_more() {
        let mut file = file(9, b"(domain )");
        file.extend(b"stream");
        let mut source = file.as_slice();
        let header = XendHeader::read(&mut source).unwrap();
        assert_eq!(header.config(), b"(domain )");
        assert_eq!(header.bytes(), 29);
        assert_eq!(source, b"stream");
    }

    #[test]
    fn a_length_that_xend_cannot_have_written_is_refused() {
        for length in [0, -1, i32::MIN, i32::MAX] {
            let error = XendHeader::read(file(length, b"(").as_slice()).unwrap_err();
            assert!(matches!(
                error.cause,
                ReadErrorCause::Xend(XendError::ConfigLength { .. })
            ));
        }
    }

    #[test]
    fn a_header_that_is_cut_off_is_truncated_wherever_it_is_cut() {
        let whole = file(4, b"(a b");
        for end in 0..whole.len() {
            let error = XendHeader::read(&whole[..end]).unwrap_err();
            assert!(
                matches!(error.cause, ReadErrorCause::Truncated { .. }),
                "{end}: {error}"
            );
            assert_eq!(error.position.place, Place::XendHeader);
        }
    }
}
