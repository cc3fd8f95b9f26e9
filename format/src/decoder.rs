//! What the streaming reader and the in-memory reader have in common: the rules for
//! headers, record headers, padding and bodies, and what has to be remembered of
//! earlier records to apply them.
//!
//! Specification: libxc migration stream, "Headers" and "Records".

use crate::error::{DecodeError, Length, Reserved};
use crate::frame::WirePageEntry;
use crate::image::{DomainHeader, ImageHeader, WireDomainHeader, WireImageHeader};
use crate::order::Order;
use crate::record::page_data::{Entries, WirePageDataHead};
use crate::record::{Body, Context, MAX_BODY, Record, RecordKind, WireRecordHeader};

/// What both the streaming and the in-memory reader know of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    pub(crate) image: ImageHeader,
    pub(crate) domain: DomainHeader,
    pub(crate) order: Order,
    pub(crate) lenient: bool,
}

impl Decoder {
    /// Decode the two headers.
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

    /// Check a record's header against the limits and the order.
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
        if kind == RecordKind::PAGE_DATA && (length as usize) < WirePageDataHead::OCTETS {
            return Err(DecodeError::BodyLength {
                expected: Length::AtLeast(WirePageDataHead::OCTETS as u64),
                got: u64::from(length),
            });
        }
        Ok(length)
    }

    /// Decode the body of any record but PAGE_DATA, and take note of it.
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

/// Octets of padding, at most 7, as one number, to be shown.
pub(crate) fn as_number(pad: &[u8]) -> u64 {
    pad.iter()
        .fold(0, |number, octet| number << 8 | u64::from(*octet))
}

pub(crate) const WIRE_HEADER: u64 = size_of::<WireRecordHeader>() as u64;
