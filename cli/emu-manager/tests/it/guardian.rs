//! The process that xenopsd has started outlives the engine, and ends with it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xsr_xen_backend::GuestKind;

use crate::images::scratch;
use crate::machine::{by_the_engine, empty, guest, shutdown};
use crate::xenopsd::{Kind, Target, Xenopsd, source};

/// The engine of the emu-manager `of`.
fn engine(of: Pid) -> Pid {
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
