//! A domain's life cycle.
//!
//! C implementation: `tools/libs/ctrl/{xc_domain,xc_evtchn}.c`,
//! `tools/libs/guest/xg_resume.c`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Errno;
use zerocopy::FromZeros;

use super::{XenDomain, sys};
use crate::error::BackendError;
use crate::privcmd::call::VCPU_CONTEXT;
use crate::suspend::Withdrawn;
use crate::{
    DomId, DomainControl, DomainInfo, GuestKind, HvmGuest, PvGuest, ShutdownReason, XenVersion,
};

/// How long to wait for a destroyed domain to leave Xen's list. It stays there as long as a process
/// has one of its pages mapped.
const DESTROY_WAIT: Duration = Duration::from_millis(500);

/// What the suspend call returns to a guest whose suspend was cancelled.
const SUSPEND_CANCELLED: u32 = 1;

/// Bytes of a 64-bit and a 32-bit `vcpu_guest_context`.
pub(super) const CONTEXT_64: usize = VCPU_CONTEXT;
pub(super) const CONTEXT_32: usize = 0xaf0;
/// The offset of eax in either: after the FPU area of 512 bytes and, in the 64-bit one, flags and
/// ten registers; in the 32-bit one, flags and six.
const EAX_64: usize = 512 + 8 + 10 * 8;
const EAX_32: usize = 512 + 4 + 6 * 4;

impl XenDomain {
    /// Make the guest's suspend call return "cancelled". A guest without PV drivers has made no
    /// such call.
    fn cancel_suspend(&self) -> Result<(), BackendError> {
        let width = match self.kind {
            GuestKind::Pv => self.guest_width()?,
            GuestKind::Hvm | GuestKind::Pvh => {
                if self.hvm_param(sys::HVM_PARAM_CALLBACK_IRQ)? == 0 {
                    return Ok(());
                }
                8
            }
        };
        if width == 8 {
            self.warn_of_lost_registers("resuming it");
        }
        let (bytes, eax) = match width {
            4 => (CONTEXT_32, EAX_32),
            _ => (CONTEXT_64, EAX_64),
        };
        let fail = |op| move |errno| self.fail(op, errno);
        let mut context = self.get_context(0, bytes).map_err(fail("getvcpucontext"))?;
        context[eax..eax + 4].copy_from_slice(&SUSPEND_CANCELLED.to_le_bytes());
        if width == 8 {
            context[eax + 4..eax + 8].fill(0);
        }
        self.set_context(0, &context)
            .map_err(fail("setvcpucontext"))
    }

    /// C xenstored announces a domain's shutdown once, and not again until it has been told that
    /// the domain was resumed. Without that, xl's next save of the guest would wait in vain, and
    /// its next poweroff would go unnoticed.
    fn tell_store_that_it_runs(&self) {
        match self.shared.store.resumed(self.domid) {
            Ok(()) => {}
            // The domain was never introduced to xenstore.
            Err(error) if matches!(error.errno(), Errno::ENOENT | Errno::EINVAL) => {}
            Err(error) => {
                let domid = self.domid;
                tracing::warn!(
                    %error,
                    %domid,
                    "the guest runs, but xenstored does not know: xl will not notice when it \
                     next shuts down"
                );
            }
        }
    }

    /// Wait briefly until the hypervisor has released the domain.
    fn wait_until_gone(&self) {
        let start = Instant::now();
        while start.elapsed() < DESTROY_WAIT {
            match self.calls().info(self.domid) {
                Ok(_) => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => return,
            }
        }
        tracing::debug!(domid = %self.domid, "destroyed, but another domain or process still has pages of it");
    }
}

impl XenDomain {
    /// Warn, once for each handle, if this Xen loses registers with a vcpu's context.
    pub(super) fn warn_of_lost_registers(&self, doing: &str) {
        if self.shared.quirks.loses_registers && !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                domid = %self.domid,
                "Xen 4.21.0 and 4.21.1 lose the registers r8 to r15 of a vcpu's context: {doing} \
                 zeroes them in the guest, which may crash; update Xen to 4.21.2"
            );
        }
    }
}

impl DomainControl for XenDomain {
    fn xen_version(&self) -> Result<XenVersion, BackendError> {
        Ok(self.shared.version)
    }

