//! The mock machine: its memory, frame table, m2p and allocator, and the domains
//! on it.
//!
//! Other processes may have the same machine open. Their changes are detected with counters
//! ([`super::sharing`]), and read again.
//!
//! Lock order: names, a domain's state, its memory ([`Dom::write`]), the list of domains, the
//! allocator.

mod allocation;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::off_t;
use xsr_format::frame::{Mfn, PAGE_SIZE, Page};

use self::allocation::{Allocation, AllocatorHeld, recount};
use super::HostConfig;
use super::allocator::{Allocator, BLOCK_FRAMES, BLOCK_LEN};
use super::domain::storage_errno;
use super::error::MockError;
use super::frames::{Frame, FrameUse, Frames};
use super::guest::Stop;
use super::memory::Words;
use super::sharing::{Changes, Held, Opened, Range};
use super::state::{Dom, MAX_PFNS, Record};
use super::store::{FORMAT, HostRecord, Saved, Store};
use crate::DomId;
use crate::pages::ENTRIES_PER_TABLE;

/// First frame of the compat m2p, which 32-bit guests see; below the first frame that the allocator
/// hands out.
pub(super) const COMPAT_M2P: Mfn = Mfn(0x80);
/// First of the frames that Xen's own entries in a guest's level-4 table refer to.
pub(super) const XEN_TABLES: Mfn = Mfn(0x40);

/// The m2p's entry for a frame that is not a guest's.
pub(super) const INVALID_M2P: u64 = u64::MAX;

/// The first number that is not a domain's.
const DOMID_FIRST_RESERVED: u16 = 0x7ff0;

/// The machine.
#[derive(Debug)]
pub(super) struct Machine {
    /// Whether the guest that is being created is no longer wanted.
    pub(super) stop: Stop,
    pub(super) store: Arc<Store>,
    pub(super) config: HostConfig,
    pub(super) memory: File,
    /// The same memory as words, for the reads and writes of running guests.
    memory_words: Words,
    pub(super) frames: Frames,
    pub(super) m2p_file: File,
    m2p: Words,
    /// Pages currently mapped as foreign pages.
    pub(super) mapped: Arc<AtomicUsize>,
    /// Four words per domain: its pages, its largest gfn ever plus 1, the last allocated event
    /// channel, and a spare.
    counters: Words,
    /// One word: the number of processes that have the host open, or died while they had.
    open_mark: Words,
    allocation: Mutex<Allocation>,
    domains: RwLock<BTreeMap<DomId, Arc<Dom>>>,
    /// The change count that `domains` corresponds to.
    domains_seen: AtomicU64,
    next_domid: Mutex<u16>,
    /// Held while a domain's name is being set.
    names: Mutex<()>,
}

fn words(store: &Store, name: &str, len: usize) -> Result<Words, MockError> {
    let file = store.file(name)?;
    Words::map(&file, len).map_err(MockError::io("map", store.path_of(name)))
}

fn frame_count(config: &HostConfig) -> Result<usize, MockError> {
    let frames = config.memory_pages.next_multiple_of(BLOCK_FRAMES);
    // The m2p and the frame table are mapped whole: 2^32 frames are 16 TiB.
    match usize::try_from(frames) {
        Ok(frames) if (4 * BLOCK_FRAMES..=1 << 32).contains(&(frames as u64)) => Ok(frames),
        _ => Err(MockError::BadSpec(format!(
            "a mock host has between 8 MiB and 16 TiB of memory, not {} pages",
            config.memory_pages
        ))),
    }
}

impl Machine {
    /// Create a new machine in `store`.
    pub(super) fn create(
        store: Store,
        opened: Opened,
        config: HostConfig,
    ) -> Result<Self, MockError> {
        let frames = frame_count(&config)?;
        let m2p = store.file("m2p")?;
        let ones = vec![0xff; 1 << 20];
        let bytes = frames * size_of::<u64>();
        for at in (0..bytes).step_by(ones.len()) {
            let len = ones.len().min(bytes - at);
            m2p.write_all_at(&ones[..len], at as u64)
                .map_err(MockError::io("write", store.path_of("m2p")))?;
        }
        let blocks = words(&store, "blocks", frames / BLOCK_LEN)?;
        // The first block belongs to Xen.
        blocks.set(0, BLOCK_FRAMES);
        drop(blocks);
        // Last: this file makes the directory a host.
        store.save_host(&HostRecord {
            format: FORMAT,
            config: config.clone(),
            next_domid: 1,
        })?;
        Self::start(store, opened, config, 1)
    }

