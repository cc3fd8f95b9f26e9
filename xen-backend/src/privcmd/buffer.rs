//! Hypercall buffers: memory that the kernel neither moves nor pages out.
//!
//! The kernel owns the pages of `/dev/xen/hypercall`. Without that device (Linux before 4.18) the
//! pages are anonymous, locked, and excluded from child processes: a fork would make them
//! copy-on-write, and the hypervisor could meet a page that is not present.
//!
//! C implementation: `tools/libs/call/{linux,buffer}.c`.

use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Errno;
use nix::sys::mman::{self, MapFlags, MmapAdvise, ProtFlags};
use xsr_format::frame::PAGE_SIZE;

/// The number of one-page buffers that are kept for later calls.
const KEPT: usize = 8;

/// A pool of buffers.
#[derive(Debug)]
pub(super) struct Pool {
    /// `/dev/xen/hypercall`; `None` for the older method.
    device: Option<File>,
    kept: Mutex<Vec<Pages>>,
}

impl Pool {
    pub(super) fn new(device: Option<File>) -> Self {
        Self {
            device,
            kept: Mutex::default(),
        }
    }

    /// A zeroed buffer of at least `bytes`.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer, Errno> {
        let pages = NonZeroUsize::new(bytes.div_ceil(PAGE_SIZE)).unwrap_or(NonZeroUsize::MIN);
        let kept = match pages.get() {
            1 => self.kept().pop(),
            _ => None,
        };
        let mut pages = match kept {
            Some(pages) => pages,
            None => Pages::new(self.device.as_ref(), pages)?,
        };
        pages.bytes_mut().fill(0);
        Ok(Buffer {
            pages: Some(pages),
            bytes,
            pool: Arc::clone(self),
        })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<Pages>> {
        // A panic cannot leave the list half-changed.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages mapped for hypercalls.
#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Pages {}

impl Pages {
    fn new(device: Option<&File>, pages: NonZeroUsize) -> Result<Self, Errno> {
        let page = NonZeroUsize::new(PAGE_SIZE).ok_or(Errno::EINVAL)?;
        let bytes = pages.checked_mul(page).ok_or(Errno::ENOMEM)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let base = match device {
            // SAFETY: a new mapping at an address of the kernel's choice.
            Some(device) => unsafe {
                mman::mmap(None, bytes, prot, MapFlags::MAP_SHARED, device, 0)
            },
            None => {
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_LOCKED;
                // SAFETY: as above.
                unsafe { mman::mmap_anonymous(None, bytes, prot, flags) }
            }
        }?;
        let pages = Self {
            base: base.cast(),
            bytes,
        };
        if device.is_none() {
            // SAFETY: the pages just mapped; the advice changes what a fork copies, and nothing in
            // this process.
            unsafe { mman::madvise(base, bytes.get(), MmapAdvise::MADV_DONTFORK) }?;
        }
        Ok(pages)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `base` starts a mapping of `bytes` readable, initialised bytes that
        // this value owns. The hypervisor writes it only during a hypercall, for which
        // the buffer is borrowed mutably (`Call`).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes.get()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; writable, and borrowed once.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes.get()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is the one `new` mapped; borrows of it borrow `self`.
        if let Err(errno) = unsafe { mman::munmap(self.base.cast(), self.bytes.get()) } {
            tracing::error!(%errno, "munmap of a hypercall buffer failed");
        }
    }
}

/// Memory that holds a hypercall's structures.
#[derive(Debug)]
pub(crate) struct CallBuffer(Memory);

#[derive(Debug)]
enum Memory {
    /// Pages of this process, for the hypervisor of this machine.
    Ours(Buffer),
    /// Memory of another hypervisor. Its address means nothing in this process.
    #[cfg_attr(
        not(feature = "mock"),
        expect(dead_code, reason = "for the mock machine")
    )]
    Elsewhere(Box<dyn Elsewhere>),
}

/// Memory of a hypervisor that is not this machine's.
pub(crate) trait Elsewhere: fmt::Debug + Send {
    /// Its address in that hypervisor.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn len(&self) -> usize;

    /// As [`CallBuffer::read`].
    fn read(&self, at: usize, out: &mut [u8]);

    /// As [`CallBuffer::write`].
    fn write(&mut self, at: usize, bytes: &[u8]);
}

impl CallBuffer {
    /// A buffer whose address is never given to this machine's hypervisor.
    #[cfg(feature = "mock")]
    pub(crate) fn elsewhere(memory: Box<dyn Elsewhere>) -> Self {
        Self(Memory::Elsewhere(memory))
    }

    pub(super) fn ours(buffer: Buffer) -> Self {
        Self(Memory::Ours(buffer))
    }

    pub(super) fn is_ours(&self) -> bool {
        matches!(self.0, Memory::Ours(_))
    }

    /// Its address, for use in a structure.
    pub(crate) fn address(&self) -> u64 {
        match &self.0 {
            Memory::Ours(buffer) => buffer.address(),
            Memory::Elsewhere(memory) => memory.address(),
        }
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Memory::Ours(buffer) => buffer.bytes,
            Memory::Elsewhere(memory) => memory.len(),
        }
    }

    /// Copy `out.len()` bytes from offset `at` on.
    ///
    /// # Panics
    ///
    /// If the buffer is too short.
    pub(crate) fn read(&self, at: usize, out: &mut [u8]) {
        match &self.0 {
            Memory::Ours(buffer) => buffer.read(at, out),
            Memory::Elsewhere(memory) => memory.read(at, out),
        }
    }

    /// Copy `bytes` into the buffer from offset `at` on.
    ///
    /// # Panics
    ///
    /// If the buffer is too short.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) {
        match &mut self.0 {
            Memory::Ours(buffer) => buffer.write(at, bytes),
            Memory::Elsewhere(memory) => memory.write(at, bytes),
        }
    }
}

/// A buffer of pages; dropping it returns them to the pool.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Always `Some` until it is dropped.
    pages: Option<Pages>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    fn address(&self) -> u64 {
        let pages = self.pages.as_ref().expect("a buffer has pages");
        pages.base.as_ptr().expose_provenance() as u64
    }

    fn read(&self, at: usize, out: &mut [u8]) {
        let pages = self.pages.as_ref().expect("a buffer has pages");
        out.copy_from_slice(&pages.bytes()[..self.bytes][at..at + out.len()]);
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let pages = self.pages.as_mut().expect("a buffer has pages");
        pages.bytes_mut()[..self.bytes][at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(pages) = self.pages.take() else {
            return;
        };
        let mut kept = self.pool.kept();
        if pages.bytes.get() == PAGE_SIZE && kept.len() < KEPT {
            kept.push(pages);
        }
    }
}