    fn info(&self) -> Result<DomainInfo, BackendError> {
        self.calls()
            .info(self.domid)
            .map_err(|errno| self.fail("getdomaininfo", errno))
    }

    fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError> {
        let mut body = sys::xen_domctl_getvcpuinfo::new_zeroed();
        body.vcpu = vcpu;
        let errno = match self
            .calls()
            .domctl(sys::XEN_DOMCTL_getvcpuinfo, self.domid, &body)
        {
            Ok(info) => return Ok(info.online != 0),
            // Xen 4.22 reports only that the vcpu does not exist.
            Err(Errno::ENOENT) if vcpu > self.info()?.max_vcpu_id => Errno::EINVAL,
            Err(Errno::ENOENT) => Errno::ESRCH,
            Err(errno) => errno,
        };
        Err(self.fail("getvcpuinfo", errno))
    }

    fn pause(&self) -> Result<(), BackendError> {
        self.calls()
            .plain_domctl(sys::XEN_DOMCTL_pausedomain, self.domid)
            .map_err(|errno| self.fail("pausedomain", errno))
    }

    fn unpause(&self) -> Result<(), BackendError> {
        self.calls()
            .plain_domctl(sys::XEN_DOMCTL_unpausedomain, self.domid)
            .map_err(|errno| self.fail("unpausedomain", errno))
    }

    fn request_suspend(&self) -> Result<bool, BackendError> {
        self.ask_to_suspend().map(|()| false)
    }

    fn withdraw_suspend(&self) -> Result<Withdrawn, BackendError> {
        self.take_back()
    }

    fn resume(&self) -> Result<(), BackendError> {
        const OP: &str = "resumedomain";
        match self.info()?.shutdown {
            // Xen itself does not refuse this.
            None => return Err(self.fail(OP, Errno::EINVAL)),
            Some(ShutdownReason::Suspend) => {
                self.forget_request();
                self.cancel_suspend()?;
            }
            Some(_) => {}
        }
        self.calls()
            .plain_domctl(sys::XEN_DOMCTL_resumedomain, self.domid)
            .map_err(|errno| self.fail(OP, errno))?;
        self.tell_store_that_it_runs();
        Ok(())
    }

    fn destroy(&self) -> Result<(), BackendError> {
        self.calls()
            .plain_domctl(sys::XEN_DOMCTL_destroydomain, self.domid)
            .map_err(|errno| self.fail("destroydomain", errno))?;
        self.shared.logs().remove(&self.domid);
        self.wait_until_gone();
        Ok(())
    }

    fn alloc_unbound_port(&self, remote: DomId) -> Result<u32, BackendError> {
        let ask = sys::evtchn_alloc_unbound {
            dom: self.domid.0,
            remote_dom: remote.0,
            port: 0,
        };
        self.calls()
            .with_struct(
                sys::__HYPERVISOR_event_channel_op,
                sys::EVTCHNOP_alloc_unbound,
                &ask,
            )
            .map(|(_, answer)| answer.port)
            .map_err(|errno| self.fail("alloc_unbound", errno))
    }
}

impl XenDomain {
    /// The basic context of a vcpu, of `bytes` bytes.
    pub(super) fn get_context(&self, vcpu: u32, bytes: usize) -> Result<Vec<u8>, Errno> {
        let mut context = self.calls().raw.buffer(CONTEXT_64)?;
        let mut body = sys::xen_domctl_vcpucontext::new_zeroed();
        body.vcpu = vcpu;
        let named = &mut [&mut context];
        self.calls()
            .domctl_naming(sys::XEN_DOMCTL_getvcpucontext, self.domid, &body, named)?;
        Ok(super::Calls::contents(&context, bytes))
    }

    /// Set the basic context of a vcpu; `context` has the size of the guest's width.
    pub(super) fn set_context(&self, vcpu: u32, context: &[u8]) -> Result<(), Errno> {
        // Xen always reads the size of the larger structure.
        let mut whole = vec![0; CONTEXT_64.max(context.len())];
        whole[..context.len()].copy_from_slice(context);
        let mut buffer = self.calls().filled(&whole)?;
        let mut body = sys::xen_domctl_vcpucontext::new_zeroed();
        body.vcpu = vcpu;
        let named = &mut [&mut buffer];
        self.calls()
            .domctl_naming(sys::XEN_DOMCTL_setvcpucontext, self.domid, &body, named)
            .map(drop)
    }
}
