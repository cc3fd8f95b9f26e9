//! A real Xen as a domain store. Names are where libxl has them; what else is kept is below
//! a tree of our own in xenstore:
//!
//! | node | holds |
//! |---|---|
//! | `/local/domain/N/name` | the name of domain N; for libxl's also `/vm/UUID/name` |
//! | `/tool/xsr/N/UUID/lock` | the process that works on the domain |
//! | `/tool/xsr/N/UUID/configuration` | the number of bytes, and the name of the node below which they are |
//! | `/tool/xsr/N/UUID/configuration-…/I` | piece I of them |
//! | `/tool/xsr/N/UUID/emulators` | likewise |
//!
//! A value is replaced by writing its pieces to a new node and then the node that names it,
//! so that a reader finds the old value or the new one, whenever the writer dies.
//!
//! C implementation: `libxl__domain_rename` and `libxl__destroy_domid` in
//! `tools/libs/light/libxl_domain.c`, `libxl__userdata_path` in `libxl_dom.c`.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Shared, XenHost, sys};
use crate::domain_store::{
    Configuration, ConfigurationKeeper, DestroyOutcome, Destroyed, DomainLock, DomainRef,
    DomainStore, DomainStoreError, Introduction, LeftBehind, ListedDomain, Process,
};
use crate::xenstore::{Nodes, StoreError};
use crate::{BackendError, DomId, DomainInfo, Host as _};

/// Where everything of ours is.
const OURS: &str = "/tool/xsr";

/// Bytes in a node: a message of xenstore has 4096, the path among them.
const PIECE: usize = 3072;
/// Most bytes of a value: a configuration has some thousand, the records of an emulator of a
/// guest without devices none. xenstore is no place for more.
const LARGEST: usize = 256 << 10;

/// Longest name, in bytes.
const LONGEST_NAME: usize = 1024;

/// How often to look whether a destroyed domain is gone.
const LOOK: Duration = Duration::from_millis(1);

fn node(domid: DomId, name: &str) -> String {
    format!("/local/domain/{}{name}", domid.0)
}

/// Our tree for a domain's number.
fn tree(domid: DomId) -> String {
    format!("{OURS}/{}", domid.0)
}

/// Our tree for a domain.
fn tree_of(domain: DomainRef) -> String {
    format!("{OURS}/{}/{}", domain.domid.0, domain.uuid)
}

/// Our node of a domain.
fn ours(domain: DomainRef, name: &str) -> String {
    format!("{}/{name}", tree_of(domain))
}

/// Removes the nodes above a domain's values if there are no values left.
fn remove_if_empty(nodes: &mut dyn Nodes, domain: DomainRef) -> Result<(), StoreError> {
    for path in [tree_of(domain), tree(domain.domid)] {
        if nodes.list(&path)?.is_empty() {
            nodes.remove(&path)?;
        }
    }
    Ok(())
}

fn failed(doing: &'static str, domid: DomId) -> impl Fn(StoreError) -> DomainStoreError {
    DomainStoreError::storage(doing, domid)
}

/// Whether a domain may be named so: xenstore and libxl accept anything, but what a user
/// could not see or type is of no use to anybody.
fn check_name(name: &str) -> Result<(), DomainStoreError> {
    let good = !name.is_empty() && name.len() <= LONGEST_NAME && !name.contains(char::is_control);
    match good {
        true => Ok(()),
        false => Err(DomainStoreError::BadName {
            name: name.chars().take(100).collect(),
            rule: "a name has at least one character, at most 1024 bytes and no control characters",
        }),
    }
}

fn text(value: Option<Vec<u8>>) -> Option<String> {
    value.map(|name| String::from_utf8_lossy(&name).into_owned())
}

/// What the name of a domain has to be before it is changed.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    /// This one, or none at all.
    Name(Option<&'a str>),
    Anything,
}

impl Shared {
    fn name_of(&self, domid: DomId) -> Result<Option<String>, DomainStoreError> {
        let name = self.store.read(&node(domid, "/name"));
        // A node without a value is what libxl's preserved domains have.
        let name = name.map_err(failed("reading the name", domid))?;
        Ok(text(name).filter(|name| !name.is_empty()))
    }

