//! Mapped foreign pages.
//!
//! The memory here belongs to a guest that may be running: it can change between any two reads. So
//! no reference to it is ever formed, except as an atomic, and each page-table entry is read once.
//! Words of a writable page are read and written as relaxed atomics: if two threads use the same
//! page, or this process and the guest do, there is no data race. A page that is mapped only for
//! reading is read with volatile reads, because an atomic has to be valid for writes; nothing in
//! this process can write through such a mapping.
//!
//! C implementation: `xenforeignmemory_map`.

mod gather;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::Errno;
use nix::libc;
use nix::sys::mman;
use xsr_format::frame::{Gfn, PAGE_SIZE, Page};

use crate::error::MapError;

pub use gather::{Gather, Unwritten, WriteCall};

/// Page-table entries in a page.
pub const ENTRIES_PER_TABLE: usize = PAGE_SIZE / 8;

/// How foreign pages are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    Write,
}

/// Pages of a guest, mapped at consecutive addresses. Unmapped on drop.
pub struct ForeignPages {
    base: NonNull<u8>,
    count: usize,
    access: Access,
    failed: Vec<MapError>,
    /// The count of mapped pages that includes these.
    counter: Option<Arc<AtomicUsize>>,
}

// SAFETY: the mapping belongs to this value alone, and is as valid on one thread as on
// another.
unsafe impl Send for ForeignPages {}
// SAFETY: a shared borrow of a writable mapping allows atomic loads and stores, and system calls in
// which the kernel accesses it. A shared borrow of a read-only mapping allows reads, which nothing
// in this process can conflict with. Neither is a data race.
unsafe impl Sync for ForeignPages {}

impl ForeignPages {
    /// Take over a mapping.
    ///
    /// `failed` lists the frames whose address range is reserved but not backed by memory (touching
    /// them would fault), in ascending order of index.
    ///
    /// # Safety
    ///
    /// - `base` is page-aligned and `base .. base + count * 4096` was mapped by
    ///   `mmap`, with at least `access`, in all pages but those of `failed`;
    /// - nothing else unmaps that range or forms a reference into it; this value
    ///   unmaps it.
    pub unsafe fn from_raw(
        base: NonNull<u8>,
        count: usize,
        access: Access,
        failed: Vec<MapError>,
    ) -> Self {
        debug_assert!(failed.is_sorted_by_key(|e| e.index));
        Self {
            base,
            count,
            access,
            failed,
            counter: None,
        }
    }

    /// These pages, with `failed` (in ascending order of index) replacing the earlier list.
    ///
    /// # Safety
    ///
    /// Every page except those of `failed` has been mapped, with at least the access that the pages
    /// have.
    pub(crate) unsafe fn with_failed(mut self, failed: Vec<MapError>) -> Self {
        debug_assert!(failed.is_sorted_by_key(|e| e.index));
        self.failed = failed;
        self
    }

    /// Count these pages in `counter` until they are unmapped.
    #[cfg(feature = "mock")]
    pub(crate) fn counted_by(mut self, counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(self.count, Ordering::Relaxed);
        self.counter = Some(Arc::clone(counter));
        self
    }

    /// Mark page `index`, whose frame is `gfn`, as one that could not be mapped: for a layer
    /// between a backend and its caller that knows better, or that makes mappings fail for a test.
    /// A page that has already failed keeps its errno.
    ///
    /// # Panics
    ///
    /// If the page does not exist.
    pub fn refuse(&mut self, index: usize, gfn: Gfn, errno: Errno) {
        assert!(index < self.count, "page {index} of {}", self.count);
        if let Err(place) = self.failed.binary_search_by_key(&index, |e| e.index) {
            self.failed.insert(place, MapError { index, gfn, errno });
        }
    }

    /// The address of the pages. They stay mapped, and the caller has to unmap them: for a foreign
    /// program that takes addresses.
    #[cfg(feature = "peer")]
    pub fn into_raw(mut self) -> NonNull<u8> {
        if let Some(counter) = self.counter.take() {
            counter.fetch_sub(self.count, Ordering::Relaxed);
        }
        // Leaves nothing for the drop to do.
        self.count = 0;
        self.base
    }

    /// The number of requested pages, including failed ones.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether no page was requested.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The access that the pages are mapped with.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The frames that could not be mapped, in ascending order of index. Callers have to check all
    /// of them: a mapping call that succeeds may still have failed for frame 7.
    pub fn failed(&self) -> &[MapError] {
        &self.failed
    }

