//! Opens the hypervisor that the command line names, and stores what a toolstack keeps with a
//! domain: configuration and emulator records.
//!
//! Only this file knows which hypervisors there are. All others see a [`DomainStore`].

pub(crate) mod workload;

use std::fmt;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, Write};
use std::iter;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail};
use xsr_format::byte_order::ByteOrder;
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlReader, LibxlRecord, LibxlWriter};
use xsr_xen_backend::domain_store::{
    DestroyOutcome, Destroyed, DomainLock, DomainRef, DomainStore, DomainStoreError,
};
pub(crate) use xsr_xen_backend::mock::phase;
use xsr_xen_backend::mock::{HostConfig, MockError, MockHost};
use xsr_xen_backend::{DomId, OpenError, XenHost};

use crate::args::Backend;
use crate::cmd::migrate::away;
use crate::exit::{self, Aftermath, BadUsage};

/// The name under which libxl keeps a domain's configuration. Mock machines use it too.
pub(crate) const CONFIG: &str = "libxl-json";

/// The byte order of libxl streams that we write.
pub(crate) const LIBXL_HEADER: LibxlHeader = LibxlHeader {
    order: ByteOrder::Little,
    legacy_converted: false,
};

/// How long a destroyed domain may take to release its memory before the command goes on.
const DESTROY_WAIT: Duration = Duration::from_secs(5);

/// The hypervisor that a command works on. Clones are handles on the same one.
#[derive(Clone)]
pub(crate) struct Hypervisor {
    backend: Backend,
    store: Arc<dyn DomainStore>,
    /// The mock machine underneath. Its guests run only while this process runs them.
    mock: Option<MockHost>,
}

impl fmt::Debug for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, .. } = self;
        f.debug_struct("Hypervisor")
            .field("backend", backend)
            .finish_non_exhaustive()
    }
}

impl Deref for Hypervisor {
    type Target = dyn DomainStore;

    fn deref(&self) -> &Self::Target {
        &*self.store
    }
}

impl From<MockHost> for Hypervisor {
    fn from(mock: MockHost) -> Self {
        let directory = mock.directory().unwrap_or(Path::new("memory"));
        Self {
            backend: Backend::Mock(directory.to_owned()),
            store: Arc::new(mock.clone()),
            mock: Some(mock),
        }
    }
}

impl Hypervisor {
    /// Opens the hypervisor that has the domain to work on; with `direct` without libxl
    /// (`--direct`).
    ///
    /// # Errors
    ///
    /// There is no such hypervisor, or this program works on it only through `xl` or with
    /// `--direct`.
    pub(crate) fn open(backend: &Backend, direct: bool) -> Result<Self> {
        match direct {
            true => Self::direct(backend),
            false => Ok(MockHost::open(directory(backend)?)?.into()),
        }
    }

    /// Opens the hypervisor to create a domain on. Creates a mock machine if there is none yet.
    ///
    /// # Errors
    ///
    /// As [`Hypervisor::open`].
    pub(crate) fn open_or_create(backend: &Backend, direct: bool) -> Result<Self> {
        match direct {
            true => Self::direct(backend),
            false => Ok(mock_machine(directory(backend)?)?.into()),
        }
    }

    /// Opens the hypervisor to work on without libxl (`--direct`).
    ///
    /// # Errors
    ///
    /// There is no such hypervisor, or it is not Xen.
    pub(crate) fn direct(backend: &Backend) -> Result<Self> {
        let (store, mock) = match backend {
            Backend::Auto | Backend::Xen => (XenHost::open()?, None),
            Backend::MockXen(dir) => {
                let mock = MockHost::open_or_create(dir, &HostConfig::default())?;
                (mock.as_xen()?, Some(mock))
            }
            Backend::Mock(_) => {
                let why = "--direct is for a Xen host: a mock machine has no xl to do without";
                return Err(Error::new(BadUsage(why.to_owned())));
            }
        };
        Ok(Self {
            backend: backend.clone(),
            store: Arc::new(store),
            mock,
        })
    }

    /// Its name on the command line.
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The mock machine underneath, if it is one.
    pub(crate) fn mock(&self) -> Option<&MockHost> {
        self.mock.as_ref()
    }

    /// Takes the lock of a domain.
    ///
    /// # Errors
    ///
    /// Another command has it; the store cannot be read.
    pub(crate) fn lock_whole(
        &self,
        domain: DomainRef,
        command: &str,
    ) -> Result<WholeLock, DomainStoreError> {
        let machine = match (&self.backend, &self.mock) {
            (Backend::MockXen(_), Some(mock)) => Some(mock.lock(domain, command)?),
            _ => None,
        };
        Ok(WholeLock {
            _store: self.store.lock(domain, command)?,
            _machine: machine,
        })
    }

