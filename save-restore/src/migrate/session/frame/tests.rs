//! Tables of the bytes of each frame, properties, and hostile input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

fn written(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.write(&mut bytes);
    bytes
}

/// The bytes of the tables in docs/session.md, written by hand.
#[test]
fn frames_have_the_bytes_that_are_specified() {
    let chunk = |contents| Frame::Chunk {
        number: 0x0102,
        contents,
    };
    let number = [2, 1, 0, 0, 0, 0, 0, 0];
    let none = [0; 8];
    /// The frame, its bytes before the number, the number, and its body.
    type Row<'a> = (Frame<'a>, &'a [u8], [u8; 8], &'a [u8]);
    let table: [Row<'_>; 8] = [
        (
            chunk(Contents::Plain(b"abc")),
            &[1, 0, 0, 0, 3, 0, 0, 0],
            number,
            b"abc",
        ),
        (
            chunk(Contents::Zstd {
                length: 300,
                frame: b"zz",
            }),
            &[1, 1, 0, 0, 6, 0, 0, 0],
            number,
            &[44, 1, 0, 0, b'z', b'z'],
        ),
        (
            chunk(Contents::Zeroes(4096)),
            &[1, 2, 0, 0, 4, 0, 0, 0],
            number,
            &[0, 16, 0, 0],
        ),
        (chunk(Contents::End), &[1, 3, 0, 0, 0, 0, 0, 0], number, &[]),
        (
            Frame::Acknowledged {
                received: 0x0102,
                read: 3,
            },
            &[2, 0, 0, 0, 8, 0, 0, 0],
            number,
            &[3, 0, 0, 0, 0, 0, 0, 0],
        ),
        (Frame::Alive, &[3, 0, 0, 0, 0, 0, 0, 0], none, &[]),
        (Frame::Bye, &[4, 0, 0, 0, 0, 0, 0, 0], none, &[]),
        (Frame::Abort, &[5, 0, 0, 0, 0, 0, 0, 0], none, &[]),
    ];
    for (frame, head, number, body) in table {
        let bytes = [head, &number, body].concat();
        assert_eq!(written(&frame), bytes, "{frame:?}");
        assert_eq!(Frame::read(&bytes), Ok(Some((frame, bytes.len()))));
        for end in 0..bytes.len() {
            assert_eq!(Frame::read(&bytes[..end]), Ok(None), "{frame:?} to {end}");
        }
    }
}

