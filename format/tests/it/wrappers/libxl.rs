//! Tests of the libxl stream: real ones, and every record in both byte orders.

use std::io;

use proptest::prelude::*;
use xsr_format::byte_order::ByteOrder;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::wrapper::libxl::{
    CheckpointState, EmulatorId, EmulatorInstance, LibxlHeader, LibxlReader, LibxlRecord,
    LibxlRecordKind, LibxlWriter, XenstoreData,
};
use xsr_format::wrapper::xl::XlHeader;

use crate::support::images::Image;
use crate::wrappers::failure::{Cause, Failure};
use crate::wrappers::{Broken, Counting, LENIENT, STRICT, all_images};

pub(crate) const LITTLE: LibxlHeader = LibxlHeader {
    order: ByteOrder::Little,
    legacy_converted: false,
};

pub(crate) const QEMU: EmulatorInstance = EmulatorInstance {
    id: EmulatorId::QemuUpstream,
    index: 0,
};

/// A header built by hand.
pub(crate) fn header(options: u32) -> Vec<u8> {
    [&b"LibxlFmt\0\0\0\x02"[..], &options.to_be_bytes()].concat()
}

/// A record built by hand, little endian, padded with `pad`.
pub(crate) fn record_padded(kind: u32, body: &[u8], pad: u8) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let mut out = [&kind.to_le_bytes(), &length.to_le_bytes(), body].concat();
    out.resize(out.len().next_multiple_of(8), pad);
    out
}

/// A record built by hand, little endian.
pub(crate) fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    record_padded(kind, body, 0)
}

/// Reads all records of a stream. `begin` is called with each record's index, and tells whether a
/// checkpoint begins there.
pub(crate) fn read_with(
    bytes: &[u8],
    options: ReadOptions,
    begin: impl Fn(usize) -> bool,
) -> Result<Vec<LibxlRecord>, Failure> {
    let mut reader = LibxlReader::new(bytes, options)?;
    let mut records = Vec::new();
    loop {
        if begin(records.len()) {
            reader.begin_checkpoint();
        }
        match reader.next_record()? {
            Some(record) => records.push(record),
            None => return Ok(records),
        }
    }
}

/// Reads all records of a stream whose libxc stream is empty.
pub(crate) fn read(bytes: &[u8], options: ReadOptions) -> Result<Vec<LibxlRecord>, Failure> {
    read_with(bytes, options, |_| false)
}

/// One record of each kind, in a permitted order; a checkpoint begins before the third.
fn every_record() -> Vec<LibxlRecord> {
    let trad = EmulatorInstance {
        id: EmulatorId::QemuTraditional,
        index: 0x0102_0304,
    };
    let data = XenstoreData::from_pairs([("physmap/f0/start_addr", "f0"), ("@a-b_c/D", "")]);
    vec![
        LibxlRecord::LibxcContext,
        LibxlRecord::Optional {
            kind: LibxlRecordKind(0x8000_0006),
            body: b"abc".to_vec(),
        },
        LibxlRecord::EmulatorXenstoreData {
            emulator: trad,
            data: data.unwrap(),
        },
        LibxlRecord::EmulatorContext {
            emulator: QEMU,
            state: b"QEVM\0".to_vec(),
        },
        LibxlRecord::CheckpointEnd,
        LibxlRecord::CheckpointState(CheckpointState::Resumed),
        LibxlRecord::End,
    ]
}

const CHECKPOINT_BEFORE: usize = 2;

fn write(header: LibxlHeader, records: &[LibxlRecord]) -> Vec<u8> {
    let mut writer = LibxlWriter::new(Vec::new(), header).unwrap();
    for (index, record) in records.iter().enumerate() {
        if index == CHECKPOINT_BEFORE {
            writer.begin_checkpoint();
        }
        writer.write(record).unwrap();
    }
    writer.into_sink()
}

/// The oracle is libxl's own bytes: split at each hand-over and reassembled, they are unchanged,
/// and every offset is right.
#[test]
fn real_images_come_back_byte_for_byte() {
    for Image { name, bytes: image } in all_images() {
        let mut source = image.as_slice();
        let xl = XlHeader::read(&mut source, STRICT).unwrap();
        let options = ReadOptions {
            lenient: false,
            offset: xl.bytes(),
        };
        let mut reader = LibxlReader::new(source, options).unwrap();
        let mut out = xl.encode();
        let mut writer = LibxlWriter::new(&mut out, reader.header()).unwrap();
        let mut kinds = Vec::new();
        while let Some(record) = reader.next_record().unwrap() {
            kinds.push(record.kind());
            writer.write(&record).unwrap();
            if record == LibxlRecord::LibxcContext {
                let offset = reader.offset();
                let from = reader.source_mut();
                let options = ReadOptions {
                    lenient: false,
                    offset,
                };
                let mut libxc = RecordReader::new(&mut *from, options).unwrap();
                while libxc.next_record().unwrap().is_some() {}
                let bytes = libxc.offset() - offset;
                let start = usize::try_from(offset).unwrap();
                let end = usize::try_from(offset + bytes).unwrap();
                io::Write::write_all(writer.sink_mut(), &image[start..end]).unwrap();
                reader.advance(bytes);
            }
        }
        assert_eq!(reader.offset(), out.len() as u64, "{name}");
        // `xl migrate` continues with the first word of its own protocol, which is not part of the
        // stream. The reader must not have consumed it.
        let rest = match name.ends_with("-live") {
            true => &b"domain is yours, you are cleared to unpause\0"[..],
            false => b"",
        };
        assert_eq!(reader.into_source(), rest, "{name}");
        out.extend(rest);
        assert!(out == image, "{name} comes back different");
        let hvm = xl.json().unwrap().unwrap().contains("\"type\": \"hvm\"");
        let mut expected = vec![LibxlRecordKind::LIBXC_CONTEXT, LibxlRecordKind::END];
        if hvm {
            expected.insert(1, LibxlRecordKind::EMULATOR_CONTEXT);
        }
        assert_eq!(kinds, expected, "{name}");
    }
}

