//! The handshake of a migration, with the test itself at one end: which end has the domain when the
//! other hangs up, sends something else, or dies, at each step.

mod silent;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::common::migration::{
    BANNER, GO, Hosts, READY, REPORT, Running, hear, hear_image, listen, until,
};
use crate::common::{arg, run};
use nix::sys::signal::Signal;

/// The test's messages as the receiver, in order. It hangs up afterwards.
#[derive(Clone, Copy, Debug)]
enum Say<'a> {
    Bytes(&'a [u8]),
    /// Receive this many bytes of the image, and no more.
    HearSome(u64),
    HearImage,
    HearGo,
}

use Say::{Bytes, HearGo, HearImage, HearSome};

/// Send to a receiver that follows the script. Returns how the sender ends.
fn send_to(hosts: &Hosts, script: &[Say<'_>]) -> crate::common::Ran {
    let socket = hosts.path("socket");
    let listener = listen(&socket);
    let sender = hosts.sender(&socket, &[]);
    let (mut peer, _) = listener.accept().unwrap();
    std::fs::remove_file(&socket).unwrap();
    for say in script {
        play(&mut peer, *say);
    }
    drop(peer);
    sender.end()
}

fn play(peer: &mut UnixStream, say: Say<'_>) {
    match say {
        Bytes(bytes) => peer.write_all(bytes).unwrap(),
        HearSome(n) => {
            let n = std::io::copy(&mut peer.take(n), &mut std::io::sink()).unwrap();
            assert!(n > 0);
        }
        HearImage => hear_image(peer),
        HearGo => hear(peer, GO),
    }
}

const HERE: [&str; 1] = ["web running"];
const AWAY: [&str; 1] = ["web--migratedaway suspended"];

#[test]
fn until_go_whatever_the_receiver_does_leaves_the_domain_running_here() {
    for hosts in ["pv", "hvm"].iter().flat_map(|kind| Hosts::each(kind, &[])) {
        let scripts: &[(&[Say<'_>], &str)] = &[
            (&[], "hung up where its banner was expected"),
            (&[Bytes(&BANNER[..9])], "hung up inside its banner"),
            (
                &[Bytes(
                    b"Welcome to Debian GNU/Linux 12 (bookworm)! Today is a good day.",
                )],
                "\"Welcome to",
            ),
            (&[Bytes(b"sh: 1: xsr: not found\n")], "then hung up,"),
            (&[Bytes(BANNER)], "runs on here"),
            (&[Bytes(BANNER), HearSome(20)], "runs on here"),
            (&[Bytes(BANNER), HearSome(400_000)], "runs on here"),
            (&[Bytes(BANNER), HearSome(4_000_000)], "runs on here"),
            (
                &[Bytes(BANNER), HearImage],
                "hung up where its \"ready\" was expected",
            ),
            (
                &[Bytes(BANNER), HearImage, Bytes(&READY[..33])],
                "hung up inside its \"ready\"",
            ),
            (
                &[Bytes(BANNER), HearImage, Bytes(GO)],
                "where its \"ready\" was expected",
            ),
            // "Ready" too early: it is not believed, and the sending fails.
            (
                &[Bytes(BANNER), Bytes(READY), HearSome(400_000)],
                "runs on here",
            ),
            // The receiver fails, reports it, and gives the domain back.
            (
                &[
                    Bytes(BANNER),
                    HearImage,
                    Bytes(READY),
                    HearGo,
                    Bytes(REPORT),
                    Bytes(&[1]),
                    Bytes(GO),
                ],
                "destroyed its copy (status 1)",
            ),
            (
                &[
                    Bytes(BANNER),
                    HearImage,
                    Bytes(READY),
                    HearGo,
                    Bytes(REPORT),
                    Bytes(&[255]),
                    Bytes(GO),
                ],
                "destroyed its copy (status 255)",
            ),
        ];
        for (script, why) in scripts {
            let sent = send_to(&hosts, script);
            let what = format!("{script:?}");
            assert_eq!(hosts.domains()[0], HERE, "{what}: {sent:?}");
            sent.code(1).stderr_has(why).stderr_has("web runs on here");
        }
        // It can be saved as always: nothing is left of all this.
        hosts.image();
    }
}

/// A message from before the receiver can have been told to go does not answer that.
#[test]
fn a_report_before_go_leaves_the_domain_running_here() {
    for hosts in Hosts::each("pvh", &[]) {
        let early = [READY, REPORT, &[0]].concat();
        let sent = send_to(&hosts, &[Bytes(BANNER), HearImage, Bytes(&early)]);
        assert_eq!(hosts.domains()[0], HERE, "{sent:?}");
        sent.code(1)
            .stderr_has("before it was told to go")
            .stderr_has("web runs on here");
    }
}

#[test]
fn a_domain_that_cannot_be_taken_back_does_not_hide_why_it_was_given_back() {
    for hosts in Hosts::each("pvh", &[]) {
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let running = hosts.sender(&socket, &[]);
        let mut peer = listener.accept().unwrap().0;
        for say in [Bytes(BANNER), HearImage, Bytes(READY), HearGo] {
            play(&mut peer, say);
        }
        // From now on the host cannot store changes to the domain.
        let state = hosts.here.join("domains/1/state.json");
        std::fs::remove_file(&state).unwrap();
        std::fs::create_dir(&state).unwrap();
        for say in [Bytes(REPORT), Bytes(&[1]), Bytes(GO)] {
            play(&mut peer, say);
        }
        running
            .end()
            .code(1)
            .stderr_has("destroyed its copy (status 1); and then: giving the domain its name back")
            .stderr_has("web--migratedaway is still suspended here");
    }
}

#[test]
fn between_go_and_the_report_nobody_knows_and_the_domain_stays_suspended() {
    for hosts in Hosts::each("pvh", &[]) {
        let until_go = [Bytes(BANNER), HearImage, Bytes(READY), HearGo];
        let ends: &[&[Say<'_>]] = &[
            &[],
            &[Bytes(&REPORT[..1])],
            &[Bytes(REPORT)],
            &[Bytes(b"my copy unpause results are as follow?")],
            &[Bytes(
                b"something else altogether, and longer than a report\0",
            )],
            // It failed, but did not say that it let go.
            &[Bytes(REPORT), Bytes(&[1])],
            &[Bytes(REPORT), Bytes(&[1]), Bytes(&GO[..43])],
            &[Bytes(REPORT), Bytes(&[1]), Bytes(READY)],
        ];
        let here = arg(&hosts.here);
        for end in ends {
            let script: Vec<Say<'_>> = until_go.iter().chain(*end).copied().collect();
            let sent = send_to(&hosts, &script);
            let what = format!("{end:?}");
            assert_eq!(hosts.domains()[0], AWAY, "{what}: {sent:?}");
            let sent = sent
                .code(3)
                .stderr_has("must never run at both ends")
                .stderr_has("web--incoming");
            // Carry out its advice: one command per line, of which the last two take the domain back.
            let commands: Vec<&str> = sent
                .stderr
                .lines()
                .map(|line| line.trim().trim_end_matches(" && \\"))
                .filter_map(|line| line.strip_prefix("xsr "))
                .collect();
            assert_eq!(commands.len(), 3, "{sent:?}");
            assert_eq!(
                commands[0],
                format!("mock destroy --host {here} web--migratedaway")
            );
            for command in &commands[1..] {
                run(command.split(' ')).code(0);
            }
            assert_eq!(hosts.domains()[0], HERE, "{what}");
        }
        // Meanwhile the domain cannot be migrated or saved, and the message says why.
        send_to(&hosts, &until_go).code(3);
        let nowhere = ["migrate", "web--migratedaway", "unix:/nowhere"].map(str::to_owned);
        run(nowhere.into_iter().chain(hosts.on(&hosts.here)))
            .code(1)
            .stderr_has("it is suspended");
        run(["mock", "destroy", "--host", here, "web--migratedaway"]).code(0);
        assert_eq!(hosts.domains(), [Vec::<String>::new(), vec![]]);
    }
}

#[test]
fn a_sender_that_is_killed_never_leaves_a_domain_that_runs_at_both_ends() {
    for hosts in Hosts::each("pv", &[]) {
        let here = arg(&hosts.here);
        let steps: &[(&[Say<'_>], &[&str])] = &[
            (&[], &HERE),
            (&[Bytes(BANNER), HearSome(400_000)], &HERE),
            (&[Bytes(BANNER), HearImage], &["web suspended"]),
            (&[Bytes(BANNER), HearImage, Bytes(READY), HearGo], &AWAY),
            (
                &[
                    Bytes(BANNER),
                    HearImage,
                    Bytes(READY),
                    HearGo,
                    Bytes(REPORT),
                ],
                &AWAY,
            ),
        ];
        for (script, left) in steps {
            let socket = hosts.path("socket");
            let listener = listen(&socket);
            let sender = hosts.sender(&socket, &[]);
            let (mut peer, _) = listener.accept().unwrap();
            std::fs::remove_file(&socket).unwrap();
            for say in *script {
                play(&mut peer, *say);
            }
            sender.kill();
            assert_eq!(hosts.domains()[0], *left, "{script:?}");
            // The user can have it back.
            let name = left[0].split(' ').next().unwrap();
            if left[0] != HERE[0] {
                run(["mock", "resume", name, "--host", here]).code(0);
            }
            run(["mock", "rename", name, "web", "--host", here]).code(0);
            assert_eq!(hosts.domains()[0], HERE);
        }
    }
}

#[test]
fn a_signal_breaks_a_migration_off_until_go_and_not_after() {
    for hosts in Hosts::each("pvh", &[]) {
        let socket = hosts.path("socket");
        let scripts: &[&[Say<'_>]] = &[
            &[],
            // The peer has stalled, and so has the sender: its socket is full.
            &[Bytes(BANNER), HearSome(100_000)],
            &[Bytes(BANNER), HearImage],
        ];
        for script in scripts {
            let listener = listen(&socket);
            let sender = hosts.sender(&socket, &[]);
            let (mut peer, _) = listener.accept().unwrap();
            std::fs::remove_file(&socket).unwrap();
            for say in *script {
                play(&mut peer, *say);
            }
            sender.signal(Signal::SIGTERM);
            let sent = sender.end().code(1).stderr_has("web runs on here");
            assert_eq!(hosts.domains()[0], HERE, "{script:?}: {sent:?}");
        }
        let listener = listen(&socket);
        let mut sender = hosts.sender(&socket, &[]);
        let (mut peer, _) = listener.accept().unwrap();
        for say in [Bytes(BANNER), HearImage, Bytes(READY), HearGo] {
            play(&mut peer, say);
        }
        sender.signal(Signal::SIGTERM);
        sender.line("waiting for its report");
        peer.write_all(REPORT).unwrap();
        peer.write_all(&[0]).unwrap();
        sender.end().code(0);
        assert_eq!(hosts.domains()[0], Vec::<String>::new());
    }
}

/// A receiver that has been sent these bytes, and the connection to it.
fn receive_from(hosts: &Hosts, image: &[u8], options: &[&str]) -> (Running, UnixStream) {
    let socket = hosts.path("socket");
    let receiver = hosts.receiver(&socket, options);
    let mut peer = UnixStream::connect(&socket).unwrap();
    hear(&mut peer, BANNER);
    peer.write_all(image).unwrap();
    (receiver, peer)
}

/// The same with --quiet.
fn receive_quietly(hosts: &Hosts, image: &[u8]) -> (Running, UnixStream) {
    let socket = hosts.path("socket");
    let at = format!("unix:{}", socket.display());
    let args = ["migrate-receive", "--quiet", "--listen", &at].map(str::to_owned);
    let receiver = Running::start(args.into_iter().chain(hosts.on(&hosts.there)));
    let mut peer = None;
    until("it listens", || {
        peer = UnixStream::connect(&socket).ok();
        peer.is_some()
    });
    let mut peer = peer.unwrap();
    hear(&mut peer, BANNER);
    peer.write_all(image).unwrap();
    (receiver, peer)
}

/// Read everything that is left, without the reason of a failure, which comes last.
fn rest(mut peer: UnixStream) -> Vec<u8> {
    const WHY: &[u8] = b"xsr: failed: ";
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).unwrap();
    let why = rest.windows(WHY.len()).position(|words| words == WHY);
    if let Some(at) = why {
        assert!(rest.ends_with(b"\n") && rest.len() - at <= 1024);
        rest.truncate(at);
    }
    rest
}

#[test]
fn a_receiver_keeps_nothing_that_the_sender_has_not_let_go_of() {
    for hosts in Hosts::each("pv", &[]) {
        let image = hosts.image();
        // The sender is gone before everything has arrived: no further message is sent.
        for length in [0, 10, 500, 900, image.len() / 2, image.len() - 1] {
            let (receiver, peer) = receive_from(&hosts, &image[..length], &[]);
            peer.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest(peer), b"", "{length}");
            let ended = receiver.end().code(1).stderr_has("; the sender keeps it");
            // So few bytes cannot be recognised.
            if length > 10 {
                ended.stderr_has("the sender hung up or the connection broke; the sender keeps it");
            }
            assert_eq!(hosts.domains()[1], Vec::<String>::new(), "{length}");
        }
        // The sender does not say "go", or not in these words: the receiver destroys its domain and
        // reports that, as xl's does.
        let given_back = [REPORT, &[1], GO].concat();
        for said in [&b""[..], &GO[..1], &GO[..43], READY] {
            let (receiver, mut peer) = receive_from(&hosts, &image, &[]);
            hear(&mut peer, READY);
            peer.write_all(said).unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest(peer), given_back, "{said:?}");
            receiver.end().code(1).stderr_has("the sender has it back");
            assert_eq!(hosts.domains()[1], Vec::<String>::new(), "{said:?}");
        }
        // The same if the report is never read.
        let (receiver, peer) = receive_from(&hosts, &image, &[]);
        drop(peer);
        receiver.end().code(1);
        assert_eq!(hosts.domains()[1], Vec::<String>::new());
        // A signal stops it.
        let (receiver, mut peer) = receive_from(&hosts, &image, &[]);
        hear(&mut peer, READY);
        receiver.signal(Signal::SIGTERM);
        assert_eq!(rest(peer), given_back);
        receiver.end().code(1);
        assert_eq!(hosts.domains()[1], Vec::<String>::new());
    }
}

#[test]
fn a_receiver_runs_what_the_sender_has_let_go_of() {
    for hosts in ["hvm", "pv"].iter().flat_map(|kind| Hosts::each(kind, &[])) {
        let image = hosts.image();
        let there = arg(&hosts.there);
        for (options, state) in [(&[][..], "web running"), (&["-p"][..], "web paused")] {
            let (receiver, mut peer) = receive_from(&hosts, &image, options);
            hear(&mut peer, READY);
            peer.write_all(GO).unwrap();
            assert_eq!(rest(peer), [REPORT, &[0]].concat());
            receiver.end().code(0);
            assert_eq!(hosts.domains()[1], [state]);
            run(["mock", "destroy", "web", "--host", there]).code(0);
        }
        // Even if its report cannot be sent. Only the receiver can say then where the domain is,
        // also with --quiet.
        let (receiver, mut peer) = receive_quietly(&hosts, &image);
        hear(&mut peer, READY);
        receiver.stop();
        peer.write_all(GO).unwrap();
        drop(peer);
        receiver.signal(Signal::SIGCONT);
        // A receiver that is called failed would be tried again.
        receiver
            .end()
            .code(0)
            .stderr_has("web has been received and started here")
            .stderr_has("destroy what it has left, web--migratedaway");
        assert_eq!(hosts.domains()[1], ["web running"]);
    }
}

#[test]
fn a_receiver_that_is_killed_leaves_nothing_that_runs() {
    for hosts in Hosts::each("pvh", &[]) {
        let image = hosts.image();
        let there = arg(&hosts.there);
        // In the middle of the pages.
        let (mut receiver, peer) = receive_from(&hosts, &image[..image.len() - 600], &[]);
        receiver.line("receiving web");
        receiver.kill();
        drop(peer);
        for domain in hosts.domains()[1].clone() {
            assert_eq!(domain, "web--incoming paused");
            run(["mock", "destroy", "web--incoming", "--host", there]).code(0);
        }
        // When everything has arrived.
        let (receiver, mut peer) = receive_from(&hosts, &image, &[]);
        hear(&mut peer, READY);
        receiver.kill();
        assert_eq!(hosts.domains()[1], ["web--incoming paused"]);
    }
}

#[test]
fn an_image_without_configuration_is_no_migration() {
    for hosts in Hosts::each("pv", &[]) {
        let image = hosts.image();
        let (libxl, libxc, _) = crate::common::layers(&image);
        // All headers of the image.
        let (receiver, peer) = receive_from(&hosts, &image[libxl..libxc + 40], &[]);
        assert_eq!(rest(peer), b"");
        receiver.end().code(1).stderr_has("no xl header");
        assert_eq!(hosts.domains()[1], Vec::<String>::new());
    }
}
