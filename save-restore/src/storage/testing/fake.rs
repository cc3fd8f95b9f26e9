//! A storage in memory in which any call can be made to fail.
//!
//! Calls are numbered from 0. [`FakeStorage::fail`] sets what happens to one of them; a test that
//! goes through all numbers until a run makes fewer calls has tried each.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::Errno;

use crate::storage::{
    Create, Durability, Existing, Opened, Shape, Storage, StorageEntry, StorageError, StorageName,
    StorageReader, StorageWriter,
};

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno, and does nothing.
    Error(Errno),
    /// A write takes half of its bytes, and at least one. Any other call succeeds as usual.
    Short,
    /// The process dies before the call: it and all later ones fail, and do nothing.
    CrashBefore,
    /// The process dies after the call, and does not learn the result.
    CrashAfter,
}

const BLOCK: u64 = PAGE_SIZE as u64;

/// The position of a byte in its block.
fn within(at: u64) -> usize {
    usize::try_from(at % BLOCK).expect("a block fits into memory")
}

/// Blocks of an image by number; missing ones are holes.
#[derive(Clone, Debug, Default)]
struct Image {
    length: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Image {
    fn write(&mut self, bytes: &[u8], offset: u64) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let n = (bytes.len() - done).min(PAGE_SIZE - within(at));
            let block = self.blocks.entry(at / BLOCK);
            let block = block.or_insert_with(|| vec![0; PAGE_SIZE]);
            block[within(at)..within(at) + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let left = self.length.saturating_sub(offset);
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let mut done = 0;
        while done < most {
            let at = offset + done as u64;
            let n = (most - done).min(PAGE_SIZE - within(at));
            let room = &mut buffer[done..done + n];
            match self.blocks.get(&(at / BLOCK)) {
                Some(block) => room.copy_from_slice(&block[within(at)..within(at) + n]),
                None => room.fill(0),
            }
            done += n;
        }
        most
    }

    fn punch(&mut self, range: Range<u64>) {
        let end = range.end.min(self.length);
        let mut at = range.start;
        while at < end {
            let next = (at / BLOCK + 1) * BLOCK;
            if at.is_multiple_of(BLOCK) && next <= end {
                self.blocks.remove(&(at / BLOCK));
            } else if let Some(block) = self.blocks.get_mut(&(at / BLOCK)) {
                let last = within(next.min(end) - 1);
                block[within(at)..=last].fill(0);
            }
            at = next;
        }
    }

    fn set_length(&mut self, length: u64) {
        self.punch(length..self.length);
        self.blocks.retain(|block, _| block * BLOCK < length);
        self.length = length;
    }

    fn data_from(&self, offset: u64) -> Option<Range<u64>> {
        let first = *self.blocks.range(offset / BLOCK..).next()?.0;
        let mut last = first;
        while self.blocks.contains_key(&(last + 1)) {
            last += 1;
        }
        let start = offset.max(first * BLOCK);
        let end = self.length.min((last + 1) * BLOCK);
        Some(start..end).filter(|data| data.start < data.end)
    }
}

type Images = BTreeMap<StorageName, Arc<Image>>;

#[derive(Debug, Default)]
struct State {
    visible: Images,
    /// The images after a power cut.
    durable: Images,
    calls: usize,
    fault: Option<(usize, Fault)>,
    crashed: bool,
}

/// What to do with a call.
enum Verdict {
    Made,
    Short,
    MadeAndCrashed,
    Failed(Errno),
}

impl State {
    fn verdict(&mut self) -> Verdict {
        let call = self.calls;
        self.calls += 1;
        if self.crashed {
            return Verdict::Failed(Errno::EIO);
        }
        match self.fault.filter(|(at, _)| *at == call) {
            None => Verdict::Made,
            Some((_, Fault::Error(errno))) => Verdict::Failed(errno),
            Some((_, Fault::Short)) => Verdict::Short,
            Some((_, Fault::CrashBefore)) => {
                self.crashed = true;
                Verdict::Failed(Errno::EIO)
            }
            Some((_, Fault::CrashAfter)) => {
                self.crashed = true;
                Verdict::MadeAndCrashed
            }
        }
    }
}

/// A storage in memory. Clones are handles to the same one.
#[derive(Clone, Debug, Default)]
pub struct FakeStorage {
    state: Arc<Mutex<State>>,
}

impl FakeStorage {
    /// An empty storage in which no call fails.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Restarts the count of calls, and makes this one fail.
    pub fn fail(&self, call: usize, fault: Fault) {
        let mut state = self.state();
        state.calls = 0;
        state.fault = Some((call, fault));
    }

