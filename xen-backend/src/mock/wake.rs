//! What a PV guest's kernel does when it first runs after a restore, as far as a
//! later save depends on it: it publishes its p2m anew.
//!
//! A restore takes `p2m_cr3` over from the image, where it holds a frame of the old
//! machine, and clears `pfn_to_mfn_frame_list_list`. A real kernel knows where its
//! p2m is and says so again; the mock has no kernel, so it finds the leaves by what
//! they hold.
//!
//! C: Linux `xen_pv_post_suspend` (`xen_setup_shared_info`,
//! `xen_build_mfn_list_list`).

use nix::errno::Errno;
use xsr_format::frame::{Mfn, PAGE_SIZE, Page};

use super::domain::MockDomain;
use super::layout::{SharedInfoLayout, VcpuLayout, read_word, write_word};
use super::state::State;

/// The p2m of a guest as the machine knows it.
struct KnownP2m {
    width: usize,
    /// mfn + 1 of each pfn; 0 where there is none.
    frames: Vec<u64>,
}

impl KnownP2m {
    fn per_leaf(&self) -> usize {
        PAGE_SIZE / self.width
    }

    fn leaves(&self) -> usize {
        self.frames.len().div_ceil(self.per_leaf())
    }

    fn mfn(&self, pfn: usize) -> Option<u64> {
        self.frames.get(pfn)?.checked_sub(1)
    }

    /// Which leaf of the p2m `page` is, by what it holds: the frames of that range
    /// where there are any, and nothing that could be a frame elsewhere.
    fn leaf(&self, page: &Page, pfn_of: impl Fn(u64) -> Option<u64>) -> Option<usize> {
        let no_frame = u64::MAX >> (64 - 8 * self.width);
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

impl MockDomain {
    /// Have a restored PV guest publish its p2m. A guest that was never restored
    /// has done so already, and nothing changes.
    ///
    /// # Errors
    ///
    /// EINVAL where the guest's p2m is not in its memory: a real one would crash.
    /// ENOMEM where there is no page for the tree.
    pub(super) fn wake_guest(&self, state: &mut State) -> Result<(), Errno> {
        let Some(roots) = state.record.vcpus.first().and_then(|vcpu| vcpu.roots) else {
            // No context: nothing will run.
            return Ok(());
        };
        let width = state.record.width;
        let layout = SharedInfoLayout::of(width);
        let shared_info = Mfn(state.record.shared_info);
        let mut page = self.machine.read_frame(shared_info)?;
        let word = |page: &Page, field| read_word(page, field, layout.width);
        if word(&page, layout.p2m_cr3) != 0 {
            // Every address space of a guest has the kernel's half, with the list.
            let cr3 = VcpuLayout::of(width).mfn_to_cr3(roots.kernel);
            write_word(page.as_mut_slice(), layout.p2m_cr3, layout.width, cr3);
        } else if word(&page, layout.frame_list_list) == 0 && word(&page, layout.max_pfn) != 0 {
            let top = self.publish_tree(state, word(&page, layout.max_pfn))?;
            write_word(
                page.as_mut_slice(),
                layout.frame_list_list,
                layout.width,
                top.0,
            );
        } else {
            return Ok(());
        }
        self.machine.write_frames(shared_info, 0, page.as_slice())
    }

    /// Build the upper two levels of a p2m tree, in pages that are not the guest's
    /// memory: it stays as the restore left it.
    fn publish_tree(&self, state: &mut State, pfns: u64) -> Result<Mfn, Errno> {
        let width = usize::from(state.record.width);
        let leaves = self.find_leaves(width, usize::try_from(pfns).map_err(|_| Errno::EINVAL)?)?;
        let mut pages = Vec::new();
        let mut level: Vec<u64> = leaves;
        // Twice: the frame lists, and the list of them.
        for _ in 0..2 {
            let mut above = Vec::new();
            for entries in level.chunks(PAGE_SIZE / width) {
                let mut page = [0; PAGE_SIZE];
                for (at, mfn) in entries.iter().enumerate() {
                    write_word(&mut page, at * width, width, *mfn);
                }
                let mfn = self
                    .machine
                    .lend_page(self.dom.domid)
                    .ok_or(Errno::ENOMEM)?;
                self.machine.write_frames(mfn, 0, &page)?;
                pages.push(mfn.0);
                above.push(mfn.0);
            }
            level = above;
        }
        state.record.lent = pages;
        match level.as_slice() {
            [top] => Ok(Mfn(*top)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The frames of the guest's p2m, in order.
    fn find_leaves(&self, width: usize, pfns: usize) -> Result<Vec<u64>, Errno> {
        let owned = self.machine.frames_of(self.dom.domid);
        let mut known = KnownP2m {
            width,
            frames: vec![0; pfns],
        };
        for mfn in &owned {
            let pfn = self
                .machine
                .m2p(*mfn)
                .and_then(|pfn| usize::try_from(pfn).ok());
            if let Some(slot) = pfn.and_then(|pfn| known.frames.get_mut(pfn)) {
                *slot = mfn.0 + 1;
            }
        }
        let pfn_of = |mfn: u64| {
            self.machine.frames.owned(Mfn(mfn), self.dom.domid)?;
            self.machine.m2p(Mfn(mfn))
        };
        let mut leaves = vec![None; known.leaves()];
        for mfn in owned {
            let page = self.machine.read_frame(mfn)?;
            if let Some(leaf) = known.leaf(&page, pfn_of) {
                leaves[leaf] = Some(mfn.0);
            }
        }
        leaves.into_iter().collect::<Option<_>>().ok_or_else(|| {
            tracing::error!(
                domid = self.dom.domid.0,
                "the guest's p2m is not in its memory"
            );
            Errno::EINVAL
        })
    }
}
