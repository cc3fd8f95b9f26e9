//! Tests of the state after each step of writing a file has failed, or was the last one of a
//! process that died; and of features that only files have.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reflink;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FlockOperation, flock};

use super::*;
use crate::storage::{Durability, Segment, segments, testing};

/// Makes one step fail, or this and all later ones, as if the process had died.
#[derive(Debug)]
struct Faulty {
    made: AtomicUsize,
    bad: usize,
    dies: bool,
    /// The most bytes of a write.
    most: usize,
    errno: rustix::io::Errno,
}

impl Steps for Faulty {
    fn before(&self, step: Step) -> io::Result<()> {
        let n = self.made.fetch_add(1, Ordering::Relaxed);
        match n == self.bad || self.dies && n > self.bad {
            true => {
                let error = io::Error::from(self.errno);
                Err(io::Error::new(error.kind(), format!("{step:?}: {error}")))
            }
            false => Ok(()),
        }
    }

    fn most(&self, bytes: usize) -> usize {
        bytes.min(self.most)
    }
}

fn faulty(directory: &Path, bad: usize, dies: bool) -> (FileStorage, Arc<Faulty>) {
    let steps = Arc::new(Faulty {
        made: AtomicUsize::new(0),
        bad,
        dies,
        most: 5,
        errno: [rustix::io::Errno::NOSPC, rustix::io::Errno::IO][bad % 2],
    });
    let storage = FileStorage {
        steps: Arc::<Faulty>::clone(&steps),
        ..FileStorage::new(directory)
    };
    (storage, steps)
}

fn name(name: &str) -> StorageName {
    name.parse().unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

fn put(storage: &dyn Storage, name: &StorageName, bytes: &[u8]) -> Result<(), StorageError> {
    let mut writer = storage.create(name, &Create::stream())?;
    writer
        .write_all(bytes)
        .map_err(StorageError::io("writing", "it"))?;
    writer.commit(Durability::Durable)
}

fn put_slots(storage: &dyn Storage, name: &StorageName, bytes: &[u8]) -> Result<(), StorageError> {
    let writer = storage.create(name, &Create::slots())?;
    writer.write_all_at(&bytes[8..], 8)?;
    writer.sync()?;
    writer.write_all_at(&bytes[..8], 0)?;
    writer.set_length(bytes.len() as u64)?;
    writer.punch(0..0)?;
    writer.commit(Durability::Durable)
}

#[test]
fn files_keep_the_contract() {
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(directory.path());
    assert_eq!(testing::run(&storage), []);
    assert_eq!(names(directory.path()), Vec::<String>::new());
}

/// The kill schedule: each step of each way to write fails, or is where the process dies.
#[test]
fn whichever_step_fails_the_name_stands_for_the_old_file_or_the_whole_new_one() {
    type Put = fn(&dyn Storage, &StorageName, &[u8]) -> Result<(), StorageError>;
    let (old, new) = (
        b"the old image".to_vec(),
        b"the new image, which is longer".to_vec(),
    );
    let name = name("web.save");
    let ways: [Put; 2] = [put, put_slots];
    let mut schedules = 0;
    for (way, dies, before) in ways
        .into_iter()
        .flat_map(|way| [false, true].map(|dies| (way, dies)))
        .flat_map(|(way, dies)| [true, false].map(|before| (way, dies, before)))
    {
        for bad in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let sane = FileStorage::new(directory.path());
            if before {
                put(&sane, &name, &old).unwrap();
            }
            let (storage, steps) = faulty(directory.path(), bad, dies);
            let result = way(&storage, &name, &new);
            let found = fs::read(directory.path().join("web.save")).ok();
            let what = format!("step {bad}, dies: {dies}, {result:?}");
            match &result {
                Ok(()) | Err(StorageError::NotDurable { .. }) => {
                    assert_eq!(found.as_ref(), Some(&new), "{what}");
                }
                Err(_) => assert_eq!(found, before.then(|| old.clone()), "{what}"),
            }
            // Only a process that died leaves anything, and the next one removes it.
            let there = names(directory.path()).len();
            let expected = usize::from(found.is_some());
            assert!(there == expected || dies && there == expected + 1, "{what}");
            put(&sane, &name, b"another").unwrap();
            assert_eq!(names(directory.path()), ["web.save"], "{what}");
            schedules += 1;
            if steps.made.load(Ordering::Relaxed) <= bad {
                result.unwrap();
                break;
            }
        }
    }
    assert!(schedules > 60, "{schedules}");
}

