//! The save helper, with the test in libxl's place: which messages come, in which order, the effect
//! of answers, and that the stream is the engine's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "helper/at_freeze.rs"]
mod at_freeze;
#[path = "helper/colo.rs"]
mod colo;
#[path = "../../tests/it/common/images.rs"]
mod images;
#[path = "helper/mapped.rs"]
mod mapped;
#[path = "../../tests/it/common/old_kernel.rs"]
mod old_kernel;
#[path = "helper/remus.rs"]
mod remus;
#[path = "helper/restore.rs"]
mod restore;
#[path = "helper/shipped.rs"]
mod shipped;
#[path = "helper/signals.rs"]
mod signals;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use images::scratch;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use xsr_save_restore::SaveOptions;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_xen_backend::Errno;
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{DomId, GuestKind, Host as _, ShutdownReason};

/// Message numbers, as in `libxl_save_msgs_gen.pl`.
const LOG: u16 = 1;
const PROGRESS: u16 = 2;
const SUSPEND: u16 = 3;
const POSTCOPY: u16 = 4;
const CHECKPOINT: u16 = 5;
const WAIT_CHECKPOINT: u16 = 6;
const LOGDIRTY: u16 = 7;
const STATIC_DATA_DONE: u16 = 8;
const RESTORE_RESULTS: u16 = 9;
const COMPLETE: u16 = 10;

/// The callbacks that libxl has for a plain save (suspend and the log), and for a plain restore
/// (static data and results).
const SAVE_CALLBACKS: &str = "136";
const RESTORE_CALLBACKS: &str = "768";

/// The outcome of one run of the helper.
#[derive(Debug, Default)]
struct Run {
    /// Messages that are neither log nor progress: number and arguments.
    asked: Vec<(u16, Vec<u8>)>,
    /// Lines of the log, each with its level.
    log: Vec<(u32, String)>,
    /// What, done and total of each progress message.
    progress: Vec<(String, u64, u64)>,
    code: Option<i32>,
}

impl Run {
    fn numbers(&self) -> Vec<u16> {
        self.asked.iter().map(|(number, _)| *number).collect()
    }

    /// Result and errno of the last message, which must be "complete".
    #[track_caller]
    fn completed(&self) -> (i32, Errno) {
        let (number, args) = self.asked.last().unwrap();
        assert_eq!(*number, COMPLETE, "{self:?}");
        let int = |at: usize| i32::from_ne_bytes(args[at..at + 4].try_into().unwrap());
        assert_eq!(self.code, Some(0), "{self:?}");
        (int(0), Errno::from_raw(int(4)))
    }

    /// Asserts that the log has a line of this level with this text.
    #[track_caller]
    fn logged(&self, level: u32, text: &str) {
        let found = self
            .log
            .iter()
            .any(|(l, t)| *l == level && t.contains(text));
        assert!(found, "no {text:?} in {self:?}");
    }
}

/// The arguments of a message, read from the front.
struct Arguments<'a>(&'a [u8]);

impl Arguments<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (front, rest) = self.0.split_at(N);
        self.0 = rest;
        front.try_into().unwrap()
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn string(&mut self) -> String {
        let length = usize::try_from(self.u32()).unwrap();
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(text.strip_suffix(b"\0").unwrap().to_vec()).unwrap()
    }
}

/// Start the helper with `stream` as its descriptor 7, as libxl does.
fn start(host: &Path, args: &str, stream: impl Into<Stdio>) -> Child {
    start_with(host, args, stream, "")
}

/// The same, with further redirections for `sh`.
fn start_with(host: &Path, args: &str, stream: impl Into<Stdio>, others: &str) -> Child {
    command(host, args, stream, others).spawn().unwrap()
}

fn command(host: &Path, args: &str, stream: impl Into<Stdio>, others: &str) -> Command {
    let mut command = started(env!("CARGO_BIN_EXE_xsr-save-helper-mock"), args, others);
    command
        .env(
            "XSR_HELPER_TEST_BACKEND",
            format!("mock:{}", host.display()),
        )
        .stderr(stream);
    command
}

