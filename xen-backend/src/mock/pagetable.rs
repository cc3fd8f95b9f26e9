//! Page-table frames of PV guests: Xen's rules for references between frames.
//!
//! While a frame has references as a page table, it cannot be mapped writable, and vice versa. On
//! the first reference as a table of some level Xen validates each of its entries, which takes
//! references in turn; Xen completes the entries as it goes and fills in its own slots.
//!
//! C implementation: `_get_page_type`, `promote_l[1-4]_table`, `get_page_from_l[1-4]e` and
//! `define_get_linear_pagetable` in `xen/arch/x86/mm.c`, `adjust_guest_l[1-4]e` in
//! `xen/arch/x86/pv/mm.h`. For a bad entry Xen returns EPERM or EBUSY; this returns EINVAL, as the
//! trait permits.

use crate::Errno;
use xsr_format::frame::{Mfn, Page};

use super::dirty::DirtyLog;
use super::frames::{Frame, FrameUse};
use super::machine::{COMPAT_M2P, Machine, XEN_TABLES};
use super::state::Dom;
use crate::DomId;
use crate::pages::ENTRIES_PER_TABLE;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const RW: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
/// Superpage at levels 2 and 3; memory type (PAT) at level 1.
const PSE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
/// Xen's mark for a mapping of the guest's kernel.
const GUEST_KERNEL: u64 = 1 << 52;
/// Xen's mark for a mapping of a grant.
const GRANT: u64 = 1 << 62;
pub(super) const NX: u64 = 1 << 63;

/// Bits 12–51: the frame.
pub(super) const FRAME_MASK: u64 = ((1 << 52) - 1) & !0xfff;
/// Bits 52–63, 9–11: for software, except NX.
const SOFTWARE_HIGH: u64 = 0xfff << 52;

/// Bits that an entry may have only at level 1.
const DISALLOWED: u64 = PWT | PCD | PSE | GLOBAL;

/// Level-4 slots that are Xen's own.
pub(super) const XEN_L4_SLOTS: std::ops::Range<usize> = 256..272;
/// The Xen slot of a level-4 table that refers to the table itself.
const SELF_SLOT: usize = 258;
/// Xen's own level-2 slots in a 32-bit guest's last GiB: from 0xf5800000 on.
pub(super) const XEN_L2_SLOTS: std::ops::Range<usize> = 428..512;

/// The frame an entry refers to.
pub(super) const fn entry_mfn(entry: u64) -> Mfn {
    Mfn((entry & FRAME_MASK) >> 12)
}

/// The entry at `index` of a table.
pub(super) fn entry(page: &Page, index: usize) -> u64 {
    super::layout::read_word(page, index * 8, 8)
}

/// The page tables of one PV guest. The caller holds the guest's lock.
#[derive(Debug)]
pub(super) struct Tables<'a> {
    machine: &'a Machine,
    dirty: &'a DirtyLog,
    domid: DomId,
    /// Whether the guest is 32 bits wide, with three levels.
    pae: bool,
}

/// The use that a reference is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Use {
    used_as: FrameUse,
    pae_xen_l2: bool,
}

impl From<FrameUse> for Use {
    fn from(used_as: FrameUse) -> Self {
        Self {
            used_as,
            pae_xen_l2: false,
        }
    }
}

impl<'a> Tables<'a> {
    /// The page tables of `dom`, `width` bytes wide.
    pub(super) fn new(machine: &'a Machine, dom: &'a Dom, width: u8) -> Self {
        Self {
            machine,
            dirty: &dom.dirty,
            domid: dom.domid,
            pae: width == 4,
        }
    }

    /// Log that a table has changed. Xen also counts it as a change if a frame becomes a table,
    /// ceases to be one, or is pinned.
    fn mark(&self, mfn: Mfn) {
        if let Some(pfn) = self.machine.m2p(mfn) {
            self.dirty.mark(pfn);
        }
    }

    /// The level of a top-level table: 4 or 3.
    pub(super) fn top_level(&self) -> u8 {
        if self.pae { 3 } else { 4 }
    }

    /// Take a reference to `mfn` as `used_as`. EINVAL if that is not allowed.
    pub(super) fn get(&self, mfn: Mfn, used_as: FrameUse) -> Result<(), Errno> {
        self.get_use(mfn, used_as.into())
    }