/// A file system that lacks calls.
#[derive(Debug)]
struct Lacks(&'static [(Step, rustix::io::Errno)]);

impl Steps for Lacks {
    fn before(&self, step: Step) -> io::Result<()> {
        match self.0.iter().find(|(lacked, _)| *lacked == step) {
            Some((_, errno)) => Err((*errno).into()),
            None => Ok(()),
        }
    }

    fn most(&self, bytes: usize) -> usize {
        bytes
    }
}

#[test]
fn a_file_system_without_calls_to_leave_files_alone_leaves_them_alone() {
    use rustix::io::Errno;
    let lacks: [&'static [_]; 5] = [
        &[(Step::RenameNew, Errno::INVAL)],
        &[(Step::RenameNew, Errno::INVAL), (Step::Link, Errno::PERM)],
        &[(Step::RenameNew, Errno::NOSYS), (Step::Link, Errno::NOSYS)],
        &[
            (Step::RenameNew, Errno::INVAL),
            (Step::Link, Errno::OPNOTSUPP),
        ],
        &[(Step::RenameNew, Errno::INVAL), (Step::Link, Errno::INVAL)],
    ];
    let name = name("a");
    for lacked in lacks {
        let directory = tempfile::tempdir().unwrap();
        let storage = FileStorage {
            steps: Arc::new(Lacks(lacked)),
            ..FileStorage::new(directory.path())
        };
        let create = Create::stream().existing(Existing::Refuse);
        let write = |bytes: &[u8]| {
            let mut writer = storage.create(&name, &create).unwrap();
            writer.write_all(bytes).unwrap();
            writer
        };
        let (first, second) = (write(b"first"), write(b"second"));
        first.commit(Durability::Durable).unwrap();
        let error = second.commit(Durability::Durable).unwrap_err();
        assert!(
            matches!(error, StorageError::Exists { .. }),
            "{lacked:?}: {error:?}"
        );
        assert_eq!(fs::read(directory.path().join("a")).unwrap(), b"first");
        assert_eq!(names(directory.path()), ["a"], "{lacked:?}");
    }
    // A failure for another reason does not mean a missing call.
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage {
        steps: Arc::new(Lacks(&[
            (Step::RenameNew, Errno::INVAL),
            (Step::Link, Errno::NOSPC),
        ])),
        ..FileStorage::new(directory.path())
    };
    let create = Create::stream().existing(Existing::Refuse);
    let writer = storage.create(&name, &create).unwrap();
    writer.commit(Durability::Durable).unwrap_err();
    assert!(names(directory.path()).is_empty());
}

#[test]
fn a_process_that_is_killed_leaves_what_the_next_one_removes() {
    const DIRECTORY: &str = "XSR_TEST_STORAGE_DIRECTORY";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        let storage = FileStorage::new(directory);
        let mut writer = storage.create(&name("a"), &Create::stream()).unwrap();
        writer.write_all(b"half").unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let test = "storage::file::tests::a_process_that_is_killed_leaves_what_the_next_one_removes";
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(DIRECTORY, directory.path())
        .output()
        .unwrap();
    assert!(!child.status.success());
    let [left] = &names(directory.path())[..] else {
        panic!("{:?}", names(directory.path()));
    };
    assert!(
        left.starts_with(".a.") && left.ends_with(".partial"),
        "{left}"
    );
    let mode = fs::metadata(directory.path().join(left)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    let storage = FileStorage::new(directory.path());
    assert_eq!(storage.list().unwrap(), [], "it is no image");
    put(&storage, &name("a"), b"whole").unwrap();
    assert_eq!(names(directory.path()), ["a"]);
}

#[test]
fn what_is_in_use_or_is_not_a_temporary_file_stays() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let kept = [
        ".a.AbC12.partial",
        ".a.AbC123.part",
        ".a.Ab.123.partial",
        ".b.AbC123.partial",
        "a.AbC123.partial",
    ];
    for name in kept {
        fs::write(at(name), "x").unwrap();
    }
    fs::write(at(".a.AbC123.partial"), "left").unwrap();
    fs::write(at(".a.Locked.partial"), "in use").unwrap();
    symlink("a.AbC123.partial", at(".a.Link12.partial")).unwrap();
    let locked = File::open(at(".a.Locked.partial")).unwrap();
    flock(&locked, FlockOperation::LockExclusive).unwrap();
    let storage = FileStorage::new(directory.path());
    put(&storage, &name("a"), b"new").unwrap();
    let mut expected: BTreeSet<_> = kept.into_iter().collect();
    expected.extend(["a", ".a.Locked.partial", ".a.Link12.partial"]);
    assert_eq!(names(directory.path()), Vec::from_iter(expected));
}

/// xl continues when this process is killed, and destroys the guest.
#[test]
fn what_another_program_wrote_is_told_and_never_removed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at(".a.AbC123.xl-partial"), "left").unwrap();
    fs::write(at(".a.Locked.xl-partial"), "in use").unwrap();
    let locked = File::open(at(".a.Locked.xl-partial")).unwrap();
    flock(&locked, FlockOperation::LockExclusive).unwrap();
    let storage = FileStorage::new(directory.path()).written_by_another();
    let target = Target::find(&at("a")).unwrap();
    let left = target.left_by_another();
    assert_eq!(left, [(at(".a.AbC123.xl-partial"), 4)]);
    let Begun::File(mut writer) = storage.write(target, &Create::stream()).unwrap() else {
        panic!("it is a file");
    };
    let temporary = writer.temporary().unwrap().to_owned();
    assert!(temporary.to_str().unwrap().ends_with(".xl-partial"));
    writer.write_all(b"image").unwrap();
    // It cannot get its name, and must not be lost.
    fs::create_dir(at("a")).unwrap();
    let kept = writer.commit_or_keep(Durability::Durable).unwrap_err();
    assert_eq!(kept.at, temporary);
    assert_eq!(fs::read(&temporary).unwrap(), b"image");
    assert_eq!(storage.list().unwrap(), [], "none is an image");
    fs::remove_dir(at("a")).unwrap();
    // These were never written to, and the older one is abandoned.
    for empty in [".a.Young1.xl-partial", ".a.Old123.xl-partial"] {
        fs::write(at(empty), "").unwrap();
    }
    for old in [".a.Old123.xl-partial", ".a.AbC123.xl-partial"] {
        let hours_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
        let file = OpenOptions::new().write(true).open(at(old)).unwrap();
        file.set_modified(hours_ago).unwrap();
    }
    put(&storage, &name("a"), b"new").unwrap();
    assert!(temporary.exists() && at(".a.AbC123.xl-partial").exists());
    assert!(at(".a.Young1.xl-partial").exists());
    assert!(!at(".a.Old123.xl-partial").exists());
}

