//! `libxencall.so.1`.
//!
//! C implementation: `tools/include/xencall.h`, `tools/libs/call/core.c`.

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::sync::atomic::Ordering;

use xsr_format::frame::PAGE_SIZE;

use crate::machine::{self, HYPERCALLS};
use crate::memory::BUFFERS;

/// Make a hypercall.
fn call(number: c_uint, arguments: [u64; 5]) -> i64 {
    HYPERCALLS.fetch_add(1, Ordering::Relaxed);
    let answer = machine::face().and_then(|face| {
        machine::requests(&face);
        face.hypercall(number, arguments)
    });
    machine::returned(answer)
}

/// The library's functions return an int.
fn int(returned: i64) -> c_int {
    c_int::try_from(returned).unwrap_or(c_int::MAX)
}

/// `xencall_open`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
    machine::open()
}

/// `xencall_close`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_close(handle: *mut c_void) -> c_int {
    machine::close(handle);
    0
}

/// `xencall_fd`: there is no descriptor.
#[unsafe(no_mangle)]
pub extern "C" fn xencall_fd(_handle: *mut c_void) -> c_int {
    -1
}

/// `xencall0`
#[unsafe(no_mangle)]
pub extern "C" fn xencall0(_handle: *mut c_void, op: c_uint) -> c_int {
    int(call(op, [0; 5]))
}

/// `xencall1`
#[unsafe(no_mangle)]
pub extern "C" fn xencall1(_handle: *mut c_void, op: c_uint, a: u64) -> c_int {
    int(call(op, [a, 0, 0, 0, 0]))
}

/// `xencall2`
#[unsafe(no_mangle)]
pub extern "C" fn xencall2(_handle: *mut c_void, op: c_uint, a: u64, b: u64) -> c_int {
    int(call(op, [a, b, 0, 0, 0]))
}

/// `xencall2L`
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the name is C's")]
pub extern "C" fn xencall2L(_handle: *mut c_void, op: c_uint, a: u64, b: u64) -> c_long {
    call(op, [a, b, 0, 0, 0])
}

/// `xencall3`
#[unsafe(no_mangle)]
pub extern "C" fn xencall3(_handle: *mut c_void, op: c_uint, a: u64, b: u64, c: u64) -> c_int {
    int(call(op, [a, b, c, 0, 0]))
}

/// `xencall4`
#[unsafe(no_mangle)]
pub extern "C" fn xencall4(
    _handle: *mut c_void,
    op: c_uint,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
) -> c_int {
    int(call(op, [a, b, c, d, 0]))
}

/// `xencall5`
#[unsafe(no_mangle)]
pub extern "C" fn xencall5(
    _handle: *mut c_void,
    op: c_uint,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    e: u64,
) -> c_int {
    int(call(op, [a, b, c, d, e]))
}

/// `xencall_alloc_buffer`: bytes, rounded up to pages.
#[unsafe(no_mangle)]
pub extern "C" fn xencall_alloc_buffer(_handle: *mut c_void, bytes: usize) -> *mut c_void {
    BUFFERS.take(bytes.div_ceil(PAGE_SIZE))
}

/// `xencall_free_buffer`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_free_buffer(_handle: *mut c_void, base: *mut c_void) {
    BUFFERS.free(base);
}

/// `xencall_alloc_buffer_pages`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_alloc_buffer_pages(_handle: *mut c_void, pages: usize) -> *mut c_void {
    BUFFERS.take(pages)
}

/// `xencall_free_buffer_pages`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_free_buffer_pages(
    _handle: *mut c_void,
    base: *mut c_void,
    _pages: usize,
) {
    BUFFERS.free(base);
}

/// `xencall_buffers_never_fault`
#[unsafe(no_mangle)]
pub extern "C" fn xencall_buffers_never_fault(_handle: *mut c_void) -> c_int {
    1
}
