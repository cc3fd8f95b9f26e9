//! Mock machines that implement the traits: real memory, really mapped, with Xen's semantics and
//! errnos.
//!
//! A [`MockHost`] is a directory, so its domains outlive the command that made them. Several
//! processes may have it open at a time, each working on another domain
//! ([`DomainStore::lock`](crate::domain_store::DomainStore::lock)). Nothing executes: a "running"
//! guest is one that would. The mock itself does the work of a suspending guest (put pfns into
//! start_info, call the hypervisor). A [`Workload`] makes a guest write while it runs, in this
//! process.
//!
//! Known differences from a real machine: a foreign writable mapping holds no reference to its
//! frame, so Xen's refusal to pin a table that is mapped writable is missing; a mapping that
//! outlives its domain, or a page that the guest gave back, shows the later contents of the frame;
//! the clock does not advance.

#![deny(unsafe_code)]

mod allocator;
mod before;
mod digest;
mod dirty;
mod domain;
mod domain_store;
mod error;
pub(crate) mod face;
mod frames;
mod grants;
mod guest;
mod hvm_context;
mod kernel;
mod layout;
mod machine;
mod memory;
mod p2m;
mod pagetable;
mod phases;
mod place;
mod platform;
mod policy;
mod processor;
mod pv;
mod random;
mod running;
mod sharing;
mod state;
mod store;
mod summary;
mod wake;
mod workload;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::Errno;
use serde::{Deserialize, Serialize};

use self::domain::MockDomain;
use self::machine::Machine;
use self::place::Place;
use self::sharing::{Locks, Opened};
use self::state::{CPUID_LEAVES, HVM_CONTEXT, POLICY_MSRS, Record, Vcpu};
use self::store::{DOMAINS, FORMAT, HOST, Store};
use crate::error::BackendError;
use crate::{
    CpuPolicy, DomId, Domain, DomainControl, DomainInfo, DomainSettings, GuestKind, Host,
    NewDomain, PhysInfo, TscInfo, XenVersion,
};

pub use self::digest::{MemoryDigest, PageDigest};
pub use self::error::MockError;
#[cfg(feature = "peer")]
pub use self::face::peer;
pub use self::grants::GrantEntry;
pub use self::guest::{GuestSpec, P2mStyle};
pub use self::phases::phase;
pub use self::processor::{BadProcessor, Processor};
pub use self::state::Placement;
pub use self::summary::{DomainReport, DomainState, DomainSummary};
pub use self::workload::{BackgroundWorkload, Workload, WorkloadCounts, WorkloadEnd, WorkloadSpec};

/// Configuration of a mock machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostConfig {
    /// The machine's memory in frames, rounded up to 2 MiB. Uses no memory until it is written,
    /// except 8 bytes for each frame.
    pub memory_pages: u64,
    /// The seed of the order of frames.
    pub seed: u64,
    /// The longest run of contiguous frames among single pages, 1–512; 1 scatters all.
    pub max_run: u32,
    /// The Xen version that it reports.
    pub xen_version: XenVersion,
    /// Whether it can use shadow page tables, without which the writes of PV guests cannot be
    /// logged.
    #[serde(default = "shadow_paging")]
    pub shadow_paging: bool,
    /// Whether the dirty log reports pages that a translated guest takes, as it does from Xen
    /// 4.22.0, 4.21.1, 4.20.3 and 4.19.5 on. Earlier versions report neither these pages nor, until
    /// the log is read, the guest's writes to them. Versions later than 4.21 always report them.
    #[serde(default)]
    pub logs_new_pages: bool,
    /// Work that guests do in steps while their writes are logged, whichever program has the
    /// machine open.
    #[serde(default)]
    pub stepped: Option<Stepped>,
    /// A pfn whose frame cannot be mapped (EINVAL), although it is reported as present in every
    /// domain that has it: for tests of how a caller handles that.
    #[serde(default)]
    pub unmappable: Option<u64>,
    /// Its processor.
    #[serde(default)]
    pub processor: Processor,
}

