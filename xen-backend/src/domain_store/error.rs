//! Errors of a domain store: whose fault, which domain, which name.

use std::error::Error as StdError;

use thiserror::Error;

use super::{DomainRef, LockHolder};
use crate::error::BackendError;
use crate::{DomId, Uuid};

/// Whose fault an error of a domain store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// What the caller asked for cannot be done for this domain or name.
    Request,
    /// The domain has gone away, or another process is working on it. The request was good
    /// a moment ago.
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
        /// The name or number that was asked for.
        name: String,
    },
    /// The domain does not exist any more, or is being destroyed.
    #[error("{domain} does not exist any more")]
    Gone {
        /// The domain.
        domain: DomainRef,
    },
    /// The number belongs to another domain now.
    #[error("{domain} does not exist any more: its number belongs to a domain with UUID {found}")]
    Replaced {
        /// The domain that was meant.
        domain: DomainRef,
        /// The UUID of the domain that has its number.
        found: Uuid,
    },
    /// The domain is not named as the caller believed.
    #[error("{domain} {}, not {}", is_named(found), named(expected))]
    WrongName {
        /// The domain.
        domain: DomainRef,
        /// The name that the caller gave; `None` if the domain was to have none yet.
        expected: Option<String>,
        /// The name it has.
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
    /// No domain can have this name.
    #[error("{name:?} cannot be the name of a domain: {rule}")]
    BadName {
        /// The name.
        name: String,
        /// What a name has to be.
        rule: &'static str,
    },
    /// Another process is working on the domain.
    #[error("{domain} is in use by {holder}{}", until(node))]
    Locked {
        /// The domain.
        domain: DomainRef,
        /// The process that has the lock.
        holder: LockHolder,
        /// Where the process cannot be looked for (it is of another PID namespace, say): the node
        /// of xenstore that is the lock.
        node: Option<String>,
    },
    /// More than can be kept.
    #[error("the {what} of {domain} is {bytes} bytes long; at most {most} can be kept")]
    TooLarge {
        /// The domain.
        domain: DomainRef,
        /// What it is.
        what: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        most: usize,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// What is kept could not be read or written.
    #[error("{doing} of {domid}")]
    Storage {
        /// What was being done, as in "reading the name".
        doing: &'static str,
        /// The domain.
        domid: DomId,
        /// Why it failed.
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// What ends a lock.
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
    /// Whose fault it is.
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

    /// The number of the domain that was asked about; `None` if the request was about a name
    /// or about the host.
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
