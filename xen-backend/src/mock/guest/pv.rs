//! Construction of a PV guest like a Linux kernel's: all its memory mapped at a high address, a few
//! processes with their own tables, its p2m published.
//!
//! | pfns | hold |
//! |---|---|
//! | 16–18 | start_info, xenstore ring, console ring |
//! | 19 and up | a GDT page per vcpu; the p2m and its tree; page tables |
//! | all others | the pattern |

mod vcpu;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE};

use super::tables::TableSet;
use super::{GuestSpec, P2mStyle, fill, populate};
use crate::error::BackendError;
use crate::mock::domain::MockDomain;
use crate::mock::layout::{SharedInfoLayout, StartInfoLayout, VcpuLayout, write_word};
use crate::mock::pagetable::{ACCESSED, DIRTY, NX, PRESENT, RW, USER, XEN_L2_SLOTS};
use crate::mock::pv::MAX_PIN_BATCH;
use crate::{DomId, DomainControl, PvGuest, RingGrant, TscInfo, X86Platform};

const START_INFO: u64 = 16;
const STORE: u64 = 17;
const CONSOLE: u64 = 18;
const GDT: u64 = 19;

/// The address at which the kernel maps all memory: 64-bit, and 32-bit (as much as fits below Xen's
/// part).
const LINEAR_64: u64 = 0xffff_8880_0000_0000;
const LINEAR_32: u64 = 0xc000_0000;
const XEN_START_32: u64 = 0xf580_0000;
/// The address at which a 64-bit kernel maps its p2m.
const P2M_64: u64 = 0xffff_c900_0000_0000;

/// Pages of each process, and the address at which they are mapped.
const PROCESS_PAGES: u64 = 24;
const PROCESS_BASE: u64 = 0x40_0000;

const KERNEL_DATA: u64 = RW | ACCESSED | DIRTY | NX;

/// The page-table roots of a process.
#[derive(Clone, Copy, Debug)]
struct Process {
    kernel: u64,
    user: Option<u64>,
}

/// A guest that is being built.
struct Build<'a> {
    domain: &'a MockDomain,
    spec: &'a GuestSpec,
    /// Bytes in the guest's word.
    width: usize,
    /// The mfn of each pfn, or `None` if it is ballooned out.
    p2m: Vec<Option<u64>>,
    /// First pfn of the published p2m, and its pages.
    p2m_first: u64,
    p2m_pages: u64,
    tables: TableSet,
    processes: Vec<Process>,
    /// Tables to pin: level and pfn.
    pins: Vec<(u8, u64)>,
}

/// Build the guest in an empty domain, and unpause it.
pub(super) fn build(domain: &MockDomain, spec: &GuestSpec) -> Result<(), BackendError> {
    domain.set_guest_width(spec.width)?;
    let width = usize::from(spec.width);
    let pages = spec.pages();
    let hole = pages / 4 * 3;
    let hole = hole..hole + spec.ballooned_pages;
    let mut frames: Vec<Gfn> = (0..pages).filter(|p| !hole.contains(p)).map(Gfn).collect();
    populate(domain, 0, &mut frames)?;
    let mut mfns = frames.iter().map(|mfn| mfn.0);
    let p2m: Vec<Option<u64>> = (0..pages)
        .map(|pfn| {
            if hole.contains(&pfn) {
                None
            } else {
                mfns.next()
            }
        })
        .collect();
    let per_page = (PAGE_SIZE / width) as u64;
    let p2m_first = GDT + u64::from(spec.vcpus);
    let p2m_pages = pages.div_ceil(per_page);
    // After the p2m pages: the middle and the top levels of the tree.
    let tree_pages = p2m_pages.div_ceil(per_page) + 1;
    let mut build = Build {
        domain,
        spec,
        width,
        p2m,
        p2m_first,
        p2m_pages,
        tables: TableSet::new(p2m_first + p2m_pages + tree_pages, spec.width),
        processes: Vec::new(),
        pins: Vec::new(),
    };
    build.make_tables();
    if build.tables.end() > hole.start {
        // Impossible with 4 MiB or more; the check guards against later changes.
        return Err(domain.fail("build", Errno::ENOMEM));
    }
    let data: Vec<(u64, Mfn)> = (0..START_INFO)
        .chain(build.tables.end()..pages)
        .filter_map(|pfn| Some((pfn, Mfn(build.mfn(pfn)?))))
        .collect();
    fill(domain, spec.seed, &data)?;
    build.write_tables()?;
    build.write_p2m()?;
    build.write_special()?;
    build.pin()?;
    (0..spec.vcpus - spec.offline_vcpus).try_for_each(|vcpu| build.set_vcpu(vcpu))?;
    domain.set_tsc_info(&TscInfo::default())?;
    let ring = |pfn| RingGrant {
        gfn: build.mfn(pfn).map(Gfn),
        backend: DomId(0),
    };
    domain.seed_grants(ring(CONSOLE), ring(STORE))?;
    domain.unpause()
}

