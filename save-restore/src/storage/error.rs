//! Errors of a storage: which image, what was being done, what the system said.

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
    /// There is an image of that name, and it is not to be replaced.
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
    /// The storage, or this image, cannot do it.
    #[error("{name} {what}")]
    Unsupported {
        /// The image.
        name: String,
        /// What it cannot.
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
        /// What was being done, as in "writing".
        doing: &'static str,
        /// The image.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The image is complete and has its name, but the directory could not be synced.
    #[error("{name} is complete, but a power cut might undo that")]
    NotDurable {
        /// The image.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

impl StorageError {
    /// What the system said, if it was the system that failed.
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

/// A name or path as text that a terminal can show.
pub(super) fn shown(name: impl AsRef<OsStr>) -> String {
    crate::text::shown(&name.as_ref().to_string_lossy())
}
