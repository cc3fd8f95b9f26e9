//! Output files and what they replace: nothing is lost, whatever a command writes to, and a failure
//! reports what has become of the guest and of the file.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::phases::{Staged, staged};
use crate::common::{Ran, arg, backend, host_with, image, run, scratch, state, xsr};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

/// The names in a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// `xsr` through sh, which has redirections.
fn sh(dir: &Path, script: &str) -> Ran {
    let out = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {script}")])
        .current_dir(dir)
        .env_remove("XSR_BACKEND")
        .env_remove("XSR_LOG")
        .env("X", env!("CARGO_BIN_EXE_xsr"))
        .output()
        .unwrap();
    Ran {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

#[test]
fn the_only_copy_is_not_overwritten_by_its_export() {
    let dir = scratch();
    let copy = dir.path().join("only.save");
    fs::copy(image("tpv"), &copy).unwrap();
    let whole = fs::read(&copy).unwrap();
    fs::hard_link(&copy, dir.path().join("hard")).unwrap();
    std::os::unix::fs::symlink("only.save", dir.path().join("soft")).unwrap();
    for script in [
        "$X export only.save only.save",
        "$X export only.save -o only.save",
        "$X export -f only.save hard",
        "$X convert -f only.save -o soft",
        "$X edit -f --name x only.save -o ./only.save",
        "$X cat -f only.save -o hard",
        "$X convert -f - -o only.save < only.save",
        "$X cat - -o soft -f < only.save",
        "$X convert only.save -o - 1<> only.save",
        "$X cat only.save >> only.save",
        "$X export only.save - >> hard",
        "$X cat only.save -o /dev/stdout >> only.save",
        "$X cat only.save -o /proc/self/fd/7 7>> only.save",
    ] {
        let ran = sh(dir.path(), script).code(64);
        assert!(
            ran.stderr.contains("is the same file as the input"),
            "{script}: {ran:?}"
        );
        assert!(fs::read(&copy).unwrap() == whole, "{script}");
    }
    // A configuration is an input, too.
    fs::write(dir.path().join("c.json"), "{}").unwrap();
    for script in [
        "$X edit -f --config c.json only.save -o c.json",
        "$X convert -f --config c.json only.save -o c.json",
        "$X edit -f --add 0x80000001:c.json only.save -o c.json",
    ] {
        sh(dir.path(), script).code(64);
        assert_eq!(
            fs::read(dir.path().join("c.json")).unwrap(),
            b"{}",
            "{script}"
        );
    }
    assert_eq!(names(dir.path()), ["c.json", "hard", "only.save", "soft"]);
}

#[test]
fn what_is_there_stays_unless_force_is_given() {
    let dir = scratch();
    fs::copy(image("tpv"), dir.path().join("a.save")).unwrap();
    fs::write(dir.path().join("o"), "precious").unwrap();
    let commands = [
        "convert a.save -o o",
        "edit --name x a.save -o o",
        "export a.save o",
        "export --format raw a.save -o o",
        "cat a.save -o o",
    ];
    for command in commands {
        let ran = sh(dir.path(), &format!("$X {command}")).code(64);
        assert!(
            ran.stderr
                .contains("o: exists already: --force replaces it"),
            "{ran:?}"
        );
        assert_eq!(fs::read(dir.path().join("o")).unwrap(), b"precious");
        // No input was read before that: even a missing input is not reported.
        let command = command.replace("a.save", "-");
        let ran = sh(dir.path(), &format!("$X {command} < /dev/zero"));
        assert_eq!(ran.code, 64, "{ran:?}");
        for force in ["-f", "--force"] {
            fs::write(dir.path().join("o"), "precious").unwrap();
            let command = command.replace(" -o", &format!(" {force} -o"));
            let command = command.replacen(" -", &format!(" {force} -"), 1);
            if command.contains(" a.save") {
                sh(dir.path(), &format!("$X {command}")).code(0);
            }
        }
        fs::write(dir.path().join("o"), "precious").unwrap();
    }
    sh(dir.path(), "$X cat -f a.save -o o").code(0);
    let mode = fs::metadata(dir.path().join("o")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    // If nothing can be lost, `--force` is not needed.
    for to in ["/dev/null", "/dev/stdout"] {
        sh(dir.path(), &format!("$X cat a.save -o {to} > /dev/null")).code(0);
    }
    let ran = sh(
        dir.path(),
        "mkfifo p && { cat p | wc -c & $X cat a.save -o p && wait; }",
    )
    .code(0);
    assert!(
        ran.stdout.trim().parse::<u64>().unwrap() > 4 << 20,
        "{ran:?}"
    );
    assert_eq!(names(dir.path()), ["a.save", "o", "p"]);
}

#[test]
fn no_guest_is_given_up_for_an_output_that_keeps_nothing() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let save = format!("$X save {} web", backend(&host));
    for (to, why) in [
        ("/dev/null", "/dev/null: is /dev/null, which keeps nothing"),
        ("- >&-", "stdout is closed"),
        ("- > /dev/null", "/dev/null"),
        ("/dev/stdout >&-", "stdout is closed"),
        ("/dev/stdout > /dev/null", "keeps nothing"),
        ("/dev/fd/5 5> /dev/null", "keeps nothing"),
        ("/dev/zero", "keeps nothing"),
        ("- 1< /dev/null", "is not open for writing"),
    ] {
        let ran = sh(dir.path(), &format!("{save} {to}")).code(64);
        assert!(ran.stderr.contains(why), "{to}: {ran:?}");
        assert_eq!(state(&host, "web").as_deref(), Some("running"), "{to}");
    }
    for (option, to) in [
        ("-c", "/dev/null"),
        ("-p", "/dev/null"),
        ("-c", "- >&-"),
        ("-p", "- >&-"),
    ] {
        sh(dir.path(), &format!("{save} {option} {to}")).code(0);
        run(["mock", "destroy", "--host", arg(&host), "web"]).code(0);
        crate::common::create(&host, "web", "pv");
    }
    // A command fails if its report cannot be written, unless that is intended, as with
    // `subprocess.DEVNULL` of Python, which is open for reading, too.
    run([
        "save",
        &backend(&host),
        "-c",
        "web",
        arg(&dir.path().join("a.save")),
    ])
    .code(0);
    for command in [
        "cat a.save",
        "inspect a.save",
        "verify a.save",
        "diff a.save a.save",
    ] {
        let ran = sh(dir.path(), &format!("$X {command} >&-")).code(1);
        assert_eq!(ran.stderr, "xsr: stdout is closed\n", "{command}");
        sh(dir.path(), &format!("$X {command} > /dev/null")).code(0);
        sh(dir.path(), &format!("$X {command} <> /dev/null >&0")).code(0);
    }
    // Appended to existing data, if that is requested.
    fs::write(dir.path().join("log"), "12345678").unwrap();
    sh(
        dir.path(),
        &format!("{save} - >> log && tail -c +9 log | $X verify -"),
    )
    .code(0);
    assert!(
        fs::read(dir.path().join("log"))
            .unwrap()
            .starts_with(b"12345678")
    );
}

#[test]
fn a_save_that_fails_says_what_became_of_the_guest_and_of_the_file() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let save = format!("$X save {} web", backend(&host));
    // The limit is in KiB: the guest has 16 MiB.
    let limited = format!("ulimit -f 4000; {save} --force");
    let ran = sh(dir.path(), &format!("{limited} web.save")).code(1);
    assert!(ran.stderr.contains("saving web to web.save: "), "{ran:?}");
    assert!(ran.stderr.contains("File too large"), "{ran:?}");
    assert!(
        ran.stderr.ends_with("; web runs on, no file was written\n"),
        "{ran:?}"
    );
    fs::write(dir.path().join("web.save"), "old").unwrap();
    let ran = sh(dir.path(), &format!("{limited} web.save")).code(1);
    assert!(
        ran.stderr
            .ends_with("; web runs on, web.save is as it was before\n"),
        "{ran:?}"
    );
    let ran = sh(dir.path(), &format!("{save} /dev/full")).code(1);
    assert!(
        ran.stderr.contains("to /dev/full") && ran.stderr.contains("; web runs on, what /dev/full"),
        "{ran:?}"
    );
    // Without --force the guest is not even suspended.
    let ran = sh(dir.path(), &format!("ulimit -f 4000; {save} web.save")).code(1);
    for words in [
        "web.save: ",
        "has 3.9 MiB free",
        "will have 15.0 MiB at least",
        "--force",
    ] {
        assert!(ran.stderr.contains(words), "{words}: {ran:?}");
    }
    assert_eq!(fs::read(dir.path().join("web.save")).unwrap(), b"old");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    assert_eq!(names(dir.path()), ["host", "web.save"]);
}

/// Let a command that is about to rename its output do so, without opening files: the directory
/// cannot be synced.
fn name_without_syncing(held: &mut Staged) {
    let pid = Pid::from_raw(i32::try_from(held.pid()).unwrap());
    let limit = |limit| prlimit(pid, Resource::Nofile, limit).unwrap();
    assert!(held.hold("output-complete", 1));
    let before = limit(Rlimit {
        current: Some(0),
        ..rustix::process::getrlimit(Resource::Nofile)
    });
    assert!(held.hold("output-named", 1));
    limit(before);
}

#[test]
fn an_output_that_a_power_cut_might_undo_is_said_to_be_there() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let (file, to) = (dir.path().join("web.save"), backend(&host));
    for options in [&[][..], &["-c"], &["-p"]] {
        fs::write(&file, "old").unwrap();
        let args = [&["save"], options, &[to.as_str(), "web", arg(&file)]];
        let mut saving = staged(dir.path(), args.concat());
        name_without_syncing(&mut saving);
        let ran = saving.end().0.code(1);
        let words = format!(
            "web runs on here: do not restore {} while it does\n",
            file.display()
        );
        assert!(ran.stderr.ends_with(&words), "{ran:?}");
        ran.stderr_has("web.save is complete, but a power cut might undo that")
            .stderr_has("Too many open files");
        assert_eq!(state(&host, "web").as_deref(), Some("running"));
        run(["verify", arg(&file)]).code(0);
    }
    let new = dir.path().join("new.save");
    let mut converting = staged(
        dir.path(),
        ["convert", "--to", "libxc", arg(&file), "-o", arg(&new)],
    );
    name_without_syncing(&mut converting);
    let ran = converting.end().0.code(1);
    assert!(!ran.stderr.contains("no file was written"), "{ran:?}");
    ran.stderr_has("new.save is complete, but a power cut might undo that");
    run(["verify", arg(&new)]).code(0);
}

