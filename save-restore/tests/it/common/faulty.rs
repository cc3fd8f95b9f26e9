//! A domain with one failing call, in each way in which Xen and the kernel can make that call fail.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use xsr_format::frame::{Gfn, Mfn, PageType};
use xsr_xen_backend::suspend::Withdrawn;
use xsr_xen_backend::{
    Access, BackendError, CpuPolicy, DirtyBitmap, DirtyRead, DirtyStats, DomId, Domain,
    DomainControl, DomainInfo, Errno, ForeignPages, GuestMemory, GuestRole, HvmGuest, LogDirty,
    M2p, MapError, PvGuest, RingGrant, TscInfo, VcpuBlob, X86Platform, XenVersion,
};

/// Which of several frames or extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    First,
    Middle,
    Last,
}

impl Which {
    fn of(self, count: usize) -> usize {
        match self {
            Self::First => 0,
            Self::Middle => count / 2,
            Self::Last => count.saturating_sub(1),
        }
    }
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is refused: nothing was done.
    Errno(Errno),
    /// All was done, and then the answer could not be delivered.
    Late(Errno),
    /// A mapping, or a write of pages, succeeds except for this frame.
    Frame(Which, Errno),
    /// A populate or a release stops before this extent.
    Short(Which),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A call that was made: which, and for how many frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: &'static str,
    pub(crate) frames: usize,
}

/// Errors that every call may return: not privileged, no such domain, a restricted handle or an
/// interface of another version (`xen/common/domctl.c`).
const ANY: [Errno; 3] = [Errno::EPERM, Errno::ESRCH, Errno::EACCES];

/// Further errors that Xen, or the kernel on its behalf, returns for each call: the promises of the
/// traits, `xen/common/{domctl,memory}.c`, `xen/arch/x86/{domctl,mm}.c`,
/// `xen/arch/x86/mm/paging.c`, `xen/arch/x86/hvm/{hvm,save}.c`, and for the mappings Linux'
/// `drivers/xen/privcmd.c`. A library also returns ENOMEM if it has no room for the buffers of a
/// call.
fn errnos(op: &str) -> &'static [Errno] {
    match op {
        "info" | "xen_version" => &[Errno::EFAULT],
        "vcpu_online" => &[Errno::EINVAL, Errno::EFAULT],
        "maximum_gfn" => &[Errno::EFAULT],
        "page_types" => &[Errno::E2BIG, Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM],
        "map" => &[Errno::ENOMEM, Errno::EFAULT, Errno::EINVAL, Errno::ENOTTY],
        "write_pages" => &[Errno::ENOMEM, Errno::EFAULT, Errno::EINVAL],
        "populate" => &[Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM],
        "release" => &[Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM],
        "enable_log_dirty" => &[
            Errno::EINVAL,
            Errno::EOPNOTSUPP,
            Errno::ENOMEM,
            Errno::EBUSY,
        ],
        "disable_log_dirty" => &[Errno::EINVAL, Errno::EBUSY, Errno::ENOMEM],
        "read_dirty" => &[Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM, Errno::EBUSY],
        "cpu_policy" | "max_cpu_policy" => &[
            Errno::ENOBUFS,
            Errno::EFAULT,
            Errno::EOPNOTSUPP,
            Errno::ENOMEM,
        ],
        "set_cpu_policy" => &[
            Errno::EINVAL,
            Errno::EEXIST,
            Errno::E2BIG,
            Errno::EFAULT,
            Errno::ENOENT,
            Errno::ENOMEM,
        ],
        "tsc_info" => &[Errno::EINVAL, Errno::EFAULT],
        "set_tsc_info" => &[Errno::EINVAL],
        "seed_grants" => &[Errno::EINVAL, Errno::EBUSY, Errno::ENOMEM, Errno::ENXIO],
        "guest_width" => &[Errno::EOPNOTSUPP],
        "set_guest_width" => &[Errno::EINVAL, Errno::EOPNOTSUPP, Errno::ENOMEM],
        "m2p" => &[Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM],
        "vcpu_state" => &[
            Errno::EINVAL,
            Errno::ENODATA,
            Errno::ENOBUFS,
            Errno::EFAULT,
            Errno::ENOMEM,
        ],
        "set_vcpu_state" => &[
            Errno::EINVAL,
            Errno::EBUSY,
            Errno::EOPNOTSUPP,
            Errno::ENXIO,
            Errno::EFAULT,
            Errno::ENOMEM,
        ],
        "pin_tables" => &[Errno::EINVAL, Errno::EBUSY, Errno::ENOMEM, Errno::EFAULT],
        "hvm_context" => &[Errno::EINVAL, Errno::ENOSPC, Errno::ENOMEM, Errno::EFAULT],
        "set_hvm_context" => &[
            Errno::EINVAL,
            Errno::ENODATA,
            Errno::ENOENT,
            Errno::ENOMEM,
            Errno::EFAULT,
        ],
        "hvm_param" => &[Errno::EINVAL, Errno::EFAULT],
        "set_hvm_param" => &[Errno::EINVAL, Errno::EEXIST, Errno::EFAULT, Errno::ENOMEM],
        _ => &[Errno::EINVAL],
    }
}

