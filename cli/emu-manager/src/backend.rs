//! The hypervisor that the program works on: the Xen of this machine.
//!
//! Tests use another one, in `mock.rs`, which is compiled only with the cargo feature
//! `test-backend`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::{DomId, Host, XenHost};

use crate::settings;

/// A hypervisor and the services of its host.
pub(crate) trait Backend {
    /// The hypervisor.
    fn host(&self) -> &dyn Host;

    /// The hypervisor, for calls that only xapi needs.
    fn xen(&self) -> &XenHost;

    /// The value of the node `/local/domain/N/NAME` of xenstore; `None` if the node does not exist.
    ///
    /// # Errors
    ///
    /// xenstore cannot be read.
    fn node(&self, domid: DomId, name: &str) -> Result<Option<Vec<u8>>>;

    /// The host's configuration file.
    fn settings_file(&self) -> PathBuf;

    /// The socket on which a domain's qemu answers.
    fn qmp_socket(&self, domid: DomId) -> PathBuf;

    /// How long to wait for a guest that suspends after xenopsd has given up waiting for it.
    fn late_suspend(&self) -> Duration;

    /// What suspends the domain when xenopsd says that it has suspended it.
    ///
    /// # Errors
    ///
    /// The state that is kept with the domain cannot be read.
    fn stand_in(&self, domid: DomId) -> Result<Option<Box<dyn StandIn + '_>>>;
}

/// Carries out on a domain what xenopsd claims to have done to it.
pub(crate) trait StandIn {
    /// Suspends the guest, because xenopsd has said so.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    fn suspend(&self) -> Result<(), ToolstackError>;
}

/// The Xen of this machine, where xenopsd suspends the domains itself.
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

    fn settings_file(&self) -> PathBuf {
        settings::FILE.into()
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

/// Opens the Xen of this machine.
///
/// # Errors
///
/// The machine runs no Xen, or this process may not use it.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    Ok(Box::new(Xen(XenHost::open()?)))
}
