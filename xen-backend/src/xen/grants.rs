//! The reserved entries of a grant table, in which xenstore and the console find their rings.
//!
//! The table is mapped as a resource. If the kernel cannot do that (before Linux 4.20, or 4.18 with
//! the backport), the table's frame is mapped like any other; the frame of a translated guest is
//! temporarily given a gfn above the guest's memory.
//!
//! C implementation: `xc_dom_gnttab_seed` and its `compat_` variants in
//! `tools/libs/guest/xg_dom_boot.c`; structures in `xen/include/public/{grant_table,memory}.h`.

use crate::Errno;
use xsr_format::frame::Gfn;
use zerocopy::{FromZeros, IntoBytes};

use super::{XenDomain, sys};
use crate::pages::{Access, ForeignPages};
use crate::privcmd::Resource;
use crate::privcmd::call::{
    GNTTABOP_SETUP_TABLE, GRANT_TABLE_OP, XENMEM_ADD_TO_PHYSMAP, XENMEM_REMOVE_FROM_PHYSMAP,
};
use crate::{GuestMemory, RingGrant};

/// Bytes of an entry of a grant table of version 1, which is one word.
const GRANT_ENTRY: usize = size_of::<sys::grant_entry_v1>();

/// `XENMAPSPACE_grant_table`.
const SPACE_GRANT_TABLE: u32 = 1;

impl XenDomain {
    /// Fill in the reserved entries; neither of them if one is impossible.
    pub(super) fn seed(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), Errno> {
        let rings = [
            (sys::GNTTAB_RESERVED_CONSOLE, console),
            (sys::GNTTAB_RESERVED_XENSTORE, xenstore),
        ];
        let mut words = Vec::new();
        for (number, ring) in rings {
            let Some(gfn) = ring.gfn else {
                continue;
            };
            let entry = sys::grant_entry_v1 {
                flags: u16::try_from(sys::GTF_permit_access).map_err(|_| Errno::EINVAL)?,
                domid: ring.backend.0,
                frame: u32::try_from(gfn.0).map_err(|_| Errno::EINVAL)?,
            };
            let mut word = [0; GRANT_ENTRY];
            word.copy_from_slice(entry.as_bytes());
            let index = usize::try_from(number).map_err(|_| Errno::EINVAL)?;
            words.push((index, u64::from_le_bytes(word)));
        }
        if words.is_empty() {
            return Ok(());
        }
        let table = Resource {
            kind: sys::XENMEM_resource_grant_table,
            id: sys::XENMEM_resource_grant_table_id_shared,
            first: 0,
            frames: 1,
        };
        match self.calls().raw.map_resource(self.domid, table) {
            Ok(pages) => write(&pages, &words),
            Err(Errno::EOPNOTSUPP) if self.kind.is_translated() => self.seed_behind(&words),
            Err(Errno::EOPNOTSUPP) => write(&self.table_by_frame()?, &words),
            Err(errno) => Err(errno),
        }
    }

    /// Seed the table of a translated guest, at a gfn above its memory.
    fn seed_behind(&self, words: &[(usize, u64)]) -> Result<(), Errno> {
        let largest = self.maximum_gfn().map_err(|error| error.errno)?;
        let place = largest.map_or(0, |gfn| gfn.0 + 1);
        let add = sys::xen_add_to_physmap {
            domid: self.domid.0,
            size: 0,
            space: SPACE_GRANT_TABLE,
            idx: 0,
            gpfn: place,
        };
        let memory_op = sys::__HYPERVISOR_memory_op;
        self.calls()
            .with_struct(memory_op, XENMEM_ADD_TO_PHYSMAP, &add)?;
        let seeded = self.table_by_frame().and_then(|pages| write(&pages, words));
        let mut remove = sys::xen_remove_from_physmap::new_zeroed();
        (remove.domid, remove.gpfn) = (self.domid.0, place);
        let removed = self
            .calls()
            .with_struct(memory_op, XENMEM_REMOVE_FROM_PHYSMAP, &remove);
        seeded.and(removed.map(drop))
    }

    /// The first page of the grant table, mapped by its frame.
    fn table_by_frame(&self) -> Result<ForeignPages, Errno> {
        let mut frames = self.calls().raw.buffer(8)?;
        let mut setup = sys::gnttab_setup_table::new_zeroed();
        (setup.dom, setup.nr_frames) = (self.domid.0, 1);
        let named = &mut [&mut frames];
        let (_, setup) =
            self.calls()
                .with_struct_naming(GRANT_TABLE_OP, GNTTABOP_SETUP_TABLE, &setup, named)?;
        if setup.status != 0 {
            tracing::error!(domid = %self.domid, status = setup.status, "gnttab_setup_table");
            return Err(Errno::EIO);
        }
        let mut frame = [0; 8];
        frames.read(0, &mut frame);
        let frame = Gfn(u64::from_ne_bytes(frame));
        super::memory::map(self.calls(), self.domid, &[frame], Access::Write)
    }
}

fn write(pages: &ForeignPages, words: &[(usize, u64)]) -> Result<(), Errno> {
    let failed = pages.failed().first().map(|frame| frame.errno);
    let page = pages.page(0).ok_or(failed.unwrap_or(Errno::EFAULT))?;
    for (index, word) in words {
        page.write_entry(*index, *word);
    }
    Ok(())
}
