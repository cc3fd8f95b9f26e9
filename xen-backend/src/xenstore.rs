//! Xenstore: the tree of values through which the toolstack and guests exchange messages. Covers
//! what a domain without devices needs: to be suspended, introduced and removed.
//!
//! C implementation: `tools/libs/store/xs.c`; the protocol is `xen/include/public/io/xs_wire.h`.

mod client;
#[cfg(test)]
mod tests;
mod wire;
use std::fmt;
use std::io;

use crate::Errno;
use thiserror::Error;
use xsr_format::frame::Gfn;

use crate::DomId;

pub(crate) use client::Sockets;

/// An error of xenstore.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    /// No store is listening.
    #[error(
        "there is no xenstore: neither /run/xenstored/socket nor /dev/xen/xenbus can be opened \
         ({0}); is xenstored running?"
    )]
    Absent(io::Error),
    /// The connection broke, or the store's answer was malformed.
    #[error("the connection to xenstore broke: {0}")]
    Connection(io::Error),
    /// The store refused the request.
    #[error("xenstore refuses {op} of {path}: {errno}")]
    Refused {
        /// The request.
        op: &'static str,
        /// Its node.
        path: String,
        /// The reason.
        errno: Errno,
    },
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

impl StoreError {
    /// The nearest errno.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Absent(_) => Errno::ENOTCONN,
            Self::Connection(error) => Errno::of(error),
            Self::Refused { errno, .. } => *errno,
        }
    }
}

/// The body of a transaction. `Ok(false)` abandons its changes without an error.
pub(crate) type Work<'w> = dyn FnMut(&mut dyn Nodes) -> Result<bool, StoreError> + 'w;

/// The nodes of the store inside a transaction.
pub(crate) trait Nodes {
    /// The value of a node; `None` if it does not exist.
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Sets the value of a node, and creates the node if necessary.
    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// The names of the nodes directly below `path`; empty if that node does not exist.
    fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError>;

    /// Removes a node and its subtree; does nothing if it does not exist.
    fn remove(&mut self, path: &str) -> Result<(), StoreError>;

    /// As [`Xenstore::let_have`].
    fn let_have(&mut self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError>;
}

/// A xenstore.
pub(crate) trait Xenstore: fmt::Debug + Send + Sync {
    /// The value of a node; `None` if it does not exist.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Set the value of a node, and create the node if necessary.
    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Replace `old` by `new` at a node atomically; returns false, and does nothing, if the node
    /// has another value.
    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError>;

    /// The names of the nodes directly below `path`; empty if that node does not exist. E2BIG if
    /// they do not fit into one message of 4096 bytes.
    fn list(&self, path: &str) -> Result<Vec<String>, StoreError>;

    /// Runs `work` in a transaction: other clients of the store see all of its changes or none.
    /// `work` may run several times, because a conflicting transaction is repeated. If `work`
    /// fails, nothing has changed.
    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError>;

    /// Remove a node and its subtree; does nothing if it does not exist.
    fn remove(&self, path: &str) -> Result<(), StoreError>;

    /// Give a domain permission for a node that the control domain created: read access, or full
    /// control if `owner`.
    fn let_have(&self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError>;

    /// Tell the store that a domain has resumed after it shut down; otherwise the store ignores the
    /// domain's next shutdown. ENOENT or EINVAL from a store that does not know the domain.
    fn resumed(&self, domid: DomId) -> Result<(), StoreError>;

    /// Connect the store to a domain's ring, whose page is `frame`, over its event channel.
    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError>;
}
