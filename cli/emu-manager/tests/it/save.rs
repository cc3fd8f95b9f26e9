//! Saves: the order of lines, the image, and every way in which one ends early.

use std::process::Command;

use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{GuestKind, Host as _, ShutdownReason};

use crate::images::scratch;
use crate::machine::{DOMID, KINDS, busy, by_the_engine, guest, shutdown};
use crate::platform::keys;
use crate::xenopsd::{Ended, Kind, STREAMS, Target, Xenopsd, command, libxc};

pub(crate) fn mode(kind: GuestKind) -> &'static str {
    match kind.is_translated() {
        true => "-mode hvm_save",
        false => "-mode save",
    }
}

/// Plays xenopsd through a successful save.
pub(crate) fn play(xenopsd: &mut Xenopsd, target: &mut Target) {
    assert!(xenopsd.until("prepare:xenguest"), "{:?}", xenopsd.lines);
    target.head();
    xenopsd.say("done\n");
    assert!(xenopsd.until("suspend:"), "{:?}", xenopsd.lines);
    xenopsd.say("done\n");
    assert!(xenopsd.until("result:"), "{:?}", xenopsd.lines);
}

/// The percentages in the progress lines.
fn percentages(ended: &Ended) -> Vec<u8> {
    let lines = ended.with(r"info:\b\b\b\b");
    lines.iter().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn the_image_holds_the_engines_stream_whatever_it_is_written_to() {
    for (kind, width) in KINDS {
        let expected = by_the_engine(kind, width);
        for stream in STREAMS {
            let dir = scratch();
            let machine = guest(dir.path(), kind, width);
            // A file gets the same stream, but with a place for each page: see `live_suspend.rs`.
            keys(
                &machine.with_extension("run"),
                &[("xsr-live-suspend", "false")],
            );
            let mut target = Target::new(stream, dir.path(), true);
            let mut xenopsd = Xenopsd::start(&machine, mode(kind), target.fd());
            play(&mut xenopsd, &mut target);
            let ended = xenopsd.wait();
            assert_eq!(ended.succeeded(), "0 0");
            let percentages = percentages(&ended);
            assert!(!percentages.is_empty(), "{ended:?}");
            assert!(percentages.is_sorted() && percentages.iter().all(|percent| *percent <= 100));
            let image = target.image();
            assert!(libxc(&image) == expected, "{kind:?} {stream:?}");
            assert_eq!(shutdown(&machine), Some(ShutdownReason::Suspend));
        }
    }
}

#[test]
fn a_live_save_sends_memory_before_the_guest_is_suspended() {
    for (kind, width) in KINDS {
        for stream in STREAMS {
            let dir = scratch();
            let machine = guest(dir.path(), kind, width);
            busy(&machine, 2000);
            let mut target = Target::new(stream, dir.path(), true);
            let words = format!("{} -live true", mode(kind));
            let mut xenopsd = Xenopsd::start(&machine, &words, target.fd());
            play(&mut xenopsd, &mut target);
            let ended = xenopsd.wait();
            ended.succeeded();
            let first = ended.lines.iter().position(|line| line.contains(r"\b"));
            let suspend = ended.lines.iter().position(|line| line == "suspend:");
            assert!(first < suspend, "{ended:?}");
            let image = target.image();
            let stream = libxc(&image);
            assert!(stream.len() > 16 << 20, "all of it, and some pages again");
            assert_eq!(stream[stream.len() - 8..], [0; 8], "END");
            assert_eq!(shutdown(&machine), Some(ShutdownReason::Suspend));
        }
    }
}

/// What reads a suspend image later may be another program.
#[test]
fn a_suspend_image_is_not_compressed() {
    let (kind, width) = KINDS[0];
    let dir = scratch();
    let machine = guest(dir.path(), kind, width);
    let wanted = [("xsr-compress", "true"), ("xsr-live-suspend", "false")];
    keys(&machine.with_extension("run"), &wanted);
    let mut target = Target::new(Kind::File, dir.path(), true);
    let words = format!("{} -compress true", mode(kind));
    let mut xenopsd = Xenopsd::start(&machine, &words, target.fd());
    play(&mut xenopsd, &mut target);
    let ended = xenopsd.wait();
    assert_eq!(ended.succeeded(), "0 0");
    let image = target.image();
    assert!(libxc(&image) == by_the_engine(kind, width), "{ended:?}");
}

/// A migration between two hosts that run this program: smaller, and the same guest.
#[test]
fn a_migration_may_be_compressed_if_the_key_says_that_the_other_end_is_ours() {
    for (kind, width) in KINDS {
        for (stream, key, more, packed) in [
            (Kind::Pipe, "true", "-compress true", true),
            (Kind::Socket, "1", "-compress true -live true", true),
            (Kind::Socket, "true", "-live true", false),
            (Kind::Pipe, "false", "-compress true -live true", false),
            (Kind::Pipe, "tea", "-compress true", false),
        ] {
            let dir = scratch();
            let machine = guest(dir.path(), kind, width);
            keys(&machine.with_extension("run"), &[("xsr-compress", key)]);
            let mut target = Target::new(stream, dir.path(), true);
            let words = format!("{} {more}", mode(kind));
            let mut xenopsd = Xenopsd::start(&machine, &words, target.fd());
            play(&mut xenopsd, &mut target);
            let ended = xenopsd.wait();
            assert_eq!(ended.succeeded(), "0 0");
            let image = target.image();
            let bytes = libxc(&image);
            assert_eq!(bytes.starts_with(b"XSRzstd1"), packed, "{ended:?}");
            let plain = by_the_engine(kind, width);
            match packed {
                true => assert!(bytes.len() < plain.len() * 9 / 10, "{}", bytes.len()),
                false if more.contains("-live") => assert!(bytes.starts_with(&[0xff; 8])),
                false => assert!(bytes == plain),
            }
            // Nothing behind it is read.
            let (restored, rest) = crate::restore::restored(kind, stream, bytes, dir.path());
            restored.succeeded();
            assert_eq!(rest, crate::xenopsd::AFTER, "{kind:?} {stream:?}");
            if kind.is_translated() {
                let [before, after] = ["host", "there/host"].map(|name| {
                    let host = MockHost::open(&dir.path().join(name)).unwrap();
                    host.memory_digest(DOMID).unwrap()
                });
                assert_eq!(after.differences(&before), [], "{kind:?}");
            }
        }
    }
}

#[test]
fn a_compressed_migration_that_is_cut_off_is_told() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pvh, 8);
    keys(&machine.with_extension("run"), &[("xsr-compress", "true")]);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let words = "-mode hvm_save -compress true";
    let mut xenopsd = Xenopsd::start(&machine, words, target.fd());
    play(&mut xenopsd, &mut target);
    xenopsd.end().succeeded();
    let image = target.image();
    let bytes = libxc(&image);
    for (bytes, text) in [
        (&bytes[..bytes.len() - 4], "reading the end of the stream"),
        (&bytes[..bytes.len() / 2], "ends inside"),
        (&bytes[..9], "ends inside"),
    ] {
        let dir = scratch();
        let (there, ports) = crate::machine::empty(dir.path(), GuestKind::Pvh);
        let bytes = bytes.to_vec();
        let at_once = bytes.len();
        let (ours, go) = crate::xenopsd::source(Kind::Pipe, dir.path(), bytes, at_once);
        let words = crate::restore::words(GuestKind::Pvh, ports);
        let mut xenopsd = Xenopsd::start(&there, &words, ours);
        xenopsd.say("restore:xenguest\n");
        drop(go);
        xenopsd.end().failed(2, text);
    }
}

