//! Tests that break each rule of the libxl stream.

use xsr_format::read::ReadOptions;
use xsr_format::wrapper::WrapperWriteError;
use xsr_format::wrapper::libxl::{
    CheckpointState, EmulatorId, LibxlError, LibxlReader, LibxlRecord, LibxlRecordKind,
    LibxlWriter, MAX_BODY, XenstoreData,
};

use crate::wrappers::failure::{Cause, Failure};
use crate::wrappers::libxl::{LITTLE, QEMU, header, read, read_with, record, record_padded};
use crate::wrappers::{Counting, LENIENT, STRICT};

/// A stream in which `second` follows LIBXC_CONTEXT.
fn with(second: &[u8]) -> Vec<u8> {
    [&header(0), &record(1, b""), second, &record(0, b"")].concat()
}

fn broken_rule(bytes: &[u8], options: ReadOptions) -> LibxlError {
    match read(bytes, options)
        .expect_err("the stream should be refused")
        .cause
    {
        Cause::Libxl(e) => e,
        other => panic!("{other:?} is no rule that was broken"),
    }
}

/// The error of a stream in which `second` follows LIBXC_CONTEXT, which must be the same in lenient
/// mode.
fn refused(second: &[u8]) -> LibxlError {
    let bytes = with(second);
    let strict = read(&bytes, STRICT).unwrap_err();
    assert_eq!(read(&bytes, LENIENT).unwrap_err(), strict);
    assert_eq!(strict.offset, 24);
    broken_rule(&bytes, STRICT)
}

/// The body of an emulator record.
fn emulator(id: u32, rest: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes(), &[0; 4], rest].concat()
}

#[test]
fn ident_and_version_must_be_right() {
    let mut bytes = with(b"");
    bytes[7] = b'T';
    let got = u64::from_be_bytes(*b"LibxlFmT");
    assert_eq!(broken_rule(&bytes, LENIENT), LibxlError::Ident { got });
    for version in [0_u32, 1, 3, 0x0200_0000] {
        let mut bytes = with(b"");
        bytes[8..12].copy_from_slice(&version.to_be_bytes());
        assert_eq!(
            broken_rule(&bytes, LENIENT),
            LibxlError::Version { got: version }
        );
    }
}

/// From the review: a reserved or padding field that must be ignored can never be given a meaning;
/// restore should check that it is zero and bail.
#[test]
fn reserved_fields_must_be_zero_unless_lenient() {
    for bit in 2..32 {
        let bytes = [header(1 << bit), with(b"")[16..].to_vec()].concat();
        let error = broken_rule(&bytes, STRICT);
        let (field, got) = ("stream header: options bits 2–31", 1 << bit);
        assert_eq!(error, LibxlError::ReservedNotZero { field, at: 12, got });
        assert_eq!(read(&bytes, LENIENT).unwrap().len(), 2);
    }
    for length in 9..16 {
        let body = emulator(2, &vec![1; length - 8]);
        for changed in length..16 {
            let mut bytes = with(&record(3, &body));
            bytes[24 + 8 + changed] = 0x80;
            let LibxlError::ReservedNotZero { field, at, got } = broken_rule(&bytes, STRICT) else {
                panic!("padding byte {changed} of {length} should be refused as such");
            };
            assert_eq!((field, at), ("padding after the body", 8 + length as u64));
            assert_eq!(got.count_ones(), 1);
            assert_eq!(read(&bytes, LENIENT).unwrap().len(), 3);
        }
    }
    let bytes = [
        header(0),
        record(1, b""),
        record(4, b""),
        record(5, b"\0\0\0\0\x01\0\0\0"),
    ]
    .concat();
    let begin = |index| index == 1;
    let error = read_with(&bytes, STRICT, begin).unwrap_err();
    let (field, at, got) = ("CHECKPOINT_STATE: padding", 12, 1);
    assert_eq!(
        error.cause,
        Cause::Libxl(LibxlError::ReservedNotZero { field, at, got })
    );
    // The stream has no END, which is what lenient reading then reports.
    let error = read_with(&bytes, LENIENT, begin).unwrap_err();
    assert_eq!((error.offset, error.cause), (48, Cause::Truncated(8)));
}

