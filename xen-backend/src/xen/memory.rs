//! A domain's memory.
//!
//! C implementation: `tools/libs/foreignmemory`, `tools/libs/ctrl/xc_domain.c`.

use std::time::{Duration, Instant};

use crate::Errno;
use xsr_format::frame::{Gfn, PageType};
use zerocopy::{FromZeros, IntoBytes};

use super::calls::Calls;
use super::{MemoryNode, XenDomain, sys};
use crate::error::BackendError;
use crate::pages::{Access, ForeignPages};
use crate::privcmd::FrameMapping;
use crate::{DomainControl, GuestMemory};

/// Maximum number of frames in one `getpageframeinfo3`.
const MAX_TYPE_BATCH: usize = 1024;

/// How often `getpageframeinfo3`, the most frequent call, is repeated after EFAULT: the kernel may
/// be migrating a buffer that is locked, but not pinned (C: `do_domctl_retry_efault`).
const FAULTS: u32 = 2;

/// Maximum number of extents in one memory operation. Limits the duration of the call and the size
/// of its buffer.
const EXTENTS: usize = 1 << 16;

/// How long to wait between two attempts to map frames that are paged out: at first, at most, and
/// in total. After that, the pager is treated as dead.
const FIRST_WAIT: Duration = Duration::from_micros(100);
const LONGEST_WAIT: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(30);

/// Map what `mapping` has reserved, and retry frames that are paged out until they are back.
pub(super) fn map_all(mapping: &mut dyn FrameMapping, frames: usize) -> Result<(), Errno> {
    mapping.map(0..frames)?;
    let (start, mut wait) = (Instant::now(), FIRST_WAIT);
    loop {
        let paged_out: Vec<usize> = (0..frames)
            .filter(|index| mapping.failure(*index) == Some(Errno::ENOENT))
            .collect();
        if paged_out.is_empty() || start.elapsed() > PATIENCE {
            // Frames that are still paged out are listed as failed.
            return Ok(());
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
        for run in paged_out.chunk_by(|a, b| a + 1 == *b) {
            let first = run[0];
            mapping.map(first..first + run.len())?;
        }
    }
}

/// Map frames of any domain, including Xen's own.
pub(super) fn map(
    calls: &Calls,
    domid: crate::DomId,
    gfns: &[Gfn],
    access: Access,
) -> Result<ForeignPages, Errno> {
    let mut mapping = calls.raw.reserve(domid, gfns, access)?;
    map_all(&mut *mapping, gfns.len())?;
    let pages = mapping.finish()?;
    // If the domain does not exist, neither do its frames.
    match pages
        .failed()
        .iter()
        .any(|frame| frame.errno == Errno::ESRCH)
    {
        true => Err(Errno::ESRCH),
        false => Ok(pages),
    }
}

impl XenDomain {
    /// A memory operation on frames, in chunks. Returns the number of extents, from the first on,
    /// for which it succeeded, and replaces each of these by Xen's result.
    fn reserve(&self, op: u32, order: u8, frames: &mut [Gfn]) -> Result<usize, Errno> {
        let mut done = 0;
        for chunk in frames.chunks_mut(EXTENTS) {
            let extents: Vec<u64> = chunk.iter().map(|gfn| gfn.0).collect();
            let mut buffer = self.calls().filled(extents.as_bytes())?;
            let mut ask = sys::xen_memory_reservation::new_zeroed();
            ask.nr_extents = extents.len() as u64;
            ask.extent_order = order.into();
            ask.domid = self.domid.0;
            if op == sys::XENMEM_populate_physmap {
                ask.mem_flags = self.memory.map_or(0, MemoryNode::flags);
            }
            let number = sys::__HYPERVISOR_memory_op;
            let named = &mut [&mut buffer];
            let (count, _) = self.calls().with_struct_naming(number, op, &ask, named)?;
            let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
            let count = count.min(extents.len());
            let answer = Calls::contents(&buffer, count * 8);
            for (word, gfn) in answer.as_chunks().0.iter().zip(chunk) {
                *gfn = Gfn(u64::from_ne_bytes(*word));
            }
            done += count;
            if count < extents.len() {
                // Xen also answers "none" for a domain that is gone.
                self.calls().info(self.domid)?;
                break;
            }
        }
        Ok(done)
    }
}

impl GuestMemory for XenDomain {
    fn maximum_gfn(&self) -> Result<Option<Gfn>, BackendError> {
        const OP: &str = "maximum_gpfn";
        let (number, cmd) = (sys::__HYPERVISOR_memory_op, sys::XENMEM_maximum_gpfn);
        let (largest, _) = self
            .calls()
            .with_struct(number, cmd, &self.domid.0)
            .map_err(|errno| self.fail(OP, errno))?;
        // A domain without memory and one with only gfn 0 give the same answer.
        if largest == 0 && self.info()?.tot_pages == 0 {
            return Ok(None);
        }
        Ok(Some(Gfn(largest)))
    }

    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError> {
        let fail = |errno| self.fail("getpageframeinfo3", errno);
        if gfns.len() > MAX_TYPE_BATCH {
            return Err(fail(Errno::E2BIG));
        }
        if gfns.len() != out.len() {
            return Err(fail(Errno::EINVAL));
        }
        let frames: Vec<u64> = gfns.iter().map(|gfn| gfn.0).collect();
        let mut buffer = self.calls().filled(frames.as_bytes()).map_err(fail)?;
        let body = sys::xen_domctl_getpageframeinfo3 {
            num: frames.len() as u64,
            array: 0,
        };
        let cmd = sys::XEN_DOMCTL_getpageframeinfo3;
        let mut left = FAULTS;
        while let Err(errno) =
            self.calls()
                .domctl_naming(cmd, self.domid, &body, &mut [&mut buffer])
        {
            if errno != Errno::EFAULT || left == 0 {
                return Err(fail(errno));
            }
            left -= 1;
            // Some of the frames may have been overwritten by their types.
            buffer.write(0, frames.as_bytes());
        }
        let answer = Calls::contents(&buffer, frames.len() * 8);
        for (word, out) in answer.as_chunks().0.iter().zip(out) {
            // The type is in the top four bits of the lower half.
            let bits = u64::from_ne_bytes(*word) >> 28 & 0xf;
            *out = PageType::from_nibble(u8::try_from(bits).map_err(|_| fail(Errno::EINVAL))?);
        }
        Ok(())
    }

    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError> {
        map(self.calls(), self.domid, gfns, access).map_err(|errno| self.fail("mmapbatch", errno))
    }

    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError> {
        let fail = |errno| self.fail("populate_physmap", errno);
        let pages = match order {
            0 | 9 | 18 => 1_u64 << order,
            _ => return Err(fail(Errno::EINVAL)),
        };
        // Xen begins with a misaligned extent and then fails half-way.
        if frames.iter().any(|pfn| !pfn.0.is_multiple_of(pages)) {
            return Err(fail(Errno::EINVAL));
        }
        self.reserve(sys::XENMEM_populate_physmap, order, frames)
            .map_err(fail)
    }

    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError> {
        self.reserve(sys::XENMEM_decrease_reservation, 0, &mut gfns.to_vec())
            .map_err(|errno| self.fail("decrease_reservation", errno))
    }
}
