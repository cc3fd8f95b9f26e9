//! Checks of PV guests' page tables: which can be pinned, and the effects of a pin.

use xsr_format::frame::{Gfn, Mfn, PageType};

use super::kit::{ACCESSED, Guest, NO_PFN, PRESENT, RW, TABLE, entry, mfn};
use super::{Check, REFUSED, Violation, ensure, equal, refused};
use crate::{Access, GuestKind, Host};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("pinning makes tables of all levels", pin),
    ("pins that cannot be: level, frame, twice", bad_pins),
    (
        "a writable mapping of a table is refused, a read-only one is not",
        mapped_tables,
    ),
    (
        "an entry to a frame that is not the guest's is refused",
        foreign_entries,
    ),
    ("an entry with reserved bits is refused", reserved_bits),
    ("pins before the one that fails stay", partial_pins),
    ("a failed pin leaves nothing behind", failed_pin_undone),
    (
        "a table may be mapped for writing only while it is none",
        write_tables,
    ),
    (
        "a level-4 table may refer to itself, read-only",
        linear_tables,
    ),
    ("Xen's slots of a level-4 table are Xen's", xen_slots),
    (
        "a 32-bit guest's last level-2 table is not shared",
        pae_tables,
    ),
];

fn pin(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    guest.write_tables(&frames, frames[4], RW | PRESENT)?;
    guest.pv()?.pin_tables(&[(4, mfn(frames[3]))])?;
    let expected = [
        PageType::L1TAB,
        PageType::L2TAB,
        PageType::L3TAB,
        PageType::L4TAB_PINNED,
        PageType::NOTAB,
    ];
    equal(&guest.types(&frames[..5])?, &expected.to_vec(), "types")?;
    // A page that is already a table can be pinned as such.
    guest
        .pv()?
        .pin_tables(&[(1, mfn(frames[0])), (2, mfn(frames[1]))])?;
    let types = guest.types(&frames[..2])?;
    equal(
        &types,
        &vec![PageType::L1TAB_PINNED, PageType::L2TAB_PINNED],
        "types",
    )
}

fn bad_pins(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    guest.write_tables(&frames, frames[4], PRESENT)?;
    let pv = guest.pv()?;
    let pin = |level, mfn| pv.pin_tables(&[(level, mfn)]);
    refused(pin(0, mfn(frames[3])), "level 0")?;
    refused(pin(5, mfn(frames[3])), "level 5")?;
    refused(pin(1, mfn(others[0])), "another guest's frame")?;
    refused(pin(1, Mfn(1 << 40)), "no frame")?;
    pin(4, mfn(frames[3]))?;
    refused(pin(4, mfn(frames[3])), "twice")?;
    refused(pin(1, mfn(frames[2])), "as another level")?;
    equal(
        &guest.types(&frames[3..4])?,
        &vec![PageType::L4TAB_PINNED],
        "it stays",
    )
}

fn mapped_tables(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    // The level-1 table maps the level-2 table above it.
    guest.write_tables(&frames, frames[1], RW | PRESENT)?;
    let pv = guest.pv()?;
    let pin = || pv.pin_tables(&[(4, mfn(frames[3]))]);
    refused(pin(), "writable")?;
    guest.write(frames[0], &[(0, entry(frames[1], PRESENT))])?;
    pin()?;
    // A page with a writable mapping cannot become a table.
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    guest.write(frames[0], &[(9, entry(frames[1], RW | PRESENT))])?;
    guest.pv()?.pin_tables(&[(1, mfn(frames[0]))])?;
    refused(
        guest.pv()?.pin_tables(&[(1, mfn(frames[1]))]),
        "mapped writable",
    )
}

fn foreign_entries(host: &dyn Host) -> Result<(), Violation> {
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    for target in [others[0], Gfn((1 << 40) - 1), Gfn(0)] {
        for level in 1..=4 {
            let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 1)?;
            guest.write(frames[0], &[(200, entry(target, PRESENT | ACCESSED))])?;
            let pinned = guest.pv()?.pin_tables(&[(level, mfn(frames[0]))]);
            refused(pinned, "an entry to another's frame")?;
        }
    }
    Ok(())
}

fn reserved_bits(host: &dyn Host) -> Result<(), Violation> {
    // Write-through, cache-disable, and a superpage (at level 1: memory type).
    for bad in [1 << 3, 1 << 4, 1 << 7] {
        for level in 1..=4_u8 {
            let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
            let flags = if level == 1 { RW | PRESENT } else { TABLE };
            let at = usize::from(level - 1);
            let target = if level == 1 {
                frames[4]
            } else {
                frames[at - 1]
            };
            guest.write_tables(&frames, frames[4], RW | PRESENT)?;
            guest.write(frames[at], &[(0, entry(target, flags | bad))])?;
            let pinned = guest.pv()?.pin_tables(&[(4, mfn(frames[3]))]);
            refused(pinned, "an entry with a reserved bit")?;
            // No-execute and the software bits are allowed.
            let good = 1 << 63 | 0xe00;
            guest.write(frames[at], &[(0, entry(target, flags | good))])?;
            guest.pv()?.pin_tables(&[(4, mfn(frames[3]))])?;
        }
    }
    Ok(())
}

