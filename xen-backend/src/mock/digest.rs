//! Digests of a domain's memory that do not depend on the machine; tests compare them to check that
//! a guest has arrived unchanged.

use std::collections::BTreeMap;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, Page, PageType, Pfn};

use super::MockHost;
use super::domain::MockDomain;
use super::error::MockError;
use super::frames::{Frame, FrameUse};
use super::layout::{SharedInfoLayout, StartInfoLayout, read_word, write_word};
use super::pagetable::{FRAME_MASK, PRESENT, XEN_L2_SLOTS, XEN_L4_SLOTS, entry, entry_mfn};
use super::platform::param;
use super::random::mix;
use super::state::State;
use crate::{DomId, GuestKind};

/// One page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageDigest {
    /// Its pfn.
    pub pfn: Pfn,
    /// Its type.
    pub page_type: PageType,
    /// A 64-bit hash of its contents; `None` if they are not the guest's own: see [`MemoryDigest`].
    pub contents: Option<u64>,
}

/// A domain's memory. In the digest of a PV guest,
///
/// - page tables have pfns in place of mfns, and no entries of Xen's own;
/// - start_info is without the fields that a toolstack fills in: size, shared_info, rings, event
///   channels;
/// - the p2m pages count only as present, and so do the pages that list them if the guest has
///   published any.
///
/// In the digest of a translated guest, the rings of xenstore, console and device model count only
/// as present: a restore clears them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDigest {
    pages: Vec<PageDigest>,
}

impl MemoryDigest {
    /// Every page of the domain, in ascending order of pfn.
    pub fn pages(&self) -> &[PageDigest] {
        &self.pages
    }

    /// The pages that differ, in ascending order: missing in one, of different types, or with
    /// different contents. A page that counts only as present in one of the two may have any
    /// contents in the other.
    pub fn differences(&self, other: &Self) -> Vec<Pfn> {
        let by_pfn = |digest: &Self| -> BTreeMap<Pfn, PageDigest> {
            digest.pages.iter().map(|page| (page.pfn, *page)).collect()
        };
        let mut theirs = by_pfn(other);
        let mut differ = Vec::new();
        for (pfn, ours) in by_pfn(self) {
            let same = theirs.remove(&pfn).is_some_and(|theirs| {
                let either_present = ours.contents.is_none() || theirs.contents.is_none();
                ours.page_type == theirs.page_type
                    && (either_present || ours.contents == theirs.contents)
            });
            if !same {
                differ.push(pfn);
            }
        }
        differ.extend(theirs.into_keys());
        differ.sort_unstable();
        differ
    }
}

/// The HVM parameters that name pages that a restore clears.
const CLEARED: [u32; 4] = [
    param::STORE_PFN,
    param::IOREQ_PFN,
    param::BUFIOREQ_PFN,
    param::CONSOLE_PFN,
];

fn hash(page: &Page) -> u64 {
    page.chunks_exact(8)
        .fold(0, |hash, word| mix(hash ^ read_word(word, 0, 8)))
}

impl MockHost {
    /// The digest of a domain's memory now.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn memory_digest(&self, domid: DomId) -> Result<MemoryDigest, MockError> {
        let domain = self.mock_domain(domid)?;
        let pages = domain.look("memory_digest", |state| match domain.dom.kind {
            GuestKind::Pv => domain.digest_pv(state),
            GuestKind::Hvm | GuestKind::Pvh => domain.digest_translated(state),
        })?;
        Ok(MemoryDigest { pages })
    }
}

