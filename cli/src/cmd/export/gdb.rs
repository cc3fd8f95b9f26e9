//! An ELF core for gdb: program headers that put each page at the guest kernel's address, and the
//! registers of each vcpu as a thread's.
//!
//! The addresses come from the page tables of one vcpu, which are walked once, in the image. A
//! frame that the image does not hold (of a device, a hole) is left out. Every page is in the file
//! once, in the order of pfns; a page at several addresses has several headers.
//!
//! ELF: `Elf64_Ehdr`, `Elf64_Phdr` of the System V ABI, gABI chapters 4 and 5; notes `NT_PRSTATUS`
//! and `NT_FPREGSET` as Linux writes them for x86-64.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_save_restore::storage::StorageCursor;

use crate::page_map::PageMap;

const PAGE: u64 = PAGE_SIZE as u64;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const SECTION_HEADER: u64 = 64;
/// `PN_XNUM`: the number of program headers is in the first section header.
const MANY: u64 = 0xffff;
/// The most pieces of the address space. An ordinary guest has thousands; malicious tables could
/// describe more than fits in memory.
const MOST_PIECES: usize = 1 << 20;
/// The most walks of one table. Guests share tables between two or three places; some have
/// thousands of aliases of one table (espfix, an address sanitizer's shadow), which add nothing
/// new.
const MOST_VISITS: u8 = 16;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// The bits of a frame address in a 64-bit entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// How a vcpu translates addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paging {
    /// No translation: addresses are physical.
    Off,
    /// Two levels of 1024 32-bit entries, from this physical address.
    Two(u64),
    /// PAE: three levels of 64-bit entries, the first of four.
    Three(u64),
    /// Four levels.
    Four(u64),
    /// Five levels.
    Five(u64),
}

impl Paging {
    /// From the control registers and `EFER` of an HVM or PVH vcpu.
    pub(super) fn of_registers(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Self {
        let bit = |word: u64, bit: u32| word >> bit & 1 == 1;
        match (bit(cr0, 31), bit(efer, 10), bit(cr4, 12), bit(cr4, 5)) {
            (false, ..) => Self::Off,
            (true, true, true, _) => Self::Five(cr3 & FRAME),
            (true, true, false, _) => Self::Four(cr3 & FRAME),
            (true, false, _, true) => Self::Three(cr3 & 0xffff_ffe0),
            (true, false, _, false) => Self::Two(cr3 & 0xffff_f000),
        }
    }
}

/// A vcpu: `vcpu_guest_context_t` of a 64-bit guest, and its address translation.
#[derive(Clone, Debug)]
pub(super) struct Vcpu {
    /// Its number. Xen does not save offline vcpus, so there may be gaps.
    pub(super) number: u32,
    /// `vcpu_guest_context_t`.
    pub(super) context: Vec<u8>,
    /// Its page tables.
    pub(super) paging: Paging,
}

/// A piece of the address space that is contiguous in the file too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    address: u64,
    pfn: u64,
    /// The number of its first page, counted from the first page in the file.
    page: u64,
    pages: u64,
}

/// Neighbouring pfns that are in the file.
#[derive(Clone, Copy, Debug)]
struct Held {
    first: u64,
    last: u64,
    page: u64,
}

/// The head of the core, up to the pages: `vcpus`, and the memory as the vcpu with number `view`
/// sees it.
///
/// # Errors
///
/// There is no such vcpu; its top-level table is not in the image; there are more than a million
/// pieces; the image cannot be read.
pub(super) fn head(
    vcpus: &[Vcpu],
    view: u32,
    map: &PageMap,
    image: &StorageCursor,
) -> Result<Vec<u8>> {
    let Some(vcpu) = vcpus.iter().find(|vcpu| vcpu.number == view) else {
        let numbers: Vec<String> = vcpus.iter().map(|v| v.number.to_string()).collect();
        bail!(
            "the image has no vcpu {view} (--vcpu): it has {}",
            numbers.join(", ")
        );
    };
    let mut space = Space::new(map, image);
    space.fill(vcpu.paging)?;
    Ok(lay_out(&notes(vcpus), &space.pieces))
}

/// An address space being built.
struct Space<'i> {
    map: &'i PageMap,
    image: &'i StorageCursor,
    held: Vec<Held>,
    visits: HashMap<(u64, u32), u8>,
    pieces: Vec<Piece>,
}

