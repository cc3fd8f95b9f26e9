//! The engine that saves and restores Xen domains, and migrates them between hosts.
//!
//! It needs a hypervisor ([`xsr_xen_backend`]: a real Xen, or a mock machine that runs anywhere), a
//! place for the bytes, and a [toolstack]: the few callbacks through which the engine asks its caller
//! to suspend the guest or to tell xenstore where the rings are.
//!
//! # Layers
//!
//! ```text
//!            two hosts: migrate::{MigrateRequest, ReceiveRequest, ProtectRequest}
//!                       messages, ownership, Connection (pipe, Unix socket, TCP)
//!                          │                                    │
//!  domain ──► SaveRequest ─┴─► PageSink ──► bytes ──► PageSource ─┴─► RestoreRequest ──► domain
//!    ▲            │              │                       │                 │              ▲
//!    │        toolstack       descriptor,             descriptor,      toolstack          │
//!    │                        storage, any Write      storage, any Read                   │
//!    └───────────────────────── xsr_xen_backend::Domain ──────────────────────────────────┘
//! ```
//!
//! | I want to … | use |
//! |---|---|
//! | save a domain: still, live, or checkpoint after checkpoint | [`SaveRequest`] |
//! | restore a domain from such a stream | [`RestoreRequest`] |
//! | migrate or protect a domain, with xl's messages on the wire | [`migrate`] |
//! | store an image so that it appears completely or not at all | [`storage`] |
//! | write into, and read from, a descriptor without a copy | [`FdSink`](sink::FdSink), [`FdSource`](source::FdSource) |
//! | write into, and read from, anything else | [`CopySink`](sink::CopySink), [`CopySource`](source::CopySource) |
//! | show progress, cancel from another thread | [`progress`] |
//! | decide when a live save suspends the guest | [`save::precopy`] |
//!
//! The bytes are those of Xen's own engine. They do not depend on the number of threads. If a save
//! fails, in any phase, the guest runs on; if a restore fails, its caller destroys the domain.
//! The headers around the stream (xl's and libxl's) are in [`xsr_format`].
//!
//! # Saving and restoring a domain
//!
//! ```
//! use xsr_format::read::{ReadOptions, RecordReader};
//! use xsr_save_restore::sink::CopySink;
//! use xsr_save_restore::source::CopySource;
//! use xsr_save_restore::toolstack::DirectToolstack;
//! use xsr_save_restore::{RestoreRequest, Rings, SaveRequest};
//! use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
//! use xsr_xen_backend::{DomId, GuestKind, Host};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A machine with a running guest. `XenHost::open()` opens the Xen of this machine.
//! let host = MockHost::ephemeral(&HostConfig::default())?;
//! let web = host.domain(host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?)?;
//!
//! // Save. The guest is suspended afterwards, until the caller decides what becomes of it.
//! let mut image = Vec::new();
//! let mut toolstack = DirectToolstack(&*web);
//! let saved = SaveRequest::new(&*web, host.xen_version()?)
//!     .write_stream(&mut toolstack, &mut CopySink(&mut image))?;
//! saved.resume()?;
//!
//! // Restore into a new domain, which is paused afterwards.
//! let info = web.info()?;
//! let copy = host.create_domain(info.kind, info.max_vcpu_id + 1, info.max_pages)?;
//! let copy = host.domain(copy)?;
//! let rings = Rings {
//!     store_port: copy.alloc_unbound_port(DomId(0))?,
//!     store_domid: DomId(0),
//!     console_port: copy.alloc_unbound_port(DomId(0))?,
//!     console_domid: DomId(0),
//! };
//! let reader = RecordReader::new(CopySource(&image[..]), ReadOptions::default())?;
//! let (restored, _) =
//!     RestoreRequest::new(&*copy, rings).read_stream(reader, &mut DirectToolstack(&*copy))?;
//! assert_eq!(copy.info()?.tot_pages, info.tot_pages);
//! copy.unpause()?;
//! # assert!(restored.store_gfn.is_some());
//! # Ok(())
//! # }
//! ```
//!
//! `examples/` has complete programs: a save with progress and cancellation, a restore, and a
//! migration between two machines.
//!
//! # Under an async runtime
//!
//! A save or restore blocks: in hypercalls, and in reads and writes of its descriptor. Run it with
//! `spawn_blocking`, and cancel it with a [`Cancel`](progress::Cancel), which ends it within a
//! fraction of a second wherever it waits.
//!
//! C implementation: `tools/libs/guest/xg_sr_*.c`.

#![forbid(unsafe_code)]

pub mod at_freeze;
pub mod back_channel;
mod bitmap;
mod descriptor;
pub mod error;
mod guest;
pub mod inherited;
pub mod migrate;
pub mod pace;
mod pipeline;
pub mod plan;
pub mod progress;
pub mod restore;
pub mod save;
pub mod signals;
pub mod sink;
pub mod source;
pub mod storage;
pub mod text;
pub mod toolstack;

pub use error::{RestoreError, SaveError};
pub use restore::{CpuCheck, RestoreRequest, Restored, Rings};
pub use save::{Live, SaveOptions, SaveRequest, Saved};

// An example is a module of the tests, and names this package as any other user does.
#[cfg(test)]
extern crate self as xsr_save_restore;
