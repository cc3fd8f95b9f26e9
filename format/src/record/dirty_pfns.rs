//! CHECKPOINT_DIRTY_PFN_LIST: the pages that COLO's secondary has written. It is the only record of
//! the back channel, from the secondary to the primary, and never part of a stream.
//!
//! Specification: "CHECKPOINT_DIRTY_PFN_LIST". C implementation:
//! `xg_sr_save.c:colo_merge_secondary_dirty_bitmap`,
//! `xg_sr_restore.c:send_checkpoint_dirty_pfn_list`.

use thiserror::Error;
use zerocopy::IntoBytes;

use super::{MAX_BODY, RecordKind, WireRecordHeader};
use crate::byte_order::ByteOrder;
use crate::error::{DecodeError, Length, WriteError};
use crate::frame::Pfn;
use crate::wire::{U32, U64};

const KIND: RecordKind = RecordKind::CHECKPOINT_DIRTY_PFN_LIST;
/// Bytes for each pfn.
const PFN_BYTES: u32 = 8;
/// Both ends of a back channel are x86.
const ORDER: ByteOrder = ByteOrder::Little;

/// The head of a list. The pfns follow, 8 bytes each.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | type, 0xf, little endian |
/// | 4–7 | length of the body |
///
/// ```
/// use xsr_format::frame::Pfn;
/// use xsr_format::record::dirty_pfns::{DirtyPfnsHead, dirty_pfns};
///
/// let record = dirty_pfns(&[Pfn(7), Pfn(8)])?;
/// let (head, body) = record.split_at(DirtyPfnsHead::BYTES);
/// let head = DirtyPfnsHead::decode(head.try_into()?)?;
/// assert_eq!(head.body_bytes, 16);
/// assert!(DirtyPfnsHead::pfns(body).eq([Pfn(7), Pfn(8)]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyPfnsHead {
    /// How many bytes follow: a multiple of 8, and at most as many as a record may have.
    pub body_bytes: u32,
}

/// A record that is not a list of pfns.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DirtyPfnsError {
    /// The record has another type.
    #[error("the record is {0}, expected CHECKPOINT_DIRTY_PFN_LIST")]
    Kind(RecordKind),
    /// No list has this length.
    #[error("the record has {0} bytes, expected a multiple of 8, at most {MAX_BODY}")]
    Length(u32),
}

impl DirtyPfnsHead {
    /// Length on the wire.
    pub const BYTES: usize = size_of::<WireRecordHeader>();

    /// Decodes a head.
    ///
    /// # Errors
    ///
    /// The head has another type, or a length that no list has.
    pub fn decode(head: [u8; Self::BYTES]) -> Result<Self, DirtyPfnsError> {
        let wire: WireRecordHeader = zerocopy::transmute!(head);
        let (kind, body_bytes) = (RecordKind(wire.kind.get(ORDER)), wire.length.get(ORDER));
        if kind != KIND {
            return Err(DirtyPfnsError::Kind(kind));
        }
        if body_bytes > MAX_BODY || !body_bytes.is_multiple_of(PFN_BYTES) {
            return Err(DirtyPfnsError::Length(body_bytes));
        }
        Ok(Self { body_bytes })
    }

    /// The pfns in a body. Bytes after the last whole pfn are ignored.
    pub fn pfns(body: &[u8]) -> impl ExactSizeIterator<Item = Pfn> {
        let (pfns, _) = body.as_chunks::<{ PFN_BYTES as usize }>();
        pfns.iter().map(|pfn| Pfn(u64::from_le_bytes(*pfn)))
    }
}

/// A complete list, with its head.
///
/// # Errors
///
/// More pfns than a record holds.
pub fn dirty_pfns(pfns: &[Pfn]) -> Result<Vec<u8>, WriteError> {
    let bytes = pfns.len().saturating_mul(PFN_BYTES as usize);
    let length = u32::try_from(bytes)
        .ok()
        .filter(|length| *length <= MAX_BODY)
        .ok_or_else(|| WriteError::Encode {
            kind: KIND,
            cause: DecodeError::BodyLength {
                expected: Length::AtMost(u64::from(MAX_BODY)),
                got: bytes as u64,
            },
        })?;
    let head = WireRecordHeader {
        kind: U32::new(KIND.0, ORDER),
        length: U32::new(length, ORDER),
    };
    let mut out = head.as_bytes().to_vec();
    for pfn in pfns {
        out.extend_from_slice(U64::new(pfn.0, ORDER).as_bytes());
    }
    Ok(out)
}
