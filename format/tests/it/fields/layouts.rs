//! Tests of the layout tables, and of reading with them.

use std::collections::BTreeSet;

use proptest::prelude::*;
use xsr_format::fields::hvm::HvmRecordKind;
use xsr_format::fields::{Field, FieldSpec, Format, Layout, Shape, TO_END, Value, fields, pv, x86};

use crate::fields::offsets::{Member, structures};

/// All layouts.
pub(crate) fn all() -> Vec<&'static Layout> {
    let mut all: Vec<&Layout> = structures().iter().map(|s| s.layout).collect();
    all.extend([&pv::VCPU_XSAVE, &pv::VCPU_MSRS, &x86::TSC_INFO]);
    all.extend(HvmRecordKind::LAPIC_REGS.layout(1024));
    all
}

/// Size of a field, or of one element of an array.
fn width(shape: &Shape) -> usize {
    match *shape {
        Shape::Number { width, .. } => width,
        Shape::Bytes { length } | Shape::Text { length } => length,
        Shape::Array { stride, .. } => stride,
        Shape::Struct(_) => panic!("no layout has a structure that is not in an array"),
    }
}

fn count(shape: &Shape) -> usize {
    match *shape {
        // A flexible array has no count.
        Shape::Array { count: TO_END, .. } => 0,
        Shape::Array { count, .. } => count,
        _ => 0,
    }
}

fn compare(layout: &str, specs: &[FieldSpec], members: &[Member]) {
    // Fields that offsetof cannot handle: bit fields, and those added after Xen 4.17.
    let beyond: &[&str] = match layout {
        "hvm_hw_vpic" => &["init_state_and_priority_add", "mode_bits"],
        "hvm_hw_lapic" => &["pending_esr"],
        _ => &[],
    };
    let found: Vec<Member> = specs
        .iter()
        .filter(|spec| !beyond.contains(&spec.name))
        .map(|spec| {
            (
                spec.name,
                spec.offset,
                width(&spec.shape),
                count(&spec.shape),
            )
        })
        .collect();
    assert_eq!(found, members, "{layout}");
}

#[test]
fn offsets_are_those_of_the_public_headers() {
    for structure in structures() {
        let layout = structure.layout;
        assert_eq!(layout.bytes, structure.bytes, "{}", layout.name);
        compare(layout.name, layout.fields, structure.members);
        let (array, members) = structure.element;
        for spec in layout.fields {
            if let Shape::Array {
                element: Shape::Struct(specs),
                ..
            } = spec.shape
            {
                assert_eq!(spec.name, array);
                compare(layout.name, specs, members);
            }
        }
        let has_element = layout.fields.iter().any(|spec| spec.name == array);
        assert_eq!(has_element, !array.is_empty(), "{}", layout.name);
    }
}

#[test]
fn blob_lengths_are_those_the_stream_specification_asks_for() {
    assert_eq!(pv::VCPU_CONTEXT_64.bytes, 0x1430);
    assert_eq!(pv::VCPU_CONTEXT_32.bytes, 0xaf0);
    assert_eq!(x86::TSC_INFO.bytes, 24);
    assert_eq!((x86::CPUID_LEAF.bytes, x86::MSR_ENTRY.bytes), (24, 16));
    for layout in [
        pv::SHARED_INFO_64,
        pv::SHARED_INFO_32,
        pv::START_INFO_64,
        pv::START_INFO_32,
    ] {
        assert!(layout.bytes <= 4096);
    }
}

/// The extent of a field, derived from its value.
fn extent(field: &Field<'_>, blob: &[u8], next: usize) -> std::ops::Range<usize> {
    let length = match field.value {
        Value::Bytes(bytes) => bytes.len(),
        Value::Text(text, rest) => text.len() + rest.len(),
        // A number does not tell its width, but it ends before the next field.
        _ => next.min(blob.len()).saturating_sub(field.offset).min(8),
    };
    field.offset..field.offset + length
}

#[test]
fn fields_have_names_of_their_own_and_do_not_overlap() {
    for layout in all() {
        let blob = vec![0xa5; layout.bytes.max(64)];
        let found: Vec<_> = fields(layout, &blob).collect();
        assert!(!found.is_empty());
        let names: BTreeSet<_> = found.iter().map(|field| &field.name).collect();
        assert_eq!(names.len(), found.len(), "{}", layout.name);
        for pair in found.windows(2) {
            let [this, next] = pair else { unreachable!() };
            let extent = extent(this, &blob, next.offset);
            assert!(
                extent.start < extent.end && extent.end <= next.offset,
                "{}: {this:?}",
                layout.name
            );
        }
    }
}

