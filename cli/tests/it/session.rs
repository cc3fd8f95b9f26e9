//! Migrations over a session: through a command and by certificates, with links that a relay cuts.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::common::migration::{Hosts, Running, until};
use crate::common::{backend, run};

/// The whole command that receives at the other host, and offers a session.
fn receiver(hosts: &Hosts, options: &str) -> String {
    format!(
        "{} migrate-receive --session {options} {}",
        env!("CARGO_BIN_EXE_xsr"),
        backend(&hosts.there)
    )
}

const ARRIVED: [&[&str]; 2] = [&[], &["web running"]];

#[test]
fn the_ends_agree_on_a_session_through_the_command_and_connect_directly() {
    let writes = ["--dirty-rate", "20000", "--working-set", "4M"];
    for options in [
        ["--connections", "3"],
        ["--compress", "auto"],
        ["--compress", "zstd:3"],
        ["--reconnect", "5"],
    ] {
        let hosts = Hosts::with("pvh", &writes);
        let there = receiver(&hosts, "--listen-address 127.0.0.1");
        let backend = backend(&hosts.here);
        let args = ["migrate", &backend, "-s", "", "web", &there];
        let ran = run(args.iter().chain(&options)).code(0);
        assert!(
            !ran.stderr.contains("no direct connection"),
            "{}",
            ran.stderr
        );
        assert_eq!(hosts.domains(), ARRIVED, "{options:?}");
    }
}

/// 8 MiB at 4 MiB/s.
#[test]
fn a_session_keeps_to_its_bandwidth_and_says_what_it_carries() {
    let hosts = Hosts::with("pvh", &[]);
    let there = receiver(&hosts, "--listen-address 127.0.0.1");
    let backend = backend(&hosts.here);
    let args = ["migrate", &backend, "-s", "", "web", &there, "--json"];
    let session = [
        "--connections",
        "2",
        "--bandwidth",
        "4M",
        "--progress-fd",
        "2",
    ];
    let begun = Instant::now();
    let ran = run(args.iter().chain(&session)).code(0);
    assert!(begun.elapsed() > Duration::from_millis(1500));
    assert_eq!(hosts.domains(), ARRIVED);
    let whole = &ran.json()["session"];
    assert_eq!(whole["connections"], 2, "{whole}");
    assert!(whole["limited_by"].is_string(), "{whole}");
    assert!(whole["wire_bytes"].as_u64().unwrap() > 8 << 20, "{whole}");
    let lines = ran.stderr.lines().filter(|line| line.starts_with('{'));
    let mut lines = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let last = lines.rfind(|line| line["event"] == "progress").unwrap();
    assert!(
        last["session"]["wire_bytes_per_second"].as_f64().unwrap() > 0.0,
        "{last}"
    );
    assert!(
        last["session"]["compression_ratio"].as_f64().unwrap() > 0.9,
        "{last}"
    );
}

#[test]
fn without_a_direct_connection_everything_goes_through_the_command() {
    for (options, said) in [
        (["--compress", "zstd"], true),
        (["--connections", "2"], true),
        (["--tls", "off"], false),
    ] {
        let hosts = Hosts::with("hvm", &[]);
        // It does not know at which address it was reached.
        let there = format!("env -u SSH_CONNECTION {}", receiver(&hosts, ""));
        let backend = backend(&hosts.here);
        let args = ["migrate", &backend, "-s", "", "web", &there];
        let ran = run(args.iter().chain(&options)).code(0);
        let says = ran.stderr.contains("no direct connection");
        assert_eq!(says, said, "{options:?}: {}", ran.stderr);
        assert_eq!(hosts.domains(), ARRIVED, "{options:?}");
    }
}

#[test]
fn a_receiver_that_offers_no_session_leaves_the_domain_here() {
    let hosts = Hosts::with("pvh", &[]);
    let there = receiver(&hosts, "").replace("--session", "");
    let backend = backend(&hosts.here);
    run([
        "migrate",
        &backend,
        "-s",
        "",
        "--compress",
        "zstd",
        "web",
        &there,
    ])
    .code(1)
    .stderr_has("offers no session")
    .stderr_has("web runs on here");
    assert_eq!(hosts.domains()[0], ["web running"]);
}

