//! What a backend answers when a call fails: the operation, the domain, the errno
//! that Xen (or the mock in its place) gave.

use nix::errno::Errno;
use thiserror::Error;
use xsr_format::frame::Gfn;

use crate::DomId;

/// A call on the hypervisor that failed as a whole.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{op} failed for {}: {errno}", domid.map_or_else(|| "the host".to_owned(), |d| d.to_string()))]
pub struct BackendError {
    /// The operation, by Xen's name for it (`populate_physmap`, `getdomaininfo`, …).
    pub op: &'static str,
    /// The domain asked about; `None` for a call about the host.
    pub domid: Option<DomId>,
    /// What Xen answered.
    pub errno: Errno,
}

impl BackendError {
    /// A failure of `op` on domain `domid`.
    pub const fn domain(op: &'static str, domid: DomId, errno: Errno) -> Self {
        Self {
            op,
            domid: Some(domid),
            errno,
        }
    }

    /// A failure of `op` that concerns no single domain.
    pub const fn host(op: &'static str, errno: Errno) -> Self {
        Self {
            op,
            domid: None,
            errno,
        }
    }
}

/// One frame that could not be mapped, in a mapping call that otherwise succeeded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("frame {gfn} (number {index} of the request) could not be mapped: {errno}")]
pub struct MapError {
    /// Position in the request, from 0.
    pub index: usize,
    /// The frame that was asked for.
    pub gfn: Gfn,
    /// EINVAL: no such frame, or it may not be mapped this way. ENOENT: paged out.
    pub errno: Errno,
}