    /// The value that is kept under `key`.
    fn get(&self, domain: DomainRef, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(head) = text(self.store.read(&ours(domain, key))?) else {
            return Ok(None);
        };
        let broken = || StoreError::Refused {
            op: "read",
            path: ours(domain, key),
            errno: Errno::EIO,
        };
        let (bytes, below) = head.split_once(' ').ok_or_else(broken)?;
        let bytes: usize = bytes.parse().map_err(|_| broken())?;
        let mut value = Vec::new();
        let mut piece = 0;
        while value.len() < bytes {
            let path = ours(domain, &format!("{below}/{piece}"));
            let more = self.store.read(&path)?.ok_or_else(broken)?;
            if more.is_empty() || value.len() + more.len() > LARGEST {
                return Err(broken());
            }
            value.extend(more);
            piece += 1;
        }
        match value.len() == bytes {
            true => Ok(Some(value)),
            false => Err(broken()),
        }
    }

    /// Keeps `value` under `key`.
    fn put(&self, domain: DomainRef, key: &str, value: &[u8]) -> Result<(), StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let below = format!("{key}-{}-{next}", std::process::id());
        let head = ours(domain, key);
        self.own_the_tree()?;
        let before = text(self.store.read(&head)?);
        let written = || {
            for (piece, bytes) in value.chunks(PIECE).enumerate() {
                self.store
                    .write(&ours(domain, &format!("{below}/{piece}")), bytes)?;
            }
            let value = format!("{} {below}", value.len());
            self.store.write(&head, value.as_bytes())
        };
        let written: Result<(), StoreError> = written();
        let of_no_use = match &written {
            Ok(()) => before.as_deref().and_then(|head| head.split_once(' ')),
            Err(_) => Some(("", below.as_str())),
        };
        if let Some((_, below)) = of_no_use {
            let removed = self.store.remove(&ours(domain, below));
            if let (Err(error), Ok(())) = (removed, &written) {
                tracing::warn!(%error, "an earlier value stays in xenstore");
            }
        }
        written
    }

    /// Removes what is kept with the domain, except what `stays`, and everything that is kept of
    /// earlier domains with its number, which another program has destroyed.
    fn remove_except(
        &self,
        domain: DomainRef,
        stays: impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        let (all, own) = (tree(domain.domid), domain.uuid.to_string());
        self.store.transaction(&mut |nodes| {
            for uuid in nodes.list(&all)? {
                if uuid != own {
                    nodes.remove(&format!("{all}/{uuid}"))?;
                }
            }
            for name in nodes.list(&tree_of(domain))? {
                if !stays(&name) {
                    nodes.remove(&ours(domain, &name))?;
                }
            }
            remove_if_empty(nodes, domain)?;
            Ok(true)
        })
    }

    /// Our tree is for the control domain's eyes: what is made below it inherits that.
    fn own_the_tree(&self) -> Result<(), StoreError> {
        if self.store.read(OURS)?.is_none() {
            self.store.write(OURS, b"")?;
            self.store.let_have(OURS, DomId(0), true)?;
        }
        Ok(())
    }

    /// What libxl has of a domain that a destroy does not remove.
    fn left_behind(&self, domain: DomainRef) -> Result<Vec<LeftBehind>, StoreError> {
        let domid = domain.domid;
        let files = self.libxl_files.of(domain);
        let mut left: Vec<LeftBehind> = files.into_iter().map(LeftBehind::File).collect();
        let pid_node = node(domid, "/image/device-model-pid");
        let pid = text(self.store.read(&pid_node)?).and_then(|pid| pid.parse().ok());
        left.extend(pid.map(|pid| LeftBehind::Process {
            pid,
            node: pid_node,
        }));
        let devices = format!("/libxl/{}/device", domid.0);
        for kind in self.store.list(&devices)? {
            // Nothing has to be disconnected: the console's daemon notices by itself.
            if kind == "console" {
                continue;
            }
            let kind = format!("{devices}/{kind}");
            let of_kind = self.store.list(&kind)?.into_iter();
            left.extend(of_kind.map(|device| LeftBehind::Device(format!("{kind}/{device}"))));
        }
        left.sort();
        Ok(left)
    }
}

