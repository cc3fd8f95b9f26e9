//! Tests of permitted outputs, and of their state after a failure.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use std::fs::OpenOptions;

use std::os::fd::BorrowedFd;

use xsr_save_restore::storage::file::check_readable;
use xsr_save_restore::storage::{self, StorageReader};

use super::*;

fn plan<'p>(path: &'p Path, inputs: &'p [&'p Path]) -> OutputPlan<'p> {
    OutputPlan {
        path,
        inputs,
        existing: Existing::Refuse,
        only_copy: false,
    }
}

/// The reason for a refusal.
#[track_caller]
fn refused(plan: &OutputPlan<'_>) -> String {
    let error = Output::open(plan).expect_err("it was taken");
    assert!(error.is::<BadUsage>(), "{error:#}");
    crate::exit::words(error.chain())
}

/// The number of a descriptor, made inheritable.
fn handed_on(file: &File) -> i32 {
    rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty()).unwrap();
    std::os::fd::AsRawFd::as_raw_fd(file)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_output_that_is_its_own_input_is_refused_by_every_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a"), "precious").unwrap();
    fs::hard_link(at("a"), at("hard")).unwrap();
    symlink("a", at("soft")).unwrap();
    symlink(at("soft"), at("softer")).unwrap();
    fs::create_dir(at("d")).unwrap();
    let held = File::open(at("a")).unwrap();
    let descriptor = format!("/proc/self/fd/{}", handed_on(&held));
    let input = at("a");
    for force in [Existing::Refuse, Existing::Replace] {
        for name in ["a", "hard", "soft", "softer", "d/../a", "./d/.././a"] {
            let path = at(name);
            let why = refused(&OutputPlan {
                existing: force,
                ..plan(&path, &[Path::new("other"), &input])
            });
            assert!(
                why.contains("is the same file as the input"),
                "{name}: {why}"
            );
        }
        let why = refused(&plan(Path::new(&descriptor), &[&input]));
        assert!(why.contains("is not open for writing"), "{why}");
    }
    let both = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&input)
        .unwrap();
    let descriptor = format!("/dev/fd/{}", handed_on(&both));
    let why = refused(&plan(Path::new(&descriptor), &[&input]));
    assert!(why.contains("is the same file as the input"), "{why}");
    assert_eq!(fs::read(&input).unwrap(), b"precious");
}

#[test]
fn a_file_that_is_there_stays_unless_it_is_to_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a"), "old").unwrap();
    symlink("a", at("soft")).unwrap();
    symlink("new", at("dangling")).unwrap();
    for name in ["a", "soft"] {
        let why = refused(&plan(&at(name), &[]));
        assert!(why.contains("exists already: --force replaces it"), "{why}");
    }
    let path = at("soft");
    let output = Output::open(&OutputPlan {
        existing: Existing::Replace,
        ..plan(&path, &[])
    });
    let output = output.unwrap();
    assert!(output.aftermath().ends_with("soft is as it was before"));
    let ((), bytes) = output.fill(|sink| Ok(sink.write_all(b"newer")?)).unwrap();
    assert_eq!(bytes, 5);
    assert_eq!(fs::read(at("a")).unwrap(), b"newer");
    assert_eq!(
        fs::metadata(at("a")).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // The target of a link is written, even if it does not exist yet.
    let path = at("dangling");
    let output = Output::open(&plan(&path, &[])).unwrap();
    output.fill(|sink| Ok(sink.write_all(b"x")?)).unwrap();
    assert_eq!(names(dir.path()), ["a", "dangling", "new", "soft"]);
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
}

