//! What can go wrong with a mock host, beyond what Xen itself would answer.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::domain_store::LockHolder;
use crate::error::BackendError;

/// A failure of the mock host.
#[derive(Debug, Error)]
pub enum MockError {
    /// A file of the host could not be read or written.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has the host open.
    #[error("mock host {} is in use by {}; wait until it ends", path.display(), match holder {
        Some(holder) => holder.to_string(),
        None => "another process".to_owned(),
    })]
    InUse {
        /// The host's directory.
        path: PathBuf,
        /// The process, by the command line that it was started with; `None` if it has not said
        /// so yet.
        holder: Option<LockHolder>,
    },
    /// A directory or file that somebody else may have put there.
    #[error("{}: {why}", path.display())]
    Unsafe {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// What the process that has the host open says.
    #[error("{0}")]
    Answered(String),
    /// There is no host in that directory.
    #[error("{} is no mock host; make one with `xsr mock create`", path.display())]
    NotAHost {
        /// The directory.
        path: PathBuf,
    },
    /// There is something in that directory already.
    #[error("{} exists and is not empty", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A state file is damaged.
    #[error("{} is damaged: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// No domain goes by that name or number.
    #[error("no domain {name:?} on this mock host")]
    NoSuchDomain {
        /// The name or number asked for.
        name: String,
    },
    /// Another domain has the name.
    #[error("a domain named {name:?} exists already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Not a name a domain or a piece of user data can have.
    #[error(
        "{name:?} is no good name: letters, digits, `-`, `_`, `.` and `+`, at most 64, not all digits, not Domain-0"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A guest or host that cannot be made.
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
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}
