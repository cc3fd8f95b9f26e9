//! A domain that has been created for an image, until the command keeps it.
//!
//! C implementation: `domcreate_complete` in `tools/libs/light/libxl_create.c`, which destroys a
//! domain that could not be completed.

use std::cell::OnceCell;

use anyhow::{Context as _, Error, Result};
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Restored, Rings};
use xsr_xen_backend::domain_store::{
    DomainRef, DomainStore, DomainStoreError, Extent, Introduction,
};
use xsr_xen_backend::{DomId, Domain, Ring};

use super::direct::Toolstack;
use super::{INCOMING, Named, bad};
use crate::backend::{self, Hypervisor, WholeLock, name_of};
use crate::exit::{self, Aftermath, LeftBehind};
use crate::left::Left;

/// The control domain: the other end of the xenstore and console rings.
const DOM0: DomId = DomId(0);

/// A domain that has been created. Destroyed on drop, unless it is kept.
pub(crate) struct Made {
    host: Hypervisor,
    which: DomainRef,
    pub(super) domain: Box<dyn Domain>,
    pub(super) about: About,
    /// What its kernel is told about its memory and vcpus.
    pub(super) extent: Option<Extent>,
    /// Whether the configuration changes what the guest sees of the CPU, and libxl does not apply
    /// that.
    pub(super) changes_cpuid: bool,
    /// The domain's event channels for xenstore and console.
    ports: OnceCell<[u32; 2]>,
    keep: bool,
    /// The entry of the domain while it exists and must not stay.
    left: Option<Left>,
    /// The lock, held while the command works on the domain.
    lock: Option<WholeLock>,
}

/// Facts about a domain that has been created.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) domid: DomId,
    /// The restore's statistics.
    pub(crate) stats: RestoreStats,
}

impl Made {
    /// A domain that has just been created, and is empty. `left` was registered before.
    ///
    /// # Errors
    ///
    /// [`LeftBehind`]: there is no handle on the domain, and it stays.
    pub(super) fn new(host: &Hypervisor, which: DomainRef, name: &str, left: Left) -> Result<Self> {
        let domid = which.domid;
        let domain = host.open(which).map_err(|error| {
            let left = format!("{domid}, made for {name}, is left here: destroy it by hand");
            Error::new(error).context(LeftBehind(left))
        })?;
        let about = About {
            name: name.to_owned(),
            domid,
            stats: RestoreStats::default(),
        };
        Ok(Self {
            host: host.clone(),
            which,
            domain,
            about,
            extent: None,
            changes_cpuid: false,
            ports: OnceCell::new(),
            keep: false,
            left: Some(left),
            lock: None,
        })
    }

    /// Locks the domain, and stores its first name and its configuration.
    pub(super) fn begin(&mut self, named: Named, json: &str) -> Result<()> {
        let (host, which, name) = (&self.host, self.which, &self.about.name);
        let (command, at_first) = match named {
            Named::AsItSays => ("restore", name.clone()),
            Named::Incoming | Named::StandingBy => ("migrate-receive", format!("{name}{INCOMING}")),
        };
        self.lock = Some(host.lock_whole(which, &format!("xsr {command} {name}"))?);
        host.give_name(which, &at_first).map_err(|error| {
            use DomainStoreError::{BadName, NameTaken};
            let another_helps = matches!(error, BadName { .. } | NameTaken { .. });
            let after = match named {
                Named::AsItSays if another_helps => "give the domain another name with --name",
                _ => "",
            };
            Aftermath::of(Error::new(error), after.to_owned())
        })?;
        backend::store_config(&**host, which, json)
    }

    /// The store that has the domain.
    pub(super) fn store(&self) -> &dyn DomainStore {
        &*self.host
    }

    /// The domain, distinguished from a later one with its number.
    pub(super) fn which(&self) -> DomainRef {
        self.which
    }

    /// The name that the domain has, or will have.
    pub(crate) fn name(&self) -> &str {
        &self.about.name
    }

    /// The domain's number.
    pub(crate) fn domid(&self) -> DomId {
        self.about.domid
    }

