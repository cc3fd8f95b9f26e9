//! Tests of each message against the bytes that Xen's tools send, written out here a second time;
//! each cut short at every byte, and each with every byte changed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use xsr_format::record::RecordKind;
use xsr_format::wrapper::libxl::{CheckpointState, LibxlRecordKind};

use super::*;

/// The messages as in `xl.h`, with the NUL of each C string that `sizeof` counts. The banner is
/// sent without its NUL.
const WORDS: [(Message, &[u8], usize); 4] = [
    (
        Message::Banner,
        b"xl migration receiver ready, send binary domain data.\x0a",
        54,
    ),
    (Message::Ready, b"domain received, ready to unpause\x00", 34),
    (
        Message::Go,
        b"domain is yours, you are cleared to unpause\x00",
        44,
    ),
    (
        Message::Report,
        b"my copy unpause results are as follows\x00",
        39,
    ),
];

/// Returns one byte at a time, and fails the test if it is asked for more than there is.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = room.len().min(1);
        (&mut self.0).read(&mut room[..n])
    }
}

/// Fails where the other end would hang up.
struct Breaks<'a>(Trickle<'a>, io::Error);

impl Read for Breaks<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.0.read(room)? {
            0 => Err(std::mem::replace(
                &mut self.1,
                io::ErrorKind::ConnectionReset.into(),
            )),
            n => Ok(n),
        }
    }
}

fn breaks(said: &[u8]) -> Breaks<'_> {
    Breaks(Trickle(said), io::ErrorKind::ConnectionReset.into())
}

#[test]
fn the_fixed_words_are_those_of_xl() {
    assert_eq!(WORDS.map(|(message, ..)| message), Message::ALL);
    for (message, bytes, length) in WORDS {
        let mut said = Vec::new();
        message.write(&mut said).unwrap();
        assert_eq!((said.as_slice(), said.len()), (bytes, length));
        // Bytes after the message are for another reader.
        said.extend(b"LibxlFmt");
        let mut whole = said.as_slice();
        message.read(&mut whole).unwrap();
        assert_eq!(whole, b"LibxlFmt");
        let mut slow = Trickle(&said);
        message.read(&mut slow).unwrap();
        assert_eq!(slow.0, b"LibxlFmt");
    }
}

