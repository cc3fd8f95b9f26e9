//! A domain that has been made for an image, until the command keeps it.
//!
//! C implementation: `domcreate_complete` in `tools/libs/light/libxl_create.c`, which destroys
//! what could not be completed.

use std::cell::OnceCell;
use std::num::NonZeroUsize;

use anyhow::{Context as _, Error, Result};
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::{CpuCheck, RestoreOptions, Restored};
use xsr_xen_backend::domain_store::{
    DomainRef, DomainStore, DomainStoreError, Extent, Introduction,
};
use xsr_xen_backend::{DomId, Domain, Ring};

use super::{INCOMING, Named, bad};
use crate::backend::{self, Hypervisor, WholeLock, name_of};
use crate::exit::{self, Aftermath, LeftBehind};
use crate::left::Left;

/// The control domain: the other end of the xenstore and console rings.
const DOM0: DomId = DomId(0);

/// A domain that has been made. Destroyed on drop, unless it is kept.
pub(crate) struct Made {
    host: Hypervisor,
    which: DomainRef,
    pub(super) domain: Box<dyn Domain>,
    pub(super) about: About,
    /// What its kernel is told of its memory and vcpus.
    pub(super) extent: Option<Extent>,
    /// The domain's event channels for xenstore and console.
    ports: OnceCell<[u32; 2]>,
    keep: bool,
    /// As long as the domain is there and must not stay.
    left: Option<Left>,
    /// As long as the command works on the domain.
    lock: Option<WholeLock>,
}

/// What there is to say of a domain that has been made.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) domid: DomId,
    /// What the restore took.
    pub(crate) stats: RestoreStats,
}

impl Made {
    /// A domain that has been created just now, and has nothing yet. `left` was there before it.
    ///
    /// # Errors
    ///
    /// [`LeftBehind`]: there is no handle on it, and it stays.
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
            ports: OnceCell::new(),
            keep: false,
            left: Some(left),
            lock: None,
        })
    }

    /// Locks the domain, and keeps its first name and its configuration with it.
    pub(super) fn begin(&mut self, named: Named, json: &str) -> Result<()> {
        let (host, which, name) = (&self.host, self.which, &self.about.name);
        let (command, at_first) = match named {
            Named::AsItSays => ("restore", name.clone()),
            Named::Incoming => ("migrate-receive", format!("{name}{INCOMING}")),
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

    /// What keeps the domain.
    pub(super) fn store(&self) -> &dyn DomainStore {
        &*self.host
    }

    /// The domain, told from a later one with its number.
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

    /// Gives a domain that was received its own name.
    ///
    /// # Errors
    ///
    /// Another domain has that name by now; the store refuses. The domain has the name that it
    /// had.
    pub(crate) fn rename_in(&self) -> Result<()> {
        let name = &self.about.name;
        let incoming = format!("{name}{INCOMING}");
        self.host
            .rename(self.which, &incoming, name)
            .context("giving the domain its name")
    }

    /// Whether it is paused, now if not before.
    pub(super) fn stands_still(&self) -> bool {
        match self.domain.info() {
            Ok(info) if info.paused => true,
            _ => self.domain.pause().is_ok(),
        }
    }

    /// The domain goes.
    ///
    /// # Errors
    ///
    /// It could not be destroyed, and is still there.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.keep = true;
        let name = &self.about.name;
        self.end().with_context(|| format!("destroying {name}"))
    }

    fn end(&self) -> Result<(), DomainStoreError> {
        backend::destroy(&*self.host, self.which, &self.about.name)
    }

    /// There is no domain to be had for `error`: destroy what there is, and say so if it cannot
    /// be.
    pub(super) fn given_up(self, error: Error) -> Error {
        match self.give_up() {
            Ok(()) => error,
            Err(left) => error.context(left),
        }
    }

    /// There is no domain to be had: destroy what there is.
    ///
    /// # Errors
    ///
    /// It could not be destroyed.
    pub(crate) fn give_up(self) -> Result<(), LeftBehind> {
        // A secondary of COLO may run: if it stays, it had better stand still.
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

    /// How it is to be restored: with event channels for the control domain.
    pub(super) fn options(
        &self,
        threads: Option<NonZeroUsize>,
        cpu: CpuCheck,
    ) -> Result<RestoreOptions> {
        let [store_port, console_port] = self.ports()?;
        Ok(RestoreOptions {
            store_port,
            store_domid: DOM0,
            console_port,
            console_domid: DOM0,
            threads,
            cpu,
        })
    }

    /// The event channels of xenstore and of the console, made once.
    fn ports(&self) -> Result<[u32; 2]> {
        if let Some(ports) = self.ports.get() {
            return Ok(*ports);
        }
        let port = || self.domain.alloc_unbound_port(DOM0);
        let ports = [port()?, port()?];
        Ok(*self.ports.get_or_init(|| ports))
    }

    /// Connects xenstore and console to the rings of the guest that has been restored.
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

    /// Let the domain run.
    pub(crate) fn unpause(&self) -> Result<()> {
        self.domain
            .unpause()
            .with_context(|| format!("unpausing {}", self.about.name))
    }

    /// The domain stays.
    pub(crate) fn keep(mut self) -> About {
        self.keep = true;
        if let Some(left) = self.left.take() {
            // What is said about the domain is the last thing to be done.
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
