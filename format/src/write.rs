//! Writer of libxc streams, version 3, little endian, as Xen's own saver writes them.
//!
//! Each record is written to the sink in one piece, padded with zeros. Long ones are not (PAGE_DATA
//! in two pieces: the head with the entries, then the pages).
//!
//! Specification: libxc migration stream. C implementation:
//! `xg_sr_common.c:write_split_record`, `xg_sr_save.c:write_headers`.

use std::io::Write;

use zerocopy::IntoBytes;

use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, WriteError};
use crate::frame::{Page, PageEntry, PageType, Pfn, WirePageEntry};
use crate::image::{DomainHeader, ImageHeader, Version};
use crate::record::hvm::{HvmParam, WireHvmParam, WireHvmParamsHead};
use crate::record::page_data::WirePageDataHead;
use crate::record::pv::{
    P2mFrames, PvInfo, WireP2mHead, WireVcpuHead, p2m_frame_count, vcpu_state_length,
};
use crate::record::x86::{CpuidPolicy, MsrPolicy, TscInfo};
use crate::record::{MAX_BATCH, MAX_BODY, RecordKind, WireRecordHeader, zeros};
use crate::wire::{U32, U64};

const ORDER: ByteOrder = ByteOrder::Little;
/// Maximum size of a body that is copied in order to write the record in one piece.
const MAX_COPIED: usize = 64 << 10;

fn encode(kind: RecordKind, cause: DecodeError) -> WriteError {
    WriteError::Encode { kind, cause }
}

fn length_error(kind: RecordKind, expected: Length, got: usize) -> WriteError {
    let got = got as u64;
    encode(kind, DecodeError::BodyLength { expected, got })
}

/// The bytes of a PAGE_DATA record up to the pages: record header, head, entries. The caller then
/// writes the pages, one for each entry with data.
///
/// # Errors
///
/// No entry or more than [`MAX_BATCH`]; an unknown type; a pfn beyond
/// [`PageEntry::MAX_PFN`].
pub fn page_data_head(entries: &[PageEntry]) -> Result<Vec<u8>, WriteError> {
    padded_page_data_head(0, entries)
}

/// Like [`page_data_head`], with `pads` pad entries of the mapped layout before the others.
pub(crate) fn padded_page_data_head(
    pads: u64,
    entries: &[PageEntry],
) -> Result<Vec<u8>, WriteError> {
    const KIND: RecordKind = RecordKind::PAGE_DATA;
    if entries.is_empty() {
        return Err(encode(KIND, DecodeError::PageCountZero));
    }
    if entries.len() > MAX_BATCH {
        let expected = Length::AtMost((MAX_BATCH as u64).saturating_mul(8));
        return Err(length_error(
            KIND,
            expected,
            entries.len().saturating_mul(8),
        ));
    }
    let mut pages: u64 = 0;
    for (index, entry) in entries.iter().enumerate() {
        let (index, pfn) = (index as u64, entry.pfn);
        if !entry.page_type.is_known() {
            let got = entry.page_type;
            return Err(encode(
                KIND,
                DecodeError::PageTypeUnknown { index, pfn, got },
            ));
        }
        if pfn > PageEntry::MAX_PFN {
            let max = PageEntry::MAX_PFN;
            return Err(encode(KIND, DecodeError::PageBeyondP2m { index, pfn, max }));
        }
        pages = pages.saturating_add(u64::from(entry.page_type.has_data()));
    }
    // At most 8 + 8 · 1535 + 4096 · 1024: far below u32::MAX and MAX_BODY.
    let all = pads.saturating_add(entries.len() as u64);
    let length = all
        .saturating_mul(8)
        .saturating_add(8)
        .saturating_add(pages.saturating_mul(4096));
    let (Ok(count), Ok(length)) = (u32::try_from(all), u32::try_from(length)) else {
        return Err(WriteError::Bug("PAGE_DATA of one batch is too long"));
    };
    let mut out = Vec::with_capacity((count as usize).saturating_mul(8).saturating_add(16));
    out.extend_from_slice(header(KIND, length).as_bytes());
    out.extend_from_slice(WirePageDataHead::new(count, ORDER).as_bytes());
    if let Some(first) = entries.first() {
        let page_type = PageType::XTAB;
        let pad = WirePageEntry::new(
            PageEntry {
                page_type,
                ..*first
            },
            ORDER,
        );
        for _ in 0..pads {
            out.extend_from_slice(pad.as_bytes());
        }
    }
    for entry in entries {
        out.extend_from_slice(WirePageEntry::new(*entry, ORDER).as_bytes());
    }
    Ok(out)
}

