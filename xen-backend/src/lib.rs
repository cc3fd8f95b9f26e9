//! What can be asked of a hypervisor, as object-safe role traits, each method with
//! its promise, units and errno.
//!
//! A [`Host`] opens domains; a [`Domain`] plays every role. Frames are
//! [`Gfn`]s throughout: the pfn of an HVM guest, the mfn of a PV guest. Only
//! [`LogDirty`] tells of [`Pfn`]s, for either kind.
//!
//! Every call may also fail with EPERM (not privileged), ESRCH (the domain is
//! gone) and, over a restricted handle, EACCES; these are not repeated below.

#![deny(unsafe_code)]

#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod domain_store;
pub mod error;
mod log_dirty;
#[cfg(feature = "mock")]
pub mod mock;
#[allow(unsafe_code, reason = "one of the rooms for it: mapped foreign pages")]
pub mod pages;
#[allow(
    unsafe_code,
    reason = "one of the rooms for it: ioctls and what they map"
)]
mod privcmd;
mod sys;
mod uuid;
mod xen;
mod xenstore;

use std::fmt;

#[cfg(feature = "mock")]
use serde::{Deserialize, Serialize};
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, PageType, Pfn};

pub use error::{BackendError, Detail, MapError, PolicyEntry};
pub use log_dirty::{DirtyBitmap, DirtyRead, DirtyStats, LogDirty};
pub use nix::errno::Errno;
pub use pages::{Access, ForeignPage, ForeignPages, Gather, Unwritten, WriteCall};
pub use uuid::{BadUuid, Uuid};
pub use xen::{OpenError, Ring, XenHost, known_versions};

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
    /// Most vcpus that a domain of this kind can have (`MAX_VIRT_CPUS`, `HVM_MAX_VCPUS`).
    pub const fn max_vcpus(self) -> u32 {
        match self {
            Self::Pv => 8192,
            Self::Hvm | Self::Pvh => 128,
        }
    }

    /// As people write it.
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
    /// 2: the guest has put itself in order to be saved.
    Suspend,
    /// 3
    Crash,
    /// 4
    Watchdog,
    /// 5
    SoftReset,
}

impl fmt::Display for ShutdownReason {
    /// In Xen's words.
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

/// What `getdomaininfo` tells.
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
    /// Largest number a vcpu of the domain can have.
    pub max_vcpu_id: u32,
    /// Pages the domain has.
    pub tot_pages: u64,
    /// Pages the domain may have.
    pub max_pages: u64,
    /// Where shared_info is; for a PV guest its mfn.
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
    /// 0 default, 1 always emulate, 2 never emulate. 3 was pvrdtscp
    /// once.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Elapsed time in nanoseconds.
    pub nsec: u64,
    /// Counts migrations.
    pub incarnation: u32,
}

/// A domain's CPU policy, serialised as in X86_CPUID_POLICY and X86_MSR_POLICY.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {
    /// CPUID leaves, 24 bytes each (leaf, subleaf, eax, ebx, ecx, edx), little endian.
    pub leaves: Vec<u8>,
    /// MSRs, 16 bytes each (u32 index, u32 flags, u64 value), little endian.
    pub msrs: Vec<u8>,
}

/// A ring of the store or the console, and the domain behind it, as a reserved entry
/// of the grant table names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingGrant {
    /// The ring's frame (HVM: pfn, PV: mfn); `None` leaves the entry alone.
    pub gfn: Option<Gfn>,
    /// The domain that may map it.
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

    /// Largest machine frame there is.
    pub fn max_mfn(&self) -> Mfn {
        self.max_mfn
    }

    /// First frame of the compat table.
    pub fn compat_first(&self) -> Mfn {
        self.compat_first
    }

    /// What the table says of `mfn`: the pfn if the frame belongs to a guest, any
    /// value otherwise. A caller checks it against the p2m. `None` beyond
    /// [`M2p::max_mfn`].
    pub fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        if mfn > self.max_mfn {
            return None;
        }
        let index = usize::try_from(mfn.0).ok()?;
        self.table.read_u64(index).map(Pfn)
    }
}

/// A domain to be made by [`Host::create`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewDomain {
    /// PV, HVM or PVH.
    pub kind: GuestKind,
    /// Vcpus it can have.
    pub vcpus: u32,
    /// Pages it may have.
    pub max_pages: u64,
    /// Its UUID; [`Uuid::NIL`] for none.
    pub uuid: Uuid,
    /// What it is allowed to do and have.
    pub settings: DomainSettings,
}

