//! The log of pages that a guest writes.
//!
//! Xen reads a log that is off as an empty one, and a final read of a running domain as
//! any other; both would lose pages, so both are refused here. So is an answer for fewer pages
//! than were asked for.
//!
//! C implementation: `xc_shadow_control`, `xc_logdirty_control` in
//! `tools/libs/ctrl/xc_domain.c`; in Xen, `xen/arch/x86/mm/paging.c`.

use nix::errno::Errno;
use zerocopy::FromZeros;

use super::{XenDomain, sys};
use crate::error::BackendError;
use crate::{DirtyBitmap, DirtyRead, DirtyStats, DomainControl, LogDirty};

const OP: &str = "shadow_op";

impl XenDomain {
    fn shadow_op(&self, op: u32) -> Result<(), BackendError> {
        let mut body = sys::xen_domctl_shadow_op::new_zeroed();
        body.op = op;
        self.calls()
            .domctl(sys::XEN_DOMCTL_shadow_op, self.domid, &body)
            .map(drop)
            .map_err(|errno| self.fail(OP, errno))
    }
}

impl LogDirty for XenDomain {
    fn enable_log_dirty(&self) -> Result<(), BackendError> {
        self.shadow_op(sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)?;
        self.shared.logged().insert(self.domid);
        Ok(())
    }

    fn disable_log_dirty(&self) -> Result<(), BackendError> {
        match self.shadow_op(sys::XEN_DOMCTL_SHADOW_OP_OFF) {
            // The log is off by then: Xen goes on to shadow paging, which this domain
            // does not use, or this hypervisor does not have.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::EOPNOTSUPP) => {}
            result => result?,
        }
        self.shared.logged().remove(&self.domid);
        Ok(())
    }

    fn read_dirty(
        &self,
        how: DirtyRead,
        out: &mut DirtyBitmap,
    ) -> Result<DirtyStats, BackendError> {
        let fail = |errno| self.fail(OP, errno);
        let info = self.info()?;
        let runs = !info.paused && info.shutdown.is_none();
        if !self.shared.logged().contains(&self.domid) || (how == DirtyRead::CleanFinal && runs) {
            return Err(fail(Errno::EINVAL));
        }
        let words = out.words();
        // One word more than there may be: a buffer has at least one octet.
        let mut buffer = self.calls().raw.buffer(words * 8 + 8).map_err(fail)?;
        let mut body = sys::xen_domctl_shadow_op::new_zeroed();
        (body.op, body.mode) = match how {
            DirtyRead::Clean => (sys::XEN_DOMCTL_SHADOW_OP_CLEAN, 0),
            DirtyRead::Peek => (sys::XEN_DOMCTL_SHADOW_OP_PEEK, 0),
            DirtyRead::CleanFinal => (
                sys::XEN_DOMCTL_SHADOW_OP_CLEAN,
                sys::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL,
            ),
        };
        body.pages = out.pfns();
        let (cmd, named) = (sys::XEN_DOMCTL_shadow_op, &mut [&mut buffer]);
        let answer = self
            .calls()
            .domctl_naming(cmd, self.domid, &body, named)
            .map_err(fail)?;
        // Where Xen says less, the rest of the bitmap is not an answer.
        if answer.pages != out.pfns() {
            let (domid, asked, answered) = (self.domid, out.pfns(), answer.pages);
            tracing::error!(%domid, asked, answered, "the dirty log is not whole");
            return Err(fail(Errno::EIO));
        }
        let octets = super::Calls::contents(&buffer, words * 8);
        let (octets, _) = octets.as_chunks::<8>();
        let bits: Vec<u64> = octets
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        out.copy_words(0, &bits);
        Ok(DirtyStats {
            dirty_count: answer.stats.dirty_count.into(),
            fault_count: answer.stats.fault_count.into(),
        })
    }
}
