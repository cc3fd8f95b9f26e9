//! Errors of the wrapper readers, reduced to comparable values.

use std::io;

use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::wrapper::libxl::LibxlError;
use xsr_format::wrapper::xl::XlError;

/// The comparable cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Io(io::ErrorKind),
    Truncated(u64),
    Xl(XlError),
    Libxl(LibxlError),
}

/// Structure, offset and cause of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) place: String,
    pub(crate) offset: u64,
    pub(crate) cause: Cause,
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        let bad_image = error.is_bad_image();
        let cause = match error.cause {
            ReadErrorCause::Io(e) => Cause::Io(e.kind()),
            ReadErrorCause::Truncated { needed } => Cause::Truncated(needed),
            ReadErrorCause::Xl(e) => Cause::Xl(e),
            ReadErrorCause::Libxl(e) => Cause::Libxl(e),
            other => panic!("{other:?} comes from no wrapper"),
        };
        assert_eq!(bad_image, !matches!(cause, Cause::Io(_)));
        Self {
            place: error.position.place.to_string(),
            offset: error.position.offset,
            cause,
        }
    }
}