fn header(kind: RecordKind, length: u32) -> WireRecordHeader {
    WireRecordHeader {
        kind: U32::new(kind.0, ORDER),
        length: U32::new(length, ORDER),
    }
}

/// Writes a record to `sink` without copying its body.
///
/// # Errors
///
/// As for [`RecordWriter::record`].
pub(crate) fn long_record(
    sink: &mut impl Write,
    kind: RecordKind,
    body: &[u8],
) -> Result<(), WriteError> {
    let length = body_length(kind, body.len())?;
    let pad = zeros(u64::from(length));
    write_parts(sink, header(kind, length), &[body], pad)
}

/// Writes X86_PV_P2M_FRAMES to `sink`, piece by piece.
///
/// # Errors
///
/// The sink's error.
pub(crate) fn long_p2m_frames(
    sink: &mut impl Write,
    frames: &P2mFrames<'_>,
) -> Result<(), WriteError> {
    const KIND: RecordKind = RecordKind::X86_PV_P2M_FRAMES;
    const PIECE: usize = 8192;
    // Of 32 bits in the stream.
    let narrow = |pfn: Pfn| {
        u32::try_from(pfn.0)
            .map_err(|_| WriteError::Bug("a pfn of X86_PV_P2M_FRAMES has more than 32 bits"))
    };
    let head = WireP2mHead {
        start: U32::new(narrow(frames.start)?, ORDER),
        end: U32::new(narrow(frames.end)?, ORDER),
    };
    let mut left = frames.frames();
    let bytes = left.len().saturating_mul(8);
    let length = body_length(KIND, bytes.saturating_add(head.as_bytes().len()))?;
    sink.write_all(header(KIND, length).as_bytes())?;
    sink.write_all(head.as_bytes())?;
    while left.len() > 0 {
        let piece: Vec<U64> = left
            .by_ref()
            .take(PIECE)
            .map(|pfn| U64::new(pfn.0, ORDER))
            .collect();
        sink.write_all(piece.as_bytes())?;
    }
    Ok(())
}

/// Appends a record to bytes in memory, little endian: for optional records that a caller adds to a
/// stream that it copies.
///
/// # Errors
///
/// A body over [`MAX_BODY`].
pub fn append_record(out: &mut Vec<u8>, kind: RecordKind, body: &[u8]) -> Result<(), WriteError> {
    long_record(out, kind, body)
}

fn body_length(kind: RecordKind, bytes: usize) -> Result<u32, WriteError> {
    u32::try_from(bytes)
        .ok()
        .filter(|length| *length <= MAX_BODY)
        .ok_or_else(|| length_error(kind, Length::AtMost(u64::from(MAX_BODY)), bytes))
}

fn write_parts(
    sink: &mut impl Write,
    header: WireRecordHeader,
    parts: &[&[u8]],
    pad: &[u8],
) -> Result<(), WriteError> {
    sink.write_all(header.as_bytes())?;
    for part in parts {
        sink.write_all(part)?;
    }
    sink.write_all(pad)?;
    Ok(())
}

/// Writer of the records of a libxc stream.
///
/// ```
/// use xsr_format::record::pv::PvInfo;
/// use xsr_format::{DomainHeader, GuestType, RecordWriter};
///
/// let domain = DomainHeader { guest_type: GuestType::X86_PV, xen_major: 4, xen_minor: 20 };
/// let mut stream = RecordWriter::new(Vec::new(), domain)?;
/// stream.pv_info(PvInfo::Bits64)?;
/// stream.static_data_end()?;
/// assert_eq!(stream.into_sink().len(), 24 + 16 + (8 + 8) + 8);
/// # Ok::<(), xsr_format::WriteError>(())
/// ```
#[derive(Debug)]
pub struct RecordWriter<W> {
    sink: W,
    scratch: Vec<u8>,
}

