//! A PV guest's kernel at work: its view of its own pages, and its changes of page tables and p2m.
//!
//! C: Linux `arch/x86/xen/{mmu_pv,p2m}.c`, `drivers/xen/balloon.c`.

use std::collections::{BTreeSet, HashMap};

use crate::Errno;
use xsr_format::frame::{Mfn, PAGE_SIZE};

use super::{Mapping, WorkPage, Workload, WorkloadCounts};
use crate::error::BackendError;
use crate::mock::domain::MockDomain;
use crate::mock::frames::FrameUse;
use crate::mock::layout::{SharedInfoLayout, VcpuLayout, read_word};
use crate::mock::p2m::PublishedP2m;
use crate::mock::pagetable::{
    ACCESSED, DIRTY, FRAME_MASK, NX, PRESENT, RW, Tables, USER, entry_mfn,
};
use crate::mock::state::State;
use crate::pages::ENTRIES_PER_TABLE;

/// The most tables that a workload makes, and the entries of each.
const MOST_MADE: usize = 8;
const MADE_ENTRIES: usize = 16;

/// The kernel's view.
#[derive(Debug)]
pub(super) struct PvView {
    pub(super) p2m: PublishedP2m,
    /// Pages that the workload has turned into tables.
    made: Vec<WorkPage>,
}

impl PvView {
    pub(super) fn new(domain: &MockDomain, state: &State) -> Result<Self, Errno> {
        let p2m = domain.published_p2m(state)?;
        Ok(Self {
            p2m,
            made: Vec::new(),
        })
    }

    /// Pages that hold data, and pfns without a page.
    pub(super) fn data_pages(
        &self,
        domain: &MockDomain,
        state: &State,
    ) -> (Vec<WorkPage>, Vec<WorkPage>) {
        let mut kernels: BTreeSet<u64> = BTreeSet::new();
        kernels.extend(
            self.p2m
                .leaves
                .iter()
                .chain(&self.p2m.lists)
                .map(|mfn| mfn.0),
        );
        if let Some(start_info) = domain.start_info(state) {
            kernels.insert(start_info.0);
            kernels.extend(
                domain
                    .rings(state.record.width, start_info)
                    .iter()
                    .flatten(),
            );
        }
        let (mut present, mut absent) = (Vec::new(), Vec::new());
        for pfn in 0..self.p2m.pfns {
            let mfn = domain.p2m_entry(&self.p2m, pfn);
            let page = WorkPage {
                pfn,
                mfn,
                mapped: Vec::new(),
            };
            let Some(mfn) = mfn else {
                absent.push(page);
                continue;
            };
            let frame = domain.machine.frames.owned(mfn, domain.dom.domid);
            let data = frame.is_some_and(|frame| {
                !frame.xen_heap && (frame.count == 0 || frame.used_as == FrameUse::Writable)
            });
            if data && !kernels.contains(&mfn.0) {
                present.push(page);
            }
        }
        (present, absent)
    }

    /// Record the mappings of `pages`.
    pub(super) fn find_mappings(&self, domain: &MockDomain, pages: &mut [WorkPage]) {
        let at: HashMap<u64, usize> = (0..pages.len())
            .filter_map(|n| Some((pages[n].mfn?.0, n)))
            .collect();
        for pfn in 0..self.p2m.pfns {
            let Some(table) = domain.p2m_entry(&self.p2m, pfn) else {
                continue;
            };
            let frame = domain.machine.frames.owned(table, domain.dom.domid);
            if !frame.is_some_and(|frame| frame.used_as == FrameUse::Table(1) && frame.validated) {
                continue;
            }
            for index in 0..ENTRIES_PER_TABLE {
                let entry = domain.machine.load(table, index);
                if entry & PRESENT != 0
                    && let Some(page) = at.get(&entry_mfn(entry).0)
                {
                    pages[*page].mapped.push(Mapping {
                        table,
                        index,
                        flags: 0,
                    });
                }
            }
        }
    }

