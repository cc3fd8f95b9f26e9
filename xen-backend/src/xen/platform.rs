//! Calls that PV and translated guests have in common: CPU policy, TSC, reserved grants
//! (`grants.rs`).
//!
//! C implementation: `tools/libs/guest/xg_cpuid_x86.c`, `xc_domain_{get,set}_tsc_info`
//! in `tools/libs/ctrl/xc_domain.c`.

use crate::Errno;
use zerocopy::FromZeros;

use super::calls::Calls;
use super::{XenDomain, XenHost, sys};
use crate::error::BackendError;
use crate::privcmd::call::Named;
use crate::{CpuPolicy, Detail, GuestKind, PolicyEntry, RingGrant, TscInfo, X86Platform};

/// Bytes of a CPUID leaf and of an MSR in a policy.
const LEAF: usize = size_of::<sys::xen_cpuid_leaf>();
const MSR: usize = size_of::<sys::xen_msr_entry>();

/// Room for a policy, in entries: at first, and at most. Policies have about 150 leaves and a
/// handful of MSRs.
const FIRST_ROOM: u32 = 512;
const LARGEST_ROOM: u32 = 1 << 16;

/// The largest TSC mode.
const TSC_NEVER_EMULATE: u32 = 2;

fn entries(bytes: &[u8], size: usize) -> Result<u32, Errno> {
    match bytes.len().is_multiple_of(size) {
        true => u32::try_from(bytes.len() / size).map_err(|_| Errno::EINVAL),
        false => Err(Errno::EINVAL),
    }
}

/// A policy, in buffers for `room` entries of either kind, which grow as long as `ask` returns
/// ENOBUFS. `ask` returns the number of leaves and of MSRs.
fn policy_of(
    calls: &Calls,
    ask: impl Fn(u32, Named<'_, '_>) -> Result<(u32, u32), Errno>,
) -> Result<CpuPolicy, Errno> {
    let mut room = FIRST_ROOM;
    loop {
        let count = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
        let mut leaves = calls.raw.buffer(count * LEAF)?;
        let mut msrs = calls.raw.buffer(count * MSR)?;
        let (nr_leaves, nr_msrs) = match ask(room, &mut [&mut leaves, &mut msrs]) {
            Err(Errno::ENOBUFS) if room < LARGEST_ROOM => {
                room *= 2;
                continue;
            }
            answer => answer?,
        };
        let len = |entries: u32, size| match usize::try_from(entries.min(room)) {
            Ok(entries) => Ok(entries * size),
            Err(_) => Err(Errno::EINVAL),
        };
        return Ok(CpuPolicy {
            leaves: Calls::contents(&leaves, len(nr_leaves, LEAF)?),
            msrs: Calls::contents(&msrs, len(nr_msrs, MSR)?),
        });
    }
}

/// One of the hypervisor's own policies (`XEN_SYSCTL_cpu_policy_*`).
fn system_policy(calls: &Calls, index: u32) -> Result<CpuPolicy, Errno> {
    policy_of(calls, |room, named| {
        let mut body = sys::xen_sysctl_cpu_policy::new_zeroed();
        (body.index, body.nr_leaves, body.nr_msrs) = (index, room, room);
        let got = calls.sysctl(sys::XEN_SYSCTL_get_cpu_policy, &body, named)?;
        Ok((got.nr_leaves, got.nr_msrs))
    })
}

/// The largest policy that the machine can offer a guest of this kind.
fn max_policy(calls: &Calls, kind: GuestKind) -> Result<CpuPolicy, Errno> {
    let index = match kind.is_translated() {
        true => sys::XEN_SYSCTL_cpu_policy_hvm_max,
        false => sys::XEN_SYSCTL_cpu_policy_pv_max,
    };
    system_policy(calls, index)
}

/// The name of the call in errors.
const MAX_POLICY: &str = "get_cpu_policy of the host";

impl XenHost {
    /// See [`crate::Host::max_cpu_policy`].
    pub(super) fn most_of_cpu(&self, kind: GuestKind) -> Result<CpuPolicy, BackendError> {
        max_policy(&self.shared.calls, kind).map_err(|errno| BackendError::host(MAX_POLICY, errno))
    }
}

