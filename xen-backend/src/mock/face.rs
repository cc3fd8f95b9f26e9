//! Hypercalls on the mock machine: its second face, which answers them like a hypervisor.
//!
//! [`crate::XenHost`] can make the same calls here as on `/dev/xen/privcmd`. The structures are
//! read from the caller's buffers and the answers written to them; all answers come from the same
//! machine. An address outside a live buffer is EFAULT, as it is if a buffer has moved, been freed
//! or is too short.
//!
//! Xen's answers deviate from what the traits promise in some cases, and so do these: a log that is
//! off is read as empty, the next domain answers for one that does not exist, and populating a
//! domain that is gone gives no pages and no error.
//!
//! C implementation: `do_domctl`, `do_memory_op` and the rest of the hypercall table.

mod buffers;
mod domctl;
mod domctl_vcpu;
mod grants;
mod mapping;
mod memory;
#[cfg(feature = "peer")]
pub mod peer;
mod store;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Errno;
use xsr_format::frame::Gfn;
use zerocopy::{FromBytes, IntoBytes};

use self::buffers::Buffers;
use super::MockHost;
use super::domain::{MockDomain, storage_errno};
use super::policy;
use crate::error::BackendError;
use crate::pages::{Access, ForeignPages};
use crate::privcmd::call::{EXTRA_VERSION, GRANT_TABLE_OP};
use crate::privcmd::{Call, CallBuffer, FrameMapping, Hypercalls, Resource};
use crate::sys::common as sys;
use crate::xen::interface::{INTERFACES, Interface, versions};
use crate::xen::{LibxlFiles, OpenError, XenHost};
use crate::{DomId, DomainControl, GuestKind, Host as _, HvmGuest, PvGuest};

/// Bytes of `xen_domctl` and `xen_sysctl` before their unions, and of the unions.
const DOMCTL_HEADER: u64 = 16;
const SYSCTL_HEADER: u64 = 8;
const BODY: usize = 128;

/// `__HYPERVISOR_multicall`, which our own backend does not need.
const MULTICALL: u32 = 13;
/// More entries than the policy of any domain has.
const MAX_LEAVES: u32 = 128;
const MAX_MSRS: u32 = 16;

/// Restrictions that a test imposes on the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Obstacles {
    /// The handle was restricted to one domain: every hypercall fails.
    pub(crate) restricted: bool,
    /// The caller is not the control domain.
    pub(crate) unprivileged: bool,
    /// The kernel cannot map resources.
    pub(crate) no_resources: bool,
    /// No domain's grant table is set up.
    pub(crate) no_tables: bool,
    /// The dirty log reports one page less than requested.
    pub(crate) short_log: bool,
    /// The processors have no nested paging.
    pub(crate) no_nested_paging: bool,
    /// Its scheduler is not the credit scheduler.
    pub(crate) another_scheduler: bool,
    /// No domain may use grant tables of version 2 (`gnttab=max-ver:1`).
    pub(crate) first_grants_only: bool,
}

/// The machine as a hypervisor.
#[derive(Clone)]
pub(crate) struct Face {
    host: MockHost,
    interface: u32,
    sysctl: u32,
    state: Arc<Mutex<State>>,
    buffers: Buffers,
    asked: Arc<Asked>,
}

/// Numbers of calls to the machine. Logged when it is dropped; a benchmark reads the log.
#[derive(Debug, Default)]
struct Asked {
    hypercalls: AtomicU64,
    maps: AtomicU64,
}

impl Drop for Asked {
    fn drop(&mut self) {
        let [hypercalls, maps] = [&mut self.hypercalls, &mut self.maps].map(|n| *n.get_mut());
        tracing::debug!(hypercalls, maps, "asked of the machine");
    }
}

/// State that the machine itself does not keep.
#[derive(Debug, Default)]
struct State {
    obstacles: Obstacles,
    /// MiB for page tables, by domain.
    allocations: BTreeMap<u16, u32>,
    /// Nodes of xenstore, if the machine is in memory.
    nodes: store::Tree,
    /// Rings that xenstore is connected to: frame and event channel, by domain.
    store_rings: BTreeMap<u16, (u64, u32)>,
    /// Domains whose shutdown xenstored has announced.
    announced: BTreeSet<u16>,
    /// Grant tables that are mapped into the guest's own gfns: domain, gfn.
    tables: BTreeSet<(u16, u64)>,
    /// Frames that are paged out, and how many more attempts will find them so.
    paged_out: BTreeMap<(u16, u64), u32>,
    /// The number of coming page-type calls that will find the second half of a buffer migrating.
    faults: u32,
}

