//! What a reader of wrappers gave up with, reduced to comparable values.

use std::io;

use xsr_format::wrapper::libxl::LibxlError;
use xsr_format::wrapper::xl::XlError;
use xsr_format::wrapper::{WrapperErrorCause, WrapperReadError};

/// Why, comparable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Io(io::ErrorKind),
    Truncated(u64),
    Xl(XlError),
    Libxl(LibxlError),
}

/// In what, where, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) place: String,
    pub(crate) offset: u64,
    pub(crate) cause: Cause,
}

impl From<WrapperReadError> for Failure {
    fn from(error: WrapperReadError) -> Self {
        let bad_image = error.is_bad_image();
        let cause = match error.cause {
            WrapperErrorCause::Io(e) => Cause::Io(e.kind()),
            WrapperErrorCause::Truncated { needed } => Cause::Truncated(needed),
            WrapperErrorCause::Xl(e) => Cause::Xl(e),
            WrapperErrorCause::Libxl(e) => Cause::Libxl(e),
        };
        assert_eq!(bad_image, !matches!(cause, Cause::Io(_)));
        Self {
            place: error.reading.to_string(),
            offset: error.offset,
            cause,
        }
    }
}
