//! Tests of the xl file header, against headers that xl wrote.

use std::io;

use proptest::prelude::*;
use xsr_format::byte_order::ByteOrder;
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::xl::{
    FLAG_JSON, FLAG_STREAM_V2, MAGIC, MAX_CONFIG, MAX_OPTIONAL_DATA, XlError, XlHeader,
    begins_legacy,
};

use crate::support::images::{self, Image};
use crate::wrappers::failure::{Cause, Failure};
use crate::wrappers::{Broken, Counting, LENIENT, STRICT};

const HEADER: &str = "xl header";
const DATA: &str = "xl header, optional data";

/// A header built by hand.
fn header(order: ByteOrder, mandatory: u32, optional: u32, data: &[u8]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for field in [
        0x0102_0304,
        mandatory,
        optional,
        u32::try_from(data.len()).unwrap(),
    ] {
        out.extend(match order {
            ByteOrder::Little => field.to_le_bytes(),
            ByteOrder::Big => field.to_be_bytes(),
        });
    }
    out.extend(data);
    out
}

/// Optional data: a little-endian length, and what follows.
fn with_length(length: u32, config: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), config].concat()
}

fn read(bytes: &[u8], options: ReadOptions) -> Result<XlHeader, Failure> {
    XlHeader::read(bytes, options).map_err(Failure::from)
}

fn failure(place: &str, offset: u64, cause: Cause) -> Failure {
    Failure {
        place: place.to_owned(),
        offset,
        cause,
    }
}

fn broken_rule(bytes: &[u8], options: ReadOptions) -> XlError {
    match read(bytes, options)
        .expect_err("the header should be refused")
        .cause
    {
        Cause::Xl(e) => e,
        other => panic!("{other:?} is no rule that was broken"),
    }
}

/// The oracle is xl's own bytes: read and written again they are unchanged, and a header made from
/// only the configuration is the same.
#[test]
fn headers_of_real_images_come_back_byte_for_byte() {
    for Image { name, bytes: image } in images::committed() {
        let mut source = Counting::new(&image);
        let header = XlHeader::read(&mut source, STRICT).unwrap();
        let bytes = header.encode();
        assert_eq!(bytes, image[..bytes.len()], "{name}");
        assert_eq!(header.bytes(), bytes.len() as u64, "{name}");
        assert_eq!(
            (source.taken, source.asked),
            (bytes.len(), bytes.len()),
            "{name}"
        );
        assert!(image[bytes.len()..].starts_with(b"LibxlFmt"), "{name}");

        assert_eq!(header.byte_order(), ByteOrder::Little);
        assert_eq!(header.mandatory_flags(), FLAG_JSON | FLAG_STREAM_V2);
        assert_eq!(header.optional_flags(), 0);
        assert!(header.is_stream_v2());
        assert_eq!(header.optional_tail(), b"");
        let json = header
            .json()
            .unwrap()
            .expect("xl writes its configuration as JSON");
        assert!(
            json.starts_with("{\n    \"c_info\": {\n") && json.ends_with("}\n"),
            "{json}"
        );
        assert_eq!(header.config().unwrap().len(), json.len() + 1);

        let mut written = Vec::new();
        XlHeader::new(json).unwrap().write(&mut written).unwrap();
        assert_eq!(written, bytes, "{name}");
    }
}

#[test]
fn a_header_cut_at_any_byte_is_truncated_there() {
    let image = &images::committed()[0].bytes;
    let whole = usize::try_from(read(image, STRICT).unwrap().bytes()).unwrap();
    for end in 0..whole {
        let options = ReadOptions {
            offset: 1000,
            ..STRICT
        };
        // The magic, the other fields, and the optional data are read separately.
        let (place, offset, part_end) = match end {
            0..32 => (HEADER, 1000, 32),
            32..48 => (HEADER, 1000, 48),
            _ => (DATA, 1048, whole),
        };
        let needed = Cause::Truncated((part_end - end) as u64);
        assert_eq!(
            read(&image[..end], options).unwrap_err(),
            failure(place, offset, needed),
            "cut at {end}"
        );
    }
    read(&image[..whole], STRICT).unwrap();
}