/// Asks `look` until it says that the domain is gone, or `timeout` has passed.
fn wait_until_gone(
    timeout: Duration,
    mut look: impl FnMut() -> Result<bool, BackendError>,
) -> Result<DestroyOutcome, BackendError> {
    let start = Instant::now();
    loop {
        if look()? {
            return Ok(DestroyOutcome::Gone);
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(DestroyOutcome::StillDying);
        }
        std::thread::sleep(left.min(LOOK));
    }
}

impl XenHost {
    /// Whether the domain is gone, its number being another's among the ways to be so.
    fn is_gone(&self, domain: DomainRef) -> Result<bool, BackendError> {
        match self.shared.calls.info(domain.domid) {
            Ok(info) => Ok(info.uuid != domain.uuid),
            Err(Errno::ESRCH) => Ok(true),
            Err(errno) => {
                let op = "getdomaininfo";
                Err(BackendError::domain(op, domain.domid, errno))
            }
        }
    }

    /// Has the hypervisor destroy the domain. It wants to be called again where there is much to
    /// release, which it is while there is time `left`.
    fn kill(&self, domain: DomainRef, left: impl Fn() -> Duration) -> Result<(), DomainStoreError> {
        let domid = domain.domid;
        loop {
            let calls = &self.shared.calls;
            match calls.plain_domctl(sys::XEN_DOMCTL_destroydomain, domid) {
                Err(Errno::EAGAIN | Errno::EINTR) if !left().is_zero() => {}
                Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(Errno::ESRCH) => return Err(DomainStoreError::Gone { domain }),
                Err(errno) => {
                    return Err(BackendError::domain("destroydomain", domid, errno).into());
                }
            }
        }
    }

    /// The domain except `domain` that has the name.
    fn taken(
        &self,
        nodes: &mut dyn Nodes,
        domain: DomainRef,
        others: &[DomainInfo],
        name: &str,
    ) -> Result<Option<DomainRef>, StoreError> {
        for info in others.iter().filter(|info| info.domid != domain.domid) {
            let found = nodes.read(&node(info.domid, "/name"))?;
            if found.as_deref() == Some(name.as_bytes()) {
                return Ok(Some(DomainRef::from(info)));
            }
        }
        Ok(None)
    }

    /// Names the domain `to`, in one step with the look at its present name, which `from` tells,
    /// and at the names of others.
    fn change_name(
        &self,
        domain: DomainRef,
        from: Expected<'_>,
        to: &str,
    ) -> Result<(), DomainStoreError> {
        check_name(to)?;
        self.check(domain)?;
        let others = self.domains()?;
        let mut refused = None;
        let changed = self.shared.store.transaction(&mut |nodes| {
            refused = self.refuse_name(nodes, domain, &others, (from, to))?;
            if refused.is_none() {
                nodes.write(&node(domain.domid, "/name"), to.as_bytes())?;
                let second = format!("/vm/{}/name", domain.uuid);
                if nodes.read(&second)?.is_some() {
                    nodes.write(&second, to.as_bytes())?;
                }
            }
            Ok(refused.is_none())
        });
        changed.map_err(failed("changing the name", domain.domid))?;
        refused.map_or(Ok(()), Err)
    }

