//! qemu during a save: its dirty log is on before a live save begins and off when one fails. It
//! continues with the guest if a save fails after the guest was suspended.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::signal::{Signal, kill};
use xsr_xen_backend::GuestKind;

use crate::images::scratch;
use crate::live_suspend::{plain, suspended};
use crate::machine::{by_the_engine, guest, shutdown};
use crate::xenopsd::{Kind, Target, Xenopsd, libxc};

/// A qemu; returns a log of the commands that it received and of each connection's end.
fn qemu(run: &Path, answer: fn(&str) -> &'static str) -> Arc<Mutex<Vec<String>>> {
    fs::create_dir(run).unwrap();
    let listener = UnixListener::bind(run.join("qmp-libxl-1")).unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&log);
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            client.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            for line in BufReader::new(client.try_clone().unwrap()).lines() {
                let line = line.unwrap();
                let answer = answer(&line);
                heard.lock().unwrap().push(line);
                client.write_all(answer.as_bytes()).unwrap();
            }
            heard.lock().unwrap().push("closed".to_owned());
        }
    });
    log
}

const CAPABILITIES: &str = "{\"execute\":\"qmp_capabilities\"}";

fn switch(enable: bool) -> String {
    format!("{{\"arguments\":{{\"enable\":{enable}}},\"execute\":\"xen-set-global-dirty-log\"}}")
}

fn start(machine: &Path, words: &str, target: &Target, run: &Path) -> Xenopsd {
    let mut with_run = |command: &mut Command| {
        command.env("XSR_EMU_TEST_RUN", run);
    };
    Xenopsd::start_with(machine, words, target.fd(), &mut with_run)
}

const FINE: &str = "{\"return\": {}}\r\n";

#[test]
fn it_is_on_before_a_live_save_begins_and_the_connection_closed() {
    let dir = scratch();
    let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
    let log = qemu(&run, |_| FINE);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = start(
        &machine,
        "-mode hvm_save -dm qemu -live true",
        &target,
        &run,
    );
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    assert!(xenopsd.until("suspend:"));
    let on = [CAPABILITIES.to_owned(), switch(true), "closed".to_owned()];
    assert_eq!(*log.lock().unwrap(), on);
    xenopsd.say("done\n");
    xenopsd.end().succeeded();
    // xenopsd has stopped qemu by now, so nothing more is sent to it.
    assert_eq!(*log.lock().unwrap(), on);
}

#[test]
fn it_is_off_again_when_a_live_save_fails() {
    for last in ["abort\n", "tea\n"] {
        let dir = scratch();
        let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
        let log = qemu(&run, |_| FINE);
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let mut xenopsd = start(
            &machine,
            "-mode hvm_save -dm qemu -live true",
            &target,
            &run,
        );
        assert!(xenopsd.until("prepare:"));
        target.head();
        xenopsd.say("done\n");
        assert!(xenopsd.until("suspend:"));
        xenopsd.say(last);
        let ended = xenopsd.end();
        assert!(ended.with("result:").is_empty());
        let log = log.lock().unwrap();
        assert!(log[3..].contains(&switch(false)), "{log:?}");
        assert_eq!(shutdown(&machine), None);
    }
}

const CONT: &str = "{\"execute\":\"cont\"}";

fn drain(from: &mut io::PipeReader) {
    io::copy(from, &mut io::sink()).unwrap();
}

#[test]
fn it_runs_on_with_the_guest_when_a_save_fails_after_the_suspend() {
    for (live, last) in [
        (false, "done\n"),
        (false, "done\nabort\n"),
        (true, "done\nabort\n"),
        (true, "done\ntea\n"),
    ] {
        let dir = scratch();
        let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
        let log = qemu(&run, |_| FINE);
        let (from, to) = io::pipe().unwrap();
        let words = format!("-mode hvm_save -dm qemu -live {live}");
        let mut with_run = |command: &mut Command| {
            command.env("XSR_EMU_TEST_RUN", &run);
        };
        let mut xenopsd = Xenopsd::start_with(&machine, &words, to.into(), &mut with_run);
        assert!(xenopsd.until("prepare:"));
        xenopsd.say("done\n");
        let reading = live.then(|| from.try_clone().unwrap());
        let reader = reading.map(|mut from| thread::spawn(move || drain(&mut from)));
        assert!(xenopsd.until("suspend:"));
        // From now on nothing reads the stream of a save that is not live.
        drop(from);
        xenopsd.say(last);
        let ended = xenopsd.end();
        assert!(ended.with("result:").is_empty(), "{ended:?}");
        assert_eq!(shutdown(&machine), None);
        let log = log.lock().unwrap();
        let conts = log.iter().filter(|line| *line == CONT).count();
        assert_eq!(conts, 1, "{log:?}");
        assert_eq!(log.contains(&switch(false)), live, "{log:?}");
        if let Some(reader) = reader {
            reader.join().unwrap();
        }
    }
}

