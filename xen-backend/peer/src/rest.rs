//! `libxendevicemodel.so.1`, `libxenevtchn.so.1` and `libxengnttab.so.1`: every user of libxenctrl
//! opens and closes them, but a save or a restore does not use them. All functions except open and
//! close fail with EOPNOTSUPP.
//!
//! C implementation: `tools/include/xen{devicemodel,evtchn,gnttab}.h`.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use xsr_xen_backend::Errno;

use crate::machine;

/// `*_open` and `*_close` of a library.
macro_rules! handles {
    ($($open:ident $close:ident)*) => {$(
        #[doc = concat!("`", stringify!($open), "`")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $open(_logger: *mut c_void, _flags: c_uint) -> *mut c_void {
            machine::open()
        }

        #[doc = concat!("`", stringify!($close), "`")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $close(handle: *mut c_void) -> c_int {
            machine::close(handle);
            0
        }
    )*};
}

handles! {
    xendevicemodel_open xendevicemodel_close
    xenevtchn_open xenevtchn_close
    xengnttab_open xengnttab_close
    xengntshr_open xengntshr_close
}

/// Functions that fail with -1. Pointers in the arguments are not touched: the caller cleans up.
macro_rules! refused {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: not on this machine.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> c_int {
            machine::status(Err(Errno::EOPNOTSUPP))
        }
    )*};
}

refused! {
    xendevicemodel_create_ioreq_server
    xendevicemodel_destroy_ioreq_server
    xendevicemodel_get_ioreq_server_info
    xendevicemodel_inject_event
    xendevicemodel_inject_msi
    xendevicemodel_map_io_range_to_ioreq_server
    xendevicemodel_map_pcidev_to_ioreq_server
    xendevicemodel_modified_memory
    xendevicemodel_pin_memory_cacheattr
    xendevicemodel_set_ioreq_server_state
    xendevicemodel_set_isa_irq_level
    xendevicemodel_set_mem_type
    xendevicemodel_set_pci_intx_level
    xendevicemodel_set_pci_link_route
    xendevicemodel_track_dirty_vram
    xendevicemodel_unmap_io_range_from_ioreq_server
    xendevicemodel_unmap_pcidev_from_ioreq_server
    xenevtchn_bind_interdomain
    xenevtchn_bind_unbound_port
    xenevtchn_bind_virq
    xenevtchn_fd
    xenevtchn_notify
    xenevtchn_pending
    xenevtchn_unbind
    xenevtchn_unmask
    xengntshr_unshare
    xengnttab_set_max_grants
    xengnttab_unmap
}

/// Functions that fail with a null pointer.
macro_rules! no_pages {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: not on this machine.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> *mut c_void {
            machine::set_errno(Errno::EOPNOTSUPP);
            ptr::null_mut()
        }
    )*};
}

no_pages! {
    xengntshr_share_page_notify
    xengntshr_share_pages
    xengnttab_map_domain_grant_refs
    xengnttab_map_grant_ref
    xengnttab_map_grant_ref_notify
    xengnttab_map_grant_refs
}
