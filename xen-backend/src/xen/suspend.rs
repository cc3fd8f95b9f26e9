//! Suspend requests to a guest, in the way that it supports.
//!
//! A guest with PV drivers listens to an event channel, if it has published one in xenstore, or
//! else to `control/shutdown`. A guest without PV drivers cannot be asked: it is stopped from
//! outside.
//!
//! C implementation: `tools/libs/light/libxl_dom_suspend.c`, `tools/libs/guest/xg_suspend.c`.

use crate::Errno;
use zerocopy::FromZeros;

use super::{XenDomain, sys};
use crate::error::BackendError;
use crate::suspend::Withdrawn;
use crate::xenstore::StoreError;
use crate::{DomainControl, GuestKind, HvmGuest};

const OP: &str = "suspend";

/// The request that a guest reads from `control/shutdown`.
const REQUEST: &[u8] = b"suspend";
/// Its value when there is no request.
const NOTHING: &[u8] = b"";

/// The parameter that holds the sleep state of an HVM guest (`HVM_PARAM_ACPI_S_STATE`).
const ACPI_S_STATE: u32 = 14;

/// A way to request a suspend.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// The event channel that the guest offers.
    Events(u32),
    /// The node of xenstore.
    Store,
    /// No request: the guest is stopped from outside.
    Remote,
}

fn store_errno(error: &StoreError) -> Errno {
    tracing::error!(%error, "xenstore");
    error.errno()
}

impl XenDomain {
    /// Request a suspend.
    pub(super) fn ask_to_suspend(&self) -> Result<(), BackendError> {
        let info = self.info()?;
        if info.shutdown.is_some() {
            return Err(self.fail(OP, Errno::EBUSY));
        }
        // A guest that is not running cannot answer: do not wait for it.
        if info.paused || !self.has_vcpu_online(info.max_vcpu_id)? {
            return Err(self.fail(OP, Errno::ETIMEDOUT));
        }
        let fail = |errno| self.fail(OP, errno);
        let way = self.way()?;
        tracing::debug!(domid = %self.domid, ?way, "asking the guest to suspend");
        match way {
            Way::Events(port) => {
                let raw = &self.calls().raw;
                raw.notify(self.domid, port).map_err(fail)
            }
            Way::Store => {
                let path = self.node("control/shutdown");
                let store = &*self.shared.store;
                let write = store.write(&path, REQUEST);
                write.map_err(|error| fail(store_errno(&error)))
            }
            Way::Remote => {
                let mut ask = sys::sched_remote_shutdown::new_zeroed();
                ask.domain_id = self.domid.0;
                ask.reason = sys::SHUTDOWN_suspend;
                let (number, cmd) = (sys::__HYPERVISOR_sched_op, sys::SCHEDOP_remote_shutdown);
                let stopped = self.calls().with_struct(number, cmd, &ask);
                stopped.map(drop).map_err(fail)
            }
        }
    }

    fn has_vcpu_online(&self, last: u32) -> Result<bool, BackendError> {
        for vcpu in 0..=last {
            match self.vcpu_online(vcpu) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                // This vcpu was never created.
                Err(error) if error.errno == Errno::ESRCH => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn node(&self, name: &str) -> String {
        format!("/local/domain/{}/{name}", self.domid.0)
    }

    fn way(&self) -> Result<Way, BackendError> {
        if self.kind == GuestKind::Hvm {
            let drivers = self.hvm_param(sys::HVM_PARAM_CALLBACK_IRQ)? != 0;
            let asleep = self.hvm_param(ACPI_S_STATE)? != 0;
            if asleep || !drivers {
                return Ok(Way::Remote);
            }
        }
        let path = self.node("device/suspend/event-channel");
        let published = self.shared.store.read(&path);
        let published = published.map_err(|error| self.fail(OP, store_errno(&error)))?;
        let port = published
            .as_deref()
            .and_then(|port| std::str::from_utf8(port).ok())
            .and_then(|port| port.trim_end_matches('\0').parse().ok())
            .filter(|port| *port > 0);
        Ok(port.map_or(Way::Store, Way::Events))
    }

    /// Withdraw a request that a guest which is about to be resumed has not read: it would suspend
    /// again because of it.
    pub(super) fn forget_request(&self) {
        if let Err(error) = self.take_back() {
            tracing::warn!(%error, "the guest may suspend once more");
        }
    }

    /// Withdraw the request.
    pub(super) fn take_back(&self) -> Result<Withdrawn, BackendError> {
        let node = self.node("control/shutdown");
        // A guest accepts a request by clearing the node.
        let exchanged = self.shared.store.exchange(&node, REQUEST, NOTHING);
        match exchanged.map_err(|error| self.fail(OP, store_errno(&error)))? {
            true => Ok(Withdrawn::TakenBack),
            false if matches!(self.way(), Ok(Way::Store)) => Ok(Withdrawn::Accepted),
            false => Ok(Withdrawn::Sent),
        }
    }
}
