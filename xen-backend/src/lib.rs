//! The interface to a hypervisor: object-safe role traits whose methods document their guarantees,
//! units and errno.
//!
//! A [`Host`] opens domains; a [`Domain`] plays every role, except that it is either a [`PvGuest`] or
//! an [`HvmGuest`] ([`GuestRole`]). Frames are [`Gfn`]s throughout: the pfn
//! of an HVM guest, the mfn of a PV guest. Only [`LogDirty`] reports [`Pfn`]s, for either kind.
//!
//! | trait | what it is for |
//! |---|---|
//! | [`Host`] | the machine: its version, its domains, a new one |
//! | [`DomainControl`] | a domain's life: pause, suspend, resume, destroy |
//! | [`GuestMemory`] | its frames: types, mapping, populating, releasing |
//! | [`LogDirty`] | the pages that a running guest writes |
//! | [`X86Platform`] | CPU policy, TSC, grants of the rings |
//! | [`PvGuest`], [`HvmGuest`] | what only one kind of guest has |
//! | [`DomainStore`](domain_store::DomainStore) | what a toolstack keeps: name, configuration, lock |
//!
//! [`XenHost`] implements them on a real Xen. With the feature `mock`, `mock::MockHost` is a machine
//! with real memory that runs anywhere; the examples of the traits use it. With the feature
//! `contract`, `contract` checks any other implementation.
//!
//! Every call may also fail with EPERM (not privileged), ESRCH (the domain is gone) and, over a
//! restricted handle, EACCES; these are not repeated below.

#![deny(unsafe_code)]

#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod domain_store;
mod errno;
pub mod error;
mod log_dirty;
#[cfg(feature = "mock")]
pub mod mock;
mod new_domain;
#[allow(unsafe_code, reason = "one of the rooms for it: mapped foreign pages")]
pub mod pages;
#[allow(
    unsafe_code,
    reason = "one of the rooms for it: ioctls and what they map"
)]
mod privcmd;
pub mod suspend;
mod sys;
mod uuid;
mod xen;
mod xenstore;

use std::fmt;

#[cfg(feature = "mock")]
use serde::{Deserialize, Serialize};
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, PageType, Pfn};

use suspend::{SuspendError, Withdrawn};

pub use errno::Errno;
pub use error::{BackendError, Detail, MapError, PolicyEntry};
pub use log_dirty::{DirtyBitmap, DirtyRead, DirtyStats, LogDirty};
pub use new_domain::{DomainSettings, NewDomain};
pub use pages::{Access, ForeignPage, ForeignPages, Gather, Unwritten, WriteCall};
pub use uuid::{BadUuid, Uuid};
pub use xen::{MemoryNode, OpenError, Ring, XenHost, known_versions};

/// A domain's number, 0–0x7fef; 0 is the control domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
pub struct DomId(pub u16);

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain {}", self.0)
    }
}

/// The version of the hypervisor, as the domain header of an image states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
pub struct XenVersion {
    /// 4 for Xen 4.17.
    pub major: u16,
    /// 17 for Xen 4.17.
    pub minor: u16,
}

impl fmt::Display for XenVersion {
    /// `4.17`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// How a guest is virtualised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
#[cfg_attr(feature = "mock", serde(rename_all = "lowercase"))]
pub enum GuestKind {
    /// Paravirtualised: the guest maintains its own page tables and p2m.
    Pv,
    /// Hardware-virtualised, with a device model. Saved as x86 HVM.
    Hvm,
    /// Hardware-virtualised, without a device model. Saved as x86 HVM.
    Pvh,
}

impl GuestKind {
    /// The most vcpus that a domain of this kind can have (`MAX_VIRT_CPUS`, `HVM_MAX_VCPUS`).
    pub const fn max_vcpus(self) -> u32 {
        match self {
            Self::Pv => 8192,
            Self::Hvm | Self::Pvh => 128,
        }
    }

    /// The usual name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pv => "PV",
            Self::Hvm => "HVM",
            Self::Pvh => "PVH",
        }
    }

    /// Whether Xen translates the guest's frames (HVM and PVH).
    pub const fn is_translated(self) -> bool {
        matches!(self, Self::Hvm | Self::Pvh)
    }
}

/// Why a domain shut down (`SHUTDOWN_*` in `xen/include/public/sched.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
#[cfg_attr(feature = "mock", serde(rename_all = "lowercase"))]
pub enum ShutdownReason {
    /// 0
    Poweroff,
    /// 1
    Reboot,
    /// 2: the guest is ready to be saved.
    Suspend,
    /// 3
    Crash,
    /// 4
    Watchdog,
    /// 5
    SoftReset,
}