    fn tables<'a>(domain: &'a MockDomain, state: &State) -> Tables<'a> {
        Tables::new(&domain.machine, &domain.dom, state.record.width)
    }

    /// Unmap a page everywhere, and record its mappings.
    pub(super) fn unmap(
        &self,
        domain: &MockDomain,
        state: &State,
        page: &mut WorkPage,
    ) -> Result<(), Errno> {
        let tables = Self::tables(domain, state);
        for mapping in &mut page.mapped {
            let entry = domain.machine.load(mapping.table, mapping.index);
            mapping.flags = entry & !FRAME_MASK;
            tables.update_l1(mapping.table, mapping.index, 0)?;
        }
        Ok(())
    }

    /// Map a page again in its recorded places.
    pub(super) fn map(
        &self,
        domain: &MockDomain,
        state: &State,
        page: &WorkPage,
        mfn: Mfn,
    ) -> Result<(), Errno> {
        let tables = Self::tables(domain, state);
        page.mapped.iter().try_for_each(|mapping| {
            tables.update_l1(mapping.table, mapping.index, mfn.0 << 12 | mapping.flags)
        })
    }

    /// Add one to the generation of the p2m, which is odd while it changes.
    fn next_generation(domain: &MockDomain, state: &State) {
        let layout = SharedInfoLayout::of(state.record.width);
        let shared_info = Mfn(state.record.shared_info);
        let at = layout.p2m_generation / layout.width;
        let byte = layout.p2m_generation / 8;
        let word = domain.machine.load(shared_info, byte).to_le_bytes();
        let old = read_word(&word, layout.p2m_generation % 8, layout.width);
        domain.store_narrow(shared_info, layout.width, at, old.wrapping_add(1));
    }
}

impl Workload {
    /// Change the flags of an entry, swap the frames of two entries, or turn a page into a table or
    /// back.
    pub(super) fn change_tables(&mut self, state: &State) -> Result<WorkloadCounts, Errno> {
        let done = match self.random.below(16) {
            0 => self.make_table(state)?,
            1 => self.unmake_table(state)?,
            2..9 => self.change_flags(state)?,
            _ => self.swap_frames(state)?,
        };
        Ok(WorkloadCounts {
            table_updates: u64::from(done),
            idle: u64::from(!done),
            ..WorkloadCounts::default()
        })
    }

    /// A page of the working set and one of its mappings.
    fn some_mapping(&mut self) -> Option<(usize, usize)> {
        let page = self.random.below(self.present.len());
        let mappings = self.present[page].mapped.len();
        (mappings > 0).then(|| (page, self.random.below(mappings)))
    }

    fn change_flags(&mut self, state: &State) -> Result<bool, Errno> {
        const CHANGED: [u64; 4] = [RW, NX, DIRTY, ACCESSED];
        let flag = CHANGED[self.random.below(CHANGED.len())];
        let Some((page, mapping)) = self.some_mapping() else {
            return Ok(false);
        };
        let Mapping { table, index, .. } = self.present[page].mapped[mapping];
        let entry = self.domain.machine.load(table, index);
        PvView::tables(&self.domain, state).update_l1(table, index, entry ^ flag)?;
        Ok(true)
    }

    fn swap_frames(&mut self, state: &State) -> Result<bool, Errno> {
        let (Some((page_a, at_a)), Some((page_b, at_b))) =
            (self.some_mapping(), self.some_mapping())
        else {
            return Ok(false);
        };
        if page_a == page_b {
            return Ok(false);
        }
        let tables = PvView::tables(&self.domain, state);
        let (a, b) = (
            self.present[page_a].mapped[at_a],
            self.present[page_b].mapped[at_b],
        );
        let load = |mapping: Mapping| self.domain.machine.load(mapping.table, mapping.index);
        let (old_a, old_b) = (load(a), load(b));
        let frame_of = |from: u64, to: u64| to & !FRAME_MASK | from & FRAME_MASK;
        tables.update_l1(a.table, a.index, frame_of(old_b, old_a))?;
        tables.update_l1(b.table, b.index, frame_of(old_a, old_b))?;
        self.present[page_a].mapped[at_a] = b;
        self.present[page_b].mapped[at_b] = a;
        Ok(true)
    }