/// From the review: only the identifying part of a file has a fixed byte order. The rest says its
/// own, and both orders are read.
#[test]
fn both_byte_orders_are_read_and_written() {
    let json = b"{}\0";
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let length = match order {
            ByteOrder::Little => 3_u32.to_le_bytes(),
            ByteOrder::Big => 3_u32.to_be_bytes(),
        };
        let data = [length.as_slice(), json].concat();
        let bytes = header(order, FLAG_JSON | FLAG_STREAM_V2, 0, &data);
        let header = read(&bytes, STRICT).unwrap();
        assert_eq!(header.byte_order(), order);
        assert_eq!(header.json().unwrap(), Some("{}"));
        assert_eq!(header.encode(), bytes);
    }
    let mut neither = header(ByteOrder::Little, 0, 0, b"");
    neither[32..36].copy_from_slice(&[2, 1, 4, 3]);
    let error = XlError::ByteOrderMark { got: [2, 1, 4, 3] };
    assert_eq!(
        read(&neither, LENIENT).unwrap_err(),
        failure(HEADER, 0, Cause::Xl(error))
    );
}

#[test]
fn a_wrong_magic_is_refused_before_anything_else_is_waited_for() {
    for at in 0..32 {
        let mut bytes = header(ByteOrder::Little, 3, 0, b"");
        bytes[at] ^= 0x20;
        let mut source = Counting::new(&bytes);
        let error = XlHeader::read(&mut source, LENIENT).unwrap_err();
        let got = bytes[..32].try_into().unwrap();
        assert_eq!(
            Failure::from(error).cause,
            Cause::Xl(XlError::Magic { got })
        );
        assert_eq!(source.asked, 32);
    }
}

#[test]
fn an_unknown_mandatory_flag_is_named_and_never_tolerated() {
    for bit in 2..32 {
        for options in [STRICT, LENIENT] {
            let got = 1 << bit | 3;
            let bytes = header(ByteOrder::Little, got, 0, b"");
            let error = broken_rule(&bytes, options);
            assert_eq!(error, XlError::UnknownMandatoryFlag { bit, got });
            assert!(error.to_string().contains(&format!("bit {bit} ")));
        }
    }
}

/// From the review: reserved fields that must be ignored can never be given a meaning.
#[test]
fn reserved_optional_flags_must_be_zero_unless_lenient() {
    for bit in 0..32 {
        let bytes = header(ByteOrder::Little, 3, 1 << bit, &with_length(3, b"{}\0"));
        let error = broken_rule(&bytes, STRICT);
        assert_eq!(error, XlError::OptionalFlags { got: 1 << bit });
        let header = read(&bytes, LENIENT).unwrap();
        assert_eq!(header.optional_flags(), 1 << bit);
        assert_eq!(header.encode(), bytes);
    }
}

#[test]
fn a_length_beyond_the_limit_is_refused_and_one_below_it_not_believed() {
    let mut bytes = header(ByteOrder::Little, 3, 0, b"");
    for length in [MAX_OPTIONAL_DATA + 1, u32::MAX] {
        bytes[44..48].copy_from_slice(&length.to_le_bytes());
        let error = broken_rule(&bytes, LENIENT);
        let (got, max) = (u64::from(length), MAX_OPTIONAL_DATA);
        assert_eq!(error, XlError::OptionalDataTooLong { got, max });
    }
    bytes[44..48].copy_from_slice(&MAX_OPTIONAL_DATA.to_le_bytes());
    bytes.extend([0; 10]);
    let mut source = Counting::new(&bytes);
    let error = XlHeader::read(&mut source, STRICT).unwrap_err();
    let needed = u64::from(MAX_OPTIONAL_DATA) - 10;
    assert_eq!(
        Failure::from(error),
        failure(DATA, 48, Cause::Truncated(needed))
    );
    // Memory is allocated as bytes arrive, a MiB at a time, not for the announced length.
    assert_eq!(source.asked, 48 + (1 << 20));
}

