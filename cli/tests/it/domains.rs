//! save, restore and mock: domains are saved to images and restored from them. A failure leaves the
//! domain running, or none, and no file.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::migration::Hosts;
use crate::common::{
    arg, backend, create, host_with, image, layers, ran, real_images, run, scratch, state, xsr,
};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use xsr_format::frame::Gfn;
use xsr_xen_backend::Host as _;
use xsr_xen_backend::domain_store::DomainStore;
use xsr_xen_backend::mock::MockHost;

const KINDS: [&str; 4] = ["pv", "pv32", "hvm", "pvh"];

/// Names in a directory, except the host's.
fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "host")
        .collect();
    names.sort();
    names
}

#[test]
fn every_kind_comes_back() {
    for kind in KINDS {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let other = dir.path().join("other");
        let (image, again) = (dir.path().join("a.save"), dir.path().join("b.save"));
        run(["save", &backend(&host), "web", arg(&image)]).code(0);
        assert_eq!(state(&host, "web"), None, "it has moved into the image");
        run(["verify", arg(&image)]).code(0);
        run(["restore", &backend(&other), arg(&image)]).code(0);
        assert_eq!(state(&other, "web").as_deref(), Some("running"));
        run(["save", &backend(&other), "web", arg(&again)]).code(0);
        run(["diff", "--after-restore", arg(&image), arg(&again)]).code(0);
        // Without the list of what a restore rewrites, the difference is reported.
        run(["diff", arg(&image), arg(&again)])
            .code(1)
            .stdout_has("incarnation");
    }
}

#[test]
fn a_domain_that_nothing_ran_in_saves_to_the_same_bytes() {
    for kind in KINDS {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let images = ["a.save", "b.save"].map(|name| dir.path().join(name));
        for image in &images {
            run(["save", "-c", &backend(&host), "web", arg(image)]).code(0);
        }
        let [a, b] = images.map(|image| fs::read(image).unwrap());
        assert!(a == b, "{kind}: the second save differs");
        // A domain created the same way elsewhere does, too.
        let other = dir.path().join("elsewhere");
        create(&other, "web", kind);
        let image = dir.path().join("c.save");
        run(["save", &backend(&other), "web", arg(&image)]).code(0);
        assert!(
            a == fs::read(image).unwrap(),
            "{kind}: made again, it differs"
        );
    }
}

#[test]
fn c_leaves_it_running_and_p_paused() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let image = dir.path().join("a.save");
    for (option, expected) in [("-c", "running"), ("-p", "paused")] {
        let json = run([
            "save",
            "--json",
            option,
            &backend(&host),
            "web",
            arg(&image),
        ])
        .code(0);
        assert_eq!(json.json()["domain"], expected);
        assert_eq!(state(&host, "web").as_deref(), Some(expected));
    }
    let other = dir.path().join("other");
    let backend = backend(&other);
    let args = ["--json", "-p", "--threads", "1", &backend, arg(&image)];
    let json = run(["restore"].iter().chain(&args)).code(0);
    assert_eq!(json.json()["domain"], "paused");
    assert_eq!(state(&other, "web").as_deref(), Some("paused"));
}

#[test]
fn an_image_is_there_whole_and_for_its_owner_alone() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let image = dir.path().join("a.save");
    fs::write(&image, "what was there before").unwrap();
    run(["save", &backend(&host), "web", arg(&image)]).code(0);
    assert_eq!(files(dir.path()), ["a.save"], "no temporary file is left");
    let mode = fs::metadata(&image).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_file_in_shared_memory_is_a_file() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    };
    let host = host_with("pvh", dir.path());
    let image = dir.path().join("a.save");
    // Longer than the image: the old file is replaced, not overwritten in place.
    fs::write(&image, vec![1; 20 << 20]).unwrap();
    run(["save", &backend(&host), "web", arg(&image)]).code(0);
    let verified = run(["verify", "--json", arg(&image)]).code(0).json();
    assert_eq!(verified.get("trailing_bytes"), None);
}

#[test]
fn an_open_descriptor_is_written_straight() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let save = |file: &str| {
        let output = xsr(["save", "-c", &backend(&host), "web", file]).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        output.stdout
    };
    let dash = save("-");
    assert!(!dash.is_empty());
    assert!(dash == save("/dev/stdout"), "another image");
    assert!(dash == save("/dev/fd/1"), "another image");
}

