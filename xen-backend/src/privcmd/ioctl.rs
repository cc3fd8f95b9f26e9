//! The ioctls of `/dev/xen/privcmd` and `/dev/xen/evtchn`, and the structures they
//! take: Linux's, in `include/uapi/xen/privcmd.h` and `include/uapi/xen/evtchn.h`.
//!
//! C implementation: the same headers.

use nix::libc::{c_int, c_ulong};

/// `struct privcmd_hypercall`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Hypercall {
    pub(super) op: u64,
    pub(super) arg: [u64; 5],
}

/// `struct privcmd_mmapbatch_v2`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct MmapBatch {
    /// The number of pages.
    pub(super) num: u32,
    pub(super) dom: u16,
    /// The address of the first.
    pub(super) addr: u64,
    pub(super) arr: *const u64,
    /// For each page, 0 or a negative errno.
    pub(super) err: *mut c_int,
}

/// `struct privcmd_mmap_resource`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct MmapResource {
    pub(super) dom: u16,
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) idx: u32,
    pub(super) num: u64,
    pub(super) addr: u64,
}

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct BindInterdomain {
    pub(super) remote_domain: u32,
    pub(super) remote_port: u32,
}

/// `struct ioctl_evtchn_notify` and `_unbind`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Port {
    pub(super) port: u32,
}

/// The number of an ioctl without a data direction, as all of these are: size, letter, number
/// (`_IOC(_IOC_NONE, …)`).
const fn request<T>(letter: u8, number: u8) -> c_ulong {
    // At most 48 bytes: the cast does not truncate.
    (size_of::<T>() as c_ulong) << 16 | (letter as c_ulong) << 8 | number as c_ulong
}

pub(super) const HYPERCALL: c_ulong = request::<Hypercall>(b'P', 0);
const MMAPBATCH_V2: c_ulong = request::<MmapBatch>(b'P', 4);
const MMAP_RESOURCE: c_ulong = request::<MmapResource>(b'P', 7);
const BIND_INTERDOMAIN: c_ulong = request::<BindInterdomain>(b'E', 1);
const UNBIND: c_ulong = request::<Port>(b'E', 3);
const NOTIFY: c_ulong = request::<Port>(b'E', 4);

/// An ioctl that no kernel has (`IOCTL_PRIVCMD_UNIMPLEMENTED`). Its errno is that of every unknown
/// ioctl; for older kernels that is EINVAL.
pub(super) const UNIMPLEMENTED: c_ulong = (b'P' as c_ulong) << 8 | 0xff;

nix::ioctl_none_bad!(
    /// Call the unimplemented ioctl.
    unimplemented,
    UNIMPLEMENTED
);
nix::ioctl_readwrite_bad!(
    /// Map foreign frames.
    mmap_batch,
    MMAPBATCH_V2,
    MmapBatch
);
nix::ioctl_readwrite_bad!(
    /// Map a resource.
    mmap_resource,
    MMAP_RESOURCE,
    MmapResource
);
nix::ioctl_readwrite_bad!(
    /// Bind one of our ports to a port that another domain offers us; returns ours.
    bind_interdomain,
    BIND_INTERDOMAIN,
    BindInterdomain
);
nix::ioctl_readwrite_bad!(
    /// Unbind a port.
    unbind,
    UNBIND,
    Port
);
nix::ioctl_readwrite_bad!(
    /// Signal the other end of a port.
    notify,
    NOTIFY,
    Port
);

#[cfg(test)]
mod tests {
    use super::*;

    /// The values that a C compiler computes from the kernel's headers.
    #[test]
    fn numbers_and_sizes_are_the_kernels() {
        assert_eq!(HYPERCALL, 0x30_5000);
        assert_eq!(MMAPBATCH_V2, 0x20_5004);
        assert_eq!(MMAP_RESOURCE, 0x20_5007);
        assert_eq!(UNIMPLEMENTED, 0x50ff);
        assert_eq!(BIND_INTERDOMAIN, 0x8_4501);
        assert_eq!(UNBIND, 0x4_4503);
        assert_eq!(NOTIFY, 0x4_4504);
    }
}
