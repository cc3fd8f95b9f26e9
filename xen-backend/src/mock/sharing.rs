//! Synchronisation of the processes that have one mock host open: locks that end with the process
//! that holds them, and counters of changes, which show a process that the host's files are newer
//! than its memory.
//!
//! The locks are on ranges of the file `lock` (`F_OFD_SETLK`). A mutex around each lock excludes
//! this process's own threads:
//!
//! | range | held |
//! |---|---|
//! | 0 | shared as long as the host is open; alone while it is made or put in order |
//! | 1 | while a domain is put on the machine |
//! | 2 | while a domain is given a name |
//! | 3 | while frames are taken or given back |
//! | 0x10000 + N | while the state of domain N is looked at or changed |
//! | 0x20000 + N | by the command that has the lock of domain N |
//! | 0x30000 + N | shared while memory of domain N is written by its frames; alone while they are freed |
//!
//! A process may be stopped (SIGSTOP) while it holds a lock, so no other waits for longer than
//! [`PATIENCE`].
//!
//! A change is counted before it is made, with its lock held: if the process is killed in between,
//! the others read again for nothing, but never miss a change.
//!
//! The counters are words of the file `changes`: 0 of the list of domains, 1 of the allocator,
//! 0x10000 + N of the state of domain N.
//!
//! A host in memory belongs to one process, and needs no locks.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::error::MockError;
use super::place::{How, Place};
use crate::DomId;

/// The file with the locks.
const LOCK: &str = "lock";
/// The file with the counters.
pub(super) const CHANGES: &str = "changes";
/// The number of counters in it.
pub(super) const COUNTERS: usize = 0x2_0000;

/// How long to wait for a process that is repairing the host.
const OPEN_WAIT: Duration = Duration::from_secs(10);
/// The longest interval between attempts.
const LOOK: Duration = Duration::from_millis(2);
/// The first interval between attempts.
const FIRST_LOOK: Duration = Duration::from_micros(50);
/// How long to wait for a lock. No process holds one for as long, unless it is stopped.
const PATIENCE: Duration = match cfg!(test) {
    true => Duration::from_millis(500),
    false => Duration::from_secs(10),
};

/// The subject of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    /// The host is open.
    Open,
    /// The list of domains.
    Domains,
    /// The names of domains.
    Names,
    /// The allocator of frames.
    Allocator,
    /// The state of a domain.
    State(DomId),
    /// The work of a command on a domain.
    Work(DomId),
    /// The memory of a domain, as frames that it has.
    Memory(DomId),
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("the host"),
            Self::Domains => f.write_str("the list of domains"),
            Self::Names => f.write_str("the names of the domains"),
            Self::Allocator => f.write_str("the allocator of memory"),
            Self::State(domid) => write!(f, "the state of {domid}"),
            Self::Work(domid) => write!(f, "the work on {domid}"),
            Self::Memory(domid) => write!(f, "the memory of {domid}"),
        }
    }
}

impl Range {
    fn start(self) -> i64 {
        match self {
            Self::Open => 0,
            Self::Domains => 1,
            Self::Names => 2,
            Self::Allocator => 3,
            Self::State(domid) => 0x1_0000 + i64::from(domid.0),
            Self::Work(domid) => 0x2_0000 + i64::from(domid.0),
            Self::Memory(domid) => 0x3_0000 + i64::from(domid.0),
        }
    }
}

/// The subject of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changes {
    /// The list of domains.
    Domains,
    /// The set of frames taken.
    Allocator,
    /// The state of a domain.
    State(DomId),
}

impl Changes {
    /// The index of its word.
    pub(super) fn index(self) -> usize {
        match self {
            Self::Domains => 0,
            Self::Allocator => 1,
            Self::State(domid) => 0x1_0000 + usize::from(domid.0),
        }
    }
}

/// A way to lock a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Shared,
    Alone,
    Not,
}

