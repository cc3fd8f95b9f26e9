//! CPU policy, TSC, and the calls for translated guests, on the mock machine.
//!
//! C implementation: `xen/arch/x86/{time,domctl,cpu-policy}.c`,
//! `xen/arch/x86/hvm/{hvm,save}.c`.

use crate::Errno;

use super::domain::MockDomain;
use super::hvm_context;
use super::policy;
use super::state::{CPUID_LEAVES, HVM_CONTEXT, POLICY_MSRS};
use crate::error::BackendError;
use crate::{CpuPolicy, Detail, HvmGuest, RingGrant, TscInfo, X86Platform};

/// The machine's TSC frequency, the default for a guest.
pub(super) const HOST_KHZ: u32 = 2_596_120;

/// Never emulate: the guest sees the machine's TSC, and there is no offset to report. The largest
/// mode.
const TSC_NEVER_EMULATE: u32 = 2;

/// The number of HVM parameters.
pub(super) const HVM_PARAMS: usize = 39;

/// Numbers of HVM parameters (`xen/include/public/hvm/params.h`).
pub(super) mod param {
    pub(in super::super) const STORE_PFN: u32 = 1;
    pub(in super::super) const STORE_EVTCHN: u32 = 2;
    pub(in super::super) const IOREQ_PFN: u32 = 5;
    pub(in super::super) const BUFIOREQ_PFN: u32 = 6;
    pub(super) const VIRIDIAN: u32 = 9;
    pub(in super::super) const TIMER_MODE: u32 = 10;
    pub(in super::super) const IDENT_PT: u32 = 12;
    pub(super) const ACPI_S_STATE: u32 = 14;
    pub(super) const VM86_TSS: u32 = 15;
    pub(in super::super) const CONSOLE_PFN: u32 = 17;
    pub(in super::super) const CONSOLE_EVTCHN: u32 = 18;
    pub(in super::super) const ACPI_IOPORTS_LOCATION: u32 = 19;
    pub(in super::super) const PAGING_RING_PFN: u32 = 27;
    pub(in super::super) const MONITOR_RING_PFN: u32 = 28;
    pub(in super::super) const SHARING_RING_PFN: u32 = 29;
    pub(super) const TRIPLE_FAULT_REASON: u32 = 31;
    pub(in super::super) const IOREQ_SERVER_PFN: u32 = 32;
    pub(in super::super) const NR_IOREQ_SERVER_PAGES: u32 = 33;
    pub(super) const ALTP2M: u32 = 35;
    pub(super) const X87_FIP_WIDTH: u32 = 36;
    pub(in super::super) const VM86_TSS_SIZED: u32 = 37;
    pub(super) const MCA_CAP: u32 = 38;
    /// Parameters that are no longer used.
    pub(super) const DEPRECATED: [u32; 10] = [4, 13, 20, 21, 22, 23, 24, 25, 26, 30];
}

/// Bytes of a 32-bit TSS: the least, and the largest that makes sense, with interrupt redirection
/// and I/O bitmaps.
const TSS_MIN: u64 = 104;
const TSS_MAX: u64 = TSS_MIN + 0x100 / 8 + 0x1_0000 / 8 + 1;

/// The value to store for a parameter that is being set, or Xen's errno.
fn check_param(index: u32, value: u64, old: u64) -> Result<(usize, u64), Errno> {
    let slot = usize::try_from(index)
        .ok()
        .filter(|slot| *slot < HVM_PARAMS);
    let slot = slot.ok_or(Errno::EINVAL)?;
    if param::DEPRECATED.contains(&index) {
        return Err(Errno::EINVAL);
    }
    let once = matches!(
        index,
        param::VIRIDIAN
            | param::IOREQ_PFN
            | param::BUFIOREQ_PFN
            | param::IOREQ_SERVER_PFN
            | param::NR_IOREQ_SERVER_PAGES
            | param::MCA_CAP
    );
    if index == param::ALTP2M || (once && old != 0 && value != old) {
        return Err(Errno::EEXIST);
    }
    let in_range = match index {
        param::TIMER_MODE => value <= 3,
        // Bit 0 (the base set) is required with any other bit.
        param::VIRIDIAN => value & !0x1fff == 0 && value & 1 == 1,
        param::ACPI_S_STATE => matches!(value, 0 | 3),
        param::ACPI_IOPORTS_LOCATION => value <= 1,
        param::TRIPLE_FAULT_REASON => value <= 5,
        param::NR_IOREQ_SERVER_PAGES => (1..=64).contains(&value),
        param::X87_FIP_WIDTH => matches!(value, 0 | 4 | 8),
        param::VM86_TSS => value <= u64::from(u32::MAX),
        param::VM86_TSS_SIZED => value >> 32 >= TSS_MIN,
        param::MCA_CAP => value <= 1,
        _ => true,
    };
    if !in_range {
        return Err(Errno::EINVAL);
    }
    Ok(match index {
        // Old firmware gives only the address; the size is then 128 bytes.
        param::VM86_TSS => (
            param::VM86_TSS_SIZED as usize,
            if value == 0 { 0 } else { value | 128 << 32 },
        ),
        param::VM86_TSS_SIZED => (
            slot,
            value & u64::from(u32::MAX) | (value >> 32).min(TSS_MAX) << 32,
        ),
        _ => (slot, value),
    })
}