/// Work that guests do in steps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stepped {
    /// The work.
    pub work: WorkloadSpec,
    /// Operations of a step. A step is done each time the log is enabled or cleared, and at no
    /// other time, so a live save finds the same pages written, however long it takes. `None`:
    /// before the log is read and before the guest suspends, the guest does as much as its rate
    /// allows for the elapsed time. This needs no extra thread, which would disturb time
    /// measurements.
    pub operations: Option<u64>,
}

/// The setting of hosts that were made before it was configurable.
const fn shadow_paging() -> bool {
    true
}

impl Default for HostConfig {
    /// 16 GiB, runs of at most 32 pages, Xen 4.17 with shadow paging.
    fn default() -> Self {
        Self {
            memory_pages: 4 << 20,
            seed: 0x7852,
            max_run: 32,
            xen_version: XenVersion {
                major: 4,
                minor: 17,
            },
            shadow_paging: shadow_paging(),
            logs_new_pages: false,
            stepped: None,
            unmappable: None,
            processor: Processor::default(),
        }
    }
}

impl HostConfig {
    /// See [`HostConfig::logs_new_pages`].
    fn logs_new_pages(&self) -> bool {
        let XenVersion { major, minor } = self.xen_version;
        self.logs_new_pages || (major, minor) > (4, 21)
    }

    /// The part after major and minor of the release number that it reports: the first release of
    /// the branch, or a late one.
    fn point_release(&self) -> &'static str {
        match self.logs_new_pages {
            true => ".9",
            false => ".0",
        }
    }
}

/// A mock machine. Clones are handles on the same one.
#[derive(Clone, Debug)]
pub struct MockHost {
    machine: Arc<Machine>,
}

impl MockHost {
    fn new(machine: Machine) -> Self {
        let machine = Arc::new(machine);
        Self { machine }
    }

    /// Make a host in `dir`, which must be empty or not exist.
    ///
    /// # Errors
    ///
    /// [`MockError::Occupied`] if the directory is not empty; [`MockError::Unsafe`] if other users
    /// can write to it; I/O errors.
    pub fn create(dir: &Path, config: &HostConfig) -> Result<Self, MockError> {
        let occupied = || MockError::Occupied {
            path: dir.to_owned(),
        };
        let place = Place::create(dir)?;
        if !place.is_empty()? {
            return Err(occupied());
        }
        let (locks, opened) = Locks::open(&place)?;
        if opened == Opened::Beside || place.read(HOST)?.is_some() {
            // Another process has just made one.
            return Err(occupied());
        }
        let made = place
            .make(DOMAINS)
            .and_then(|_| Store::open(place, locks))
            .and_then(|store| Machine::create(store, opened, config.clone()));
        if made.is_err() {
            Self::undo_create(dir);
        }
        made.map(Self::new)
    }

    /// A machine could not be made in `dir`, which was empty: empties it again. The error that kept
    /// it from being made is the one that counts.
    fn undo_create(dir: &Path) {
        let emptied = Place::open(dir).and_then(|place| match place {
            Some(place) => place
                .names()?
                .iter()
                .try_for_each(|name| place.remove_any(name)),
            None => Ok(()),
        });
        if let Err(error) = emptied {
            tracing::warn!(%error, "files of a mock host that could not be made are left");
        }
    }

