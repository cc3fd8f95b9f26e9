//! What PV and translated x86 guests have in common: CPU policy and TSC.
//!
//! C implementation: `xg_sr_common_x86.c`.

use xsr_format::record::x86::TscInfo;
use xsr_xen_backend::{CpuPolicy, Domain, TscInfo as DomainTsc};

use crate::error::{RestoreError, SaveError};
use crate::guest::Out;
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

/// Set the TSC as a stream says.
pub(crate) fn set_tsc_info(domain: &dyn Domain, tsc: TscInfo) -> Result<(), RestoreError> {
    Ok(domain.set_tsc_info(&DomainTsc {
        mode: tsc.mode,
        khz: tsc.khz,
        nsec: tsc.nsec,
        incarnation: tsc.incarnation,
    })?)
}

/// Set the CPU policy as a stream says; what of it the stream did not hold.
pub(crate) fn set_cpu_policy(
    domain: &dyn Domain,
    policy: &CpuPolicy,
) -> Result<MissingStaticData, RestoreError> {
    let missing = MissingStaticData {
        cpuid: policy.leaves.is_empty(),
        msr: policy.msrs.is_empty(),
    };
    if !(missing.cpuid && missing.msr) {
        domain.set_cpu_policy(policy)?;
    }
    Ok(missing)
}
