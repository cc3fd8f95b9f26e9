//! Calls for PV guests: width, m2p, vcpu state, pinned page tables.
//!
//! C implementation: `tools/libs/guest/{xg_sr_common_x86_pv,xg_private}.c`,
//! `tools/libs/ctrl/{xc_domain,xc_private}.c`.

use std::sync::atomic::Ordering;

use crate::Errno;
use xsr_format::frame::{Gfn, Mfn};
use zerocopy::{FromZeros, IntoBytes};

use super::calls::Calls;
use super::control::{CONTEXT_32, CONTEXT_64};
use super::memory;
use super::{DOMID_XEN, XenDomain, sys};
use crate::error::BackendError;
use crate::pages::Access;
use crate::privcmd::Call;
use crate::privcmd::call::MMUEXT_OP;
use crate::{M2p, PvGuest, VcpuBlob};

/// The most page tables pinned in one call.
const MAX_PIN_BATCH: usize = 1024;

/// Frames in a 2 MiB chunk of the m2p; Xen names a chunk by its first frame.
const CHUNK_PAGES: u64 = 512;
/// Entries of the m2p in such a chunk.
const CHUNK_ENTRIES: u64 = CHUNK_PAGES * 512;

/// Bytes of `xen_domctl_ext_vcpucontext`, and the most that there is room for.
const EXTENDED: usize = 64;
const EXTENDED_MAX: usize = 128;
/// The range that holds the vcpu's number.
const EXTENDED_VCPU: std::ops::Range<usize> = 0..4;

/// Bytes of an MSR of a vcpu.
const VCPU_MSR: usize = size_of::<sys::xen_domctl_vcpu_msr>();

