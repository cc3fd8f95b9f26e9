//! Tests of HVM contexts as lists of records.

use proptest::prelude::*;
use xsr_format::fields::FieldDifference;
use xsr_format::fields::hvm::{
    FieldError, HvmContext, HvmDifference, HvmRecord, HvmRecordKind as Kind, diff_contexts,
    param_name,
};

fn record(kind: u16, instance: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [
        &kind.to_le_bytes()[..],
        &instance.to_le_bytes(),
        &length.to_le_bytes(),
        body,
    ]
    .concat()
}

fn end() -> Vec<u8> {
    record(0, 0, b"")
}

fn error(context: &[u8]) -> FieldError {
    HvmContext::records(context).expect_err("the context should be refused")
}

#[test]
fn records_are_taken_apart() {
    let context = [
        record(2, 1, b"abc"),
        record(99, 0xffff, b""),
        record(3, 0, b"x"),
        end(),
    ]
    .concat();
    let of = |kind, instance, offset, body| HvmRecord {
        kind: Kind(kind),
        instance,
        offset,
        body,
    };
    assert_eq!(
        HvmContext::records(&context).unwrap(),
        [
            of(2, 1, 0, &b"abc"[..]),
            of(99, 0xffff, 11, b""),
            of(3, 0, 19, b"x")
        ]
    );
    assert_eq!(HvmContext::records(&end()).unwrap(), []);
}

#[test]
fn kinds_have_names_and_unknown_ones_can_be_shown() {
    let names: Vec<_> = Kind::ALL.iter().map(Kind::to_string).collect();
    assert_eq!(names.len(), 21);
    assert_eq!((names[2].as_str(), names[20].as_str()), ("CPU", "CPU_MSR"));
    for (value, kind) in (0..).zip(Kind::ALL) {
        assert_eq!(kind.0, value);
        // Only END has no body.
        assert_eq!(kind.layout(8).is_some(), *kind != Kind::END);
    }
    assert_eq!(
        (Kind(21).name(), Kind(21).to_string()),
        (None, "unknown type 21".into())
    );
    assert!(Kind(21).layout(8).is_none());
}

#[test]
fn a_context_cut_at_any_byte_is_refused() {
    let context = [record(2, 1, b"abc"), record(3, 0, b"12345"), end()].concat();
    for length in 0..context.len() {
        let expected = match length {
            0..8 => FieldError::NoEnd {
                offset: 0,
                left: length,
            },
            8..11 => too_long(2, 1, 0, 3, length - 8),
            11..19 => FieldError::NoEnd {
                offset: 11,
                left: length - 11,
            },
            19..24 => too_long(3, 0, 11, 5, length - 19),
            _ => FieldError::NoEnd {
                offset: 24,
                left: length - 24,
            },
        };
        assert_eq!(error(&context[..length]), expected, "cut at {length}");
    }
    HvmContext::records(&context).unwrap();
}

fn too_long(kind: u16, instance: u16, offset: usize, length: u32, left: usize) -> FieldError {
    let kind = Kind(kind);
    FieldError::BodyTooLong {
        kind,
        instance,
        offset,
        length,
        left,
    }
}