#[test]
fn options_that_do_not_fit_are_refused_before_anything_happens() {
    let hosts = Hosts::with("pvh", &[]);
    let backend = backend(&hosts.here);
    for (options, said) in [
        (["--connections", "2", "unix:/x"], "tls:ADDRESS:PORT"),
        (["--compress", "auto", "tcp:a:1"], "tls:ADDRESS:PORT"),
        (["--tls", "/x", "other"], "--tls DIR is for"),
        (["--compress", "auto", "tls:a:1"], "needs --tls DIR"),
    ] {
        let [option, value, host] = options;
        run(["migrate", &backend, option, value, "web", host])
            .code(64)
            .stderr_has(said);
    }
    assert_eq!(hosts.domains()[0], ["web running"]);
    for option in ["-r", "--colo"] {
        let listen = ["--listen", "tls:127.0.0.1:0", "--tls", "/x", option];
        run(["migrate-receive", &backend].into_iter().chain(listen))
            .code(64)
            .stderr_has("-r and --colo take no tls: address");
    }
    // A receiver that would listen without the keys that it was given.
    for endpoint in ["tcp:127.0.0.1:0", "unix:/x"] {
        run([
            "migrate-receive",
            &backend,
            "--listen",
            endpoint,
            "--tls",
            "/x",
        ])
        .code(64)
        .stderr_has("--tls DIR needs --listen tls:ADDRESS:PORT");
    }
}

/// Makes a directory of keys.
pub(crate) fn keys(ca: &CertifiedIssuer<'_, KeyPair>, at: &Path, names: &[&str]) {
    fs::create_dir_all(at).unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(names).unwrap();
    let certificate = params.signed_by(&key, ca).unwrap();
    fs::write(at.join("ca.pem"), ca.as_ref().pem()).unwrap();
    fs::write(at.join("cert.pem"), certificate.pem()).unwrap();
    fs::write(at.join("key.pem"), key.serialize_pem()).unwrap();
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(at.join("key.pem"), private).unwrap();
}

pub(crate) fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A receiver that listens, and its port.
fn listening(hosts: &Hosts) -> (Running, u16) {
    let ca = authority();
    keys(&ca, &hosts.path("client"), &["web1.example.org"]);
    keys(&ca, &hosts.path("server"), &["127.0.0.1"]);
    fs::write(hosts.path("server").join("allow"), "web1.example.org\n").unwrap();
    let directory = hosts.path("server");
    let backend = backend(&hosts.there);
    let at = ["--listen", "tls:127.0.0.1:0", "--tls"];
    let args = ["migrate-receive", &backend].into_iter().chain(at);
    let mut running = Running::start(args.chain([directory.to_str().unwrap()]));
    let line = running.line("waiting at");
    let port = line.trim().rsplit(':').next().unwrap().parse().unwrap();
    (running, port)
}

/// Migrates to this port.
fn sender(hosts: &Hosts, port: u16, options: &[&str]) -> Running {
    let backend = backend(&hosts.here);
    let directory = hosts.path("client");
    let to = format!("tls:127.0.0.1:{port}");
    let tls = directory.to_str().unwrap();
    let args = ["migrate", &backend, "--tls", tls, "web", &to];
    Running::start(args.iter().chain(options))
}

#[test]
fn a_domain_moves_by_certificate_to_a_receiver_that_allows_it() {
    let hosts = Hosts::with("pvh", &[]);
    let (there, port) = listening(&hosts);
    sender(&hosts, port, &["--connections", "2"]).end().code(0);
    there.end().code(0);
    assert_eq!(hosts.domains(), ARRIVED);
    // Another host is not allowed.
    let hosts = Hosts::with("pvh", &[]);
    let (there, port) = listening(&hosts);
    keys(&authority(), &hosts.path("client"), &["web1.example.org"]);
    sender(&hosts, port, &[])
        .end()
        .code(1)
        .stderr_has("web runs on here");
    there.kill();
    assert_eq!(hosts.domains()[0], ["web running"]);
}

