//! The rules of the legacy stream, one variant each.

use thiserror::Error;

use super::chunk::Marker;
use super::detect::{LegacyDetectError, MAX_BATCH, MAX_P2M_SIZE};
use super::items::MAX_PENDING_PAGES;
use crate::error::WriteError;
use crate::frame::{PageType, Pfn};

/// A rule of the legacy stream that some bytes break.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LegacyError {
    /// No legacy saver wrote this.
    #[error(transparent)]
    Detect(#[from] LegacyDetectError),
    /// A size that no saver accepted.
    #[error("p2m_size is {got:#x}, expected 1 to {MAX_P2M_SIZE:#x}")]
    P2mSize {
        /// What came.
        got: u64,
    },
    /// Neither the stream of a PV nor of an HVM guest.
    #[error(
        "after p2m_size comes {got:#010x}, expected 0xffffffff (a PV guest's extended info), \
         a page count or a chunk (an HVM guest), or a pfn below p2m_size (an old PV guest's p2m)"
    )]
    GuestUnclear {
        /// What came.
        got: u32,
    },
    /// A mark that is only half there.
    #[error("extended info begins with {got:#018x}, expected 0xffffffffffffffff")]
    ExtendedInfoMark {
        /// What came.
        got: u64,
    },
    /// A block of the extended info that does not fit in it.
    #[error(
        "extended info: block {:?} has {length} bytes, but {left} are left",
        name.escape_ascii().to_string()
    )]
    BlockTooLong {
        /// Its name.
        name: [u8; 4],
        /// Bytes it says it has.
        length: u32,
        /// Bytes of the extended info that are left.
        left: u32,
    },
    /// Less left of the extended info than any block has.
    #[error("extended info: {left} bytes are left, expected none or 8 and more")]
    BlockCut {
        /// What is left.
        left: u32,
    },
    /// A block that came before.
    #[error("extended info: block {:?} for the second time", name.escape_ascii().to_string())]
    BlockRepeated {
        /// Its name.
        name: [u8; 4],
    },
    /// A vcpu context of a size that none has.
    #[error(
        "extended info: the vcpu context has {got:#x} bytes, expected 0xaf0 (32-bit guest) or \
         0x1430 (64-bit guest)"
    )]
    VcpuContext {
        /// What came.
        got: u32,
    },
    /// An XSAVE area of a size that none has.
    #[error("extended info: the XSAVE area has {got:#x} bytes, expected 0, or 0x10 to {max:#x}")]
    XsaveSize {
        /// What came.
        got: u32,
        /// The limit.
        max: u32,
    },
    /// An XSAVE area of another size than was announced.
    #[error("vcpu {vcpu}: the XSAVE area has {got:#x} bytes, expected {expected:#x}")]
    XsaveLength {
        /// Whose.
        vcpu: u32,
        /// As announced.
        expected: u64,
        /// What came.
        got: u64,
    },
    /// A chunk of no known kind.
    #[error("chunk {marker}: expected 0 to {MAX_BATCH} or -1 to -20")]
    UnknownChunk {
        /// Its marker.
        marker: Marker,
    },
    /// A chunk that this type of guest does not have.
    #[error("chunk {marker}: only HVM guests have it, and this is a PV guest")]
    HvmOnly {
        /// Its marker.
        marker: Marker,
    },
    /// An entry with bits that have no meaning.
    #[error("entry {index} of the batch is {got:#x}, expected 32 bits at most")]
    EntryBits {
        /// Which.
        index: u32,
        /// What came.
        got: u64,
    },
    /// An entry of no known type.
    #[error("entry {index} of the batch (pfn {pfn}) has type {:#x}, which is reserved", got.nibble())]
    PageType {
        /// Which.
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
        /// Which.
        index: u32,
        /// Its pfn.
        pfn: Pfn,
        /// Where the guest's memory ends.
        p2m_size: u32,
    },
    /// A page that comes twice in one batch.
    #[error("pfn {pfn} comes twice in one batch")]
    DuplicatePfn {
        /// The pfn.
        pfn: Pfn,
    },
    /// Vcpus that cannot be.
    #[error("the highest vcpu is {got}, expected 0 to 4095")]
    MaxVcpu {
        /// What came.
        got: i32,
    },
    /// A vcpu beyond the highest.
    #[error("vcpu {vcpu} is present, though {max} is the highest")]
    VcpuBeyond {
        /// The vcpu.
        vcpu: u32,
        /// The highest.
        max: u32,
    },
    /// Nobody to restore.
    #[error("no vcpu is present")]
    NoVcpu,
    /// Nothing to restore.
    #[error("the pages end, and none has come: the state is incomplete and cannot be restored")]
    NoPages,
    /// A reserved field that is not zero.
    #[error("{what} is {got:#x}, expected 0 (--lenient tolerates this)")]
    NotZero {
        /// Which.
        what: &'static str,
        /// What came.
        got: u32,
    },
    /// A count or a length beyond its limit.
    #[error("{what} is {got:#x}, expected {min:#x} to {max:#x}")]
    Range {
        /// Of what.
        what: &'static str,
        /// What came.
        got: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// Transcendent memory of another layout.
    #[error("tmem: {what} is {got:#x}, expected 0xffffffff")]
    Tmem {
        /// Which field.
        what: &'static str,
        /// What came.
        got: u32,
    },
    /// A device model's record of no known kind.
    #[error(
        "signature is {:?}, expected QemuDeviceModelRecord, DeviceModelRecord0002 or \
         RemusDeviceModelState",
        got.escape_ascii().to_string()
    )]
    QemuSignature {
        /// What came.
        got: [u8; 21],
    },
    /// More pages announced than a saver buffers.
    #[error("more than {MAX_PENDING_PAGES} pages wait for their compressed contents")]
    TooManyPending,
    /// Compressed contents of no page.
    #[error("compressed data goes on for {left} bytes behind the last page that was announced")]
    CompressedTooLong {
        /// Bytes left in the chunk.
        left: u64,
    },
    /// Pages without contents.
    #[error("the body ends while {pages} announced pages lack their compressed contents")]
    CompressedMissing {
        /// How many.
        pages: u64,
    },
    /// A run of no words.
    #[error("compressed page {pfn}: a run of zero words inside the page")]
    EmptyRun {
        /// Of which page.
        pfn: Pfn,
    },
    /// Runs that do not end where the page ends.
    #[error("compressed page {pfn}: runs of {bytes} bytes, expected 4096")]
    RunOverPage {
        /// Of which page.
        pfn: Pfn,
        /// How far they go.
        bytes: u64,
    },
    /// A difference to a page that nobody has.
    #[error(
        "compressed page {pfn}: it is a difference to a page that was not sent before, or that \
         the sender's cache of 8192 pages had dropped"
    )]
    NoBase {
        /// Of which page.
        pfn: Pfn,
    },
    /// A toolstack record of another version.
    #[error("toolstack record: version is {got}, expected 1")]
    ToolstackVersion {
        /// What came.
        got: u32,
    },
    /// A toolstack record that ends too early or too late.
    #[error("toolstack record: {got} bytes for the {what}, expected {expected}")]
    ToolstackLength {
        /// Which part.
        what: &'static str,
        /// What it needs.
        expected: u64,
        /// What there is.
        got: u64,
    },
    /// A name that does not end where it should.
    #[error("toolstack record: the name of region {region} must have its only NUL at its end")]
    ToolstackName {
        /// Which region, from 0.
        region: u32,
    },
    /// Something that a stream of version 3 cannot hold.
    #[error("as a stream of version 3: {0}")]
    Unwritable(String),
}

impl From<WriteError> for LegacyError {
    fn from(error: WriteError) -> Self {
        Self::Unwritable(error.to_string())
    }
}
