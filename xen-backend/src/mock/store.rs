//! Storage of a mock host's state: a directory that outlives the process, or memory that does not.
//!
//! Big tables are sparse files that are mapped shared, so they are current even if the process is
//! killed. The small state of each domain is written as a whole, to a temporary file that is then
//! renamed:
//!
//! | path | holds |
//! |---|---|
//! | `lock` | nothing: it is locked ([`super::sharing`]) |
//! | `changes` | counters of changes, a word each ([`super::sharing`]) |
//! | `host.json` | [`HostRecord`] |
//! | `memory` | frame `n` at offset `n * 4096` |
//! | `frames` | the frame table ([`super::frames`]) |
//! | `m2p` | a u64 pfn per frame, all ones if it has none |
//! | `blocks` | frames taken per 2 MiB |
//! | `counters` | four words per domain: pages, largest gfn ever plus 1, last port, unused |
//! | `open` | one word: how many processes have the host open, or have died while they had |
//! | `xenstore` | the nodes of the machine's xenstore ([`super::face`]), once there are any |
//! | `domains/N.dead` | remains of a domain that is gone, if they could not be removed |
//! | `domains/N/state.json` | [`super::state::Record`] |
//! | `domains/N/p2m` | translated guests: mfn + 1 per pfn, 0 if it has none |
//! | `domains/N/holder` | the command that has, or had, the lock of the domain |
//! | `domains/N/blobs/NAME` | contexts, policy and user data, as they are |
//!
//! These files hold the memory of guests. They are private to their owner, and [`super::place`]
//! opens them without following links.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::HostConfig;
use super::error::MockError;
use super::memory::Words;
use super::place::{How, Place, is_new, new_name};
use super::sharing::{CHANGES, COUNTERS, Changes, Locks};
use super::state::Record;
use crate::DomId;
use crate::domain_store::LockHolder;

/// The contents of `host.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct HostRecord {
    /// The version of the directory's layout.
    pub(super) format: u32,
    pub(super) config: HostConfig,
    /// Number of the next domain.
    pub(super) next_domid: u16,
}

/// The layout that this program reads and writes.
pub(super) const FORMAT: u32 = 3;

/// The host's own state.
pub(super) const HOST: &str = "host.json";
/// The nodes of xenstore.
const XENSTORE: &str = "xenstore";
/// The directory of the domains.
pub(super) const DOMAINS: &str = "domains";
/// A domain's state, in its directory.
const STATE: &str = "state.json";
/// The directory of a domain's blobs.
const BLOBS: &str = "blobs";
/// The prefix of the name of a user data blob.
const USERDATA: &str = "userdata-";
/// The file in a domain's directory that names the command with its lock.
const HOLDER: &str = "holder";
/// The suffix of the directory of a removed domain.
const DEAD: &str = "dead";

/// The storage of a host's state.
#[derive(Debug)]
pub(super) struct Store {
    /// `None`: nothing outlives the process.
    place: Option<Place>,
    /// Without a directory: the large files by name.
    files: Mutex<BTreeMap<String, File>>,
    /// Without a directory: the domains' user data. In a directory it is not kept in memory, because
    /// it may be long.
    userdata: Mutex<BTreeMap<DomId, BTreeMap<String, Vec<u8>>>>,
    /// The locks between processes.
    pub(super) locks: Locks,
    /// Counters of changes.
    changes: Words,
}

/// A domain's last written state.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) record: Record,
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
}