#[test]
fn the_target_of_a_link_is_replaced_and_not_the_link() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("real")).unwrap();
    fs::write(at("real/a"), "old").unwrap();
    symlink("real/a", at("link")).unwrap();
    symlink("real/new", at("dangling")).unwrap();
    let storage = FileStorage::new(directory.path());
    for (link, target) in [("link", "real/a"), ("dangling", "real/new")] {
        put(&storage, &name(link), b"new").unwrap();
        assert_eq!(fs::read(at(target)).unwrap(), b"new");
        assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink());
    }
    assert_eq!(names(&at("real")), ["a", "new"]);
    // Two that lead to each other.
    symlink("y", at("x")).unwrap();
    symlink("x", at("y")).unwrap();
    let error = put(&storage, &name("x"), b"new").unwrap_err();
    assert!(
        matches!(error, StorageError::Unsupported { .. }),
        "{error:?}"
    );
}

#[test]
fn links_and_pipes_of_other_users_are_refused() {
    use std::os::unix::fs::{chown, lchown};
    const OTHER: Option<u32> = Some(65534);
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make what another user owns");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("victim"), "precious").unwrap();
    symlink("victim", at("link")).unwrap();
    lchown(at("link"), OTHER, None).unwrap();
    fifo(&at("fifo"));
    chown(at("fifo"), OTHER, None).unwrap();
    let storage = FileStorage::new(directory.path());
    for bad in ["link", "fifo"] {
        let error = put(&storage, &name(bad), b"new").unwrap_err();
        let StorageError::Refused { why, .. } = &error else {
            panic!("{error:?}");
        };
        assert!(why.contains("of another user (uid 65534)"), "{why}");
    }
    assert_eq!(fs::read(at("victim")).unwrap(), b"precious");
}

fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
}

#[test]
fn pipes_are_written_straight_and_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(directory.path());
    fifo(&directory.path().join("pipe"));
    let pipe = name("pipe");
    let bytes = vec![7; 3 << 20];
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let Opened::Once(mut reader) = storage.open(&pipe).unwrap() else {
                panic!("a pipe cannot be read at any place");
            };
            assert!(reader.descriptor().is_some());
            let mut arrived = Vec::new();
            reader.read_to_end(&mut arrived).unwrap();
            arrived
        });
        let mut writer = storage.create(&pipe, &Create::stream()).unwrap();
        assert!(writer.is_straight());
        writer.write_all(&bytes).unwrap();
        writer.commit(Durability::Durable).unwrap();
        assert!(reading.join().unwrap() == bytes);
    });
    assert_eq!(names(directory.path()), ["pipe"]);
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .open(directory.path().join("pipe"))
        .unwrap();
    let error = storage.create(&pipe, &Create::slots()).unwrap_err();
    assert!(
        matches!(error, StorageError::Unsupported { .. }),
        "{error:?}"
    );
    drop(held);
    let error = storage.remove(&pipe).unwrap_err();
    assert!(
        matches!(error, StorageError::Unsupported { .. }),
        "{error:?}"
    );
}

#[test]
fn a_descriptor_by_name_is_written_where_it_stands() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before ").unwrap();
    let path = format!("/dev/fd/{}", file.as_raw_fd());
    let error = Target::find(Path::new(&path)).unwrap_err();
    assert_eq!(error.to_string(), format!("{path} is not open"));
    // Like an inherited one.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    for path in [
        format!("/dev/fd/{}", file.as_raw_fd()),
        format!("/proc/self/fd/{}", file.as_raw_fd()),
    ] {
        let (storage, name) = FileStorage::at(Path::new(&path)).unwrap();
        put(&storage, &name, b"middle ").unwrap();
    }
    file.write_all(b"after").unwrap();
    let mut all = [0; 26];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut all, 0).unwrap();
    assert_eq!(&all, b"before middle middle after");
    let error = put(
        &FileStorage::new("/proc/self/fd"),
        &name("999999"),
        b"nowhere",
    );
    assert!(
        matches!(error, Err(StorageError::Unsupported { .. })),
        "{error:?}"
    );
}

#[test]
fn directories_are_neither_written_nor_read_nor_removed() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("d")).unwrap();
    let storage = FileStorage::new(directory.path());
    let d = name("d");
    assert!(matches!(
        put(&storage, &d, b""),
        Err(StorageError::Unsupported { .. })
    ));
    let opened = storage.open(&d);
    assert!(matches!(opened, Err(StorageError::Unsupported { .. })));
    let removed = storage.remove(&d);
    assert!(matches!(removed, Err(StorageError::Unsupported { .. })));
    assert_eq!(storage.list().unwrap(), []);
    let nowhere = FileStorage::new(directory.path().join("nowhere"));
    assert!(put(&nowhere, &d, b"").is_err());
    assert!(FileStorage::at(Path::new("/")).is_err());
}

