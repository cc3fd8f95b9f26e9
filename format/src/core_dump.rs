//! ELF core dumps of a guest's memory, in the layout of `xl dump-core`, which Xen-aware tools
//! (crash, volatility3) open.
//!
//! | section | holds |
//! |---|---|
//! | `.shstrtab` | names of the sections |
//! | `.note.Xen` | notes: none, header, version of Xen, version of the format |
//! | `.xen_prstatus` | `vcpu_guest_context_t` of each vcpu |
//! | `.xen_shared_info` | the shared info page |
//! | `.xen_p2m` (PV) | u64 pfn, u64 gmfn of each page |
//! | `.xen_pfn` (HVM, translated) | u64 pfn of each page |
//! | `.xen_pages` | the pages, in that order |
//!
//! An image does not say where a PV guest's pages were in the machine, and its page tables hold
//! pfns. So the gmfn of a page is its pfn, and the page tables and the list agree.
//!
//! Specification: Xen's `docs/misc/dump-core-format.txt`, format version 0.1. C
//! implementation: `xc_domain_dumpcore_via_callback` in `xg_core.c`.

use std::io::{self, Write};

use crate::frame::PAGE_SIZE;

/// Bytes of the 64-bit ELF header, and of each section header.
const ELF_HEADER: u16 = 64;
const SECTION_HEADER: u16 = 64;
/// The pages begin at a multiple of this.
const ALIGNMENT: u64 = PAGE_SIZE as u64;

const MAGIC_PV: u64 = 0xf00f_ebed;
const MAGIC_HVM: u64 = 0xf00f_ebee;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const SHT_PROGBITS: u32 = 1;
const SHT_STRTAB: u32 = 3;
const SHT_NOTE: u32 = 7;
/// `XEN_ELFNOTE_DUMPCORE_NONE`; the other note types follow it.
const NOTE_NONE: u32 = 0x0200_0000;
/// Bytes of `xen_dumpcore_elfnote_xen_version_desc` on a 64-bit Xen.
const VERSION_NOTE: usize = 1280;

/// Everything in a core dump except the pages.
#[derive(Clone, Debug, Default)]
pub struct CoreDump {
    /// HVM or PVH, not PV.
    pub hvm: bool,
    /// List only pfns ([`CoreDump::entry`]), even for a PV guest: volatility3 2.28 reads no other
    /// list.
    pub translated: bool,
    /// A 32-bit PV guest.
    pub bits_32: bool,
    /// `vcpu_guest_context_t` of each vcpu, in the guest's width.
    pub vcpus: Vec<Vec<u8>>,
    /// The shared info page, where there is one.
    pub shared_info: Vec<u8>,
    /// Version of the Xen that saved the guest: major and minor.
    pub xen: (u32, u32),
    /// Number of pages that follow.
    pub pages: u64,
}

