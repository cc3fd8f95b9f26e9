//! Foreign frames mapped through privcmd, with the errno of each frame.
//!
//! C implementation: `osdep_xenforeignmemory_map` in
//! `tools/libs/foreignmemory/linux.c`; in Linux, `privcmd_ioctl_mmap_batch`.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Errno;
use nix::sys::mman::{self, MapFlags, ProtFlags};
use xsr_format::frame::{Gfn, PAGE_SIZE};

use super::ioctl::{self, MmapBatch, MmapResource};
use super::{FrameMapping, Resource};
use crate::DomId;
use crate::error::MapError;
use crate::pages::{Access, ForeignPages, Gather, WriteCall};

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::Read => ProtFlags::PROT_READ,
        Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
    }
}

/// Addresses of `pages` pages that belong to privcmd; touching one at which nothing has been mapped
/// raises SIGBUS.
fn map_device(privcmd: &File, pages: usize, access: Access) -> Result<NonNull<u8>, Errno> {
    let bytes = pages.checked_mul(PAGE_SIZE).ok_or(Errno::ENOMEM)?;
    let bytes = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
    let (prot, flags) = (protection(access), MapFlags::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { mman::mmap(None, bytes, prot, flags, privcmd, 0) }?;
    Ok(base.cast())
}

/// The largest frame that a page-table entry of Linux can name. Linux silently drops the bits above
/// it and maps another frame.
const LARGEST_FRAME: u64 = (1 << 40) - 1;

/// A reservation, and the state of each of its pages.
#[derive(Debug)]
pub(super) struct Mapping {
    privcmd: Arc<File>,
    domid: DomId,
    /// The addresses; dropping this releases them.
    pages: ForeignPages,
    base: NonNull<u8>,
    gfns: Vec<Gfn>,
    /// The same frames, in the form that the kernel takes.
    asked: Vec<u64>,
    /// 0 for mapped, or a negative errno, as the kernel writes them.
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
            // SAFETY: `base` starts a mapping of `gfns.len()` pages made above, which nothing else
            // refers to; all are listed as failed. (None for no pages.)
            pages: unsafe { ForeignPages::from_raw(base, gfns.len(), access, failed) },
            base,
            gfns: gfns.to_vec(),
            asked: gfns.iter().map(|gfn| gfn.0.min(LARGEST_FRAME)).collect(),
            errors: vec![-Errno::EAGAIN.raw(); gfns.len()],
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
        // A frame for which the kernel reports nothing is not mapped.
        errors.fill(-Errno::EFAULT.raw());
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
        match called.map_err(Errno::from) {
            // Some frames are paged out: `errors` says which.
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => {
                errors.fill(-errno.raw());
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

    fn finish(self: Box<Self>) -> Result<ForeignPages, Errno> {
        let failed = (0..self.gfns.len())
            .filter_map(|index| {
                Some(MapError {
                    index,
                    gfn: self.gfns[index],
                    errno: self.failure(index)?,
                })
            })
            .collect();
        // SAFETY: the kernel has reported every page as mapped except those of `failed`, with the
        // access that `new` reserved them for.
        Ok(unsafe { self.pages.with_failed(failed) })
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
    // SAFETY: `base` starts the mapping just made, of this many pages; if the kernel does not fill
    // it below, the value is dropped without being accessed.
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
    let mapped = unsafe { ioctl::mmap_resource(privcmd.as_raw_fd(), &raw mut request) };
    mapped
        .map_err(Errno::from)
        .map_err(|errno| match errno == unimplemented(privcmd) {
            true => Errno::EOPNOTSUPP,
            false => errno,
        })?;
    reachable(&pages)?;
    Ok(pages)
}

/// The errno of this kernel for an ioctl that it does not have.
fn unimplemented(privcmd: &File) -> Errno {
    // SAFETY: the request takes no argument, and no kernel does anything for it.
    let asked = unsafe { ioctl::unimplemented(privcmd.as_raw_fd()) };
    asked.err().map_or(Errno::ENOTTY, Errno::from)
}

/// Whether every page is backed by memory. Linux reports a resource as mapped even if the last of
/// its frames failed (`privcmd_ioctl_mmap_resource` checks only as many results as there were
/// successes), and touching such a page raises SIGBUS. If the kernel itself accesses the page, it
/// reports EFAULT.
fn reachable(pages: &ForeignPages) -> Result<(), Errno> {
    let errno = |error: io::Error| Errno::of(&error);
    for (_, page) in pages.iter() {
        let (_reader, writer) = io::pipe().map_err(errno)?;
        let mut list = Gather::new();
        list.push_page(page);
        let one = WriteCall::AtMost(NonZeroUsize::MIN);
        let looked = list.unwritten().write_some(writer.as_fd(), one);
        looked.map_err(errno)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    /// A file in place of privcmd, which refuses the ioctl.
    const NAME: &str = "xsr-no-privcmd";

    fn reserved(gfns: &[u64]) -> Mapping {
        let file = Arc::new(File::from(memfd_create(NAME, MFdFlags::empty()).unwrap()));
        let gfns: Vec<Gfn> = gfns.iter().copied().map(Gfn).collect();
        Mapping::new(&file, DomId(7), &gfns, Access::Read).unwrap()
    }

    fn listed(pages: &ForeignPages) -> Vec<(usize, u64, Errno)> {
        let failed = pages.failed().iter();
        failed.map(|e| (e.index, e.gfn.0, e.errno)).collect()
    }

    #[test]
    fn each_frame_has_the_kernels_word_and_the_addresses_go_back() {
        // Nothing was tried, or the call failed as a whole.
        let mut mapping = reserved(&[4, 5]);
        assert_eq!(mapping.failure(1), Some(Errno::EAGAIN));
        assert_eq!(mapping.map(0..2), Err(Errno::ENOTTY));
        let pages = Box::new(mapping).finish().unwrap();
        let refused = [(0, 4, Errno::ENOTTY), (1, 5, Errno::ENOTTY)];
        assert_eq!(listed(&pages), refused);
        // As the kernel writes it: one mapped, one paged out, one truncated to another frame.
        let mut mapping = reserved(&[1, 2, 1 << 40]);
        mapping.errors = vec![0, -Errno::ENOENT.raw(), 0];
        assert_eq!(mapping.asked, [1, 2, LARGEST_FRAME]);
        let some = Box::new(mapping).finish().unwrap();
        let failed = [(1, 2, Errno::ENOENT), (2, 1 << 40, Errno::EINVAL)];
        assert_eq!(listed(&some), failed);
        assert!(some.page(0).is_some() && some.page(1).is_none());
        let unfinished = reserved(&[9]);
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(mapped().matches(NAME).count(), 3);
        drop((pages, some, unfinished));
        assert_eq!(mapped().matches(NAME).count(), 0);
        assert!(Box::new(reserved(&[])).finish().unwrap().is_empty());
    }

    #[test]
    fn a_kernel_that_maps_no_resources_says_so() {
        let file = File::from(memfd_create(NAME, MFdFlags::empty()).unwrap());
        let table = Resource {
            kind: 1,
            id: 0,
            first: 0,
            frames: 1,
        };
        let refused = resource(&file, DomId(7), table).unwrap_err();
        assert_eq!(refused, Errno::EOPNOTSUPP);
    }

    #[test]
    fn a_page_without_memory_behind_it_is_found_out_before_it_is_touched() {
        let file = File::from(memfd_create("half", MFdFlags::empty()).unwrap());
        file.set_len(PAGE_SIZE as u64).unwrap();
        for (count, expected) in [(1, Ok(())), (2, Err(Errno::EFAULT))] {
            let base = map_device(&file, count, Access::Write).unwrap();
            // SAFETY: `base` starts the mapping just made of this many pages, which nothing else
            // refers to. (Pages beyond the file's end are not touched here.)
            let pages = unsafe { ForeignPages::from_raw(base, count, Access::Write, vec![]) };
            assert_eq!(reachable(&pages), expected);
        }
    }
}