    /// Why the domain may not be named `to`.
    fn refuse_name(
        &self,
        nodes: &mut dyn Nodes,
        domain: DomainRef,
        others: &[DomainInfo],
        (from, to): (Expected<'_>, &str),
    ) -> Result<Option<DomainStoreError>, StoreError> {
        if let Expected::Name(expected) = from {
            let found = text(nodes.read(&node(domain.domid, "/name"))?);
            let found = found.filter(|name| !name.is_empty());
            if found.as_deref() != expected {
                return Ok(Some(DomainStoreError::WrongName {
                    domain,
                    expected: expected.map(str::to_owned),
                    found,
                }));
            }
        }
        let taken = self.taken(nodes, domain, others, to)?;
        Ok(taken.map(|by| DomainStoreError::NameTaken {
            name: to.to_owned(),
            by,
        }))
    }

    /// Removes what is kept of domains that another program has destroyed. Numbers are not
    /// reused before all have been.
    fn remove_of_destroyed(&self) -> Result<(), StoreError> {
        for number in self.shared.store.list(OURS)? {
            let Ok(domid) = number.parse().map(DomId) else {
                continue;
            };
            if self.shared.calls.info(domid) == Err(Errno::ESRCH) {
                self.shared.store.remove(&tree(domid))?;
            }
        }
        Ok(())
    }

    fn keep(
        &self,
        domain: DomainRef,
        key: &str,
        what: &'static str,
        bytes: &[u8],
    ) -> Result<(), DomainStoreError> {
        self.check(domain)?;
        if bytes.len() > LARGEST {
            return Err(DomainStoreError::TooLarge {
                domain,
                what,
                bytes: bytes.len(),
                most: LARGEST,
            });
        }
        let put = self.shared.put(domain, key, bytes);
        put.map_err(failed("keeping the user data", domain.domid))
    }

    /// Removes what libxl, or [`XenHost::connect`], has written of the domain, unless devices
    /// are left for libxl.
    fn remove_nodes(&self, domid: DomId, left: &[LeftBehind]) -> Result<(), DomainStoreError> {
        let devices = left
            .iter()
            .any(|left| matches!(left, LeftBehind::Device(_)));
        match devices {
            true => Ok(()),
            false => self
                .remove_nodes_of(domid)
                .map_err(|error| DomainStoreError::storage("removing the nodes", domid)(error)),
        }
    }
}

const CONFIGURATION: &str = "configuration";
const EMULATORS: &str = "emulators";
const LOCK: &str = "lock";

impl DomainStore for XenHost {
    fn list(&self) -> Result<Vec<ListedDomain>, DomainStoreError> {
        let mut listed = Vec::new();
        for info in self.domains()? {
            let name = self.shared.name_of(info.domid)?;
            listed.push(ListedDomain { info, name });
        }
        Ok(listed)
    }

    fn name(&self, domain: DomainRef) -> Result<Option<String>, DomainStoreError> {
        self.check(domain)?;
        self.shared.name_of(domain.domid)
    }

    fn give_name(&self, domain: DomainRef, name: &str) -> Result<(), DomainStoreError> {
        self.change_name(domain, Expected::Name(None), name)
    }

    fn rename(&self, domain: DomainRef, from: &str, to: &str) -> Result<(), DomainStoreError> {
        self.change_name(domain, Expected::Name(Some(from)), to)
    }

    fn configuration(&self, domain: DomainRef) -> Result<Option<Configuration>, DomainStoreError> {
        const DOING: &str = "reading the configuration";
        self.check(domain)?;
        let libxl = self.shared.libxl_files.configuration(domain);
        let libxl = libxl.map_err(DomainStoreError::storage(DOING, domain.domid))?;
        if let Some((path, bytes)) = libxl {
            let keeper = ConfigurationKeeper::Libxl(path);
            return Ok(Some(Configuration { bytes, keeper }));
        }
        let bytes = self.shared.get(domain, CONFIGURATION);
        let bytes = bytes.map_err(failed(DOING, domain.domid))?;
        let keeper = ConfigurationKeeper::Store;
        Ok(bytes.map(|bytes| Configuration { bytes, keeper }))
    }

    fn set_configuration(&self, domain: DomainRef, bytes: &[u8]) -> Result<(), DomainStoreError> {
        self.keep(domain, CONFIGURATION, "configuration", bytes)
    }

