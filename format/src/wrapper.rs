//! What stands around a libxc stream: the xl file header and the libxl stream.
//!
//! A file that `xl save` wrote nests three layers, each of which reads exactly its
//! own octets and hands the source on:
//!
//! ```text
//! xl header │ libxl header │ LIBXC_CONTEXT ┬ libxc stream ┬ emulator records │ END
//! ```
//!
//! Specification: libxl migration stream (revision 2). C implementation:
//! `tools/xl/xl_saverestore.c`, `tools/libs/light/libxl_stream_{read,write}.c`.

use std::fmt;
use std::io::{self, Read};

use thiserror::Error;

use crate::error::ReadErrorCause;
use crate::read::fill;

pub mod libxl;
pub mod xl;

use libxl::{LibxlError, LibxlRecordKind};
use xl::XlError;

/// What was being read when something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The fixed part of the xl file header.
    XlHeader,
    /// The optional data behind it: the configuration.
    XlOptionalData,
    /// The header of the libxl stream.
    LibxlHeader,
    /// A record of the libxl stream.
    LibxlRecord {
        /// Its number, from 0.
        index: u64,
        /// Its kind, once its header has been read.
        kind: Option<LibxlRecordKind>,
    },
}

impl fmt::Display for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::XlHeader => f.write_str("xl header"),
            Self::XlOptionalData => f.write_str("xl header, optional data"),
            Self::LibxlHeader => f.write_str("libxl stream header"),
            Self::LibxlRecord { index, kind: None } => write!(f, "libxl record {index}"),
            Self::LibxlRecord {
                index,
                kind: Some(kind),
            } => write!(f, "libxl record {index} ({kind})"),
        }
    }
}

/// A wrapper that could not be read, and where.
#[derive(Debug, Error)]
#[error("{reading} at octet {offset:#x}: {cause}")]
pub struct WrapperReadError {
    /// What was being read.
    pub reading: Reading,
    /// Where it begins: octets from the start of the file.
    pub offset: u64,
    /// What is wrong.
    pub cause: WrapperErrorCause,
}

/// Why a wrapper could not be read.
#[derive(Debug, Error)]
pub enum WrapperErrorCause {
    /// The source failed.
    #[error("reading failed: {0}")]
    Io(#[source] io::Error),
    /// The file ends too early.
    #[error("file ends inside it: {needed} octets more were expected, the file is truncated")]
    Truncated {
        /// Octets that were still to come.
        needed: u64,
    },
    /// The xl header breaks a rule.
    #[error("{0}")]
    Xl(#[from] XlError),
    /// The libxl stream breaks a rule.
    #[error("{0}")]
    Libxl(#[from] LibxlError),
}

impl WrapperReadError {
    /// Whether the image is to blame (a broken rule or a truncated file), not the
    /// source it was read from.
    pub fn is_bad_image(&self) -> bool {
        !matches!(self.cause, WrapperErrorCause::Io(_))
    }
}

/// A wrapper that could not be written.
#[derive(Debug, Error)]
pub enum WrapperWriteError {
    /// The sink failed.
    #[error("writing failed: {0}")]
    Io(#[from] io::Error),
    /// What was to be written would break a rule of the libxl stream.
    #[error("{kind} cannot be written: {cause}")]
    Libxl {
        /// The record.
        kind: LibxlRecordKind,
        /// The rule.
        cause: LibxlError,
    },
}

/// A source that knows how far it has been read.
#[derive(Debug)]
pub(crate) struct Source<R> {
    pub(crate) inner: R,
    pub(crate) offset: u64,
}

impl<R: Read> Source<R> {
    /// Fill `room` exactly, and never read beyond it.
    pub(crate) fn fill(&mut self, room: &mut [u8]) -> Result<(), WrapperErrorCause> {
        match fill(&mut self.inner, room) {
            Ok(()) => {
                self.offset = self.offset.saturating_add(room.len() as u64);
                Ok(())
            }
            Err(ReadErrorCause::Truncated { needed }) => {
                Err(WrapperErrorCause::Truncated { needed })
            }
            Err(ReadErrorCause::Io(e)) => Err(WrapperErrorCause::Io(e)),
            // `fill` looks at no octet.
            Err(ReadErrorCause::Decode(e)) => {
                Err(WrapperErrorCause::Io(io::Error::other(e.to_string())))
            }
        }
    }

    /// Read `octets`, allocating as they really arrive: the length comes from the
    /// file and may be a lie.
    pub(crate) fn take(&mut self, octets: usize) -> Result<Vec<u8>, WrapperErrorCause> {
        const STEP: usize = 1 << 20;
        let mut body = Vec::new();
        let mut left = octets;
        while left > 0 {
            let step = left.min(STEP);
            left = left.saturating_sub(step);
            let at = body.len();
            body.resize(at.saturating_add(step), 0);
            let (_, room) = body.split_at_mut(at);
            self.fill(room).map_err(|cause| match cause {
                WrapperErrorCause::Truncated { needed } => WrapperErrorCause::Truncated {
                    needed: needed.saturating_add(left as u64),
                },
                other => other,
            })?;
        }
        Ok(body)
    }
}
