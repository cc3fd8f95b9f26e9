//! Remus with a failure, or the end of the guest, at one end while the other is well.

use std::net::Shutdown;
use std::path::PathBuf;

use xsr_xen_backend::ShutdownReason;
use xsr_xen_backend::mock::{MockHost, WorkloadEnd, WorkloadSpec};

use super::*;
use crate::common::migration::{GO, domain_dir};

/// Make a mock machine's disk refuse a file, by a directory in place of the file that is written
/// first.
fn refuse(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap().to_owned();
    name.push(".new");
    let instead = file.with_file_name(name);
    // The machine may be writing that file at this moment.
    until("a place for a directory", || {
        fs::create_dir(&instead).is_ok()
    });
    instead
}

#[test]
fn a_guest_that_shuts_down_by_itself_ends_the_protection_where_it_is() {
    for (kind, how) in [("pv", "poweroff"), ("hvm", "reboot"), ("pvh", "crash")] {
        let hosts = Hosts::with(kind, &BUSY);
        let [sender, receiver] = protected(&hosts, &[]);
        // Once a checkpoint is complete there, however long that takes.
        shut_down(&hosts.here, how);
        let sent = sender.end().code(1);
        let said = format!("web has shut down ({how}) here");
        assert!(sent.stderr.contains(&said), "{sent:?}");
        receiver
            .end()
            .code(1)
            .stderr_has("the sender has ended the protection, and keeps");
        assert_eq!(hosts.domains(), [vec!["web shutdown".to_owned()], vec![]]);
    }
}

/// Have `web` shut down by itself.
fn shut_down(host: &Path, how: &str) {
    let reason = match how {
        "poweroff" => ShutdownReason::Poweroff,
        "reboot" => ShutdownReason::Reboot,
        _ => ShutdownReason::Crash,
    };
    let host = MockHost::open(host).unwrap();
    let work = WorkloadSpec {
        end: Some(WorkloadEnd { after: 0, reason }),
        ..WorkloadSpec::writes(1, 1, 1)
    };
    let domid = host.find("web").unwrap();
    let mut work = host.workload(domid, &work).unwrap();
    // Not while a checkpoint has it suspended.
    until("its end", || {
        work.step(1).unwrap();
        host.show(domid).unwrap().shutdown == Some(reason)
    });
}

#[test]
fn a_domain_stands_still_before_anybody_is_waited_for() {
    let given_back = [&[1], GO].concat();
    for (outcome, code, left) in [
        (&given_back[..], 1, "web running"),
        (&[0], 1, "web--migratedaway paused"),
        (&[], 3, "web paused"),
    ] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let mut sender = sender(&hosts, &socket, &["--on-loss", "pause"]);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(BANNER).unwrap();
        let mut from = stream.try_clone().unwrap();
        let reader = std::thread::spawn(move || from.read_to_end(&mut Vec::new()).unwrap());
        sender.line("is protected by");
        // The start of a message, whose meaning is not yet known.
        stream.write_all(&REPORT[..1]).unwrap();
        until("the domain paused", || state(&hosts.here)["pauses"] == 1);
        stream.write_all(&REPORT[1..]).unwrap();
        stream.write_all(outcome).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let sent = sender.end();
        reader.join().unwrap();
        assert_eq!(sent.code, code, "{sent:?}");
        assert_eq!(hosts.domains()[0], [left], "{sent:?}");
    }
}

/// The stored state of a host's only domain.
fn state(host: &Path) -> serde_json::Value {
    let state = fs::read(domain_dir(host).join("state.json")).unwrap();
    serde_json::from_slice(&state).unwrap()
}

/// Read to the end of the first checkpoint, and not a byte further.
fn read_checkpoint(stream: impl Read) {
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    loop {
        let step = walk.next_step().unwrap().unwrap();
        if matches!(
            step.content,
            Content::LibxlRecord(LibxlRecord::CheckpointEnd)
        ) {
            break;
        }
    }
}

