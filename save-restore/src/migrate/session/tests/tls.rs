//! Links with TLS: who gets in, and who does not.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};

use super::super::frame::{Answer, Hello, Purpose, Token, Welcome};
use super::super::wire::Inbox;
use super::*;

const LIMIT: Duration = Duration::from_secs(10);
const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A server that listens on the loopback interface.
struct Listening {
    address: SocketAddr,
    server: Arc<Server>,
    session: thread::JoinHandle<Result<Session, SessionError>>,
    cancel: Cancel,
}

impl Listening {
    fn new(request: &SessionRequest, tls: ServerTls) -> Self {
        let listener = SessionListener::bind(LOCAL, 0..=0).unwrap();
        let address = listener.address().unwrap();
        let server = Arc::new(Server::new(request.clone()));
        let (serving, cancel) = (Arc::clone(&server), Cancel::new());
        let token = cancel.clone();
        let session = thread::spawn(move || listener.accept(serving, tls, None, &token));
        Self {
            address,
            server,
            session,
            cancel,
        }
    }

    fn connect(&self, request: &SessionRequest, tls: ClientTls) -> Result<Session, SessionError> {
        let dial = Arc::new(TcpDial::new(vec![self.address], tls));
        request.connect(dial, LIMIT, &Cancel::new())
    }

    fn pair(self, request: &SessionRequest, tls: ClientTls) -> (Session, Session) {
        let client = self.connect(request, tls).unwrap();
        (client, self.session.join().unwrap().unwrap())
    }

    /// Nothing has been let in.
    fn stays_empty(self) {
        self.cancel.cancel();
        assert!(self.session.join().unwrap().is_err());
    }
}

fn keys() -> (ClientTls, ServerTls) {
    let (here, there) = (OneTimeKey::new().unwrap(), OneTimeKey::new().unwrap());
    let client = here.client(there.public()).unwrap();
    (client, there.server(here.public()).unwrap())
}

#[test]
fn a_session_over_tls_keeps_the_contract() {
    let request = several().compression(Compression::Auto);
    contract(&|| {
        let (client, server) = keys();
        let (client, server) = Listening::new(&request, server).pair(&request, client);
        (Box::new(client), Box::new(server))
    });
}

#[test]
fn much_arrives_over_tls_as_it_was() {
    let request = several();
    let (client, server) = keys();
    let (client, server) = Listening::new(&request, server).pair(&request, client);
    let bytes = pattern(64 << 20);
    super::cut::carried(&client, &server, &bytes, || {});
    super::cut::carried(&server, &client, &bytes, || {});
    // No link was lost.
    assert_eq!(client.monitor().figures().stream_bytes, 64 << 20);
}