impl fmt::Display for ShutdownReason {
    /// Xen's name for the reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Poweroff => "poweroff",
            Self::Reboot => "reboot",
            Self::Suspend => "suspend",
            Self::Crash => "crash",
            Self::Watchdog => "watchdog",
            Self::SoftReset => "soft reset",
        })
    }
}

/// The information that `getdomaininfo` returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// The domain's number.
    pub domid: DomId,
    /// The UUID that its toolstack gave it; [`Uuid::NIL`] if it has none.
    pub uuid: Uuid,
    /// PV, HVM or PVH.
    pub kind: GuestKind,
    /// Set once the domain has shut down.
    pub shutdown: Option<ShutdownReason>,
    /// Paused by the toolstack (not by shutting down).
    pub paused: bool,
    /// Being destroyed.
    pub dying: bool,
    /// The largest number that a vcpu of the domain can have.
    pub max_vcpu_id: u32,
    /// Pages that the domain has.
    pub tot_pages: u64,
    /// Pages that the domain may have.
    pub max_pages: u64,
    /// The frame of shared_info; for a PV guest its mfn.
    pub shared_info_frame: Gfn,
}

/// The blobs Xen keeps for a PV vcpu. All little endian, as in Xen's public headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VcpuBlob {
    /// `vcpu_guest_context` of the guest's width: 0x1430 bytes (64-bit) or 0xaf0.
    Basic,
    /// `xen_domctl_ext_vcpucontext`, at most 128 bytes.
    Extended,
    /// XSAVE area: two u64 (xfeature mask, xcr0) and the area itself.
    Xsave,
    /// MSRs: entries of 16 bytes (u32 index, u32 zero, u64 value).
    Msrs,
}

/// A domain's TSC, as X86_TSC_INFO holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
pub struct TscInfo {
    /// 0 default, 1 always emulate, 2 never emulate. 3 was pvrdtscp in older versions.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Elapsed time in nanoseconds.
    pub nsec: u64,
    /// The number of migrations.
    pub incarnation: u32,
}

/// What a machine has for its domains (`XEN_SYSCTL_physinfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysInfo {
    /// Pages of memory.
    pub total_pages: u64,
    /// Pages that no domain has.
    pub free_pages: u64,
    /// Of `free_pages`, those claimed for domains that are being built.
    pub outstanding_pages: u64,
    /// Frequency of the processors' TSC in kHz.
    pub cpu_khz: u32,
    /// Whether it runs PV guests.
    pub pv: bool,
    /// Whether it runs HVM and PVH guests.
    pub hvm: bool,
    /// Whether the processor translates their addresses (HAP: EPT or NPT).
    pub hap: bool,
    /// Whether Xen can shadow page tables: a live save of a PV guest needs that, and so does a
    /// translated guest without HAP.
    pub shadow: bool,
}

impl PhysInfo {
    /// Pages that a new domain can have.
    pub const fn available_pages(&self) -> u64 {
        self.free_pages.saturating_sub(self.outstanding_pages)
    }
}

/// A domain's CPU policy, serialised as in X86_CPUID_POLICY and X86_MSR_POLICY.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {
    /// CPUID leaves, 24 bytes each (leaf, subleaf, eax, ebx, ecx, edx), little endian.
    pub leaves: Vec<u8>,
    /// MSRs, 16 bytes each (u32 index, u32 flags, u64 value), little endian.
    pub msrs: Vec<u8>,
}

/// A ring of xenstore or the console, and the domain that serves it, as a reserved entry of the
/// grant table names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingGrant {
    /// The ring's frame (HVM: pfn, PV: mfn); `None` leaves the entry alone.
    pub gfn: Option<Gfn>,
    /// The domain that may map the ring.
    pub backend: DomId,
}

/// The machine-to-physical table, mapped for reading.
#[derive(Debug)]
pub struct M2p {
    table: ForeignPages,
    max_mfn: Mfn,
    compat_first: Mfn,
}

impl M2p {
    /// `table` holds a u64 pfn per mfn from mfn 0 to `max_mfn`; `compat_first` is
    /// the first mfn of the table that 32-bit guests see, which their page tables
    /// may refer to (C: `compat_m2p_mfn0`).
    pub fn new(table: ForeignPages, max_mfn: Mfn, compat_first: Mfn) -> Self {
        Self {
            table,
            max_mfn,
            compat_first,
        }
    }