#[test]
fn holes_of_a_file_take_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(directory.path());
    let sparse = name("sparse");
    let writer = storage.create(&sparse, &Create::slots()).unwrap();
    writer.write_all_at(&[1; 1 << 20], 0).unwrap();
    writer.write_all_at(&[2; 4096], 63 << 20).unwrap();
    writer.punch(4096..1 << 20).unwrap();
    writer.set_length(64 << 20).unwrap();
    writer.commit(Durability::Durable).unwrap();
    let found = fs::metadata(directory.path().join("sparse")).unwrap();
    assert_eq!(found.len(), 64 << 20);
    if found.blocks() * 512 > 8 << 20 {
        eprintln!("SKIPPED: the file system of {directory:?} keeps no holes");
        return;
    }
    let Opened::Random(reader) = storage.open(&sparse).unwrap() else {
        panic!("it can be read only once");
    };
    let data = segments(&*reader).map(Result::unwrap);
    let data: Vec<_> = data
        .filter(|segment| matches!(segment, Segment::Data(_)))
        .collect();
    let expected = [0..4096, 63 << 20..(63 << 20) + 4096].map(Segment::Data);
    assert_eq!(data, expected);
}

#[test]
fn a_file_that_is_shortened_while_it_is_read_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(directory.path());
    put(&storage, &name("a"), &[1; 10_000]).unwrap();
    let Opened::Random(reader) = storage.open(&name("a")).unwrap() else {
        panic!("it can be read only once");
    };
    let path = directory.path().join("a");
    let other = OpenOptions::new().write(true).open(&path).unwrap();
    other.set_len(5000).unwrap();
    let error = reader.read_exact_at(&mut [0; 4096], 4096).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{} ends at byte 5000: expected 3192 more bytes",
            path.display()
        )
    );
    // No hole is found after the end either.
    for segment in segments(&*reader) {
        segment.unwrap();
    }
}

/// A clean-up that records its calls.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn tell(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
}

impl Cleanup for Told {
    fn while_making(
        &self,
        to: &Path,
        make: &mut dyn FnMut() -> io::Result<PathBuf>,
    ) -> io::Result<Box<dyn Registered>> {
        let made = make()?;
        assert!(made.exists());
        self.tell(format!("made for {}", to.file_name().unwrap().display()));
        Ok(Box::new(Entry(self.clone(), made)))
    }
}

#[derive(Debug)]
struct Entry(Told, PathBuf);

impl Registered for Entry {
    fn settle(&mut self, keep: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        assert!(self.1.exists());
        keep()?;
        assert!(!self.1.exists());
        self.0.tell("kept".to_owned());
        Ok(())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.tell("gone".to_owned());
    }
}

#[test]
fn a_cleanup_is_told_of_every_temporary_file() {
    let directory = tempfile::tempdir().unwrap();
    let told = Told::default();
    let storage = FileStorage::new(directory.path()).cleanup(Arc::new(told.clone()));
    drop(storage.create(&name("a"), &Create::stream()).unwrap());
    put(&storage, &name("b"), b"whole").unwrap();
    let so_far = std::mem::take(&mut *told.0.lock().unwrap());
    assert_eq!(so_far, ["made for a", "gone", "made for b", "kept", "gone"]);
    // A file that cannot get its name is a temporary file until it is removed.
    let target = Target::find(&directory.path().join("c")).unwrap();
    let Begun::File(mut writer) = storage.write(target, &Create::stream()).unwrap() else {
        panic!("it is a file");
    };
    fs::create_dir(directory.path().join("c")).unwrap();
    writer.give_name(Durability::Durable).unwrap_err();
    assert_eq!(*told.0.lock().unwrap(), ["made for c"]);
    drop(writer);
    assert_eq!(*told.0.lock().unwrap(), ["made for c", "gone"]);
}
