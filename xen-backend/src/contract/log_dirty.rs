//! Checks of the dirty log. The guest's own writes cannot be provoked from outside, only those that
//! the hypervisor counts as such.

use crate::Errno;
use xsr_format::frame::{Gfn, Pfn};

use super::kit::{self, Guest, PRESENT, RW, mfn};
use super::{Check, Violation, ensure, equal, fails};
use crate::{DirtyBitmap, DirtyRead, DirtyStats, GuestKind, Host};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("the log is off at first, and is then EINVAL to read", off),
    ("the log is enabled once, and disabled at will", on_and_off),
    ("a final read wants a domain that does not run", final_read),
    ("what the toolstack writes is not logged", toolstack_writes),
    (
        "a table that is pinned is logged, by its pfn, until a clean",
        pinned_table,
    ),
    ("the log of a domain that is gone is ESRCH", gone),
];

const KINDS: [GuestKind; 3] = [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh];
const READS: [DirtyRead; 3] = [DirtyRead::Clean, DirtyRead::Peek, DirtyRead::CleanFinal];

/// Enable the log. False if the hypervisor cannot, as for a PV guest without shadow paging.
fn enable(guest: &Guest, kind: GuestKind) -> Result<bool, Violation> {
    match guest.enable_log_dirty() {
        Ok(()) => Ok(true),
        Err(error) if error.errno == Errno::EOPNOTSUPP && kind == GuestKind::Pv => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Read into a bitmap that is full beforehand.
fn read(guest: &Guest, how: DirtyRead, pfns: u64) -> Result<Vec<u64>, Violation> {
    let mut bitmap = DirtyBitmap::new(pfns);
    bitmap.set_all();
    let stats = guest.read_dirty(how, &mut bitmap)?;
    let dirty: Vec<u64> = bitmap.iter().map(|pfn| pfn.0).collect();
    equal(&stats.dirty_count, &(dirty.len() as u64), "pages written")?;
    Ok(dirty)
}

fn off(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let (guest, _) = Guest::with_pages(host, kind, 4)?;
        for how in READS {
            let read = guest.read_dirty(how, &mut DirtyBitmap::new(4));
            fails(read, Errno::EINVAL, "read_dirty")?;
        }
        guest.disable_log_dirty()?;
    }
    Ok(())
}

fn on_and_off(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let (guest, _) = Guest::with_pages(host, kind, 4)?;
        if !enable(&guest, kind)? {
            let read = guest.read_dirty(DirtyRead::Clean, &mut DirtyBitmap::new(4));
            fails(read, Errno::EINVAL, "read_dirty")?;
            continue;
        }
        fails(guest.enable_log_dirty(), Errno::EINVAL, "enabled twice")?;
        equal(&read(&guest, DirtyRead::Clean, 4)?, &Vec::new(), "dirty")?;
        guest.disable_log_dirty()?;
        guest.disable_log_dirty()?;
        let read = guest.read_dirty(DirtyRead::Peek, &mut DirtyBitmap::new(4));
        fails(read, Errno::EINVAL, "read_dirty")?;
        ensure(enable(&guest, kind)?, "it can be enabled again")?;
        // Bitmaps that are smaller or larger than the guest.
        for pfns in [0, 1, 1 << 20] {
            let mut bitmap = DirtyBitmap::new(pfns);
            let stats = guest.read_dirty(DirtyRead::Clean, &mut bitmap)?;
            equal(&stats, &DirtyStats::default(), "what has happened")?;
        }
    }
    Ok(())
}

fn final_read(host: &dyn Host) -> Result<(), Violation> {
    let (guest, _) = Guest::with_pages(host, GuestKind::Hvm, 16)?;
    guest.hvm()?.set_hvm_context(&kit::hvm_context())?;
    guest.enable_log_dirty()?;
    guest.unpause()?;
    let wild = guest.read_dirty(DirtyRead::CleanFinal, &mut DirtyBitmap::new(16));
    fails(wild, Errno::EINVAL, "a final read of a running domain")?;
    guest.read_dirty(DirtyRead::Clean, &mut DirtyBitmap::new(16))?;
    guest.read_dirty(DirtyRead::Peek, &mut DirtyBitmap::new(16))?;
    guest.pause()?;
    guest.read_dirty(DirtyRead::CleanFinal, &mut DirtyBitmap::new(16))?;
    guest.unpause()?;
    guest.suspend()?;
    guest.read_dirty(DirtyRead::CleanFinal, &mut DirtyBitmap::new(16))?;
    // A suspend does not change the log.
    fails(guest.enable_log_dirty(), Errno::EINVAL, "enabled twice")
}

fn toolstack_writes(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 16)?;
        if !enable(&guest, kind)? {
            continue;
        }
        for gfn in &gfns {
            guest.write(*gfn, &[(1, 2)])?;
        }
        equal(&read(&guest, DirtyRead::Clean, 16)?, &Vec::new(), "dirty")?;
    }
    Ok(())
}

fn pinned_table(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 2)?;
    let mut frames = [Gfn(70), Gfn(3)];
    equal(&guest.populate(0, &mut frames)?, &2, "pages")?;
    guest.write(frames[0], &[(9, kit::entry(frames[1], PRESENT | RW))])?;
    if !enable(&guest, GuestKind::Pv)? {
        return Ok(());
    }
    guest.pv()?.pin_tables(&[(1, mfn(frames[0]))])?;
    for how in [DirtyRead::Peek, DirtyRead::Peek, DirtyRead::Clean] {
        equal(&read(&guest, how, 71)?, &vec![70], "dirty")?;
    }
    let mut bitmap = DirtyBitmap::new(71);
    let stats = guest.read_dirty(DirtyRead::Clean, &mut bitmap)?;
    equal(&stats, &DirtyStats::default(), "after a clean")?;
    ensure(!bitmap.contains(Pfn(70)), "a clean forgets")
}

fn gone(host: &dyn Host) -> Result<(), Violation> {
    let (guest, _) = Guest::with_pages(host, GuestKind::Pvh, 1)?;
    guest.destroy()?;
    fails(guest.enable_log_dirty(), Errno::ESRCH, "enable_log_dirty")?;
    fails(guest.disable_log_dirty(), Errno::ESRCH, "disable_log_dirty")?;
    let read = guest.read_dirty(DirtyRead::Peek, &mut DirtyBitmap::new(1));
    fails(read, Errno::ESRCH, "read_dirty")
}