impl XenDomain {
    fn list_of_m2p(&self, cmd: u32, chunks: u32) -> Result<Vec<u64>, Errno> {
        let count = usize::try_from(chunks).map_err(|_| Errno::EINVAL)?;
        let mut list = self.calls().raw.buffer(count * 8)?;
        let mut ask = sys::xen_machphys_mfn_list::new_zeroed();
        ask.max_extents = chunks;
        let number = sys::__HYPERVISOR_memory_op;
        let named = &mut [&mut list];
        let (_, answer) = self.calls().with_struct_naming(number, cmd, &ask, named)?;
        let found = usize::try_from(answer.nr_extents.min(chunks)).map_err(|_| Errno::EINVAL)?;
        let bytes = Calls::contents(&list, found * 8);
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    fn map_m2p(&self) -> Result<M2p, Errno> {
        let ask = Call::plain(sys::__HYPERVISOR_memory_op, sys::XENMEM_maximum_ram_page)?;
        let max_mfn = self.calls().raw.hypercall(ask)?;
        let chunks = u32::try_from(max_mfn.div_ceil(CHUNK_ENTRIES)).map_err(|_| Errno::E2BIG)?;
        let list = self.list_of_m2p(sys::XENMEM_machphys_mfn_list, chunks)?;
        let frames: Vec<Gfn> = list
            .iter()
            .flat_map(|first| (*first..first.saturating_add(CHUNK_PAGES)).map(Gfn))
            .collect();
        let table = memory::map(self.calls(), DOMID_XEN, &frames, Access::Read)?;
        if let Some(failed) = table.failed().first() {
            tracing::error!(frame = %failed, "a page of the m2p");
            return Err(failed.errno);
        }
        let compat = match self.list_of_m2p(sys::XENMEM_machphys_compat_mfn_list, 1) {
            Ok(list) => list.first().copied(),
            // A hypervisor without 32-bit PV has no such table.
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => None,
            Err(errno) => return Err(errno),
        };
        Ok(M2p::new(
            table,
            Mfn(max_mfn),
            compat.map_or(Mfn::INVALID, Mfn),
        ))
    }

    fn width(&self) -> Result<u8, Errno> {
        let body = sys::xen_domctl_address_size::new_zeroed();
        let got = self
            .calls()
            .domctl(sys::XEN_DOMCTL_get_address_size, self.domid, &body)?;
        // Xen counts bits.
        u8::try_from(got.size / 8).map_err(|_| Errno::EINVAL)
    }

    fn context_bytes(&self) -> Result<usize, Errno> {
        Ok(match self.width()? {
            4 => CONTEXT_32,
            _ => CONTEXT_64,
        })
    }

    fn extended(&self, vcpu: u32) -> Result<Vec<u8>, Errno> {
        let mut body = [0_u8; EXTENDED_MAX];
        body[EXTENDED_VCPU].copy_from_slice(&vcpu.to_le_bytes());
        let got = self
            .calls()
            .domctl(sys::XEN_DOMCTL_get_ext_vcpucontext, self.domid, &body)?;
        Ok(got[..EXTENDED].to_vec())
    }

    fn set_extended(&self, vcpu: u32, state: &[u8]) -> Result<(), Errno> {
        let mut body = [0_u8; EXTENDED_MAX];
        let place = body.get_mut(..state.len()).ok_or(Errno::EINVAL)?;
        place.copy_from_slice(state);
        body[EXTENDED_VCPU].copy_from_slice(&vcpu.to_le_bytes());
        self.calls()
            .domctl(sys::XEN_DOMCTL_set_ext_vcpucontext, self.domid, &body)
            .map(drop)
    }

    fn xsave(&self, vcpu: u32) -> Result<Vec<u8>, Errno> {
        let mut body = sys::xen_domctl_vcpuextstate::new_zeroed();
        body.vcpu = vcpu;
        // Without a buffer, Xen reports the maximum size (for a vcpu that has used every feature)
        // and the features; with one, the actual size.
        let body = self
            .calls()
            .domctl(sys::XEN_DOMCTL_getvcpuextstate, self.domid, &body)?;
        let bytes = usize::try_from(body.size).map_err(|_| Errno::EINVAL)?;
        // Without features (a host without XSAVE) there is no area, only its header.
        if bytes == 0 || body.xfeature_mask == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = self.calls().raw.buffer(bytes)?;
        let (cmd, named) = (sys::XEN_DOMCTL_getvcpuextstate, &mut [&mut buffer]);
        let got = self.calls().domctl_naming(cmd, self.domid, &body, named)?;
        let used = usize::try_from(got.size).map_err(|_| Errno::EINVAL)?;
        Ok(Calls::contents(&buffer, used.min(bytes)))
    }

    fn set_xsave(&self, vcpu: u32, state: &[u8]) -> Result<(), Errno> {
        let mut buffer = self.calls().filled(state)?;
        let mut body = sys::xen_domctl_vcpuextstate::new_zeroed();
        (body.vcpu, body.size) = (vcpu, state.len() as u64);
        let (cmd, named) = (sys::XEN_DOMCTL_setvcpuextstate, &mut [&mut buffer]);
        self.calls()
            .domctl_naming(cmd, self.domid, &body, named)
            .map(drop)
    }

    fn msrs(&self, vcpu: u32) -> Result<Vec<u8>, Errno> {
        let mut body = sys::xen_domctl_vcpu_msrs::new_zeroed();
        body.vcpu = vcpu;
        // Without a buffer, Xen reports the maximum number.
        let body = self
            .calls()
            .domctl(sys::XEN_DOMCTL_get_vcpu_msrs, self.domid, &body)?;
        let bytes = |count| usize::try_from(count).map(|n| n * VCPU_MSR);
        let room = bytes(body.msr_count).map_err(|_| Errno::EINVAL)?;
        if room == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = self.calls().raw.buffer(room)?;
        let (cmd, named) = (sys::XEN_DOMCTL_get_vcpu_msrs, &mut [&mut buffer]);
        let got = self.calls().domctl_naming(cmd, self.domid, &body, named)?;
        let used = bytes(got.msr_count).map_err(|_| Errno::EINVAL)?;
        Ok(Calls::contents(&buffer, used.min(room)))
    }

    fn set_msrs(&self, vcpu: u32, state: &[u8]) -> Result<(), Errno> {
        if !state.len().is_multiple_of(VCPU_MSR) {
            return Err(Errno::EINVAL);
        }
        let mut buffer = self.calls().filled(state)?;
        let mut body = sys::xen_domctl_vcpu_msrs::new_zeroed();
        body.vcpu = vcpu;
        body.msr_count = u32::try_from(state.len() / VCPU_MSR).map_err(|_| Errno::EINVAL)?;
        let (cmd, named) = (sys::XEN_DOMCTL_set_vcpu_msrs, &mut [&mut buffer]);
        self.calls()
            .domctl_naming(cmd, self.domid, &body, named)
            .map(drop)
    }

    fn set_basic(&self, vcpu: u32, state: &[u8]) -> Result<(), Errno> {
        match state.len() == self.context_bytes()? {
            true => self.set_context(vcpu, state),
            false => Err(Errno::EINVAL),
        }
    }

    /// Xen returns EINVAL for a vcpu above the largest too, but not in every call. The number of
    /// vcpus may grow, but never shrinks.
    fn vcpu_exists(&self, vcpu: u32) -> Result<(), Errno> {
        let known = |vcpus: u64| u64::from(vcpu) < vcpus;
        if known(self.vcpus.load(Ordering::Relaxed)) {
            return Ok(());
        }
        let vcpus = u64::from(self.calls().info(self.domid)?.max_vcpu_id) + 1;
        self.vcpus.fetch_max(vcpus, Ordering::Relaxed);
        match known(vcpus) {
            true => Ok(()),
            false => Err(Errno::EINVAL),
        }
    }
}

/// Xen's names for the calls that get and set a blob.
const fn names(blob: VcpuBlob) -> (&'static str, &'static str) {
    match blob {
        VcpuBlob::Basic => ("getvcpucontext", "setvcpucontext"),
        VcpuBlob::Extended => ("get_ext_vcpucontext", "set_ext_vcpucontext"),
        VcpuBlob::Xsave => ("getvcpuextstate", "setvcpuextstate"),
        VcpuBlob::Msrs => ("get_vcpu_msrs", "set_vcpu_msrs"),
    }
}

impl PvGuest for XenDomain {
    fn guest_width(&self) -> Result<u8, BackendError> {
        const OP: &str = "get_address_size";
        self.width().map_err(|errno| self.fail(OP, errno))
    }

