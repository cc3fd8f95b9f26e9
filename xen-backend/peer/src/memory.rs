//! Hypercall buffers of a C program: pages that it reads and writes by their addresses,
//! and that the face copies from and to. Where a structure points elsewhere (to a
//! variable, as Xen's library does once) the kernel copies, and says EFAULT where there
//! is nothing: to a hypervisor all of a process is the caller's memory.
//!
//! C implementation: `tools/libs/call/buffer.c`.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::mock::peer::CallerMemory;

/// A page of a buffer. Atomics, since the program changes it behind our back.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([AtomicU8; PAGE_SIZE]);

impl Page {
    const fn zeroed() -> Self {
        Self([const { AtomicU8::new(0) }; PAGE_SIZE])
    }

    /// The octets as one runs through the pages.
    fn octets(pages: &[Self]) -> impl Iterator<Item = &AtomicU8> {
        pages.iter().flat_map(|page| &page.0)
    }
}

/// Every buffer that is not freed, by its address.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<BTreeMap<u64, Vec<Page>>>);

/// Those of this process.
pub(crate) static BUFFERS: Buffers = Buffers(Mutex::new(BTreeMap::new()));

impl Buffers {
    fn live(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<Page>>> {
        // Every change of it is a single step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroed pages, at least one.
    pub(crate) fn take(&self, pages: usize) -> *mut c_void {
        let mut buffer: Vec<Page> = (0..pages.max(1)).map(|_| Page::zeroed()).collect();
        // With the right to all of it, which the program uses.
        let base = buffer.as_mut_ptr().cast::<c_void>();
        let address = base.expose_provenance() as u64;
        self.live().insert(address, buffer);
        base
    }

    /// Free one; another address is left alone.
    pub(crate) fn free(&self, base: *mut c_void) {
        self.live().remove(&(base.addr() as u64));
    }

    /// Go through `count` octets from an address on; `false` where they are not all in
    /// one buffer.
    fn each(&self, address: u64, count: usize, mut visit: impl FnMut(usize, &AtomicU8)) -> bool {
        let live = self.live();
        let Some((start, pages)) = live.range(..=address).next_back() else {
            return false;
        };
        let at = usize::try_from(address - start).unwrap_or(usize::MAX);
        let inside = at
            .checked_add(count)
            .is_some_and(|end| end <= pages.len() * PAGE_SIZE);
        if !inside {
            return false;
        }
        let skipped = at / PAGE_SIZE;
        Page::octets(&pages[skipped..])
            .skip(at % PAGE_SIZE)
            .take(count)
            .enumerate()
            .for_each(|(index, octet)| visit(index, octet));
        true
    }
}

/// Octets of this process at an address, as the kernel takes them.
fn elsewhere(address: u64, len: usize) -> Result<[RemoteIoVec; 1], Errno> {
    let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
    Ok([RemoteIoVec { base, len }])
}

/// All of it, or none to speak of.
fn whole(copied: usize, wanted: usize) -> Result<(), Errno> {
    match copied == wanted {
        true => Ok(()),
        false => Err(Errno::EFAULT),
    }
}

impl CallerMemory for &'static Buffers {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Errno> {
        let found = self.each(address, out.len(), |index, octet| {
            out[index] = octet.load(Ordering::Relaxed);
        });
        if found {
            return Ok(());
        }
        let (wanted, there) = (out.len(), elsewhere(address, out.len())?);
        let copied = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(out)], &there)?;
        whole(copied, wanted)
    }

    fn write(&self, address: u64, octets: &[u8]) -> Result<(), Errno> {
        let found = self.each(address, octets.len(), |index, octet| {
            octet.store(octets[index], Ordering::Relaxed);
        });
        if found {
            return Ok(());
        }
        let there = elsewhere(address, octets.len())?;
        let copied = process_vm_writev(Pid::this(), &[IoSlice::new(octets)], &there)?;
        whole(copied, octets.len())
    }
}
