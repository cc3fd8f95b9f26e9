//! The Xen domain save image format: conversion between bytes and typed values.
//!
//! This crate reads and writes the file of `xl save`, the stream of a migration, and what other
//! toolstacks put around them. It works on [`Read`](std::io::Read), [`Write`](std::io::Write) and
//! slices. It opens no file, starts no thread, makes no call to Xen and has no `unsafe` code, so it
//! builds wherever Rust's standard library does.
//!
//! # Layers
//!
//! An image is up to three layers, one inside the other. Each reader takes exactly the bytes of its
//! own layer and hands the source on.
//!
//! ```text
//! xl header          libxl stream                        libxc stream
//! ┌───────────────┐
//! │ flags         │  ┌────────┐
//! │ configuration │  │ header │
//! └───────────────┘  ├────────┴──────┐  ┌─────────────────────────┐
//!                    │ LIBXC_CONTEXT │  │ image and domain header │
//!                    └───────────────┘  ├─────────────────────────┤
//!                                       │ records: PAGE_DATA, …   │
//!                                       │ END                     │
//!                    ┌───────────────┐  └─────────────────────────┘
//!                    │ emulators'    │
//!                    │ records, END  │
//!                    └───────────────┘
//! ```
//!
//! | I want to … | use |
//! |---|---|
//! | read any image, through all its layers | [`Walk`] |
//! | know what domain an image needs | [`survey`](survey::Survey) |
//! | copy an image, and change records on the way | [`rewrite`](rewrite::rewrite) |
//! | convert an image to what Xen writes today | [`transcode`](transcode::transcode) |
//! | read a bare libxc stream, from a file, pipe or socket | [`RecordReader`] |
//! | read one that is in memory, without a copy | [`SliceReader`] |
//! | write a libxc stream | [`RecordWriter`] |
//! | write the layers around it | [`XlHeader`], [`LibxlWriter`] |
//! | know what a file is | [`detect`](detect::detect) |
//! | remove the wrapper of libvirt, xapi or xend | [`wrapper`] |
//! | read a stream of Xen 4.5 or earlier | [`legacy`] |
//! | understand a guest's state | [`GuestImage`], [`fields`], [`cpu_policy`] |
//! | read single pages of a large file | [`layout`] |
//!
//! # Reading an image
//!
//! ```
//! use xsr_format::{Content, ReadError, ReadOptions, Walk};
//!
//! /// Counts the pages with contents.
//! fn pages(source: impl std::io::Read) -> Result<u64, ReadError> {
//!     let mut walk = Walk::open(source, ReadOptions::default())?;
//!     let mut pages = 0;
//!     while let Some(step) = walk.next_step()? {
//!         if let Content::PageData(body) = step.content {
//!             pages += body.pages();
//!         }
//!     }
//!     Ok(pages)
//! }
//! # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
//! # assert_eq!(pages(&doc::image()[..])?, 1);
//! # Ok::<(), ReadError>(())
//! ```
//!
//! `body.read_page` reads the contents of a page; contents that are not read are skipped, with
//! [`Walk::open_seeking`] without reading them.
//!
//! # Writing an image
//!
//! ```
//! use xsr_format::{
//!     DomainHeader, GuestType, PAGE_SIZE, PageEntry, PageType, Pfn, RecordWriter, WriteError,
//! };
//!
//! # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
//! # use doc::CONTEXT;
//! # fn main() -> Result<(), WriteError> {
//! let domain = DomainHeader { guest_type: GuestType::X86_HVM, xen_major: 4, xen_minor: 20 };
//! let mut stream = RecordWriter::new(Vec::new(), domain)?;
//! stream.static_data_end()?;
//! let entry = PageEntry { pfn: Pfn(0x1000), page_type: PageType::NOTAB };
//! stream.page_data(&[entry], &[&[0x90; PAGE_SIZE]])?;
//! stream.hvm_context(&CONTEXT)?;
//! stream.end()?;
//! let image = stream.into_sink();
//! # assert_eq!(image, doc::image());
//! # Ok(())
//! # }
//! ```
//!
//! `CONTEXT` is what Xen returns for `XEN_DOMCTL_gethvmcontext`. The writer knows the encoding of each record, not the order of records: reading the result tells
//! whether a restorer would accept it.
//!
//! # What strict means
//!
//! A reader refuses whatever the specification forbids, also where Xen's own reader does not look:
//! an unknown mandatory record, a record in the wrong place, a length that does not fit, and
//! reserved fields or padding that are not zero. [`ReadOptions::lenient`] tolerates the last of
//! these, and nothing else. Each broken rule is a variant of [`DecodeError`], and [`ReadError`] says
//! in which record it was broken and at which byte of the file.
//!
//! Values that the format leaves open stay open: an unknown optional record, page type or guest type
//! is a value like any other, and is refused only where it would be used.
//!
//! No input makes this crate panic or allocate much more memory than has arrived. Lengths in the
//! input are never trusted with an allocation.
//!
//! # Under an async runtime
//!
//! The readers and writers are synchronous. One thread reads an image from start to end, and the
//! hypervisor calls of a restorer block that thread as well, so an async interface would gain
//! nothing. Run a reader on a thread of its own: under tokio, with `spawn_blocking`. Give it the
//! blocking form of the socket (`into_std`, then `set_nonblocking(false)`). All types are `Send` if
//! their source is, and hold no locks.
//!
//! # Features
//!
//! None is enabled by default.
//!
//! | feature | what it adds | dependency |
//! |---|---|---|
//! | `config` | the module `config`: the domain's configuration in an xl image as typed values | serde_json |

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

pub mod byte_order;
#[cfg(feature = "config")]
pub mod config;
pub mod core_dump;
pub mod cpu_policy;
mod decoder;
pub mod detect;
pub mod error;
pub mod fields;
pub mod frame;
pub mod guest_image;
pub mod image;
pub mod layout;
pub mod legacy;
pub mod order;
pub mod read;
pub mod record;
pub mod rewrite;
pub mod slice;
mod source;
pub mod survey;
pub mod transcode;
pub mod walk;
mod wire;
pub mod wrapper;
pub mod write;

pub use detect::Detected;
pub use error::{DecodeError, ReadError, WriteError};
pub use frame::{PAGE_SIZE, Page, PageEntry, PageType, Pfn};
pub use guest_image::GuestImage;
pub use image::{DomainHeader, GuestType, ImageHeader, Version};
pub use read::{Incoming, PageDataBody, ReadOptions, RecordReader};
pub use record::pv::PvInfo;
pub use record::{Body, Record, RecordKind};
pub use slice::{SliceReader, SliceRecord};
pub use walk::{Content, Step, Walk};
pub use wrapper::libxl::{LibxlReader, LibxlRecord, LibxlWriter};
pub use wrapper::xl::XlHeader;
pub use write::RecordWriter;
