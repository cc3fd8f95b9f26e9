//! Checks for PV guests.

use crate::Errno;
use xsr_format::frame::{Gfn, PageType};

use super::kit::{Guest, NO_PFN, PRESENT, context, entry, mfn, put};
use super::{Check, Violation, ensure, equal, fails};
use crate::{Domain, GuestKind, Host, VcpuBlob};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("a translated guest has nothing of PV", not_pv),
    ("the width is 8, or 4 before there is memory", width),
    ("the m2p knows every frame of a guest", m2p),
    ("shared_info can be mapped, read and written", shared_info),
    ("a vcpu never initialised is ENODATA", fresh_vcpu),
    ("a context comes back as it was", context_round_trip),
    ("a context holds its tables and GDT", context_references),
    ("contexts Xen does not take are EINVAL", bad_contexts),
    ("the other blobs come back as they were", other_blobs),
    ("other blobs of a wrong length are EINVAL", bad_blobs),
];

fn not_pv(host: &dyn Host) -> Result<(), Violation> {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        let guest = Guest::new(host, kind, 1, 1)?;
        ensure(Domain::pv(&*guest).is_none(), "its role is not PV")?;
        ensure(Domain::hvm(&*guest).is_some(), "its role is HVM")?;
    }
    Ok(())
}

fn width(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    equal(&guest.pv()?.guest_width()?, &8, "a new domain's width")?;
    for bad in [0, 2, 16] {
        fails(
            guest.pv()?.set_guest_width(bad),
            Errno::EINVAL,
            "another width",
        )?;
    }
    guest.pv()?.set_guest_width(8)?;
    if !guest.narrow()? {
        return Ok(());
    }
    equal(&guest.pv()?.guest_width()?, &4, "width")?;
    fails(guest.pv()?.set_guest_width(8), Errno::EINVAL, "back to 8")?;
    guest.populate(0, &mut [Gfn(0)])?;
    guest.pv()?.set_guest_width(4)?;
    equal(&guest.pv()?.guest_width()?, &4, "width")?;
    let wide = Guest::new(host, GuestKind::Pv, 1, 1)?;
    wide.populate(0, &mut [Gfn(0)])?;
    wide.pv()?.set_guest_width(8)?;
    fails(
        wide.pv()?.set_guest_width(4),
        Errno::EACCES,
        "4 with memory",
    )
}

fn m2p(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 1000)?;
    let m2p = guest.pv()?.m2p()?;
    for (pfn, frame) in (0..).zip(&frames) {
        ensure(mfn(*frame) <= m2p.max_mfn(), "no frame beyond the machine")?;
        equal(&m2p.pfn(mfn(*frame)).map(|pfn| pfn.0), &Some(pfn), "pfn")?;
    }
    let beyond = m2p.max_mfn().checked_add(1);
    equal(
        &beyond.and_then(|mfn| m2p.pfn(mfn)),
        &None,
        "pfn beyond the machine",
    )?;
    let compat = m2p.pfn(m2p.compat_first());
    ensure(
        compat.is_none_or(|pfn| pfn == NO_PFN || pfn.0 >= 1000),
        "the compat table is no guest's",
    )?;
    // A mapping made earlier shows the guest's destruction.
    drop(guest);
    ensure(
        frames.iter().all(|f| m2p.pfn(mfn(*f)) == Some(NO_PFN)),
        "freed frames have no pfn",
    )
}

fn shared_info(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    let frame = guest.info()?.shared_info_frame;
    guest.write(frame, &[(0x180, 77)])?;
    equal(&guest.read(frame)?[0x180], &77, "a word of shared_info")?;
    equal(
        &guest.info()?.tot_pages,
        &0,
        "it is none of the guest's pages",
    )
}

