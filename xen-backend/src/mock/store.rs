//! Where a mock host keeps its state: a directory that outlives the process, or
//! memory that does not.
//!
//! Big tables are sparse files that are mapped shared, so they are as current as
//! the last store even when the process is killed. The small state of each domain
//! is written whole, to a temporary name that is then renamed:
//!
//! | path | holds |
//! |---|---|
//! | `lock` | the process that has the host open: its number and its command line |
//! | `host.json` | [`HostRecord`] |
//! | `memory` | frame `n` at offset `n * 4096` |
//! | `frames` | the frame table ([`super::frames`]) |
//! | `m2p` | a u64 pfn per frame, all ones where there is none |
//! | `blocks` | frames taken per 2 MiB |
//! | `counters` | four words per domain: pages, largest gfn ever plus 1, last port, none |
//! | `open` | one word: 1 while the host is open |
//! | `domains/N.dead` | what could not be removed of a domain that is gone |
//! | `domains/N/state.json` | [`super::state::Record`] |
//! | `domains/N/p2m` | translated guests: mfn + 1 per pfn, 0 where there is none |
//! | `domains/N/blobs/NAME` | contexts, policy and user data, as they are |
//!
//! These files hold the memory of guests. They are their owner's alone, and [`super::place`]
//! opens them without following a link.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::HostConfig;
use super::error::MockError;
use super::place::{How, NEW, Place};
use super::state::Record;
use crate::DomId;
use crate::domain_store::LockHolder;

/// What `host.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct HostRecord {
    /// Layout of the directory.
    pub(super) format: u32,
    pub(super) config: HostConfig,
    /// Number of the next domain.
    pub(super) next_domid: u16,
}

/// The layout that this program reads and writes.
pub(super) const FORMAT: u32 = 2;

/// The host's own state.
pub(super) const HOST: &str = "host.json";
/// Where the domains are.
pub(super) const DOMAINS: &str = "domains";
/// A domain's state, in its directory.
const STATE: &str = "state.json";
/// Where a domain's blobs are.
const BLOBS: &str = "blobs";
/// What the name of a forgotten domain's directory ends with.
const DEAD: &str = "dead";

/// The place of a host's state.
#[derive(Debug)]
pub(super) struct Store {
    /// `None`: nothing outlives the process.
    dir: Option<Dir>,
    /// Without a directory: the big files by name.
    files: Mutex<BTreeMap<String, File>>,
}

#[derive(Debug)]
struct Dir {
    place: Place,
    /// Held while the host is open.
    _lock: Flock<File>,
}

/// A domain as it was last written.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) record: Record,
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
}