    fn set_guest_width(&self, width: u8) -> Result<(), BackendError> {
        const OP: &str = "set_address_size";
        let fail = |errno| self.fail(OP, errno);
        // The width stays the same: make no call, because Xen refuses it for a domain that has
        // memory.
        if self.width().map_err(fail)? == width {
            return Ok(());
        }
        if width != 4 {
            return Err(fail(Errno::EINVAL));
        }
        let body = sys::xen_domctl_address_size {
            size: u32::from(width) * 8,
        };
        self.calls()
            .domctl(sys::XEN_DOMCTL_set_address_size, self.domid, &body)
            .map(drop)
            .map_err(fail)
    }

    fn m2p(&self) -> Result<M2p, BackendError> {
        const OP: &str = "machphys_mfn_list";
        self.map_m2p().map_err(|errno| self.fail(OP, errno))
    }

    fn vcpu_state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, BackendError> {
        let (op, _) = names(blob);
        self.vcpu_exists(vcpu)
            .and_then(|()| match blob {
                VcpuBlob::Basic => {
                    let bytes = self.context_bytes()?;
                    if bytes == CONTEXT_64 {
                        self.warn_of_lost_registers("saving it");
                    }
                    self.get_context(vcpu, bytes)
                }
                VcpuBlob::Extended => self.extended(vcpu),
                VcpuBlob::Xsave => self.xsave(vcpu),
                VcpuBlob::Msrs => self.msrs(vcpu),
            })
            .map_err(|errno| self.fail(op, errno))
    }

    fn set_vcpu_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<(), BackendError> {
        let (_, op) = names(blob);
        self.vcpu_exists(vcpu)
            .and_then(|()| match blob {
                VcpuBlob::Basic => self.set_basic(vcpu, state),
                VcpuBlob::Extended => self.set_extended(vcpu, state),
                VcpuBlob::Xsave => self.set_xsave(vcpu, state),
                VcpuBlob::Msrs => self.set_msrs(vcpu, state),
            })
            .map_err(|errno| self.fail(op, errno))
    }

    fn pin_tables(&self, tables: &[(u8, Mfn)]) -> Result<(), BackendError> {
        const OP: &str = "mmuext_op";
        let fail = |errno| self.fail(OP, errno);
        if tables.len() > MAX_PIN_BATCH {
            return Err(fail(Errno::E2BIG));
        }
        let mut ops = Vec::with_capacity(tables.len() * MMUEXT_OP);
        for (level, mfn) in tables {
            let cmd = match level {
                1 => sys::MMUEXT_PIN_L1_TABLE,
                2 => sys::MMUEXT_PIN_L2_TABLE,
                3 => sys::MMUEXT_PIN_L3_TABLE,
                4 => sys::MMUEXT_PIN_L4_TABLE,
                _ => return Err(fail(Errno::EINVAL)),
            };
            ops.extend_from_slice([cmd.into(), mfn.0, 0_u64].as_bytes());
        }
        if ops.is_empty() {
            return Ok(());
        }
        let mut buffer = self.calls().filled(&ops).map_err(fail)?;
        Call::pins(&mut buffer, tables.len(), self.domid.0)
            .and_then(|call| self.calls().raw.hypercall(call))
            .map(drop)
            .map_err(fail)
    }
}