/// The bytes match the specification's diagrams, written out by hand.
#[test]
fn every_record_is_encoded_as_the_specification_draws_it() {
    let little = [
        header(0),
        record(1, b""),
        record(0x8000_0006, b"abc"),
        record(
            2,
            b"\x01\0\0\0\x04\x03\x02\x01physmap/f0/start_addr\0f0\0@a-b_c/D\0\0",
        ),
        record(3, b"\x02\0\0\0\0\0\0\0QEVM\0"),
        record(4, b""),
        record(5, b"\x03\0\0\0\0\0\0\0"),
        record(0, b""),
    ]
    .concat();
    assert_eq!(write(LITTLE, &every_record()), little);
    let big = LibxlHeader {
        order: ByteOrder::Big,
        legacy_converted: true,
    };
    let big = write(big, &every_record());
    assert_eq!(big.len(), little.len());
    assert_eq!(big[..16], header(3));
    assert_eq!(big[24..35], *b"\x80\0\0\x06\0\0\0\x03abc");
    assert_eq!(big[48..56], *b"\0\0\0\x01\x01\x02\x03\x04");
}

/// From the review: only the identifying header has a fixed byte order. The rest follows its option
/// bit, and both orders are read.
#[test]
fn both_byte_orders_are_read_and_written() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        for legacy_converted in [false, true] {
            let header = LibxlHeader {
                order,
                legacy_converted,
            };
            let bytes = write(header, &every_record());
            let mut source = Counting::new(&bytes);
            let reader = LibxlReader::new(&mut source, STRICT).unwrap();
            assert_eq!(reader.header(), header);
            let records = read_with(&bytes, STRICT, |index| index == CHECKPOINT_BEFORE);
            assert_eq!(records.unwrap(), every_record());
        }
    }
}

#[test]
fn a_stream_cut_at_any_byte_is_truncated_there() {
    let bytes = write(LITTLE, &every_record());
    // The offset and name of each reported structure.
    let mut parts = vec![(0, "libxl header".to_owned())];
    let mut at = 16;
    for (index, record) in every_record().iter().enumerate() {
        parts.push((at, format!("libxl record {index}")));
        let named = format!("libxl record {index} ({})", record.kind());
        parts.push((at + 8, named));
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        at += 8 + (length as usize).next_multiple_of(8);
    }
    assert_eq!(at, bytes.len());
    for end in 0..bytes.len() {
        let options = ReadOptions {
            offset: 1000,
            ..STRICT
        };
        let begin = |index| index == CHECKPOINT_BEFORE;
        let error = read_with(&bytes[..end], options, begin).unwrap_err();
        let (begins, place) = parts.iter().rfind(|(at, _)| *at <= end).unwrap();
        assert_eq!(&error.place, place, "cut at {end}");
        // A record is reported from its header on, wherever the stream ends inside it.
        let header = if place.ends_with(')') { 8 } else { 0 };
        assert_eq!(
            error.offset,
            1000 + (begins - header) as u64,
            "cut at {end}"
        );
        let Cause::Truncated(needed) = error.cause else {
            panic!("cut at {end}: {error:?}");
        };
        assert!(
            (1..=(bytes.len() - end) as u64).contains(&needed),
            "cut at {end}"
        );
    }
}

#[test]
fn nothing_is_read_behind_a_record() {
    let mut bytes = write(LITTLE, &every_record());
    let whole = bytes.len();
    bytes.extend(b"whose is this?");
    let mut reader = LibxlReader::new(Counting::new(&bytes), STRICT).unwrap();
    let mut taken = 16;
    for (index, expected) in every_record().iter().enumerate() {
        assert_eq!(
            (reader.source_mut().taken, reader.source_mut().asked),
            (taken, taken)
        );
        assert_eq!(reader.offset(), taken as u64);
        if index == CHECKPOINT_BEFORE {
            reader.begin_checkpoint();
        }
        assert_eq!(reader.next_record().unwrap().as_ref(), Some(expected));
        let length = u32::from_le_bytes(bytes[taken + 4..taken + 8].try_into().unwrap());
        taken += 8 + (length as usize).next_multiple_of(8);
    }
    assert_eq!(taken, whole);
    assert_eq!(reader.next_record().unwrap(), None);
    assert_eq!(reader.next_record().unwrap(), None);
    assert_eq!(reader.into_source().asked, whole);
}

