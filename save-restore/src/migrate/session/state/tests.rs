//! What ends a session and what does not, with a clock of the test's own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::super::frame::{CHUNK, WINDOW};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits(reconnect: u32) -> Limits {
    Limits {
        reconnect: SECOND * reconnect,
        suspended: SECOND,
        silence: SECOND * 4,
    }
}

fn state(reconnect: u32, links: u8) -> (State, Vec<LinkId>, Instant) {
    let now = Instant::now();
    let mut state = State::new(limits(reconnect), WINDOW, now);
    let attach = |slot| state.attach(slot, 0, WINDOW, now).unwrap().0;
    let ids = (0..links).map(attach).collect();
    (state, ids, now)
}

fn lost(state: &State) -> bool {
    matches!(state.over(), Some(Over::Lost(_)))
}

/// The chunks that a link sends now.
fn chunks(state: &mut State, link: LinkId, now: Instant) -> Vec<u64> {
    let jobs = std::iter::from_fn(|| state.job(link, now));
    jobs.filter_map(|job| match job {
        Job::Chunk(number, _) => Some(number),
        _ => None,
    })
    .collect()
}

/// Once the session is sealed, its only link is not taken up again, and a short silence is not its
/// end.
#[test]
fn a_sealed_session_survives_a_silence_of_less_than_half_a_minute() {
    let (mut state, _, now) = state(10, 1);
    state.seal();
    state.tick(now + SECOND * 29);
    assert_eq!(state.over(), None);
    assert!(!state.gives_up(SECOND * 29, SECOND * 29));
    assert!(state.gives_up(SILENCE_FOR_GOOD, SILENCE_FOR_GOOD));
    state.tick(now + SECOND * 30);
    assert!(lost(&state));
}

/// A peer that acknowledges one chunk now and then does not hold up an end that leaves for ever.
#[test]
fn an_end_that_leaves_waits_for_a_limited_time_in_all() {
    let (mut state, _, _) = state(10, 1);
    assert!(!state.gives_up(SECOND, SECOND * 31));
    assert!(state.gives_up(SECOND * 2, SECOND * 2));
    assert!(state.gives_up(SECOND, SECOND * 32));
    state.seal();
    assert!(!state.gives_up(SECOND * 2, SECOND * 31));
    assert!(state.gives_up(SECOND, SECOND * 32));
}

/// Nothing is sent again once the session is sealed.
#[test]
fn what_a_link_had_taken_is_not_sent_again_after_the_seal() {
    let (mut state, links, now) = state(10, 2);
    assert_eq!(state.out.write(b"go"), 2);
    assert_eq!(chunks(&mut state, links[1], now), [0]);
    state.seal();
    // It was not the link that is left.
    state.lose(links[1], "", now);
    assert_eq!(chunks(&mut state, links[0], now), [0; 0]);
}

#[test]
fn a_session_without_a_link_waits_for_its_limit() {
    let (mut state, links, now) = state(10, 2);
    state.lose(links[0], "", now);
    state.lose(links[1], "", now + SECOND);
    state.tick(now + SECOND * 10);
    assert_eq!(state.over(), None);
    // A link that returns starts the limit again.
    let (id, _) = state.attach(0, 0, WINDOW, now + SECOND * 10).unwrap();
    state.lose(id, "", now + SECOND * 10);
    state.tick(now + SECOND * 19);
    assert_eq!(state.over(), None);
    state.tick(now + SECOND * 20);
    assert!(lost(&state));
    assert_eq!(
        state.attach(0, 0, WINDOW, now).map(drop).unwrap_err(),
        Answer::TooLate
    );
}

#[test]
fn a_suspended_domain_shortens_the_limit_from_its_suspension_on() {
    let (mut state, links, now) = state(10, 1);
    state.lose(links[0], "", now);
    state.set_suspended(true, now + SECOND * 5);
    state.set_suspended(true, now + SECOND * 6);
    state.tick(now + SECOND * 6 - Duration::from_millis(1));
    assert_eq!(state.over(), None);
    state.set_suspended(false, now + SECOND * 6);
    state.tick(now + SECOND * 7);
    assert_eq!(state.over(), None);
    state.set_suspended(true, now + SECOND * 7);
    state.tick(now + SECOND * 8);
    assert!(lost(&state));
}

