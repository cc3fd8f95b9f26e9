//! Xenstore: the tree of values in which toolstack and guests leave word for each
//! other. As much of it as a domain without devices needs: to suspend, to be introduced, to go.
//!
//! C implementation: `tools/libs/store/xs.c`; the protocol is
//! `xen/include/public/io/xs_wire.h`.

mod client;
#[cfg(test)]
mod tests;
mod wire;
use std::fmt;
use std::io;

use nix::errno::Errno;
use thiserror::Error;
use xsr_format::frame::Gfn;

use crate::DomId;

pub(crate) use client::Sockets;

/// What goes wrong with the store.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    /// Nobody is there.
    #[error(
        "there is no xenstore: neither /run/xenstored/socket nor /dev/xen/xenbus can be opened \
         ({0}); is xenstored running?"
    )]
    Absent(io::Error),
    /// The connection broke, or what came over it is no answer.
    #[error("the connection to xenstore broke: {0}")]
    Connection(#[from] io::Error),
    /// The store refuses.
    #[error("xenstore refuses {op} of {path}: {errno}")]
    Refused {
        /// What was asked.
        op: &'static str,
        /// Of which node.
        path: String,
        /// Why not.
        errno: Errno,
    },
}

impl StoreError {
    /// The errno that is nearest.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Absent(_) => Errno::ENOTCONN,
            Self::Connection(error) => error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
            Self::Refused { errno, .. } => *errno,
        }
    }
}

/// What a transaction is to do. `Ok(false)` abandons its changes without an error.
pub(crate) type Work<'w> = dyn FnMut(&mut dyn Nodes) -> Result<bool, StoreError> + 'w;

/// The nodes of the store inside a transaction.
pub(crate) trait Nodes {
    /// The value of a node; `None` if there is none.
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Sets the value of a node, and makes it if there is none.
    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// The names of the nodes directly below `path`; none if there is no such node.
    fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError>;

    /// Removes a node and all below it; does nothing if there is none.
    fn remove(&mut self, path: &str) -> Result<(), StoreError>;
}

/// A xenstore.
pub(crate) trait Xenstore: fmt::Debug + Send + Sync {
    /// The value of a node; `None` where there is none.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Set the value of a node, making it where there is none.
    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Replace `old` by `new` at a node, whoever else is at it; false, and nothing
    /// done, where the node has another value.
    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError>;

    /// The names of the nodes directly below `path`; none if there is no such node.
    /// E2BIG if they do not fit into one message of 4096 bytes.
    fn list(&self, path: &str) -> Result<Vec<String>, StoreError>;

    /// Runs `work` in a transaction: the other clients of the store see all of its
    /// changes or none. `work` may run several times, because a transaction that
    /// conflicts with another is made anew. If `work` fails, nothing has changed.
    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError>;

    /// Remove a node and all below it; nothing where there is none.
    fn remove(&self, path: &str) -> Result<(), StoreError>;

    /// Let a domain have a node that the control domain made: to read it, or, where
    /// `owner`, to do with it as it likes.
    fn let_have(&self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError>;

    /// Tell the store that a domain runs on after it has shut down: it takes note of the
    /// next shutdown only then. ENOENT or EINVAL from a store that does not know the domain.
    fn resumed(&self, domid: DomId) -> Result<(), StoreError>;

    /// Connect the store to a domain's ring, which is at `frame`, by its event channel.
    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError>;
}
