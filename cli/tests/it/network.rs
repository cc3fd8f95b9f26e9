//! Migrations between two network namespaces, over a relay of this test's own: links that are reset,
//! vanish, lose packets, and whose client gets another address.
//!
//! Needs root, `unshare`, `nsenter` and `ip`. For root, a machine without namespaces or TUN devices
//! is a failure.

mod relay;

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use self::relay::{Ending, Mode, Quality, Relay};
use crate::common::backend;
use crate::common::migration::{Hosts, Running, until};
use crate::session::{authority, keys};

/// 40 Mbit/s: the 8 MiB of the domain take about 2 s.
const LINK: Quality = Quality {
    rate: 40_000_000,
    delay: Duration::from_millis(5),
    lost: 0,
    late: 0,
};

/// 200 Mbit/s, for a domain that is much larger than what may be sent twice: about 3 s.
const FAST: Quality = Quality {
    rate: 200_000_000,
    ..LINK
};

/// The domain of it, in MiB.
const LARGE: u64 = 64;

const CLIENT: &str = "10.9.0.1";
const SERVER: &str = "10.9.0.2";

/// A network namespace, which exists as long as a process in it.
struct Namespace {
    holder: Child,
    device: String,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its stdin is closed, so it ends by itself, too.
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}

fn ran(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

impl Namespace {
    fn new(device: String) -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "cat"]).stdin(Stdio::piped());
        let holder = unshare.spawn().unwrap();
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
        let (ours, process) = (namespace("self"), holder.id().to_string());
        until("a namespace", || namespace(&process) != ours);
        ran(Command::new("ip").args(["link", "set", &device, "netns", &process]));
        Self { holder, device }
    }

    /// A command in it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let process = self.holder.id().to_string();
        command.args(["--net", "--target", &process, program]);
        command
    }

    fn ip(&self, words: &[&str]) {
        ran(self.command("ip").args(words));
    }

    fn up(&self, address: &str) {
        self.address("add", address);
        self.ip(&["link", "set", &self.device, "up"]);
    }

    fn address(&self, what: &str, address: &str) {
        self.ip(&[
            "address",
            what,
            &format!("{address}/24"),
            "dev",
            &self.device,
        ]);
    }

    fn xsr(&self, args: &[&str]) -> Running {
        let mut command = self.command(env!("CARGO_BIN_EXE_xsr"));
        command.args(args);
        command.env("XSR_LOG", "xsr_save_restore=debug");
        Running::of(command)
    }
}

/// Two hosts in two namespaces, and the link between them.
struct Network {
    hosts: Hosts,
    here: Namespace,
    there: Namespace,
    relay: Ending,
    /// The memory of the domain in bytes.
    memory: u64,
}

impl Network {
    /// `None` if this is not root.
    fn new(quality: Quality, writes: &[&str]) -> Option<Self> {
        Self::with(8, quality, writes)
    }

    /// With a domain of so many MiB.
    fn with(mebibytes: u64, quality: Quality, writes: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI runs these tests as root"
            );
            eprintln!("SKIPPED: only root can make network namespaces");
            return None;
        }
        let device = |end: char| format!("xsr{}{end}", std::process::id());
        let open = |end| xsr_tun::open(&device(end)).expect("a TUN device can be made");
        let relay = Relay::start(open('a'), open('b'), quality);
        let (here, there) = (Namespace::new(device('a')), Namespace::new(device('b')));
        here.up(CLIENT);
        there.up(SERVER);
        let hosts = Hosts::of_size(&format!("{mebibytes}M"), "pvh", writes);
        let ca = authority();
        keys(&ca, &hosts.path("client"), &["web1.example.org"]);
        keys(&ca, &hosts.path("server"), &[SERVER]);
        fs::write(hosts.path("server").join("allow"), "web1.example.org\n").unwrap();
        Some(Self {
            hosts,
            here,
            there,
            relay: Ending(relay),
            memory: mebibytes << 20,
        })
    }

    /// Migrates the domain, and calls `meanwhile` in the midst of precopy. Returns what the sender
    /// said.
    fn migrate(&self, options: &[&str], meanwhile: impl FnOnce(&Relay, &mut Running)) -> String {
        let (client, server) = (self.hosts.path("client"), self.hosts.path("server"));
        let listen = format!("tls:{SERVER}:8002");
        let there = backend(&self.hosts.there);
        let args = ["migrate-receive", &there, "--listen", &listen, "--tls"];
        let mut receiver = self
            .there
            .xsr(&[&args[..], &[server.to_str().unwrap()]].concat());
        receiver.line("waiting at");
        let here = backend(&self.hosts.here);
        let args = ["migrate", &here, "--tls", client.to_str().unwrap()];
        let mut sender = self
            .here
            .xsr(&[&args[..], options, &["web", &listen]].concat());
        let relay = &self.relay.0;
        // Late in the first pass.
        let midst = self.memory / 8 * 5;
        until("the midst of precopy", || relay.carried() > midst);
        meanwhile(relay, &mut sender);
        let sent = sender.end().code(0);
        receiver.end().code(0);
        assert_eq!(self.hosts.domains(), [&[][..], &["web running"]]);
        sent.stderr
    }
}