/// The format of the tables of one paging mode.
#[derive(Clone, Copy, Debug)]
struct Tables {
    /// 1024 32-bit entries in a table; otherwise 512 64-bit ones.
    narrow: bool,
    /// Bits of an address. The upper bits repeat the last of these, unless it is 32.
    bits: u32,
}

impl Tables {
    /// The lowest bit of an address that a table of `level` decodes.
    fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * if self.narrow { 10 } else { 9 }
    }

    fn canonical(self, address: u64) -> u64 {
        let upper = u64::MAX << (self.bits - 1);
        match self.bits > 32 && address & upper != 0 {
            true => address | upper,
            false => address,
        }
    }

    /// The frame of a large page of `level`, if the entry maps one.
    fn large(self, entry: u64, level: u32) -> Option<u64> {
        let may_be = level == 2 || (level == 3 && self.bits > 32);
        let frame = match self.narrow {
            // Bits 32 to 39 of the address are bits 13 to 20 of the entry.
            true => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
            false => entry & FRAME & (u64::MAX << self.shift(level)),
        };
        (may_be && entry & LARGE != 0).then_some(frame)
    }
}

impl<'i> Space<'i> {
    fn new(map: &'i PageMap, image: &'i StorageCursor) -> Self {
        let mut held: Vec<Held> = Vec::new();
        let mut page = 0;
        for run in map.runs().filter(|run| run.page_type.has_data()) {
            match held.last_mut() {
                Some(before) if before.last + 1 == run.first => before.last = run.last,
                _ => held.push(Held {
                    first: run.first,
                    last: run.last,
                    page,
                }),
            }
            page += run.pages();
        }
        Self {
            map,
            image,
            held,
            visits: HashMap::new(),
            pieces: Vec::new(),
        }
    }

    fn fill(&mut self, paging: Paging) -> Result<()> {
        let (root, level, narrow, bits) = match paging {
            Paging::Off => {
                for held in self.held.clone() {
                    self.maps(held.first * PAGE, held.first, held.last - held.first + 1)?;
                }
                return Ok(());
            }
            Paging::Two(root) => (root, 2, true, 32),
            Paging::Three(root) => (root, 3, false, 32),
            Paging::Four(root) => (root, 4, false, 48),
            Paging::Five(root) => (root, 5, false, 57),
        };
        let Some(table) = self.page(root / PAGE)? else {
            bail!(
                "pfn {:#x}, which the vcpu's cr3 names, is not in the image: take --format \
                 elf or raw, which need no page tables",
                root / PAGE
            );
        };
        let mut table = &table[usize::try_from(root % PAGE)?..];
        if matches!(paging, Paging::Three(_)) {
            // PAE's top-level table has four entries.
            table = &table[..32];
        }
        self.entries(table, level, Tables { narrow, bits }, 0)
    }

    /// Walk a table of `level` that translates from `address` on.
    fn entries(&mut self, table: &[u8], level: u32, tables: Tables, address: u64) -> Result<()> {
        let bytes = if tables.narrow { 4 } else { 8 };
        for (index, entry) in (0_u64..).zip(table.chunks_exact(bytes)) {
            let mut wide = [0; 8];
            wide[..bytes].copy_from_slice(entry);
            let entry = u64::from_le_bytes(wide);
            if entry & PRESENT == 0 {
                continue;
            }
            let shift = tables.shift(level);
            let address = tables.canonical(address | index << shift);
            if level == 1 {
                self.maps(address, (entry & FRAME) / PAGE, 1)?;
            } else if let Some(frame) = tables.large(entry, level) {
                self.maps(address, frame / PAGE, 1 << (shift - 12))?;
            } else {
                self.table((entry & FRAME) / PAGE, level - 1, tables, address)?;
            }
        }
        Ok(())
    }

    fn table(&mut self, pfn: u64, level: u32, tables: Tables, address: u64) -> Result<()> {
        let visits = self.visits.entry((pfn, level)).or_default();
        if *visits == MOST_VISITS {
            return Ok(());
        }
        *visits += 1;
        match self.page(pfn)? {
            Some(table) => self.entries(&table, level, tables, address),
            None => Ok(()),
        }
    }

    /// The last version of a page.
    fn page(&self, pfn: u64) -> Result<Option<[u8; PAGE_SIZE]>> {
        let Some((_, Some(offset))) = self.map.get(Pfn(pfn)) else {
            return Ok(None);
        };
        let mut page = [0; PAGE_SIZE];
        self.image
            .read_exact_at(&mut page, offset)
            .with_context(|| format!("a page table, pfn {pfn:#x}"))?;
        Ok(Some(page))
    }

