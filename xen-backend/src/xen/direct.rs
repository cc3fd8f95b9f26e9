//! The xenstore nodes of a domain without devices, for toolstacks that do not use libxl: its name,
//! its rings, the nodes through which it is asked to suspend.
//!
//! Values and permissions are those that libxl uses. xenconsoled takes over a console of type
//! "xenconsoled" when xenstore announces a new domain.
//!
//! C implementation: `libxl__domain_make` in `tools/libs/light/libxl_create.c`,
//! `libxl__device_console_add` in `libxl_console.c`.

use std::collections::BTreeSet;

use xsr_format::frame::Gfn;

use super::XenHost;
use crate::domain_store::{Extent, Introduction};
use crate::error::BackendError;
use crate::xenstore::StoreError;
use crate::{DomId, Host as _};

/// Bytes of output that xenconsoled keeps while no client reads it.
const CONSOLE_LIMIT: &str = "1048576";

/// The directory of the control domain's half of the consoles; every guest made by libxl has one
/// there.
const CONSOLES: &str = "/local/domain/0/backend/console";

/// The directories of a domain that it may read. Nodes created there later inherit the permission.
const GUEST_READABLE_DIRS: [&str; 7] = [
    "", "/control", "/device", "/console", "/cpu", "/memory", "/store",
];
/// The nodes that the domain owns.
const GUEST_OWNED_NODES: [&str; 9] = [
    "/control/shutdown",
    "/control/feature-poweroff",
    "/control/feature-reboot",
    "/control/feature-suspend",
    "/device/suspend/event-channel",
    "/data",
    "/drivers",
    "/attr",
    "/error",
];

/// A ring: its frame, and the domain's event channel for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// A pfn of a translated guest, an mfn of a PV guest.
    pub frame: Gfn,
    /// The domain's port.
    pub port: u32,
}

fn node(domid: DomId, name: &str) -> String {
    format!("/local/domain/{}{name}", domid.0)
}

/// The nodes of an extent (C: `libxl__build_post`).
fn nodes_of(extent: &Extent) -> Vec<(String, String)> {
    let memory = [
        ("static-max", extent.max_memory_kib),
        ("target", extent.target_memory_kib),
        ("videoram", extent.video_memory_kib),
    ];
    let memory = memory.map(|(what, kib)| (format!("/memory/{what}"), kib.to_string()));
    let vcpus = extent
        .vcpus_online
        .iter()
        .enumerate()
        .map(|(vcpu, online)| {
            let word = if *online { "online" } else { "offline" };
            (format!("/cpu/{vcpu}/availability"), word.to_owned())
        });
    memory.into_iter().chain(vcpus).collect()
}

fn failed(op: &'static str, domid: DomId) -> impl Fn(StoreError) -> BackendError {
    move |error| {
        tracing::error!(%error, "xenstore");
        BackendError::domain(op, domid, error.errno())
    }
}

impl XenHost {
    /// Parts of a domain that a save without libxl does not save: see
    /// [`DomainStore::devices`](crate::domain_store::DomainStore::devices).
    ///
    /// # Errors
    ///
    /// ENOTCONN if xenstore cannot be reached; its own error if it refuses; ESRCH.
    pub(crate) fn devices_of(&self, domid: DomId) -> Result<Vec<String>, BackendError> {
        let fail = failed("devices", domid);
        let xenstore = &*self.shared.store;
        let mut found = BTreeSet::new();
        let kept = format!("/libxl/{}/device", domid.0);
        for (place, none) in [(node(domid, "/device"), "suspend"), (kept, "console")] {
            for class in xenstore.list(&place).map_err(&fail)? {
                if class == none {
                    continue;
                }
                let devices = xenstore.list(&format!("{place}/{class}"));
                let devices = devices.map_err(&fail)?;
                found.extend(devices.iter().map(|device| format!("{class}/{device}")));
            }
        }
        let mut found: Vec<String> = found.into_iter().collect();
        let vnuma = self.shared.calls.has_vnuma(domid);
        if vnuma.map_err(|errno| BackendError::domain("get_vnumainfo", domid, errno))? {
            found.push("vNUMA".to_owned());
        }
        Ok(found)
    }

    /// What a domain's nodes say of its memory and of its vcpus up to `last_vcpu`; `None` without
    /// those of its memory. As in libxl, a vcpu without a node is offline (C:
    /// `libxl__update_avail_vcpus_xenstore`, `libxl__get_memory_target`).
    pub(crate) fn extent_of(
        &self,
        domid: DomId,
        last_vcpu: u32,
    ) -> Result<Option<Extent>, StoreError> {
        let read = |path: &str| self.shared.store.read(&node(domid, path));
        let kib = |what: &str| -> Result<Option<u64>, StoreError> {
            let value = read(&format!("/memory/{what}"))?;
            Ok(value.and_then(|value| str::from_utf8(&value).ok()?.parse().ok()))
        };
        let (Some(max_memory_kib), Some(target_memory_kib)) = (kib("static-max")?, kib("target")?)
        else {
            return Ok(None);
        };
        let is_online = |vcpu: u32| -> Result<bool, StoreError> {
            let value = read(&format!("/cpu/{vcpu}/availability"))?;
            Ok(value.as_deref() == Some(b"online"))
        };
        Ok(Some(Extent {
            max_memory_kib,
            target_memory_kib,
            video_memory_kib: kib("videoram")?.unwrap_or(0),
            vcpus_online: (0..=last_vcpu).map(is_online).collect::<Result<_, _>>()?,
        }))
    }