/// What a toolstack sets of a domain before it first runs, and an image's libxc stream does
/// not hold. The default is libxl's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "mock", derive(Serialize, Deserialize))]
#[non_exhaustive]
pub struct DomainSettings {
    /// Largest number of an event channel.
    pub max_event_port: u32,
    /// Frames of its grant table; what the hypervisor allows, if `None`.
    pub max_grant_frames: Option<u32>,
    /// Frames of the table of grants that it has mapped, likewise.
    pub max_maptrack_frames: Option<u32>,
    /// The largest version of grant tables that it may use; the largest that the hypervisor
    /// has, if `None`.
    pub max_grant_version: Option<u8>,
    /// Its security label (FLASK), as a number; 0 for the default.
    pub ssidref: u32,
    /// Reads of registers that Xen does not know give zero, instead of a fault. Xen 4.14 does
    /// so always.
    pub msr_relaxed: bool,
    /// Translated guests: memory for the tables that Xen keeps of them, in KiB; what libxl
    /// reckons, if `None`.
    pub paging_kib: Option<u64>,
    /// The pool of processors that it runs in.
    pub cpupool: u32,
    /// Translated guests: what becomes of timer ticks that it misses
    /// (`HVM_PARAM_TIMER_MODE`).
    pub timer_mode: u8,
    /// Its wall clock, in seconds ahead of the host's.
    pub time_offset_seconds: i64,
}

impl DomainSettings {
    /// Missed ticks are dropped (`HVMPTM_no_delay_for_missed_ticks`).
    pub const NO_DELAY_FOR_MISSED_TICKS: u8 = 1;

    /// What libxl gives a domain of which nothing else is said.
    pub const DEFAULT: Self = Self {
        max_event_port: 1023,
        max_grant_frames: None,
        max_maptrack_frames: None,
        max_grant_version: None,
        ssidref: 0,
        msr_relaxed: false,
        paging_kib: None,
        cpupool: 0,
        timer_mode: Self::NO_DELAY_FOR_MISSED_TICKS,
        time_offset_seconds: 0,
    };
}

impl Default for DomainSettings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl NewDomain {
    /// A domain with nothing special about it, and without a UUID.
    pub const fn new(kind: GuestKind, vcpus: u32, max_pages: u64) -> Self {
        Self {
            kind,
            vcpus,
            max_pages,
            uuid: Uuid::NIL,
            settings: DomainSettings::DEFAULT,
        }
    }

    /// The same, with this UUID.
    pub const fn uuid(mut self, uuid: Uuid) -> Self {
        self.uuid = uuid;
        self
    }

    /// The same, with these settings.
    #[must_use]
    pub fn settings(mut self, settings: DomainSettings) -> Self {
        self.settings = settings;
        self
    }

    /// EINVAL where no domain of this kind can have so many vcpus.
    pub(crate) fn check_vcpus(&self, op: &'static str) -> Result<(), BackendError> {
        let most = self.kind.max_vcpus();
        match (1..=most).contains(&self.vcpus) {
            true => Ok(()),
            false => Err(BackendError::host(op, Errno::EINVAL).explained(format!(
                "{} vcpus: a {} domain has between 1 and {most}",
                self.vcpus,
                self.kind.name()
            ))),
        }
    }
}

/// The machine as a whole.
pub trait Host: Send + Sync {
    /// The hypervisor's version.
    fn xen_version(&self) -> Result<XenVersion, BackendError>;

    /// Every domain but the control domain, ascending.
    fn domains(&self) -> Result<Vec<DomainInfo>, BackendError>;

    /// A handle on one domain. Fails with ESRCH where there is none.
    fn domain(&self, domid: DomId) -> Result<Box<dyn Domain>, BackendError>;

    /// The most that the machine's CPU can be to a guest of this kind
    /// (`XEN_SYSCTL_get_cpu_policy`, `pv_max` and `hvm_max`). A guest gets no feature that is not
    /// in it, whatever its policy says: [`xsr_format::cpu_policy::missing`] compares them. A guest
    /// whose page tables are shadowed gets less, without nested virtualisation neither VMX nor
    /// SVM. EOPNOTSUPP where the hypervisor has no guests of that kind.
    fn max_cpu_policy(&self, kind: GuestKind) -> Result<CpuPolicy, BackendError>;

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

/// A domain's life.
pub trait DomainControl: Send + Sync {
    /// The version of the hypervisor that the domain is on.
    fn xen_version(&self) -> Result<XenVersion, BackendError>;

    /// The domain's state now (`XEN_DOMCTL_getdomaininfo`).
    fn info(&self) -> Result<DomainInfo, BackendError>;

