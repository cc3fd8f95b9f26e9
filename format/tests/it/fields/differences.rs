//! Tests of the differences between two blobs.

use proptest::prelude::*;
use xsr_format::fields::{FieldDifference, Layout, diff, fields, pv};

use crate::fields::layouts::all;

#[test]
fn equal_blobs_do_not_differ() {
    for layout in all() {
        for length in [0, 1, layout.bytes, layout.bytes + 3] {
            let blob = vec![0x5a; length];
            assert_eq!(diff(layout, &blob, &blob.clone()), []);
        }
    }
}

/// Each changed byte is reported as one difference in the right place: no byte is missed, whether
/// in a field, between fields or after the last.
#[test]
fn each_changed_byte_is_one_difference() {
    for layout in all() {
        let length = (layout.bytes + 40).min(4096);
        let a = vec![0x20; length];
        let mut named = 0;
        for at in 0..length {
            let mut b = a.clone();
            b[at] = 0x21;
            let differences = diff(layout, &a, &b);
            match differences.as_slice() {
                [FieldDifference::Field { a, b }] => {
                    assert_eq!((&a.name, a.offset), (&b.name, b.offset));
                    assert!(a.offset <= at);
                    named += 1;
                }
                [FieldDifference::Bytes { offset, a, b }] => {
                    assert_eq!((*offset, *a, *b), (at, &b"\x20"[..], &b"\x21"[..]));
                }
                other => panic!("{}: byte {at}: {other:?}", layout.name),
            }
        }
        assert!(named > 0);
    }
}

#[test]
fn differences_read_well() {
    let a = vec![0; 3200];
    let mut b = a.clone();
    // arch.max_pfn, evtchn_mask[2], vcpu_info[1].time.tsc_shift; padding of vcpu_info[0]; what
    // follows the structure.
    b[3088] = 9;
    b[2560 + 17] = 1;
    b[64 + 60] = 0xff;
    b[2..6].copy_from_slice(&[1, 2, 3, 4]);
    b[3136] = 7;
    b[3138] = 8;
    let shown = |a: &[u8], b: &[u8]| -> Vec<String> {
        let differences = diff(&pv::SHARED_INFO_64, a, b);
        differences.iter().map(FieldDifference::to_string).collect()
    };
    assert_eq!(
        shown(&a, &b),
        [
            "vcpu_info[1].time.tsc_shift: 0 → -1",
            "evtchn_mask[2]: 0x0 → 0x100",
            "arch.max_pfn: 0 → 9",
            "bytes 0x2–0x5: 00000000 → 01020304",
            "bytes 0xc40–0xc40: 00 → 07",
            "bytes 0xc42–0xc42: 00 → 08",
        ]
    );
    assert_eq!(shown(&a, &a[..3000]), ["length: 3200 → 3000"]);
    assert_eq!(
        shown(&a[..3092], &b),
        [
            "vcpu_info[1].time.tsc_shift: 0 → -1",
            "evtchn_mask[2]: 0x0 → 0x100",
            "bytes 0x2–0x5: 00000000 → 01020304",
            "bytes 0xc10–0xc10: 00 → 09",
            "length: 3092 → 3200",
        ],
        "half a field is no field"
    );
}

/// Text that differs after its NUL counts as a difference of that field.
#[test]
fn text_differs_behind_its_end_too() {
    let a = vec![0; pv::START_INFO_64.bytes];
    let mut b = a.clone();
    b[20] = 1;
    let differences = diff(&pv::START_INFO_64, &a, &b);
    assert!(matches!(&differences[..], [FieldDifference::Field { a, .. }] if a.name == "magic"));
}

fn any_layout() -> impl Strategy<Value = &'static Layout> {
    (0..all().len()).prop_map(|index| all()[index])
}

proptest! {
    /// Blobs of any length: a difference is reported exactly if they differ, it is the same in
    /// either direction, and the bytes in it are right.
    #[test]
    fn differences_are_true(
        layout in any_layout(),
        a in proptest::collection::vec(0..3_u8, 0..200),
        b in proptest::collection::vec(0..3_u8, 0..200),
    ) {
        let there = diff(layout, &a, &b);
        let back = diff(layout, &b, &a);
        prop_assert_eq!(there.is_empty(), a == b);
        prop_assert_eq!(there.len(), back.len());
        let a_fields: Vec<_> = fields(layout, &a).collect();
        for difference in &there {
            match difference {
                FieldDifference::Field { a: of_a, b: of_b } => {
                    prop_assert!(a_fields.contains(of_a));
                    prop_assert_ne!(of_a.value, of_b.value);
                }
                FieldDifference::Bytes { offset, a: of_a, b: of_b } => {
                    prop_assert_eq!(&a[*offset..*offset + of_a.len()], *of_a);
                    prop_assert_eq!(&b[*offset..*offset + of_b.len()], *of_b);
                    prop_assert!(!of_a.is_empty() && of_a.iter().zip(*of_b).all(|(a, b)| a != b));
                }
                FieldDifference::Length { a: of_a, b: of_b } => {
                    prop_assert_eq!((*of_a, *of_b), (a.len(), b.len()));
                }
            }
        }
    }
}