    /// The machine's largest mfn.
    pub fn max_mfn(&self) -> Mfn {
        self.max_mfn
    }

    /// First frame of the compat table.
    pub fn compat_first(&self) -> Mfn {
        self.compat_first
    }

    /// The table's entry for `mfn`: the pfn if the frame belongs to a guest, any value otherwise. A
    /// caller checks it against the p2m. `None` beyond [`M2p::max_mfn`].
    pub fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        if mfn > self.max_mfn {
            return None;
        }
        let index = usize::try_from(mfn.0).ok()?;
        self.table.read_u64(index).map(Pfn)
    }
}

/// The machine as a whole.
/// ```
/// use xsr_xen_backend::mock::{HostConfig, MockHost};
/// use xsr_xen_backend::{GuestKind, Host, NewDomain};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let host = MockHost::ephemeral(&HostConfig::default())?;
/// let new = NewDomain::new(GuestKind::Pvh, 2, 2048);
/// let domid = host.create(&new)?;
/// let found = host.domains()?;
/// assert_eq!(found[0].domid, domid);
/// assert!(found[0].paused, "until its toolstack lets it run");
/// host.domain(domid)?.destroy()?;
/// assert!(host.domain(domid).is_err(), "ESRCH");
/// # Ok(())
/// # }
/// ```
pub trait Host: Send + Sync {
    /// The hypervisor's version.
    fn xen_version(&self) -> Result<XenVersion, BackendError>;

    /// All domains except the control domain, in ascending order.
    fn domains(&self) -> Result<Vec<DomainInfo>, BackendError>;

    /// A handle on one domain. Fails with ESRCH if the domain does not exist.
    fn domain(&self, domid: DomId) -> Result<Box<dyn Domain>, BackendError>;

    /// The largest policy that this machine can offer a guest of this kind
    /// (`XEN_SYSCTL_get_cpu_policy`, `pv_max` and `hvm_max`). A guest gets no feature outside it,
    /// whatever the guest's policy says: [`xsr_format::cpu_policy::missing`] compares them. A guest
    /// with shadow page tables gets less, and one without nested virtualisation gets neither VMX
    /// nor SVM. EOPNOTSUPP if the hypervisor has no guests of this kind.
    fn max_cpu_policy(&self, kind: GuestKind) -> Result<CpuPolicy, BackendError>;

    /// The machine's memory, clock and capabilities (`XEN_SYSCTL_physinfo`).
    fn physinfo(&self) -> Result<PhysInfo, BackendError>;

    /// Makes a new, paused domain without memory and returns its number. A PV domain
    /// starts out 64 bits wide.
    ///
    /// EINVAL for zero vcpus or more than [`GuestKind::max_vcpus`]; ENOMEM when the host is
    /// full; EOPNOTSUPP for a setting that this version of the hypervisor does not have.
    fn create(&self, new: &NewDomain) -> Result<DomId, BackendError>;

    /// [`Host::create`] for a domain without a UUID, with `vcpus` vcpus and room for
    /// `max_pages` pages.
    fn create_domain(
        &self,
        kind: GuestKind,
        vcpus: u32,
        max_pages: u64,
    ) -> Result<DomId, BackendError> {
        self.create(&NewDomain::new(kind, vcpus, max_pages))
    }
}

/// A domain's life cycle.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{DomainControl, GuestKind, Host, ShutdownReason};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// # let domain = host.domain(domid)?;
/// domain.suspend()?;
/// assert_eq!(domain.info()?.shutdown, Some(ShutdownReason::Suspend));
/// domain.resume()?;
/// assert_eq!(domain.info()?.shutdown, None);
/// # Ok(())
/// # }
/// ```
pub trait DomainControl: Send + Sync {
    /// The version of the hypervisor that the domain runs on.
    fn xen_version(&self) -> Result<XenVersion, BackendError>;

    /// The domain's current state (`XEN_DOMCTL_getdomaininfo`).
    fn info(&self) -> Result<DomainInfo, BackendError>;

    /// Whether the vcpu is online (`XEN_DOMCTL_getvcpuinfo`). EINVAL above `max_vcpu_id`, ESRCH if
    /// that vcpu was never created.
    fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError>;

    /// Stop all vcpus; returns when none of them runs. Pauses are counted: two of them need two
    /// unpauses.
    fn pause(&self) -> Result<(), BackendError>;

