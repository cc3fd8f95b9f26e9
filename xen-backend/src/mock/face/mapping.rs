//! Frames of the mock machine mapped as privcmd maps them, including those of the m2p.
//!
//! C implementation: in Linux, `privcmd_ioctl_mmap_batch` and
//! `privcmd_ioctl_mmap_resource`.

use std::ops::Range;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use super::memory::M2P_FRAMES;
use super::{Face, sys};
use crate::DomId;
use crate::mock::domain::{MockDomain, storage_errno};
use crate::mock::memory;
use crate::pages::{Access, ForeignPages};
use crate::privcmd::{FrameMapping, Resource};

/// The owner of the m2p's frames (`DOMID_XEN`).
pub(super) const DOMID_XEN: DomId = DomId(0x7ff2);

/// Frames that are being mapped.
pub(super) struct Mapping {
    face: Face,
    domid: DomId,
    access: Access,
    gfns: Vec<Gfn>,
    /// The frame of the memory, or the reason for its failure.
    found: Vec<Result<Mfn, Errno>>,
}

impl Mapping {
    pub(super) fn new(face: &Face, domid: DomId, gfns: &[Gfn], access: Access) -> Self {
        Self {
            face: face.clone(),
            domid,
            access,
            gfns: gfns.to_vec(),
            found: vec![Err(Errno::EAGAIN); gfns.len()],
        }
    }

    fn look_up(&self, owner: &Owner, gfn: Gfn) -> Result<Mfn, Errno> {
        if owner.some_paged_out
            && let Some(times) = self.face.state().paged_out.get_mut(&(self.domid.0, gfn.0))
            && *times > 0
        {
            *times -= 1;
            return Err(Errno::ENOENT);
        }
        match owner.table_at.contains(&gfn) {
            true => Ok(owner.table),
            false => owner.domain.map_one(gfn, self.access),
        }
    }
}

/// Values that a mapping call looks up once for its thousand frames.
struct Owner {
    domain: MockDomain,
    some_paged_out: bool,
    /// Its grant table, and the gfns by which a caller may map it.
    table: Mfn,
    table_at: Vec<Gfn>,
}

impl Owner {
    fn of(face: &Face, domid: u16) -> Result<Self, Errno> {
        let domain = face.domain(domid)?;
        let table = grant_table(&domain)?;
        let state = face.state();
        let table_at = match domain.dom.kind.is_translated() {
            true => {
                let of_domain = state.tables.range((domid, 0)..=(domid, u64::MAX));
                of_domain.map(|(_, gfn)| Gfn(*gfn)).collect()
            }
            false => vec![Gfn(table.0)],
        };
        let some_paged_out = !state.paged_out.is_empty();
        drop(state);
        Ok(Self {
            domain,
            some_paged_out,
            table,
            table_at,
        })
    }
}

impl FrameMapping for Mapping {
    fn map(&mut self, range: Range<usize>) -> Result<(), Errno> {
        // The first call covers everything; later ones, as in the kernel, cover pages that are not
        // mapped yet.
        let first = self.found.iter().all(|f| *f == Err(Errno::EAGAIN));
        let again = self.found[range.clone()].iter().all(Result::is_err);
        if (first && range != (0..self.gfns.len())) || !again {
            return Err(Errno::EINVAL);
        }
        let owner = match self.domid {
            DOMID_XEN => None,
            DomId(number) => Some(Owner::of(&self.face, number)),
        };
        for index in range {
            let gfn = self.gfns[index];
            self.found[index] = match &owner {
                None => self.face.m2p_page(gfn),
                Some(Ok(owner)) => self.look_up(owner, gfn),
                Some(Err(errno)) => Err(*errno),
            };
        }
        Ok(())
    }

    fn failure(&self, index: usize) -> Option<Errno> {
        self.found[index].err()
    }

    fn finish(self: Box<Self>) -> Result<ForeignPages, Errno> {
        let machine = &self.face.host.machine;
        let file = match self.domid {
            DOMID_XEN => &machine.m2p_file,
            _ => &machine.memory,
        };
        memory::map_frames(file, &self.gfns, self.access, |index, _| self.found[index])
    }
}

impl Face {
    /// The page of the m2p's file for a frame of the m2p. After its end the last page is repeated:
    /// Xen, too, fills a hole of the machine with frames that are already in use.
    fn m2p_page(&self, gfn: Gfn) -> Result<Mfn, Errno> {
        let page = gfn.0.checked_sub(M2P_FRAMES).ok_or(Errno::EPERM)?;
        let bytes = self.host.machine.frames.len() * size_of::<u64>() as u64;
        let pages = bytes.div_ceil(PAGE_SIZE as u64);
        Ok(Mfn(page.min(pages - 1)))
    }
}

/// The frame of a domain's grant table.
pub(super) fn grant_table(domain: &MockDomain) -> Result<Mfn, Errno> {
    let state = domain.dom.lock().map_err(|error| storage_errno(&error))?;
    Ok(Mfn(state.record.grant_table))
}

/// The grant table of a domain, which is the only resource.
pub(super) fn resource(
    face: &Face,
    domid: DomId,
    resource: Resource,
) -> Result<ForeignPages, Errno> {
    let known = resource.kind == sys::XENMEM_resource_grant_table
        && resource.id == sys::XENMEM_resource_grant_table_id_shared;
    if !known || face.state().obstacles.no_resources {
        return Err(Errno::EOPNOTSUPP);
    }
    if (resource.first, resource.frames) != (0, 1) {
        return Err(Errno::EINVAL);
    }
    let table = grant_table(&face.domain(domid.0)?)?;
    let memory = &face.host.machine.memory;
    memory::map_frames(memory, &[Gfn(table.0)], Access::Write, |_, gfn| {
        Ok(Mfn(gfn.0))
    })
}
