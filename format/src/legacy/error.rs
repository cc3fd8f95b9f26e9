//! Errors of the legacy stream, one variant for each rule.

use thiserror::Error;

use super::chunk::Marker;
use super::detect::{LegacyDetectError, MAX_BATCH, MAX_P2M_SIZE};
use super::items::MAX_PENDING_PAGES;
use crate::error::WriteError;
use crate::frame::{PageType, Pfn};

/// A broken rule of the legacy stream.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LegacyError {
    /// No legacy saver wrote this.
    #[error(transparent)]
    Detect(#[from] LegacyDetectError),
    /// A size that no saver accepted.
    #[error("p2m_size is {got:#x}, expected 1 to {MAX_P2M_SIZE:#x}")]
    P2mSize {
        /// The value found.
        got: u64,
    },
    /// The stream of neither a PV nor an HVM guest.
    #[error(
        "after p2m_size comes {got:#010x}, expected 0xffffffff (a PV guest's extended info), \
         a page count or a chunk (an HVM guest), or a pfn below p2m_size (an old PV guest's p2m)"
    )]
    GuestUnclear {
        /// The value found.
        got: u32,
    },
    /// An incomplete mark of the extended info.
    #[error("extended info begins with {got:#018x}, expected 0xffffffffffffffff")]
    ExtendedInfoMark {
        /// The value found.
        got: u64,
    },
    /// A block that does not fit in the extended info.
    #[error(
        "extended info: block {:?} has {length} bytes, but {left} are left",
        name.escape_ascii().to_string()
    )]
    BlockTooLong {
        /// Its name.
        name: [u8; 4],
        /// Its length field.
        length: u32,
        /// Bytes of the extended info that are left.
        left: u32,
    },
    /// The rest of the extended info is too short for a block.
    #[error("extended info: {left} bytes are left, expected none or 8 and more")]
    BlockCut {
        /// Bytes that are left.
        left: u32,
    },
    /// A block that occurs twice.
    #[error("extended info: block {:?} for the second time", name.escape_ascii().to_string())]
    BlockRepeated {
        /// Its name.
        name: [u8; 4],
    },
    /// A vcpu context of an impossible size.
    #[error(
        "extended info: the vcpu context has {got:#x} bytes, expected 0xaf0 (32-bit guest) or \
         0x1430 (64-bit guest)"
    )]
    VcpuContext {
        /// The value found.
        got: u32,
    },
    /// An XSAVE area of an impossible size.
    #[error("extended info: the XSAVE area has {got:#x} bytes, expected 0, or 0x10 to {max:#x}")]
    XsaveSize {
        /// The value found.
        got: u32,
        /// The limit.
        max: u32,
    },
    /// An XSAVE area of another size than announced.
    #[error("vcpu {vcpu}: the XSAVE area has {got:#x} bytes, expected {expected:#x}")]
    XsaveLength {
        /// The vcpu.
        vcpu: u32,
        /// The announced size.
        expected: u64,
        /// The value found.
        got: u64,
    },
    /// A chunk of no known kind.
    #[error("chunk {marker}: expected 0 to {MAX_BATCH} or -1 to -20")]
    UnknownChunk {
        /// Its marker.
        marker: Marker,
    },
    /// A chunk that does not exist for this type of guest.
    #[error("chunk {marker}: only HVM guests have it, and this is a PV guest")]
    HvmOnly {
        /// Its marker.
        marker: Marker,
    },
    /// An entry with bits that have no meaning.
    #[error("entry {index} of the batch is {got:#x}, expected 32 bits at most")]
    EntryBits {
        /// Index of the entry.
        index: u32,
        /// The value found.
        got: u64,
    },
    /// An entry of no known type.
    #[error("entry {index} of the batch (pfn {pfn}) has type {:#x}, which is reserved", got.nibble())]
    PageType {
        /// Index of the entry.
        index: u32,
        /// Its pfn.
        pfn: Pfn,
        /// Its type.
        got: PageType,
    },
    /// A page beyond the guest's memory.
    #[error(
        "entry {index} of the batch has pfn {pfn}, expected less than the p2m_size {p2m_size:#x}"
    )]
    PfnBeyond {
        /// Index of the entry.
        index: u32,
        /// Its pfn.
        pfn: Pfn,
        /// The end of the guest's memory.
        p2m_size: u32,
    },
    /// A page that occurs twice in a batch.
    #[error("pfn {pfn} comes twice in one batch")]
    DuplicatePfn {
        /// The pfn.
        pfn: Pfn,
    },
    /// An impossible highest vcpu.
    #[error("the highest vcpu is {got}, expected 0 to 4095")]
    MaxVcpu {
        /// The value found.
        got: i32,
    },
    /// A vcpu above the highest.
    #[error("vcpu {vcpu} is present, though {max} is the highest")]
    VcpuBeyond {
        /// The vcpu.
        vcpu: u32,
        /// The highest vcpu.
        max: u32,
    },
    /// A guest without vcpus.
    #[error("no vcpu is present")]
    NoVcpu,
    /// A guest without pages.
    #[error("the pages end, and none has come: the state is incomplete and cannot be restored")]
    NoPages,
    /// A reserved field that is not zero.
    #[error("{what} is {got:#x}, expected 0")]
    NotZero {
        /// Name of the field.
        what: &'static str,
        /// The value found.
        got: u32,
    },
    /// A count or length outside its limits.
    #[error("{what} is {got:#x}, expected {min:#x} to {max:#x}")]
    Range {
        /// What is counted.
        what: &'static str,
        /// The value found.
        got: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
    /// Transcendent memory of another layout.
    #[error("tmem: {what} is {got:#x}, expected 0xffffffff")]
    Tmem {
        /// Name of the field.
        what: &'static str,
        /// The value found.
        got: u32,
    },
    /// A device model's record of unknown kind.
    #[error(
        "signature is {:?}, expected QemuDeviceModelRecord, DeviceModelRecord0002 or \
         RemusDeviceModelState",
        got.escape_ascii().to_string()
    )]
    QemuSignature {
        /// The value found.
        got: [u8; 21],
    },
    /// More announced pages than a saver buffers.
    #[error("more than {MAX_PENDING_PAGES} pages wait for their compressed contents")]
    TooManyPending,
    /// Compressed contents that belong to no page.
    #[error("compressed data goes on for {left} bytes after the last page that was announced")]
    CompressedTooLong {
        /// Bytes left in the chunk.
        left: u64,
    },
    /// Pages without contents.
    #[error("the body ends while {pages} announced pages lack their compressed contents")]
    CompressedMissing {
        /// Their number.
        pages: u64,
    },
    /// A run without words.
    #[error("compressed page {pfn}: a run of zero words inside the page")]
    EmptyRun {
        /// The page.
        pfn: Pfn,
    },
    /// Runs that do not end at the end of the page.
    #[error("compressed page {pfn}: runs of {bytes} bytes, expected 4096")]
    RunOverPage {
        /// The page.
        pfn: Pfn,
        /// Where they end, in bytes.
        bytes: u64,
    },
    /// A difference to a page that was not sent before.
    #[error(
        "compressed page {pfn}: it is a difference to a page that was not sent before, or that \
         the sender's cache of 8192 pages had dropped"
    )]
    NoBase {
        /// The page.
        pfn: Pfn,
    },
    /// A toolstack record of another version.
    #[error("toolstack record: version is {got}, expected 1")]
    ToolstackVersion {
        /// The value found.
        got: u32,
    },
    /// A toolstack record that is too short or too long.
    #[error("toolstack record: {got} bytes for the {what}, expected {expected}")]
    ToolstackLength {
        /// The part of it.
        what: &'static str,
        /// The bytes it needs.
        expected: u64,
        /// The bytes there are.
        got: u64,
    },
    /// A name whose terminator is not at its end.
    #[error("toolstack record: the name of region {region} must have its only NUL at its end")]
    ToolstackName {
        /// Index of the region.
        region: u32,
    },
    /// Something that a stream of version 3 cannot represent.
    #[error("as a stream of version 3: {0}")]
    Unwritable(String),
}

impl From<WriteError> for LegacyError {
    fn from(error: WriteError) -> Self {
        Self::Unwritable(error.to_string())
    }
}