/// Whether another process has the host open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// No other process has it open, and none can open it until [`Locks::share`].
    Alone,
    /// Another process has it open.
    Beside,
}

/// The locks of a host.
#[derive(Debug)]
pub(super) struct Locks {
    /// `None` for a host in memory.
    file: Option<File>,
    /// The host's directory.
    path: PathBuf,
}

impl Locks {
    /// The locks of a host in memory: none.
    pub(super) fn none() -> Self {
        Self {
            file: None,
            path: PathBuf::new(),
        }
    }

    /// Whether a host has been opened in a directory, or is being made there.
    pub(super) fn are_there(place: &Place) -> bool {
        place.file(LOCK, How::Read).is_ok()
    }

    /// Opens the locks of the host in a directory, which marks the host as open.
    pub(super) fn open(place: &Place) -> Result<(Self, Opened), MockError> {
        let locks = Self {
            file: Some(place.file(LOCK, How::Write)?),
            path: place.path().to_owned(),
        };
        let path = || place.path().join(LOCK);
        let until = Instant::now() + OPEN_WAIT;
        loop {
            for (lock, opened) in [(Lock::Alone, Opened::Alone), (Lock::Shared, Opened::Beside)] {
                match locks.set(Range::Open, lock) {
                    Ok(()) => return Ok((locks, opened)),
                    Err(Errno::EAGAIN | Errno::EACCES) => {}
                    Err(errno) => return Err(MockError::io("lock", path())(errno.into())),
                }
            }
            if Instant::now() >= until {
                return Err(MockError::InUse {
                    path: place.path().to_owned(),
                });
            }
            thread::sleep(LOOK);
        }
    }

    /// Lets other processes open the host too.
    pub(super) fn share(&self) -> io::Result<()> {
        Ok(self.set(Range::Open, Lock::Shared)?)
    }

    /// Waits for a lock, which is held alone until the returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`MockError::Busy`] if another process holds it for long; the system's.
    pub(super) fn hold(&self, range: Range) -> Result<Held<'_>, MockError> {
        self.wait(range, Lock::Alone)?;
        Ok(Held { locks: self, range })
    }

    /// Waits for a lock, which is held until [`Locks::give_back`].
    ///
    /// # Errors
    ///
    /// As [`Locks::hold`].
    pub(super) fn wait(&self, range: Range, lock: Lock) -> Result<(), MockError> {
        let until = Instant::now() + PATIENCE;
        let mut pause = FIRST_LOOK;
        loop {
            match self.set(range, lock) {
                Ok(()) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => {
                    return Err(MockError::io("lock", self.path.join(LOCK))(errno.into()));
                }
            }
            if Instant::now() >= until {
                return Err(MockError::Busy {
                    path: self.path.clone(),
                    what: range.to_string(),
                    waited: PATIENCE,
                });
            }
            thread::sleep(pause);
            pause = (2 * pause).min(LOOK);
        }
    }

    /// Takes a lock, if no other process has it.
    pub(super) fn take(&self, range: Range) -> io::Result<bool> {
        match self.set(range, Lock::Alone) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Releases a lock.
    pub(super) fn give_back(&self, range: Range) {
        if let Err(errno) = self.set(range, Lock::Not) {
            tracing::error!(%errno, ?range, "a lock of a mock host could not be given back");
        }
    }

    fn set(&self, range: Range, lock: Lock) -> Result<(), Errno> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let kind = match lock {
            Lock::Shared => libc::F_RDLCK,
            Lock::Alone => libc::F_WRLCK,
            Lock::Not => libc::F_UNLCK,
        };
        let what = libc::flock {
            l_type: i16::try_from(kind).map_err(|_| Errno::EINVAL)?,
            l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| Errno::EINVAL)?,
            l_start: range.start(),
            l_len: 1,
            l_pid: 0,
        };
        fcntl(file, FcntlArg::F_OFD_SETLK(&what))?;
        Ok(())
    }
}

