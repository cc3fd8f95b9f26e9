//! Tests that break every rule of the format once, and check error, record and offset.

use xsr_format::error::{DecodeError as D, Length, Place};
use xsr_format::frame::{PageType, Pfn};
use xsr_format::image::Version;
use xsr_format::record::RecordKind as K;

use crate::support::build::*;
use crate::support::drive::{Cause, lenient, strict};

/// Asserts that the stream is refused in the image header.
#[track_caller]
fn image_header(bytes: &[u8], expected: D) {
    let failure = strict(bytes).failure();
    assert_eq!(failure.cause, Cause::Decode(expected));
    assert_eq!(failure.position.place, Place::ImageHeader);
    assert_eq!(failure.position.offset, 0);
}

/// Asserts that the stream is refused in the domain header.
#[track_caller]
fn domain_header(bytes: &[u8], expected: D) {
    let failure = strict(bytes).failure();
    assert_eq!(failure.cause, Cause::Decode(expected));
    assert_eq!(failure.position.place, Place::DomainHeader);
    assert_eq!(failure.position.offset, 24);
}

/// Asserts that the stream is refused in record `index`, and that everything before it is read.
#[track_caller]
pub(crate) fn in_record(stream: &Stream, index: usize, expected: impl Into<D>) {
    in_record_of(&stream.bytes(), stream, index, expected);
}

#[track_caller]
fn in_record_of(bytes: &[u8], stream: &Stream, index: usize, expected: impl Into<D>) {
    let outcome = strict(bytes);
    assert_eq!(outcome.seen.len(), index);
    let failure = outcome.failure();
    assert_eq!(failure.cause, Cause::Decode(expected.into()));
    let place = Place::Record {
        index: index as u64,
        kind: Some(K(stream.records[index].kind)),
    };
    assert_eq!(failure.position.place, place);
    assert_eq!(failure.position.offset, stream.offsets()[index] as u64);
}

pub(crate) fn pv() -> Stream {
    Stream::whole_pv(3, false, 8)
}

pub(crate) fn hvm() -> Stream {
    Stream::whole_hvm(3, false)
}

/// The index of the first record of this kind.
pub(crate) fn index_of(stream: &Stream, kind: u32) -> usize {
    stream.records.iter().position(|r| r.kind == kind).unwrap()
}

/// Replaces the body of the first record of this kind, and returns its index.
pub(crate) fn with_body(mut stream: Stream, kind: u32, body: Bytes) -> (Stream, usize) {
    let index = index_of(&stream, kind);
    stream.records[index].body = body.bytes;
    (stream, index)
}

pub(crate) fn bytes() -> Bytes {
    Bytes::new(false)
}

#[test]
fn image_marker() {
    let mut stream = pv().bytes();
    stream[7] = 0xfe;
    image_header(&stream, D::ImageMarker { got: !1 });
}

#[test]
fn image_id() {
    let mut stream = pv().bytes();
    stream[8] = b'Y';
    image_header(&stream, D::ImageId { got: 0x5945_4e46 });
}

#[test]
fn image_version() {
    for got in [0, 1, 4, u32::MAX] {
        let stream = Stream::new(got, PV, false).bytes();
        image_header(&stream, D::ImageVersion { got });
    }
}

#[test]
fn image_header_reserved() {
    for (byte, value, field, at, got) in [
        (16, 0x80, "options bits 1–15", 16, 0x8000),
        (17, 0x02, "options bits 1–15", 16, 0x0002),
        (19, 0x01, "reserved bytes", 18, 1),
        (23, 0x01, "reserved bytes", 20, 1),
    ] {
        let mut stream = pv().bytes();
        stream[byte] = value;
        let structure = "image header";
        let expected = D::ReservedNotZero {
            structure,
            field,
            at,
            got,
        };
        image_header(&stream, expected);
        assert_eq!(lenient(&stream).end, Ok(stream.len() as u64));
    }
}

#[test]
fn guest_type_zero() {
    let stream = Stream::new(3, 0, false).bytes();
    domain_header(&stream, D::GuestTypeReserved);
}

#[test]
fn page_shift() {
    let mut stream = pv().bytes();
    stream[28] = 13;
    domain_header(&stream, D::PageShift { got: 13 });
}

#[test]
fn domain_header_reserved() {
    let mut stream = pv().bytes();
    stream[30] = 0x10;
    let expected = D::ReservedNotZero {
        structure: "domain header",
        field: "reserved bytes",
        at: 6,
        got: 0x10,
    };
    domain_header(&stream, expected);
    assert_eq!(lenient(&stream).end, Ok(stream.len() as u64));
}

