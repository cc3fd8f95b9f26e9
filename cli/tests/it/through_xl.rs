//! Commands that run `xl` on a Xen host. A script in place of xl prints its arguments and its
//! environment.

mod at_freeze;
mod options;
mod packed;

use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::{Ran, scratch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// The script in place of xl: it prints each of its arguments on a line, then the helper and other
/// variables of its environment, then its stdin.
const SAYS: &str = "#!/bin/sh
for a in \"$@\"; do echo \"[$a]\"; done
echo \"helper=$LIBXL_SAVE_HELPER backend=${XSR_BACKEND-none}\"
cat
echo \"from xl\" >&2
";

/// One test at a time: a program that has just been written cannot be started while another
/// thread's fork still has it open for writing.
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

/// `xsr`, without environment variables that would affect it.
fn xsr(arguments: &[&str]) -> Command {
    installed("xsr-save-helper");
    let mut command = Command::new(installed("xsr"));
    command.args(arguments);
    command.env_remove("XSR_LOG").env_remove("XSR_PLAN");
    command
}

fn ran(command: Command) -> Ran {
    crate::common::ran(command.into())
}

/// `xsr` with `dir` first on PATH.
fn beside(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = xsr(arguments);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", dir.display()));
    command.env("XSR_BACKEND", "xen");
    command
}

/// A command with the signal dispositions of a terminal's shell, whatever the test run has
/// inherited.
fn hearing(command: Command) -> Command {
    through_env("--default-signal=INT,HUP,TERM,QUIT", command)
}

/// Start a command. Returns the child, its stdin, and its output after the line "ready".
fn ready(mut command: Command) -> (Child, ChildStdin, Lines<BufReader<ChildStdout>>) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let held = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    (child, held, lines)
}

/// A command run through `env`, which execs it.
fn through_env(option: &str, command: Command) -> Command {
    let mut env = Command::new("env");
    env.arg(option)
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => env.env(name, value),
            None => env.env_remove(name),
        };
    }
    env
}

/// `xsr` or `xsr-save-helper` in a directory with both, as after an installation. The helper is a
/// package of its own, and the script in place of xl does not start it.
fn installed(program: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
    fs::create_dir_all(&dir).unwrap();
    // Other tests may do the same at this moment: each renames a complete file.
    let new = tempfile::tempdir_in(&dir).unwrap();
    let (new, to) = (new.path().join(program), dir.join(program));
    match program {
        "xsr" => fs::hard_link(env!("CARGO_BIN_EXE_xsr"), &new).unwrap(),
        // As if xl had started a helper that has ended.
        _ => {
            fs::write(&new, "#!/bin/sh\n: > \"$XSR_HELPER_BEGAN\"\nexit 255\n").unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    fs::rename(new, &to).unwrap();
    to
}

#[test]
fn arguments_environment_and_descriptors_are_xls() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), SAYS);
    for (given, xls) in [
        (
            ["save", "-c", "-p", "web", "/dev/null"].as_slice(),
            "[save]\n[-c]\n[-p]\n[web]\n[/dev/null]\n",
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
        let helper = installed("xsr-save-helper");
        let mut command = beside(dir.path(), given);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"bytes\n").unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(0));
        let helper = helper.canonicalize().unwrap();
        let expected = format!("{xls}helper={} backend=none\nbytes\n", helper.display());
        assert_eq!(String::from_utf8(out.stdout).unwrap(), expected);
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert!(stderr.contains("from xl"), "{stderr}");
    }
}

