//! `libxenforeignmemory.so.1`.
//!
//! C implementation: `tools/include/xenforeignmemory.h`,
//! `tools/libs/foreignmemory/{core,linux}.c`.

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering;

use nix::libc;
use nix::sys::mman::munmap;
use xsr_format::frame::{Gfn, PAGE_SIZE};
use xsr_xen_backend::Access;
use xsr_xen_backend::Errno;

use crate::machine::{self, MAPS};

/// A mapped resource.
#[derive(Debug)]
pub struct Resource {
    base: NonNull<u8>,
    frames: usize,
}

fn failed<T>(errno: Errno) -> *mut T {
    machine::set_errno(errno);
    ptr::null_mut()
}

/// `xenforeignmemory_open`
#[unsafe(no_mangle)]
pub extern "C" fn xenforeignmemory_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    machine::open()
}

/// `xenforeignmemory_close`
#[unsafe(no_mangle)]
pub extern "C" fn xenforeignmemory_close(handle: *mut c_void) -> c_int {
    machine::close(handle);
    0
}

/// `xenforeignmemory_restrict`: not supported.
#[unsafe(no_mangle)]
pub extern "C" fn xenforeignmemory_restrict(_handle: *mut c_void, _domid: u16) -> c_int {
    machine::status(Err(Errno::EOPNOTSUPP))
}

/// `xenforeignmemory_map2`, at an address of the kernel's choice.
///
/// # Safety
///
/// `frames` has `pages` elements, and so has `errors` unless it is null.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the interface is C's")]
pub unsafe extern "C" fn xenforeignmemory_map2(
    handle: *mut c_void,
    domid: u32,
    address: *mut c_void,
    prot: c_int,
    flags: c_int,
    pages: usize,
    frames: *const c_ulong,
    errors: *mut c_int,
) -> *mut c_void {
    if !address.is_null() || flags & libc::MAP_FIXED != 0 {
        return failed(Errno::EOPNOTSUPP);
    }
    // SAFETY: the caller guarantees it.
    unsafe { xenforeignmemory_map(handle, domid, prot, pages, frames, errors) }
}

/// `xenforeignmemory_map`: with `errors`, it succeeds even if single frames fail, and reports each
/// frame's error.
///
/// # Safety
///
/// `frames` has `pages` elements, and so has `errors` unless it is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_map(
    _handle: *mut c_void,
    domid: u32,
    prot: c_int,
    pages: usize,
    frames: *const c_ulong,
    errors: *mut c_int,
) -> *mut c_void {
    MAPS.fetch_add(1, Ordering::Relaxed);
    if pages == 0 || frames.is_null() {
        return failed(Errno::EINVAL);
    }
    // SAFETY: not null, and of `pages` elements as the caller guarantees, and not changed during
    // the call.
    let frames = unsafe { std::slice::from_raw_parts(frames, pages) };
    let gfns: Vec<Gfn> = frames.iter().copied().map(Gfn).collect();
    let access = match prot & libc::PROT_WRITE {
        0 => Access::Read,
        _ => Access::Write,
    };
    let mapped = match machine::face().and_then(|face| face.map(domid, &gfns, access)) {
        Ok(mapped) => mapped,
        Err(errno) => return failed(errno),
    };
    match NonNull::new(errors) {
        None => {
            if let Some(error) = mapped.failed().first() {
                return failed(error.errno);
            }
        }
        Some(errors) => {
            // SAFETY: not null, and of `pages` elements that the caller lets us write.
            let errors = unsafe { std::slice::from_raw_parts_mut(errors.as_ptr(), pages) };
            errors.fill(0);
            for error in mapped.failed() {
                errors[error.index] = -(error.errno.raw());
            }
        }
    }
    mapped.into_raw().as_ptr().cast()
}

/// `xenforeignmemory_unmap`
///
/// # Safety
///
/// The pages were mapped by one of the above, and nothing refers to them any longer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_unmap(
    _handle: *mut c_void,
    base: *mut c_void,
    pages: usize,
) -> c_int {
    let Some(base) = NonNull::new(base) else {
        return machine::status(Err(Errno::EINVAL));
    };
    // SAFETY: a mapping of that many pages, which the caller no longer uses.
    machine::status(unsafe { munmap(base, pages * PAGE_SIZE) }.map_err(Errno::from))
}

/// `xenforeignmemory_map_resource`
///
/// # Safety
///
/// `address` points to an address: null, which lets the kernel choose; nothing else is supported.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the interface is C's")]
pub unsafe extern "C" fn xenforeignmemory_map_resource(
    _handle: *mut c_void,
    domid: u16,
    kind: c_uint,
    id: c_uint,
    first: c_ulong,
    frames: c_ulong,
    address: *mut *mut c_void,
    _prot: c_int,
    _flags: c_int,
) -> *mut Resource {
    MAPS.fetch_add(1, Ordering::Relaxed);
    let Ok(frames) = usize::try_from(frames) else {
        return failed(Errno::EINVAL);
    };
    let face = machine::face();
    let mapped = face.and_then(|face| face.map_resource(domid, kind, id, first, frames));
    let base = match mapped {
        Ok(mapped) => mapped.into_raw(),
        Err(errno) => return failed(errno),
    };
    // SAFETY: the caller's variable for the address.
    unsafe { address.write(base.as_ptr().cast()) };
    Box::into_raw(Box::new(Resource { base, frames }))
}

/// `xenforeignmemory_unmap_resource`
///
/// # Safety
///
/// `resource` was mapped by the above, and nothing refers to its pages any longer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_unmap_resource(
    _handle: *mut c_void,
    resource: *mut Resource,
) -> c_int {
    if resource.is_null() {
        return 0;
    }
    // SAFETY: made by `Box::into_raw` above, and no longer used by the caller.
    let resource = unsafe { Box::from_raw(resource) };
    // SAFETY: the mapping of that many pages, which ends with the resource.
    machine::status(
        unsafe { munmap(resource.base.cast(), resource.frames * PAGE_SIZE) }.map_err(Errno::from),
    )
}

/// `xenforeignmemory_resource_size`: not supported.
#[unsafe(no_mangle)]
pub extern "C" fn xenforeignmemory_resource_size(
    _handle: *mut c_void,
    _domid: u16,
    _kind: c_uint,
    _id: c_uint,
    _size: *mut usize,
) -> c_int {
    machine::status(Err(Errno::EOPNOTSUPP))
}