#[test]
fn a_writing_error_is_not_blamed_on_the_input() {
    let dir = scratch();
    fs::copy(image("tpv"), dir.path().join("a.save")).unwrap();
    for command in [
        "convert a.save -o",
        "convert --to libxc a.save -o",
        "edit --name x a.save -o",
        "cat a.save -o",
        "export a.save",
        "export --format gdb a.save",
        "export --format raw a.save",
    ] {
        let ran = sh(dir.path(), &format!("ulimit -f 1000; $X {command} o.save")).code(1);
        assert_eq!(
            ran.stderr, "xsr: writing o.save: File too large (os error 27); no file was written\n",
            "{command}"
        );
        let ran = sh(dir.path(), &format!("$X {command} - > /dev/full")).code(1);
        let words = "xsr: writing stdout: No space left on device (os error 28); ";
        assert!(ran.stderr.starts_with(words), "{command}: {ran:?}");
        // No message for a reader that has read enough.
        let ran = sh(
            dir.path(),
            &format!("$X {command} - | head -c 10 > /dev/null"),
        )
        .code(1);
        assert_eq!(ran.stderr, "", "{command}");
    }
    assert_eq!(names(dir.path()), ["a.save"]);
}

#[test]
fn what_was_done_is_no_failure_because_it_cannot_be_reported() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let with = backend(&host);
    for (command, done) in [
        (
            format!("save {with} --json -c web w.save"),
            "web saved to w.save; the domain is running",
        ),
        (format!("mock destroy --host {} web", host.display()), ""),
        (
            format!("restore {with} --json w.save"),
            "web restored; it is running",
        ),
        (
            "convert --json w.save -o x.save".to_owned(),
            "w.save converted to an xl image",
        ),
    ] {
        let ran = sh(dir.path(), &format!("$X {command} > /dev/full")).code(0);
        let expected = match done {
            "" => String::new(),
            done => format!(
                "xsr: {done}; the report could not be written: stdout: No space left on device \
                 (os error 28)\n"
            ),
        };
        assert_eq!(ran.stderr, expected, "{command}");
    }
    // If the report is the work itself, it fails.
    for command in [
        "inspect w.save",
        "verify w.save",
        "diff w.save w.save",
        "verify --json w.save",
    ] {
        let ran = sh(dir.path(), &format!("$X {command} > /dev/full"));
        assert_eq!(ran.code, 1, "{command}: {ran:?}");
        assert!(
            ran.stderr.contains("stdout: No space"),
            "{command}: {ran:?}"
        );
    }
}

