//! Hypercalls: buffers that do not move, mappings of guest frames, notification of event channels.
//!
//! [`Hypercalls`] is exactly what the backend needs. `/dev/xen/privcmd` is one implementation
//! ([`Privcmd`]); the other is the mock machine's face (`mock/face.rs`), which reads the same
//! structures and answers from its state.
//!
//! C implementation: `tools/libs/call/linux.c`, `tools/libs/foreignmemory/linux.c`,
//! `tools/libs/evtchn/linux.c`.

mod buffer;
pub(crate) mod call;
mod device;
mod events;
mod ioctl;
mod mapping;

use std::fmt;
use std::ops::Range;

use crate::Errno;
use xsr_format::frame::Gfn;

use crate::DomId;
use crate::pages::{Access, ForeignPages};

pub(crate) use buffer::CallBuffer;
#[cfg(feature = "mock")]
pub(crate) use buffer::Elsewhere;
pub(crate) use call::Call;
pub(crate) use device::Privcmd;

/// A resource of a domain, which is mapped by its number instead of its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resource {
    /// `XENMEM_resource_*`.
    pub(crate) kind: u32,
    /// The resource's number among those of its kind.
    pub(crate) id: u32,
    /// Its first frame.
    pub(crate) first: u64,
    /// The number of frames, at least one.
    pub(crate) frames: usize,
}

/// An interface for making hypercalls.
pub(crate) trait Hypercalls: fmt::Debug + Send + Sync {
    /// Make a hypercall. Returns the hypervisor's result or errno; EFAULT for a call that names
    /// buffers of another implementation.
    fn hypercall(&self, call: Call<'_>) -> Result<u64, Errno>;

    /// Zeroed memory for arguments, of at least one byte, that does not move and that the
    /// hypervisor can always access. ENOMEM if none is left.
    fn buffer(&self, bytes: usize) -> Result<CallBuffer, Errno>;

    /// Addresses for `gfns` of a domain; none of them is mapped yet.
    fn reserve(
        &self,
        domid: DomId,
        gfns: &[Gfn],
        access: Access,
    ) -> Result<Box<dyn FrameMapping>, Errno>;

    /// Map a resource for reading and writing.
    fn map_resource(&self, domid: DomId, resource: Resource) -> Result<ForeignPages, Errno>;

    /// Signal the event channel that a domain offers at its `port`.
    fn notify(&self, domid: DomId, port: u32) -> Result<(), Errno>;
}

/// Frames that are being mapped.
pub(crate) trait FrameMapping: Send {
    /// Try to map the frames of `range` (positions in the request). The first call covers all
    /// frames, later calls those that are not mapped yet. The result concerns the call as a whole;
    /// [`FrameMapping::failure`] gives that of each frame.
    fn map(&mut self, range: Range<usize>) -> Result<(), Errno>;

    /// The error of the frame at `index`; `None` once it is mapped.
    fn failure(&self, index: usize) -> Option<Errno>;

    /// The mapped pages; the rest are listed as failed. ENOMEM if there is no room for the list.
    fn finish(self: Box<Self>) -> Result<ForeignPages, Errno>;
}
