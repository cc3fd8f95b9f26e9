//! Gather lists: local bytes and foreign pages, written without copying them first.
//!
//! C implementation: the `writev_exact` of `xg_sr_save.c:write_batch`.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::Errno;
use nix::libc;
use xsr_format::frame::PAGE_SIZE;

use super::{ForeignPage, ForeignPages};

/// A list of memory to write, in order: local bytes and foreign pages.
#[derive(Default)]
pub struct Gather<'a> {
    pieces: Vec<Piece>,
    bytes: usize,
    borrowed: PhantomData<(&'a [u8], ForeignPage<'a>)>,
}

#[derive(Clone, Copy)]
struct Piece {
    base: NonNull<u8>,
    len: usize,
}

/// The most iovecs that one `writev(2)` takes on Linux (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

impl<'a> Gather<'a> {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes in the list.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the list holds no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Add local bytes.
    pub fn push(&mut self, local: &'a [u8]) {
        self.push_piece(NonNull::from(local).cast(), local.len());
    }

    /// Add a guest page.
    pub fn push_page(&mut self, page: ForeignPage<'a>) {
        self.push_piece(page.ptr, PAGE_SIZE);
    }

    /// Add a range of guest pages, by their indices.
    ///
    /// # Panics
    ///
    /// If the range exceeds the pages or contains one that could not be mapped.
    pub fn push_pages(&mut self, pages: &'a ForeignPages, range: Range<usize>) {
        let (base, bytes) = pages.mapped_bytes(range);
        self.push_piece(base, bytes);
    }

    fn push_piece(&mut self, base: NonNull<u8>, len: usize) {
        if len == 0 {
            return;
        }
        self.bytes += len;
        self.pieces.push(Piece { base, len });
    }

    /// The list in the kernel's form. Adjacent pieces become one: to the kernel they are addresses.
    /// (In Rust they may be two allocations, so the list keeps them apart.)
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

    /// The list, ready to be written to a file descriptor piece by piece, without copying.
    pub fn unwritten(&self) -> Unwritten<'_> {
        Unwritten {
            iovecs: self.iovecs(),
            first: 0,
            borrowed: PhantomData,
        }
    }

    /// Write every byte of the list to `out`, through a buffer of 64 KiB: for sinks that are not
    /// file descriptors.
    ///
    /// # Errors
    ///
    /// The error of `out`.
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
    /// Copy the bytes from `at` on into `out`, which must not reach beyond the piece. Each byte is
    /// read once, in whole words if the piece is aligned, as pages are.
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
        for (i, byte) in rest.iter_mut().enumerate() {
            // SAFETY: at + done + i < at + out.len() <= len.
            let from = unsafe { base.add(done + i) };
            // SAFETY: `from` is inside readable memory; u8 needs no alignment.
            *byte = unsafe { from.read_volatile() };
        }
    }
}

impl fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather")
            .field("bytes", &self.bytes)
            .field("pieces", &self.pieces.len())
            .finish_non_exhaustive()
    }
}

/// The system call for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCall {
    /// `writev(2)`: blocks if the descriptor does.
    Writev,
    /// `sendmsg(2)` that never blocks (EAGAIN), whatever the descriptor's mode. Sockets only.
    SendDontWait,
    /// `writev(2)` of at most this many bytes. A pipe that poll(2) reports as writable takes
    /// PIPE_BUF without blocking.
    AtMost(NonZeroUsize),
}

/// The part of a [`Gather`] that is yet to be written.
pub struct Unwritten<'g> {
    iovecs: Vec<libc::iovec>,
    first: usize,
    borrowed: PhantomData<&'g Gather<'g>>,
}

impl Unwritten<'_> {
    /// Whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.first == self.iovecs.len()
    }

    /// Write as much as the kernel takes with one call. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// The error of the call, including EINTR and EAGAIN; nothing has been written then. EFAULT if
    /// a guest page is no longer there. `WriteZero` if the descriptor takes nothing without an
    /// error.
    pub fn write_some(&mut self, fd: BorrowedFd<'_>, call: WriteCall) -> io::Result<usize> {
        if self.is_empty() {
            return Ok(0);
        }
        let rest = &self.iovecs[self.first..];
        let rest = &rest[..rest.len().min(MAX_IOVECS)];
        let n = match call {
            WriteCall::Writev => writev(fd, rest),
            WriteCall::SendDontWait => send_dont_wait(fd, &mut by_page(rest)),
            WriteCall::AtMost(limit) => {
                let mut one = rest[0];
                one.iov_len = one.iov_len.min(limit.get());
                writev(fd, &[one])
            }
        };
        match Errno::result(n)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            n => {
                let n = n.unsigned_abs();
                self.advance(n);
                Ok(n)
            }
        }
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let step = written.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            written -= step;
            if iovec.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
    }
}

/// `writev(2)` of pieces of an [`Unwritten`].
fn writev(fd: BorrowedFd<'_>, iovecs: &[libc::iovec]) -> isize {
    let count = i32::try_from(iovecs.len()).expect("at most 1024");
    // SAFETY: every iovec lies in memory that the `Gather` borrows (local slices, or pages inside a
    // live mapping); the kernel only reads it, and reports EFAULT for memory that is not mapped.
    unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), count) }
}