impl CoreDump {
    /// Writes the bytes up to the list of pages. The caller then writes an entry for each page
    /// ([`CoreDump::entry`]), [`CoreDump::padding`], and the pages.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn write_head(&self, sink: &mut impl Write) -> io::Result<()> {
        let names = [
            "",
            ".shstrtab",
            ".note.Xen",
            ".xen_prstatus",
            ".xen_shared_info",
            self.list_name(),
            ".xen_pages",
        ];
        let mut strings = Vec::new();
        let mut name_offsets = Vec::new();
        for name in names {
            name_offsets.push(u32::try_from(strings.len()).map_err(io::Error::other)?);
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
        }
        let notes = self.notes();
        let per_vcpu = self.vcpus.first().map_or(0, Vec::len) as u64;
        let mut offset = (names.len() as u64)
            .saturating_mul(SECTION_HEADER.into())
            .saturating_add(ELF_HEADER.into());
        let mut out = self.elf_header(u16::try_from(names.len()).map_err(io::Error::other)?);
        let mut place = |bytes: u64| {
            let at = offset;
            offset = offset.saturating_add(bytes);
            (at, bytes)
        };
        let sections = [
            (0, (0, 0), 0),
            (SHT_STRTAB, place(strings.len() as u64), 0),
            (SHT_NOTE, place(notes.len() as u64), 0),
            (SHT_PROGBITS, place(self.vcpu_bytes()), per_vcpu),
            (
                SHT_PROGBITS,
                place(self.shared_info.len() as u64),
                PAGE_SIZE as u64,
            ),
            (SHT_PROGBITS, place(self.list_bytes()), self.entry_bytes()),
            (
                SHT_PROGBITS,
                (
                    self.pages_offset(),
                    self.pages.saturating_mul(PAGE_SIZE as u64),
                ),
                PAGE_SIZE as u64,
            ),
        ];
        for ((kind, (at, bytes), entry), name) in sections.into_iter().zip(name_offsets) {
            out.extend_from_slice(&name.to_le_bytes());
            out.extend_from_slice(&kind.to_le_bytes());
            // Flags, address; offset, size; link and info; alignment, size of an entry.
            for word in [0, 0, at, bytes, 0, u64::from(kind != 0), entry] {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
        sink.write_all(&out)?;
        sink.write_all(&strings)?;
        sink.write_all(&notes)?;
        for vcpu in &self.vcpus {
            sink.write_all(vcpu)?;
        }
        sink.write_all(&self.shared_info)
    }

    /// Bytes in the state of all vcpus.
    fn vcpu_bytes(&self) -> u64 {
        let lengths = self.vcpus.iter().map(|vcpu| vcpu.len() as u64);
        lengths.fold(0, u64::saturating_add)
    }

    /// A page's entry in the list.
    pub fn entry(&self, pfn: u64) -> Vec<u8> {
        let entry = pfn.to_le_bytes();
        match self.pfns_alone() {
            true => entry.to_vec(),
            false => [entry, entry].concat(),
        }
    }

    /// Number of zero bytes between the list and the pages.
    pub fn padding(&self) -> u64 {
        self.pages_offset().saturating_sub(self.list_end())
    }

    fn pfns_alone(&self) -> bool {
        self.hvm || self.translated
    }

    fn list_name(&self) -> &'static str {
        match self.pfns_alone() {
            true => ".xen_pfn",
            false => ".xen_p2m",
        }
    }

    fn entry_bytes(&self) -> u64 {
        match self.pfns_alone() {
            true => 8,
            false => 16,
        }
    }

    fn list_bytes(&self) -> u64 {
        self.pages.saturating_mul(self.entry_bytes())
    }

    fn list_end(&self) -> u64 {
        const SECTIONS: usize = 7;
        let strings = "\0.shstrtab\0.note.Xen\0.xen_prstatus\0.xen_shared_info\0.xen_pages\0".len();
        let fixed = usize::from(ELF_HEADER)
            .saturating_add(SECTIONS.saturating_mul(SECTION_HEADER.into()))
            .saturating_add(strings)
            .saturating_add(self.list_name().len())
            .saturating_add(1)
            .saturating_add(self.notes().len())
            .saturating_add(self.shared_info.len());
        (fixed as u64)
            .saturating_add(self.vcpu_bytes())
            .saturating_add(self.list_bytes())
    }

    /// Offset of the pages.
    pub fn pages_offset(&self) -> u64 {
        self.list_end().next_multiple_of(ALIGNMENT)
    }

