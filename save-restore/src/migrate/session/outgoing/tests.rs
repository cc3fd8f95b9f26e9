//! The window, acknowledgements, and what waits for another link.

use super::*;

const LINK: LinkId = 7;

fn numbers(out: &mut Outgoing, link: LinkId) -> Vec<u64> {
    std::iter::from_fn(|| out.take(link))
        .map(|(number, _)| number)
        .collect()
}

#[test]
fn no_more_is_taken_than_the_peer_has_room_for() {
    let mut out = Outgoing::new(WINDOW);
    let much = vec![1; 32 << 20];
    assert_eq!(out.write(&much) as u64, AT_FIRST);
    assert_eq!(out.write(&much), 0);
    let chunks = AT_FIRST / CHUNK as u64;
    assert_eq!(numbers(&mut out, LINK).len() as u64, chunks);
    // Arrived, but not read: no room.
    assert_eq!(out.acknowledged(chunks, 0), Ok(true));
    assert_eq!(out.write(&much), 0);
    assert_eq!(out.acknowledged(chunks, 2), Ok(true));
    assert_eq!(out.write(&much), 2 * CHUNK);
    // Older and repeated acknowledgements change nothing.
    assert_eq!(out.acknowledged(1, 0), Ok(false));
    assert_eq!(out.acknowledged(chunks, 2), Ok(false));
}

#[test]
fn the_window_grows_only_while_the_network_holds_the_process_up() {
    let mut out = Outgoing::new(WINDOW);
    let much = vec![1; 32 << 20];
    out.set_window(u64::MAX);
    out.write(&much);
    // A link could take more.
    out.grow();
    assert_eq!(out.room(), 0);
    numbers(&mut out, LINK);
    out.grow();
    assert_eq!(out.room() as u64, STEP);
    // There is room.
    out.grow();
    assert_eq!(out.room() as u64, STEP);
    for _ in 0..100 {
        out.write(&much);
        numbers(&mut out, LINK);
        out.grow();
    }
    assert_eq!(out.held, WINDOW);
    // All of it has arrived: the process of the peer holds it up.
    let mut out = Outgoing::new(WINDOW);
    out.write(&much);
    let sent = numbers(&mut out, LINK).len() as u64;
    assert_eq!(out.acknowledged(sent, 0), Ok(true));
    out.grow();
    assert_eq!(out.room(), 0);
}

#[test]
fn an_acknowledgement_of_what_was_not_sent_is_refused() {
    let mut out = Outgoing::new(WINDOW);
    out.write(b"one");
    assert_eq!(out.acknowledged(1, 0), Err(Malformed::NotSent(1)));
    assert_eq!(numbers(&mut out, LINK), [0]);
    assert_eq!(out.acknowledged(1, 2), Err(Malformed::NotSent(2)));
    assert_eq!(out.acknowledged(1, 1), Ok(true));
    assert!(out.is_read());
}

#[test]
fn what_a_lost_link_had_waits_for_another_one_unless_nothing_is_sent_again() {
    for again in [true, false] {
        let mut out = Outgoing::new(WINDOW);
        out.write(&vec![1; 4 * CHUNK]);
        for link in [1, 2, 1, 2] {
            assert!(out.take(link).is_some());
        }
        assert_eq!(out.acknowledged(1, 0), Ok(true));
        out.lost(1, again);
        assert_eq!(numbers(&mut out, 3), if again { vec![2] } else { vec![] });
        out.lost(1, again);
        assert!(numbers(&mut out, 3).is_empty());
    }
}

#[test]
fn what_was_discarded_is_never_sent() {
    let mut out = Outgoing::new(WINDOW);
    out.write(&vec![1; 2 * CHUNK + 1]);
    assert!(out.take(1).is_some());
    out.discard();
    assert!(!out.is_waiting());
    assert!(numbers(&mut out, 2).is_empty());
    out.lost(1, true);
    assert!(numbers(&mut out, 2).is_empty());
    assert_eq!(out.write(b"more"), 0);
    out.end();
    assert!(numbers(&mut out, 2).is_empty());
}

#[test]
fn the_end_is_the_last_chunk_and_comes_once() {
    let mut out = Outgoing::new(WINDOW);
    out.write(b"last");
    out.end();
    out.end();
    assert_eq!(out.write(b"more"), 0);
    let (number, piece) = out.take(1).expect("the bytes");
    assert_eq!((number, &*piece), (0, &Piece::Bytes(b"last".to_vec())));
    let (number, piece) = out.take(1).expect("the end");
    assert_eq!((number, &*piece), (1, &Piece::End));
    assert!(out.take(1).is_none());
}

/// A process that writes a byte at a time.
#[test]
fn the_number_of_chunks_is_bounded() {
    let mut out = Outgoing::new(WINDOW);
    for _ in 0..2 * CHUNKS {
        out.write(b"x");
        out.take(LINK);
    }
    out.end();
    assert!(out.next() < CHUNKS);
}

#[test]
fn an_end_has_no_more_in_transit_than_it_wants() {
    let most = CHUNK as u64 + 10;
    let mut out = Outgoing::new(most);
    out.set_window(WINDOW);
    assert_eq!(out.write(&vec![1; 1 << 20]) as u64, most);
    while out.take(1).is_some() {}
    out.grow();
    assert_eq!(out.room(), 0);
    // What the peer's process has read makes room, and what has only arrived does not.
    out.acknowledged(1, 0).unwrap();
    assert_eq!(out.room(), 0);
    out.acknowledged(1, 1).unwrap();
    assert_eq!(out.room(), CHUNK);
}
