//! Signals at each phase of each command that writes: afterwards exactly one copy of the guest
//! runs, no partial file is left, and the exit code and the message report what was done.
//!
//! Each phase that a command announces gets one of the 54 pairs of signals below, in turn, and every
//! seventh a second SIGHUP after 900 ms. `XSR_SIGNALS=all cargo test -p xsr --test it signals` tries
//! all of them at each. Commands on files are in `signals/images.rs`.

mod force;
mod images;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::migration::{BANNER, Hosts, Running, domains, hear, hear_image, listen};
use crate::common::phases::{Staged, staged, staged_command};
use crate::common::{Ran, arg, backend, run, scratch};

const ASK: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// Two signals.
#[derive(Clone, Copy, Debug)]
struct Pair {
    first: Signal,
    second: Signal,
    gap: Duration,
    /// Whether they are sent to the whole process group.
    group: bool,
}

/// When a terminal is closed, the shell and the kernel both send SIGHUP to the group; the second may
/// come most of a second later.
const LATE_HANGUP: Pair = Pair {
    first: Signal::SIGHUP,
    second: Signal::SIGHUP,
    gap: Duration::from_millis(900),
    group: true,
};

/// All pairs.
fn pairs() -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (n, milliseconds) in [0, 5, 50].into_iter().enumerate() {
        for (m, first) in ASK.into_iter().enumerate() {
            for (k, second) in ASK.into_iter().enumerate() {
                for group in [false, true] {
                    // An order in which the first few differ in everything.
                    let at = (n * 7 + m * 3 + k * 5 + usize::from(group) * 11) % 13;
                    let gap = Duration::from_millis(milliseconds);
                    let pair = Pair {
                        first,
                        second,
                        gap,
                        group,
                    };
                    pairs.push((at, pair));
                }
            }
        }
    }
    pairs.sort_by_key(|(at, _)| *at);
    let pairs: Vec<Pair> = pairs.into_iter().map(|(_, pair)| pair).collect();
    let sevenths = pairs.chunks(6).map(|six| [&[LATE_HANGUP], six].concat());
    sevenths.flatten().collect()
}

/// Chooses the pairs for a phase: not those of the phase before.
struct Turns {
    pairs: Vec<Pair>,
    next: usize,
    each: usize,
}

impl Turns {
    /// `seed`: so that the commands begin with different pairs.
    fn new(seed: usize) -> Self {
        let pairs = pairs();
        let all = std::env::var("XSR_SIGNALS").is_ok_and(|how| how == "all");
        Self {
            each: if all { pairs.len() } else { 1 },
            next: seed * 7,
            pairs,
        }
    }

    fn take(&mut self) -> Vec<Pair> {
        let taken = (self.next..self.next + self.each).map(|n| self.pairs[n % self.pairs.len()]);
        self.next += self.each;
        taken.collect()
    }
}

/// Send both signals to a command that is held, and let it go on once it has received the first.
fn ask(command: &mut Staged, pair: Pair, heard: bool) {
    command.signal(pair.first, pair.group);
    thread::sleep(pair.gap);
    command.signal(pair.second, pair.group);
    if heard {
        command.until_said("interrupt");
    }
    command.release();
}

/// The phases of a command in order, each at most twice, with the number of the occurrence.
fn phases(passed: &[String]) -> Vec<(String, usize)> {
    let mut phases: Vec<(String, usize)> = Vec::new();
    for name in passed {
        let before = phases.iter().filter(|(seen, _)| seen == name).count();
        if before < 2 {
            phases.push((name.clone(), before + 1));
        }
    }
    phases
}

/// Incomplete files in a directory.
fn partial_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_string_lossy().ends_with(".partial"))
        .collect()
}

fn has(list: &[String], domain: &str) -> bool {
    list == [domain.to_owned()]
}

#[track_caller]
fn no_force(ran: &Ran, at: &str) {
    assert!(!ran.stderr.contains("panicked"), "{at}: {ran:?}");
    assert!(!ran.stderr.contains("ended at once"), "{at}: {ran:?}");
}

/// Whether a request to stop at this phase cancels a save.
fn save_is_broken_off(phase: &str) -> bool {
    !matches!(
        phase,
        "output-complete" | "output-named" | "destroying" | "destroyed"
    )
}

