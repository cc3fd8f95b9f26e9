//! The lock of a domain: a node that names its process.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Shared, remove_if_empty};
use crate::domain_store::{DomainRef, LockHolder, Process};
use crate::xenstore::StoreError;

/// The process that holds the lock in a node's `value`, and whether that process would be visible
/// from here; `None` if it has ended. An unknown format may be from another version of this
/// program, so that lock is not free.
pub(super) fn holder(value: &[u8]) -> Option<(LockHolder, bool)> {
    match Process::decode(value) {
        Some(process) if process.has_ended() => None,
        Some(process) => {
            let seen = process.is_seen();
            Some((process.holder, seen))
        }
        None => Some((LockHolder::unknown(value), false)),
    }
}

/// A lock that this process holds.
pub(super) struct OurLock {
    pub(super) shared: Arc<Shared>,
    pub(super) domain: DomainRef,
    pub(super) path: String,
    /// The value of the node.
    pub(super) value: Mutex<Vec<u8>>,
}

impl OurLock {
    /// Records another process as the holder of the lock.
    pub(super) fn name(&self, new: Vec<u8>) -> Result<(), StoreError> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        // The node is missing if the domain was destroyed.
        if self.shared.store.exchange(&self.path, &value, &new)? {
            *value = new;
        }
        Ok(())
    }

    pub(super) fn give_back(&self) -> Result<(), StoreError> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.store.transaction(&mut |nodes| {
            let ours = nodes.read(&self.path)?.as_deref() == Some(&*value);
            if ours {
                nodes.remove(&self.path)?;
                remove_if_empty(nodes, self.domain)?;
            }
            Ok(ours)
        })
    }
}