    /// Turn a page of the working set into a level-1 table that maps others, as for a new process:
    /// the page has no writable mappings from then on.
    fn make_table(&mut self, state: &State) -> Result<bool, Errno> {
        let made = self.pv.as_ref().map_or(0, |view| view.made.len());
        if made == MOST_MADE || self.present.len() <= self.keep {
            return Ok(false);
        }
        let tables = PvView::tables(&self.domain, state);
        let machine = &self.domain.machine;
        let at = self.random.below(self.present.len());
        let page = self.present.swap_remove(at);
        let mfn = page.mfn.ok_or(Errno::EINVAL)?;
        for Mapping { table, index, .. } in &page.mapped {
            let entry = machine.load(*table, *index);
            tables.update_l1(*table, *index, entry & !RW)?;
        }
        (0..ENTRIES_PER_TABLE).for_each(|index| machine.store_word(mfn, index, 0));
        for n in 0..MADE_ENTRIES {
            let every = ENTRIES_PER_TABLE / MADE_ENTRIES;
            let index = n * every + self.random.below(every);
            let target = self.random.below(self.present.len());
            let target = &mut self.present[target];
            let frame = target.mfn.ok_or(Errno::EINVAL)?;
            let flags = if n % 2 == 0 { RW } else { NX };
            let entry = frame.0 << 12 | PRESENT | USER | ACCESSED | flags;
            machine.store_word(mfn, index, entry);
            target.mapped.push(Mapping {
                table: mfn,
                index,
                flags: 0,
            });
        }
        self.domain.dom.dirty.mark(page.pfn);
        tables.pin(1, mfn)?;
        if let Some(view) = &mut self.pv {
            view.made.push(page);
        }
        Ok(true)
    }

    /// Turn a table that the workload made back into a page of the working set, as when the process
    /// ends.
    fn unmake_table(&mut self, state: &State) -> Result<bool, Errno> {
        let made = self.pv.as_mut().map(|view| &mut view.made);
        let Some(made) = made.filter(|made| !made.is_empty()) else {
            return Ok(false);
        };
        let page = made.swap_remove(self.random.below(made.len()));
        let mfn = page.mfn.ok_or(Errno::EINVAL)?;
        let tables = PvView::tables(&self.domain, state);
        let machine = &self.domain.machine;
        tables.unpin(mfn)?;
        (0..ENTRIES_PER_TABLE).for_each(|index| machine.store_word(mfn, index, 0));
        self.domain.dom.dirty.mark(page.pfn);
        // Tables made since then may be mapped in it, too.
        let pages = self.present.iter_mut().chain(&mut self.absent).chain(made);
        pages.for_each(|page| page.mapped.retain(|mapping| mapping.table != mfn));
        for Mapping { table, index, .. } in &page.mapped {
            let entry = machine.load(*table, *index);
            tables.update_l1(*table, *index, entry | RW)?;
        }
        self.present.push(page);
        Ok(true)
    }

    /// Make a change to the p2m while the guest runs; `Ok(false)` if it does not run.
    fn on_p2m(
        &mut self,
        change: impl FnOnce(&mut Self, &State) -> Result<(), Errno>,
    ) -> Result<bool, BackendError> {
        let domain = self.domain.clone();
        domain.look("workload", |state| {
            if self.pv.is_none() {
                return Err(Errno::EINVAL);
            }
            if !MockDomain::runs(state) {
                return Ok(false);
            }
            change(self, state).map(|()| true)
        })
    }

    /// Change `p2m_generation` like a kernel that moves its p2m: by 2, odd in between. `Ok(false)`
    /// if the guest does not run.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL for a guest that is not PV.
    pub fn bump_p2m_generation(&mut self) -> Result<bool, BackendError> {
        self.on_p2m(|workload, state| {
            PvView::next_generation(&workload.domain, state);
            PvView::next_generation(&workload.domain, state);
            Ok(())
        })
    }

    /// Move a random leaf of the p2m to a page of the working set, like a kernel that rearranges
    /// its tables; the old leaf is overwritten. `Ok(false)` if the guest does not run.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL for a guest that is not PV.
    pub fn move_p2m_leaf(&mut self) -> Result<bool, BackendError> {
        self.on_p2m(Self::move_leaf)
    }

