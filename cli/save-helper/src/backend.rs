//! The hypervisor that the helper works on: the Xen of this machine.
//!
//! Tests have another one, in `mock.rs`, which is compiled with the cargo feature
//! `test-backend` only.

use anyhow::Result;
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::{DomId, Domain, Host, XenHost};

/// A hypervisor, and who does there what libxl does to a domain of Xen.
pub(crate) trait Backend {
    /// The hypervisor.
    fn host(&self) -> &dyn Host;

    /// Who suspends and resumes the domain when libxl says that it has done so. `ran`: whether
    /// there is a guest in it already.
    ///
    /// # Errors
    ///
    /// What is kept with the domain cannot be read.
    fn stand_in<'d>(
        &self,
        domid: DomId,
        domain: &'d dyn Domain,
        ran: bool,
    ) -> Result<Option<Box<dyn StandIn + 'd>>>;
}

/// Does to a domain what libxl says that it has done to it.
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

/// The Xen of this machine, whose domains libxl suspends and resumes itself.
struct Xen(XenHost);

impl Backend for Xen {
    fn host(&self) -> &dyn Host {
        &self.0
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

/// Open the Xen of this machine.
///
/// # Errors
///
/// There is none, or this process may not ask it.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    Ok(Box::new(Xen(XenHost::open()?)))
}
