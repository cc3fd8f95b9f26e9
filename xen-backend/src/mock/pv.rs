//! Calls for PV guests of the mock machine: width, m2p, vcpu contexts, pins.
//!
//! C implementation: `arch_set_info_guest` in `xen/arch/x86/domain.c`,
//! `pv_set_gdt` in `xen/arch/x86/pv/descriptor-tables.c`, `xen/arch/x86/domctl.c`.

use crate::Errno;
use xsr_format::frame::{Mfn, PAGE_SIZE};

use super::domain::MockDomain;
use super::frames::FrameUse;
use super::layout::{
    DESCRIPTORS_PER_PAGE, MAX_GDT_ENTRIES, VGCF_IN_KERNEL, VGCF_ONLINE, VcpuLayout, read_word,
};
use super::machine::COMPAT_M2P;
use super::memory;
use super::pagetable::Tables;
use super::state::{Roots, State};
use crate::error::BackendError;
use crate::{GuestKind, M2p, PvGuest, VcpuBlob};

/// The most page tables pinned in one call.
pub(super) const MAX_PIN_BATCH: usize = 1024;

/// Bytes of `xen_domctl_ext_vcpucontext` as the mock (and Xen) gives it.
const EXTENDED_SIZE: usize = 64;
/// The least that Xen accepts: everything before the machine-check part.
const EXTENDED_MIN: u64 = 32;
/// The most that fits into a domctl.
const EXTENDED_MAX: u64 = 128;

/// Bytes before the XSAVE area: xcr0, and its accumulated earlier values.
const XSAVE_HEADER: usize = 16;
/// x87, SSE, AVX, MPX, AVX-512, PKRU.
const XFEATURES: u64 = 0x2ff;
/// Offset and size of each component from the third on, in the standard format.
const XSTATE_COMPONENTS: [(u32, usize, usize); 7] = [
    (2, 576, 256),
    (3, 960, 64),
    (4, 1024, 64),
    (5, 1088, 64),
    (6, 1152, 512),
    (7, 1664, 1024),
    (9, 2688, 8),
];

/// MSRs that Xen keeps for a PV vcpu: SPEC_CTRL, MISC_FEATURES_ENABLES, TSC_AUX,
/// VIRT_SPEC_CTRL, DR address masks.
const VCPU_MSRS: [u64; 8] = [
    0x48,
    0x140,
    0xc000_0103,
    0xc001_011f,
    0xc001_1019,
    0xc001_101a,
    0xc001_101b,
    0xc001_1027,
];

/// Bits of vm_assist that Xen knows.
const fn vm_assist_mask(width: u8) -> u64 {
    match width {
        4 => 0x3f,
        _ => 1 << 32 | 0x3f,
    }
}

/// The name of a blob.
pub(super) fn blob_name(vcpu: usize, blob: VcpuBlob) -> String {
    let what = match blob {
        VcpuBlob::Basic => "basic",
        VcpuBlob::Extended => "extended",
        VcpuBlob::Xsave => "xsave",
        VcpuBlob::Msrs => "msrs",
    };
    format!("vcpu{vcpu}-{what}")
}

const fn is_canonical(address: u64) -> bool {
    matches!(address >> 47, 0 | 0x1_ffff)
}

fn check(good: bool) -> Result<(), Errno> {
    if good { Ok(()) } else { Err(Errno::EINVAL) }
}

