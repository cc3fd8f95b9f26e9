//! Failures of both engines: the same result, the same messages, and the guest in the same state.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xsr_xen_backend::mock::HostConfig;

use super::*;

/// The equal parts of two failed runs: the result, the exit code, and the messages to libxl.
type Outcome = (Option<i32>, Option<i32>, Vec<u16>);

fn outcome(run: &driver::Run) -> Outcome {
    let result = run.result().map(|(result, _)| result);
    (result, run.code, run.numbers())
}

/// Checks the result of a failed run.
#[track_caller]
fn assert_failed(run: &driver::Run, what: &str) {
    let (result, code, _) = outcome(run);
    assert_eq!((result, code), (Some(-1), Some(0)), "{what}: {run:#?}");
}

/// A guest that does not suspend: the same bytes up to there, the same messages, and the guest
/// keeps running with its log off.
#[test]
fn a_guest_that_does_not_suspend_fails_both_alike() {
    let Some(helpers) = helpers() else { return };
    for (kind, width) in [(GuestKind::Pv, 8), (GuestKind::Hvm, 8)] {
        let scratch = tempfile::tempdir().unwrap();
        let [stock, ours] = [Whose::Stock, Whose::OursByCalls].map(|whose| {
            let dir = scratch.path().join(format!("{whose:?}"));
            let domid = working(&dir, kind, width);
            let path = scratch.path().join("image");
            let stream = File::create(&path).unwrap();
            let run = helpers
                .save_live(whose, &dir, domid, stream, false)
                .unwrap();
            let host = MockHost::open(&dir).unwrap();
            let info = host.domain(domid).unwrap().info().unwrap();
            assert_failed(&run, &format!("{kind:?}, {whose:?}"));
            let logged = host.is_log_dirty(domid).unwrap();
            assert_eq!((info.shutdown, logged), (None, false), "{whose:?}");
            (run.numbers(), fs::read(&path).unwrap())
        });
        assert_eq!(stock.0, ours.0, "{kind:?}: what libxl is asked");
        assert_same(&stock.1, &ours.1);
    }
}

/// A full disk: the same errno, the same messages, and the guest unchanged.
#[test]
fn a_sink_without_room_fails_both_alike() {
    let Some(helpers) = helpers() else { return };
    for (kind, width) in [(GuestKind::Pv, 8), (GuestKind::Pv, 4), (GuestKind::Pvh, 8)] {
        let scratch = tempfile::tempdir().unwrap();
        let [stock, ours] = [Whose::Stock, Whose::Ours].map(|whose| {
            let dir = scratch.path().join(format!("{whose:?}"));
            let domid = driver::with_guest(&dir, kind, width, MIB).unwrap();
            if whose == Whose::Stock {
                let host = MockHost::open(&dir).unwrap();
                host.domain(domid).unwrap().suspend().unwrap();
            }
            let full = File::options().write(true).open("/dev/full").unwrap();
            let run = helpers.save(whose, &dir, domid, full).unwrap();
            let host = MockHost::open(&dir).unwrap();
            let logged = host.is_log_dirty(domid).unwrap();
            (run.result(), run.code, logged)
        });
        assert_eq!(stock, ours, "{kind:?}");
        assert_eq!(stock, (Some((-1, 28)), Some(0), false), "{kind:?}");
    }
}

/// A truncated stream: both fail, with the same messages.
#[test]
fn a_stream_that_is_cut_fails_both() {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    let domid = driver::with_guest(&source, GuestKind::Pvh, 8, MIB).unwrap();
    let image = save(&helpers, Whose::Ours, &source, domid);
    for cut in [30, 100, image.len() / 2, image.len() - 8] {
        let [stock, ours] = [Whose::Stock, Whose::Ours].map(|whose| {
            let dir = scratch.path().join(format!("{whose:?}-{cut}"));
            let empty = driver::empty(&dir, GuestKind::Pvh, 8, MIB).unwrap();
            let path = scratch.path().join("cut");
            fs::write(&path, &image[..cut]).unwrap();
            let stream = File::options().read(true).write(true).open(&path).unwrap();
            let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
            assert_failed(&run, &format!("cut at {cut}, {whose:?}"));
            outcome(&run)
        });
        assert_eq!(stock, ours, "cut at {cut}");
    }
}