/// A client that sends a byte now and then, before the handshake and after it, gets no longer than
/// one that sends nothing.
#[test]
fn a_slow_client_holds_its_place_no_longer_than_the_limit() {
    let (_, tls) = keys();
    let limit = Duration::from_millis(200);
    let (client, server) = UnixStream::pair().unwrap();
    let mut client = client;
    // The beginning of a record of 512 bytes, and then a byte every 20 ms: 10 s in all.
    let slow = thread::spawn(move || {
        let mut sent = client.write_all(&[0x16, 3, 1, 2, 0]);
        while sent.is_ok() {
            thread::park_timeout(Duration::from_millis(20));
            sent = client.write_all(&[0]);
        }
    });
    let begun = Instant::now();
    let connection = Box::new(UnixConnection::new(server).unwrap());
    let error = tls.secure(connection, limit, &Cancel::new()).unwrap_err();
    assert!(matches!(error, ConnectionError::TimedOut(_)), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    slow.join().unwrap();
}

/// A peer that closes TLS and goes on to send does not keep the reading thread busy: the link ends.
#[test]
fn bytes_after_the_end_of_tls_end_the_link() {
    let (client, server) = keys();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut raw = ours.try_clone().unwrap();
    let connect = thread::spawn(move || {
        let connection = Box::new(UnixConnection::new(ours).unwrap());
        client.secure(connection, LIMIT, &Cancel::new()).unwrap()
    });
    let connection = Box::new(UnixConnection::new(theirs).unwrap());
    let wire = server.secure(connection, LIMIT, &Cancel::new()).unwrap();
    let peer = connect.join().unwrap();
    peer.close_tls().unwrap();
    raw.write_all(&[0x17; 100]).unwrap();
    let mut inbox = Inbox::new();
    let ended = wire.read(&mut inbox, &Wait::forever().at_most(LIMIT));
    assert!(!ended.unwrap());
}

#[test]
fn zeroes_and_text_are_sent_as_less_than_they_are() {
    let request = SessionRequest::new().compression(Compression::Zstd(1));
    let (client, server) = keys();
    let (client, server) = Listening::new(&request, server).pair(&request, client);
    let zeroes = vec![0; 8 << 20];
    super::cut::carried(&client, &server, &zeroes, || {});
    let sent = client.monitor().figures();
    assert!(sent.wire_bytes < sent.stream_bytes / 1000, "{sent:?}");
    super::cut::carried(&client, &server, &pattern(8 << 20), || {});
    let sent = client.monitor().figures();
    assert!(sent.wire_bytes < sent.stream_bytes / 10, "{sent:?}");
}

#[test]
fn another_key_than_the_one_that_was_told_is_refused_by_either_end() {
    let [here, there, other] = [(); 3].map(|()| OneTimeKey::new().unwrap());
    let request = SessionRequest::new();
    // The server's key is another one, then the client's.
    for (client, server) in [
        (here.client(other.public()), there.server(here.public())),
        (other.client(there.public()), there.server(here.public())),
    ] {
        let listening = Listening::new(&request, server.unwrap());
        let error = listening.connect(&request, client.unwrap()).unwrap_err();
        assert!(
            matches!(
                error,
                SessionError::Connecting(_) | SessionError::Beginning(_)
            ),
            "{error:?}"
        );
        listening.stays_empty();
    }
}

/// Sends a hello of the attacker's own and returns the answer.
fn answer(address: SocketAddr, tls: &ClientTls, hello: &Hello) -> Answer {
    let cancel = Cancel::new();
    let dial = TcpDial::new(vec![address], tls.clone());
    let wire = dial.dial(LIMIT, &cancel).unwrap();
    let wait = Wait::forever().at_most(LIMIT);
    wire.write(&hello.bytes(), &wait).unwrap();
    let mut inbox = Inbox::new();
    wire.read_whole(&mut inbox, Welcome::LENGTH, &wait).unwrap();
    let bytes = inbox.bytes().first_chunk().unwrap();
    Welcome::read(bytes).unwrap().answer
}

/// One that has a key which is allowed, such as another client of the same CA.
#[test]
fn only_the_token_of_a_session_gives_it_another_link() {
    let token = [7; SessionRequest::TOKEN];
    let request = several().token(token);
    let (tls, server) = keys();
    let listening = Listening::new(&request, server);
    let address = listening.address;
    let hello = |purpose, token| Hello {
        purpose,
        slot: 9,
        limit: LIMIT,
        token: Token(token),
        received: 0,
        window: 1 << 20,
    };
    let wrong = [8; SessionRequest::TOKEN];
    for purpose in [Purpose::New, Purpose::Join] {
        let refused = answer(address, &tls, &hello(purpose, wrong));
        assert_eq!(refused, Answer::NoSuchSession);
    }
    let early = answer(address, &tls, &hello(Purpose::Join, token));
    assert_eq!(early, Answer::NoSuchSession);
    let served = Arc::clone(&listening.server);
    let (client, server) = listening.pair(&request, tls.clone());
    while server.links() < 4 {
        thread::yield_now();
    }
    let refused = answer(address, &tls, &hello(Purpose::Join, wrong));
    assert_eq!(refused, Answer::NoSuchSession);
    let refused = answer(address, &tls, &hello(Purpose::New, token));
    assert_eq!(refused, Answer::AlreadyThere);
    assert_eq!(
        answer(address, &tls, &hello(Purpose::Join, token)),
        Answer::Accepted
    );
    assert!(served.is_open());
    server.stage(Stage::LetGo);
    assert!(!served.is_open());
    // The listener ends; until it does, it refuses.
    let dial = TcpDial::new(vec![address], tls.clone());
    while dial.dial(LIMIT, &Cancel::new()).is_ok() {
        thread::yield_now();
    }
    drop((client, server));
}

#[test]
fn connections_without_a_key_neither_get_in_nor_hold_the_session_up() {
    let request = several();
    let (tls, server) = keys();
    let listening = Listening::new(&request, server);
    let address = listening.address;
    // Idle ones, and ones that send something else.
    let mut strangers: Vec<TcpStream> = Vec::new();
    for n in 0..20 {
        let mut stranger = TcpStream::connect(address).unwrap();
        if n % 2 == 0 {
            let garbage = std::io::Write::write_all(&mut stranger, &[n; 5000]);
            // It may have been closed by now.
            drop(garbage);
        }
        strangers.push(stranger);
    }
    // At most 8 handshakes are in progress, and each for 5 s.
    let begun = Instant::now();
    let client = loop {
        match listening.connect(&request, tls.clone()) {
            Ok(client) => break client,
            Err(_) => assert!(begun.elapsed() < Duration::from_secs(60)),
        }
    };
    let server = listening.session.join().unwrap().unwrap();
    super::cut::carried(&client, &server, &pattern(1 << 20), || {});
    drop(strangers);
}

/// A CA, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A directory for an end with these names.
    fn directory(&self, at: &Path, names: &[&str], allow: Option<&str>, expired: bool) {
        fs::create_dir_all(at).unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if expired {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(at.join("ca.pem"), self.0.as_ref().pem()).unwrap();
        fs::write(at.join("cert.pem"), certificate.pem()).unwrap();
        fs::write(at.join("key.pem"), key.serialize_pem()).unwrap();
        mode(&at.join("key.pem"), 0o600);
        if let Some(allow) = allow {
            fs::write(at.join("allow"), allow).unwrap();
        }
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn only_an_allowed_client_and_the_named_server_of_the_ca_make_a_session() {
    let place = tempfile::tempdir().unwrap();
    let (ours, other) = (Authority::new(), Authority::new());
    let at = |name: &str| place.path().join(name);
    let allow = Some("# senders\nweb1.example.org # the first\n\nweb2.example.org\n");
    ours.directory(&at("server"), &["there", "127.0.0.1"], allow, false);
    ours.directory(&at("server-old"), &["127.0.0.1"], allow, true);
    ours.directory(&at("server-none"), &["127.0.0.1"], None, false);
    ours.directory(&at("server-empty"), &["127.0.0.1"], Some("#\n"), false);
    other.directory(&at("server-other"), &["127.0.0.1"], allow, false);
    ours.directory(&at("client"), &["web2.example.org"], None, false);
    ours.directory(&at("client-any"), &["*.example.org"], None, false);
    ours.directory(
        &at("client-two"),
        &["web1.example.org", "*.b.org"],
        None,
        false,
    );
    ours.directory(&at("client-old"), &["web2.example.org"], None, true);
    ours.directory(&at("client-not"), &["web3.example.org"], None, false);
    other.directory(&at("client-other"), &["web2.example.org"], None, false);
    let table = [
        ("server", "client", "127.0.0.1", true),
        ("server", "client", "there", true),
        ("server", "client", "elsewhere", false),
        ("server", "client-any", "127.0.0.1", false),
        ("server", "client-two", "127.0.0.1", false),
        ("server", "client-old", "127.0.0.1", false),
        ("server", "client-not", "127.0.0.1", false),
        ("server", "client-other", "127.0.0.1", false),
        ("server-old", "client", "127.0.0.1", false),
        ("server-none", "client", "127.0.0.1", false),
        ("server-empty", "client", "127.0.0.1", false),
        ("server-other", "client", "127.0.0.1", false),
        ("server-other", "client-other", "127.0.0.1", true),
    ];
    let request = SessionRequest::new();
    for (server, client, name, allowed) in table {
        let row = format!("{client} to {server} as {name}");
        let server = KeyDirectory::open(&at(server)).unwrap().server().unwrap();
        let client = KeyDirectory::open(&at(client)).unwrap().client(name);
        let listening = Listening::new(&request, server);
        let made = listening.connect(&request, client.unwrap());
        assert_eq!(made.is_ok(), allowed, "{row}: {made:?}");
        match made {
            Ok(client) => drop((client, listening.session.join().unwrap().unwrap())),
            Err(_) => listening.stays_empty(),
        }
    }
}

#[test]
fn keys_that_others_can_read_and_files_that_hold_something_else_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let at = place.path().join("keys");
    Authority::new().directory(&at, &["web"], Some("no name!"), false);
    let refused = |words: &str| {
        let error = KeyDirectory::open(&at).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let error = KeyDirectory::open(&at).unwrap().server().unwrap_err();
    assert!(error.to_string().contains("allow: \"no name!\""), "{error}");
    let error = KeyDirectory::open(&at).unwrap().client("no name!");
    assert!(matches!(error, Err(KeyError::Name(_))), "{error:?}");
    for bits in [0o640, 0o604, 0o660] {
        mode(&at.join("key.pem"), bits);
        refused(&format!(
            "key.pem: other users can read this key (mode 0{bits:o})"
        ));
    }
    mode(&at.join("key.pem"), 0o400);
    assert!(KeyDirectory::open(&at).is_ok());
    // Only root can give a file away.
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(at.join("key.pem"), Some(1234), None).unwrap();
        refused("key.pem: user 1234 owns this key");
        std::os::unix::fs::chown(at.join("key.pem"), Some(0), None).unwrap();
    }
    fs::write(at.join("cert.pem"), "nothing").unwrap();
    refused("cert.pem: ");
    fs::remove_file(at.join("key.pem")).unwrap();
    refused("key.pem");
}