#[test]
fn what_no_frame_may_be_is_refused_before_its_body_arrives() {
    let header = |kind: u8, form: u8, length: u32, number: u64| {
        let mut bytes = vec![kind, form, 0, 0];
        bytes.extend(length.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes
    };
    let most = u32::try_from(CHUNK).unwrap();
    let table = [
        (0, 0, 0, 0),
        (6, 0, 0, 0),
        (1, 4, 0, 0),
        (2, 1, 8, 0),
        (1, 0, 0, 0),
        (1, 0, most + 1, 0),
        (1, 0, u32::MAX, 0),
        (1, 1, 4, 0),
        (1, 1, most + 4, 0),
        (1, 2, 3, 0),
        (1, 2, 5, 0),
        (1, 3, 1, 0),
        (2, 0, 7, 0),
        (2, 0, 9, 0),
        (3, 0, 1, 0),
        (3, 0, 0, 1),
        (4, 0, 0, 1),
        (5, 0, 0, 1),
    ];
    for (kind, form, length, number) in table {
        let bytes = header(kind, form, length, number);
        assert!(
            Frame::read(&bytes).is_err(),
            "{kind} {form} {length} {number}"
        );
    }
    for reserved in [2, 3] {
        let mut bytes = header(3, 0, 0, 0);
        bytes[reserved] = 1;
        assert_eq!(Frame::read(&bytes), Err(Malformed::Reserved));
    }
    // Contents of no bytes, of too many, and compressed to no fewer.
    for (form, contents, rest) in [
        (2_u8, 0, &b""[..]),
        (2, most + 1, b""),
        (1, 0, b"z"),
        (1, most + 1, b"z"),
        (1, 1, b"z"),
    ] {
        let length = u32::try_from(4 + rest.len()).unwrap();
        let mut bytes = header(1, form, length, 0);
        bytes.extend(contents.to_le_bytes());
        bytes.extend(rest);
        assert!(Frame::read(&bytes).is_err(), "{form} {contents}");
    }
}

fn hello() -> Hello {
    Hello {
        purpose: Purpose::Join,
        slot: 3,
        limit: Duration::from_millis(0x0201),
        token: Token([7; 32]),
        received: 5,
        window: WINDOW,
    }
}

#[test]
fn a_link_begins_with_the_bytes_that_are_specified() {
    let bytes = hello().bytes();
    let expected = [
        &b"\x01xsrlink\x01\x03\0\0\x01\x02\0\0"[..],
        &[7; 32],
        &[5, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 1, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(bytes[..], expected);
    let read = Hello::read(&bytes).unwrap();
    assert_eq!(read.bytes(), bytes);
    let answers = [
        Answer::Accepted,
        Answer::UnknownVersion,
        Answer::NoSuchSession,
        Answer::AlreadyThere,
        Answer::TooLate,
    ];
    for (code, answer) in (0..).zip(answers) {
        let welcome = Welcome {
            answer,
            received: 5,
            window: WINDOW,
        };
        let bytes = welcome.bytes();
        let expected = [
            &b"\x01xsrlink"[..],
            &[code, 0, 0, 0, 0, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 1, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(bytes[..], expected);
        assert_eq!(Welcome::read(&bytes), Ok(welcome));
    }
}

#[test]
fn a_hello_that_is_not_one_is_refused() {
    let refused = |at: usize, byte: u8| {
        let mut bytes = hello().bytes();
        bytes[at] = byte;
        Hello::read(&bytes).unwrap_err()
    };
    assert_eq!(refused(0, 2), Malformed::Version(2));
    assert_eq!(refused(1, b'y'), Malformed::Magic);
    assert_eq!(refused(8, 2), Malformed::Purpose(2));
    assert_eq!(refused(9, SLOTS), Malformed::Slot(SLOTS));
    assert_eq!(refused(10, 1), Malformed::Reserved);
    assert_eq!(refused(11, 1), Malformed::Reserved);
    let mut bytes = Welcome::refusal(Answer::TooLate).bytes();
    bytes[8] = 5;
    assert_eq!(Welcome::read(&bytes), Err(Malformed::Answer(5)));
    bytes[0] = 9;
    assert_eq!(Welcome::read(&bytes), Err(Malformed::Version(9)));
}

#[test]
fn tokens_are_compared_whole() {
    let token = Token([7; 32]);
    assert!(token.is(&Token([7; 32])));
    for at in 0..32 {
        let mut other = token;
        other.0[at] ^= 1;
        assert!(!token.is(&other), "byte {at}");
    }
    assert_eq!(format!("{token:?}"), "Token(..)");
}

proptest! {
    /// Any bytes are a frame, the beginning of one, or refused; a frame is written as it was read.
    #[test]
    fn any_bytes_are_read_or_refused(
        kind in 0_u8..8,
        form in 0_u8..5,
        length in prop_oneof![0_u32..20, Just(131_072), Just(131_076), any::<u32>()],
        rest in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = vec![kind, form, 0, 0];
        bytes.extend(length.to_le_bytes());
        bytes.extend(rest);
        if let Ok(Some((frame, used))) = Frame::read(&bytes) {
            prop_assert!(used <= bytes.len() && used <= LONGEST);
            prop_assert_eq!(written(&frame), &bytes[..used]);
        }
    }

    /// A byte of a good one is changed: what is still read is what was sent.
    #[test]
    fn any_hello_is_read_or_refused(at in 0_usize..64, byte in any::<u8>()) {
        let mut hello = hello().bytes();
        hello[at] = byte;
        match Hello::read(&hello) {
            Ok(read) => prop_assert_eq!(read.bytes(), hello),
            // The token, and the numbers, may be any.
            Err(_) => prop_assert!(at < 12, "{at}"),
        }
        let mut welcome = Welcome::refusal(Answer::Accepted).bytes();
        let at = at % Welcome::LENGTH;
        welcome[at] = byte;
        match Welcome::read(&welcome) {
            Ok(read) => prop_assert_eq!(read.bytes(), welcome),
            Err(_) => prop_assert!(at < 16, "{at}"),
        }
    }
}
