//! Signals at each phase of a save, and ignored ones.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::thread;
use std::time::Duration;

use super::*;

/// Send `signals` to the helper, which announces its phases to `listener`, when it enters `phase`
/// for the `nth` time (from 1), the second signal a little later. The helper goes on once it has
/// received them.
fn at_phase(
    listener: UnixListener,
    helper: Pid,
    phase: &'static str,
    signals: [Signal; 2],
    (gap, group): (Duration, bool),
) -> thread::JoinHandle<bool> {
    let send = move |signal| match group {
        true => signal::killpg(helper, signal),
        false => signal::kill(helper, signal),
    };
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap()).lines();
        let mut sent = false;
        for line in lines.map_while(Result::ok) {
            if line.starts_with(phase) && !std::mem::replace(&mut sent, true) {
                send(signals[0]).unwrap();
                thread::sleep(gap);
                // The helper may have ended.
                send(signals[1]).unwrap_or_default();
                until_heard(helper);
            }
            if socket.write_all(b"\n").is_err() {
                break;
            }
        }
        sent
    })
}

/// Wait until no signal is pending for the process any more.
fn until_heard(helper: Pid) {
    loop {
        let Ok(status) = fs::read_to_string(format!("/proc/{helper}/status")) else {
            return;
        };
        let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
        if pending.is_none_or(|mask| mask.trim().chars().all(|c| c == '0')) {
            return;
        }
        thread::yield_now();
    }
}

fn phases(command: &mut Command, dir: &Path, n: usize) -> UnixListener {
    let path = dir.join(format!("phases-{n}"));
    command.env("XSR_MOCK_PHASES", &path);
    UnixListener::bind(path).unwrap()
}

#[test]
fn two_signals_at_any_phase_of_a_save_break_it_off_in_good_order() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let ask = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let pairs = ask.into_iter().flat_map(|a| ask.map(|b| [a, b]));
    let mut pairs = pairs.collect::<Vec<_>>().into_iter().cycle();
    let mut n = 0;
    for (live, phase) in [
        (1, "log-dirty-on"),
        (1, "map"),
        (1, "read-dirty"),
        (1, "suspending"),
        (1, "suspended"),
        (0, "map"),
        (0, "suspended"),
    ] {
        // The last as when a terminal is closed, which is late at times.
        for (milliseconds, group) in [(0, false), (10, true), (50, false), (900, true)] {
            n += 1;
            let signals = match milliseconds {
                900 => [Signal::SIGHUP; 2],
                _ => pairs.next().unwrap(),
            };
            let at = format!("live {live}, {phase}, {signals:?} {milliseconds} ms apart");
            let stream = File::create(dir.path().join("s")).unwrap();
            let mut command = command(&path, &save_args(domid, live), stream, "");
            let listener = phases(&mut command, dir.path(), n);
            let child = command.process_group(0).spawn().unwrap();
            let pid = Pid::from_raw(child.id().cast_signed());
            let how = (Duration::from_millis(milliseconds), group);
            let asking = at_phase(listener, pid, phase, signals, how);
            let run = play(child, fine);
            assert!(asking.join().unwrap(), "{at}");
            assert_eq!(run.completed(), (-1, Errno::ECANCELED), "{at}: {run:?}");
            let numbers = run.numbers();
            if live == 1 {
                // The device model's log is off again.
                let logs = numbers.iter().filter(|number| **number == LOGDIRTY);
                assert_eq!(logs.count(), 2, "{at}: {run:?}");
            }
            let host = MockHost::open(&path).unwrap();
            let domain = host.domain(domid).unwrap();
            // A suspended guest is libxl's to resume.
            if domain.info().unwrap().shutdown.is_some() {
                domain.resume().unwrap();
            }
        }
    }
}