#[test]
fn a_failure_leaves_what_there_was_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let failing = |existing| {
        let output = Output::open(&OutputPlan {
            existing,
            ..plan(&path, &[])
        });
        let filled = output.unwrap().fill(|sink| {
            sink.write_all(b"half")?;
            bail!("converting b: no good")
        });
        let filled: Result<((), u64)> = filled;
        crate::exit::words(filled.unwrap_err().chain())
    };
    let words = failing(Existing::Refuse);
    assert_eq!(words, "converting b: no good; no file was written");
    assert!(names(dir.path()).is_empty());
    fs::write(&path, "old").unwrap();
    let words = failing(Existing::Replace);
    assert!(words.ends_with("/a is as it was before"), "{words}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

/// A file as an image.
fn cursor(file: File) -> StorageCursor {
    StorageCursor::new(storage::file::opened(file, "image").unwrap()).unwrap()
}

/// An image of 10 bytes, none of which can be read.
#[derive(Debug)]
struct Unreadable;

impl StorageReader for Unreadable {
    fn name(&self) -> String {
        "image".to_owned()
    }

    fn length(&self) -> u64 {
        10
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<usize, StorageError> {
        Err(StorageError::Refused {
            name: self.name(),
            why: "cannot be read".to_owned(),
        })
    }

    fn data_from(&self, offset: u64) -> Result<Option<std::ops::Range<u64>>, StorageError> {
        Ok(Some(offset..10))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[test]
fn a_writing_error_names_the_output_whatever_it_was_taken_for() {
    let output = Output::open(&plan(Path::new("/dev/full"), &[])).unwrap();
    let filled = output.fill(|sink| {
        sink.write_all(b"x")
            .map_err(|e| Error::new(e).context("reading failed"))
    });
    let words = crate::exit::words(filled.unwrap_err().chain());
    assert_eq!(
        words,
        "writing /dev/full: No space left on device (os error 28); what /dev/full got is \
         incomplete"
    );
    // An input that ends early is not the output's fault.
    let source = cursor(tempfile::tempfile().unwrap());
    let output = Output::open(&plan(Path::new("/dev/null"), &[])).unwrap();
    let (copied, _) = output.fill(|sink| Ok(sink.copy(&source, 10)?)).unwrap();
    assert_eq!(copied, 0);
    // Nor is one that cannot be read.
    let unreadable = StorageCursor::over(Arc::new(Unreadable));
    let output = Output::open(&plan(Path::new("/dev/null"), &[])).unwrap();
    let error = output
        .fill(|sink| Ok(sink.copy(&unreadable, 10)?))
        .unwrap_err();
    assert!(
        !crate::exit::words(error.chain()).contains("writing"),
        "{error}"
    );
}

#[test]
fn a_guest_is_not_given_up_for_what_keeps_nothing() {
    for path in ["/dev/null", "/dev/zero", "/dev/random"] {
        let plan = OutputPlan {
            only_copy: true,
            ..plan(Path::new(path), &[])
        };
        let why = refused(&plan);
        assert!(why.contains("keeps nothing"), "{why}");
        let plan = OutputPlan {
            only_copy: false,
            ..plan
        };
        Output::open(&plan).unwrap();
    }
    // By a descriptor's path, too.
    let held = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let path = format!("/proc/self/fd/{}", handed_on(&held));
    let why = refused(&OutputPlan {
        only_copy: true,
        ..plan(Path::new(&path), &[])
    });
    assert!(why.contains("keeps nothing"), "{why}");
}

#[test]
fn a_descriptor_by_name_is_written_where_it_stands() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before ").unwrap();
    let path = format!("/dev/fd/{}", handed_on(&file));
    let output = Output::open(&plan(Path::new(&path), &[])).unwrap();
    output.fill(|sink| Ok(sink.write_all(b"middle ")?)).unwrap();
    file.write_all(b"after").unwrap();
    let mut all = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut all).unwrap();
    assert_eq!(all, "before middle after");
}

#[test]
fn a_file_opened_for_appending_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "log: ").unwrap();
    let log = OpenOptions::new().append(true).open(&path).unwrap();
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(b"image").unwrap();
    source.rewind().unwrap();
    let source = cursor(source);
    let name = format!("/dev/fd/{}", handed_on(&log));
    let output = Output::open(&plan(Path::new(&name), &[])).unwrap();
    output
        .fill(|sink| {
            sink.write_all(b"head ")?;
            assert_eq!(sink.copy(&source, 5)?, 5);
            Ok(())
        })
        .unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"log: head image");
}