impl MockDomain {
    fn digest_translated(&self, state: &State) -> Result<Vec<PageDigest>, Errno> {
        let cleared = CLEARED.map(|index| state.record.hvm_params[index as usize]);
        let end = self
            .machine
            .max_gfn(self.dom.domid)
            .map_or(0, |gfn| gfn + 1);
        let mut pages = Vec::new();
        for pfn in 0..end {
            if let Some((mfn, frame)) = self.resolve(Gfn(pfn)) {
                pages.push(PageDigest {
                    pfn: Pfn(pfn),
                    page_type: frame.page_type(),
                    contents: match pfn != 0 && cleared.contains(&pfn) {
                        true => None,
                        false => Some(hash(&*self.machine.read_frame(mfn)?)),
                    },
                });
            }
        }
        Ok(pages)
    }

    fn digest_pv(&self, state: &State) -> Result<Vec<PageDigest>, Errno> {
        let p2m = self.p2m_pages(state)?;
        let start_info = self.start_info(state);
        let mut pages = Vec::new();
        for mfn in self.machine.frames_of(self.dom.domid) {
            let frame = self.machine.frames.owned(mfn, self.dom.domid);
            let (Some(frame), Some(pfn)) = (frame, self.machine.m2p(mfn)) else {
                continue;
            };
            let mut page = self.machine.read_frame(mfn)?;
            self.normalise(&frame, &mut page);
            if start_info == Some(mfn) {
                clear_machine_fields(state.record.width, &mut page);
            }
            pages.push(PageDigest {
                pfn: Pfn(pfn),
                page_type: frame.page_type(),
                contents: (!p2m.contains(&mfn.0)).then(|| hash(&page)),
            });
        }
        pages.sort_by_key(|page| page.pfn);
        Ok(pages)
    }

    /// The frames of the guest's p2m, and of the pages that list them if the guest has published
    /// any.
    fn p2m_pages(&self, state: &State) -> Result<Vec<u64>, Errno> {
        let layout = SharedInfoLayout::of(state.record.width);
        let shared_info = self.machine.read_frame(Mfn(state.record.shared_info))?;
        let pfns = read_word(shared_info.as_slice(), layout.max_pfn, layout.width);
        // An impossible value is not its size.
        let pfns = pfns.min(self.most_pfns());
        let pfns = usize::try_from(pfns).map_err(|_| Errno::EINVAL)?;
        let leaves = self.leaves_by_contents(layout.width, pfns)?;
        let mut pages: Vec<u64> = leaves.into_iter().flatten().collect();
        match self.published_p2m(state) {
            Ok(published) => {
                let all = published.leaves.iter().chain(&published.lists);
                pages.extend(all.map(|mfn| mfn.0));
            }
            // A restored guest has not published its p2m yet.
            Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
        Ok(pages)
    }

    /// Replace mfns by pfns in a page table, and clear Xen's own entries.
    fn normalise(&self, frame: &Frame, page: &mut Page) {
        let FrameUse::Table(level) = frame.used_as else {
            return;
        };
        if !frame.validated {
            return;
        }
        for index in 0..PAGE_SIZE / 8 {
            let xen = match level {
                4 => XEN_L4_SLOTS.contains(&index),
                2 => frame.pae_xen_l2 && XEN_L2_SLOTS.contains(&index),
                _ => false,
            };
            let value = entry(page, index);
            let normal = if xen {
                0
            } else if value & PRESENT == 0 {
                value
            } else {
                let mfn = entry_mfn(value);
                let pfn = self.machine.m2p(mfn).map_or(FRAME_MASK, |pfn| pfn << 12);
                value & !FRAME_MASK | pfn & FRAME_MASK
            };
            write_word(page.as_mut_slice(), index * 8, 8, normal);
        }
    }
}

/// Clear the fields of start_info that a toolstack fills in.
fn clear_machine_fields(width: u8, page: &mut Page) {
    let layout = StartInfoLayout::of(width);
    for field in [
        layout.nr_pages,
        layout.shared_info,
        layout.store_mfn,
        layout.console_mfn,
    ] {
        write_word(page.as_mut_slice(), field, layout.width, 0);
    }
    for port in [layout.store_evtchn, layout.console_evtchn] {
        write_word(page.as_mut_slice(), port, 4, 0);
    }
}
