//! Suspend requests to a guest, in the way that it supports, and the wait for its answer.
//!
//! A guest with PV drivers listens to an event channel, if it has published one in xenstore, or
//! else to `control/shutdown`. A guest without PV drivers cannot be asked: it is stopped from
//! outside.
//!
//! C implementation: `tools/libs/light/libxl_dom_suspend.c`, `tools/libs/guest/xg_suspend.c`.

use std::time::{Duration, Instant};

use crate::Errno;
use zerocopy::FromZeros;

use super::{XenDomain, sys};
use crate::error::BackendError;
use crate::xenstore::StoreError;
use crate::{DomainControl, GuestKind, HvmGuest, ShutdownReason};

const OP: &str = "suspend";

/// How long a guest has to accept the request, and then to suspend (libxl's timeout).
const PATIENCE: Duration = Duration::from_secs(60);
/// How often to poll, at first and in the end.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LAST_LOOK: Duration = Duration::from_millis(10);

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
    /// Request a suspend, and wait until it is done.
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
                raw.notify(self.domid, port).map_err(fail)?;
                self.wait_for_shutdown(None)
            }
            Way::Store => {
                let path = self.node("control/shutdown");
                let store = &*self.shared.store;
                let write = store.write(&path, REQUEST);
                write.map_err(|error| fail(store_errno(&error)))?;
                self.wait_for_shutdown(Some(&path))
            }
            Way::Remote => {
                let mut ask = sys::sched_remote_shutdown::new_zeroed();
                ask.domain_id = self.domid.0;
                ask.reason = sys::SHUTDOWN_suspend;
                let (number, cmd) = (sys::__HYPERVISOR_sched_op, sys::SCHEDOP_remote_shutdown);
                self.calls().with_struct(number, cmd, &ask).map_err(fail)?;
                self.wait_for_shutdown(None)
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

    /// Wait until the domain has suspended. If the guest has not even accepted the request at
    /// `node` in time, the request is withdrawn.
    fn wait_for_shutdown(&self, node: Option<&str>) -> Result<(), BackendError> {
        let (mut deadline, mut look) = (Instant::now() + PATIENCE, FIRST_LOOK);
        let mut taken = node.is_none();
        loop {
            match self.info()?.shutdown {
                Some(ShutdownReason::Suspend) => return Ok(()),
                Some(reason) => {
                    tracing::error!(domid = %self.domid, ?reason, "it shut down instead");
                    return Err(self.fail(OP, Errno::ECANCELED));
                }
                None => {}
            }
            if Instant::now() > deadline {
                match node.filter(|_| !taken) {
                    Some(node) if !self.take_back(node)? => {
                        // The guest accepted it at the last moment.
                        taken = true;
                        deadline = Instant::now() + PATIENCE;
                    }
                    _ => return Err(self.fail(OP, Errno::ETIMEDOUT)),
                }
            }
            std::thread::sleep(look);
            look = (look * 2).min(LAST_LOOK);
        }
    }

    /// Withdraw the request; false if the guest has already accepted it.
    fn take_back(&self, node: &str) -> Result<bool, BackendError> {
        let exchanged = self.shared.store.exchange(node, REQUEST, NOTHING);
        exchanged.map_err(|error| self.fail(OP, store_errno(&error)))
    }
}