#[test]
fn lengths_are_not_believed() {
    let mut context = [record(6, 0, b""), end()].concat();
    context[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(error(&context), too_long(6, 0, 0, u32::MAX, 8));
    let text = error(&context).to_string();
    assert!(
        text.contains("LAPIC_REGS") && text.contains("4294967295"),
        "{text}"
    );
}

#[test]
fn end_is_empty_and_last() {
    let context = [record(2, 0, b"a"), record(0, 0, b"b")].concat();
    assert_eq!(
        error(&context),
        FieldError::EndNotEmpty {
            offset: 9,
            length: 1
        }
    );
    let context = [end(), record(2, 0, b"a"), end()].concat();
    assert_eq!(
        error(&context),
        FieldError::AfterEnd {
            offset: 8,
            bytes: 17
        }
    );
}

/// The iterator ends after its first error instead of repeating it.
#[test]
fn nothing_follows_an_error() {
    let context = record(2, 0, b"a");
    let mut records = HvmContext::new(&context);
    assert!(matches!(records.next(), Some(Ok(_))));
    assert!(matches!(records.next(), Some(Err(_))));
    assert_eq!(records.next(), None);
}

#[test]
fn contexts_are_compared_record_by_record() {
    // PMTIMER has fields, 99 does not.
    let a = [
        record(13, 0, b"\x01\0\0\0\0\0\0\0"),
        record(99, 1, b"aaaa"),
        record(2, 0, b""),
        end(),
    ]
    .concat();
    let b = [
        record(99, 2, b"b"),
        record(99, 1, b"abba"),
        record(13, 0, b"\x02\0\0\0\0\0\0\0"),
        end(),
    ]
    .concat();
    let differences = diff_contexts(&a, &b).unwrap();
    let [
        HvmDifference::Fields {
            kind: Kind::PMTIMER,
            instance: 0,
            differences: timer,
        },
        HvmDifference::Fields {
            kind: Kind(99),
            instance: 1,
            differences: unknown,
        },
        HvmDifference::OnlyInA(only_a),
        HvmDifference::OnlyInB(only_b),
    ] = differences.as_slice()
    else {
        panic!("{differences:?}");
    };
    let [timer] = timer.as_slice() else {
        panic!("{timer:?}")
    };
    assert_eq!(timer.to_string(), "tmr_val: 0x1 → 0x2");
    assert_eq!(
        unknown[..],
        [FieldDifference::Bytes {
            offset: 1,
            a: b"aa",
            b: b"bb"
        }]
    );
    assert_eq!(
        (only_a.kind, only_b.kind, only_b.instance),
        (Kind::CPU, Kind(99), 2)
    );

    assert_eq!(diff_contexts(&a, &a).unwrap(), []);
    // The same records in another order form the same context.
    let moved = [
        record(2, 0, b""),
        record(13, 0, b"\x01\0\0\0\0\0\0\0"),
        record(99, 1, b"aaaa"),
        end(),
    ];
    assert_eq!(diff_contexts(&a, &moved.concat()).unwrap(), []);
    // Two records of the same kind and instance are paired in order.
    let twice = |first, second| [record(99, 0, first), record(99, 0, second), end()].concat();
    assert_eq!(
        diff_contexts(&twice(b"a", b"b"), &twice(b"a", b"b")).unwrap(),
        []
    );
    assert_eq!(
        diff_contexts(&twice(b"a", b"b"), &twice(b"b", b"a"))
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        diff_contexts(&a, b"").unwrap_err(),
        FieldError::NoEnd { offset: 0, left: 0 }
    );
}

#[test]
fn parameters_have_the_names_of_the_public_headers() {
    for (index, name) in [
        (0, "CALLBACK_IRQ"),
        (1, "STORE_PFN"),
        (2, "STORE_EVTCHN"),
        (5, "IOREQ_PFN"),
        (6, "BUFIOREQ_PFN"),
        (12, "IDENT_PT"),
        (17, "CONSOLE_PFN"),
        (18, "CONSOLE_EVTCHN"),
        (32, "IOREQ_SERVER_PFN"),
        (38, "MCA_CAP"),
    ] {
        assert_eq!(param_name(index), Some(name));
    }
    for index in [3, 7, 8, 39, u64::MAX, 1 << 32] {
        assert_eq!(param_name(index), None);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_taken_apart_or_refused(bytes in prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..128),
        proptest::collection::vec(0..4_u8, 0..128),
    ]) {
        if let Ok(records) = HvmContext::records(&bytes) {
            // Reassembled, it is unchanged.
            let mut again: Vec<u8> = Vec::new();
            for r in &records {
                prop_assert_eq!(r.offset, again.len());
                again.extend(record(r.kind.0, r.instance, r.body));
            }
            prop_assert_eq!(again.len() + 8, bytes.len());
            prop_assert_eq!(&bytes[..again.len()], &again);
            prop_assert_eq!(diff_contexts(&bytes, &bytes), Ok(vec![]));
        }
    }
}
