//! A PV guest's p2m: as the guest publishes it, or recognised by its contents if it is not
//! published.
//!
//! C implementation: `map_p2m_tree` and `map_p2m_list` in
//! `tools/libs/guest/xg_sr_save_x86_pv.c`.

use crate::Errno;
use xsr_format::frame::{Mfn, PAGE_SIZE, Page};

use super::domain::MockDomain;
use super::layout::{SharedInfoLayout, VcpuLayout, read_word};
use super::pagetable::{PRESENT, entry_mfn};
use super::state::State;

/// The machine's own knowledge of a guest's p2m.
struct KnownP2m {
    width: usize,
    /// mfn + 1 of each pfn; 0 if it has no frame.
    frames: Vec<u64>,
}

impl KnownP2m {
    fn per_leaf(&self) -> usize {
        PAGE_SIZE / self.width
    }

    fn mfn(&self, pfn: usize) -> Option<u64> {
        self.frames.get(pfn)?.checked_sub(1)
    }

    /// The index of the p2m leaf in `page`, recognised by its contents: the right frame for each
    /// pfn that has one, and no possible frame for the others.
    fn leaf(&self, page: &Page, pfn_of: impl Fn(u64) -> Option<u64>) -> Option<usize> {
        let no_frame = no_frame(self.width);
        let word = |at: usize| read_word(page, at * self.width, self.width);
        let first = (0..self.per_leaf()).find(|at| word(*at) != no_frame)?;
        let pfn = usize::try_from(pfn_of(word(first))?).ok()?;
        let start = pfn.checked_sub(first)?;
        if start % self.per_leaf() != 0 || pfn >= self.frames.len() {
            return None;
        }
        let end = self.frames.len().min(start + self.per_leaf());
        (start..end)
            .all(|pfn| match self.mfn(pfn) {
                Some(mfn) => word(pfn - start) == mfn,
                None => pfn_of(word(pfn - start)).is_none(),
            })
            .then_some(start / self.per_leaf())
    }
}