#[test]
fn a_fifo_is_written_straight() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || fs::read(fifo).unwrap()
    });
    run(["save", &backend(&host), "web", arg(&fifo)]).code(0);
    let mut verify = xsr(["verify", "-"]);
    verify.write_stdin(reader.join().unwrap());
    ran(verify).code(0);
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
}

#[test]
fn a_link_to_a_file_stays_a_link() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let (image, link) = (dir.path().join("a.save"), dir.path().join("link"));
    fs::write(&image, "").unwrap();
    std::os::unix::fs::symlink("a.save", &link).unwrap();
    run(["save", &backend(&host), "web", arg(&link)]).code(0);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    run(["verify", arg(&image)]).code(0);
}

#[test]
fn through_a_pipe_and_back() {
    for kind in ["pv", "hvm"] {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let file = dir.path().join("a.save");
        run(["save", "-c", &backend(&host), "web", arg(&file)]).code(0);
        let output = xsr(["save", &backend(&host), "web", "-"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(
            output.stdout == fs::read(&file).unwrap(),
            "stdout got another image"
        );
        let mut restore = xsr(["restore", &backend(&host), "-"]);
        restore.write_stdin(output.stdout);
        ran(restore).code(0);
        assert_eq!(state(&host, "web").as_deref(), Some("running"));
    }
}

#[test]
fn a_save_that_fails_leaves_the_domain_running_and_no_file() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    run(["save", &backend(&host), "web", "/dev/full"])
        .code(1)
        .stderr_has("No space left");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    // The reader closes the pipe in the middle.
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["save", &backend(&host), "web", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("Broken pipe"), "{stderr}");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    // No such directory: the save does not even begin.
    let nowhere = dir.path().join("nowhere/a.save");
    run(["save", &backend(&host), "web", arg(&nowhere)]).code(1);
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    assert_eq!(files(dir.path()), Vec::<String>::new());
}

#[test]
fn a_signal_breaks_a_save_off_in_good_order() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["save", &backend(&host), "web", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first byte shows that the save has begun; the pipe blocks it while the signal arrives.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    signal::kill(pid, Signal::SIGTERM).unwrap();
    // The signal has been received once none is pending.
    let status = format!("/proc/{pid}/status");
    while !fs::read_to_string(&status)
        .unwrap()
        .contains("ShdPnd:\t0000000000000000")
    {
        std::thread::yield_now();
    }
    io::copy(&mut stdout, &mut io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    // In the header that xl writes, or in the stream.
    let said = ["aborted", "cancelled"].iter().any(|w| stderr.contains(w));
    assert!(said, "{stderr}");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
}

#[test]
fn a_file_that_cannot_be_renamed_leaves_the_domain_running() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    // A directory with the image's name.
    let taken = dir.path().join("a.save");
    fs::create_dir(&taken).unwrap();
    run(["save", &backend(&host), "web", arg(&taken)])
        .code(1)
        .stderr_has("is a directory");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
}

#[test]
fn a_restore_that_fails_leaves_no_domain() {
    let dir = scratch();
    let host = dir.path().join("host");
    for name in ["tpv", "tpvh"] {
        let bytes = fs::read(image(name)).unwrap();
        // A file that is not an image does not even create a host.
        if name == "tpv" {
            run(["restore", &backend(&host), "/dev/null"]).code(2);
            assert!(!host.exists());
        }
        let bad = dir.path().join("bad.save");
        // In the headers, in the pages, in the tail, in the libxl stream after it.
        for length in [60, 900, 1 << 20, bytes.len() - 60, bytes.len() - 4] {
            fs::write(&bad, &bytes[..length]).unwrap();
            run(["restore", &backend(&host), arg(&bad)])
                .code(2)
                .stderr_has("truncated");
            assert_eq!(state(&host, name), None, "{name} cut to {length}");
        }
        run(["restore", &backend(&host), arg(&image(name))]).code(0);
    }
}

#[test]
fn a_restored_domain_stays_where_nobody_hears_of_it() {
    let dir = scratch();
    let host = dir.path().join("host");
    let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["restore", "--json", &backend(&host), arg(&image("tpv"))])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(state(&host, "tpv").as_deref(), Some("running"));
}

#[test]
fn a_name_is_had_by_one_domain() {
    let dir = scratch();
    let host = dir.path().join("host");
    let image = image("tpv");
    run(["restore", &backend(&host), arg(&image)]).code(0);
    run(["restore", &backend(&host), arg(&image)])
        .code(1)
        .stderr_has("\"tpv\" exists already");
    run(["mock", "create", "tpv", "--host", arg(&host)])
        .code(1)
        .stderr_has("exists already");
    let list = run(["mock", "list", "--json", "--host", arg(&host)]).json();
    assert_eq!(list["domains"].as_array().unwrap().len(), 1);
}

