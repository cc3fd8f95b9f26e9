//! Ends that stay connected and send nothing, read nothing, or read too little: each wait has a
//! limit, and the domain is then where it would be after a broken connection.

use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::*;
use crate::common::backend;

const SOON: [&str; 2] = ["--answer-timeout", "1"];

/// Send to a receiver that follows the script, and is then silent until the sender has ended.
fn silent_after(hosts: &Hosts, script: &[Say<'_>], options: &[&str]) -> crate::common::Ran {
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let sender = hosts.sender(&socket, &[&SOON, options].concat());
    let (mut peer, _) = listener.accept().unwrap();
    std::fs::remove_file(&socket).unwrap();
    for say in script {
        play(&mut peer, *say);
    }
    let ran = sender.end();
    drop(peer);
    ran
}

#[test]
fn a_silent_receiver_is_given_up_with_the_domain_running_here() {
    let hosts = Hosts::with("pvh", &[]);
    let (answered, taken) = ("has not answered in 1 s", "has taken nothing for 1 s");
    let scripts: &[(&[Say<'_>], &[&str], &str)] = &[
        (&[], &[], answered),
        (&[Bytes(&BANNER[..9])], &[], answered),
        (&[Bytes(BANNER)], &[], taken),
        // Data in its buffers count as read, so the message may be that it is slow.
        (&[Bytes(BANNER)], &["--no-live"], "the other end "),
        (
            &[Bytes(BANNER), HearSome(400_000)],
            &["--no-live"],
            "the other end ",
        ),
        (&[Bytes(BANNER), HearImage], &[], answered),
        (&[Bytes(BANNER), HearImage], &["--no-live"], answered),
        (
            &[Bytes(BANNER), HearImage, Bytes(&READY[..33])],
            &[],
            answered,
        ),
    ];
    for (script, options, why) in scripts {
        let sent = silent_after(&hosts, script, options);
        let what = format!("{script:?} {options:?}");
        assert_eq!(hosts.domains()[0], HERE, "{what}: {sent:?}");
        sent.code(1).stderr_has(why).stderr_has("web runs on here");
    }
}

#[test]
fn a_silent_receiver_that_has_been_told_to_run_the_domain_is_waited_for_no_longer() {
    for said in [&[][..], &REPORT[..7], REPORT] {
        let hosts = Hosts::with("pvh", &[]);
        let script = [Bytes(BANNER), HearImage, Bytes(READY), HearGo, Bytes(said)];
        let sent = silent_after(&hosts, &script, &[]);
        assert_eq!(hosts.domains()[0], AWAY, "{sent:?}");
        sent.code(3)
            .stderr_has("has not answered in 1 s")
            .stderr_has("It must never run at both ends")
            .stderr_has("xsr mock resume");
    }
}

/// Read a little now and then, until the sender has hung up or `ended` has a message.
fn sip(mut peer: impl Read, ended: &mpsc::Receiver<()>) {
    let mut room = [0; 4096];
    while ended.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
        match peer.read(&mut room) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
}

#[test]
fn a_suspended_guest_is_not_held_by_a_receiver_that_takes_little() {
    let hosts = Hosts::with("pv", &[]);
    for over in ["unix", "tcp"] {
        let (tell, ended) = mpsc::channel();
        let playing;
        let sender;
        if over == "unix" {
            let socket = hosts.path("socket");
            let listener = listen(&socket);
            sender = hosts.sender(&socket, &[&SOON[..], &["--no-live"]].concat());
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(BANNER).unwrap();
            playing = thread::spawn(move || sip(peer, &ended));
        } else {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = format!("tcp:{}", listener.local_addr().unwrap());
            let backend = backend(&hosts.here);
            let args = ["migrate", "--no-live", &backend, "web", &to];
            sender = Running::start(args.iter().chain(&SOON));
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(BANNER).unwrap();
            playing = thread::spawn(move || sip(peer, &ended));
        }
        let sent = sender.end();
        drop(tell);
        playing.join().unwrap();
        assert_eq!(hosts.domains()[0], HERE, "{over}: {sent:?}");
        let sent = sent.code(1).stderr_has("web runs on here");
        // TCP's buffers may take all of a small guest.
        if over == "unix" {
            sent.stderr_has("takes what it is sent too slowly");
        }
    }
}

#[test]
fn a_silent_command_is_given_up_too() {
    let hosts = Hosts::with("pvh", &[]);
    let backend = backend(&hosts.here);
    for (command, options, why) in [
        ("read x", &[][..], "waiting for the banner"),
        (
            "echo 'xl migration receiver ready, send binary domain data.'; exec sleep 5",
            &["--no-live"],
            "the other end ",
        ),
    ] {
        let args = ["migrate", &backend, "-s", "", "web", command];
        let sent = run(args.iter().chain(&SOON).chain(options));
        assert_eq!(hosts.domains()[0], HERE, "{command}: {sent:?}");
        sent.code(1).stderr_has(why).stderr_has("web runs on here");
    }
}

#[test]
fn a_silent_sender_leaves_nothing_behind() {
    let hosts = Hosts::with("pvh", &[]);
    let image = hosts.image();
    for options in [&[][..], &["-r"], &["--colo"]] {
        let places: &[usize] = match options {
            [] => &[0, 9, 4000, image.len() / 2, image.len()],
            _ => &[0, 9, 4000, image.len() / 2],
        };
        for sent in places {
            let with = [&SOON, options].concat();
            let (receiver, peer) = receive_from(&hosts, &image[..*sent], &with);
            let ran = receiver.end();
            drop(peer);
            let what = format!("{options:?} {sent}");
            assert_eq!(hosts.domains()[1], [""; 0], "{what}: {ran:?}");
            let why = match *sent == image.len() {
                true => "has not answered in 1 s",
                false => "has sent nothing for 1 s",
            };
            ran.code(1).stderr_has(why);
        }
    }
}

#[test]
fn a_protected_domain_does_not_wait_for_a_banner() {
    let hosts = Hosts::with("pvh", &[]);
    for colo in [&[][..], &["-c"]] {
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let to = format!("unix:{}", socket.display());
        let backend = backend(&hosts.here);
        let args = ["remus", &backend, "web", &to];
        let sender = Running::start(args.iter().chain(&SOON).chain(colo));
        let (peer, _) = listener.accept().unwrap();
        std::fs::remove_file(&socket).unwrap();
        let ran = sender.end();
        drop(peer);
        assert_eq!(hosts.domains()[0], HERE, "{ran:?}");
        ran.code(1)
            .stderr_has("has not answered in 1 s")
            .stderr_has("web runs on here, unprotected");
    }
}

#[test]
fn a_client_that_says_nothing_does_not_keep_a_listening_receiver() {
    let hosts = Hosts::with("pvh", &[]);
    let backend = backend(&hosts.there);
    let args = ["migrate-receive", &backend, "--listen", "tcp:127.0.0.1:0"];
    let mut receiver = Running::start(args.iter().chain(&SOON));
    let line = receiver.line("waiting at");
    let address = line.trim_end().rsplit_once("tcp:").unwrap().1;
    let client = TcpStream::connect(address).unwrap();
    receiver
        .end()
        .code(1)
        .stderr_has("has sent nothing for 1 s")
        .stderr_has("the sender keeps it");
    drop(client);
}

/// In a directory that others can write to, a socket may belong to another user.
#[test]
fn a_listener_of_another_user_is_given_no_domain() {
    const NOBODY: u32 = 65_534;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: a process of another user: this is not root");
        return;
    }
    let hosts = Hosts::with("pvh", &[]);
    // A place where that user can run the program, and listen.
    let place = tempfile::tempdir().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(place.path(), open).unwrap();
    let program = place.path().join("xsr");
    std::fs::copy(env!("CARGO_BIN_EXE_xsr"), &program).unwrap();
    let to = format!("unix:{}", place.path().join("socket").display());
    let theirs = format!("mock:{}", place.path().join("host").display());
    let mut listener =
        std::os::unix::process::CommandExt::uid(&mut std::process::Command::new(&program), NOBODY)
            .args(["migrate-receive", "--backend", &theirs, "--listen", &to])
            .current_dir(place.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
    let mut said = std::io::BufReader::new(listener.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert!(line.contains("waiting at"), "{line}");
    run(["migrate", &backend(&hosts.here), "web", &to])
        .code(1)
        .stderr_has("a process of another user listens there (uid 65534")
        .stderr_has("put the socket into a directory of your own")
        .stderr_has("web runs on here");
    // It mistook the connection for its sender's.
    assert!(!listener.wait().unwrap().success());
    assert_eq!(hosts.domains(), [HERE.map(str::to_owned).to_vec(), vec![]]);
}

#[test]
fn a_receivers_reason_reaches_the_sender_over_a_socket() {
    let hosts = Hosts::with("pvh", &[]);
    let args = ["mock", "create", "web", "--memory", "8M"];
    run(args.iter().chain(&["--host", arg(&hosts.there)])).code(0);
    let socket = hosts.path("socket");
    for live in [&[][..], &["--no-live"]] {
        let receiver = hosts.receiver(&socket, &[]);
        let sent = hosts.sender(&socket, live).end();
        receiver.end().code(1);
        assert_eq!(hosts.domains(), [HERE, HERE], "{sent:?}");
        sent.code(1)
            .stderr_has("the other end has failed: ")
            .stderr_has("exists already")
            .stderr_has("web runs on here");
    }
}
