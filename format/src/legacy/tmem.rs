//! Transcendent memory in a legacy stream. It is parsed only to find its end, and skipped, since
//! Xen has had no tmem since 4.13.
//!
//! | chunk −5 | |
//! |---|---|
//! | u32 × 7 | version, most pools, all ones, flags, weight, cap, all ones |
//! | pools | u32 id (all ones: no more), u32 flags, i32 pages, u64 × 2 uuid |
//! | of a pool, for each page | u64 × 3 object (all ones: no more), u32 index, the page |
//!
//! | chunk −6 | |
//! |---|---|
//! | invalid pages | u32 pool (all ones: no more), u64 × 3 object, u32 index |
//!
//! C implementation: `tools/libxc/xc_tmem.c` (Xen 4.5).

use std::io::Read;

use super::error::LegacyError;
use crate::error::ReadErrorCause;
use crate::source::{Skip, fill};

const ONES: [u8; 4] = [0xff; 4];
const NO_OBJECT: [u8; 24] = [0xff; 24];
/// `TMEM_POOL_PAGESIZE_SHIFT` and `_MASK`: log2 of the page size, minus 12.
const PAGE_SIZE_SHIFT: u32 = 4;
const PAGE_SIZE_MASK: u32 = 0xf;

/// Skips and counts the bytes of tmem chunks.
struct Passing<'s, R> {
    source: &'s mut R,
    skip: Skip<R>,
    scratch: &'s mut Vec<u8>,
    bytes: u64,
}

/// Skips the body of chunk −5. Returns its size.
pub(super) fn pass_over<R: Read>(
    source: &mut R,
    skip: Skip<R>,
    scratch: &mut Vec<u8>,
) -> Result<u64, ReadErrorCause> {
    let mut passing = Passing::new(source, skip, scratch);
    passing.words()?;
    Ok(passing.bytes)
}

/// Skips the body of chunk −6. Returns its size.
pub(super) fn pass_over_extra<R: Read>(
    source: &mut R,
    skip: Skip<R>,
    scratch: &mut Vec<u8>,
) -> Result<u64, ReadErrorCause> {
    let mut passing = Passing::new(source, skip, scratch);
    while passing.take::<4>()? != ONES {
        passing.take::<28>()?;
    }
    Ok(passing.bytes)
}

impl<'s, R: Read> Passing<'s, R> {
    fn new(source: &'s mut R, skip: Skip<R>, scratch: &'s mut Vec<u8>) -> Self {
        Self {
            source,
            skip,
            scratch,
            bytes: 0,
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ReadErrorCause> {
        let mut bytes = [0; N];
        fill(self.source, &mut bytes)?;
        self.bytes = self.bytes.saturating_add(N as u64);
        Ok(bytes)
    }

    fn word(&mut self) -> Result<u32, ReadErrorCause> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn ones(&mut self, what: &'static str) -> Result<(), ReadErrorCause> {
        match self.word()? {
            u32::MAX => Ok(()),
            got => Err(LegacyError::Tmem { what, got }.into()),
        }
    }

    fn words(&mut self) -> Result<(), ReadErrorCause> {
        self.take::<8>()?;
        self.ones("the word after the number of pools")?;
        self.take::<12>()?;
        self.ones("the word after the cap")?;
        while self.take::<4>()? != ONES {
            self.pool()?;
        }
        Ok(())
    }

    fn pool(&mut self) -> Result<(), ReadErrorCause> {
        let flags = self.word()?;
        // The restorer also treats a negative number of pages as 0.
        let pages = i32::from_le_bytes(self.take()?);
        self.take::<16>()?;
        // 4 KiB to 128 MiB.
        let page = 4096_u64 << (flags >> PAGE_SIZE_SHIFT & PAGE_SIZE_MASK);
        for _ in 0..pages {
            if self.take::<24>()? == NO_OBJECT {
                break;
            }
            self.take::<4>()?;
            let done = (self.skip)(self.source, page, self.scratch).map_err(ReadErrorCause::Io)?;
            self.bytes = self.bytes.saturating_add(done);
            if done < page {
                let needed = page.saturating_sub(done);
                return Err(ReadErrorCause::Truncated { needed });
            }
        }
        Ok(())
    }
}