    fn move_leaf(&mut self, state: &State) -> Result<(), Errno> {
        let leaves = self.pv.as_ref().ok_or(Errno::EINVAL)?.p2m.leaves.len();
        let leaf = self.random.below(leaves);
        let place = self.leaf_place(state, leaf as u64)?;
        if self.present.len() < 2 {
            return Err(Errno::EINVAL);
        }
        PvView::next_generation(&self.domain, state);
        let new = self.new_leaf()?;
        let view = self.pv.as_mut().ok_or(Errno::EINVAL)?;
        let old = std::mem::replace(&mut view.p2m.leaves[leaf], new);
        let machine = &self.domain.machine;
        for index in 0..ENTRIES_PER_TABLE {
            machine.store_word(new, index, machine.load(old, index));
        }
        self.enter_leaf(state, &place, new)?;
        for index in 0..ENTRIES_PER_TABLE {
            let value = self.random.next();
            self.domain.machine.store_word(old, index, value);
        }
        let pfn = self.domain.machine.m2p(old).ok_or(Errno::EINVAL)?;
        self.domain.dom.dirty.mark(pfn);
        PvView::next_generation(&self.domain, state);
        Ok(())
    }

    /// Enter a leaf of the p2m at its place.
    fn enter_leaf(&self, state: &State, place: &LeafPlace, leaf: Mfn) -> Result<(), Errno> {
        match *place {
            LeafPlace::Mapped { table, slot, .. } => {
                let entry = leaf.0 << 12 | PRESENT | RW | ACCESSED | DIRTY | NX;
                PvView::tables(&self.domain, state).update_l1(table, slot, entry)?;
            }
            LeafPlace::Listed(list, at) => {
                let width = usize::from(state.record.width);
                self.domain.store_narrow(list, width, at, leaf.0);
            }
        }
        Ok(())
    }

    /// Enlarge the p2m by `pfns`, like memory hotplug, with as many pages as the domain may have;
    /// the others stay holes that later operations may fill. If the p2m itself needs more pages,
    /// they come from the working set, and a linear p2m changes its generation. `Ok(false)` if the
    /// guest does not run.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL for a guest that is not PV; EOPNOTSUPP if the p2m would need another page
    /// table or list, or is linear and lies within the guest's memory (32-bit). In these cases
    /// nothing has changed.
    pub fn grow_p2m(&mut self, pfns: u64) -> Result<bool, BackendError> {
        self.on_p2m(|workload, state| workload.grow(state, pfns))
    }

    fn grow(&mut self, state: &State, pfns: u64) -> Result<(), Errno> {
        let p2m = &self.pv.as_ref().ok_or(Errno::EINVAL)?.p2m;
        let (start, end) = (p2m.pfns, p2m.pfns + pfns);
        let have = p2m.leaves.len() as u64;
        let more = end.div_ceil(p2m.per_leaf()).saturating_sub(have);
        let places = (have..have + more)
            .map(|leaf| match self.leaf_place(state, leaf)? {
                LeafPlace::Mapped { taken: true, .. } => Err(Errno::EOPNOTSUPP),
                place => Ok(place),
            })
            .collect::<Result<Vec<_>, _>>()?;
        if self.present.len() as u64 <= more {
            return Err(Errno::EOPNOTSUPP);
        }
        let linear = places
            .iter()
            .any(|place| matches!(place, LeafPlace::Mapped { .. }));
        if linear {
            PvView::next_generation(&self.domain, state);
        }
        for place in places {
            let leaf = self.new_leaf()?;
            self.enter_leaf(state, &place, leaf)?;
            if let Some(view) = &mut self.pv {
                view.p2m.leaves.push(leaf);
            }
        }
        if linear {
            PvView::next_generation(&self.domain, state);
        }
        let layout = SharedInfoLayout::of(state.record.width);
        let shared_info = Mfn(state.record.shared_info);
        let at = layout.max_pfn / layout.width;
        self.domain.store_narrow(shared_info, layout.width, at, end);
        if let Some(view) = &mut self.pv {
            view.p2m.pfns = end;
        }
        for pfn in start..end {
            self.domain
                .set_p2m_entry(&self.pv.as_ref().ok_or(Errno::EINVAL)?.p2m, pfn, None)?;
            self.absent.push(WorkPage {
                pfn,
                mfn: None,
                mapped: Vec::new(),
            });
        }
        for _ in 0..pfns {
            let counts = self.take(state)?;
            self.counts += counts;
        }
        Ok(())
    }

    /// Shrink the p2m by `pfns`, as when memory is unplugged: their pages are given back. Leaves
    /// that only they needed leave the p2m and are kept. `Ok(false)` if the guest does not run.
    ///
    /// # Errors
    ///
    /// ESRCH; EINVAL for a guest that is not PV; EOPNOTSUPP if one of the pages is in use for
    /// anything but data, or if there are fewer pages. In these cases nothing has changed.
    pub fn shrink_p2m(&mut self, pfns: u64) -> Result<bool, BackendError> {
        self.on_p2m(|workload, state| workload.shrink(state, pfns))
    }

