//! Offsets of the fields of Xen's guest structures, for both guest widths: `vcpu_guest_context`,
//! `shared_info` and `start_info`.
//!
//! C: `xen/include/public/arch-x86/xen.h`, `xen-x86_{32,64}.h`, `xen/include/public/xen.h`.

/// `flags` of a vcpu context: the FPU registers are valid.
pub(super) const VGCF_I387_VALID: u64 = 1 << 0;
/// `flags` of a vcpu context: in kernel mode.
pub(super) const VGCF_IN_KERNEL: u64 = 1 << 2;
/// `flags` of a vcpu context: the vcpu is online.
pub(super) const VGCF_ONLINE: u64 = 1 << 5;

/// GDT entries a guest can have; those above are Xen's.
pub(super) const MAX_GDT_ENTRIES: u64 = 14 * 512;
/// Descriptors in a page.
pub(super) const DESCRIPTORS_PER_PAGE: u64 = 512;

/// Read a word of `width` bytes (4 or 8), little endian, at `offset`.
pub(super) fn read_word(bytes: &[u8], offset: usize, width: usize) -> u64 {
    let mut word = [0; 8];
    word[..width].copy_from_slice(&bytes[offset..offset + width]);
    u64::from_le_bytes(word)
}

/// Write a word of `width` bytes (4 or 8), little endian, at `offset`; higher bytes are dropped.
pub(super) fn write_word(bytes: &mut [u8], offset: usize, width: usize, value: u64) {
    bytes[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Offsets in `vcpu_guest_context`. All fields are words of the guest's width unless noted.
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuLayout {
    /// Bytes in a word.
    pub(super) width: usize,
    /// Bytes in the structure.
    pub(super) size: usize,
    pub(super) flags: usize,
    pub(super) ax: usize,
    pub(super) dx: usize,
    pub(super) ip: usize,
    /// u16 (64-bit) or low half of a u32.
    pub(super) cs: usize,
    pub(super) eflags: usize,
    pub(super) sp: usize,
    pub(super) ss: usize,
    /// 256 entries of `8 + width` (64-bit) or 8 bytes, whose address is the last word.
    pub(super) trap_ctxt: usize,
    pub(super) trap_size: usize,
    pub(super) ldt_base: usize,
    pub(super) ldt_ents: usize,
    /// Sixteen.
    pub(super) gdt_frames: usize,
    pub(super) gdt_ents: usize,
    pub(super) kernel_ss: usize,
    pub(super) kernel_sp: usize,
    /// Eight.
    pub(super) ctrlreg: usize,
    /// Eight.
    pub(super) debugreg: usize,
    pub(super) vm_assist: usize,
    /// Other code and data addresses that must be canonical.
    pub(super) addresses: &'static [usize],
}

const VCPU_64: VcpuLayout = VcpuLayout {
    width: 8,
    size: 0x1430,
    flags: 0x200,
    ax: 0x258,
    dx: 0x268,
    ip: 0x288,
    cs: 0x290,
    eflags: 0x298,
    sp: 0x2a0,
    ss: 0x2a8,
    trap_ctxt: 0x2d0,
    trap_size: 16,
    ldt_base: 0x12d0,
    ldt_ents: 0x12d8,
    gdt_frames: 0x12e0,
    gdt_ents: 0x1360,
    kernel_ss: 0x1368,
    kernel_sp: 0x1370,
    ctrlreg: 0x1378,
    debugreg: 0x13b8,
    vm_assist: 0x1410,
    // Event, failsafe and syscall callbacks; fs, kernel gs and user gs bases.
    addresses: &[0x13f8, 0x1400, 0x1408, 0x1418, 0x1420, 0x1428],
};

const VCPU_32: VcpuLayout = VcpuLayout {
    width: 4,
    size: 0xaf0,
    flags: 0x200,
    ax: 0x21c,
    dx: 0x20c,
    ip: 0x224,
    cs: 0x228,
    eflags: 0x22c,
    sp: 0x230,
    ss: 0x234,
    trap_ctxt: 0x248,
    trap_size: 8,
    ldt_base: 0xa48,
    ldt_ents: 0xa4c,
    gdt_frames: 0xa50,
    gdt_ents: 0xa90,
    kernel_ss: 0xa94,
    kernel_sp: 0xa98,
    ctrlreg: 0xa9c,
    debugreg: 0xabc,
    vm_assist: 0xaec,
    addresses: &[],
};

impl VcpuLayout {
    /// The layout of a guest of `width` bytes.
    pub(super) const fn of(width: u8) -> &'static Self {
        match width {
            4 => &VCPU_32,
            _ => &VCPU_64,
        }
    }

    /// The word at `offset` of `context`.
    pub(super) fn get(&self, context: &[u8], offset: usize) -> u64 {
        read_word(context, offset, self.width)
    }

    /// Set the word at `offset` of `context`.
    pub(super) fn set(&self, context: &mut [u8], offset: usize, value: u64) {
        write_word(context, offset, self.width, value);
    }

    /// Control register `n` (0–7).
    pub(super) const fn cr(&self, n: usize) -> usize {
        self.ctrlreg + n * self.width
    }

    /// Page `n` of the GDT (0–15).
    pub(super) const fn gdt_frame(&self, n: usize) -> usize {
        self.gdt_frames + n * self.width
    }

    /// The frame in a cr3 value.
    pub(super) const fn cr3_to_mfn(&self, cr3: u64) -> u64 {
        match self.width {
            4 => ((cr3 >> 12) | (cr3 << 20)) & 0xffff_ffff,
            _ => cr3 >> 12,
        }
    }

    /// The cr3 value for a frame.
    pub(super) const fn mfn_to_cr3(&self, mfn: u64) -> u64 {
        match self.width {
            4 => ((mfn << 12) | (mfn >> 20)) & 0xffff_ffff,
            _ => mfn << 12,
        }
    }
}

/// Offsets in `shared_info`; words of the guest's width unless noted.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedInfoLayout {
    /// Bytes in a word.
    pub(super) width: usize,
    pub(super) evtchn_mask: usize,
    pub(super) evtchn_mask_bytes: usize,
    /// u32 version, seconds and nanoseconds.
    pub(super) wallclock: usize,
    pub(super) max_pfn: usize,
    pub(super) frame_list_list: usize,
    pub(super) p2m_cr3: usize,
    pub(super) p2m_vaddr: usize,
    pub(super) p2m_generation: usize,
}

