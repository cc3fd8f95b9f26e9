//! Tests of walks through whole files: layers, hand-overs, positions, and what is not read.

use std::io::{self, Cursor, Read};

use crate::support::build::*;
use crate::support::drive::{Cause, Failure};
use crate::support::images;
use crate::support::mutate::{cut_down, mutant, pieces};
use xsr_format::detect::{Compression, Detected};
use xsr_format::error::{Place, ReadError, ReadErrorCause};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::order::OrderError;
use xsr_format::read::ReadOptions;
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::{LibxlError, LibxlRecord};

const STRICT: ReadOptions = ReadOptions {
    lenient: false,
    offset: 0,
};

/// A step in words, with its offset.
type Said = (u64, String);

/// All steps, and the final result.
fn steps<R: Read>(walk: &mut Walk<R>) -> (Vec<Said>, Result<(), ReadError>) {
    let mut out = Vec::new();
    loop {
        let step = match walk.next_step() {
            Ok(Some(step)) => step,
            Ok(None) => return (out, Ok(())),
            Err(e) => return (out, Err(e)),
        };
        let said = match step.content {
            Content::XlHeader(header) => format!("xl {}", header.bytes()),
            Content::LibxlHeader(header) => format!("libxl {}", header.order),
            Content::LibxlRecord(record) => record.kind().to_string(),
            Content::Headers(image, domain) => {
                format!("libxc {} {}", image.version.number(), domain.guest_type)
            }
            Content::PageData(body) => format!("PAGE_DATA {}", body.entries().len()),
            Content::Record(record) => record.kind.to_string(),
        };
        out.push((step.position.offset, said));
    }
}

fn walk(bytes: &[u8]) -> (Vec<Said>, Result<(), ReadError>) {
    let mut walk = match Walk::open(bytes, STRICT) {
        Ok(walk) => walk,
        Err(e) => return (Vec::new(), Err(e)),
    };
    let stepped = steps(&mut walk);
    let mut seeking = Walk::open_seeking(Cursor::new(bytes), STRICT).unwrap();
    let (also, end) = steps(&mut seeking);
    assert_eq!(also, stepped.0);
    assert_eq!(end.is_ok(), stepped.1.is_ok());
    stepped
}

fn names(said: &[Said]) -> Vec<&str> {
    said.iter().map(|(_, name)| name.as_str()).collect()
}

/// An xl header with a configuration.
fn xl(flags: u32, config: &[u8]) -> Vec<u8> {
    let length = u32::try_from(config.len()).unwrap();
    Bytes::new(false)
        .bytes(b"Xen saved domain, xl format\n \0 \r")
        .u32(0x0102_0304)
        .u32(flags)
        .u32(0)
        .u32(length + 4)
        .u32(length)
        .bytes(config)
        .bytes
}

fn libxl_header(big: bool) -> Vec<u8> {
    let header = Bytes::new(true).bytes(b"LibxlFmt").u32(2);
    header.u32(u32::from(big)).bytes
}

/// A complete xl file with an emulator's records.
fn xl_file(big: bool) -> Vec<u8> {
    [
        xl(3, b"{}\0"),
        libxl_header(big),
        record(big, 1, b""),
        Stream::whole_hvm(3, big).bytes(),
        record(
            big,
            2,
            &Bytes::new(big).u32(2).u32(0).bytes(b"k\0v\0").bytes,
        ),
        record(big, 3, &Bytes::new(big).u32(2).u32(0).bytes(b"qemu!").bytes),
        record(big, 0, b""),
    ]
    .concat()
}

