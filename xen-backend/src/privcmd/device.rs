//! Device files of the hypervisor: `/dev/xen/privcmd`, `/dev/xen/hypercall` and `/dev/xen/evtchn`.
//!
//! C implementation: `tools/libs/call/linux.c`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use crate::Errno;
use nix::libc;
use xsr_format::frame::Gfn;

use super::buffer::Pool;
use super::ioctl::{HYPERCALL, Hypercall};
use super::mapping::Mapping;
use super::{Call, CallBuffer, FrameMapping, Hypercalls, Resource, events, mapping};
use crate::DomId;
use crate::pages::{Access, ForeignPages};

/// The device files through which a Linux control domain reaches the hypervisor, newest path first.
const PRIVCMD: [&str; 2] = ["/dev/xen/privcmd", "/proc/xen/privcmd"];
const BUFFERS: &str = "/dev/xen/hypercall";
const EVENTS: &str = "/dev/xen/evtchn";

/// The hypervisor of this machine.
#[derive(Debug)]
pub(crate) struct Privcmd {
    privcmd: Arc<File>,
    buffers: Arc<Pool>,
}

fn open(path: impl AsRef<Path>) -> io::Result<File> {
    // Close-on-exec, like every file that the standard library opens.
    OpenOptions::new().read(true).write(true).open(path)
}

/// `None` if the file does not exist, or no device serves it.
fn optional(opened: io::Result<File>) -> io::Result<Option<File>> {
    let absent = [Errno::ENOENT, Errno::ENXIO, Errno::ENODEV].map(|errno| errno.raw());
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error().is_some_and(|e| absent.contains(&e)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Privcmd {
    /// Open the devices; `None` if there is no privcmd.
    ///
    /// # Errors
    ///
    /// The error of `open(2)`: EACCES for a user other than root.
    pub(crate) fn open() -> io::Result<Option<Self>> {
        let mut privcmd = None;
        for path in PRIVCMD {
            privcmd = optional(open(path))?;
            if privcmd.is_some() {
                break;
            }
        }
        let Some(privcmd) = privcmd else {
            return Ok(None);
        };
        let buffers = optional(open(BUFFERS))?;
        if buffers.is_none() {
            tracing::debug!("no {BUFFERS}: hypercalls go through locked memory");
        }
        Ok(Some(Self {
            privcmd: Arc::new(privcmd),
            buffers: Arc::new(Pool::new(buffers)),
        }))
    }
}

impl Hypercalls for Privcmd {
    fn hypercall(&self, call: Call<'_>) -> Result<u64, Errno> {
        if !call.is_ours() {
            return Err(Errno::EFAULT);
        }
        let request = Hypercall {
            op: call.number().into(),
            arg: call.arguments(),
        };
        // The raw system call: ioctl(3) truncates the hypervisor's result to an int, and a frame
        // number may need more. SAFETY: the descriptor is privcmd's and `request` is what it takes.
        // The hypervisor accesses only the memory of this process that the command's addresses lead
        // to. All of these are addresses of buffers of our own pool (`is_ours`). `Call` put them in
        // where its tables list an address for the command, each with as many bytes as the
        // structure says. `call` borrows the buffers mutably, so they stay alive and are not
        // accessed until it returns.
        let returned = unsafe {
            libc::syscall(
                libc::SYS_ioctl,
                self.privcmd.as_raw_fd(),
                HYPERCALL,
                &raw const request,
            )
        };
        u64::try_from(returned).map_err(|_| Errno::last())
    }

    fn buffer(&self, bytes: usize) -> Result<CallBuffer, Errno> {
        Ok(CallBuffer::ours(self.buffers.take(bytes)?))
    }

    fn reserve(
        &self,
        domid: DomId,
        gfns: &[Gfn],
        access: Access,
    ) -> Result<Box<dyn FrameMapping>, Errno> {
        Ok(Box::new(Mapping::new(&self.privcmd, domid, gfns, access)?))
    }

    fn map_resource(&self, domid: DomId, resource: Resource) -> Result<ForeignPages, Errno> {
        mapping::resource(&self.privcmd, domid, resource)
    }

    fn notify(&self, domid: DomId, port: u32) -> Result<(), Errno> {
        let device = open(EVENTS).map_err(|error| Errno::of(&error))?;
        events::notify(&device, domid, port)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::mock::face::Face;
    use crate::mock::{HostConfig, MockHost};
    use crate::sys::common as sys;

    /// A file in place of privcmd, which refuses the ioctl.
    #[test]
    fn memory_of_another_hypervisor_is_not_for_this_one() {
        let machine = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let file = memfd_create("xsr-no-privcmd", MFdFlags::empty()).unwrap();
        let device = Privcmd {
            privcmd: Arc::new(File::from(file)),
            buffers: Arc::new(Pool::new(None)),
        };
        let face = Face::new(&machine);
        let ask = |raw: &dyn Hypercalls, from: &dyn Hypercalls| {
            let mut whole = raw.buffer(144).unwrap();
            whole.write(0, &sys::XEN_DOMCTL_getpageframeinfo3.to_le_bytes());
            let mut frames = from.buffer(8).unwrap();
            let named = &mut [&mut frames];
            device.hypercall(Call::domctl(&mut whole, named).unwrap())
        };
        assert_eq!(ask(&face, &device), Err(Errno::EFAULT));
        assert_eq!(ask(&device, &face), Err(Errno::EFAULT));
        assert_eq!(ask(&device, &device), Err(Errno::ENOTTY));
    }

    #[test]
    fn a_device_without_a_driver_is_none() {
        let failed = |errno: Errno| optional(Err(io::Error::from_raw_os_error(errno.raw())));
        for errno in [Errno::ENOENT, Errno::ENXIO, Errno::ENODEV] {
            assert!(matches!(failed(errno), Ok(None)), "{errno}");
        }
        let denied = failed(Errno::EACCES).unwrap_err();
        assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
    }
}