    fn elf_header(&self, sections: u16) -> Vec<u8> {
        // 64-bit class, little endian, version 1, System V.
        let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        let machine = match self.bits_32 && !self.hvm {
            true => EM_386,
            false => EM_X86_64,
        };
        const ET_CORE: u16 = 4;
        for half in [ET_CORE, machine] {
            out.extend_from_slice(&half.to_le_bytes());
        }
        out.extend_from_slice(&1_u32.to_le_bytes());
        // Entry, program headers (none), section headers; flags.
        for word in [0_u64, 0, ELF_HEADER.into()] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&0_u32.to_le_bytes());
        // Sizes and counts: this header, program headers, section headers; then the index of the
        // section that holds the names.
        let halves = [ELF_HEADER, 0, 0, SECTION_HEADER, sections, 1];
        for half in halves {
            out.extend_from_slice(&half.to_le_bytes());
        }
        out
    }

    fn notes(&self) -> Vec<u8> {
        let mut version = [0; VERSION_NOTE / 8];
        // The image does not say how that Xen was built.
        let [major, minor, .., page_size] = &mut version;
        (*major, *minor) = (self.xen.0.into(), self.xen.1.into());
        *page_size = PAGE_SIZE as u64;
        let magic = match self.hvm {
            true => MAGIC_HVM,
            false => MAGIC_PV,
        };
        let header = [magic, self.vcpus.len() as u64, self.pages, PAGE_SIZE as u64];
        // Major in the upper half, minor in the lower: 0.1.
        let format = [1];
        let mut out = Vec::new();
        for (kind, note) in (NOTE_NONE..).zip([&[][..], &header, &version, &format]) {
            out.extend_from_slice(&4_u32.to_le_bytes());
            let bytes: u32 = note.iter().map(|_| 8).sum();
            out.extend_from_slice(&bytes.to_le_bytes());
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(b"Xen\0");
            note.iter()
                .for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
        }
        out
    }
}

/// `vcpu_guest_context_t` of a 64-bit guest, from the CPU record of an HVM context.
pub fn vcpu_context_of_hvm(cpu: &[u8]) -> Vec<u8> {
    /// Bytes of the structure.
    const CONTEXT: usize = 0x1430;
    /// Offset of a field in the CPU record, its length, and its offset in the context.
    const FIELDS: &[(usize, usize, usize)] = &[
        (0, 512, 0),     // fpu_ctxt
        (632, 8, 520),   // r15
        (624, 8, 528),   // r14
        (616, 8, 536),   // r13
        (608, 8, 544),   // r12
        (544, 8, 552),   // rbp
        (520, 8, 560),   // rbx
        (600, 8, 568),   // r11
        (592, 8, 576),   // r10
        (584, 8, 584),   // r9
        (576, 8, 592),   // r8
        (512, 8, 600),   // rax
        (528, 8, 608),   // rcx
        (536, 8, 616),   // rdx
        (552, 8, 624),   // rsi
        (560, 8, 632),   // rdi
        (640, 8, 648),   // rip
        (736, 2, 656),   // cs
        (648, 8, 664),   // rflags
        (568, 8, 672),   // rsp
        (756, 2, 680),   // ss
        (744, 2, 688),   // es
        (740, 2, 696),   // ds
        (748, 2, 704),   // fs
        (752, 2, 712),   // gs
        (656, 8, 4984),  // cr0
        (664, 8, 5000),  // cr2
        (672, 8, 5008),  // cr3
        (680, 8, 5016),  // cr4
        (688, 32, 5048), // dr0 to dr3
        (720, 16, 5096), // dr6, dr7
        (832, 8, 5144),  // fs_base
    ];
    let mut context = vec![0; CONTEXT];
    for (from, bytes, to) in FIELDS {
        let from = cpu.get(*from..from.saturating_add(*bytes));
        let to = context.get_mut(*to..to.saturating_add(*bytes));
        if let (Some(from), Some(to)) = (from, to) {
            to.copy_from_slice(from);
        }
    }
    // The GS bases, assigned by whether the kernel or a user process was running, as
    // `arch_get_info_guest` does.
    const GS_BASE: (usize, usize) = (840, 848);
    const SHADOW_GS: (usize, usize) = (944, 952);
    let (kernel, user) = match cpu.get(736).is_none_or(|cs| cs & 3 == 0) {
        true => (GS_BASE, SHADOW_GS),
        false => (SHADOW_GS, GS_BASE),
    };
    for ((from, end), to) in [(kernel, 5152_usize), (user, 5160)] {
        let to = context.get_mut(to..to.saturating_add(8));
        if let (Some(from), Some(to)) = (cpu.get(from..end), to) {
            to.copy_from_slice(from);
        }
    }
    context
}
