//! Hypercall buffers of a C program: pages that it reads and writes by their addresses, and that
//! the face copies from and to. If a structure points elsewhere (to a variable, as Xen's library
//! does once), the kernel copies, and returns EFAULT for an unmapped address: a hypervisor can
//! access all of the caller's memory.
//!
//! C implementation: `tools/libs/call/buffer.c`.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::Errno;
use xsr_xen_backend::mock::peer::CallerMemory;

/// Words of a page.
const WORDS: usize = PAGE_SIZE / 8;

/// A page of a buffer. It consists of atomics, because the C program changes it without our
/// knowledge, and of words, so that copying costs as much as in a hypervisor.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([AtomicU64; WORDS]);

impl Page {
    const fn zeroed() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS])
    }
}

/// Part of a word of a buffer: bytes from `first` on, which are the bytes of the copy from `at` on.
struct Part<'b> {
    word: &'b AtomicU64,
    first: usize,
    at: usize,
    bytes: usize,
}

impl Part<'_> {
    fn read(&self, out: &mut [u8]) {
        let word = self.word.load(Ordering::Relaxed).to_ne_bytes();
        let bytes = &word[self.first..self.first + self.bytes];
        out[self.at..self.at + self.bytes].copy_from_slice(bytes);
    }

    /// The caller waits for its hypercall, so the rest of the word does not change meanwhile.
    fn write(&self, bytes: &[u8]) {
        let mut word = match self.bytes {
            8 => [0; 8],
            _ => self.word.load(Ordering::Relaxed).to_ne_bytes(),
        };
        let bytes = &bytes[self.at..self.at + self.bytes];
        word[self.first..self.first + self.bytes].copy_from_slice(bytes);
        self.word.store(u64::from_ne_bytes(word), Ordering::Relaxed);
    }
}

/// Every live buffer, by its address.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<BTreeMap<u64, Vec<Page>>>);

/// The buffers of this process.
pub(crate) static BUFFERS: Buffers = Buffers(Mutex::new(BTreeMap::new()));

impl Buffers {
    fn live(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<Page>>> {
        // Every change is a single step, so a panic leaves no partial state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroed pages, at least one.
    pub(crate) fn take(&self, pages: usize) -> *mut c_void {
        let mut buffer: Vec<Page> = (0..pages.max(1)).map(|_| Page::zeroed()).collect();
        // The pointer is for all of the buffer, which the program uses.
        let base = buffer.as_mut_ptr().cast::<c_void>();
        let address = base.expose_provenance() as u64;
        self.live().insert(address, buffer);
        base
    }

    /// Free a buffer; any other address is ignored.
    pub(crate) fn free(&self, base: *mut c_void) {
        self.live().remove(&(base.addr() as u64));
    }

    /// Visit `count` bytes from an address on, as words and parts of words; `false` if they are not
    /// all in one buffer.
    fn each(&self, address: u64, count: usize, mut visit: impl FnMut(&Part<'_>)) -> bool {
        let live = self.live();
        let Some((start, pages)) = live.range(..=address).next_back() else {
            return false;
        };
        let start = usize::try_from(address - start).unwrap_or(usize::MAX);
        let inside = start
            .checked_add(count)
            .is_some_and(|end| end <= pages.len() * PAGE_SIZE);
        if !inside {
            return false;
        }
        let mut at = 0;
        while at < count {
            let place = start + at;
            let first = place % 8;
            let bytes = (8 - first).min(count - at);
            let word = &pages[place / PAGE_SIZE].0[place % PAGE_SIZE / 8];
            visit(&Part {
                word,
                first,
                at,
                bytes,
            });
            at += bytes;
        }
        true
    }
}

/// Bytes of this process at an address, in the kernel's form.
fn elsewhere(address: u64, len: usize) -> Result<[RemoteIoVec; 1], Errno> {
    let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
    Ok([RemoteIoVec { base, len }])
}

/// EFAULT unless everything was copied.
fn whole(copied: usize, wanted: usize) -> Result<(), Errno> {
    match copied == wanted {
        true => Ok(()),
        false => Err(Errno::EFAULT),
    }
}

impl CallerMemory for &'static Buffers {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Errno> {
        let found = self.each(address, out.len(), |part| part.read(out));
        if found {
            return Ok(());
        }
        let (wanted, there) = (out.len(), elsewhere(address, out.len())?);
        let copied = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(out)], &there)?;
        whole(copied, wanted)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let found = self.each(address, bytes.len(), |part| part.write(bytes));
        if found {
            return Ok(());
        }
        let there = elsewhere(address, bytes.len())?;
        let copied = process_vm_writev(Pid::this(), &[IoSlice::new(bytes)], &there)?;
        whole(copied, bytes.len())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// Buffers that are never freed, as in a program.
    fn buffers() -> &'static Buffers {
        Box::leak(Box::default())
    }

    #[test]
    fn bytes_are_copied_wherever_they_begin_and_end() {
        let buffers = buffers();
        let base = buffers.take(2).addr() as u64;
        let mut expected = vec![0; 2 * PAGE_SIZE];
        let mut next = 0_u8;
        for (at, len) in [
            (0, 8),
            (3, 4),
            (5, 20),
            (16, 1),
            (4090, 13),
            (8191, 1),
            (24, 4096),
        ] {
            let bytes: Vec<u8> = (0..len)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            (&buffers).write(base + at as u64, &bytes).unwrap();
            expected[at..at + len].copy_from_slice(&bytes);
            let mut part = vec![0; len];
            (&buffers).read(base + at as u64, &mut part).unwrap();
            assert_eq!(part, bytes, "{len} bytes at {at}");
            let mut all = vec![0; 2 * PAGE_SIZE];
            (&buffers).read(base, &mut all).unwrap();
            assert_eq!(all, expected, "{len} bytes at {at}");
        }
    }

    #[test]
    fn what_is_in_no_buffer_is_copied_by_the_kernel_or_is_no_memory() {
        let buffers = buffers();
        let mut variable = 7_u64.to_ne_bytes();
        let address = variable.as_mut_ptr().expose_provenance() as u64;
        let mut out = [0; 8];
        (&buffers).read(address, &mut out).unwrap();
        assert_eq!(out, variable);
        for address in [0, 8, u64::MAX - 8] {
            assert_eq!((&buffers).read(address, &mut out), Err(Errno::EFAULT));
            assert_eq!((&buffers).write(address, &[1]), Err(Errno::EFAULT));
        }
    }

    #[test]
    fn a_buffer_that_is_freed_is_found_no_more() {
        let buffers = buffers();
        let base = buffers.take(0);
        assert_eq!(buffers.live().len(), 1);
        buffers.free(base.wrapping_byte_add(8));
        assert_eq!(buffers.live().len(), 1);
        buffers.free(base);
        assert!(!buffers.each(base.addr() as u64, 8, |_| {}));
    }
}
