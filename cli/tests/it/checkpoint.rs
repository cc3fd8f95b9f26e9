//! `xsr save --layout mapped`: the contents and the length of the file, and what is left when the
//! command is stopped or killed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::common::migration::{Hosts, domains, until};
use crate::common::phases::staged;
use crate::common::{arg, backend, create, host_with, run, scratch};

#[test]
fn a_still_save_is_what_convert_makes_of_one() {
    for kind in ["pv", "pv32", "hvm", "pvh"] {
        let dir = scratch();
        let host = backend(&host_with(kind, dir.path()));
        let [plain, converted, saved] =
            ["plain", "converted", "saved"].map(|name| dir.path().join(name));
        run(["save", &host, "-c", "web", arg(&plain)]).code(0);
        for digests in [&[][..], &["--page-digests"]] {
            let to = ["convert", "-f", "--layout", "mapped", "-o", arg(&converted)];
            run([&to, digests, &[arg(&plain)]].concat()).code(0);
            for threads in ["1", "4"] {
                let how = ["save", &host, "-c", "--layout", "mapped", "--json"];
                let what = ["--threads", threads, "web", arg(&saved)];
                let report = run([&how, digests, &what].concat()).code(0).json();
                let [expected, got] = [&converted, &saved].map(|file| fs::read(file).unwrap());
                assert!(expected == got, "{kind}, {digests:?}, {threads} threads");
                assert_eq!(report["file_bytes"], got.len());
                assert!(report["zero_pages"].as_u64().unwrap() > 0, "{report}");
                assert_eq!(report["domain"], "running");
            }
        }
        // Without `-c` the domain is gone afterwards, as with any save.
        run(["save", &host, "--layout", "mapped", "web", arg(&saved)]).code(0);
        run(["verify", "--deep", arg(&saved)])
            .code(0)
            .stdout_has("all of them fit");
        run(["restore", &host, arg(&saved)]).code(0);
    }
}

#[test]
fn what_is_not_a_file_is_refused_before_the_domain_is_touched() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let to = backend(&host);
    for file in ["-", "/dev/null"] {
        run(["save", &to, "-c", "--layout", "mapped", "web", file])
            .code(64)
            .stderr_has("--layout stream");
    }
    let file = dir.path().join("web.save");
    run(["save", &to, "--page-digests", "web", arg(&file)])
        .code(64)
        .stderr_has("--page-digests is for --layout mapped");
    assert_eq!(domains(&host), ["web running"]);
    assert!(!file.exists());
}

/// At any rate of the guest's writes.
#[test]
fn a_live_checkpoint_is_no_longer_than_a_still_save_at_any_rate() {
    for kind in ["pv", "hvm", "pvh"] {
        for rate in ["10", "2000", "40000"] {
            let hosts = Hosts::with(kind, &["--dirty-rate", rate, "--working-set", "4M"]);
            let to = backend(&hosts.here);
            let [still, live] = ["still", "live"].map(|name| hosts.path(name));
            let mapped = ["save", &to, "-c", "--layout", "mapped"];
            run([&mapped, &["web", arg(&still)][..]].concat()).code(0);
            let target = ["--live", "--max-downtime", "20", "--timeout", "2", "--json"];
            let line = [&mapped[..], &target, &["web", arg(&live)]].concat();
            let report = run(line).code(0).json();
            assert!(report["iterations"].as_u64().unwrap() >= 1, "{report}");
            assert!(report["downtime_seconds"].as_f64().unwrap() > 0.0);
            let [a, b] = [&still, &live].map(|file| fs::metadata(file).unwrap());
            let most = |of: u64| of + of / 200;
            assert!(b.len() <= most(a.len()), "{kind}, {rate}: {}", b.len());
            // Zero pages may have been written since, at most the whole working set.
            let room = most(a.blocks() * 512) + (4 << 20) + (64 << 10);
            assert!(b.blocks() * 512 <= room, "{kind}, {rate}");
            run(["verify", "--deep", arg(&live)])
                .code(0)
                .stdout_has("all of them fit");
            assert_eq!(domains(&hosts.here), ["web running"]);
            run(["restore", &backend(&hosts.there), arg(&live)]).code(0);
            // The plain stream has nothing of the layout.
            let plain = hosts.path("plain");
            run(["convert", arg(&live), "-o", arg(&plain)]).code(0);
            run(["diff", arg(&live), arg(&plain)]).code(0);
            let again = hosts.path("again");
            let line = [
                "convert",
                "--layout",
                "mapped",
                arg(&plain),
                "-o",
                arg(&again),
            ];
            run(line).code(0);
            assert!(
                fs::read(&again).unwrap() == fs::read(&live).unwrap(),
                "{kind}"
            );
        }
    }
}

fn partial_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_string_lossy().ends_with(".partial"))
        .collect()
}