/// A program started as by libxl. Its initial stderr becomes its descriptor 7.
fn started(program: &str, args: &str, others: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            &format!("exec \"$0\" \"$@\" 7>&2 2>/dev/null {others}"),
        ])
        .arg(program)
        .args(args.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// Play libxl until the helper ends: `answer` returns the answer to a message that wants one;
/// `None` hangs up.
fn play(mut child: Child, mut answer: impl FnMut(u16) -> Option<i32>) -> Run {
    let mut to: Option<ChildStdin> = child.stdin.take();
    let mut from = child.stdout.take().unwrap();
    let mut run = Run::default();
    let mut head = [0; 2];
    while from.read_exact(&mut head).is_ok() {
        let mut message = vec![0; u16::from_ne_bytes(head).into()];
        from.read_exact(&mut message).unwrap();
        let (number, args) = message.split_at(2);
        let number = u16::from_ne_bytes(number.try_into().unwrap());
        let mut arguments = Arguments(args);
        match number {
            LOG => {
                let (level, errno) = (arguments.u32(), arguments.u32());
                assert_eq!((errno, arguments.string().as_str()), (u32::MAX, "xsr"));
                run.log.push((level, arguments.string()));
                assert!(arguments.0.is_empty());
            }
            PROGRESS => {
                assert_eq!(arguments.string(), "xsr");
                let what = arguments.string();
                run.progress.push((what, arguments.u64(), arguments.u64()));
                assert!(arguments.0.is_empty());
            }
            _ => run.asked.push((number, args.to_vec())),
        }
        if matches!(
            number,
            SUSPEND
                | POSTCOPY
                | CHECKPOINT
                | WAIT_CHECKPOINT
                | LOGDIRTY
                | STATIC_DATA_DONE
                | COMPLETE
        ) {
            match answer(number) {
                Some(answer) => to
                    .as_mut()
                    .unwrap()
                    .write_all(&answer.to_ne_bytes())
                    .unwrap(),
                None => to = None,
            }
        }
    }
    run.code = child.wait().unwrap().code();
    run
}

/// libxl's answers when all is well.
fn fine(number: u16) -> Option<i32> {
    Some(i32::from(number == SUSPEND))
}

/// A mock host in `dir` with one domain, and the domain's number.
fn host(dir: &Path, kind: GuestKind, width: u8) -> (PathBuf, DomId) {
    let path = dir.join("host");
    let host = MockHost::create(&path, &HostConfig::default()).unwrap();
    let spec = GuestSpec {
        width,
        vcpus: 2,
        ..GuestSpec::new("web", kind, 16)
    };
    let domid = host.create_guest(&spec).unwrap();
    (path, domid)
}

fn save_args(domid: DomId, flags: u32) -> String {
    format!("--save-domain 7 -1 {} {flags} {SAVE_CALLBACKS} 0", domid.0)
}

/// What the engine writes for the same domain.
fn by_the_engine(kind: GuestKind, width: u8) -> Vec<u8> {
    let dir = scratch();
    let (path, domid) = host(dir.path(), kind, width);
    let host = MockHost::open(&path).unwrap();
    let domain = host.domain(domid).unwrap();
    let mut stream = Vec::new();
    xsr_save_restore::SaveRequest::new(domain.as_ref(), host.xen_version().unwrap())
        .options(&SaveOptions::default())
        .observe(&mut |_| std::ops::ControlFlow::Continue(()))
        .write_stream(
            &mut DirectToolstack(domain.as_ref()),
            &mut CopySink(&mut stream),
        )
        .unwrap()
        .keep_suspended();
    stream
}

const KINDS: [(GuestKind, u8); 4] = [
    (GuestKind::Pv, 8),
    (GuestKind::Pv, 4),
    (GuestKind::Hvm, 8),
    (GuestKind::Pvh, 8),
];

#[test]
fn a_save_asks_what_libxl_expects_and_writes_the_engines_stream() {
    for (kind, width) in KINDS {
        let dir = scratch();
        let (path, domid) = host(dir.path(), kind, width);
        let stream = dir.path().join("stream");
        let child = start(&path, &save_args(domid, 0), File::create(&stream).unwrap());
        let run = play(child, fine);
        assert_eq!(run.completed(), (0, Errno::from_raw(0)));
        let expected: &[u16] = match kind {
            GuestKind::Pv => &[SUSPEND, COMPLETE],
            _ => &[LOGDIRTY, SUSPEND, LOGDIRTY, COMPLETE],
        };
        assert_eq!(run.numbers(), expected);
        if kind != GuestKind::Pv {
            let switch = |on: u8| {
                let [low, high] = domid.0.to_ne_bytes();
                vec![low, high, 0, 0, on, 0, 0, 0]
            };
            assert_eq!((&run.asked[0].1, &run.asked[2].1), (&switch(1), &switch(0)));
        }
        run.logged(5, "Saving domain");
        run.logged(1, "starting save");
        assert!(
            fs::read(&stream).unwrap() == by_the_engine(kind, width),
            "{kind:?}"
        );
        // Now it is libxl's task to resume or destroy the guest.
        let host = MockHost::open(&path).unwrap();
        let info = host.domain(domid).unwrap().info().unwrap();
        assert_eq!(info.shutdown, Some(ShutdownReason::Suspend));
    }
}

/// XCP-ng 8.3's dom0 has Linux 4.19.
#[test]
fn a_save_needs_no_system_call_that_is_newer_than_linux_4_19() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    let stream = dir.path().join("stream");
    let program = env!("CARGO_BIN_EXE_xsr-save-helper-mock");
    let args = save_args(domid, 0);
    // What the test program prints goes elsewhere.
    let others = "8>&1 >/dev/null";
    let mut command = started(&old_kernel::test_program(), old_kernel::BECOME, others);
    command
        .env(
            old_kernel::COMMAND,
            format!("exec {program} {args} >&8 8>&-"),
        )
        .env(
            "XSR_HELPER_TEST_BACKEND",
            format!("mock:{}", path.display()),
        )
        .stderr(File::create(&stream).unwrap());
    let run = play(command.spawn().unwrap(), fine);
    assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
    assert!(fs::read(&stream).unwrap() == by_the_engine(GuestKind::Pv, 8));
}