impl Build<'_> {
    fn mfn(&self, pfn: u64) -> Option<u64> {
        *self.p2m.get(usize::try_from(pfn).ok()?)?
    }

    fn write(&self, pfn: u64, page: &[u8]) -> Result<(), BackendError> {
        let mfn = self.mfn(pfn).ok_or(Errno::EINVAL);
        let mfn = mfn.map_err(|errno| self.domain.fail("build", errno))?;
        self.domain.write_own("build", Mfn(mfn), page)
    }

    fn style(&self) -> P2mStyle {
        match (self.spec.p2m, self.width) {
            (Some(style), _) => style,
            (None, 4) => P2mStyle::Tree,
            (None, _) => P2mStyle::Linear,
        }
    }

    fn is_pae(&self) -> bool {
        self.width == 4
    }

    fn linear(&self) -> u64 {
        if self.is_pae() { LINEAR_32 } else { LINEAR_64 }
    }

    /// The address at which the kernel maps its p2m.
    fn p2m_vaddr(&self) -> u64 {
        match self.is_pae() {
            true => self.linear() + self.p2m_first * PAGE_SIZE as u64,
            false => P2M_64,
        }
    }

    fn make_tables(&mut self) {
        let top = self.tables.top_level();
        let kernel = self.tables.add(top);
        let mapped = match self.is_pae() {
            true => (XEN_START_32 - LINEAR_32) / PAGE_SIZE as u64,
            false => u64::MAX,
        };
        for pfn in 0..self.spec.pages().min(mapped) {
            if self.mfn(pfn).is_some() {
                let address = self.linear() + pfn * PAGE_SIZE as u64;
                self.tables.map(kernel, address, pfn, KERNEL_DATA);
            }
        }
        if !self.is_pae() {
            for n in 0..self.p2m_pages {
                let address = P2M_64 + n * PAGE_SIZE as u64;
                self.tables
                    .map(kernel, address, self.p2m_first + n, KERNEL_DATA);
            }
        }
        self.processes.push(Process { kernel, user: None });
        self.pins.push((top, kernel));
        for n in 0..self.spec.processes {
            let process = self.make_process(kernel, n);
            self.processes.push(process);
            self.pins.push((top, process.kernel));
            self.pins.extend(process.user.map(|user| (top, user)));
        }
        self.make_loose_tables();
    }

    /// A process that shares the kernel's tables.
    fn make_process(&mut self, init: u64, number: u64) -> Process {
        let top = self.tables.top_level();
        let kernel = self.tables.add(top);
        let first = self.spec.pages() / 2 + number * PROCESS_PAGES;
        for n in 0..PROCESS_PAGES {
            let flags = match n % 3 {
                // Text, read-only data, data.
                0 => USER | ACCESSED,
                1 => USER | ACCESSED | NX,
                _ => USER | ACCESSED | DIRTY | NX | RW,
            };
            let address = PROCESS_BASE + n * PAGE_SIZE as u64;
            if self.mfn(first + n).is_some() {
                self.tables.map(kernel, address, first + n, flags);
            }
        }
        if self.is_pae() {
            // Each address space has its own level-2 table, which receives Xen's entries, over
            // common level-1 tables.
            let own = self.tables.add(2);
            if let Some(common) = self.tables.target(init, 3) {
                self.tables.share(common, own, 0..XEN_L2_SLOTS.start);
            }
            self.tables.link(kernel, 3, own);
            return Process { kernel, user: None };
        }
        self.tables.share(init, kernel, 272..512);
        let user = self.tables.add(4);
        self.tables.share(kernel, user, 0..256);
        Process {
            kernel,
            user: Some(user),
        }
    }

    /// Pinned tables of lower levels without a root, which some kernels keep.
    fn make_loose_tables(&mut self) {
        let mut lower = None;
        for level in 1..self.tables.top_level() {
            let table = self.tables.add(level);
            match lower {
                Some(lower) => self.tables.link(table, 5, lower),
                None => self
                    .tables
                    .set(table, 7, STORE, PRESENT | RW | ACCESSED | NX),
            }
            self.pins.push((level, table));
            lower = Some(table);
        }
    }

    fn is_gdt(&self, pfn: u64) -> bool {
        (GDT..GDT + u64::from(self.spec.vcpus)).contains(&pfn)
    }

    fn write_tables(&self) -> Result<(), BackendError> {
        let read_only = |pfn| self.tables.contains(pfn) || self.is_gdt(pfn);
        for (pfn, table) in self.tables.iter() {
            self.write(pfn, &table.write_out(|pfn| self.mfn(pfn), read_only))?;
        }
        Ok(())
    }

    /// One page of words of the guest's width; missing words are all ones.
    fn list(&self, words: impl Iterator<Item = Option<u64>>) -> Vec<u8> {
        let mut page = vec![0xff; PAGE_SIZE];
        for (n, word) in words.enumerate() {
            write_word(
                &mut page,
                n * self.width,
                self.width,
                word.unwrap_or(u64::MAX),
            );
        }
        page
    }

    fn write_p2m(&self) -> Result<(), BackendError> {
        let per_page = PAGE_SIZE / self.width;
        for (n, entries) in (self.p2m_first..).zip(self.p2m.chunks(per_page)) {
            self.write(n, &self.list(entries.iter().copied()))?;
        }
        let leaves: Vec<u64> = (self.p2m_first..self.p2m_first + self.p2m_pages).collect();
        let middle = self.p2m_first + self.p2m_pages;
        let middles = leaves.len().div_ceil(per_page) as u64;
        for (n, leaves) in (middle..).zip(leaves.chunks(per_page)) {
            self.write(n, &self.list(leaves.iter().map(|pfn| self.mfn(*pfn))))?;
        }
        let top = self.list((middle..middle + middles).map(|pfn| self.mfn(pfn)));
        self.write(self.tree_top(), &top)
    }

    /// The pfn of the top page of the tree.
    fn tree_top(&self) -> u64 {
        let per_page = (PAGE_SIZE / self.width) as u64;
        self.p2m_first + self.p2m_pages + self.p2m_pages.div_ceil(per_page)
    }

    fn write_special(&self) -> Result<(), BackendError> {
        let shared_info = self.domain.info()?.shared_info_frame;
        let start_info = self.start_info(shared_info)?;
        self.write(START_INFO, &start_info)?;
        let mut console = [0; PAGE_SIZE];
        console[..20].copy_from_slice(b"A guest made by xsr\n");
        self.write(CONSOLE, &console)?;
        for vcpu in 0..u64::from(self.spec.vcpus) {
            let mut gdt = [0; PAGE_SIZE];
            // Null, then flat code and data for kernel and user.
            for (n, descriptor) in [
                0_u64,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x00cf_fb00_0000_ffff,
                0x00cf_f300_0000_ffff,
                0x00af_fb00_0000_ffff,
            ]
            .into_iter()
            .enumerate()
            {
                write_word(&mut gdt, n * 8, 8, descriptor);
            }
            self.write(GDT + vcpu, &gdt)?;
        }
        let page = self.shared_info();
        self.domain.write_own("build", Mfn(shared_info.0), &page)
    }

    fn start_info(&self, shared_info: Gfn) -> Result<[u8; PAGE_SIZE], BackendError> {
        let layout = StartInfoLayout::of(self.spec.width);
        let mut page = [0; PAGE_SIZE];
        let magic: &[u8] = if self.is_pae() {
            b"xen-3.0-x86_32p"
        } else {
            b"xen-3.0-x86_64"
        };
        page[..magic.len()].copy_from_slice(magic);
        let command_line = b"root=/dev/xvda console=hvc0";
        page[layout.cmd_line..][..command_line.len()].copy_from_slice(command_line);
        let mut word = |offset, value| write_word(&mut page, offset, layout.width, value);
        word(layout.nr_pages, self.spec.pages());
        word(layout.shared_info, shared_info.0 << 12);
        word(layout.store_mfn, self.mfn(STORE).unwrap_or(0));
        word(layout.console_mfn, self.mfn(CONSOLE).unwrap_or(0));
        word(
            layout.pt_base,
            self.linear() + self.processes[0].kernel * PAGE_SIZE as u64,
        );
        word(layout.nr_pt_frames, self.tables.iter().count() as u64);
        word(layout.mfn_list, self.p2m_vaddr());
        word(layout.first_p2m_pfn, self.p2m_first);
        word(layout.nr_p2m_frames, self.p2m_pages);
        for offset in [layout.store_evtchn, layout.console_evtchn] {
            let port = self.domain.alloc_unbound_port(DomId(0))?;
            write_word(&mut page, offset, 4, u64::from(port));
        }
        Ok(page)
    }

    fn shared_info(&self) -> [u8; PAGE_SIZE] {
        let layout = SharedInfoLayout::of(self.spec.width);
        let vcpu = VcpuLayout::of(self.spec.width);
        let mut page = [0; PAGE_SIZE];
        page[layout.evtchn_mask..][..layout.evtchn_mask_bytes].fill(0xff);
        // vcpu_info: events masked; version and rate of the clock. The page has room for 32 (Xen's
        // XEN_LEGACY_MAX_VCPUS); further vcpus register their own page.
        for n in 0..self.spec.vcpus.min(32) as usize {
            page[n * 64 + 1] = 1;
            write_word(&mut page, n * 64 + 32, 4, 2);
            write_word(&mut page, n * 64 + 56, 4, 0xc53e_2d08);
        }
        write_word(&mut page, layout.wallclock, 4, 2);
        write_word(&mut page, layout.wallclock + 4, 4, 0x6900_0000);
        let mut word = |offset, value| write_word(&mut page, offset, layout.width, value);
        word(layout.max_pfn, self.spec.pages());
        match self.style() {
            P2mStyle::Tree => word(
                layout.frame_list_list,
                self.mfn(self.tree_top()).unwrap_or(0),
            ),
            P2mStyle::Linear => {
                let root = self.mfn(self.processes[0].kernel).unwrap_or(0);
                word(layout.frame_list_list, u64::MAX);
                word(layout.p2m_cr3, vcpu.mfn_to_cr3(root));
                word(layout.p2m_vaddr, self.p2m_vaddr());
                word(layout.p2m_generation, 4);
            }
        }
        page
    }

    fn pin(&self) -> Result<(), BackendError> {
        let pins: Vec<(u8, Mfn)> = self
            .pins
            .iter()
            .filter_map(|(level, pfn)| Some((*level, Mfn(self.mfn(*pfn)?))))
            .collect();
        // One hypercall's worth at a time.
        pins.chunks(MAX_PIN_BATCH)
            .try_for_each(|batch| self.domain.pin_tables(batch))
    }
}
