//! The mock machine's domain store: names in the domains' records, everything else as their user
//! data.
//!
//! Locks are kept in memory: only one process at a time has the machine open. Another process can
//! only ask it to show a domain or to change its state (`control.rs`), which ignores locks.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::domain::MockDomain;
use super::error::MockError;
use super::state::USERDATA;
use super::{MockHost, check_name, phase};
use crate::domain_store::{
    Configuration, ConfigurationKeeper, DestroyOutcome, Destroyed, DomainLock, DomainRef,
    DomainStore, DomainStoreError, Introduction, ListedDomain, LockHolder,
};
use crate::error::BackendError;
use crate::{DomId, DomainControl};

/// The key of the configuration, libxl's name for it.
const CONFIGURATION: &str = "libxl-json";
/// The key of the emulators' records.
const EMULATORS: &str = "libxl-emulators";

/// The machine's name for a domain that was not given one.
pub(super) fn default_name(domid: DomId) -> String {
    format!("domain-{}", domid.0)
}

impl MockHost {
    /// A handle on a domain whose UUID matches.
    fn named(&self, domain: DomainRef) -> Result<MockDomain, DomainStoreError> {
        self.check(domain)?;
        self.mock_domain(domain.domid).map_err(gone(domain))
    }

    /// While this is held, no name changes through this store.
    fn names(&self) -> MutexGuard<'_, ()> {
        let names = self.machine.names.lock();
        names.unwrap_or_else(PoisonError::into_inner)
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

    fn put(&self, domain: DomainRef, key: &str, bytes: &[u8]) -> Result<(), DomainStoreError> {
        self.named(domain)?;
        self.userdata_store(domain.domid, key, bytes)
            .map_err(failed("keeping the user data", domain))
    }

    /// Renames the domain to `to` if `from`, called with its present name, succeeds.
    fn set_name(
        &self,
        domain: DomainRef,
        to: &str,
        from: impl FnOnce(Option<String>) -> Result<(), DomainStoreError>,
    ) -> Result<(), DomainStoreError> {
        check_name(to).map_err(|_| bad_name(to))?;
        let _names = self.names();
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
        for dom in self.machine.all_domains() {
            let machine = Arc::clone(&self.machine);
            let domain = MockDomain { machine, dom };
            let info = match domain.info() {
                Ok(info) => info,
                // It has been destroyed in the meantime.
                Err(error) if error.errno == Errno::ESRCH => continue,
                Err(error) => return Err(error.into()),
            };
            let name = domain.dom.lock().record.name.clone();
            let name = Some(name).filter(|name| *name != default_name(info.domid));
            listed.push(ListedDomain { info, name });
        }
        Ok(listed)
    }

    fn name(&self, domain: DomainRef) -> Result<Option<String>, DomainStoreError> {
        let name = self
            .named(domain)?
            .look("name", |state| Ok(state.record.name.clone()))
            .map_err(gone(domain))?;
        Ok(Some(name).filter(|name| *name != default_name(domain.domid)))
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
        self.put(domain, CONFIGURATION, bytes)
    }

    fn emulators(&self, domain: DomainRef) -> Result<Option<Vec<u8>>, DomainStoreError> {
        self.get(domain, EMULATORS)
    }

    fn set_emulators(&self, domain: DomainRef, bytes: &[u8]) -> Result<(), DomainStoreError> {
        self.put(domain, EMULATORS, bytes)
    }

    fn devices(&self, domain: DomainRef) -> Result<Vec<String>, DomainStoreError> {
        // The machine's guests have no devices, except the emulator records that are stored with a
        // domain.
        self.named(domain).map(|_| Vec::new())
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
        let keys: BTreeSet<String> = mock
            .look("userdata", |state| {
                let names = state.blobs.keys();
                Ok(names
                    .filter(|name| name.starts_with(USERDATA))
                    .cloned()
                    .collect())
            })
            .map_err(gone(domain))?;
        let doing = "removing the user data";
        let mut state = mock.dom.lock();
        for key in keys {
            let removed = self.machine.store.remove_blob(domain.domid, &key);
            removed.map_err(failed(doing, domain))?;
            state.blobs.remove(&key);
        }
        drop(state);
        mock.change("rename", |state| {
            state.record.name = default_name(domain.domid);
            Ok(())
        })
        .map_err(|error| failed(doing, domain)(error.into()))
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
        let dom = self.named(domain)?.dom;
        let mut holder = dom.holder.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = &*holder {
            return Err(DomainStoreError::Locked {
                domain,
                holder: holder.clone(),
                node: None,
            });
        }
        *holder = Some(LockHolder::this(command));
        drop(holder);
        Ok(DomainLock::new(move || {
            *dom.holder.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }))
    }
}