impl fmt::Debug for Face {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Face")
            .field("interface", &format_args!("{:#x}", self.interface))
            .finish_non_exhaustive()
    }
}

impl MockHost {
    /// The machine as a hypervisor of its configured version: the same domains, reached by
    /// hypercalls. This is for trials of everything that works on a real Xen.
    ///
    /// # Errors
    ///
    /// [`OpenError::UnknownInterface`] if the machine is newer than Xen 4.22.
    pub fn as_xen(&self) -> Result<XenHost, OpenError> {
        let face = Face::new(self);
        let files = LibxlFiles::of_mock(self.directory());
        XenHost::with_files(Arc::new(face.clone()), Box::new(face), files)
    }
}

impl Face {
    pub(crate) fn new(host: &MockHost) -> Self {
        let (interface, sysctl) = versions(host.config().xen_version.minor);
        Self {
            host: host.clone(),
            interface,
            sysctl,
            state: Arc::default(),
            buffers: Buffers::default(),
            asked: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single step, so a panic leaves no partial state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This version's structure layouts; `None` for a future version.
    fn layout(&self) -> Option<&'static Interface> {
        INTERFACES.iter().find(|i| i.domctl == self.interface)
    }

    fn domain(&self, domid: u16) -> Result<MockDomain, Errno> {
        self.host.mock_domain(DomId(domid)).map_err(errno)
    }

    /// A structure in a buffer.
    fn load<T: FromBytes>(&self, address: u64) -> Result<T, Errno> {
        let bytes = self.buffers.read(address, size_of::<T>())?;
        T::read_from_bytes(&bytes).map_err(|_| Errno::EFAULT)
    }

    /// Write a structure to a buffer.
    fn save<T: IntoBytes + zerocopy::Immutable>(
        &self,
        address: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.buffers.write(address, value.as_bytes())
    }

    fn sysctl(&self, address: u64) -> Result<u64, Errno> {
        let [cmd, version]: [u32; 2] = self.load(address)?;
        if version != self.sysctl {
            return Err(Errno::EACCES);
        }
        if self.state().obstacles.unprivileged {
            return Err(Errno::EPERM);
        }
        let place = address + SYSCTL_HEADER;
        match cmd {
            sys::XEN_SYSCTL_getdomaininfolist => {}
            sys::XEN_SYSCTL_get_cpu_policy => return self.host_policy(place),
            sys::XEN_SYSCTL_physinfo => {
                let info = self.host.physinfo().map_err(errno)?;
                let interface = self.layout().ok_or(Errno::EACCES)?;
                self.buffers
                    .write(place, &(interface.encode_physinfo)(&info))?;
                return Ok(0);
            }
            _ => return Err(Errno::ENOSYS),
        }
        let mut list: sys::xen_sysctl_getdomaininfolist = self.load(place)?;
        let mut bytes = Vec::new();
        let mut found = 0;
        let domains = self.host.machine.all_domains();
        for domain in domains.map_err(|error| storage_errno(&error))? {
            if domain.domid.0 < list.first_domain || found == list.max_domains {
                continue;
            }
            bytes.extend(self.info_bytes(domain.domid.0)?);
            found += 1;
        }
        self.buffers.write(list.buffer, &bytes)?;
        list.num_domains = found;
        self.save(place, &list)?;
        Ok(0)
    }

    /// `XEN_SYSCTL_get_cpu_policy`; without buffers, only their required sizes.
    fn host_policy(&self, place: u64) -> Result<u64, Errno> {
        let mut body: sys::xen_sysctl_cpu_policy = self.load(place)?;
        if (body.leaves, body.msrs) == (0, 0) {
            (body.nr_leaves, body.nr_msrs) = (MAX_LEAVES, MAX_MSRS);
            self.save(place, &body)?;
            return Ok(0);
        }
        let most = |kind| self.host.max_cpu_policy(kind).map_err(errno);
        let policy = match body.index {
            _ if body._rsvd != 0 => return Err(Errno::EINVAL),
            sys::XEN_SYSCTL_cpu_policy_host => policy::host_policy(),
            sys::XEN_SYSCTL_cpu_policy_pv_max => most(GuestKind::Pv)?,
            sys::XEN_SYSCTL_cpu_policy_hvm_max => most(GuestKind::Hvm)?,
            // The others are for tools that examine the processor itself.
            0 | 4 | 5 => return Err(Errno::ENOSYS),
            _ => return Err(Errno::EINVAL),
        };
        let leaf = size_of::<sys::xen_cpuid_leaf>();
        let msr = size_of::<sys::xen_msr_entry>();
        for (bytes, size, room, buffer) in [
            (&policy.leaves, leaf, &mut body.nr_leaves, body.leaves),
            (&policy.msrs, msr, &mut body.nr_msrs, body.msrs),
        ] {
            let entries = u32::try_from(bytes.len() / size).map_err(|_| Errno::EINVAL)?;
            if *room < entries {
                return Err(Errno::ENOBUFS);
            }
            *room = entries;
            self.buffers.write(buffer, bytes)?;
        }
        self.save(place, &body)?;
        Ok(0)
    }

    fn hvm_op(&self, cmd: u64, address: u64) -> Result<u64, Errno> {
        let mut param: sys::xen_hvm_param = self.load(address)?;
        let domain = self.domain(param.domid)?;
        match u32::try_from(cmd) {
            Ok(sys::HVMOP_get_param) => {
                param.value = domain.hvm_param(param.index).map_err(errno)?;
                self.save(address, &param)?;
            }
            Ok(sys::HVMOP_set_param) => domain
                .set_hvm_param(param.index, param.value)
                .map_err(errno)?,
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }

    fn event_channel_op(&self, cmd: u64, address: u64) -> Result<u64, Errno> {
        if cmd != u64::from(sys::EVTCHNOP_alloc_unbound) {
            return Err(Errno::ENOSYS);
        }
        let mut channel: sys::evtchn_alloc_unbound = self.load(address)?;
        let remote = DomId(channel.remote_dom);
        channel.port = self
            .domain(channel.dom)?
            .alloc_unbound_port(remote)
            .map_err(errno)?;
        self.save(address, &channel)?;
        Ok(0)
    }

    fn sched_op(&self, cmd: u64, address: u64) -> Result<u64, Errno> {
        if cmd != u64::from(sys::SCHEDOP_remote_shutdown) {
            return Err(Errno::ENOSYS);
        }
        let shutdown: sys::sched_remote_shutdown = self.load(address)?;
        if shutdown.reason != sys::SHUTDOWN_suspend {
            return Err(Errno::EINVAL);
        }
        let domain = self.domain(shutdown.domain_id)?;
        domain.stop_for_suspend(true).map_err(errno)?;
        Ok(0)
    }

    /// Hypercalls in a list, eight words each: number, result, arguments. Xen's library uses this
    /// for calls whose result may exceed an int.
    fn multicall(&self, list: u64, count: u64) -> Result<u64, Errno> {
        for n in 0..count {
            let place = list + n * 64;
            let [number, _, a, b, c, d, e, _]: [u64; 8] = self.load(place)?;
            let answer = match u32::try_from(number) {
                Ok(MULTICALL) | Err(_) => Err(Errno::ENOSYS),
                Ok(number) => self.answer(number, [a, b, c, d, e]),
            };
            // Like Xen, which returns an error as its negative number.
            let result = answer.unwrap_or_else(|errno| (-i64::from(errno.raw())).cast_unsigned());
            self.save(place + 8, &result)?;
        }
        Ok(0)
    }

    /// `mmuext_op` of pins only: three words each. The command is the lower half of the first word,
    /// whose other half is padding with any content; the second word is the frame.
    fn mmuext_op(&self, [ops, count, done, domid, _]: [u64; 5]) -> Result<u64, Errno> {
        let domid = u16::try_from(domid).map_err(|_| Errno::ESRCH)?;
        let domain = self.domain(domid)?;
        for n in 0..count {
            let place = ops + n * 24;
            let [cmd, _]: [u32; 2] = self.load(place)?;
            let mfn: u64 = self.load(place + 8)?;
            let level = match cmd {
                sys::MMUEXT_PIN_L1_TABLE => 1,
                sys::MMUEXT_PIN_L2_TABLE => 2,
                sys::MMUEXT_PIN_L3_TABLE => 3,
                sys::MMUEXT_PIN_L4_TABLE => 4,
                _ => return Err(Errno::ENOSYS),
            };
            let pinned = domain.pin_tables(&[(level, xsr_format::frame::Mfn(mfn))]);
            if done != 0 {
                let done_now = u32::try_from(n).map_err(|_| Errno::EINVAL)? + 1;
                self.save(done, &done_now)?;
            }
            pinned.map_err(errno)?;
        }
        Ok(0)
    }

    /// Answer a hypercall, also one from a list. An address outside a buffer is EFAULT.
    fn answer(&self, number: u32, arguments: [u64; 5]) -> Result<u64, Errno> {
        if self.state().obstacles.restricted {
            return Err(Errno::EPERM);
        }
        let [first, second, ..] = arguments;
        match number {
            sys::__HYPERVISOR_domctl => self.domctl(first),
            sys::__HYPERVISOR_sysctl => self.sysctl(first),
            sys::__HYPERVISOR_memory_op => self.memory_op(first, second),
            sys::__HYPERVISOR_hvm_op => self.hvm_op(first, second),
            sys::__HYPERVISOR_event_channel_op => self.event_channel_op(first, second),
            sys::__HYPERVISOR_sched_op => self.sched_op(first, second),
            GRANT_TABLE_OP => self.grant_table_op(first, second, arguments[2]),
            MULTICALL => self.multicall(first, second),
            sys::__HYPERVISOR_mmuext_op => self.mmuext_op(arguments),
            sys::__HYPERVISOR_xen_version if first == u64::from(sys::XENVER_version) => {
                let version = self.host.config().xen_version;
                Ok(u64::from(version.major) << 16 | u64::from(version.minor))
            }
            sys::__HYPERVISOR_xen_version if first == u64::from(sys::XENVER_extraversion) => {
                let mut text = [0; EXTRA_VERSION];
                let release = self.host.config().point_release();
                text[..release.len()].copy_from_slice(release.as_bytes());
                self.save(second, &text)?;
                Ok(0)
            }
            _ => Err(Errno::ENOSYS),
        }
    }
}

fn errno(error: BackendError) -> Errno {
    error.errno
}

impl Hypercalls for Face {
    fn hypercall(&self, call: Call<'_>) -> Result<u64, Errno> {
        self.asked.hypercalls.fetch_add(1, Ordering::Relaxed);
        self.answer(call.number(), call.arguments())
    }

    fn buffer(&self, bytes: usize) -> Result<CallBuffer, Errno> {
        Ok(CallBuffer::elsewhere(Box::new(self.buffers.take(bytes))))
    }

    fn reserve(
        &self,
        domid: DomId,
        gfns: &[Gfn],
        access: Access,
    ) -> Result<Box<dyn FrameMapping>, Errno> {
        if self.state().obstacles.unprivileged {
            return Err(Errno::EPERM);
        }
        self.asked.maps.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(mapping::Mapping::new(self, domid, gfns, access)))
    }

    fn map_resource(&self, domid: DomId, resource: Resource) -> Result<ForeignPages, Errno> {
        self.asked.maps.fetch_add(1, Ordering::Relaxed);
        mapping::resource(self, domid, resource)
    }

    fn notify(&self, domid: DomId, port: u32) -> Result<(), Errno> {
        // The only listener is a guest that waits for its suspend request.
        let node = format!("/local/domain/{}/device/suspend/event-channel", domid.0);
        let offered = self.nodes().map_err(|error| error.errno())?.remove(&node);
        match offered == Some(port.to_string().into_bytes()) {
            true => {
                let domain = self.domain(domid.0)?;
                domain.request_suspend().map(drop).map_err(errno)
            }
            false => Err(Errno::EINVAL),
        }
    }
}
