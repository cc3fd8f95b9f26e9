//! Saves and restores on Linux 4.19, the kernel of XCP-ng 8.3's dom0.

use std::os::fd::AsFd as _;

use xsr_xen_backend::GuestKind;

use crate::images::scratch;
use crate::live_suspend::plain;
use crate::machine::{by_the_engine, empty, guest};
use crate::old_kernel::{BECOME, COMMAND, test_program};
use crate::restore::words;
use crate::save::play;
use crate::xenopsd::{Kind, STREAMS, Target, Xenopsd, command, libxc, source};

/// Starts the emu-manager under an old kernel.
fn start(machine: &std::path::Path, words: &str, stream: std::os::fd::OwnedFd) -> Xenopsd {
    let program = env!("CARGO_BIN_EXE_xsr-emu-manager-mock");
    let words = format!("-controloutfd 6 -controlinfd 5 -fd 7 -domid 1 {words}");
    let mut command = command(&test_program(), BECOME);
    command.env(COMMAND, format!("exec {program} {words}")).env(
        "XSR_EMU_TEST_BACKEND",
        format!("mock:{}", machine.display()),
    );
    Xenopsd::spawn(command, stream)
}

#[test]
fn a_save_needs_no_call_that_is_newer() {
    for live in [false, true] {
        for kind in STREAMS {
            let dir = scratch();
            let machine = guest(dir.path(), GuestKind::Pvh, 8);
            let mut target = Target::new(kind, dir.path(), true);
            let words = format!("-mode hvm_save -live {live}");
            let mut xenopsd = start(&machine, &words, target.fd());
            play(&mut xenopsd, &mut target);
            xenopsd.wait().succeeded();
            let image = target.image();
            assert!(live || plain(libxc(&image)) == by_the_engine(GuestKind::Pvh, 8));
        }
    }
}

#[test]
fn a_restore_needs_no_call_that_is_newer() {
    let stream = by_the_engine(GuestKind::Pvh, 8);
    for kind in [Kind::File, Kind::Pipe, Kind::Socket] {
        let dir = scratch();
        let (machine, ports) = empty(dir.path(), GuestKind::Pvh);
        let (ours, go) = source(kind, dir.path(), stream.clone(), stream.len());
        let its = ours.as_fd().try_clone_to_owned().unwrap();
        let mut xenopsd = start(&machine, &words(GuestKind::Pvh, ports), its);
        xenopsd.say("restore:xenguest\n");
        xenopsd.end().succeeded();
        drop(go);
    }
}
