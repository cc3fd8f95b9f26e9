//! `domctl` on vcpus of the mock machine.
//!
//! C implementation: `xen/common/domctl.c`, `xen/arch/x86/domctl.c`.

use crate::Errno;

use super::domctl::{Domctl, FIRST_WITH_ANY, done};
use super::{BODY, errno, sys};
use crate::{DomainControl, HvmGuest, PvGuest, VcpuBlob};

/// Bytes of the larger `vcpu_guest_context`, which Xen always reads.
const CONTEXT: usize = 0x1430;
/// The least and the most bytes of an extended context: the least is everything before the
/// machine-check part.
const EXTENDED_MIN: usize = 32;
/// The offset of rax in a 64-bit context, and in the HVM record of a translated guest's first vcpu,
/// which follows the header (32 bytes) and the record's descriptor (8).
const RAX: usize = 600;
const HVM_RAX: usize = 32 + 8 + 512;

impl Domctl<'_> {
    /// Answers the commands on vcpus; ENOSYS for unknown ones.
    pub(super) fn vcpu_answer(&self, cmd: u32) -> Result<u64, Errno> {
        match cmd {
            sys::XEN_DOMCTL_getvcpuinfo => {
                let mut body: sys::xen_domctl_getvcpuinfo = self.load()?;
                let online = self.domain.vcpu_online(body.vcpu).map_err(errno);
                let online = online.map_err(|errno| match errno {
                    Errno::EINVAL | Errno::ESRCH if self.face.interface >= FIRST_WITH_ANY => {
                        Errno::ENOENT
                    }
                    errno => errno,
                })?;
                body.online = online.into();
                self.save(&body)
            }
            sys::XEN_DOMCTL_getvcpucontext => self.context(),
            sys::XEN_DOMCTL_setvcpucontext => self.set_context(),
            sys::XEN_DOMCTL_get_ext_vcpucontext => {
                let mut body: [u8; BODY] = self.load()?;
                let [v0, v1, v2, v3, ..] = body;
                let vcpu = u32::from_le_bytes([v0, v1, v2, v3]);
                let state = self.state(vcpu, VcpuBlob::Extended)?;
                body[..state.len()].copy_from_slice(&state);
                self.save(&body)
            }
            sys::XEN_DOMCTL_set_ext_vcpucontext => {
                let body: [u8; BODY] = self.load()?;
                let [v0, v1, v2, v3, s0, s1, s2, s3, ..] = body;
                let vcpu = u32::from_le_bytes([v0, v1, v2, v3]);
                let size = u32::from_le_bytes([s0, s1, s2, s3]);
                let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
                let state = body.get(..size.max(EXTENDED_MIN)).ok_or(Errno::EINVAL)?;
                self.set_state(vcpu, VcpuBlob::Extended, state)
            }
            sys::XEN_DOMCTL_getvcpuextstate => self.xsave(),
            sys::XEN_DOMCTL_setvcpuextstate => {
                let body: sys::xen_domctl_vcpuextstate = self.load()?;
                let state = self.bytes(body.buffer, body.size)?;
                self.set_state(body.vcpu, VcpuBlob::Xsave, &state)
            }
            sys::XEN_DOMCTL_get_vcpu_msrs => self.msrs(),
            sys::XEN_DOMCTL_set_vcpu_msrs => {
                let body: sys::xen_domctl_vcpu_msrs = self.load()?;
                let msr = size_of::<sys::xen_domctl_vcpu_msr>() as u64;
                let state = self.bytes(body.msrs, u64::from(body.msr_count) * msr)?;
                self.set_state(body.vcpu, VcpuBlob::Msrs, &state)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn state(&self, vcpu: u32, blob: VcpuBlob) -> Result<Vec<u8>, Errno> {
        self.domain.vcpu_state(vcpu, blob).map_err(errno)
    }

    fn set_state(&self, vcpu: u32, blob: VcpuBlob, state: &[u8]) -> Result<u64, Errno> {
        done(self.domain.set_vcpu_state(vcpu, blob, state))
    }

    fn context(&self) -> Result<u64, Errno> {
        let body: sys::xen_domctl_vcpucontext = self.load()?;
        let context = match self.domain.dom.kind.is_translated() {
            false => self.state(body.vcpu, VcpuBlob::Basic)?,
            true => {
                let hvm = self.domain.hvm_context().map_err(errno)?;
                let mut context = vec![0; CONTEXT];
                let rax = hvm.get(HVM_RAX..HVM_RAX + 8).ok_or(Errno::ENODATA)?;
                context[RAX..RAX + 8].copy_from_slice(rax);
                context
            }
        };
        self.face.buffers.write(body.ctxt, &context)?;
        Ok(0)
    }

    fn set_context(&self) -> Result<u64, Errno> {
        let body: sys::xen_domctl_vcpucontext = self.load()?;
        let context = self.face.buffers.read(body.ctxt, CONTEXT)?;
        if self.domain.dom.kind.is_translated() {
            let mut hvm = self.domain.hvm_context().map_err(errno)?;
            let rax = hvm.get_mut(HVM_RAX..HVM_RAX + 8).ok_or(Errno::ENODATA)?;
            rax.copy_from_slice(&context[RAX..RAX + 8]);
            return done(self.domain.set_hvm_context(&hvm));
        }
        let bytes = match self.domain.guest_width().map_err(errno)? {
            4 => 0xaf0,
            _ => CONTEXT,
        };
        self.set_state(body.vcpu, VcpuBlob::Basic, &context[..bytes])
    }

    fn xsave(&self) -> Result<u64, Errno> {
        let mut body: sys::xen_domctl_vcpuextstate = self.load()?;
        let state = self.state(body.vcpu, VcpuBlob::Xsave)?;
        let features = state
            .first_chunk()
            .map_or(0, |word| u64::from_le_bytes(*word));
        if (body.size, body.xfeature_mask) == (0, 0) {
            (body.size, body.xfeature_mask) = (state.len() as u64, features);
            return self.save(&body);
        }
        if (body.size, body.xfeature_mask) != (state.len() as u64, features) {
            return Err(Errno::EINVAL);
        }
        self.face.buffers.write(body.buffer, &state)?;
        Ok(0)
    }

    fn msrs(&self) -> Result<u64, Errno> {
        let mut body: sys::xen_domctl_vcpu_msrs = self.load()?;
        let state = self.state(body.vcpu, VcpuBlob::Msrs)?;
        let size = size_of::<sys::xen_domctl_vcpu_msr>();
        let count = u32::try_from(state.len() / size).map_err(|_| Errno::EINVAL)?;
        if body.msrs != 0 {
            if body.msr_count < count {
                return Err(Errno::ENOBUFS);
            }
            self.face.buffers.write(body.msrs, &state)?;
        }
        body.msr_count = count;
        self.save(&body)
    }
}
