//! Guests and page tables for the checks.

use std::ops::Deref;

use xsr_format::frame::{Gfn, Mfn, PageType, Pfn};

use super::Violation;
use crate::{Access, BackendError, DomId, Domain, GuestKind, Host, HvmGuest, NewDomain, PvGuest};

pub(super) const PRESENT: u64 = 1;
pub(super) const RW: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const TABLE: u64 = PRESENT | RW | USER | ACCESSED | DIRTY;

/// A domain that is destroyed at the end of the check.
pub(super) struct Guest {
    domain: Box<dyn Domain>,
    pub(super) domid: DomId,
}

impl Deref for Guest {
    type Target = dyn Domain;

    fn deref(&self) -> &Self::Target {
        &*self.domain
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.domain.destroy()
            && error.errno != crate::Errno::ESRCH
        {
            tracing::error!(%error, "a domain of the contract suite is left behind");
        }
    }
}

impl Guest {
    /// A new domain with room for `max_pages`.
    pub(super) fn new(
        host: &dyn Host,
        kind: GuestKind,
        vcpus: u32,
        max_pages: u64,
    ) -> Result<Self, BackendError> {
        Self::of(host, &NewDomain::new(kind, vcpus, max_pages))
    }

    /// A new domain as specified by `new`.
    pub(super) fn of(host: &dyn Host, new: &NewDomain) -> Result<Self, BackendError> {
        let domid = host.create(new)?;
        let domain = host.domain(domid)?;
        Ok(Self { domain, domid })
    }

    /// A new domain of one vcpu, with `pages` pages from pfn 0 on. Returns their gfns too.
    pub(super) fn with_pages(
        host: &dyn Host,
        kind: GuestKind,
        pages: u64,
    ) -> Result<(Self, Vec<Gfn>), Violation> {
        let guest = Self::new(host, kind, 1, pages)?;
        let mut gfns: Vec<Gfn> = (0..pages).map(Gfn).collect();
        let done = guest.populate(0, &mut gfns)?;
        super::equal(&done, &gfns.len(), "extents populated")?;
        Ok((guest, gfns))
    }

    /// The calls for a PV guest.
    pub(super) fn pv(&self) -> Result<&dyn PvGuest, Violation> {
        self.domain
            .pv()
            .ok_or_else(|| Violation("a PV guest has no calls of a PV guest".to_owned()))
    }

    /// The calls for a translated guest.
    pub(super) fn hvm(&self) -> Result<&dyn HvmGuest, Violation> {
        self.domain
            .hvm()
            .ok_or_else(|| Violation("a translated guest has no calls of one".to_owned()))
    }

    /// Make a PV guest 32 bits wide; false if the hypervisor has no such guests.
    pub(super) fn narrow(&self) -> Result<bool, Violation> {
        match self.pv()?.set_guest_width(4) {
            Ok(()) => Ok(true),
            Err(error) if error.errno == crate::Errno::EOPNOTSUPP => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Set words of a page.
    pub(super) fn write(&self, gfn: Gfn, words: &[(usize, u64)]) -> Result<(), Violation> {
        let pages = self.map(&[gfn], Access::Write)?;
        let page = pages
            .page(0)
            .ok_or_else(|| Violation(format!("{gfn} could not be mapped for writing")))?;
        words
            .iter()
            .for_each(|(at, word)| page.write_entry(*at, *word));
        Ok(())
    }

    /// All words of a page.
    pub(super) fn read(&self, gfn: Gfn) -> Result<[u64; 512], Violation> {
        let pages = self.map(&[gfn], Access::Read)?;
        let page = pages
            .page(0)
            .ok_or_else(|| Violation(format!("{gfn} could not be mapped for reading")))?;
        Ok(page.read_entries())
    }

    /// The types of pages.
    pub(super) fn types(&self, gfns: &[Gfn]) -> Result<Vec<PageType>, BackendError> {
        let mut types = vec![PageType::NOTAB; gfns.len()];
        self.page_types(gfns, &mut types)?;
        Ok(types)
    }

    /// Make `frames[0..4]` tables of level 1 to 4: each is the only entry of the next, and the
    /// first maps `leaf` with `flags`.
    pub(super) fn write_tables(
        &self,
        frames: &[Gfn],
        leaf: Gfn,
        flags: u64,
    ) -> Result<(), Violation> {
        self.write(frames[0], &[(0, entry(leaf, flags))])?;
        for level in 1..4 {
            self.write(frames[level], &[(0, entry(frames[level - 1], TABLE))])?;
        }
        Ok(())
    }
}

/// An entry of a page table.
pub(super) fn entry(gfn: Gfn, flags: u64) -> u64 {
    gfn.0 << 12 | flags
}

/// The machine frame of a PV guest's gfn.
pub(super) fn mfn(gfn: Gfn) -> Mfn {
    Mfn(gfn.0)
}

/// "No pfn".
pub(super) const NO_PFN: Pfn = Pfn::INVALID;

/// The context of a 64-bit vcpu in kernel mode, with this root and otherwise empty.
pub(super) fn context(root: Gfn) -> Vec<u8> {
    /// In kernel mode, online.
    const FLAGS: u64 = 1 << 2 | 1 << 5;
    let mut context = vec![0; 0x1430];
    put(&mut context, 0x200, FLAGS);
    put(&mut context, 0x1378 + 3 * 8, root.0 << 12);
    context
}

/// Set the u64 at `offset`.
pub(super) fn put(bytes: &mut [u8], offset: usize, value: u64) {
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// An HVM context whose first vcpu is online.
pub(super) fn hvm_context() -> Vec<u8> {
    let mut context = Vec::new();
    let mut record = |kind: u16, body: &[u8]| {
        context.extend_from_slice(&kind.to_le_bytes());
        context.extend_from_slice(&[0, 0]);
        context.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        context.extend_from_slice(body);
    };
    let mut header = [0; 24];
    header[..4].copy_from_slice(&0x5438_1286_u32.to_le_bytes());
    header[4] = 1;
    record(1, &header);
    let mut cpu = [0; 1032];
    put(&mut cpu, 648, 2);
    // cr0 after reset.
    put(&mut cpu, 656, 0x6000_0010);
    record(2, &cpu);
    record(0, &[]);
    context
}