fn partial_pins(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 3)?;
    guest.write(frames[1], &[(0, entry(Gfn(0), PRESENT))])?;
    let pins = [0, 1, 2].map(|n: usize| (1, mfn(frames[n])));
    refused(guest.pv()?.pin_tables(&pins), "the second of three")?;
    let expected = [PageType::L1TAB_PINNED, PageType::NOTAB, PageType::NOTAB];
    equal(&guest.types(&frames)?, &expected.to_vec(), "types")
}

fn failed_pin_undone(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    guest.write_tables(&frames, frames[4], RW | PRESENT)?;
    guest.write(frames[3], &[(5, entry(Gfn(0), TABLE))])?;
    refused(
        guest.pv()?.pin_tables(&[(4, mfn(frames[3]))]),
        "a bad entry at the top",
    )?;
    equal(
        &guest.types(&frames[..5])?,
        &vec![PageType::NOTAB; 5],
        "types",
    )?;
    // Each frame can be used for any purpose again.
    ensure(
        guest.map(&frames, Access::Write)?.failed().is_empty(),
        "all may be written",
    )?;
    guest.write(frames[4], &[(0, 0)])?;
    guest.pv()?.pin_tables(&[(1, mfn(frames[4]))])?;
    Ok(())
}

fn write_tables(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    guest.write_tables(&frames, frames[4], RW | PRESENT)?;
    guest.pv()?.pin_tables(&[(4, mfn(frames[3]))])?;
    let pages = guest.map(&frames, Access::Write)?;
    let failed: Vec<_> = pages
        .failed()
        .iter()
        .map(|e| (e.index, REFUSED.contains(&e.errno)))
        .collect();
    let expected: Vec<_> = (0..4).map(|n| (n, true)).collect();
    equal(&failed, &expected, "the tables")?;
    ensure(
        guest.map(&frames, Access::Read)?.failed().is_empty(),
        "all may be read",
    )
}

fn linear_tables(host: &dyn Host) -> Result<(), Violation> {
    for (flags, fine) in [(PRESENT | ACCESSED, true), (TABLE, false)] {
        let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
        guest.write_tables(&frames, frames[4], PRESENT)?;
        guest.write(frames[3], &[(300, entry(frames[3], flags))])?;
        let pinned = guest.pv()?.pin_tables(&[(4, mfn(frames[3]))]);
        match fine {
            true => pinned?,
            false => refused(pinned, "with write permission")?,
        }
    }
    Ok(())
}

fn xen_slots(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 8)?;
    guest.write_tables(&frames, frames[4], PRESENT)?;
    // Xen overwrites these, whatever the guest left there.
    guest.write(frames[3], &[(256, u64::MAX), (271, 1)])?;
    guest.pv()?.pin_tables(&[(4, mfn(frames[3]))])?;
    let m2p = guest.pv()?.m2p()?;
    let entries = guest.read(frames[3])?;
    let xen: Vec<u64> = entries[256..272]
        .iter()
        .copied()
        .filter(|e| e & PRESENT != 0)
        .collect();
    ensure(
        !xen.is_empty() && !xen.contains(&u64::MAX),
        "Xen fills them",
    )?;
    let foreign = |entry: &u64| {
        let target = Mfn((entry & ((1 << 52) - 1)) >> 12);
        m2p.pfn(target).is_none_or(|pfn| pfn == NO_PFN)
    };
    ensure(
        xen.iter().any(foreign),
        "with frames that are not the guest's",
    )
}

/// The slot of a 32-bit guest's level-2 table where Xen's slots begin: 0xf5800000.
const PAE_XEN_SLOT: usize = 428;

fn pae_tables(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 8)?;
    if !guest.narrow()? {
        return Ok(());
    }
    let mut frames: Vec<Gfn> = (0..8).map(Gfn).collect();
    guest.populate(0, &mut frames)?;
    let pv = guest.pv()?;
    let pin = |frame: Gfn, level| pv.pin_tables(&[(level, mfn(frame))]);
    guest.write(
        frames[1],
        &[(0, entry(frames[0], TABLE)), (PAE_XEN_SLOT, u64::MAX)],
    )?;
    refused(pin(frames[2], 3), "without its last level-2 table")?;
    guest.write(frames[2], &[(3, entry(frames[1], PRESENT)), (4, u64::MAX)])?;
    pin(frames[2], 3)?;
    let types = guest.types(&frames[..3])?;
    let expected = [PageType::L1TAB, PageType::L2TAB, PageType::L3TAB_PINNED];
    equal(&types, &expected.to_vec(), "types")?;
    let compat = guest.pv()?.m2p()?.compat_first();
    let slot = guest.read(frames[1])?[PAE_XEN_SLOT];
    equal(
        &((slot & ((1 << 52) - 1)) >> 12),
        &compat.0,
        "Xen's first slot",
    )?;
    refused(pin(frames[2], 4), "level 4")?;
    // A second top-level table over the same last level-2 table.
    guest.write(frames[3], &[(3, entry(frames[1], PRESENT))])?;
    refused(pin(frames[3], 3), "a shared last level-2 table")
}
