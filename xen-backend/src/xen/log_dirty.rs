//! The dirty log: the pages that a guest has written.
//!
//! Xen reads a log that is off as an empty one, and treats a final read of a running domain like
//! any other. Both would lose pages, so both are refused here, as is an answer for fewer pages than
//! requested.
//!
//! C implementation: `xc_shadow_control`, `xc_logdirty_control` in
//! `tools/libs/ctrl/xc_domain.c`; in Xen, `xen/arch/x86/mm/paging.c`.

use std::sync::PoisonError;

use crate::Errno;
use zerocopy::FromZeros;

use super::{Log, XenDomain, sys};
use crate::error::BackendError;
use crate::privcmd::CallBuffer;
use crate::{DirtyBitmap, DirtyRead, DirtyStats, DomainControl, GuestKind, LogDirty};

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

impl XenDomain {
    /// Whether the log is on, whichever process enabled it: libxl does so for the secondary of
    /// COLO, and its helper reads it. The only call that can tell is the one that enables it; Xen
    /// refuses it if the log is on.
    ///
    /// Xen refuses it (EINVAL) in two other cases, which look the same: if the log covers only the
    /// few pages of a screen, and if the domain has a device passed through. A caller that has not
    /// enabled the log itself has to know that its toolstack has. COLO knows: libxl enables the log
    /// and fails if it cannot, and refuses passed-through devices.
    fn log_is_on(&self) -> Result<bool, BackendError> {
        match self.shared.logs().get(&self.domid) {
            Some(Log::On) => return Ok(true),
            // It may cover only the few pages of a screen.
            Some(Log::Held) => return Ok(false),
            None => {}
        }
        match self.shadow_op(sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY) {
            Err(error) if error.errno == Errno::EINVAL => {
                self.shared.logs().insert(self.domid, Log::On);
                Ok(true)
            }
            Err(error) => Err(error),
            Ok(()) => {
                self.disable_log_dirty()?;
                Ok(false)
            }
        }
    }
}

impl LogDirty for XenDomain {
    fn enable_log_dirty(&self) -> Result<(), BackendError> {
        let result = self.shadow_op(sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY);
        let mut logs = self.shared.logs();
        match &result {
            Ok(()) => logs.insert(self.domid, Log::On),
            Err(error) if error.errno == Errno::EINVAL && logs.get(&self.domid).is_none() => {
                logs.insert(self.domid, Log::Held)
            }
            Err(_) => None,
        };
        result.map_err(|error| match error.errno {
            Errno::EOPNOTSUPP if self.kind == GuestKind::Pv => error.explained(
                "this Xen is built without shadow paging, which the dirty log of a PV guest needs; \
                 the guest cannot be saved or sent while it runs, only suspended",
            ),
            _ => error,
        })
    }

    fn disable_log_dirty(&self) -> Result<(), BackendError> {
        match self.shadow_op(sys::XEN_DOMCTL_SHADOW_OP_OFF) {
            // The log is off by now: after that Xen tries to switch to shadow paging, which this
            // domain does not use, or this hypervisor does not have.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::EOPNOTSUPP) => {}
            result => result?,
        }
        self.shared.logs().remove(&self.domid);
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
        if (how == DirtyRead::CleanFinal && runs) || !self.log_is_on()? {
            return Err(fail(Errno::EINVAL));
        }
        // One word more than needed: a buffer has at least one byte.
        let bytes = out.words() * 8 + 8;
        let mut kept = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = match kept.take().filter(|buffer| buffer.len() >= bytes) {
            Some(buffer) => buffer,
            None => self.calls().raw.buffer(bytes).map_err(fail)?,
        };
        // If the call fails, the next one overwrites what it left in the buffer.
        let buffer = kept.insert(buffer);
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
        let (cmd, named) = (sys::XEN_DOMCTL_shadow_op, &mut [&mut *buffer]);
        let answer = self
            .calls()
            .domctl_naming(cmd, self.domid, &body, named)
            .map_err(fail)?;
        // If Xen reports fewer pages, the rest of the bitmap is invalid.
        if answer.pages != out.pfns() {
            let (domid, asked, answered) = (self.domid, out.pfns(), answer.pages);
            tracing::error!(%domid, asked, answered, "the dirty log is not whole");
            return Err(fail(Errno::EIO));
        }
        take_words(buffer, out);
        Ok(DirtyStats {
            dirty_count: answer.stats.dirty_count.into(),
            fault_count: answer.stats.fault_count.into(),
        })
    }

    fn logs_new_pages(&self) -> Result<bool, BackendError> {
        Ok(self.shared.quirks.logs_new_pages)
    }
}

/// Words of the log that are copied at a time.
const AT_ONCE: usize = 512;

/// Fill `out` from the bits in the buffer.
fn take_words(buffer: &CallBuffer, out: &mut DirtyBitmap) {
    let mut bytes = [0; AT_ONCE * 8];
    for first in (0..out.words()).step_by(AT_ONCE) {
        let count = AT_ONCE.min(out.words() - first);
        buffer.read(first * 8, &mut bytes[..count * 8]);
        let (chunks, _) = bytes[..count * 8].as_chunks::<8>();
        let mut words = [0; AT_ONCE];
        for (word, chunk) in words.iter_mut().zip(chunks) {
            *word = u64::from_le_bytes(*chunk);
        }
        out.copy_words(first as u64 * 64, &words[..count]);
    }
}