/// The point of a save at which it is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// Before the first line.
    Start,
    /// Instead of the answer to `prepare:`.
    Prepare,
    /// Directly after the answer to `prepare:`.
    Prepared,
    /// While the stream is not read.
    Stalled,
    /// Instead of the answer to `suspend:`.
    Suspend,
    /// Directly after the answer to `suspend:`, while the stream is not read.
    Suspended,
}

impl Point {
    /// Whether the guest is suspended at this point.
    fn is_suspended(self, live: bool) -> bool {
        self == Self::Suspended || self == Self::Stalled && !live
    }
}

const POINTS: [Point; 6] = [
    Point::Start,
    Point::Prepare,
    Point::Prepared,
    Point::Stalled,
    Point::Suspend,
    Point::Suspended,
];

/// Plays xenopsd up to `point`, then does `act`; returns how the run ended, and why the guest has
/// shut down. `None` if a file cannot stall there.
fn disturbed(
    stream: Kind,
    point: Point,
    live: bool,
    act: impl Fn(&mut Xenopsd),
) -> Option<(Ended, Option<ShutdownReason>)> {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    // An unread stream must fill up before the save is complete.
    let stalls = match point {
        Point::Stalled => true,
        Point::Suspended => !live,
        _ => false,
    };
    let mut target = Target::new(stream, dir.path(), !stalls);
    if stalls && target.is_file() {
        return None;
    }
    let words = format!("-mode save -live {live}");
    let mut xenopsd = Xenopsd::start(&machine, &words, target.fd());
    if point == Point::Start {
        act(&mut xenopsd);
    } else {
        assert!(xenopsd.until("prepare:"), "{point:?}: {:?}", xenopsd.lines);
        if point != Point::Prepare {
            target.head();
        }
        match point {
            Point::Prepared => xenopsd.say("done\n"),
            Point::Stalled | Point::Suspend | Point::Suspended => {
                xenopsd.say("done\n");
                if point == Point::Stalled && live {
                    // A pass has begun, and its stream is not read.
                    assert!(xenopsd.until(r"info:\b"), "{:?}", xenopsd.lines);
                } else {
                    assert!(xenopsd.until("suspend:"), "{point:?}: {:?}", xenopsd.lines);
                }
                if point == Point::Suspended || point == Point::Stalled && !live {
                    xenopsd.say("done\n");
                }
            }
            Point::Start | Point::Prepare => {}
        }
        act(&mut xenopsd);
    }
    let ended = xenopsd.end();
    Some((ended, shutdown(&machine)))
}

