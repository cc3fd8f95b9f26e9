//! Differences between the versions of Xen's domctl interface, in one table.
//!
//! | domctl | Xen | `createdomain` | `getdomaininfo` | sysctl | `physinfo` |
//! |---|---|---|---|---|---|
//! | 0x12 | 4.14 | no misc_flags, no vmtrace_size, no grant_opts | no misc_flags | 0x13 | no arch_capabilities |
//! | 0x13 | 4.15 | + misc_flags, vmtrace_size | + misc_flags | 0x13 | |
//! | 0x14 | 4.16 | + grant_opts | + gpaddr_bits | 0x14 | |
//! | 0x15 | 4.17 | + cpupool_id | | 0x15 | + arch_capabilities |
//! | 0x16 | 4.18 | | | 0x15 | |
//! | 0x17 | 4.19–4.21 | + altp2m | | 0x15, 4.21: 0x16 | |
//! | 0x18 | 4.22 | | | 0x16 | |
//!
//! Every other structure is the same in all of them: `cargo xtask bindings` checks that. (From 0x18
//! on `createdomain` chooses a number only for DOMID_ANY, which older versions accept as well, and
//! `getvcpuinfo` returns ENOENT for a vcpu that does not exist.) Source:
//! `xen/include/public/{domctl,sysctl}.h` and `arch-x86/xen.h` of each release.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::sys::{common as sys, v12, v13, v14, v15, v16, v17, v18};
use crate::{DomId, DomainInfo, GuestKind, PhysInfo, ShutdownReason, Uuid, XenVersion};
use xsr_format::frame::Gfn;

/// The domctl and sysctl interface versions of Xen 4.`minor`; for a Xen newer than the known ones,
/// versions that no Xen uses.
pub(crate) const fn versions(minor: u16) -> (u32, u32) {
    match minor {
        0..=14 => (0x12, 0x13),
        15 => (0x13, 0x13),
        16 => (0x14, 0x14),
        17 => (0x15, 0x15),
        18 => (0x16, 0x15),
        19 | 20 => (0x17, 0x15),
        21 => (0x17, 0x16),
        22 => (0x18, 0x16),
        // Future versions.
        _ => (0x19, 0x17),
    }
}

/// The first Xen 4.x whose interface is in the table.
const OLDEST_MINOR: u16 = 14;

/// The oldest and the newest Xen that [`XenHost::open`](super::XenHost::open) works with.
pub fn known_versions() -> [XenVersion; 2] {
    let known = |minor: &u16| {
        let domctl = versions(*minor).0;
        INTERFACES
            .iter()
            .any(|interface| interface.domctl == domctl)
    };
    let newest = (OLDEST_MINOR..).take_while(known).last();
    [OLDEST_MINOR, newest.unwrap_or(OLDEST_MINOR)].map(|minor| XenVersion { major: 4, minor })
}

/// The parameters of a new domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Create {
    /// `XEN_DOMCTL_CDF_*`.
    pub(crate) flags: u32,
    pub(crate) vcpus: u32,
    /// Largest port.
    pub(crate) max_evtchn_port: u32,
    /// `XEN_X86_EMU_*`.
    pub(crate) emulation: u32,
    /// The UUID.
    pub(crate) handle: [u8; 16],
    /// The security label.
    pub(crate) ssidref: u32,
    /// If negative, as many as the hypervisor allows.
    pub(crate) max_grant_frames: i32,
    /// Likewise.
    pub(crate) max_maptrack_frames: i32,
    /// The largest grant table version, from 0x14 on; before that 0, because the hypervisor's
    /// command line sets it.
    pub(crate) grant_version: u32,
    /// `XEN_X86_MSR_RELAXED`, from 0x13 on.
    pub(crate) misc_flags: u32,
    /// From 0x15 on.
    pub(crate) cpupool: u32,
}

/// The members of `getdomaininfo` that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) domid: u16,
    /// `XEN_DOMINF_*`.
    pub(crate) flags: u32,
    pub(crate) tot_pages: u64,
    pub(crate) max_pages: u64,
    pub(crate) shared_info_frame: u64,
    pub(crate) max_vcpu_id: u32,
    /// `XEN_X86_EMU_*`.
    pub(crate) emulation: u32,
    /// The UUID.
    pub(crate) handle: [u8; 16],
}