    /// The number of calls since the last [`fail`](Self::fail).
    pub fn calls(&self) -> usize {
        self.state().calls
    }

    /// The storage as the next process finds it. None of its calls fails.
    pub fn after_a_crash(&self) -> Self {
        Self::of(self.state().visible.clone())
    }

    /// The storage after a power cut: what was committed as durable.
    pub fn after_a_power_cut(&self) -> Self {
        Self::of(self.state().durable.clone())
    }

    fn of(images: Images) -> Self {
        let state = State {
            visible: images.clone(),
            durable: images,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn call<T>(
        &self,
        doing: &'static str,
        name: &str,
        act: impl FnOnce(&mut State, bool) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let failed = |errno: Errno| StorageError::io(doing, name)(errno);
        let mut state = self.state();
        match state.verdict() {
            Verdict::Made => act(&mut state, false),
            Verdict::Short => act(&mut state, true),
            Verdict::Failed(errno) => Err(failed(errno)),
            Verdict::MadeAndCrashed => {
                act(&mut state, false)?;
                Err(failed(Errno::EIO))
            }
        }
    }
}

fn not_found(name: &StorageName) -> StorageError {
    StorageError::NotFound {
        name: name.to_string(),
    }
}

fn exists(name: &StorageName) -> StorageError {
    StorageError::Exists {
        name: name.to_string(),
    }
}

impl Storage for FakeStorage {
    fn create(
        &self,
        name: &StorageName,
        create: &Create,
    ) -> Result<Box<dyn StorageWriter>, StorageError> {
        self.call("creating", &name.to_string(), |state, _| {
            if create.existing == Existing::Refuse && state.visible.contains_key(name) {
                return Err(exists(name));
            }
            Ok(Box::new(FakeWriter {
                storage: self.clone(),
                name: name.clone(),
                create: *create,
                image: Mutex::default(),
                position: 0,
            }) as Box<dyn StorageWriter>)
        })
    }

    fn open(&self, name: &StorageName) -> Result<Opened, StorageError> {
        self.call("opening", &name.to_string(), |state, _| {
            let image = state.visible.get(name).ok_or_else(|| not_found(name))?;
            Ok(Opened::Random(Box::new(FakeReader {
                storage: self.clone(),
                name: name.to_string(),
                image: Arc::clone(image),
            })))
        })
    }

    fn list(&self) -> Result<Vec<StorageEntry>, StorageError> {
        self.call("listing", "the storage", |state, _| {
            let entries = state.visible.iter().map(|(name, image)| StorageEntry {
                name: name.clone(),
                length: image.length,
            });
            Ok(entries.collect())
        })
    }

    fn remove(&self, name: &StorageName) -> Result<(), StorageError> {
        self.call("removing", &name.to_string(), |state, _| {
            let removed = state.visible.remove(name);
            state.durable.remove(name);
            removed.map(drop).ok_or_else(|| not_found(name))
        })
    }
}

#[derive(Debug)]
struct FakeWriter {
    storage: FakeStorage,
    name: StorageName,
    create: Create,
    image: Mutex<Image>,
    /// The position of [`Write`].
    position: u64,
}

impl FakeWriter {
    fn image(&self) -> MutexGuard<'_, Image> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that changes slots.
    fn change(&self, change: impl FnOnce(&mut Image)) -> Result<(), StorageError> {
        if self.create.shape == Shape::Stream {
            return Err(StorageError::Unsupported {
                name: self.name(),
                what: "was created as a stream",
            });
        }
        self.storage.call("writing", &self.name(), |_, _| {
            change(&mut self.image());
            Ok(())
        })
    }
}

impl Write for FakeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let position = self.position;
        let taken = self.storage.call("writing", &self.name(), |_, short| {
            let taken = match short {
                true => (bytes.len() / 2).max(1).min(bytes.len()),
                false => bytes.len(),
            };
            self.image().write(&bytes[..taken], position);
            Ok(taken)
        });
        match taken {
            Ok(taken) => {
                self.position += taken as u64;
                Ok(taken)
            }
            Err(StorageError::Io { source, .. }) => Err(source),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for FakeWriter {
    fn name(&self) -> String {
        self.name.to_string()
    }

    fn shape(&self) -> Shape {
        self.create.shape
    }

    fn is_straight(&self) -> bool {
        false
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.change(|image| image.write(bytes, offset))
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let mut read = 0;
        self.change(|image| read = image.read(buffer, offset))?;
        match read == buffer.len() {
            true => Ok(()),
            false => Err(StorageError::Truncated {
                name: self.name(),
                offset: offset + read as u64,
                missing: buffer.len() - read,
            }),
        }
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.change(|image| image.punch(range))
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.change(|image| image.set_length(length))
    }

    fn clone_range(
        &self,
        _: &dyn StorageReader,
        _: Range<u64>,
        _: u64,
    ) -> Result<(), StorageError> {
        Err(StorageError::Unsupported {
            name: self.name(),
            what: "is in memory, and cannot share room",
        })
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.storage.call("syncing", &self.name(), |_, _| Ok(()))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        let image = Arc::new(self.image().clone());
        let name = self.name();
        // As for a file: the contents, the name, the directory.
        if durability == Durability::Durable {
            self.sync()?;
        }
        self.storage.call("naming", &name, |state, _| {
            if self.create.existing == Existing::Refuse && state.visible.contains_key(&self.name) {
                return Err(exists(&self.name));
            }
            state.visible.insert(self.name.clone(), Arc::clone(&image));
            Ok(())
        })?;
        if durability == Durability::Process {
            return Ok(());
        }
        let synced = self.storage.call("syncing", &name, |state, _| {
            state.durable.insert(self.name.clone(), image);
            Ok(())
        });
        synced.map_err(|error| match error {
            StorageError::Io { name, source, .. } => StorageError::NotDurable { name, source },
            other => other,
        })
    }
}

#[derive(Debug)]
struct FakeReader {
    storage: FakeStorage,
    name: String,
    image: Arc<Image>,
}

impl StorageReader for FakeReader {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn length(&self) -> u64 {
        self.image.length
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, StorageError> {
        self.storage.call("reading", &self.name, |_, short| {
            let room = match short && buffer.len() > 1 {
                true => buffer.len() / 2,
                false => buffer.len(),
            };
            Ok(self.image.read(&mut buffer[..room], offset))
        })
    }

    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>, StorageError> {
        self.storage.call("reading", &self.name, |_, _| {
            Ok(self.image.data_from(offset))
        })
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::super::run;
    use super::*;

    #[test]
    fn the_fake_keeps_the_contract() {
        assert_eq!(run(&FakeStorage::new()), []);
    }

    /// Replaces an image, as every writer of one does.
    fn replace(storage: &FakeStorage, name: &StorageName) -> Result<(), StorageError> {
        let mut writer = storage.create(name, &Create::stream())?;
        writer
            .write_all(b"new image")
            .map_err(StorageError::io("writing", name.to_string()))?;
        writer.commit(Durability::Durable)
    }

    fn contents(storage: &FakeStorage, name: &StorageName) -> Vec<u8> {
        let Opened::Random(reader) = storage.open(name).unwrap() else {
            panic!("it can be read only once");
        };
        let mut bytes = vec![0; usize::try_from(reader.length()).unwrap()];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn whichever_call_fails_the_image_is_the_old_one_or_the_new_one() {
        let name: StorageName = "a".parse().unwrap();
        let faults = [
            Fault::Error(Errno::ENOSPC),
            Fault::Error(Errno::EIO),
            Fault::Short,
            Fault::CrashBefore,
            Fault::CrashAfter,
        ];
        for fault in faults {
            let mut failures = 0;
            for call in 0.. {
                let storage = FakeStorage::new();
                let mut old = storage.create(&name, &Create::stream()).unwrap();
                old.write_all(b"old").unwrap();
                old.commit(Durability::Durable).unwrap();
                storage.fail(call, fault);
                let result = replace(&storage, &name);
                let made = storage.calls();
                let found = contents(&storage.after_a_crash(), &name);
                let cut = contents(&storage.after_a_power_cut(), &name);
                match &result {
                    Ok(()) => assert!(found == b"new image" && cut == found),
                    Err(StorageError::NotDurable { .. }) => assert_eq!(found, b"new image"),
                    // The result of a call before the process died stays.
                    Err(_) if fault == Fault::CrashAfter => {
                        assert!([&b"old"[..], b"new image"].contains(&&found[..]));
                    }
                    Err(_) => assert_eq!(found, b"old", "call {call}"),
                }
                assert!([&b"old"[..], b"new image"].contains(&&cut[..]));
                failures += usize::from(result.is_err());
                if made <= call {
                    break;
                }
            }
            // Creation, write, sync, name, directory.
            assert_eq!(
                failures,
                if fault == Fault::Short { 0 } else { 5 },
                "{fault:?}"
            );
        }
    }
}