    /// Add the mapping of `pages` pages from `pfn` on at `address`, as far as they are in the file.
    fn maps(&mut self, address: u64, pfn: u64, pages: u64) -> Result<()> {
        let end = pfn + pages;
        let from = self.held.partition_point(|held| held.last < pfn);
        for held in self.held.iter().skip(from) {
            if held.first >= end {
                break;
            }
            let first = held.first.max(pfn);
            let piece = Piece {
                address: address.wrapping_add((first - pfn) * PAGE),
                pfn: first,
                page: held.page + (first - held.first),
                pages: (held.last + 1).min(end) - first,
            };
            if let Some(before) = self.pieces.last_mut()
                && before.goes_on_with(&piece)
            {
                before.pages += piece.pages;
                continue;
            }
            if self.pieces.len() == MOST_PIECES {
                bail!(
                    "the page tables cut the guest's memory into more than {MOST_PIECES} \
                     pieces: take --format elf or raw, which need none"
                );
            }
            self.pieces.push(piece);
        }
        Ok(())
    }
}

impl Piece {
    fn goes_on_with(&self, next: &Self) -> bool {
        self.address.checked_add(self.pages * PAGE) == Some(next.address)
            && self.pfn + self.pages == next.pfn
            && self.page + self.pages == next.page
    }
}

/// Headers and notes. The pages follow, from the next page boundary on.
fn lay_out(notes: &[u8], pieces: &[Piece]) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    const ALL: u32 = 7;
    let headers = pieces.len() as u64 + 1;
    let sections = u64::from(headers >= MANY);
    let notes_at = ELF_HEADER + sections * SECTION_HEADER + headers * PROGRAM_HEADER;
    let pages_at = (notes_at + notes.len() as u64).next_multiple_of(PAGE);

    // Class 64, little endian, version 1, System V.
    let mut out = Words(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec());
    out.u16s(&[ET_CORE, EM_X86_64]);
    out.u32s(&[1]);
    // Entry; offsets of the program headers and the section header.
    out.u64s(&[
        0,
        ELF_HEADER + sections * SECTION_HEADER,
        sections * ELF_HEADER,
    ]);
    out.u32s(&[0]);
    let count = u16::try_from(headers.min(MANY)).unwrap_or(u16::MAX);
    out.u16s(&[64, 56, count, 64, u16::from(sections == 1), 0]);
    if sections == 1 {
        // All 0, except the number of program headers: sh_info.
        out.u32s(&[0, 0]);
        out.u64s(&[0, 0, 0, 0]);
        out.u32s(&[0, u32::try_from(headers).unwrap_or(u32::MAX)]);
        out.u64s(&[0, 0]);
    }
    out.u32s(&[PT_NOTE, 0]);
    out.u64s(&[notes_at, 0, 0, notes.len() as u64, notes.len() as u64, 4]);
    for piece in pieces {
        let bytes = piece.pages * PAGE;
        out.u32s(&[PT_LOAD, ALL]);
        let offset = pages_at + piece.page * PAGE;
        let physical = piece.pfn * PAGE;
        out.u64s(&[offset, piece.address, physical, bytes, bytes, PAGE]);
    }
    let mut out = out.0;
    out.extend_from_slice(notes);
    out.resize(out.len().next_multiple_of(PAGE_SIZE), 0);
    out
}

