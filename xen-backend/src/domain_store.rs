//! Domain stores: the data that a toolstack keeps with a domain in addition to the hypervisor's.
//! This is its name, its configuration, the records of its emulators, a lock, and its nodes in
//! xenstore from `introduce` to `destroy`.
//!
//! The number of a domain is reused once the domain is gone. Therefore every method takes a
//! [`DomainRef`], which names the number *and* the UUID, and fails with
//! [`DomainStoreError::Replaced`] if the number now belongs to a domain with another UUID. Xen has
//! no call that compares the UUID and acts in one step, so the store does not notice a domain that
//! is destroyed and replaced between the comparison and the action. Domains without a UUID
//! ([`Uuid::NIL`]) cannot be distinguished at all.
//!
//! C implementation: `tools/libs/light/libxl_{dom,domain,internal}.c`.

mod error;
mod lock;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use crate::Errno;

use crate::{DomId, Domain, DomainInfo, Host, Ring, Uuid};

pub use error::{Blame, DomainStoreError};
pub(crate) use lock::Process;
pub use lock::{DomainLock, LockHolder};

/// One domain: its number, and the UUID that distinguishes it from an earlier or later domain with
/// the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainRef {
    /// The number.
    pub domid: DomId,
    /// The UUID.
    pub uuid: Uuid,
}

impl fmt::Display for DomainRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uuid.is_nil() {
            true => write!(f, "{}", self.domid),
            false => write!(f, "{} (UUID {})", self.domid, self.uuid),
        }
    }
}

impl From<&DomainInfo> for DomainRef {
    fn from(info: &DomainInfo) -> Self {
        Self {
            domid: info.domid,
            uuid: info.uuid,
        }
    }
}

/// The domain number in `text`, which has to consist of digits only, as for xl.
///
/// C implementation: `libxl_domain_qualifier_to_domid` in `tools/libs/light/libxl_utils.c`.
pub(crate) fn number(text: &str) -> Option<DomId> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().map(DomId).filter(|_| digits)
}

/// A domain in the list of a [`DomainStore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedDomain {
    /// The hypervisor's information about it.
    pub info: DomainInfo,
    /// Its name; `None` if it has not been given one.
    pub name: Option<String>,
}

impl ListedDomain {
    /// The domain.
    pub fn domain(&self) -> DomainRef {
        DomainRef::from(&self.info)
    }
}

/// A domain's configuration, in its toolstack's format (libxl: JSON).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The configuration itself; the store does not interpret it.
    pub bytes: Vec<u8>,
    /// Its keeper.
    pub keeper: ConfigurationKeeper,
}

/// The keeper of a domain's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigurationKeeper {
    /// This store: [`DomainStore::set_configuration`] put it there.
    Store,
    /// libxl, in this file. The store only reads it.
    Libxl(PathBuf),
}

/// The data that [`DomainStore::introduce`] publishes about a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction<'a> {
    /// The domain's name.
    pub name: &'a str,
    /// The ring of xenstore.
    pub store: Ring,
    /// The ring of the console, if the domain has one.
    pub console: Option<Ring>,
    /// Its memory and vcpus, for its kernel; `None` publishes nothing.
    pub extent: Option<&'a Extent>,
}

/// The memory and the vcpus that a domain is to use; read by its balloon driver and its vcpu
/// hotplug.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The most memory that it may ever have, in KiB (`memory/static-max`).
    pub max_memory_kib: u64,
    /// The memory that it should have now, in KiB (`memory/target`).
    pub target_memory_kib: u64,
    /// The video memory, in KiB (`memory/videoram`).
    pub video_memory_kib: u64,
    /// Whether it may use each of its vcpus (`cpu/N/availability`).
    pub vcpus_online: Vec<bool>,
}

/// The result of [`DomainStore::destroy`].
#[must_use = "a domain that is still dying has not released its memory"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destroyed {
    /// Whether the hypervisor has released the domain.
    pub outcome: DestroyOutcome,
    /// The domain's remains outside the hypervisor, which libxl or an administrator has to remove.
    /// Empty for a domain that libxl did not create.
    pub left_behind: Vec<LeftBehind>,
}

/// Whether a destroyed domain is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyOutcome {
    /// The domain no longer exists; its memory is free.
    Gone,
    /// The timeout has passed. The domain will never run again, but some of its memory is still in
    /// use: another domain or process has it mapped, or the hypervisor did not have enough time to
    /// release it. Destroying the domain again continues the release.
    StillDying,
}

