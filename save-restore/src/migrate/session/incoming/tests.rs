//! Order, duplicates, and what a hostile peer may not do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::super::frame::CHUNK;
use super::*;

fn bytes(of: &[u8]) -> Piece {
    Piece::Bytes(of.to_vec())
}

fn read(incoming: &mut Incoming) -> Vec<u8> {
    let mut room = vec![0; 1 << 20];
    let taken = incoming.take(&mut room);
    room.truncate(taken);
    room
}

#[test]
fn a_chunk_beyond_the_window_is_refused() {
    let mut incoming = Incoming::default();
    let full = || Piece::Bytes(vec![0; CHUNK]);
    let most = WINDOW / CHUNK as u64;
    // The first one is missing.
    for number in 1..=most {
        assert_eq!(incoming.arrived(number, full(), 0), Ok(false));
    }
    let beyond = most + 1;
    assert_eq!(
        incoming.arrived(beyond, full(), 0),
        Err(Malformed::BeyondWindow(beyond))
    );
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrived(CHUNKS - 1, bytes(b"x"), 0), Ok(false));
    assert_eq!(
        incoming.arrived(CHUNKS, bytes(b"x"), 0),
        Err(Malformed::BeyondWindow(CHUNKS))
    );
    assert_eq!(
        incoming.arrived(u64::MAX, bytes(b"x"), 0),
        Err(Malformed::BeyondWindow(u64::MAX))
    );
}

#[test]
fn nothing_comes_after_the_end() {
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrived(2, bytes(b"c"), 0), Ok(false));
    assert_eq!(
        incoming.arrived(1, Piece::End, 0),
        Err(Malformed::AfterEnd(1))
    );
    assert_eq!(incoming.arrived(3, Piece::End, 0), Ok(false));
    assert_eq!(
        incoming.arrived(4, bytes(b"e"), 0),
        Err(Malformed::AfterEnd(4))
    );
    assert_eq!(incoming.arrived(0, bytes(b"a"), 0), Ok(true));
    assert_eq!(incoming.arrived(1, bytes(b"b"), 0), Ok(true));
    assert!(!incoming.is_over());
    assert_eq!(read(&mut incoming), b"abc");
    assert!(incoming.is_over());
    assert_eq!(incoming.acknowledgement(), (4, 4));
}

#[test]
fn a_chunk_counts_as_read_once_all_of_it_is() {
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrived(0, bytes(b"abcd"), 9), Ok(true));
    assert_eq!(incoming.newest_from(), Some(9));
    assert_eq!(incoming.take(&mut [0; 3]), 3);
    assert_eq!(incoming.acknowledgement(), (1, 0));
    let mut room = [0; 4];
    assert_eq!(incoming.peek(&mut room), 1);
    assert_eq!(room[0], b'd');
    assert_eq!(incoming.take(&mut room), 1);
    assert_eq!(incoming.acknowledgement(), (1, 1));
    assert!(!incoming.is_unread());
}

proptest! {
    /// In any order, and more than once.
    #[test]
    fn chunks_are_read_in_order_each_once(
        order in prop::collection::vec(0_u64..20, 0..60),
        last in Just((0_u64..20).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut incoming = Incoming::default();
        let mut all = Vec::new();
        for number in order.into_iter().chain(last) {
            let piece = match number {
                19 => Piece::End,
                number => bytes(&[u8::try_from(number).unwrap(); 3]),
            };
            incoming.arrived(number, piece, number).unwrap();
            all.extend(read(&mut incoming));
        }
        let expected: Vec<u8> = (0..19).flat_map(|number| [number; 3]).collect();
        prop_assert_eq!(all, expected);
        prop_assert!(incoming.is_over());
        prop_assert_eq!(incoming.acknowledgement(), (20, 20));
    }
}
