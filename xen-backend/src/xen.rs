//! The real hypervisor: a [`Host`] and a [`Domain`] implemented with hypercalls.
//!
//! Everything goes through [`Hypercalls`], so all of it can also run without Xen, over the mock
//! machine's face. Only `xen/interface.rs` knows the differences between versions of Xen.
//!
//! C implementation: `tools/libs/ctrl`, `tools/libs/guest`.

mod calls;
mod control;
mod create;
mod direct;
mod domain_store;
pub(crate) mod grants;
mod hvm;
pub(crate) mod interface;
mod libxl_files;
mod log_dirty;
mod memory;
mod open;
mod placement;
mod platform;
mod pv;
mod release;
mod suspend;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Errno;

use self::calls::Calls;
pub(crate) use self::libxl_files::LibxlFiles;
use self::release::Quirks;
use crate::error::BackendError;
use crate::privcmd::{CallBuffer, Hypercalls, Privcmd};
use crate::sys::common as sys;
use crate::xenstore::Xenstore;
use crate::{
    CpuPolicy, DomId, Domain, DomainInfo, GuestKind, GuestRole, Host, NewDomain, PhysInfo,
    XenVersion,
};

#[cfg(feature = "mock")]
pub(crate) use self::create::MSR_RELAXED;
pub use self::direct::Ring;
pub use self::interface::known_versions;
pub use self::open::OpenError;

/// The first number that is not a domain's (`DOMID_FIRST_RESERVED`).
const DOMID_FIRST_RESERVED: u16 = 0x7ff0;
/// The owner of Xen's own frames (`DOMID_XEN`).
const DOMID_XEN: DomId = DomId(0x7ff2);
/// The most domains that one call lists.
const LIST_BATCH: u32 = 256;

/// A Xen host, reached from its control domain.
#[derive(Debug)]
pub struct XenHost {
    shared: Arc<Shared>,
}

/// State that a host shares with the handles on its domains.
#[derive(Debug)]
struct Shared {
    calls: Calls,
    store: Box<dyn Xenstore>,
    version: XenVersion,
    /// The files that libxl keeps for its domains.
    libxl_files: LibxlFiles,
    /// Differences of this release of Xen from others of its version.
    quirks: Quirks,
    /// Domains for which the state of the dirty log is known. Xen does not report whether a log is
    /// on, and reads one that is off as empty.
    logs: Mutex<BTreeMap<DomId, Log>>,
}

/// The known state of a domain's dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// It is on.
    On,
    /// Enabling it was refused: something else holds it.
    Held,
}

impl Shared {
    fn logs(&self) -> std::sync::MutexGuard<'_, BTreeMap<DomId, Log>> {
        // A panic cannot leave the map half-changed.
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl XenHost {
    /// Opens the hypervisor of this machine.
    ///
    /// # Errors
    ///
    /// What is missing: Xen, its device, the privilege, or a known interface version.
    pub fn open() -> Result<Self, OpenError> {
        let hypervisor = open::device()?;
        let store = crate::xenstore::Sockets::default();
        let files = LibxlFiles::of_this_machine();
        Self::with_files(Arc::new(hypervisor), Box::new(store), files)
    }

    /// The hypervisor that `raw` leads to, without libxl.
    #[cfg(all(test, feature = "mock"))]
    pub(crate) fn over(
        raw: Arc<dyn Hypercalls>,
        store: Box<dyn Xenstore>,
    ) -> Result<Self, OpenError> {
        Self::with_files(raw, store, LibxlFiles::none())
    }

    pub(crate) fn with_files(
        raw: Arc<dyn Hypercalls>,
        store: Box<dyn Xenstore>,
        libxl_files: LibxlFiles,
    ) -> Result<Self, OpenError> {
        let (calls, version) = open::probe(raw)?;
        let extra = calls.extra_version();
        let quirks = Quirks::of(version, &extra);
        tracing::debug!(
            xen = %format_args!("{}.{}{extra}", version.major, version.minor),
            domctl = %format_args!("{:#x}", calls.interface.domctl),
            "hypervisor"
        );
        Ok(Self {
            shared: Arc::new(Shared {
                calls,
                store,
                version,
                libxl_files,
                quirks,
                logs: Mutex::default(),
            }),
        })
    }

    /// As [`Host::domain`], for a domain that is about to get its memory (by a restore into the
    /// handle, for example): it is taken from a NUMA node.
    ///
    /// # Errors
    ///
    /// As [`Host::domain`].
    pub fn domain_on(
        &self,
        domid: DomId,
        memory: MemoryNode,
    ) -> Result<Box<dyn Domain>, BackendError> {
        Ok(Box::new(XenDomain {
            memory: Some(memory),
            ..self.handle(domid)?
        }))
    }

    fn handle(&self, domid: DomId) -> Result<XenDomain, BackendError> {
        if domid.0 == 0 || domid.0 >= DOMID_FIRST_RESERVED {
            return Err(BackendError::domain("domain", domid, Errno::EINVAL));
        }
        let info = self.shared.calls.info(domid);
        let info = info.map_err(|e| BackendError::domain("getdomaininfo", domid, e))?;
        Ok(XenDomain {
            shared: Arc::clone(&self.shared),
            domid,
            kind: info.kind,
            memory: None,
            vcpus: AtomicU64::new(0),
            log: Mutex::default(),
            warned: AtomicBool::new(false),
        })
    }

    /// The domctl interface version of the hypervisor.
    pub fn domctl_version(&self) -> u32 {
        self.shared.calls.interface.domctl
    }
}

/// The NUMA node that a domain's memory is taken from.
///
/// C: `memflags` of `xc_domain_restore` (`XENMEMF_node`, `XENMEMF_exact_node_request`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNode {
    /// Xen's number of the node.
    pub node: u8,
    /// Whether no other node may be used, even if this one has no memory left.
    pub exact: bool,
}

