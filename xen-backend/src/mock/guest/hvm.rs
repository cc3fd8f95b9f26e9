//! Construction of an HVM or PVH guest as libxl builds it: memory below the hole at 3.75 GiB and
//! from 4 GiB on, in superpages where they fit; the special pages below the hole's end; parameters
//! and context.
//!
//! C implementation: `tools/libs/guest/xg_dom_x86.c` (`meminit_hvm`,
//! `alloc_magic_pages_hvm`).

use std::ops::Range;

use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use super::{GuestSpec, fill, populate};
use crate::error::BackendError;
use crate::mock::domain::MockDomain;
use crate::mock::hvm_context;
use crate::mock::layout::write_word;
use crate::mock::platform::param;
use crate::{DomId, DomainControl, GuestKind, HvmGuest, RingGrant, TscInfo, X86Platform};

/// No memory from here to 4 GiB.
const MMIO_START: u64 = 0xf_0000;
const FOUR_GIB: u64 = 0x10_0000;
/// The video memory of an HVM guest: not populated.
const VGA_HOLE: Range<u64> = 0xa0..0xc0;

/// The special pages, eight of them.
const SPECIAL: u64 = 0xf_eff8;
const PAGING: u64 = SPECIAL;
const ACCESS: u64 = SPECIAL + 1;
const SHARING: u64 = SPECIAL + 2;
const BUFIOREQ: u64 = SPECIAL + 3;
const XENSTORE: u64 = SPECIAL + 4;
const IOREQ: u64 = SPECIAL + 5;
const IDENT_PT: u64 = SPECIAL + 6;
const CONSOLE: u64 = SPECIAL + 7;
/// Pages for I/O request servers, below the special pages.
const IOREQ_SERVER_PAGES: u64 = 8;
const IOREQ_SERVER: u64 = SPECIAL - IOREQ_SERVER_PAGES;

/// All special pages: a kernel does not use them as ordinary memory.
pub(in super::super) const SPECIAL_PAGES: Range<u64> = IOREQ_SERVER..CONSOLE + 1;

/// The largest order whose extents fit at `pfn` with `left` pages to go.
fn order_at(pfn: u64, left: u64) -> u8 {
    [18, 9]
        .into_iter()
        .find(|order| pfn.is_multiple_of(1 << order) && left >= 1 << order)
        .unwrap_or(0)
}

/// Populate a range of RAM with the largest extents that fit. A machine without a free GiB gives 2
/// MiB extents instead, as Xen does.
fn populate_range(domain: &MockDomain, range: Range<u64>) -> Result<(), BackendError> {
    let mut at = range.start;
    while at < range.end {
        let mut order = order_at(at, range.end - at);
        while order > 0 {
            if crate::GuestMemory::populate(domain, order, &mut [Gfn(at)])? == 1 {
                break;
            }
            order = if order == 18 { 9 } else { 0 };
        }
        if order > 0 {
            at += 1 << order;
            continue;
        }
        let boundary = (at + 1).next_multiple_of(512).min(range.end);
        let mut pages: Vec<Gfn> = (at..boundary).map(Gfn).collect();
        populate(domain, 0, &mut pages)?;
        at = boundary;
    }
    Ok(())
}

/// Build the guest in an empty domain, and unpause it.
pub(super) fn build(domain: &MockDomain, spec: &GuestSpec) -> Result<(), BackendError> {
    let hvm = spec.kind == GuestKind::Hvm;
    let pages = spec.pages();
    let low = 0..pages.min(MMIO_START);
    let high = FOUR_GIB..FOUR_GIB + pages.saturating_sub(MMIO_START);
    let ranges = match hvm {
        true => vec![0..VGA_HOLE.start, VGA_HOLE.end..low.end, high],
        false => vec![low, high],
    };
    for range in &ranges {
        populate_range(domain, range.clone())?;
    }
    let data: Vec<(u64, Mfn)> = ranges
        .into_iter()
        .flatten()
        .filter_map(|pfn| Some((pfn, domain.dom.p2m_get(Gfn(pfn))?)))
        .collect();
    fill(domain, spec.seed, &data)?;
    let first = if hvm { IOREQ_SERVER } else { SPECIAL };
    let mut special: Vec<Gfn> = (first..=CONSOLE).map(Gfn).collect();
    populate(domain, 0, &mut special)?;
    write_special(domain)?;
    set_params(domain, hvm)?;
    let online = u16::try_from(spec.vcpus - spec.offline_vcpus).unwrap_or(u16::MAX);
    domain.set_hvm_context(&hvm_context::make(spec.kind, online, spec.seed))?;
    domain.set_tsc_info(&TscInfo::default())?;
    let ring = |pfn| RingGrant {
        gfn: Some(Gfn(pfn)),
        backend: DomId(0),
    };
    domain.seed_grants(ring(CONSOLE), ring(XENSTORE))?;
    domain.unpause()
}

fn write_special(domain: &MockDomain) -> Result<(), BackendError> {
    // Superpages of 4 MiB, one to one.
    let mut identity = [0; PAGE_SIZE];
    for n in 0..PAGE_SIZE / 4 {
        write_word(&mut identity, n * 4, 4, (n as u64) << 22 | 0xe7);
    }
    let mut console = [0; PAGE_SIZE];
    console[..20].copy_from_slice(b"A guest made by xsr\n");
    for (pfn, page) in [(IDENT_PT, identity), (CONSOLE, console)] {
        if let Some(mfn) = domain.dom.p2m_get(Gfn(pfn)) {
            domain.write_own("build", mfn, &page)?;
        }
    }
    Ok(())
}

fn set_params(domain: &MockDomain, hvm: bool) -> Result<(), BackendError> {
    let mut params = vec![
        (param::STORE_PFN, XENSTORE),
        (param::BUFIOREQ_PFN, BUFIOREQ),
        (param::IOREQ_PFN, IOREQ),
        (param::CONSOLE_PFN, CONSOLE),
        (param::PAGING_RING_PFN, PAGING),
        (param::MONITOR_RING_PFN, ACCESS),
        (param::SHARING_RING_PFN, SHARING),
        (param::IDENT_PT, IDENT_PT << 12),
    ];
    if hvm {
        params.extend([
            (param::IOREQ_SERVER_PFN, IOREQ_SERVER),
            (param::NR_IOREQ_SERVER_PAGES, IOREQ_SERVER_PAGES),
            (param::ACPI_IOPORTS_LOCATION, 1),
            (param::VM86_TSS_SIZED, 0x180 << 32 | 0xfc10_0280),
        ]);
    }
    for index in [param::STORE_EVTCHN, param::CONSOLE_EVTCHN] {
        params.push((index, u64::from(domain.alloc_unbound_port(DomId(0))?)));
    }
    params
        .into_iter()
        .try_for_each(|(index, value)| domain.set_hvm_param(index, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_as_large_as_alignment_and_rest_allow() {
        assert_eq!(order_at(0, 1 << 18), 18);
        assert_eq!(order_at(0, (1 << 18) - 1), 9);
        assert_eq!(order_at(512, 511), 0);
        assert_eq!(order_at(1, 1 << 20), 0);
    }
}
