//! A domain of which the n-th call fails.

use std::sync::atomic::{AtomicUsize, Ordering};

use xsr_format::frame::{Gfn, Mfn, PageType};
use xsr_xen_backend::{
    Access, BackendError, CpuPolicy, DirtyBitmap, DirtyRead, DirtyStats, DomId, Domain,
    DomainControl, DomainInfo, Errno, ForeignPages, GuestMemory, HvmGuest, LogDirty, M2p, PvGuest,
    RingGrant, TscInfo, VcpuBlob, X86Platform,
};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// As a whole, with this errno.
    Errno(Errno),
    /// A mapping for its last frame only, a populate for its last extent only; other
    /// calls as a whole.
    Partly,
}

/// Hands every call on to a real domain, but the one whose turn it is.
pub(crate) struct Faulty {
    inner: Box<dyn Domain>,
    fault: Fault,
    at: usize,
    calls: AtomicUsize,
}

impl Faulty {
    /// Call number `at` fails, from 0; `usize::MAX` for none.
    pub(crate) fn new(inner: Box<dyn Domain>, at: usize, fault: Fault) -> Self {
        let calls = AtomicUsize::new(0);
        Self {
            inner,
            fault,
            at,
            calls,
        }
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    fn turn(&self) -> bool {
        self.calls.fetch_add(1, Ordering::Relaxed) == self.at
    }

    fn call<T>(
        &self,
        op: &'static str,
        call: impl FnOnce(&dyn Domain) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        match (self.turn(), self.fault) {
            (false, _) => call(self.inner.as_ref()),
            (true, Fault::Errno(errno)) => Err(BackendError::host(op, errno)),
            (true, Fault::Partly) => Err(BackendError::host(op, Errno::EINVAL)),
        }
    }
}

impl DomainControl for Faulty {
    fn info(&self) -> Result<DomainInfo, BackendError> {
        self.call("info", |d| d.info())
    }
    fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError> {
        self.call("vcpu_online", |d| d.vcpu_online(vcpu))
    }
    fn pause(&self) -> Result<(), BackendError> {
        self.call("pause", |d| d.pause())
    }
    fn unpause(&self) -> Result<(), BackendError> {
        self.call("unpause", |d| d.unpause())
    }
    fn suspend(&self) -> Result<(), BackendError> {
        self.call("suspend", |d| d.suspend())
    }
    fn resume(&self) -> Result<(), BackendError> {
        self.call("resume", |d| d.resume())
    }
    fn destroy(&self) -> Result<(), BackendError> {
        self.call("destroy", |d| d.destroy())
    }
    fn alloc_unbound_port(&self, remote: DomId) -> Result<u32, BackendError> {
        self.call("alloc_unbound_port", |d| d.alloc_unbound_port(remote))
    }
}

impl GuestMemory for Faulty {
    fn maximum_gfn(&self) -> Result<Option<Gfn>, BackendError> {
        self.call("maximum_gfn", |d| d.maximum_gfn())
    }
    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError> {
        self.call("page_types", |d| d.page_types(gfns, out))
    }
    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError> {
        if self.fault != Fault::Partly {
            return self.call("map", |d| d.map(gfns, access));
        }
        let mut gfns = gfns.to_vec();
        if self.turn()
            && let Some(last) = gfns.last_mut()
        {
            *last = Gfn::INVALID;
        }
        self.inner.map(&gfns, access)
    }
    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError> {
        if self.fault != Fault::Partly {
            return self.call("populate", |d| d.populate(order, frames));
        }
        match self.turn() {
            true => {
                let but_one = frames.len().saturating_sub(1);
                self.inner.populate(order, &mut frames[..but_one])
            }
            false => self.inner.populate(order, frames),
        }
    }
    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError> {
        if self.fault != Fault::Partly {
            return self.call("release", |d| d.release(gfns));
        }
        match self.turn() {
            true => self.inner.release(&gfns[..gfns.len().saturating_sub(1)]),
            false => self.inner.release(gfns),
        }
    }
}

impl LogDirty for Faulty {
    fn enable_log_dirty(&self) -> Result<(), BackendError> {
        self.call("enable_log_dirty", |d| d.enable_log_dirty())
    }
    fn disable_log_dirty(&self) -> Result<(), BackendError> {
        self.call("disable_log_dirty", |d| d.disable_log_dirty())
    }
    fn read_dirty(
        &self,
        how: DirtyRead,
        out: &mut DirtyBitmap,
    ) -> Result<DirtyStats, BackendError> {
        self.call("read_dirty", |d| d.read_dirty(how, out))
    }
}

impl X86Platform for Faulty {
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        self.call("cpu_policy", |d| d.cpu_policy())
    }
    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), BackendError> {
        self.call("set_cpu_policy", |d| d.set_cpu_policy(policy))
    }
    fn tsc_info(&self) -> Result<TscInfo, BackendError> {
        self.call("tsc_info", |d| d.tsc_info())
    }
    fn set_tsc_info(&self, info: &TscInfo) -> Result<(), BackendError> {
        self.call("set_tsc_info", |d| d.set_tsc_info(info))
    }
    fn seed_grants(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), BackendError> {
        self.call("seed_grants", |d| d.seed_grants(console, xenstore))
    }
}

impl PvGuest for Faulty {
    fn guest_width(&self) -> Result<u8, BackendError> {
        self.call("guest_width", |d| d.guest_width())
    }
    fn set_guest_width(&self, width: u8) -> Result<(), BackendError> {
        self.call("set_guest_width", |d| d.set_guest_width(width))
    }
    fn m2p(&self) -> Result<M2p, BackendError> {
        self.call("m2p", |d| d.m2p())
    }
    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError> {
        self.call("vcpu_state", |d| d.vcpu_state(vcpu, blob))
    }
    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError> {
        self.call("set_vcpu_state", |d| d.set_vcpu_state(vcpu, blob, state))
    }
    fn pin_tables(&self, tables: &[(u8, Mfn)]) -> Result<(), BackendError> {
        self.call("pin_tables", |d| d.pin_tables(tables))
    }
}

impl HvmGuest for Faulty {
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError> {
        self.call("hvm_context", |d| d.hvm_context())
    }
    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError> {
        self.call("set_hvm_context", |d| d.set_hvm_context(context))
    }
    fn hvm_param(&self, index: u32) -> Result<u64, BackendError> {
        self.call("hvm_param", |d| d.hvm_param(index))
    }
    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError> {
        self.call("set_hvm_param", |d| d.set_hvm_param(index, value))
    }
}
