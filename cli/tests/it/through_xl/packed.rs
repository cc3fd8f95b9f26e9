//! `--compress` and `--encrypt-to` through xl, which saves into a pipe of ours.

use std::os::unix::fs::OpenOptionsExt as _;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::*;

const RECIPIENT: &str = "age1jmjhnyuegaqsu23rx902autsk2vpsla2dgl94ue7zexngljy5eksc4kure";

/// xl, which writes down how it is called. A save has its output as the last argument; `ends` is
/// what it does when it destroys a domain or lets one run on.
fn plays_and_ends(dir: &Path, saves: &str, ends: &str) -> String {
    format!(
        "#!/bin/sh\nfor file; do true; done\nsays() {{ echo \"$*\" >> {}; }}\n\
         case $1 in\nsave) says \"${{*%% /*}}\"; {saves};;\n*) {ends}; says \"$*\";;\nesac\n",
        dir.join("calls").display()
    )
}

fn plays(dir: &Path, saves: &str) -> String {
    plays_and_ends(dir, saves, "true")
}

/// The calls of xl since the last time.
fn calls(dir: &Path) -> Vec<String> {
    let path = dir.join("calls");
    let said = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    said.lines().map(str::to_owned).collect()
}

fn partial(dir: &Path) -> usize {
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().contains("partial"))
        .count()
}

#[test]
fn what_xl_writes_is_packed_and_named_once_xl_has_succeeded() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let plain = fs::read(&image).unwrap();
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    let identity = format!(
        "{}/src/age/testdata/identity.txt",
        env!("CARGO_MANIFEST_DIR")
    );
    // The domain is destroyed when the image has its name.
    script(
        dir.path(),
        &plays_and_ends(
            dir.path(),
            &format!(
                "test -p \"$file\" || exit 9; cat {} > \"$file\"",
                image.display()
            ),
            &format!("test -s {at}"),
        ),
    );
    for how in [
        &["--compress", "zstd"][..],
        &["--encrypt-to", RECIPIENT],
        &["--compress=zstd", &format!("--encrypt-to={RECIPIENT}")],
    ] {
        for (then, expected) in [
            (&["-c"][..], &["save -c web"][..]),
            (&["-p"], &["save -p web"]),
            (&[], &["save -p web", "destroy web"]),
        ] {
            fs::remove_file(&file).ok();
            let line = [&["save"], how, then, &["web", at]].concat();
            ran(beside(dir.path(), &line)).code(0);
            assert_eq!(calls(dir.path()), expected, "{how:?}");
            let mode = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!((mode & 0o777, partial(dir.path())), (0o600, 0));
        }
        assert!(fs::read(&file).unwrap() != plain);
        let cat = ["cat", "--layer", "xl", "--identity", &identity, at];
        let mut command = xsr(&cat);
        let out = command.stdout(Stdio::piped()).output().unwrap();
        assert!(out.status.success() && out.stdout == plain, "{how:?}");
    }
}

#[test]
fn an_xl_that_fails_leaves_the_file_as_it_was() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    let save = ["save", "--compress", "zstd", "web", at];
    fs::write(&file, "old").unwrap();
    let image = image.display();
    for (does, said) in [
        ("exit 1".to_owned(), ""),
        (format!("head -c 100000 {image} > \"$file\"; exit 1"), ""),
        // It destroys nothing by itself, so that the image is not needed.
        (
            format!("cat {image} > \"$file\"; kill -KILL $$"),
            "xl was ended: signal: 9",
        ),
    ] {
        script(dir.path(), &plays(dir.path(), &does));
        ran(beside(dir.path(), &save))
            .code(1)
            .stderr_has("web.save is as it was before")
            .stderr_has(said);
        assert_eq!(fs::read(&file).unwrap(), b"old");
        assert_eq!(partial(dir.path()), 0);
        assert_eq!(calls(dir.path()), ["save -p web"]);
    }
    script(dir.path(), &plays(dir.path(), ": > \"$file\""));
    ran(beside(dir.path(), &save))
        .code(1)
        .stderr_has("has written nothing; see `xl list` for what has become of web, ");
    assert_eq!(calls(dir.path()), ["save -p web"]);
}

#[test]
fn an_output_that_fails_ends_xl() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let ended = dir.path().join("ended");
    // More than the pipe takes.
    let saves = format!(
        "for i in 1 2 3 4; do cat {0} {0} {0} {0} || exit 7; done > \"$file\"; : > {1}",
        image.display(),
        ended.display()
    );
    script(dir.path(), &plays(dir.path(), &saves));
    let line = ["save", "--encrypt-to", RECIPIENT, "web", "/dev/full"];
    ran(beside(dir.path(), &line))
        .code(1)
        .stderr_has("writing /dev/full: No space left on device");
    // xl has let the domain run on by itself.
    assert_eq!(calls(dir.path()), ["save -p web"]);
    assert!(!ended.exists());
}

