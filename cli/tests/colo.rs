//! remus -c and migrate-receive --colo, both ends real or one of them the test: the domain
//! runs at both, and what becomes of it when either is interrupted, killed or cut off.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::migration::{BANNER, Cut, GO, Hosts, REPORT, Running, hear, listen};
use common::{arg, backend, run};
use nix::sys::signal::Signal;
use xsr_format::read::ReadOptions;
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;

const NONE: [&str; 0] = [];
const BUSY: [&str; 4] = ["--dirty-rate", "20000", "--working-set", "4M"];

/// What a CHECKPOINT_STATE says, and what it says when a primary takes its domain back.
const NEW: u32 = 0;
const SUSPENDED: u32 = 1;
const READY: u32 = 2;
const RESUMED: u32 = 3;
const WITHDRAWAL: u32 = 0x7fff_ffff;
/// What a secondary says that has a checkpoint.
const RUNS: [u32; 2] = [READY, RESUMED];

/// A CHECKPOINT_STATE, as libxl writes it.
fn state(id: u32) -> Vec<u8> {
    [5, 4, id, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

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

/// Both ends, with a checkpoint complete at the second.
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
        // All the pages of a checkpoint but the first are those that the secondary wrote.
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
    // Killed at whatever it did.
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

    // It says that it has none any more.
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
        run(["remus", "-c", "-F", option, &here, "web", "nobody"]).code(64);
    }
    run(["remus", "-p", &here, "web", "nobody"]).code(64);
    let timeout = ["--answer-timeout", "5"];
    run(["remus", &here, "web", "nobody"].iter().chain(&timeout)).code(64);
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

/// Which checkpoints a sender has in its stream, what it says between them, and how it
/// takes its domain back: with a secondary whose dirty pages are `pages`, which come in the
/// checkpoint behind, and which answers `last` to the last checkpoint.
fn heard(
    stream: &mut UnixStream,
    mut to: UnixStream,
    checkpoints: usize,
    pages: &[u64],
    last: &[u32],
) {
    to.write_all(BANNER).unwrap();
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut number = 0;
    let mut came = BTreeSet::new();
    while number < checkpoints {
        let mut record = None;
        if let Some(step) = walk.next_step().unwrap() {
            match step.content {
                Content::PageData(body) => {
                    let whole = body.entries().iter().filter(|e| e.page_type.has_data());
                    came.extend(whole.map(|entry| entry.pfn.0));
                }
                Content::LibxlRecord(libxl) => record = Some(libxl),
                Content::Record(libxc) => assert_ne!(libxc.kind, RecordKind::END),
                _ => {}
            }
        }
        match record {
            Some(LibxlRecord::CheckpointEnd) => {
                number += 1;
                if number > 1 {
                    // It does nothing itself.
                    assert_eq!(came, pages.iter().copied().collect());
                }
                came.clear();
                let states = match number == checkpoints {
                    true => last,
                    false => &RUNS[..],
                };
                let states: Vec<u8> = states.iter().copied().flat_map(state).collect();
                to.write_all(&states).unwrap();
            }
            Some(LibxlRecord::CheckpointState(new)) => {
                assert_eq!(new.value(), NEW);
                let mut list = state(SUSPENDED);
                list.extend(0xf_u32.to_le_bytes());
                list.extend(u32::try_from(8 * pages.len()).unwrap().to_le_bytes());
                list.extend(pages.iter().flat_map(|pfn| pfn.to_le_bytes()));
                to.write_all(&list).unwrap();
            }
            _ => {}
        }
    }
}

#[test]
fn the_stream_is_libxls_and_its_last_word_makes_xls_secondary_fail() {
    for (pages, code) in [(&[5_u64, 700][..], 0), (&[1 << 40], 1)] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &["--epochs", "3"]);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        if code == 0 {
            heard(&mut from, to.try_clone().unwrap(), 3, pages, &RUNS);
            hear(&mut from, &state(WITHDRAWAL));
        } else {
            // A list that is none: the secondary waits for the second checkpoint.
            heard(&mut from, to.try_clone().unwrap(), 1, pages, &RUNS);
            hear(&mut from, &state(NEW));
            let mut list = state(SUSPENDED);
            list.extend([0xf, 8].iter().flat_map(|word: &u32| word.to_le_bytes()));
            list.extend(pages[0].to_le_bytes());
            to.write_all(&list).unwrap();
            hear(&mut from, &withdrawal_within());
        }
        to.write_all(&[REPORT, &[1], GO].concat()).unwrap();
        drop(to);
        let mut rest = Vec::new();
        from.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"");
        drop(from);
        let sent = sender.end();
        assert_eq!(sent.code, code, "{sent:?}");
        if code == 1 {
            assert!(sent.stderr.contains("names pfn"), "{sent:?}");
        }
        assert_eq!(hosts.domains()[0], ["web running"]);
    }
}

/// What a primary says that takes its domain back from a secondary that waits for a
/// checkpoint's records.
fn withdrawal_within() -> Vec<u8> {
    let kinds = [0x7fff_ffff, 0xe, 4];
    let records = kinds.iter().flat_map(|kind: &u64| kind.to_le_bytes());
    records.collect()
}