#[test]
fn a_file_of_xl() {
    for big in [false, true] {
        let file = xl_file(big);
        let (said, end) = walk(&file);
        end.unwrap();
        let order = if big {
            "libxl big endian"
        } else {
            "libxl little endian"
        };
        assert_eq!(
            names(&said),
            [
                "xl 55",
                order,
                "LIBXC_CONTEXT",
                "libxc 3 x86 HVM",
                "X86_CPUID_POLICY",
                "X86_MSR_POLICY",
                "STATIC_DATA_END",
                "PAGE_DATA 3",
                "PAGE_DATA 2",
                "X86_TSC_INFO",
                "HVM_CONTEXT",
                "HVM_PARAMS",
                "END",
                "EMULATOR_XENSTORE_DATA",
                "EMULATOR_CONTEXT",
                "END",
            ]
        );
        // Compares offsets with the sizes of the parts.
        assert_eq!(said[1].0, 55);
        assert_eq!(said[2].0, 55 + 16);
        assert_eq!(said[3].0, 55 + 16 + 8);
        let stream = Stream::whole_hvm(3, big);
        for (index, at) in stream.offsets().into_iter().enumerate() {
            assert_eq!(said[4 + index].0, 55 + 16 + 8 + at as u64);
        }
        let behind = (55 + 16 + 8 + stream.bytes().len()) as u64;
        assert_eq!(said[13].0, behind);
        assert_eq!(said[14].0, behind + 24);
        assert_eq!(said[15].0, behind + 24 + 24);
        assert_eq!(file.len() as u64, said[15].0 + 8);
    }
}

#[test]
fn offsets_count_from_where_the_file_begins() {
    let file = xl_file(false);
    let options = ReadOptions {
        offset: 1 << 40,
        ..STRICT
    };
    let mut moved = Walk::open(&file[..], options).unwrap();
    let (said, end) = steps(&mut moved);
    end.unwrap();
    let (plain, _) = walk(&file);
    assert!(said.iter().zip(&plain).all(|(a, b)| a.0 == b.0 + (1 << 40)));
    assert_eq!(moved.offset(), (1 << 40) + file.len() as u64);
}

#[test]
fn real_images() {
    for image in images::committed() {
        let mut walk = Walk::open(&image.bytes[..], STRICT).unwrap();
        assert_eq!(walk.detected(), Detected::Xl);
        let (said, end) = steps(&mut walk);
        end.unwrap();
        let behind = image.bytes.len() as u64 - walk.offset();
        // After the image of a migration come messages between its two ends.
        let talk: u64 = if image.name.ends_with("-live") { 44 } else { 0 };
        assert_eq!(behind, talk);
        assert_eq!(walk.expect_end().is_err(), talk != 0);
        let json = walk.xl().unwrap().json().unwrap().unwrap();
        assert!(json.starts_with('{') && json.contains("c_info"), "{json}");
        assert!(said.len() > 15);
    }
}

/// A source that fails the test if more is requested than belongs to the file.
struct Guarded<'a>(&'a [u8]);

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.0.len(), "read beyond the last record");
        self.0.read(room)
    }
}

#[test]
fn nothing_is_read_beyond_the_last_record() {
    let bare = Stream::whole_pv(3, false, 8).bytes();
    for file in [
        xl_file(false),
        xl_file(true)[55..].to_vec(),
        bare,
        checkpointed(true),
    ] {
        let mut walk = Walk::open(Guarded(&file), STRICT).unwrap();
        let (_, end) = steps(&mut walk);
        end.unwrap();
        assert!(walk.next_step().unwrap().is_none());
        assert_eq!(walk.into_source().unwrap().0, b"");
    }
}

/// A source that returns one byte at a time, interrupted before each.
struct Trickle<'a>(&'a [u8], bool);

impl Read for Trickle<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let some = room.len().min(1);
        self.0.read(&mut room[..some])
    }
}

#[test]
fn one_byte_at_a_time() {
    for file in [xl_file(false), checkpointed(true)] {
        let mut slow = Walk::open(Trickle(&file, false), STRICT).unwrap();
        let (said, end) = steps(&mut slow);
        end.unwrap();
        assert_eq!(said, walk(&file).0);
        slow.expect_end().unwrap();
    }
}

#[test]
fn expect_end() {
    let mut file = xl_file(false);
    let length = file.len() as u64;
    let mut early = Walk::open(&file[..], STRICT).unwrap();
    assert!(!early.expect_end().unwrap_err().is_bad_image());
    file.push(0);
    let mut walk = Walk::open(&file[..], STRICT).unwrap();
    steps(&mut walk).1.unwrap();
    let error = walk.expect_end().unwrap_err();
    assert!(matches!(error.cause, ReadErrorCause::Trailing));
    assert_eq!(error.position.place, Place::End);
    assert_eq!(error.position.offset, length);
}

