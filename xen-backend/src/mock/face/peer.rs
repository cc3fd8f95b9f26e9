//! The face for a foreign program: hypercalls over the caller's own memory, frames mapped into its
//! address space. The package `xsr-peer` runs Xen's own toolstack libraries on it.
//!
//! C implementation: none; `tools/libs/call` and `tools/libs/foreignmemory` are its callers.

use std::sync::Arc;

use crate::Errno;
use xsr_format::frame::Gfn;

use super::buffers::Buffers;
use super::mapping::DOMID_XEN;
use super::{Face, errno};
use crate::mock::MockHost;
use crate::pages::{Access, ForeignPages};
use crate::privcmd::{Hypercalls as _, Resource};
use crate::{DomId, DomainControl as _, LogDirty as _};

pub use super::buffers::CallerMemory;

/// A mock machine as a hypervisor, for a caller with memory of its own.
#[derive(Clone, Debug)]
pub struct PeerFace(Face);

impl PeerFace {
    /// The machine as a hypervisor; the addresses in hypercalls are those of `memory`.
    pub fn new(host: &MockHost, memory: Arc<dyn CallerMemory>) -> Self {
        let mut face = Face::new(host);
        face.buffers = Buffers::of_caller(memory);
        Self(face)
    }

    /// Make hypercall `number` (`__HYPERVISOR_*`) and return the hypervisor's result.
    ///
    /// # Errors
    ///
    /// Its errno; EFAULT for addresses that are not the caller's.
    pub fn hypercall(&self, number: u32, arguments: [u64; 5]) -> Result<u64, Errno> {
        self.0.answer(number, arguments)
    }

    /// Suspend a domain, on behalf of its toolstack: only the process that has the machine open can
    /// change its domains.
    ///
    /// # Errors
    ///
    /// ESRCH; EBUSY if it is shut down, ETIMEDOUT if it does not run.
    pub fn suspend(&self, domid: u16) -> Result<(), Errno> {
        self.0.domain(domid)?.suspend().map_err(errno)
    }

    /// Resume a suspended domain; one that works in steps does a step.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL if it is not suspended.
    pub fn resume(&self, domid: u16) -> Result<(), Errno> {
        let domain = self.0.domain(domid)?;
        domain.resume().map_err(errno)?;
        domain.step().map_err(errno)
    }

    /// Unpause a paused domain, with its dirty log on.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL if it is not paused, or if its log is already on.
    pub fn run_logged(&self, domid: u16) -> Result<(), Errno> {
        let domain = self.0.domain(domid)?;
        domain.unpause().map_err(errno)?;
        domain.enable_log_dirty().map_err(errno)
    }

    /// Map frames of a domain at consecutive addresses; those that could not be mapped are listed
    /// in the result.
    ///
    /// # Errors
    ///
    /// EINVAL for an invalid domain number, ESRCH if there is no such domain; ENOMEM.
    pub fn map(&self, domid: u32, gfns: &[Gfn], access: Access) -> Result<ForeignPages, Errno> {
        let domid = u16::try_from(domid).map_err(|_| Errno::EINVAL)?;
        if DomId(domid) != DOMID_XEN {
            self.0.domain(domid)?;
        }
        let mut mapping = self.0.reserve(DomId(domid), gfns, access)?;
        mapping.map(0..gfns.len())?;
        mapping.finish()
    }

    /// Map `frames` frames of a resource (`XENMEM_resource_*`) from `first` on, for reading and
    /// writing.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP for a resource other than a grant table, EINVAL for frames that it does not have.
    pub fn map_resource(
        &self,
        domid: u16,
        kind: u32,
        id: u32,
        first: u64,
        frames: usize,
    ) -> Result<ForeignPages, Errno> {
        let resource = Resource {
            kind,
            id,
            first,
            frames,
        };
        self.0.map_resource(DomId(domid), resource)
    }
}
