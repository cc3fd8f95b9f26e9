//! remus and migrate-receive -r, both ends real: what becomes of the domain when either is
//! interrupted, killed or cut off.

mod failing;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::migration::{BANNER, Cut, Hosts, REPORT, Running, hear, listen, until};
use crate::common::phases::staged;
use crate::common::{arg, backend, create, run};
use nix::sys::signal::Signal;
use xsr_format::read::ReadOptions;
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;

const NONE: [&str; 0] = [];
/// The message with which a sender takes its domain back: three records without a body.
const WITHDRAWAL: usize = 24;
const BUSY: [&str; 4] = ["--dirty-rate", "20000", "--working-set", "4M"];

/// `xsr remus` of `web`, to a socket.
fn sender(hosts: &Hosts, socket: &Path, options: &[&str]) -> Running {
    let to = format!("unix:{}", socket.display());
    let on = hosts.on(&hosts.here);
    let args = ["remus", "-i", "10", "web", &to];
    let args = args.into_iter().chain(on.iter().map(String::as_str));
    Running::start(args.chain(options.iter().copied()))
}

/// Both ends, with a checkpoint complete at the secondary.
fn protected(hosts: &Hosts, options: &[&str]) -> [Running; 2] {
    let socket = hosts.path("socket");
    let mut receiver = hosts.receiver(&socket, &["-r"]);
    let sender = sender(hosts, &socket, options);
    receiver.line("first checkpoint");
    [sender, receiver]
}

