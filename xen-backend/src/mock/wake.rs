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
        let pfns = usize::try_from(pfns).map_err(|_| Errno::EINVAL)?;
        let leaves = self.leaves_by_contents(width, pfns)?;
        let leaves: Option<Vec<u64>> = leaves.into_iter().collect();
        let leaves = leaves.ok_or_else(|| {
            tracing::error!(
                domid = self.dom.domid.0,
                "the guest's p2m is not in its memory"
            );
            Errno::EINVAL
        })?;
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
}