#[test]
fn progress_is_in_the_words_of_xen() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    let run = play(
        start(
            &path,
            &save_args(domid, 0),
            File::create(dir.path().join("s")).unwrap(),
        ),
        fine,
    );
    let mut words: Vec<&str> = run
        .progress
        .iter()
        .map(|(what, ..)| what.as_str())
        .collect();
    words.dedup();
    let expected = [
        "Start of stream",
        "Domain now suspended",
        "Frames",
        "End of stream",
        "Complete",
    ];
    assert_eq!(words, expected);
    let last = run
        .progress
        .iter()
        .rfind(|(what, ..)| what == "Frames")
        .unwrap();
    assert_eq!((last.1, last.2), (4096, 4096));
    let steps = run.progress.iter().filter(|(what, ..)| what == "Frames");
    assert!(
        (4..=5).contains(&steps.count()),
        "16 MiB in steps of 4: {run:?}"
    );
}

#[test]
fn a_live_save_counts_its_passes() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    // FLAGS: live, debug.
    let run = play(
        start(
            &path,
            &save_args(domid, 3),
            File::create(dir.path().join("s")).unwrap(),
        ),
        fine,
    );
    assert_eq!(run.completed(), (0, Errno::from_raw(0)));
    let mut words: Vec<&str> = run
        .progress
        .iter()
        .map(|(what, ..)| what.as_str())
        .collect();
    words.dedup();
    assert_eq!(words[..2], ["Start of stream", "Frames iteration 0"]);
    assert!(words.contains(&"Frames verify"), "{words:?}");
}

#[test]
fn a_live_save_has_the_target_of_its_environment() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let save = |variables: &[(&str, &str)]| {
        let file = File::create(dir.path().join("s")).unwrap();
        let mut command = command(&path, &save_args(domid, 1), file, "");
        command.envs(variables.iter().copied());
        let run = play(command.spawn().unwrap(), fine);
        let host = MockHost::open(&path).unwrap();
        (run, host.show(domid).unwrap().shutdown)
    };
    // The time is up before the first pass.
    let (run, reason) = save(&[("XSR_TIMEOUT", "0"), ("XSR_ON_TIMEOUT", "cancel")]);
    assert_eq!(run.completed(), (-1, Errno::ETIMEDOUT));
    run.logged(8, "save failed: ");
    assert!(!run.numbers().contains(&SUSPEND), "{run:?}");
    assert_eq!(reason, None);
    for (variable, value) in [
        ("XSR_MAX_DOWNTIME", "soon"),
        ("XSR_ON_TIMEOUT", "wait"),
        ("XSR_THREADS", "0"),
    ] {
        let (run, reason) = save(&[(variable, value)]);
        assert_eq!(run.completed().0, -1);
        run.logged(8, &format!("{variable} is {value:?}, expected"));
        assert_eq!((run.numbers().len(), reason), (1, None));
    }
    let (run, reason) = save(&[("XSR_TIMEOUT", "0")]);
    assert_eq!(run.completed(), (0, Errno::from_raw(0)));
    assert!(reason.is_some(), "{run:?}");
}

