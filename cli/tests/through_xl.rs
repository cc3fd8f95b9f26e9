//! On a Xen host `xl` does the work. A script in its place says what it was asked and
//! what it found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "not all that tests have in common is of use here")]

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Ran, scratch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What stands for xl: each of its arguments on a line, then the helper and what else is
/// of its environment, then what comes on stdin.
const SAYS: &str = "#!/bin/sh
for a in \"$@\"; do echo \"[$a]\"; done
echo \"helper=$LIBXL_SAVE_HELPER backend=${XSR_BACKEND-none}\"
cat
echo \"from xl\" >&2
";

fn script(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("xl");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// `xsr`, without what the environment could make of it.
fn xsr(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsr"));
    command.args(arguments).env_remove("XSR_LOG");
    command
}

fn ran(command: Command) -> Ran {
    common::ran(command.into())
}

/// `xsr` with `dir` first on PATH.
fn beside(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = xsr(arguments);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", dir.display()));
    command.env("XSR_BACKEND", "xen");
    command
}

fn helper() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_xsr-save-helper")).to_owned()
}

#[test]
fn arguments_environment_and_descriptors_are_xls() {
    let dir = scratch();
    script(dir.path(), SAYS);
    for (given, xls) in [
        (
            ["save", "-c", "-p", "web", "a b.save"].as_slice(),
            "[save]\n[-c]\n[-p]\n[web]\n[a b.save]\n",
        ),
        (
            &["restore", "-p", "-e", "web.save"],
            "[restore]\n[-p]\n[-e]\n[web.save]\n",
        ),
        (
            &["-v", "migrate", "-s", "", "--", "-C", "x", "web", "h"],
            "[-v]\n[migrate]\n[-s]\n[]\n[-C]\n[x]\n[web]\n[h]\n",
        ),
        (
            &["migrate-receive", "--backend", "xen", "-e"],
            "[migrate-receive]\n[-e]\n",
        ),
    ] {
        let mut command = beside(dir.path(), given);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"octets\n").unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(0));
        let helper = helper().canonicalize().unwrap();
        let expected = format!("{xls}helper={} backend=none\noctets\n", helper.display());
        assert_eq!(String::from_utf8(out.stdout).unwrap(), expected);
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert!(stderr.contains("from xl"), "{stderr}");
    }
}

#[test]
fn exit_codes_are_ours() {
    for (xls, ours) in [(0, 0), (1, 1), (2, 64), (3, 1), (255, 1)] {
        let dir = scratch();
        script(dir.path(), &format!("#!/bin/sh\nexit {xls}\n"));
        ran(beside(dir.path(), &["save", "web", "f"])).code(ours);
    }
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\nkill -KILL $$\n");
    ran(beside(dir.path(), &["save", "web", "f"]))
        .code(1)
        .stderr_has("xl was ended: signal: 9");
}

#[test]
fn signals_reach_xl() {
    for (signal, name) in [
        // Not those that a test run in the background ignores, for sh ignores them too.
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGUSR1, "USR1"),
    ] {
        let dir = scratch();
        // It ends when the signal comes, or when nobody holds its stdin any more.
        script(
            dir.path(),
            &format!("#!/bin/sh\ntrap 'echo got {name}; exit 0' {name}\necho ready\nread line\n"),
        );
        let mut command = beside(dir.path(), &["save", "web", "f"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let held = child.stdin.take();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        // What xl is told is what this process waits for by then, or soon: one that it
        // does not wait for yet would end it, and the line below would not come.
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        until_signals_wait(pid);
        kill(pid, signal).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), format!("got {name}"));
        assert_eq!(child.wait().unwrap().code(), Some(0));
        drop(held);
    }
}

/// Wait until a process has blocked SIGTERM, as one does that reads its signals.
fn until_signals_wait(pid: Pid) {
    loop {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let blocked = status.lines().find_map(|l| l.strip_prefix("SigBlk:"));
        let blocked = u64::from_str_radix(blocked.unwrap().trim(), 16).unwrap();
        if blocked & (1 << (Signal::SIGTERM as u64 - 1)) != 0 {
            return;
        }
        std::thread::yield_now();
    }
}

#[test]
fn what_is_missing_or_not_xls_is_said() {
    let dir = scratch();
    let mut command = xsr(&["save", "--backend", "xen", "web", "f"]);
    command.env("PATH", dir.path());
    ran(command).code(1).stderr_has("there is no `xl` on PATH");
    script(dir.path(), SAYS);
    ran(beside(dir.path(), &["save", "--json", "web", "f"]))
        .code(64)
        .stderr_has("--json is not an option of xl");
    // A copy that has no helper beside it.
    let alone = dir.path().join("xsr");
    fs::copy(env!("CARGO_BIN_EXE_xsr"), &alone).unwrap();
    let mut command = Command::new(&alone);
    command.args(["save", "--backend", "xen", "web", "f"]);
    command.env("PATH", dir.path());
    ran(command)
        .code(1)
        .stderr_has("there is no xsr-save-helper");
    // One on PATH will do.
    std::os::unix::fs::symlink(helper(), dir.path().join("xsr-save-helper")).unwrap();
    let mut command = Command::new(&alone);
    command.args(["save", "--backend", "xen", "web", "f"]);
    command.env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()));
    command.stdin(Stdio::null());
    ran(command).code(0).stdout_has("/xsr-save-helper backend=");
}

#[test]
fn other_commands_and_other_machines_are_not_xls() {
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\nexit 7\n");
    ran(beside(dir.path(), &["save", "--help"]))
        .code(0)
        .stdout_has("Save a domain to an image");
    let mock = format!("mock:{}", dir.path().join("host").display());
    let saving = ["save", "--backend", &mock, "web", "f"];
    let none = ran(beside(dir.path(), &saving)).code(1);
    assert!(!none.stderr.contains("xl was"), "{}", none.stderr);
}
