//! Restores: the result, what is left in the stream, and every way in which one ends early.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;

use xsr_xen_backend::GuestKind;
use xsr_xen_backend::mock::MockHost;

use crate::images::{image, layers, scratch};
use crate::machine::{DOMID, by_the_engine, empty};
use crate::xenopsd::{AFTER, Ended, Kind, STREAMS, Xenopsd, source};

/// The libxc stream of an image that a real Xen wrote, without the layers around it.
fn by_xen(name: &str) -> Vec<u8> {
    let bytes = fs::read(image(name)).unwrap();
    let (_, start, end) = layers(&bytes);
    bytes[start..end].to_vec()
}

pub(crate) fn words(kind: GuestKind, ports: [u32; 2]) -> String {
    let mode = match kind.is_translated() {
        true => "hvm_restore",
        false => "restore",
    };
    let [store, console] = ports;
    format!("-mode {mode} -store_port {store} -console_port {console}")
}

/// Restores `stream`, followed by xenopsd's next record; returns how the run ended, and what is
/// left in the stream.
pub(crate) fn restored(
    kind: GuestKind,
    through: Kind,
    stream: &[u8],
    dir: &Path,
) -> (Ended, Vec<u8>) {
    let dir = &dir.join("there");
    fs::create_dir(dir).unwrap();
    let (machine, ports) = empty(dir, kind);
    let mut bytes = stream.to_vec();
    bytes.extend(AFTER);
    let at_once = bytes.len();
    let (ours, go) = source(through, dir, bytes, at_once);
    let its = ours.as_fd().try_clone_to_owned().unwrap();
    let mut xenopsd = Xenopsd::start(&machine, &words(kind, ports), its);
    xenopsd.say("restore:xenguest\n");
    let ended = xenopsd.end();
    drop(go);
    let mut rest = Vec::new();
    File::from(ours).read_to_end(&mut rest).unwrap();
    (ended, rest)
}

#[test]
fn a_restore_says_where_the_rings_are_and_stops_reading_at_end() {
    for (name, kind) in [("tpv", GuestKind::Pv), ("tpvh", GuestKind::Pvh)] {
        let stream = by_xen(name);
        for through in STREAMS {
            let dir = scratch();
            let (ended, rest) = restored(kind, through, &stream, dir.path());
            let result = ended.succeeded();
            let [emulator, store, console] = result.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{result}");
            };
            assert_eq!(emulator, "xenguest");
            let [store, console] = [store, console].map(|frame| frame.parse::<u64>().unwrap());
            assert!(store != 0 && console != 0 && store != console, "{result}");
            assert_eq!(rest, AFTER, "{name} {through:?}");
        }
    }
}

#[test]
fn a_guest_that_was_saved_here_has_the_same_memory() {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        let stream = by_the_engine(kind, 8);
        let dir = scratch();
        let (ended, _) = restored(kind, Kind::Socket, &stream, dir.path());
        ended.succeeded();
        let host = MockHost::open(&dir.path().join("there/host")).unwrap();
        let dir = scratch();
        let equal = MockHost::open(&crate::machine::guest(dir.path(), kind, 8)).unwrap();
        let digest = host.memory_digest(DOMID).unwrap();
        let differences = digest.differences(&equal.memory_digest(DOMID).unwrap());
        assert_eq!(differences, [], "{kind:?}");
    }
}

#[test]
fn a_stream_that_ends_early_or_is_none_is_told() {
    let stream = by_the_engine(GuestKind::Pv, 8);
    for through in STREAMS {
        for (bytes, text) in [
            (&stream[..stream.len() / 2], "stream ends inside"),
            (&stream[..10], "stream ends inside"),
            (&[0x11; 4096][..], "marker"),
        ] {
            let dir = scratch();
            let (machine, ports) = empty(dir.path(), GuestKind::Pv);
            let (ours, go) = source(through, dir.path(), bytes.to_vec(), bytes.len());
            let mut xenopsd = Xenopsd::start(&machine, &words(GuestKind::Pv, ports), ours);
            xenopsd.say("restore:xenguest\n");
            drop(go);
            xenopsd.end().failed(2, text);
        }
    }
}

#[test]
fn an_abort_the_end_of_the_pipe_and_nonsense_end_a_restore() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    // Whether xenopsd has sent its line, and how many bytes of the stream have arrived.
    for (told, at_once) in [(false, 0), (true, 0), (true, 5000), (true, 3 << 20)] {
        for through in [Kind::Pipe, Kind::Socket] {
            for (say, expected) in [
                (Some("abort\n"), None),
                (None, Some("xenopsd closed the control pipe")),
                (Some("done\n"), Some("without having been asked")),
                (Some("restore:vgpu\n"), Some("which is not expected")),
                (Some("tea\n"), Some("which is not expected")),
            ] {
                let dir = scratch();
                let (machine, ports) = empty(dir.path(), GuestKind::Pvh);
                let (ours, _go) = source(through, dir.path(), stream.clone(), at_once);
                let words = words(GuestKind::Pvh, ports);
                let mut xenopsd = Xenopsd::start(&machine, &words, ours);
                if told {
                    xenopsd.say("restore:xenguest\n");
                }
                match say {
                    Some(text) => xenopsd.say(text),
                    None => xenopsd.hang_up(),
                }
                let ended = xenopsd.end();
                match expected {
                    // By then, xenopsd's reader of the image is waiting for a line.
                    None if told => ended.failed(0, "aborted by xenopsd"),
                    None => ended.aborted(),
                    Some(text) => ended.failed(2, text),
                }
            }
        }
    }
}

#[test]
fn xenopsd_s_word_may_come_before_the_emu_manager_is_ready_but_once() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    let dir = scratch();
    let (machine, ports) = empty(dir.path(), GuestKind::Pvh);
    let (ours, _go) = source(Kind::Pipe, dir.path(), stream, 5000);
    let mut xenopsd = Xenopsd::start(&machine, &words(GuestKind::Pvh, ports), ours);
    xenopsd.say("restore:xenguest\nrestore:xenguest\n");
    xenopsd.end().failed(2, "\"restore:xenguest\"");
}

#[test]
fn the_stream_may_stop_in_the_middle() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    for through in [Kind::Pipe, Kind::Socket] {
        let dir = scratch();
        let (machine, ports) = empty(dir.path(), GuestKind::Pvh);
        let (ours, go) = source(through, dir.path(), stream.clone(), 5 << 20);
        let left = ours.as_fd().try_clone_to_owned().unwrap();
        let mut xenopsd = Xenopsd::start(&machine, &words(GuestKind::Pvh, ports), ours);
        xenopsd.say("restore:xenguest\n");
        // All that has been sent is read: the emu-manager waits for more.
        let mut go = go.unwrap();
        go.wait_until_sent();
        while rustix::io::ioctl_fionread(&left).unwrap() > 0 {
            std::thread::yield_now();
        }
        go.send_the_rest();
        xenopsd.end().succeeded();
    }
}

#[test]
fn a_descriptor_of_the_wrong_kind_is_refused() {
    let dir = scratch();
    let (machine, ports) = empty(dir.path(), GuestKind::Pvh);
    let path = dir.path().join("image");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"x").unwrap();
    let xenopsd = Xenopsd::start(&machine, &words(GuestKind::Pvh, ports), file.into());
    xenopsd.end().failed(1, "without O_APPEND");
}
