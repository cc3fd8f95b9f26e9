//! Layout of the fields that a save or restore of a PV guest must translate.
//!
//! Offsets come from `xsr_format::fields`, looked up by name at compile time.

use std::ops::Range;

use xsr_format::fields::{FieldSpec, Layout, Shape};
use xsr_format::record::pv::PvInfo;

/// A field of a structure whose layout depends on the guest's width: offset and
/// bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    bits32: (usize, usize),
    bits64: (usize, usize),
}

/// The field called `name`; an unknown name does not compile.
const fn find(fields: &'static [FieldSpec], name: &str) -> FieldSpec {
    let mut i = 0;
    while i < fields.len() {
        if same(fields[i].name.as_bytes(), name.as_bytes()) {
            return fields[i];
        }
        i += 1;
    }
    panic!("no field of that name");
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// Offset and size of a number, or of the first element of an array.
const fn number(field: FieldSpec) -> (usize, usize) {
    match field.shape {
        Shape::Number { width, .. } => (field.offset, width),
        Shape::Array { stride, .. } => (field.offset, stride),
        _ => panic!("neither a number nor an array"),
    }
}

/// The bytes an array takes.
const fn array(layout: &Layout, name: &str) -> Range<usize> {
    let field = find(layout.fields, name);
    match field.shape {
        Shape::Array { count, stride, .. } => field.offset..field.offset + count * stride,
        _ => panic!("not an array"),
    }
}

impl Field {
    const fn named(layout32: &Layout, layout64: &Layout, name: &str) -> Self {
        Self {
            bits32: number(find(layout32.fields, name)),
            bits64: number(find(layout64.fields, name)),
        }
    }

    /// Element `index` of an array that begins at this field.
    const fn element(self, index: usize) -> Self {
        let ((at32, bytes32), (at64, bytes64)) = (self.bits32, self.bits64);
        Self {
            bits32: (at32 + bytes32 * index, bytes32),
            bits64: (at64 + bytes64 * index, bytes64),
        }
    }

    const fn place(self, info: PvInfo) -> (usize, usize) {
        match info {
            PvInfo::Bits32 => self.bits32,
            PvInfo::Bits64 => self.bits64,
        }
    }

    /// The field's value in `bytes`.
    ///
    /// # Panics
    ///
    /// When `bytes` is shorter than the structure; callers check its length.
    pub(crate) fn get(self, info: PvInfo, bytes: &[u8]) -> u64 {
        let (at, len) = self.place(info);
        let mut value = [0; 8];
        value[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(value)
    }

    /// Sets the field in `bytes`, to the low part of `value` if it is wider than the field.
    ///
    /// # Panics
    ///
    /// As [`Field::get`].
    pub(crate) fn set(self, info: PvInfo, bytes: &mut [u8], value: u64) {
        let (at, len) = self.place(info);
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

/// `vcpu_guest_context`.
pub(crate) mod vcpu {
    use xsr_format::fields::pv::{VCPU_CONTEXT_32, VCPU_CONTEXT_64};

    use super::{Field, find, number};

    const fn field(name: &str) -> Field {
        Field::named(&VCPU_CONTEXT_32, &VCPU_CONTEXT_64, name)
    }

    pub(crate) const FLAGS: Field = field("flags");
    /// The suspend record: start_info's frame, in vcpu 0.
    pub(crate) const EDX: Field = Field {
        bits32: number(find(VCPU_CONTEXT_32.fields, "user_regs.edx")),
        bits64: number(find(VCPU_CONTEXT_64.fields, "user_regs.rdx")),
    };
    pub(crate) const GDT_ENTS: Field = field("gdt_ents");
    const GDT_FRAMES: Field = field("gdt_frames");
    const CTRLREG: Field = field("ctrlreg");

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
    use xsr_format::fields::pv::{START_INFO_32, START_INFO_64};

    use super::Field;

    const fn field(name: &str) -> Field {
        Field::named(&START_INFO_32, &START_INFO_64, name)
    }

    pub(crate) const NR_PAGES: Field = field("nr_pages");
    pub(crate) const SHARED_INFO: Field = field("shared_info");
    pub(crate) const FLAGS: Field = field("flags");
    pub(crate) const STORE_MFN: Field = field("store_mfn");
    pub(crate) const STORE_EVTCHN: Field = field("store_evtchn");
    pub(crate) const CONSOLE_MFN: Field = field("console.mfn");
    pub(crate) const CONSOLE_EVTCHN: Field = field("console.evtchn");
}

/// `shared_info`.
pub(crate) mod shared_info {
    use xsr_format::fields::pv::{SHARED_INFO_32, SHARED_INFO_64};

    use super::{Field, Layout, PvInfo, Range, Shape, array, find, number};

    const fn layout(info: PvInfo) -> &'static Layout {
        match info {
            PvInfo::Bits32 => &SHARED_INFO_32,
            PvInfo::Bits64 => &SHARED_INFO_64,
        }
    }

    const fn field(name: &str) -> Field {
        Field::named(&SHARED_INFO_32, &SHARED_INFO_64, name)
    }

    /// `evtchn_pending_sel` of the first `vcpu_info` in `layout`.
    const fn pending_sel(layout: &Layout) -> (usize, usize) {
        match find(layout.fields, "vcpu_info").shape {
            Shape::Array {
                element: Shape::Struct(fields),
                ..
            } => number(find(fields, "evtchn_pending_sel")),
            _ => panic!("vcpu_info is an array of structures"),
        }
    }

    pub(crate) const MAX_PFN: Field = field("arch.max_pfn");
    pub(crate) const FRAME_LIST_LIST: Field = field("arch.pfn_to_mfn_frame_list_list");
    pub(crate) const P2M_CR3: Field = field("arch.p2m_cr3");
    pub(crate) const P2M_VADDR: Field = field("arch.p2m_vaddr");

    pub(crate) const P2M_GENERATION: Field = field("arch.p2m_generation");

    /// `evtchn_pending_sel`, in one `vcpu_info`.
    pub(crate) const PENDING_SEL: Field = Field {
        bits32: pending_sel(&SHARED_INFO_32),
        bits64: pending_sel(&SHARED_INFO_64),
    };

    /// Bytes of one `vcpu_info`, of either width.
    pub(crate) const VCPU_INFO_BYTES: usize = 64;

    /// `vcpu_info[32]`.
    pub(crate) const fn vcpu_info(info: PvInfo) -> Range<usize> {
        array(layout(info), "vcpu_info")
    }

    /// `evtchn_pending`.
    pub(crate) const fn evtchn_pending(info: PvInfo) -> Range<usize> {
        array(layout(info), "evtchn_pending")
    }

    /// `evtchn_mask`.
    pub(crate) const fn evtchn_mask(info: PvInfo) -> Range<usize> {
        array(layout(info), "evtchn_mask")
    }

    /// `arch`: from its first field to the end of the structure.
    pub(crate) const fn arch(info: PvInfo) -> Range<usize> {
        MAX_PFN.place(info).0..layout(info).bytes
    }
}

/// The frame in a cr3: folded in 32-bit guests, whose cr3 cannot hold it plainly.
pub(crate) const fn cr3_to_frame(info: PvInfo, cr3: u64) -> u64 {
    match info {
        PvInfo::Bits64 => cr3 >> 12,
        PvInfo::Bits32 => (cr3 >> 12 | cr3 << 20) & 0xffff_ffff,
    }
}

/// The cr3 for a frame; `None` if a 32-bit guest cannot hold it.
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
    fn offsets_are_those_of_xens_headers() {
        for (field, bits32, bits64) in [
            (vcpu::EDX, (524, 4), (616, 8)),
            (vcpu::gdt_frame(15), (2700, 4), (4952, 8)),
            (vcpu::ctrlreg(3), (2728, 4), (5008, 8)),
            (start_info::CONSOLE_EVTCHN, (56, 4), (80, 4)),
            (shared_info::PENDING_SEL, (4, 4), (8, 8)),
        ] {
            assert_eq!((field.bits32, field.bits64), (bits32, bits64));
        }
        assert_eq!(shared_info::arch(PvInfo::Bits32), 2316..2344);
        assert_eq!(shared_info::arch(PvInfo::Bits64), 3088..3136);
        assert_eq!(shared_info::evtchn_mask(PvInfo::Bits32), 2176..2304);
        assert_eq!(shared_info::vcpu_info(PvInfo::Bits64), 0..2048);
    }

    #[test]
    fn a_field_takes_its_own_bytes_only() {
        let mut bytes = [0xff_u8; 0xaf0];
        vcpu::EDX.set(PvInfo::Bits32, &mut bytes, 0x1_2345_6789);
        assert_eq!(vcpu::EDX.get(PvInfo::Bits32, &bytes), 0x2345_6789);
        assert_eq!(bytes[523], 0xff);
        assert_eq!(bytes[528], 0xff);
    }
}