impl X86Platform for MockDomain {
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        self.look("get_cpu_policy", |state| {
            let blob = |name| state.blobs.get(name).cloned().unwrap_or_default();
            Ok(CpuPolicy {
                leaves: blob(CPUID_LEAVES),
                msrs: blob(POLICY_MSRS),
            })
        })
    }

    fn host_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        self.look("host_cpu_policy", |_| Ok(policy::host_policy()))
    }

    fn max_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        const OP: &str = "get_cpu_policy of the host";
        let processor = &self.machine.config.processor;
        self.look(OP, |_| Ok(processor.max_policy(self.dom.kind)))
    }

    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), BackendError> {
        let mut blamed = None;
        let set = self.change("set_cpu_policy", |state| {
            if state.record.has_run {
                return Err(Errno::EEXIST);
            }
            if let Err((errno, entry)) = policy::check(self.dom.kind, policy) {
                blamed = entry;
                return Err(errno);
            }
            let policy = self.machine.config.processor.clamp(self.dom.kind, policy);
            for (name, half) in [(CPUID_LEAVES, &policy.leaves), (POLICY_MSRS, &policy.msrs)] {
                if !half.is_empty() {
                    self.put_blob(state, name, half.clone())?;
                }
            }
            Ok(())
        });
        set.map_err(|error| match blamed {
            Some(entry) => error.because(Detail::PolicyEntry(entry)),
            None => error,
        })
    }

    fn tsc_info(&self) -> Result<TscInfo, BackendError> {
        self.look("gettscinfo", |state| {
            let tsc = state.record.tsc;
            Ok(match tsc.mode {
                TSC_NEVER_EMULATE => TscInfo {
                    khz: 0,
                    nsec: 0,
                    ..tsc
                },
                _ => tsc,
            })
        })
    }

    fn set_tsc_info(&self, info: &TscInfo) -> Result<(), BackendError> {
        self.change("settscinfo", |state| {
            if info.mode > TSC_NEVER_EMULATE {
                return Err(Errno::EINVAL);
            }
            state.record.tsc = TscInfo {
                khz: match info.khz {
                    0 => HOST_KHZ,
                    khz => khz,
                },
                incarnation: info.incarnation.wrapping_add(1),
                ..*info
            };
            Ok(())
        })
    }

    fn seed_grants(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), BackendError> {
        self.look("gnttab_seed", |state| {
            self.set_grants(state, console, xenstore)
        })
    }
}

impl MockDomain {
    fn translated(&self, op: &'static str) -> Result<(), BackendError> {
        match self.dom.kind.is_translated() {
            true => Ok(()),
            false => Err(self.fail(op, Errno::EINVAL)),
        }
    }
}

impl HvmGuest for MockDomain {
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError> {
        const OP: &str = "gethvmcontext";
        self.translated(OP)?;
        self.look(OP, |state| {
            state.blobs.get(HVM_CONTEXT).cloned().ok_or(Errno::EINVAL)
        })
    }

    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError> {
        const OP: &str = "sethvmcontext";
        self.translated(OP)?;
        self.change(OP, |state| {
            let vcpus = state.record.vcpus.len();
            let (end, online) = hvm_context::check(context, vcpus)?;
            // Bytes after the end marker are ignored.
            self.put_blob(state, HVM_CONTEXT, context[..end].to_vec())?;
            for (vcpu, online) in state.record.vcpus.iter_mut().zip(online) {
                vcpu.online = online;
            }
            Ok(())
        })
    }

    fn hvm_param(&self, index: u32) -> Result<u64, BackendError> {
        const OP: &str = "get_param";
        self.translated(OP)?;
        self.look(OP, |state| {
            let slot = usize::try_from(index).map_err(|_| Errno::EINVAL)?;
            if slot >= HVM_PARAMS || param::DEPRECATED.contains(&index) {
                return Err(Errno::EINVAL);
            }
            Ok(match index {
                param::VM86_TSS => {
                    state.record.hvm_params[param::VM86_TSS_SIZED as usize] & u64::from(u32::MAX)
                }
                _ => state.record.hvm_params[slot],
            })
        })
    }

    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError> {
        const OP: &str = "set_param";
        self.translated(OP)?;
        self.change(OP, |state| {
            let params = &mut state.record.hvm_params;
            let old = usize::try_from(index)
                .ok()
                .and_then(|slot| params.get(slot));
            let (slot, value) = check_param(index, value, old.copied().unwrap_or(0))?;
            params[slot] = value;
            Ok(())
        })
    }
}