/// The last of a compressed image is written once xl has ended.
#[test]
fn an_output_that_fails_after_xl_has_ended_well_lets_the_domain_run_on() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let saves = format!("head -c 100000 {} > \"$file\"", image.display());
    let save = |then: &[&str], at: &str| {
        let line = [&["save", "--compress", "zstd"], then, &["web", at]].concat();
        ran(beside(dir.path(), &line)).code(1)
    };
    for (then, expected) in [
        (&["-c"][..], &["save -c web"][..]),
        (&["-p"], &["save -p web", "unpause web"]),
        (&[], &["save -p web", "unpause web"]),
    ] {
        script(dir.path(), &plays(dir.path(), &saves));
        save(then, "/dev/full")
            .stderr_has("writing /dev/full: No space left on device (os error 28); web runs on, ");
        assert_eq!(calls(dir.path()), expected);
    }
    // Where that fails, or destroying does, the message says how the domain is left.
    script(
        dir.path(),
        &plays_and_ends(dir.path(), &saves, "says \"$*\"; exit 5"),
    );
    save(&[], "/dev/full").stderr_has("web is left paused: `xl unpause web`");
    assert_eq!(calls(dir.path()), ["save -p web", "unpause web"]);
    let file = dir.path().join("web.save");
    save(&[], file.to_str().unwrap())
        .stderr_has("`xl destroy web` has failed (exit status: 5)")
        .stderr_has(
            "web.save is complete, and web may be here still, paused: see `xl list`, and `xl",
        )
        .stderr_has("and `xl destroy web` before /");
    assert_eq!(calls(dir.path()), ["save -p web", "destroy web"]);
    assert!(file.exists());
}

/// A user need not wait for an output that takes nothing more.
#[test]
fn a_signal_ends_the_wait_for_an_output_after_xl_has_ended() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let pid = dir.path().join("pid");
    let saves = format!(
        "echo $$ > {}; echo ready; head -c 400000 {} > \"$file\"",
        pid.display(),
        image.display()
    );
    script(dir.path(), &plays(dir.path(), &saves));
    let stalled = dir.path().join("stalled");
    nix::unistd::mkfifo(&stalled, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut both = fs::OpenOptions::new();
    both.read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits());
    let mut both = both.open(&stalled).unwrap();
    // As wide as xsr makes it, and full.
    fcntl(&both, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
    while both.write(&[0; 4096]).is_ok() {}
    for asked in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let at = stalled.to_str().unwrap();
        let line = ["save", "--encrypt-to", RECIPIENT, "web", at];
        let mut command = hearing(beside(dir.path(), &line));
        command.stderr(Stdio::piped());
        let (child, _held, _lines) = ready(command);
        let xl: u32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let gone = || !Path::new(&format!("/proc/{xl}")).exists();
        crate::common::migration::until("xl has ended", gone);
        kill(Pid::from_raw(child.id().try_into().unwrap()), asked).unwrap();
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains("web runs on"), "{said}");
        assert_eq!(calls(dir.path()), ["save -p web", "unpause web"], "{asked}");
    }
}

/// What xl itself writes after its helper has ended: libxl writes on after a short count, and xl
/// would die of SIGPIPE before it lets the domain run on.
#[test]
fn an_xl_that_writes_hears_of_a_failure_and_lives() {
    let _alone = alone();
    let dir = scratch();
    // As if the helper had begun and ended; then more than the pipe and the output take.
    let saves = ": > \"$XSR_HELPER_BEGAN\"; exec 9> \"$file\"; echo ready; \
                 while head -c 65536 /dev/zero >&9; do :; done 2>/dev/null; echo resumed; exit 1";
    script(dir.path(), &plays(dir.path(), saves));
    let stalled = dir.path().join("stalled");
    nix::unistd::mkfifo(&stalled, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut both = fs::OpenOptions::new();
    let _both = both.read(true).write(true).open(&stalled).unwrap();
    for (output, is_asked) in [("/dev/full", false), (stalled.to_str().unwrap(), true)] {
        let line = ["save", "--encrypt-to", RECIPIENT, "web", output];
        let mut command = hearing(beside(dir.path(), &line));
        command.stderr(Stdio::piped());
        let (child, _held, lines) = ready(command);
        if is_asked {
            kill(
                Pid::from_raw(child.id().try_into().unwrap()),
                Signal::SIGTERM,
            )
            .unwrap();
        }
        let said: Vec<String> = lines.map(Result::unwrap).collect();
        assert_eq!(said, ["resumed"], "{output}");
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        assert_eq!(calls(dir.path()), ["save -p web"]);
    }
}

#[test]
fn what_does_not_go_together_is_refused_before_xl_is_started() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho started\n");
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    for (how, why) in [
        (
            &["--compress", "zstd", "--layout", "mapped"][..],
            "does not go with --layout mapped",
        ),
        (&["--compress", "gzip"], "--compress: expected zstd"),
        (&["--encrypt-to", "age1x"], "expected a recipient"),
    ] {
        let line = [&["save", "-c"], how, &["web", at]].concat();
        let ran = ran(beside(dir.path(), &line)).code(64).stderr_has(why);
        assert_eq!((ran.stdout.as_str(), file.exists()), ("", false));
    }
}
