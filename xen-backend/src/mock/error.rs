//! Errors of a mock host, other than Xen's own errnos.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::store::FORMAT;
use crate::error::BackendError;

/// A failure of the mock host.
#[derive(Debug, Error)]
pub enum MockError {
    /// A file of the host could not be read or written.
    #[error("{doing} {}: {cause}", path.display())]
    Io {
        /// The operation that failed.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
    /// Another process has been repairing the host for a long time, after one that was killed.
    #[error("another process is putting mock host {} in order: try again when it has", path.display())]
    InUse {
        /// The host's directory.
        path: PathBuf,
    },
    /// A lock of the host could not be taken in time. Its holder may itself wait for another
    /// process, which holds another lock.
    #[error(
        "mock host {} is busy: the lock of {what} could not be taken within {} s; if one of the \
         processes that work on this host is stopped, continue or end it",
        path.display(), waited.as_secs_f64()
    )]
    Busy {
        /// The host's directory.
        path: PathBuf,
        /// What the lock is for.
        what: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A directory or file that another user may have put there.
    #[error("{}: {why}", path.display())]
    Unsafe {
        /// The directory or file.
        path: PathBuf,
        /// The problem, and what to do.
        why: String,
    },
    /// The directory holds no host.
    #[error("{} is not a mock host", path.display())]
    NotAHost {
        /// The directory.
        path: PathBuf,
    },
    /// The host was made by a version of xsr that keeps it in another way.
    #[error(
        "{} is a mock host of another version of xsr (layout {layout}, expected {FORMAT})",
        path.display()
    )]
    OtherLayout {
        /// The host's directory.
        path: PathBuf,
        /// Its layout.
        layout: u32,
    },
    /// The directory is not empty.
    #[error("{} exists and is not empty", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A state file is damaged.
    #[error("{} is damaged: {cause}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The parse error.
        cause: serde_json::Error,
    },
    /// No domain has that name or number.
    #[error("no domain {name:?} on this mock host")]
    NoSuchDomain {
        /// The requested name or number.
        name: String,
    },
    /// Another domain has the name.
    #[error("a domain named {name:?} exists already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Not a valid name for a domain or for user data.
    #[error(
        "{name:?} is not a valid name: use letters, digits, `-`, `_`, `.` and `+`, at most 64, not all digits, not Domain-0"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A specification for which no guest or host can be created.
    #[error("{0}")]
    BadSpec(String),
    /// The hypervisor refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl MockError {
    /// For `map_err`: `doing` something with `path` failed.
    pub(super) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { doing, path, cause }
    }
}
