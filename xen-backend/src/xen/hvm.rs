//! The context and parameters of translated guests.
//!
//! C implementation: `xc_domain_hvm_{get,set}context` and `xc_hvm_param_{get,set}` in
//! `tools/libs/ctrl`.

use crate::Errno;
use zerocopy::FromZeros;

use super::calls::Calls;
use super::{XenDomain, sys};
use crate::HvmGuest;
use crate::error::BackendError;
use crate::privcmd::call::Named;

impl XenDomain {
    fn read_hvm_context(&self) -> Result<Vec<u8>, Errno> {
        let get = |size, named: Named<'_, '_>| {
            let mut body = sys::xen_domctl_hvmcontext::new_zeroed();
            body.size = size;
            self.calls()
                .domctl_naming(sys::XEN_DOMCTL_gethvmcontext, self.domid, &body, named)
        };
        // Without a buffer, Xen reports the size that is needed.
        let room = get(0, &mut [])?.size;
        let bytes = |size| usize::try_from(size).map_err(|_| Errno::EINVAL);
        let mut buffer = self.calls().raw.buffer(bytes(room)?)?;
        let used = get(room, &mut [&mut buffer])?.size;
        Ok(Calls::contents(&buffer, bytes(used.min(room))?))
    }

    fn write_hvm_context(&self, context: &[u8]) -> Result<(), Errno> {
        let mut buffer = self.calls().filled(context)?;
        let mut body = sys::xen_domctl_hvmcontext::new_zeroed();
        body.size = u32::try_from(context.len()).map_err(|_| Errno::EINVAL)?;
        let named = &mut [&mut buffer];
        self.calls()
            .domctl_naming(sys::XEN_DOMCTL_sethvmcontext, self.domid, &body, named)
            .map(drop)
    }

    fn param(&self, cmd: u32, index: u32, value: u64) -> Result<u64, Errno> {
        let mut ask = sys::xen_hvm_param::new_zeroed();
        (ask.domid, ask.index, ask.value) = (self.domid.0, index, value);
        let (_, answer) = self
            .calls()
            .with_struct(sys::__HYPERVISOR_hvm_op, cmd, &ask)?;
        Ok(answer.value)
    }
}

impl HvmGuest for XenDomain {
    fn hvm_context(&self) -> Result<Vec<u8>, BackendError> {
        const OP: &str = "gethvmcontext";
        self.read_hvm_context()
            .map_err(|errno| self.fail(OP, errno))
    }

    fn set_hvm_context(&self, context: &[u8]) -> Result<(), BackendError> {
        const OP: &str = "sethvmcontext";
        self.write_hvm_context(context)
            .map_err(|errno| self.fail(OP, errno))
    }

    fn hvm_param(&self, index: u32) -> Result<u64, BackendError> {
        const OP: &str = "get_param";
        self.param(sys::HVMOP_get_param, index, 0)
            .map_err(|errno| self.fail(OP, errno))
    }

    fn set_hvm_param(&self, index: u32, value: u64) -> Result<(), BackendError> {
        const OP: &str = "set_param";
        self.param(sys::HVMOP_set_param, index, value)
            .map(drop)
            .map_err(|errno| self.fail(OP, errno))
    }
}