/// A page that cannot be mapped: both write what comes before it, nothing more, and end.
#[test]
fn a_frame_that_cannot_be_mapped_fails_both_alike() {
    let Some(helpers) = helpers() else { return };
    for (kind, width) in [(GuestKind::Pv, 8), (GuestKind::Pvh, 8), (GuestKind::Hvm, 8)] {
        let scratch = tempfile::tempdir().unwrap();
        // In the third batch.
        let pfn = 2500;
        let [stock, ours] = [Whose::Stock, Whose::OursByCalls].map(|whose| {
            let dir = scratch.path().join(format!("{whose:?}"));
            let config = HostConfig {
                unmappable: Some(pfn),
                ..driver::config(MIB)
            };
            let host = MockHost::create(&dir, &config).unwrap();
            let domid = driver::guest_on(&host, kind, width, MIB).unwrap();
            if whose == Whose::Stock {
                host.domain(domid).unwrap().suspend().unwrap();
            }
            drop(host);
            let path = scratch.path().join("image");
            let stream = File::create(&path).unwrap();
            let run = helpers.save(whose, &dir, domid, stream).unwrap();
            assert_failed(&run, &format!("{kind:?}, {whose:?}"));
            if whose != Whose::Stock {
                let said = run.log.join("\n");
                assert!(said.contains("map"), "{said}");
            }
            let logged = MockHost::open(&dir).unwrap().is_log_dirty(domid).unwrap();
            (outcome(&run), logged, fs::read(&path).unwrap())
        });
        assert_eq!((&stock.0, stock.1), (&ours.0, ours.1), "{kind:?}");
        assert_same(&stock.2, &ours.2);
    }
}

/// A domain that may not have as many pages as the stream brings.
#[test]
fn memory_that_is_not_to_be_had_fails_both_alike() {
    let Some(helpers) = helpers() else { return };
    for (kind, width) in [(GuestKind::Pv, 8), (GuestKind::Pvh, 8), (GuestKind::Hvm, 8)] {
        let scratch = tempfile::tempdir().unwrap();
        let source = scratch.path().join("source");
        let domid = driver::with_guest(&source, kind, width, MIB).unwrap();
        let image = save(&helpers, Whose::Ours, &source, domid);
        let path = scratch.path().join("image");
        fs::write(&path, &image).unwrap();
        let [stock, ours] = [Whose::Stock, Whose::OursByCalls].map(|whose| {
            let dir = scratch.path().join(format!("{whose:?}"));
            let host = MockHost::create(&dir, &driver::config(MIB)).unwrap();
            let empty = driver::empty_on(&host, kind, width, MIB / 2).unwrap();
            drop(host);
            let stream = File::options().read(true).write(true).open(&path).unwrap();
            let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
            assert_failed(&run, &format!("{kind:?}, {whose:?}"));
            let info = MockHost::open(&dir).unwrap();
            let info = info.domain(empty.domid).unwrap().info().unwrap();
            // The domain reached its limit, except for less than a superpage.
            assert!(info.tot_pages + 512 > info.max_pages, "{info:?}");
            (outcome(&run), info.shutdown)
        });
        assert_eq!(stock, ours, "{kind:?}");
    }
}

/// libxl's way to cancel: SIGTERM, while a helper waits for the reader of the stream.
#[test]
fn a_save_that_is_cancelled_ends_alike() {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let [stock, ours] = [Whose::Stock, Whose::OursByCalls].map(|whose| {
        let dir = scratch.path().join(format!("{whose:?}"));
        let domid = driver::with_guest(&dir, GuestKind::Pvh, 8, MIB).unwrap();
        if whose == Whose::Stock {
            let host = MockHost::open(&dir).unwrap();
            host.domain(domid).unwrap().suspend().unwrap();
        }
        let (mut from, to) = io::pipe().unwrap();
        let from = &mut from;
        let run = thread::scope(|scope| {
            let cancel = move |pid| {
                // The save has begun and cannot end, because the rest is not read.
                scope.spawn(move || {
                    from.read_exact(&mut vec![0; 2 << 20]).unwrap();
                    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
                    kill(pid, Signal::SIGTERM).unwrap();
                });
            };
            helpers.save_watched(whose, &dir, domid, OwnedFd::from(to), cancel)
        });
        let run = run.unwrap();
        assert_failed(&run, &format!("{whose:?}"));
        let logged = MockHost::open(&dir).unwrap().is_log_dirty(domid).unwrap();
        (outcome(&run), logged)
    });
    assert_eq!(stock, ours);
}

/// A restore has nothing to clean up: the signal ends it without a message.
#[test]
fn a_restore_that_is_cancelled_ends_alike() {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    let domid = driver::with_guest(&source, GuestKind::Pvh, 8, MIB).unwrap();
    let image = save(&helpers, Whose::Ours, &source, domid);
    let [stock, ours] = [Whose::Stock, Whose::OursByCalls].map(|whose| {
        let dir = scratch.path().join(format!("{whose:?}"));
        let empty = driver::empty(&dir, GuestKind::Pvh, 8, MIB).unwrap();
        let (from, mut to) = io::pipe().unwrap();
        let (to, image) = (&mut to, &image);
        let run = thread::scope(|scope| {
            let cancel = move |pid| {
                scope.spawn(move || {
                    // More than the pipe holds: the helper has read some of it.
                    to.write_all(&image[..4 << 20]).unwrap();
                    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
                    kill(pid, Signal::SIGTERM).unwrap();
                });
            };
            helpers.restore_watched(whose, &dir, &empty, OwnedFd::from(from), cancel)
        });
        outcome(&run.unwrap())
    });
    assert_eq!(stock, ours);
    assert_eq!((stock.0, stock.1), (None, None));
}