#[test]
fn body_too_long() {
    let max = 128 << 20;
    for got in [max + 1, u32::MAX] {
        let stream = hvm().empty(TSC_INFO);
        let at = stream.offsets()[0];
        let mut raw = stream.bytes();
        raw[at + 4..at + 8].copy_from_slice(&got.to_le_bytes());
        in_record_of(&raw, &stream, 0, D::BodyTooLong { got, max });
    }
}

#[test]
fn lengths_of_fixed_records() {
    for (stream, kind, expected) in [
        (pv(), END, 0_usize),
        (pv(), PV_INFO, 8),
        (pv(), STATIC_DATA_END, 0),
        (pv(), SHARED_INFO, 4096),
        (pv(), TSC_INFO, 24),
        (hvm(), TSC_INFO, 24),
    ] {
        let wrong = [0, 1, expected.saturating_sub(1), expected + 1, expected + 8];
        for length in wrong.into_iter().filter(|length| *length != expected) {
            let (stream, index) = with_body(stream.clone(), kind, bytes().fill(0, length));
            let expected = D::BodyLength {
                expected: Length::Exactly(expected as u64),
                got: length as u64,
            };
            in_record(&stream, index, expected);
        }
    }
}

#[test]
fn verify_and_checkpoint_have_no_body() {
    for kind in [VERIFY, CHECKPOINT] {
        let mut stream = hvm().without(END).with(kind, |o| o.u8(0));
        let index = stream.records.len() - 1;
        let expected = D::BodyLength {
            expected: Length::Exactly(0),
            got: 1,
        };
        in_record(&stream, index, expected);
        stream.records[index].body.clear();
        assert!(strict(&stream.empty(END).bytes()).end.is_ok());
    }
}

#[test]
fn lengths_of_policies() {
    for (kind, unit) in [(CPUID_POLICY, 24), (MSR_POLICY, 16)] {
        for got in [0, 1, unit - 1, unit + 1, unit + 8] {
            let (stream, index) = with_body(hvm(), kind, bytes().fill(0, got as usize));
            let expected = Length::MultipleOf(unit);
            in_record(&stream, index, D::BodyLength { expected, got });
        }
        let (stream, _) = with_body(hvm(), kind, bytes().fill(0, 3 * unit as usize));
        assert!(strict(&stream.bytes()).end.is_ok());
    }
}

#[test]
fn length_of_hvm_context() {
    let (stream, index) = with_body(hvm(), HVM_CONTEXT, bytes());
    let expected = D::BodyLength {
        expected: Length::AtLeast(1),
        got: 0,
    };
    in_record(&stream, index, expected);
}

#[test]
fn length_of_hvm_params() {
    for (body, expected, got) in [
        (bytes(), Length::AtLeast(8), 0),
        (bytes().fill(0, 7), Length::AtLeast(8), 7),
        (bytes().u32(1).u32(0), Length::Exactly(24), 8),
        (bytes().u32(1).u32(0).fill(0, 10), Length::Exactly(24), 18),
        (bytes().u32(1).u32(0).fill(0, 32), Length::Exactly(24), 40),
        (bytes().u32(0).u32(0).fill(0, 16), Length::Exactly(8), 24),
        (
            bytes().u32(u32::MAX).u32(0).fill(0, 16),
            Length::Exactly(8 + 16 * 0xffff_ffff),
            24,
        ),
    ] {
        let (stream, index) = with_body(hvm(), HVM_PARAMS, body);
        in_record(&stream, index, D::BodyLength { expected, got });
    }
}

#[test]
fn length_of_p2m_frames() {
    for (width, body, expected, got) in [
        (8, bytes().fill(0, 7), Length::AtLeast(8), 7),
        (8, bytes().u32(0).u32(0), Length::Exactly(16), 8),
        (8, bytes().u32(0).u32(511).u32(0), Length::Exactly(16), 12),
        (8, bytes().u32(0).u32(512).u64(1), Length::Exactly(24), 16),
        (8, bytes().u32(511).u32(512).u64(1), Length::Exactly(24), 16),
        (
            4,
            bytes().u32(0).u32(1023).u64(1).u64(2),
            Length::Exactly(16),
            24,
        ),
        (
            4,
            bytes().u32(0).u32(u32::MAX).u64(1),
            Length::Exactly(8 + 8 * (1 << 22)),
            16,
        ),
    ] {
        let (stream, index) = with_body(Stream::whole_pv(3, false, width), P2M_FRAMES, body);
        in_record(&stream, index, D::BodyLength { expected, got });
    }
}

#[test]
fn length_of_vcpu_records() {
    for kind in [VCPU_BASIC, VCPU_EXTENDED, VCPU_XSAVE, VCPU_MSRS] {
        let (stream, index) = with_body(pv(), kind, bytes().fill(0, 7));
        let expected = D::BodyLength {
            expected: Length::AtLeast(8),
            got: 7,
        };
        in_record(&stream, index, expected);
    }
}

