//! The way to the hypervisor: hypercalls over buffers that do not move, frames of
//! guests mapped, event channels notified.
//!
//! [`Hypercalls`] is what the backend needs of it and no more. `/dev/xen/privcmd` is
//! one implementation ([`Privcmd`]); the other is the mock machine's face
//! (`mock/face.rs`), which reads the same structures and answers from its state.
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

use nix::errno::Errno;
use xsr_format::frame::Gfn;

use crate::DomId;
use crate::pages::{Access, ForeignPages};

pub(crate) use buffer::CallBuffer;
#[cfg(feature = "mock")]
pub(crate) use buffer::Elsewhere;
pub(crate) use call::Call;
pub(crate) use device::Privcmd;

/// A resource of a domain that is mapped by its number, not by its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resource {
    /// `XENMEM_resource_*`.
    pub(crate) kind: u32,
    /// Which one of that kind.
    pub(crate) id: u32,
    /// First frame of it.
    pub(crate) first: u64,
    /// Frames, at least one.
    pub(crate) frames: usize,
}

/// What a hypervisor is asked through.
pub(crate) trait Hypercalls: fmt::Debug + Send + Sync {
    /// Make a hypercall. What the hypervisor returned, or its errno; EFAULT for a call that
    /// names buffers of another.
    fn hypercall(&self, call: Call<'_>) -> Result<u64, Errno>;

    /// Zeroed memory for arguments, of at least one byte, that stays where it is and
    /// that the hypervisor can reach at any time. ENOMEM where there is none left.
    fn buffer(&self, bytes: usize) -> Result<CallBuffer, Errno>;

    /// Addresses for `gfns` of a domain, none mapped as yet.
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

/// Frames on their way to be mapped.
pub(crate) trait FrameMapping: Send {
    /// Try to map the frames of `range` (positions in the request). The first call is
    /// for all of them, later ones for such as are not mapped yet. The result is about
    /// the call; that of each frame is [`FrameMapping::failure`]'s.
    fn map(&mut self, range: Range<usize>) -> Result<(), Errno>;

    /// Why the frame at `index` is not mapped; `None` once it is.
    fn failure(&self, index: usize) -> Option<Errno>;

    /// What has been mapped, with the rest listed as failed. ENOMEM where there is no
    /// room for it.
    fn finish(self: Box<Self>) -> Result<ForeignPages, Errno>;
}