    fn get_use(&self, mfn: Mfn, want: Use) -> Result<(), Errno> {
        let needs_look = matches!(want.used_as, FrameUse::Table(_));
        let before = self.machine.frames.update(mfn, |frame| {
            if frame.owner != Some(self.domid) || frame.count == Frame::MAX_COUNT {
                return Err(Errno::EINVAL);
            }
            let mut new = frame;
            new.count += 1;
            if frame.count == 0 {
                new.used_as = want.used_as;
                new.pae_xen_l2 = want.pae_xen_l2;
                new.validated = !needs_look;
                new.linear = 0;
            } else if (frame.used_as, frame.pae_xen_l2) != (want.used_as, want.pae_xen_l2)
                || !frame.validated
            {
                return Err(Errno::EINVAL);
            }
            Ok(new)
        })?;
        let FrameUse::Table(level) = want.used_as else {
            return Ok(());
        };
        if before.count > 0 {
            return Ok(());
        }
        let looked = self.look(mfn, level, want.pae_xen_l2);
        self.machine.frames.update(mfn, |frame| {
            Ok(match looked {
                Ok(()) => Frame {
                    validated: true,
                    ..frame
                },
                Err(_) => Frame {
                    count: 0,
                    validated: false,
                    pae_xen_l2: false,
                    linear: 0,
                    ..frame
                },
            })
        })?;
        self.mark(mfn);
        looked
    }

    /// Drop a reference taken by [`Tables::get`].
    pub(super) fn put(&self, mfn: Mfn) -> Result<(), Errno> {
        let before = self.machine.frames.update(mfn, |frame| {
            let last = frame.count <= 1;
            let table = matches!(frame.used_as, FrameUse::Table(_));
            Ok(Frame {
                count: frame.count.saturating_sub(1),
                validated: frame.validated && !(last && table),
                ..frame
            })
        })?;
        let FrameUse::Table(level) = before.used_as else {
            return Ok(());
        };
        if before.count != 1 {
            return Ok(());
        }
        self.mark(mfn);
        // The table has no references left: drop those that its entries hold.
        let page = self.machine.read_frame(mfn)?;
        for index in self.guest_slots(level, before.pae_xen_l2) {
            self.put_entry(mfn, level, entry(&page, index))?;
        }
        self.machine.frames.update(mfn, |frame| {
            Ok(Frame {
                pae_xen_l2: false,
                linear: 0,
                ..frame
            })
        })?;
        Ok(())
    }

    /// Pin `mfn` as a table of `level`.
    pub(super) fn pin(&self, level: u8, mfn: Mfn) -> Result<(), Errno> {
        if !(1..=self.top_level()).contains(&level) {
            return Err(Errno::EINVAL);
        }
        self.get(mfn, FrameUse::Table(level))?;
        let pinned = self.machine.frames.update(mfn, |frame| {
            if frame.pinned {
                return Err(Errno::EINVAL);
            }
            Ok(Frame {
                pinned: true,
                ..frame
            })
        });
        if let Err(errno) = pinned {
            self.put(mfn)?;
            return Err(errno);
        }
        self.mark(mfn);
        Ok(())
    }

    /// The slots of a table that the guest fills.
    fn guest_slots(&self, level: u8, pae_xen_l2: bool) -> impl Iterator<Item = usize> + use<> {
        let (end, xen) = match level {
            4 => (512, XEN_L4_SLOTS),
            3 if self.pae => (4, 0..0),
            2 if pae_xen_l2 => (512, XEN_L2_SLOTS),
            _ => (512, 0..0),
        };
        (0..end).filter(move |index| !xen.contains(index))
    }

    /// Validate each entry of a table, take the references for it, and complete it. On failure no
    /// references are held.
    fn look(&self, mfn: Mfn, level: u8, pae_xen_l2: bool) -> Result<(), Errno> {
        let page = self.machine.read_frame(mfn)?;
        let mut held = Vec::with_capacity(ENTRIES_PER_TABLE);
        let mut result = Ok(());
        for index in self.guest_slots(level, pae_xen_l2) {
            let value = entry(&page, index);
            let needed = self.pae && level == 3 && index == 3;
            if value & PRESENT == 0 {
                if needed {
                    result = Err(Errno::EINVAL);
                    break;
                }
                continue;
            }
            result = self.get_entry(mfn, level, value, needed);
            if result.is_err() {
                break;
            }
            held.push((index, value));
        }
        if let Err(errno) = result {
            for (_, value) in held {
                self.put_entry(mfn, level, value)?;
            }
            return Err(errno);
        }
        // Only changed entries are written: the rest of the page may be mapped.
        let set = |index, old, new| {
            if new != old {
                self.machine.store_word(mfn, index, new);
            }
        };
        for (index, value) in held {
            set(index, value, self.complete(level, value));
        }
        self.xen_slots(mfn, level, pae_xen_l2, |index, value| {
            set(index, entry(&page, index), value);
        });
        Ok(())
    }

