//! The mock machine's xenstore, with guests that listen to it.
//!
//! Of a machine in a directory it is the file `xenstore` there, which the processes share as they
//! share the machine. The name of a domain is a node that stands for the name in the domain's
//! record, so that both faces of the machine have the same names.
//!
//! C implementation: `tools/xenstore/xenstored_core.c`; in a guest, Linux's
//! `drivers/xen/manage.c`.

use std::collections::BTreeMap;
use std::io;

use crate::Errno;
use xsr_format::frame::Gfn;

use super::Face;
use crate::GuestMemory as _;
use crate::domain_store::{DomainStore, ListedDomain};
use crate::mock::phase;
use crate::pages::Access;
use crate::xenstore::{Nodes, StoreError, Work, Xenstore};
use crate::{DomId, DomainControl};

/// The nodes with their values.
pub(super) type Tree = BTreeMap<String, Vec<u8>>;

/// The node of a domain's name.
fn name_node(domid: DomId) -> String {
    format!("/local/domain/{}/name", domid.0)
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::Connection(io::Error::other(error))
}

impl Face {
    /// All nodes.
    pub(super) fn nodes(&self) -> Result<Tree, StoreError> {
        let mut nodes = match self.host.machine.store.load_nodes().map_err(broken)? {
            Some(nodes) => nodes,
            None => self.state().nodes.clone(),
        };
        for listed in self.listed()? {
            let node = name_node(listed.info.domid);
            match listed.name {
                Some(name) => {
                    nodes.insert(node, name.into_bytes());
                }
                // A node without a value is no name.
                None if nodes.get(&node).is_some_and(|name| !name.is_empty()) => {
                    nodes.remove(&node);
                }
                None => {}
            }
        }
        Ok(nodes)
    }

    fn listed(&self) -> Result<Vec<ListedDomain>, StoreError> {
        DomainStore::list(&self.host).map_err(broken)
    }

    /// Changes nodes in one step, unless `change` returns `None`.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Tree) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let names = self.host.machine.lock_names().map_err(broken)?;
        let mut nodes = self.nodes()?;
        let Some(out) = change(&mut nodes) else {
            return Ok(None);
        };
        let mut renamed = false;
        for listed in self.listed()? {
            let (domid, node) = (listed.info.domid, name_node(listed.info.domid));
            let name = nodes.get(&node).map(|name| String::from_utf8_lossy(name));
            let name = name.unwrap_or_default().into_owned();
            if name != listed.name.unwrap_or_default() {
                renamed |= !name.is_empty();
                self.set_name(domid, name)?;
            }
        }
        let store = &self.host.machine.store;
        if !store.save_nodes(&nodes).map_err(broken)? {
            self.state().nodes = nodes;
        }
        drop(names);
        if renamed {
            phase("renamed");
        }
        Ok(Some(out))
    }

    fn set_name(&self, domid: DomId, name: String) -> Result<(), StoreError> {
        let renamed = self.host.mock_domain(domid).and_then(|domain| {
            domain.change("rename", |state| {
                state.record.name = name;
                Ok(())
            })
        });
        match renamed {
            // It has been destroyed in the meantime.
            Err(error) if error.errno == Errno::ESRCH => Ok(()),
            renamed => renamed.map_err(broken),
        }
    }
}

impl Xenstore for Face {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.nodes()?.remove(path))
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        let set = |value: &[u8]| {
            self.change(|nodes| {
                nodes.insert(path.to_owned(), value.to_vec());
                Some(())
            })
        };
        set(value)?;
        let guest = path
            .strip_prefix("/local/domain/")
            .and_then(|rest| rest.strip_suffix("/control/shutdown"))
            .and_then(|domid| domid.parse().ok())
            .and_then(|domid| self.domain(domid).ok());
        // A guest that listens accepts the request and suspends; any other leaves the node
        // unchanged.
        if let Some(guest) = guest
            && value == b"suspend"
            && guest.request_suspend().unwrap_or(false)
        {
            set(b"")?;
        }
        Ok(())
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        let exchanged = self.change(|nodes| match nodes.get_mut(path) {
            Some(value) if value == old => {
                *value = new.to_vec();
                Some(())
            }
            _ => None,
        });
        Ok(exchanged?.is_some())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        Ok(list(&self.nodes()?, path))
    }

    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError> {
        // Like xenstored: a conflicting transaction is repeated.
        loop {
            let before = self.nodes()?;
            let mut changed = Changed(before.clone());
            if !work(&mut changed)? {
                return Ok(());
            }
            let done = self.change(|nodes| {
                let unchanged = *nodes == before;
                unchanged.then(|| *nodes = changed.0)
            });
            if done?.is_some() {
                return Ok(());
            }
        }
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        self.change(|nodes| {
            remove(nodes, path);
            Some(())
        })
        .map(drop)
    }

    fn resumed(&self, domid: DomId) -> Result<(), StoreError> {
        self.domain(domid.0)
            .map_err(|_| refused("resume", domid, Errno::ENOENT))?;
        self.state().announced.remove(&domid.0);
        Ok(())
    }

    fn let_have(&self, path: &str, domid: DomId, _owner: bool) -> Result<(), StoreError> {
        // Guests of the machine read nothing, so only the existence of the node matters.
        let_have(&self.nodes()?, path, domid)
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
struct Changed(Tree);

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

fn let_have(nodes: &Tree, path: &str, domid: DomId) -> Result<(), StoreError> {
    let below = format!("{path}/");
    let mut nodes = nodes.keys();
    match nodes.any(|node| node == path || node.starts_with(&below)) {
        true => Ok(()),
        false => Err(refused("set_perms", domid, Errno::ENOENT)),
    }
}

/// The names of the nodes directly below `path`.
fn list(nodes: &Tree, path: &str) -> Vec<String> {
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
fn remove(nodes: &mut Tree, path: &str) {
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
