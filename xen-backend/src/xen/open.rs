//! Opening of the hypervisor, detection of its interface version, and errors that say what is
//! missing.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::Errno;
use nix::unistd::geteuid;
use thiserror::Error;

use super::calls::{self, Calls};
use super::interface::{INTERFACES, Interface, known_versions, versions};
use super::{Privcmd, sys};
use crate::XenVersion;
use crate::privcmd::{Call, Hypercalls};

/// Contains "xen" if Linux runs on Xen.
const HYPERVISOR_TYPE: &str = "/sys/hypervisor/type";
/// Interface versions that may exist, for the error message about an unknown one.
const OUTLANDISH: std::ops::RangeInclusive<u32> = 0x0b..=0x40;

/// The reason why the hypervisor cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The machine does not run on Xen.
    #[error(
        "this machine runs no Xen: there is no /dev/xen/privcmd. Boot it with Xen, or work on \
         a mock machine"
    )]
    NoXen,
    /// The machine runs on Xen, but no device leads to the hypervisor.
    #[error(
        "Xen is here, but not /dev/xen/privcmd: load the kernel module xen-privcmd \
         (`modprobe xen-privcmd`)"
    )]
    NoPrivcmd,
    /// The device is not accessible to this user.
    #[error(
        "privcmd may be opened by root only, and this is user {uid}: run the command as root \
         in the control domain"
    )]
    NotRoot {
        /// The user that tried.
        uid: u32,
    },
    /// A device cannot be opened for another reason.
    #[error("the hypervisor's devices below /dev/xen cannot be opened: {cause}")]
    Device {
        /// The kernel's error.
        cause: io::Error,
    },
    /// The device refuses hypercalls.
    #[error(
        "the handle on privcmd is restricted to one domain (IOCTL_PRIVCMD_RESTRICT) and may \
         make no hypercall: open it unrestricted"
    )]
    Restricted,
    /// The hypervisor does not let this domain control others.
    #[error(
        "Xen {major}.{minor} lets only its control domain do this, and this domain is not it: \
         run the command in dom0"
    )]
    NotPrivileged {
        /// Of the hypervisor.
        major: u16,
        /// Of the hypervisor.
        minor: u16,
    },
    /// An unknown version of the interface.
    #[error(
        "Xen {major}.{minor} speaks version {} of the domctl interface; this xsr knows {} to \
         {} ({}). Use an xsr made for this Xen, or a Xen that this xsr knows",
        found.map_or_else(|| "an unknown".to_owned(), |found| format!("{found:#x}")),
        format_args!("{:#x}", known.0),
        format_args!("{:#x}", known.1),
        format_args!("Xen 4.{} to 4.{}", known_versions()[0].minor, known_versions()[1].minor)
    )]
    UnknownInterface {
        /// Of the hypervisor.
        major: u16,
        /// Of the hypervisor.
        minor: u16,
        /// The version of the hypervisor's interface, if it could be determined.
        found: Option<u32>,
        /// The oldest and the newest known version.
        known: (u32, u32),
    },
    /// The hypervisor gives an unexpected answer.
    #[error("the hypervisor does not answer {op}: {errno}")]
    NoAnswer {
        /// Xen's name for the call.
        op: &'static str,
        /// The errno that it returned.
        errno: Errno,
    },
}

/// The hypervisor's device.
pub(super) fn device() -> Result<Privcmd, OpenError> {
    match Privcmd::open() {
        Ok(Some(device)) => Ok(device),
        Ok(None) => Err(match under_xen(Path::new(HYPERVISOR_TYPE)) {
            true => OpenError::NoPrivcmd,
            false => OpenError::NoXen,
        }),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() => {
            Err(OpenError::NotRoot {
                uid: geteuid().as_raw(),
            })
        }
        Err(cause) => Err(OpenError::Device { cause }),
    }
}

/// Whether the kernel says that it runs on Xen.
fn under_xen(hypervisor_type: &Path) -> bool {
    match std::fs::read_to_string(hypervisor_type) {
        Ok(kind) => kind.trim_end() == "xen",
        // No hypervisor, or one that does not report its type.
        Err(_) => false,
    }
}

/// Finds out the version of Xen and of its interface.
pub(super) fn probe(raw: Arc<dyn Hypercalls>) -> Result<(Calls, XenVersion), OpenError> {
    let ask = Call::plain(sys::__HYPERVISOR_xen_version, sys::XENVER_version);
    let version = match ask.and_then(|call| raw.hypercall(call)) {
        // Major in the upper half, minor in the lower.
        Ok(version) => XenVersion {
            major: half(version >> 16),
            minor: half(version),
        },
        Err(Errno::EPERM | Errno::EACCES) => return Err(OpenError::Restricted),
        Err(errno) => {
            let op = "xen_version";
            return Err(OpenError::NoAnswer { op, errno });
        }
    };
    let XenVersion { major, minor } = version;
    // The version that this Xen should have is tried first; a custom build may have another.
    let (expected, _) = versions(minor);
    let (likely, others): (Vec<_>, Vec<_>) = INTERFACES.iter().partition(|i| i.domctl == expected);
    for interface in likely.into_iter().chain(others) {
        match speaks(&*raw, interface.domctl) {
            Ok(true) => return Ok((Calls { raw, interface }, version)),
            Ok(false) => {}
            Err(Errno::EPERM) => return Err(OpenError::NotPrivileged { major, minor }),
            Err(errno) => {
                let op = "getdomaininfo";
                return Err(OpenError::NoAnswer { op, errno });
            }
        }
    }
    // Xen returns EPERM, too, only after it has accepted the version.
    let found = OUTLANDISH.rev().find(|version| {
        !INTERFACES.iter().any(|known| known.domctl == *version)
            && !matches!(speaks(&*raw, *version), Ok(false))
    });
    Err(OpenError::UnknownInterface {
        major,
        minor,
        found,
        known: (
            INTERFACES.last().map_or(0, known),
            INTERFACES.first().map_or(0, known),
        ),
    })
}

fn known(interface: &Interface) -> u32 {
    interface.domctl
}

/// The lower sixteen bits.
fn half(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(u16::MAX)
}

/// Whether the hypervisor accepts domctls of this version: it refuses any other with EACCES, before
/// it looks at the command.
fn speaks(raw: &dyn Hypercalls, version: u32) -> Result<bool, Errno> {
    match calls::domctl(raw, version, sys::XEN_DOMCTL_getdomaininfo, 0, &[], &mut []) {
        Ok(_) => Ok(true),
        Err(Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}
