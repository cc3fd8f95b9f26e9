//! TUN devices: network devices whose packets a process reads and writes. For tests, which carry
//! packets from one to another and delay, lose or cut them on the way.
//!
//! This is a crate of its own for `unsafe`: for one ioctl.

use std::fs::{File, OpenOptions};
use std::io;

use rustix::ioctl::{Opcode, Updater, ioctl};

/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: Opcode = 0x4004_54ca;

/// `IFF_TUN`: packets without a link layer. `IFF_NO_PI`: nothing before them.
const FLAGS: u16 = 0x0001 | 0x1000;

/// The longest name of a device, with its NUL (`IFNAMSIZ`).
const NAME: usize = 16;

/// `struct ifreq` of linux/if.h on 64-bit Linux.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a device of this name in the network namespace of the calling thread. It exists until the
/// file is closed, also after another namespace has been given to it. Each read takes one packet,
/// and each write sends one.
///
/// # Errors
///
/// The name is empty or too long, a device has it, or the caller may not make devices.
pub fn open(name: &str) -> io::Result<File> {
    if name.is_empty() || name.len() >= NAME {
        let why = format!("{name:?} is not the name of a device");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let mut request = Request {
        name: [0; NAME],
        flags: FLAGS,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `Request` has the size and the
    // layout of.
    let update = unsafe { Updater::<TUNSETIFF, Request>::new(&mut request) };
    // SAFETY: the kernel accesses nothing but the request, which outlives the call.
    unsafe { ioctl(&file, update) }?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_size_of_the_kernels() {
        assert_eq!(size_of::<Request>(), 40);
    }

    #[test]
    fn a_name_that_no_device_can_have_is_refused() {
        for name in ["", "sixteen-letters!"] {
            let error = open(name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }
}