fn save_at_each_phase(kind: &str, options: &[&str], seed: usize) {
    let hosts = Hosts::with(kind, &["--dirty-rate", "2000", "--working-set", "1M"]);
    let file = hosts.path("web.save");
    let to = backend(&hosts.here);
    let args: Vec<&str> = [&["save", to.as_str()], options, &["web", arg(&file)]].concat();
    let (ran, passed) = staged(hosts.dir.path(), [&["save", "-c"], &args[1..]].concat()).end();
    ran.code(0);
    fs::remove_file(&file).unwrap();
    let mut turns = Turns::new(seed);
    let mut broken_off = 0;
    for (phase, nth) in phases(&passed) {
        for pair in turns.take() {
            let at = format!("save {options:?}, {phase} {nth}, {pair:?}");
            let mut command = staged(hosts.dir.path(), &args);
            if !command.hold(&phase, nth) {
                // The domain left by `-c`.
                let (ran, _) = command.end();
                ran.code(0);
            } else {
                ask(&mut command, pair, true);
                let (ran, _) = command.end();
                no_force(&ran, &at);
                let expected = u8::from(save_is_broken_off(&phase));
                assert_eq!(ran.code, i32::from(expected), "{at}: {ran:?}");
                if expected == 1 {
                    broken_off += 1;
                    assert!(has(&domains(&hosts.here), "web running"), "{at}: {ran:?}");
                    assert!(!file.exists(), "{at}");
                    let said = ["aborted", "was not written"];
                    assert!(said.iter().any(|s| ran.stderr.contains(s)), "{at}: {ran:?}");
                }
            }
            assert!(partial_files(hosts.dir.path()).is_empty(), "{at}");
            if file.exists() {
                assert_eq!(domains(&hosts.here), Vec::<String>::new(), "{at}");
                run(["restore", &to, arg(&file)]).code(0);
                fs::remove_file(&file).unwrap();
            }
        }
    }
    assert!(broken_off >= 8, "{passed:?}");
}

#[test]
fn save() {
    save_at_each_phase("pv", &[], 1);
}

#[test]
fn save_live_into_slots() {
    save_at_each_phase("pv", &["--live", "--layout", "mapped"], 5);
}

#[test]
fn save_live() {
    save_at_each_phase("pvh", &["--live"], 2);
}

#[test]
fn restore() {
    let hosts = Hosts::with("hvm", &[]);
    let file = hosts.path("web.save");
    fs::write(&file, hosts.image()).unwrap();
    let to = backend(&hosts.there);
    let args = ["restore", &to, arg(&file)];
    let clear = || {
        if !domains(&hosts.there).is_empty() {
            run(["mock", "destroy", "web", "--host", arg(&hosts.there)]).code(0);
        }
    };
    let (ran, passed) = staged(hosts.dir.path(), args).end();
    ran.code(0);
    clear();
    let mut turns = Turns::new(3);
    for (phase, nth) in phases(&passed) {
        for pair in turns.take() {
            let at = format!("restore, {phase} {nth}, {pair:?}");
            let mut command = staged(hosts.dir.path(), args);
            assert!(command.hold(&phase, nth), "{at}");
            ask(&mut command, pair, true);
            let (ran, _) = command.end();
            no_force(&ran, &at);
            let runs = phase == "unpaused";
            assert_eq!(ran.code, i32::from(!runs), "{at}: {ran:?}");
            let there = domains(&hosts.there);
            assert_eq!(has(&there, "web running"), runs, "{at}: {there:?}");
            assert_eq!(there.is_empty(), !runs, "{at}: {there:?}");
            clear();
        }
    }
}

/// A guest that moves between two hosts.
struct Moving {
    hosts: Hosts,
    socket: PathBuf,
    kind: &'static str,
}

impl Moving {
    fn new(kind: &'static str) -> Self {
        let hosts = Hosts::with(kind, &["--dirty-rate", "2000", "--working-set", "1M"]);
        let socket = hosts.path("socket");
        Self {
            hosts,
            socket,
            kind,
        }
    }

    /// Move the guest to the first host, if it is not there.
    fn back(&self) {
        let [here, there] = self.hosts.domains();
        if here.is_empty() {
            let host = arg(&self.hosts.here);
            let kind = ["--type", self.kind, "--dirty-rate", "2000"];
            let create = ["mock", "create", "web", "--memory", "8M", "--host", host];
            run(create.iter().chain(&kind)).code(0);
        }
        if !there.is_empty() {
            run(["mock", "destroy", "web", "--host", arg(&self.hosts.there)]).code(0);
        }
    }

    /// Asserts that exactly one of the two hosts runs it, and that no other domain exists. Returns
    /// whether it is the first.
    #[track_caller]
    fn one_runs(&self, at: &str) -> bool {
        let both = self.hosts.domains();
        let one = ["web running".to_owned()];
        match &both {
            [here, there] if here == &one && there.is_empty() => true,
            [here, there] if here.is_empty() && there == &one => false,
            _ => panic!("{at}: {both:?}"),
        }
    }