#[test]
fn an_abort_ends_a_save_in_good_order_wherever_it_comes() {
    for live in [false, true] {
        for stream in STREAMS {
            for point in POINTS {
                let act = |xenopsd: &mut Xenopsd| xenopsd.say("abort\n");
                let Some((ended, state)) = disturbed(stream, point, live, act) else {
                    continue;
                };
                // xenopsd never sends `abort` after `suspend:`; the save may already be complete.
                if point == Point::Suspended && !ended.with("result:").is_empty() {
                    continue;
                }
                ended.aborted();
                assert_eq!(state, None, "{live} {stream:?} {point:?}");
                let resumed = ended.with("info:the save is not complete: the guest runs on");
                let suspended = point.is_suspended(live);
                assert_eq!(resumed.len(), usize::from(suspended), "{ended:?}");
            }
        }
    }
}

#[test]
fn a_guest_that_suspends_after_xenopsd_has_given_up_runs_on() {
    for live in [false, true] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = machine.with_extension("run");
        std::fs::create_dir(&run).unwrap();
        std::fs::write(run.join("late"), "").unwrap();
        let mut target = Target::new(Kind::Pipe, dir.path(), true);
        let words = format!("-mode save -live {live}");
        let mut xenopsd = Xenopsd::start(&machine, &words, target.fd());
        assert!(xenopsd.until("prepare:"));
        target.head();
        xenopsd.say("done\n");
        assert!(xenopsd.until("suspend:"));
        xenopsd.say("abort\n");
        {
            let host = MockHost::open(&machine).unwrap();
            host.domain(DOMID).unwrap().suspend().unwrap();
        }
        let ended = xenopsd.end();
        ended.aborted();
        assert_eq!(shutdown(&machine), None);
        let resumed = ended.with("info:the save is not complete: the guest runs on");
        assert_eq!(resumed.len(), 1, "{ended:?}");
    }
}

#[test]
fn the_end_of_the_pipe_and_nonsense_fail_a_save_wherever_they_come() {
    for live in [false, true] {
        for point in POINTS {
            for (say, text) in [
                (None, "xenopsd closed the control pipe"),
                (Some("tea:two sugars\n"), "which is not expected"),
                (Some("restore:xenguest\n"), "which is not expected"),
            ] {
                let act = |xenopsd: &mut Xenopsd| match say {
                    None => xenopsd.hang_up(),
                    Some(text) => xenopsd.say(text),
                };
                let (ended, state) = disturbed(Kind::Pipe, point, live, act).unwrap();
                if point == Point::Suspended && !ended.with("result:").is_empty() {
                    continue;
                }
                ended.failed(2, text);
                assert_eq!(state, None, "{live} {point:?}");
            }
        }
    }
}

