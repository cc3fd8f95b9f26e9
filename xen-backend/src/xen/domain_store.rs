//! The domain store of a real Xen. Names are at libxl's nodes; all other data is in our own tree in
//! xenstore:
//!
//! | node | holds |
//! |---|---|
//! | `/local/domain/N/name` | the name of domain N; for libxl's also `/vm/UUID/name` |
//! | `/tool/xsr/N/UUID/lock` | the process that works on the domain |
//! | `/tool/xsr/N/UUID/configuration` | the number of bytes, and the node below which they are |
//! | `/tool/xsr/N/UUID/configuration-…/I` | piece I of them |
//! | `/tool/xsr/N/UUID/emulators` | the same for the emulators' records |
//!
//! A value is replaced by writing its pieces to a new node, and then the node that names it, so
//! that a reader finds either the old value or the new one, whenever the writer dies.
//!
//! C implementation: `libxl__domain_rename` and `libxl__destroy_domid` in
//! `tools/libs/light/libxl_domain.c`, `libxl__userdata_path` in `libxl_dom.c`.

mod lock;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::Errno;

use self::lock::{OurLock, holder};
use super::{Shared, XenHost, sys};
use crate::domain_store::{
    Configuration, ConfigurationKeeper, DestroyOutcome, Destroyed, DomainLock, DomainRef,
    DomainStore, DomainStoreError, Extent, Introduction, LeftBehind, ListedDomain, Process,
};
use crate::xenstore::{Nodes, StoreError};
use crate::{BackendError, DomId, Host as _};

/// The root of our tree.
const OURS: &str = "/tool/xsr";

/// Bytes in a node: a message of xenstore has at most 4096, including the path.
const PIECE: usize = 3072;
/// The most bytes of a value. A configuration has some thousand, and the emulator records of a
/// guest without devices none. xenstore is not meant for more.
const LARGEST: usize = 256 << 10;

/// The longest name, in bytes.
const LONGEST_NAME: usize = 1024;

/// The interval between checks whether a destroyed domain is gone.
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

/// Removes the nodes above a domain's values if no values are left.
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

/// Checks that `name` is valid: xenstore and libxl accept anything, but a name that a user cannot
/// see or type is useless.
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

/// The name that a domain must have before it is changed.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    /// This name, or none.
    Name(Option<&'a str>),
    Anything,
}

impl Shared {
    fn name_of(&self, domid: DomId) -> Result<Option<String>, DomainStoreError> {
        let name = self.store.read(&node(domid, "/name"));
        // The name of a domain that libxl has preserved is a node without a value.
        let name = name.map_err(failed("reading the name", domid))?;
        Ok(text(name).filter(|name| !name.is_empty()))
    }

    /// The value stored under `key`.
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

    /// Stores `value` under `key`.
    fn put(&self, domain: DomainRef, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let head = ours(domain, key);
        self.own_the_tree()?;
        let below = self.unused(domain, key)?;
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

    /// An unused node for the pieces of a value. A process with the same number, an earlier one or
    /// one in another PID namespace, may already have used the next name.
    fn unused(&self, domain: DomainRef, key: &str) -> Result<String, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            let below = format!("{key}-{}-{next}", std::process::id());
            let path = ours(domain, &below);
            if self.store.read(&path)?.is_none() && self.store.list(&path)?.is_empty() {
                return Ok(below);
            }
        }
    }

    /// Removes the domain's data, except names for which `stays` is true, and all data of earlier
    /// domains with its number, which another program has destroyed.
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

    /// Makes our tree readable only for the control domain; nodes created below it inherit that.
    fn own_the_tree(&self) -> Result<(), StoreError> {
        if self.store.read(OURS)?.is_some() {
            return Ok(());
        }
        // Created together with its permissions.
        self.store.transaction(&mut |nodes| {
            let missing = nodes.read(OURS)?.is_none();
            if missing {
                nodes.write(OURS, b"")?;
                nodes.let_have(OURS, DomId(0), true)?;
            }
            Ok(missing)
        })
    }

    /// libxl's data about a domain that a destroy does not remove.
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
            // Nothing has to be disconnected: the console daemon notices by itself.
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

