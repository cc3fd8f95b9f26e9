//! Mapped foreign pages, and gather lists over them.
//!
//! The memory here belongs to a guest that may be running: it can change between
//! any two reads. So no reference to it is ever formed, reads and writes are
//! volatile, and each page-table entry is read once.
//!
//! C implementation: `xenforeignmemory_map` and the `writev_exact` of
//! `xg_sr_save.c:write_batch`.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman;
use xsr_format::frame::{PAGE_SIZE, Page};

use crate::error::MapError;

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

/// Pages of a guest, mapped one behind the other. Unmapped on drop.
pub struct ForeignPages {
    base: NonNull<u8>,
    count: usize,
    access: Access,
    failed: Vec<MapError>,
}

// SAFETY: the mapping belongs to this value alone and is reached only through
// raw volatile accesses, which are as valid on one thread as on another.
unsafe impl Send for ForeignPages {}
// SAFETY: as for `Send`; two threads that write one page race as the guest itself
// does, through volatile accesses, and no reference observes it.
unsafe impl Sync for ForeignPages {}

impl ForeignPages {
    /// Take over a mapping.
    ///
    /// `failed` lists the frames whose address range is reserved but backed by
    /// nothing (touching them would fault), in ascending order of index.
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
        }
    }

    /// Number of pages asked for, those that failed included.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether no page was asked for.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The access the pages are mapped with.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The frames that could not be mapped, ascending by index. A caller looks at
    /// every one: a mapping call that succeeds may still have failed for frame 7.
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

    /// Page `index`, or `None` where it is out of range or could not be mapped.
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

    /// The little-endian u64 at `index` (in units of 8 octets from the first page),
    /// or `None` where that is outside the pages or in one that failed.
    pub fn read_u64(&self, index: usize) -> Option<u64> {
        let page = self.page(index / ENTRIES_PER_TABLE)?;
        Some(page.read_entry(index % ENTRIES_PER_TABLE))
    }

    /// Fill `pages` (a range of indices) from a file descriptor, straight into the
    /// mapping, reading exactly their octets.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the descriptor ends early; what `read(2)` says
    /// otherwise. EINTR is retried.
    ///
    /// # Panics
    ///
    /// When the range leaves the pages, holds one that failed, or the mapping is
    /// read-only.
    pub fn read_exact_from(
        &self,
        fd: BorrowedFd<'_>,
        pages: std::ops::Range<usize>,
    ) -> io::Result<()> {
        assert!(self.access == Access::Write, "mapping is read-only");
        assert!(
            pages.start <= pages.end && pages.end <= self.count,
            "range leaves the mapping"
        );
        assert!(
            !self.failed.iter().any(|e| pages.contains(&e.index)),
            "range holds a page that is not mapped"
        );
        let total = pages.len() * PAGE_SIZE;
        let mut done = 0;
        while done < total {
            // SAFETY: start < count when total > 0 and done < total, so the sum
            // stays inside the mapping.
            let ptr = unsafe { self.base.add(pages.start * PAGE_SIZE + done) };
            // SAFETY: `ptr .. ptr + (total - done)` lies in the mapping, which is
            // writable and has no failed page in this range (asserted above); no
            // reference to it exists anywhere.
            let n = unsafe { libc::read(fd.as_raw_fd(), ptr.as_ptr().cast(), total - done) };
            match Errno::result(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n.unsigned_abs(),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl Drop for ForeignPages {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        // SAFETY: the range is the one `from_raw` took over, unmapped only here;
        // every `ForeignPage` and `Gather` into it borrows `self` and is gone.
        let result = unsafe { mman::munmap(self.base.cast(), self.count * PAGE_SIZE) };
        if let Err(errno) = result {
            tracing::error!(%errno, pages = self.count, "munmap of foreign pages failed");
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

    /// The 64-bit word at `index` (0–511), read once, little endian.
    ///
    /// # Panics
    ///
    /// When `index` is 512 or more.
    pub fn read_entry(self, index: usize) -> u64 {
        // SAFETY: `word` is inside a mapped page and 8-aligned, since pages are
        // page-aligned.
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
    /// When `index` is 512 or more, or the page is mapped for reading only.
    pub fn write_entry(self, index: usize, value: u64) {
        assert!(self.access == Access::Write, "page is mapped read-only");
        // SAFETY: `word` is inside a page mapped for writing, and 8-aligned.
        unsafe { self.word(index).write_volatile(value.to_le()) }
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
    /// When the page is mapped for reading only.
    pub fn copy_from(self, page: &Page) {
        for (i, word) in page.as_chunks().0.iter().enumerate() {
            self.write_entry(i, u64::from_le_bytes(*word));
        }
    }

    /// Overwrite the page with zeros.
    ///
    /// # Panics
    ///
    /// When the page is mapped for reading only.
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

/// A list of places to write from, in order: local octets and foreign pages.
#[derive(Default)]
pub struct Gather<'a> {
    pieces: Vec<Piece>,
    octets: usize,
    borrowed: PhantomData<(&'a [u8], ForeignPage<'a>)>,
}

#[derive(Clone, Copy)]
struct Piece {
    base: NonNull<u8>,
    len: usize,
}

/// Most iovecs that one `writev(2)` takes on Linux (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

impl<'a> Gather<'a> {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Octets in the list.
    pub fn len(&self) -> usize {
        self.octets
    }

    /// Whether the list holds no octet.
    pub fn is_empty(&self) -> bool {
        self.octets == 0
    }

    /// Add octets of our own.
    pub fn push(&mut self, local: &'a [u8]) {
        self.push_piece(NonNull::from(local).cast(), local.len());
    }

    /// Add a page of the guest.
    pub fn push_page(&mut self, page: ForeignPage<'a>) {
        self.push_piece(page.ptr, PAGE_SIZE);
    }

    fn push_piece(&mut self, base: NonNull<u8>, len: usize) {
        if len == 0 {
            return;
        }
        self.octets += len;
        self.pieces.push(Piece { base, len });
    }

    /// The list as the kernel wants it. Neighbours that touch become one: to the kernel
    /// they are addresses. (To us they may be two allocations, so pieces stay apart.)
    fn iovecs(&self) -> Vec<libc::iovec> {
        let mut iovecs: Vec<libc::iovec> = Vec::new();
        for piece in &self.pieces {
            let base = piece.base.as_ptr();
            match iovecs.last_mut() {
                Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => {
                    last.iov_len += piece.len;
                }
                _ => iovecs.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: piece.len,
                }),
            }
        }
        iovecs
    }

    /// Write every octet of the list to a file descriptor without copying, in as
    /// few `writev(2)` calls as the kernel allows. Short writes go on where they
    /// stopped; EINTR is retried.
    ///
    /// # Errors
    ///
    /// What `writev(2)` says; EFAULT when a page of the guest went away. An
    /// unknown part of the list has then been written.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut iovecs = self.iovecs();
        let mut rest = iovecs.as_mut_slice();
        while let Some(first) = rest.first() {
            if first.iov_len == 0 {
                rest = &mut rest[1..];
                continue;
            }
            let count = i32::try_from(rest.len().min(MAX_IOVECS)).expect("at most 1024");
            // SAFETY: every iovec lies in memory that `self` borrows for 'a (local
            // slices, or pages inside a live mapping); the kernel only reads it,
            // and reports EFAULT for what is not mapped.
            let n = unsafe { libc::writev(fd.as_raw_fd(), rest.as_ptr(), count) };
            let mut written = match Errno::result(n) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => n.unsigned_abs(),
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            };
            for iovec in rest.iter_mut() {
                let step = written.min(iovec.iov_len);
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
                iovec.iov_len -= step;
                written -= step;
                if written == 0 {
                    break;
                }
            }
            let done = rest.iter().take_while(|v| v.iov_len == 0).count();
            rest = &mut rest[done..];
        }
        Ok(())
    }

    /// Write every octet of the list to `out`, through a buffer of 64 KiB: for
    /// sinks that are no file descriptor.
    ///
    /// # Errors
    ///
    /// What `out` says.
    pub fn copy_to(&self, out: &mut dyn io::Write) -> io::Result<()> {
        const BUFFER: usize = 16 * PAGE_SIZE;
        let mut buffer = vec![0_u8; BUFFER];
        for piece in &self.pieces {
            let mut at = 0;
            while at < piece.len {
                let step = (piece.len - at).min(BUFFER);
                piece.read(at, &mut buffer[..step]);
                out.write_all(&buffer[..step])?;
                at += step;
            }
        }
        Ok(())
    }
}

impl Piece {
    /// Copy the octets from `at` on into `out`, which must not reach beyond the
    /// piece: each read once, whole words at a time where the piece is aligned, as
    /// pages are.
    fn read(self, at: usize, out: &mut [u8]) {
        debug_assert!(at + out.len() <= self.len);
        // SAFETY: at < len (callers), so the result is inside memory the list borrows.
        let base = unsafe { self.base.add(at) };
        let aligned = base.cast::<u64>().is_aligned();
        let (words, rest) = match aligned {
            true => out.as_chunks_mut::<8>(),
            false => (Default::default(), out),
        };
        let done = words.len() * 8;
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: at + 8 * (i + 1) <= at + out.len() <= len.
            let from = unsafe { base.cast::<u64>().add(i) };
            // SAFETY: `from` is inside readable memory and aligned (checked above).
            *word = unsafe { from.read_volatile() }.to_ne_bytes();
        }
        for (i, octet) in rest.iter_mut().enumerate() {
            // SAFETY: at + done + i < at + out.len() <= len.
            let from = unsafe { base.add(done + i) };
            // SAFETY: `from` is inside readable memory; u8 needs no alignment.
            *octet = unsafe { from.read_volatile() };
        }
    }
}

impl fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather")
            .field("octets", &self.octets)
            .field("pieces", &self.pieces.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags};
    use xsr_format::frame::Gfn;

    use super::*;

    /// `count` pages of a memfd, page i filled with the octet i + 1; those in
    /// `failed` have no memory behind them.
    fn pages(count: usize, access: Access, failed: &[usize]) -> ForeignPages {
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
        // SAFETY: the mapping above is handed over whole; the protected pages are
        // listed as failed.
        unsafe { ForeignPages::from_raw(base, count, access, failed) }
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
    fn a_list_merges_neighbours_and_arrives_whole() {
        let pages = pages(5, Access::Read, &[]);
        let head = [9_u8; 13];
        let mut list = Gather::new();
        list.push(&head);
        list.push(&[]);
        for i in [0, 1, 2, 4] {
            list.push_page(pages.page(i).unwrap());
        }
        assert_eq!(list.iovecs().len(), 3);
        assert_eq!(list.len(), 13 + 4 * PAGE_SIZE);
        let mut expected = head.to_vec();
        for octet in [1, 2, 3, 5] {
            expected.extend([octet; PAGE_SIZE]);
        }
        let mut copied = Vec::new();
        list.copy_to(&mut copied).unwrap();
        assert_eq!(copied, expected);

        // A pipe takes 64 KiB at most at a time: the writes come short.
        let mut list = Gather::new();
        for _ in 0..100 {
            list.push(&head);
            for (_, page) in pages.iter() {
                list.push_page(page);
            }
        }
        let (mut reader, writer) = std::io::pipe().unwrap();
        let received = std::thread::scope(|scope| {
            let receiver = scope.spawn(move || {
                let mut received = Vec::new();
                reader.read_to_end(&mut received).map(|_| received)
            });
            list.write_to(writer.as_fd()).unwrap();
            drop(writer);
            receiver.join().unwrap().unwrap()
        });
        assert_eq!(received.len(), 100 * (13 + 5 * PAGE_SIZE));
        assert_eq!(received[received.len() - PAGE_SIZE..], [5; PAGE_SIZE]);
    }

    #[test]
    fn a_closed_pipe_and_a_vanished_page_are_errors() {
        let pages = pages(3, Access::Read, &[1]);
        let (reader, writer) = std::io::pipe().unwrap();
        let mut list = Gather::new();
        list.push_page(pages.page(0).unwrap());
        drop(reader);
        let error = list.write_to(writer.as_fd()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        // What the kernel says of memory that goes away under a mapping.
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut list = Gather::new();
        list.push_page(pages.page_unchecked(1));
        let error = list.write_to(writer.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EFAULT as i32));
    }

    #[test]
    fn pages_are_filled_from_a_descriptor_exactly() {
        let pages = pages(4, Access::Write, &[]);
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[0x77; 2 * PAGE_SIZE]).unwrap();
        writer.write_all(b"behind").unwrap();
        pages.read_exact_from(reader.as_fd(), 1..3).unwrap();
        for (index, octet) in [(0, 1), (1, 0x77), (2, 0x77), (3, 4)] {
            assert_eq!(*pages.page(index).unwrap().to_page(), [octet; PAGE_SIZE]);
        }
        drop(writer);
        let error = pages.read_exact_from(reader.as_fd(), 0..1).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
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