    /// Give a domain its name and its nodes, and connect xenstore and console to its rings. A guest
    /// without a console ring has no console.
    ///
    /// # Errors
    ///
    /// xenstore's error. Some nodes may exist then: remove them with [`XenHost::remove_nodes_of`].
    pub(crate) fn connect(
        &self,
        domid: DomId,
        introduction: &Introduction<'_>,
    ) -> Result<(), BackendError> {
        let &Introduction {
            name,
            store,
            console,
            extent,
        } = introduction;
        let fail = failed("introduce", domid);
        let xenstore = &*self.shared.store;
        let readable = GUEST_READABLE_DIRS.iter().filter(|path| match **path {
            "/console" => console.is_some(),
            "/cpu" | "/memory" => extent.is_some(),
            _ => true,
        });
        let owned = GUEST_OWNED_NODES.iter().map(|path| (path, true));
        // Before the values, which inherit the permissions.
        for (path, owner) in readable.map(|path| (path, false)).chain(owned) {
            let path = node(domid, path);
            xenstore.write(&path, b"").map_err(&fail)?;
            xenstore.let_have(&path, domid, owner).map_err(&fail)?;
        }
        let mut values = vec![
            ("/name", name.to_owned()),
            ("/domid", domid.0.to_string()),
            (
                "/control/platform-feature-multiprocessor-suspend",
                "1".to_owned(),
            ),
            ("/control/platform-feature-xs_reset_watches", "1".to_owned()),
            ("/store/port", store.port.to_string()),
            ("/store/ring-ref", store.frame.0.to_string()),
        ];
        let uuid = self.domain(domid)?.info()?.uuid;
        let vm = format!("/vm/{uuid}");
        if !uuid.is_nil() {
            values.push(("/vm", vm.clone()));
            for (key, value) in [("uuid", uuid.to_string()), ("name", name.to_owned())] {
                xenstore
                    .write(&format!("{vm}/{key}"), value.as_bytes())
                    .map_err(&fail)?;
            }
            xenstore.let_have(&vm, domid, false).map_err(&fail)?;
        }
        if let Some(console) = console {
            values.extend([
                ("/console/type", "xenconsoled".to_owned()),
                ("/console/output", "pty".to_owned()),
                ("/console/limit", CONSOLE_LIMIT.to_owned()),
                ("/console/port", console.port.to_string()),
                ("/console/ring-ref", console.frame.0.to_string()),
            ]);
        }
        let values = values
            .into_iter()
            .map(|(path, value)| (path.to_owned(), value));
        for (path, value) in values.chain(extent.into_iter().flat_map(nodes_of)) {
            xenstore
                .write(&node(domid, &path), value.as_bytes())
                .map_err(&fail)?;
        }
        // The name may have been set before its directory was made readable.
        xenstore
            .let_have(&node(domid, "/name"), domid, false)
            .map_err(&fail)?;
        xenstore
            .introduce(domid, store.frame, store.port)
            .map_err(&fail)
    }

    /// Whether another domain has the node below `/vm`, too: a copy of this one, of a migration to
    /// this same host, has the same UUID. A node of which that is not known stays.
    fn is_shared(&self, path: &str, domid: DomId) -> bool {
        let xenstore = &*self.shared.store;
        let Ok(domains) = xenstore.list("/local/domain") else {
            return true;
        };
        domains
            .iter()
            .filter(|other| **other != domid.0.to_string())
            .any(
                |other| match xenstore.read(&format!("/local/domain/{other}/vm")) {
                    Ok(found) => found.is_some_and(|found| found == path.as_bytes()),
                    Err(_) => true,
                },
            )
    }

    /// Removes a domain's nodes in xenstore: those that [`XenHost::connect`] made, and those that
    /// libxl keeps for a domain that it created and that has no device but its console. xenstore
    /// releases the domain's ring by itself once the domain is destroyed.
    ///
    /// # Errors
    ///
    /// ENOTCONN if xenstore cannot be reached; its own error if it refuses. All other nodes are
    /// removed; the error names what is left.
    pub(crate) fn remove_nodes_of(&self, domid: DomId) -> Result<(), BackendError> {
        let xenstore = &*self.shared.store;
        let mut first = None;
        let mut left = Vec::new();
        let mut paths = vec![
            format!("/libxl/{}", domid.0),
            format!("{CONSOLES}/{}", domid.0),
            node(domid, ""),
        ];
        match xenstore.read(&node(domid, "/vm")) {
            Ok(path) => {
                let path = path.and_then(|path| String::from_utf8(path).ok());
                let path = path.filter(|path| path.starts_with("/vm/"));
                paths.extend(path.filter(|path| !self.is_shared(path, domid)));
            }
            Err(error) => first = Some(error),
        }
        for path in paths {
            if let Err(error) = xenstore.remove(&path) {
                first.get_or_insert(error);
                left.push(path);
            }
        }
        match first {
            None => Ok(()),
            Some(error) => Err(failed("forget", domid)(error).explained(format!(
                "left in xenstore: {}; xenstore-rm removes it",
                match left.is_empty() {
                    true => "perhaps a node below /vm".to_owned(),
                    false => left.join(" "),
                }
            ))),
        }
    }
}