/// Part of a domain made by libxl that is not removed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeftBehind {
    /// One of libxl's files.
    File(PathBuf),
    /// A process that served the domain: its device model.
    Process {
        /// Its process number.
        pid: u32,
        /// The xenstore node that names it.
        node: String,
    },
    /// A device, given by libxl's node for it in xenstore. Its backend is still connected and its
    /// hotplug script has not run. The nodes of such a domain are left for libxl.
    Device(String),
}

impl fmt::Display for LeftBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Process { pid, node } => write!(f, "process {pid} ({node})"),
            Self::Device(node) => write!(f, "device {node}"),
        }
    }
}

/// The store of a toolstack's data about its domains.
///
/// Every method that takes a [`DomainRef`] fails with [`DomainStoreError::Gone`] if the domain does
/// not exist, and with [`DomainStoreError::Replaced`] if its number belongs to another domain. Only
/// these and further errors are listed below.
///
/// The mock machine is a store, and so is a real Xen, which keeps everything in xenstore. libxl's
/// files are only read.
///
/// ```
/// use std::time::Duration;
/// use xsr_xen_backend::domain_store::{DestroyOutcome, DomainStore, DomainStoreError};
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::GuestKind;
///
/// let host = MockHost::ephemeral(&HostConfig::default())?;
/// host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// let store: &dyn DomainStore = &host;
///
/// let web = store.find("web")?;
/// let lock = store.lock(web, "example")?;
/// store.set_configuration(web, b"{}")?;
/// store.rename(web, "web", "web-old")?;
/// // The name is not the one that the caller believes it to be.
/// let error = store.rename(web, "web", "web-new").unwrap_err();
/// assert!(matches!(error, DomainStoreError::WrongName { .. }));
///
/// let destroyed = store.destroy(web, Duration::from_secs(5))?;
/// assert_eq!(destroyed.outcome, DestroyOutcome::Gone);
/// assert!(matches!(store.name(web), Err(DomainStoreError::Gone { .. })));
/// drop(lock);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait DomainStore: Host {
    /// Every domain except the control domain, in ascending order of their numbers.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`] if a name cannot be read.
    fn list(&self) -> Result<Vec<ListedDomain>, DomainStoreError>;

    /// The domain with this number or name. As in `xl`, text that consists of digits is a number,
    /// and is a name only if no domain has that number.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::NotFound`]; as [`DomainStore::list`].
    fn find(&self, name_or_number: &str) -> Result<DomainRef, DomainStoreError> {
        let domains = self.list()?;
        let number = number(name_or_number);
        let by_number = domains
            .iter()
            .find(|listed| Some(listed.info.domid) == number);
        by_number
            .or_else(|| {
                let named = |listed: &&ListedDomain| listed.name.as_deref() == Some(name_or_number);
                domains.iter().find(named)
            })
            .map(ListedDomain::domain)
            .ok_or_else(|| DomainStoreError::NotFound {
                name: name_or_number.to_owned(),
            })
    }

    /// The hypervisor's information about this domain, after its UUID has been compared.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Gone`] also for a domain that is being destroyed.
    fn check(&self, domain: DomainRef) -> Result<DomainInfo, DomainStoreError> {
        let info = self.look_up(domain)?;
        match info.dying {
            true => Err(DomainStoreError::Gone { domain }),
            false => Ok(info),
        }
    }

    /// As [`DomainStore::check`], but also for domains that are being destroyed.
    ///
    /// # Errors
    ///
    /// Only the common ones.
    fn look_up(&self, domain: DomainRef) -> Result<DomainInfo, DomainStoreError> {
        let info = self
            .domain(domain.domid)
            .and_then(|handle| handle.info())
            .map_err(|error| match error.errno {
                Errno::ESRCH => DomainStoreError::Gone { domain },
                _ => error.into(),
            })?;
        match info.uuid == domain.uuid {
            true => Ok(info),
            false => Err(DomainStoreError::Replaced {
                domain,
                found: info.uuid,
            }),
        }
    }

    /// A handle on the domain for the engine, after its UUID has been compared. The handle itself
    /// only knows the number.
    ///
    /// # Errors
    ///
    /// Only the common ones.
    fn open(&self, domain: DomainRef) -> Result<Box<dyn Domain>, DomainStoreError> {
        self.check(domain)?;
        Ok(self.domain(domain.domid)?)
    }

    /// The domain's name; `None` if it has not been given one.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`].
    fn name(&self, domain: DomainRef) -> Result<Option<String>, DomainStoreError>;

    /// Checks that a name is valid for a domain; another domain may already have it.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::BadName`].
    fn check_name(&self, name: &str) -> Result<(), DomainStoreError>;

    /// Gives a new domain its first name. Until it is introduced, only the name is known.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::WrongName`] if the domain has a name already, and as
    /// [`DomainStore::rename`].
    fn give_name(&self, domain: DomainRef, name: &str) -> Result<(), DomainStoreError>;

    /// Renames the domain from `from` to `to`. The comparison with `from` and with the names of all
    /// other domains is atomic with the change.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::WrongName`] if the domain is not named `from`,
    /// [`DomainStoreError::NameTaken`] if another domain is named `to`,
    /// [`DomainStoreError::BadName`] if `to` is not a valid name, and
    /// [`DomainStoreError::Storage`]. The name is unchanged then.
    fn rename(&self, domain: DomainRef, from: &str, to: &str) -> Result<(), DomainStoreError>;

    /// The domain's configuration; `None` if it has none.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`].
    fn configuration(&self, domain: DomainRef) -> Result<Option<Configuration>, DomainStoreError>;

    /// Stores a configuration with the domain, replacing the store's earlier one. If libxl has a
    /// configuration of the domain, libxl's takes precedence.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::TooLarge`] and [`DomainStoreError::Storage`]. The earlier
    /// configuration is still kept then.
    fn set_configuration(&self, domain: DomainRef, bytes: &[u8]) -> Result<(), DomainStoreError>;

    /// The records of the domain's emulators that [`DomainStore::set_emulators`] has stored; `None`
    /// if there are none.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`].
    fn emulators(&self, domain: DomainRef) -> Result<Option<Vec<u8>>, DomainStoreError>;

    /// Stores what `write` writes as the records of the domain's emulators, replacing earlier ones.
    /// They may be long: a store that has files needs no copy of them in memory.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::TooLarge`] and [`DomainStoreError::Storage`], also if `write` fails. The
    /// earlier records are still kept then.
    fn set_emulators(
        &self,
        domain: DomainRef,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), DomainStoreError>;

    /// Parts of the domain that a save with this store's hypervisor alone does not save: its
    /// devices, by the names that libxl and the guest use (`vbd/51712`), and vNUMA. The console is
    /// not listed.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Backend`] and [`DomainStoreError::Storage`].
    fn devices(&self, domain: DomainRef) -> Result<Vec<String>, DomainStoreError>;

    /// The memory and the vcpus that the domain is to use now. Another program may have changed
    /// them since the domain was introduced (`xl mem-set`, `xl vcpu-set`), and its stored
    /// configuration does not follow. `None` if the store does not know.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`].
    fn extent(&self, domain: DomainRef) -> Result<Option<Extent>, DomainStoreError>;

    /// Publishes a new domain: gives it its name if it has not been given one, and connects
    /// xenstore and its console to its rings. Its lock and earlier stored data stay.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::BadName`] and [`DomainStoreError::NameTaken`], before anything
    /// is done. [`DomainStoreError::Storage`] and [`DomainStoreError::Backend`], after which
    /// the domain has to be [forgotten](DomainStore::forget).
    fn introduce(
        &self,
        domain: DomainRef,
        introduction: &Introduction<'_>,
    ) -> Result<(), DomainStoreError>;

    /// Removes everything that the store keeps with the domain, except the lock, which stays with
    /// its holder. The domain itself stays, without a name. Meant for a domain that was introduced
    /// but cannot be used. If libxl has connected the domain to devices, its nodes, including its
    /// name, are left for libxl.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Storage`]; some of it may have been removed then.
    fn forget(&self, domain: DomainRef) -> Result<(), DomainStoreError>;

    /// Destroys the domain, removes the store's data about it, and waits until the hypervisor has
    /// released it, at most for `timeout`. Continues the destruction of a domain that is already
    /// dying. Files, processes and devices of libxl are not touched; [`Destroyed::left_behind`]
    /// lists them.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Backend`]: the domain is unchanged. [`DomainStoreError::Storage`]: the
    /// store's data could not be read, and the domain is unchanged; or it could not be removed, and
    /// the domain is destroyed ([`DomainStore::check`] shows which).
    fn destroy(&self, domain: DomainRef, timeout: Duration) -> Result<Destroyed, DomainStoreError>;

    /// Takes the lock of the domain for `command`, until the returned value is dropped. A lock
    /// whose process has ended is free; a lock whose process is unknown is not. The lock does not
    /// prevent other callers from calling the other methods: a command that works on a domain for
    /// some time takes it first.
    ///
    /// # Errors
    ///
    /// [`DomainStoreError::Locked`] names the process and the command that have it.
    /// [`DomainStoreError::Storage`].
    fn lock(&self, domain: DomainRef, command: &str) -> Result<DomainLock, DomainStoreError>;
}
