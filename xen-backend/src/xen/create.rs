//! Making a domain, as far as a restore needs it made: no devices, no memory.
//!
//! C implementation: `libxl__domain_make`, `libxl__build_pre` and
//! `libxl__arch_domain_create` in `tools/libs/light`.

use nix::errno::Errno;
use zerocopy::FromZeros;

use super::calls::{self, Calls};
use super::interface::Create;
use super::sys;
use crate::error::BackendError;
use crate::{DomId, GuestKind, NewDomain};

/// Most vcpus a domain can have.
const MAX_VCPUS: u32 = 128;
/// Largest event channel, as xl has it by default.
const MAX_PORT: u32 = 1023;
/// Lets Xen choose the number (`DOMID_ANY`). From 4.22 on nothing else does: 0, too, is
/// the number of one domain there, which exists. Older ones take any reserved number so.
const DOMID_ANY: u16 = 0x7ff5;
/// KiB in a page.
const PAGE_KIB: u64 = 4;

/// Make a domain. What was made of it is destroyed again where a step fails.
pub(super) fn create(calls: &Calls, new: &NewDomain) -> Result<DomId, BackendError> {
    const OP: &str = "createdomain";
    let host = |errno| BackendError::host(OP, errno);
    if !(1..=MAX_VCPUS).contains(&new.vcpus) {
        return Err(host(Errno::EINVAL));
    }
    let domid = createdomain(calls, new).map_err(host)?;
    if let Err(error) = furnish(calls, domid, new) {
        if let Err(errno) = calls.plain_domctl(sys::XEN_DOMCTL_destroydomain, domid) {
            tracing::error!(%domid, %errno, "a domain half made is left behind");
        }
        return Err(error);
    }
    Ok(domid)
}

fn createdomain(calls: &Calls, new: &NewDomain) -> Result<DomId, Errno> {
    let emulation = match new.kind {
        GuestKind::Pv => 0,
        GuestKind::Pvh => sys::XEN_X86_EMU_LAPIC,
        // What only the control domain has.
        GuestKind::Hvm => sys::XEN_X86_EMU_ALL & !sys::XEN_X86_EMU_VPCI,
    };
    let ask = |flags| {
        let create = Create {
            flags,
            vcpus: new.vcpus,
            max_evtchn_port: MAX_PORT,
            emulation,
            handle: new.uuid.0,
        };
        let body = (calls.interface.encode_create)(&create);
        let (version, cmd) = (calls.interface.domctl, sys::XEN_DOMCTL_createdomain);
        let (domid, _) = calls::domctl(&*calls.raw, version, cmd, DOMID_ANY, &body, &mut [])?;
        Ok(DomId(domid))
    };
    if new.kind == GuestKind::Pv {
        return ask(0);
    }
    match ask(sys::XEN_DOMCTL_CDF_hvm | sys::XEN_DOMCTL_CDF_hap) {
        // Processors without nested paging: shadows, then.
        Err(Errno::EINVAL) => ask(sys::XEN_DOMCTL_CDF_hvm),
        made => made,
    }
}

/// Give the domain its vcpus, its limit, and room for tables that Xen keeps of it.
fn furnish(calls: &Calls, domid: DomId, new: &NewDomain) -> Result<(), BackendError> {
    let &NewDomain {
        kind,
        vcpus,
        max_pages,
        ..
    } = new;
    let fail = |op| move |errno| BackendError::domain(op, domid, errno);
    let max = sys::xen_domctl_max_vcpus { max: vcpus };
    calls
        .domctl(sys::XEN_DOMCTL_max_vcpus, domid, &max)
        .map_err(fail("max_vcpus"))?;
    let max_memkb = max_pages.saturating_mul(PAGE_KIB);
    if kind.is_translated() {
        let mut allocation = sys::xen_domctl_shadow_op::new_zeroed();
        allocation.op = sys::XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION;
        allocation.mb = table_mib(vcpus, max_memkb);
        calls
            .domctl(sys::XEN_DOMCTL_shadow_op, domid, &allocation)
            .map_err(fail("shadow_op"))?;
    }
    let max = sys::xen_domctl_max_mem { max_memkb };
    calls
        .domctl(sys::XEN_DOMCTL_max_mem, domid, &max)
        .map_err(fail("max_mem"))?;
    Ok(())
}

/// MiB for the p2m and shadow tables: 1 for each vcpu, and 8 KiB for each MiB of memory
/// (C: `libxl_get_required_shadow_memory`).
fn table_mib(vcpus: u32, max_memkb: u64) -> u32 {
    let kib = 1024 * u64::from(vcpus) + 8 * (max_memkb / 1024);
    u32::try_from(kib.div_ceil(1024)).unwrap_or(u32::MAX)
}