    /// Open the machine in `store`.
    pub(super) fn open(store: Store, opened: Opened, host: HostRecord) -> Result<Self, MockError> {
        Self::start(store, opened, host.config, host.next_domid)
    }

    fn start(
        store: Store,
        opened: Opened,
        config: HostConfig,
        next_domid: u16,
    ) -> Result<Self, MockError> {
        let store = Arc::new(store);
        let frames = frame_count(&config)?;
        let memory = store.file("memory")?;
        memory
            .set_len((frames * PAGE_SIZE) as u64)
            .map_err(MockError::io("size", store.path_of("memory")))?;
        let memory_words = Words::map(&memory, frames * ENTRIES_PER_TABLE)
            .map_err(MockError::io("map", store.path_of("memory")))?;
        let table = Frames::new(words(&store, "frames", frames)?);
        let m2p_file = store.file("m2p")?;
        let path = store.path_of("m2p");
        let m2p = Words::map(&m2p_file, frames).map_err(MockError::io("map", path))?;
        let mark = words(&store, "open", 1)?;
        let taken = words(&store, "blocks", frames / BLOCK_LEN)?;
        let counters = words(&store, "counters", COUNTERS * (usize::from(u16::MAX) + 1))?;
        let mut in_order = true;
        match opened {
            Opened::Alone => {
                // From here on, a process that dies leaves the host marked as open.
                let was_open = mark.get(0) != 0;
                mark.set(0, 1);
                let leftovers = store.clear_leftovers()?;
                in_order = !was_open && !leftovers;
            }
            Opened::Beside => {
                mark.increment(0);
            }
        }
        let domains_seen = store.count(Changes::Domains);
        let domains = store
            .load_domains()?
            .into_iter()
            .map(|saved| Ok((saved.record.domid, Arc::new(dom(&store, saved)?))))
            .collect::<Result<BTreeMap<_, _>, MockError>>()?;
        if !in_order {
            recount(&table, &taken, &m2p, &counters, &memory, &domains)?;
        }
        let seen = store.count(Changes::Allocator);
        let allocator = Allocator::new(taken, config.seed, config.max_run as usize);
        store
            .locks
            .share()
            .map_err(MockError::io("lock", "the mock host"))?;
        Ok(Self {
            stop: Stop::default(),
            store,
            config,
            memory,
            memory_words,
            frames: table,
            m2p_file,
            m2p,
            mapped: Arc::default(),
            counters,
            open_mark: mark,
            allocation: Mutex::new(Allocation::new(allocator, seen)),
            domains: RwLock::new(domains),
            domains_seen: AtomicU64::new(domains_seen),
            next_domid: Mutex::new(next_domid),
            names: Mutex::default(),
        })
    }