/// A checkpoint is stopped at each of its phases, with an old image in place: the guest runs, and
/// the image is the old one. A killed checkpoint may leave a file under a temporary name, which has
/// a footer only if it is complete, and a suspended guest, which the next command reports.
#[test]
fn a_checkpoint_that_is_stopped_or_killed_leaves_the_old_image() {
    let hosts = Hosts::with("pv", &["--dirty-rate", "2000", "--working-set", "1M"]);
    let (dir, file) = (hosts.dir.path(), hosts.path("web.save"));
    let to = backend(&hosts.here);
    let line = [
        "save",
        &to,
        "--live",
        "-c",
        "--layout",
        "mapped",
        "web",
        arg(&file),
    ];
    let (ran, passed) = staged(dir, line).end();
    ran.code(0);
    assert!(
        passed.iter().any(|phase| phase == "mapped-image"),
        "{passed:?}"
    );
    let old = fs::read(&file).unwrap();
    let mut tried: Vec<&String> = Vec::new();
    let signals = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGKILL,
    ];
    for phase in &passed {
        if tried.contains(&phase) {
            continue;
        }
        tried.push(phase);
        let asked = signals[tried.len() % 3];
        for signal in [asked, Signal::SIGKILL] {
            let at = format!("{phase}, {signal}");
            fs::write(&file, &old).unwrap();
            let mut command = staged(dir, line);
            assert!(command.hold(phase, 1), "{at}");
            command.signal(signal, false);
            if signal != Signal::SIGKILL {
                command.until_said("interrupt");
                command.release();
            }
            let (ran, _) = command.end();
            let named = matches!(phase.as_str(), "output-named" | "destroying");
            if signal == Signal::SIGKILL {
                for partial in partial_files(dir) {
                    let bytes = fs::read(&partial).unwrap();
                    let has_footer =
                        bytes.len() > 160 && bytes[bytes.len() - 160..].starts_with(b"XSRmapFt");
                    if has_footer {
                        run(["verify", "--deep", arg(&partial)]).code(0);
                    }
                }
                if domains(&hosts.here) == ["web suspended"] {
                    let again = run(line).code(1);
                    assert!(again.stderr.contains("resume"), "{at}: {again:?}");
                    run(["mock", "resume", "web", "--host", arg(&hosts.here)]).code(0);
                }
            } else if phase != "output-complete" && !named {
                assert_eq!(ran.code, 1, "{at}: {ran:?}");
                let said = ["runs on", "was not written"];
                assert!(said.iter().any(|s| ran.stderr.contains(s)), "{at}: {ran:?}");
                assert!(partial_files(dir).is_empty(), "{at}");
            }
            assert_eq!(domains(&hosts.here), ["web running"], "{at}");
            if !named && ran.code != 0 {
                assert!(fs::read(&file).unwrap() == old, "{at}");
            } else {
                run(["verify", "--deep", arg(&file)]).code(0);
            }
        }
    }
    assert!(tried.len() >= 8, "{passed:?}");
    // The next save removes what the killed ones have left.
    run(line).code(0);
    assert_eq!(partial_files(dir), Vec::<PathBuf>::new());
}

/// Two checkpoints of one guest: the second has the guest's state at its time.
#[test]
fn each_checkpoint_replaces_the_one_before() {
    let dir = scratch();
    let host = dir.path().join("lab");
    create(&host, "web", "pvh");
    let to = backend(&host);
    let file = dir.path().join("web.save");
    for _ in 0..2 {
        let line = [
            "save",
            &to,
            "--live",
            "-c",
            "--layout",
            "mapped",
            "web",
            arg(&file),
        ];
        run(line).code(0);
    }
    assert_eq!(domains(&host), ["web running"]);
    run(["verify", "--deep", arg(&file)]).code(0);
}

