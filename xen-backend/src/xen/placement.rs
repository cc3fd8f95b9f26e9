//! Placement of a domain, as xapi's emu-manager sets it before a restore: the processors that its
//! vcpus may run on, its share of them, and its wall clock. Also reads the nodes that xapi keeps of
//! the domain in xenstore.
//!
//! C implementation: `xc_vcpu_setaffinity`, `xc_sched_credit_domain_{get,set}` and
//! `xc_domain_set_time_offset` in `tools/libs/ctrl`.

use crate::Errno;

use super::{XenHost, sys};
use crate::DomId;
use crate::error::BackendError;
use crate::privcmd::call::{
    AFFINITY_HARD, SCHEDULER_CREDIT, SCHEDULER_GET, SCHEDULER_OP, SCHEDULER_PUT, SET_VCPU_AFFINITY,
    SchedulerOp, VcpuAffinity,
};

impl XenHost {
    /// The value of the node `/local/domain/N/NAME` of xenstore; `None` if the node does not exist.
    ///
    /// # Errors
    ///
    /// xenstore cannot be reached (ENOTCONN), or refuses.
    pub fn domain_node(&self, domid: DomId, name: &str) -> Result<Option<Vec<u8>>, BackendError> {
        let path = format!("/local/domain/{}/{name}", domid.0);
        self.shared.store.read(&path).map_err(|error| {
            BackendError::domain("xenstore", domid, error.errno()).explained(error.to_string())
        })
    }

    /// Sets the domain's wall clock, in seconds ahead of the host's.
    ///
    /// # Errors
    ///
    /// ESRCH: the domain does not exist.
    pub fn set_time_offset(&self, domid: DomId, seconds: i64) -> Result<(), BackendError> {
        let body = sys::xen_domctl_settimeoffset {
            time_offset_seconds: seconds,
        };
        self.shared
            .calls
            .domctl(sys::XEN_DOMCTL_settimeoffset, domid, &body)
            .map(drop)
            .map_err(|errno| BackendError::domain("settimeoffset", domid, errno))
    }

    /// Lets a vcpu run only on these processors: true for each that it may run on, starting with
    /// processor 0. Processors that the host does not have are ignored.
    ///
    /// # Errors
    ///
    /// EINVAL if no processor is left, or if the domain does not have the vcpu.
    pub fn set_hard_affinity(
        &self,
        domid: DomId,
        vcpu: u32,
        processors: &[bool],
    ) -> Result<(), BackendError> {
        let fail = |errno| BackendError::domain("setvcpuaffinity", domid, errno);
        let byte = |eight: &[bool]| {
            let bits = eight.iter().enumerate();
            bits.fold(0_u8, |byte, (bit, on)| byte | u8::from(*on) << bit)
        };
        let map: Vec<u8> = processors.chunks(8).map(byte).collect();
        let calls = &self.shared.calls;
        let mut hard = calls.filled(&map).map_err(fail)?;
        let body = VcpuAffinity {
            vcpu,
            flags: AFFINITY_HARD,
            hard: 0,
            hard_bits: processors.len() as u64,
            soft: 0,
            soft_bits: 0,
        };
        calls
            .domctl_naming(SET_VCPU_AFFINITY, domid, &body, &mut [&mut hard])
            .map(drop)
            .map_err(fail)
    }

    /// Sets the domain's weight and cap with the credit scheduler; `None` leaves a value unchanged.
    /// Returns false, and changes nothing, if another scheduler is in use.
    ///
    /// # Errors
    ///
    /// EINVAL if the scheduler does not accept the weight or cap.
    pub fn set_credit(
        &self,
        domid: DomId,
        weight: Option<u16>,
        cap: Option<u16>,
    ) -> Result<bool, BackendError> {
        let fail = |errno| BackendError::domain("scheduler_op", domid, errno);
        let calls = &self.shared.calls;
        let body = SchedulerOp {
            scheduler: SCHEDULER_CREDIT,
            cmd: SCHEDULER_GET,
            weight: 0,
            cap: 0,
        };
        let now = match calls.domctl(SCHEDULER_OP, domid, &body) {
            Ok(now) => now,
            Err(Errno::EINVAL) => return Ok(false),
            Err(errno) => return Err(fail(errno)),
        };
        let body = SchedulerOp {
            cmd: SCHEDULER_PUT,
            weight: weight.unwrap_or(now.weight),
            cap: cap.unwrap_or(now.cap),
            ..body
        };
        calls.domctl(SCHEDULER_OP, domid, &body).map_err(fail)?;
        Ok(true)
    }
}