fn parse<T: for<'de> Deserialize<'de>>(path: &Path, bytes: &[u8]) -> Result<T, MockError> {
    serde_json::from_slice(bytes).map_err(|cause| MockError::Damaged {
        path: path.to_owned(),
        cause,
    })
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, MockError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|cause| MockError::Damaged {
        path: PathBuf::from("state"),
        cause,
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl Store {
    /// A store in memory.
    pub(super) fn in_memory() -> Result<Self, MockError> {
        Self::over(None, Locks::none())
    }

    /// A store in a directory, which other processes may have open too.
    pub(super) fn open(place: Place, locks: Locks) -> Result<Self, MockError> {
        Self::over(Some(place), locks)
    }

    fn over(place: Option<Place>, locks: Locks) -> Result<Self, MockError> {
        let files = Mutex::default();
        let file = big_file(place.as_ref(), &files, CHANGES)?;
        let changes = Words::map(&file, COUNTERS).map_err(MockError::io("map", CHANGES))?;
        Ok(Self {
            place,
            files,
            userdata: Mutex::default(),
            locks,
            changes,
        })
    }

    /// The number of changes of `of`, by any process.
    pub(super) fn count(&self, of: Changes) -> u64 {
        self.changes.get(of.index())
    }

    /// Counts a change of `of`, and returns the new number.
    pub(super) fn changed(&self, of: Changes) -> u64 {
        self.changes.increment(of.index())
    }

    /// The directory, if there is one.
    pub(super) fn path(&self) -> Option<&Path> {
        self.place().map(Place::path)
    }

    /// The path of a file in it, for messages.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path()
            .map_or_else(PathBuf::new, Path::to_owned)
            .join(name)
    }

    fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// A large file of the host, created if it does not exist.
    pub(super) fn file(&self, name: &str) -> Result<File, MockError> {
        big_file(self.place(), &self.files, name)
    }

    /// The contents of `host.json`; `None` if it does not exist.
    pub(super) fn load_host(&self) -> Result<Option<HostRecord>, MockError> {
        let Some(place) = self.place() else {
            return Ok(None);
        };
        match place.read(HOST)? {
            Some(bytes) => {
                let host: HostRecord = parse(&place.path().join(HOST), &bytes)?;
                match host.format {
                    FORMAT => Ok(Some(host)),
                    layout => Err(MockError::OtherLayout {
                        path: place.path().to_owned(),
                        layout,
                    }),
                }
            }
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

    /// The nodes of xenstore; `None` if they are not kept here but in memory.
    pub(super) fn load_nodes(&self) -> Result<Option<BTreeMap<String, Vec<u8>>>, MockError> {
        let Some(place) = self.place() else {
            return Ok(None);
        };
        match place.read(XENSTORE)? {
            Some(bytes) => parse(&place.path().join(XENSTORE), &bytes).map(Some),
            None => Ok(Some(BTreeMap::new())),
        }
    }

    /// Writes the nodes of xenstore; false if they are to be kept in memory.
    pub(super) fn save_nodes(&self, nodes: &BTreeMap<String, Vec<u8>>) -> Result<bool, MockError> {
        let Some(place) = self.place() else {
            return Ok(false);
        };
        // Without line breaks, which would be most of it.
        let bytes = serde_json::to_vec(nodes).map_err(|cause| MockError::Damaged {
            path: place.path().join(XENSTORE),
            cause,
        })?;
        place.replace(XENSTORE, &bytes)?;
        Ok(true)
    }

    /// The directory of the domains.
    fn domains(&self) -> Result<Option<Place>, MockError> {
        self.place().map(|place| place.within(DOMAINS)).transpose()
    }

    fn domain(&self, domid: DomId) -> Result<Option<Place>, MockError> {
        self.place()
            .map(|place| place.within(&format!("{DOMAINS}/{}", domid.0)))
            .transpose()
    }

    /// Create the directory of a new domain.
    pub(super) fn add_domain(&self, domid: DomId) -> Result<(), MockError> {
        let Some(domains) = self.domains()? else {
            return Ok(());
        };
        domains.make(&domid.0.to_string())?.make(BLOBS)?;
        Ok(())
    }

    /// Remove a domain: its directory is renamed to a name that is not a domain's.
    pub(super) fn forget_domain(&self, domid: DomId) -> Result<(), MockError> {
        // The remains of an earlier domain with this number, if they could not be removed then.
        self.clear_forgotten(domid)?;
        let Some(domains) = self.domains()? else {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            files.remove(&Self::p2m_name(domid));
            self.userdata().remove(&domid);
            return Ok(());
        };
        domains.rename(&domid.0.to_string(), &dead(domid))
    }

    /// Remove the remains of a removed domain, if any.
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

    /// Remove one blob of a domain, if it exists.
    pub(super) fn remove_blob(&self, domid: DomId, name: &str) -> Result<(), MockError> {
        match self.domain(domid)? {
            None => Ok(()),
            Some(domain) => domain.within(BLOBS)?.remove(name),
        }
    }

    fn userdata(&self) -> MutexGuard<'_, BTreeMap<DomId, BTreeMap<String, Vec<u8>>>> {
        self.userdata.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of a domain's blobs.
    fn blobs(&self, domid: DomId) -> Result<Option<Place>, MockError> {
        self.domain(domid)?
            .map(|domain| domain.within(BLOBS))
            .transpose()
    }

    /// The user data of a domain under `key`. Must be called with the domain's state locked, like
    /// the functions below.
    pub(super) fn load_userdata(
        &self,
        domid: DomId,
        key: &str,
    ) -> Result<Option<Vec<u8>>, MockError> {
        match self.blobs(domid)? {
            Some(blobs) => blobs.read(&format!("{USERDATA}{key}")),
            None => {
                let userdata = self.userdata();
                Ok(userdata.get(&domid).and_then(|keys| keys.get(key)).cloned())
            }
        }
    }

    /// Keeps what `write` writes as user data of a domain under `key`. After a failure the earlier
    /// data is kept.
    pub(super) fn save_userdata(
        &self,
        domid: DomId,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), MockError> {
        if let Some(blobs) = self.blobs(domid)? {
            return blobs.replace_with(&format!("{USERDATA}{key}"), write);
        }
        let mut bytes = Vec::new();
        write(&mut bytes).map_err(MockError::io("write", key))?;
        let mut userdata = self.userdata();
        let keys = userdata.entry(domid).or_default();
        keys.insert(key.to_owned(), bytes);
        Ok(())
    }

    /// Makes a domain have no user data, in a way that can be undone. After a failure it has all of
    /// it.
    pub(super) fn set_aside_userdata(&self, domid: DomId) -> Result<SetAside, MockError> {
        let Some(blobs) = self.blobs(domid)? else {
            let kept = self.userdata().remove(&domid).unwrap_or_default();
            return Ok(SetAside::Memory(kept));
        };
        let mut names = blobs.names()?;
        names.retain(|name| name.starts_with(USERDATA) && !is_new(name));
        names.sort();
        for (done, name) in names.iter().enumerate() {
            if let Err(error) = blobs.rename(name, &new_name(name)) {
                names.truncate(done);
                put_back(&blobs, &names)?;
                return Err(error);
            }
        }
        Ok(SetAside::Files(blobs, names))
    }

    /// Undoes [`Store::set_aside_userdata`].
    pub(super) fn put_back_userdata(&self, domid: DomId, aside: SetAside) -> Result<(), MockError> {
        match aside {
            SetAside::Files(blobs, names) => put_back(&blobs, &names),
            SetAside::Memory(kept) => {
                self.userdata().insert(domid, kept);
                Ok(())
            }
        }
    }

    /// The keys of a domain's user data, with the number of bytes of each.
    pub(super) fn userdata_sizes(&self, domid: DomId) -> Result<BTreeMap<String, u64>, MockError> {
        let mut sizes = BTreeMap::new();
        match self.blobs(domid)? {
            Some(blobs) => {
                for name in blobs.names()? {
                    if let Some(key) = name.strip_prefix(USERDATA)
                        && !is_new(&name)
                        && let Some(bytes) = blobs.length(&name)?
                    {
                        sizes.insert(key.to_owned(), bytes);
                    }
                }
            }
            None => {
                let userdata = self.userdata();
                let keys = userdata.get(&domid).into_iter().flatten();
                sizes.extend(keys.map(|(key, bytes)| (key.clone(), bytes.len() as u64)));
            }
        }
        Ok(sizes)
    }

    /// Removes incomplete and half-removed domains, and returns whether there were any: they may
    /// still own frames. Only for a process that has the host open alone.
    pub(super) fn clear_leftovers(&self) -> Result<bool, MockError> {
        let Some(domains) = self.domains()? else {
            return Ok(false);
        };
        let mut leftovers = false;
        for name in domains.names()? {
            let whole = Path::new(&name).extension().is_none();
            if whole && domains.within(&name)?.read(STATE)?.is_some() {
                domains.within(&name)?.within(BLOBS)?.clear_new()?;
                continue;
            }
            domains.remove_any(&name)?;
            leftovers = true;
        }
        Ok(leftovers)
    }

    /// All domains.
    pub(super) fn load_domains(&self) -> Result<Vec<Saved>, MockError> {
        let Some(domains) = self.domains()? else {
            return Ok(Vec::new());
        };
        let mut saved = Vec::new();
        for name in domains.names()? {
            if let Ok(number) = name.parse() {
                saved.extend(load(&domains, DomId(number))?);
            }
        }
        Ok(saved)
    }

    /// A domain; `None` if none has this number.
    pub(super) fn load_domain(&self, domid: DomId) -> Result<Option<Saved>, MockError> {
        match self.domains()? {
            None => Ok(None),
            Some(domains) => load(&domains, domid),
        }
    }

    /// Records the command that holds the lock of a domain.
    pub(super) fn save_holder(&self, domid: DomId, holder: &LockHolder) -> Result<(), MockError> {
        match self.domain(domid)? {
            None => Ok(()),
            Some(domain) => domain.replace(HOLDER, &holder.encode()),
        }
    }

    /// The command that holds, or last held, the lock of a domain.
    pub(super) fn load_holder(&self, domid: DomId) -> Result<Option<LockHolder>, MockError> {
        let holder = match self.domain(domid)? {
            None => None,
            Some(domain) => domain.read(HOLDER)?,
        };
        Ok(holder.and_then(|text| LockHolder::decode(&text)))
    }
}

/// The user data that a domain had.
#[derive(Debug)]
pub(super) enum SetAside {
    /// The directory, and the names of the files: they now have those of files that are not
    /// complete, which are never read.
    Files(Place, Vec<String>),
    /// That of a host in memory.
    Memory(BTreeMap<String, Vec<u8>>),
}

impl SetAside {
    /// Removes it.
    pub(super) fn remove(self) -> Result<(), MockError> {
        match self {
            Self::Files(blobs, names) => names
                .iter()
                .try_for_each(|name| blobs.remove(&new_name(name))),
            Self::Memory(_) => Ok(()),
        }
    }
}

/// Gives all files their names again; the first error counts.
fn put_back(blobs: &Place, names: &[String]) -> Result<(), MockError> {
    let mut result = Ok(());
    for name in names {
        let back = blobs.rename(&new_name(name), name);
        result = result.and(back);
    }
    result
}

/// A large file, created if it does not exist.
fn big_file(
    place: Option<&Place>,
    files: &Mutex<BTreeMap<String, File>>,
    name: &str,
) -> Result<File, MockError> {
    let Some(place) = place else {
        let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match files.entry(name.to_owned()) {
            Entry::Occupied(file) => file.into_mut(),
            Entry::Vacant(vacant) => {
                let file = memfd_create(name, MFdFlags::MFD_CLOEXEC)
                    .map_err(|errno| MockError::io("create", name)(errno.into()))?;
                vacant.insert(File::from(file))
            }
        };
        return file.try_clone().map_err(MockError::io("open", name));
    };
    match name.rsplit_once('/') {
        None => place.file(name, How::Write),
        Some((dir, name)) => place.within(dir)?.file(name, How::Write),
    }
}

/// The domain with this number; `None` also if another process removes it meanwhile.
fn load(domains: &Place, domid: DomId) -> Result<Option<Saved>, MockError> {
    let loaded = (|| {
        let domain = domains.within(&domid.0.to_string())?;
        let Some(state) = domain.read(STATE)? else {
            return Ok(None);
        };
        Ok(Some(Saved {
            record: parse(&domain.path().join(STATE), &state)?,
            blobs: load_blobs(&domain.within(BLOBS)?)?,
        }))
    })();
    match loaded {
        Err(MockError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        loaded => loaded,
    }
}

/// The name of the directory of a removed domain.
fn dead(domid: DomId) -> String {
    format!("{}.{DEAD}", domid.0)
}

/// The contexts and the policy of a domain, without its user data.
fn load_blobs(blobs: &Place) -> Result<BTreeMap<String, Vec<u8>>, MockError> {
    let mut loaded = BTreeMap::new();
    for name in blobs.names()? {
        // A blob that is being written still has its old contents under its own name.
        if !is_new(&name)
            && !name.starts_with(USERDATA)
            && let Some(blob) = blobs.read(&name)?
        {
            loaded.insert(name, blob);
        }
    }
    Ok(loaded)
}
