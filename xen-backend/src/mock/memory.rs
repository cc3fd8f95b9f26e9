//! Mappings of the mock machine: words of a state file shared with the kernel, and guest frames
//! mapped as `privcmd` maps them. The mock's only file with `unsafe`.
//!
//! C implementation: `tools/libs/foreignmemory/linux.c`.

#![allow(unsafe_code, reason = "mmap has no safe interface")]

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Errno;
use nix::libc::off_t;
use nix::sys::mman::{self, MapFlags, ProtFlags};
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use crate::error::MapError;
use crate::pages::{Access, ForeignPages};

/// A sparse file of u64 words, mapped whole and shared: stored words survive this process, however
/// it ends.
pub(super) struct Words {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to this value and is accessed only through atomics.
unsafe impl Send for Words {}
// SAFETY: as for `Send`: every access is atomic.
unsafe impl Sync for Words {}

impl Words {
    /// Map the first `len` words of `file`, which grows to hold them.
    pub(super) fn map(file: &File, len: usize) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(len * size_of::<u64>()).ok_or(io::ErrorKind::InvalidInput)?;
        let wanted = u64::try_from(bytes.get()).map_err(io::Error::other)?;
        if file.metadata()?.len() < wanted {
            file.set_len(wanted)?;
        }
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe { mman::mmap(None, bytes, prot, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    /// The number of words.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.len, "word {index} of {}", self.len);
        // SAFETY: index < len, so the word is inside the one mapping.
        let word = unsafe { self.base.add(index) };
        // SAFETY: `word` is page-aligned plus a multiple of 8, mapped readable and writable until
        // `self` drops, and accessed only as an atomic, both through this mapping and by other
        // processes of the machine. Frames of the guest's memory are mapped a second time, as
        // foreign pages, whose accesses are volatile and form no reference.
        unsafe { word.as_ref() }
    }

    /// The word at `index`.
    pub(super) fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// Store the word at `index`.
    pub(super) fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    /// Add 1 to the word at `index`, and return its new value.
    pub(super) fn increment(&self, index: usize) -> u64 {
        self.word(index)
            .fetch_add(1, Ordering::AcqRel)
            .wrapping_add(1)
    }

    /// Subtract 1 from the word at `index`, unless it is 0.
    pub(super) fn decrement(&self, index: usize) {
        let mut now = self.get(index);
        while let Some(less) = now.checked_sub(1)
            && let Err(other) = self.exchange(index, now, less)
        {
            now = other;
        }
    }

    /// Store `new` at `index` if `old` is there; otherwise return the current word.
    pub(super) fn exchange(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        self.word(index)
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the range is the one `map` made; the borrows of it borrow `self`.
        let result = unsafe { mman::munmap(self.base.cast(), self.len * size_of::<u64>()) };
        if let Err(errno) = result {
            tracing::error!(%errno, "munmap of machine state failed");
        }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// An address range reserved for this use, still inaccessible.
fn reserve(pages: NonZeroUsize) -> Result<NonNull<u8>, Errno> {
    let bytes = pages
        .checked_mul(NonZeroUsize::new(PAGE_SIZE).ok_or(Errno::EINVAL)?)
        .ok_or(Errno::ENOMEM)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    let base = unsafe { mman::mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) }?;
    Ok(base.cast())
}

/// A run of contiguous machine frames to be mapped at contiguous addresses.
struct Run {
    /// Index of its first page in the reservation.
    at: usize,
    first: Mfn,
    pages: usize,
}

/// Map `gfns` at consecutive addresses from the machine's `memory` file, where frame `mfn` is at
/// offset `mfn * 4096`. `resolve` returns the machine frame of a gfn (given with its index), or the
/// reason why it may not be mapped; a refused frame is listed as failed and left inaccessible.
/// Neighbouring machine frames share one mmap.
pub(super) fn map_frames(
    memory: &File,
    gfns: &[Gfn],
    access: Access,
    resolve: impl Fn(usize, Gfn) -> Result<Mfn, Errno>,
) -> Result<ForeignPages, Errno> {
    let mut failed = Vec::new();
    let mut runs: Vec<Run> = Vec::new();
    for (index, &gfn) in gfns.iter().enumerate() {
        match resolve(index, gfn) {
            Err(errno) => failed.push(MapError { index, gfn, errno }),
            Ok(mfn) => match runs.last_mut() {
                Some(run)
                    if run.at + run.pages == index && run.first.0 + run.pages as u64 == mfn.0 =>
                {
                    run.pages += 1;
                }
                _ => runs.push(Run {
                    at: index,
                    first: mfn,
                    pages: 1,
                }),
            },
        }
    }
    let base = match NonZeroUsize::new(gfns.len()) {
        None => NonNull::dangling(),
        Some(pages) => reserve(pages)?,
    };
    // SAFETY: `base` is page-aligned and starts a private reservation of exactly `gfns.len()` pages
    // (or there are none, and it is never used). All pages except those of `failed` get their
    // access below, before the value leaves this function; on an early return it is dropped without
    // being accessed.
    let pages = unsafe { ForeignPages::from_raw(base, gfns.len(), access, failed) };
    let shared = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
    let prot = match access {
        Access::Read => ProtFlags::PROT_READ,
        Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
    };
    // The pages are faulted in here, because a mapping of privcmd's is complete when it is made. In
    // a file in memory (tmpfs), pages faulted in for reading can also be written.
    let flags = shared | MapFlags::MAP_POPULATE;
    for run in &runs {
        // SAFETY: `run.at < gfns.len()`, so the address is inside the reservation.
        let address = unsafe { base.add(run.at * PAGE_SIZE) };
        let bytes = NonZeroUsize::new(run.pages * PAGE_SIZE).ok_or(Errno::EINVAL)?;
        let offset = run
            .first
            .0
            .checked_mul(PAGE_SIZE as u64)
            .and_then(|bytes| off_t::try_from(bytes).ok())
            .ok_or(Errno::EINVAL)?;
        // SAFETY: MAP_FIXED replaces only pages of our own reservation:
        // `run.at + run.pages <= gfns.len()`, and nothing has borrowed them yet.
        unsafe { mman::mmap(Some(address.addr()), bytes, prot, flags, memory, offset) }?;
    }
    Ok(pages)
}

/// Map a whole file of `pages` pages for reading.
pub(super) fn map_file(file: &File, pages: usize) -> Result<ForeignPages, Errno> {
    let bytes = NonZeroUsize::new(pages * PAGE_SIZE).ok_or(Errno::EINVAL)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    let base = unsafe {
        mman::mmap(
            None,
            bytes,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            file,
            0,
        )
    }?;
    // SAFETY: `base` starts the mapping just made, of `pages` readable pages, which nothing else
    // refers to.
    Ok(unsafe { ForeignPages::from_raw(base.cast(), pages, Access::Read, Vec::new()) })
}