#[test]
fn a_domain_that_another_process_works_on_is_not_saved() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let open = MockHost::open(&host).unwrap();
    let web = DomainStore::find(&open, "web").unwrap();
    let held = open.lock(web, "a test").unwrap();
    let image = dir.path().join("a.save");
    run(["save", &backend(&host), "web", arg(&image)])
        .code(1)
        .stderr_has("in use by process")
        .stderr_has("(a test)");
    // It can still be looked at.
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    drop(held);
    assert_eq!(files(dir.path()), Vec::<String>::new());
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
}

#[test]
fn without_xen_the_mock_is_named() {
    if Path::new("/dev/xen/privcmd").exists() {
        eprintln!("SKIPPED: this machine runs Xen");
        return;
    }
    run(["save", "web", "a.save"])
        .code(1)
        .stderr_has("no Xen")
        .stderr_has("mock:DIR");
    let image = image("tpv");
    run(["restore", arg(&image)]).code(1).stderr_has("no Xen");
}

#[test]
fn the_backend_may_come_from_the_environment() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let mut save = xsr(["save", "web", "-"]);
    save.env("XSR_BACKEND", format!("mock:{}", host.display()));
    assert_eq!(save.output().unwrap().status.code(), Some(0));
    assert_eq!(state(&host, "web"), None);
}

#[test]
fn what_is_not_there_is_said() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    run(["save", &backend(&host), "db", "-"])
        .code(1)
        .stderr_has("\"db\"");
    run(["mock", "show", "--host", arg(&host), "99"]).code(1);
    run(["mock", "destroy", "--host", arg(&host), "db"]).code(1);
    run(["mock", "list", "--host", arg(dir.path())])
        .code(1)
        .stderr_has("is not a mock host");
    run(["restore", &backend(&host), "/nonexistent"])
        .code(1)
        .stderr_has("/nonexistent");
}

#[test]
fn a_mock_domain_can_be_made_shown_and_destroyed() {
    let dir = scratch();
    let host = dir.path().join("host");
    for kind in KINDS {
        create(&host, &format!("a-{kind}"), kind);
    }
    run(["mock", "list", "--host", arg(&host)])
        .code(0)
        .stdout_has("a-pv32")
        .stdout_has("running");
    run(["mock", "show", "--host", arg(&host), "a-pv32"])
        .code(0)
        .stdout_has("PV, 32-bit");
    let shown = run(["mock", "show", "--json", "--host", arg(&host), "2"]).code(0);
    assert_eq!(shown.json()["name"], "a-pv32");
    run(["mock", "destroy", "--host", arg(&host), "a-pv"]).code(0);
    assert_eq!(state(&host, "a-pv"), None);
    run([
        "mock",
        "create",
        "x",
        "--host",
        arg(&host),
        "--memory",
        "4100K",
    ])
    .code(64);
    run([
        "mock",
        "create",
        "x",
        "--host",
        arg(&host),
        "--type",
        "pvh",
        "--vcpus",
        "129",
    ])
    .code(1);
    run(["mock", "create", "a/b", "--host", arg(&host)])
        .code(1)
        .stderr_has("not a valid name");
}

#[test]
fn what_an_image_says_itself_is_not_said_again() {
    let dir = scratch();
    let host = dir.path().join("host");
    run([
        "restore",
        &backend(&host),
        "--vcpus",
        "2",
        arg(&image("tpv")),
    ])
    .code(64)
    .stderr_has("has a configuration");
}

#[test]
fn a_suspended_domain_can_be_resumed_and_others_cannot() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let mock = |args: &[&str]| run(["mock"].iter().chain(args).chain(&["--host", arg(&host)]));
    mock(&["resume", "web"])
        .code(1)
        .stderr_has("resuming web: it runs");
    mock(&["unpause", "web"])
        .code(1)
        .stderr_has("unpausing web: it is not paused: it runs");
    mock(&["pause", "web"]).code(0);
    assert_eq!(state(&host, "web").as_deref(), Some("paused"));
    mock(&["unpause", "web"]).code(0);
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
    mock(&["rename", "web", "shop"]).code(0);
    let image = dir.path().join("a.save");
    run(["save", &backend(&host), "shop", arg(&image)]).code(0);
    let inspected = run(["inspect", "--json", arg(&image)]).code(0).json();
    assert_eq!(inspected["guest"]["name"], "shop");
}

