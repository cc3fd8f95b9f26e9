//! The first run of a PV guest's kernel after a restore, as far as a later save depends on it: the
//! kernel publishes its p2m anew.
//!
//! A restore copies `p2m_cr3` from the image, where it names a frame of the old machine, and clears
//! `pfn_to_mfn_frame_list_list`. A real kernel knows its p2m and publishes it again. The mock has
//! no kernel, so it recognises the leaves by their contents. A leaf that covers only holes (a
//! ballooned tail) has no recognisable contents: any page of the guest that is full of "no frame"
//! is used. If there are fewer of those pages than such leaves, the last one is used for several,
//! like a kernel's page of missing entries. A guest without such a page does not wake.
//!
//! C: Linux `xen_pv_post_suspend` (`xen_setup_shared_info`,
//! `xen_build_mfn_list_list`).

use crate::Errno;
use xsr_format::frame::{Mfn, PAGE_SIZE, Page};

use super::domain::{MockDomain, storage_errno};
use super::layout::{SharedInfoLayout, VcpuLayout, read_word, write_word};
use super::state::State;

impl MockDomain {
    /// Make a restored PV guest publish its p2m. A guest that was never restored has already done
    /// so, and does not change.
    ///
    /// # Errors
    ///
    /// EINVAL if the guest's p2m is not in its memory, or has an impossible size: a real guest
    /// would crash. ENOMEM if there is no page for the tree.
    pub(super) fn wake_guest(&self, state: &mut State) -> Result<(), Errno> {
        let Some(roots) = state.record.vcpus.first().and_then(|vcpu| vcpu.roots) else {
            // No context: the guest cannot run.
            return Ok(());
        };
        let width = state.record.width;
        let layout = SharedInfoLayout::of(width);
        let shared_info = Mfn(state.record.shared_info);
        let mut page = self.machine.read_frame(shared_info)?;
        let word = |page: &Page, field| read_word(page, field, layout.width);
        if word(&page, layout.p2m_cr3) != 0 {
            // Every address space of a guest contains the kernel's half, with the list.
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

    /// Build the upper two levels of a p2m tree, in pages outside the guest's memory, which stays
    /// as the restore left it.
    fn publish_tree(&self, state: &mut State, pfns: u64) -> Result<Mfn, Errno> {
        let width = usize::from(state.record.width);
        let mut level = self.all_leaves(width, pfns).inspect_err(|errno| {
            tracing::error!(
                domid = self.dom.domid.0,
                pfns,
                %errno,
                "the guest's p2m is not in its memory"
            );
        })?;
        // Twice: the frame lists, and the page that lists them.
        for _ in 0..2 {
            let mut above = Vec::new();
            for entries in level.chunks(PAGE_SIZE / width) {
                let mut page = [0; PAGE_SIZE];
                for (at, mfn) in entries.iter().enumerate() {
                    write_word(&mut page, at * width, width, *mfn);
                }
                let lent = self.machine.lend_page(self.dom.domid);
                let lent = lent.map_err(|error| storage_errno(&error))?;
                let mfn = lent.ok_or(Errno::ENOMEM)?;
                // Recorded at once, so that a rollback takes it back.
                state.record.lent.push(mfn.0);
                self.machine.write_frames(mfn, 0, &page)?;
                above.push(mfn.0);
            }
            level = above;
        }
        match level.as_slice() {
            [top] => Ok(Mfn(*top)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Undo [`MockDomain::publish_tree`], except its pages: there was no tree before.
    pub(super) fn unpublish_tree(&self, state: &State) -> Result<(), Errno> {
        let layout = SharedInfoLayout::of(state.record.width);
        let none = &[0; 8][..layout.width];
        let shared_info = Mfn(state.record.shared_info);
        self.machine
            .write_frames(shared_info, layout.frame_list_list, none)
    }

    /// Every leaf of the guest's p2m of `pfns` pfns, or an error.
    fn all_leaves(&self, width: usize, pfns: u64) -> Result<Vec<u64>, Errno> {
        let per_leaf = PAGE_SIZE / width;
        // The number comes from the image: one that exceeds this machine or the tree's three levels
        // is invalid.
        if pfns > self.most_pfns().min((per_leaf as u64).pow(3)) {
            return Err(Errno::EINVAL);
        }
        let pfns = usize::try_from(pfns).map_err(|_| Errno::EINVAL)?;
        let mut leaves = self.leaves_by_contents(width, pfns)?;
        let covering = self.leaves_covering(per_leaf, leaves.len());
        let mut missing = Vec::new();
        for (leaf, covers) in leaves.iter_mut().zip(covering) {
            match (&leaf, covers) {
                (Some(_), _) => {}
                (None, true) => return Err(Errno::EINVAL),
                (None, false) => missing.push(leaf),
            }
        }
        if !missing.is_empty() {
            let holes = self.pages_of_holes(missing.len())?;
            let last = holes.last().copied().ok_or(Errno::EINVAL)?;
            for (leaf, page) in missing
                .into_iter()
                .zip(holes.into_iter().chain(std::iter::repeat(last)))
            {
                *leaf = Some(page);
            }
        }
        Ok(leaves.into_iter().flatten().collect())
    }

    /// For each of `leaves` leaves, whether it covers a frame of the guest.
    fn leaves_covering(&self, per_leaf: usize, leaves: usize) -> Vec<bool> {
        let mut covering = vec![false; leaves];
        for mfn in self.machine.frames_of(self.dom.domid) {
            let leaf = self.machine.m2p(mfn).map(|pfn| pfn / per_leaf as u64);
            let leaf = leaf.and_then(|leaf| usize::try_from(leaf).ok());
            if let Some(covers) = leaf.and_then(|leaf| covering.get_mut(leaf)) {
                *covers = true;
            }
        }
        covering
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{GuestSpec, HostConfig, MockHost, P2mStyle};
    use crate::{DomainControl, GuestKind};

    /// Pfns of the guests in these tests, and the number that is ballooned out: all that one leaf
    /// covers.
    const PFNS: u64 = 4096;
    const HOLES: u64 = 512;

    /// A guest in its state after a restore, whose image gives it `pfns` pfns, and the leaves that
    /// it had published before.
    fn restored(ballooned_pages: u64, pfns: u64) -> (MockDomain, Vec<Mfn>) {
        let host = MockHost::ephemeral(&HostConfig {
            memory_pages: 1 << 14,
            ..HostConfig::default()
        })
        .expect("a host");
        let spec = GuestSpec {
            p2m: Some(P2mStyle::Tree),
            ballooned_pages,
            ..GuestSpec::new("guest", GuestKind::Pv, PFNS >> 8)
        };
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.mock_domain(domid).expect("the guest");
        let leaves = domain.change("restore", |state| {
            let leaves = domain.published_p2m(state)?.leaves;
            state.record.pauses = 1;
            state.record.has_run = false;
            let layout = SharedInfoLayout::of(8);
            for (field, value) in [(layout.frame_list_list, 0), (layout.max_pfn, pfns)] {
                let shared_info = Mfn(state.record.shared_info);
                domain.machine.store_word(shared_info, field / 8, value);
            }
            Ok(leaves)
        });
        (domain, leaves.expect("its p2m"))
    }

    fn published(domain: &MockDomain) -> Vec<Mfn> {
        let p2m = domain.look("p2m", |state| domain.published_p2m(state));
        p2m.expect("a p2m").leaves
    }

    #[test]
    fn a_restored_guest_publishes_the_leaves_it_had() {
        for ballooned in [0, 20, HOLES] {
            let (domain, leaves) = restored(ballooned, PFNS);
            domain.unpause().expect("it wakes");
            assert_eq!(published(&domain), leaves, "{ballooned} ballooned out");
        }
    }

    #[test]
    fn a_tail_of_holes_is_published_with_pages_of_holes() {
        let (domain, leaves) = restored(HOLES, PFNS + 2 * HOLES);
        domain.unpause().expect("it wakes");
        let hole = leaves[6];
        assert_eq!(published(&domain), [leaves, vec![hole; 2]].concat());
        // The guest has no page that could serve as the tail.
        let (domain, _) = restored(0, PFNS + 1);
        let error = domain.unpause().expect_err("no leaf");
        assert_eq!(error.errno, Errno::EINVAL);
    }

    #[test]
    fn a_size_that_cannot_be_is_refused() {
        for pfns in [1 << 60 | 1, 1 << 45, (1 << 15) + 1, u64::MAX] {
            let (domain, _) = restored(HOLES, pfns);
            let free = domain.machine.free_pages();
            let error = domain.unpause().expect_err("no p2m");
            assert_eq!(error.errno, Errno::EINVAL, "{pfns:#x}");
            assert_eq!(domain.machine.free_pages(), free, "{pfns:#x}");
        }
    }
}