    /// These pages, if every frame could be mapped.
    ///
    /// # Errors
    ///
    /// The first frame that could not.
    pub fn all_mapped(self) -> Result<Self, MapError> {
        match self.failed.first() {
            Some(error) => Err(*error),
            None => Ok(self),
        }
    }

    /// Page `index`, or `None` if it is out of range or could not be mapped.
    pub fn page(&self, index: usize) -> Option<ForeignPage<'_>> {
        let mapped = index < self.count
            && self
                .failed
                .binary_search_by_key(&index, |e| e.index)
                .is_err();
        mapped.then(|| self.page_unchecked(index))
    }

    fn page_unchecked(&self, index: usize) -> ForeignPage<'_> {
        debug_assert!(index < self.count);
        // SAFETY: `index < count` (both callers check), so the result is inside
        // the one mapping that `from_raw`'s caller vouched for.
        let ptr = unsafe { self.base.add(index * PAGE_SIZE) };
        ForeignPage {
            ptr,
            access: self.access,
            mapping: PhantomData,
        }
    }

    /// Every page that could be mapped, with its index.
    pub fn iter(&self) -> impl Iterator<Item = (usize, ForeignPage<'_>)> {
        (0..self.count).filter_map(|i| Some((i, self.page(i)?)))
    }

    /// The little-endian u64 at `index` (in units of 8 bytes from the first page), or `None` if
    /// that is outside the pages or in one that failed.
    pub fn read_u64(&self, index: usize) -> Option<u64> {
        let page = self.page(index / ENTRIES_PER_TABLE)?;
        Some(page.read_entry(index % ENTRIES_PER_TABLE))
    }

    /// Read from a file descriptor into the bytes `range` of the pages (counted from the first page
    /// on), directly into the mapping, with one `read(2)`. Returns the number of bytes; 0 if the
    /// range is empty or the descriptor is at its end.
    ///
    /// # Errors
    ///
    /// The error of `read(2)`, including EINTR and EAGAIN.
    ///
    /// # Panics
    ///
    /// If the range exceeds the pages or touches one that failed, or if the mapping is read-only.
    pub fn read_some_from(&self, fd: BorrowedFd<'_>, range: Range<usize>) -> io::Result<usize> {
        let (room, bytes) = self.room(range);
        // SAFETY: `room` says that the bytes lie in the mapping, which is writable and
        // has no failed page there; no reference to it exists anywhere.
        let n = unsafe { libc::read(fd.as_raw_fd(), room.as_ptr().cast(), bytes) };
        Ok(Errno::result(n)?.unsigned_abs())
    }

    /// As [`ForeignPages::read_some_from`], from `offset` in a file, with `pread(2)`: ignores the
    /// descriptor's position and leaves it unchanged.
    ///
    /// # Errors
    ///
    /// The same; EINVAL for an offset larger than a file can have.
    ///
    /// # Panics
    ///
    /// The same.
    pub fn read_some_at(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        range: Range<usize>,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let (room, bytes) = self.room(range);
        // SAFETY: as in `read_some_from`.
        let n = unsafe { libc::pread(fd.as_raw_fd(), room.as_ptr().cast(), bytes, offset) };
        Ok(Errno::result(n)?.unsigned_abs())
    }

    /// The address and length of the bytes of `range`: all of them in the mapping, which is
    /// writable, and in pages that are mapped. Panics otherwise.
    fn room(&self, range: Range<usize>) -> (NonNull<u8>, usize) {
        assert!(self.access == Access::Write, "mapping is read-only");
        self.bytes(range)
    }

    /// The address and length of a range of page indices. Panics if not all of the pages are
    /// mapped.
    fn mapped_bytes(&self, pages: Range<usize>) -> (NonNull<u8>, usize) {
        self.bytes(pages.start * PAGE_SIZE..pages.end * PAGE_SIZE)
    }

    fn bytes(&self, range: Range<usize>) -> (NonNull<u8>, usize) {
        assert!(
            range.start <= range.end && range.end <= self.count * PAGE_SIZE,
            "range leaves the mapping"
        );
        let pages = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        assert!(
            !self.failed.iter().any(|e| pages.contains(&e.index)),
            "range holds a page that is not mapped"
        );
        // SAFETY: start <= count * 4096, so the result is inside the mapping or just past its end
        // (then there are no bytes).
        let room = unsafe { self.base.add(range.start) };
        (room, range.len())
    }
}