    /// Undo one [`DomainControl::pause`]. EINVAL if the domain is not paused.
    fn unpause(&self) -> Result<(), BackendError>;

    /// Ask the guest to suspend, and return at once: whether it has suspended already. EBUSY if it is
    /// already shut down; ETIMEDOUT if it cannot answer, because it is paused or has no vcpu online.
    fn request_suspend(&self) -> Result<bool, BackendError>;

    /// Take back a request that the guest has not answered.
    fn withdraw_suspend(&self) -> Result<Withdrawn, BackendError>;

    /// As [`suspend_within`](suspend::suspend_within) 60 s, with its failures as an errno: ECANCELED
    /// if the guest has shut down instead, ETIMEDOUT if it does not suspend.
    fn suspend(&self) -> Result<(), BackendError> {
        suspend::suspend_within(self, suspend::SUSPEND_TIMEOUT, &|| false).map_err(|error| {
            let errno = match error {
                SuspendError::Backend(error) => return error,
                SuspendError::ShutDown(_) => Errno::ECANCELED,
                _ => Errno::ETIMEDOUT,
            };
            BackendError::host("suspend", errno)
        })
    }

    /// Resume a suspended domain in place; its suspend call returns "cancelled"
    /// (`XEN_DOMCTL_resumedomain`, cooperative). EINVAL if the domain has not shut down.
    fn resume(&self) -> Result<(), BackendError>;

    /// Destroy the domain and free its memory.
    fn destroy(&self) -> Result<(), BackendError>;

    /// Allocate an event channel that `remote` may bind, and return its port (≥ 1). ENOSPC if no
    /// port is left.
    fn alloc_unbound_port(&self, remote: DomId) -> Result<u32, BackendError>;
}

/// A domain's memory.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{Access, GuestKind, GuestMemory, Host};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// # let domain = host.domain(domid)?;
/// use xsr_format::frame::Gfn;
///
/// let frames = [Gfn(1), Gfn(0xfff_ffff)];
/// let pages = domain.map(&frames, Access::Read)?;
/// // The call succeeds although one frame does not exist. A caller that needs them all asks for
/// // `all_mapped`, which returns the first error.
/// assert_eq!(pages.failed()[0].gfn, frames[1]);
/// let page = pages.page(0).expect("frame 1 is mapped");
/// let contents = page.to_page();
/// assert_eq!(contents.as_slice().len(), 4096);
/// # Ok(())
/// # }
/// ```
pub trait GuestMemory: Send + Sync {
    /// The largest gfn ever populated for the domain (`XENMEM_maximum_gpfn`); `None` before the
    /// first.
    fn maximum_gfn(&self) -> Result<Option<Gfn>, BackendError>;

    /// Write the type of each frame of `gfns` to `out` (`XEN_DOMCTL_getpageframeinfo3`). A frame
    /// that does not exist, is not the domain's or is Xen's own is [`PageType::XTAB`]. E2BIG above
    /// 1024 frames; EINVAL if the lengths differ.
    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError>;

    /// Map frames at consecutive addresses. The call succeeds as a whole even if single frames
    /// fail: see [`ForeignPages::failed`]. A frame that does not exist or is not the domain's
    /// fails. A page of a PV guest cannot be mapped for writing while it is in use as a page table.
    /// The errno of a failed frame is EINVAL, EPERM or EBUSY, depending on the hypervisor.
    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError>;

    /// Write whole pages: `contents` has one for each of `gfns`, in that order; if a frame is named
    /// twice, the later page is kept. Returns the frames that could not be written, for the same
    /// reasons as in [`GuestMemory::map`], in ascending order of index. All others have been
    /// written. EINVAL if the lengths do not match.
    ///
    /// If a hypervisor has no call for it, the pages are mapped and filled.
    fn write_pages(&self, gfns: &[Gfn], contents: &[u8]) -> Result<Vec<MapError>, BackendError> {
        if contents.len() != gfns.len() * PAGE_SIZE {
            return Err(BackendError::host("write_pages", Errno::EINVAL));
        }
        let pages = self.map(gfns, Access::Write)?;
        let (contents, _) = contents.as_chunks();
        for (index, page) in pages.iter() {
            page.copy_from(&contents[index]);
        }
        Ok(pages.failed().to_vec())
    }

    /// Whether [`GuestMemory::write_pages`] costs less than mapping the pages and reading a stream
    /// straight into them; false if it maps them itself.
    fn writing_is_cheaper(&self) -> bool {
        false
    }