#[test]
fn what_xl_has_no_option_for_reaches_the_helper_in_its_environment() {
    let _alone = alone();
    let dir = scratch();
    script(
        dir.path(),
        "#!/bin/sh\necho \"$* $XSR_THREADS/$XSR_MAX_DOWNTIME/$XSR_TIMEOUT/$XSR_ON_TIMEOUT\"\n",
    );
    let target = ["--max-downtime", "50", "--timeout=9", "--on-timeout=cancel"];
    let words = ["migrate", "--threads", "3"].into_iter().chain(target);
    let words: Vec<&str> = words.chain(["-C", "x", "web", "h"]).collect();
    ran(beside(dir.path(), &words))
        .code(0)
        .stdout_has("migrate -C x web h 3/50/9/cancel\n");
    for (bad, why) in [
        (
            "--max-downtime=soon",
            "invalid value 'soon' for '--max-downtime <MS>'",
        ),
        ("--on-timeout=wait", "[possible values: stop-copy, cancel]"),
        ("--threads=0", "invalid value '0' for '--threads <N>'"),
    ] {
        let words = ["migrate", bad, "web", "h"];
        ran(beside(dir.path(), &words)).code(64).stderr_has(why);
    }
}

/// Our commands refuse a guest that has seen CPU features which this host lacks. The helper
/// compares them, and is told to refuse if a domain is created.
#[test]
fn the_helper_is_told_whether_to_refuse_a_guest() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho \"$* plan=$XSR_PLAN\"\n");
    for (words, said) in [
        (["restore", "f"].as_slice(), "restore f plan=refuse\n"),
        (&["restore", "--force", "f"], "restore f plan=warn\n"),
        (&["migrate-receive"], "migrate-receive plan=refuse\n"),
        (
            &["migrate-receive", "--force"],
            "migrate-receive plan=warn\n",
        ),
        (&["save", "web", "-"], "save web /dev/stdout plan=\n"),
        (&["migrate", "web", "h"], "migrate web h plan=\n"),
    ] {
        ran(beside(dir.path(), words)).code(0).stdout_has(said);
    }
    // The user's own setting stays, unless the command line overrides it.
    let mut set = beside(dir.path(), &["restore", "f"]);
    set.env("XSR_PLAN", "warn");
    ran(set).code(0).stdout_has("restore f plan=warn\n");
    let mut forced = beside(dir.path(), &["restore", "--force", "f"]);
    forced.env("XSR_PLAN", "refuse");
    ran(forced).code(0).stdout_has("restore f plan=warn\n");
    // The other host's helper only warns: there is nothing to force.
    let words = ["migrate", "--force", "web", "h"];
    ran(beside(dir.path(), &words))
        .code(64)
        .stderr_has("--force");
}

#[test]
fn exit_codes_are_ours() {
    let _alone = alone();
    for (xls, ours) in [(0, 0), (1, 1), (2, 64), (3, 1), (255, 1)] {
        let dir = scratch();
        script(dir.path(), &format!("#!/bin/sh\nexit {xls}\n"));
        ran(beside(dir.path(), &["save", "web", "-"])).code(ours);
    }
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\nkill -KILL $$\n");
    ran(beside(dir.path(), &["save", "web", "-"]))
        .code(1)
        .stderr_has("xl was ended: signal: 9");
}

/// Without a running helper, for every signal that would end xl.
#[test]
fn signals_reach_xl() {
    let _alone = alone();
    for (asked, number, said) in [
        ("restore", 15, Some("got TERM")),
        ("restore", 10, Some("got TERM")),
        ("restore", 16, Some("got TERM")),
        ("restore", 40, Some("got TERM")),
        // xl has not begun its work, and is killed.
        ("save", 10, None),
        ("save", 40, None),
    ] {
        let dir = scratch();
        // It ends when the signal comes, or when its stdin is closed.
        let text = "#!/bin/sh\ntrap 'echo got TERM; exit 0' TERM\necho ready\nread line\n";
        script(dir.path(), text);
        let (mut child, held, mut lines) = ready(beside(dir.path(), &[asked, "web", "-"]));
        // xsr has started xl, so it has blocked the signals that it reads.
        crate::common::signal_number(child.id(), number);
        let line = lines.next().map(Result::unwrap);
        assert_eq!(line.as_deref(), said, "{asked}, {number}");
        let code = i32::from(said.is_none());
        assert_eq!(
            child.wait().unwrap().code(),
            Some(code),
            "{asked}, {number}"
        );
        drop(held);
    }
}