/// Xen's checks of a context before it looks at frames.
fn check_basic(layout: &VcpuLayout, context: &[u8], vcpu: usize) -> Result<(), Errno> {
    check(context.len() == layout.size)?;
    let word = |offset| layout.get(context, offset);
    if layout.width == 8 {
        let registers = [layout.ip, layout.sp, layout.kernel_sp];
        let traps = (0..256).map(|n| layout.trap_ctxt + n * layout.trap_size + 8);
        let mut addresses = registers
            .iter()
            .chain(layout.addresses)
            .copied()
            .chain(traps);
        check(addresses.all(|offset| is_canonical(word(offset))))?;
        check(word(layout.ldt_ents) == 0 || is_canonical(word(layout.ldt_base)))?;
        let debug_status_and_control = [6, 7].map(|n| word(layout.debugreg + n * 8));
        check(
            debug_status_and_control
                .iter()
                .all(|v| *v <= u64::from(u32::MAX)),
        )?;
    } else {
        const EFLAGS_VM: u64 = 1 << 17;
        check(word(layout.eflags) & EFLAGS_VM == 0)?;
    }
    check(word(layout.ldt_base) % PAGE_SIZE as u64 == 0 && word(layout.ldt_ents) <= 8192)?;
    check(
        vcpu != 0
            || word(layout.vm_assist) & !vm_assist_mask(if layout.width == 4 { 4 } else { 8 }) == 0,
    )?;
    check(word(layout.gdt_ents) <= MAX_GDT_ENTRIES)
}

fn check_extended(state: &[u8]) -> Result<(), Errno> {
    check((EXTENDED_MIN..=EXTENDED_MAX).contains(&(state.len() as u64)))?;
    let size = read_word(state, 4, 4);
    check(size >= EXTENDED_MIN && size <= state.len() as u64)?;
    check(is_canonical(read_word(state, 8, 8)) && is_canonical(read_word(state, 16, 8)))
}

/// Bytes of an XSAVE area with these features.
fn xsave_area(features: u64) -> usize {
    if features == 0 {
        return 0;
    }
    XSTATE_COMPONENTS
        .iter()
        .filter(|(bit, ..)| features >> bit & 1 == 1)
        .map(|(_, offset, size)| offset + size)
        .fold(512 + 64, usize::max)
}

fn check_xsave(state: &[u8]) -> Result<(), Errno> {
    const X87: u64 = 1;
    check(state.len() >= XSAVE_HEADER)?;
    let (xcr0, ever) = (read_word(state, 0, 8), read_word(state, 8, 8));
    if ever == 0 {
        return check(xcr0 == 0 && state.len() == XSAVE_HEADER);
    }
    check(ever & !XFEATURES == 0 && xcr0 & !ever == 0 && xcr0 & X87 == X87)?;
    check(state.len() == XSAVE_HEADER + xsave_area(ever))?;
    let (held, compacted) = (
        read_word(state, XSAVE_HEADER + 512, 8),
        read_word(state, XSAVE_HEADER + 520, 8),
    );
    check(held & !ever == 0 && compacted == 0)
}

fn check_msrs(state: &[u8]) -> Result<(), Errno> {
    check(state.len().is_multiple_of(16))?;
    check(
        state
            .chunks_exact(16)
            .all(|msr| VCPU_MSRS.contains(&read_word(msr, 0, 4)) && read_word(msr, 4, 4) == 0),
    )
}

/// The root for user mode in a context.
fn user_root(width: u8, context: &[u8]) -> Option<u64> {
    let layout = VcpuLayout::of(width);
    let cr1 = layout.get(context, layout.cr(1));
    (width == 8 && cr1 != 0).then_some(cr1 >> 12)
}

/// The frames that a context refers to: GDT frames and page-table roots, which are tables of level
/// `top`.
fn references(width: u8, top: u8, context: &[u8]) -> Vec<(Mfn, FrameUse)> {
    let layout = VcpuLayout::of(width);
    let word = |offset| layout.get(context, offset);
    let gdt = (0..word(layout.gdt_ents).div_ceil(DESCRIPTORS_PER_PAGE))
        .filter_map(|n| usize::try_from(n).ok())
        .map(|n| (Mfn(word(layout.gdt_frame(n))), FrameUse::Descriptors));
    let kernel = layout.cr3_to_mfn(word(layout.cr(3)));
    let roots = [Some(kernel), user_root(width, context)];
    let roots = roots.into_iter().flatten();
    gdt.chain(roots.map(|mfn| (Mfn(mfn), FrameUse::Table(top))))
        .collect()
}

impl MockDomain {
    fn pv_or(&self, op: &'static str, otherwise: Errno) -> Result<(), BackendError> {
        match self.dom.kind {
            GuestKind::Pv => Ok(()),
            _ => Err(self.fail(op, otherwise)),
        }
    }

