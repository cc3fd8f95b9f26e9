//! Command lines, and the descriptors that they name.

use std::fs;
use std::process::Command;

use nix::fcntl::OFlag;
use xsr_xen_backend::GuestKind;

use crate::images::scratch;
use crate::machine::{guest, shutdown};
use crate::xenopsd::{Kind, Target, Xenopsd, command, opened};

const SHIPPED: &str = env!("CARGO_BIN_EXE_xsr-emu-manager");

/// Runs the shipped program with these words and the usual descriptors.
fn shipped(words: &str) -> Xenopsd {
    let dir = scratch();
    let target = Target::new(Kind::Pipe, dir.path(), true);
    Xenopsd::spawn(command(SHIPPED, words), target.fd())
}

#[test]
fn xenopsd_is_told_of_a_bad_command_line() {
    const GOOD: &str = "-controlinfd 5 -controloutfd 6 -fd 7 -mode save -domid 1";
    for (words, text) in [
        ("-controloutfd 6", "-mode is missing"),
        (&format!("{GOOD} -tea 3"), "unknown option"),
        (&format!("{GOOD} -fd 99"), "-fd 99: Bad file descriptor"),
        (&format!("{GOOD} -fd -1"), "-fd is"),
        (&format!("{GOOD} -domid 7x"), "-domid is"),
        (&format!("{GOOD} -controlinfd 99"), "-controlinfd 99"),
        (&format!("{GOOD} -mode restore"), "-store_port is missing"),
    ] {
        shipped(words).end().failed(1, text);
    }
    for words in [
        "",
        "-tea",
        "-controloutfd 99 -mode save",
        &GOOD.replace('6', "98"),
    ] {
        let ended = shipped(words).end();
        assert_eq!((ended.lines.len(), ended.code), (0, Some(1)), "{words}");
    }
}

#[test]
fn a_descriptor_has_to_be_open_as_xenopsd_opens_it() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let path = dir.path().join("image");
    let start = |flags| Xenopsd::start(&machine, "-mode save", opened(&path, flags)).end();
    for flags in [OFlag::O_WRONLY, OFlag::O_RDWR] {
        start(flags).failed(1, "open for writing without O_APPEND");
    }
    start(OFlag::O_RDONLY).failed(1, "open for reading only");
    assert_eq!(fs::read(&path).unwrap(), b"");
    assert_eq!(shutdown(&machine), None);
    let flags = OFlag::O_RDWR | OFlag::O_APPEND;
    let mut xenopsd = Xenopsd::start(&machine, "-mode save", opened(&path, flags));
    for line in ["prepare:", "suspend:"] {
        assert!(xenopsd.until(line), "{:?}", xenopsd.lines);
        xenopsd.say("done\n");
    }
    xenopsd.end().succeeded();
    let image = crate::live_suspend::plain(&fs::read(&path).unwrap());
    assert!(image == crate::machine::by_the_engine(GuestKind::Pv, 8));
}

#[test]
fn a_question_gets_an_answer() {
    let says = |words: &[&str]| {
        let output = Command::new(SHIPPED).args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(says(&["-supports", "migration-v2"]), "true\n");
    assert_eq!(says(&["-supports", "tea"]), "false\n");
    let version = concat!("xsr-emu-manager ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(says(&["--version"]), version);
    assert!(says(&["-help"]).contains("platform:emu-manager=xsr"));
}

/// On a machine without Xen the program fails to open it; on a Xen host the domain does not exist.
#[test]
fn no_variable_gives_the_shipped_program_a_mock_machine() {
    let dir = scratch();
    let machine = guest(dir.path(), GuestKind::Pv, 8);
    let target = Target::new(Kind::Pipe, dir.path(), true);
    let words = "-controlinfd 5 -controloutfd 6 -fd 7 -mode save -domid 30000";
    let mut command = command(SHIPPED, words);
    for variable in ["XSR_BACKEND", "XSR_EMU_TEST_BACKEND"] {
        command.env(variable, format!("mock:{}", machine.display()));
    }
    let ended = Xenopsd::spawn(command, target.fd()).end();
    assert_eq!(ended.with("error:").len(), 1, "{ended:?}");
    assert!(ended.with("prepare:").is_empty(), "{ended:?}");
}