/// A checkpointed stream: two checkpoints, then END. COLO sends its control word after each
/// CHECKPOINT_END.
fn checkpointed(colo: bool) -> Vec<u8> {
    let whole = Stream::whole_hvm(3, false).without(END);
    let at = whole.offsets()[3];
    let emulator = Bytes::new(false).u32(2).u32(0).bytes(b"abc").bytes;
    let again = whole.bytes()[at..].to_vec();
    let pause = |state: bool| {
        [
            record(false, CHECKPOINT, b""),
            record(false, 3, &emulator),
            record(false, 4, b""),
            if state {
                record(false, 5, &[0; 8])
            } else {
                Vec::new()
            },
        ]
        .concat()
    };
    [
        libxl_header(false),
        record(false, 1, b""),
        whole.bytes(),
        pause(colo),
        again.clone(),
        pause(colo),
        again,
        record(false, END, b""),
        record(false, 3, &emulator),
        record(false, 0, b""),
    ]
    .concat()
}

#[test]
fn checkpoints_hand_over_and_back() {
    let batch = [
        "PAGE_DATA 3",
        "PAGE_DATA 2",
        "X86_TSC_INFO",
        "HVM_CONTEXT",
        "HVM_PARAMS",
    ];
    for colo in [false, true] {
        let mut pause = vec!["CHECKPOINT", "EMULATOR_CONTEXT", "CHECKPOINT_END"];
        if colo {
            pause.push("CHECKPOINT_STATE");
        }
        let head = [
            "libxl little endian",
            "LIBXC_CONTEXT",
            "libxc 3 x86 HVM",
            "X86_CPUID_POLICY",
            "X86_MSR_POLICY",
            "STATIC_DATA_END",
        ];
        let tail = ["END", "EMULATOR_CONTEXT", "END"];
        let file = checkpointed(colo);
        let (said, end) = walk(&file);
        end.unwrap();
        let expected: Vec<&str> =
            [&head[..], &batch, &pause, &batch, &pause, &batch, &tail].concat();
        assert_eq!(names(&said), expected);
        // Steps are contiguous: each begins where the previous one ended.
        let record_at = |offset: u64| {
            let at = offset as usize;
            let length = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap());
            offset + 8 + u64::from(length.next_multiple_of(8))
        };
        for pair in said[3..].windows(2) {
            assert_eq!(record_at(pair[0].0), pair[1].0, "{pair:?}");
        }
        assert_eq!(record_at(said.last().unwrap().0), file.len() as u64);
    }
}

/// A caller that applies checkpoints gets the records that libxl keeps of each, up to a limit.
#[test]
fn the_records_of_a_checkpoint_are_bounded() {
    let file = checkpointed(false);
    let around = || {
        Walk::open(&file[..], STRICT)
            .unwrap()
            .into_libxc()
            .unwrap()
            .1
    };
    let emulator = Bytes::new(false).u32(2).u32(0).bytes(b"abc").bytes;
    let behind = [
        record(false, 3, &emulator),
        record(false, 0x8000_0007, b"left out"),
        record(false, 4, b""),
    ]
    .concat();
    let (records, bytes) = around().checkpoint(&mut &behind[..], 1000).unwrap();
    assert!(matches!(records[..], [LibxlRecord::EmulatorContext { .. }]));
    assert_eq!(bytes, behind.len() as u64);

    // 48 MiB, repeatedly.
    const LENGTH: u32 = 48 << 20;
    let one = || {
        let head = Bytes::new(false).u32(3).u32(LENGTH).u32(2).u32(0).bytes;
        Cursor::new(head).chain(io::repeat(7).take(u64::from(LENGTH) - 8))
    };
    let mut source = one().chain(one()).chain(one()).chain(one());
    let error = around().checkpoint(&mut source, 1000).unwrap_err();
    assert_eq!(error.position.offset, 1000 + 2 * (8 + u64::from(LENGTH)));
    assert!(
        matches!(
            error.cause,
            ReadErrorCause::Libxl(LibxlError::CheckpointTooLong { .. })
        ),
        "{error}"
    );
}

