//! Pieces of a legacy stream, as the reader returns them.

use crate::frame::{Page, PageEntry, Pfn};
use crate::record::hvm::HvmParam;
use crate::record::x86::TscInfo;

/// Maximum number of pages of a compressed checkpoint that wait for their contents: the saver
/// buffered 8192 (`PAGE_BUFFER_SIZE` of `xc_compression.c`), and could then be in the middle of a
/// batch.
pub(super) const MAX_PENDING_PAGES: usize = 8192 + 1024;

/// One piece of a legacy stream.
#[derive(Clone, Debug)]
pub enum Item {
    /// PV: properties of the vcpus.
    ExtendedInfo(ExtendedInfo),
    /// PV: the pfns of the frames of the p2m.
    P2mFrames(Vec<Pfn>),
    /// Pages. Their contents follow, unless the checkpoint is compressed.
    Batch(Batch),
    /// From here on, pages are sent again for comparison.
    Verify,
    /// The vcpus that are present, ascending.
    VcpuInfo(Vec<u32>),
    /// An HVM parameter.
    HvmParam(HvmParam),
    /// Transcendent memory, which was skipped.
    Tmem {
        /// Bytes after the marker.
        bytes: u64,
    },
    /// The TSC.
    TscInfo(TscInfo),
    /// The current checkpoint is the last.
    LastCheckpoint,
    /// Pages of the next checkpoint are compressed.
    EnableCompression,
    /// A record of the toolstack.
    Toolstack(Vec<u8>),
    /// Compressed contents of pages, which follow.
    Compressed {
        /// Number of bytes.
        bytes: u64,
    },
    /// The body of the checkpoint has ended.
    BodyEnd,
    /// PV: pfns without memory, which were skipped: Xen's converter calls them bogus.
    Unmapped {
        /// Number of pfns.
        count: u32,
    },
    /// PV: the state of a vcpu.
    Vcpu(Vcpu),
    /// PV: the shared info page.
    SharedInfo(Box<Page>),
    /// HVM: three parameters: the I/O request pages and xenstore's page.
    MagicPfns([HvmParam; 3]),
    /// HVM: Xen's state.
    HvmContext(Vec<u8>),
    /// HVM: the device model's state.
    Qemu(QemuRecord),
    /// The tail has ended: the checkpoint is complete.
    CheckpointEnd,
}

/// The contents of the extended info.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtendedInfo {
    /// Width of the guest in bytes, 4 or 8, if there is a vcpu context.
    pub guest_width: Option<u8>,
    /// Whether each vcpu has 128 bytes of extended state.
    pub extended: bool,
    /// Size of each vcpu's XSAVE record, including its 16-byte header; 0 for none.
    pub xsave: u32,
    /// Unknown blocks, which were skipped.
    pub unknown_blocks: u32,
}

/// A batch of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The entries, without filler.
    pub entries: Vec<PageEntry>,
    /// Number of entries with contents.
    pub pages: u64,
    /// Entries without meaning (0xF0000000), which were left out.
    pub filler: u32,
    /// Whether the contents follow immediately.
    pub with_contents: bool,
}

/// The state of a PV vcpu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its number.
    pub vcpu: u32,
    /// `vcpu_guest_context_t` in the guest's width.
    pub basic: Vec<u8>,
    /// 128 bytes, or empty.
    pub extended: Vec<u8>,
    /// The XSAVE area, without its header.
    pub xsave: Vec<u8>,
}

/// The device model's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuRecord {
    /// Its signature, one of three.
    pub signature: [u8; 21],
    /// The state.
    pub state: Vec<u8>,
}

impl QemuRecord {
    /// Signature of state that extends to the end of the file.
    pub const UP_TO_THE_END: [u8; 21] = *b"QemuDeviceModelRecord";
    /// Signature of state preceded by its length.
    pub const WITH_LENGTH: [u8; 21] = *b"DeviceModelRecord0002";
    /// The same, in a checkpoint.
    pub const REMUS: [u8; 21] = *b"RemusDeviceModelState";
}