#[test]
fn an_interrupt_ends_the_protection_and_the_other_end_forgets_the_domain() {
    let ends = [
        ("pv", Signal::SIGINT),
        ("hvm", Signal::SIGTERM),
        ("pvh", Signal::SIGHUP),
    ];
    let each = ends.into_iter().flat_map(|(kind, signal)| {
        let each = Hosts::each(kind, &BUSY).into_iter();
        each.map(move |hosts| (hosts, signal))
    });
    for (hosts, signal) in each {
        let [sender, receiver] = protected(&hosts, &["--json"]);
        sender.signal(signal);
        let sent = sender.end().code(0);
        let json = sent.json();
        assert_eq!(json["ended"], "interrupted", "{json}");
        assert_eq!(json["was_protected"], true, "{json}");
        sent.stderr_has("web runs on here, and is no longer protected");
        assert!(json["checkpoints"].as_u64() >= Some(1), "{json}");
        let received = receiver.end();
        assert_eq!(received.code, 1, "{received:?}");
        assert!(
            received
                .stderr
                .contains("the sender has ended the protection, and keeps"),
            "{received:?}"
        );
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

/// Before the receiver has a checkpoint.
#[test]
fn an_interrupt_before_there_is_protection_says_that_there_was_none() {
    let hosts = Hosts::with("pvh", &BUSY);
    let socket = hosts.path("socket");
    let here = backend(&hosts.here);
    let to = format!("unix:{}", socket.display());
    for phase in ["log-dirty-on", "suspended"] {
        let receiver = hosts.receiver(&socket, &["-r"]);
        let args = ["remus", "--json", &here, "web", &to];
        let mut sender = staged(hosts.dir.path(), args);
        assert!(sender.hold(phase, 1), "{phase}");
        sender.signal(Signal::SIGTERM, false);
        sender.until_said("interrupting").unwrap();
        let (sent, _) = sender.end();
        let json = sent.json();
        assert_eq!(json["domain"], "running", "{json}");
        assert_eq!(json["was_protected"], false, "{json}");
        sent.code(0)
            .stderr_has("web runs on here, and was never protected");
        let received = receiver.end().code(1);
        assert!(!received.stderr.contains("file"), "{received:?}");
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

/// It has nothing that it could run, and so nothing to say.
#[test]
fn an_interrupt_before_the_first_checkpoint_waits_for_no_answer() {
    let hosts = Hosts::with("pvh", &BUSY);
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let (here, to) = (backend(&hosts.here), format!("unix:{}", socket.display()));
    let args = ["remus", "--answer-timeout", "3600", &here, "web", &to];
    let mut sender = staged(hosts.dir.path(), args);
    let silent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(BANNER).unwrap();
        // It reads to the end, and says nothing.
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        stream
    });
    assert!(sender.hold("suspended", 1));
    sender.signal(Signal::SIGTERM, false);
    sender.until_said("interrupting").unwrap();
    let (sent, _) = sender.end();
    sent.code(0)
        .stderr_has("web runs on here, and was never protected");
    drop(silent.join().unwrap());
    assert_eq!(hosts.domains()[0], ["web running"]);
}

#[test]
fn a_sender_that_is_killed_leaves_its_last_checkpoint_running() {
    // The guest does nothing, so that all checkpoints equal it.
    let each = ["pv", "pv32", "hvm", "pvh"].into_iter().flat_map(|kind| {
        let each = Hosts::each(kind, &[]).into_iter();
        each.map(move |hosts| (kind, hosts))
    });
    for (kind, hosts) in each {
        let image = hosts.path("before");
        hosts.save(&hosts.here, &["-c", arg(&image)]);
        let [sender, receiver] = protected(&hosts, &[]);
        // This receiver goes on after a hangup of its session.
        receiver.signal(Signal::SIGHUP);
        sender.kill();
        let received = receiver.end().code(0);
        assert!(received.stderr.contains("goes on here from checkpoint"));
        assert_eq!(hosts.domains()[1], ["web running"], "{kind}");
        let after = hosts.path("after");
        hosts.save(&hosts.there, &[arg(&after)]);
        let diff = ["diff", "--after-restore", arg(&image), arg(&after)];
        if kind != "hvm" {
            run(diff).code(0);
            continue;
        }
        // Its device model has been saved, as in each checkpoint.
        let differences = run(diff).code(1).stdout;
        assert!(
            differences.starts_with(
                "records\n  libxl EMULATOR_CONTEXT  absent → 1\nemulators\n  \
                 qemu upstream 0 context  absent → 31 bytes\nexpected after a restore\n"
            ),
            "{differences}"
        );
    }
}

/// The guest writes; the result is the last checkpoint that had arrived.
#[test]
fn a_sender_that_is_killed_leaves_the_last_checkpoint_that_had_come() {
    for kind in ["pv", "hvm", "pvh"] {
        let hosts = Hosts::with(kind, &BUSY);
        let file = hosts.path("stream");
        // Keep a copy of everything that the receiver gets.
        let there = backend(&hosts.there);
        let xsr = env!("CARGO_BIN_EXE_xsr");
        let receiver = format!("tee {} | {xsr} migrate-receive -r {there}", arg(&file));
        let here = backend(&hosts.here);
        let mut sender = Running::start(["remus", "-i", "5", &here, "-s", "", "web", &receiver]);
        sender.line("first checkpoint");
        until("some checkpoints more", || {
            ends(&fs::read(&file).unwrap(), kind).len() > 3
        });
        sender.signal(Signal::SIGKILL);
        sender.line("goes on here from checkpoint");
        // The receiver shares its stderr, and ends last.
        assert!(!sender.end().stderr.contains("panicked"));
        assert_eq!(hosts.domains()[1], ["web running"], "{kind}");
        let [left, expected] = ["left", "expected"].map(|name| hosts.path(name));
        run(["save", &there, "web", arg(&left)]).code(0);
        let stream = fs::read(&file).unwrap();
        let ends = ends(&stream, kind);
        let mut images = Vec::new();
        for end in &ends[ends.len() - 2..] {
            assert_eq!(survivor(&hosts, &stream[..*end], &expected), 0, "{kind}");
            images.push(fs::read(&expected).unwrap());
        }
        run(["diff", arg(&expected), arg(&left)]).code(0);
        assert!(images[0] != images[1], "{kind}: the last two are the same");
    }
}

#[test]
fn a_receiver_that_is_lost_leaves_the_domain_running_where_it_is() {
    Hosts::each("pvh", &BUSY)
        .iter()
        .for_each(a_receiver_is_lost);
}

fn a_receiver_is_lost(hosts: &Hosts) {
    // It is unknown what has become of the copy.
    let [sender, receiver] = protected(hosts, &[]);
    receiver.kill();
    let sent = sender.end();
    assert_eq!(sent.code, 3, "{sent:?}");
    assert!(
        sent.stderr.contains("must never run at both ends"),
        "{sent:?}"
    );
    let [here, there] = hosts.domains();
    assert_eq!(here, ["web running"]);
    assert_eq!(there, ["web--incoming paused"]);
    let gone = [
        "mock",
        "destroy",
        "web--incoming",
        "--host",
        arg(&hosts.there),
    ];
    run(gone).code(0);

    // The same, with the domain to be paused.
    let [sender, receiver] = protected(hosts, &["--on-loss", "pause"]);
    receiver.kill();
    sender.end().code(3).stderr_has("Here it is paused");
    assert_eq!(hosts.domains()[0], ["web paused"]);
    run(gone).code(0);
    run(["mock", "unpause", "web", "--host", arg(&hosts.here)]).code(0);

    // It reports that it has no copy any more.
    let [sender, receiver] = protected(hosts, &[]);
    receiver.signal(Signal::SIGINT);
    assert_eq!(receiver.end().code, 1);
    sender
        .end()
        .code(1)
        .stderr_has("web runs on here, unprotected");
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);

    // A checkpoint for which there is no room; and a name in use.
    let socket = hosts.path("socket");
    let small = ["-r", "--checkpoint-memory", "4K", "--checkpoint-file", "8K"];
    let receiver = hosts.receiver(&socket, &small);
    let sent = sender_of(hosts, &socket).end();
    assert_eq!(sent.code, 1, "{sent:?}");
    let why = receiver.end().code(1);
    why.stderr_has("8192 in the file");
    // The sender is told, and says it.
    assert!(
        sent.stderr.contains("the other end has failed: "),
        "{sent:?}"
    );
    assert!(sent.stderr.contains("8192 in the file"), "{sent:?}");
    create(&hosts.there, "web", "pv");
    let receiver = hosts.receiver(&socket, &["-r"]);
    let sent = sender_of(hosts, &socket).end();
    assert_eq!(sent.code, 1, "{sent:?}");
    assert!(sent.stderr.contains("\"web\" exists already"), "{sent:?}");
    receiver.end().code(1).stderr_has("\"web\" exists already");
    assert_eq!(hosts.domains()[0], ["web running"]);
}

fn sender_of(hosts: &Hosts, socket: &Path) -> Running {
    sender(hosts, socket, &[])
}

#[test]
fn a_receiver_that_says_that_it_runs_the_domain_has_it() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let mut sender = sender(&hosts, &socket, &[]);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(BANNER).unwrap();
    let mut from = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
    });
    sender.line("is protected by");
    stream.write_all(REPORT).unwrap();
    stream.write_all(&[0]).unwrap();
    let sent = sender.end();
    reader.join().unwrap();
    assert_eq!(sent.code, 1, "{sent:?}");
    assert!(
        sent.stderr.contains("here it does not run any more"),
        "{sent:?}"
    );
    assert_eq!(hosts.domains()[0], ["web--migratedaway paused"]);
}