#[test]
fn optional_data_must_hold_what_they_announce() {
    for (data, what, expected) in [
        (&b"\x01"[..], "length of the configuration", 4),
        (b"\x01\x00\x00", "length of the configuration", 4),
        (b"\x01\x00\x00\x00", "configuration", 5),
        (b"\xff\xff\xff\xff\x00", "configuration", (1 << 32) + 3),
    ] {
        let bytes = header(ByteOrder::Little, FLAG_STREAM_V2, 0, data);
        let got = data.len() as u64;
        let error = XlError::OptionalDataTooShort {
            what,
            expected,
            got,
        };
        assert_eq!(
            read(&bytes, LENIENT).unwrap_err(),
            failure(DATA, 48, Cause::Xl(error))
        );
    }
}

#[test]
fn a_json_configuration_is_one_c_string() {
    for (config, first_nul) in [(&b"{}"[..], None), (b"{\0}", Some(1)), (b"{}\0\0", Some(2))] {
        let length = config.len() as u64;
        let data = with_length(u32::try_from(length).unwrap(), config);
        let bytes = header(ByteOrder::Little, FLAG_JSON, 0, &data);
        let error = XlError::ConfigNul { length, first_nul };
        assert_eq!(
            read(&bytes, LENIENT).unwrap_err(),
            failure(DATA, 48, Cause::Xl(error))
        );
        // Without the flag it is an xl configuration file, which only has a length.
        let bytes = header(ByteOrder::Little, 0, 0, &data);
        let header = read(&bytes, STRICT).unwrap();
        assert_eq!(
            (header.config(), header.json().unwrap()),
            (Some(config), None)
        );
        assert!(!header.is_stream_v2());
    }
    let error = XlError::ConfigNul {
        length: 4,
        first_nul: Some(1),
    };
    assert_eq!(XlHeader::new("{\0}").unwrap_err(), error);
}

#[test]
fn a_configuration_that_is_no_utf_8_can_be_kept_but_not_shown() {
    let bytes = header(ByteOrder::Little, 3, 0, &with_length(4, b"{\"\xff\0"));
    let header = read(&bytes, STRICT).unwrap();
    assert_eq!(
        header.json(),
        Err(XlError::ConfigNotUtf8 { valid_up_to: 2 })
    );
    assert_eq!(header.encode(), bytes);
}

#[test]
fn a_header_may_have_no_configuration() {
    for data in [&b""[..], b"\0\0\0\0"] {
        let bytes = header(ByteOrder::Little, 3, 0, data);
        let header = read(&bytes, STRICT).unwrap();
        assert_eq!((header.config(), header.json().unwrap()), (None, None));
        assert_eq!(header.encode(), bytes);
    }
}

#[test]
fn optional_data_behind_the_configuration_are_kept() {
    let bytes = header(ByteOrder::Little, 3, 0, &with_length(3, b"{}\0more"));
    let header = read(&bytes, STRICT).unwrap();
    assert_eq!(header.json().unwrap(), Some("{}"));
    assert_eq!(header.optional_tail(), b"more");
    assert_eq!(header.encode(), bytes);
}

#[test]
fn a_configuration_longer_than_the_limit_is_neither_written_nor_looked_into() {
    let max = MAX_CONFIG;
    let fits = " ".repeat(max as usize);
    let header = XlHeader::new(&fits).unwrap();
    assert_eq!(read(&header.encode(), STRICT).unwrap(), header);
    assert_eq!(header.json().unwrap(), Some(fits.as_str()));
    let got = u64::from(max) + 1;
    let error = XlError::ConfigTooLong { got, max };
    let longer = fits + " ";
    assert_eq!(XlHeader::new(&longer).unwrap_err(), error);
    assert_eq!(header.with_text(&longer).unwrap_err(), error);
    // The header can be read in either case, JSON (flags 3) or xl's own text (flags 2): inspect
    // shows it.
    let config = [longer.as_bytes(), &[0]].concat();
    for flags in [3, 2] {
        let data = with_length(max + 2, &config);
        let header = read(&self::header(ByteOrder::Little, flags, 0, &data), STRICT).unwrap();
        assert_eq!(header.config(), Some(config.as_slice()));
        assert_eq!(header.json().unwrap_err(), error);
    }
}