#[test]
fn a_message_that_is_cut_short_or_changed_is_no_message() {
    for (message, bytes, _) in WORDS {
        for end in 0..bytes.len() {
            let error = message.read(&bytes[..end]).unwrap_err();
            let name = message.name();
            let expected = match end {
                0 => format!("the other end hung up where its {name} was expected"),
                _ => format!("the other end hung up inside its {name}"),
            };
            assert_eq!(error.to_string(), expected);
        }
        for at in 0..bytes.len() {
            let mut other = bytes.to_vec();
            other[at] ^= 0x20;
            // Detected at the byte that differs, without waiting for the rest.
            let error = message.read(Trickle(&other[..=at])).unwrap_err();
            let MessageError::Other { got, hung_up, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!((got.as_slice(), *hung_up), (&other[..=at], false));
            // Or the rest is read, for the error message.
            let error = message.read_or(Trickle(&other[..=at]), |_| true);
            let error = error.unwrap_err();
            let MessageError::Other { got, hung_up, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(got, &other[..=at]);
            // It is known whether the other end hung up if more bytes were expected.
            assert_eq!(*hung_up, at + 1 < bytes.len());
            assert_eq!(error.to_string().contains(", then hung up,"), *hung_up);
            // The bytes received say more than the reason why no more came.
            let broken = Breaks(
                Trickle(&other[..=at]),
                io::ErrorKind::ConnectionReset.into(),
            );
            let error = message.read_or(broken, |_| true).unwrap_err();
            assert!(matches!(error, MessageError::Other { .. }), "{error:?}");
            // But a cancellation has precedence.
            if at + 1 < bytes.len() {
                let asked = Breaks(Trickle(&other[..=at]), io::Error::other(Cancelled));
                let error = message.read_or(asked, |_| true).unwrap_err();
                assert!(
                    matches!(&error, MessageError::Waiting { cause, .. } if Cancelled::is(cause)),
                    "{error:?}"
                );
            }
        }
        for other in Message::ALL {
            assert_eq!(message.read(other.bytes()).is_ok(), message == other);
        }
    }
}

#[test]
fn what_came_in_the_place_of_a_message_is_bounded_and_escaped() {
    let shell = [b"\x1b[2Jlogin: ".as_slice(), &[b'a'; 4096]].concat();
    let error = Message::Banner.read(shell.as_slice()).unwrap_err();
    let words = error.to_string();
    assert!(words.contains("\\x1b[2Jlogin: aaa"), "{words}");
    assert!(words.len() < 200 && !words.contains('\x1b'), "{words}");
}

#[test]
fn a_receiver_that_fails_says_why_in_the_place_of_any_message() {
    let mut said = Vec::new();
    Reason::write("no\nmemory\x1b[2J", &mut said).unwrap();
    assert_eq!(said, b"xsr: failed: no\\nmemory\\u{1b}[2J\n");
    for message in Message::ALL {
        let error = message.read(Trickle(&said)).unwrap_err();
        let words = "the other end has failed: no\\nmemory\\u{1b}[2J";
        assert_eq!(error.to_string(), words);
    }
    // The part that was read before, and where it ends early.
    for at in 0..said.len() {
        let why = Reason::read(&said[..at], &said[at..]).unwrap();
        assert_eq!(why, "no\\nmemory\\u{1b}[2J");
        let cut = Reason::read(b"", breaks(&said[..at]));
        assert_eq!(cut.is_some(), at >= Reason::BEGIN.len());
    }
    // No longer than allowed, whatever its length.
    let mut long = Vec::new();
    Reason::write(&"x".repeat(5000), &mut long).unwrap();
    assert_eq!((long.len(), long.last()), (Reason::LONGEST, Some(&b'\n')));
    let endless = [Reason::BEGIN, &[b'y'; 5000]].concat();
    let why = Reason::read(b"", endless.as_slice()).unwrap();
    assert_eq!(why.len(), Reason::LONGEST - Reason::BEGIN.len());
    // Hostile bytes do not reach a terminal.
    let hostile = [Reason::BEGIN, b"\x1b]0;\xff\n"].concat();
    let why = Reason::read(b"", hostile.as_slice()).unwrap();
    assert_eq!(why, "\\u{1b}]0;\u{fffd}");
    // Nor do characters that reorder the text around them, or end its line.
    for unfit in "\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}".chars() {
        let hostile = format!("xsr: failed: a{unfit}b\n");
        let why = Reason::read(b"", hostile.as_bytes()).unwrap();
        assert_eq!(why, format!("a{}b", unfit.escape_unicode()));
        let mut said = Vec::new();
        Reason::write(&format!("a{unfit}b"), &mut said).unwrap();
        assert!(said.is_ascii(), "{said:?}");
    }
    assert_eq!(Reason::read(b"", &b"xsr: fine\n"[..]), None);
}

#[test]
fn an_outcome_is_a_report_its_status_and_what_gives_back() {
    let report = Message::Report.bytes();
    let go = Message::Go.bytes();
    let said = |status: u8, rest: &[u8]| [report, &[status], rest].concat();
    let read = |said: &[u8]| Outcome::read(said);
    assert_eq!(read(&said(0, b"")).unwrap(), Outcome::Runs);
    for status in 1..=255 {
        let back = said(status, go);
        assert_eq!(read(&back).unwrap(), Outcome::GivenBack { status });
        // Without its last byte it does not count.
        let error = read(&back[..back.len() - 1]).unwrap_err();
        assert!(matches!(error, MessageError::NotGivenBack { status: s, .. } if s == status));
    }
    for end in 0..=report.len() {
        read(&said(0, b"")[..end]).unwrap_err();
    }
    let error = read(report).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the other end hung up where its status was expected"
    );
}

#[test]
fn last_words_are_found_behind_whatever_else_was_said() {
    let report = Message::Report.bytes();
    let go = Message::Go.bytes();
    let of = |pieces: &[&[u8]]| {
        let mut words = LastWords::default();
        for piece in pieces {
            words.push(piece);
        }
        words
    };
    let list = vec![0xf; 3 * LastWords::KEPT];
    let words = of(&[&list, report, &[0]]);
    assert_eq!(words.bytes().len(), LastWords::KEPT);
    assert_eq!(words.outcome().unwrap(), Outcome::Runs);
    let words = of(&[&list, report, &[7], go]);
    assert_eq!(words.outcome().unwrap(), Outcome::GivenBack { status: 7 });
    assert_eq!(words.status(), Some(Status(7)));
    // A report that has only begun is recognised, but decides nothing.
    let words = of(&[&report[..8]]);
    assert!(words.report_began() && words.status().is_none());
    words.outcome().unwrap_err();
    let words = of(&[&report[..7]]);
    assert!(!words.report_began());
    assert!(matches!(words.outcome(), Err(MessageError::NoReport)));
    let words = of(&[report, &[7], &go[..go.len() - 1]]);
    words.outcome().unwrap_err();
    // Text that only begins like a report does not count, and nothing after a report changes it.
    let log: &[u8] = b"my copy unpause results are in the log\n";
    for pieces in [
        [log, report, &[0], b""],
        [report, &[0], log, b""],
        [report, &[0], log, &[report, &[7], go].concat()],
    ] {
        assert_eq!(of(&pieces).outcome().unwrap(), Outcome::Runs);
        assert_eq!(of(&[&pieces.concat()]).outcome().unwrap(), Outcome::Runs);
    }
    assert!(!of(&[log]).report_began());
    // What is still to come is read, and an error of the reader says no more than what came.
    for (said, outcome) in [
        ([report, &[0], b"and more"].concat(), Some(Outcome::Runs)),
        (
            [report, &[7], go].concat(),
            Some(Outcome::GivenBack { status: 7 }),
        ),
        ([report, &[7]].concat(), None),
        (report.to_vec(), None),
        (Vec::new(), None),
    ] {
        for at in 0..=said.len().min(50) {
            let mut words = of(&[b"state", &said[..at]]);
            let heard = words.hear_out(Trickle(&said[at..]));
            assert_eq!(heard.ok(), outcome, "{said:?} {at}");
            let mut words = of(&[&said[..at]]);
            let heard = words.hear_out(breaks(&said[at..]));
            assert_eq!(heard.ok(), outcome, "{said:?} {at}");
        }
    }
}

#[test]
fn withdrawals_are_records_that_nobody_can_apply() {
    let unknown: &[u8] = &[0xff, 0xff, 0xff, 0x7f];
    let none = &[0; 4];
    let checkpoint = &[0xe, 0, 0, 0];
    let end = &[4, 0, 0, 0];
    for (withdrawal, bytes) in [
        (
            Withdrawal::Remus,
            [checkpoint, none, unknown, none, end, none].concat(),
        ),
        (
            Withdrawal::ColoWithin,
            [unknown, none, checkpoint, none, end, none].concat(),
        ),
        (
            Withdrawal::ColoBetween,
            [&[5, 0, 0, 0], end, unknown, none].concat(),
        ),
    ] {
        let mut said = Vec::new();
        withdrawal.write(&mut said).unwrap();
        assert_eq!(said, bytes, "{withdrawal:?}");
    }
    // Bit 31 would let a receiver skip them.
    assert!(!RecordKind(Withdrawal::UNKNOWN).is_optional());
    assert!(!LibxlRecordKind(Withdrawal::UNKNOWN).is_optional());
    assert!(LibxlRecordKind(Withdrawal::UNKNOWN).name().is_none());
    for kind in 0..=5 {
        assert!(!Withdrawal::is_libxl_record(kind) && !Withdrawal::is_libxc_record(kind));
    }
    assert!(Withdrawal::is_libxl_record(0xe) && !Withdrawal::is_libxc_record(0xe));
    assert!(Withdrawal::is_libxl_record(0x7fff_ffff) && Withdrawal::is_libxc_record(0x7fff_ffff));
}

#[test]
fn states_of_colo_are_the_records_of_libxl() {
    use CheckpointState::{New, Ready, Resumed, Suspended};
    for (word, id) in [
        (ColoWord::State(New), [0, 0, 0, 0]),
        (ColoWord::State(Suspended), [1, 0, 0, 0]),
        (ColoWord::State(Ready), [2, 0, 0, 0]),
        (ColoWord::State(Resumed), [3, 0, 0, 0]),
        (ColoWord::Withdrawn, [0xff, 0xff, 0xff, 0x7f]),
    ] {
        let bytes = [[5, 0, 0, 0], [4, 0, 0, 0], id, [0; 4]].concat();
        let mut said = Vec::new();
        word.write(&mut said).unwrap();
        assert_eq!(said, bytes);
        // Also with the specification's length.
        for length in [4, 8] {
            let mut record: [u8; 16] = bytes.as_slice().try_into().unwrap();
            record[4] = length;
            assert_eq!(ColoWord::decode(record).unwrap(), word);
        }
        for end in 0..bytes.len() {
            ColoWord::read(&bytes[..end]).unwrap_err();
        }
        for (at, byte) in [
            (0, 6),
            (3, 1),
            (4, 5),
            (7, 1),
            (8, 4),
            (11, 1),
            (12, 1),
            (15, 1),
        ] {
            let mut record: [u8; 16] = bytes.as_slice().try_into().unwrap();
            record[at] = byte;
            ColoWord::decode(record).unwrap_err();
        }
    }
}

proptest! {
    /// Hostile bytes: no panic, only the exact bytes are accepted, and no more is read than a
    /// message has.
    #[test]
    fn anything_else_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for message in Message::ALL {
            let mut rest = bytes.as_slice();
            let read = message.read(&mut rest);
            prop_assert_eq!(read.is_ok(), bytes.starts_with(message.bytes()));
            prop_assert!(bytes.len() - rest.len() <= message.bytes().len());
        }
        if let Ok(word) = ColoWord::read(bytes.as_slice()) {
            prop_assert_eq!(&word.encode()[8..], &bytes[8..16]);
        }
        let mut words = LastWords::default();
        words.push(&bytes);
        prop_assert!(words.outcome().is_err());
    }
}
