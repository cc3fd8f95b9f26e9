//! The program as shipped: it has no mock machine, creates its mark as a new file, and answers a
//! user.

use super::*;

/// The program as shipped, started as by libxl, but without descriptor 7.
fn shipped(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsr-save-helper"));
    command
        .args(args.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// On a machine without Xen it fails to open Xen; on a Xen host there is no such domain.
#[test]
fn no_variable_gives_it_a_mock_machine() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    for how in ["mock", "mock-xen"] {
        let stream = dir.path().join("stream");
        let machine = format!("{how}:{}", path.display());
        let args = format!("--save-domain 7 -1 30000 0 {SAVE_CALLBACKS} 0");
        let mut command = started(env!("CARGO_BIN_EXE_xsr-save-helper"), &args, "");
        command
            .env("XSR_BACKEND", &machine)
            .env("XSR_HELPER_TEST_BACKEND", &machine)
            .stderr(File::create(&stream).unwrap());
        let run = play(command.spawn().unwrap(), fine);
        assert!(!run.numbers().contains(&SUSPEND), "{run:?}");
        assert!(run.log.iter().all(|(_, text)| !text.contains("MOCK")));
        assert_eq!(fs::read(&stream).unwrap(), b"", "{how}");
    }
    let host = MockHost::open(&path).unwrap();
    assert_eq!(host.domain(domid).unwrap().info().unwrap().shutdown, None);
}

#[test]
fn the_one_for_tests_says_so() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    let stream = File::create(dir.path().join("stream")).unwrap();
    let run = play(start(&path, &save_args(domid, 0), stream), fine);
    run.logged(7, "MOCK: XSR_HELPER_TEST_BACKEND=mock:");
}

#[test]
fn the_mark_is_a_new_file_and_is_made_for_work_only() {
    let dir = scratch();
    let (new, old) = (dir.path().join("new"), dir.path().join("old"));
    fs::write(&old, "precious").unwrap();
    let began = |args: &str, path: &Path| {
        let mut command = shipped(args);
        command.env("XSR_HELPER_BEGAN", path);
        command.output().unwrap().status.code()
    };
    for (args, code) in [
        ("--help", 0),
        ("--version", 0),
        ("--what", 255),
        ("--save-domain 7 -1", 255),
    ] {
        assert_eq!(began(args, &new), Some(code), "{args}");
        assert!(!new.exists(), "{args}");
    }
    let work = format!("--save-domain 7 -1 30000 0 {SAVE_CALLBACKS} 0");
    began(&work, &new);
    assert!(new.exists());
    began(&work, &old);
    assert_eq!(fs::read_to_string(&old).unwrap(), "precious");
}

#[test]
fn a_person_is_told_what_it_is() {
    let said = |args: &str| {
        let output = shipped(args).output().unwrap();
        assert!(output.status.success(), "{args}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let version = concat!("xsr-save-helper ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(said("--version"), version);
    for text in ["usage: xsr-save-helper", "LIBXL_SAVE_HELPER", "XSR_THREADS"] {
        assert!(said("--help").contains(text), "{text}");
    }
}
