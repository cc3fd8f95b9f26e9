//! A guest that has seen CPU features which a host lacks: our commands refuse it there and name the
//! features, and `--force` goes on.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::common::migration::{Hosts, Running, domains};
use crate::common::phases::staged;
use crate::common::{arg, backend, create, host_with, run, scratch, state};

const KINDS: [&str; 4] = ["pv", "pv32", "hvm", "pvh"];

/// A mock machine whose processor lacks features that guests elsewhere have.
fn older(host: &Path) {
    run(["mock", "host", "--host", arg(host), "--cpu=-avx2,-erms"]).code(0);
}

/// `web` on one host, and one that lacks AVX2.
fn hosts(kind: &str) -> Hosts {
    let dir = scratch();
    let [here, there] = ["here", "there"].map(|name| dir.path().join(name));
    create(&here, "web", kind);
    older(&there);
    let direct = false;
    Hosts {
        dir,
        here,
        there,
        direct,
    }
}

#[test]
fn a_restore_names_what_is_missing_and_leaves_no_domain() {
    for kind in KINDS {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let (image, other) = (dir.path().join("web.save"), dir.path().join("other"));
        run(["save", "-c", &backend(&host), "web", arg(&image)]).code(0);
        older(&other);
        let backend = backend(&other);
        let restore = ["restore", &backend, arg(&image)];
        // ERMS is not reported, because it is only a hint.
        run(restore)
            .code(1)
            .stderr_has("it lacks AVX2;")
            .stderr_has("--force");
        assert_eq!(state(&other, "web"), None, "{kind}");
        let forced = run(restore.iter().chain(&["--force"])).code(0);
        let forced = forced.stderr_has("a CPU feature that this host lacks: AVX2 (bit 5 of CPUID");
        assert!(!forced.stderr.contains("ERMS"), "{forced:?}");
        assert_eq!(state(&other, "web").as_deref(), Some("running"), "{kind}");
    }
}

#[test]
fn a_restore_without_libxl_compares_as_well() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let (image, other) = (dir.path().join("web.save"), dir.path().join("other"));
    run(["save", "-c", &backend(&host), "web", arg(&image)]).code(0);
    older(&other);
    let xen = format!("mock-xen:{}", arg(&other));
    let restore = ["restore", "--direct", "--backend", &xen, arg(&image)];
    run(restore).code(1).stderr_has("it lacks AVX2;");
    assert_eq!(state(&other, "web"), None);
    run(restore.iter().chain(&["--force"])).code(0);
}

/// The receiver refuses at the policy record. The sender is told why, and its guest has not even
/// been asked to suspend.
#[test]
fn a_migration_names_what_is_missing_before_the_guest_suspends() {
    for kind in KINDS {
        let hosts = hosts(kind);
        let socket = hosts.path("socket");
        let receiver = hosts.receiver(&socket, &[]);
        let to = format!("unix:{}", socket.display());
        let here = backend(&hosts.here);
        let sender = staged(hosts.dir.path(), ["migrate", &here, "web", &to]);
        let (sent, phases) = sender.end();
        sent.code(1)
            .stderr_has("it lacks AVX2;")
            .stderr_has("--force")
            .stderr_has("web runs");
        assert!(!phases.is_empty(), "it announces none");
        assert!(!phases.contains(&"suspending".to_owned()), "{phases:?}");
        receiver
            .end()
            .code(1)
            .stderr_has("it lacks AVX2;")
            .stderr_has("the sender keeps it");
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

#[test]
fn a_receiver_that_is_forced_takes_it() {
    let hosts = hosts("pvh");
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, &["--force"]);
    hosts.sender(&socket, &[]).end().code(0);
    receiver
        .end()
        .code(0)
        .stderr_has("a CPU feature that this host lacks: AVX2");
    assert_eq!(hosts.domains(), [vec![], vec!["web running".to_owned()]]);
}

#[test]
fn what_stands_by_compares_as_well() {
    let hosts = hosts("pvh");
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, &["-r"]);
    let to = format!("unix:{}", socket.display());
    let here = backend(&hosts.here);
    let sender = Running::start(["remus", &here, "web", &to]);
    receiver.end().code(1).stderr_has("it lacks AVX2;");
    sender.end();
    assert_eq!(domains(&hosts.here), ["web running"]);
    assert_eq!(domains(&hosts.there), [""; 0]);
}

/// The sender passes `--force` to a receiver that it starts itself.
#[test]
fn force_reaches_a_receiver_that_a_command_starts() {
    let hosts = hosts("pvh");
    let ssh = hosts.path("ssh");
    let there = arg(&hosts.there);
    let script = format!("#!/bin/sh\nshift\nXSR_BACKEND=mock:{there} exec \"$@\"\n");
    fs::write(&ssh, script).unwrap();
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
    let receive = format!("{} migrate-receive", env!("CARGO_BIN_EXE_xsr"));
    let (here, ssh) = (backend(&hosts.here), arg(&ssh));
    let migrate = ["migrate", &here, "-s", ssh, "--receiver", &receive];
    run(migrate.iter().chain(&["web", "example"]))
        .code(1)
        .stderr_has("it lacks AVX2;")
        .stderr_has("web runs");
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    run(migrate.iter().chain(&["--force", "web", "example"])).code(0);
    assert_eq!(hosts.domains(), [vec![], vec!["web running".to_owned()]]);
}

#[test]
fn a_mock_machine_has_the_processor_that_it_was_made_with() {
    let dir = scratch();
    let rich = dir.path().join("rich");
    run(["mock", "host", "--host", arg(&rich), "--cpu=+avx512f"]).code(0);
    create(&rich, "web", "pvh");
    let image = dir.path().join("web.save");
    run(["save", &backend(&rich), "web", arg(&image)]).code(0);
    run(["inspect", "--fields", arg(&image)])
        .code(0)
        .stdout_has("avx512f");
    let usual = backend(&dir.path().join("usual"));
    run(["restore", &usual, arg(&image)])
        .code(1)
        .stderr_has("it lacks AVX512F;");
    run(["restore", &backend(&rich), arg(&image)]).code(0);
    run(["mock", "host", "--host", arg(&rich)])
        .code(1)
        .stderr_has("not empty");
    let bad = dir.path().join("bad");
    run(["mock", "host", "--host", arg(&bad), "--cpu=-avx1024"])
        .code(64)
        .stderr_has("-avx1024");
    assert!(!bad.exists());
}
