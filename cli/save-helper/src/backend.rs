//! The hypervisor that the helper works on: Xen on this machine.
//!
//! Tests have another one, in `mock.rs`, which is compiled with the cargo feature `test-backend`
//! only.

use anyhow::Result;
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore as _};
use xsr_xen_backend::{DomId, Domain, Host, XenHost};

/// A hypervisor, and what imitates libxl's actions on its domains if it is not Xen.
pub(crate) trait Backend {
    /// The hypervisor.
    fn host(&self) -> &dyn Host;

    /// The domain's name.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    fn name(&self, domain: DomainRef) -> Result<Option<String>>;

    /// The guest to suspend and resume when libxl says that it has done so. `ran`: whether the
    /// domain holds a guest already.
    ///
    /// # Errors
    ///
    /// The data kept with the domain cannot be read.
    fn stand_in<'d>(
        &self,
        domid: DomId,
        domain: &'d dyn Domain,
        ran: bool,
    ) -> Result<Option<Box<dyn StandIn + 'd>>>;
}

/// Repeats on a domain what libxl says that it has done.
pub(crate) trait StandIn {
    /// libxl has suspended the guest.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    fn suspend(&self) -> Result<(), ToolstackError>;

    /// libxl has resumed the guest, or has started it for the first time.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    fn run_on(&mut self) -> Result<(), ToolstackError>;
}

/// Xen on this machine. libxl suspends and resumes its domains itself.
struct Xen(XenHost);

impl Backend for Xen {
    fn host(&self) -> &dyn Host {
        &self.0
    }

    fn name(&self, domain: DomainRef) -> Result<Option<String>> {
        Ok(self.0.name(domain)?)
    }

    fn stand_in<'d>(
        &self,
        _: DomId,
        _: &'d dyn Domain,
        _: bool,
    ) -> Result<Option<Box<dyn StandIn + 'd>>> {
        Ok(None)
    }
}

/// Open Xen on this machine.
///
/// # Errors
///
/// There is no Xen, or this process has no access to it.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    Ok(Box::new(Xen(XenHost::open()?)))
}