impl<W: Write> RecordWriter<W> {
    /// Writes the image header and the domain header.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn new(mut sink: W, domain: DomainHeader) -> Result<Self, WriteError> {
        let image = ImageHeader {
            version: Version::V3,
            order: ORDER,
        };
        let mut scratch = Vec::new();
        scratch.extend_from_slice(image.encode().as_bytes());
        scratch.extend_from_slice(domain.encode(ORDER).as_bytes());
        sink.write_all(&scratch)?;
        Ok(Self { sink, scratch })
    }

    /// The sink, for a caller that writes pages itself after a [`page_data_head`].
    pub fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// Returns the sink.
    pub fn into_sink(self) -> W {
        self.sink
    }

    /// Writes a record whose body is the concatenation of `parts`, for records without a method of
    /// their own, such as optional ones.
    ///
    /// # Errors
    ///
    /// A body over [`MAX_BODY`], or the sink's error.
    pub fn record(&mut self, kind: RecordKind, parts: &[&[u8]]) -> Result<(), WriteError> {
        let bytes = parts
            .iter()
            .fold(0_usize, |sum, part| sum.saturating_add(part.len()));
        let length = body_length(kind, bytes)?;
        let header = header(kind, length);
        let pad = zeros(u64::from(length));
        if bytes > MAX_COPIED {
            return write_parts(&mut self.sink, header, parts, pad);
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(header.as_bytes());
        for part in parts {
            self.scratch.extend_from_slice(part);
        }
        self.scratch.extend_from_slice(pad);
        self.sink.write_all(&self.scratch)?;
        Ok(())
    }

    /// END.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn end(&mut self) -> Result<(), WriteError> {
        self.record(RecordKind::END, &[])
    }

    /// STATIC_DATA_END.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn static_data_end(&mut self) -> Result<(), WriteError> {
        self.record(RecordKind::STATIC_DATA_END, &[])
    }

    /// VERIFY.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn verify(&mut self) -> Result<(), WriteError> {
        self.record(RecordKind::VERIFY, &[])
    }

    /// CHECKPOINT.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn checkpoint(&mut self) -> Result<(), WriteError> {
        self.record(RecordKind::CHECKPOINT, &[])
    }

    /// X86_PV_INFO.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn pv_info(&mut self, info: PvInfo) -> Result<(), WriteError> {
        self.record(RecordKind::X86_PV_INFO, &[info.encode().as_bytes()])
    }

    /// X86_PV_P2M_FRAMES for the pfns `start..=end`; `frames` are the pfns of the
    /// p2m frames that cover them.
    ///
    /// # Errors
    ///
    /// A range that ends before it starts, a number of frames that does not match it, or the sink's
    /// error.
    pub fn p2m_frames(
        &mut self,
        info: PvInfo,
        start: u32,
        end: u32,
        frames: &[Pfn],
    ) -> Result<(), WriteError> {
        const KIND: RecordKind = RecordKind::X86_PV_P2M_FRAMES;
        if start > end {
            return Err(encode(KIND, DecodeError::P2mRange { start, end }));
        }
        let count = p2m_frame_count(start, end, info);
        if frames.len() as u64 != count {
            let expected = Length::Exactly(count.saturating_mul(8));
            return Err(length_error(KIND, expected, frames.len().saturating_mul(8)));
        }
        let head = WireP2mHead {
            start: U32::new(start, ORDER),
            end: U32::new(end, ORDER),
        };
        let pfns: Vec<U64> = frames.iter().map(|pfn| U64::new(pfn.0, ORDER)).collect();
        self.record(KIND, &[head.as_bytes(), pfns.as_bytes()])
    }

    /// X86_PV_VCPU_BASIC, _EXTENDED, _XSAVE or _MSRS. An empty blob is not written
    /// (erratum 1).
    ///
    /// # Errors
    ///
    /// A blob of the wrong length for its kind, or the sink's error.
    pub fn vcpu_state(
        &mut self,
        kind: RecordKind,
        info: PvInfo,
        vcpu: u32,
        state: &[u8],
    ) -> Result<(), WriteError> {
        if state.is_empty() {
            return Ok(());
        }
        if let Some(expected) = vcpu_state_length(kind, info, state.len()) {
            let got = state.len() as u64;
            return Err(encode(
                kind,
                DecodeError::BlobLength {
                    kind,
                    expected,
                    got,
                },
            ));
        }
        let head = WireVcpuHead {
            vcpu: U32::new(vcpu, ORDER),
            reserved: U32::default(),
        };
        self.record(kind, &[head.as_bytes(), state])
    }

    /// SHARED_INFO.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn shared_info(&mut self, page: &Page) -> Result<(), WriteError> {
        self.record(RecordKind::SHARED_INFO, &[page])
    }

    /// X86_TSC_INFO.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn tsc_info(&mut self, info: TscInfo) -> Result<(), WriteError> {
        self.record(RecordKind::X86_TSC_INFO, &[info.encode(ORDER).as_bytes()])
    }

    /// HVM_CONTEXT.
    ///
    /// # Errors
    ///
    /// An empty context, or the sink's error.
    pub fn hvm_context(&mut self, context: &[u8]) -> Result<(), WriteError> {
        const KIND: RecordKind = RecordKind::HVM_CONTEXT;
        if context.is_empty() {
            return Err(length_error(KIND, Length::AtLeast(1), 0));
        }
        self.record(KIND, &[context])
    }

    /// HVM_PARAMS. An empty list is not written (erratum 1).
    ///
    /// # Errors
    ///
    /// More parameters than a record holds, or the sink's error.
    pub fn hvm_params(&mut self, params: &[HvmParam]) -> Result<(), WriteError> {
        const KIND: RecordKind = RecordKind::HVM_PARAMS;
        if params.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(params.len())
            .map_err(|_| length_error(KIND, Length::AtMost(u64::from(MAX_BODY)), params.len()))?;
        let head = WireHvmParamsHead {
            count: U32::new(count, ORDER),
            reserved: U32::default(),
        };
        let entries: Vec<WireHvmParam> = params
            .iter()
            .map(|param| WireHvmParam {
                index: U64::new(param.index, ORDER),
                value: U64::new(param.value, ORDER),
            })
            .collect();
        self.record(KIND, &[head.as_bytes(), entries.as_bytes()])
    }

    /// X86_CPUID_POLICY: leaves of 24 bytes, little endian. Not written if empty.
    ///
    /// # Errors
    ///
    /// A length that is not a multiple of 24, or the sink's error.
    pub fn cpuid_policy(&mut self, leaves: &[u8]) -> Result<(), WriteError> {
        self.policy(
            RecordKind::X86_CPUID_POLICY,
            leaves,
            CpuidPolicy::LEAF_BYTES,
        )
    }

    /// X86_MSR_POLICY: entries of 16 bytes, little endian. Not written if empty.
    ///
    /// # Errors
    ///
    /// A length that is not a multiple of 16, or the sink's error.
    pub fn msr_policy(&mut self, entries: &[u8]) -> Result<(), WriteError> {
        self.policy(RecordKind::X86_MSR_POLICY, entries, MsrPolicy::ENTRY_BYTES)
    }

    fn policy(&mut self, kind: RecordKind, body: &[u8], unit: usize) -> Result<(), WriteError> {
        if !body.len().is_multiple_of(unit) {
            return Err(length_error(
                kind,
                Length::MultipleOf(unit as u64),
                body.len(),
            ));
        }
        match body.is_empty() {
            true => Ok(()),
            false => self.record(kind, &[body]),
        }
    }

    /// PAGE_DATA with pages in memory: `pages` has one for each entry with data, in order.
    ///
    /// # Errors
    ///
    /// Same as [`page_data_head`]; a number of pages that does not match the entries; or the sink's
    /// error.
    pub fn page_data(&mut self, entries: &[PageEntry], pages: &[&Page]) -> Result<(), WriteError> {
        let head = page_data_head(entries)?;
        let wanted = entries.iter().filter(|e| e.page_type.has_data()).count();
        if wanted != pages.len() {
            let expected = Length::Exactly((wanted as u64).saturating_mul(4096));
            let got = pages.len().saturating_mul(4096);
            return Err(length_error(RecordKind::PAGE_DATA, expected, got));
        }
        self.sink.write_all(&head)?;
        for page in pages {
            self.sink.write_all(*page)?;
        }
        Ok(())
    }
}
