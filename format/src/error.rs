//! Errors of reading and writing a stream: one [`DecodeError`] variant per rule, and [`ReadError`],
//! which adds the position.

use std::fmt;
use std::io;

use thiserror::Error;

use crate::detect::Detected;
use crate::fields::hvm::FieldError;
use crate::frame::{PageType, Pfn};
use crate::image::Version;
use crate::legacy::chunk::Marker;
use crate::legacy::error::LegacyError;
use crate::order::OrderError;
use crate::record::RecordKind;
use crate::wrapper::libvirt::LibvirtError;
use crate::wrapper::libxl::{LibxlError, LibxlRecordKind};
use crate::wrapper::xapi::{XapiError, XapiKind};
use crate::wrapper::xend::XendError;
use crate::wrapper::xl::XlError;

/// The length that a rule requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Exactly this many bytes.
    Exactly(u64),
    /// This many or more.
    AtLeast(u64),
    /// This many or fewer.
    AtMost(u64),
    /// One or more elements of this size.
    MultipleOf(u64),
}

impl Length {
    /// Whether a length fits.
    pub const fn holds(self, got: u64) -> bool {
        match self {
            Self::Exactly(n) => got == n,
            Self::AtLeast(n) => got >= n,
            Self::AtMost(n) => got <= n,
            Self::MultipleOf(n) => got > 0 && got.is_multiple_of(n),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(n) => write!(f, "exactly {n} bytes"),
            Self::AtLeast(n) => write!(f, "at least {n} bytes"),
            Self::AtMost(n) => write!(f, "at most {n} bytes"),
            Self::MultipleOf(n) => write!(f, "one or more elements of {n} bytes"),
        }
    }
}