    /// Open the host in `dir`, which other processes may have open too.
    ///
    /// # Errors
    ///
    /// [`MockError::NotAHost`] if there is none, [`MockError::InUse`] if another process is
    /// repairing it, [`MockError::Unsafe`] if other users can write to it, [`MockError::Damaged`];
    /// I/O errors.
    pub fn open(dir: &Path) -> Result<Self, MockError> {
        let not_a_host = || MockError::NotAHost {
            path: dir.to_owned(),
        };
        let place = Place::open(dir)?.ok_or_else(not_a_host)?;
        if place.read(HOST)?.is_none() && !Locks::are_there(&place) {
            return Err(not_a_host());
        }
        let (locks, opened) = Locks::open(&place)?;
        if place.read(HOST)?.is_none() {
            return Err(not_a_host());
        }
        let store = Store::open(place, locks)?;
        let host = store.load_host()?.ok_or_else(not_a_host)?;
        if host.format != FORMAT {
            return Err(MockError::BadSpec(format!(
                "{} has layout {}, this program knows {FORMAT}; make a new host",
                dir.display(),
                host.format
            )));
        }
        Machine::open(store, opened, host).map(Self::new)
    }

    /// Open the host in `dir`, or make one there.
    ///
    /// # Errors
    ///
    /// As [`MockHost::open`] and [`MockHost::create`].
    pub fn open_or_create(dir: &Path, config: &HostConfig) -> Result<Self, MockError> {
        match Self::open(dir) {
            Err(MockError::NotAHost { .. }) => {}
            other => return other,
        }
        match Self::create(dir, config) {
            Err(occupied @ MockError::Occupied { .. }) => match Self::open(dir) {
                Err(MockError::NotAHost { .. }) => Err(occupied),
                // Another process was faster.
                opened => opened,
            },
            made => made,
        }
    }

    /// A host in memory, which leaves nothing behind.
    ///
    /// # Errors
    ///
    /// [`MockError::BadSpec`] for a machine that is too small or too large; I/O errors.
    pub fn ephemeral(config: &HostConfig) -> Result<Self, MockError> {
        Machine::create(Store::in_memory()?, Opened::Alone, config.clone()).map(Self::new)
    }

    /// Its configuration.
    pub fn config(&self) -> &HostConfig {
        &self.machine.config
    }

    /// Its directory; `None` for a host in memory.
    pub fn directory(&self) -> Option<&Path> {
        self.machine.store.path()
    }

    /// Abort the creation of a guest ([`MockHost::create_guest`], EINTR) once `stop` returns true.
    pub fn stop_making_when(&self, stop: impl Fn() -> bool + Send + Sync + 'static) {
        self.machine.stop.set(stop);
    }

    /// The number of free frames.
    pub fn free_pages(&self) -> u64 {
        self.machine.free_pages()
    }

    /// Pages that are currently mapped as foreign pages, including the machine-to-physical table.
    /// Tests check with it that a save or a restore, successful or not, has unmapped everything.
    pub fn mapped_pages(&self) -> usize {
        self.machine.mapped.load(Ordering::Relaxed)
    }

    fn mock_domain(&self, domid: DomId) -> Result<MockDomain, BackendError> {
        const OP: &str = "getdomaininfo";
        let dom = self.machine.dom(domid).map_err(|error| {
            BackendError::domain(OP, domid, domain::errno_of(&error)).explained(error.to_string())
        })?;
        let dom = dom.ok_or(BackendError::domain(OP, domid, Errno::ESRCH))?;
        Ok(MockDomain {
            machine: Arc::clone(&self.machine),
            dom,
        })
    }

    /// The domain with this number or name. As for xl, text of digits only is a number.
    ///
    /// # Errors
    ///
    /// [`MockError::NoSuchDomain`].
    pub fn find(&self, name_or_id: &str) -> Result<DomId, MockError> {
        // The state of no other domain is needed: its lock may be held for long.
        let found = match crate::domain_store::number(name_or_id) {
            Some(number) => self.machine.dom(number)?.map(|dom| dom.domid),
            // Or the name shown for a domain without one.
            None => match self.find_named(name_or_id)? {
                None => self.find_shown(name_or_id)?,
                found => found,
            },
        };
        found.ok_or_else(|| MockError::NoSuchDomain {
            name: name_or_id.to_owned(),
        })
    }

    fn find_shown(&self, name: &str) -> Result<Option<DomId>, MockError> {
        let domains = self.list()?;
        let shown = domains.iter().find(|domain| domain.name == name);
        Ok(shown.map(|domain| domain.domid))
    }

