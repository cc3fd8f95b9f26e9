//! Where a mock host keeps its state: a directory that outlives the process, or
//! memory that does not.
//!
//! Big tables are sparse files that are mapped shared, so they are as current as
//! the last store even when the process is killed. The small state of each domain
//! is written whole, to a temporary name that is then renamed:
//!
//! | path | holds |
//! |---|---|
//! | `lock` | the process that has the host open |
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

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::HostConfig;
use super::error::MockError;
use super::state::Record;
use crate::DomId;

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
    path: PathBuf,
    /// Held while the host is open.
    _lock: Flock<File>,
}

/// A domain as it was last written.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) record: Record,
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
}

/// Put `octets` at `path` in one go: a reader, or whoever comes after a process that
/// died, finds the old file or the new one. It is not forced to the disk.
fn replace_file(path: &Path, octets: &[u8]) -> Result<(), MockError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    fs::write(&temporary, octets).map_err(MockError::io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(MockError::io("rename", &temporary))
}

fn parse<T: for<'de> Deserialize<'de>>(path: &Path, octets: &[u8]) -> Result<T, MockError> {
    serde_json::from_slice(octets).map_err(|source| MockError::Damaged {
        path: path.to_owned(),
        source,
    })
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, MockError> {
    let mut octets = serde_json::to_vec_pretty(value).map_err(|source| MockError::Damaged {
        path: PathBuf::from("state"),
        source,
    })?;
    octets.push(b'\n');
    Ok(octets)
}

impl Store {
    /// A store that leaves nothing behind.
    pub(super) fn in_memory() -> Self {
        Self {
            dir: None,
            files: Mutex::default(),
        }
    }

    /// Take the directory `path`, which exists, for this process.
    pub(super) fn lock(path: &Path) -> Result<Self, MockError> {
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(MockError::io("open", &lock_path))?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, Errno::EAGAIN)) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)
                    .map_err(MockError::io("read", &lock_path))?;
                let holder = holder.trim();
                return Err(MockError::InUse {
                    path: path.to_owned(),
                    holder: if holder.is_empty() { "unknown" } else { holder }.to_owned(),
                });
            }
            Err((_, errno)) => return Err(MockError::io("lock", &lock_path)(errno.into())),
        };
        (|| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        })()
        .map_err(MockError::io("write", &lock_path))?;
        Ok(Self {
            dir: Some(Dir {
                path: path.to_owned(),
                _lock: lock,
            }),
            files: Mutex::default(),
        })
    }

    /// The directory, if there is one.
    pub(super) fn path(&self) -> Option<&Path> {
        self.dir.as_ref().map(|dir| dir.path.as_path())
    }

    /// A big file of the host's, made if it is not there.
    pub(super) fn file(&self, name: &str) -> Result<File, MockError> {
        match self.path() {
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
            Some(path) => {
                let path = path.join(name);
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(&path)
                    .map_err(MockError::io("open", &path))
            }
        }
    }

    /// What `host.json` holds; `None` where there is none.
    pub(super) fn load_host(&self) -> Result<Option<HostRecord>, MockError> {
        let Some(dir) = self.path() else {
            return Ok(None);
        };
        let path = dir.join("host.json");
        match fs::read(&path) {
            Ok(octets) => parse(&path, &octets).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(MockError::io("read", &path)(e)),
        }
    }

    /// Write `host.json`.
    pub(super) fn save_host(&self, host: &HostRecord) -> Result<(), MockError> {
        match self.path() {
            None => Ok(()),
            Some(dir) => replace_file(&dir.join("host.json"), &encode(host)?),
        }
    }

    fn domain_dir(&self, domid: DomId) -> Option<PathBuf> {
        Some(self.path()?.join("domains").join(domid.0.to_string()))
    }

    /// Make room for a new domain.
    pub(super) fn add_domain(&self, domid: DomId) -> Result<(), MockError> {
        let Some(dir) = self.domain_dir(domid) else {
            return Ok(());
        };
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(MockError::io("create", &blobs))
    }

    /// Forget a domain: its directory gets a name that is no domain's.
    pub(super) fn forget_domain(&self, domid: DomId) -> Result<(), MockError> {
        // Of an earlier domain with this number, where that could not be removed.
        self.clear_forgotten(domid)?;
        let Some(dir) = self.domain_dir(domid) else {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            files.remove(&Self::p2m_name(domid));
            return Ok(());
        };
        fs::rename(&dir, dir.with_extension(DEAD)).map_err(MockError::io("rename", &dir))
    }

    /// Remove what is left of a forgotten domain, if anything is.
    pub(super) fn clear_forgotten(&self, domid: DomId) -> Result<(), MockError> {
        let Some(dir) = self.domain_dir(domid) else {
            return Ok(());
        };
        let dead = dir.with_extension(DEAD);
        match fs::remove_dir_all(&dead) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(MockError::io("remove", &dead)),
        }
    }

    /// The name of a domain's p2m file, for [`Store::file`].
    pub(super) fn p2m_name(domid: DomId) -> String {
        format!("domains/{}/p2m", domid.0)
    }

    /// Write the small state of a domain.
    pub(super) fn save_record(&self, record: &Record) -> Result<(), MockError> {
        match self.domain_dir(record.domid) {
            None => Ok(()),
            Some(dir) => replace_file(&dir.join("state.json"), &encode(record)?),
        }
    }

    /// Write one blob of a domain.
    pub(super) fn save_blob(&self, domid: DomId, name: &str, blob: &[u8]) -> Result<(), MockError> {
        match self.domain_dir(domid) {
            None => Ok(()),
            Some(dir) => replace_file(&dir.join("blobs").join(name), blob),
        }
    }

    /// Remove one blob of a domain, if it is there.
    pub(super) fn remove_blob(&self, domid: DomId, name: &str) -> Result<(), MockError> {
        let Some(dir) = self.domain_dir(domid) else {
            return Ok(());
        };
        let path = dir.join("blobs").join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(MockError::io("remove", &path)),
        }
    }

    /// Every domain there is. What is half-made or half-removed is removed; whether
    /// there was any comes second: frames may still be called its own.
    pub(super) fn load_domains(&self) -> Result<(Vec<Saved>, bool), MockError> {
        let Some(path) = self.path() else {
            return Ok((Vec::new(), false));
        };
        let mut leftovers = false;
        let domains = path.join("domains");
        let mut saved = Vec::new();
        for entry in fs::read_dir(&domains).map_err(MockError::io("read", &domains))? {
            let dir = entry.map_err(MockError::io("read", &domains))?.path();
            let state = dir.join("state.json");
            let record: Record = match fs::read(&state) {
                Ok(octets) if dir.extension().is_none() => parse(&state, &octets)?,
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(MockError::io("read", &state)(e));
                }
                _ => {
                    fs::remove_dir_all(&dir).map_err(MockError::io("remove", &dir))?;
                    leftovers = true;
                    continue;
                }
            };
            saved.push(Saved {
                record,
                blobs: load_blobs(&dir.join("blobs"))?,
            });
        }
        Ok((saved, leftovers))
    }
}

fn load_blobs(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>, MockError> {
    let mut blobs = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(MockError::io("read", dir))? {
        let path = entry.map_err(MockError::io("read", dir))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if path.extension().is_some_and(|e| e == "new") {
            fs::remove_file(&path).map_err(MockError::io("remove", &path))?;
            continue;
        }
        let blob = fs::read(&path).map_err(MockError::io("read", &path))?;
        blobs.insert(name.to_owned(), blob);
    }
    Ok(blobs)
}