/// The beginning of `iovecs`, split so that none is larger than a page. The kernel copies up to 32
/// KiB at once into a socket if they are contiguous, and that was measured to take a fifth more
/// processor time than copying page by page.
fn by_page(iovecs: &[libc::iovec]) -> Vec<libc::iovec> {
    let pages = iovecs.iter().flat_map(|iovec| {
        (0..iovec.iov_len).step_by(PAGE_SIZE).map(|at| libc::iovec {
            iov_base: iovec.iov_base.wrapping_byte_add(at),
            iov_len: PAGE_SIZE.min(iovec.iov_len - at),
        })
    });
    pages.take(MAX_IOVECS).collect()
}

/// `sendmsg(2)` of pieces of an [`Unwritten`], which does not block.
fn send_dont_wait(fd: BorrowedFd<'_>, iovecs: &mut [libc::iovec]) -> isize {
    // SAFETY: msghdr consists of numbers and pointers, for all of which zero is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = iovecs.as_mut_ptr();
    header.msg_iovlen = iovecs.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header` holds only the iovecs; they lie in memory that the `Gather` borrows, which
    // the kernel only reads (as for `writev`).
    unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) }
}

impl fmt::Debug for Unwritten<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unwritten")
            .field("pieces", &(self.iovecs.len() - self.first))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::super::Access;
    use super::super::tests::pages;
    use super::*;

    fn write_all(list: &Gather<'_>, fd: BorrowedFd<'_>, call: WriteCall) -> io::Result<()> {
        let mut rest = list.unwritten();
        while !rest.is_empty() {
            match rest.write_some(fd, call) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                result => _ = result?,
            }
        }
        Ok(())
    }

    #[test]
    fn a_list_merges_neighbours_and_arrives_whole() {
        let pages = pages(5, Access::Read, &[]);
        let head = [9_u8; 13];
        let mut list = Gather::new();
        list.push(&head);
        list.push(&[]);
        list.push_pages(&pages, 0..2);
        list.push_pages(&pages, 2..2);
        for i in [2, 4] {
            list.push_page(pages.page(i).unwrap());
        }
        assert_eq!(list.iovecs().len(), 3);
        let lens = by_page(&list.iovecs())
            .into_iter()
            .map(|iovec| iovec.iov_len);
        let page = PAGE_SIZE;
        assert_eq!(lens.collect::<Vec<_>>(), [13, page, page, page, page]);
        assert_eq!(list.len(), 13 + 4 * PAGE_SIZE);
        let mut expected = head.to_vec();
        for byte in [1, 2, 3, 5] {
            expected.extend([byte; PAGE_SIZE]);
        }
        let mut copied = Vec::new();
        list.copy_to(&mut copied).unwrap();
        assert_eq!(copied, expected);
    }

    #[test]
    #[should_panic(expected = "not mapped")]
    fn a_run_with_a_page_that_is_not_mapped_is_refused() {
        let pages = pages(3, Access::Read, &[1]);
        Gather::new().push_pages(&pages, 0..2);
    }

    #[test]
    fn a_list_arrives_whole_however_little_each_call_takes() {
        let pages = pages(5, Access::Read, &[]);
        let head = [9_u8; 13];
        let mut list = Gather::new();
        for _ in 0..100 {
            list.push(&head);
            for (_, page) in pages.iter() {
                list.push_page(page);
            }
        }
        let mut expected = Vec::new();
        list.copy_to(&mut expected).unwrap();
        let odd = WriteCall::AtMost(NonZeroUsize::new(4095).unwrap());
        for call in [WriteCall::Writev, WriteCall::SendDontWait, odd] {
            // The socket takes some 200 KiB at a time: the writes are short.
            let (mut reader, writer) = UnixStream::pair().unwrap();
            let received = std::thread::scope(|scope| {
                let receiver = scope.spawn(move || {
                    let mut received = Vec::new();
                    reader.read_to_end(&mut received).map(|_| received)
                });
                write_all(&list, writer.as_fd(), call).unwrap();
                drop(writer);
                receiver.join().unwrap().unwrap()
            });
            assert!(received == expected, "{call:?}");
        }
    }

    #[test]
    fn a_socket_that_is_full_does_not_block() {
        let pages = pages(1, Access::Read, &[]);
        let mut list = Gather::new();
        for _ in 0..1000 {
            list.push_page(pages.page(0).unwrap());
        }
        let (_reader, writer) = UnixStream::pair().unwrap();
        let mut rest = list.unwritten();
        let error = loop {
            if let Err(error) = rest.write_some(writer.as_fd(), WriteCall::SendDontWait) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!rest.is_empty());
    }

    #[test]
    fn a_closed_pipe_and_a_vanished_page_are_errors() {
        let pages = pages(3, Access::Read, &[1]);
        let (reader, writer) = std::io::pipe().unwrap();
        let mut list = Gather::new();
        list.push_page(pages.page(0).unwrap());
        drop(reader);
        let error = write_all(&list, writer.as_fd(), WriteCall::Writev).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        // The kernel's error for memory that disappears under a mapping.
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut list = Gather::new();
        list.push_page(pages.page_unchecked(1));
        let error = write_all(&list, writer.as_fd(), WriteCall::Writev).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EFAULT.raw()));
    }
}