/// Cut the connection after this many bytes, with both ends alive.
fn cut(hosts: &Hosts, forth: u64, on_loss: &str) -> (i32, [Vec<String>; 2]) {
    let (at, to) = (hosts.path("at"), hosts.path("to"));
    let receiver = hosts.receiver(&to, &["-r"]);
    let back = u64::MAX;
    let proxy = Cut { forth, back }.run(&at, &to);
    let sent = sender(hosts, &at, &["--on-loss", on_loss]).end();
    let received = receiver.end();
    proxy.join().unwrap();
    let domains = hosts.domains();
    let what = format!("cut after {forth}: {domains:?}\n{sent:?}\n{received:?}");
    assert!(!what.contains("panicked"), "{what}");
    let there = domains[1].first().map(String::as_str);
    assert_eq!(received.code == 0, there == Some("web running"), "{what}");
    assert!(matches!(there, None | Some("web running")), "{what}");
    if there.is_some() {
        // It cannot be known, and the message says so.
        assert_eq!(sent.code, 3, "{what}");
        assert!(
            sent.stderr.contains("must never run at both ends"),
            "{what}"
        );
        run(["mock", "destroy", "web", "--host", arg(&hosts.there)]).code(0);
    }
    let here = domains[0][0].as_str();
    match (sent.code, on_loss) {
        (1, _) | (3, "run") => assert_eq!(here, "web running", "{what}"),
        _ => {
            assert_eq!(here, "web paused", "{what}");
            run(["mock", "unpause", "web", "--host", arg(&hosts.here)]).code(0);
        }
    }
    (sent.code, domains)
}

#[test]
fn a_connection_that_is_cut_anywhere_leaves_a_domain_that_runs_and_says_where() {
    let hosts = Hosts::with("pvh", &[]);
    // The length of the first checkpoint.
    let (at, to) = (hosts.path("at"), hosts.path("to"));
    let receiver = hosts.receiver(&to, &["-r"]);
    let proxy = Cut::NEVER.run(&at, &to);
    sender(&hosts, &at, &["--epochs", "1"]).end().code(0);
    assert_eq!(receiver.end().code, 1);
    let first = proxy.join().unwrap()[0] - WITHDRAWAL as u64;
    let mut there = Vec::new();
    for forth in [0, 40, first / 2, first - 1, first, first + 1, first + 2000] {
        for on_loss in ["run", "pause"] {
            let (_, domains) = cut(&hosts, forth, on_loss);
            there.push(domains[1].len());
        }
    }
    assert_eq!(there, [[0; 8].as_slice(), &[1; 6]].concat());
}