fn fresh_vcpu(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 2, 1)?;
    fails(
        guest.pv()?.vcpu_state(1, VcpuBlob::Basic),
        Errno::ENODATA,
        "basic",
    )?;
    for blob in [
        VcpuBlob::Basic,
        VcpuBlob::Extended,
        VcpuBlob::Xsave,
        VcpuBlob::Msrs,
    ] {
        fails(
            guest.pv()?.vcpu_state(2, blob),
            Errno::EINVAL,
            "no such vcpu",
        )?;
        fails(
            guest.pv()?.set_vcpu_state(2, blob, &[0; 64]),
            Errno::EINVAL,
            "no such vcpu",
        )?;
    }
    Ok(())
}

fn context_round_trip(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 16)?;
    guest.write_tables(&frames, frames[8], PRESENT)?;
    let mut basic = context(frames[3]);
    // The user's root: its low bit comes from the stream and is not Xen's.
    put(&mut basic, 0x1378 + 8, frames[9].0 << 12 | 1);
    // edx: Xen does not check it.
    put(&mut basic, 0x268, frames[5].0);
    guest.pv()?.set_vcpu_state(0, VcpuBlob::Basic, &basic)?;
    put(&mut basic, 0x1378 + 8, frames[9].0 << 12);
    let got = guest.pv()?.vcpu_state(0, VcpuBlob::Basic)?;
    equal(&got.len(), &basic.len(), "length")?;
    for (what, range) in [
        ("edx", 0x268..0x270),
        ("control registers", 0x1378 + 8..0x1378 + 32),
    ] {
        equal(&got[range.clone()], &basic[range], what)?;
    }
    ensure(guest.vcpu_online(0)?, "online")?;
    // Tables cannot be replaced once they are set either.
    put(&mut basic, 0x1378 + 24, frames[9].0 << 12);
    fails(
        guest.pv()?.set_vcpu_state(0, VcpuBlob::Basic, &basic),
        Errno::EOPNOTSUPP,
        "another root",
    )
}

fn context_references(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 16)?;
    guest.write_tables(&frames, frames[8], PRESENT)?;
    let mut basic = context(frames[3]);
    put(&mut basic, 0x12e0, frames[6].0);
    put(&mut basic, 0x1360, 16);
    guest.pv()?.set_vcpu_state(0, VcpuBlob::Basic, &basic)?;
    let expected = [
        PageType::L1TAB,
        PageType::L2TAB,
        PageType::L3TAB,
        PageType::L4TAB,
    ];
    equal(&guest.types(&frames[..4])?, &expected.to_vec(), "types")?;
    equal(
        &guest.types(&frames[6..7])?,
        &vec![PageType::NOTAB],
        "type of the GDT",
    )?;
    fails(
        guest.pv()?.pin_tables(&[(1, mfn(frames[6]))]),
        Errno::EINVAL,
        "the GDT as a table",
    )?;
    // A restorer does this: it pins a table that a context already refers to.
    guest.pv()?.pin_tables(&[(4, mfn(frames[3]))])?;
    Ok(())
}

fn bad_contexts(host: &dyn Host) -> Result<(), Violation> {
    let (guest, frames) = Guest::with_pages(host, GuestKind::Pv, 16)?;
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    guest.write_tables(&frames, frames[8], PRESENT)?;
    guest.write(frames[10], &[(0, entry(Gfn(0), PRESENT))])?;
    guest.pv()?.pin_tables(&[(1, mfn(frames[0]))])?;
    let good = context(frames[3]);
    let with = |changes: &[(usize, u64)]| {
        let mut context = good.clone();
        changes
            .iter()
            .for_each(|(at, value)| put(&mut context, *at, *value));
        context
    };
    let (cr1, cr3, gdt, gdt_ents) = (0x1380, 0x1390, 0x12e0, 0x1360);
    let bad = [
        ("short", good[..0x142f].to_vec()),
        ("long", [&good[..], &[0]].concat()),
        ("of the other width", vec![0; 0xaf0]),
        ("another's root", context(others[0])),
        ("a root that does not validate", context(frames[10])),
        ("a level-1 table for a root", context(frames[0])),
        (
            "a user root that does not validate",
            with(&[(cr1, frames[10].0 << 12)]),
        ),
        ("user mode without a user root", with(&[(0x200, 1 << 5)])),
        (
            "a GDT frame that is a table",
            with(&[(gdt, frames[0].0), (gdt_ents, 1)]),
        ),
        (
            "another's GDT frame",
            with(&[(gdt, others[0].0), (gdt_ents, 1)]),
        ),
        ("too large a GDT", with(&[(gdt_ents, 14 * 512 + 1)])),
        (
            "an address that is not canonical",
            with(&[(0x288, 1 << 47)]),
        ),
        ("a root that is no frame", with(&[(cr3, 1 << 51)])),
    ];
    for (what, context) in bad {
        let set = guest.pv()?.set_vcpu_state(0, VcpuBlob::Basic, &context);
        fails(set, Errno::EINVAL, what)?;
    }
    // No context was set.
    fails(
        guest.pv()?.vcpu_state(0, VcpuBlob::Basic),
        Errno::ENODATA,
        "basic",
    )?;
    guest.pv()?.set_vcpu_state(0, VcpuBlob::Basic, &good)?;
    Ok(())
}

