//! Several commands on one mock host at the same time, one of which has it open; and a host that
//! must not be trusted.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use xsr_xen_backend::Host as _;
use xsr_xen_backend::mock::MockHost;

use crate::common::migration::{Hosts, Running};
use crate::common::phases::staged;
use crate::common::{arg, backend, create, run, scratch, state};

fn mock(what: &[&str], host: &Path) -> crate::common::Ran {
    run([&["mock"], what, &["--host", arg(host)]].concat())
}

#[test]
fn what_another_command_works_on_is_listed_shown_and_changed() {
    let dir = scratch();
    let host = dir.path().join("host");
    create(&host, "web", "pvh");
    create(&host, "mail", "pv");
    let to = backend(&host);
    let args = ["remus", "-F", "-b", "-i", "1", &to, "web", "absent"];
    let mut protecting = staged(dir.path(), args);
    assert!(protecting.hold("checkpoint", 2));
    let refused = format!("in use by process {} (xsr remus web)", protecting.pid());
    for second in [
        ["save", &to, "web", arg(&dir.path().join("web.save"))],
        ["migrate", &to, "web", "absent"],
        ["remus", &to, "web", "absent"],
    ] {
        run(second).code(1).stderr_has(&refused);
    }
    for second in [
        &["resume", "web"][..],
        &["pause", "web"],
        &["unpause", "web"],
        &["workload", "web", "--dirty-rate", "9"],
        &["rename", "web", "site"],
    ] {
        mock(second, &host).code(1).stderr_has(&refused);
    }
    let list = mock(&["list"], &host).code(0);
    list.stdout_has("web").stdout_has("mail");
    let show = mock(&["show", "mail"], &host).code(0);
    show.stdout_has("mail (domain 2)").stdout_has("libxl-json");
    mock(&["show", "--json", "web"], &host).code(0).json();
    mock(&["pause", "mail"], &host).code(0);
    assert_eq!(state(&host, "mail").as_deref(), Some("paused"));
    mock(&["unpause", "mail"], &host).code(0);
    mock(&["resume", "mail"], &host)
        .code(1)
        .stderr_has("it runs");
    mock(&["rename", "mail", "post"], &host).code(0);
    mock(&["destroy", "mail"], &host)
        .code(1)
        .stderr_has("no domain");
    mock(&["destroy", "post"], &host).code(0);
    // Even the domain that another command is working on can be destroyed; that command reports
    // that it is gone.
    mock(&["destroy", "web"], &host).code(0);
    let list = mock(&["list", "--json"], &host).code(0).json();
    assert_eq!(list["domains"], serde_json::json!([]));
    let (ran, _) = protecting.end();
    ran.code(1).stderr_has("destroyed");
}

/// Each command works on a domain of its own, on one host.
#[test]
fn two_domains_of_one_host_are_protected_at_a_time() {
    let dir = scratch();
    let host = dir.path().join("host");
    let to = backend(&host);
    let busy = ["--memory", "16M", "--dirty-rate", "2000"];
    for name in ["web", "mail"] {
        mock(&[&["create", name][..], &busy].concat(), &host).code(0);
    }
    let [a, b] = ["a", "b"].map(|there| backend(&dir.path().join(there)));
    let socket = format!("unix:{}", dir.path().join("socket").display());
    let args = ["migrate-receive", "-r", &a, "--listen", &socket];
    let mut receiver = Running::start(args);
    receiver.line("waiting at");
    let args = ["remus", "-i", "10", &to, "web", &socket];
    let mut protecting = staged(dir.path(), args);
    assert!(protecting.hold("checkpoint", 2));
    let other = format!("{} migrate-receive -q -r {b}", env!("CARGO_BIN_EXE_xsr"));
    let args = ["remus", "-i", "10", "--epochs", "3", &to, "-s", "", "mail"];
    let ran = run(args.iter().chain(&[other.as_str()])).code(0);
    ran.stderr_has("mail runs on here");
    // A domain is restored while another on the host is saved.
    let image = dir.path().join("mail.save");
    run(["save", "-c", &to, "mail", arg(&image)]).code(0);
    run(["restore", "--name", "copy", &to, arg(&image)]).code(0);
    assert_eq!(state(&host, "copy").as_deref(), Some("running"));
    protecting.signal(Signal::SIGTERM, false);
    let (ran, _) = protecting.end();
    ran.code(0)
        .stderr_has("web runs on here, and is no longer protected");
    receiver.end().code(1);
    for name in ["web", "mail", "copy"] {
        assert_eq!(state(&host, name).as_deref(), Some("running"), "{name}");
        let image = dir.path().join(name);
        run(["save", &to, name, arg(&image)]).code(0);
        run(["verify", arg(&image)]).code(0);
    }
    let list = mock(&["list", "--json"], &host).code(0).json();
    assert_eq!(list["domains"], serde_json::json!([]));
}

#[test]
fn a_domain_is_made_and_told_what_to_do_beside_another_command() {
    let dir = scratch();
    let host = dir.path().join("host");
    create(&host, "web", "pvh");
    let to = backend(&host);
    let args = [
        "remus", "-F", "-b", "-i", "1", "--epochs", "4", &to, "web", "x",
    ];
    let mut protecting = staged(dir.path(), args);
    assert!(protecting.hold("checkpoint", 2));
    let guest = ["create", "mail", "--memory", "16M", "--dirty-rate", "100"];
    mock(&guest, &host).code(0);
    mock(&guest, &host).code(1).stderr_has("exists already");
    mock(&["create", "much", "--memory", "900G"], &host).code(1);
    mock(&["workload", "mail", "--dirty-rate", "7"], &host).code(0);
    mock(&["workload", "post"], &host)
        .code(1)
        .stderr_has("no domain");
    let show = mock(&["show", "mail"], &host).code(0);
    show.stdout_has("writes   7 pages").stdout_has("libxl-json");
    protecting.end().0.code(0);
    // Both are complete, and outlive both commands.
    for name in ["web", "mail"] {
        assert_eq!(state(&host, name).as_deref(), Some("running"));
        let file = dir.path().join(name);
        run(["save", &to, name, arg(&file)]).code(0);
        run(["verify", arg(&file)]).code(0);
    }
}

