//! Wrappers around a libxc stream: the xl file header, the libxl stream, and the formats of other
//! toolstacks.
//!
//! A file that `xl save` wrote nests three layers, each of which reads exactly its own bytes and
//! passes the source on:
//!
//! ```text
//! xl header │ libxl header │ LIBXC_CONTEXT ┬ libxc stream ┬ emulator records │ END
//! ```
//!
//! Specification: libxl migration stream (revision 2). C implementation:
//! `tools/xl/xl_saverestore.c`, `tools/libs/light/libxl_stream_{read,write}.c`.

use std::io;

use thiserror::Error;

pub mod libvirt;
pub mod libxl;
pub mod vhd;
pub mod xapi;
pub mod xend;
pub mod xl;

use libxl::{LibxlError, LibxlRecordKind};

/// A failure to write a wrapper.
#[derive(Debug, Error)]
pub enum WrapperWriteError {
    /// The sink failed.
    #[error("writing failed")]
    Io(#[from] io::Error),
    /// The record would break a rule of the libxl stream.
    #[error("{kind} cannot be written: {cause}")]
    Libxl {
        /// The record.
        kind: LibxlRecordKind,
        /// The rule.
        cause: LibxlError,
    },
}