/// A relay to a port, which cuts all of its connections.
pub(crate) struct Relay {
    pub(crate) port: u16,
    /// Bytes that it still carries before the next cut.
    left: AtomicU64,
    /// How many cuts come after that, each after so many bytes.
    again: AtomicU64,
    every: u64,
    connections: Mutex<Vec<TcpStream>>,
    /// It takes no more connections once it has cut for the last time.
    ends: bool,
    pub(crate) over: AtomicBool,
    /// Whether it cuts before it carries something back to the client.
    holds: Option<Holds>,
}

pub(crate) type Holds = Box<dyn Fn() -> bool + Send + Sync>;

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

impl Relay {
    fn start(to: u16, after: u64, cuts: u64, ends: bool) -> Arc<Self> {
        Self::made(move || to, after, cuts, ends, None)
    }

    /// A relay that cuts as soon as `holds` is true when something goes back to the client.
    fn start_with(
        to: u16,
        after: u64,
        cuts: u64,
        ends: bool,
        holds: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Arc<Self> {
        Self::made(move || to, after, cuts, ends, Some(Box::new(holds)))
    }

    /// A relay to a port that is known once there is a connection.
    pub(crate) fn made(
        to: impl Fn() -> u16 + Send + 'static,
        after: u64,
        cuts: u64,
        ends: bool,
        holds: Option<Holds>,
    ) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Arc::new(Self {
            port: listener.local_addr().unwrap().port(),
            left: after.into(),
            again: (cuts - 1).into(),
            every: after,
            connections: Mutex::default(),
            ends,
            over: false.into(),
            holds,
        });
        let run = Arc::clone(&relay);
        thread::spawn(move || {
            for here in listener.incoming() {
                let here = here.unwrap();
                if run.ends && run.over.load(Ordering::Relaxed) {
                    continue;
                }
                // The receiver may have stopped listening.
                let Ok(there) = TcpStream::connect(("127.0.0.1", to())) else {
                    continue;
                };
                let mut all = run.connections.lock().unwrap();
                all.push(here.try_clone().unwrap());
                all.push(there.try_clone().unwrap());
                for (from, to, back) in [
                    (here.try_clone().unwrap(), there.try_clone().unwrap(), false),
                    (there, here, true),
                ] {
                    let run = Arc::clone(&run);
                    thread::spawn(move || run.carry(from, to, back));
                }
            }
        });
        relay
    }

    /// Carries bytes in one direction.
    fn carry(&self, mut from: TcpStream, mut to: TcpStream, back: bool) {
        let mut room = [0; 16 << 10];
        while let Ok(n @ 1..) = from.read(&mut room) {
            let cuts_no_more = self.over.load(Ordering::Relaxed);
            if back && !cuts_no_more && self.holds.as_ref().is_some_and(|holds| holds()) {
                self.cut();
                break;
            }
            let less = |left: u64| Some(left.saturating_sub(n as u64));
            let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
            let left = self.left.fetch_update(set, get, less).unwrap();
            let carried = left.min(n as u64);
            if to.write_all(&room[..carried as usize]).is_err() {
                break;
            }
            if carried < n as u64 {
                self.cut();
                break;
            }
        }
        // The peer may have closed both.
        let _closed = to.shutdown(Shutdown::Write);
    }

    pub(crate) fn cut(&self) {
        let mut all = self.connections.lock().unwrap();
        let again = self.again.load(Ordering::Relaxed);
        self.again.store(again.saturating_sub(1), Ordering::Relaxed);
        let next = if again == 0 { u64::MAX } else { self.every };
        self.over.store(again == 0, Ordering::Relaxed);
        self.left.store(next, Ordering::Relaxed);
        for connection in all.drain(..) {
            let _closed = connection.shutdown(Shutdown::Both);
        }
    }
}