/// A broken rule of the format. One variant per rule, with the value expected and the value found.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// The image header's first eight bytes are wrong.
    #[error("image header: marker is {got:#018x}, expected 0xffffffffffffffff")]
    ImageMarker {
        /// The value found.
        got: u64,
    },
    /// The image header's identifier is wrong.
    #[error("image header: id is {got:#010x}, expected 0x58454e46 (XENF)")]
    ImageId {
        /// The value found.
        got: u32,
    },
    /// A version that this reader does not know.
    #[error("image header: version is {got}, expected 2 or 3")]
    ImageVersion {
        /// The value found.
        got: u32,
    },
    /// Guest type 0.
    #[error(
        "domain header: guest type is 0, which is reserved; expected 1 (x86 PV) or 2 (x86 HVM)"
    )]
    GuestTypeReserved,
    /// A page size other than 4096.
    #[error("domain header: page shift is {got}, expected 12")]
    PageShift {
        /// The value found.
        got: u16,
    },
    /// A reserved field or padding that is not zero.
    #[error("{structure}: {field} at byte {at} of it must be zero, got {got:#x}")]
    ReservedNotZero {
        /// The header or record body with the field.
        structure: &'static str,
        /// The field.
        field: &'static str,
        /// Offset of the field in the structure.
        at: u64,
        /// The value found.
        got: u64,
    },
    /// A body that is longer than any record may have.
    #[error("body length is {got}, expected at most {max} bytes")]
    BodyTooLong {
        /// The value found.
        got: u32,
        /// The limit.
        max: u32,
    },
    /// A body of the wrong length for its kind.
    #[error("body length is {got}, expected {expected}")]
    BodyLength {
        /// The length that the kind requires.
        expected: Length,
        /// The value found.
        got: u64,
    },
    /// A vcpu blob of the wrong length for its kind.
    #[error("{kind}: the blob has {got} bytes, expected {expected}")]
    BlobLength {
        /// The record.
        kind: RecordKind,
        /// The length that the kind requires.
        expected: Length,
        /// The value found.
        got: u64,
    },
    /// A mandatory record that this version of the format does not define.
    #[error(
        "record type {kind:#010x} is mandatory and unknown; a newer saver made this image, or it is damaged"
    )]
    UnknownMandatory {
        /// Its type.
        kind: u32,
    },
    /// A record that the format's version does not have.
    #[error("{kind} belongs to version 3 of the format, but the image header says version {}", version.number())]
    NotInVersion {
        /// The record.
        kind: RecordKind,
        /// The stream's version.
        version: Version,
    },
    /// TOOLSTACK, which no released Xen wrote or reads.
    #[error("TOOLSTACK is deprecated and was never to be written; no restorer accepts it")]
    Deprecated,
    /// A PAGE_DATA record without pages.
    #[error("PAGE_DATA: count is 0, expected at least 1")]
    PageCountZero,
    /// A PAGE_DATA entry whose type has no meaning.
    #[error("PAGE_DATA: entry {index} (pfn {pfn}) has type {:#x}, which is reserved", got.nibble())]
    PageTypeUnknown {
        /// Index of the entry.
        index: u64,
        /// Its pfn.
        pfn: Pfn,
        /// The value found.
        got: PageType,
    },
    /// Reserved bits in a PAGE_DATA entry.
    #[error(
        "PAGE_DATA: entry {index} (pfn {pfn}) has bits 52–59 set ({got:#04x}), which must be zero"
    )]
    PageEntryReserved {
        /// Index of the entry.
        index: u64,
        /// Its pfn.
        pfn: Pfn,
        /// Bits 52–59.
        got: u8,
    },
    /// A PAGE_DATA entry beyond what X86_PV_P2M_FRAMES announced.
    #[error(
        "PAGE_DATA: entry {index} has pfn {pfn}, beyond the last pfn {max} that X86_PV_P2M_FRAMES announced"
    )]
    PageBeyondP2m {
        /// Index of the entry.
        index: u64,
        /// Its pfn.
        pfn: Pfn,
        /// The last pfn of the p2m.
        max: Pfn,
    },
    /// X86_TSC_INFO with a mode that no Xen has.
    #[error("X86_TSC_INFO: the mode is {got}, expected at most 3")]
    TscMode {
        /// The value found.
        got: u32,
    },
    /// A combination of width and number of levels that no guest has.
    #[error(
        "X86_PV_INFO: width {width} with {levels} page-table levels, expected 4 with 3 or 8 with 4"
    )]
    PvInfo {
        /// Bytes in the guest's machine word.
        width: u8,
        /// Levels of its page tables.
        levels: u8,
    },
    /// A p2m range that ends before it starts.
    #[error("X86_PV_P2M_FRAMES: range {start:#x}–{end:#x} ends before it starts")]
    P2mRange {
        /// First pfn.
        start: u32,
        /// Last pfn.
        end: u32,
    },
    /// X86_PV_P2M_FRAMES that leaves a gap in the p2m.
    #[error(
        "X86_PV_P2M_FRAMES: it begins at pfn {start}, but only the first {known} p2m frames have come before it"
    )]
    P2mGap {
        /// Its first pfn.
        start: Pfn,
        /// How many frames of the p2m are known before it.
        known: u64,
    },
    /// A frame of the p2m that would have to hold two different contents.
    #[error(
        "X86_PV_P2M_FRAMES: frames {first} and {second} of the p2m are both at pfn {pfn}, and at least one of them has to hold pages of the guest"
    )]
    P2mLeafShared {
        /// The pfn of both.
        pfn: Pfn,
        /// Index of the first.
        first: u64,
        /// Index of the second.
        second: u64,
    },
    /// A pfn that no guest of this type can have.
    #[error(
        "PAGE_DATA: entry {index} has pfn {pfn}, beyond {max}, the last that a guest of this type can have"
    )]
    PfnRange {
        /// Index of the entry.
        index: u64,
        /// Its pfn.
        pfn: Pfn,
        /// The last pfn of such a guest: [`MAX_X86_PFN`], or [`MAX_PV_PFN`] for a PV guest.
        ///
        /// [`MAX_X86_PFN`]: crate::guest_image::MAX_X86_PFN
        /// [`MAX_PV_PFN`]: crate::guest_image::MAX_PV_PFN
        max: Pfn,
    },
    /// A frame of the p2m that no x86 guest can have.
    #[error(
        "X86_PV_P2M_FRAMES: frame {index} is pfn {pfn}, beyond 0xffffffffff, the last that any x86 guest can have"
    )]
    P2mFrameRange {
        /// Index of the frame.
        index: u64,
        /// Its pfn.
        pfn: Pfn,
    },
    /// A vcpu that no guest of this type can have.
    #[error("{kind}: the vcpu is {vcpu}, expected at most {max}")]
    VcpuNumber {
        /// The record.
        kind: RecordKind,
        /// The value found.
        vcpu: u32,
        /// The highest number.
        max: u32,
    },
    /// A parameter that no Xen knows.
    #[error("HVM_PARAMS: there is no parameter {index:#x}")]
    HvmParamIndex {
        /// The value found.
        index: u64,
    },
    /// More state than a restorer keeps in memory.
    #[error("the vcpus have more than {max} bytes of state, which is more than a restore keeps")]
    StateTooLong {
        /// The limit.
        max: u64,
    },
    /// More optional records than a reader counts.
    #[error("there are more than {max} optional records; Xen writes none")]
    TooManyOptional {
        /// The limit.
        max: u32,
    },
    /// More records than any guest has.
    #[error("there are more than {max} records other than PAGE_DATA; no guest has so many")]
    TooManyRecords {
        /// The limit.
        max: u32,
    },
    /// An HVM context that Xen could not load.
    #[error(transparent)]
    HvmContext(#[from] FieldError),
    /// A record that is out of place.
    #[error(transparent)]
    Order(#[from] OrderError),
}

impl DecodeError {
    /// Whether a lenient reader accepts what is wrong ([`ReadOptions::lenient`]).
    ///
    /// [`ReadOptions::lenient`]: crate::read::ReadOptions::lenient
    pub fn is_tolerable(&self) -> bool {
        matches!(
            self,
            Self::ReservedNotZero { .. } | Self::PageEntryReserved { .. }
        )
    }
}

/// Checks reserved fields of one structure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    pub(crate) lenient: bool,
    pub(crate) structure: &'static str,
}