/// A held lock, which is released when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the lock back"]
pub(super) struct Held<'l> {
    locks: &'l Locks,
    range: Range,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.locks.give_back(self.range);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, OnceLock, mpsc};

    use xsr_format::frame::{Gfn, PageType};

    use super::*;
    use crate::domain_store::{DomainRef, DomainStore};
    use crate::mock::{GuestSpec, HostConfig, MockHost};
    use crate::{GuestKind, Host as _, NewDomain};

    #[test]
    fn a_lock_is_one_processes_and_a_host_that_is_put_in_order_is_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || {
            let place = Place::create(dir.path()).expect("a directory");
            Locks::open(&place).expect("the locks")
        };
        let (first, opened) = open();
        assert_eq!(opened, Opened::Alone);
        let (asked, waits) = mpsc::channel();
        thread::scope(|scope| {
            let second = scope.spawn(move || {
                asked.send(()).expect("the test waits");
                open()
            });
            waits.recv().expect("it asks");
            first.share().expect("shared");
            let (second, opened) = second.join().expect("no panic");
            assert_eq!(opened, Opened::Beside);
            let range = Range::Work(DomId(7));
            assert!(first.take(range).expect("a lock"));
            assert!(!second.take(range).expect("no lock"));
            assert!(second.take(Range::Work(DomId(8))).expect("another's"));
            drop(first);
            assert!(second.take(range).expect("it has ended"));
        });
    }

    #[test]
    fn a_lock_that_another_process_keeps_is_an_error_in_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::create(dir.path()).expect("a directory");
        let (stopped, _) = Locks::open(&place).expect("the locks");
        stopped.share().expect("shared");
        let (other, _) = Locks::open(&place).expect("the locks");
        for (range, what) in [
            (Range::Names, "the names of the domains"),
            (Range::State(DomId(3)), "the state of domain 3"),
        ] {
            let held = stopped.hold(range).expect("a lock");
            let error = other.hold(range).expect_err("it is held").to_string();
            assert!(error.contains(what), "{error}");
            assert!(error.contains("is stopped, continue or end it"), "{error}");
            drop(held);
            drop(other.hold(range).expect("it is free"));
        }
    }

    #[test]
    fn a_lock_that_fails_is_an_error() {
        // Locks cannot be set on such a descriptor.
        let locks = Locks {
            file: Some(File::open("/dev/null").expect("a file")),
            path: PathBuf::from("/dev"),
        };
        let error = locks.hold(Range::Names).expect_err("no lock");
        assert!(matches!(error, MockError::Io { .. }), "{error}");
    }

    fn small() -> HostConfig {
        HostConfig {
            memory_pages: 4096,
            ..HostConfig::default()
        }
    }

    /// Two processes' views of one host, and a guest of it.
    fn two(dir: &Path) -> ([MockHost; 2], DomId) {
        let one = MockHost::create(dir, &small()).expect("a host");
        let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
        let domid = one.create_guest(&spec).expect("a guest");
        let other = MockHost::open(dir).expect("the host");
        ([one, other], domid)
    }

    #[test]
    fn a_stopped_process_holds_up_no_rename_for_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([stopped, other], domid) = two(dir.path());
        let stopped = stopped.mock_domain(domid).expect("the guest");
        let state = stopped.dom.lock().expect("its state");
        let error = other.rename(domid, "other").expect_err("it is held");
        let MockError::Backend(error) = error else {
            panic!("{error}");
        };
        assert_eq!(error.errno, Errno::ETIMEDOUT);
        let words = error.to_string();
        assert!(
            words.contains("the lock of the state of domain 1 could not be taken"),
            "{words}"
        );
        drop(state);
        other.rename(domid, "other").expect("it goes on");
    }

    /// The lock of the allocator is taken before anything is changed.
    #[test]
    fn a_domain_whose_memory_cannot_be_freed_is_not_destroyed() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([stopped, other], domid) = two(dir.path());
        let domain = other.domain(domid).expect("the guest");
        let held = stopped.machine.hold_allocator().expect("the allocator");
        let error = domain.destroy().expect_err("it is held");
        assert_eq!(error.errno, Errno::ETIMEDOUT);
        let words = error.to_string();
        assert!(words.contains("the allocator of memory"), "{words}");
        for host in [&stopped, &other] {
            assert_eq!(host.find("web").expect("it is there"), domid);
        }
        domain.info().expect("it runs");
        drop(held);
        let before = other.free_pages();
        domain.destroy().expect("it is free");
        assert!(other.free_pages() > before);
        stopped.find("web").expect_err("it is gone");
    }

    /// A lock that is not free is told from a machine that is full.
    #[test]
    fn a_lock_of_the_allocator_is_not_called_a_lack_of_memory() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([stopped, other], _) = two(dir.path());
        let new = NewDomain::new(GuestKind::Pvh, 1, 100);
        let domid = other.create(&new).expect("a domain");
        let domain = other.domain(domid).expect("it");
        let mut frames = [Gfn(0), Gfn(1)];
        assert_eq!(domain.populate(0, &mut frames).expect("memory"), 2);
        let held = stopped.machine.hold_allocator().expect("the allocator");
        let before = other.free_pages();
        let mut more = [Gfn(7)];
        let populated = domain.populate(0, &mut more).map(drop);
        let released = domain.release(&frames).map(drop);
        for error in [
            populated.expect_err("it is held"),
            released.expect_err("it is held"),
            other.create(&new).map(drop).expect_err("it is held"),
        ] {
            assert_eq!(error.errno, Errno::ETIMEDOUT, "{error}");
            let words = error.to_string();
            assert!(words.contains("could not be taken"), "{words}");
        }
        assert_eq!(other.free_pages(), before);
        drop(held);
        assert_eq!(domain.release(&frames).expect("free"), 2);
        other.create(&new).expect("room");
    }

    #[test]
    fn a_domain_is_found_whatever_others_are_doing() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([stopped, other], web) = two(dir.path());
        let mail = other.create_guest(&GuestSpec::new("mail", GuestKind::Pvh, 4));
        let mail = mail.expect("a guest");
        let held = stopped.mock_domain(web).expect("the guest");
        let held = held.dom.lock().expect("its state");
        assert_eq!(other.find(&mail.0.to_string()).expect("there"), mail);
        assert_eq!(other.find("mail").expect("there"), mail);
        // Not "no such domain": the other may have that name.
        let error = other.find("database").expect_err("it is held");
        assert!(matches!(error, MockError::Busy { .. }), "{error}");
        drop(held);
        let error = other.find("77").expect_err("no such number");
        assert!(matches!(error, MockError::NoSuchDomain { .. }), "{error}");
    }

    #[test]
    fn a_domain_that_cannot_be_forgotten_keeps_its_name_and_its_user_data() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([one, other], domid) = two(dir.path());
        let which = DomainRef::from(&one.domain(domid).expect("it").info().expect("it"));
        for key in ["a", "b", "c"] {
            one.userdata_store(domid, key, key.as_bytes())
                .expect("kept");
        }
        let domain = dir.path().join(format!("domains/{}", domid.0));
        // A directory with that name cannot be replaced by a file.
        for in_the_way in ["blobs/userdata-b.new", "state.json.new"] {
            let path = domain.join(in_the_way);
            fs::create_dir(&path).expect("a directory");
            one.forget(which).expect_err("it is in the way");
            for host in [&one, &other] {
                assert_eq!(host.find("web").expect("its name"), domid, "{in_the_way}");
                for key in ["a", "b", "c"] {
                    let kept = host.userdata_get(domid, key).expect("it can be read");
                    let kept = kept.expect("it is there");
                    assert_eq!(kept, key.as_bytes(), "{in_the_way}");
                }
            }
            fs::remove_dir(&path).expect("removed");
        }
        one.forget(which).expect("forgotten");
        other.find("web").expect_err("no name");
        assert_eq!(other.userdata_get(domid, "b").expect("read"), None);
        let left = fs::read_dir(domain.join("blobs")).expect("the blobs");
        let left = left.map(|entry| entry.expect("an entry").file_name());
        let left: Vec<_> = left
            .map(|name| name.into_string().expect("UTF-8"))
            .collect();
        assert!(
            !left.iter().any(|name| name.starts_with("userdata-")),
            "{left:?}"
        );
    }

    #[test]
    fn user_data_that_cannot_be_written_leaves_the_earlier_and_no_partial_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([one, other], domid) = two(dir.path());
        one.userdata_store(domid, "key", b"earlier").expect("kept");
        let blobs = dir.path().join(format!("domains/{}/blobs", domid.0));
        let partial = blobs.join("userdata-key.new");
        let mut written = false;
        let error = one.keep_userdata(domid, "key", &mut |file| {
            file.write_all(&[7; 1 << 20])?;
            written = partial.exists();
            Err(io::Error::other("the source has failed"))
        });
        let error = error.expect_err("it has failed").to_string();
        assert!(written, "under another name");
        assert!(error.contains("EIO"), "{error}");
        assert!(!partial.exists());
        let kept = other.userdata_get(domid, "key").expect("read");
        assert_eq!(kept.as_deref(), Some(&b"earlier"[..]));
        // That of a process that was killed is removed by the next that opens the host alone.
        fs::write(&partial, b"half").expect("a partial file");
        drop((one, other));
        let again = MockHost::open(dir.path()).expect("the host");
        assert!(!partial.exists());
        let kept = again.userdata_get(domid, "key").expect("read");
        assert_eq!(kept.as_deref(), Some(&b"earlier"[..]));
    }

    #[test]
    fn a_host_that_cannot_be_made_leaves_the_directory_empty() {
        let dir = tempfile::tempdir().expect("a directory");
        let none = HostConfig {
            memory_pages: 1,
            ..HostConfig::default()
        };
        MockHost::create(dir.path(), &none).expect_err("it is too small");
        let left = fs::read_dir(dir.path()).expect("the directory");
        assert_eq!(left.count(), 0);
        MockHost::create(dir.path(), &small()).expect("a host");
        MockHost::create(dir.path(), &none).expect_err("there is one");
        MockHost::open(dir.path()).expect("it is untouched");
    }

    #[test]
    fn a_state_that_cannot_be_read_again_is_neither_used_nor_written_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([one, other], domid) = two(dir.path());
        let (domain, same) = (one.domain(domid), other.domain(domid));
        let (domain, same) = (domain.expect("the guest"), same.expect("the guest"));
        let which = one.find("web").map(|_| domain.info().expect("it"));
        let which = DomainRef::from(&which.expect("the guest"));
        same.pause().expect("paused");
        let path = dir.path().join(format!("domains/{}/state.json", domid.0));
        let kept = fs::read(&path).expect("the state");
        fs::write(&path, b"{").expect("damaged");
        domain.info().expect_err("it is not known");
        domain.pause().expect_err("it is not known");
        domain
            .page_types(&[Gfn(0)], &mut [PageType::XTAB])
            .expect_err("it may be gone");
        one.forget(which).expect_err("it is not known");
        DomainStore::list(&one).expect_err("its name is not known");
        one.rename(domid, "other").expect_err("it is not known");
        assert_eq!(fs::read(&path).expect("the state"), b"{", "written back");
        fs::write(&path, kept).expect("repaired");
        domain.pause().expect("it is read now");
        for _ in 0..2 {
            same.unpause().expect("paused twice");
        }
        same.unpause().expect_err("it runs");
    }

    #[test]
    fn a_list_that_cannot_be_read_again_is_not_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([one, other], domid) = two(dir.path());
        other
            .domain(domid)
            .expect("the guest")
            .destroy()
            .expect("gone");
        let path = dir.path().join("domains");
        let away = dir.path().join("away");
        fs::rename(&path, &away).expect("moved");
        for error in [
            one.list().map(drop).expect_err("not known"),
            one.find("web").map(drop).expect_err("not known"),
            one.rename(domid, "other").expect_err("not known"),
        ] {
            let words = error.to_string();
            assert!(words.contains("domains"), "{words}");
        }
        fs::rename(&away, &path).expect("moved back");
        assert!(one.list().expect("read").is_empty());
    }

    /// The memory of a guest that is destroyed while it is made may be another one's.
    #[test]
    fn a_guest_that_is_destroyed_while_it_is_made_writes_to_no_other() {
        for kind in [GuestKind::Pv, GuestKind::Pvh] {
            let dir = tempfile::tempdir().expect("a directory");
            let one = MockHost::create(dir.path(), &small()).expect("a host");
            let other = MockHost::open(dir.path()).expect("the host");
            let third = Arc::new(OnceLock::new());
            let (made, asked) = (Arc::clone(&third), AtomicUsize::new(0));
            one.stop_making_when(move || {
                // The guest has its memory; the last chunks are being filled.
                if asked.fetch_add(1, Ordering::SeqCst) == 20 {
                    let domid = other.find("web").expect("half made");
                    other.domain(domid).expect("it").destroy().expect("gone");
                    let new = NewDomain::new(GuestKind::Pvh, 1, 3000);
                    let domid = other.create(&new).expect("a domain");
                    let domain = other.domain(domid).expect("it");
                    let mut frames: Vec<Gfn> = (0..3000).map(Gfn).collect();
                    assert_eq!(domain.populate(0, &mut frames).expect("memory"), 3000);
                    made.set((other.clone(), domid)).expect("once");
                }
                false
            });
            let spec = GuestSpec::new("web", kind, 8);
            let error = one.create_guest(&spec).expect_err("it is destroyed");
            assert!(error.to_string().contains("ESRCH"), "{error}");
            let (other, domid) = third.get().expect("made");
            let digest = other.memory_digest(*domid).expect("its memory");
            let zero = other.create(&NewDomain::new(GuestKind::Pvh, 1, 1));
            let zero = zero.expect("a domain");
            let page = &mut [Gfn(0)];
            other
                .domain(zero)
                .expect("it")
                .populate(0, page)
                .expect("a page");
            let zero = other.memory_digest(zero).expect("a page").pages()[0].contents;
            let written = digest.pages().iter().filter(|page| page.contents != zero);
            assert_eq!(written.count(), 0, "{kind:?}");
        }
    }

    #[test]
    fn changes_are_counted_before_they_are_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let ([one, _], domid) = two(dir.path());
        let machine = &one.machine;
        let count = |of| machine.store.count(of);
        let mut record = {
            let dom = machine.dom(domid).expect("the list").expect("the guest");
            dom.lock().expect("its state").record.clone()
        };
        let before = count(Changes::Domains);
        let added = machine.add_domain(|domid, _| {
            assert_ne!(count(Changes::Domains), before, "not counted");
            record.domid = domid;
            (record, BTreeMap::new())
        });
        let added = added.expect("a domain").expect("there is room");
        let before = count(Changes::Domains);
        let state = count(Changes::State(added.domid));
        let path = dir.path().join("domains");
        fs::rename(&path, dir.path().join("away")).expect("moved");
        machine
            .remove_domain(&added)
            .expect_err("it cannot be removed");
        assert_ne!(count(Changes::Domains), before, "not counted");
        assert_ne!(count(Changes::State(added.domid)), state, "not counted");
        assert!(!added.is_gone());
    }
}