#[test]
fn length_of_vcpu_blobs() {
    for (width, kind, got, expected) in [
        (8, VCPU_BASIC, 0x142f, Length::Exactly(0x1430)),
        (8, VCPU_BASIC, 0xaf0, Length::Exactly(0x1430)),
        (4, VCPU_BASIC, 0x1430, Length::Exactly(0xaf0)),
        (8, VCPU_EXTENDED, 129, Length::AtMost(128)),
        (8, VCPU_XSAVE, 15, Length::AtLeast(16)),
        (8, VCPU_MSRS, 17, Length::MultipleOf(16)),
    ] {
        let body = bytes().u32(0).u32(0).fill(1, got as usize);
        let (stream, index) = with_body(Stream::whole_pv(3, false, width), kind, body);
        let expected = D::BlobLength {
            kind: K(kind),
            expected,
            got,
        };
        in_record(&stream, index, expected);
    }
}

#[test]
fn reserved_fields_of_records() {
    let entry = bytes().u64(5).u64(6);
    for (stream, kind, body, structure, at, got) in [
        (
            pv(),
            PV_INFO,
            bytes().u8(8).u8(4).u16(0x100).u32(0),
            "X86_PV_INFO",
            2,
            0x100,
        ),
        (
            pv(),
            PV_INFO,
            bytes().u8(8).u8(4).u16(0).u32(7),
            "X86_PV_INFO",
            4,
            7,
        ),
        (
            pv(),
            TSC_INFO,
            bytes().fill(0, 20).u32(9),
            "X86_TSC_INFO",
            20,
            9,
        ),
        (
            pv(),
            VCPU_XSAVE,
            bytes().u32(0).u32(3).fill(0, 16),
            "X86_PV_VCPU_XSAVE",
            4,
            3,
        ),
        (
            hvm(),
            HVM_PARAMS,
            bytes().u32(1).u32(2).bytes(&entry.bytes),
            "HVM_PARAMS",
            4,
            2,
        ),
        (
            hvm(),
            PAGE_DATA,
            bytes().u32(1).u32(1 << 31).u64(0xf << 60),
            "PAGE_DATA",
            4,
            1 << 31,
        ),
    ] {
        let (stream, index) = with_body(stream, kind, body);
        let expected = D::ReservedNotZero {
            structure,
            field: "reserved bytes",
            at,
            got,
        };
        in_record(&stream, index, expected);
        assert!(lenient(&stream.bytes()).end.is_ok(), "{structure}");
    }
}

#[test]
fn padding_of_records() {
    let stream = hvm();
    let index = index_of(&stream, HVM_CONTEXT);
    let body = stream.records[index].body.len();
    assert_eq!(body % 8, 5);
    for pad in 0..3 {
        let mut raw = stream.bytes();
        raw[stream.offsets()[index] + 8 + body + pad] = 0xa5;
        let expected = D::ReservedNotZero {
            structure: "record",
            field: "padding after the body",
            at: 8 + body as u64,
            got: 0xa5 << (16 - 8 * pad),
        };
        in_record_of(&raw, &stream, index, expected);
        assert!(lenient(&raw).end.is_ok());
    }
}

#[test]
fn unknown_mandatory() {
    for kind in [0x13, 0x14, 0xff, 0x7fff_ffff] {
        let mut stream = hvm();
        stream.records.insert(
            1,
            Rec {
                kind,
                body: vec![1],
            },
        );
        in_record(&stream, 1, D::UnknownMandatory { kind });
        assert!(lenient(&stream.bytes()).end.is_err());
    }
}

#[test]
fn not_in_version() {
    for kind in [STATIC_DATA_END, CPUID_POLICY, MSR_POLICY] {
        let mut stream = Stream::whole_hvm(2, false);
        let body = vec![0; if kind == STATIC_DATA_END { 0 } else { 48 }];
        stream.records.insert(0, Rec { kind, body });
        let (kind, version) = (K(kind), Version::V2);
        in_record(&stream, 0, D::NotInVersion { kind, version });
    }
}

#[test]
fn toolstack_is_deprecated() {
    let mut stream = hvm();
    let (kind, body) = (TOOLSTACK, vec![0; 8]);
    stream.records.insert(3, Rec { kind, body });
    in_record(&stream, 3, D::Deprecated);
}

#[test]
fn page_count_zero() {
    let (stream, index) = with_body(hvm(), PAGE_DATA, bytes().u32(0).u32(0));
    in_record(&stream, index, D::PageCountZero);
}

#[test]
fn page_type_unknown() {
    for ty in 5..=8 {
        let body = bytes().u32(2).u32(0).u64(0xf << 60).u64(9 | ty << 60);
        let (stream, index) = with_body(hvm(), PAGE_DATA, body);
        let expected = D::PageTypeUnknown {
            index: 1,
            pfn: Pfn(9),
            got: PageType::from_nibble(ty as u8),
        };
        in_record(&stream, index, expected);
        assert!(lenient(&stream.bytes()).end.is_err());
    }
}

