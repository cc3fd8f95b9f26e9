//! The legacy stream, version 1 (Xen 4.5 and earlier).
//!
//! Specification: libxc migration stream, "Legacy Images". Layout:
//! `tools/python/xen/migration/legacy.py`.

pub mod detect;