    /// While this is held, no domain's name is changed.
    pub(super) fn lock_names(&self) -> Result<NamesLocked<'_>, MockError> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(NamesLocked {
            _held: self.store.locks.hold(Range::Names)?,
            _names: names,
        })
    }

    /// All domains, in ascending order.
    pub(super) fn all_domains(&self) -> Result<Vec<Arc<Dom>>, MockError> {
        self.refresh_domains()?;
        let domains = self.domains.read().unwrap_or_else(PoisonError::into_inner);
        Ok(domains.values().cloned().collect())
    }

    /// The domain with this number.
    pub(super) fn dom(&self, domid: DomId) -> Result<Option<Arc<Dom>>, MockError> {
        self.refresh_domains()?;
        let domains = self.domains.read().unwrap_or_else(PoisonError::into_inner);
        Ok(domains.get(&domid).cloned())
    }

    /// Reads the list of domains again, if another process has changed it.
    fn refresh_domains(&self) -> Result<(), MockError> {
        if self.domains_seen.load(Ordering::Acquire) == self.store.count(Changes::Domains) {
            return Ok(());
        }
        // The write lock keeps this process's threads from adding or removing domains, so that each
        // has only one `Dom`.
        let mut domains = self.domains.write().unwrap_or_else(PoisonError::into_inner);
        let _held = self.store.locks.hold(Range::Domains)?;
        self.read_domains(&mut domains)
    }

    /// Must be called with the list locked.
    fn read_domains(&self, domains: &mut BTreeMap<DomId, Arc<Dom>>) -> Result<(), MockError> {
        // A host in memory has no other processes.
        let now = self.store.count(Changes::Domains);
        if self.store.path().is_some() {
            let mut found = BTreeMap::new();
            for saved in self.store.load_domains()? {
                let domid = saved.record.domid;
                let known = domains.get(&domid);
                let known = known.filter(|dom| !dom.is_gone() && dom.is(&saved.record));
                match known {
                    Some(known) => {
                        found.insert(domid, Arc::clone(known));
                    }
                    None => match dom(&self.store, saved) {
                        Ok(new) => {
                            found.insert(domid, Arc::new(new));
                        }
                        // Another process has just destroyed it.
                        Err(MockError::Io { cause, .. })
                            if cause.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    },
                }
            }
            *domains = found;
        }
        self.domains_seen.store(now, Ordering::Release);
        Ok(())
    }

    /// Add a new domain to the machine. `make` fills in the record, given the domain's number and
    /// the frames of its shared_info and grant table. `Ok(None)`: the machine is full.
    pub(super) fn add_domain(
        &self,
        make: impl FnOnce(DomId, [Mfn; 2]) -> (Record, BTreeMap<String, Vec<u8>>),
    ) -> Result<Option<Arc<Dom>>, MockError> {
        let mut next = self
            .next_domid
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut domains = self.domains.write().unwrap_or_else(PoisonError::into_inner);
        let _held = self.store.locks.hold(Range::Domains)?;
        self.read_domains(&mut domains)?;
        if let Some(host) = self.store.load_host()? {
            *next = host.next_domid;
        }
        let Some(domid) = (0..DOMID_FIRST_RESERVED)
            .map(|n| DomId(1 + (*next - 1 + n) % (DOMID_FIRST_RESERVED - 1)))
            .find(|domid| !domains.contains_key(domid))
        else {
            return Ok(None);
        };
        let Some(shared_info) = self.lend_page(domid)? else {
            return Ok(None);
        };
        let grant_table = match self.lend_page(domid) {
            Ok(Some(grant_table)) => grant_table,
            failed => {
                self.take_back_unused(&[shared_info]);
                return failed.map(|_| None);
            }
        };
        let lent = [shared_info, grant_table];
        *next = 1 + domid.0 % (DOMID_FIRST_RESERVED - 1);
        let listed = self.store.changed(Changes::Domains);
        let (mut record, blobs) = make(domid, lent);
        record.born = self.store.changed(Changes::State(domid));
        let saved = self.save_new(*next, &record, &blobs);
        let p2m = match saved {
            Ok(p2m) => p2m,
            Err(e) => {
                self.take_back_unused(&lent);
                return Err(e);
            }
        };
        let seen = record.born;
        let dom = Arc::new(Dom::new(&self.store, Saved { record, blobs }, p2m, seen));
        domains.insert(domid, Arc::clone(&dom));
        self.domains_seen.store(listed, Ordering::Release);
        Ok(Some(dom))
    }

    fn save_new(
        &self,
        next_domid: u16,
        record: &Record,
        blobs: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Option<Words>, MockError> {
        self.store.save_host(&HostRecord {
            format: FORMAT,
            config: self.config.clone(),
            next_domid,
        })?;
        self.store.add_domain(record.domid)?;
        let p2m = match record.kind.is_translated() {
            true => Some(words(
                &self.store,
                &Store::p2m_name(record.domid),
                MAX_PFNS,
            )?),
            false => None,
        };
        for (name, blob) in blobs {
            self.store.save_blob(record.domid, name, blob)?;
        }
        // Last: this file makes the directory a domain.
        self.store.save_record(record)?;
        Ok(p2m)
    }

    /// Take back the pages of a domain that was not added. The error that kept it from being added
    /// is the one that counts.
    fn take_back_unused(&self, lent: &[Mfn]) {
        match self.allocator() {
            Ok(mut allocator) => {
                for mfn in lent {
                    allocator.give_back(&self.frames, *mfn);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "pages of the mock host are lost until it is put in order");
            }
        }
    }

    /// Remove a domain from the machine and free its frames. If this fails, the domain stays
    /// unchanged.
    pub(super) fn remove_domain(&self, dom: &Dom) -> Result<(), MockError> {
        // Waits for operations on the domain that are in progress.
        let state = dom.lock()?;
        if dom.is_gone() {
            return Ok(());
        }
        dom.changes();
        let frozen = dom.freeze()?;
        let allocator = self.take_off_list(dom)?;
        let freed = self.free_all(dom.domid);
        drop(allocator);
        drop(frozen);
        drop(state);
        // While the directory is there, the next process that opens the host alone frees what is
        // left of the memory.
        let cleared = freed.and_then(|()| self.store.clear_forgotten(dom.domid));
        if let Err(error) = cleared {
            // The domain is gone all the same.
            tracing::warn!(%error, domid = dom.domid.0, "remains of a domain are left");
        }
        Ok(())
    }

    /// Removes a domain from the list. Must be called with its state locked. Returns the lock that
    /// is needed to free its memory, because nothing may fail once the domain is gone.
    fn take_off_list(&self, dom: &Dom) -> Result<AllocatorHeld<'_>, MockError> {
        let mut domains = self.domains.write().unwrap_or_else(PoisonError::into_inner);
        let _held = self.store.locks.hold(Range::Domains)?;
        let allocator = self.hold_allocator()?;
        // Not noted in `domains_seen`: other processes may have changed the list before.
        self.store.changed(Changes::Domains);
        self.store.forget_domain(dom.domid)?;
        dom.goes();
        if domains
            .get(&dom.domid)
            .is_some_and(|listed| listed.is_gone())
        {
            domains.remove(&dom.domid);
        }
        Ok(allocator)
    }

    fn free_all(&self, domid: DomId) -> Result<(), MockError> {
        let mut allocator = self.allocator()?;
        let blocks: Vec<Mfn> = allocator.taken_blocks().collect();
        let owned: Vec<Mfn> = blocks
            .into_iter()
            .flat_map(|first| (first.0..first.0 + BLOCK_FRAMES).map(Mfn))
            .filter(|mfn| self.frames.owned(*mfn, domid).is_some())
            .collect();
        for mfn in &owned {
            self.set_m2p(*mfn, INVALID_M2P);
        }
        for run in owned.chunk_by(|a, b| a.0 + 1 == b.0) {
            punch(&self.memory, run[0], run.len()).map_err(|errno| {
                MockError::io("free", self.store.path_of("memory"))(errno.into())
            })?;
        }
        for mfn in owned {
            allocator.give_back(&self.frames, mfn);
        }
        for counter in 0..COUNTERS {
            self.counters.set(pages_counter(domid) + counter, 0);
        }
        Ok(())
    }

    /// Allocate `2^order` frames for `owner`. Returns the first of them.
    pub(super) fn allocate(&self, order: u8, owner: DomId) -> Result<Option<Mfn>, MockError> {
        let mut allocator = self.allocator()?;
        Ok(match order {
            0 => {
                let frame = Frame {
                    owner: Some(owner),
                    ..Frame::default()
                };
                allocator.take_page(&self.frames, frame)
            }
            _ => allocator.take_extent(&self.frames, order, owner),
        })
    }

    /// Take a page of Xen's own and lend it to `owner`.
    pub(super) fn lend_page(&self, owner: DomId) -> Result<Option<Mfn>, MockError> {
        let mut allocator = self.allocator()?;
        Ok(allocator.take_page(&self.frames, lent_page(owner)))
    }

    /// Take back a lent page without references.
    pub(super) fn take_back(&self, mfn: Mfn) -> Result<(), Errno> {
        let mut allocator = self.allocator().map_err(|error| storage_errno(&error))?;
        punch(&self.memory, mfn, 1)?;
        allocator.give_back(&self.frames, mfn);
        Ok(())
    }

    /// All frames of a domain except Xen's own pages.
    pub(super) fn frames_of(&self, domid: DomId) -> Vec<Mfn> {
        self.taken_blocks()
            .into_iter()
            .flat_map(|first| (first.0..first.0 + BLOCK_FRAMES).map(Mfn))
            .filter(|mfn| {
                let frame = self.frames.owned(*mfn, domid);
                frame.is_some_and(|frame| !frame.xen_heap)
            })
            .collect()
    }

    /// The number of a domain's pages.
    pub(super) fn tot_pages(&self, domid: DomId) -> u64 {
        self.counters.get(pages_counter(domid))
    }

    /// The largest gfn that a domain has ever had.
    pub(super) fn max_gfn(&self, domid: DomId) -> Option<u64> {
        self.counters.get(pages_counter(domid) + 1).checked_sub(1)
    }

    /// Add `pages` to a domain's count, up to gfn `last`. The caller holds the domain's lock.
    pub(super) fn count_pages(&self, domid: DomId, pages: u64, last: u64) {
        let at = pages_counter(domid);
        self.counters.set(at, self.counters.get(at) + pages);
        self.counters
            .set(at + 1, self.counters.get(at + 1).max(last + 1));
    }

    /// Free a frame of `domid` that has no references; its contents are lost. The caller holds the
    /// domain's lock.
    pub(super) fn free_page(&self, mfn: Mfn, domid: DomId) -> Result<(), Errno> {
        let mut allocator = self.allocator().map_err(|error| storage_errno(&error))?;
        self.set_m2p(mfn, INVALID_M2P);
        punch(&self.memory, mfn, 1)?;
        allocator.give_back(&self.frames, mfn);
        let at = pages_counter(domid);
        self.counters
            .set(at, self.counters.get(at).saturating_sub(1));
        Ok(())
    }

    /// Allocate the next event channel of a domain that has `ports` ports; port 0 is never
    /// allocated. The caller holds the domain's lock.
    pub(super) fn take_port(&self, domid: DomId, ports: u32) -> Option<u32> {
        let at = pages_counter(domid) + 2;
        let port = u32::try_from(self.counters.get(at) + 1).ok()?;
        (port < ports).then(|| {
            self.counters.set(at, u64::from(port));
            port
        })
    }

    /// Set the m2p's pfn for `mfn`.
    pub(super) fn set_m2p(&self, mfn: Mfn, pfn: u64) {
        if let Ok(index) = usize::try_from(mfn.0) {
            self.m2p.set(index, pfn);
        }
    }

    /// The m2p's pfn for `mfn`.
    pub(super) fn m2p(&self, mfn: Mfn) -> Option<u64> {
        let index = usize::try_from(mfn.0)
            .ok()
            .filter(|i| *i < self.m2p.len())?;
        Some(self.m2p.get(index)).filter(|pfn| *pfn != INVALID_M2P)
    }

    /// Read a frame, which must exist.
    pub(super) fn read_frame(&self, mfn: Mfn) -> Result<Box<Page>, Errno> {
        let mut page = Box::new([0; PAGE_SIZE]);
        self.memory
            .read_exact_at(page.as_mut_slice(), mfn.0 * PAGE_SIZE as u64)
            .map_err(|e| io_errno(&e))?;
        Ok(page)
    }

    fn word_index(&self, mfn: Mfn, index: usize) -> usize {
        assert!(index < ENTRIES_PER_TABLE, "word {index} of a frame");
        let frame = usize::try_from(mfn.0).expect("a frame that exists");
        frame * ENTRIES_PER_TABLE + index
    }

    /// The u64 at `index` (0–511) of a frame, which must exist, in one read.
    pub(super) fn load(&self, mfn: Mfn, index: usize) -> u64 {
        u64::from_le(self.memory_words.get(self.word_index(mfn, index)))
    }

    /// Set the u64 at `index` (0–511) of a frame, which must exist, in one write: a concurrent
    /// reader sees either the old word or the new one.
    pub(super) fn store_word(&self, mfn: Mfn, index: usize, value: u64) {
        self.memory_words
            .set(self.word_index(mfn, index), value.to_le());
    }

    /// Write `bytes` from `offset` in the frame `first` on; they may extend into the following
    /// frames.
    pub(super) fn write_frames(
        &self,
        first: Mfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Errno> {
        let at = first.0 * PAGE_SIZE as u64 + offset as u64;
        match self
            .memory
            .write_all_at(bytes, at)
            .map_err(|e| io_errno(&e))
        {
            // A limit on file sizes must not limit the guest's memory.
            Err(Errno::EFBIG) => {
                self.store_bytes(usize::try_from(at).map_err(|_| Errno::EFBIG)?, bytes);
                Ok(())
            }
            written => written,
        }
    }

    /// Store bytes word by word through the memory's mapping.
    fn store_bytes(&self, mut at: usize, mut bytes: &[u8]) {
        const WORD: usize = size_of::<u64>();
        while !bytes.is_empty() {
            let (index, within) = (at / WORD, at % WORD);
            let (now, rest) = bytes.split_at(bytes.len().min(WORD - within));
            let mut word = self.memory_words.get(index).to_ne_bytes();
            word[within..within + now.len()].copy_from_slice(now);
            self.memory_words.set(index, u64::from_ne_bytes(word));
            (at, bytes) = (at + now.len(), rest);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.open_mark.decrement(0);
    }
}

/// A guard of the domains' names.
pub(super) struct NamesLocked<'m> {
    /// Keeps out other processes. Declared before `_names`, which keeps out threads, so that it is
    /// dropped first.
    _held: Held<'m>,
    _names: MutexGuard<'m, ()>,
}