#[test]
fn a_failing_source_is_not_blamed_on_the_image() {
    let error = XlHeader::read(Broken, STRICT).unwrap_err();
    assert!(!error.is_bad_image());
    assert_eq!(error.to_string(), "xl header at byte 0x0: reading failed");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(
        source,
        io::Error::from(io::ErrorKind::PermissionDenied).to_string()
    );
    let cause = Cause::Io(io::ErrorKind::PermissionDenied);
    assert_eq!(Failure::from(error), failure(HEADER, 0, cause));
}

/// Bytes that begin like a header, so that the fields after the magic are exercised too.
fn like_a_header() -> impl Strategy<Value = Vec<u8>> {
    let small = || prop_oneof![Just(0_u32), 0..16_u32, any::<u32>()];
    let data = proptest::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..64);
    let parts = (any::<bool>(), 0..5_u32, small(), small(), small(), data);
    parts.prop_map(|(big, mandatory, optional, length, config, data)| {
        let order = if big {
            ByteOrder::Big
        } else {
            ByteOrder::Little
        };
        let mut out = header(order, mandatory, optional, b"");
        for (at, field) in [(44..48, length), (48..52, config)] {
            out.resize(out.len().max(at.end), 0);
            out[at].copy_from_slice(&match order {
                ByteOrder::Little => field.to_le_bytes(),
                ByteOrder::Big => field.to_be_bytes(),
            });
        }
        out.extend(data);
        out
    })
}

proptest! {
    /// No input panics or makes the reader take more than the header has, and lenient reading
    /// differs only in what it tolerates.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..128),
        like_a_header(),
    ]) {
        let mut source = Counting::new(&bytes);
        let strict = XlHeader::read(&mut source, STRICT);
        match &strict {
            Ok(header) => {
                prop_assert_eq!(header.bytes(), source.taken as u64);
                prop_assert_eq!(source.asked, source.taken);
                prop_assert_eq!(&header.encode(), &bytes[..source.taken]);
            }
            Err(error) => prop_assert!(error.is_bad_image(), "{}", error),
        }
        let strict = strict.map_err(Failure::from);
        let lenient = read(&bytes, LENIENT);
        match (strict, lenient) {
            (Ok(strict), lenient) => prop_assert_eq!(strict, lenient.unwrap()),
            (Err(strict), Ok(_)) => {
                let optional = matches!(strict.cause, Cause::Xl(XlError::OptionalFlags { .. }));
                prop_assert!(optional, "{:?}", strict);
            }
            (Err(_), Err(_)) => {}
        }
    }
}

#[test]
fn a_legacy_stream_is_announced_by_the_flags_in_either_byte_order() {
    let header = XlHeader::new("{}").unwrap();
    let little = header.encode();
    assert!(!begins_legacy(&little));
    let with = |mark: [u8; 4], flags: [u8; 4]| [&MAGIC[..], &mark, &flags].concat();
    let (le, be) = ([4, 3, 2, 1], [1, 2, 3, 4]);
    for (mark, flags, legacy) in [
        (le, [0, 0, 0, 0], true),
        (le, [1, 0, 0, 0], true),
        (le, [2, 0, 0, 0], false),
        (le, [0, 0, 0, 2], true),
        (be, [0, 0, 0, 2], false),
        (be, [0, 0, 0, 1], true),
        (be, [2, 0, 0, 0], true),
    ] {
        let prefix = with(mark, flags);
        assert_eq!(begins_legacy(&prefix), legacy, "{mark:?} {flags:?}");
        // The flags are not complete.
        assert!(!begins_legacy(&prefix[..39]));
    }
    assert!(!begins_legacy(b"LibxlFmt"));
}