#[test]
fn a_secondary_that_does_not_answer_is_given_up_and_the_domain_runs_on() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    // It never has the checkpoint; it never runs; it does not suspend; it names no pages.
    for (checkpoints, last, said) in [
        (1, &[][..], None),
        (2, &[READY], None),
        (1, &RUNS, Some(vec![])),
        (2, &RUNS, Some(state(SUSPENDED))),
    ] {
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &["--answer-timeout", "1"]);
        let (mut from, _) = listener.accept().unwrap();
        std::fs::remove_file(&socket).unwrap();
        // So that a sender that waits for ever is a failure.
        from.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), checkpoints, &[5], last);
        match said {
            None => hear(&mut from, &state(WITHDRAWAL)),
            Some(said) => {
                hear(&mut from, &state(NEW));
                to.write_all(&said).unwrap();
                hear(&mut from, &withdrawal_within());
            }
        }
        to.write_all(&[REPORT, &[1], GO].concat()).unwrap();
        drop((from, to));
        let sent = sender.end().code(1);
        assert!(sent.stderr.contains("has not answered in 1 s"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"], "{sent:?}");
    }
}

#[test]
fn what_a_secondary_that_fails_says_is_heard_wherever_it_says_it() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    // In the place of each of its words, and while it has nothing to say.
    for (last, said) in [
        (&[][..], None),
        (&[READY], None),
        (&RUNS, Some(vec![])),
        (&RUNS, Some(state(SUSPENDED))),
        (&RUNS, None),
    ] {
        let listener = listen(&socket);
        let interval: &[&str] = match (last, &said) {
            (&[READY, RESUMED], None) => &["-i", "4000000000"],
            _ => &[],
        };
        let sender = sender(&hosts, &socket, interval);
        let (mut from, _) = listener.accept().unwrap();
        std::fs::remove_file(&socket).unwrap();
        let mut to = from.try_clone().unwrap();
        heard(
            &mut from,
            to.try_clone().unwrap(),
            2 - interval.len() / 2,
            &[5],
            last,
        );
        if let Some(said) = said {
            hear(&mut from, &state(NEW));
            to.write_all(&said).unwrap();
        }
        to.write_all(&[REPORT, &[7], GO].concat()).unwrap();
        drop((from, to));
        let sent = sender.end().code(1);
        assert!(
            sent.stderr.contains("the other end has failed (status 7)"),
            "{sent:?}"
        );
        assert!(!sent.stderr.contains("where it had to say"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"], "{sent:?}");
    }
}

/// A secondary that is applying a checkpoint hears it once it runs.
#[test]
fn a_domain_is_taken_back_from_a_secondary_that_applies() {
    for last in [&[SUSPENDED][..], &[READY, NEW]] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &NONE);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), 2, &[5], last);
        hear(&mut from, &state(WITHDRAWAL));
        // It gets so far first.
        let runs: Vec<u8> = RUNS.into_iter().flat_map(state).collect();
        to.write_all(&[&runs, REPORT, &[1], GO].concat()).unwrap();
        drop(to);
        from.read_to_end(&mut Vec::new()).unwrap();
        drop(from);
        let sent = sender.end();
        assert_eq!(sent.code, 1, "{sent:?}");
        assert!(sent.stderr.contains("web runs on here"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"]);
    }
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
    // What the receiver says in the end is no part of a turn.
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
    // Three words, then the list: its header, and the first pages that the secondary wrote.
    .chain(
        [0, 1, 15, 16, 17, 32, 33, 50, 48, 53, 56, 57, 63, 64, 85]
            .map(|back| (u64::MAX, banner + back)),
    );
    for (forth, back) in cuts {
        let receiver = hosts.receiver(&to, &secondary);
        let proxy = Cut { forth, back }.run(&at, &to);
        // Long enough for the secondary to write.
        let sent = sender(&hosts, &at, &["-i", "100"]).end();
        let received = receiver.end();
        proxy.join().unwrap();
        let domains = hosts.domains();
        let what = format!("cut after {forth}, {back}: {domains:?}\n{sent:?}\n{received:?}");
        assert!(!what.contains("panicked"), "{what}");
        assert_eq!(
            sent.stderr.contains("reading the back-channel failed"),
            (banner + 48..u64::MAX).contains(&back),
            "{what}"
        );
        assert_eq!(domains[0], ["web running"], "{what}");
        assert_eq!(received.code == 0, domains[1] == ["web running"], "{what}");
        if received.code == 0 {
            assert_eq!(sent.code, 3, "{what}");
            destroy(&hosts.there, "web");
        } else {
            assert_eq!(domains[1], NONE, "{what}");
            assert!([1, 3].contains(&sent.code), "{what}");
        }
        there.push(received.code == 0);
    }
    // Three that cut it before there is a checkpoint.
    let mut expected = [true; 22];
    (expected[0], expected[1], expected[7]) = (false, false, false);
    assert_eq!(there, expected);
}