impl XenDomain {
    /// The errno comes with the entry that Xen blames.
    fn set_policy(&self, policy: &CpuPolicy) -> Result<(), (Errno, Option<PolicyEntry>)> {
        let early = |errno| (errno, None);
        let mut body = sys::xen_domctl_cpu_policy::new_zeroed();
        body.nr_leaves = entries(&policy.leaves, LEAF).map_err(early)?;
        body.nr_msrs = entries(&policy.msrs, MSR).map_err(early)?;
        // Xen leaves these values if it blames no entry.
        (body.err_leaf, body.err_subleaf, body.err_msr) = (NOTHING, NOTHING, NOTHING);
        let mut leaves = self.calls().filled(&policy.leaves).map_err(early)?;
        let mut msrs = self.calls().filled(&policy.msrs).map_err(early)?;
        let (cmd, named) = (
            sys::XEN_DOMCTL_set_cpu_policy,
            &mut [&mut leaves, &mut msrs],
        );
        self.calls()
            .domctl_telling(cmd, self.domid, &body, named)
            .map(drop)
            .map_err(|(errno, told)| (errno, told.and_then(|told| blamed(&told))))
    }
}

/// "Nothing", as an index of a leaf or an MSR; for a subleaf also "the leaf has none".
const NOTHING: u32 = u32::MAX;

/// The entry that Xen has reported in the structure.
fn blamed(told: &sys::xen_domctl_cpu_policy) -> Option<PolicyEntry> {
    let some = |index: u32| (index != NOTHING).then_some(index);
    let leaf = some(told.err_leaf).map(|leaf| PolicyEntry::Leaf {
        leaf,
        subleaf: some(told.err_subleaf),
    });
    leaf.or_else(|| some(told.err_msr).map(PolicyEntry::Msr))
}

impl X86Platform for XenDomain {
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        let policy = policy_of(self.calls(), |room, named| {
            let mut body = sys::xen_domctl_cpu_policy::new_zeroed();
            (body.nr_leaves, body.nr_msrs) = (room, room);
            let cmd = sys::XEN_DOMCTL_get_cpu_policy;
            let got = self.calls().domctl_naming(cmd, self.domid, &body, named)?;
            Ok((got.nr_leaves, got.nr_msrs))
        });
        policy.map_err(|errno| self.fail("get_cpu_policy", errno))
    }

    fn host_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        let policy = system_policy(self.calls(), sys::XEN_SYSCTL_cpu_policy_host);
        policy.map_err(|errno| self.fail("host_cpu_policy", errno))
    }

    fn max_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        max_policy(self.calls(), self.kind).map_err(|errno| self.fail(MAX_POLICY, errno))
    }

    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), BackendError> {
        self.set_policy(policy).map_err(|(errno, entry)| {
            let error = self.fail("set_cpu_policy", errno);
            match entry {
                Some(entry) => error.because(Detail::PolicyEntry(entry)),
                None => error,
            }
        })
    }

    fn tsc_info(&self) -> Result<TscInfo, BackendError> {
        let body = sys::xen_domctl_tsc_info::new_zeroed();
        self.calls()
            .domctl(sys::XEN_DOMCTL_gettscinfo, self.domid, &body)
            .map(|info| TscInfo {
                mode: info.tsc_mode,
                khz: info.gtsc_khz,
                nsec: info.elapsed_nsec,
                incarnation: info.incarnation,
            })
            .map_err(|errno| self.fail("gettscinfo", errno))
    }

    fn set_tsc_info(&self, info: &TscInfo) -> Result<(), BackendError> {
        let fail = |errno| self.fail("settscinfo", errno);
        // Not every version of Xen reports this.
        if info.mode > TSC_NEVER_EMULATE {
            return Err(fail(Errno::EINVAL));
        }
        let body = sys::xen_domctl_tsc_info {
            tsc_mode: info.mode,
            gtsc_khz: info.khz,
            incarnation: info.incarnation,
            pad: 0,
            elapsed_nsec: info.nsec,
        };
        self.calls()
            .domctl(sys::XEN_DOMCTL_settscinfo, self.domid, &body)
            .map(drop)
            .map_err(fail)
    }

    fn seed_grants(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), BackendError> {
        self.seed(console, xenstore)
            .map_err(|errno| self.fail("gnttab_seed", errno))
    }
}