    /// Gives a received domain its own name.
    ///
    /// # Errors
    ///
    /// Another domain has that name by now; the store refuses. The domain keeps its temporary name.
    pub(crate) fn rename_in(&self) -> Result<()> {
        let name = &self.about.name;
        let incoming = format!("{name}{INCOMING}");
        self.host
            .rename(self.which, &incoming, name)
            .context("giving the domain its name")
    }

    /// Pause it if it is not paused. Returns whether it is.
    pub(super) fn stands_still(&self) -> bool {
        match self.domain.info() {
            Ok(info) if info.paused => true,
            _ => self.domain.pause().is_ok(),
        }
    }

    /// Destroy the domain.
    ///
    /// # Errors
    ///
    /// It could not be destroyed, and still exists.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.keep = true;
        let name = &self.about.name;
        self.end().with_context(|| format!("destroying {name}"))
    }

    fn end(&self) -> Result<(), DomainStoreError> {
        backend::destroy(&*self.host, self.which, &self.about.name)
    }

    /// Destroy the domain because of `error`. The result says so if it could not be destroyed.
    pub(super) fn given_up(self, error: Error) -> Error {
        match self.give_up() {
            Ok(()) => error,
            Err(left) => error.context(left),
        }
    }

    /// Destroy the domain because it is of no use.
    ///
    /// # Errors
    ///
    /// It could not be destroyed.
    pub(crate) fn give_up(self) -> Result<(), LeftBehind> {
        // A COLO secondary may be running: if it stays, it should be paused.
        let how = match self.stands_still() {
            true => "is left here, paused; it must not run: destroy it by hand",
            false => "is left here and may be running: destroy it by hand, now",
        };
        let left = format!("{}, made for {}, {how}", self.domid(), self.name());
        self.destroy().map_err(|cause| {
            tracing::error!("{}", exit::words(cause.chain()));
            LeftBehind(left)
        })
    }

    /// Event channels for its rings, with the control domain at the other end.
    pub(super) fn rings(&self) -> Result<Rings> {
        let [store_port, console_port] = self.ports()?;
        Ok(Rings {
            store_port,
            store_domid: DOM0,
            console_port,
            console_domid: DOM0,
        })
    }

    /// The toolstack of the domain while it is restored.
    pub(super) fn toolstack(&self) -> Toolstack<'_> {
        Toolstack {
            direct: DirectToolstack(self.domain.as_ref()),
            changes_cpuid: self.changes_cpuid,
        }
    }

    /// The event channels of xenstore and the console, allocated once.
    fn ports(&self) -> Result<[u32; 2]> {
        if let Some(ports) = self.ports.get() {
            return Ok(*ports);
        }
        let port = || self.domain.alloc_unbound_port(DOM0);
        let ports = [port()?, port()?];
        Ok(*self.ports.get_or_init(|| ports))
    }

    /// Connects xenstore and console to the rings of the restored guest.
    ///
    /// # Errors
    ///
    /// The image names no xenstore ring, without which the guest cannot be asked to suspend; the
    /// store refuses.
    pub(super) fn connect(&mut self, restored: &Restored) -> Result<()> {
        self.about.stats = restored.stats;
        if !self.host.has_rings() {
            return Ok(());
        }
        let [store_port, console_port] = self.ports()?;
        let store = restored.store_gfn.ok_or_else(|| {
            bad("the image names no xenstore ring, without which nothing can be asked of the guest")
        })?;
        let ring = |frame, port| Ring { frame, port };
        let name = name_of(&*self.host, self.which)?;
        let introduction = Introduction {
            name: &name,
            store: ring(store, store_port),
            console: restored.console_gfn.map(|gfn| ring(gfn, console_port)),
            extent: self.extent.as_ref(),
        };
        self.host
            .introduce(self.which, &introduction)
            .context("connecting xenstore and console")
    }

    /// Unpause the domain.
    pub(crate) fn unpause(&self) -> Result<()> {
        self.domain
            .unpause()
            .with_context(|| format!("unpausing {}", self.about.name))
    }

    /// Keep the domain.
    pub(crate) fn keep(mut self) -> About {
        self.keep = true;
        if let Some(left) = self.left.take() {
            // After this the command only reports.
            left.until_the_end();
        }
        self.about.clone()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.end() {
            let name = &self.about.name;
            tracing::error!(%error, name, "the domain could not be destroyed: destroy it by hand");
        }
    }
}
