//! remus -c and migrate-receive --colo, both ends real or one of them the test: the domain runs at
//! both, and what happens to it when either is interrupted, killed or cut off.

mod primary;

use std::path::Path;

use crate::common::migration::{BANNER, Cut, Hosts, Running};
use crate::common::{arg, backend, run};
use nix::sys::signal::Signal;

const NONE: [&str; 0] = [];
const BUSY: [&str; 4] = ["--dirty-rate", "20000", "--working-set", "4M"];

/// `xsr remus -c` of `web`, to a socket.
fn sender(hosts: &Hosts, socket: &Path, options: &[&str]) -> Running {
    let to = format!("unix:{}", socket.display());
    let backend = backend(&hosts.here);
    let interval = match options {
        ["-i", ..] => &[][..],
        _ => &["-i", "20"],
    };
    let args = ["remus", "-c", &backend, "web", &to];
    Running::start(args.iter().chain(interval).chain(options))
}

/// Both ends, with one checkpoint complete at the secondary.
fn protected(hosts: &Hosts, options: &[&str], there: &[&str]) -> [Running; 2] {
    let socket = hosts.path("socket");
    let mut receiver = hosts.receiver(&socket, &[&["--colo"], there].concat());
    let mut sender = sender(hosts, &socket, options);
    receiver.line("first checkpoint");
    sender.line("is protected by");
    [sender, receiver]
}

fn destroy(host: &Path, name: &str) {
    run(["mock", "destroy", name, "--host", arg(host)]).code(0);
}

#[test]
fn both_guests_run_and_the_end_of_the_protection_leaves_the_first() {
    for kind in ["hvm", "pvh"] {
        // After the first checkpoint, all pages sent are those that the secondary has written.
        let hosts = Hosts::with(kind, &[]);
        let socket = hosts.path("socket");
        let receiver = hosts.receiver(&socket, &["--colo", "--dirty-rate", "20000"]);
        let lines = sender(&hosts, &socket, &["--epochs", "5", "--stats", "--json"]);
        let lines = lines.end().code(0).stdout;
        let lines: Vec<serde_json::Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 6, "{lines:?}");
        let pages = |line: &serde_json::Value| line["dirty_pages"].as_u64().unwrap();
        assert!(
            lines[1..5].iter().map(pages).sum::<u64>() > 100,
            "{lines:?}"
        );
        for line in &lines[..5] {
            assert!(line["pause_seconds"].as_f64() > Some(0.0), "{line}");
        }
        assert_eq!(lines[5]["ended"], "epochs");
        receiver
            .end()
            .code(1)
            .stderr_has("the sender has ended the protection, and keeps the domain");
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);

        let hosts = Hosts::with(kind, &BUSY);
        let [sender, receiver] = protected(&hosts, &[], &[]);
        sender.signal(Signal::SIGINT);
        sender.end().code(0);
        assert_eq!(receiver.end().code, 1);
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

#[test]
fn who_is_left_alone_runs_on() {
    let hosts = Hosts::with("pvh", &[]);
    let [sender, receiver] = protected(&hosts, &[], &["--dirty-rate", "5000"]);
    sender.kill();
    receiver
        .end()
        .code(0)
        .stderr_has("goes on here from checkpoint");
    assert_eq!(hosts.domains()[1], ["web running"]);
    destroy(&hosts.there, "web");
    // It was killed at an arbitrary point.
    let here = hosts.domains()[0][0].clone();
    if here == "web suspended" {
        run(["mock", "resume", "web", "--host", arg(&hosts.here)]).code(0);
    }

    let [sender, receiver] = protected(&hosts, &[], &["-p"]);
    sender.kill();
    receiver.end().code(0);
    assert_eq!(hosts.domains()[1], ["web paused"]);
    destroy(&hosts.there, "web");
    if hosts.domains()[0] == ["web suspended"] {
        run(["mock", "resume", "web", "--host", arg(&hosts.here)]).code(0);
    }

    for (on_loss, left) in [("run", "web running"), ("pause", "web paused")] {
        let [sender, receiver] = protected(&hosts, &["--on-loss", on_loss], &[]);
        receiver.kill();
        let sent = sender.end();
        assert_eq!(sent.code, 3, "{sent:?}");
        assert_eq!(hosts.domains()[0], [left], "{sent:?}");
        destroy(&hosts.there, "web--incoming");
    }
    run(["mock", "unpause", "web", "--host", arg(&hosts.here)]).code(0);

    // It reports that it has no copy any more.
    let [sender, receiver] = protected(&hosts, &[], &[]);
    receiver.signal(Signal::SIGTERM);
    assert_eq!(receiver.end().code, 1);
    sender
        .end()
        .code(1)
        .stderr_has("web runs on here, unprotected");
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
}

