//! Foreign frames mapped through privcmd, and every frame's errno kept.
//!
//! C implementation: `osdep_xenforeignmemory_map` in
//! `tools/libs/foreignmemory/linux.c`; in Linux, `privcmd_ioctl_mmap_batch`.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{self, MapFlags, ProtFlags};
use xsr_format::frame::{Gfn, PAGE_SIZE};

use super::ioctl::{self, MmapBatch, MmapResource};
use super::{FrameMapping, Resource};
use crate::DomId;
use crate::error::MapError;
use crate::pages::{Access, ForeignPages};

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::Read => ProtFlags::PROT_READ,
        Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
    }
}

/// Addresses of `pages` pages that belong to privcmd; touching one that nothing has
/// been mapped at is a SIGBUS.
fn map_device(privcmd: &File, pages: usize, access: Access) -> Result<NonNull<u8>, Errno> {
    let octets = pages.checked_mul(PAGE_SIZE).ok_or(Errno::ENOMEM)?;
    let octets = NonZeroUsize::new(octets).ok_or(Errno::EINVAL)?;
    let (prot, flags) = (protection(access), MapFlags::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { mman::mmap(None, octets, prot, flags, privcmd, 0) }?;
    Ok(base.cast())
}

/// The largest frame that a page-table entry of Linux can name. Bits above it are cut
/// off without a word, and another frame is mapped.
const LARGEST_FRAME: u64 = (1 << 40) - 1;

/// A reservation, and what is known of each of its pages.
#[derive(Debug)]
pub(super) struct Mapping {
    privcmd: Arc<File>,
    domid: DomId,
    /// Gives the addresses back if the work is not finished.
    pages: Option<ForeignPages>,
    base: NonNull<u8>,
    access: Access,
    gfns: Vec<Gfn>,
    /// The same, as the kernel is asked for them.
    asked: Vec<u64>,
    /// 0 mapped, or a negative errno, as the kernel writes them.
    errors: Vec<i32>,
}

// SAFETY: `base` is the address of the mapping that `pages` owns, which may be sent.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(super) fn new(
        privcmd: &Arc<File>,
        domid: DomId,
        gfns: &[Gfn],
        access: Access,
    ) -> Result<Self, Errno> {
        let base = match gfns.len() {
            0 => NonNull::dangling(),
            pages => map_device(privcmd, pages, access)?,
        };
        let unmapped = |(index, gfn): (usize, &Gfn)| MapError {
            index,
            gfn: *gfn,
            errno: Errno::EAGAIN,
        };
        let failed = gfns.iter().enumerate().map(unmapped).collect();
        Ok(Self {
            privcmd: Arc::clone(privcmd),
            domid,
            // SAFETY: `base` starts a mapping of `gfns.len()` pages made above, which
            // nobody else knows of; all are listed as failed. (None for no pages.)
            pages: Some(unsafe { ForeignPages::from_raw(base, gfns.len(), access, failed) }),
            base,
            access,
            gfns: gfns.to_vec(),
            asked: gfns.iter().map(|gfn| gfn.0.min(LARGEST_FRAME)).collect(),
            errors: vec![-(Errno::EAGAIN as i32); gfns.len()],
        })
    }
}

impl FrameMapping for Mapping {
    fn map(&mut self, range: Range<usize>) -> Result<(), Errno> {
        let asked = &self.asked[range.clone()];
        let errors = &mut self.errors[range.clone()];
        if asked.is_empty() {
            return Ok(());
        }
        // SAFETY: `range` lies inside the reservation: the slices above did not panic.
        let first = unsafe { self.base.add(range.start * PAGE_SIZE) };
        // A frame the kernel says nothing of is not mapped.
        errors.fill(-(Errno::EFAULT as i32));
        let mut batch = MmapBatch {
            num: u32::try_from(asked.len()).map_err(|_| Errno::EINVAL)?,
            dom: self.domid.0,
            addr: first.as_ptr().expose_provenance() as u64,
            arr: asked.as_ptr(),
            err: errors.as_mut_ptr(),
        };
        // SAFETY: the descriptor is privcmd's; `arr` and `err` have `num` elements,
        // which live until the call returns; `addr` to `addr + num * 4096` is inside a
        // mapping of privcmd's that we own and nothing has borrowed, so the kernel may
        // put frames there.
        let called = unsafe { ioctl::mmap_batch(self.privcmd.as_raw_fd(), &raw mut batch) };
        match called {
            // Some frame is paged out: `errors` says which.
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => {
                errors.fill(-(errno as i32));
                Err(errno)
            }
        }
    }

    fn failure(&self, index: usize) -> Option<Errno> {
        match self.errors[index] {
            0 if self.gfns[index].0 > LARGEST_FRAME => Some(Errno::EINVAL),
            0 => None,
            error => Some(Errno::from_raw(error.wrapping_neg())),
        }
    }

    fn finish(mut self: Box<Self>) -> Result<ForeignPages, Errno> {
        let failed = (0..self.gfns.len())
            .filter_map(|index| {
                Some(MapError {
                    index,
                    gfn: self.gfns[index],
                    errno: self.failure(index)?,
                })
            })
            .collect();
        // The addresses are those of the value made now: the old one must not give
        // them back.
        std::mem::forget(self.pages.take());
        // SAFETY: `base` starts the mapping of this many pages that `new` made and that
        // nobody else owns any more; every page but those of `failed` has been mapped
        // by the kernel, which said so.
        Ok(unsafe { ForeignPages::from_raw(self.base, self.gfns.len(), self.access, failed) })
    }
}

/// Map a resource, all or nothing.
pub(super) fn resource(
    privcmd: &File,
    domid: DomId,
    resource: Resource,
) -> Result<ForeignPages, Errno> {
    let idx = u32::try_from(resource.first).map_err(|_| Errno::EINVAL)?;
    let base = map_device(privcmd, resource.frames, Access::Write)?;
    // SAFETY: `base` starts the mapping just made, of this many pages; if the kernel
    // does not fill it below, the value is dropped without having been looked at.
    let pages = unsafe { ForeignPages::from_raw(base, resource.frames, Access::Write, Vec::new()) };
    let mut request = MmapResource {
        dom: domid.0,
        kind: resource.kind,
        id: resource.id,
        idx,
        num: resource.frames as u64,
        addr: base.as_ptr().expose_provenance() as u64,
    };
    // SAFETY: the descriptor is privcmd's; `addr` to `addr + num * 4096` is a mapping of
    // privcmd's that we own and nothing has borrowed.
    unsafe { ioctl::mmap_resource(privcmd.as_raw_fd(), &raw mut request) }?;
    Ok(pages)
}