    /// Whether the vcpu is online (`XEN_DOMCTL_getvcpuinfo`). EINVAL above
    /// `max_vcpu_id`, ESRCH where that vcpu was never made.
    fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError>;

    /// Stop all vcpus; returns when none runs. Counted: two pauses want two
    /// unpauses.
    fn pause(&self) -> Result<(), BackendError>;

    /// Undo one [`DomainControl::pause`]. EINVAL when not paused.
    fn unpause(&self) -> Result<(), BackendError>;

    /// Ask the guest to suspend and wait until it has: afterwards [`DomainControl::info`]
    /// shows `ShutdownReason::Suspend`. EBUSY when it is already shut down,
    /// ETIMEDOUT when it does not answer.
    fn suspend(&self) -> Result<(), BackendError>;

    /// Let a domain that has suspended run on where it is, its suspend call
    /// returning "cancelled" (`XEN_DOMCTL_resumedomain`, cooperative). EINVAL when
    /// it has not shut down.
    fn resume(&self) -> Result<(), BackendError>;

    /// Destroy the domain and free its memory.
    fn destroy(&self) -> Result<(), BackendError>;

    /// Allot an event channel that `remote` may bind; its port (≥ 1). ENOSPC when
    /// there is none left.
    fn alloc_unbound_port(&self, remote: DomId) -> Result<u32, BackendError>;
}

/// A domain's memory.
pub trait GuestMemory: Send + Sync {
    /// The largest gfn the domain has ever had populated
    /// (`XENMEM_maximum_gpfn`); `None` while it has none.
    fn maximum_gfn(&self) -> Result<Option<Gfn>, BackendError>;

    /// The type of each frame of `gfns` into `out` (`XEN_DOMCTL_getpageframeinfo3`).
    /// A frame that does not exist, is not the domain's or is Xen's own is
    /// [`PageType::XTAB`]. E2BIG above 1024 frames; EINVAL where the lengths differ.
    fn page_types(&self, gfns: &[Gfn], out: &mut [PageType]) -> Result<(), BackendError>;

    /// Map frames one behind the other. Succeeds as a whole even where single
    /// frames fail: see [`ForeignPages::failed`]. A frame that does not exist or is
    /// not the domain's is refused; a page table of a PV guest may be mapped for writing
    /// only while nothing has its type. Of a frame that is refused a hypervisor says
    /// EINVAL, EPERM or EBUSY.
    fn map(&self, gfns: &[Gfn], access: Access) -> Result<ForeignPages, BackendError>;

    /// Write whole pages: `contents` has one for each of `gfns`, in that order, and of
    /// a frame named twice the later stays. The frames that could not be written, for
    /// the reasons that [`GuestMemory::map`] has, are listed, ascending by index; all
    /// others are. EINVAL where the lengths do not fit.
    ///
    /// Where a hypervisor has no call for it, they are mapped and filled.
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

    /// Whether [`GuestMemory::write_pages`] costs less than mapping the pages and
    /// reading a stream straight into them: not where it maps them itself.
    fn writing_is_cheaper(&self) -> bool {
        false
    }

    /// Allocate `frames.len()` extents of 2^`order` pages
    /// (`XENMEM_populate_physmap`; orders 0, 9 and 18). Going in, each element is
    /// the first pfn of an extent, aligned to it. Coming out, for a PV guest, it is
    /// the first mfn; for a translated guest it is unchanged. Says how many extents,
    /// from the first on, were allocated: fewer than asked for when memory or the
    /// domain's limit ran out. A translated guest's pfn is to be populated once: Xen
    /// puts a second page in the place of the first, which stays the domain's (a PV
    /// guest may reuse one). EINVAL for another order or a misaligned pfn. New pages are
    /// zero, but for such as the domain gave back before: those Xen need not clear.
    fn populate(&self, order: u8, frames: &mut [Gfn]) -> Result<usize, BackendError>;

    /// Give pages back, one by one (`XENMEM_decrease_reservation`, order 0): what they
    /// hold is lost, and a translated guest's pfn may be populated again. Says how
    /// many, from the first on, went: fewer than asked for where a frame does not
    /// exist or is not the domain's; but a translated guest's pfn that has no page may
    /// count as one that went. Whether one goes that a page table or a vcpu refers to,
    /// or that is Xen's own, is not promised.
    fn release(&self, gfns: &[Gfn]) -> Result<usize, BackendError>;
}

/// What PV and translated guests on x86 have in common.
pub trait X86Platform: Send + Sync {
    /// The CPU policy (`XEN_DOMCTL_get_cpu_policy`).
    fn cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// The policy of the host's processors (`XEN_SYSCTL_get_cpu_policy`): what they can do,
    /// not what a guest may be given of it.
    fn host_cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// The most that the machine's CPU can be to this domain: [`Host::max_cpu_policy`] for its
    /// kind.
    fn max_cpu_policy(&self) -> Result<CpuPolicy, BackendError>;