    fn pv(&self, op: &'static str) -> Result<(), BackendError> {
        self.pv_or(op, Errno::EINVAL)
    }

    /// Take the references of a vcpu's first context: GDT frames and page-table roots. On failure
    /// none is held.
    fn take_roots(&self, width: u8, context: &[u8]) -> Result<Roots, Errno> {
        let layout = VcpuLayout::of(width);
        let tables = Tables::new(&self.machine, &self.dom, width);
        let word = |offset| layout.get(context, offset);
        let flags = word(layout.flags);
        let user = user_root(width, context);
        check(width == 4 || flags & VGCF_IN_KERNEL != 0 || user.is_some())?;
        let kernel = layout.cr3_to_mfn(word(layout.cr(3)));
        let mut held = Vec::new();
        for (mfn, used_as) in references(width, tables.top_level(), context) {
            if let Err(errno) = tables.get(mfn, used_as) {
                held.into_iter().try_for_each(|mfn| tables.put(mfn))?;
                return Err(errno);
            }
            held.push(mfn);
        }
        Ok(Roots { kernel, user })
    }

    /// Drop the references that [`MockDomain::take_roots`] took for this stored context.
    pub(super) fn drop_references(&self, width: u8, context: &[u8]) -> Result<(), Errno> {
        let tables = Tables::new(&self.machine, &self.dom, width);
        references(width, tables.top_level(), context)
            .into_iter()
            .try_for_each(|(mfn, _)| tables.put(mfn))
    }

    fn set_basic(&self, state: &mut State, vcpu: usize, context: &[u8]) -> Result<(), Errno> {
        let width = state.record.width;
        let layout = VcpuLayout::of(width);
        check_basic(layout, context, vcpu)?;
        let name = blob_name(vcpu, VcpuBlob::Basic);
        let roots = match (state.record.vcpus[vcpu].roots, state.blobs.get(&name)) {
            // After the first context, only the guest itself may change its tables and GDT.
            (Some(roots), Some(old)) => {
                let fixed = layout.gdt_frames..layout.kernel_ss;
                let fixed_ldt = layout.ldt_base..layout.gdt_frames;
                let word = |offset| layout.get(context, offset);
                let same = old[fixed.clone()] == context[fixed]
                    && old[fixed_ldt.clone()] == context[fixed_ldt]
                    && roots.kernel == layout.cr3_to_mfn(word(layout.cr(3)))
                    && roots.user == user_root(width, context);
                if !same {
                    return Err(Errno::EOPNOTSUPP);
                }
                roots
            }
            _ => self.take_roots(width, context)?,
        };
        let mut kept = context.to_vec();
        // Xen returns the roots without the low bits that they may have had when set.
        layout.set(&mut kept, layout.cr(3), layout.mfn_to_cr3(roots.kernel));
        if width == 8 {
            layout.set(&mut kept, layout.cr(1), roots.user.unwrap_or(0) << 12);
        }
        let online = layout.get(context, layout.flags) & VGCF_ONLINE != 0;
        let vcpu = &mut state.record.vcpus[vcpu];
        vcpu.roots = Some(roots);
        vcpu.online = online;
        self.put_blob(state, &name, kept)
    }
}

fn vcpu_index(state: &State, vcpu: u32) -> Result<usize, Errno> {
    usize::try_from(vcpu)
        .ok()
        .filter(|vcpu| *vcpu < state.record.vcpus.len())
        .ok_or(Errno::EINVAL)
}

impl PvGuest for MockDomain {
    fn guest_width(&self) -> Result<u8, BackendError> {
        const OP: &str = "get_address_size";
        self.pv_or(OP, Errno::EOPNOTSUPP)?;
        self.look(OP, |state| Ok(state.record.width))
    }

