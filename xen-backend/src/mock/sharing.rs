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
//!
//! The counters are words of the file `changes`: 0 of the list of domains, 1 of the allocator,
//! 0x10000 + N of the state of domain N.
//!
//! A host in memory belongs to one process, and needs no locks.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
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
/// The interval between attempts.
const LOOK: Duration = Duration::from_millis(2);

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
enum Lock {
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
pub(super) struct Locks(Option<File>);

impl Locks {
    /// The locks of a host in memory: none.
    pub(super) const NONE: Self = Self(None);

    /// Whether a host has been opened in a directory, or is being made there.
    pub(super) fn are_there(place: &Place) -> bool {
        place.file(LOCK, How::Read).is_ok()
    }

    /// Opens the locks of the host in a directory, which marks the host as open.
    pub(super) fn open(place: &Place) -> Result<(Self, Opened), MockError> {
        let locks = Self(Some(place.file(LOCK, How::Write)?));
        let path = || place.path().join(LOCK);
        let until = Instant::now() + OPEN_WAIT;
        loop {
            for (lock, opened) in [(Lock::Alone, Opened::Alone), (Lock::Shared, Opened::Beside)] {
                match locks.set(Range::Open, lock, false) {
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
        Ok(self.set(Range::Open, Lock::Shared, false)?)
    }

    /// Waits for a lock, which is held until the returned value is dropped.
    pub(super) fn hold(&self, range: Range) -> Held<'_> {
        self.wait(range);
        Held { locks: self, range }
    }

    /// Waits for a lock, which is held until [`Locks::give_back`].
    pub(super) fn wait(&self, range: Range) {
        loop {
            match self.set(range, Lock::Alone, true) {
                Ok(()) => return,
                Err(Errno::EINTR) => {}
                // Not every file system has locks. Without them, only one process at a time may use
                // the host.
                Err(errno) => {
                    return tracing::error!(%errno, ?range, "a mock host could not be locked");
                }
            }
        }
    }

    /// Takes a lock, if no other process has it.
    pub(super) fn take(&self, range: Range) -> io::Result<bool> {
        match self.set(range, Lock::Alone, false) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Releases a lock.
    pub(super) fn give_back(&self, range: Range) {
        if let Err(errno) = self.set(range, Lock::Not, false) {
            tracing::error!(%errno, ?range, "a lock of a mock host could not be given back");
        }
    }

    fn set(&self, range: Range, lock: Lock, wait: bool) -> Result<(), Errno> {
        let Some(file) = &self.0 else { return Ok(()) };
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
        let how = match wait {
            true => FcntlArg::F_OFD_SETLKW(&what),
            false => FcntlArg::F_OFD_SETLK(&what),
        };
        fcntl(file, how).map(drop)
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
    use std::sync::mpsc;

    use super::*;

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
}
