//! Progress and notes on a terminal, and none of them elsewhere. A stalled terminal or stderr must
//! not cost a guest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::migration::{Hosts, Running, until};
use crate::common::{arg, backend, host_with, run, scratch};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;

/// Run with stderr on a terminal. Returns the exit code and the terminal's output.
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
        // Linux ends with EIO when the last writer has closed the terminal.
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

/// The output on a terminal with this many columns, with each redrawn line separate.
/// `input` writes to its stdin, and can wait until a word has been shown.
fn drawn(
    columns: u16,
    args: &[&str],
    input: impl FnOnce(std::process::ChildStdin, &dyn Fn(&str)),
) -> Vec<String> {
    let size = nix::pty::Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(Some(&size), None).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::from(pty.slave))
        .spawn()
        .unwrap();
    let mut terminal = File::from(pty.master);
    let shown = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&shown);
    let reader = thread::spawn(move || {
        let mut room = [0; 4096];
        while let Ok(n @ 1..) = terminal.read(&mut room) {
            all.lock().unwrap().extend_from_slice(&room[..n]);
        }
    });
    let text = || String::from_utf8_lossy(&shown.lock().unwrap()).into_owned();
    input(child.stdin.take().unwrap(), &|word| {
        until(word, || text().contains(word));
    });
    assert_eq!(child.wait().unwrap().code(), Some(0));
    reader.join().unwrap();
    let shown = text();
    // Only carriage returns and complete lines: no escape sequence moves up.
    assert!(!shown.contains("\u{1b}[1A"), "{shown:?}");
    // A line is padded with spaces up to the terminal's width.
    let lines = shown
        .split(['\r', '\n'])
        .map(|line| line.replace("\u{1b}[2K", "").trim_end().to_owned());
    lines.filter(|line| !line.trim().is_empty()).collect()
}

#[test]
fn progress_is_by_bytes_and_fits_the_terminal() {
    for columns in [40, 60, 80, 120] {
        let dir = scratch();
        // Its pages end at 0xff000, however many there are.
        let host = host_with("pvh", dir.path());
        let workload = ["mock", "workload", "web", "--dirty-rate", "50000", "--host"];
        run(workload.iter().chain(&[arg(&host)])).code(0);
        let image = dir.path().join("a.save");
        let lines = drawn(
            columns,
            &["save", "--live", "-c", &backend(&host), "web", arg(&image)],
            |stdin, _| drop(stdin),
        );
        let bars: Vec<_> = lines.iter().filter(|line| line.contains('%')).collect();
        assert!(!bars.is_empty(), "{lines:?}");
        for line in bars {
            assert!(line.chars().count() < columns.into(), "{columns}: {line:?}");
        }
        // The percentage is that of the bytes: a pass over 16 MiB, whatever the pfns are.
        for line in lines.iter().filter(|line| line.contains(" MiB")) {
            let Some((head, volume)) = line.split_once("% pass 1: ") else {
                continue;
            };
            let percent: f64 = head.rsplit([' ', ']']).next().unwrap().parse().unwrap();
            let mib: f64 = volume.split(' ').next().unwrap().parse().unwrap();
            assert!((percent - mib / 16.0 * 100.0).abs() < 5.0, "{line:?}");
        }
    }
}

/// Work that reads a file gets a bar after a second. Here it waits for its input until the terminal
/// has shown one.
#[test]
fn a_conversion_that_takes_long_shows_how_far_it_is() {
    let dir = scratch();
    let out = dir.path().join("o.save");
    let whole = std::fs::read(crate::common::image("tpv")).unwrap();
    let lines = drawn(
        80,
        &["convert", "-", "-o", arg(&out)],
        |mut stdin, wait_for| {
            stdin.write_all(&whole[..2 << 20]).unwrap();
            wait_for("converting");
            stdin.write_all(&whole[2 << 20..]).unwrap();
        },
    );
    assert!(
        lines
            .iter()
            .any(|line| line.contains("converting") && line.contains("MiB")),
        "{lines:?}"
    );
    assert!(
        lines.iter().all(|line| line.chars().count() < 80),
        "{lines:?}"
    );
}

/// A compressed image is unpacked before it can be read twice.
#[test]
fn unpacking_that_takes_long_shows_how_far_it_is() {
    let dir = scratch();
    let (image, packed) = (crate::common::image("tpv"), dir.path().join("packed"));
    let out = dir.path().join("o.raw");
    let convert = [
        "convert",
        "--compress",
        "zstd",
        arg(&image),
        "-o",
        arg(&packed),
    ];
    run(convert).code(0);
    let whole = std::fs::read(&packed).unwrap();
    let commands: [&[&str]; 3] = [
        &["export", "--format", "raw", "-", "-o", arg(&out)],
        &["diff", "-", arg(&image)],
        &["inspect", "--page", "0", "-"],
    ];
    for command in commands {
        let lines = drawn(80, command, |mut stdin, wait_for| {
            stdin.write_all(&whole[..whole.len() / 2]).unwrap();
            wait_for("unpacking");
            stdin.write_all(&whole[whole.len() / 2..]).unwrap();
        });
        let bars = lines.iter().filter(|line| line.contains("unpacking"));
        assert!(bars.clone().any(|line| line.contains("MiB")), "{lines:?}");
    }
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
    // As after Ctrl-S: full, and not read.
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
        // Both are on the lost host: the reader of stderr, and the sender.
        let mut receiver = receiver.unheard();
        sender.kill();
        let status = receiver.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{flag}");
        assert_eq!(hosts.domains()[1], ["web running"], "{flag}");
    }
}
