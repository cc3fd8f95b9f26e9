//! Chunks of a legacy stream.
//!
//! C implementation: `pagebuf_get_one` in `tools/libxc/xc_domain_restore.c` (Xen 4.5).

use super::{
    Item, LegacyError, LegacyGuest, LegacyReader, Marker, Place, Read, ReadErrorCause, State,
};
use crate::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};
use crate::legacy::detect::MAX_BATCH;
use crate::legacy::items::Batch;
use crate::legacy::tmem;
use crate::record::hvm::HvmParam;
use crate::record::x86::TscInfo;

/// What the saver wrote where it found no page: no type, no pfn.
const FILLER: u64 = 0xf000_0000;
const PFN_BITS: u64 = 0x0fff_ffff;
/// The highest possible vcpu (`XC_SR_MAX_VCPUS`).
const MAX_VCPU: i32 = 4095;
/// Maximum size of a toolstack record: libxl's has about a hundred bytes for each of a few regions.
const MAX_TOOLSTACK: u64 = 1 << 20;
/// Maximum size of a compressed chunk: 8192 pages at their worst. The saver's chunks were smaller.
const MAX_COMPRESSED: u64 = 8192 * 5120;

impl<R: Read> LegacyReader<R> {
    pub(super) fn chunk(&mut self) -> Result<Item, ReadErrorCause> {
        let marker = Marker(i32::from_le_bytes(self.take()?));
        self.current.place = Place::LegacyChunk {
            index: self.index,
            marker: Some(marker),
        };
        self.index = self.index.saturating_add(1);
        if let Some(index) = marker.hvm_param() {
            return self.hvm_param(marker, index);
        }
        Ok(match marker {
            Marker(count @ 1..) => self.batch(marker, count.unsigned_abs())?,
            // A guest without memory cannot be restored, whatever the format of its image.
            Marker::END if !self.any_entry => return Err(LegacyError::NoPages.into()),
            Marker::END => {
                self.state = match self.guest {
                    LegacyGuest::Pv => State::Unmapped,
                    LegacyGuest::Hvm => State::MagicPfns,
                };
                Item::BodyEnd
            }
            Marker::ENABLE_VERIFY_MODE => Item::Verify,
            Marker::VCPU_INFO => self.vcpu_info()?,
            Marker::TMEM => {
                let bytes = tmem::pass_over(&mut self.source, self.skip, &mut self.scratch)?;
                self.offset = self.offset.saturating_add(bytes);
                Item::Tmem { bytes }
            }
            Marker::TMEM_EXTRA => {
                let bytes = tmem::pass_over_extra(&mut self.source, self.skip, &mut self.scratch)?;
                self.offset = self.offset.saturating_add(bytes);
                Item::Tmem { bytes }
            }
            Marker::TSC_INFO => Item::TscInfo(TscInfo {
                mode: self.u32()?,
                nsec: self.u64()?,
                khz: self.u32()?,
                incarnation: self.u32()?,
            }),
            Marker::LAST_CHECKPOINT => {
                self.last = true;
                Item::LastCheckpoint
            }
            Marker::ENABLE_COMPRESSION => {
                self.compress_next = true;
                Item::EnableCompression
            }
            Marker::COMPRESSED_DATA => {
                let bytes = self.long()?;
                Self::range("length of the compressed data", bytes, 0, MAX_COMPRESSED)?;
                self.left = bytes;
                Item::Compressed { bytes }
            }
            Marker::TOOLSTACK => {
                let bytes = u64::from(self.u32()?);
                Self::range("length of the toolstack's record", bytes, 0, MAX_TOOLSTACK)?;
                Item::Toolstack(self.blob(bytes)?)
            }
            marker => return Err(LegacyError::UnknownChunk { marker }.into()),
        })
    }

