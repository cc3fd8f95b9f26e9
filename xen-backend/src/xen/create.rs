//! Creation of a domain for a restore: without devices or memory.
//!
//! C implementation: `libxl__domain_make`, `libxl__build_pre` and
//! `libxl__arch_domain_create` in `tools/libs/light`.

use crate::Errno;
use zerocopy::FromZeros;

use super::calls::{self, Calls};
use super::interface::{Create, DEFAULT_LIMIT};
use super::sys;
use crate::error::BackendError;
use crate::{DomId, GuestKind, NewDomain};

/// Lets Xen choose the number (`DOMID_ANY`). From 4.22 on only this value does so: 0 also names one
/// domain there, which exists. Older versions treat any reserved number like this.
const DOMID_ANY: u16 = 0x7ff5;
/// KiB in a page.
const PAGE_KIB: u64 = 4;

/// The newest grant table version.
const NEWEST_GRANT_VERSION: u8 = 2;

const OP: &str = "createdomain";

/// Reading an unknown MSR gives zero (`XEN_X86_MSR_RELAXED`).
pub(crate) const MSR_RELAXED: u32 = 1;

/// Create a domain. If a step fails, the incomplete domain is destroyed.
pub(super) fn create(calls: &Calls, new: &NewDomain) -> Result<DomId, BackendError> {
    new.check_vcpus(OP)?;
    let create = body(calls, new)?;
    let domid = createdomain(calls, new, create)?;
    if let Err(error) = furnish(calls, domid, new) {
        if let Err(errno) = calls.plain_domctl(sys::XEN_DOMCTL_destroydomain, domid) {
            tracing::error!(%domid, %errno, "a domain half made is left behind");
        }
        return Err(error);
    }
    Ok(domid)
}

/// The requested settings, except the flags and the grant table version. EOPNOTSUPP for a setting
/// that this version of Xen does not have.
fn body(calls: &Calls, new: &NewDomain) -> Result<Create, BackendError> {
    let settings = &new.settings;
    let interface = calls.interface;
    for (wanted, has, what) in [
        (
            // Xen allows the newest version by default.
            settings
                .max_grant_version
                .is_some_and(|version| version < NEWEST_GRANT_VERSION),
            interface.has_grant_version,
            "max_grant_version (from Xen 4.16 on)",
        ),
        (
            settings.cpupool != 0,
            interface.has_cpupool,
            "a pool of processors (from Xen 4.17 on)",
        ),
    ] {
        if wanted && !has {
            let why = format!("this Xen cannot be asked for {what} when a domain is made");
            return Err(BackendError::host(OP, Errno::EOPNOTSUPP).explained(why));
        }
    }
    let limit = |frames: Option<u32>| match frames {
        None => Ok(DEFAULT_LIMIT),
        Some(frames) => i32::try_from(frames)
            .map_err(|_| BackendError::host(OP, Errno::EINVAL).explained("too many grant frames")),
    };
    Ok(Create {
        flags: 0,
        vcpus: new.vcpus,
        max_evtchn_port: settings.max_event_port,
        emulation: match new.kind {
            GuestKind::Pv => 0,
            GuestKind::Pvh => sys::XEN_X86_EMU_LAPIC,
            // Emulation that only the control domain can have.
            GuestKind::Hvm => sys::XEN_X86_EMU_ALL & !sys::XEN_X86_EMU_VPCI,
        },
        handle: new.uuid.0,
        ssidref: settings.ssidref,
        max_grant_frames: limit(settings.max_grant_frames)?,
        max_maptrack_frames: limit(settings.max_maptrack_frames)?,
        grant_version: 0,
        // Without this field, every domain behaves like this.
        misc_flags: if settings.msr_relaxed { MSR_RELAXED } else { 0 },
        cpupool: settings.cpupool,
    })
}

fn createdomain(calls: &Calls, new: &NewDomain, create: Create) -> Result<DomId, BackendError> {
    let kind = new.kind;
    // Best first: this hypervisor may refuse each but the last (EINVAL).
    let flags: &[u32] = match kind {
        GuestKind::Pv => &[0],
        // The second is for processors without nested paging: shadow page tables.
        GuestKind::Hvm | GuestKind::Pvh => &[
            sys::XEN_DOMCTL_CDF_hvm | sys::XEN_DOMCTL_CDF_hap,
            sys::XEN_DOMCTL_CDF_hvm,
        ],
    };
    let versions: &[u8] = match new.settings.max_grant_version {
        Some(version) => &[version],
        None if calls.interface.has_grant_version => &[NEWEST_GRANT_VERSION, 1],
        None => &[0],
    };
    let mut made = Err(Errno::EINVAL);
    for (flags, version) in flags
        .iter()
        .flat_map(|flags| versions.iter().map(move |version| (*flags, *version)))
    {
        let body = (calls.interface.encode_create)(&Create {
            flags,
            grant_version: version.into(),
            ..create
        });
        let (version, cmd) = (calls.interface.domctl, sys::XEN_DOMCTL_createdomain);
        made = calls::domctl(&*calls.raw, version, cmd, DOMID_ANY, &body, &mut []);
        if !matches!(made, Err(Errno::EINVAL)) {
            break;
        }
    }
    made.map(|(domid, _)| DomId(domid)).map_err(|errno| {
        let error = BackendError::host(OP, errno);
        match errno {
            Errno::ENOMEM => error.explained("Xen has no memory for another domain"),
            Errno::EINVAL | Errno::EOPNOTSUPP => error.explained(format!(
                "a {} domain with {} vcpus; the hypervisor's log says what Xen does not like",
                kind.name(),
                create.vcpus
            )),
            _ => error,
        }
    })
}

/// Give the domain its vcpus, its memory limit, room for the tables that Xen keeps for it, and its
/// clock.
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
        allocation.mb = match new.settings.paging_kib {
            Some(kib) => u32::try_from(kib.div_ceil(1024)).map_err(|_| {
                fail("shadow_op")(Errno::EINVAL).explained("too much shadow memory")
            })?,
            None => table_mib(vcpus, max_memkb),
        };
        calls
            .domctl(sys::XEN_DOMCTL_shadow_op, domid, &allocation)
            .map_err(fail("shadow_op"))?;
    }
    let max = sys::xen_domctl_max_mem { max_memkb };
    calls
        .domctl(sys::XEN_DOMCTL_max_mem, domid, &max)
        .map_err(fail("max_mem"))?;
    if kind.is_translated() {
        let mut param = sys::xen_hvm_param::new_zeroed();
        (param.domid, param.index) = (domid.0, sys::HVM_PARAM_TIMER_MODE);
        param.value = new.settings.timer_mode.into();
        calls
            .with_struct(sys::__HYPERVISOR_hvm_op, sys::HVMOP_set_param, &param)
            .map_err(fail("set_param"))?;
    }
    if new.settings.time_offset_seconds != 0 {
        let offset = sys::xen_domctl_settimeoffset {
            time_offset_seconds: new.settings.time_offset_seconds,
        };
        calls
            .domctl(sys::XEN_DOMCTL_settimeoffset, domid, &offset)
            .map_err(fail("settimeoffset"))?;
    }
    Ok(())
}

/// MiB for the p2m and shadow tables: 1 for each vcpu, and 8 KiB for each MiB of memory
/// (C: `libxl_get_required_shadow_memory`).
fn table_mib(vcpus: u32, max_memkb: u64) -> u32 {
    let kib = 1024 * u64::from(vcpus) + 8 * (max_memkb / 1024);
    u32::try_from(kib.div_ceil(1024)).unwrap_or(u32::MAX)
}