/// Links that return and are lost at once share the limit of a suspended domain.
#[test]
fn links_that_return_do_not_renew_the_limit_of_a_suspended_domain() {
    let (mut state, links, now) = state(10, 1);
    let tenth = SECOND / 10;
    state.set_suspended(true, now);
    state.lose(links[0], "", now);
    let mut at = now;
    for _ in 0..9 {
        at += tenth;
        assert!(!state.tick(at), "{:?}", state.over());
        let (id, _) = state.attach(0, 0, WINDOW, at).unwrap();
        state.lose(id, "", at);
    }
    assert_eq!(state.attempt(at, SECOND * 5), SHORTEST);
    state.tick(at + tenth);
    assert!(lost(&state));
    // A domain that runs again has the whole limit when it is suspended once more.
    let (mut state, links, now) = self::state(10, 1);
    state.set_suspended(true, now);
    state.lose(links[0], "", now);
    let (id, _) = state.attach(0, 0, WINDOW, now + tenth * 9).unwrap();
    state.set_suspended(false, now + SECOND);
    state.set_suspended(true, now + SECOND);
    state.lose(id, "", now + SECOND);
    state.tick(now + tenth * 19);
    assert_eq!(state.over(), None);
    state.tick(now + SECOND * 2);
    assert!(lost(&state));
}

#[test]
fn attempts_to_make_a_link_fit_into_the_time_that_is_left() {
    let usual = SECOND * 5;
    let (mut state, links, now) = state(30, 2);
    assert_eq!(state.attempt(now, usual), usual);
    state.lose(links[0], "", now);
    state.lose(links[1], "", now);
    assert_eq!(state.attempt(now, usual), usual);
    assert_eq!(state.attempt(now + SECOND * 24, usual), SECOND * 2);
    state.limits.suspended = Duration::from_millis(2300);
    state.set_suspended(true, now);
    let three = state.attempt(now, usual) * 3;
    assert!(three <= Duration::from_millis(2300), "{three:?}");
    assert_eq!(state.attempt(now + SECOND * 2, usual), SHORTEST);
}

/// What waits for a link at the seal goes over the link that is left, once, and before "go".
#[test]
fn chunks_that_wait_at_the_seal_are_sent_once() {
    let (mut state, links, now) = state(10, 2);
    state.out.write(b"image");
    assert_eq!(chunks(&mut state, links[1], now), [0]);
    state.lose(links[1], "", now);
    state.seal();
    state.out.write(b"go");
    assert_eq!(chunks(&mut state, links[0], now), [0, 1]);
    assert_eq!(chunks(&mut state, links[0], now), [0; 0]);
    state.lose(links[0], "", now);
    assert!(lost(&state));
    assert!(!state.out.is_waiting());
}

/// A peer that says bye and keeps the end of its stream to itself would let this end read for ever.
#[test]
fn a_bye_without_the_end_is_a_violation_unless_this_end_leaves_too() {
    let (mut state, links, now) = state(10, 1);
    assert!(state.arrived(0, Piece::Bytes(b"x".to_vec()), links[0], now));
    state.peer_leaves(links[0], false);
    let violated = Some(&Over::Malformed(Malformed::ByeWithoutEnd));
    assert_eq!(state.over(), violated);
    for leaves in [false, true] {
        let (mut state, links, now) = self::state(10, 1);
        match leaves {
            true => state.say_bye(),
            false => _ = state.arrived(0, Piece::End, links[0], now),
        }
        state.peer_leaves(links[0], false);
        assert_eq!(state.over(), None);
        assert!(state.peer_left());
    }
}

#[test]
fn a_silent_link_is_lost_and_its_chunks_go_to_another() {
    let (mut state, links, now) = state(0, 2);
    state.out.write(b"one");
    assert_eq!(chunks(&mut state, links[0], now), [0]);
    state.heard(links[1], now + SECOND * 3);
    assert!(state.tick(now + SECOND * 4));
    assert!(!state.has(links[0]));
    assert_eq!(state.over(), None);
    assert_eq!(chunks(&mut state, links[1], now + SECOND * 4), [0]);
}