/// One version of the interface.
pub(crate) struct Interface {
    /// Its version number (`XEN_DOMCTL_INTERFACE_VERSION`).
    pub(crate) domctl: u32,
    /// The possible sysctl interface versions, to be tried in turn.
    pub(crate) sysctl: &'static [u32],
    /// Bytes of `xen_domctl_getdomaininfo`.
    pub(crate) info_bytes: usize,
    /// Decodes such a structure; `None` if there are too few bytes.
    pub(crate) decode_info: fn(&[u8]) -> Option<Info>,
    /// Encodes one, as a hypervisor does.
    #[cfg_attr(
        not(feature = "mock"),
        expect(dead_code, reason = "for the mock machine")
    )]
    pub(crate) encode_info: fn(&Info) -> Vec<u8>,
    /// Decodes a `xen_sysctl_physinfo`; `None` if there are too few bytes.
    pub(crate) decode_physinfo: fn(&[u8]) -> Option<PhysInfo>,
    /// Encodes one, as a hypervisor does.
    #[cfg_attr(
        not(feature = "mock"),
        expect(dead_code, reason = "for the mock machine")
    )]
    pub(crate) encode_physinfo: fn(&PhysInfo) -> Vec<u8>,
    /// Encodes a `xen_domctl_createdomain`.
    pub(crate) encode_create: fn(&Create) -> Vec<u8>,
    /// Decodes one, as a hypervisor does; `None` if there are too few bytes or the grant table
    /// version is invalid.
    #[cfg_attr(
        not(feature = "mock"),
        expect(dead_code, reason = "for the mock machine")
    )]
    pub(crate) decode_create: fn(&[u8]) -> Option<Create>,
    /// Whether `createdomain` has [`Create::grant_version`].
    pub(crate) has_grant_version: bool,
    /// Whether it has [`Create::cpupool`].
    pub(crate) has_cpupool: bool,
}

impl std::fmt::Debug for Interface {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "domctl interface {:#x}", self.domctl)
    }
}

/// "No vcpu at all" (`XEN_INVALID_MAX_VCPU_ID`).
const NO_VCPU: u32 = u32::MAX;

/// "As many as the hypervisor allows."
pub(crate) const DEFAULT_LIMIT: i32 = -1;

/// A table entry, from the module of the bindings and the other features of its domctl.
macro_rules! interface {
    ($module:ident, $sysctl:expr, misc: $misc:tt, grants: $grants:tt, pool: $pool:tt) => {
        Interface {
            domctl: $module::XEN_DOMCTL_INTERFACE_VERSION,
            sysctl: &$sysctl,
            info_bytes: size_of::<$module::xen_domctl_getdomaininfo>(),
            decode_info: |bytes| {
                let (info, _) = $module::xen_domctl_getdomaininfo::read_from_prefix(bytes).ok()?;
                Some(Info {
                    domid: info.domain,
                    flags: info.flags,
                    tot_pages: info.tot_pages,
                    max_pages: info.max_pages,
                    shared_info_frame: info.shared_info_frame,
                    max_vcpu_id: info.max_vcpu_id,
                    emulation: info.arch_config.emulation_flags,
                    handle: info.handle,
                })
            },
            encode_info: |info| {
                let mut out = $module::xen_domctl_getdomaininfo::new_zeroed();
                out.domain = info.domid;
                out.flags = info.flags;
                out.tot_pages = info.tot_pages;
                out.max_pages = info.max_pages;
                out.shared_info_frame = info.shared_info_frame;
                out.max_vcpu_id = info.max_vcpu_id;
                out.arch_config.emulation_flags = info.emulation;
                out.handle = info.handle;
                out.as_bytes().to_vec()
            },
            decode_physinfo: |bytes| {
                let (info, _) = $module::xen_sysctl_physinfo::read_from_prefix(bytes).ok()?;
                let has = |capability: u32| info.capabilities & capability != 0;
                Some(PhysInfo {
                    total_pages: info.total_pages,
                    free_pages: info.free_pages,
                    outstanding_pages: info.outstanding_pages,
                    cpu_khz: info.cpu_khz,
                    pv: has(sys::XEN_SYSCTL_PHYSCAP_pv),
                    hvm: has(sys::XEN_SYSCTL_PHYSCAP_hvm),
                    hap: has(sys::XEN_SYSCTL_PHYSCAP_hap),
                    shadow: has(sys::XEN_SYSCTL_PHYSCAP_shadow),
                })
            },
            encode_physinfo: |info| {
                let mut out = $module::xen_sysctl_physinfo::new_zeroed();
                out.total_pages = info.total_pages;
                out.free_pages = info.free_pages;
                out.outstanding_pages = info.outstanding_pages;
                out.cpu_khz = info.cpu_khz;
                for (has, capability) in [
                    (info.pv, sys::XEN_SYSCTL_PHYSCAP_pv),
                    (info.hvm, sys::XEN_SYSCTL_PHYSCAP_hvm),
                    (info.hap, sys::XEN_SYSCTL_PHYSCAP_hap),
                    (info.shadow, sys::XEN_SYSCTL_PHYSCAP_shadow),
                ] {
                    out.capabilities |= capability * u32::from(has);
                }
                out.as_bytes().to_vec()
            },
            encode_create: |create| {
                let mut out = $module::xen_domctl_createdomain::new_zeroed();
                out.flags = create.flags;
                out.max_vcpus = create.vcpus;
                out.max_evtchn_port = create.max_evtchn_port;
                out.max_grant_frames = create.max_grant_frames;
                out.max_maptrack_frames = create.max_maptrack_frames;
                out.arch.emulation_flags = create.emulation;
                out.handle = create.handle;
                out.ssidref = create.ssidref;
                interface!(@encode_misc $misc, out, create);
                interface!(@encode_grants $grants, out, create);
                interface!(@encode_pool $pool, out, create);
                out.as_bytes().to_vec()
            },
            decode_create: |bytes| {
                let (create, _) = $module::xen_domctl_createdomain::read_from_prefix(bytes).ok()?;
                Some(Create {
                    flags: create.flags,
                    vcpus: create.max_vcpus,
                    max_evtchn_port: create.max_evtchn_port,
                    emulation: create.arch.emulation_flags,
                    handle: create.handle,
                    ssidref: create.ssidref,
                    max_grant_frames: create.max_grant_frames,
                    max_maptrack_frames: create.max_maptrack_frames,
                    grant_version: interface!(@grants $grants, create),
                    misc_flags: interface!(@misc $misc, create),
                    cpupool: interface!(@pool $pool, create),
                })
            },
            has_grant_version: $grants,
            has_cpupool: $pool,
        }
    };
    (@encode_grants true, $out:ident, $create:ident) => { $out.grant_opts = $create.grant_version };
    (@encode_grants false, $out:ident, $create:ident) => {};
    (@encode_misc true, $out:ident, $create:ident) => { $out.arch.misc_flags = $create.misc_flags };
    (@encode_misc false, $out:ident, $create:ident) => {};
    (@encode_pool true, $out:ident, $create:ident) => { $out.cpupool_id = $create.cpupool };
    (@encode_pool false, $out:ident, $create:ident) => {};
    (@grants true, $create:ident) => {
        match $create.grant_opts {
            version @ 1..=2 => version,
            _ => return None,
        }
    };
    (@grants false, $create:ident) => { 0 };
    (@misc true, $create:ident) => { $create.arch.misc_flags };
    (@misc false, $create:ident) => { 0 };
    (@pool true, $create:ident) => { $create.cpupool_id };
    (@pool false, $create:ident) => { 0 };
}

