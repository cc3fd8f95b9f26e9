//! The contract over the connection in memory, and its faults.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read as _, Write as _};

use super::*;
use crate::migrate::connection::{ConnectionReader, ConnectionWriter};
use crate::migrate::testing::contract;

#[test]
fn it_keeps_the_contract() {
    for capacity in [1 << 16, 4096] {
        contract(&|| {
            let (here, there) = FakeConnection::pair_for_contract(capacity);
            (Box::new(here), Box::new(there))
        });
    }
}

/// Three messages each way, between two threads: what each end has read, and when it ended.
fn conversation(fault: Option<(usize, Faulty)>) -> ([Vec<u8>; 2], [u64; 2], Duration) {
    let (first, second) = FakeConnection::pair(64);
    if let Some((end, faulty)) = fault {
        [&first, &second][end].fail(faulty);
    }
    let talk = |end: FakeConnection, speaks_first: bool| {
        let wait = Wait::forever().idle(Duration::from_secs(10));
        let mut heard = Vec::new();
        for turn in 0..6 {
            if (turn % 2 == 0) == speaks_first {
                let mut writer = ConnectionWriter::new(&end, wait);
                if writer.write_all(&[turn; 100]).is_err() {
                    break;
                }
            } else {
                let mut word = [0; 100];
                let mut reader = ConnectionReader::new(&end, wait).unwrap();
                if reader.read_exact(&mut word).is_err() {
                    break;
                }
                heard.push(word[99]);
            }
        }
        (heard, end.calls(), end.clock())
    };
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| talk(first, true));
        let second = scope.spawn(|| talk(second, false));
        (first.join().unwrap(), second.join().unwrap())
    });
    (
        [first.0, second.0],
        [first.1, second.1],
        first.2.max(second.2),
    )
}

#[test]
fn every_call_can_fail_and_time_passes_only_where_both_wait() {
    let (heard, calls, took) = conversation(None);
    assert_eq!(heard, [vec![1, 3, 5], vec![0, 2, 4]]);
    assert_eq!(took, Duration::ZERO);
    let minute = Duration::from_secs(60);
    for (end, calls) in calls.into_iter().enumerate() {
        for call in 0..calls {
            let with = |fault| conversation(Some((end, Faulty { call, fault })));
            for fault in [
                Fault::Lose { taken: 0 },
                Fault::Lose { taken: 1 },
                Fault::Vanish,
            ] {
                let (heard, ..) = with(fault);
                // The last call of an end should see that the other one has hung up.
                let lost = heard[0].len() + heard[1].len() < 6;
                assert!(lost || call + 1 == calls, "{fault:?} at {call}");
            }
            // Late bytes still arrive.
            for fault in [Fault::Stall(Duration::from_secs(9)), Fault::Short(1)] {
                let (heard, _, took) = with(fault);
                assert_eq!(heard, [vec![1, 3, 5], vec![0, 2, 4]], "{fault:?} at {call}");
                let stalled = matches!(fault, Fault::Stall(_));
                assert_eq!(took, Duration::from_secs(if stalled { 9 } else { 0 }));
            }
            // Longer than either end waits.
            let (heard, _, took) = with(Fault::Stall(minute));
            assert!(heard[0].len() + heard[1].len() < 6);
            assert!(took >= Duration::from_secs(10) && took < minute, "{took:?}");
        }
    }
}

#[test]
fn what_is_late_arrives_in_order() {
    let (here, there) = FakeConnection::pair_in_one_thread(1 << 16);
    let late = Fault::Late(Duration::from_secs(3));
    here.fail(Faulty {
        call: 0,
        fault: late,
    });
    here.write(b"late ", &Wait::forever()).unwrap();
    here.write(b"and after", &Wait::forever()).unwrap();
    assert_eq!(there.peek(&mut [0; 8]).unwrap(), 0);
    let mut room = [0; 32];
    let wait = Wait::forever().idle(Duration::from_secs(10));
    assert_eq!(there.read(&mut room, &wait).unwrap(), Received::Bytes(14));
    assert_eq!(&room[..14], b"late and after");
    assert_eq!(there.clock(), Duration::from_secs(3));
}

#[test]
fn two_ends_that_wait_for_each_other_for_ever_are_told_so() {
    let (here, _there) = FakeConnection::pair_in_one_thread(1);
    let error = here.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Local(_)), "{error:?}");
}