/// SIGSTKFLT, SIGABRT, real-time signals: none leaves a dirty log on.
#[test]
fn every_signal_that_would_end_a_save_breaks_it_off() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    for (n, number) in [16, 6, 14, 34, 64].into_iter().enumerate() {
        let stream = File::create(dir.path().join("s")).unwrap();
        let mut command = command(&path, &save_args(domid, 1), stream, "");
        let listener = phases(&mut command, dir.path(), n);
        let child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let asking = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let lines = BufReader::new(socket.try_clone().unwrap()).lines();
            for line in lines.map_while(Result::ok) {
                if line.starts_with("log-dirty-on") {
                    let kill = format!("kill -{number} {pid}");
                    assert!(
                        Command::new("sh")
                            .args(["-c", &kill])
                            .status()
                            .unwrap()
                            .success()
                    );
                    until_heard(pid);
                }
                if socket.write_all(b"\n").is_err() {
                    break;
                }
            }
        });
        let run = play(child, fine);
        asking.join().unwrap();
        assert_eq!(run.completed(), (-1, Errno::ECANCELED), "{number}: {run:?}");
        let logs = run.numbers().iter().filter(|is| **is == LOGDIRTY).count();
        assert_eq!(logs, 2, "{number}: {run:?}");
    }
}

#[test]
fn a_save_leaves_ignored_signals_ignored() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let args = format!(
        "--ignore-signal=HUP --ignore-signal=INT {} {}",
        env!("CARGO_BIN_EXE_xsr-save-helper-mock"),
        save_args(domid, 0)
    );
    let mut command = started("env", &args, "");
    command.env(
        "XSR_HELPER_TEST_BACKEND",
        format!("mock:{}", path.display()),
    );
    command.stderr(File::create(dir.path().join("s")).unwrap());
    let listener = phases(&mut command, dir.path(), 1);
    let child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let signals = [Signal::SIGHUP, Signal::SIGINT];
    let asking = at_phase(listener, pid, "suspended", signals, (Duration::ZERO, false));
    let run = play(child, fine);
    assert!(asking.join().unwrap());
    assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
}

#[test]
fn sigterm_is_heard_though_it_was_ignored() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let helper = |args: &str, n: usize| {
        let helper = env!("CARGO_BIN_EXE_xsr-save-helper-mock");
        let mut command = started("env", &format!("--ignore-signal=TERM {helper} {args}"), "");
        command.env(
            "XSR_HELPER_TEST_BACKEND",
            format!("mock:{}", path.display()),
        );
        let listener = phases(&mut command, dir.path(), n);
        (command, listener)
    };
    let stream = dir.path().join("s");
    let signals = [Signal::SIGTERM; 2];
    let (mut command, listener) = helper(&save_args(domid, 0), 1);
    let child = command
        .stderr(File::create(&stream).unwrap())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let asking = at_phase(listener, pid, "suspended", signals, (Duration::ZERO, false));
    assert_eq!(play(child, fine).completed(), (-1, Errno::ECANCELED));
    assert!(asking.join().unwrap());
    // And a restore ends.
    let host = MockHost::open(&path).unwrap();
    host.domain(domid).unwrap().resume().unwrap();
    drop(host);
    let saved = start(&path, &save_args(domid, 0), File::create(&stream).unwrap());
    assert_eq!(play(saved, fine).completed(), (0, Errno::from_raw(0)));
    let host = MockHost::open(&path).unwrap();
    let to = host.create_domain(GuestKind::Pvh, 2, 8192).unwrap();
    drop(host);
    let args = format!(
        "--restore-domain 7 -1 {} 1 0 2 0 {RESTORE_CALLBACKS} 0",
        to.0
    );
    let (mut command, listener) = helper(&args, 2);
    let child = command
        .stderr(File::open(&stream).unwrap())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let asking = at_phase(listener, pid, "populate", signals, (Duration::ZERO, false));
    let run = play(child, fine);
    assert!(asking.join().unwrap());
    assert_eq!(run.code, Some(255), "{run:?}");
}
