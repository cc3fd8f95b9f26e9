//! On a Xen host `xl` does the work. A script in its place says what it was asked and
//! what it found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "not all that tests have in common is of use here")]

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Ran, scratch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// One test at a time: a program that has just been written cannot be started while the
/// fork of another thread still holds it open for writing.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    let _alone = alone();
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
    let _alone = alone();
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
    let _alone = alone();
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
        // It has xl, and so it has blocked what it passes on.
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, signal).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), format!("got {name}"));
        assert_eq!(child.wait().unwrap().code(), Some(0));
        drop(held);
    }
}

/// xl's helper breaks off what it does, and xl is left to put the guest right.
#[test]
fn what_asks_to_stop_reaches_the_helper_and_not_xl() {
    let _alone = alone();
    for asked in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let dir = scratch();
        let helper = dir.path().join("xsr-save-helper");
        let xl = script(
            dir.path(),
            "#!/bin/sh\ntrap 'echo told; exit 3' TERM\necho ready\nread line\n",
        );
        fs::rename(xl, &helper).unwrap();
        script(
            dir.path(),
            &format!(
                "#!/bin/sh\ntrap 'echo xl ends' TERM INT HUP\n{}\necho helper $?\nexit 1\n",
                helper.display()
            ),
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
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, asked).unwrap();
        let said: Vec<String> = lines.map(Result::unwrap).collect();
        assert_eq!(said, ["told", "helper 3"], "{asked}");
        assert_eq!(child.wait().unwrap().code(), Some(1));
        drop(held);
    }
}

/// What the terminal sends to all of its processes leaves xl alone.
#[test]
fn xl_does_not_hear_the_keys_of_the_terminal() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\ngrep Sig /proc/self/status\n");
    let out = beside(dir.path(), &["save", "web", "f"]).output().unwrap();
    let about = String::from_utf8(out.stdout).unwrap();
    let mask = |name: &str| {
        let line = about.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    };
    let bit = |signal: Signal| 1_u64 << (signal as u32 - 1);
    assert_eq!(mask("SigBlk:"), 0);
    assert_ne!(mask("SigIgn:") & bit(Signal::SIGINT), 0);
    assert_ne!(mask("SigIgn:") & bit(Signal::SIGHUP), 0);
    assert_eq!(mask("SigIgn:") & bit(Signal::SIGTERM), 0);
}

/// Signals that come while xl is being started end both, or neither and xl hears of them:
/// no xl is ever left to itself.
#[test]
fn a_signal_that_comes_early_leaves_no_xl_alone() {
    let _alone = alone();
    for turn in 0..60 {
        let dir = scratch();
        script(dir.path(), "#!/bin/sh\nread line\n");
        let mut command = beside(dir.path(), &["save", "web", "f"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let held = child.stdin.take();
        let stdout = child.stdout.take().unwrap();
        // At another moment each time.
        for _ in 0..turn * 2000 {
            std::hint::spin_loop();
        }
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        let ended = child.wait().unwrap();
        assert!(!ended.success(), "{ended:?}");
        // As long as anybody is left over, this is open.
        let mut closed = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        let closed = poll(&mut closed, PollTimeout::from(10_000_u16)).unwrap();
        assert_eq!(closed, 1, "an xl is left, turn {turn}");
        drop(held);
    }
}

#[test]
fn what_is_missing_or_not_xls_is_said() {
    let _alone = alone();
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
    let _alone = alone();
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