/// The save ends while its stream is not read.
#[test]
fn it_is_off_again_however_a_live_save_ends_early() {
    let acts: [fn(&mut Xenopsd); 4] = [
        |xenopsd| xenopsd.say("abort\n"),
        |xenopsd| xenopsd.hang_up(),
        |xenopsd| kill(xenopsd.pid(), Signal::SIGTERM).unwrap(),
        // xenopsd answers before it was asked.
        |xenopsd| xenopsd.say("done\n"),
    ];
    for (which, act) in acts.into_iter().enumerate() {
        let dir = scratch();
        let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
        let log = qemu(&run, |_| FINE);
        let target = Target::new(Kind::Socket, dir.path(), false);
        let words = "-mode hvm_save -dm qemu -live true";
        let mut xenopsd = start(&machine, words, &target, &run);
        assert!(xenopsd.until("prepare:"));
        xenopsd.say("done\n");
        assert!(xenopsd.until(r"info:\b"));
        act(&mut xenopsd);
        let ended = xenopsd.end();
        assert!(ended.with("result:").is_empty(), "{which}: {ended:?}");
        assert_eq!(ended.with("error:").len(), usize::from(which > 0));
        assert_eq!(shutdown(&machine), None);
        let log = log.lock().unwrap();
        assert_eq!(log.iter().filter(|line| **line == switch(false)).count(), 1);
        assert!(!log.contains(&CONT.to_owned()), "{log:?}");
    }
}

#[test]
fn one_that_refuses_or_is_not_there_fails_a_live_save() {
    let refuses = |line: &str| match line.contains("global") {
        true => "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no logging\"}}\r\n",
        false => FINE,
    };
    for there in [true, false] {
        let dir = scratch();
        let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
        if there {
            qemu(&run, refuses);
        }
        let target = Target::new(Kind::Pipe, dir.path(), true);
        let mut xenopsd = start(
            &machine,
            "-mode hvm_save -dm qemu -live true",
            &target,
            &run,
        );
        assert!(xenopsd.until("prepare:"));
        xenopsd.say("done\n");
        let text = match there {
            true => "refuses xen-set-global-dirty-log: no logging",
            false => "No such file or directory",
        };
        xenopsd.end().failed(2, text);
        assert_eq!(shutdown(&machine), None);
    }
}

/// A suspend into a file is live, though xenopsd does not know.
#[test]
fn it_logs_during_a_suspend_into_a_file_and_one_that_refuses_has_the_guest_suspended_first() {
    let refuses = |line: &str| match line.contains("true") {
        true => "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no logging\"}}\r\n",
        false => FINE,
    };
    let on = [CAPABILITIES.to_owned(), switch(true), "closed".to_owned()];
    let off = [CAPABILITIES.to_owned(), switch(false), "closed".to_owned()];
    let first = "info:what the guest writes cannot be followed";
    for (answer, is_live) in [
        (refuses as fn(&str) -> &'static str, false),
        (|_| FINE, true),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Hvm, 8);
        let log = qemu(&machine.with_extension("run"), answer);
        let (ended, image) = suspended(&machine, dir.path(), "-mode hvm_save -dm qemu");
        let told = ended.with(first);
        assert_eq!(told.is_empty(), is_live, "{ended:?}");
        assert!(plain(libxc(&image)) == by_the_engine(GuestKind::Hvm, 8));
        let expected = match is_live {
            true => on.to_vec(),
            // Whether it is on is unknown after an error.
            false => [&on[..], &off].concat(),
        };
        assert_eq!(*log.lock().unwrap(), expected);
    }
    // None at all.
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Hvm, 8);
    let (ended, _) = suspended(&machine, dir.path(), "-mode hvm_save -dm qemu");
    assert_eq!(ended.with(first).len(), 1, "{ended:?}");
    // After the suspend, a failure has it run on, without a log.
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Hvm, 8);
    let log = qemu(&machine.with_extension("run"), |_| FINE);
    let mut target = Target::new(Kind::File, dir.path(), true);
    let words = "-mode hvm_save -dm qemu";
    let mut xenopsd = Xenopsd::start(&machine, words, target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    assert!(xenopsd.until("suspend:"));
    xenopsd.say("done\ntea\n");
    xenopsd.end().failed(2, "which is not expected");
    assert_eq!(shutdown(&machine), None);
    let log = log.lock().unwrap();
    let count = |wanted: &str| log.iter().filter(|line| *line == wanted).count();
    assert_eq!((count(CONT), count(&switch(false))), (1, 1), "{log:?}");
}

#[test]
fn it_is_left_alone_by_a_save_that_is_not_live() {
    let dir = scratch();
    let (machine, run) = (guest(dir.path(), GuestKind::Hvm, 8), dir.path().join("run"));
    let log = qemu(&run, |_| FINE);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = start(&machine, "-mode hvm_save -dm qemu", &target, &run);
    for line in ["prepare:", "suspend:"] {
        assert!(xenopsd.until(line));
        if line == "prepare:" {
            target.head();
        }
        xenopsd.say("done\n");
    }
    xenopsd.end().succeeded();
    assert!(log.lock().unwrap().is_empty());
}
