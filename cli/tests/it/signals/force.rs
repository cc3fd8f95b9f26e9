//! Signals that stay ignored, ending at once, and signals that must not be delayed.

use super::*;
use crate::common::migration::until;

/// `nohup`, and a background job of a script.
#[test]
fn what_was_ignored_stays_ignored() {
    let hosts = Hosts::with("pvh", &[]);
    let file = hosts.path("web.save");
    let here = backend(&hosts.here);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP INT QUIT 40; exec \"$@\"", "sh"]);
    command.arg(env!("CARGO_BIN_EXE_xsr"));
    command.args(["save", &here, "-c", "web", arg(&file)]);
    let mut command = staged_command(hosts.dir.path(), command);
    assert!(command.hold("suspended", 1));
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        command.signal(signal, false);
    }
    command.signal_number(40);
    let (ran, _) = command.end();
    assert_eq!(ran.stderr, "");
    ran.code(0);
    assert!(file.exists());
}

/// Including those that Rust has no name for, and those that report a crash.
#[test]
fn every_signal_that_ends_a_process_is_a_request() {
    let hosts = Hosts::with("pvh", &[]);
    let file = hosts.path("web.save");
    let here = backend(&hosts.here);
    let standard = [
        1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14, 15, 16, 24, 26, 27, 29, 30, 31,
    ];
    for number in standard.into_iter().chain([34, 40, 64]) {
        let mut command = staged(hosts.dir.path(), ["save", &here, "web", arg(&file)]);
        assert!(command.hold("suspended", 1));
        command.signal_number(number);
        command.until_said("interrupting").unwrap();
        let (ran, _) = command.end();
        assert_eq!(ran.code, 1, "signal {number}: {ran:?}");
        no_force(&ran, &format!("signal {number}"));
        assert!(has(&domains(&hosts.here), "web running"), "signal {number}");
        assert!(!file.exists() && partial_files(hosts.dir.path()).is_empty());
    }
}

/// No cleanup is needed.
#[test]
fn a_command_that_writes_nothing_ends_by_the_signal() {
    let hosts = Hosts::with("pvh", &[]);
    let fifo = hosts.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // 128 + N: a real-time signal cannot be raised.
    for (number, code) in [(15, -1), (11, -1), (16, -1), (40, 128 + 40)] {
        let command = Running::start(["verify", arg(&fifo)]);
        command.until_thread("signals");
        command.signal_number(number);
        let ran = command.end();
        assert_eq!(ran.code, code, "signal {number}: {ran:?}");
    }
}

#[test]
fn the_hard_way_out_is_for_who_insists_and_says_what_it_leaves() {
    let hosts = Hosts::with("pvh", &[]);
    let file = hosts.path("web.save");
    let here = backend(&hosts.here);
    for insists in [Signal::SIGINT, Signal::SIGTERM] {
        let mut command = staged(hosts.dir.path(), ["save", &here, "web", arg(&file)]);
        assert!(command.hold("suspended", 1));
        command.signal(Signal::SIGHUP, false);
        let said = command.until_said("interrupting").unwrap();
        assert!(said.contains("press Ctrl-C again to end at once"), "{said}");
        // Longer than the time after which a signal ends the process at once.
        thread::sleep(Duration::from_millis(1100));
        command.signal(Signal::SIGHUP, false);
        assert!(!partial_files(hosts.dir.path()).is_empty());
        command.signal(insists, false);
        // It does not go on: it ends where it is held.
        let ran = command.end_held();
        let ran = ran.code(130).stderr_has("ended at once");
        let partial = partial_files(hosts.dir.path());
        let [partial] = partial.as_slice() else {
            panic!("{partial:?}");
        };
        let ran = ran.stderr_has(&format!("{} is not complete: remove it", partial.display()));
        let resume = format!("xsr mock resume --host {} web", hosts.here.display());
        ran.stderr_has(&format!("web is suspended here: `{resume}`"));
        fs::remove_file(partial).unwrap();
        assert!(has(&domains(&hosts.here), "web suspended"));
        run(["mock", "resume", "web", "--host", arg(&hosts.here)]).code(0);
    }
}

/// A program of `--at-freeze` does not outlive a process that is ended at once.
#[test]
fn the_hard_way_out_kills_the_program_of_at_freeze() {
    use std::os::unix::fs::PermissionsExt as _;
    let hosts = Hosts::with("pvh", &[]);
    let [program, phases, late] = ["program", "phases", "late"].map(|name| hosts.path(name));
    let script = format!(
        "#!/bin/sh\necho $XSR_PHASE >> {}\nif [ $XSR_PHASE = failed ]; then sleep 4; echo > {}; \
         else sleep 60; fi\n",
        phases.display(),
        late.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let (here, file) = (backend(&hosts.here), hosts.path("web.save"));
    let line = ["save", &here, "-c", "--at-freeze", arg(&program)];
    let line = [&line[..], &["--at-freeze-limit", "60", "web", arg(&file)]].concat();
    let command = Running::start(line);
    let told = |phase: &str| fs::read_to_string(&phases).is_ok_and(|all| all.contains(phase));
    until("the program runs", || told("frozen"));
    command.signal(Signal::SIGINT);
    until("the program is told", || told("failed"));
    thread::sleep(Duration::from_millis(1200));
    command.signal(Signal::SIGINT);
    command
        .end()
        .code(130)
        .stderr_has("was not told how the save ended");
    assert!(has(&domains(&hosts.here), "web running"));
    thread::sleep(Duration::from_millis(4200));
    assert!(!late.exists());
}

/// A process cannot be ended at once if the user could not be told that it can.
#[test]
fn no_hard_way_out_without_an_announcement() {
    let hosts = Hosts::with("pvh", &[]);
    let file = hosts.path("web.save");
    let here = backend(&hosts.here);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "exec \"$@\" 2>&-", "sh", env!("CARGO_BIN_EXE_xsr")]);
    command.args(["save", &here, "web", arg(&file)]);
    let mut command = staged_command(hosts.dir.path(), command);
    assert!(command.hold("suspended", 1));
    command.signal(Signal::SIGINT, false);
    thread::sleep(Duration::from_millis(1100));
    command.signal(Signal::SIGINT, false);
    let (ran, _) = command.end();
    ran.code(1);
    assert!(has(&domains(&hosts.here), "web running"));
    assert!(partial_files(hosts.dir.path()).is_empty());
}

