//! Event channels through `/dev/xen/evtchn`.
//!
//! C implementation: `tools/libs/evtchn/linux.c`.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::Errno;

use super::ioctl::{self, BindInterdomain, Port};
use crate::DomId;

/// Signal the channel that `domid` offers at `port`. The channel is bound only for this call;
/// closing the descriptor unbinds it at the latest.
pub(super) fn notify(device: &File, domid: DomId, port: u32) -> Result<(), Errno> {
    let mut bind = BindInterdomain {
        remote_domain: domid.0.into(),
        remote_port: port,
    };
    // SAFETY: the descriptor belongs to /dev/xen/evtchn, and the structure is the one this request
    // takes.
    let bound = unsafe { ioctl::bind_interdomain(device.as_raw_fd(), &raw mut bind) }?;
    let mut ours = Port {
        port: bound.unsigned_abs(),
    };
    // SAFETY: as above.
    let notified = unsafe { ioctl::notify(device.as_raw_fd(), &raw mut ours) };
    // SAFETY: as above.
    let unbound = unsafe { ioctl::unbind(device.as_raw_fd(), &raw mut ours) };
    notified.and(unbound)?;
    Ok(())
}
