//! `memory_op` on the mock machine.
//!
//! C implementation: `xen/common/memory.c`, `xen/arch/x86/x86_64/mm.c`.

use crate::Errno;
use xsr_format::frame::Gfn;
use zerocopy::IntoBytes;

use super::{Face, errno, sys};
use crate::GuestMemory;
use crate::mock::machine::COMPAT_M2P;
use crate::privcmd::call::{
    XENMEM_ADD_TO_PHYSMAP, XENMEM_GET_VNUMAINFO, XENMEM_REMOVE_FROM_PHYSMAP,
};

/// The first frame of the m2p: above all frames that a guest could have.
pub(super) const M2P_FRAMES: u64 = 1 << 40;
/// Frames of the m2p that one entry of its list covers.
const CHUNK_FRAMES: u64 = 512;
/// Entries of the m2p in such a chunk.
const CHUNK_ENTRIES: u64 = CHUNK_FRAMES * 512;

impl Face {
    pub(super) fn memory_op(&self, cmd: u64, address: u64) -> Result<u64, Errno> {
        let cmd = u32::try_from(cmd).map_err(|_| Errno::ENOSYS)?;
        match cmd {
            // One more than the last frame number.
            sys::XENMEM_maximum_ram_page => Ok(self.host.machine.frames.len()),
            sys::XENMEM_maximum_gpfn => {
                let domid: u16 = self.load(address)?;
                let largest = self.domain(domid)?.maximum_gfn().map_err(errno)?;
                Ok(largest.map_or(0, |gfn| gfn.0))
            }
            sys::XENMEM_machphys_mfn_list => {
                let chunks = self.host.machine.frames.len().div_ceil(CHUNK_ENTRIES);
                let first = |chunk| M2P_FRAMES + chunk * CHUNK_FRAMES;
                self.list(address, &(0..chunks).map(first).collect::<Vec<u64>>())
            }
            sys::XENMEM_machphys_compat_mfn_list => self.list(address, &[COMPAT_M2P.0]),
            sys::XENMEM_populate_physmap | sys::XENMEM_decrease_reservation => {
                self.reservation(cmd, address)
            }
            // The machine's guests have no virtual NUMA.
            XENMEM_GET_VNUMAINFO => {
                let domid: u16 = self.load(address)?;
                self.domain(domid)?;
                Err(Errno::EOPNOTSUPP)
            }
            XENMEM_ADD_TO_PHYSMAP => self.add_to_physmap(address),
            XENMEM_REMOVE_FROM_PHYSMAP => self.remove_from_physmap(address),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn list(&self, address: u64, frames: &[u64]) -> Result<u64, Errno> {
        let mut list: sys::xen_machphys_mfn_list = self.load(address)?;
        let room = usize::try_from(list.max_extents).map_err(|_| Errno::EINVAL)?;
        let frames = &frames[..frames.len().min(room)];
        self.buffers.write(list.extent_start, frames.as_bytes())?;
        list.nr_extents = u32::try_from(frames.len()).map_err(|_| Errno::EINVAL)?;
        self.save(address, &list)?;
        Ok(0)
    }

    fn reservation(&self, cmd: u32, address: u64) -> Result<u64, Errno> {
        let ask: sys::xen_memory_reservation = self.load(address)?;
        let count = usize::try_from(ask.nr_extents).map_err(|_| Errno::EINVAL)?;
        let bytes = count.checked_mul(8).ok_or(Errno::EINVAL)?;
        let bytes = self.buffers.read(ask.extent_start, bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut frames: Vec<Gfn> = words.iter().map(|w| Gfn(u64::from_ne_bytes(*w))).collect();
        // For a domain that does not exist, Xen only reports zero extents.
        let Ok(domain) = self.domain(ask.domid) else {
            return Ok(0);
        };
        let order = u8::try_from(ask.extent_order).map_err(|_| Errno::EINVAL)?;
        // The machine has one node, of number 0, which the flags count from 1.
        let (node, exact) = (ask.mem_flags >> 8 & 0xff, ask.mem_flags >> 17 & 1 == 1);
        if exact && node > 1 {
            return Ok(0);
        }
        let done = match cmd {
            sys::XENMEM_populate_physmap => domain.populate(order, &mut frames),
            _ if order == 0 => domain.release(&frames),
            _ => return Err(Errno::EINVAL),
        };
        let done = done.map_err(errno)?;
        let words: Vec<u64> = frames.iter().take(done).map(|gfn| gfn.0).collect();
        if cmd == sys::XENMEM_populate_physmap {
            self.buffers.write(ask.extent_start, words.as_bytes())?;
        }
        Ok(done as u64)
    }
}