/// The registers of each vcpu, as those of a thread whose number is one more than the vcpu's.
fn notes(vcpus: &[Vcpu]) -> Vec<u8> {
    const NT_PRSTATUS: u32 = 1;
    const NT_FPREGSET: u32 = 2;
    /// Offset and size of `struct user_regs_struct` in `struct elf_prstatus`.
    const REGISTERS: usize = 112;
    const PRSTATUS: usize = 336;
    const PID: usize = 32;
    /// Offset in `vcpu_guest_context_t`, and size, of each register, in the order of
    /// `user_regs_struct`.
    const FROM: [(usize, usize); 27] = [
        (520, 8),  // r15
        (528, 8),  // r14
        (536, 8),  // r13
        (544, 8),  // r12
        (552, 8),  // rbp
        (560, 8),  // rbx
        (568, 8),  // r11
        (576, 8),  // r10
        (584, 8),  // r9
        (592, 8),  // r8
        (600, 8),  // rax
        (608, 8),  // rcx
        (616, 8),  // rdx
        (624, 8),  // rsi
        (632, 8),  // rdi
        (600, 8),  // orig_rax
        (648, 8),  // rip
        (656, 2),  // cs
        (664, 8),  // rflags
        (672, 8),  // rsp
        (680, 2),  // ss
        (5144, 8), // fs_base
        (5152, 8), // gs_base in kernel mode; for user mode see below
        (696, 2),  // ds
        (688, 2),  // es
        (704, 2),  // fs
        (712, 2),  // gs
    ];
    /// The index of gs_base in the list, and its offset for a vcpu in user mode.
    const GS_BASE: usize = 22;
    const GS_BASE_USER: usize = 5160;
    /// The size of FXSAVE's area, the first field of the context.
    const FXSAVE: usize = 512;
    let mut out = Words(Vec::new());
    for vcpu in vcpus {
        let thread = vcpu.number.saturating_add(1);
        let mut status = vec![0; PRSTATUS];
        status[PID..PID + 4].copy_from_slice(&thread.to_le_bytes());
        for (at, (from, bytes)) in (REGISTERS..).step_by(8).zip(FROM) {
            if let Some(register) = vcpu.context.get(from..from + bytes) {
                status[at..at + bytes].copy_from_slice(register);
            }
        }
        if !in_kernel(&vcpu.context)
            && let Some(base) = vcpu.context.get(GS_BASE_USER..GS_BASE_USER + 8)
        {
            let at = REGISTERS + 8 * GS_BASE;
            status[at..at + 8].copy_from_slice(base);
        }
        out.note(NT_PRSTATUS, &status);
        if let Some(area) = vcpu.context.get(..FXSAVE) {
            out.note(NT_FPREGSET, area);
        }
    }
    out.0
}

/// Whether a vcpu was in its guest's kernel. For a PV guest a flag says so (`VGCF_in_kernel`),
/// since its kernel runs in ring 3 too.
fn in_kernel(context: &[u8]) -> bool {
    const FLAGS: usize = 512;
    const IN_KERNEL: u8 = 1 << 2;
    const CS: usize = 656;
    let byte = |at: usize| context.get(at).copied().unwrap_or_default();
    byte(FLAGS) & IN_KERNEL != 0 || byte(CS) & 3 == 0
}

/// Consecutive little-endian words.
struct Words(Vec<u8>);