/// All versions, newest first: the order in which they are tried.
pub(crate) static INTERFACES: [Interface; 7] = [
    interface!(v18, [v18::XEN_SYSCTL_INTERFACE_VERSION], misc: true, grants: true, pool: true),
    interface!(
        v17,
        [v17::XEN_SYSCTL_INTERFACE_VERSION, v18::XEN_SYSCTL_INTERFACE_VERSION],
        misc: true, grants: true, pool: true
    ),
    interface!(v16, [v16::XEN_SYSCTL_INTERFACE_VERSION], misc: true, grants: true, pool: true),
    interface!(v15, [v15::XEN_SYSCTL_INTERFACE_VERSION], misc: true, grants: true, pool: true),
    interface!(v14, [v14::XEN_SYSCTL_INTERFACE_VERSION], misc: true, grants: true, pool: false),
    interface!(v13, [v13::XEN_SYSCTL_INTERFACE_VERSION], misc: true, grants: false, pool: false),
    interface!(v12, [v12::XEN_SYSCTL_INTERFACE_VERSION], misc: false, grants: false, pool: false),
];

impl Info {
    /// The same information in the type of the traits.
    pub(crate) fn to_domain_info(self) -> DomainInfo {
        let has = |flag: u32| self.flags & flag != 0;
        let reason = (self.flags >> sys::XEN_DOMINF_shutdownshift) & sys::XEN_DOMINF_shutdownmask;
        DomainInfo {
            domid: DomId(self.domid),
            uuid: Uuid(self.handle),
            kind: match (has(sys::XEN_DOMINF_hvm_guest), self.emulation) {
                (false, _) => GuestKind::Pv,
                // A guest with at most this much emulation in Xen has no device model.
                (true, emulated) if emulated & !sys::XEN_X86_EMU_LAPIC == 0 => GuestKind::Pvh,
                (true, _) => GuestKind::Hvm,
            },
            shutdown: has(sys::XEN_DOMINF_shutdown).then(|| shutdown_reason(reason)),
            paused: has(sys::XEN_DOMINF_paused),
            dying: has(sys::XEN_DOMINF_dying),
            max_vcpu_id: match self.max_vcpu_id {
                // The domain's vcpus have not been created yet: reported like a domain whose first
                // vcpu has not been created, which every caller handles.
                NO_VCPU => 0,
                largest => largest,
            },
            tot_pages: self.tot_pages,
            max_pages: self.max_pages,
            shared_info_frame: Gfn(self.shared_info_frame),
        }
    }
}

/// An unknown reason is treated as a crash: the domain cannot be resumed after it.
fn shutdown_reason(reason: u32) -> ShutdownReason {
    match reason {
        sys::SHUTDOWN_poweroff => ShutdownReason::Poweroff,
        sys::SHUTDOWN_reboot => ShutdownReason::Reboot,
        sys::SHUTDOWN_suspend => ShutdownReason::Suspend,
        sys::SHUTDOWN_watchdog => ShutdownReason::Watchdog,
        sys::SHUTDOWN_soft_reset => ShutdownReason::SoftReset,
        _ => ShutdownReason::Crash,
    }
}