/// A program for `--at-freeze` that appends what it is told to a file, and then does this.
fn program(directory: &Path, does: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = directory.join("program");
    let told = directory.join("told");
    let script = format!(
        "#!/bin/sh\n{{ env | sort | grep ^XSR_; ls /proc/$$/fd; echo; }} >> {}\necho said\n{does}\n",
        arg(&told)
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_program_runs_while_the_domain_is_suspended_and_learns_how_it_ended() {
    for options in [&[][..], &["--live"], &["--live", "--layout", "mapped"]] {
        let hosts = Hosts::with("pvh", &[]);
        let (dir, file) = (hosts.dir.path(), hosts.path("web.save"));
        let to = backend(&hosts.here);
        // It asks how the domain is, which only this test lets it know.
        let state = hosts.path("state");
        let xsr = env!("CARGO_BIN_EXE_xsr");
        let list = format!(
            "{xsr} mock list --json --host {} >> {}",
            arg(&hosts.here),
            arg(&state)
        );
        let path = program(dir, &list);
        let line = ["save", &to, "-c", "--json", "--at-freeze", arg(&path)];
        let line = [&line[..], options, &["web", arg(&file)]].concat();
        // A descriptor that a shell has left open does not reach it.
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "exec 7</dev/null; exec \"$@\"", "sh", xsr]);
        command.args(&line).env_remove("XSR_BACKEND");
        let ran = crate::common::ran(assert_cmd::Command::from_std(command)).code(0);
        let report = ran.json();
        assert!(
            report["at_freeze_seconds"].as_f64().unwrap() > 0.0,
            "{report}"
        );
        let told = fs::read_to_string(hosts.path("told")).unwrap();
        for word in ["XSR_NAME=web\n", "XSR_DOMID=", "XSR_UUID=", "XSR_DEADLINE="] {
            assert_eq!(told.matches(word).count(), 2, "{told}");
        }
        let name = format!("XSR_FILE={}\n", arg(&file));
        assert_eq!(told.matches(&name).count(), 2, "{told}");
        let [frozen, saved] = ["XSR_PHASE=frozen", "XSR_PHASE=saved"].map(|at| told.find(at));
        assert!(frozen.unwrap() < saved.unwrap(), "{told}");
        assert!(!told.contains("\n7\n"), "{told}");
        // Suspended at first, and running in the end.
        let states = fs::read_to_string(&state).unwrap();
        let [suspended, running] = ["suspended", "running"].map(|at| states.find(at));
        assert!(suspended.unwrap() < running.unwrap(), "{states}");
        assert_eq!(domains(&hosts.here), ["web running"]);
    }
}

#[test]
fn a_program_that_fails_or_hangs_fails_the_save_and_the_domain_runs_on() {
    let hosts = Hosts::with("pv", &[]);
    let (dir, file) = (hosts.dir.path(), hosts.path("web.save"));
    let to = backend(&hosts.here);
    let started = hosts.path("started");
    // What it has started is killed with it.
    let hangs = format!(
        "[ $XSR_PHASE = failed ] || {{ sleep 1000 & echo $! >> {}; wait; }}",
        arg(&started)
    );
    for (does, expected) in [
        ("[ $XSR_PHASE = failed ]", "it failed (exit status: 1)"),
        (hangs.as_str(), "has not ended within 1 s, and was killed"),
    ] {
        let path = program(dir, does);
        for layout in ["stream", "mapped"] {
            let line = [
                "save",
                &to,
                "-c",
                "--live",
                "--layout",
                layout,
                "--at-freeze",
                arg(&path),
                "--at-freeze-limit",
                "1",
                "web",
                arg(&file),
            ];
            run(line)
                .code(1)
                .stderr_has(expected)
                .stderr_has("web runs on");
            assert_eq!(domains(&hosts.here), ["web running"]);
            assert!(!file.exists());
            assert_eq!(partial_files(dir), Vec::<PathBuf>::new());
        }
        let told = fs::read_to_string(hosts.path("told")).unwrap();
        assert_eq!(told.matches("XSR_PHASE=failed").count(), 2, "{told}");
        assert!(!told.contains("XSR_PHASE=saved"), "{told}");
        fs::remove_file(hosts.path("told")).unwrap();
    }
    let started = fs::read_to_string(started).unwrap();
    assert_eq!(started.lines().count(), 2, "{started}");
    for process in started.lines() {
        // Empty for a process that has ended and has not been waited for.
        let line = Path::new("/proc").join(process).join("cmdline");
        until("what the program started has gone", || {
            !fs::read(&line).is_ok_and(|line| line.starts_with(b"sleep"))
        });
    }
}

#[test]
fn a_program_that_others_can_replace_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let hosts = Hosts::with("pvh", &[]);
    let to = backend(&hosts.here);
    let file = hosts.path("web.save");
    let path = program(hosts.dir.path(), "true");
    let refused = |path: &str, to_file: &str, expected: &str| {
        run(["save", &to, "-c", "--at-freeze", path, "web", to_file])
            .code(64)
            .stderr_has(expected);
        assert_eq!(domains(&hosts.here), ["web running"]);
        assert!(!file.exists() && !hosts.path("told").exists());
    };
    refused(arg(&path), "/dev/null", "for a save to a file");
    refused("program", arg(&file), "expected an absolute path");
    refused(arg(&hosts.path("none")), arg(&file), "No such file");
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    refused(arg(&path), arg(&file), "is not a program");
    mode(0o757);
    refused(arg(&path), arg(&file), "can be written by other users");
    mode(0o755);
    let open = fs::Permissions::from_mode(0o777);
    fs::set_permissions(hosts.dir.path(), open).unwrap();
    refused(arg(&path), arg(&file), "can be written by other users");
}
