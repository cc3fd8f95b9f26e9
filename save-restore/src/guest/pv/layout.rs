//! Where the fields are that a save or restore of a PV guest must translate.
//!
//! Offsets as in `xen/include/public/{xen,vcpu}.h` and `arch-x86/xen-x86_{32,64}.h`.

use xsr_format::record::pv::PvInfo;

/// A field of a structure whose layout depends on the guest's width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    /// Offset and octets for 32-bit guests.
    bits32: (usize, usize),
    /// Offset and octets for 64-bit guests.
    bits64: (usize, usize),
}

impl Field {
    /// A field as wide as the guest's word.
    const fn word(at32: usize, at64: usize) -> Self {
        Self {
            bits32: (at32, 4),
            bits64: (at64, 8),
        }
    }

    /// A field of 32 bits in both.
    const fn u32(at32: usize, at64: usize) -> Self {
        Self {
            bits32: (at32, 4),
            bits64: (at64, 4),
        }
    }

    /// Element `index` of an array of guest words that begins at this field.
    const fn element(self, index: usize) -> Self {
        Self::word(self.bits32.0 + 4 * index, self.bits64.0 + 8 * index)
    }

    const fn place(self, info: PvInfo) -> (usize, usize) {
        match info {
            PvInfo::Bits32 => self.bits32,
            PvInfo::Bits64 => self.bits64,
        }
    }

    /// The field's value in `octets`.
    ///
    /// # Panics
    ///
    /// When `octets` is shorter than the structure; callers check its length.
    pub(crate) fn get(self, info: PvInfo, octets: &[u8]) -> u64 {
        let (at, len) = self.place(info);
        let mut value = [0; 8];
        value[..len].copy_from_slice(&octets[at..at + len]);
        u64::from_le_bytes(value)
    }

    /// Set the field in `octets`; of a value that is wider the low part counts.
    ///
    /// # Panics
    ///
    /// As [`Field::get`].
    pub(crate) fn set(self, info: PvInfo, octets: &mut [u8], value: u64) {
        let (at, len) = self.place(info);
        octets[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

/// `vcpu_guest_context`.
pub(crate) mod vcpu {
    use super::Field;

    pub(crate) const FLAGS: Field = Field::word(512, 512);
    /// The suspend record: start_info's frame, in vcpu 0.
    pub(crate) const EDX: Field = Field::word(524, 616);
    pub(crate) const GDT_ENTS: Field = Field::word(2704, 4960);
    const GDT_FRAMES: Field = Field::word(2640, 4832);
    const CTRLREG: Field = Field::word(2716, 4984);

    /// `VGCF_online`.
    pub(crate) const ONLINE: u64 = 1 << 5;
    /// Entries of a GDT that are the guest's (`FIRST_RESERVED_GDT_ENTRY`).
    pub(crate) const MAX_GDT_ENTS: u64 = 14 * 512;

    /// GDT frame `index`, 0–15.
    pub(crate) const fn gdt_frame(index: usize) -> Field {
        GDT_FRAMES.element(index)
    }

    /// Control register `index`, 0–7.
    pub(crate) const fn ctrlreg(index: usize) -> Field {
        CTRLREG.element(index)
    }
}

/// `start_info`.
pub(crate) mod start_info {
    use super::Field;

    pub(crate) const NR_PAGES: Field = Field::word(32, 32);
    pub(crate) const SHARED_INFO: Field = Field::word(36, 40);
    pub(crate) const FLAGS: Field = Field::u32(40, 48);
    pub(crate) const STORE_MFN: Field = Field::word(44, 56);
    pub(crate) const STORE_EVTCHN: Field = Field::u32(48, 64);
    pub(crate) const CONSOLE_MFN: Field = Field::word(52, 72);
    pub(crate) const CONSOLE_EVTCHN: Field = Field::u32(56, 80);
}

/// `shared_info`.
pub(crate) mod shared_info {
    use std::ops::Range;

    use super::{Field, PvInfo};

    /// `vcpu_info[32]`.
    pub(crate) const VCPU_INFO: Range<usize> = 0..2048;
    pub(crate) const VCPU_INFO_OCTETS: usize = 64;
    /// `arch.max_pfn`.
    pub(crate) const MAX_PFN: Field = Field::word(2316, 3088);
    /// `arch.pfn_to_mfn_frame_list_list`.
    pub(crate) const FRAME_LIST_LIST: Field = Field::word(2320, 3096);
    /// `arch.p2m_cr3`.
    pub(crate) const P2M_CR3: Field = Field::word(2328, 3112);
    /// `arch.p2m_vaddr`.
    pub(crate) const P2M_VADDR: Field = Field::word(2332, 3120);

    /// `evtchn_pending_sel` of one `vcpu_info`.
    pub(crate) const PENDING_SEL: Field = Field::word(4, 8);

    /// `evtchn_pending`.
    pub(crate) const fn evtchn_pending(info: PvInfo) -> Range<usize> {
        match info {
            PvInfo::Bits32 => 2048..2176,
            PvInfo::Bits64 => 2048..2560,
        }
    }

    /// `evtchn_mask`.
    pub(crate) const fn evtchn_mask(info: PvInfo) -> Range<usize> {
        match info {
            PvInfo::Bits32 => 2176..2304,
            PvInfo::Bits64 => 2560..3072,
        }
    }

    /// `arch`.
    pub(crate) const fn arch(info: PvInfo) -> Range<usize> {
        match info {
            PvInfo::Bits32 => 2316..2344,
            PvInfo::Bits64 => 3088..3136,
        }
    }
}

/// The frame in a cr3: folded in 32-bit guests, whose cr3 cannot hold it plainly.
pub(crate) const fn cr3_to_frame(info: PvInfo, cr3: u64) -> u64 {
    match info {
        PvInfo::Bits64 => cr3 >> 12,
        PvInfo::Bits32 => (cr3 >> 12 | cr3 << 20) & 0xffff_ffff,
    }
}

/// The cr3 for a frame; `None` where a 32-bit guest cannot hold it.
pub(crate) const fn frame_to_cr3(info: PvInfo, frame: u64) -> Option<u64> {
    match info {
        PvInfo::Bits64 => Some(frame << 12),
        PvInfo::Bits32 if frame >> 32 != 0 => None,
        PvInfo::Bits32 => Some((frame << 12 | frame >> 20) & 0xffff_ffff),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cr3_folds_and_unfolds_for_32_bit_guests() {
        for frame in [0, 1, 0xfffff, 0x12_3456, 0xffff_ffff] {
            let cr3 = frame_to_cr3(PvInfo::Bits32, frame).unwrap();
            assert!(cr3 >> 32 == 0);
            assert_eq!(cr3_to_frame(PvInfo::Bits32, cr3), frame);
        }
        assert_eq!(frame_to_cr3(PvInfo::Bits32, 0x12_3456), Some(0x2345_6001));
        assert_eq!(frame_to_cr3(PvInfo::Bits32, 1 << 32), None);
        assert_eq!(frame_to_cr3(PvInfo::Bits64, 1 << 32), Some(1 << 44));
    }

    #[test]
    fn a_field_takes_its_own_octets_only() {
        let mut octets = [0xff_u8; 0xaf0];
        vcpu::EDX.set(PvInfo::Bits32, &mut octets, 0x1_2345_6789);
        assert_eq!(vcpu::EDX.get(PvInfo::Bits32, &octets), 0x2345_6789);
        assert_eq!(octets[523], 0xff);
        assert_eq!(octets[528], 0xff);
    }
}