    /// Whether its guests have rings to xenstore and a console.
    pub(crate) fn has_rings(&self) -> bool {
        !matches!(self.backend, Backend::Mock(_))
    }

    /// A domain's name in messages: `domain 3 of mock:DIR`.
    pub(crate) fn place_of(&self, domid: DomId) -> String {
        match &self.backend {
            Backend::Auto | Backend::Xen => domid.to_string(),
            Backend::Mock(dir) | Backend::MockXen(dir) => {
                format!("{domid} of mock:{}", dir.display())
            }
        }
    }
}

/// The mock machine in a directory, created if it does not exist.
///
/// # Errors
///
/// The directory holds something else; another process is repairing the machine.
pub(crate) fn mock_machine(directory: &Path) -> Result<MockHost> {
    match MockHost::open_or_create(directory, &HostConfig::default()) {
        Err(e @ MockError::Occupied { .. }) => {
            bail!("{e}, and is not a mock machine; name another directory")
        }
        other => Ok(other?),
    }
}

/// Checks, before anything is created, that this program can work on it at all.
pub(crate) fn check(backend: &Backend) -> Result<()> {
    directory(backend).map(drop)
}

fn directory(backend: &Backend) -> Result<&Path> {
    match backend {
        Backend::Mock(dir) => return Ok(dir),
        Backend::MockXen(_) => bail!("mock-xen: is for --direct"),
        Backend::Auto | Backend::Xen => {}
    }
    let why = match XenHost::open() {
        Err(OpenError::NoXen) => {
            "this machine runs no Xen (there is no /dev/xen/privcmd)".to_owned()
        }
        Err(error) => error.to_string(),
        // With xl installed, xl does the work (`xl.rs`), and this point is not reached.
        Ok(_) => "this machine runs Xen, but there is no `xl` on PATH: install Xen's tools, or \
             give --direct (to work without libxl)"
            .to_owned(),
    };
    bail!(
        "{why}; use a mock machine: --backend mock:DIR, or XSR_BACKEND=mock:DIR (`xsr mock \
         create` makes one)"
    )
}

/// The command with which a user acts on a domain there.
pub(crate) fn domain_command(backend: &Backend, verb: &str, rest: &str) -> String {
    match backend {
        // xl has this only since Xen 4.20.
        Backend::Auto | Backend::Xen if verb == "resume" => format!("xsr resume --direct {rest}"),
        Backend::Auto | Backend::Xen => format!("xl {verb} {rest}"),
        Backend::Mock(dir) | Backend::MockXen(dir) => {
            format!("xsr mock {verb} --host {} {rest}", dir.display())
        }
    }
}

/// The domain that a command works on.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) domain: DomainRef,
    /// Its name, or a placeholder made from its number, for messages.
    pub(crate) name: String,
    /// What commands accept for it: its name, or its number if it has none.
    pub(crate) handle: String,
    /// The lock, held while the command works on the domain.
    pub(crate) lock: WholeLock,
}

/// The lock of a domain.
#[derive(Debug)]
pub(crate) struct WholeLock {
    _store: DomainLock,
    /// The lock of the mock machine below a store that only one process can open.
    _machine: Option<DomainLock>,
}

impl Found {
    /// Finds a domain, and locks it for `command`, the name of one of our commands.
    ///
    /// # Errors
    ///
    /// There is no such domain; another command works on it; the store cannot be read.
    pub(crate) fn find(host: &Hypervisor, called: &str, command: &str) -> Result<Self> {
        let domain = host.find(called)?;
        let lock = host.lock_whole(domain, &format!("xsr {command} {called}"))?;
        Ok(Self {
            domain,
            name: name_of(&**host, domain)?,
            handle: handle_of(&**host, domain)?,
            lock,
        })
    }

    /// Refuses a domain that cannot be sent away: it is renamed before the destination is told to
    /// run it, when all of its memory has been sent.
    ///
    /// # Errors
    ///
    /// It has no name, or its name cannot be made longer, or another domain has the longer name.
    pub(crate) fn check_leaves(&self, host: &Hypervisor) -> Result<()> {
        let (domain, backend) = (self.domain, host.backend());
        let Some(name) = host.name(domain)? else {
            let number = domain.domid.0;
            bail!(
                "{domain} has no name, by which it is told from its copy on the other host: first \
                 `{}`",
                domain_command(backend, "rename", &format!("{number} NAME"))
            )
        };
        let away = away(&name);
        let renamed = || format!("{name} has to be called {away} once the other host has it");
        host.check_name(&away).with_context(renamed)?;
        let listed = host.list()?;
        if let Some(other) = listed
            .iter()
            .find(|other| other.name.as_ref() == Some(&away))
        {
            let error = Error::new(DomainStoreError::NameTaken {
                name: away.clone(),
                by: other.domain(),
            });
            let first = domain_command(backend, "destroy", &away);
            let error = error.context(renamed());
            return Err(Aftermath::of(
                error,
                format!("if it is left from an earlier migration of {name}: `{first}`"),
            ));
        }
        Ok(())
    }
}

