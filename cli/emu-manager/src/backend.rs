//! The hypervisor that the program works on: the Xen of this machine.
//!
//! Tests have another one, in `mock.rs`, which is compiled with the cargo feature
//! `test-backend` only.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::{DomId, Host, XenHost};

/// A hypervisor, and what there is on its host.
pub(crate) trait Backend {
    /// The hypervisor.
    fn host(&self) -> &dyn Host;

    /// The hypervisor, for what only xapi asks of it.
    fn xen(&self) -> &XenHost;

    /// The value of the node `/local/domain/N/NAME` of xenstore; `None` if there is none.
    ///
    /// # Errors
    ///
    /// xenstore cannot be asked.
    fn node(&self, domid: DomId, name: &str) -> Result<Option<Vec<u8>>>;

    /// The socket at which a domain's qemu answers.
    fn qmp_socket(&self, domid: DomId) -> PathBuf;

    /// How long a guest may still suspend after xenopsd has given up waiting for it.
    fn late_suspend(&self) -> Duration;

    /// What suspends the domain when xenopsd says that it has done so.
    ///
    /// # Errors
    ///
    /// What is kept with the domain cannot be read.
    fn stand_in(&self, domid: DomId) -> Result<Option<Box<dyn StandIn + '_>>>;
}

/// Does to a domain what xenopsd says that it has done to it.
pub(crate) trait StandIn {
    /// xenopsd has suspended the guest.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    fn suspend(&self) -> Result<(), ToolstackError>;
}

/// The Xen of this machine, whose domains xenopsd suspends itself.
struct Xen(XenHost);

impl Backend for Xen {
    fn host(&self) -> &dyn Host {
        &self.0
    }

    fn xen(&self) -> &XenHost {
        &self.0
    }

    fn node(&self, domid: DomId, name: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.0.domain_node(domid, name)?)
    }

    fn qmp_socket(&self, domid: DomId) -> PathBuf {
        format!("/var/run/xen/qmp-libxl-{}", domid.0).into()
    }

    fn late_suspend(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn stand_in(&self, _: DomId) -> Result<Option<Box<dyn StandIn + '_>>> {
        Ok(None)
    }
}

/// Open the Xen of this machine.
///
/// # Errors
///
/// There is none, or this process may not ask it.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    Ok(Box::new(Xen(XenHost::open()?)))
}
