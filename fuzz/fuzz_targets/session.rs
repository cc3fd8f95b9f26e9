//! Fuzz target for a session between two hosts: a peer with the right token sends anything. The end
//! that is tried hands out no more than the chunks that it was sent can hold, and its calls return.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use xsr_save_restore::migrate::connection::{Connection as _, Received, UnixConnection, Wait};
use xsr_save_restore::migrate::session::{Server, SessionRequest, Wire};
use xsr_save_restore::progress::Cancel;

/// What fits into the socket's buffer, so that the peer does not wait.
const MOST: usize = 64 << 10;

/// The most bytes in one chunk.
const CHUNK: usize = 128 << 10;

/// The bytes of the shortest frame that has a chunk: one of zeroes.
const SHORTEST: usize = 20;

/// A hello that the server takes, as docs/session.md specifies it.
fn hello() -> [u8; 64] {
    let mut hello = [0; 64];
    hello[0] = 1;
    hello[1..8].copy_from_slice(b"xsrlink");
    hello[16..48].fill(7);
    hello[56..].copy_from_slice(&(16_u64 << 20).to_le_bytes());
    hello
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let (mut peer, here) = UnixStream::pair().expect("a pair of sockets");
    // Half of the inputs are frames after a good hello, and half begin with the hello.
    let is_known = first % 2 == 0;
    if is_known {
        peer.write_all(&hello()).expect("there is room");
    }
    let rest = &rest[..rest.len().min(MOST)];
    peer.write_all(rest).expect("there is room");
    peer.shutdown(Shutdown::Write).expect("it is open");
    let server = Server::new(SessionRequest::new().token([7; 32]));
    let here = UnixConnection::new(here).expect("a socket");
    let Ok(Some(session)) = server.admit(Wire::plain(Box::new(here)), &Cancel::new()) else {
        assert!(!is_known, "a good hello was refused");
        return;
    };
    let mut room = vec![0; 1 << 16];
    let mut all = 0;
    let wait = Wait::forever().at_most(Duration::from_secs(5));
    while let Ok(Received::Bytes(n)) = session.read(&mut room, &wait) {
        all += n;
    }
    // A chunk of zeroes or a compressed one is more than it is on the wire.
    let chunks = rest.len() / SHORTEST + 1;
    assert!(all <= chunks * CHUNK, "{all} bytes of {}", bytes.len());
});