#[test]
fn unknown_records_are_refused_if_mandatory_and_kept_if_optional() {
    for kind in [6, 0x7fff_ffff] {
        assert_eq!(
            refused(&record(kind, b"")),
            LibxlError::UnknownMandatory { kind }
        );
    }
    for kind in [0x8000_0000, 0x8000_0001, u32::MAX] {
        let records = read(&with(&record(kind, b"12345")), STRICT).unwrap();
        let body = b"12345".to_vec();
        let kind = LibxlRecordKind(kind);
        assert_eq!(records[1], LibxlRecord::Optional { kind, body });
        assert_eq!(kind.name(), None);
    }
}

#[test]
fn lengths_must_be_those_of_the_kind() {
    for (kind, bad) in [
        (0, &[1, 8][..]),
        (1, &[1, 8]),
        (4, &[1]),
        (2, &[0, 4, 7]),
        (3, &[0, 4, 7]),
        (5, &[0, 1, 3, 5, 7, 9, 16]),
    ] {
        for &length in bad {
            let error = refused(&record(kind, &vec![0; length]));
            assert!(
                matches!(error, LibxlError::BodyLength { got, .. } if got == length as u64),
                "{kind} of {length}: {error}"
            );
        }
    }
}

#[test]
fn a_length_beyond_the_limit_is_refused_and_one_below_it_not_believed() {
    for kind in [0_u32, 3, 77, 0x8000_0000] {
        for length in [MAX_BODY + 1, u32::MAX] {
            let second = [kind.to_le_bytes(), length.to_le_bytes()].concat();
            let got = u64::from(length);
            assert_eq!(
                refused(&second),
                LibxlError::BodyTooLong { got, max: MAX_BODY }
            );
        }
    }
    for kind in [2_u32, 3, 0x8000_0000] {
        let head = [kind.to_le_bytes(), MAX_BODY.to_le_bytes()].concat();
        let bytes = [&header(0), &record(1, b""), head.as_slice(), &[0; 10]].concat();
        let mut reader = LibxlReader::new(Counting::new(&bytes), STRICT).unwrap();
        reader.next_record().unwrap();
        let error = Failure::from(reader.next_record().unwrap_err());
        assert_eq!(error.cause, Cause::Truncated(u64::from(MAX_BODY) - 10));
        // Memory is allocated as bytes arrive, a MiB at a time, not for the announced length.
        assert_eq!(reader.into_source().asked, 32 + (1 << 20));
    }
}

#[test]
fn emulators_must_be_known() {
    for id in 0..3 {
        let records = read(&with(&record(3, &emulator(id, b"x"))), STRICT).unwrap();
        let LibxlRecord::EmulatorContext { emulator, state } = &records[1] else {
            panic!("{records:?}");
        };
        assert_eq!((emulator.id.value(), state.as_slice()), (id, &b"x"[..]));
    }
    assert_eq!(EmulatorId::from_value(3), None);
    for id in [3, u32::MAX] {
        for kind in [2, 3] {
            let error = refused(&record(kind, &emulator(id, b"")));
            assert_eq!(error, LibxlError::UnknownEmulator { got: id });
        }
    }
}

#[test]
fn xenstore_data_are_pairs_of_strings() {
    let parse = |raw: &[u8]| XenstoreData::parse(raw.to_vec());
    for (raw, pairs) in [
        (&b""[..], &[][..]),
        (b"a\0\0", &[(&b"a"[..], &b""[..])]),
        (
            b"a/B-9_@\0caf\xe9 \n\0k\0v\0",
            &[(b"a/B-9_@", b"caf\xe9 \n"), (b"k", b"v")],
        ),
    ] {
        let data = parse(raw).unwrap();
        assert_eq!(data.iter().collect::<Vec<_>>(), pairs);
        assert_eq!(data.as_bytes(), raw);
    }
    let key = |pair, key: &[u8]| {
        let key = key.to_vec();
        LibxlError::XenstoreKey { pair, key }
    };
    for (raw, error) in [
        (
            &b"a\0b"[..],
            LibxlError::XenstoreNotTerminated {
                length: 3,
                got: b'b',
            },
        ),
        (b"a\0", LibxlError::XenstoreOdd { got: 1 }),
        (b"a\0b\0c\0", LibxlError::XenstoreOdd { got: 3 }),
        (b"\0v\0", key(0, b"")),
        (b"k\0v\0a b\0v\0", key(1, b"a b")),
        (b"k\xc3\xa9\0v\0", key(0, b"k\xc3\xa9")),
        // The message contains only the beginning of a long key.
        (
            &[[b'~'; 100].as_slice(), b"\0\0"].concat(),
            key(0, &[b'~'; 64]),
        ),
    ] {
        assert_eq!(parse(raw).unwrap_err(), error);
        assert_eq!(refused(&record(2, &emulator(2, raw))), error);
    }
    for pairs in [[("k", "v"), ("a\0b", "c")], [("k", "v"), ("a", "b\0c\0d")]] {
        let error = XenstoreData::from_pairs(pairs).unwrap_err();
        assert_eq!(error, LibxlError::XenstoreNul { pair: 1 });
    }
}