    /// Allocate `frames.len()` extents of 2^`order` pages (`XENMEM_populate_physmap`; orders 0, 9
    /// and 18). On entry, each element is the first pfn of an extent, aligned to it. On return, for
    /// a PV guest, it is the first mfn; for a translated guest it is unchanged. Returns how many
    /// extents, counted from the first, were allocated: fewer than requested if memory or the
    /// domain's limit ran out. A translated guest's pfn must be populated only once: Xen replaces
    /// the first page by the second, but the domain keeps both (a PV guest may reuse a pfn). EINVAL
    /// for another order or a misaligned pfn. New pages are zero, except pages that the domain gave
    /// back before: Xen need not clear those.
    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError>;

    /// Give pages back, one by one (`XENMEM_decrease_reservation`, order 0): their contents are
    /// lost, and a translated guest's pfn may be populated again. Returns how many, counted from
    /// the first, were released: fewer than requested if a frame does not exist or is not the
    /// domain's; but a translated guest's pfn without a page may count as released. It is
    /// unspecified whether a page is released that a page table or a vcpu refers to, or that is
    /// Xen's own.
    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError>;
}

/// Calls that PV and translated guests on x86 have in common.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{GuestKind, Host, X86Platform};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// # let domain = host.domain(domid)?;
/// let policy = domain.cpu_policy()?;
/// assert_eq!(policy.leaves.len() % 24, 0);
/// let largest = domain.max_cpu_policy()?;
/// assert!(largest.leaves.len() >= policy.leaves.len());
/// let tsc = domain.tsc_info()?;
/// domain.set_tsc_info(&tsc)?;
/// # Ok(())
/// # }
/// ```
pub trait X86Platform: Send + Sync {
    /// The CPU policy (`XEN_DOMCTL_get_cpu_policy`).
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// The policy of the host's processors (`XEN_SYSCTL_get_cpu_policy`): all that they can do, not
    /// what a guest may use.
    fn host_cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// The largest policy that this machine can offer this domain: [`Host::max_cpu_policy`] for its
    /// kind.
    fn max_cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// Set the CPU policy; an empty half is left alone. Xen silently clears features that the
    /// machine does not have: [`X86Platform::cpu_policy`] shows the result. EINVAL for lengths that
    /// are not a multiple of an entry. EINVAL, ERANGE or EOVERFLOW for a policy that the machine
    /// cannot offer, with the entry at fault ([`Detail::PolicyEntry`]); EEXIST once the domain has
    /// been unpaused.
    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), BackendError>;

    /// TSC mode, frequency, elapsed time and incarnation (`XEN_DOMCTL_gettscinfo`).
    fn tsc_info(&self) -> Result<TscInfo, BackendError>;

    /// Set them (`XEN_DOMCTL_settscinfo`). EINVAL for a mode above 2. The domain may be running: it
    /// is paused during the call.
    fn set_tsc_info(&self, info: &TscInfo) -> Result<(), BackendError>;

    /// Put the frames of the xenstore and console rings into the reserved grant entries 1 and 0 of
    /// the domain (C: `xc_dom_gnttab_seed`). EINVAL for a frame beyond 2^32 - 1, which an entry
    /// cannot hold.
    fn seed_grants(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), BackendError>;
}

/// What only a PV guest has. [`Domain::pv`] returns it.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{GuestKind, Host, VcpuBlob};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pv, 8))?;
/// # let domain = host.domain(domid)?;
/// let guest = domain.pv().expect("a PV guest");
/// assert_eq!(guest.guest_width()?, 8);
/// let basic = guest.vcpu_state(0, VcpuBlob::Basic)?;
/// assert_eq!(basic.len(), 0x1430);
/// let m2p = guest.m2p()?;
/// assert!(m2p.pfn(m2p.max_mfn()).is_some());
/// assert!(domain.hvm().is_none());
/// # Ok(())
/// # }
/// ```
pub trait PvGuest: Send + Sync {
    /// Bytes in the guest's word: 8 or 4 (`XEN_DOMCTL_get_address_size`, in bytes).
    fn guest_width(&self) -> Result<u8, BackendError>;

    /// Make the guest 4 or 8 bytes wide (`XEN_DOMCTL_set_address_size`); setting the current width
    /// always succeeds. EINVAL for another width, and for 8 once it is 4; EACCES for 4 once the
    /// domain has memory; EOPNOTSUPP if the hypervisor has no 32-bit PV guests.
    fn set_guest_width(&self, width: u8) -> Result<(), BackendError>;