/// xl's helper cancels its work, and xl is left to resume or destroy the guest.
#[test]
fn what_asks_to_stop_reaches_the_helper_and_not_xl() {
    let _alone = alone();
    // SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGSTKFLT and a real-time signal.
    for asked in [2, 15, 1, 3, 14, 16, 40] {
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
                // A real helper receives SIGTERM even if it is ignored at the start; sh does not.
                "#!/bin/sh\nenv --default-signal=TERM {}\necho helper $?\nexit 1\n",
                helper.display()
            ),
        );
        let command = hearing(beside(dir.path(), &["save", "web", "-"]));
        let (mut child, held, lines) = ready(command);
        crate::common::signal_number(child.id(), asked);
        let said: Vec<String> = lines.map(Result::unwrap).collect();
        assert_eq!(said, ["told", "helper 3"], "{asked}");
        assert_eq!(child.wait().unwrap().code(), Some(1));
        drop(held);
    }
}

/// A closing terminal sends SIGHUP twice. The second must not end an xl that is destroying a domain
/// that its helper has not restored.
#[test]
fn a_second_signal_leaves_xl_its_time() {
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
                "#!/bin/sh\ntrap 'echo xl hears' TERM\n{}\necho helper $?\nread line\n\
                 echo destroyed $line\nexit 1\n",
                helper.display()
            ),
        );
        let command = hearing(beside(dir.path(), &["restore", "f"]));
        let (mut child, mut held, mut lines) = ready(command);
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, asked).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "told", "{asked}");
        assert_eq!(lines.next().unwrap().unwrap(), "helper 3", "{asked}");
        for again in [asked, Signal::SIGHUP, Signal::SIGTERM] {
            kill(pid, again).unwrap();
        }
        held.write_all(b"it\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "destroyed it", "{asked}");
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }
}