#[test]
fn json_and_an_output_do_not_share_stdout() {
    let dir = scratch();
    fs::copy(image("tpv"), dir.path().join("a.save")).unwrap();
    for to in ["-", "/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"] {
        let ran = sh(
            dir.path(),
            &format!("$X convert --json a.save -o {to} | cat"),
        )
        .code(64);
        assert!(ran.stderr.contains("would both go to stdout"), "{ran:?}");
        assert_eq!(ran.stdout, "");
    }
}

#[test]
fn a_temporary_file_of_a_killed_command_goes_with_the_next() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let fifo = dir.path().join("source");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["convert", arg(&fifo), "-o", "a.save"])
        .current_dir(dir.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Once it reads from the source, it has opened its output. It now waits for more.
    let mut source = OpenOptions::new().write(true).open(&fifo).unwrap();
    let whole = fs::read(image("tpv")).unwrap();
    std::io::Write::write_all(&mut source, &whole[..2 << 20]).unwrap();
    let left = || {
        names(dir.path())
            .into_iter()
            .filter(|name| name.ends_with(".partial"))
    };
    assert_eq!(left().count(), 1);
    // The file is in use, so another command must not remove it.
    let save = format!("{} -c web a.save", backend(&host));
    sh(dir.path(), &format!("$X save {save}")).code(0);
    assert_eq!(left().count(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(left().count(), 1);
    let ran = sh(dir.path(), &format!("$X -v save {save}")).code(0);
    assert!(
        ran.stderr.contains("that a killed command has left"),
        "{ran:?}"
    );
    assert_eq!(left().count(), 0);
}

#[test]
fn no_name_of_a_file_is_obeyed_by_a_terminal() {
    let dir = scratch();
    let name = "a\nother.save: good\u{1b}[31m\u{9b}2J\u{202e}";
    fs::copy(image("tpv"), dir.path().join(name)).unwrap();
    let ran = sh(dir.path(), "$X verify *").code(0);
    assert_eq!(ran.stdout.lines().count(), 1, "{ran:?}");
    assert!(
        ran.stdout.starts_with(r"a\nother.save: good\u{1b}[31m"),
        "{ran:?}"
    );
    for command in [
        "verify *",
        "inspect *",
        "diff * *",
        "cat * -o /x/y",
        "verify /nothing/*",
    ] {
        let ran = sh(dir.path(), &format!("$X {command}"));
        let unfit = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(
            !ran.stdout.contains(unfit) && !ran.stderr.contains(unfit),
            "{ran:?}"
        );
    }
    let json = sh(dir.path(), "$X verify --json *").code(0).json();
    assert_eq!(json["file"], name);
}

#[test]
fn a_long_message_is_cut() {
    let long = format!("--backend=mock:{}", "x/".repeat(50_000));
    let mut command = xsr(["save", &long, "web", "f"]);
    let output = command.output().unwrap();
    assert!(output.stderr.len() < 20_000, "{}", output.stderr.len());
}

/// Nothing is written to a stream of another user. This test needs root.
#[test]
fn another_users_fifo_gets_no_memory() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make what another user owns");
        return;
    }
    let dir = scratch();
    let host = host_with("pv", dir.path());
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let fifo = dir.path().join("-fifo.save");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    std::os::unix::fs::chown(&fifo, Some(65534), None).unwrap();
    let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let save = format!("$X save {} -c web ./-fifo.save", backend(&host));
    let ran = sh(dir.path(), &save).code(64);
    assert!(
        ran.stderr.contains("of another user (uid 65534)"),
        "{ran:?}"
    );
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    // Not a byte has arrived.
    std::io::Write::write_all(&mut reader, b"!").unwrap();
    let mut byte = [0];
    reader.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
}

/// A wrapped image is unpacked into a temporary file by commands that read it twice: if that cannot
/// be written, the image is not to blame.
#[test]
fn a_temporary_file_that_cannot_be_written_is_named() {
    let dir = scratch();
    let packed = dir.path().join("tpv.save.gz");
    crate::bounds::inputs::gzip(&image("tpv"), &packed);
    for line in ["export tpv.save.gz core", "diff tpv.save.gz tpv.save.gz"] {
        // In units of 1024 bytes.
        let ran = sh(dir.path(), &format!("ulimit -f 200; TMPDIR=$PWD $X {line}"));
        let place = format!("writing a temporary file in {}", dir.path().display());
        let ran = ran.code(1).stderr_has(&place).stderr_has("File too large");
        let ran = ran.stderr_has("tpv.save.gz (TMPDIR names another directory)");
        assert!(!ran.stderr.contains("reading failed"), "{ran:?}");
        assert_eq!(names(dir.path()), ["tpv.save.gz"]);
    }
}
