//! Common parts of PV and translated x86 guests: CPU policy, TSC, the console's ring.
//!
//! C implementation: `xg_sr_common_x86.c`.

use xsr_format::frame::Gfn;
use xsr_format::record::x86::TscInfo;
use xsr_xen_backend::{Access, CpuPolicy, Domain, Errno, TscInfo as DomainTsc};

use crate::error::{RestoreError, SaveError};
use crate::guest::Out;
use crate::guest::refused::PolicyRefused;
use crate::toolstack::MissingStaticData;

/// X86_CPUID_POLICY and X86_MSR_POLICY.
pub(crate) fn write_cpu_policy(domain: &dyn Domain, out: &mut Out<'_>) -> Result<(), SaveError> {
    let policy = domain.cpu_policy()?;
    out.cpuid_policy(&policy.leaves)?;
    out.msr_policy(&policy.msrs)?;
    Ok(())
}

/// X86_TSC_INFO.
pub(crate) fn write_tsc_info(domain: &dyn Domain, out: &mut Out<'_>) -> Result<(), SaveError> {
    let tsc = domain.tsc_info()?;
    out.tsc_info(TscInfo {
        mode: tsc.mode,
        khz: tsc.khz,
        nsec: tsc.nsec,
        incarnation: tsc.incarnation,
    })?;
    Ok(())
}

/// Sets the TSC from a stream.
pub(crate) fn set_tsc_info(domain: &dyn Domain, tsc: TscInfo) -> Result<(), RestoreError> {
    let TscInfo { mode, khz, .. } = tsc;
    let info = DomainTsc {
        mode,
        khz,
        nsec: tsc.nsec,
        incarnation: tsc.incarnation,
    };
    domain
        .set_tsc_info(&info)
        .map_err(|cause| match cause.errno {
            Errno::EINVAL | Errno::EOPNOTSUPP => RestoreError::TscInfo { mode, khz, cause },
            _ => cause.into(),
        })
}

/// Sets the CPU policy from a stream; returns the parts that the stream did not hold.
pub(crate) fn set_cpu_policy(
    domain: &dyn Domain,
    policy: &CpuPolicy,
) -> Result<MissingStaticData, RestoreError> {
    let missing = MissingStaticData {
        cpuid: policy.leaves.is_empty(),
        msr: policy.msrs.is_empty(),
    };
    if !(missing.cpuid && missing.msr) {
        domain
            .set_cpu_policy(policy)
            .map_err(|cause| match cause.errno {
                // Errors about the policy itself; E2BIG: it has more entries than any policy may.
                Errno::EINVAL | Errno::ERANGE | Errno::EOVERFLOW | Errno::E2BIG => {
                    RestoreError::CpuPolicy(Box::new(PolicyRefused::new(domain, policy, cause)))
                }
                _ => cause.into(),
            })?;
    }
    Ok(missing)
}

/// The first version of Xen whose console daemon marks the ring as connected.
const CONNECTING_CONSOLE: (u16, u16) = (4, 21);
/// The word of a console ring whose lowest byte says whether a daemon is connected: `connection` of
/// `xencons_interface`, after 1024 bytes of input, 2048 of output and four indices of 4.
const CONSOLE_CONNECTION: usize = (1024 + 2048 + 16) / 8;
/// Not connected yet (`XENCONSOLE_DISCONNECTED`); 0 would mean connected.
const DISCONNECTED: u64 = 1;

/// Marks the console ring as not connected, if the host's daemon will mark it connected. An older
/// daemon never would, and the guest would print nothing.
///
/// C: `xc_dom_console_set_disconnected`.
pub(crate) fn disconnect_console(domain: &dyn Domain, ring: Gfn) -> Result<(), RestoreError> {
    let version = domain.xen_version()?;
    if (version.major, version.minor) < CONNECTING_CONSOLE {
        return Ok(());
    }
    let pages = domain.map(&[ring], Access::Write)?;
    match pages.page(0) {
        Some(page) => {
            let rest = page.read_entry(CONSOLE_CONNECTION) & !0xff;
            page.write_entry(CONSOLE_CONNECTION, rest | DISCONNECTED);
        }
        None => tracing::warn!(%ring, "the console ring is a page that the guest does not have"),
    }
    Ok(())
}
