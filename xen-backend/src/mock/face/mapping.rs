//! Frames of the mock machine mapped as privcmd maps them, those of the m2p included.
//!
//! C implementation: in Linux, `privcmd_ioctl_mmap_batch` and
//! `privcmd_ioctl_mmap_resource`.

use std::ops::Range;

use nix::errno::Errno;
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use super::memory::M2P_FRAMES;
use super::{Face, sys};
use crate::DomId;
use crate::mock::domain::MockDomain;
use crate::mock::memory;
use crate::pages::{Access, ForeignPages};
use crate::privcmd::{FrameMapping, Resource};

/// Whose frames the m2p's are (`DOMID_XEN`).
pub(super) const DOMID_XEN: DomId = DomId(0x7ff2);

/// Frames on their way.
pub(super) struct Mapping {
    face: Face,
    domid: DomId,
    access: Access,
    gfns: Vec<Gfn>,
    /// Frame of the memory, or why not.
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

    fn look_up(&self, domain: &Result<Option<MockDomain>, Errno>, gfn: Gfn) -> Result<Mfn, Errno> {
        let Some(domain) = domain.as_ref().map_err(|errno| *errno)? else {
            return self.face.m2p_page(gfn);
        };
        if let Some(times) = self.face.state().paged_out.get_mut(&(self.domid.0, gfn.0))
            && *times > 0
        {
            *times -= 1;
            return Err(Errno::ENOENT);
        }
        match self.face.grant_table_at(self.domid.0, gfn)? {
            Some(table) => Ok(table),
            None => domain.map_one(gfn, self.access),
        }
    }
}

impl FrameMapping for Mapping {
    fn map(&mut self, range: Range<usize>) -> Result<(), Errno> {
        // The first call is for the whole; later ones, as the kernel has it, for pages
        // where nothing is as yet.
        let first = self.found.iter().all(|f| *f == Err(Errno::EAGAIN));
        let again = self.found[range.clone()].iter().all(Result::is_err);
        if (first && range != (0..self.gfns.len())) || !again {
            return Err(Errno::EINVAL);
        }
        let domain = match self.domid {
            DOMID_XEN => Ok(None),
            DomId(number) => self.face.domain(number).map(Some),
        };
        for index in range {
            self.found[index] = self.look_up(&domain, self.gfns[index]);
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
    /// The page of the m2p's file behind a frame of the m2p. Behind its end there is
    /// what the last page holds: in Xen, too, a hole of the machine is filled with
    /// frames that are there already.
    fn m2p_page(&self, gfn: Gfn) -> Result<Mfn, Errno> {
        let page = gfn.0.checked_sub(M2P_FRAMES).ok_or(Errno::EPERM)?;
        let octets = self.host.machine.frames.len() * size_of::<u64>() as u64;
        let pages = octets.div_ceil(PAGE_SIZE as u64);
        Ok(Mfn(page.min(pages - 1)))
    }
}

/// The grant table of a domain: the one resource there is.
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
    let table = face.domain(domid.0)?.dom.lock().record.grant_table;
    let memory = &face.host.machine.memory;
    memory::map_frames(memory, &[Gfn(table)], Access::Write, |_, gfn| {
        Ok(Mfn(gfn.0))
    })
}
