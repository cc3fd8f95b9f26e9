//! For tests only: the stable C interfaces under Xen's toolstack libraries (`libxencall.so.1`,
//! `libxenforeignmemory.so.1`, `libxendevicemodel.so.1`, `libxenevtchn.so.1`, `libxengnttab.so.1`),
//! on the hypercall face of a mock machine. Debian's unmodified `libxl-save-helper`, started with
//! `LD_LIBRARY_PATH`, then saves and restores mock domains: `cargo xtask peer`.
//!
//! `XSR_PEER_HOST` names the directory of the machine. It is open from the first `*_open` to the
//! last `*_close` of the process; if `XSR_PEER_COUNTS` names a file, the numbers of hypercalls and
//! of mappings are written there at the end. The program that plays libxl suspends a guest
//! beforehand, or requests it during a live save, with the file that `XSR_PEER_REQUESTS` names.
//!
//! Contains `unsafe` code because its callers are C: they pass arrays as pointers.

pub mod call;
pub mod foreign_memory;
mod machine;
mod memory;
pub mod rest;