#[test]
fn what_a_killed_command_left_is_removed_and_what_is_in_use_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let kept = [
        ".a.save.AbC123.part",
        ".a.save.AbC12.partial",
        ".b.save.AbC123.partial",
        ".a.save.Ab.123.partial",
        "a.save.AbC123.partial",
    ];
    for name in kept {
        fs::write(at(name), "x").unwrap();
    }
    fs::write(at(".a.save.AbC123.partial"), "left").unwrap();
    symlink("a.save.AbC123.partial", at(".a.save.Link12.partial")).unwrap();
    let path = at("a.save");
    let first = Output::open(&plan(&path, &[])).unwrap();
    assert!(!at(".a.save.AbC123.partial").exists());
    let second = Output::open(&plan(&path, &[])).unwrap();
    let replace = OutputPlan {
        existing: Existing::Replace,
        ..plan(&path, &[])
    };
    let third = Output::open(&replace).unwrap();
    // All are in use.
    assert_eq!(names(dir.path()).len(), kept.len() + 4);
    first.fill(|sink| Ok(sink.write_all(b"1")?)).unwrap();
    // A file that has appeared since is not replaced without `--force`.
    let late = second.fill(|sink| Ok(sink.write_all(b"2")?)).unwrap_err();
    let words = crate::exit::words(late.chain());
    assert!(words.contains("--force replaces it"), "{words}");
    assert_eq!(fs::read(&path).unwrap(), b"1");
    third.fill(|sink| Ok(sink.write_all(b"3")?)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"3");
    assert_eq!(names(dir.path()).len(), kept.len() + 2);
}

#[test]
fn room_is_refused_only_where_it_is_surely_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let output = Output::open(&plan(&path, &[])).unwrap();
    output.check_room(4096).unwrap();
    // A pipe has room for everything.
    let (_reader, writer) = io::pipe().unwrap();
    let writer = File::from(std::os::fd::OwnedFd::from(writer));
    let pipe = Output::of_descriptor(writer, "pipe".to_owned()).unwrap();
    pipe.check_room(u64::MAX).unwrap();
}

/// The rules for other users' links and pipes, which only root can create.
#[test]
fn links_and_pipes_of_other_users_are_not_followed() {
    use std::os::unix::fs::{chown, lchown};
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make what another user owns");
        return;
    }
    const OTHER: Option<u32> = Some(65534);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("victim"), "precious").unwrap();
    symlink("victim", at("link")).unwrap();
    lchown(at("link"), OTHER, None).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::from_bits_retain(0o666)).unwrap();
    chown(at("fifo"), OTHER, None).unwrap();
    fs::create_dir(at("real")).unwrap();
    symlink("real", at("way")).unwrap();
    lchown(at("way"), OTHER, None).unwrap();
    for (mode, way_is_refused) in [(0o755, false), (0o1777, true), (0o777, true)] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        for name in ["link", "fifo"] {
            let path = at(name);
            let why = refused(&OutputPlan {
                existing: Existing::Replace,
                ..plan(&path, &[])
            });
            assert!(why.contains("of another user (uid 65534)"), "{why}");
        }
        // The directory belongs to root, the link to another user: refused only if all users can
        // create links there.
        let path = at("way/new");
        match Output::open(&plan(&path, &[])) {
            Ok(_) => assert!(!way_is_refused || mode == 0o755),
            Err(error) => assert!(way_is_refused, "{error:#}"),
        }
    }
    assert_eq!(fs::read(at("victim")).unwrap(), b"precious");
}