/// Why one frame of a mapping fails: no such frame, paged out, not ours, no memory for
/// its page table, a frame that may not be mapped this way.
const FRAME_ERRNOS: [Errno; 5] = [
    Errno::EINVAL,
    Errno::ENOENT,
    Errno::EPERM,
    Errno::ENOMEM,
    Errno::EFAULT,
];

impl Call {
    /// All the ways in which it can fail.
    pub(crate) fn faults(self) -> Vec<Fault> {
        let known = errnos(self.op);
        let whole = ANY.iter().chain(known).copied();
        let mut faults: Vec<Fault> = whole.map(Fault::Errno).collect();
        faults.push(Fault::Late(known.last().copied().unwrap_or(Errno::EFAULT)));
        let places: BTreeSet<usize> = [Which::First, Which::Middle, Which::Last]
            .map(|which| which.of(self.frames))
            .into();
        let which = [Which::First, Which::Last, Which::Middle];
        let which = which.into_iter().take(places.len());
        match self.op {
            "map" | "write_pages" if self.frames > 0 => {
                faults.extend(which.flat_map(|w| FRAME_ERRNOS.map(|errno| Fault::Frame(w, errno))))
            }
            "populate" | "release" if self.frames > 0 => faults.extend(which.map(Fault::Short)),
            _ => {}
        }
        faults
    }
}

/// Which calls of a run should fail: all, but in a row of identical calls only the first, the last
/// and every hundredth.
pub(crate) fn turns(trace: &[Call]) -> Vec<(usize, Call)> {
    let edge = |at: usize| {
        let neighbours = [at.checked_sub(1), at.checked_add(1)];
        let same = |at: Option<usize>, call| at.and_then(|at| trace.get(at)) == Some(call);
        move |call| !neighbours.iter().all(|at| same(*at, call))
    };
    let calls = trace.iter().enumerate();
    calls
        .filter(|(at, call)| at % 101 == 0 || edge(*at)(call))
        .map(|(at, call)| (at, *call))
        .collect()
}

/// The call that the fault met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Struck {
    pub(crate) op: &'static str,
    /// The frame that could not be mapped or given back, the pfn that got no memory.
    pub(crate) frame: Option<Gfn>,
}

/// Passes every call on to a real domain, except the one that fails.
pub(crate) struct Faulty {
    inner: Box<dyn Domain>,
    fault: Option<(usize, Fault)>,
    /// Reports that pages should be mapped rather than written, as a real Xen does.
    maps: bool,
    calls: AtomicUsize,
    trace: Mutex<Vec<Call>>,
    struck: Mutex<Option<Struck>>,
    before_map: Option<Box<dyn Fn() + Send + Sync>>,
    /// Does not report its largest gfn.
    has_no_page: bool,
    /// The most that the host claims to be able to give it.
    most: Option<CpuPolicy>,
}

impl Faulty {
    /// Call number `at` fails, from 0.
    pub(crate) fn new(inner: Box<dyn Domain>, at: usize, fault: Fault) -> Self {
        Self {
            fault: Some((at, fault)),
            ..Self::watching(inner)
        }
    }