/// The p2m entry, in words of `width` bytes, of a pfn without a frame.
const fn no_frame(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

/// The p2m as the guest publishes it.
#[derive(Debug)]
pub(super) struct PublishedP2m {
    width: usize,
    /// One more than the largest pfn it covers.
    pub(super) pfns: u64,
    /// Its pages, in order.
    pub(super) leaves: Vec<Mfn>,
    /// The pages that list them, top last; none if the p2m is linear.
    pub(super) lists: Vec<Mfn>,
}

impl PublishedP2m {
    /// Pfns of a leaf.
    pub(super) fn per_leaf(&self) -> u64 {
        (PAGE_SIZE / self.width) as u64
    }

    /// The place of the entry of `pfn`: the leaf, and the index of the word.
    fn place(&self, pfn: u64) -> Option<(Mfn, usize)> {
        let leaf = usize::try_from(pfn / self.per_leaf()).ok()?;
        let within = usize::try_from(pfn % self.per_leaf()).ok()?;
        let leaf = self.leaves.get(leaf).filter(|_| pfn < self.pfns)?;
        Some((*leaf, within))
    }
}

impl MockDomain {
    /// Word `at`, of `width` bytes, of a frame, which must exist.
    fn load_narrow(&self, mfn: Mfn, width: usize, at: usize) -> u64 {
        let byte = at * width;
        let word = self.machine.load(mfn, byte / 8);
        word >> (8 * (byte % 8)) & no_frame(width)
    }

    /// The guest stores word `at`, of `width` bytes, in one of its own frames.
    pub(super) fn store_narrow(&self, mfn: Mfn, width: usize, at: usize, value: u64) {
        let byte = at * width;
        let shift = 8 * (byte % 8);
        let others = self.machine.load(mfn, byte / 8) & !(no_frame(width) << shift);
        let word = others | (value & no_frame(width)) << shift;
        self.guest_store(mfn, byte / 8, word);
    }

    fn own(&self, mfn: u64) -> Result<Mfn, Errno> {
        let mfn = Mfn(mfn);
        let owned = self.machine.frames.owned(mfn, self.dom.domid);
        owned.map(|_| mfn).ok_or(Errno::EINVAL)
    }

    /// The level-1 table that maps `address` under the root table `root`, and the index of the
    /// entry. EINVAL if a level is missing.
    pub(super) fn walk(&self, width: u8, root: u64, address: u64) -> Result<(Mfn, usize), Errno> {
        let levels = if width == 4 { 3 } else { 4 };
        let slot = |level: u32| {
            usize::try_from(address >> (12 + 9 * (level - 1)) & 0x1ff).map_err(|_| Errno::EINVAL)
        };
        let mut table = self.own(root)?;
        for level in (2..=levels).rev() {
            let entry = self.machine.load(table, slot(level)?);
            if entry & PRESENT == 0 {
                return Err(Errno::EINVAL);
            }
            table = self.own(entry_mfn(entry).0)?;
        }
        Ok((table, slot(1)?))
    }

    /// The p2m at the place that the guest publishes. EINVAL if it is not there: a restored guest
    /// publishes it only once it runs.
    pub(super) fn published_p2m(&self, state: &State) -> Result<PublishedP2m, Errno> {
        let width = state.record.width;
        let layout = SharedInfoLayout::of(width);
        let shared_info = Mfn(state.record.shared_info);
        let word = |field: usize| self.load_narrow(shared_info, layout.width, field / layout.width);
        let per_leaf = PAGE_SIZE / layout.width;
        let pfns = word(layout.max_pfn);
        if pfns > self.most_pfns() {
            return Err(Errno::EINVAL);
        }
        let count = usize::try_from(pfns.div_ceil(per_leaf as u64)).map_err(|_| Errno::EINVAL)?;
        let mut p2m = PublishedP2m {
            width: layout.width,
            pfns,
            leaves: Vec::with_capacity(count),
            lists: Vec::new(),
        };
        match word(layout.p2m_cr3) {
            0 => {
                let top = self.own(word(layout.frame_list_list))?;
                for n in 0..count.div_ceil(per_leaf) {
                    let list = self.own(self.load_narrow(top, layout.width, n))?;
                    p2m.lists.push(list);
                    for at in 0..per_leaf.min(count - n * per_leaf) {
                        let leaf = self.load_narrow(list, layout.width, at);
                        p2m.leaves.push(self.own(leaf)?);
                    }
                }
                p2m.lists.push(top);
            }
            cr3 => {
                let root = VcpuLayout::of(width).cr3_to_mfn(cr3);
                for n in 0..count {
                    let address = word(layout.p2m_vaddr) + (n * PAGE_SIZE) as u64;
                    let (table, slot) = self.walk(width, root, address)?;
                    let entry = self.machine.load(table, slot);
                    if entry & PRESENT == 0 {
                        return Err(Errno::EINVAL);
                    }
                    p2m.leaves.push(self.own(entry_mfn(entry).0)?);
                }
            }
        }
        Ok(p2m)
    }

    /// The frame of `pfn` in the guest's p2m.
    pub(super) fn p2m_entry(&self, p2m: &PublishedP2m, pfn: u64) -> Option<Mfn> {
        let (leaf, at) = p2m.place(pfn)?;
        let mfn = self.load_narrow(leaf, p2m.width, at);
        (mfn != no_frame(p2m.width)).then_some(Mfn(mfn))
    }

    /// The guest sets or clears the frame of `pfn` in its p2m. EINVAL beyond its end.
    pub(super) fn set_p2m_entry(
        &self,
        p2m: &PublishedP2m,
        pfn: u64,
        mfn: Option<Mfn>,
    ) -> Result<(), Errno> {
        let (leaf, at) = p2m.place(pfn).ok_or(Errno::EINVAL)?;
        let word = mfn.map_or(no_frame(p2m.width), |mfn| mfn.0);
        self.store_narrow(leaf, p2m.width, at, word);
        Ok(())
    }

    /// The frames of the guest's p2m of `pfns` pfns, in order, recognised by their contents; `None`
    /// for a leaf that is in none of the guest's pages, or that covers no frame. `pfns` is at most
    /// [`MockDomain::most_pfns`].
    pub(super) fn leaves_by_contents(
        &self,
        width: usize,
        pfns: usize,
    ) -> Result<Vec<Option<u64>>, Errno> {
        let owned = self.machine.frames_of(self.dom.domid);
        let pfn_below = |mfn: &Mfn| {
            let pfn = usize::try_from(self.machine.m2p(*mfn)?).ok()?;
            (pfn < pfns).then_some(pfn)
        };
        // Leaves after the last one that covers a frame cannot be recognised.
        let covered = owned.iter().filter_map(pfn_below).max();
        let covered = covered.map_or(0, |last| (last + 1).next_multiple_of(PAGE_SIZE / width));
        let mut known = KnownP2m {
            width,
            frames: vec![0; covered.min(pfns)],
        };
        for mfn in &owned {
            if let Some(slot) = pfn_below(mfn).and_then(|pfn| known.frames.get_mut(pfn)) {
                *slot = mfn.0 + 1;
            }
        }
        let pfn_of = |mfn: u64| {
            self.machine.frames.owned(Mfn(mfn), self.dom.domid)?;
            self.machine.m2p(Mfn(mfn))
        };
        let mut leaves = vec![None; pfns.div_ceil(known.per_leaf())];
        for mfn in owned {
            let page = self.machine.read_frame(mfn)?;
            if let Some(leaf) = known.leaf(&page, pfn_of) {
                leaves[leaf] = Some(mfn.0);
            }
        }
        Ok(leaves)
    }

    /// The most pfns that a guest's p2m can plausibly cover: twice the machine's frames, to allow
    /// for holes.
    pub(super) fn most_pfns(&self) -> u64 {
        self.machine.frames.len().saturating_mul(2)
    }

    /// At most `count` of the guest's pages that hold only "no frame" entries, in the order of
    /// their pfns.
    pub(super) fn pages_of_holes(&self, count: usize) -> Result<Vec<u64>, Errno> {
        let mut pages = Vec::new();
        for mfn in self.machine.frames_of(self.dom.domid) {
            if self.machine.read_frame(mfn)?.iter().all(|o| *o == 0xff) {
                pages.push((self.machine.m2p(mfn), mfn.0));
            }
        }
        pages.sort_unstable();
        pages.truncate(count);
        Ok(pages.into_iter().map(|(_, mfn)| mfn).collect())
    }
}