impl Reserved {
    /// Requires `got` to be zero, unless lenient.
    pub(crate) fn zero(self, field: &'static str, at: u64, got: u64) -> Result<Self, DecodeError> {
        if got == 0 || self.lenient {
            return Ok(self);
        }
        Err(DecodeError::ReservedNotZero {
            structure: self.structure,
            field,
            at,
            got,
        })
    }
}

/// The structure of a file that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The first bytes, from which the format is detected.
    Start,
    /// The fixed part of the xl file header.
    XlHeader,
    /// The optional data after it: the configuration.
    XlOptionalData,
    /// The header of the libxl stream.
    LibxlHeader,
    /// A record of the libxl stream.
    LibxlRecord {
        /// Index of the record in its stream.
        index: u64,
        /// Its kind, once its header has been read.
        kind: Option<LibxlRecordKind>,
    },
    /// The image header of the libxc stream.
    ImageHeader,
    /// The domain header of the libxc stream.
    DomainHeader,
    /// A record of the libxc stream.
    Record {
        /// Index of the record in its stream.
        index: u64,
        /// Its kind, once its header has been read.
        kind: Option<RecordKind>,
    },
    /// The header of a file that libvirt wrote.
    LibvirtHeader,
    /// A record of an image of xapi.
    XapiRecord {
        /// Its kind, once its header has been read.
        kind: Option<XapiKind>,
    },
    /// The header of a file that xend wrote.
    XendHeader,
    /// The start of a legacy stream: sizes, extended info, the p2m.
    LegacyHead,
    /// A chunk of a legacy stream.
    LegacyChunk {
        /// Index of the chunk.
        index: u64,
        /// Its marker, once it has been read.
        marker: Option<Marker>,
    },
    /// What follows the chunks of a legacy stream.
    LegacyTail,
    /// After the last record.
    End,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("start of the file"),
            Self::XlHeader => f.write_str("xl header"),
            Self::XlOptionalData => f.write_str("xl header, optional data"),
            Self::LibxlHeader => f.write_str("libxl header"),
            Self::LibxlRecord { index, kind: None } => write!(f, "libxl record {index}"),
            Self::LibxlRecord {
                index,
                kind: Some(kind),
            } => write!(f, "libxl record {index} ({kind})"),
            Self::End => f.write_str("end of the file"),
            Self::LibvirtHeader => f.write_str("libvirt header"),
            Self::XapiRecord { kind: None } => f.write_str("xapi image"),
            Self::XapiRecord { kind: Some(kind) } => write!(f, "xapi record {kind}"),
            Self::XendHeader => f.write_str("xend header"),
            Self::LegacyHead => f.write_str("legacy stream, head"),
            Self::LegacyChunk {
                index,
                marker: None,
            } => write!(f, "legacy chunk {index}"),
            Self::LegacyChunk {
                index,
                marker: Some(marker),
            } => write!(f, "legacy chunk {index} ({marker})"),
            Self::LegacyTail => f.write_str("legacy stream, tail"),
            Self::ImageHeader => f.write_str("libxc image header"),
            Self::DomainHeader => f.write_str("libxc domain header"),
            Self::Record { index, kind: None } => write!(f, "libxc record {index}"),
            Self::Record {
                index,
                kind: Some(kind),
            } => write!(f, "libxc record {index} ({kind})"),
        }
    }
}