    /// No call fails, and all are recorded.
    pub(crate) fn watching(inner: Box<dyn Domain>) -> Self {
        Self {
            inner,
            fault: None,
            maps: false,
            calls: AtomicUsize::new(0),
            trace: Mutex::default(),
            struck: Mutex::default(),
            before_map: None,
            has_no_page: false,
            most: None,
        }
    }

    /// No call fails, but the guest does `act` whenever frames are about to be mapped: between
    /// reading their types and reading their contents.
    pub(crate) fn meddled(inner: Box<dyn Domain>, act: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            before_map: Some(Box::new(act)),
            ..Self::watching(inner)
        }
    }

    /// No call fails, but the domain reports that it has no page.
    pub(crate) fn without_pages(inner: Box<dyn Domain>) -> Self {
        Self {
            has_no_page: true,
            ..Self::watching(inner)
        }
    }

    /// Sets the CPU that the host claims to be able to give it.
    pub(crate) fn with_most(self, most: CpuPolicy) -> Self {
        Self {
            most: Some(most),
            ..self
        }
    }

    /// Sets whether pages should be mapped rather than written.
    pub(crate) fn mapping(self, maps: bool) -> Self {
        Self { maps, ..self }
    }

    /// The calls that were made, in order.
    pub(crate) fn trace(&self) -> Vec<Call> {
        self.trace.lock().unwrap().clone()
    }

    /// The call that the fault met, if its turn has come.
    pub(crate) fn struck(&self) -> Option<Struck> {
        *self.struck.lock().unwrap()
    }

    fn strike(&self, op: &'static str, frame: Option<Gfn>) {
        *self.struck.lock().unwrap() = Some(Struck { op, frame });
    }

    /// Counts a call; returns the fault if this is its turn.
    fn turn(&self, op: &'static str, frames: usize) -> Option<Fault> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            None => {
                self.trace.lock().unwrap().push(Call { op, frames });
                None
            }
            Some((at, fault)) => (number == at).then_some(fault),
        }
    }

    fn fail(&self, op: &'static str, errno: Errno) -> BackendError {
        self.strike(op, None);
        BackendError::host(op, errno)
    }

    fn call<T>(
        &self,
        op: &'static str,
        call: impl FnOnce(&dyn Domain) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let turn = self.turn(op, 0);
        self.call_whole(op, turn, call)
    }

    fn call_whole<T>(
        &self,
        op: &'static str,
        turn: Option<Fault>,
        call: impl FnOnce(&dyn Domain) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        match turn {
            None => call(self.inner.as_ref()),
            Some(Fault::Late(errno)) => {
                drop(call(self.inner.as_ref())?);
                Err(self.fail(op, errno))
            }
            Some(Fault::Errno(errno) | Fault::Frame(_, errno)) => Err(self.fail(op, errno)),
            Some(Fault::Short(_)) => Err(self.fail(op, Errno::EINVAL)),
        }
    }
}