    /// The domain that has been given this name.
    fn find_named(&self, name: &str) -> Result<Option<DomId>, MockError> {
        let mut unknown = None;
        for dom in self.machine.all_domains()? {
            match dom.lock() {
                Ok(state) if state.record.given_name() == Some(name) && !dom.is_gone() => {
                    return Ok(Some(dom.domid));
                }
                Ok(_) => {}
                // It may be this one, unless another has the name.
                Err(error) => {
                    unknown.get_or_insert(error);
                }
            }
        }
        unknown.map_or(Ok(None), Err)
    }

    fn check_new_name(&self, name: &str) -> Result<(), MockError> {
        check_name(name)?;
        match self.find_named(name)? {
            Some(_) => Err(MockError::NameTaken {
                name: name.to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Rename a domain.
    ///
    /// # Errors
    ///
    /// [`MockError::BadName`], [`MockError::NameTaken`]; ESRCH.
    pub fn rename(&self, domid: DomId, name: &str) -> Result<(), MockError> {
        let domain = self.mock_domain(domid)?;
        if domain.look("rename", |state| Ok(state.record.name == name))? {
            return Ok(());
        }
        let _names = self.machine.lock_names()?;
        self.check_new_name(name)?;
        domain.change("rename", |state| {
            name.clone_into(&mut state.record.name);
            Ok(())
        })?;
        phase("renamed");
        Ok(())
    }

    /// Store `data` as user data of the domain under `key`. It is removed with the domain.
    ///
    /// # Errors
    ///
    /// [`MockError::BadName`] for the key; ESRCH.
    pub fn userdata_store(&self, domid: DomId, key: &str, data: &[u8]) -> Result<(), MockError> {
        self.keep_userdata(domid, key, &mut |file| file.write_all(data))
    }

    /// As [`MockHost::userdata_store`], of what `write` writes.
    fn keep_userdata(
        &self,
        domid: DomId,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), MockError> {
        check_name(key)?;
        let domain = self.mock_domain(domid)?;
        domain.look("userdata", |_| {
            let saved = self.machine.store.save_userdata(domid, key, write);
            saved.map_err(|error| domain::storage_errno(&error))
        })?;
        phase("userdata");
        Ok(())
    }

    /// The user data of the domain under `key`.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn userdata_get(&self, domid: DomId, key: &str) -> Result<Option<Vec<u8>>, MockError> {
        let domain = self.mock_domain(domid)?;
        Ok(domain.look("userdata", |_| {
            let loaded = self.machine.store.load_userdata(domid, key);
            loaded.map_err(|error| domain::storage_errno(&error))
        })?)
    }

    /// The settings that a domain was created with.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn settings(&self, domid: DomId) -> Result<DomainSettings, MockError> {
        let domain = self.mock_domain(domid)?;
        Ok(domain.look("settings", |state| Ok(state.record.settings.clone()))?)
    }

    /// Where and how much the vcpus of a domain may run.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn placement(&self, domid: DomId) -> Result<Placement, MockError> {
        let domain = self.mock_domain(domid)?;
        Ok(domain.look("placement", |state| Ok(state.record.placement.clone()))?)
    }

    /// The reserved grant entries of a domain: console and xenstore.
    ///
    /// # Errors
    ///
    /// ESRCH.
    pub fn grants(&self, domid: DomId) -> Result<[Option<GrantEntry>; 2], MockError> {
        let domain = self.mock_domain(domid)?;
        Ok(domain.look("grants", |state| domain.reserved_grants(state))?)
    }
}

/// The control domain's name on every Xen host, which no other domain can have.
const CONTROL_DOMAIN: &str = "Domain-0";

/// Check that `name` is valid for a domain or for user data.
fn check_name(name: &str) -> Result<(), MockError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let digits_only = name.chars().all(|c| c.is_ascii_digit());
    if digits_only || name == CONTROL_DOMAIN || name.len() > 64 || !name.chars().all(good) {
        return Err(MockError::BadName {
            name: name.to_owned(),
        });
    }
    Ok(())
}