    fn args<'a>(&'a self, to: &'a str, command: &[&'a str], options: &[&'a str]) -> Vec<String> {
        let backend = backend(&self.hosts.here);
        let args = [command, &[&backend, "web", to], options].concat();
        args.into_iter().map(str::to_owned).collect()
    }

    /// Hold the sender at each of its phases.
    fn sender(&self, command: &[&str], options: &[&str], there: &[&str], seed: usize) {
        let to = format!("unix:{}", self.socket.display());
        let args = self.args(&to, command, options);
        let dir = self.hosts.dir.path();
        let receiver = self.hosts.receiver(&self.socket, there);
        let (ran, passed) = staged(dir, &args).end();
        ran.code(0);
        receiver.end();
        let mut turns = Turns::new(seed);
        for (phase, nth) in phases(&passed) {
            for pair in turns.take() {
                self.back();
                let at = format!("{command:?} {options:?}, {phase} {nth}, {pair:?}");
                let receiver = self.hosts.receiver(&self.socket, there);
                let mut sender = staged(dir, &args);
                if sender.hold(&phase, nth) {
                    ask(&mut sender, pair, true);
                }
                let (ran, _) = sender.end();
                no_force(&ran, &at);
                let received = receiver.end();
                no_force(&received, &at);
                let here = self.one_runs(&at);
                if command[0] == "migrate" {
                    let expected = i32::from(here);
                    assert_eq!(ran.code, expected, "{at}: {ran:?}");
                    assert_eq!(received.code, expected, "{at}: {received:?}");
                    let late = ["renamed", "go", "report", "destroying", "destroyed"];
                    assert_eq!(!here, late.contains(&&*phase), "{at}: {ran:?}");
                } else {
                    assert!(here, "{at}: {ran:?} {received:?}");
                    assert_eq!(
                        (ran.code, received.code),
                        (0, 1),
                        "{at}: {ran:?} {received:?}"
                    );
                }
            }
        }
    }

    /// Hold the receiver at each of its phases.
    fn receiver(&self, command: &[&str], options: &[&str], there: &[&str], seed: usize) {
        let to = format!("unix:{}", self.socket.display());
        let args = self.args(&to, command, options);
        let backend_there = backend(&self.hosts.there);
        let listen = ["migrate-receive", &backend_there, "--listen", &to];
        let start = || {
            let mut receiver = staged(self.hosts.dir.path(), listen.iter().chain(there));
            receiver.until_said("waiting at");
            receiver
        };
        let mut receiver = start();
        let sender = Running::start(&args);
        while receiver.hold("", 1) {}
        let (_, passed) = receiver.end();
        sender.end().code(0);
        let stands_by = !there.is_empty();
        let mut turns = Turns::new(seed);
        for (phase, nth) in phases(&passed) {
            for pair in turns.take() {
                self.back();
                let at = format!("receiver of {command:?}, {phase} {nth}, {pair:?}");
                let mut receiver = start();
                let sender = Running::start(&args);
                let held = receiver.hold(&phase, nth);
                let only_hangup = [pair.first, pair.second] == [Signal::SIGHUP; 2];
                if held {
                    // A receiver on standby ignores the end of its session.
                    ask(&mut receiver, pair, !(stands_by && only_hangup));
                }
                let (received, _) = receiver.end();
                no_force(&received, &at);
                let ran = sender.end();
                let here = self.one_runs(&at);
                if stands_by {
                    assert!(here, "{at}: {ran:?} {received:?}");
                    assert_eq!(received.code, 1, "{at}: {received:?}");
                } else {
                    assert_eq!(ran.code, i32::from(here), "{at}: {ran:?}");
                    assert_eq!(received.code, i32::from(here), "{at}: {received:?}");
                }
            }
        }
    }
}

#[test]
fn migrate() {
    Moving::new("pv").sender(&["migrate"], &[], &[], 4);
}

#[test]
fn migrate_receive() {
    Moving::new("pvh").receiver(&["migrate"], &["--no-live"], &[], 5);
}

/// So few checkpoints that each phase occurs in the first two.
const EPOCHS: [&str; 4] = ["-i", "5", "--epochs", "2"];

#[test]
fn remus() {
    Moving::new("pvh").sender(&["remus"], &EPOCHS, &["-r"], 6);
}

#[test]
fn remus_receiver() {
    Moving::new("pv").receiver(&["remus"], &EPOCHS, &["-r"], 7);
}

#[test]
fn colo() {
    Moving::new("hvm").sender(&["remus", "-c"], &EPOCHS, &["--colo"], 8);
}

#[test]
fn colo_receiver() {
    Moving::new("pvh").receiver(&["remus", "-c"], &EPOCHS, &["--colo"], 9);
}

