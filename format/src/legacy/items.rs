//! What a legacy stream holds, piece by piece, as the reader hands it out.

use crate::frame::{Page, PageEntry, Pfn};
use crate::record::hvm::HvmParam;
use crate::record::x86::TscInfo;

/// How many pages of a compressed checkpoint may wait for their contents: the saver
/// buffered 8192 (`PAGE_BUFFER_SIZE` of `xc_compression.c`), and was in the middle of a
/// batch then.
pub(super) const MAX_PENDING_PAGES: usize = 8192 + 1024;

/// One piece of a legacy stream.
#[derive(Clone, Debug)]
pub enum Item {
    /// PV: what is said of the vcpus before anything else.
    ExtendedInfo(ExtendedInfo),
    /// PV: the pfns of the frames of the p2m.
    P2mFrames(Vec<Pfn>),
    /// Pages. Their contents follow, unless the checkpoint is a compressed one.
    Batch(Batch),
    /// From here on pages come again, to be compared.
    Verify,
    /// The vcpus that are present, ascending.
    VcpuInfo(Vec<u32>),
    /// An HVM parameter.
    HvmParam(HvmParam),
    /// Transcendent memory: so many bytes of it were passed over.
    Tmem {
        /// Bytes behind the marker.
        bytes: u64,
    },
    /// The TSC.
    TscInfo(TscInfo),
    /// This checkpoint is the last.
    LastCheckpoint,
    /// Pages of the next checkpoint are compressed.
    EnableCompression,
    /// A toolstack's record.
    Toolstack(Vec<u8>),
    /// Contents of pages, compressed; so many bytes follow.
    Compressed {
        /// How many.
        bytes: u64,
    },
    /// The body of the checkpoint is over.
    BodyEnd,
    /// PV: pfns without memory. They were passed over: Xen's converter calls them bogus.
    Unmapped {
        /// How many.
        count: u32,
    },
    /// PV: the state of a vcpu.
    Vcpu(Vcpu),
    /// PV: the shared info page.
    SharedInfo(Box<Page>),
    /// HVM: three parameters: I/O request pages and xenstore's page.
    MagicPfns([HvmParam; 3]),
    /// HVM: Xen's state.
    HvmContext(Vec<u8>),
    /// HVM: the device model's state.
    Qemu(QemuRecord),
    /// The tail is over: the checkpoint is complete.
    CheckpointEnd,
}

/// What the extended info says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtendedInfo {
    /// Width of the guest in bytes, 4 or 8, where there is a vcpu context.
    pub guest_width: Option<u8>,
    /// Whether each vcpu has 128 bytes of extended state.
    pub extended: bool,
    /// Bytes of each vcpu's XSAVE record, its head of 16 bytes included; 0 for none.
    pub xsave: u32,
    /// Blocks that nobody knows, passed over.
    pub unknown_blocks: u32,
}

/// A batch of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The entries, without filler.
    pub entries: Vec<PageEntry>,
    /// How many entries have contents.
    pub pages: u64,
    /// Entries that say nothing (0xF0000000), left out.
    pub filler: u32,
    /// Whether the contents follow at once.
    pub with_contents: bool,
}

/// The state of a PV vcpu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its number.
    pub vcpu: u32,
    /// `vcpu_guest_context_t` of the guest's width.
    pub basic: Vec<u8>,
    /// 128 bytes, or none.
    pub extended: Vec<u8>,
    /// The XSAVE area, without the head in front of it.
    pub xsave: Vec<u8>,
}

/// The device model's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuRecord {
    /// Which of the three signatures it had.
    pub signature: [u8; 21],
    /// The state.
    pub state: Vec<u8>,
}

impl QemuRecord {
    /// State up to the end of the file.
    pub const UP_TO_THE_END: [u8; 21] = *b"QemuDeviceModelRecord";
    /// A length, then the state.
    pub const WITH_LENGTH: [u8; 21] = *b"DeviceModelRecord0002";
    /// The same, of a checkpoint.
    pub const REMUS: [u8; 21] = *b"RemusDeviceModelState";
}