    fn emulators(&self, domain: DomainRef) -> Result<Option<Vec<u8>>, DomainStoreError> {
        self.check(domain)?;
        let doing = "reading the emulators' records";
        let bytes = self.shared.get(domain, EMULATORS);
        bytes.map_err(failed(doing, domain.domid))
    }

    fn set_emulators(&self, domain: DomainRef, bytes: &[u8]) -> Result<(), DomainStoreError> {
        self.keep(domain, EMULATORS, "state of the emulators", bytes)
    }

    fn devices(&self, domain: DomainRef) -> Result<Vec<String>, DomainStoreError> {
        self.check(domain)?;
        Ok(self.devices_of(domain.domid)?)
    }

    fn introduce(
        &self,
        domain: DomainRef,
        introduction: &Introduction<'_>,
    ) -> Result<(), DomainStoreError> {
        self.change_name(domain, Expected::Anything, introduction.name)?;
        // The caller may have locked and configured the domain before it introduces it.
        let stale = self.shared.remove_except(domain, |_| true);
        stale.map_err(failed("removing old nodes", domain.domid))?;
        Ok(self.connect(domain.domid, introduction)?)
    }

    fn forget(&self, domain: DomainRef) -> Result<(), DomainStoreError> {
        self.check(domain)?;
        let left = self.shared.left_behind(domain);
        let left = left.map_err(failed("looking for devices", domain.domid))?;
        let removed = self.shared.remove_except(domain, |name| name == LOCK);
        removed.map_err(failed("removing the nodes", domain.domid))?;
        self.remove_nodes(domain.domid, &left)
    }

    fn destroy(&self, domain: DomainRef, timeout: Duration) -> Result<Destroyed, DomainStoreError> {
        let domid = domain.domid;
        let info = self.look_up(domain)?;
        let left_behind = self.shared.left_behind(domain);
        let left_behind = left_behind.map_err(failed("looking for devices", domid))?;
        let start = Instant::now();
        let left = || timeout.saturating_sub(start.elapsed());
        if !info.dying {
            self.kill(domain, left)?;
        }
        self.shared.logs().remove(&domid);
        let removed = self.shared.store.remove(&tree(domid));
        removed.map_err(failed("removing the nodes", domid))?;
        self.remove_nodes(domid, &left_behind)?;
        let outcome = wait_until_gone(left(), || self.is_gone(domain))?;
        Ok(Destroyed {
            outcome,
            left_behind,
        })
    }

    fn lock(&self, domain: DomainRef, command: &str) -> Result<DomainLock, DomainStoreError> {
        const DOING: &str = "locking";
        self.check(domain)?;
        let tree = self.shared.own_the_tree();
        tree.map_err(failed(DOING, domain.domid))?;
        if let Err(error) = self.remove_of_destroyed() {
            tracing::debug!(%error, "what is kept of destroyed domains stays in xenstore");
        }
        let (path, this) = (ours(domain, LOCK), Process::this(command).encode());
        let mut holder = None;
        let taken = self.shared.store.transaction(&mut |nodes| {
            holder = nodes
                .read(&path)?
                .and_then(|value| Process::decode(&value))
                .filter(|process| !process.has_ended());
            if holder.is_none() {
                nodes.write(&path, &this)?;
            }
            Ok(holder.is_none())
        });
        taken.map_err(failed(DOING, domain.domid))?;
        if let Some(process) = holder {
            let node = (!process.is_seen()).then_some(path);
            let holder = process.holder;
            return Err(DomainStoreError::Locked {
                domain,
                holder,
                node,
            });
        }
        let shared = Arc::clone(&self.shared);
        Ok(DomainLock::new(move || {
            let given_back = shared.store.transaction(&mut |nodes| {
                // Not there any more if the domain was destroyed.
                let ours = nodes.read(&path)?.as_deref() == Some(&this);
                if ours {
                    nodes.remove(&path)?;
                    remove_if_empty(nodes, domain)?;
                }
                Ok(ours)
            });
            if let Err(error) = given_back {
                tracing::warn!(%error, "the lock of a domain stays until this process ends");
            }
        }))
    }
}