impl DomainControl for Faulty {
    fn xen_version(&self) -> Result<XenVersion, BackendError> {
        self.call("xen_version", |d| d.xen_version())
    }
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
    fn request_suspend(&self) -> Result<bool, BackendError> {
        self.call("suspend", |d| d.request_suspend())
    }
    fn withdraw_suspend(&self) -> Result<Withdrawn, BackendError> {
        self.call("withdraw_suspend", |d| d.withdraw_suspend())
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
        let largest = self.call("maximum_gfn", |d| d.maximum_gfn());
        largest.map(|gfn| gfn.filter(|_| !self.has_no_page))
    }
    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError> {
        let turn = self.turn("page_types", gfns.len());
        self.call_whole("page_types", turn, |d| d.page_types(gfns, out))
    }
    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError> {
        if let Some(act) = &self.before_map {
            act();
        }
        let turn = self.turn("map", gfns.len());
        let Some(Fault::Frame(which, errno)) = turn else {
            return self.call_whole("map", turn, |d| d.map(gfns, access));
        };
        let mut pages = self.inner.map(gfns, access)?;
        let index = which.of(gfns.len());
        if let Some(gfn) = gfns.get(index) {
            pages.refuse(index, *gfn, errno);
            self.strike("map", Some(*gfn));
        }
        Ok(pages)
    }
    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError> {
        let turn = self.turn("populate", frames.len());
        let Some(Fault::Short(which)) = turn else {
            return self.call_whole("populate", turn, |d| d.populate(order, frames));
        };
        let (got, rest) = frames.split_at_mut(which.of(frames.len()));
        self.strike("populate", rest.first().copied());
        self.inner.populate(order, got)
    }
    fn write_pages(&self, gfns: &[Gfn], contents: &[u8]) -> Result<Vec<MapError>, BackendError> {
        let turn = self.turn("write_pages", gfns.len());
        let Some(Fault::Frame(which, errno)) = turn else {
            return self.call_whole("write_pages", turn, |d| d.write_pages(gfns, contents));
        };
        let index = which.of(gfns.len());
        let mut failed = self.inner.write_pages(gfns, contents)?;
        if let Some(gfn) = gfns.get(index).copied() {
            failed.push(MapError { index, gfn, errno });
            self.strike("write_pages", Some(gfn));
        }
        Ok(failed)
    }
    fn writing_is_cheaper(&self) -> bool {
        !self.maps && self.inner.writing_is_cheaper()
    }
    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError> {
        let turn = self.turn("release", gfns.len());
        let Some(Fault::Short(which)) = turn else {
            return self.call_whole("release", turn, |d| d.release(gfns));
        };
        let (gone, rest) = gfns.split_at(which.of(gfns.len()));
        self.strike("release", rest.first().copied());
        self.inner.release(gone)
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
    fn logs_new_pages(&self) -> Result<bool, BackendError> {
        self.call("logs_new_pages", |d| d.logs_new_pages())
    }
}

impl X86Platform for Faulty {
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        self.call("cpu_policy", |d| d.cpu_policy())
    }
    fn host_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        self.call("host_cpu_policy", |d| d.host_cpu_policy())
    }
    fn max_cpu_policy(&self) -> Result<CpuPolicy, BackendError> {
        let most = self.call("max_cpu_policy", |d| d.max_cpu_policy())?;
        Ok(self.most.clone().unwrap_or(most))
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

impl Domain for Faulty {
    fn guest_role(&self) -> GuestRole<'_> {
        match self.inner.guest_role() {
            GuestRole::Pv(_) => GuestRole::Pv(self),
            GuestRole::Hvm(_) => GuestRole::Hvm(self),
        }
    }
}

fn pv(domain: &dyn Domain) -> &dyn PvGuest {
    domain.pv().expect("the engine asked for the role")
}

fn hvm(domain: &dyn Domain) -> &dyn HvmGuest {
    domain.hvm().expect("the engine asked for the role")
}

impl PvGuest for Faulty {
    fn guest_width(&self) -> Result<u8, BackendError> {
        self.call("guest_width", |d| pv(d).guest_width())
    }
    fn set_guest_width(&self, width: u8) -> Result<(), BackendError> {
        self.call("set_guest_width", |d| pv(d).set_guest_width(width))
    }
    fn m2p(&self) -> Result<M2p, BackendError> {
        self.call("m2p", |d| pv(d).m2p())
    }
    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError> {
        self.call("vcpu_state", |d| pv(d).vcpu_state(vcpu, blob))
    }
    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError> {
        self.call("set_vcpu_state", |d| {
            pv(d).set_vcpu_state(vcpu, blob, state)
        })
    }
    fn pin_tables(&self, tables: &[(u8, Mfn)]) -> Result<(), BackendError> {
        self.call("pin_tables", |d| pv(d).pin_tables(tables))
    }
}

impl HvmGuest for Faulty {
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError> {
        self.call("hvm_context", |d| hvm(d).hvm_context())
    }
    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError> {
        self.call("set_hvm_context", |d| hvm(d).set_hvm_context(context))
    }
    fn hvm_param(&self, index: u32) -> Result<u64, BackendError> {
        self.call("hvm_param", |d| hvm(d).hvm_param(index))
    }
    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError> {
        self.call("set_hvm_param", |d| hvm(d).set_hvm_param(index, value))
    }
}