impl Network {
    #[track_caller]
    fn sent_little_twice(&self) {
        let carried = self.relay.0.carried();
        assert!(carried < self.memory + AGAIN, "{carried} bytes");
    }
}

/// Writes that leave precopy a chance.
const WRITES: [&str; 4] = ["--dirty-rate", "100", "--working-set", "1M"];

/// What passes the link in addition to the domain's memory. After an outage, what the peer has not
/// acknowledged is sent again: never more than the session's window of 16 MiB, which includes what
/// is in the buffers of both kernels. The guest writes to 1 MiB, of which each pass sends what was
/// written: 8 MiB are more passes than precopy takes here, and the headers of all packets.
const AGAIN: u64 = (16 + 8) << 20;

#[test]
fn connections_that_are_reset_and_refused_for_10_s_return() {
    let Some(network) = Network::with(LARGE, FAST, &WRITES) else {
        return;
    };
    let options = ["--connections", "2", "--reconnect", "30"];
    let said = network.migrate(&options, |relay, _| {
        relay.set(Mode::Reset);
        thread::sleep(Duration::from_secs(10));
        relay.set(Mode::Pass);
    });
    assert!(said.contains("a link of the session has ended"), "{said}");
    network.sent_little_twice();
}

#[test]
fn packets_that_vanish_for_a_minute_are_noticed_and_the_migration_goes_on() {
    let Some(network) = Network::with(LARGE, FAST, &WRITES) else {
        return;
    };
    let options = [
        "--connections",
        "2",
        "--reconnect",
        "90",
        "--answer-timeout",
        "120",
    ];
    let begun = Instant::now();
    network.migrate(&options, |relay, sender| {
        relay.set(Mode::Vanish);
        let vanished = Instant::now();
        // Neither the other end nor a router says anything.
        sender.line("nothing was heard for 4 s");
        let noticed = vanished.elapsed();
        assert!(noticed < Duration::from_secs(5), "{noticed:?}");
        thread::sleep(Duration::from_secs(60).saturating_sub(noticed));
        relay.set(Mode::Pass);
    });
    assert!(begun.elapsed() > Duration::from_secs(60));
    network.sent_little_twice();
}

#[test]
fn a_client_that_gets_another_address_goes_on() {
    let Some(network) = Network::new(LINK, &WRITES) else {
        return;
    };
    let options = ["--reconnect", "30"];
    let said = network.migrate(&options, |_, _| {
        network.here.address("del", CLIENT);
        network.here.address("add", "10.9.0.77");
    });
    assert!(said.contains("a link of the session has ended"), "{said}");
}

/// Losses and reordering are TCP's to mend: no link is lost.
#[test]
fn a_link_that_loses_and_reorders_packets_carries_the_domain() {
    let quality = Quality {
        lost: 5,
        late: 10,
        ..LINK
    };
    let Some(network) = Network::new(quality, &WRITES) else {
        return;
    };
    network.migrate(&["--connections", "3", "--compress", "auto"], |_, _| {});
    assert!(network.relay.0.hurt() > 0);
}