/// `xen_domctl_ext_vcpucontext` of vcpu 0, with a callback.
fn extended() -> Vec<u8> {
    let mut extended = vec![0; 64];
    extended[4] = 64;
    put(&mut extended, 16, 0xffff_ffff_8100_1000);
    // Selectors of the guest's kernel: Xen changes all others to these.
    extended[24..28].copy_from_slice(&[0x33, 0xe0, 0x33, 0xe0]);
    extended
}

/// An XSAVE area with x87 and SSE in use.
fn xsave() -> Vec<u8> {
    let mut xsave = vec![0; 16 + 576];
    xsave[0] = 3;
    xsave[8] = 3;
    xsave[16 + 512] = 3;
    xsave
}

fn other_blobs(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    // TSC_AUX.
    let mut msrs = vec![0; 16];
    msrs[..4].copy_from_slice(&0xc000_0103_u32.to_le_bytes());
    msrs[8] = 5;
    let blobs = [
        (VcpuBlob::Extended, extended()),
        (VcpuBlob::Xsave, xsave()),
        (VcpuBlob::Msrs, msrs),
    ];
    for (kind, blob) in blobs {
        match guest.pv()?.set_vcpu_state(0, kind, &blob) {
            // A machine without RDTSCP has no TSC_AUX to set.
            Err(error) if kind == VcpuBlob::Msrs && error.errno == Errno::EINVAL => {
                let fresh = guest.pv()?.vcpu_state(0, kind)?;
                guest.pv()?.set_vcpu_state(0, kind, &fresh)?;
                continue;
            }
            set => set?,
        }
        let got = guest.pv()?.vcpu_state(0, kind)?;
        match kind {
            // The area may be returned for all features that the vcpu could use, with unused
            // registers in their state after a reset.
            VcpuBlob::Xsave => {
                ensure(got.len() >= blob.len(), "bytes of an XSAVE area")?;
                guest.pv()?.set_vcpu_state(0, kind, &got)?;
                equal(&guest.pv()?.vcpu_state(0, kind)?, &got, "an XSAVE area")?;
            }
            _ => equal(&got, &blob, "a blob")?,
        }
    }
    Ok(())
}

fn bad_blobs(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    let mut unlisted = vec![0; 16];
    unlisted[0] = 0x10;
    let bad = [
        (VcpuBlob::Extended, vec![0; 31]),
        (VcpuBlob::Extended, vec![0; 129]),
        (VcpuBlob::Xsave, vec![0; 15]),
        (VcpuBlob::Xsave, xsave()[..591].to_vec()),
        (VcpuBlob::Xsave, [&xsave()[..], &[0; 64]].concat()),
        (VcpuBlob::Msrs, vec![0; 17]),
        (VcpuBlob::Msrs, unlisted),
    ];
    for (kind, blob) in bad {
        let set = guest.pv()?.set_vcpu_state(0, kind, &blob);
        fails(
            set,
            Errno::EINVAL,
            &format!("{kind:?} of {} bytes", blob.len()),
        )?;
    }
    Ok(())
}