#[test]
fn page_entry_reserved() {
    let body = bytes().u32(1).u32(0).u64(0xf << 60 | 0x81 << 52 | 3);
    let (stream, index) = with_body(hvm(), PAGE_DATA, body);
    let expected = D::PageEntryReserved {
        index: 0,
        pfn: Pfn(3),
        got: 0x81,
    };
    in_record(&stream, index, expected);
    assert!(lenient(&stream.bytes()).end.is_ok());
}

#[test]
fn page_beyond_p2m() {
    let body = bytes().u32(2).u32(0).u64(0xf << 60 | 7).u64(0xf << 60 | 8);
    let (stream, index) = with_body(pv(), PAGE_DATA, body);
    let expected = D::PageBeyondP2m {
        index: 1,
        pfn: Pfn(8),
        max: Pfn(7),
    };
    in_record(&stream, index, expected);
}

#[test]
fn length_of_page_data() {
    let xtab = 0xf << 60;
    for (body, expected, got) in [
        (bytes(), Length::AtLeast(8), 0),
        (bytes().fill(0, 7), Length::AtLeast(8), 7),
        (bytes().u32(1).u32(0), Length::AtLeast(16), 8),
        (
            bytes().u32(2).u32(0).u64(xtab).u32(0),
            Length::AtLeast(24),
            20,
        ),
        (
            bytes().u32(u32::MAX).u32(0).u64(xtab),
            Length::AtLeast(8 + 8 * 0xffff_ffff),
            16,
        ),
        (
            bytes().u32(1).u32(0).u64(xtab).u64(0),
            Length::Exactly(16),
            24,
        ),
        (
            bytes().u32(1).u32(0).u64(1).fill(0, 4095),
            Length::Exactly(16 + 4096),
            16 + 4095,
        ),
        (
            bytes().u32(2).u32(0).u64(xtab).u64(1),
            Length::Exactly(24 + 4096),
            24,
        ),
    ] {
        let (stream, index) = with_body(hvm(), PAGE_DATA, body);
        in_record(&stream, index, D::BodyLength { expected, got });
    }
}

#[test]
fn pv_info_combinations() {
    for (width, levels) in [(4, 4), (8, 3), (0, 0), (16, 4), (255, 255)] {
        let body = bytes().u8(width).u8(levels).fill(0, 6);
        let (stream, index) = with_body(pv(), PV_INFO, body);
        in_record(&stream, index, D::PvInfo { width, levels });
    }
}

#[test]
fn p2m_range() {
    let body = bytes().u32(9).u32(8).u64(0);
    let (stream, index) = with_body(pv(), P2M_FRAMES, body);
    in_record(&stream, index, D::P2mRange { start: 9, end: 8 });
}

#[test]
fn truncated() {
    let stream = hvm().bytes();
    for (length, place, offset, needed) in [
        (0, Place::ImageHeader, 0, 24),
        (23, Place::ImageHeader, 0, 1),
        (24, Place::DomainHeader, 24, 16),
        (39, Place::DomainHeader, 24, 1),
        (
            40,
            Place::Record {
                index: 0,
                kind: None,
            },
            40,
            8,
        ),
        (
            47,
            Place::Record {
                index: 0,
                kind: None,
            },
            40,
            1,
        ),
        (
            48,
            Place::Record {
                index: 0,
                kind: Some(K::X86_CPUID_POLICY),
            },
            40,
            48,
        ),
    ] {
        let failure = strict(&stream[..length]).failure();
        assert_eq!(failure.cause, Cause::Truncated(needed), "{length}");
        assert_eq!(failure.position.place, place);
        assert_eq!(failure.position.offset, offset);
    }
}

/// A message contains the record, the offset, and the expected and found values.
#[test]
fn message() {
    use xsr_format::read::ReadOptions;
    let (stream, _) = with_body(pv(), TSC_INFO, bytes().fill(0, 23));
    let options = ReadOptions {
        offset: 0x1000,
        ..ReadOptions::default()
    };
    let mut reader = xsr_format::slice::SliceReader::new(&[], options).unwrap_err();
    assert_eq!(
        reader.to_string(),
        "libxc image header at byte 0x1000: stream ends inside it: 24 bytes more were expected"
    );
    let bytes = stream.bytes();
    for record in xsr_format::slice::SliceReader::new(&bytes, options).unwrap() {
        if let Err(e) = record {
            reader = e;
        }
    }
    assert_eq!(
        reader.to_string(),
        format!(
            "libxc record 7 (X86_TSC_INFO) at byte {:#x}: body length is 23, expected exactly 24 bytes",
            0x1000 + stream.offsets()[7]
        )
    );
    assert!(reader.is_bad_image());
}