#[test]
fn a_command_that_ends_is_in_no_others_way() {
    let hosts = Hosts::with("pvh", &[]);
    create(&hosts.here, "mail", "pvh");
    let file = hosts.path("web.save");
    let to = backend(&hosts.here);
    for turn in 0..12_u32 {
        let mut saving = staged(hosts.dir.path(), ["save", &to, "-c", "web", arg(&file)]);
        assert!(saving.hold("resumed", 1));
        std::thread::scope(|scope| {
            let here = &hosts.here;
            let asking = scope.spawn(move || {
                let name = format!("mail{turn}");
                let create = ["create", &name, "--memory", "8M"];
                for what in [
                    &["list"][..],
                    &create,
                    &["pause", "mail"],
                    &["unpause", "mail"],
                ] {
                    mock(what, here).code(0);
                }
                mock(&["destroy", &name], here).code(0);
            });
            saving.end().0.code(0);
            asking.join().unwrap();
        });
    }
    assert_eq!(state(&hosts.here, "mail").as_deref(), Some("running"));
}

/// Whatever has resumed it: it must not be reported as suspended.
#[test]
fn a_domain_that_another_program_has_resumed_is_said_to_run_on() {
    let hosts = Hosts::with("pv", &[]);
    let file = hosts.path("web.save");
    let to = backend(&hosts.here);
    let mut saving = staged(hosts.dir.path(), ["save", &to, "web", arg(&file)]);
    assert!(saving.hold("suspended", 1));
    // As xl does, which does not know our locks.
    let host = MockHost::open(&hosts.here).unwrap();
    let web = host.find("web").unwrap();
    host.domain(web).unwrap().resume().unwrap();
    let (ran, _) = saving.end();
    let ran = ran.code(1).stderr_has("web runs on");
    assert!(!ran.stderr.contains("suspended: resume"), "{ran:?}");
    assert!(!file.exists());
    assert_eq!(state(&hosts.here, "web").as_deref(), Some("running"));
}

#[test]
fn a_domain_that_is_destroyed_beside_its_save_is_gone() {
    let hosts = Hosts::with("pv", &[]);
    let file = hosts.path("web.save");
    let to = backend(&hosts.here);
    for phase in [
        "output-made",
        "log-dirty-on",
        "precopy",
        "suspended",
        "tail",
    ] {
        if state(&hosts.here, "web").is_none() {
            create(&hosts.here, "web", "pv");
        }
        let args = ["save", "--live", &to, "web", arg(&file)];
        let mut saving = staged(hosts.dir.path(), args);
        assert!(saving.hold(phase, 1), "{phase}");
        mock(&["destroy", "web"], &hosts.here).code(0);
        let (ran, _) = saving.end();
        ran.code(1);
        assert_eq!(state(&hosts.here, "web"), None, "{phase}");
        assert!(!file.exists(), "{phase}");
    }
}

/// The save was going to destroy it anyway.
#[test]
fn a_domain_that_is_destroyed_once_its_image_is_complete_is_saved() {
    let hosts = Hosts::with("pv", &[]);
    let file = hosts.path("web.save");
    let to = backend(&hosts.here);
    let mut saving = staged(hosts.dir.path(), ["save", &to, "web", arg(&file)]);
    assert!(saving.hold("output-named", 1));
    mock(&["destroy", "web"], &hosts.here).code(0);
    let (ran, _) = saving.end();
    ran.code(0);
    assert_eq!(state(&hosts.here, "web"), None);
    run(["verify", arg(&file)]).code(0);
}

fn modes(dir: &Path) -> Vec<(PathBuf, u32)> {
    let mut all = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        if about.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        all.push((path, about.permissions().mode() & 0o777));
    }
    all
}

#[test]
fn a_host_is_its_owners_alone_whatever_the_umask() {
    let dir = scratch();
    for mask in ["000", "022", "077", "0277"] {
        let host = dir.path().join(mask);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &format!("umask {mask}; exec \"$@\""), "sh"]);
        command.arg(env!("CARGO_BIN_EXE_xsr"));
        command.args([
            "mock",
            "create",
            "web",
            "--memory",
            "8M",
            "--host",
            arg(&host),
        ]);
        assert!(command.status().unwrap().success());
        for (path, mode) in modes(&host) {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode, expected, "{mode:o} {}, umask {mask}", path.display());
        }
    }
}

#[test]
fn a_link_in_a_host_is_not_followed() {
    let dir = scratch();
    let [good, evil, victim] = ["good", "evil", "victim"].map(|name| dir.path().join(name));
    create(&good, "web", "pvh");
    for name in ["lock", "memory", "open"] {
        fs::create_dir(&evil).unwrap();
        fs::create_dir(evil.join("domains")).unwrap();
        fs::copy(good.join("host.json"), evil.join("host.json")).unwrap();
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, evil.join(name)).unwrap();
        for refused in [
            mock(&["list"], &evil),
            run(["save", &backend(&evil), "web", "-"]),
        ] {
            refused.code(1).stderr_has("is a symbolic link");
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        fs::remove_dir_all(&evil).unwrap();
    }
    fs::set_permissions(&good, fs::Permissions::from_mode(0o777)).unwrap();
    mock(&["list"], &good)
        .code(1)
        .stderr_has("others may write to it");
}
