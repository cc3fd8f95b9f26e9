//! Errors of a domain store.

use std::error::Error as StdError;

use thiserror::Error;

use super::{DomainRef, LockHolder};
use crate::error::BackendError;
use crate::{DomId, Uuid};

/// The cause of an error of a domain store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The request cannot be carried out for this domain or name.
    Request,
    /// The domain is gone, or another process is working on it. The request was valid a moment ago.
    Domain,
    /// The hypervisor refused a call.
    Hypervisor,
    /// xenstore, or a file, could not be read or written.
    Storage,
}

/// A failure of a [`DomainStore`](super::DomainStore).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DomainStoreError {
    /// No domain has this name or number.
    #[error("there is no domain {name:?}")]
    NotFound {
        /// The requested name or number.
        name: String,
    },
    /// The domain no longer exists, or is being destroyed.
    #[error("{domain} does not exist any more")]
    Gone {
        /// The domain.
        domain: DomainRef,
    },
    /// The number belongs to another domain now.
    #[error("{domain} does not exist any more: its number belongs to a domain with UUID {found}")]
    Replaced {
        /// The requested domain.
        domain: DomainRef,
        /// The UUID of the domain that has its number.
        found: Uuid,
    },
    /// The domain's name is not the expected one.
    #[error("{domain} {}, not {}", is_named(found), named(expected))]
    WrongName {
        /// The domain.
        domain: DomainRef,
        /// The expected name; `None` if the domain was expected to have none.
        expected: Option<String>,
        /// The actual name.
        found: Option<String>,
    },
    /// Another domain has the name.
    #[error("a domain named {name:?} exists already: {by}")]
    NameTaken {
        /// The name.
        name: String,
        /// The domain that has it.
        by: DomainRef,
    },
    /// The name is not valid for a domain.
    #[error("{name:?} cannot be the name of a domain: {rule}")]
    BadName {
        /// The name.
        name: String,
        /// The rule for names.
        rule: &'static str,
    },
    /// Another process is working on the domain.
    #[error("{domain} is in use by {holder}{}", until(node))]
    Locked {
        /// The domain.
        domain: DomainRef,
        /// The process that has the lock.
        holder: LockHolder,
        /// The xenstore node of the lock, if it is unknown whether the process runs (because it is
        /// in another PID namespace, for example).
        node: Option<String>,
    },
    /// The data is too large for the store.
    #[error("the {what} of {domain} is {bytes} bytes long; at most {most} can be kept")]
    TooLarge {
        /// The domain.
        domain: DomainRef,
        /// A description of the data.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The maximum length.
        most: usize,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The store's data could not be read or written.
    #[error("{doing} of {domid}")]
    Storage {
        /// The operation, as in "reading the name".
        doing: &'static str,
        /// The domain.
        domid: DomId,
        /// The cause.
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// A hint on how the lock can end.
fn until(node: &Option<String>) -> String {
    match node {
        None => "; wait until it ends".to_owned(),
        Some(node) => format!(
            ", which cannot be looked for from here: wait until it ends, or, if it surely has, \
             `xenstore-rm {node}`"
        ),
    }
}

fn is_named(name: &Option<String>) -> String {
    match name {
        Some(name) => format!("is named {name:?}"),
        None => "has no name".to_owned(),
    }
}

fn named(name: &Option<String>) -> String {
    match name {
        Some(name) => format!("{name:?}"),
        None => "nameless".to_owned(),
    }
}

impl DomainStoreError {
    /// The cause of the error.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NotFound { .. }
            | Self::WrongName { .. }
            | Self::NameTaken { .. }
            | Self::BadName { .. }
            | Self::TooLarge { .. } => Blame::Request,
            Self::Gone { .. } | Self::Replaced { .. } | Self::Locked { .. } => Blame::Domain,
            Self::Backend(_) => Blame::Hypervisor,
            Self::Storage { .. } => Blame::Storage,
        }
    }

    /// The number of the requested domain; `None` if the request named no number or was about the
    /// host.
    pub fn domid(&self) -> Option<DomId> {
        match self {
            Self::NotFound { .. } | Self::NameTaken { .. } | Self::BadName { .. } => None,
            Self::Gone { domain }
            | Self::Replaced { domain, .. }
            | Self::WrongName { domain, .. }
            | Self::Locked { domain, .. }
            | Self::TooLarge { domain, .. } => Some(domain.domid),
            Self::Backend(error) => error.domid,
            Self::Storage { domid, .. } => Some(*domid),
        }
    }

    /// For `map_err`: `doing` something with the domain failed.
    pub(crate) fn storage<E: Into<Box<dyn StdError + Send + Sync>>>(
        doing: &'static str,
        domid: DomId,
    ) -> impl Fn(E) -> Self {
        move |source| Self::Storage {
            doing,
            domid,
            source: source.into(),
        }
    }
}