impl Words {
    fn u16s(&mut self, words: &[u16]) {
        self.0.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    fn u32s(&mut self, words: &[u32]) {
        self.0.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    fn u64s(&mut self, words: &[u64]) {
        self.0.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    /// A note of `CORE`. Its contents are a multiple of four bytes.
    fn note(&mut self, kind: u32, contents: &[u8]) {
        let bytes = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        self.u32s(&[5, bytes, kind]);
        self.0.extend_from_slice(b"CORE\0\0\0\0");
        self.0.extend_from_slice(contents);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;
    use crate::page_map::Run;
    use xsr_format::frame::PageType;

    /// An image of pages 0 to 7 in order, and the tables written to them: (pfn, index, entry).
    fn image(bytes: usize, entries: &[(u64, u64, u64)]) -> (StorageCursor, PageMap) {
        let mut memory = vec![0; 8 * PAGE_SIZE];
        for (pfn, index, entry) in entries {
            let at = usize::try_from(pfn * PAGE + index * bytes as u64).expect("small");
            memory[at..at + bytes].copy_from_slice(&entry.to_le_bytes()[..bytes]);
        }
        let mut file = tempfile::tempfile().expect("a scratch file");
        file.write_all(&memory).expect("room for it");
        file.rewind().expect("a file");
        let opened = xsr_save_restore::storage::file::opened(file, "image").expect("a file");
        let image = StorageCursor::new(opened).expect("a file");
        let mut map = PageMap::default();
        map.insert(Run {
            first: 0,
            last: 7,
            page_type: PageType::NOTAB,
            offset: 0,
        })
        .expect("few pages");
        (image, map)
    }

    /// (address, pfn, pages) of each piece.
    fn walked(paging: Paging, bytes: usize, entries: &[(u64, u64, u64)]) -> Vec<(u64, u64, u64)> {
        let (file, map) = image(bytes, entries);
        let mut space = Space::new(&map, &file);
        space.fill(paging).expect("tables that can be walked");
        let piece = |p: &Piece| (p.address, p.pfn, p.pages);
        space.pieces.iter().map(piece).collect()
    }

    #[test]
    fn each_paging_mode_is_walked() {
        let small = |level: u64| 0x8000_0000_0000_0000 | level << 12 | 0x67;
        // Two levels: a table of pages, and a page of 4 MiB of which the image has 32 KiB.
        let two = [
            (1, 3, 0x2067),
            (1, 1023, 0xe7),
            (2, 1, 0x5067),
            (2, 2, 0x6067),
        ];
        assert_eq!(
            walked(Paging::Two(0x1000), 4, &two),
            [(0x00c0_1000, 5, 2), (0xffc0_0000, 0, 8)]
        );
        // PAE: four entries, not at the beginning of a page.
        let three = [
            (1, 7, small(2)),
            (1, 8, small(3)),
            (2, 0, small(3)),
            (3, 4, small(7)),
        ];
        assert_eq!(
            walked(Paging::Three(0x1020), 8, &three),
            [(0xc000_4000, 7, 1)]
        );
        // Four levels: the upper half, a page of 1 GiB, one of 2 MiB.
        let four = [
            (1, 511, small(2)),
            (2, 510, 0x80 | small(0)),
            (2, 511, small(3)),
            (3, 0, 0x80 | small(0)),
        ];
        assert_eq!(
            walked(Paging::Four(0x1000), 8, &four),
            [(0xffff_ffff_8000_0000, 0, 8), (0xffff_ffff_c000_0000, 0, 8)]
        );
        let five = [
            (1, 256, small(2)),
            (2, 0, small(3)),
            (3, 0, small(4)),
            (4, 0, small(5)),
        ];
        let five = [&five[..], &[(5, 0, small(6))]].concat();
        assert_eq!(
            walked(Paging::Five(0x1000), 8, &five),
            [(0xff00_0000_0000_0000, 6, 1)]
        );
        assert_eq!(walked(Paging::Off, 8, &[]), [(0, 0, 8)]);
    }

    #[test]
    fn tables_that_name_themselves_end() {
        let entries: Vec<_> = (0..512).map(|index| (1, index, 0x1067)).collect();
        let pieces = walked(Paging::Four(0x1000), 8, &entries);
        // 16 walks of a lowest-level table, of 512 entries each.
        assert_eq!(pieces.len(), 16 * 512);
    }

    #[test]
    fn the_paging_mode_is_that_of_the_registers() {
        let of = Paging::of_registers;
        assert_eq!(of(0x11, 0x1000, 0x20, 0), Paging::Off);
        assert_eq!(of(0x8000_0011, 0x1fff, 0, 0), Paging::Two(0x1000));
        assert_eq!(of(0x8000_0011, 0x1fff, 0x20, 0), Paging::Three(0x1fe0));
        assert_eq!(of(0x8000_0011, 0x1fff, 0x20, 0x500), Paging::Four(0x1000));
        assert_eq!(of(0x8000_0011, 0x1fff, 0x1020, 0x500), Paging::Five(0x1000));
    }

    #[test]
    fn the_base_of_gs_is_that_of_the_mode() {
        let base = |flags: u8, cs: u8| {
            let mut context = vec![0; 5168];
            (context[512], context[656]) = (flags, cs);
            (context[5152], context[5160]) = (7, 9);
            let vcpu = Vcpu {
                number: 3,
                context,
                paging: Paging::Off,
            };
            let notes = notes(&[vcpu]);
            // After the note's header and name: pr_pid, and pr_reg.
            assert_eq!(notes[20 + 32], 4);
            notes[20 + 112 + 22 * 8]
        };
        // HVM, in ring 0 and 3; PV, in kernel mode and not.
        assert_eq!([base(0, 0x10), base(0, 0x33)], [7, 9]);
        assert_eq!([base(4, 0x33), base(0, 0x33)], [7, 9]);
    }

    #[test]
    fn more_pieces_than_a_header_counts_are_counted_in_a_section() {
        let piece = Piece {
            address: 0,
            pfn: 0,
            page: 0,
            pages: 1,
        };
        let head = lay_out(&[0; 4], &vec![piece; 0xffff]);
        assert_eq!(head[0x38..0x3a], [0xff, 0xff]);
        assert_eq!(head[0x28..0x30], 64_u64.to_le_bytes());
        assert_eq!(head[64 + 44..64 + 48], 0x1_0000_u32.to_le_bytes());
        assert_eq!(head[128..132], 4_u32.to_le_bytes());
        assert_eq!(head.len() % PAGE_SIZE, 0);
    }
}
