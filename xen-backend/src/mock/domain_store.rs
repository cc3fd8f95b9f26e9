//! The mock machine's domain store: names in the domains' records, everything else as their user
//! data.
//!
//! The lock of a domain is one of the host's locks ([`super::sharing`]), so it ends with its
//! process.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::Errno;

use super::domain::{MockDomain, errno_of, storage_errno};
use super::error::MockError;
use super::sharing::Range;
use super::state::{Dom, State};
use super::{MockHost, check_name, phase};
use crate::DomainControl;
use crate::domain_store::{
    Configuration, ConfigurationKeeper, DestroyOutcome, Destroyed, DomainLock, DomainRef,
    DomainStore, DomainStoreError, Extent, Introduction, ListedDomain, LockHolder,
};
use crate::error::BackendError;

/// The key of the configuration, libxl's name for it.
const CONFIGURATION: &str = "libxl-json";
/// The key of the emulators' records.
const EMULATORS: &str = "libxl-emulators";

impl MockHost {
    /// A handle on a domain whose UUID matches.
    fn named(&self, domain: DomainRef) -> Result<MockDomain, DomainStoreError> {
        self.check(domain)?;
        self.mock_domain(domain.domid).map_err(gone(domain))
    }

    /// Checks that no other domain has the name `name`.
    fn check_free(&self, domain: DomainRef, name: &str) -> Result<(), DomainStoreError> {
        let taken = DomainStore::list(self)?.into_iter().find(|listed| {
            listed.name.as_deref() == Some(name) && listed.info.domid != domain.domid
        });
        match taken {
            Some(listed) => Err(DomainStoreError::NameTaken {
                name: name.to_owned(),
                by: listed.domain(),
            }),
            None => Ok(()),
        }
    }

    fn get(&self, domain: DomainRef, key: &str) -> Result<Option<Vec<u8>>, DomainStoreError> {
        self.named(domain)?;
        self.userdata_get(domain.domid, key)
            .map_err(failed("reading the user data", domain))
    }

    fn put(
        &self,
        domain: DomainRef,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), DomainStoreError> {
        self.named(domain)?;
        self.keep_userdata(domain.domid, key, write)
            .map_err(failed("keeping the user data", domain))
    }

    /// Renames the domain to `to` if `from`, called with its present name, succeeds.
    fn set_name(
        &self,
        domain: DomainRef,
        to: &str,
        from: impl FnOnce(Option<String>) -> Result<(), DomainStoreError>,
    ) -> Result<(), DomainStoreError> {
        DomainStore::check_name(self, to)?;
        let names = self.machine.lock_names();
        let _names = names.map_err(failed("keeping the name", domain))?;
        from(self.name(domain)?)?;
        self.check_free(domain, to)?;
        let doing = "keeping the name";
        self.named(domain)?
            .change("rename", |state| {
                to.clone_into(&mut state.record.name);
                Ok(())
            })
            .map_err(|error| failed(doing, domain)(error.into()))
    }
}

impl MockDomain {
    fn listed(&self, state: &State) -> ListedDomain {
        ListedDomain {
            info: self.info_of(state),
            name: state.record.given_name().map(str::to_owned),
        }
    }
}

/// The error if the list of domains cannot be read.
fn all(error: &MockError) -> BackendError {
    BackendError::host("getdomaininfolist", errno_of(error)).explained(error.to_string())
}

fn gone(domain: DomainRef) -> impl Fn(BackendError) -> DomainStoreError {
    move |error| match error.errno {
        Errno::ESRCH => DomainStoreError::Gone { domain },
        _ => error.into(),
    }
}

fn failed(doing: &'static str, domain: DomainRef) -> impl Fn(MockError) -> DomainStoreError {
    move |error| match error {
        MockError::Backend(error) if error.errno == Errno::ESRCH => gone(domain)(error),
        other => DomainStoreError::storage(doing, domain.domid)(other),
    }
}

/// An error if the name that was `found` is not the one that the caller expects.
fn wrong_name(
    domain: DomainRef,
    expected: Option<&str>,
    found: Option<String>,
) -> Result<(), DomainStoreError> {
    match found.as_deref() == expected {
        true => Ok(()),
        false => Err(DomainStoreError::WrongName {
            domain,
            expected: expected.map(str::to_owned),
            found,
        }),
    }
}

fn bad_name(name: &str) -> DomainStoreError {
    DomainStoreError::BadName {
        name: name.to_owned(),
        rule: "a name on a mock machine has at most 64 letters, digits, `-`, `_`, `.` and `+`, \
               does not consist of digits alone and is not Domain-0",
    }
}