impl Drop for ForeignPages {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        // SAFETY: the range is the one that `from_raw` took over and is unmapped only here; every
        // `ForeignPage` and `Gather` into it borrows `self` and is gone.
        let result = unsafe { mman::munmap(self.base.cast(), self.count * PAGE_SIZE) };
        if let Err(errno) = result {
            tracing::error!(%errno, pages = self.count, "munmap of foreign pages failed");
        } else if let Some(counter) = &self.counter {
            counter.fetch_sub(self.count, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for ForeignPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignPages")
            .field("count", &self.count)
            .field("access", &self.access)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// One mapped page of a guest.
#[derive(Clone, Copy)]
pub struct ForeignPage<'a> {
    ptr: NonNull<u8>,
    access: Access,
    mapping: PhantomData<&'a ForeignPages>,
}

// SAFETY: it is a borrow of `ForeignPages`, which is `Sync`.
unsafe impl Send for ForeignPage<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for ForeignPage<'_> {}

impl ForeignPage<'_> {
    fn word(self, index: usize) -> NonNull<u64> {
        assert!(index < ENTRIES_PER_TABLE, "entry {index} of a page");
        // SAFETY: index < 512, so the word is inside the page.
        unsafe { self.ptr.cast::<u64>().add(index) }
    }

    /// The word at `index` as an atomic. Panics if the page is mapped only for reading.
    fn atomic(&self, index: usize) -> &AtomicU64 {
        assert!(self.access == Access::Write, "page is mapped read-only");
        let word = self.word(index);
        // SAFETY: `word` is inside a page that is mapped for reading and writing for as long as
        // this borrow of the mapping lives, and is 8-aligned, since pages are page-aligned. All
        // accesses in this process to a word of such a page are made here, atomically and as a
        // whole; the guest and the kernel are other agents, whose accesses are not Rust's.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    /// The 64-bit word at `index` (0–511), read once, little endian.
    ///
    /// # Panics
    ///
    /// If `index` is 512 or more.
    pub fn read_entry(self, index: usize) -> u64 {
        if self.access == Access::Write {
            return u64::from_le(self.atomic(index).load(Ordering::Relaxed));
        }
        // SAFETY: `word` is inside a mapped page and 8-aligned, since pages are
        // page-aligned. Nothing in this process writes through this mapping.
        u64::from_le(unsafe { self.word(index).read_volatile() })
    }

    /// All 512 words, each read once.
    pub fn read_entries(self) -> [u64; ENTRIES_PER_TABLE] {
        std::array::from_fn(|i| self.read_entry(i))
    }

    /// Set the 64-bit word at `index` (0–511), little endian, in one write.
    ///
    /// # Panics
    ///
    /// If `index` is 512 or more, or the page is mapped only for reading.
    pub fn write_entry(self, index: usize, value: u64) {
        self.atomic(index).store(value.to_le(), Ordering::Relaxed);
    }

    /// Copy the page out.
    pub fn copy_to(self, out: &mut Page) {
        for (i, word) in out.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.read_entry(i).to_le_bytes());
        }
    }

    /// A copy of the page.
    pub fn to_page(self) -> Box<Page> {
        let mut page = Box::new([0; PAGE_SIZE]);
        self.copy_to(&mut page);
        page
    }

    /// Overwrite the page.
    ///
    /// # Panics
    ///
    /// If the page is mapped only for reading.
    pub fn copy_from(self, page: &Page) {
        for (i, word) in page.as_chunks().0.iter().enumerate() {
            self.write_entry(i, u64::from_le_bytes(*word));
        }
    }

    /// Overwrite the page with zeros.
    ///
    /// # Panics
    ///
    /// If the page is mapped only for reading.
    pub fn clear(self) {
        for i in 0..ENTRIES_PER_TABLE {
            self.write_entry(i, 0);
        }
    }
}

