//! `xsr save --layout mapped`: the contents and the length of the file, and what is left when the
//! command is stopped or killed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::common::migration::{Hosts, domains};
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