impl DomainStore for MockHost {
    fn list(&self) -> Result<Vec<ListedDomain>, DomainStoreError> {
        let mut listed = Vec::new();
        let domains = self.machine.all_domains();
        for dom in domains.map_err(|error| all(&error))? {
            let machine = Arc::clone(&self.machine);
            let domain = MockDomain { machine, dom };
            match domain.look("list", |state| Ok(domain.listed(state))) {
                Ok(of_domain) => listed.push(of_domain),
                // It has been destroyed in the meantime.
                Err(error) if error.errno == Errno::ESRCH => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(listed)
    }

    fn name(&self, domain: DomainRef) -> Result<Option<String>, DomainStoreError> {
        let given = |state: &State| Ok(state.record.given_name().map(str::to_owned));
        let name = self.named(domain)?.look("name", given);
        name.map_err(gone(domain))
    }

    fn check_name(&self, name: &str) -> Result<(), DomainStoreError> {
        check_name(name).map_err(|_| bad_name(name))
    }

    fn give_name(&self, domain: DomainRef, name: &str) -> Result<(), DomainStoreError> {
        self.set_name(domain, name, |found| wrong_name(domain, None, found))?;
        phase("renamed");
        Ok(())
    }

    fn rename(&self, domain: DomainRef, from: &str, to: &str) -> Result<(), DomainStoreError> {
        self.set_name(domain, to, |found| wrong_name(domain, Some(from), found))?;
        phase("renamed");
        Ok(())
    }

    fn configuration(&self, domain: DomainRef) -> Result<Option<Configuration>, DomainStoreError> {
        let bytes = self.get(domain, CONFIGURATION)?;
        Ok(bytes.map(|bytes| Configuration {
            bytes,
            keeper: ConfigurationKeeper::Store,
        }))
    }

    fn set_configuration(&self, domain: DomainRef, bytes: &[u8]) -> Result<(), DomainStoreError> {
        self.put(domain, CONFIGURATION, &mut |file| file.write_all(bytes))
    }

    fn emulators(&self, domain: DomainRef) -> Result<Option<Vec<u8>>, DomainStoreError> {
        self.get(domain, EMULATORS)
    }

    fn set_emulators(
        &self,
        domain: DomainRef,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), DomainStoreError> {
        self.put(domain, EMULATORS, write)
    }

    fn devices(&self, domain: DomainRef) -> Result<Vec<String>, DomainStoreError> {
        // The machine's guests have no devices, except the emulator records that are stored with a
        // domain.
        self.named(domain).map(|_| Vec::new())
    }

    fn extent(&self, domain: DomainRef) -> Result<Option<Extent>, DomainStoreError> {
        // There is no xenstore through which it could have changed.
        self.named(domain).map(|_| None)
    }

    fn introduce(
        &self,
        domain: DomainRef,
        introduction: &Introduction<'_>,
    ) -> Result<(), DomainStoreError> {
        // No xenstore and no console exist to connect the rings to.
        self.set_name(domain, introduction.name, |_| Ok(()))
    }

    fn forget(&self, domain: DomainRef) -> Result<(), DomainStoreError> {
        let mock = self.named(domain)?;
        let doing = "removing the user data";
        let mut aside = None;
        let forgotten = mock.change("forget", |state| {
            state.record.name.clear();
            let set = self.machine.store.set_aside_userdata(domain.domid);
            aside = Some(set.map_err(|error| storage_errno(&error))?);
            Ok(())
        });
        // The domain keeps either both its name and its user data, or neither.
        let settled = match (&forgotten, aside) {
            (_, None) => Ok(()),
            (Ok(()), Some(aside)) => aside.remove(),
            (Err(_), Some(aside)) => self.machine.store.put_back_userdata(domain.domid, aside),
        };
        if let Err(error) = settled {
            tracing::warn!(%error, domid = domain.domid.0, "user data of a domain");
        }
        forgotten.map_err(|error| failed(doing, domain)(error.into()))
    }

    fn destroy(&self, domain: DomainRef, _: Duration) -> Result<Destroyed, DomainStoreError> {
        let mock = self.named(domain)?;
        // The user data is removed at the same time.
        mock.destroy().map_err(gone(domain))?;
        Ok(Destroyed {
            outcome: DestroyOutcome::Gone,
            left_behind: Vec::new(),
        })
    }

    fn lock(&self, domain: DomainRef, command: &str) -> Result<DomainLock, DomainStoreError> {
        const DOING: &str = "locking";
        let dom = self.named(domain)?.dom;
        let locked = |holder| DomainStoreError::Locked {
            domain,
            holder,
            node: None,
        };
        let mut held = held_by(&dom);
        if let Some(holder) = &*held {
            return Err(locked(holder.clone()));
        }
        let store = Arc::clone(&self.machine.store);
        let range = Range::Work(domain.domid);
        let taken = store.locks.take(range);
        if !taken.map_err(DomainStoreError::storage(DOING, domain.domid))? {
            return Err(locked(self.holder(domain).map_err(failed(DOING, domain))?));
        }
        let holder = LockHolder::this(command);
        if let Err(error) = store.save_holder(domain.domid, &holder) {
            store.locks.give_back(range);
            return Err(failed(DOING, domain)(error));
        }
        *held = Some(holder.clone());
        drop(held);
        let (named, passed) = (Arc::clone(&self.machine.store), Arc::clone(&dom));
        let pass = move |pid| {
            let holder = LockHolder {
                pid: Some(pid),
                ..holder.clone()
            };
            let saved = named.save_holder(domain.domid, &holder);
            saved.map_err(failed(DOING, domain))?;
            *held_by(&passed) = Some(holder);
            Ok(())
        };
        let release = move || {
            // One step for this process's threads: none of them takes the lock in between.
            let mut held = held_by(&dom);
            store.locks.give_back(range);
            *held = None;
        };
        Ok(DomainLock::new(release, pass))
    }
}

fn held_by(dom: &Dom) -> MutexGuard<'_, Option<LockHolder>> {
    dom.holder.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MockHost {
    /// The command of another process that holds the lock of a domain. That process may have just
    /// taken it and not recorded itself yet.
    fn holder(&self, domain: DomainRef) -> Result<LockHolder, MockError> {
        const TRIES: u32 = 20;
        const BETWEEN: Duration = Duration::from_millis(5);
        let mut found = None;
        for _ in 0..TRIES {
            found = self.machine.store.load_holder(domain.domid)?;
            // A process that has ended held the lock earlier.
            let runs = |holder: &LockHolder| holder.pid.is_some_and(is_running);
            if found.as_ref().is_some_and(runs) {
                break;
            }
            thread::sleep(BETWEEN);
        }
        Ok(found.unwrap_or(LockHolder {
            pid: None,
            command: "another command".to_owned(),
        }))
    }
}

/// Whether a process with this number exists.
fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}
