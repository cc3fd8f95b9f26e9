//! The guardian: the process that xenopsd has started outlives the engine, and ends with it.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xsr_xen_backend::{GuestKind, ShutdownReason};

use crate::images::scratch;
use crate::machine::{by_the_engine, empty, guest, shutdown};
use crate::xenopsd::{Kind, Target, Xenopsd, command, source};

/// The engine that the emu-manager `of` has started.
pub(crate) fn engine(of: Pid) -> Pid {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children"));
        let child = children.unwrap().trim().parse().ok();
        if let Some(pid) = child {
            return Pid::from_raw(pid);
        }
        assert!(Instant::now() < until, "the engine has not been started");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A save that waits for xenopsd to suspend the guest.
fn waiting(machine: &std::path::Path, target: &mut Target) -> Xenopsd {
    let mut xenopsd = Xenopsd::start(machine, "-mode save", target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    assert!(xenopsd.until("suspend:"));
    xenopsd
}

#[test]
fn an_engine_that_is_killed_is_told_on_a_save() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let xenopsd = waiting(&machine, &mut target);
    kill(engine(xenopsd.pid()), Signal::SIGKILL).unwrap();
    xenopsd.end().failed(2, "killed by SIGKILL");
    assert_eq!(shutdown(&machine), None);
}

/// The engine is killed after it has suspended the guest, or panics before that.
#[test]
fn the_guest_of_an_engine_that_is_killed_runs_on_and_is_not_logged() {
    for live in [false, true] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = machine.with_extension("run");
        fs::create_dir(&run).unwrap();
        let (from, to) = std::io::pipe().unwrap();
        let words = format!("-mode save -live {live}");
        let mut xenopsd = Xenopsd::start(&machine, &words, to.into());
        assert!(xenopsd.until("prepare:"));
        xenopsd.say("done\n");
        if live {
            // The engine's first pass is running.
            while !xenopsd.next().unwrap().contains(r"\b") {}
        } else {
            assert!(xenopsd.until("suspend:"));
            xenopsd.say("done\n");
            while shutdown(&machine).is_none() {
                thread::yield_now();
            }
        }
        // Xen keeps the dirty log on when a process ends; the mock machine must be told to.
        fs::write(run.join("dirty-log-of"), "1").unwrap();
        kill(engine(xenopsd.pid()), Signal::SIGKILL).unwrap();
        if !live {
            fs::remove_file(run.join("dirty-log-of")).unwrap();
        }
        let ended = xenopsd.end();
        ended.failed(2, "killed by SIGKILL");
        ended.failed(2, "the guest runs on");
        assert_eq!(shutdown(&machine), None);
        drop(from);
    }
}

/// The guest must not be touched then: it may be running on the destination.
#[test]
fn a_guest_whose_result_is_out_stays_suspended() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = waiting(&machine, &mut target);
    let engine = engine(xenopsd.pid());
    xenopsd.say("done\n");
    assert!(xenopsd.until("result:"));
    // The engine may already have ended.
    kill(engine, Signal::SIGKILL).ok();
    xenopsd.wait();
    assert_eq!(shutdown(&machine), Some(ShutdownReason::Suspend));
}

#[test]
fn a_panic_is_in_syslog_and_the_guest_runs_on() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let run = machine.with_extension("run");
    fs::create_dir(&run).unwrap();
    let syslog = UnixDatagram::bind(run.join("log")).unwrap();
    fs::write(run.join("panic"), "").unwrap();
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = waiting(&machine, &mut target);
    xenopsd.say("done\n");
    xenopsd
        .end()
        .failed(2, "it panicked; syslog has the message");
    assert_eq!(shutdown(&machine), None);
    syslog.set_nonblocking(true).unwrap();
    let mut lines = Vec::new();
    let mut room = [0; 4096];
    while let Ok(n) = syslog.recv(&mut room) {
        lines.push(String::from_utf8_lossy(&room[..n]).into_owned());
    }
    for (priority, said) in [
        (
            30,
            format!(
                "xsr-emu-manager {}: save of domain 1",
                env!("CARGO_PKG_VERSION")
            ),
        ),
        (27, "mock.rs".to_owned()),
        (27, "as the test asks".to_owned()),
        (27, "the engine ended unexpectedly".to_owned()),
    ] {
        let is = |line: &String| {
            line.starts_with(&format!("<{priority}>emu-manager-1[")) && line.contains(&said)
        };
        assert!(lines.iter().any(is), "no {said:?} in {lines:?}");
    }
}

#[test]
fn a_starter_that_ignores_sigchld_changes_nothing() {
    let start = |machine: &std::path::Path, target: &Target| {
        let mut command = command("env", "--ignore-signal=CHLD");
        command
            .arg(env!("CARGO_BIN_EXE_xsr-emu-manager-mock"))
            .args("-controloutfd 6 -controlinfd 5 -fd 7 -domid 1 -mode save".split(' '))
            .env(
                "XSR_EMU_TEST_BACKEND",
                format!("mock:{}", machine.display()),
            );
        Xenopsd::spawn(command, target.fd())
    };
    for killed in [false, true] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let mut xenopsd = start(&machine, &target);
        assert!(xenopsd.until("prepare:"));
        target.head();
        xenopsd.say("done\n");
        assert!(xenopsd.until("suspend:"));
        if killed {
            kill(engine(xenopsd.pid()), Signal::SIGKILL).unwrap();
            xenopsd.end().failed(2, "it is unknown how");
            continue;
        }
        xenopsd.say("done\n");
        xenopsd.end().succeeded();
    }
}

#[test]
fn an_engine_that_is_killed_is_told_on_a_restore() {
    for told in [false, true] {
        let dir = scratch();
        let (machine, [store, console]) = empty(dir.path(), GuestKind::Pvh);
        let stream = by_the_engine(GuestKind::Pvh, 8);
        let (ours, _go) = source(Kind::Pipe, dir.path(), stream, 3 << 20);
        let words = format!("-mode hvm_restore -store_port {store} -console_port {console}");
        let mut xenopsd = Xenopsd::start(&machine, &words, ours);
        if told {
            xenopsd.say("restore:xenguest\n");
        }
        kill(engine(xenopsd.pid()), Signal::SIGKILL).unwrap();
        xenopsd.end().failed(2, "did dom0 run out of memory?");
    }
}

#[test]
fn a_signal_ends_a_save_in_good_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let xenopsd = waiting(&machine, &mut target);
        kill(xenopsd.pid(), signal).unwrap();
        xenopsd.end().failed(2, "a signal asked");
        assert_eq!(shutdown(&machine), None);
    }
}

#[test]
fn the_engine_ends_when_the_process_that_started_it_is_killed() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let xenopsd = waiting(&machine, &mut target);
    kill(xenopsd.pid(), Signal::SIGKILL).unwrap();
    let ended = xenopsd.end();
    assert_eq!(ended.code, None);
    assert!(
        ended.with("error:")[0].contains("a signal asked"),
        "{ended:?}"
    );
    assert_eq!(shutdown(&machine), None);
}