/// The stream that `xsr remus` sends, with this many checkpoints, to a receiver that sends nothing
/// more.
fn stream(hosts: &Hosts, epochs: &str) -> Vec<u8> {
    let file = hosts.path("stream");
    let banner = String::from_utf8(BANNER.to_vec()).unwrap();
    let receiver = format!("printf '{}'; cat > {}; true", banner.trim_end(), arg(&file));
    let receiver = receiver.replace("data.'", "data.\\n'");
    let here = backend(&hosts.here);
    let args = ["remus", "-i", "10", &here, "--epochs", epochs, "-s", ""];
    run(args.iter().chain(&["web", &receiver])).code(3);
    fs::read(file).unwrap()
}

/// The end of each checkpoint in a stream, including libxl's part.
fn ends(stream: &[u8], kind: &str) -> Vec<usize> {
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut ends = Vec::new();
    let mut checkpoint = false;
    // The last step is the withdrawal, which the walk rejects.
    while let Ok(Some(step)) = walk.next_step() {
        match step.content {
            Content::Record(record) => {
                assert!(!checkpoint, "{kind}: libxl has a checkpoint's end");
                checkpoint = record.kind == RecordKind::CHECKPOINT;
            }
            Content::LibxlRecord(LibxlRecord::CheckpointEnd) => {
                checkpoint = false;
                ends.push(usize::try_from(walk.offset()).unwrap());
            }
            _ => {}
        }
    }
    ends
}

/// Give a receiver a truncated stream, and save the resulting domain.
fn survivor(hosts: &Hosts, stream: &[u8], image: &Path) -> i32 {
    let mut receiver = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["migrate-receive", "-r", "-q", &backend(&hosts.there)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(hosts.path("stderr")).unwrap())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (
        receiver.stdin.take().unwrap(),
        receiver.stdout.take().unwrap(),
    );
    hear(&mut from, BANNER);
    to.write_all(stream).unwrap();
    drop(to);
    let code = receiver.wait().unwrap().code().unwrap();
    let mut said = Vec::new();
    from.read_to_end(&mut said).unwrap();
    if code == 0 {
        assert_eq!(said, [REPORT, &[0]].concat());
        // Which host has the domain is a result, also with -q.
        let said = fs::read_to_string(hosts.path("stderr")).unwrap();
        assert!(said.contains("it goes on here from checkpoint"), "{said}");
        run(["save", &backend(&hosts.there), "web", arg(image)]).code(0);
    }
    code
}

#[test]
fn the_survivor_is_the_last_checkpoint_that_is_whole_in_both_layers() {
    for kind in ["pv", "hvm"] {
        let hosts = Hosts::with(kind, &BUSY);
        let stream = stream(&hosts, "3");
        let ends = ends(&stream, kind);
        assert_eq!(ends.len(), 3, "{kind}");
        assert_eq!(stream.len(), ends[2] + WITHDRAWAL, "{kind}");
        // The device model's state differs in each.
        let model = b"xsr mock device model: ";
        let has = |bytes: &[u8], saves: u64| {
            let state = [model, saves.to_le_bytes().as_slice()].concat();
            bytes.windows(state.len()).any(|window| window == state)
        };
        let [exact, later] = ["exact", "later"].map(|name| hosts.path(name));
        let mut images = Vec::new();
        assert_eq!(survivor(&hosts, &stream[..ends[0] - 1], &exact), 1);
        // The second of its three records takes the domain back.
        let taken_back = ends[2] + 16;
        for (saves, (at, next)) in
            (1..).zip(ends.iter().zip(ends.iter().skip(1).chain([&taken_back])))
        {
            assert_eq!(survivor(&hosts, &stream[..*at], &exact), 0, "{kind}");
            let image = fs::read(&exact).unwrap();
            let states = (1..=3).filter(|saves| has(&image, *saves));
            let expected = if kind == "hvm" { vec![saves] } else { vec![] };
            assert_eq!(states.collect::<Vec<u64>>(), expected, "{kind}");
            images.push(image);
            // For example, within libxl's part of the next one.
            for cut in [at + 1, (at + next) / 2, next - 1] {
                assert_eq!(survivor(&hosts, &stream[..cut], &later), 0, "{kind}");
                run(["diff", arg(&exact), arg(&later)]).code(0);
            }
        }
        assert!(images[0] != images[1] && images[1] != images[2], "{kind}");
        // All of it: the sender has taken the domain back.
        assert_eq!(survivor(&hosts, &stream, &exact), 1);
        assert_eq!(hosts.domains()[1], NONE);
    }
}