/// libxl writes a body of 4 bytes where the specification has 8: the record's padding is then the
/// specification's padding field.
#[test]
fn checkpoint_states_are_read_as_specified_and_as_libxl_writes_them() {
    let begin = |index| index == 1;
    let states = [
        CheckpointState::New,
        CheckpointState::Suspended,
        CheckpointState::Ready,
        CheckpointState::Resumed,
    ];
    for (id, state) in (0_u8..).zip(states) {
        for length in [4, 8] {
            let body = [id, 0, 0, 0, 0, 0, 0, 0];
            let second = [record(4, b""), record(5, &body[..length])].concat();
            let records = read_with(&with(&second), STRICT, begin).unwrap();
            assert_eq!(records[2], LibxlRecord::CheckpointState(state));
        }
    }
    let second = [record(4, b""), record(5, b"\x04\0\0\0")].concat();
    let error = read_with(&with(&second), LENIENT, begin).unwrap_err();
    assert_eq!(
        error.cause,
        Cause::Libxl(LibxlError::UnknownCheckpointState { got: 4 })
    );
}

#[test]
fn padding_of_records_is_zero_unless_lenient() {
    let bytes = with(&record_padded(0x8000_0000, b"1", 0xff));
    let (field, at, got) = ("padding after the body", 9, 0x00ff_ffff_ffff_ffff);
    assert_eq!(
        broken_rule(&bytes, STRICT),
        LibxlError::ReservedNotZero { field, at, got }
    );
    assert_eq!(read(&bytes, LENIENT).unwrap().len(), 3);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = LibxlWriter::new(Vec::new(), LITTLE).unwrap();
    let refused = |writer: &mut LibxlWriter<Vec<u8>>, record: &LibxlRecord| {
        let before = writer.sink_mut().len();
        let error = writer.write(record).unwrap_err();
        assert_eq!(
            writer.sink_mut().len(),
            before,
            "nothing of it may be written"
        );
        match error {
            WrapperWriteError::Libxl { kind, cause } => {
                assert_eq!(kind, record.kind());
                cause
            }
            WrapperWriteError::Io(e) => panic!("{e}"),
        }
    };
    assert!(matches!(
        refused(&mut writer, &LibxlRecord::End),
        LibxlError::Order(_)
    ));
    writer.write(&LibxlRecord::LibxcContext).unwrap();
    let no_option = LibxlRecord::Optional {
        kind: LibxlRecordKind::EMULATOR_CONTEXT,
        body: vec![0; 8],
    };
    let error = refused(&mut writer, &no_option);
    assert_eq!(error, LibxlError::UnknownMandatory { kind: 3 });
    let too_long = LibxlRecord::EmulatorContext {
        emulator: QEMU,
        state: vec![0; MAX_BODY as usize - 7],
    };
    let got = u64::from(MAX_BODY) + 1;
    let error = refused(&mut writer, &too_long);
    assert_eq!(error, LibxlError::BodyTooLong { got, max: MAX_BODY });
    assert!(matches!(
        refused(&mut writer, &LibxlRecord::CheckpointEnd),
        LibxlError::Order(_)
    ));
    writer.write(&LibxlRecord::End).unwrap();
    assert!(matches!(
        refused(&mut writer, &LibxlRecord::End),
        LibxlError::Order(_)
    ));
}