#[test]
fn a_link_carries_a_sign_of_life_each_second() {
    let (mut state, links, now) = state(0, 1);
    assert!(state.job(links[0], now).is_none());
    let job = state.job(links[0], now + SECOND);
    assert!(matches!(job, Some(Job::Alive)), "{job:?}");
    assert!(state.job(links[0], now + SECOND).is_none());
}

#[test]
fn once_sealed_everything_goes_over_the_link_of_the_newest_chunk() {
    let (mut state, links, now) = state(10, 3);
    assert!(state.arrived(0, Piece::Bytes(b"ready".to_vec()), links[1], now));
    state.seal();
    state.out.write(b"go");
    for link in [links[0], links[2]] {
        assert!(chunks(&mut state, link, now).is_empty());
    }
    assert_eq!(chunks(&mut state, links[1], now), [0]);
    // The others do not matter.
    state.lose(links[0], "", now);
    assert_eq!(state.over(), None);
    assert!(state.attach(0, 0, WINDOW, now).is_err());
    // It is never sent again.
    state.lose(links[1], "", now);
    assert!(lost(&state));
    assert!(chunks(&mut state, links[2], now).is_empty());
}

#[test]
fn a_sealed_session_needs_a_link() {
    let (mut state, links, now) = state(10, 1);
    state.lose(links[0], "", now);
    state.seal();
    assert!(lost(&state));
}

#[test]
fn what_was_abandoned_is_not_sent_and_the_peer_is_told_once() {
    let (mut state, links, now) = state(10, 2);
    state.out.write(b"image");
    state.abandon();
    for link in &links {
        let job = state.job(*link, now);
        assert!(matches!(job, Some(Job::Abort)), "{job:?}");
        assert!(state.job(*link, now + SECOND * 5).is_none());
    }
    assert!(!state.is_open());
    // What the peer has said before it knows can be read.
    assert!(state.arrived(0, Piece::Bytes(b"why".to_vec()), links[0], now));
    assert_eq!(state.incoming.take(&mut [0; 9]), 3);
}

#[test]
fn links_that_end_after_a_bye_end_in_order() {
    for (bye, ends_in_order) in [(true, true), (false, false)] {
        let (mut state, links, now) = state(0, 2);
        if bye {
            state.arrived(0, Piece::End, links[0], now);
            state.peer_leaves(links[0], false);
        }
        for link in links {
            state.lose(link, "", now);
        }
        assert_eq!(state.over().is_none(), ends_in_order);
        assert!(!state.is_open());
    }
}

/// A link that has been replaced, or lost, says nothing any more.
#[test]
fn a_link_that_is_not_of_the_session_changes_nothing() {
    let (mut state, links, now) = state(10, 1);
    let (new, _) = state.attach(0, 0, WINDOW, now).unwrap();
    assert!(!state.has(links[0]));
    state.peer_leaves(links[0], true);
    state.violated(Malformed::Magic, links[0]);
    state.acknowledged(9, 9, links[0]);
    assert!(!state.arrived(0, Piece::Bytes(b"x".to_vec()), links[0], now));
    assert_eq!(state.over(), None);
    state.acknowledged(9, 9, new);
    assert_eq!(state.over(), Some(&Over::Malformed(Malformed::NotSent(9))));
}

/// All links together send no faster than the rate.
#[test]
fn a_chunk_waits_for_the_rate() {
    let (mut state, links, now) = state(10, 2);
    state.limit_rate(1 << 20, now);
    assert_eq!(state.out.write(&[7; 3 * CHUNK]), 3 * CHUNK);
    let take = |state: &mut State, link: LinkId, now| match state.job(link, now) {
        Some(Job::Chunk(number, _)) => {
            state.sent(CHUNK, now);
            Some(number)
        }
        _ => None,
    };
    assert_eq!(take(&mut state, links[0], now), Some(0));
    let eighth = SECOND / 8;
    for link in &links {
        assert_eq!(take(&mut state, *link, now + eighth - SECOND / 100), None);
    }
    assert!(state.pause(now) <= eighth);
    assert_eq!(take(&mut state, links[1], now + eighth), Some(1));
    assert_eq!(take(&mut state, links[0], now + eighth), None);
    // What was not used is lost.
    let later = now + SECOND * 2;
    assert_eq!(take(&mut state, links[0], later), Some(2));
    assert!(state.pause(later) > eighth - LATE * 2);
}
