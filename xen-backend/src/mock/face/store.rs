//! The mock machine's xenstore, with guests that listen to it.
//!
//! C implementation: `tools/xenstore/xenstored_core.c`; in a guest, Linux's
//! `drivers/xen/manage.c`.

use std::collections::BTreeMap;

use crate::Errno;
use xsr_format::frame::Gfn;

use super::Face;
use crate::GuestMemory as _;
use crate::pages::Access;
use crate::xenstore::{Nodes, StoreError, Work, Xenstore};
use crate::{DomId, DomainControl};

impl Xenstore for Face {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.state().nodes.get(path).cloned())
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.state().nodes.insert(path.to_owned(), value.to_vec());
        let guest = path
            .strip_prefix("/local/domain/")
            .and_then(|rest| rest.strip_suffix("/control/shutdown"))
            .and_then(|domid| domid.parse().ok())
            .and_then(|domid| self.domain(domid).ok());
        // A guest that listens accepts the request and suspends; any other leaves the node
        // unchanged.
        if let Some(guest) = guest
            && value == b"suspend"
            && guest.suspend().is_ok()
        {
            self.state().nodes.insert(path.to_owned(), Vec::new());
        }
        Ok(())
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        let mut state = self.state();
        match state.nodes.get_mut(path) {
            Some(value) if value == old => {
                *value = new.to_vec();
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        Ok(list(&self.state().nodes, path))
    }

    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError> {
        // Like xenstored: a conflicting transaction is repeated.
        loop {
            let before = self.state().nodes.clone();
            let mut changed = Changed(before.clone());
            if !work(&mut changed)? {
                return Ok(());
            }
            let mut state = self.state();
            if state.nodes == before {
                state.nodes = changed.0;
                return Ok(());
            }
        }
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        remove(&mut self.state().nodes, path);
        Ok(())
    }

    fn resumed(&self, domid: DomId) -> Result<(), StoreError> {
        self.domain(domid.0)
            .map_err(|_| refused("resume", domid, Errno::ENOENT))?;
        self.state().announced.remove(&domid.0);
        Ok(())
    }

    fn let_have(&self, path: &str, domid: DomId, _owner: bool) -> Result<(), StoreError> {
        // Guests of the machine read nothing, so only the existence of the node matters.
        let_have(&self.state().nodes, path, domid)
    }

    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError> {
        let domain = self
            .domain(domid.0)
            .map_err(|_| refused("introduce", domid, Errno::ENOENT))?;
        // xenstored maps the ring, which must be a frame of the domain.
        let ring = domain.map(&[frame], Access::Write);
        if !ring.is_ok_and(|ring| ring.failed().is_empty()) {
            return Err(refused("introduce", domid, Errno::EINVAL));
        }
        self.state().store_rings.insert(domid.0, (frame.0, port));
        Ok(())
    }
}

/// The nodes as the transaction sees them.
struct Changed(BTreeMap<String, Vec<u8>>);

impl Nodes for Changed {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.get(path).cloned())
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.0.insert(path.to_owned(), value.to_vec());
        Ok(())
    }

    fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        Ok(list(&self.0, path))
    }

    fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        remove(&mut self.0, path);
        Ok(())
    }

    fn let_have(&mut self, path: &str, domid: DomId, _owner: bool) -> Result<(), StoreError> {
        let_have(&self.0, path, domid)
    }
}

fn let_have(nodes: &BTreeMap<String, Vec<u8>>, path: &str, domid: DomId) -> Result<(), StoreError> {
    let below = format!("{path}/");
    let mut nodes = nodes.keys();
    match nodes.any(|node| node == path || node.starts_with(&below)) {
        true => Ok(()),
        false => Err(refused("set_perms", domid, Errno::ENOENT)),
    }
}

/// The names of the nodes directly below `path`.
fn list(nodes: &BTreeMap<String, Vec<u8>>, path: &str) -> Vec<String> {
    let below = format!("{path}/");
    let mut names: Vec<String> = nodes
        .range(below.clone()..)
        .map_while(|(node, _)| node.strip_prefix(&below))
        .filter_map(|rest| rest.split('/').next())
        .map(str::to_owned)
        .collect();
    names.dedup();
    names
}

/// Removes a node and its subtree.
fn remove(nodes: &mut BTreeMap<String, Vec<u8>>, path: &str) {
    let below = format!("{path}/");
    nodes.retain(|node, _| node != path && !node.starts_with(&below));
}

fn refused(op: &'static str, domid: DomId, errno: Errno) -> StoreError {
    StoreError::Refused {
        op,
        path: domid.to_string(),
        errno,
    }
}

#[cfg(test)]
impl Face {
    /// Whether the store announces, on a check now, that the domain has shut down
    /// (`@releaseDomain`): once, and not again until it has been told that the domain was resumed.
    pub(super) fn announces_shutdown(&self, domid: DomId) -> bool {
        let down = self
            .domain(domid.0)
            .is_ok_and(|domain| domain.info().is_ok_and(|info| info.shutdown.is_some()));
        down && self.state().announced.insert(domid.0)
    }
}