    /// Set the CPU policy; an empty half is left alone. Features that the machine does not have
    /// are cleared without a word: [`X86Platform::cpu_policy`] shows what was made of it. EINVAL
    /// for lengths that are no multiple of an entry. EINVAL, ERANGE or EOVERFLOW for a policy that the machine
    /// cannot offer, with the entry that is to blame ([`Detail::PolicyEntry`]); EEXIST once
    /// the domain has been unpaused.
    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), BackendError>;

    /// TSC mode, frequency, elapsed time and incarnation (`XEN_DOMCTL_gettscinfo`).
    fn tsc_info(&self) -> Result<TscInfo, BackendError>;

    /// Set them (`XEN_DOMCTL_settscinfo`). EINVAL for a mode above 2. The domain may
    /// run: it is paused meanwhile.
    fn set_tsc_info(&self, info: &TscInfo) -> Result<(), BackendError>;

    /// Put the frames of the xenstore and console rings into the reserved grant
    /// entries 1 and 0 of the domain (C: `xc_dom_gnttab_seed`). EINVAL for a frame
    /// beyond 2^32 - 1: an entry has no room for it.
    fn seed_grants(&self, console: RingGrant, xenstore: RingGrant) -> Result<(), BackendError>;
}

/// What only PV guests have. On a translated guest every call fails with EINVAL, but
/// those of the width with EOPNOTSUPP.
pub trait PvGuest: Send + Sync {
    /// Bytes in the guest's word: 8 or 4 (`XEN_DOMCTL_get_address_size`, in bytes).
    fn guest_width(&self) -> Result<u8, BackendError>;

    /// Make the guest 4 or 8 bytes wide (`XEN_DOMCTL_set_address_size`); the width it
    /// has always succeeds. EINVAL for another width, and for 8 once it is 4; EACCES
    /// for 4 once the domain has memory; EOPNOTSUPP where the hypervisor has no 32-bit
    /// PV guests.
    fn set_guest_width(&self, width: u8) -> Result<(), BackendError>;

    /// The machine-to-physical table.
    fn m2p(&self) -> Result<M2p, BackendError>;

    /// One blob of a vcpu; empty where Xen has nothing of that kind. EINVAL above
    /// `max_vcpu_id`; [`VcpuBlob::Basic`] of a vcpu that was never initialised:
    /// ENODATA.
    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError>;

    /// Set one blob. EINVAL for a wrong length, a cr3 that is no valid top-level
    /// table of the guest, a GDT frame that is page table or otherwise unfit, or
    /// a state Xen does not accept. EOPNOTSUPP for other tables than those a vcpu has.
    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError>;

    /// Validate and pin page tables (`MMUEXT_PIN_Ln_TABLE`), at most 1024 at a time:
    /// level 1–4 and the table's mfn. EINVAL, EPERM or EBUSY when a table does not
    /// validate: an entry with reserved bits, to a frame that is not the guest's, or a
    /// writable mapping of a page table. Those before the failing one stay pinned.
    fn pin_tables(&self, tables: &[(u8, Mfn)]) -> Result<(), BackendError>;
}

/// What only translated guests have. On a PV guest every call fails with EINVAL.
pub trait HvmGuest: Send + Sync {
    /// The HVM context: Xen's own list of {u16 type, u16 instance, u32 length, body}
    /// (`XEN_DOMCTL_gethvmcontext`).
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError>;

    /// Set it. EINVAL for a context that is malformed or was made by a machine too
    /// different; where something is missing in it, ENODATA too.
    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError>;

    /// One HVM parameter (`HVM_PARAM_*`; 0 when never set). EINVAL for an index
    /// that does not exist.
    fn hvm_param(&self, index: u32) -> Result<u64, BackendError>;

    /// Set one. EINVAL as above or for a value out of range; EEXIST for one that
    /// may be set once only and was.
    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError>;
}

/// A handle on one domain, in every role.
pub trait Domain:
    DomainControl + GuestMemory + LogDirty + X86Platform + PvGuest + HvmGuest
{
}

impl<T: DomainControl + GuestMemory + LogDirty + X86Platform + PvGuest + HvmGuest> Domain for T {}
