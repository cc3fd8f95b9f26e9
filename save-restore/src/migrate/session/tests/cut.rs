//! Links that break: what arrives, and what the session does.

use std::io::{Read as _, Write as _};
use std::thread;

use super::*;

/// Sends `bytes` from one end to the other while `meanwhile` runs, and checks that they arrive.
pub(super) fn carried(from: &Session, to: &Session, bytes: &[u8], meanwhile: impl FnOnce() + Send) {
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = ConnectionWriter::new(from, Wait::forever());
            writer.write_all(bytes).unwrap();
        });
        scope.spawn(meanwhile);
        let mut arrived = vec![0; bytes.len()];
        let mut reader = ConnectionReader::new(to, Wait::forever()).unwrap();
        reader.read_exact(&mut arrived).unwrap();
        assert!(arrived == bytes, "bytes arrive in order, each once");
    });
}

#[test]
fn a_session_whose_links_are_cut_goes_on() {
    let (network, client, server) = Network::session(&several());
    let bytes = pattern(64 << 20);
    for (from, to) in [(&client, &server), (&server, &client)] {
        carried(from, to, &bytes, || {
            for _ in 0..20 {
                network.cut();
                // Until the client has noticed and come back.
                while client.links() == 0 {
                    thread::yield_now();
                }
            }
        });
    }
    drop(client);
    let read = server.read(&mut [0; 1], &Wait::forever()).unwrap();
    assert_eq!(read, Received::Closed);
}

#[test]
fn the_other_links_carry_on_where_none_is_taken_up_again() {
    let request = SessionRequest::new().links(4);
    let (network, client, server) = Network::session(&request);
    let bytes = pattern(32 << 20);
    carried(&client, &server, &bytes, || {
        for _ in 0..3 {
            let connection = network.connections.lock().unwrap().pop().unwrap();
            let before = client.links();
            connection.shutdown(std::net::Shutdown::Both).unwrap();
            while client.links() == before {
                thread::yield_now();
            }
        }
    });
    assert_eq!(client.links(), 1);
    network.cut();
    let error = client.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
}

#[test]
fn a_session_without_a_link_ends_when_its_limit_has_passed() {
    let limit = Duration::from_millis(300);
    let request = SessionRequest::new().reconnect(limit);
    let (network, client, server) = Network::session(&request);
    network.refuse(true);
    let begun = Instant::now();
    network.cut();
    let error = client.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
    assert!(begun.elapsed() >= limit);
    let error = server.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
    assert!(begun.elapsed() >= limit + Duration::from_secs(2));
}

#[test]
fn a_suspended_domain_waits_for_a_link_no_longer_than_it_may() {
    let limit = Duration::from_millis(300);
    let request = several().reconnect_suspended(limit);
    let (network, client, _server) = Network::session(&request);
    network.refuse(true);
    network.cut();
    client.stage(Stage::Suspended);
    let begun = Instant::now();
    let error = client.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
    let waited = begun.elapsed();
    assert!(waited < Duration::from_secs(15), "{waited:?}");
}

#[test]
fn a_sealed_session_sends_nothing_again_and_takes_no_link() {
    let (network, client, server) = Network::session(&several());
    client.write(b"go", &Wait::forever()).unwrap();
    let mut room = [0; 2];
    server.read(&mut room, &Wait::forever()).unwrap();
    client.stage(Stage::LetGo);
    server.stage(Stage::LetGo);
    // Over the one link that is left to it.
    server.write(b"done", &Wait::forever()).unwrap();
    let mut room = [0; 4];
    let read = client.read(&mut room, &Wait::forever()).unwrap();
    assert_eq!(read, Received::Bytes(4));
    network.cut();
    for end in [&client, &server] {
        let error = end.read(&mut [0; 1], &Wait::forever()).unwrap_err();
        assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
    }
    assert!(!network.server.is_open());
}

#[test]
fn a_session_without_a_link_does_not_take_go() {
    let (network, client, _server) = Network::session(&several());
    network.refuse(true);
    network.cut();
    while client.links() > 0 {
        thread::yield_now();
    }
    client.stage(Stage::LetGo);
    let error = client.write(b"go", &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
}

#[test]
fn what_was_taken_back_is_not_delivered_when_the_link_returns() {
    let (network, client, server) = Network::session(&several());
    network.refuse(true);
    network.cut();
    while client.links() > 0 {
        thread::yield_now();
    }
    client.write(b"stale", &Wait::forever()).unwrap();
    client.stage(Stage::TakenBack);
    network.refuse(false);
    let error = client.write(b"more", &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
    let wait = Wait::forever().at_most(Duration::from_millis(500));
    let error = server.read(&mut [0; 8], &wait).unwrap_err();
    assert!(matches!(error, ConnectionError::TimedOut(_)), "{error:?}");
    assert_eq!(server.links(), 0);
}

#[test]
fn a_domain_taken_back_ends_the_other_end_at_once() {
    let (_, client, server) = Network::session(&several());
    client.write(b"image", &Wait::forever()).unwrap();
    while server.peek(&mut [0; 5]).unwrap() < 5 {
        thread::yield_now();
    }
    client.stage(Stage::TakenBack);
    let mut room = [0; 5];
    let read = server.read(&mut room, &Wait::forever()).unwrap();
    assert_eq!(read, Received::Bytes(5));
    let error = server.read(&mut room, &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
}

/// Every call of the client on its connections fails in turn, in each way.
#[test]
fn every_call_below_may_fail() {
    let bytes = pattern(1 << 20);
    let faults = [
        Fault::Lose { taken: 0 },
        Fault::Lose { taken: 7 },
        Fault::Cut { arrive: 0 },
        Fault::Cut { arrive: 100 },
        Fault::Vanish,
        Fault::Short(1),
    ];
    let request = SessionRequest::new()
        .links(2)
        .reconnect(Duration::from_secs(30));
    // After its hello and its welcome.
    for call in 3..40 {
        for fault in faults {
            let (network, made) = Network::new(&request, true);
            let faulty = |by: u64| Faulty {
                call: call + by,
                fault,
            };
            *network.faults.lock().unwrap() = vec![vec![faulty(0)], vec![faulty(1)]];
            let (client, server) = network.connect(&request, &made);
            carried(&client, &server, &bytes, || {});
            carried(&server, &client, &bytes[..1000], || {});
            drop(client);
            let read = server.read(&mut [0; 1], &Wait::forever()).unwrap();
            assert_eq!(read, Received::Closed, "call {call}, {fault:?}");
        }
    }
}
