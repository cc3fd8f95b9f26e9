//! Checks of the host and of a domain's life cycle.

use crate::Errno;

use super::kit::{self, Guest};
use super::{Check, Violation, ensure, equal, fails};
use crate::{DomId, GuestKind, Host, NewDomain, ShutdownReason, Uuid};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("a new domain is paused, empty and listed", new_domain),
    ("a new domain has the UUID it was given", uuid),
    ("a domain that is not there is ESRCH", absent_domain),
    ("zero vcpus or too many are EINVAL", vcpu_bounds),
    ("a destroyed domain is gone, for old handles too", destroyed),
    ("pauses are counted", pauses),
    ("vcpus above the largest number are EINVAL", vcpu_numbers),
    ("ports are given out from 1 up until ENOSPC", ports),
    ("a paused domain does not answer a suspend", suspend_paused),
    (
        "a domain suspends once and resumes once",
        suspend_and_resume,
    ),
];

const KINDS: [GuestKind; 3] = [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh];

fn new_domain(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 3, 100)?;
        let info = guest.info()?;
        equal(&info.domid, &guest.domid, "number")?;
        equal(&info.kind, &kind, "kind")?;
        equal(&info.shutdown, &None, "shutdown reason")?;
        ensure(info.paused && !info.dying, "paused, not dying")?;
        equal(&info.max_vcpu_id, &2, "largest vcpu")?;
        equal(&(info.tot_pages, info.max_pages), &(0, 100), "pages")?;
        equal(&guest.maximum_gfn()?, &None, "largest gfn")?;
        ensure(!guest.vcpu_online(2)?, "no vcpu is online")?;
        let listed: Vec<DomId> = host.domains()?.into_iter().map(|info| info.domid).collect();
        ensure(listed.contains(&guest.domid), "listed")?;
        ensure(listed.is_sorted(), "listed in order")?;
        ensure(
            !listed.contains(&DomId(0)),
            "the control domain is not listed",
        )?;
    }
    ensure(host.xen_version()?.major >= 4, "version")
}

fn uuid(host: &dyn Host) -> Result<(), Violation> {
    for (kind, first) in KINDS.into_iter().zip([0, 1, 0x80]) {
        let mut uuid = Uuid(*b"\0contract of xsr");
        uuid.0[0] = first;
        let guest = Guest::of(host, &NewDomain::new(kind, 1, 1).uuid(uuid))?;
        equal(&guest.info()?.uuid, &uuid, "UUID")?;
        let listed = host.domains()?;
        let listed = listed.iter().find(|info| info.domid == guest.domid);
        equal(
            &listed.map(|info| info.uuid),
            &Some(uuid),
            "UUID in the list",
        )?;
    }
    let guest = Guest::new(host, GuestKind::Pvh, 1, 1)?;
    equal(
        &guest.info()?.uuid,
        &Uuid::NIL,
        "UUID of a domain without one",
    )
}

fn absent_domain(host: &dyn Host) -> Result<(), Violation> {
    fails(host.domain(DomId(0x7fef)).map(drop), Errno::ESRCH, "domain")
}

fn vcpu_bounds(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        for vcpus in [0, kind.max_vcpus() + 1, u32::MAX] {
            let made = host.create_domain(kind, vcpus, 1);
            fails(made, Errno::EINVAL, "create_domain")?;
        }
    }
    equal(
        &Guest::new(host, GuestKind::Hvm, 128, 1)?
            .info()?
            .max_vcpu_id,
        &127,
        "largest vcpu",
    )
}

fn destroyed(host: &dyn Host) -> Result<(), Violation> {
    let (guest, gfns) = Guest::with_pages(host, GuestKind::Pv, 4)?;
    guest.destroy()?;
    fails(host.domain(guest.domid).map(drop), Errno::ESRCH, "domain")?;
    fails(guest.info(), Errno::ESRCH, "info")?;
    fails(guest.pause(), Errno::ESRCH, "pause")?;
    fails(guest.types(&gfns), Errno::ESRCH, "page_types")?;
    fails(guest.map(&gfns, crate::Access::Read), Errno::ESRCH, "map")?;
    fails(
        guest.populate(0, &mut gfns.clone()),
        Errno::ESRCH,
        "populate",
    )?;
    fails(guest.destroy(), Errno::ESRCH, "destroy")
}

fn pauses(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pvh, 1, 1)?;
    guest.pause()?;
    guest.unpause()?;
    ensure(guest.info()?.paused, "one of two pauses left")?;
    guest.unpause()?;
    ensure(!guest.info()?.paused, "no pause left")?;
    fails(guest.unpause(), Errno::EINVAL, "unpause")
}

fn vcpu_numbers(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 2, 1)?;
    guest.vcpu_online(1)?;
    fails(guest.vcpu_online(2), Errno::EINVAL, "vcpu_online")
}

fn ports(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 1)?;
    equal(&guest.alloc_unbound_port(DomId(0))?, &1, "first port")?;
    equal(&guest.alloc_unbound_port(DomId(0))?, &2, "second port")?;
    // At most 2^17 ports exist (FIFO event channels).
    for _ in 0..1 << 17 {
        if let Err(error) = guest.alloc_unbound_port(DomId(0)) {
            return equal(&error.errno, &Errno::ENOSPC, "when there are no ports left");
        }
    }
    Err(Violation("ports without end".to_owned()))
}

fn suspend_paused(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1)?;
        fails(guest.suspend(), Errno::ETIMEDOUT, "suspend")?;
        equal(&guest.info()?.shutdown, &None, "shutdown reason")?;
    }
    Ok(())
}

fn suspend_and_resume(host: &dyn Host) -> Result<(), Violation> {
    let (guest, _) = Guest::with_pages(host, GuestKind::Hvm, 16)?;
    guest.hvm()?.set_hvm_context(&kit::hvm_context())?;
    ensure(guest.vcpu_online(0)?, "the vcpu of the context is online")?;
    fails(guest.resume(), Errno::EINVAL, "resume of a running domain")?;
    guest.unpause()?;
    guest.suspend()?;
    let info = guest.info()?;
    equal(
        &info.shutdown,
        &Some(ShutdownReason::Suspend),
        "shutdown reason",
    )?;
    ensure(!info.paused, "not paused")?;
    fails(guest.suspend(), Errno::EBUSY, "second suspend")?;
    guest.resume()?;
    equal(&guest.info()?.shutdown, &None, "shutdown reason")?;
    fails(guest.resume(), Errno::EINVAL, "second resume")
}