impl Host for MockHost {
    fn xen_version(&self) -> Result<XenVersion, BackendError> {
        Ok(self.machine.config.xen_version)
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, BackendError> {
        let mut infos = Vec::new();
        let domains = self.machine.all_domains().map_err(|error| {
            BackendError::host("getdomaininfolist", domain::errno_of(&error))
                .explained(error.to_string())
        })?;
        for dom in domains {
            let machine = Arc::clone(&self.machine);
            match (MockDomain { machine, dom }).info() {
                Ok(info) => infos.push(info),
                // It has been destroyed in the meantime.
                Err(e) if e.errno == Errno::ESRCH => {}
                Err(e) => return Err(e),
            }
        }
        Ok(infos)
    }

    fn domain(&self, domid: DomId) -> Result<Box<dyn Domain>, BackendError> {
        Ok(Box::new(self.mock_domain(domid)?))
    }

    fn max_cpu_policy(&self, kind: GuestKind) -> Result<CpuPolicy, BackendError> {
        Ok(self.machine.config.processor.max_policy(kind))
    }

    fn physinfo(&self) -> Result<PhysInfo, BackendError> {
        let free_pages = self.machine.hold_allocator().map(|_| self.free_pages());
        Ok(PhysInfo {
            total_pages: self.machine.config.memory_pages,
            free_pages: free_pages.map_err(|error| {
                BackendError::host("physinfo", domain::errno_of(&error))
                    .explained(error.to_string())
            })?,
            outstanding_pages: 0,
            cpu_khz: platform::HOST_KHZ,
            pv: true,
            hvm: true,
            hap: true,
            shadow: self.machine.config.shadow_paging,
        })
    }

    fn create(&self, new: &NewDomain) -> Result<DomId, BackendError> {
        let &NewDomain {
            kind,
            vcpus,
            max_pages,
            uuid,
            ref settings,
        } = new;
        const OP: &str = "createdomain";
        new.check_vcpus(OP)?;
        let mut hvm_params = vec![0; platform::HVM_PARAMS];
        if kind.is_translated() {
            hvm_params[platform::param::TIMER_MODE as usize] = settings.timer_mode.into();
        }
        let made = self
            .machine
            .add_domain(|domid, [shared_info, grant_table]| {
                let policy = self.machine.config.processor.default_policy(kind);
                let mut blobs = BTreeMap::from([
                    (CPUID_LEAVES.to_owned(), policy.leaves),
                    (POLICY_MSRS.to_owned(), policy.msrs),
                ]);
                if kind.is_translated() {
                    let context = hvm_context::make(kind, 0, 0);
                    blobs.insert(HVM_CONTEXT.to_owned(), context);
                }
                let record = Record {
                    domid,
                    born: 0,
                    name: String::new(),
                    uuid,
                    kind,
                    width: 8,
                    max_pages,
                    pauses: 1,
                    has_run: false,
                    shutdown: None,
                    suspended_rings: None,
                    shared_info: shared_info.0,
                    grant_table: grant_table.0,
                    lent: Vec::new(),
                    vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
                    tsc: TscInfo {
                        khz: platform::HOST_KHZ,
                        ..TscInfo::default()
                    },
                    hvm_params,
                    settings: settings.clone(),
                    placement: Placement::default(),
                    ignores_suspend: false,
                };
                (record, blobs)
            });
        match made {
            Ok(Some(dom)) => {
                phase("created");
                Ok(dom.domid)
            }
            Ok(None) => Err(BackendError::host(OP, Errno::ENOMEM)
                .explained("the mock host has no memory for another domain")),
            Err(error) => {
                Err(BackendError::host(OP, domain::errno_of(&error)).explained(error.to_string()))
            }
        }
    }
}