    fn get_entry(&self, table: Mfn, level: u8, value: u64, xen_l2: bool) -> Result<(), Errno> {
        let disallowed = match level {
            1 => PWT | PCD | PSE | GRANT,
            3 if self.pae => DISALLOWED | SOFTWARE_HIGH,
            _ => DISALLOWED,
        };
        if value & disallowed != 0 {
            return Err(Errno::EINVAL);
        }
        let mfn = entry_mfn(value);
        if level == 1 && value & RW != 0 {
            return self.get(mfn, FrameUse::Writable);
        }
        if self.machine.frames.owned(mfn, self.domid).is_none() {
            return Err(Errno::EINVAL);
        }
        if level == 1 {
            return Ok(());
        }
        let taken = self.get_use(
            mfn,
            Use {
                used_as: FrameUse::Table(level - 1),
                pae_xen_l2: xen_l2,
            },
        );
        if xen_l2 {
            // Xen's entries in it belong to this table: nothing else may refer to it.
            taken?;
            let frame = self.machine.frames.owned(mfn, self.domid);
            if frame.is_some_and(|frame| frame.count == 1) {
                return Ok(());
            }
            self.put(mfn)?;
            return Err(Errno::EINVAL);
        }
        match taken {
            Err(Errno::EINVAL) if !(self.pae && level == 3) => self.get_linear(table, level, value),
            taken => taken,
        }
    }

    /// Take a reference from a table of `level` to one of the same level: a read-only linear page
    /// table. A table may always refer to itself; it may refer to another if that one is valid and
    /// neither has linear references in the opposite direction.
    fn get_linear(&self, table: Mfn, level: u8, value: u64) -> Result<(), Errno> {
        if value & RW != 0 {
            return Err(Errno::EINVAL);
        }
        let target = entry_mfn(value);
        if target == table {
            return Ok(());
        }
        let frames = &self.machine.frames;
        frames.update(table, |frame| {
            if !(0..Frame::MAX_LINEAR).contains(&frame.linear) {
                return Err(Errno::EINVAL);
            }
            Ok(Frame {
                linear: frame.linear + 1,
                ..frame
            })
        })?;
        // If this fails, so does the validation of the whole table, which resets its count.
        frames.update(target, |frame| {
            if frame.used_as != FrameUse::Table(level)
                || !frame.validated
                || frame.count == Frame::MAX_COUNT
                || !(-Frame::MAX_LINEAR + 1..=0).contains(&frame.linear)
            {
                return Err(Errno::EINVAL);
            }
            Ok(Frame {
                count: frame.count + 1,
                linear: frame.linear - 1,
                ..frame
            })
        })?;
        Ok(())
    }

    fn drop_linear(&self, mfn: Mfn, step: i16) -> Result<(), Errno> {
        self.machine.frames.update(mfn, |frame| {
            Ok(Frame {
                linear: frame.linear + step,
                ..frame
            })
        })?;
        Ok(())
    }

    fn put_entry(&self, table: Mfn, level: u8, value: u64) -> Result<(), Errno> {
        if value & PRESENT == 0 {
            return Ok(());
        }
        let mfn = entry_mfn(value);
        if level == 1 {
            return match value & RW {
                0 => Ok(()),
                _ => self.put(mfn),
            };
        }
        if mfn == table {
            return Ok(());
        }
        let linear = self
            .machine
            .frames
            .owned(mfn, self.domid)
            .is_some_and(|frame| frame.used_as == FrameUse::Table(level));
        if linear {
            self.drop_linear(mfn, 1)?;
            self.drop_linear(table, -1)?;
        }
        self.put(mfn)
    }

    /// An entry with the bits that Xen adds to a valid one.
    fn complete(&self, level: u8, value: u64) -> u64 {
        match (level, self.pae) {
            (1 | 2, true) => value,
            (3, true) => value | USER | RW,
            (1, false) => {
                let mut value = value;
                if value & USER == 0 {
                    value |= GUEST_KERNEL | USER;
                }
                if value & GUEST_KERNEL == 0 {
                    value |= GLOBAL | USER;
                }
                value
            }
            (2 | 3, false) => value | USER,
            _ => value | ACCESSED | USER,
        }
    }

    /// Xen's entries in its own slots of a table.
    fn xen_slots(&self, mfn: Mfn, level: u8, pae_xen_l2: bool, set: impl Fn(usize, u64)) {
        match level {
            4 => {
                for (n, index) in (0_u64..).zip(XEN_L4_SLOTS) {
                    let frame = match index {
                        SELF_SLOT => mfn,
                        _ => Mfn(XEN_TABLES.0 + n),
                    };
                    set(index, frame.0 << 12 | PRESENT | RW | ACCESSED | DIRTY | NX);
                }
            }
            3 if self.pae => (4..ENTRIES_PER_TABLE).for_each(|index| set(index, 0)),
            2 if pae_xen_l2 => {
                // The compat m2p holds a u32 per frame, mapped 2 MiB at a time.
                let slots = (self.machine.frames.len() * 4).div_ceil(2 << 20);
                for (n, index) in (0_u64..).zip(XEN_L2_SLOTS) {
                    let value = (COMPAT_M2P.0 + n) << 12 | PRESENT | USER | ACCESSED | PSE;
                    set(index, if n < slots { value } else { 0 });
                }
            }
            _ => {}
        }
    }
}

mod update;

#[cfg(test)]
pub(super) mod tests;