/// A domain in the store.
fn dom(store: &Arc<Store>, saved: Saved) -> Result<Dom, MockError> {
    let domid = saved.record.domid;
    let p2m = match saved.record.kind.is_translated() {
        true => Some(words(store, &Store::p2m_name(domid), MAX_PFNS)?),
        false => None,
    };
    // The domain may have changed since it was read, so its first use reads it again.
    let seen = store.count(Changes::State(domid)).wrapping_sub(1);
    Ok(Dom::new(store, saved, p2m, seen))
}

/// The frame table's entry for a page of Xen's that is lent to `owner`.
fn lent_page(owner: DomId) -> Frame {
    Frame {
        owner: Some(owner),
        used_as: FrameUse::Writable,
        count: 1,
        validated: true,
        xen_heap: true,
        ..Frame::default()
    }
}

/// Counters for each domain.
const COUNTERS: usize = 4;

fn pages_counter(domid: DomId) -> usize {
    COUNTERS * usize::from(domid.0)
}

/// The errno of an I/O error on the machine's own files.
pub(super) fn io_errno(error: &std::io::Error) -> Errno {
    tracing::error!(%error, "the mock machine's memory failed");
    Errno::of(error)
}

/// Zero `pages` frames from `first` on and release their disk space.
fn punch(memory: &File, first: Mfn, pages: usize) -> Result<(), Errno> {
    let offset = off_t::try_from(first.0 * PAGE_SIZE as u64).map_err(|_| Errno::EINVAL)?;
    let len = off_t::try_from(pages * PAGE_SIZE).map_err(|_| Errno::EINVAL)?;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(memory, how, offset, len).map_err(Errno::from) {
        // A file system that cannot punch holes.
        Err(Errno::EOPNOTSUPP) => {
            let zeros = [0; PAGE_SIZE];
            (0..pages as u64)
                .try_for_each(|n| memory.write_all_at(&zeros, (first.0 + n) * PAGE_SIZE as u64))
                .map_err(|e| io_errno(&e))
        }
        result => result,
    }
}
