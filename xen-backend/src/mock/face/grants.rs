//! Grant tables without `IOCTL_PRIVCMD_MMAP_RESOURCE`: the caller asks for the table's frame, and
//! maps it into a translated guest.
//!
//! C implementation: `gnttab_setup_table` in `xen/common/grant_table.c`,
//! `xenmem_add_to_physmap_one` in `xen/arch/x86/mm/p2m.c`.

use crate::Errno;
use xsr_format::frame::Gfn;
use zerocopy::IntoBytes;

use super::Face;
use super::mapping::grant_table;
use crate::privcmd::call::GNTTABOP_SETUP_TABLE;
use crate::sys::common::{
    gnttab_setup_table as SetupTable, xen_add_to_physmap as AddToPhysmap,
    xen_remove_from_physmap as RemoveFromPhysmap,
};

/// `GNTST_bad_domain`.
const BAD_DOMAIN: i16 = -2;
/// `XENMAPSPACE_grant_table`.
const GRANT_TABLE: u32 = 1;

impl Face {
    pub(super) fn grant_table_op(&self, cmd: u64, address: u64, count: u64) -> Result<u64, Errno> {
        if cmd != u64::from(GNTTABOP_SETUP_TABLE) {
            return Err(Errno::ENOSYS);
        }
        let mut ask: SetupTable = self.load(address)?;
        if count != 1 || ask.nr_frames != 1 {
            return Err(Errno::EINVAL);
        }
        let refused = self.state().obstacles.no_tables;
        let Some(domain) = self.domain(ask.dom).ok().filter(|_| !refused) else {
            ask.status = BAD_DOMAIN;
            self.save(address, &ask)?;
            return Ok(0);
        };
        let frame = match domain.dom.kind.is_translated() {
            false => grant_table(&domain)?.0,
            // Its gfn in the guest, if it has one.
            true => {
                let state = self.state();
                let place = state.tables.iter().find(|(domid, _)| *domid == ask.dom);
                place.map_or(Gfn::INVALID.0, |(_, gfn)| *gfn)
            }
        };
        self.buffers.write(ask.frame_list, frame.as_bytes())?;
        ask.status = 0;
        self.save(address, &ask)?;
        Ok(0)
    }

    pub(super) fn add_to_physmap(&self, address: u64) -> Result<u64, Errno> {
        let ask: AddToPhysmap = self.load(address)?;
        if !self.domain(ask.domid)?.dom.kind.is_translated() {
            return Err(Errno::EINVAL);
        }
        if (ask.space, ask.idx) != (GRANT_TABLE, 0) {
            return Err(Errno::ENOSYS);
        }
        self.state().tables.insert((ask.domid, ask.gpfn));
        Ok(0)
    }

    pub(super) fn remove_from_physmap(&self, address: u64) -> Result<u64, Errno> {
        let ask: RemoveFromPhysmap = self.load(address)?;
        self.domain(ask.domid)?;
        match self.state().tables.remove(&(ask.domid, ask.gpfn)) {
            true => Ok(0),
            false => Err(Errno::ENOENT),
        }
    }
}