impl MemoryNode {
    /// Xen's flags for an allocation. (Its macros are not among the generated constants.)
    fn flags(self) -> u32 {
        const EXACT: u32 = 1 << 17;
        (u32::from(self.node) + 1) << 8 & 0xff00 | if self.exact { EXACT } else { 0 }
    }
}

/// A handle on a domain of a [`XenHost`].
#[derive(Debug)]
struct XenDomain {
    shared: Arc<Shared>,
    domid: DomId,
    kind: GuestKind,
    /// Where its memory is taken from. `None`: where Xen chooses.
    memory: Option<MemoryNode>,
    /// The number of vcpus that the domain is known to have, at least.
    vcpus: AtomicU64,
    /// The buffer that the dirty log is read into, kept for the next read.
    log: Mutex<Option<CallBuffer>>,
    /// Whether the user has been warned that this Xen loses registers.
    warned: AtomicBool,
}

impl XenDomain {
    fn calls(&self) -> &Calls {
        &self.shared.calls
    }

    fn fail(&self, op: &'static str, errno: Errno) -> BackendError {
        BackendError::domain(op, self.domid, errno)
    }
}

impl Domain for XenDomain {
    fn guest_role(&self) -> GuestRole<'_> {
        match self.kind {
            GuestKind::Pv => GuestRole::Pv(self),
            GuestKind::Hvm | GuestKind::Pvh => GuestRole::Hvm(self),
        }
    }
}

impl Host for XenHost {
    fn xen_version(&self) -> Result<XenVersion, BackendError> {
        Ok(self.shared.version)
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, BackendError> {
        const OP: &str = "getdomaininfolist";
        let calls = &self.shared.calls;
        let mut infos = Vec::new();
        let mut next = 1_u16;
        while next < DOMID_FIRST_RESERVED {
            let batch = calls
                .list_domains(next, LIST_BATCH)
                .map_err(|errno| BackendError::host(OP, errno))?;
            let Some(last) = batch.last() else {
                break;
            };
            next = last.domid.0 + 1;
            infos.extend(batch.into_iter().filter(|info| !info.dying));
        }
        Ok(infos)
    }

    fn domain(&self, domid: DomId) -> Result<Box<dyn Domain>, BackendError> {
        // Includes the control domain itself: releasing or writing its frames would change the
        // memory of this process without the compiler's knowledge.
        Ok(Box::new(self.handle(domid)?))
    }

    fn max_cpu_policy(&self, kind: GuestKind) -> Result<CpuPolicy, BackendError> {
        self.most_of_cpu(kind)
    }

    fn physinfo(&self) -> Result<PhysInfo, BackendError> {
        let info = self.shared.calls.physinfo();
        info.map_err(|errno| BackendError::host("physinfo", errno))
    }

    fn create(&self, new: &NewDomain) -> Result<DomId, BackendError> {
        create::create(&self.shared.calls, new)
    }
}