/// The name of a domain, or a placeholder made from its number.
///
/// # Errors
///
/// The domain is gone; the store cannot be read.
pub(crate) fn name_of(
    host: &dyn DomainStore,
    domain: DomainRef,
) -> Result<String, DomainStoreError> {
    let name = host.name(domain)?;
    Ok(name.unwrap_or_else(|| format!("domain-{}", domain.domid.0)))
}

/// What commands accept for a domain: its name, or its number if it has none.
///
/// # Errors
///
/// As [`name_of`].
pub(crate) fn handle_of(
    host: &dyn DomainStore,
    domain: DomainRef,
) -> Result<String, DomainStoreError> {
    let name = host.name(domain)?;
    Ok(name.unwrap_or_else(|| domain.domid.0.to_string()))
}

/// Destroys a domain, and tells the user what remains of it. A domain that another command has
/// destroyed counts as destroyed.
///
/// # Errors
///
/// The domain still exists.
pub(crate) fn destroy(
    host: &dyn DomainStore,
    domain: DomainRef,
    name: &str,
) -> Result<(), DomainStoreError> {
    let destroyed = match host.destroy(domain, DESTROY_WAIT) {
        // The store's data of the domain remain, and the error names them.
        Err(error @ DomainStoreError::Storage { .. }) if is_destroyed(host, domain) => {
            let error = Error::new(error);
            tracing::warn!("{name} is destroyed, but {}", exit::words(error.chain()));
            return Ok(());
        }
        Err(DomainStoreError::Gone { .. } | DomainStoreError::Replaced { .. }) => return Ok(()),
        destroyed => destroyed?,
    };
    let Destroyed {
        outcome,
        left_behind,
    } = destroyed;
    if outcome == DestroyOutcome::StillDying {
        tracing::warn!(
            "{name} is destroyed, but some of its memory is still in use: another domain or \
             process has it mapped"
        );
    }
    if !left_behind.is_empty() {
        let left: Vec<String> = left_behind.iter().map(ToString::to_string).collect();
        tracing::warn!("what libxl keeps of {name} stays: {}", left.join(", "));
    }
    Ok(())
}

/// Whether a domain is gone or dying.
fn is_destroyed(host: &dyn DomainStore, domain: DomainRef) -> bool {
    match host.check(domain) {
        Ok(info) => info.dying,
        Err(error) => matches!(
            error,
            DomainStoreError::Gone { .. } | DomainStoreError::Replaced { .. }
        ),
    }
}

/// Store the configuration with a domain.
pub(crate) fn store_config(host: &dyn DomainStore, domain: DomainRef, json: &str) -> Result<()> {
    Ok(host.set_configuration(domain, json.as_bytes())?)
}

/// The configuration stored with a domain.
pub(crate) fn config(host: &dyn DomainStore, domain: DomainRef) -> Result<Option<String>> {
    let Some(kept) = host.configuration(domain)? else {
        return Ok(None);
    };
    let mut json =
        String::from_utf8(kept.bytes).context("the configuration kept with the domain")?;
    // libxl includes the NUL that ends its string.
    json.truncate(json.trim_end_matches('\0').len());
    Ok(Some(json))
}

/// Store emulator records with a domain, as a libxl stream without a libxc stream.
pub(crate) fn store_emulators(
    host: &dyn DomainStore,
    domain: DomainRef,
    records: &[LibxlRecord],
) -> Result<()> {
    // An earlier checkpoint may have had some, which no longer hold.
    if records.is_empty() && host.emulators(domain)?.is_none() {
        return Ok(());
    }
    // Written directly: they may be long.
    Ok(host.set_emulators(domain, &mut |file| write_emulators(records, file))?)
}

fn write_emulators(records: &[LibxlRecord], file: &mut dyn Write) -> io::Result<()> {
    let mut stream = LibxlWriter::new(file, LIBXL_HEADER)?;
    let framed = iter::once(&LibxlRecord::LibxcContext)
        .chain(records)
        .chain(iter::once(&LibxlRecord::End));
    for record in framed {
        stream.write(record).map_err(io::Error::other)?;
    }
    Ok(())
}

