//! Hypercall buffers of the mock machine's callers, at simulated addresses with unmapped gaps
//! between them.
//!
//! C implementation: `copy_from_guest` and `copy_to_guest`, to which other addresses
//! are EFAULT.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Errno;
use xsr_format::frame::PAGE_SIZE;

use crate::privcmd::Elsewhere;

/// The address of the first buffer.
const FIRST: u64 = 0x7f00_0000_0000;

/// The memory of a caller that has its own buffers.
#[cfg_attr(
    not(feature = "peer"),
    allow(unreachable_pub, reason = "only `peer` gives it away")
)]
pub trait CallerMemory: fmt::Debug + Send + Sync {
    /// Copy bytes from an address on into `out`.
    ///
    /// # Errors
    ///
    /// EFAULT if they are not all in one buffer.
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Errno>;

    /// Copy bytes to an address.
    ///
    /// # Errors
    ///
    /// EFAULT as above.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno>;
}

/// Buffers by address.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers {
    space: Arc<Mutex<Space>>,
    /// The caller's memory, if it has its own addresses.
    caller: Option<Arc<dyn CallerMemory>>,
}

#[derive(Debug, Default)]
struct Space {
    live: BTreeMap<u64, Vec<u8>>,
    /// Bytes of addresses allocated so far; no address is reused.
    used: u64,
}

impl Buffers {
    /// The buffers of a caller with its own memory.
    #[cfg(feature = "peer")]
    pub(super) fn of_caller(caller: Arc<dyn CallerMemory>) -> Self {
        Self {
            space: Arc::default(),
            caller: Some(caller),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Space> {
        // Every change is a single step, so a panic leaves no partial state.
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self, bytes: usize) -> Buffer {
        let mut space = self.lock();
        let address = FIRST + space.used;
        // At least one unmapped page after each buffer.
        let pages = bytes.div_ceil(PAGE_SIZE) + 2;
        space.used += (pages * PAGE_SIZE) as u64;
        space.live.insert(address, vec![0; bytes]);
        Buffer {
            space: self.clone(),
            address,
            bytes,
        }
    }

    /// The number of live buffers.
    #[cfg(test)]
    pub(super) fn live(&self) -> usize {
        self.lock().live.len()
    }

    /// Bytes from an address on; EFAULT if they are not all in one buffer.
    pub(super) fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Errno> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        if let Some(caller) = &self.caller {
            let mut out = vec![0; bytes];
            caller.read(address, &mut out)?;
            return Ok(out);
        }
        let space = self.lock();
        let (start, buffer) = space
            .live
            .range(..=address)
            .next_back()
            .ok_or(Errno::EFAULT)?;
        let at = usize::try_from(address - start).map_err(|_| Errno::EFAULT)?;
        let end = at.checked_add(bytes).ok_or(Errno::EFAULT)?;
        buffer.get(at..end).map(<[u8]>::to_vec).ok_or(Errno::EFAULT)
    }

    /// Write bytes to an address; EFAULT as above.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(caller) = &self.caller {
            return caller.write(address, bytes);
        }
        let mut space = self.lock();
        let place = space.live.range_mut(..=address).next_back();
        let (start, buffer) = place.ok_or(Errno::EFAULT)?;
        let at = usize::try_from(address - start).map_err(|_| Errno::EFAULT)?;
        let end = at.checked_add(bytes.len()).ok_or(Errno::EFAULT)?;
        let place = buffer.get_mut(at..end).ok_or(Errno::EFAULT)?;
        place.copy_from_slice(bytes);
        Ok(())
    }
}

/// A caller's buffer; its address is invalid once it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    space: Buffers,
    address: u64,
    bytes: usize,
}

impl Elsewhere for Buffer {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> usize {
        self.bytes
    }

    fn read(&self, at: usize, out: &mut [u8]) {
        let bytes = self.space.read(self.address + at as u64, out.len());
        out.copy_from_slice(&bytes.expect("inside the buffer"));
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let written = self.space.write(self.address + at as u64, bytes);
        written.expect("inside the buffer");
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.space.lock().live.remove(&self.address);
    }
}