    /// | bytes | field |
    /// |---|---|
    /// | 0–3 | padding, zero |
    /// | 4–11 | value |
    fn hvm_param(&mut self, marker: Marker, index: u64) -> Result<Item, ReadErrorCause> {
        if self.guest != LegacyGuest::Hvm {
            return Err(LegacyError::HvmOnly { marker }.into());
        }
        let got = self.u32()?;
        if got != 0 && !self.options.lenient {
            let what = "padding of the chunk";
            return Err(LegacyError::NotZero { what, got }.into());
        }
        let value = self.u64()?;
        Ok(Item::HvmParam(HvmParam { index, value }))
    }

    /// | bytes | field |
    /// |---|---|
    /// | 0–3 | highest vcpu |
    /// | 4… | bitmap of those present, u64 for each 64 |
    fn vcpu_info(&mut self) -> Result<Item, ReadErrorCause> {
        let got = i32::from_le_bytes(self.take()?);
        if !(0..=MAX_VCPU).contains(&got) {
            return Err(LegacyError::MaxVcpu { got }.into());
        }
        let max = got.unsigned_abs();
        let words = max.div_euclid(64).saturating_add(1);
        let mut vcpus = Vec::new();
        for word in 0..words {
            let bits = self.u64()?;
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let vcpu = word.saturating_mul(64).saturating_add(bit);
                if vcpu > max {
                    return Err(LegacyError::VcpuBeyond { vcpu, max }.into());
                }
                vcpus.push(vcpu);
            }
        }
        if vcpus.is_empty() {
            return Err(LegacyError::NoVcpu.into());
        }
        self.vcpus.clone_from(&vcpus);
        Ok(Item::VcpuInfo(vcpus))
    }

    fn batch(&mut self, marker: Marker, count: u32) -> Result<Item, ReadErrorCause> {
        if count > MAX_BATCH {
            return Err(LegacyError::UnknownChunk { marker }.into());
        }
        let raw = self.longs(count.into())?;
        let mut batch = Batch {
            entries: Vec::with_capacity(raw.len()),
            with_contents: !self.compressed,
            ..Batch::default()
        };
        for (index, raw) in (0_u32..).zip(raw) {
            if raw == FILLER {
                batch.filler = batch.filler.saturating_add(1);
                continue;
            }
            let entry = self.entry(index, raw)?;
            batch.pages = batch
                .pages
                .saturating_add(entry.page_type.has_data().into());
            batch.entries.push(entry);
        }
        no_duplicates(&batch.entries)?;
        self.any_entry |= !batch.entries.is_empty();
        if batch.with_contents {
            self.left = batch.pages.saturating_mul(PAGE_SIZE as u64);
        }
        Ok(Item::Batch(batch))
    }

    fn entry(&self, index: u32, raw: u64) -> Result<PageEntry, LegacyError> {
        let low = u32::try_from(raw).map_err(|_| LegacyError::EntryBits { index, got: raw })?;
        let pfn = Pfn(raw & PFN_BITS);
        let [.., high] = low.to_le_bytes();
        let got = PageType::from_nibble(high >> 4);
        if !got.is_known() {
            return Err(LegacyError::PageType { index, pfn, got });
        }
        let p2m_size = self.start.p2m_size;
        if pfn.0 >= u64::from(p2m_size) {
            return Err(LegacyError::PfnBeyond {
                index,
                pfn,
                p2m_size,
            });
        }
        Ok(PageEntry {
            pfn,
            page_type: got,
        })
    }
}

/// Savers go through the pfns in ascending order, so this checks for that order first.
fn no_duplicates(entries: &[PageEntry]) -> Result<(), LegacyError> {
    if entries.is_sorted_by(|a, b| a.pfn < b.pfn) {
        return Ok(());
    }
    let mut pfns: Vec<Pfn> = entries.iter().map(|entry| entry.pfn).collect();
    pfns.sort_unstable();
    match pfns.iter().zip(pfns.iter().skip(1)).find(|(a, b)| a == b) {
        Some((pfn, _)) => Err(LegacyError::DuplicatePfn { pfn: *pfn }),
        None => Ok(()),
    }
}