/// The number of COLO's control word is also that of a record of PV guests.
#[test]
fn a_pv_record_behind_a_checkpoint_is_no_control_word() {
    let whole = Stream::whole_pv(3, false, 8).without(END);
    let again = Stream::new(3, PV, false)
        .vcpu(VCPU_EXTENDED, 0, 64)
        .empty(END);
    let file = [
        libxl_header(false),
        record(false, 1, b""),
        whole.bytes(),
        record(false, CHECKPOINT, b""),
        record(false, 4, b""),
        again.bytes()[40..].to_vec(),
        record(false, 0, b""),
    ]
    .concat();
    let (said, end) = walk(&file);
    end.unwrap();
    let names = names(&said);
    let tail = [
        "CHECKPOINT",
        "CHECKPOINT_END",
        "X86_PV_VCPU_EXTENDED",
        "END",
        "END",
    ];
    assert!(names.ends_with(&tail), "{names:?}");
}

/// A bare libxc stream has no other layer to hand over to.
#[test]
fn checkpoints_of_a_bare_stream() {
    let whole = Stream::whole_hvm(3, false).without(END);
    let mut stream = whole.clone().empty(CHECKPOINT);
    stream.records.extend_from_slice(&whole.records[3..]);
    let bytes = stream.empty(END).bytes();
    let (said, end) = walk(&bytes);
    end.unwrap();
    assert_eq!(said.len(), 1 + 8 + 1 + 5 + 1);
}

#[track_caller]
fn fails(file: &[u8], place: Place, offset: u64, check: impl Fn(&ReadErrorCause) -> bool) {
    let (_, end) = walk(file);
    let error = end.unwrap_err();
    assert_eq!(error.position.place, place, "{error}");
    assert_eq!(error.position.offset, offset, "{error}");
    assert!(check(&error.cause), "{error}");
    assert!(error.is_bad_image());
}

#[test]
fn errors_name_the_layer() {
    let file = xl_file(false);
    let change = |at: usize, byte: u8| {
        let mut file = file.clone();
        file[at] = byte;
        file
    };
    let xl = |cause: &ReadErrorCause| matches!(cause, ReadErrorCause::Xl(_));
    let libxl = |cause: &ReadErrorCause| matches!(cause, ReadErrorCause::Libxl(_));
    let libxc = |cause: &ReadErrorCause| matches!(cause, ReadErrorCause::Decode(_));
    fails(&change(10, b'X'), Place::XlHeader, 0, xl);
    fails(&change(54, b'}'), Place::XlOptionalData, 48, xl);
    fails(&change(55, b'l'), Place::LibxlHeader, 55, libxl);
    let kind = Some(LibxlRecord::LibxcContext.kind());
    let context = Place::LibxlRecord { index: 0, kind };
    fails(&change(75, 8), context, 71, libxl);
    fails(&change(79, 0), Place::ImageHeader, 79, libxc);
    fails(&change(79 + 24, 0), Place::DomainHeader, 79 + 24, libxc);
    let first = Place::Record {
        index: 0,
        kind: Some(RecordKind(0x71)),
    };
    fails(&change(79 + 40, 0x71), first, 79 + 40, libxc);
    let last = file.len() as u64 - 8;
    let index = 3;
    let kind = Some(xsr_format::wrapper::libxl::LibxlRecordKind(0x99));
    let place = Place::LibxlRecord { index, kind };
    fails(&change(file.len() - 8, 0x99), place, last, |cause| {
        matches!(
            cause,
            ReadErrorCause::Libxl(LibxlError::UnknownMandatory { kind: 0x99 })
        )
    });
}

