//! Suspends into a file while the guest runs: each page has one place in it, and xenopsd does not
//! know that the save is live.
//!
//! A suspend VDI is a block device. The machine that runs the tests may have none to spare; what
//! differs there is tested with `SharedFileWriter` itself.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use xsr_format::frame::{Gfn, PAGE_SIZE};
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{Layer, copy_bytes, transcode};
use xsr_format::walk::{Content, Walk};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{Access, GuestKind, Host as _, ShutdownReason};

use crate::guardian::engine;
use crate::images::scratch;
use crate::machine::{DOMID, KINDS, busy, by_the_engine, empty, guest, shutdown};
use crate::platform::keys;
use crate::restore::words;
use crate::save::{mode, play};
use crate::xenopsd::{Ended, Kind, Target, Xenopsd, libxc, source};

const RUNS: &str = "info:the guest runs while its memory is written";

/// Suspends the guest into a file; returns how that ended, and the image.
fn suspended(machine: &Path, dir: &Path, mode: &str) -> (Ended, Vec<u8>) {
    let mut target = Target::new(Kind::File, dir, true);
    let mut xenopsd = Xenopsd::start(machine, mode, target.fd());
    play(&mut xenopsd, &mut target);
    let ended = xenopsd.wait();
    assert_eq!(ended.succeeded(), "0 0");
    assert_eq!(shutdown(machine), Some(ShutdownReason::Suspend));
    (ended, target.image())
}

/// The stream without what the mapped layout adds.
pub(crate) fn plain(stream: &[u8]) -> Vec<u8> {
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut out = Vec::new();
    transcode(&mut walk, &mut out, Layer::Libxc, None, copy_bytes).unwrap();
    out
}

#[test]
fn the_image_of_an_idle_guest_is_the_one_that_a_still_save_writes() {
    for (kind, width) in KINDS {
        let dir = scratch();
        let machine = guest(dir.path(), kind, width);
        let (ended, image) = suspended(&machine, dir.path(), mode(kind));
        assert_eq!(ended.with(RUNS).len(), 1, "{ended:?}");
        assert!(
            plain(libxc(&image)) == by_the_engine(kind, width),
            "{kind:?}"
        );
    }
}

/// Passes come before `suspend:`, the file does not grow with them, and it holds the last contents
/// of each page.
#[test]
fn what_the_guest_writes_again_takes_no_more_room() {
    for (kind, width) in KINDS {
        let dir = scratch();
        let machine = guest(dir.path(), kind, width);
        busy(&machine, 20_000);
        let (ended, image) = suspended(&machine, dir.path(), mode(kind));
        let first = ended.lines.iter().position(|line| line.contains(r"\b"));
        let suspend = ended.lines.iter().position(|line| line == "suspend:");
        assert!(first.is_some() && first < suspend, "{ended:?}");
        let stream = libxc(&image);
        // Pads and heads of records are all that is added to what a still save writes.
        let still = by_the_engine(kind, width).len();
        let most = still + still / 50;
        assert!(stream.len() < most, "{kind:?}: {} > {most}", stream.len());
        if kind.is_translated() {
            same_memory(&machine, stream);
        }
        let to = scratch();
        let (there, ports) = empty(to.path(), kind);
        let (ours, _go) = source(Kind::Pipe, dir.path(), stream.to_vec(), stream.len());
        let mut xenopsd = Xenopsd::start(&there, &words(kind, ports), ours);
        xenopsd.say("restore:xenguest\n");
        xenopsd.end().succeeded();
    }
}

/// Checks that the stream holds the memory of the machine's guest, whose pfns are gfns.
fn same_memory(machine: &Path, stream: &[u8]) {
    let host = MockHost::open(machine).unwrap();
    let domain = host.domain(DOMID).unwrap();
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut pages = 0;
    while let Some(step) = walk.next_step().unwrap() {
        let Content::PageData(mut body) = step.content else {
            continue;
        };
        let entries: Vec<_> = body.entries().iter().collect();
        for entry in entries.iter().filter(|entry| entry.page_type.has_data()) {
            let mut page = [0; PAGE_SIZE];
            assert!(body.read_page(&mut page).unwrap());
            let mapped = domain.map(&[Gfn(entry.pfn.0)], Access::Read).unwrap();
            let mut there = [0; PAGE_SIZE];
            mapped.page(0).unwrap().copy_to(&mut there);
            assert!(page == there, "pfn {:#x}", entry.pfn.0);
            pages += 1;
        }
    }
    assert!(pages > 4000, "{pages}");
}

#[test]
fn a_key_of_the_vm_turns_it_off() {
    for (value, off) in [
        ("false", true),
        ("0", true),
        ("true", false),
        ("tea", false),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = machine.with_extension("run");
        keys(&run, &[("xsr-live-suspend", value)]);
        let (ended, image) = suspended(&machine, dir.path(), "-mode save");
        assert_eq!(ended.with(RUNS).is_empty(), off, "{value}: {ended:?}");
        let ignored = ended.with("info:platform/xsr-live-suspend in xenstore is ignored");
        assert_eq!(ignored.len(), usize::from(value == "tea"), "{ended:?}");
        if off {
            assert!(libxc(&image) == by_the_engine(GuestKind::Pv, 8));
        }
    }
}

/// A save that is given up before the guest suspends leaves nothing behind what xenopsd wrote.
#[test]
fn an_abort_during_the_passes_leaves_the_file_as_it_was() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pvh, 8);
    busy(&machine, 2000);
    let mut target = Target::new(Kind::File, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode hvm_save", target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    while !xenopsd.next().unwrap().contains(r"\b") {}
    xenopsd.say("abort\n");
    xenopsd.end().aborted();
    assert_eq!(shutdown(&machine), None);
    assert_eq!(libxc(&target.image()), b"");
}

/// The guardian cannot see by the command line that dirty logs may be on.
#[test]
fn the_guest_of_an_engine_that_is_killed_is_not_logged() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let run = machine.with_extension("run");
    fs::create_dir(&run).unwrap();
    let mut target = Target::new(Kind::File, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode save", target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    assert!(xenopsd.until("suspend:"));
    // Xen keeps the dirty log on when a process ends; the mock machine must be told to.
    fs::write(run.join("dirty-log-of"), "1").unwrap();
    kill(engine(xenopsd.pid()), Signal::SIGKILL).unwrap();
    let ended = xenopsd.end();
    ended.failed(2, "killed by SIGKILL");
    ended.failed(2, "the guest runs on");
    assert_eq!(shutdown(&machine), None);
}