    /// The machine-to-physical table.
    fn m2p(&self) -> Result<M2p, BackendError>;

    /// One blob of a vcpu; empty if Xen has nothing of that kind. EINVAL above `max_vcpu_id`;
    /// [`VcpuBlob::Basic`] of a vcpu that was never initialised: ENODATA.
    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError>;

    /// Set one blob. EINVAL for a wrong length, a cr3 that is not a valid top-level table of the
    /// guest, a GDT frame that is a page table or otherwise unusable, or a state that Xen does not
    /// accept. EOPNOTSUPP for tables that differ from those that the vcpu already has.
    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError>;

    /// Validate and pin page tables (`MMUEXT_PIN_Ln_TABLE`), at most 1024 at a time: level 1–4
    /// and the table's mfn. EINVAL, EPERM or EBUSY if a table does not validate because of an entry
    /// with reserved bits, an entry for a frame that is not the guest's, or a writable mapping of a
    /// page table. Tables before the failing one stay pinned.
    fn pin_tables(&self, tables: &[(u8, Mfn)]) -> Result<(), BackendError>;
}

/// What only a translated guest (HVM or PVH) has. [`Domain::hvm`] returns it.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{GuestKind, Host};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Hvm, 8))?;
/// # let domain = host.domain(domid)?;
/// /// `HVM_PARAM_STORE_PFN`, the frame of the xenstore ring.
/// const STORE_PFN: u32 = 1;
///
/// let guest = domain.hvm().expect("a translated guest");
/// let ring = guest.hvm_param(STORE_PFN)?;
/// assert_ne!(ring, 0);
/// // A context begins with its header: type 1, instance 0.
/// let context = guest.hvm_context()?;
/// assert_eq!(context[..4], [1, 0, 0, 0]);
/// assert!(domain.pv().is_none());
/// # Ok(())
/// # }
/// ```
pub trait HvmGuest: Send + Sync {
    /// The HVM context: Xen's own list of {u16 type, u16 instance, u32 length, body}
    /// (`XEN_DOMCTL_gethvmcontext`).
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError>;

    /// Set it. EINVAL for a context that is malformed or comes from a machine that differs too
    /// much; EINVAL or ENODATA for an incomplete one.
    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError>;

    /// One HVM parameter (`HVM_PARAM_*`; 0 if never set). EINVAL for an index that does not exist.
    fn hvm_param(&self, index: u32) -> Result<u64, BackendError>;

    /// Set one. EINVAL as above or for a value out of range; EEXIST for a parameter that may be set
    /// only once and has been set.
    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError>;
}

/// What a domain has that the other kind of guest does not.
pub enum GuestRole<'d> {
    /// A PV guest.
    Pv(&'d dyn PvGuest),
    /// A translated guest: HVM or PVH.
    Hvm(&'d dyn HvmGuest),
}

impl fmt::Debug for GuestRole<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pv(_) => "Pv",
            Self::Hvm(_) => "Hvm",
        })
    }
}

/// A handle on one domain, in every role.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{Domain, GuestKind, Host};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// # let domain = host.domain(domid)?;
/// /// Works with any hypervisor.
/// fn describe(domain: &dyn Domain) -> Result<String, xsr_xen_backend::BackendError> {
///     let info = domain.info()?;
///     let last = domain.maximum_gfn()?;
///     Ok(format!("{}: {} pages up to {last:?}", info.domid, info.tot_pages))
/// }
///
/// assert!(describe(&*domain)?.starts_with("domain 1: "));
/// # Ok(())
/// # }
/// ```
pub trait Domain: DomainControl + GuestMemory + LogDirty + X86Platform {
    /// What this kind of guest has. A domain's kind never changes.
    fn guest_role(&self) -> GuestRole<'_>;

    /// The calls for a PV guest; `None` for a translated one.
    fn pv(&self) -> Option<&dyn PvGuest> {
        match self.guest_role() {
            GuestRole::Pv(guest) => Some(guest),
            GuestRole::Hvm(_) => None,
        }
    }

    /// The calls for a translated guest; `None` for a PV guest.
    fn hvm(&self) -> Option<&dyn HvmGuest> {
        match self.guest_role() {
            GuestRole::Pv(_) => None,
            GuestRole::Hvm(guest) => Some(guest),
        }
    }
}