/// The missing bytes of every layer when the file is truncated there.
#[test]
fn truncated_at_every_byte() {
    for file in [xl_file(false), checkpointed(true), checkpointed(false)] {
        let (whole, end) = walk(&file);
        end.unwrap();
        let mut last_place = None;
        // For the inside of pages, some bytes represent all.
        let in_page = |cut: &usize| file[cut - 8..*cut].windows(2).all(|w| w[0] == w[1]);
        for cut in (8..file.len()).filter(|cut| !in_page(cut) || cut % 61 == 0) {
            let mut seeking = Walk::open_seeking(Cursor::new(&file[..cut]), STRICT).unwrap();
            let (skipped, end) = steps(&mut seeking);
            let failure = Failure::from(end.unwrap_err());
            let mut reading = Walk::open(&file[..cut], STRICT).unwrap();
            let (said, end) = steps(&mut reading);
            assert_eq!(failure, Failure::from(end.unwrap_err()));
            assert_eq!(said, skipped);
            assert_eq!(said, whole[..said.len()]);
            let Cause::Truncated(needed) = failure.cause else {
                panic!("{cut}: {failure:?}");
            };
            let at = failure.position.offset;
            assert!(needed > 0 && at <= cut as u64, "{cut}: {failure:?}");
            // The missing bytes belong to the step that fails.
            let next = whole.iter().map(|w| w.0).find(|o| *o > at);
            let next = next.unwrap_or(file.len() as u64);
            let headers = matches!(
                failure.position.place,
                Place::ImageHeader | Place::DomainHeader
            );
            if !headers && failure.position.place != Place::XlHeader {
                assert!(cut as u64 + needed <= next, "{cut}: {failure:?}");
            }
            // If a record's length is known, all its missing bytes are reported.
            let known = match failure.position.place {
                Place::LibxlRecord { kind, .. } => kind.is_some(),
                Place::Record { kind, .. } => kind.is_some_and(|k| k != RecordKind::PAGE_DATA),
                _ => false,
            };
            if known {
                assert_eq!(cut as u64 + needed, next, "{cut}: {failure:?}");
            }
            if last_place != Some(failure.position) {
                assert!(
                    last_place.is_none_or(|p| p.offset < at || p.place != failure.position.place)
                );
                last_place = Some(failure.position);
            }
        }
    }
}

#[test]
fn what_is_recognised_but_not_read() {
    let legacy = Bytes::new(false)
        .u64(0x8000)
        .u32(u32::MAX)
        .fill(0, 20)
        .bytes;
    for (bytes, detected) in [
        (
            b"libvirt-xml\n \0 \r and more of it".to_vec(),
            Detected::Libvirt,
        ),
        (b"XenSavedDomv2-\n and more of it".to_vec(), Detected::Xapi),
        (
            b"\x28\xb5\x2f\xfd\x24\0\0\0\0".to_vec(),
            Detected::Compressed(Compression::Zstd),
        ),
        (b"".to_vec(), Detected::Empty),
        (b"\x01\x02\x03\xf4 and more".to_vec(), Detected::Unknown),
    ] {
        let error = Walk::open(&bytes[..], STRICT).unwrap_err();
        assert_eq!(error.position.place, Place::Start);
        match error.cause {
            ReadErrorCause::Unreadable(got) => assert_eq!(got, detected),
            other => panic!("{other}"),
        }
    }
    let error = Walk::open(&legacy[..], STRICT).unwrap_err();
    assert!(matches!(
        error.cause,
        ReadErrorCause::Unreadable(Detected::Legacy(_))
    ));
    // … and inside an xl file.
    let file = [xl(1, b"{}\0"), legacy].concat();
    let mut walk = Walk::open(&file[..], STRICT).unwrap();
    let (said, end) = steps(&mut walk);
    assert_eq!(names(&said), ["xl 55"]);
    let error = end.unwrap_err();
    assert_eq!(error.position.offset, 55);
    assert!(matches!(
        error.cause,
        ReadErrorCause::Unreadable(Detected::Legacy(_))
    ));
}