#[test]
fn a_migration_whose_links_are_cut_again_and_again_completes() {
    let writes = ["--dirty-rate", "20000", "--working-set", "4M"];
    for links in ["1", "3"] {
        let hosts = Hosts::with("pvh", &writes);
        let (there, port) = listening(&hosts);
        let relay = Relay::start(port, 1_234_567, 6, false);
        let options = ["--connections", links, "--reconnect", "30", "--debug"];
        sender(&hosts, relay.port, &options).end().code(0);
        there.end().code(0);
        assert_eq!(hosts.domains(), ARRIVED, "{links} links");
        assert!(relay.over.load(Ordering::Relaxed), "it was cut");
    }
}

/// The relay holds the report back and cuts, once the domain runs at the other end.
#[test]
fn a_link_that_is_lost_between_go_and_the_report_is_exit_code_3() {
    for reconnect in ["0", "10"] {
        let hosts = Arc::new(Hosts::with("pvh", &[]));
        let (there, port) = listening(&hosts);
        let both = Arc::clone(&hosts);
        let relay = Relay::start_with(port, u64::MAX, 1, true, move || {
            let let_go = both.domains()[0] == ["web--migratedaway suspended"];
            if let_go {
                until("the domain runs there", || {
                    both.domains()[1] == ["web running"]
                });
            }
            let_go
        });
        let options = ["--no-live", "--reconnect", reconnect];
        sender(&hosts, relay.port, &options)
            .end()
            .code(3)
            .stderr_has("It must never run at both ends");
        // It had handed the report to its kernel.
        there.end();
        let here = ["web--migratedaway suspended"];
        assert_eq!(hosts.domains(), [&here[..], &["web running"]]);
    }
}

/// The relay cuts for good after more and more bytes: in the image, around "ready", "go" and the
/// report, and after all of it.
#[test]
fn a_session_that_is_lost_leaves_the_domain_at_one_end() {
    let whole = {
        let hosts = Hosts::with("pvh", &[]);
        let (there, port) = listening(&hosts);
        let relay = Relay::start(port, u64::MAX, 1, true);
        let options = ["--no-live", "--reconnect", "0"];
        sender(&hosts, relay.port, &options).end().code(0);
        there.end().code(0);
        u64::MAX - relay.left.load(Ordering::Relaxed)
    };
    let mut codes = Vec::new();
    let early = [4000, whole / 4, whole / 2];
    let late = (0..14).map(|n| whole - 1400 + n * 100);
    // On a busy machine heartbeats make one run longer than another: the last is not cut in any case.
    for after in early.into_iter().chain(late).chain([whole + 10_000]) {
        let hosts = Hosts::with("pvh", &[]);
        let (there, port) = listening(&hosts);
        let relay = Relay::start(port, after, 1, true);
        let reconnect = if after % 200 == 0 { "1" } else { "0" };
        let options = ["--no-live", "--reconnect", reconnect];
        let sent = sender(&hosts, relay.port, &options).end();
        let received = there.end();
        let what = format!(
            "after {after} of {whole}: {} / {}",
            sent.stderr, received.stderr
        );
        let [here, there] = hosts.domains();
        let here: Vec<&str> = here.iter().map(String::as_str).collect();
        let there: Vec<&str> = there.iter().map(String::as_str).collect();
        match sent.code {
            0 => assert_eq!((&here[..], &there[..]), (ARRIVED[0], ARRIVED[1]), "{what}"),
            1 => assert_eq!(
                (&here[..], &there[..]),
                (&["web running"][..], &[][..]),
                "{what}"
            ),
            3 => {
                assert_eq!(here, ["web--migratedaway suspended"], "{what}");
                assert!(there.is_empty() || there == ["web running"], "{what}");
            }
            other => panic!("exit code {other}: {what}"),
        }
        codes.push(sent.code);
    }
    assert!(codes.contains(&1) && codes.contains(&0), "{codes:?}");
}
