//! Legacy streams, version 1 (Xen 4.5 and earlier): reading them and converting them to version 3.
//!
//! | module | what it does |
//! |---|---|
//! | [`detect`] | the width of the toolstack that wrote it |
//! | [`chunk`] | the markers of chunks |
//! | [`read`] | the pull parser |
//! | `compress` | pages that Remus sent as differences |
//! | `toolstack` | libxl's physmap in the toolstack chunk |
//! | [`convert`] | the same guest as a stream of version 3 |
//!
//! A specification never existed. Layout: `tools/python/xen/migration/legacy.py`. What a saver
//! writes and a restorer accepts: `tools/libxc/xc_domain_save.c` and `xc_domain_restore.c` as of
//! Xen 4.5. Specification of the conversion: libxc migration stream, "Legacy Images".

pub mod chunk;
mod compress;
pub mod convert;
pub mod detect;
pub mod error;
mod items;
pub mod read;
mod tmem;
mod toolstack;

pub use convert::{Converted, Target};
pub use error::LegacyError;
pub use items::{Batch, ExtendedInfo, Item, QemuRecord, Vcpu};
pub use read::{Checkpoints, LegacyGuest, LegacyOptions, LegacyReader};