/// As under `xl save`, whose libxl does not ask for it.
#[test]
fn a_save_is_live_if_the_environment_says_so() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let save = |variables: &[(&str, &str)]| {
        let file = File::create(dir.path().join("s")).unwrap();
        let mut command = command(&path, &save_args(domid, 0), file, "");
        command.envs(variables.iter().copied());
        play(command.spawn().unwrap(), fine)
    };
    let bad = save(&[("XSR_LIVE", "yes")]);
    assert_eq!(bad.completed().0, -1);
    bad.logged(8, "XSR_LIVE is \"yes\", expected");
    assert!(!bad.numbers().contains(&SUSPEND));
    // Only a live save has a time that can be up before the guest is asked to suspend.
    let up = [("XSR_TIMEOUT", "0"), ("XSR_ON_TIMEOUT", "cancel")];
    let late = save(&[&[("XSR_LIVE", "1")], &up[..]].concat());
    assert_eq!(late.completed(), (-1, Errno::ETIMEDOUT));
    assert!(!late.numbers().contains(&SUSPEND));
    let live = save(&[("XSR_LIVE", "1")]);
    assert_eq!(live.completed(), (0, Errno::from_raw(0)));
    assert!(live.numbers().contains(&SUSPEND), "{live:?}");
    let host = MockHost::open(&path).unwrap();
    assert!(host.show(domid).unwrap().shutdown.is_some());
    assert!(!host.is_log_dirty(domid).unwrap());
}

#[test]
fn a_guest_that_libxl_cannot_suspend_fails_the_save() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Hvm, 8);
    let child = start(
        &path,
        &save_args(domid, 0),
        File::create(dir.path().join("s")).unwrap(),
    );
    let run = play(child, |number| match number {
        SUSPEND => Some(0),
        other => fine(other),
    });
    assert_eq!(run.completed(), (-1, Errno::EIO));
    // The device model's log is off again.
    assert_eq!(run.numbers(), [LOGDIRTY, SUSPEND, LOGDIRTY, COMPLETE]);
    run.logged(8, "suspending the guest");
    let host = MockHost::open(&path).unwrap();
    assert_eq!(host.domain(domid).unwrap().info().unwrap().shutdown, None);
}

#[test]
fn sigterm_stops_a_save_whose_reader_has_stalled() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let child = start(&path, &save_args(domid, 1), writer);
    let pid = Pid::from_raw(child.id().cast_signed());
    let stopping = std::thread::spawn(move || {
        // Bytes have arrived, so the signal is caught by now. The rest is never read.
        reader.read_exact(&mut [0; 4096]).unwrap();
        signal::kill(pid, Signal::SIGTERM).unwrap();
        reader
    });
    let run = play(child, fine);
    drop(stopping.join().unwrap());
    assert_eq!(run.completed(), (-1, Errno::ECANCELED), "{run:?}");
    assert_eq!(run.numbers(), [LOGDIRTY, LOGDIRTY, COMPLETE]);
    let host = MockHost::open(&path).unwrap();
    assert_eq!(host.domain(domid).unwrap().info().unwrap().shutdown, None);
}

#[test]
fn a_libxl_that_goes_away_ends_the_helper_as_it_ends_xens() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    let child = start(
        &path,
        &save_args(domid, 0),
        File::create(dir.path().join("s")).unwrap(),
    );
    assert_eq!(play(child, |_| None).code, Some(254));
    let host = MockHost::open(&path).unwrap();
    assert_eq!(host.domain(domid).unwrap().info().unwrap().shutdown, None);
    drop(host);
    let mut child = start(
        &path,
        &save_args(domid, 0),
        File::create(dir.path().join("s")).unwrap(),
    );
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(255));
}

#[test]
fn what_it_cannot_do_it_says_before_it_touches_the_guest() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pv, 8);
    let file = || File::create(dir.path().join("s")).unwrap();
    // COLO without a back channel, and of a PV guest.
    let colo = format!("--save-domain 7 -1 {} 1 {SAVE_CALLBACKS} 2", domid.0);
    let run = play(start(&path, &colo, file()), fine);
    assert_eq!(run.completed(), (-1, Errno::EINVAL));
    run.logged(8, "RECV_FD is -1");
    let run = play(start(&path, &colo.replace("7 -1", "7 7"), file()), fine);
    assert_eq!(run.completed(), (-1, Errno::EIO));
    run.logged(8, "it is for HVM guests");
    let no_such = save_args(DomId(99), 0);
    let run = play(start(&path, &no_such, file()), fine);
    assert_eq!(run.completed(), (-1, Errno::ESRCH));
    let closed = save_args(domid, 0).replace("--save-domain 7", "--save-domain 99");
    let run = play(start(&path, &closed, file()), fine);
    assert_eq!(run.completed(), (-1, Errno::EBADF));
    let run = play(start(&path, "--save-domain 7", file()), fine);
    assert_eq!((run.code, run.asked.len()), (Some(255), 0));
    let run = play(
        start(&dir.path().join("none"), &save_args(domid, 0), file()),
        fine,
    );
    assert_eq!((run.code, run.asked.len()), (Some(255), 0));
    run.logged(8, "none");
}