#[test]
fn a_pv_guest_and_what_xl_refuses_is_refused() {
    let hosts = Hosts::with("pv", &[]);
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, &["--colo"]);
    sender(&hosts, &socket, &[])
        .end()
        .code(1)
        .stderr_has("it is for HVM guests");
    assert_eq!(receiver.end().code, 1);
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    let here = backend(&hosts.here);
    for option in ["-b", "-n", "-d", "--no-buffer"] {
        run(["remus", "-c", "-F", option, &here, "web", "absent"]).code(64);
    }
    run(["remus", "-p", &here, "web", "absent"]).code(64);
    let timeout = ["--answer-timeout", "0"];
    run(["remus", &here, "web", "absent"].iter().chain(&timeout)).code(64);
    run(["migrate-receive", "-r", "--colo"]).code(64);
    run(["migrate-receive", "--dirty-rate", "5"]).code(64);
}

#[test]
fn the_receiver_is_told_what_xls_is() {
    let hosts = Hosts::with("pvh", &[]);
    let said = hosts.path("said");
    let shell = format!("sh -c 'echo \"$@\" > {}' sh", arg(&said));
    let here = backend(&hosts.here);
    for (options, expected) in [
        (&["-c"][..], "host xsr migrate-receive --colo\n"),
        (
            &["-c", "-p", "-e", "-N", "x"],
            "host xsr migrate-receive --colo --coloft-script x --userspace-colo-proxy -e\n",
        ),
    ] {
        let args = ["remus", &here, "-s", &shell, "web", "host"];
        run(args.iter().chain(options)).code(1);
        let told = std::fs::read_to_string(&said).unwrap_or_default();
        assert_eq!(told, expected);
    }
}

#[test]
fn a_guest_that_shuts_down_by_itself_ends_the_protection_where_it_is() {
    let end = ["--shut-down", "crash", "--after", "20000"];
    let hosts = Hosts::with("pvh", &[&BUSY[..], &end].concat());
    let [sender, receiver] = protected(&hosts, &[], &[]);
    let said = "web has shut down (crash) here";
    sender.end().code(1).stderr_has(said);
    assert_eq!(receiver.end().code, 1);
    assert_eq!(hosts.domains(), [vec!["web shutdown".to_owned()], vec![]]);
}

#[test]
fn a_connection_that_is_cut_anywhere_leaves_a_domain_that_runs_and_says_where() {
    let hosts = Hosts::with("pvh", &[]);
    let (at, to) = (hosts.path("at"), hosts.path("to"));
    let secondary = ["--colo", "--dirty-rate", "20000"];
    let receiver = hosts.receiver(&to, &secondary);
    let proxy = Cut::NEVER.run(&at, &to);
    sender(&hosts, &at, &["--epochs", "1"]).end().code(0);
    assert_eq!(receiver.end().code, 1);
    let [forth, back] = proxy.join().unwrap();
    let first = forth - 16;
    let banner = BANNER.len() as u64;
    // The receiver's last message is not part of a checkpoint's cycle.
    assert!(back > banner + 32);
    let mut there = Vec::new();
    let cuts = [
        40,
        first - 1,
        first,
        first + 1,
        first + 16,
        first + 60,
        first + 2000,
    ]
    .map(|forth| (forth, u64::MAX))
    .into_iter()
    // Three messages, then the list: its header, and the first pages that the secondary has
    // written.
    .chain(
        [0, 1, 15, 16, 17, 32, 33, 50, 48, 53, 56, 57, 63, 64, 85]
            .map(|back| (u64::MAX, banner + back)),
    );
    // Whether the secondary runs afterwards, and whether its list was cut.
    let cut = |forth, back| {
        let receiver = hosts.receiver(&to, &secondary);
        let proxy = Cut { forth, back }.run(&at, &to);
        // Long enough for the secondary to write.
        let sent = sender(&hosts, &at, &["-i", "100"]).end();
        let received = receiver.end();
        proxy.join().unwrap();
        let domains = hosts.domains();
        let what = format!("cut after {forth}, {back}: {domains:?}\n{sent:?}\n{received:?}");
        assert!(!what.contains("panicked"), "{what}");
        assert_eq!(domains[0], ["web running"], "{what}");
        assert_eq!(received.code == 0, domains[1] == ["web running"], "{what}");
        if received.code == 0 {
            assert_eq!(sent.code, 3, "{what}");
            destroy(&hosts.there, "web");
        } else {
            assert_eq!(domains[1], NONE, "{what}");
            assert!([1, 3].contains(&sent.code), "{what}");
        }
        let list = sent.stderr.contains("reading the back-channel failed");
        (received.code == 0, list)
    };
    for (forth, back) in cuts {
        let in_list = (banner + 48..u64::MAX).contains(&back);
        // If the secondary got no CPU time, it has written less by then.
        let mut turns = 0;
        there.push(loop {
            let (runs, list) = cut(forth, back);
            if list == in_list {
                break runs;
            }
            turns += 1;
            assert!(in_list && turns < 10, "{back}: never in a list");
        });
    }
    // Three cuts are before the first checkpoint is complete.
    let mut expected = [true; 22];
    (expected[0], expected[1], expected[7]) = (false, false, false);
    assert_eq!(there, expected);
}