#[test]
fn stats_have_a_line_for_each_checkpoint() {
    let hosts = Hosts::with("pvh", &BUSY);
    let here = backend(&hosts.here);
    let args = [
        "remus", "-F", "-b", "-i", "20", "--epochs", "4", "--stats", &here,
    ];
    let operands = ["web", "absent"];
    let lines = run(args.iter().chain(&operands)).code(0).stdout;
    assert_eq!(lines.lines().count(), 4, "{lines}");
    assert!(lines.lines().skip(1).all(|line| {
        line.contains(" dirty pages, paused ") && line.contains(" ms, complete after ")
    }));
    for (option, kept) in [("--buffer=64M", true), ("--no-buffer", false)] {
        let json = run(args.iter().chain(&["--json", option]).chain(&operands)).code(0);
        let lines: Vec<serde_json::Value> = json
            .stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let (end, lines) = lines.split_last().unwrap();
        assert_eq!(lines.len(), 4);
        for line in lines {
            let seconds = |name: &str| line[name].as_f64().unwrap();
            assert!(seconds("pause_seconds") > 0.0, "{line}");
            assert!(seconds("checkpoint_seconds") >= seconds("pause_seconds"));
            assert_eq!(line["buffered_bytes"].as_u64() > Some(0), kept, "{line}");
        }
        let dirty = lines
            .iter()
            .map(|line| line["dirty_pages"].as_u64().unwrap());
        assert_eq!(end["dirty_pages"].as_u64(), Some(dirty.sum()));
        assert_eq!(
            (&end["ended"], &end["checkpoints"]),
            (&"epochs".into(), &4.into())
        );
    }
    assert_eq!(hosts.domains()[0], ["web running"]);
}

#[test]
fn who_does_not_read_the_stats_holds_up_no_checkpoint() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, &["-r"]);
    let options = ["-i", "1", "--epochs", "1000", "--stats", "--json"];
    let to = format!("unix:{}", socket.display());
    let here = backend(&hosts.here);
    let args = ["remus", &here, "web", &to];
    let sender = Running::start(args.iter().chain(&options));
    // All of them have been received, and none has been read.
    receiver
        .end()
        .code(1)
        .stderr_has("has ended the protection");
    let sent = sender.end().code(0);
    assert!(
        sent.stderr.contains("were read too slowly"),
        "{}",
        sent.stderr
    );
    let lines = sent.stdout.lines().count();
    assert!((200..1000).contains(&lines), "{lines}");
    let last: serde_json::Value =
        serde_json::from_str(sent.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["checkpoints"], 1000);
}

#[test]
fn a_receiver_that_never_gets_to_its_banner() {
    let hosts = Hosts::with("pvh", &[]);
    let here = backend(&hosts.here);
    run(["remus", &here, "-s", "", "web", "exit 7"])
        .code(1)
        .stderr_has("ended with exit code 7");
    // Until it is interrupted.
    let command = "echo begun >&2; cat > /dev/null";
    let mut sender = Running::start(["remus", &here, "-s", "", "web", command]);
    sender.line("begun");
    sender.signal(Signal::SIGTERM);
    sender.end().code(0);
    assert_eq!(hosts.domains()[0], ["web running"]);
}

#[test]
fn what_does_not_protect_is_refused_as_xl_does() {
    let hosts = Hosts::with("pvh", &[]);
    let here = backend(&hosts.here);
    for options in [
        ["-b", "-u"],
        ["-n", "-u"],
        ["-d", "-u"],
        ["-c", "-b"],
        ["-p", "-u"],
    ] {
        run(["remus", &here, "web", "absent"].iter().chain(&options)).code(64);
    }
    let socket = format!("unix:{}", hosts.path("socket").display());
    run(["remus", &here, "-F", "-n", "-d", "web", &socket])
        .code(1)
        .stderr_has("migrate-receive -r --listen");
    // It refuses a plain migration.
    let at = hosts.path("at");
    let receiver = hosts.receiver(&at, &["-r"]);
    let migrating = hosts.sender(&at, &[]);
    receiver.end().code(1).stderr_has("without -r");
    assert_eq!(migrating.end().code, 1);
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
}
