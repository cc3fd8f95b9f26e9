//! Updates of entries in tables that are in use, which only the hypervisor may make, and unpinning
//! of tables.
//!
//! C implementation: `mod_l1_entry` and `MMUEXT_UNPIN_TABLE` in `xen/arch/x86/mm.c`.

use crate::Errno;
use xsr_format::frame::Mfn;

use super::{Frame, FrameUse, PRESENT, Tables};

impl Tables<'_> {
    /// Set entry `index` (0–511) of the level-1 table `table` (`MMU_NORMAL_PT_UPDATE`): the new
    /// entry's references are taken before those of the old one are dropped. EINVAL if `table` is
    /// not a level-1 table, or the entry is invalid; then nothing changes.
    pub(in super::super) fn update_l1(
        &self,
        table: Mfn,
        index: usize,
        entry: u64,
    ) -> Result<(), Errno> {
        let frame = self.machine.frames.owned(table, self.domid);
        if !frame.is_some_and(|frame| frame.used_as == FrameUse::Table(1) && frame.validated) {
            return Err(Errno::EINVAL);
        }
        let old = self.machine.load(table, index);
        let new = match entry & PRESENT {
            0 => entry,
            _ => {
                self.get_entry(table, 1, entry, false)?;
                self.complete(1, entry)
            }
        };
        self.machine.store_word(table, index, new);
        self.mark(table);
        self.put_entry(table, 1, old)
    }

    /// Undo [`Tables::pin`]. EINVAL if `mfn` is not a pinned table of the guest.
    pub(in super::super) fn unpin(&self, mfn: Mfn) -> Result<(), Errno> {
        self.machine.frames.update(mfn, |frame| {
            if frame.owner != Some(self.domid) || !frame.pinned {
                return Err(Errno::EINVAL);
            }
            Ok(Frame {
                pinned: false,
                ..frame
            })
        })?;
        self.mark(mfn);
        self.put(mfn)
    }
}