/// A position in a file or stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The structure.
    pub place: Place,
    /// Offset of the structure: bytes from the start of the file, or of what the reader was given.
    pub offset: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {:#x}", self.place, self.offset)
    }
}

/// A failure to read a stream, with its position. Its text contains the text of `cause`; its source
/// is the source of `cause`.
#[derive(Debug)]
pub struct ReadError {
    /// Position of the structure that failed.
    pub position: Position,
    /// The cause.
    pub cause: ReadErrorCause,
}

/// Why reading a stream failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadErrorCause {
    /// The source failed.
    #[error("reading failed")]
    Io(#[source] io::Error),
    /// The stream ends too early.
    #[error("stream ends inside it: {needed} bytes more were expected{}", plausibly(*needed))]
    Truncated {
        /// How many more bytes the structure needs.
        needed: u64,
    },
    /// The bytes break a rule of the libxc stream.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The bytes break a rule of the libxl stream.
    #[error(transparent)]
    Libxl(#[from] LibxlError),
    /// The bytes break a rule of libvirt's header.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The bytes break a rule of xapi's images.
    #[error(transparent)]
    Xapi(#[from] XapiError),
    /// The bytes break a rule of xend's header.
    #[error(transparent)]
    Xend(#[from] XendError),
    /// The bytes break a rule of the legacy stream.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// The bytes break a rule of the xl header.
    #[error(transparent)]
    Xl(#[from] XlError),
    /// The file is, or holds, something other than a current image.
    #[error("not a saved domain that can be read: {0}")]
    Unreadable(Detected),
    /// Bytes follow where the file should end.
    #[error("bytes follow the last record: something was appended to the image")]
    Trailing,
    /// An impossible state: a bug in xsr, not a fault of the image or its source.
    #[error("{0}: this is a bug in xsr, please report it")]
    Bug(&'static str),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.position, self.cause)
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.source()
    }
}

impl ReadError {
    pub(crate) fn at(place: Place, offset: u64, cause: impl Into<ReadErrorCause>) -> Self {
        let position = Position { place, offset };
        let cause = cause.into();
        Self { position, cause }
    }

    /// The broken rule of the libxc stream, if that is the cause.
    pub fn decode(&self) -> Option<&DecodeError> {
        match &self.cause {
            ReadErrorCause::Decode(e) => Some(e),
            _ => None,
        }
    }

    /// Whether a lenient reader accepts what is wrong ([`ReadOptions::lenient`]).
    ///
    /// [`ReadOptions::lenient`]: crate::read::ReadOptions::lenient
    pub fn is_tolerable(&self) -> bool {
        match &self.cause {
            ReadErrorCause::Decode(error) => error.is_tolerable(),
            ReadErrorCause::Libxl(error) => matches!(error, LibxlError::ReservedNotZero { .. }),
            ReadErrorCause::Libvirt(error) => matches!(error, LibvirtError::Reserved { .. }),
            ReadErrorCause::Legacy(error) => matches!(error, LegacyError::NotZero { .. }),
            ReadErrorCause::Xl(error) => matches!(error, XlError::OptionalFlags { .. }),
            _ => false,
        }
    }

    /// Whether the image is to blame (a broken rule, a truncated stream, another format), not the
    /// source that it was read from.
    ///
    /// If the source is itself a reader of images (a converter, a wrapper), its [`io::Error`] holds
    /// a `ReadError`, and that error decides.
    pub fn is_bad_image(&self) -> bool {
        match &self.cause {
            ReadErrorCause::Io(e) => e
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<Self>())
                .is_some_and(Self::is_bad_image),
            ReadErrorCause::Bug(_) => false,
            _ => true,
        }
    }
}

/// No valid record lacks so many bytes: the longest that Xen writes is a batch of 1024 pages.
const IMPLAUSIBLE: u64 = 32 << 20;

fn plausibly(needed: u64) -> &'static str {
    match needed > IMPLAUSIBLE {
        true => " (that is implausible: its length is probably wrong)",
        false => "",
    }
}

impl ReadErrorCause {
    /// The same error where `bytes` more follow the missing ones.
    pub(crate) fn truncated_before(self, bytes: u64) -> Self {
        match self {
            Self::Truncated { needed } => Self::Truncated {
                needed: needed.saturating_add(bytes),
            },
            other => other,
        }
    }
}

/// A failure to write a record.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The sink failed.
    #[error("writing failed")]
    Io(#[from] io::Error),
    /// The record would break a rule of the format.
    #[error("{kind} cannot be written: {cause}")]
    Encode {
        /// The record.
        kind: RecordKind,
        /// The rule.
        cause: DecodeError,
    },
    /// An impossible state: a bug in xsr.
    #[error("{0}: this is a bug in xsr, please report it")]
    Bug(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_said_to_be_one_and_the_image_is_not_blamed() {
        let error = ReadError::at(Place::XlHeader, 0, ReadErrorCause::Bug("a body got lost"));
        assert!(!error.is_bad_image());
        let words = [
            error.to_string(),
            WriteError::Bug("a length wrapped").to_string(),
        ];
        for words in words {
            assert!(words.contains("a bug in xsr, please report it"), "{words}");
        }
    }

    #[test]
    fn a_lenient_reader_tolerates_reserved_fields_and_nothing_else() {
        let tolerable = |cause: ReadErrorCause| ReadError::at(Place::End, 0, cause).is_tolerable();
        let field = "options";
        let (at, got) = (12, 4);
        assert!(tolerable(
            LibxlError::ReservedNotZero { field, at, got }.into()
        ));
        assert!(tolerable(XlError::OptionalFlags { got: 1 }.into()));
        let structure = "image header";
        let reserved = DecodeError::ReservedNotZero {
            structure,
            field,
            at,
            got,
        };
        assert!(tolerable(reserved.into()));
        assert!(!tolerable(DecodeError::PageCountZero.into()));
        assert!(!tolerable(ReadErrorCause::Trailing));
    }
}