#[test]
fn a_failed_stream_cannot_be_followed() {
    let bytes = [header(0), record(0x77, b""), record(1, b""), record(0, b"")].concat();
    let mut reader = LibxlReader::new(Counting::new(&bytes), STRICT).unwrap();
    assert!(reader.next_record().unwrap_err().is_bad_image());
    let taken = reader.source_mut().taken;
    let error = Failure::from(reader.next_record().unwrap_err());
    assert_eq!(error.cause, Cause::Io(io::ErrorKind::Other));
    assert_eq!(reader.into_source().taken, taken);
    // This also holds after a failure in its last record.
    let bytes = [header(0), record(1, b""), record(0, b"")].concat();
    let mut reader = LibxlReader::new(&bytes[..bytes.len() - 1], STRICT).unwrap();
    reader.next_record().unwrap();
    reader.next_record().unwrap_err();
    reader.next_record().unwrap_err();
}

#[test]
fn a_failing_source_is_not_blamed_on_the_image() {
    let error = LibxlReader::new(Broken, STRICT).unwrap_err();
    assert!(!error.is_bad_image());
    let error = Failure::from(error);
    assert_eq!(error.cause, Cause::Io(io::ErrorKind::PermissionDenied));
}

/// A record of any kind.
fn any_record() -> impl Strategy<Value = LibxlRecord> {
    let emulator = || {
        let id = prop_oneof![
            Just(EmulatorId::Unknown),
            Just(EmulatorId::QemuTraditional),
            Just(EmulatorId::QemuUpstream)
        ];
        (id, any::<u32>()).prop_map(|(id, index)| EmulatorInstance { id, index })
    };
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    let pairs = proptest::collection::vec(("[-/_@A-Za-z0-9]{1,8}", "[^\0]{0,8}"), 0..4);
    prop_oneof![
        (emulator(), pairs).prop_map(|(emulator, pairs)| {
            let pairs = pairs
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()));
            let data = XenstoreData::from_pairs(pairs).unwrap();
            LibxlRecord::EmulatorXenstoreData { emulator, data }
        }),
        (emulator(), bytes())
            .prop_map(|(emulator, state)| LibxlRecord::EmulatorContext { emulator, state }),
        (0x8000_0000..=u32::MAX, bytes()).prop_map(|(kind, body)| LibxlRecord::Optional {
            kind: LibxlRecordKind(kind),
            body
        }),
    ]
}

/// The bytes of a stream of any records, with a few bytes changed.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4);
    (proptest::collection::vec(any_record(), 0..4), changes).prop_map(|(mut records, changes)| {
        records.insert(0, LibxlRecord::LibxcContext);
        records.push(LibxlRecord::End);
        let mut writer = LibxlWriter::new(Vec::new(), LITTLE).unwrap();
        for record in &records {
            writer.write(record).unwrap();
        }
        let mut bytes = writer.into_sink();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        mut records in proptest::collection::vec(any_record(), 0..6),
        order in prop_oneof![Just(ByteOrder::Little), Just(ByteOrder::Big)],
        at in any::<proptest::sample::Index>(),
    ) {
        records.insert(at.index(records.len() + 1), LibxlRecord::LibxcContext);
        records.push(LibxlRecord::End);
        let header = LibxlHeader { order, ..LITTLE };
        let mut writer = LibxlWriter::new(Vec::new(), header).unwrap();
        for record in &records {
            writer.write(record).unwrap();
        }
        prop_assert_eq!(read(&writer.into_sink(), STRICT).unwrap(), records);
    }

    /// No input panics or makes the reader request more than a record has, and lenient reading
    /// differs only in what it tolerates.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..128),
        damaged(),
        damaged(),
    ], checkpoint in any::<bool>()) {
        let begin = |index| checkpoint && index == 1;
        let strict = read_with(&bytes, STRICT, begin);
        let lenient = read_with(&bytes, LENIENT, begin);
        match (&strict, lenient) {
            (Ok(strict), lenient) => prop_assert_eq!(strict, &lenient.unwrap()),
            (Err(error), lenient) => {
                let reserved = matches!(
                    &error.cause,
                    Cause::Libxl(xsr_format::wrapper::libxl::LibxlError::ReservedNotZero { .. })
                );
                prop_assert!(reserved || lenient.unwrap_err() == *error);
            }
        }
        let mut source = Counting::new(&bytes);
        let Ok(mut reader) = LibxlReader::new(&mut source, STRICT) else {
            return Ok(());
        };
        let mut records = 0;
        loop {
            if begin(records) {
                reader.begin_checkpoint();
            }
            let next = reader.next_record();
            let offset = reader.offset();
            let source = reader.source_mut();
            match next {
                Ok(next) => {
                    prop_assert_eq!(offset, source.taken as u64);
                    prop_assert_eq!(source.asked, source.taken);
                    records += 1;
                    if next.is_none() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
    }
}
