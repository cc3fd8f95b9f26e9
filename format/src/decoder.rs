//! Decoding rules shared by the streaming reader and the in-memory reader, for headers, record
//! headers, padding and bodies, and the state of earlier records that these rules need.
//!
//! Specification: libxc migration stream, "Headers" and "Records".

use crate::error::{DecodeError, Length, Reserved};
use crate::frame::{PAGE_SIZE, WirePageEntry};
use crate::image::{DomainHeader, ImageHeader, WireDomainHeader, WireImageHeader};
use crate::order::Order;
use crate::record::page_data::{Entries, WirePageDataHead};
use crate::record::pv::{PvInfo, WirePvInfo, WireVcpuHead, vcpu_state_length};
use crate::record::x86::{CpuidPolicy, MsrPolicy, WireTscInfo};
use crate::record::{Body, Context, MAX_BODY, Record, RecordKind, WireRecordHeader};

/// State of a stream that both readers keep.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    pub(crate) image: ImageHeader,
    pub(crate) domain: DomainHeader,
    pub(crate) order: Order,
    pub(crate) lenient: bool,
}

impl Decoder {
    /// Decodes the two headers.
    pub(crate) fn new(
        image: &WireImageHeader,
        domain: &WireDomainHeader,
        lenient: bool,
    ) -> Result<Self, DecodeError> {
        let image = ImageHeader::decode(image, lenient)?;
        let domain = DomainHeader::decode(domain, image.order, lenient)?;
        Ok(Self {
            image,
            domain,
            order: Order::new(image.version, domain.guest_type),
            lenient,
        })
    }

    pub(crate) fn context(&self) -> Context {
        Context {
            order: self.image.order,
            guest_width: self.order.guest_width(),
            lenient: self.lenient,
        }
    }

    pub(crate) fn kind(&self, header: &WireRecordHeader) -> RecordKind {
        RecordKind(header.kind.get(self.image.order))
    }

    /// Checks a record's header against the limits and the order.
    pub(crate) fn admit(&mut self, header: &WireRecordHeader) -> Result<u32, DecodeError> {
        let kind = self.kind(header);
        let length = header.length.get(self.image.order);
        if length > MAX_BODY {
            return Err(DecodeError::BodyTooLong {
                got: length,
                max: MAX_BODY,
            });
        }
        if kind.name().is_none() && !kind.is_optional() {
            return Err(DecodeError::UnknownMandatory { kind: kind.0 });
        }
        self.order.admit(kind)?;
        self.check_length(kind, length)?;
        if kind == RecordKind::PAGE_DATA && (length as usize) < WirePageDataHead::BYTES {
            return Err(DecodeError::BodyLength {
                expected: Length::AtLeast(WirePageDataHead::BYTES as u64),
                got: u64::from(length),
            });
        }
        Ok(length)
    }

    /// Checks a length against what its kind allows before the body is read, so that a wrong length
    /// is not reported as a truncated file. Lengths that depend on the body are checked with the
    /// body.
    fn check_length(&self, kind: RecordKind, got: u32) -> Result<(), DecodeError> {
        use RecordKind as K;
        let info = self.order.guest_width().and_then(PvInfo::from_width);
        let expected = match kind {
            K::END | K::VERIFY | K::CHECKPOINT | K::STATIC_DATA_END => Length::Exactly(0),
            K::X86_PV_INFO => Length::Exactly(size_of::<WirePvInfo>() as u64),
            K::SHARED_INFO => Length::Exactly(PAGE_SIZE as u64),
            K::X86_TSC_INFO => Length::Exactly(size_of::<WireTscInfo>() as u64),
            K::X86_CPUID_POLICY | K::X86_MSR_POLICY | K::HVM_PARAMS if got > MAX_SMALL_BODY => {
                Length::AtMost(u64::from(MAX_SMALL_BODY))
            }
            K::HVM_CONTEXT => Length::AtMost(MAX_HVM_CONTEXT),
            K::X86_CPUID_POLICY => Length::MultipleOf(CpuidPolicy::LEAF_BYTES as u64),
            K::X86_MSR_POLICY => Length::MultipleOf(MsrPolicy::ENTRY_BYTES as u64),
            // All pfns that fit in 32 bits.
            K::X86_PV_P2M_FRAMES => Length::AtMost(MAX_P2M_BODY),
            K::X86_PV_VCPU_BASIC
            | K::X86_PV_VCPU_EXTENDED
            | K::X86_PV_VCPU_XSAVE
            | K::X86_PV_VCPU_MSRS => {
                let state = (got as usize).checked_sub(size_of::<WireVcpuHead>());
                return match (state.filter(|state| *state > 0), info) {
                    (Some(state), Some(info)) => match vcpu_state_length(kind, info, state) {
                        Some(expected) => Err(DecodeError::BlobLength {
                            kind,
                            expected,
                            got: state as u64,
                        }),
                        None => Ok(()),
                    },
                    _ => Ok(()),
                };
            }
            _ => return Ok(()),
        };
        let got = u64::from(got);
        match expected.holds(got) {
            true => Ok(()),
            false => Err(DecodeError::BodyLength { expected, got }),
        }
    }

    /// Decodes the body of any record except PAGE_DATA, and updates the state.
    pub(crate) fn body<'a>(
        &mut self,
        kind: RecordKind,
        raw: &'a [u8],
        pad: &[u8],
    ) -> Result<Record<'a>, DecodeError> {
        Reserved {
            lenient: self.lenient,
            structure: "record",
        }
        .zero(
            "padding after the body",
            (raw.len() as u64).saturating_add(WIRE_HEADER),
            as_number(pad),
        )?;
        let body = Body::decode(kind, raw, self.context())?;
        let record = Record { kind, raw, body };
        self.order.note(&record);
        Ok(record)
    }

    pub(crate) fn entries<'a>(
        &self,
        wire: &'a [WirePageEntry],
        length: u32,
    ) -> Result<(Entries<'a>, u64), DecodeError> {
        Entries::check(wire, length, self.order.max_pfn(), self.context())
    }
}

/// At most 7 bytes of padding as one number, for an error message.
pub(crate) fn as_number(pad: &[u8]) -> u64 {
    pad.iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Maximum size of HVM_CONTEXT. Xen's has about 20 KiB for each vcpu, of which there may be 128.
pub(crate) const MAX_HVM_CONTEXT: u64 = 16 << 20;

/// Maximum size of X86_CPUID_POLICY, X86_MSR_POLICY and HVM_PARAMS. Xen's have a few KiB.
const MAX_SMALL_BODY: u32 = 1 << 20;

/// Maximum size of X86_PV_P2M_FRAMES: its head and a frame for each 512 of the 2^32 pfns.
const MAX_P2M_BODY: u64 = 8 + (8 << 23);

pub(crate) const WIRE_HEADER: u64 = size_of::<WireRecordHeader>() as u64;