#[test]
fn mock_create() {
    let dir = scratch();
    let host = dir.path().join("host");
    crate::common::create(&host, "x", "pv");
    let mut turns = Turns::new(11);
    for kind in ["pv", "hvm"] {
        let host = arg(&host);
        let what = [
            "--host",
            host,
            "--type",
            kind,
            "--memory",
            "8M",
            "--dirty-rate",
            "9",
        ];
        let args = ["mock", "create", "web"].into_iter().chain(what);
        let args: Vec<&str> = args.collect();
        let (ran, passed) = staged(dir.path(), &args).end();
        ran.code(0);
        run(["mock", "destroy", "web", "--host", host]).code(0);
        for (phase, nth) in phases(&passed) {
            for pair in turns.take() {
                let at = format!("{args:?}, {phase} {nth}, {pair:?}");
                let mut command = staged(dir.path(), &args);
                assert!(command.hold(&phase, nth), "{at}");
                ask(&mut command, pair, true);
                let (ran, _) = command.end();
                assert_eq!(ran.code, 1, "{at}: {ran:?}");
                ran.stderr_has("interrupted");
                assert!(has(&domains(Path::new(host)), "x running"), "{at}");
            }
        }
    }
}

#[test]
fn a_second_hangup_after_most_of_a_second_forces_nothing() {
    let hosts = Hosts::with("pvh", &[]);
    let file = hosts.path("web.save");
    let image = hosts.path("image.save");
    fs::write(&image, hosts.image()).unwrap();
    let [here, there] = [&hosts.here, &hosts.there].map(|host| backend(host));
    let socket = hosts.path("socket");
    let to = format!("unix:{}", socket.display());
    let late = LATE_HANGUP;
    let hold = |args: &[&str], phase: &str| {
        let mut command = staged(hosts.dir.path(), args);
        assert!(command.hold(phase, 1), "{args:?}");
        command
    };
    thread::scope(|scope| {
        // Each on its own host, all at once.
        let migrating = scope.spawn(|| {
            let receiver = hosts.receiver(&socket, &["-r"]);
            let mut command = hold(&["remus", &here, "web", &to], "checkpoint");
            ask(&mut command, late, true);
            (command.end().0, receiver.end())
        });
        let converting = scope.spawn(|| {
            let mut command = hold(&["export", arg(&image), arg(&file)], "output-made");
            ask(&mut command, late, false);
            command.end().0
        });
        let (sent, received) = migrating.join().unwrap();
        no_force(&sent, "remus");
        assert_eq!((sent.code, received.code), (0, 1), "{sent:?} {received:?}");
        converting.join().unwrap().code(1);
    });
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    thread::scope(|scope| {
        let restoring = scope.spawn(|| {
            let mut command = hold(&["restore", &there, arg(&image)], "populate");
            ask(&mut command, late, true);
            command.end().0
        });
        let mut command = hold(&["save", &here, "web", arg(&file)], "suspended");
        ask(&mut command, late, true);
        let (ran, _) = command.end();
        no_force(&ran, "save");
        ran.code(1);
        let ran = restoring.join().unwrap();
        no_force(&ran, "restore");
        ran.code(1);
    });
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    assert!(!file.exists() && partial_files(hosts.dir.path()).is_empty());
}

/// The receiver that a sender starts is in its process group, as on a terminal.
#[test]
fn a_receiver_in_the_senders_group_does_not_end_before_it() {
    for (command, there, phase) in [
        (&["migrate"][..], "", "suspended"),
        (&["remus", "-i", "5"], "-r", "checkpoint"),
    ] {
        let hosts = Hosts::with("pvh", &[]);
        let rune = format!(
            "env -u XSR_MOCK_PHASES {} migrate-receive {there} {}",
            env!("CARGO_BIN_EXE_xsr"),
            backend(&hosts.there)
        );
        let here = backend(&hosts.here);
        let args = [command, &[here.as_str(), "-s", "", "web", &rune]].concat();
        for pair in [
            (Signal::SIGHUP, Signal::SIGHUP),
            (Signal::SIGINT, Signal::SIGTERM),
        ] {
            let pair = Pair {
                first: pair.0,
                second: pair.1,
                gap: Duration::from_millis(1),
                group: true,
            };
            let mut sender = staged(hosts.dir.path(), &args);
            assert!(sender.hold(phase, 1));
            ask(&mut sender, pair, true);
            let (ran, _) = sender.end();
            no_force(&ran, "group");
            assert_eq!(
                hosts.domains(),
                [vec!["web running".to_owned()], vec![]],
                "{ran:?}"
            );
        }
    }
}