impl fmt::Debug for ForeignPage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignPage").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags};

    /// `count` pages of a memfd; page i is filled with the byte i + 1, and those in `failed` are
    /// not backed by memory.
    pub(super) fn pages(count: usize, access: Access, failed: &[usize]) -> ForeignPages {
        let mut file = File::from(memfd_create("pages", MFdFlags::empty()).unwrap());
        for i in 0..count {
            file.write_all(&[u8::try_from(i + 1).unwrap(); PAGE_SIZE])
                .unwrap();
        }
        let length = (count * PAGE_SIZE).try_into().unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mman::mmap(None, length, prot, MapFlags::MAP_SHARED, &file, 0) };
        let base = base.unwrap().cast::<u8>();
        let failed = failed
            .iter()
            .map(|&index| {
                // SAFETY: index < count, so the page is inside the mapping.
                let page = unsafe { base.add(index * PAGE_SIZE) };
                // SAFETY: a whole page of the mapping made above.
                unsafe { mman::mprotect(page.cast(), PAGE_SIZE, ProtFlags::PROT_NONE) }.unwrap();
                MapError {
                    index,
                    gfn: Gfn(index as u64),
                    errno: Errno::EINVAL,
                }
            })
            .collect();
        // SAFETY: the whole mapping above is handed over; the protected pages are listed as failed.
        unsafe { ForeignPages::from_raw(base, count, access, failed) }
    }

    #[test]
    fn a_page_that_is_refused_is_no_page() {
        let mut pages = pages(4, Access::Read, &[2]);
        pages.refuse(0, Gfn(7), Errno::ENOENT);
        pages.refuse(2, Gfn(9), Errno::ENOENT);
        let failed: Vec<_> = pages.failed().iter().map(|e| (e.index, e.gfn.0)).collect();
        assert_eq!(failed, [(0, 7), (2, 2)]);
        assert!(pages.page(0).is_none() && pages.page(1).is_some());
        let counter = Arc::default();
        let pages = pages.counted_by(&counter);
        assert_eq!(counter.load(Ordering::Relaxed), 4);
        assert_eq!(pages.all_mapped().unwrap_err().errno, Errno::ENOENT);
        assert_eq!(counter.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_failed_frame_is_no_page() {
        let pages = pages(4, Access::Read, &[2]);
        assert_eq!(pages.len(), 4);
        assert!(pages.page(2).is_none());
        assert!(pages.page(4).is_none());
        assert!(pages.read_u64(2 * ENTRIES_PER_TABLE).is_none());
        assert_eq!(
            pages.read_u64(3 * ENTRIES_PER_TABLE),
            Some(0x0404_0404_0404_0404)
        );
        assert_eq!(pages.iter().map(|(i, _)| i).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(pages.all_mapped().unwrap_err().index, 2);
    }

    #[test]
    fn pages_are_filled_from_a_descriptor_byte_for_byte() {
        let pages = pages(4, Access::Write, &[3]);
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[0x77; PAGE_SIZE]).unwrap();
        let range = PAGE_SIZE + 100..2 * PAGE_SIZE;
        let n = pages.read_some_from(reader.as_fd(), range.clone()).unwrap();
        assert_eq!(n, range.len(), "no more than asked for");
        let mut expected = [2; PAGE_SIZE];
        expected[100..].fill(0x77);
        for (index, contents) in [(0, [1; PAGE_SIZE]), (1, expected), (2, [3; PAGE_SIZE])] {
            assert_eq!(*pages.page(index).unwrap().to_page(), contents);
        }
        let short = pages.read_some_from(reader.as_fd(), 0..PAGE_SIZE).unwrap();
        assert_eq!(short, 100, "what there is");
        assert_eq!(pages.read_some_from(reader.as_fd(), 7..7).unwrap(), 0);
        drop(writer);
        assert_eq!(pages.read_some_from(reader.as_fd(), 0..1).unwrap(), 0);
    }

    #[test]
    #[should_panic(expected = "not mapped")]
    fn a_page_that_failed_is_not_read_into() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pages = pages(2, Access::Write, &[1]);
        let result = pages.read_some_from(reader.as_fd(), 0..PAGE_SIZE + 1);
        panic!("{result:?}");
    }

    #[test]
    #[should_panic(expected = "read-only")]
    fn a_read_only_page_is_not_written() {
        pages(1, Access::Read, &[]).page(0).unwrap().clear();
    }

    #[test]
    fn pages_are_copied_both_ways() {
        let pages = pages(2, Access::Write, &[]);
        let first = pages.page(0).unwrap();
        let second = pages.page(1).unwrap();
        second.copy_from(&first.to_page());
        assert_eq!(*second.to_page(), [1; PAGE_SIZE]);
        second.write_entry(511, 0x1122_3344_5566_7788);
        assert_eq!(second.read_entries()[511], 0x1122_3344_5566_7788);
        second.clear();
        assert_eq!(*second.to_page(), [0; PAGE_SIZE]);
    }
}