fn parse<T: for<'de> Deserialize<'de>>(path: &Path, bytes: &[u8]) -> Result<T, MockError> {
    serde_json::from_slice(bytes).map_err(|source| MockError::Damaged {
        path: path.to_owned(),
        source,
    })
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, MockError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| MockError::Damaged {
        path: PathBuf::from("state"),
        source,
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl Store {
    /// A store that leaves nothing behind.
    pub(super) fn in_memory() -> Self {
        Self {
            dir: None,
            files: Mutex::default(),
        }
    }

    /// Take a directory for this process.
    pub(super) fn lock(place: Place) -> Result<Self, MockError> {
        const LOCK: &str = "lock";
        let file = place.file(LOCK, How::Write)?;
        let lock_path = place.path().join(LOCK);
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, Errno::EAGAIN)) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)
                    .map_err(MockError::io("read", &lock_path))?;
                return Err(MockError::InUse {
                    path: place.path().to_owned(),
                    holder: LockHolder::decode(&holder),
                });
            }
            Err((_, errno)) => return Err(MockError::io("lock", &lock_path)(errno.into())),
        };
        (|| {
            lock.set_len(0)?;
            lock.rewind()?;
            let LockHolder { pid, command } = LockHolder::by_command_line();
            writeln!(lock, "{pid} {command}")
        })()
        .map_err(MockError::io("write", &lock_path))?;
        Ok(Self {
            dir: Some(Dir { place, _lock: lock }),
            files: Mutex::default(),
        })
    }

    /// The directory, if there is one.
    pub(super) fn path(&self) -> Option<&Path> {
        self.place().map(Place::path)
    }

    fn place(&self) -> Option<&Place> {
        self.dir.as_ref().map(|dir| &dir.place)
    }

    /// A big file of the host's, made if it is not there.
    pub(super) fn file(&self, name: &str) -> Result<File, MockError> {
        match self.place() {
            None => {
                let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                let file = match files.entry(name.to_owned()) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(place) => {
                        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC)
                            .map_err(|errno| MockError::io("create", name)(errno.into()))?;
                        place.insert(File::from(file))
                    }
                };
                file.try_clone().map_err(MockError::io("open", name))
            }
            Some(place) => match name.rsplit_once('/') {
                None => place.file(name, How::Write),
                Some((dir, name)) => place.within(dir)?.file(name, How::Write),
            },
        }
    }

    /// What `host.json` holds; `None` where there is none.
    pub(super) fn load_host(&self) -> Result<Option<HostRecord>, MockError> {
        let Some(place) = self.place() else {
            return Ok(None);
        };
        match place.read(HOST)? {
            Some(bytes) => parse(&place.path().join(HOST), &bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Write `host.json`.
    pub(super) fn save_host(&self, host: &HostRecord) -> Result<(), MockError> {
        match self.place() {
            None => Ok(()),
            Some(place) => place.replace(HOST, &encode(host)?),
        }
    }

    /// Where the domains are.
    fn domains(&self) -> Result<Option<Place>, MockError> {
        self.place().map(|place| place.within(DOMAINS)).transpose()
    }

    fn domain(&self, domid: DomId) -> Result<Option<Place>, MockError> {
        self.place()
            .map(|place| place.within(&format!("{DOMAINS}/{}", domid.0)))
            .transpose()
    }

    /// Make room for a new domain.
    pub(super) fn add_domain(&self, domid: DomId) -> Result<(), MockError> {
        let Some(domains) = self.domains()? else {
            return Ok(());
        };
        domains.make(&domid.0.to_string())?.make(BLOBS)?;
        Ok(())
    }

    /// Forget a domain: its directory gets a name that is no domain's.
    pub(super) fn forget_domain(&self, domid: DomId) -> Result<(), MockError> {
        // Of an earlier domain with this number, where that could not be removed.
        self.clear_forgotten(domid)?;
        let Some(domains) = self.domains()? else {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            files.remove(&Self::p2m_name(domid));
            return Ok(());
        };
        domains.rename(&domid.0.to_string(), &dead(domid))
    }

    /// Remove what is left of a forgotten domain, if anything is.
    pub(super) fn clear_forgotten(&self, domid: DomId) -> Result<(), MockError> {
        match self.domains()? {
            None => Ok(()),
            Some(domains) => domains.remove_all(&dead(domid)),
        }
    }

    /// The name of a domain's p2m file, for [`Store::file`].
    pub(super) fn p2m_name(domid: DomId) -> String {
        format!("domains/{}/p2m", domid.0)
    }

    /// Write the small state of a domain.
    pub(super) fn save_record(&self, record: &Record) -> Result<(), MockError> {
        match self.domain(record.domid)? {
            None => Ok(()),
            Some(domain) => domain.replace(STATE, &encode(record)?),
        }
    }

    /// Write one blob of a domain.
    pub(super) fn save_blob(&self, domid: DomId, name: &str, blob: &[u8]) -> Result<(), MockError> {
        match self.domain(domid)? {
            None => Ok(()),
            Some(domain) => domain.within(BLOBS)?.replace(name, blob),
        }
    }

    /// Remove one blob of a domain, if it is there.
    pub(super) fn remove_blob(&self, domid: DomId, name: &str) -> Result<(), MockError> {
        match self.domain(domid)? {
            None => Ok(()),
            Some(domain) => domain.within(BLOBS)?.remove(name),
        }
    }

    /// Every domain there is. What is half-made or half-removed is removed; whether
    /// there was any comes second: frames may still be called its own.
    pub(super) fn load_domains(&self) -> Result<(Vec<Saved>, bool), MockError> {
        let Some(domains) = self.domains()? else {
            return Ok((Vec::new(), false));
        };
        let mut leftovers = false;
        let mut saved = Vec::new();
        for name in domains.names()? {
            let whole = Path::new(&name).extension().is_none();
            let domain = domains.within(&name)?;
            let state = match whole {
                true => domain.read(STATE)?,
                false => None,
            };
            let Some(state) = state else {
                domains.remove_all(&name)?;
                leftovers = true;
                continue;
            };
            saved.push(Saved {
                record: parse(&domain.path().join(STATE), &state)?,
                blobs: load_blobs(&domain.within(BLOBS)?)?,
            });
        }
        Ok((saved, leftovers))
    }
}

/// What the directory of a forgotten domain is called.
fn dead(domid: DomId) -> String {
    format!("{}.{DEAD}", domid.0)
}

fn load_blobs(blobs: &Place) -> Result<BTreeMap<String, Vec<u8>>, MockError> {
    let mut loaded = BTreeMap::new();
    for name in blobs.names()? {
        if Path::new(&name).extension().is_some_and(|e| e == NEW) {
            blobs.remove(&name)?;
        } else if let Some(blob) = blobs.read(&name)? {
            loaded.insert(name, blob);
        }
    }
    Ok(loaded)
}