#[test]
fn a_configuration_that_makes_no_sense_is_a_bad_image() {
    let dir = scratch();
    let host = dir.path().join("host");
    let bytes = fs::read(image("tpv")).unwrap();
    let bad = dir.path().join("bad.save");
    let at = bytes
        .windows(12)
        .position(|window| window == b"\"type\": \"pv\"")
        .unwrap();
    let mut mutant = bytes;
    mutant[at + 9..at + 11].copy_from_slice(b"vp");
    fs::write(&bad, mutant).unwrap();
    run(["restore", &backend(&host), arg(&bad)])
        .code(2)
        .stderr_has("c_info.type \"vp\"");
}

#[test]
fn a_reserved_bit_is_refused_or_tolerated() {
    let dir = scratch();
    let host = dir.path().join("host");
    let mut bytes = fs::read(image("tpvh")).unwrap();
    let (_, libxc, _) = layers(&bytes);
    // The reserved field of the domain header.
    bytes[libxc + 24 + 6] ^= 1;
    let odd = dir.path().join("odd.save");
    fs::write(&odd, bytes).unwrap();
    run(["restore", &backend(&host), arg(&odd)])
        .code(2)
        .stderr_has("--lenient");
    assert_eq!(state(&host, "tpvh"), None);
    run(["restore", "--lenient", &backend(&host), arg(&odd)]).code(0);
    assert_eq!(state(&host, "tpvh").as_deref(), Some("running"));
}

#[test]
fn json_and_an_image_do_not_share_stdout() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    run(["save", "--json", &backend(&host), "web", "-"]).code(64);
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
}

/// An image of a real Xen survives a round trip: configuration and emulator records byte for byte,
/// and everything that a restore does not rewrite.
#[test]
fn real_images_come_back() {
    let dir = scratch();
    for image in real_images(dir.path()) {
        let host = dir.path().join("host");
        let again = dir.path().join("again.save");
        run(["verify", arg(&image)]).code(0);
        let inspected = run(["inspect", "--json", arg(&image)]).code(0).json();
        let name = inspected["guest"]["name"].as_str().unwrap().to_owned();
        run(["restore", &backend(&host), arg(&image)]).code(0);
        run(["save", &backend(&host), &name, arg(&again)]).code(0);
        run(["verify", arg(&again)]).code(0);
        run(["diff", "--after-restore", arg(&image), arg(&again)]).code(0);
        let (a, b) = (fs::read(&image).unwrap(), fs::read(&again).unwrap());
        let ((_, start_a, end_a), (_, start_b, end_b)) = (layers(&a), layers(&b));
        assert!(a[..start_a] == b[..start_b], "{name}: xl and libxl headers");
        // The live images have the protocol of `xl migrate` after the last record.
        let tail = b.len() - end_b;
        assert!(
            a[end_a..end_a + tail] == b[end_b..],
            "{name}: emulator records"
        );
        fs::remove_file(&image).unwrap();
        fs::remove_dir_all(&host).unwrap();
    }
}

#[test]
fn the_demo_works_and_leaves_nothing() {
    let dir = scratch();
    let mut demo = xsr(["demo"]);
    demo.env("TMPDIR", dir.path());
    let ran = ran(demo)
        .code(0)
        .stdout_has("all the same")
        .stdout_has("Every domain came back");
    let place = ran
        .stdout
        .split_whitespace()
        .find(|word| word.contains("xsr-demo-"));
    let place = place.unwrap().trim_end_matches(';');
    assert!(!Path::new(place).exists(), "{place} is still there");
    assert_eq!(files(dir.path()), Vec::<String>::new());
}

/// The guest decides how long its image is.
#[test]
fn a_pfn_far_beyond_a_guests_memory_is_named() {
    let hosts = Hosts::with("pvh", &[]);
    let (here, file) = (backend(&hosts.here), hosts.path("web.save"));
    let line = ["save", "-c", "--force", &here, "web", arg(&file)];
    let ran = run(line).code(0);
    assert!(!ran.stderr.contains("WARN"), "{ran:?}");
    let mock = MockHost::open(&hosts.here).unwrap();
    let domain = mock.domain(mock.find("web").unwrap()).unwrap();
    assert_eq!(domain.populate(0, &mut [Gfn(1 << 22)]).unwrap(), 1);
    drop((domain, mock));
    run(line)
        .code(0)
        .stderr_has("but pfns up to 0x400000: the image has 32 MiB");
}
