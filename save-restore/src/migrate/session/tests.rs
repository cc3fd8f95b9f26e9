//! Sessions over sockets and over the faulty connection, whose links are cut.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "tests/cut.rs"]
mod cut;
#[path = "tests/tls.rs"]
mod tls;

use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use super::*;
use crate::migrate::connection::{ConnectionReader, ConnectionWriter, UnixConnection};
use crate::migrate::testing::{FakeConnection, Fault, Faulty, Pair, contract};
use crate::progress::Cancel;

/// A server, and the network to it: connections in this process that can be cut.
#[derive(Debug)]
struct Network {
    server: Server,
    sessions: Mutex<mpsc::Sender<Session>>,
    /// One end of each connection.
    connections: Mutex<Vec<UnixStream>>,
    refuses: AtomicBool,
    /// Which connections fail, and how; from the first one.
    faults: Mutex<Vec<Vec<Faulty>>>,
    fake: bool,
}

/// The client's end of it.
#[derive(Debug)]
struct Caller(Arc<Network>);

impl Dial for Caller {
    fn dial(&self, _: Duration, _: &Cancel) -> io::Result<Wire> {
        let network = &self.0;
        if network.refuses.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (here, there): Pair = match network.fake {
            true => {
                let (here, there) = FakeConnection::pair(1 << 16);
                let mut faults = network.faults.lock().unwrap();
                if !faults.is_empty() {
                    for faulty in faults.remove(0) {
                        here.fail(faulty);
                    }
                }
                (Box::new(here), Box::new(there))
            }
            false => {
                let (here, there) = UnixStream::pair()?;
                let mut connections = network.connections.lock().unwrap();
                connections.push(here.try_clone()?);
                let end = |stream| UnixConnection::new(stream).map(Box::new);
                (end(here)?, end(there)?)
            }
        };
        let network = Arc::clone(network);
        std::thread::spawn(move || {
            // A connection that fails is the client's to notice.
            let admitted = network.server.admit(Wire::plain(there), &Cancel::new());
            if let Ok(Some(session)) = admitted {
                let sessions = network.sessions.lock().unwrap();
                sessions.send(session).unwrap();
            }
        });
        Ok(Wire::plain(here))
    }
}

impl Network {
    fn new(request: &SessionRequest, fake: bool) -> (Arc<Self>, mpsc::Receiver<Session>) {
        let (sessions, made) = mpsc::channel();
        let network = Self {
            server: Server::new(request.clone()),
            sessions: sessions.into(),
            connections: Mutex::default(),
            refuses: false.into(),
            faults: Mutex::default(),
            fake,
        };
        (Arc::new(network), made)
    }

    /// Both ends of a session, once it has all of its links.
    fn session(request: &SessionRequest) -> (Arc<Self>, Session, Session) {
        let (network, made) = Self::new(request, false);
        let (client, server) = network.connect(request, &made);
        while client.links() < request.links.into() {
            std::thread::yield_now();
        }
        (network, client, server)
    }

    fn connect(
        self: &Arc<Self>,
        request: &SessionRequest,
        made: &mpsc::Receiver<Session>,
    ) -> (Session, Session) {
        let dial = Arc::new(Caller(Arc::clone(self)));
        let client = request.connect(dial, Duration::from_secs(5), &Cancel::new());
        (client.unwrap(), made.recv().unwrap())
    }

    /// Cuts every connection that there is.
    fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            // It may be gone already.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::Relaxed);
    }
}

fn several() -> SessionRequest {
    SessionRequest::new()
        .links(4)
        .reconnect(Duration::from_secs(30))
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(bytes).collect()
}

#[test]
fn a_session_of_one_link_keeps_the_contract() {
    contract(&|| {
        let (_, client, server) = Network::session(&SessionRequest::new());
        (Box::new(client), Box::new(server))
    });
}

#[test]
fn a_session_of_several_links_keeps_the_contract() {
    contract(&|| {
        let (_, client, server) = Network::session(&several());
        (Box::new(server), Box::new(client))
    });
}

#[test]
fn what_was_not_read_when_an_end_is_dropped_loses_the_session() {
    let (_, client, server) = Network::session(&several());
    client.write(b"unread", &Wait::forever()).unwrap();
    while server.peek(&mut [0; 6]).unwrap() < 6 {
        std::thread::yield_now();
    }
    drop(server);
    let error = client.read(&mut [0; 1], &Wait::forever()).unwrap_err();
    assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
}

#[test]
fn what_the_peer_has_read_is_known() {
    let (_, client, server) = Network::session(&several());
    assert_eq!(client.delivery(), Delivery::Read);
    client.write(b"sent", &Wait::forever()).unwrap();
    while client.delivery() == Delivery::Pending {
        std::thread::yield_now();
    }
    assert_eq!(client.delivery(), Delivery::AtPeerHost);
    let read = server.read(&mut [0; 4], &Wait::forever()).unwrap();
    assert_eq!(read, Received::Bytes(4));
    while client.delivery() != Delivery::Read {
        std::thread::yield_now();
    }
}