/// A restorer takes over the libxc stream and returns the source after END.
#[test]
fn the_libxc_stream_taken_over() {
    for steps_before in 0..6 {
        let file = xl_file(false);
        let mut walk = Walk::open(Guarded(&file), STRICT).unwrap();
        for _ in 0..steps_before {
            walk.next_step().unwrap().unwrap();
        }
        let (mut reader, around) = walk.into_libxc().unwrap();
        assert_eq!(around.detected(), Detected::Xl);
        assert_eq!(around.xl().unwrap().json().unwrap(), Some("{}"));
        assert!(around.libxl().is_some());
        let passed_over = usize::from(steps_before < 3);
        assert_eq!(around.before().len(), passed_over);
        let mut pages = 0;
        while let Some(incoming) = reader.next_record().unwrap() {
            if let xsr_format::read::Incoming::PageData(mut body) = incoming {
                while body.read_page(&mut [0; PAGE_SIZE]).unwrap() {
                    pages += 1;
                }
            }
        }
        assert_eq!(pages, 3);
        let offset = reader.offset();
        let mut walk = around.resume(reader.into_source(), offset);
        let (said, end) = steps(&mut walk);
        end.unwrap();
        assert_eq!(
            names(&said),
            ["EMULATOR_XENSTORE_DATA", "EMULATOR_CONTEXT", "END"]
        );
        assert_eq!(said[2].0 + 8, file.len() as u64);
    }
    let file = xl_file(false);
    let mut walk = Walk::open(&file[..], STRICT).unwrap();
    steps(&mut walk).1.unwrap();
    assert!(walk.into_libxc().is_err());

    let bare = Stream::whole_pv(3, false, 4).bytes();
    let (reader, around) = Walk::open(&bare[..], STRICT).unwrap().into_libxc().unwrap();
    assert!(around.xl().is_none() && around.libxl().is_none());
    let offset = reader.offset();
    assert_eq!(offset, 40);
    assert!(
        around
            .resume(reader.into_source(), offset)
            .next_step()
            .unwrap()
            .is_none()
    );
}

#[test]
fn rules_hold_across_the_layers() {
    // END inside a checkpoint; a second LIBXC_CONTEXT; records missing before CHECKPOINT.
    let file = checkpointed(false);
    let (said, _) = walk(&file);
    let end = said.iter().find(|s| s.1 == "CHECKPOINT_END").unwrap().0;
    let mut bad = file.clone();
    bad[end as usize] = 0;
    let error = walk(&bad).1.unwrap_err();
    assert!(
        matches!(error.cause, ReadErrorCause::Libxl(LibxlError::Order(_))),
        "{error}"
    );

    let mut bad = file.clone();
    let context = said.iter().find(|s| s.1 == "HVM_CONTEXT").unwrap().0;
    bad[context as usize..context as usize + 4].copy_from_slice(&0x8000_0000_u32.to_le_bytes());
    let error = walk(&bad).1.unwrap_err();
    let kind = RecordKind::CHECKPOINT;
    let missing = RecordKind::HVM_CONTEXT;
    assert_eq!(
        error.decode(),
        Some(&OrderError::Incomplete { kind, missing }.into())
    );
    let mut failed = Walk::open(&bad[..], STRICT).unwrap();
    steps(&mut failed).1.unwrap_err();
    assert!(failed.next_step().is_err(), "there is no going on");
}

/// Damaged files: no panic, and a seekable source gives the same result.
#[test]
fn mutants() {
    let mut bases = vec![xl_file(false), checkpointed(true), checkpointed(false)];
    bases.extend(images::committed().iter().map(|i| cut_down(&i.bytes, 3, 4)));
    for base in bases {
        walk(&base).1.unwrap();
        let pieces = pieces(&base);
        let mut refused = 0;
        for seed in 0..400 {
            let file = mutant(&pieces, seed);
            for lenient in [false, true] {
                let options = ReadOptions { lenient, ..STRICT };
                let all = |walk: Result<Walk<_>, ReadError>| match walk {
                    Ok(mut walk) => steps(&mut walk),
                    Err(e) => (Vec::new(), Err(e)),
                };
                let (said, end) = all(Walk::open(Cursor::new(&file), options));
                let (also, other) = all(Walk::open_seeking(Cursor::new(&file), options));
                assert_eq!(said, also);
                refused += usize::from(end.is_err());
                assert_eq!(end.map_err(Failure::from), other.map_err(Failure::from));
            }
        }
        assert!((100..790).contains(&refused), "{refused} of 800 refused");
    }
}
