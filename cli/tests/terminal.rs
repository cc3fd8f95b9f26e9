//! Where a person watches: progress and notes on a terminal, and none of them
//! elsewhere. A terminal or a stderr that takes nothing is no reason to lose a guest.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use common::migration::{Hosts, Running, until};
use common::{arg, backend, host_with, run, scratch};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;

/// Run with stderr on a terminal; the exit code and what the terminal got.
fn watched(args: &[&str]) -> (i32, String) {
    let pty = openpty(None, None).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::from(pty.slave))
        .spawn()
        .unwrap();
    let mut terminal = File::from(pty.master);
    let reader = thread::spawn(move || {
        let mut shown = Vec::new();
        // Linux ends with EIO where the last one has closed the terminal.
        let mut room = [0; 4096];
        while let Ok(n @ 1..) = terminal.read(&mut room) {
            shown.extend_from_slice(&room[..n]);
        }
        String::from_utf8_lossy(&shown).into_owned()
    });
    let code = child.wait().unwrap().code().unwrap();
    (code, reader.join().unwrap())
}

#[test]
fn a_person_sees_progress_and_what_was_done() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    let (code, shown) = watched(&["save", &backend(&host), "web", arg(&image)]);
    assert_eq!(code, 0, "{shown}");
    for word in [
        "saving [",
        "100%",
        "web saved to",
        "the domain is destroyed",
    ] {
        assert!(shown.contains(word), "no {word:?} in {shown:?}");
    }
    let (code, shown) = watched(&["restore", &backend(&host), arg(&image)]);
    assert_eq!(code, 0, "{shown}");
    for word in ["restoring [", "web restored from", "it is running"] {
        assert!(shown.contains(word), "no {word:?} in {shown:?}");
    }
    let (code, shown) = watched(&["diff", arg(&image), arg(&image)]);
    assert_eq!(code, 0, "{shown}");
}

#[test]
fn q_is_quiet_there_too() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    let (code, shown) = watched(&["-q", "save", &backend(&host), "web", arg(&image)]);
    assert_eq!((code, shown.as_str()), (0, ""));
}

#[test]
fn who_does_not_watch_gets_nothing() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    let ran = run(["save", &backend(&host), "web", arg(&image)]).code(0);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
}

#[test]
fn v_tells_more() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    let ran = run(["-vvv", "save", &backend(&host), "web", arg(&image)]).code(0);
    assert_eq!(ran.stdout, "");
    assert!(
        ran.stderr.lines().all(|line| !line.contains('\u{1b}')),
        "{ran:?}"
    );
}

#[test]
fn a_terminal_that_takes_nothing_holds_no_domain_up() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    let pty = openpty(None, None).unwrap();
    // As after Ctrl-S: full, and nobody reads it.
    let mut slave = File::from(pty.slave);
    let flags = OFlag::from_bits_retain(fcntl(&slave, FcntlArg::F_GETFL).unwrap());
    fcntl(&slave, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    let full = loop {
        if let Err(error) = slave.write(&[b'.'; 64]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    fcntl(&slave, FcntlArg::F_SETFL(flags)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["save", &backend(&host), "web", arg(&image)])
        .stdout(Stdio::null())
        .stderr(Stdio::from(slave))
        .spawn()
        .unwrap();
    // It is in the image, and no longer on the host.
    let domains = host.join("domains");
    until("the image", || {
        image.exists() && domains.read_dir().unwrap().next().is_none()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    run(["verify", arg(&image)]).code(0);
}

#[test]
fn a_receiver_that_nobody_hears_takes_over_all_the_same() {
    for (flag, kind) in [("-r", "pv"), ("--colo", "pvh")] {
        let hosts = Hosts::with(kind, &[]);
        let socket = hosts.path("socket");
        let mut receiver = hosts.receiver(&socket, &[flag, "-vvv"]);
        let to = format!("unix:{}", socket.display());
        let backend = backend(&hosts.here);
        let mut words = vec!["remus", "-i", "20", &backend, "web", &to];
        if flag == "--colo" {
            words.push("-c");
        }
        let sender = Running::start(&words);
        receiver.line("first checkpoint");
        // Both are on the host that is lost: whoever listens, and the sender.
        let mut receiver = receiver.unheard();
        sender.kill();
        let status = receiver.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{flag}");
        assert_eq!(hosts.domains()[1], ["web running"], "{flag}");
    }
}