impl SharedInfoLayout {
    /// The layout of a guest of `width` bytes.
    pub(super) const fn of(width: u8) -> Self {
        match width {
            4 => Self {
                width: 4,
                evtchn_mask: 0x880,
                evtchn_mask_bytes: 0x80,
                wallclock: 0x900,
                max_pfn: 0x90c,
                frame_list_list: 0x910,
                p2m_cr3: 0x918,
                p2m_vaddr: 0x91c,
                p2m_generation: 0x920,
            },
            _ => Self {
                width: 8,
                evtchn_mask: 0xa00,
                evtchn_mask_bytes: 0x200,
                wallclock: 0xc00,
                max_pfn: 0xc10,
                frame_list_list: 0xc18,
                p2m_cr3: 0xc28,
                p2m_vaddr: 0xc30,
                p2m_generation: 0xc38,
            },
        }
    }
}

/// Offsets in `start_info`; words of the guest's width unless noted.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartInfoLayout {
    /// Bytes in a word.
    pub(super) width: usize,
    pub(super) nr_pages: usize,
    pub(super) shared_info: usize,
    pub(super) store_mfn: usize,
    /// u32.
    pub(super) store_evtchn: usize,
    pub(super) console_mfn: usize,
    /// u32.
    pub(super) console_evtchn: usize,
    pub(super) pt_base: usize,
    pub(super) nr_pt_frames: usize,
    pub(super) mfn_list: usize,
    pub(super) cmd_line: usize,
    pub(super) first_p2m_pfn: usize,
    pub(super) nr_p2m_frames: usize,
}

impl StartInfoLayout {
    /// The layout of a guest of `width` bytes.
    pub(super) const fn of(width: u8) -> Self {
        match width {
            4 => Self {
                width: 4,
                nr_pages: 0x20,
                shared_info: 0x24,
                store_mfn: 0x2c,
                store_evtchn: 0x30,
                console_mfn: 0x34,
                console_evtchn: 0x38,
                pt_base: 0x3c,
                nr_pt_frames: 0x40,
                mfn_list: 0x44,
                cmd_line: 0x50,
                first_p2m_pfn: 0x450,
                nr_p2m_frames: 0x454,
            },
            _ => Self {
                width: 8,
                nr_pages: 0x20,
                shared_info: 0x28,
                store_mfn: 0x38,
                store_evtchn: 0x40,
                console_mfn: 0x48,
                console_evtchn: 0x50,
                pt_base: 0x58,
                nr_pt_frames: 0x60,
                mfn_list: 0x68,
                cmd_line: 0x80,
                first_p2m_pfn: 0x480,
                nr_p2m_frames: 0x488,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fields_end_the_structures() {
        for width in [4, 8] {
            let vcpu = VcpuLayout::of(width);
            assert_eq!(vcpu.trap_ctxt + 256 * vcpu.trap_size, vcpu.ldt_base);
            assert_eq!(vcpu.gdt_frame(16), vcpu.gdt_ents);
            assert_eq!(vcpu.cr(8), vcpu.debugreg);
        }
        assert_eq!(VCPU_32.vm_assist + 4, VCPU_32.size);
        assert_eq!(VCPU_64.addresses[5] + 8, VCPU_64.size);
    }

    #[test]
    fn cr3_folds_for_32_bit_guests_only() {
        let (narrow, wide) = (VcpuLayout::of(4), VcpuLayout::of(8));
        assert_eq!(narrow.mfn_to_cr3(0x0012_3456), 0x2345_6001);
        for mfn in [1, 0xf_ffff, 0x10_0000, 0xffff_ffff] {
            assert_eq!(narrow.cr3_to_mfn(narrow.mfn_to_cr3(mfn)), mfn);
            assert_eq!(wide.cr3_to_mfn(wide.mfn_to_cr3(mfn)), mfn);
        }
    }
}
