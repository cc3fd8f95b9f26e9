//! Errors of a storage: which image, the operation that failed, and the system's error.

use std::ffi::OsStr;
use std::io;

use thiserror::Error;

/// A failure of a storage.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StorageError {
    /// There is no image of that name.
    #[error("{name} does not exist")]
    NotFound {
        /// The image.
        name: String,
    },
    /// There is an image of that name, and it must not be replaced.
    #[error("{name} exists already")]
    Exists {
        /// The image.
        name: String,
    },
    /// No image can have that name.
    #[error(
        "\"{name}\" cannot be the name of an image: expected 1 to 255 bytes without a slash or a \
         zero byte"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// Writing or reading there would be unsafe.
    #[error("{name} {why}")]
    Refused {
        /// The image.
        name: String,
        /// Why, and what to do instead.
        why: String,
    },
    /// The storage, or this image, does not support it.
    #[error("{name} {what}")]
    Unsupported {
        /// The image.
        name: String,
        /// The operation that it does not support.
        what: &'static str,
    },
    /// The image is shorter than it was.
    #[error("{name} ends at byte {offset}: expected {missing} more bytes")]
    Truncated {
        /// The image.
        name: String,
        /// Where it ends.
        offset: u64,
        /// How many bytes are missing.
        missing: usize,
    },
    /// The system failed.
    #[error("{doing} {name}")]
    Io {
        /// The operation, for example "writing".
        doing: &'static str,
        /// The image.
        name: String,
        /// The system's error.
        source: io::Error,
    },
    /// The image is complete and has its name, but the directory could not be synced.
    #[error("{name} is complete, but a power cut might undo that")]
    NotDurable {
        /// The image.
        name: String,
        /// The system's error.
        source: io::Error,
    },
}

impl StorageError {
    /// The system's error, if there is one.
    pub fn io_error(&self) -> Option<&io::Error> {
        match self {
            Self::Io { source, .. } | Self::NotDurable { source, .. } => Some(source),
            _ => None,
        }
    }

    /// For `map_err`: `doing` something with the image failed.
    pub(crate) fn io<E: Into<io::Error>>(
        doing: &'static str,
        name: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let name = name.into();
        move |error| {
            let source = error.into();
            Self::Io {
                doing,
                name,
                source,
            }
        }
    }
}

/// The system's error, if there is one; otherwise an error of the matching kind.
impl From<StorageError> for io::Error {
    fn from(error: StorageError) -> Self {
        let kind = match error {
            StorageError::Io { source, .. } | StorageError::NotDurable { source, .. } => {
                return source;
            }
            StorageError::NotFound { .. } => io::ErrorKind::NotFound,
            StorageError::Exists { .. } => io::ErrorKind::AlreadyExists,
            StorageError::BadName { .. } => io::ErrorKind::InvalidInput,
            StorageError::Refused { .. } => io::ErrorKind::PermissionDenied,
            StorageError::Unsupported { .. } => io::ErrorKind::Unsupported,
            StorageError::Truncated { .. } => io::ErrorKind::UnexpectedEof,
        };
        Self::new(kind, error)
    }
}

/// A name or path as text that a terminal can show.
pub(super) fn shown(name: impl AsRef<OsStr>) -> String {
    crate::text::shown(&name.as_ref().to_string_lossy())
}