/// The file system may take seconds to free the blocks of a large file.
#[test]
fn the_guest_runs_on_before_the_partial_file_is_removed() {
    for layout in ["stream", "mapped"] {
        let hosts = Hosts::with("pvh", &[]);
        let (here, file) = (backend(&hosts.here), hosts.path("web.save"));
        let line = ["save", &here, "--layout", layout, "web", arg(&file)];
        let mut command = staged(hosts.dir.path(), line);
        assert!(command.hold("suspended", 1));
        command.signal(Signal::SIGTERM, false);
        command.until_said("interrupting").unwrap();
        assert!(command.hold("resumed", 1), "{layout}");
        assert_eq!(partial_files(hosts.dir.path()).len(), 1, "{layout}");
        assert!(has(&domains(&hosts.here), "web running"), "{layout}");
        let (ran, _) = command.end();
        ran.code(1).stderr_has("no file was written");
        assert!(partial_files(hosts.dir.path()).is_empty(), "{layout}");
    }
}

#[test]
fn the_hard_way_out_behind_go_says_that_nobody_knows() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    let receiver = listen(&socket);
    let mut sender = hosts.sender(&socket, &[]);
    let (mut peer, _) = receiver.accept().unwrap();
    std::io::Write::write_all(&mut peer, BANNER).unwrap();
    hear_image(&mut peer);
    std::io::Write::write_all(&mut peer, crate::common::migration::READY).unwrap();
    hear(&mut peer, crate::common::migration::GO);
    sender.signal(Signal::SIGTERM);
    let said = sender.line("too late to interrupt");
    assert!(said.contains("waiting for its report"), "{said}");
    assert!(said.contains("press Ctrl-C again"), "{said}");
    sender.signal(Signal::SIGTERM);
    thread::sleep(Duration::from_millis(1100));
    sender.signal(Signal::SIGTERM);
    let ran = sender.end().code(3).stderr_has("ended at once");
    let ran = ran.stderr_has("web is suspended here, as web--migratedaway");
    ran.stderr_has("had been told to run it");
    assert!(has(&domains(&hosts.here), "web--migratedaway suspended"));
}

/// A pipe without a writer or a reader does not delay a signal.
#[test]
fn a_command_that_waits_for_a_pipe_hears() {
    let hosts = Hosts::with("pvh", &[]);
    let out = hosts.path("out");
    let fifo = hosts.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let here = backend(&hosts.here);
    let there = backend(&hosts.there);
    for args in [
        vec!["convert", arg(&fifo), "-o", arg(&out)],
        vec!["edit", arg(&fifo), "-o", arg(&out)],
        vec!["restore", &there, arg(&fifo)],
        vec!["save", &here, "web", arg(&fifo)],
    ] {
        let command = Running::start(&args);
        command.until_thread("signals");
        command.signal(Signal::SIGTERM);
        let ran = command.end();
        assert!(matches!(ran.code, 1 | -1), "{args:?}: {ran:?}");
        assert!(!out.exists());
    }
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    assert!(partial_files(hosts.dir.path()).is_empty());
}

/// `ulimit -f`: a write fails.
#[test]
fn a_file_that_may_not_grow_is_an_error_and_no_signal() {
    let hosts = Hosts::with("pvh", &[]);
    let image = hosts.path("image.save");
    fs::write(&image, hosts.image()).unwrap();
    let out = hosts.path("out");
    let here = backend(&hosts.here);
    for args in [
        vec!["save", "--force", &here, "web", arg(&out)],
        vec!["convert", "--to", "libxl", arg(&image), "-o", arg(&out)],
        vec!["edit", "--name", "mail", arg(&image), "-o", arg(&out)],
        vec!["export", arg(&image), arg(&out)],
    ] {
        let mut command = std::process::Command::new("sh");
        // In units of 512 bytes.
        command.args(["-c", "ulimit -f 4000; exec \"$@\"", "sh"]);
        command.arg(env!("CARGO_BIN_EXE_xsr")).args(&args);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("File too large"), "{args:?}: {said}");
        assert!(!out.exists() && partial_files(hosts.dir.path()).is_empty());
    }
    assert!(has(&domains(&hosts.here), "web running"));
}