    fn shrink(&mut self, state: &State, pfns: u64) -> Result<(), Errno> {
        let p2m = &self.pv.as_ref().ok_or(Errno::EINVAL)?.p2m;
        let end = p2m.pfns.checked_sub(pfns).filter(|end| *end > 0);
        let end = end.ok_or(Errno::EOPNOTSUPP)?;
        let going = |page: &WorkPage| page.pfn >= end;
        let known = self.present.iter().chain(&self.absent).filter(|p| going(p));
        if known.count() as u64 != pfns {
            return Err(Errno::EOPNOTSUPP);
        }
        while let Some(at) = self.present.iter().position(going) {
            let counts = self.give_back_page(state, at)?;
            self.counts += counts;
        }
        self.absent.retain(|page| !going(page));
        self.keep = self.keep.min(self.present.len());
        let view = self.pv.as_mut().ok_or(Errno::EINVAL)?;
        let keep = usize::try_from(end.div_ceil(view.p2m.per_leaf())).unwrap_or(usize::MAX);
        view.p2m.pfns = end;
        view.p2m.leaves.truncate(keep);
        let linear = view.p2m.lists.is_empty();
        let layout = SharedInfoLayout::of(state.record.width);
        let at = layout.max_pfn / layout.width;
        let shared_info = Mfn(state.record.shared_info);
        if linear {
            PvView::next_generation(&self.domain, state);
        }
        self.domain.store_narrow(shared_info, layout.width, at, end);
        if linear {
            PvView::next_generation(&self.domain, state);
        }
        Ok(())
    }

    /// The place of a leaf in the page tables or lists.
    fn leaf_place(&self, state: &State, leaf: u64) -> Result<LeafPlace, Errno> {
        let width = state.record.width;
        let view = self.pv.as_ref().ok_or(Errno::EINVAL)?;
        let layout = SharedInfoLayout::of(width);
        let page = self
            .domain
            .machine
            .read_frame(Mfn(state.record.shared_info))?;
        let word = |field| read_word(page.as_slice(), field, layout.width);
        if view.p2m.lists.is_empty() {
            let root = VcpuLayout::of(width).cr3_to_mfn(word(layout.p2m_cr3));
            let address = word(layout.p2m_vaddr) + leaf * PAGE_SIZE as u64;
            let place = self.domain.walk(width, root, address);
            let (table, slot) = place.map_err(|_| Errno::EOPNOTSUPP)?;
            let taken = self.domain.machine.load(table, slot) & PRESENT != 0;
            return Ok(LeafPlace::Mapped { table, slot, taken });
        }
        let per_list = view.p2m.per_leaf();
        let list = usize::try_from(leaf / per_list).map_err(|_| Errno::EOPNOTSUPP)?;
        let at = usize::try_from(leaf % per_list).map_err(|_| Errno::EOPNOTSUPP)?;
        // The last list is the top of the tree.
        let lists = &view.p2m.lists[..view.p2m.lists.len() - 1];
        let list = lists.get(list).ok_or(Errno::EOPNOTSUPP)?;
        Ok(LeafPlace::Listed(*list, at))
    }

    /// Take a page of the working set as a new part of the p2m.
    fn new_leaf(&mut self) -> Result<Mfn, Errno> {
        let at = self.random.below(self.present.len());
        let page = self.present.swap_remove(at);
        let mfn = page.mfn.ok_or(Errno::EINVAL)?;
        for index in 0..ENTRIES_PER_TABLE {
            self.domain.machine.store_word(mfn, index, u64::MAX);
        }
        self.domain.dom.dirty.mark(page.pfn);
        self.keep = self.keep.min(self.present.len());
        Ok(mfn)
    }
}

/// The place where a leaf of the p2m is entered.
#[derive(Clone, Copy, Debug)]
enum LeafPlace {
    /// A level-1 table and the index of its entry, and whether the entry is in use.
    Mapped {
        table: Mfn,
        slot: usize,
        taken: bool,
    },
    /// A frame list and the index of its word.
    Listed(Mfn, usize),
}