/// Calls `look` until it returns that the domain is gone, or `timeout` has passed.
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
    /// Whether the domain is gone; its number may belong to another domain by now.
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

    /// Makes the hypervisor destroy the domain. If there is much to release, the call has to be
    /// repeated, which is done while there is time `left`.
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

    /// The domain other than `domain` that has the name. Must be called in the transaction that
    /// sets the name, which is then repeated if another domain is given the name meanwhile.
    fn taken(
        &self,
        nodes: &mut dyn Nodes,
        domain: DomainRef,
        name: &str,
    ) -> Result<Option<DomainRef>, StoreError> {
        for domid in self.with_nodes(nodes)? {
            if domid == domain.domid {
                continue;
            }
            let found = nodes.read(&node(domid, "/name"))?;
            // A domain that is gone may have left nodes.
            if found.as_deref() == Some(name.as_bytes())
                && let Ok(info) = self.shared.calls.info(domid)
            {
                return Ok(Some(DomainRef::from(&info)));
            }
        }
        Ok(None)
    }

    /// The domains that have nodes.
    fn with_nodes(&self, nodes: &mut dyn Nodes) -> Result<Vec<DomId>, StoreError> {
        match nodes.list("/local/domain") {
            Ok(names) => Ok(names
                .iter()
                .filter_map(|name| name.parse().ok().map(DomId))
                .collect()),
            // There are too many for one message of xenstore.
            Err(StoreError::Refused {
                errno: Errno::E2BIG,
                ..
            }) => match self.domains() {
                Ok(infos) => Ok(infos.iter().map(|info| info.domid).collect()),
                Err(error) => Err(StoreError::Connection(error.errno.into())),
            },
            Err(error) => Err(error),
        }
    }

    /// Renames the domain to `to`, atomically with the check of its present name against `from` and
    /// of other domains' names.
    fn change_name(
        &self,
        domain: DomainRef,
        from: Expected<'_>,
        to: &str,
    ) -> Result<(), DomainStoreError> {
        check_name(to)?;
        let mut refused = None;
        let changed = self.shared.store.transaction(&mut |nodes| {
            refused = self.refuse_name(nodes, domain, from, to)?;
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

    /// The reason why the domain may not be renamed to `to`; `None` if it may. The domain is looked
    /// for after its name has been read: if its number is given to another one meanwhile, that one's
    /// name makes the transaction conflict.
    fn refuse_name(
        &self,
        nodes: &mut dyn Nodes,
        domain: DomainRef,
        from: Expected<'_>,
        to: &str,
    ) -> Result<Option<DomainStoreError>, StoreError> {
        let found = text(nodes.read(&node(domain.domid, "/name"))?);
        if let Err(error) = self.check(domain) {
            return Ok(Some(error));
        }
        if let Expected::Name(expected) = from {
            let found = found.filter(|name| !name.is_empty());
            if found.as_deref() != expected {
                return Ok(Some(DomainStoreError::WrongName {
                    domain,
                    expected: expected.map(str::to_owned),
                    found,
                }));
            }
        }
        let taken = self.taken(nodes, domain, to)?;
        Ok(taken.map(|by| DomainStoreError::NameTaken {
            name: to.to_owned(),
            by,
        }))
    }

    /// Removes the data of domains that another program has destroyed. Domain numbers are only
    /// reused after all others have been used.
    fn remove_of_destroyed(&self) -> Result<(), StoreError> {
        for number in self.shared.store.list(OURS)? {
            let Ok(domid) = number.parse().map(DomId) else {
                continue;
            };
            self.shared.store.transaction(&mut |nodes| {
                // Makes the transaction conflict, and be repeated, if a new domain with this number
                // is locked or configured meanwhile.
                nodes.list(&tree(domid))?;
                let gone = self.shared.calls.info(domid) == Err(Errno::ESRCH);
                if gone {
                    nodes.remove(&tree(domid))?;
                }
                Ok(gone)
            })?;
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
        if bytes.len() > LARGEST {
            return Err(self.too_large(domain, what, bytes.len()));
        }
        self.check(domain)?;
        let put = self.shared.put(domain, key, bytes);
        put.map_err(failed("keeping the user data", domain.domid))
    }

    /// The error for data that is too long for xenstore, or for a domain that does not exist.
    fn too_large(&self, domain: DomainRef, what: &'static str, bytes: usize) -> DomainStoreError {
        let too_large = DomainStoreError::TooLarge {
            domain,
            what,
            bytes,
            most: LARGEST,
        };
        self.check(domain).err().unwrap_or(too_large)
    }

    /// Removes the nodes that libxl or [`XenHost::connect`] has written for the domain, unless
    /// devices are left for libxl.
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

/// Keeps what is written to it, as far as xenstore can hold it.
#[derive(Default)]
struct AtMost {
    kept: Vec<u8>,
    /// The number of bytes written.
    bytes: usize,
}

impl Write for AtMost {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len();
        if self.bytes <= LARGEST {
            self.kept.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

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

    fn check_name(&self, name: &str) -> Result<(), DomainStoreError> {
        check_name(name)
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

    fn set_emulators(
        &self,
        domain: DomainRef,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), DomainStoreError> {
        let doing = "keeping the emulators' records";
        let mut records = AtMost::default();
        write(&mut records).map_err(DomainStoreError::storage(doing, domain.domid))?;
        let what = "state of the emulators";
        match records.bytes > LARGEST {
            true => Err(self.too_large(domain, what, records.bytes)),
            false => self.keep(domain, EMULATORS, what, &records.kept),
        }
    }

    fn devices(&self, domain: DomainRef) -> Result<Vec<String>, DomainStoreError> {
        self.check(domain)?;
        Ok(self.devices_of(domain.domid)?)
    }

    fn extent(&self, domain: DomainRef) -> Result<Option<Extent>, DomainStoreError> {
        let info = self.check(domain)?;
        self.extent_of(domain.domid, info.max_vcpu_id)
            .map_err(failed("reading the memory's target", domain.domid))
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
        // Includes a dying domain: the hypervisor continues to release it.
        match self.kill(domain, left) {
            Err(DomainStoreError::Gone { .. }) if info.dying => {}
            killed => killed?,
        }
        self.shared.logs().remove(&domid);
        // Only this domain's own nodes: another domain may have the number by now.
        let removed = self.shared.store.transaction(&mut |nodes| {
            nodes.remove(&tree_of(domain))?;
            remove_if_empty(nodes, domain)?;
            Ok(true)
        });
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
        let mut locked = None;
        let taken = self.shared.store.transaction(&mut |nodes| {
            locked = nodes.read(&path)?.and_then(|value| holder(&value));
            if locked.is_none() {
                nodes.write(&path, &this)?;
            }
            Ok(locked.is_none())
        });
        taken.map_err(failed(DOING, domain.domid))?;
        if let Some((holder, seen)) = locked {
            let node = (!seen).then_some(path);
            return Err(DomainStoreError::Locked {
                domain,
                holder,
                node,
            });
        }
        let ours = Arc::new(OurLock {
            shared: Arc::clone(&self.shared),
            domain,
            path,
            value: Mutex::new(this),
        });
        let (passed, command) = (Arc::clone(&ours), command.to_owned());
        let pass = move |pid| {
            let named = passed.name(Process::of(pid, &command).encode());
            named.map_err(failed(DOING, domain.domid))
        };
        let release = move || {
            if let Err(error) = ours.give_back() {
                tracing::warn!(%error, "the lock of a domain stays until this process ends");
            }
        };
        Ok(DomainLock::new(release, pass))
    }
}