    fn set_guest_width(&self, width: u8) -> Result<(), BackendError> {
        const OP: &str = "set_address_size";
        self.pv_or(OP, Errno::EOPNOTSUPP)?;
        self.change(OP, |state| {
            match (state.record.width, width) {
                (old, new) if old == new => Ok(()),
                (_, 4) if self.machine.tot_pages(self.dom.domid) > 0 => Err(Errno::EACCES),
                (_, 4) => {
                    state.record.width = 4;
                    Ok(())
                }
                // The width cannot be changed back either.
                _ => Err(Errno::EINVAL),
            }
        })
    }

    fn m2p(&self) -> Result<M2p, BackendError> {
        const OP: &str = "machphys_mfn_list";
        self.pv(OP)?;
        self.look(OP, |_| {
            let frames = self.machine.frames.len();
            let pages = (frames * size_of::<u64>() as u64).div_ceil(PAGE_SIZE as u64);
            let pages = usize::try_from(pages).map_err(|_| Errno::ENOMEM)?;
            let table = memory::map_file(&self.machine.m2p_file, pages)?;
            let table = table.counted_by(&self.machine.mapped);
            Ok(M2p::new(table, Mfn(frames - 1), COMPAT_M2P))
        })
    }

    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError> {
        const OP: &str = "getvcpucontext";
        self.pv(OP)?;
        self.look(OP, |state| {
            let vcpu_number = vcpu;
            let vcpu = vcpu_index(state, vcpu)?;
            match (state.blobs.get(&blob_name(vcpu, blob)), blob) {
                (Some(state), _) => Ok(state.clone()),
                (None, VcpuBlob::Basic) => Err(Errno::ENODATA),
                (None, VcpuBlob::Extended) => {
                    let mut fresh = vec![0; EXTENDED_SIZE];
                    fresh[..4].copy_from_slice(&vcpu_number.to_le_bytes());
                    fresh[4..8].copy_from_slice(&64_u32.to_le_bytes());
                    Ok(fresh)
                }
                (None, VcpuBlob::Xsave) => Ok(vec![0; XSAVE_HEADER]),
                (None, VcpuBlob::Msrs) => Ok(Vec::new()),
            }
        })
    }

    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError> {
        const OP: &str = "setvcpucontext";
        self.pv(OP)?;
        let bytes = state;
        self.change(OP, |state| {
            let vcpu = vcpu_index(state, vcpu)?;
            match blob {
                VcpuBlob::Basic => return self.set_basic(state, vcpu, bytes),
                VcpuBlob::Extended => check_extended(bytes)?,
                VcpuBlob::Xsave => check_xsave(bytes)?,
                VcpuBlob::Msrs => check_msrs(bytes)?,
            }
            self.put_blob(state, &blob_name(vcpu, blob), bytes.to_vec())
        })
    }

    fn pin_tables(&self, pins: &[(u8, Mfn)]) -> Result<(), BackendError> {
        const OP: &str = "mmuext_op";
        self.pv(OP)?;
        self.look(OP, |state| {
            if pins.len() > MAX_PIN_BATCH {
                return Err(Errno::E2BIG);
            }
            let tables = Tables::new(&self.machine, &self.dom, state.record.width);
            pins.iter()
                .try_for_each(|(level, mfn)| tables.pin(*level, *mfn))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xsave_areas_have_the_sizes_real_machines_have() {
        // 848 bytes with AVX and 2720 - 24 with PKRU: as in images of Xen 4.17.
        assert_eq!(XSAVE_HEADER + xsave_area(0x7), 848);
        assert_eq!(xsave_area(0x207), 2720 - 24);
        assert_eq!(xsave_area(0), 0);
    }

    #[test]
    fn an_xsave_area_must_fit_the_features_it_claims() {
        let mut area = vec![0; 848];
        area[0] = 7;
        area[8] = 7;
        assert_eq!(check_xsave(&area), Ok(()));
        assert_eq!(check_xsave(&area[..840]), Err(Errno::EINVAL));
        area[8] = 3;
        assert_eq!(check_xsave(&area), Err(Errno::EINVAL));
        assert_eq!(check_xsave(&[0; 16]), Ok(()));
        assert_eq!(check_xsave(&[0; 15]), Err(Errno::EINVAL));
    }
}