/// A hash of emulator records, to notice that they have changed without keeping them.
pub(crate) fn hash_emulators(records: &[LibxlRecord]) -> io::Result<u64> {
    struct Hashed(DefaultHasher);
    impl Write for Hashed {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hashed = Hashed(DefaultHasher::new());
    write_emulators(records, &mut hashed)?;
    Ok(hashed.0.finish())
}

/// The emulator records stored with a domain.
pub(crate) fn emulators(host: &dyn DomainStore, domain: DomainRef) -> Result<Vec<LibxlRecord>> {
    let mut records = Vec::new();
    if let Some(kept) = host.emulators(domain)? {
        // Errors in it are the host's fault, not the image's.
        let bad = |e| anyhow::anyhow!("the emulator records kept with the domain: {e}");
        let mut stream = LibxlReader::new(kept.as_slice(), ReadOptions::default()).map_err(bad)?;
        while let Some(record) = stream.next_record().map_err(bad)? {
            if !matches!(record, LibxlRecord::LibxcContext | LibxlRecord::End) {
                records.push(record);
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use xsr_format::wrapper::libxl::{EmulatorId, EmulatorInstance};
    use xsr_xen_backend::mock::GuestSpec;
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::*;

    #[test]
    fn emulators_records_of_an_earlier_checkpoint_do_not_stay() {
        let mock = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Hvm, 8);
        let domid = mock.create_guest(&spec).expect("a guest");
        let which = mock.domain(domid).and_then(|domain| domain.info());
        let which = DomainRef::from(&which.expect("the guest"));
        store_emulators(&mock, which, &[]).expect("nothing");
        assert_eq!(mock.emulators(which).expect("read"), None);
        let record = LibxlRecord::EmulatorContext {
            emulator: EmulatorInstance {
                id: EmulatorId::QemuUpstream,
                index: 0,
            },
            state: vec![1, 2, 3],
        };
        store_emulators(&mock, which, std::slice::from_ref(&record)).expect("kept");
        assert_eq!(emulators(&mock, which).expect("read"), [record]);
        store_emulators(&mock, which, &[]).expect("kept");
        assert_eq!(emulators(&mock, which).expect("read"), []);
    }

    #[test]
    fn a_domain_that_a_command_works_on_is_refused_to_the_next() {
        let mock = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        mock.create_guest(&spec).expect("a guest");
        let on_xen = Hypervisor {
            backend: Backend::MockXen("memory".into()),
            store: Arc::new(mock.as_xen().expect("a Xen")),
            mock: Some(mock.clone()),
        };
        for host in [Hypervisor::from(mock), on_xen] {
            let number = host.domains().expect("the domains")[0].domid.0.to_string();
            let found = Found::find(&host, &number, "migrate").expect("the domain");
            let error = Found::find(&host, &number, "save").expect_err("a second command");
            let said = format!(
                "in use by process {} (xsr migrate {number})",
                std::process::id()
            );
            assert!(error.to_string().contains(&said), "{error}");
            drop(found);
            Found::find(&host, &number, "save").expect("the domain");
        }
    }

    #[test]
    fn a_domain_without_a_name_is_not_sent_away() {
        let mock = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let host = Hypervisor::from(mock);
        let new = xsr_xen_backend::NewDomain::new(GuestKind::Pvh, 1, 16);
        let number = host.create(&new).expect("a domain").0.to_string();
        let found = Found::find(&host, &number, "migrate").expect("the domain");
        assert_eq!(found.name, format!("domain-{number}"));
        let check = || {
            found
                .check_leaves(&host)
                .map_err(|error| exit::words(error.chain()))
        };
        let error = check().expect_err("no name");
        let said = format!("rename --host memory {number} NAME`");
        assert!(error.contains(&said), "{error}");
        host.give_name(found.domain, "web").expect("a name");
        check().expect("it has one");
        let left = xsr_xen_backend::NewDomain::new(GuestKind::Pvh, 1, 16);
        let left = DomainRef {
            domid: host.create(&left).expect("a domain"),
            uuid: left.uuid,
        };
        host.give_name(left, "web--migratedaway").expect("a name");
        let error = check().expect_err("the other name is taken");
        assert!(error.contains("exists already"), "{error}");
        let destroyed = host.destroy(left, DESTROY_WAIT).expect("it goes");
        assert_eq!(destroyed.outcome, DestroyOutcome::Gone);
        let long = "w".repeat(60);
        host.rename(found.domain, "web", &long).expect("a name");
        let error = check().expect_err("no room for more");
        assert!(error.contains("at most 64 letters"), "{error}");
    }

    #[test]
    fn the_nul_that_ends_a_configuration_of_libxl_is_not_part_of_it() {
        let mock = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let new = xsr_xen_backend::NewDomain::new(GuestKind::Pvh, 1, 16);
        let host = Hypervisor::from(mock);
        let which = DomainRef {
            domid: host.create(&new).expect("a domain"),
            uuid: new.uuid,
        };
        assert_eq!(config(&*host, which).expect("read"), None);
        host.set_configuration(which, b"{}\0").expect("kept");
        assert_eq!(config(&*host, which).expect("read").as_deref(), Some("{}"));
    }
}