#[test]
fn an_answer_that_was_not_asked_for_and_a_line_without_end_fail_a_save() {
    for (say, text) in [
        ("done\n".to_owned(), "without having been asked"),
        ("x".repeat(300), "without a line end"),
    ] {
        let act = |xenopsd: &mut Xenopsd| xenopsd.say(&say);
        let (ended, state) = disturbed(Kind::Pipe, Point::Stalled, true, act).unwrap();
        ended.failed(2, text);
        assert_eq!(state, None);
    }
}

#[test]
fn answers_may_come_in_pieces() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pvh, 8);
    let mut target = Target::new(Kind::Socket, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode hvm_save", target.fd());
    for line in ["prepare:", "suspend:"] {
        assert!(xenopsd.until(line));
        if line == "prepare:" {
            target.head();
        }
        xenopsd.say("do");
        xenopsd.wait_until_heard();
        xenopsd.say("ne\n");
    }
    xenopsd.end().succeeded();
    assert!(libxc(&target.image()) == by_the_engine(GuestKind::Pvh, 8));
}

#[test]
fn an_xenopsd_that_hears_nothing_any_more_ends_a_save() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode save", target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    let ended = xenopsd.wait();
    assert_eq!(ended.code, Some(2));
    assert_eq!(shutdown(&machine), None);
}

#[test]
fn a_stream_that_takes_no_more_is_told() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let full = std::fs::File::options().append(true).open("/dev/full");
    let mut xenopsd = Xenopsd::start(&machine, "-mode save", full.unwrap().into());
    assert!(xenopsd.until("prepare:"));
    xenopsd.say("done\n");
    xenopsd.end().failed(2, "No space left on device");
    assert_eq!(shutdown(&machine), None);
}

/// `ulimit -f`, of 4 MiB.
#[test]
fn a_file_that_may_not_grow_is_told_and_left_as_it_was() {
    for live in ["true", "false"] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = machine.with_extension("run");
        keys(&run, &[("xsr-live-suspend", live)]);
        let mut target = Target::new(Kind::File, dir.path(), true);
        let program = env!("CARGO_BIN_EXE_xsr-emu-manager-mock");
        let words = "-controloutfd 6 -controlinfd 5 -fd 7 -domid 1 -mode save";
        let unlimited = command(program, words);
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -f 8192; exec \"$@\"", "sh"])
            .arg(unlimited.get_program())
            .args(unlimited.get_args())
            .env(
                "XSR_EMU_TEST_BACKEND",
                format!("mock:{}", machine.display()),
            )
            .env("XSR_EMU_TEST_RUN", &run);
        let mut xenopsd = Xenopsd::spawn(command, target.fd());
        assert!(xenopsd.until("prepare:"), "{:?}", xenopsd.lines);
        target.head();
        xenopsd.say("done\n");
        if live == "false" {
            assert!(xenopsd.until("suspend:"), "{:?}", xenopsd.lines);
            xenopsd.say("done\n");
        }
        xenopsd.end().failed(2, "File too large");
        assert_eq!(shutdown(&machine), None, "{live}");
        if live == "true" {
            assert_eq!(libxc(&target.image()), b"");
        }
    }
}

#[test]
fn what_cannot_be_saved_is_refused_before_anything_is_asked() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    for (words, text) in [
        ("-mode hvm_save", "domain 1 is a PV domain"),
        ("-mode save -dm vgpu:9", "vgpu Operation not supported"),
        ("-mode save -domid 4", "domain 4"),
    ] {
        let target = Target::new(Kind::Pipe, dir.path(), true);
        let xenopsd = Xenopsd::start(&machine, words, target.fd());
        let ended = xenopsd.end();
        ended.failed(2, text);
        assert!(ended.with("prepare:").is_empty());
    }
    let elsewhere = dir.path().join("none");
    let target = Target::new(Kind::Pipe, dir.path(), true);
    let ended = Xenopsd::start(&elsewhere, "-mode save", target.fd()).end();
    ended.failed(2, "none");
}