/// In the middle of a checkpoint that has partly arrived: with the domain suspended, or after it
/// has been resumed and while the buffered part is sent.
#[test]
fn a_receiver_that_reads_nothing_any_more_is_lost_and_the_domain_runs_on() {
    for (buffer, on_loss, left) in [
        ("--no-buffer", "run", "web running"),
        ("--no-buffer", "pause", "web paused"),
        ("--buffer=64M", "run", "web running"),
        ("--buffer=64M", "pause", "web paused"),
    ] {
        let hosts = Hosts::with("pvh", &["--dirty-rate", "200000", "--working-set", "4M"]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let options = [buffer, "--on-loss", on_loss, "--answer-timeout", "1"];
        let mut sender = sender(&hosts, &socket, &options);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(BANNER).unwrap();
        read_checkpoint(&stream);
        // The receiver hangs: its end of the connection stays open.
        sender.until_its_end();
        let sent = sender.end();
        assert_eq!(sent.code, 3, "{sent:?}");
        let said = "the other end has taken nothing for 1 s";
        assert!(sent.stderr.contains(said), "{sent:?}");
        assert_eq!(hosts.domains()[0], [left], "{buffer}: {sent:?}");
    }
}

#[test]
fn a_domain_that_cannot_be_resumed_when_its_receiver_is_lost_is_said_to_be_suspended() {
    for (on_loss, words) in [
        ("run", "Here it is suspended"),
        ("pause", "Here it could not be paused"),
    ] {
        let hosts = Hosts::with("pvh", &["--dirty-rate", "200000", "--working-set", "4M"]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let options = ["--no-buffer", "--on-loss", on_loss];
        let sender = sender(&hosts, &socket, &options);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(BANNER).unwrap();
        read_checkpoint(&stream);
        // The next checkpoint, which is larger than a socket can buffer, is not read. Then the
        // machine's disk refuses writes, and the domain stays in its state.
        let mut refused = None;
        until("the domain suspended for good", || {
            let suspended = || state(&hosts.here)["shutdown"] == "suspend";
            if !suspended() {
                return false;
            }
            let instead = refuse(&domain_dir(&hosts.here).join("state.json"));
            if !suspended() {
                fs::remove_dir(instead).unwrap();
                return false;
            }
            refused = Some(instead);
            true
        });
        drop(stream);
        let sent = sender.end();
        assert_eq!(sent.code, 3, "{sent:?}");
        assert!(sent.stderr.contains(words), "{sent:?}");
        fs::remove_dir(refused.unwrap()).unwrap();
        assert_eq!(hosts.domains()[0], ["web suspended"], "{sent:?}");
    }
}

/// A signal in the middle of the first checkpoint: there is nothing to take back, and the domain
/// does not run.
#[test]
fn a_domain_that_cannot_be_resumed_when_a_signal_ends_its_first_checkpoint_is_no_success() {
    let hosts = Hosts::with("pvh", &["--dirty-rate", "200000", "--working-set", "4M"]);
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let mut sender = sender(&hosts, &socket, &["--no-buffer"]);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(BANNER).unwrap();
    let mut room = [0; 1 << 16];
    until("the domain suspended", || {
        let suspended = state(&hosts.here)["shutdown"] == "suspend";
        assert!(suspended || stream.read(&mut room).unwrap() > 0);
        suspended
    });
    let refused = refuse(&domain_dir(&hosts.here).join("state.json"));
    sender.signal(Signal::SIGINT);
    sender.line("interrupting");
    drop(stream);
    let sent = sender.end();
    assert_eq!(sent.code, 1, "{sent:?}");
    let said = "web is suspended here, and runs nowhere else: `";
    assert!(sent.stderr.contains(said), "{sent:?}");
    fs::remove_dir(refused).unwrap();
    assert_eq!(hosts.domains()[0], ["web suspended"], "{sent:?}");
}

/// The withdrawal cannot be sent, and the domain is paused. Then the other end gives it back, and
/// it cannot be unpaused.
#[test]
fn a_domain_that_cannot_be_unpaused_when_it_is_given_back_is_no_success() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let to = format!("unix:{}", socket.display());
    let backend = backend(&hosts.here);
    let mut sender = Running::start([
        "remus",
        "-i",
        "600000",
        "--on-loss",
        "pause",
        &backend,
        "web",
        &to,
    ]);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(BANNER).unwrap();
    read_checkpoint(&stream);
    sender.line("is protected by");
    stream.shutdown(Shutdown::Read).unwrap();
    sender.signal(Signal::SIGINT);
    until("the domain paused", || state(&hosts.here)["pauses"] == 1);
    let refused = refuse(&domain_dir(&hosts.here).join("state.json"));
    stream.write_all(&[REPORT, &[1], GO].concat()).unwrap();
    let sent = sender.end();
    assert_eq!(sent.code, 1, "{sent:?}");
    let said = "web is paused here, and runs nowhere else: unpausing it";
    assert!(sent.stderr.contains(said), "{sent:?}");
    fs::remove_dir(refused).unwrap();
    assert_eq!(hosts.domains()[0], ["web paused"], "{sent:?}");
}

/// Then the first checkpoint does not count, and there is no domain.
#[test]
fn emulators_that_cannot_be_kept_at_first_leave_the_domain_at_the_sender() {
    let hosts = Hosts::with("hvm", &[]);
    let stream = stream(&hosts, "1");
    let end = ends(&stream, "hvm")[0];
    let mut receiver = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["migrate-receive", "-r", "-q", &backend(&hosts.there)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(hosts.path("stderr")).unwrap())
        .spawn()
        .unwrap();
    let mut to = receiver.stdin.take().unwrap();
    let mut from = receiver.stdout.take().unwrap();
    hear(&mut from, BANNER);
    to.write_all(&stream[..end - 1]).unwrap();
    let config = || domain_dir(&hosts.there).join("blobs/userdata-libxl-json");
    until("a domain there", || {
        hosts.there.join("domains").read_dir().unwrap().count() > 0 && config().exists()
    });
    refuse(&config().with_file_name("userdata-libxl-emulators"));
    to.write_all(&stream[end - 1..end]).unwrap();
    hear(&mut from, &[REPORT, &[1], GO].concat());
    assert_eq!(receiver.wait().unwrap().code(), Some(1));
    let said = fs::read_to_string(hosts.path("stderr")).unwrap();
    assert!(said.contains("keeping the emulators' state"), "{said}");
    assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
}

#[test]
fn emulators_that_cannot_be_kept_later_leave_the_domain_at_the_sender_alone_or_it_is_said() {
    for destroyed in [true, false] {
        let hosts = Hosts::with("hvm", &[]);
        let [before, after] = ["before", "after"].map(|name| hosts.path(name));
        fs::write(&before, hosts.image()).unwrap();
        let [sender, receiver] = protected(&hosts, &[]);
        let dir = domain_dir(&hosts.there);
        // Nor can the copy be destroyed, if the remains of an earlier one cannot be removed.
        let dead = dir.with_extension("dead");
        if !destroyed {
            fs::write(&dead, b"").unwrap();
        }
        let refused = refuse(&dir.join("blobs/userdata-libxl-emulators"));
        let sent = sender.end();
        let received = receiver.end().code(1);
        assert!(
            received.stderr.contains("keeping the emulators' state"),
            "{received:?}"
        );
        let left: &[String] = if destroyed {
            assert_eq!(sent.code, 1, "{sent:?}");
            assert!(
                sent.stderr
                    .contains("the other end has failed: keeping the emulators' state"),
                "{sent:?}"
            );
            &[]
        } else {
            fs::remove_file(dead).unwrap();
            fs::remove_dir(refused).unwrap();
            assert_eq!(sent.code, 3, "{sent:?}");
            let said = "made for web, is left here, paused";
            assert!(received.stderr.contains(said), "{received:?}");
            &["web--incoming paused".to_owned()]
        };
        assert_eq!(hosts.domains()[1], left);
        assert_eq!(hosts.domains()[0], ["web running"]);
        fs::write(&after, hosts.image()).unwrap();
        run(["diff", arg(&before), arg(&after)]).code(0);
    }
}
