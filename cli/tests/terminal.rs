//! Where a person watches: progress and notes on a terminal, and none of them
//! elsewhere.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;

use common::{arg, backend, host_with, run, scratch};
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