/// Every field is read from exactly where the layout says: with one byte set, at most one field
/// shows it.
#[test]
fn each_byte_shows_in_at_most_one_field() {
    for layout in all() {
        let zero = vec![0; layout.bytes.min(4096)];
        let before: Vec<_> = fields(layout, &zero).collect();
        for at in 0..zero.len() {
            let mut blob = zero.clone();
            blob[at] = 0x11;
            let changed: Vec<_> = fields(layout, &blob)
                .zip(&before)
                .filter(|(now, before)| now.value != before.value)
                .map(|(now, _)| now)
                .collect();
            assert!(
                changed.len() <= 1,
                "{}: byte {at} is in {changed:?}",
                layout.name
            );
            if let [field] = changed.as_slice() {
                assert!(field.offset <= at);
                if let Value::Hex(value) | Value::Dec(value) = field.value {
                    assert_eq!(value, 0x11 << (8 * (at - field.offset)), "{field:?}");
                }
            }
        }
    }
}

/// Older Xens wrote shorter structures: the fields that fit are read, and no others.
#[test]
fn a_short_blob_has_fewer_fields() {
    for layout in all() {
        let blob: Vec<u8> = (0..layout.bytes)
            .map(|at| at.to_le_bytes()[0] | 1)
            .collect();
        let whole: Vec<_> = fields(layout, &blob).collect();
        let mut had = 0;
        for length in 0..=blob.len() {
            let found: Vec<_> = fields(layout, &blob[..length]).collect();
            assert_eq!(found, whole[..found.len()], "{} of {length}", layout.name);
            assert!(found.len() >= had);
            had = found.len();
        }
        assert_eq!(had, whole.len());
        assert_eq!(fields(layout, b"").count(), 0);
    }
}

#[test]
fn numbers_are_little_endian_and_signed_ones_extended() {
    const LAYOUT: Layout = Layout {
        name: "test",
        bytes: 20,
        fields: &[
            spec("byte", 0, 1, Format::Signed),
            spec("word", 1, 2, Format::Signed),
            spec("long", 3, 8, Format::Signed),
            spec("positive", 11, 2, Format::Signed),
            spec("three", 13, 3, Format::Hex),
            spec("count", 16, 4, Format::Dec),
        ],
    };
    const fn spec(name: &'static str, offset: usize, width: usize, format: Format) -> FieldSpec {
        let shape = Shape::Number { width, format };
        FieldSpec {
            name,
            offset,
            shape,
        }
    }
    let blob = *b"\xff\xfe\xff\x00\x00\x00\x00\x00\x00\x00\x80\xff\x7f\x01\x02\x03\x0a\x01\x00\x00";
    let values: Vec<_> = fields(&LAYOUT, &blob).map(|field| field.value).collect();
    assert_eq!(
        values,
        [
            Value::Signed(-1),
            Value::Signed(-2),
            Value::Signed(i64::MIN),
            Value::Signed(0x7fff),
            Value::Hex(0x0003_0201),
            Value::Dec(266),
        ]
    );
    let shown: Vec<_> = values.iter().map(Value::to_string).collect();
    assert_eq!(
        shown,
        [
            "-1",
            "-2",
            "-9223372036854775808",
            "32767",
            "0x30201",
            "266"
        ]
    );
}

#[test]
fn text_and_bytes_are_shown_so_that_they_fit_a_line() {
    let mut blob = vec![0; pv::START_INFO_64.bytes];
    blob[..8].copy_from_slice(b"xen\x1b\"\0ab");
    let magic = fields(&pv::START_INFO_64, &blob).next().unwrap();
    assert_eq!(magic.value.to_string(), r#""xen\x1b\"""#);
    let Value::Text(text, rest) = magic.value else {
        panic!("{magic:?}");
    };
    assert_eq!(
        (text, rest.len(), &rest[..3]),
        (&b"xen\x1b\""[..], 27, &b"\0ab"[..])
    );
    assert_eq!(Value::Bytes(b"\x00\xff").to_string(), "00ff");
    assert_eq!(
        Value::Bytes(&[0xab; 17]).to_string(),
        format!("{}… (17 bytes)", "ab".repeat(16))
    );
}

#[test]
fn an_array_to_the_end_has_as_many_elements_as_fit() {
    for (length, expected) in [(0, 0), (15, 0), (16, 1), (47, 2), (48, 3)] {
        let blob = vec![1; length];
        let whole = fields(&pv::VCPU_MSRS, &blob).filter(|f| f.name.ends_with(".value"));
        assert_eq!(whole.count(), expected, "{length} bytes");
    }
}

proptest! {
    /// For any bytes and any layout: no panic, and nothing from outside the blob.
    #[test]
    fn any_bytes_have_fields_within_them(blob in proptest::collection::vec(any::<u8>(), 0..512)) {
        for layout in all() {
            for field in fields(layout, &blob) {
                prop_assert!(field.offset < blob.len());
                prop_assert!(!field.value.to_string().is_empty());
            }
        }
    }
}
