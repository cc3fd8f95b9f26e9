//! Suspends into a file while the guest runs: each page has one place in it, and xenopsd does not
//! know that the save is live.
//!
//! A suspend VDI is a block device. Here it is a loop device, which needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use xsr_format::frame::{Gfn, PAGE_SIZE};
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{Layer, copy_bytes, transcode};
use xsr_format::walk::{Content, Walk};
use xsr_xen_backend::mock::{HostConfig, MockHost};
use xsr_xen_backend::{Access, GuestKind, Host as _, ShutdownReason};

use crate::guardian::engine;
use crate::images::scratch;
use crate::machine::{DOMID, KINDS, busy, by_the_engine, empty, guest, guest_on, shutdown};
use crate::platform::keys;
use crate::restore::words;
use crate::save::{mode, play};
use crate::xenopsd::{Ended, Kind, Target, Xenopsd, libxc, source};

const RUNS: &str = "info:the guest runs while its memory is written";

/// A loop device full of old data, which is detached on drop.
struct Loop(PathBuf);

impl Loop {
    /// One of this length; `None` on a machine without.
    fn new(dir: &Path, bytes: usize) -> Option<Self> {
        let path = dir.join("disk");
        fs::write(&path, vec![0xff; bytes]).unwrap();
        let mut attach = Command::new("losetup");
        let attached = attach.args(["--find", "--show"]).arg(&path).output();
        let device = attached.ok().filter(|attached| attached.status.success());
        let Some(device) = device else {
            eprintln!("NOT RUN: this machine has no loop device for the test");
            return None;
        };
        let device = String::from_utf8(device.stdout).unwrap();
        Some(Self(device.trim_end().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        assert!(detached.is_ok_and(|status| status.success()));
    }
}

/// Suspends the guest into a file; returns how that ended, and the image.
pub(crate) fn suspended(machine: &Path, dir: &Path, mode: &str) -> (Ended, Vec<u8>) {
    suspended_to(Target::new(Kind::File, dir, true), machine, mode)
}

fn suspended_to(mut target: Target, machine: &Path, mode: &str) -> (Ended, Vec<u8>) {
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
        let saved = ended.with("info:saved in ");
        let passes: usize = saved[0].split(' ').next().unwrap().parse().unwrap();
        // docs/xapi.md says so: 0.3 %, and 0.1 % for each pass.
        let most = still + still * (3 + passes) / 1000;
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

/// What was on the device before does not show, neither in an idle guest's pages of zeros nor in
/// those that become zeros meanwhile, and xenopsd continues where the stream ends.
#[test]
fn an_image_on_a_block_device_full_of_old_data_is_whole() {
    for (kind, width) in KINDS {
        for pages in [0, 20_000] {
            let dir = scratch();
            let Some(device) = Loop::new(dir.path(), 40 << 20) else {
                return;
            };
            let machine = guest(dir.path(), kind, width);
            if pages > 0 {
                busy(&machine, pages);
            }
            let target = Target::on_device(&device.0);
            let (ended, image) = suspended_to(target, &machine, mode(kind));
            assert_eq!(ended.with(RUNS).len(), 1, "{ended:?}");
            let stream = libxc(&image);
            match pages {
                0 => assert!(plain(stream) == by_the_engine(kind, width), "{kind:?}"),
                _ if kind.is_translated() => same_memory(&machine, stream),
                _ => {}
            }
        }
    }
}

#[test]
fn a_block_device_that_is_too_small_is_told_and_the_guest_runs_on() {
    for live in ["true", "false"] {
        let dir = scratch();
        let Some(device) = Loop::new(dir.path(), 8 << 20) else {
            return;
        };
        let machine = guest(dir.path(), GuestKind::Pvh, 8);
        keys(
            &machine.with_extension("run"),
            &[("xsr-live-suspend", live)],
        );
        let mut target = Target::on_device(&device.0);
        let mut xenopsd = Xenopsd::start(&machine, "-mode hvm_save", target.fd());
        assert!(xenopsd.until("prepare:"));
        target.head();
        xenopsd.say("done\n");
        if live == "false" {
            assert!(xenopsd.until("suspend:"));
            xenopsd.say("done\n");
        }
        xenopsd.end().failed(2, "No space left on device");
        assert_eq!(shutdown(&machine), None);
        // The position is where xenopsd has left it.
        if live == "true" {
            assert_eq!(libxc(&target.image()), b"");
        }
    }
}

/// Xen without shadow paging logs no PV guest.
#[test]
fn a_guest_whose_writes_xen_cannot_follow_is_suspended_first() {
    let machine = HostConfig {
        shadow_paging: false,
        ..HostConfig::default()
    };
    let dir = scratch();
    let machine = guest_on(dir.path(), GuestKind::Pv, 8, &machine);
    let (ended, image) = suspended(&machine, dir.path(), "-mode save");
    let told = ended.with("info:what the guest writes cannot be followed");
    assert_eq!(told.len(), 1, "{ended:?}");
    assert!(libxc(&image) == by_the_engine(GuestKind::Pv, 8));
    // xenopsd asks for a live migration: that is another matter.
    let dir = scratch();
    let config = HostConfig {
        shadow_paging: false,
        ..HostConfig::default()
    };
    let machine = guest_on(dir.path(), GuestKind::Pv, 8, &config);
    let mut target = Target::new(Kind::Pipe, dir.path(), true);
    let mut xenopsd = Xenopsd::start(&machine, "-mode save -live true", target.fd());
    assert!(xenopsd.until("prepare:"));
    target.head();
    xenopsd.say("done\n");
    xenopsd.end().failed(2, "not supported");
    assert_eq!(shutdown(&machine), None);
}

#[test]
fn a_guest_with_a_pci_device_is_suspended_first_unless_its_key_says_otherwise() {
    for (key, runs) in [
        (None, 0),
        (Some(""), 0),
        (Some("tea"), 0),
        (Some("true"), 1),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Hvm, 8);
        let run = machine.with_extension("run");
        let device = run.join("xenstore/0/backend/pci/1/0");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("dev-0"), "0000:03:00.0").unwrap();
        if let Some(value) = key {
            keys(&run, &[("xsr-live-suspend", value)]);
        }
        let (ended, image) = suspended(&machine, dir.path(), "-mode hvm_save");
        assert_eq!(ended.with(RUNS).len(), runs, "{key:?}: {ended:?}");
        let told = ended.with("info:the VM has a PCI device");
        assert_eq!(told.len(), 1 - runs, "{key:?}: {ended:?}");
        assert!(plain(libxc(&image)) == by_the_engine(GuestKind::Hvm, 8));
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

/// The host's file counts for a VM without the key.
#[test]
fn the_host_s_configuration_turns_it_off_for_every_vm() {
    for (text, key, runs) in [
        ("xsr-live-suspend = false\n", None, 0),
        ("xsr-live-suspend = false\n", Some("true"), 1),
        ("xsr-live-suspend = true\n", Some("false"), 0),
        ("xsr-live-suspend = tea\n", None, 1),
        ("tea = false\n", None, 1),
    ] {
        let dir = scratch();
        let machine = guest(dir.path(), GuestKind::Pv, 8);
        let run = machine.with_extension("run");
        fs::create_dir(&run).unwrap();
        fs::write(run.join("settings"), text).unwrap();
        if let Some(value) = key {
            keys(&run, &[("xsr-live-suspend", value)]);
        }
        let (ended, _) = suspended(&machine, dir.path(), "-mode save");
        assert_eq!(ended.with(RUNS).len(), runs, "{text:?} {key:?}: {ended:?}");
        let ignored = ended
            .lines
            .iter()
            .filter(|line| line.contains(" is ignored: "));
        assert_eq!(
            ignored.count(),
            usize::from(text.contains("tea")),
            "{ended:?}"
        );
    }
    // A PCI device is another matter: only the VM's own key says that it may.
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let run = machine.with_extension("run");
    fs::create_dir_all(run.join("xenstore/0/backend/pci/1")).unwrap();
    fs::write(run.join("settings"), "xsr-live-suspend = true\n").unwrap();
    let (ended, _) = suspended(&machine, dir.path(), "-mode save");
    assert!(ended.with(RUNS).is_empty(), "{ended:?}");
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