#[test]
fn a_descriptor_that_was_not_inherited_has_no_name() {
    let file = tempfile::tempfile().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let own = std::process::id();
    let names = [
        format!("/dev/fd/{number}"),
        format!("/proc/self/fd/{number}"),
        format!("/proc/{own}/fd/{number}"),
        format!("/proc/thread-self/fd/{number}"),
        format!("/proc/{own}/task/{own}/fd/{number}"),
        format!("/proc/self/root/proc/self/fd/{number}"),
        "/dev/fd/9999".to_owned(),
    ];
    for name in &names {
        let path = Path::new(name);
        let error = Output::open(&plan(path, &[])).expect_err("it was taken");
        assert_eq!(format!("{error:#}"), format!("{name}: is not open"));
        let error = check_readable(path).expect_err("it was taken");
        assert_eq!(error.to_string(), format!("{name} is not open"));
    }
    handed_on(&file);
    for name in &names[..6] {
        Output::open(&plan(Path::new(name), &[])).unwrap();
        check_readable(Path::new(name)).unwrap();
    }
}

#[test]
fn a_file_below_proc_is_an_ordinary_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a");
    fs::write(&file, "precious").unwrap();
    let below = |process: &str| {
        let file = file.strip_prefix("/").unwrap();
        Path::new("/proc").join(process).join("root").join(file)
    };
    for process in ["self", "thread-self", &std::process::id().to_string()] {
        let path = below(process);
        let why = refused(&plan(&path, &[]));
        assert!(why.contains("exists already"), "{why}");
        let replace = OutputPlan {
            existing: Existing::Replace,
            ..plan(&path, &[])
        };
        let output = Output::open(&replace).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        drop(output);
    }
    assert_eq!(names(dir.path()), ["a"]);
    let link = Path::new("/proc/self/ns/net");
    let error = Output::open(&plan(link, &[])).unwrap_err();
    assert!(
        format!("{error:#}").contains("has no name outside /proc"),
        "{error:#}"
    );
}

#[test]
fn a_path_with_a_slash_at_its_end_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "precious").unwrap();
    symlink("new/", dir.path().join("link")).unwrap();
    for name in ["new/", "a/", "new/.", "a/.", "new//", "link"] {
        let path = dir.path().join(name);
        let error = Output::open(&plan(&path, &[])).expect_err(name);
        let words = format!("{error:#}");
        assert!(
            words.ends_with(&format!("{name}: is not a directory")),
            "{words}"
        );
    }
    assert_eq!(names(dir.path()), ["a", "link"]);
}

/// A directory like `/sys/dev/block`: a loop device, a partition of it, and a disk.
#[test]
fn a_loop_device_is_the_file_that_it_keeps_its_data_in() {
    let dir = tempfile::tempdir().expect("a directory");
    let (devices, image) = (dir.path().join("dev"), dir.path().join("image"));
    fs::write(&image, b"image").expect("a file");
    let loop0 = dir.path().join("loop0");
    fs::create_dir_all(loop0.join("loop")).expect("a directory");
    fs::create_dir_all(loop0.join("loop0p1")).expect("a directory");
    fs::create_dir_all(&devices).expect("a directory");
    fs::write(loop0.join("loop0p1/partition"), b"1\n").expect("a file");
    let named = format!("{}\n", image.display());
    fs::write(loop0.join("loop/backing_file"), named).expect("a file");
    let link = |to: &Path, name: &str| {
        std::os::unix::fs::symlink(to, devices.join(name)).expect("a link");
    };
    link(&loop0, "7:0");
    link(&loop0.join("loop0p1"), "259:1");
    fs::create_dir_all(devices.join("8:0")).expect("a directory");
    let inode = fs::metadata(&image).expect("the file").ino();
    let behind = |major, minor| {
        let device = nix::sys::stat::makedev(major, minor);
        behind_loop(&devices, device).map(|file| file.ino())
    };
    assert_eq!(behind(7, 0), Some(inode));
    assert_eq!(behind(259, 1), Some(inode));
    assert_eq!(behind(8, 0), None);
    assert_eq!(behind(8, 1), None);
    // Its file has been removed.
    fs::remove_file(&image).expect("removed");
    assert_eq!(behind(7, 0), None);
}