/// SIGINT or SIGTERM a second after the announcement is deliberate.
#[test]
fn who_insists_ends_xl_and_is_told_what_that_may_leave() {
    let _alone = alone();
    let dir = scratch();
    script(
        dir.path(),
        "#!/bin/sh\n$LIBXL_SAVE_HELPER </dev/null >/dev/null 2>&1\n\
         echo helper ended\nread line\nexit 1\n",
    );
    let mut child = hearing(beside(dir.path(), &["save", "web", "f"]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let held = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "helper ended");
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    while !said.next().unwrap().unwrap().contains("press Ctrl-C again") {}
    // Longer than the time after which a signal ends xl at once.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    kill(pid, Signal::SIGHUP).unwrap();
    kill(pid, Signal::SIGINT).unwrap();
    let left = said.next().unwrap().unwrap();
    assert!(left.contains("ended at once: xl has been killed"), "{left}");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(held);
}

/// Signals that the terminal sends to all of its processes do not reach xl.
#[test]
fn xl_does_not_hear_the_keys_of_the_terminal() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\ngrep Sig /proc/self/status\n");
    for (asked, hears_term) in [
        ("save", false),
        ("migrate", false),
        ("remus", false),
        ("restore", true),
        ("migrate-receive", true),
    ] {
        let command = hearing(beside(dir.path(), &[asked, "web", "-"]));
        let about = ran(command).code(0).stdout;
        let mask = |name: &str| {
            let line = about.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        let ignored = |signal: Signal| mask("SigIgn:") >> (signal as u32 - 1) & 1 == 1;
        assert_eq!(mask("SigBlk:"), 0);
        let keys = [Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
        assert!(keys.into_iter().all(ignored), "{asked}");
        // A real-time signal, as an example of those that are sent to process groups.
        assert_eq!(mask("SigIgn:") >> 39 & 1 == 1, !hears_term, "{asked}");
        assert_eq!(ignored(Signal::SIGTERM), !hears_term, "{asked}");
    }
}

/// After its helper has ended, xl resumes or destroys the guest. No signal interrupts that, not the
/// second, and not one to the whole process group.
#[test]
fn behind_its_helper_nothing_stops_xl() {
    let _alone = alone();
    for asked in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let dir = scratch();
        script(
            dir.path(),
            "#!/bin/sh\n$LIBXL_SAVE_HELPER --save-domain 99 -1 1 0 0 0 </dev/null >/dev/null 2>&1\n\
             echo helper ended\nread line\necho resumed $line\nexit 1\n",
        );
        let mut command = hearing(beside(dir.path(), &["save", "web", "-"]));
        // Its own process group, as a shell makes one for a job.
        let mut child = std::os::unix::process::CommandExt::process_group(&mut command, 0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut held = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "helper ended");
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, asked).unwrap();
        let line = said.next().unwrap().unwrap();
        assert!(line.contains("cannot be broken off"), "{asked}: {line}");
        let line = said.next().unwrap().unwrap();
        assert!(line.contains("press Ctrl-C again"), "{asked}: {line}");
        // The same request.
        killpg(pid, asked).unwrap();
        held.write_all(b"it\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "resumed it");
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }
}

/// `nohup` is for a command whose terminal goes away.
#[test]
fn what_was_ignored_before_stays_ignored() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho ready\nread line\necho $line\n");
    let command = beside(dir.path(), &["save", "a", "-"]);
    let (mut child, mut held, mut lines) = ready(through_env("--ignore-signal=HUP", command));
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGHUP,
    )
    .unwrap();
    held.write_all(b"still here\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "still here");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A signal that comes while xl is being started ends both, or neither and xl receives it: xl is
/// never left alone.
#[test]
fn a_signal_that_comes_early_leaves_no_xl_alone() {
    let _alone = alone();
    for turn in 0..60 {
        let dir = scratch();
        script(dir.path(), "#!/bin/sh\nread line\n");
        let mut command = beside(dir.path(), &["save", "web", "-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let held = child.stdin.take();
        let stdout = child.stdout.take().unwrap();
        // At a different moment each time.
        for _ in 0..turn * 2000 {
            std::hint::spin_loop();
        }
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        let ended = child.wait().unwrap();
        assert!(!ended.success(), "{ended:?}");
        // While any process is left, this is open.
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
    let mut command = xsr(&["save", "--backend", "xen", "web", "-"]);
    command.env("PATH", dir.path());
    ran(command).code(1).stderr_has("there is no `xl` on PATH");
    script(dir.path(), SAYS);
    ran(beside(dir.path(), &["save", "--json", "web", "f"]))
        .code(64)
        .stderr_has("--json is not an option of xl");
    // A copy without a helper beside it.
    let alone = dir.path().join("xsr");
    fs::copy(env!("CARGO_BIN_EXE_xsr"), &alone).unwrap();
    let mut command = Command::new(&alone);
    command.args(["save", "--backend", "xen", "web", "-"]);
    command.env("PATH", dir.path());
    ran(command)
        .code(1)
        .stderr_has("there is no xsr-save-helper");
    // A helper on PATH suffices.
    std::os::unix::fs::symlink(
        installed("xsr-save-helper"),
        dir.path().join("xsr-save-helper"),
    )
    .unwrap();
    let mut command = Command::new(&alone);
    command.args(["save", "--backend", "xen", "web", "-"]);
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

/// xl truncates FILE at once, so it gets another file, which is renamed once xl has succeeded.
#[test]
fn the_file_of_a_save_is_whole_or_as_it_was() {
    let _alone = alone();
    let dir = scratch();
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    let partial = || {
        let names = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.to_string_lossy().contains("partial"))
            .count()
    };
    // As xl opens it.
    let writes = |what: &str, code: i32| {
        format!(
            "#!/bin/sh\nfor file; do true; done\n[ \"$file\" = conf ] && eval file=\\${{$(($#-1))}}\n\
             umask 022; {what} > \"$file\"; stat -c %a \"$file\"; exit {code}\n"
        )
    };
    fs::write(&file, "old").unwrap();
    script(dir.path(), &writes("echo half", 1));
    ran(beside(dir.path(), &["save", "web", at]))
        .code(1)
        .stdout_has("600\n")
        .stderr_has("web.save is as it was before");
    assert_eq!((fs::read(&file).unwrap(), partial()), (b"old".to_vec(), 0));
    for arguments in [
        ["save", "web", at].as_slice(),
        &["save", "-c", "web", at],
        &["save", "web", at, "conf"],
        &["save", "--force", "--checkpoint", "web", at, "conf"],
        &["-v", "save", "--", "web", at],
    ] {
        script(dir.path(), &writes("echo whole", 0));
        fs::write(&file, "old").unwrap();
        ran(beside(dir.path(), arguments))
            .code(0)
            .stdout_has("600\n");
        assert_eq!(fs::read(&file).unwrap(), b"whole\n", "{arguments:?}");
        assert_eq!(partial(), 0);
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // Killed after it had written everything: it may have destroyed the domain.
    let image = crate::common::image("tpv");
    let all = format!("cat {}", image.display());
    script(
        dir.path(),
        &writes(&all, 0).replace("exit 0", "kill -KILL $$"),
    );
    ran(beside(dir.path(), &["save", "web", at]))
        .code(1)
        .stderr_has("xl failed after the image was complete: it is ");
    assert_eq!(fs::read(&file).unwrap(), b"whole\n");
    assert_eq!(partial(), 1);
    // The next save does not treat it as rubbish.
    script(dir.path(), &writes("echo next", 0));
    ran(beside(dir.path(), &["save", "web", at]))
        .code(0)
        .stderr_has("may be all that there is of its domain");
    assert_eq!(partial(), 1);
    // If xl writes nothing it has saved nothing, whatever it reports.
    script(dir.path(), "#!/bin/sh\nexit 0\n");
    ran(beside(dir.path(), &["save", "web", at]))
        .code(1)
        .stderr_has("has written nothing");
    assert_eq!(fs::read(&file).unwrap(), b"next\n");
}

#[test]
fn pipes_and_devices_are_xls_to_write_but_no_domain_is_given_up_for_nothing() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), SAYS);
    for (keeps, to, code, says) in [
        ("-c", "/dev/null", 0, "[/dev/null]"),
        ("-p", "/dev/null", 0, "[/dev/null]"),
        ("-v", "/dev/null", 64, ""),
        ("-c", "-", 0, "[/dev/stdout]"),
        ("-v", "-", 0, "[/dev/stdout]"),
    ] {
        let mut command = beside(dir.path(), &["save", keeps, "web", to]);
        command.stdin(Stdio::null());
        ran(command).code(code).stdout_has(says);
    }
    let mut command = beside(dir.path(), &["save", "web", "-"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(64), "{out:?}");
}

/// xl would truncate it.
#[test]
fn xl_does_not_truncate_what_its_output_is_appended_to() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho image > \"$3\"\n");
    let archive = dir.path().join("archive");
    for to in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        let save = |old: &str| {
            fs::write(&archive, old).unwrap();
            let file = fs::OpenOptions::new().append(true).open(&archive).unwrap();
            let mut command = beside(dir.path(), &["save", "web", to]);
            command.stdin(Stdio::null()).stdout(file);
            let out = command.stderr(Stdio::piped()).output().unwrap();
            (out, fs::read_to_string(&archive).unwrap())
        };
        let (out, after) = save("precious");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(64), "{to}: {said}");
        assert!(said.contains("which xl would truncate"), "{to}: {said}");
        assert_eq!(after, "precious", "{to}");
        let (out, after) = save("");
        assert_eq!(out.status.code(), Some(0), "{to}: {out:?}");
        assert_eq!(after, "image\n", "{to}");
    }
}
