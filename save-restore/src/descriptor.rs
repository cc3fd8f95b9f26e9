//! How a descriptor is waited for: its other end may be slow, or not move at all, and
//! nobody but we must notice how it is done.
//!
//! O_NONBLOCK belongs to the open file, which may be shared with other processes (a
//! shell's stdout), so it is never set on a descriptor that was given to us; but where
//! somebody else has set it, EAGAIN is waited out. What waits without being told to
//! stop just calls the kernel. With a [`Cancel`] no call blocks:
//!
//! | the descriptor is | a write | a read |
//! |---|---|---|
//! | a pipe | on the same pipe, opened once more without blocking; where /proc does not let us, at most PIPE_BUF after poll(2) | after poll(2) |
//! | a socket | `sendmsg` with MSG_DONTWAIT | after poll(2) |
//! | anything else (files) | just done | just done |
//!
//! The last row is for files and block devices, which do not wait for anybody. A
//! terminal is there too: nobody saves to one.

use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, open, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::{Mode, SFlag, fstat};
use xsr_xen_backend::WriteCall;

use crate::pace::{Pace, ReadLimit};
use crate::progress::{Cancel, Cancelled};

/// How long a wait may last before the token is looked at again, in milliseconds.
const LOOK_EVERY_MS: u8 = 20;

/// What poll(2) promises there is room for in a pipe that it calls writable.
const PIPE_BUF: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// A descriptor, and how to wait for it.
#[derive(Debug)]
pub(crate) struct Descriptor<F> {
    fd: F,
    way: Way,
    /// How fast an end has to take what is written.
    pace: Option<Arc<Pace>>,
    /// How long an end may send nothing.
    read_limit: Option<Arc<ReadLimit>>,
}

/// How long one call may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit<'a> {
    /// Without a byte going through.
    pub(crate) idle: Option<Duration>,
    /// Until this time, whatever goes through.
    pub(crate) until: Option<Instant>,
    /// Beside the descriptor's own token.
    pub(crate) cancel: Option<&'a Cancel>,
    /// When the wait began.
    pub(crate) began: Instant,
}

impl Limit<'_> {
    /// As long as it takes, or until nothing has gone through for so long.
    fn idle(idle: Option<Duration>) -> Self {
        Self {
            idle,
            until: None,
            cancel: None,
            began: Instant::now(),
        }
    }

    /// The time at which a wait ends that began to be one just now.
    fn ends(&self) -> Option<Instant> {
        let idle = self.idle.and_then(|idle| Instant::now().checked_add(idle));
        match (idle, self.until) {
            (Some(idle), Some(until)) => Some(idle.min(until)),
            (idle, until) => idle.or(until),
        }
    }
}

/// How calls are kept from blocking.
#[derive(Debug)]
enum Way {
    /// They are not.
    Blocking,
    /// Nothing blocks here.
    Never(Cancel),
    Socket(Cancel),
    /// With a description of our own of the writing end, if we could get one.
    Pipe(Cancel, Option<OwnedFd>),
}

impl Way {
    fn cancel(&self) -> Option<&Cancel> {
        match self {
            Self::Blocking => None,
            Self::Never(cancel) | Self::Socket(cancel) | Self::Pipe(cancel, _) => Some(cancel),
        }
    }
}

impl<F: AsFd> AsFd for Descriptor<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<F: AsFd> Descriptor<F> {
    /// Waits for as long as it takes.
    pub(crate) fn blocking(fd: F) -> Self {
        Self {
            fd,
            way: Way::Blocking,
            pace: None,
            read_limit: None,
        }
    }

    /// Waits until `cancel` says no. `writing`: it will be written to.
    pub(crate) fn cancellable(fd: F, cancel: Cancel, writing: bool) -> io::Result<Self> {
        let mode = SFlag::from_bits_truncate(fstat(fd.as_fd())?.st_mode) & SFlag::S_IFMT;
        let way = match mode {
            SFlag::S_IFSOCK => Way::Socket(cancel),
            SFlag::S_IFIFO if writing => Way::Pipe(cancel, reopen(fd.as_fd())),
            SFlag::S_IFIFO => Way::Pipe(cancel, None),
            _ => Way::Never(cancel),
        };
        Ok(Self {
            fd,
            way,
            pace: None,
            read_limit: None,
        })
    }

    /// Have a write fail (`TimedOut`) when the other end breaks these rules. Calls that may
    /// block do so all the same.
    pub(crate) fn keep_pace(&mut self, pace: Arc<Pace>) {
        self.pace = Some(pace);
    }

    /// Have a read fail (`TimedOut`) when the other end sends nothing for too long. Calls that
    /// may block do so all the same.
    pub(crate) fn limit_reads(&mut self, limit: Arc<ReadLimit>) {
        self.read_limit = Some(limit);
    }

    /// Who may say stop.
    pub(crate) fn cancel(&self) -> Option<&Cancel> {
        self.way.cancel()
    }

    /// Fails with [`Cancelled`] once somebody has asked to stop.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.way.cancel() {
            Some(cancel) if cancel.is_cancelled() => Err(io::Error::other(Cancelled)),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`], and for the token of one call.
    fn check_both(&self, limit: &Limit<'_>) -> io::Result<()> {
        if limit.cancel.is_some_and(Cancel::is_cancelled) {
            return Err(io::Error::other(Cancelled));
        }
        self.check()
    }

    /// Wait until a call will do something, if only fail (true), or until it is time to give
    /// up, if there is such a time (false).
    fn wait(
        &self,
        what: PollFlags,
        due: &dyn Fn() -> Option<Instant>,
        limit: &Limit<'_>,
    ) -> io::Result<bool> {
        let timeout = match (self.way.cancel(), due()) {
            (None, None) => PollTimeout::NONE,
            _ => PollTimeout::from(LOOK_EVERY_MS),
        };
        loop {
            self.check_both(limit)?;
            if due().is_some_and(|due| Instant::now() >= due) {
                return Ok(false);
            }
            match poll(&mut [PollFd::new(self.fd.as_fd(), what)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Have `write` called until it has done something: with the descriptor and the
    /// call that it is to be done with. Its answer: the octets that were taken.
    ///
    /// # Errors
    ///
    /// [`Cancelled`]; nothing was taken for too long; what `write` says but EINTR and EAGAIN.
    pub(crate) fn write(
        &self,
        write: impl FnMut(BorrowedFd<'_>, WriteCall) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.write_within(
            &Limit::idle(self.pace.as_deref().map(Pace::patience)),
            write,
        )
    }

    /// As [`Self::write`], for no longer than a limit of its own.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_within(
        &self,
        limit: &Limit<'_>,
        mut write: impl FnMut(BorrowedFd<'_>, WriteCall) -> io::Result<usize>,
    ) -> io::Result<usize> {
        // From the first time that there was no room: once bytes are taken, another call begins.
        let mut until = None;
        let mut room = || {
            let until = *until.get_or_insert_with(|| limit.ends());
            let pace = self.pace.as_deref();
            let due = || {
                [until, pace.and_then(Pace::due)]
                    .into_iter()
                    .flatten()
                    .min()
            };
            self.wait(PollFlags::POLLOUT, &due, limit)
        };
        let mut ready = true;
        loop {
            self.check_both(limit)?;
            if self.overdue() {
                return Err(self.stalled(limit));
            }
            let result = match &self.way {
                Way::Blocking | Way::Never(_) => write(self.fd.as_fd(), WriteCall::Writev),
                Way::Socket(_) => write(self.fd.as_fd(), WriteCall::SendDontWait),
                Way::Pipe(_, Some(own)) => write(own.as_fd(), WriteCall::Writev),
                Way::Pipe(_, None) => match room()? {
                    true => write(self.fd.as_fd(), WriteCall::AtMost(PIPE_BUF)),
                    false => return Err(self.stalled(limit)),
                },
            };
            match result {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // poll(2) wants more room in a socket than a write does: one that is read
                    // slowly has been tried once more in the end.
                    if !ready {
                        return Err(self.stalled(limit));
                    }
                    ready = room()?;
                }
                result => {
                    if let (Some(pace), Ok(n)) = (&self.pace, &result) {
                        pace.took(*n as u64);
                    }
                    return result;
                }
            }
        }
    }

    /// Whether the other end has taken too little of what it was sent while a guest is
    /// suspended. (A descriptor that never waits has no other end.)
    fn overdue(&self) -> bool {
        let pace = match self.way {
            Way::Blocking | Way::Never(_) => None,
            Way::Socket(_) | Way::Pipe(..) => self.pace.as_deref(),
        };
        let due = pace.and_then(Pace::due);
        due.is_some_and(|due| Instant::now() >= due)
    }

    /// The other end has taken too little.
    fn stalled(&self, limit: &Limit<'_>) -> io::Error {
        match &self.pace {
            Some(pace) => pace.broken(),
            None => stalled(limit),
        }
    }

    /// Have `read` called until it has read something, or the end; its answer.
    ///
    /// # Errors
    ///
    /// [`Cancelled`]; the other end sends nothing for too long; what `read` says except EINTR and
    /// EAGAIN.
    pub(crate) fn read(
        &self,
        read: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.read_within(&Limit::idle(None), read)
    }

    /// As [`Self::read`], for no longer than a limit of its own.
    ///
    /// # Errors
    ///
    /// `TimedOut` without an errno: nothing has come for as long as may be. As [`Self::read`].
    pub(crate) fn read_within(
        &self,
        limit: &Limit<'_>,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let until = limit.ends();
        let reads = self.read_limit.as_deref();
        let due = || {
            let silent = reads.and_then(|reads| reads.due(limit.began));
            [until, silent].into_iter().flatten().min()
        };
        let come = || match self.wait(PollFlags::POLLIN, &due, limit)? {
            true => Ok(()),
            false => match reads {
                Some(reads) => Err(reads.broken()),
                None => {
                    let why = "the other end has said nothing for too long";
                    Err(io::Error::new(io::ErrorKind::TimedOut, why))
                }
            },
        };
        loop {
            match &self.way {
                Way::Blocking => {}
                Way::Never(_) => self.check_both(limit)?,
                Way::Socket(_) | Way::Pipe(..) => come()?,
            }
            match read(self.fd.as_fd()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => come()?,
                result => return result,
            }
        }
    }

    /// What is there to be read, of a socket or a pipe, without taking or waiting for it: how
    /// many octets of it fit, or are there; 0 at the end, and where there is no such look.
    ///
    /// # Errors
    ///
    /// What the kernel says, EAGAIN where nothing is there.
    pub(crate) fn peek(&self, room: &mut [u8]) -> io::Result<usize> {
        let fd = self.fd.as_fd();
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(fd.as_raw_fd(), room, flags) {
            Err(Errno::ENOTSOCK) => {}
            result => return Ok(result?),
        }
        let (mut copy, copied) = io::pipe()?;
        match tee(fd, &copied, room.len(), SpliceFFlags::SPLICE_F_NONBLOCK) {
            // Not a pipe.
            Err(Errno::EINVAL) => Ok(0),
            Err(errno) => Err(errno.into()),
            Ok(n) => {
                copy.read_exact(&mut room[..n])?;
                Ok(n)
            }
        }
    }
}

/// Nothing was taken for as long as may be.
fn stalled(limit: &Limit<'_>) -> io::Error {
    let waited = limit.idle.unwrap_or_else(|| limit.began.elapsed());
    let seconds = waited.as_secs_f64();
    let why = format!("the other end has taken nothing for {seconds} s");
    io::Error::new(io::ErrorKind::TimedOut, why)
}

/// The writing end of a pipe, opened once more: another open file, whose O_NONBLOCK
/// nobody shares.
fn reopen(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty())
        .inspect_err(|error| tracing::debug!(%error, "the pipe cannot be opened once more"))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::RecvTimeoutError;
    use std::thread;
    use std::time::{Duration, Instant};

    use nix::fcntl::{FcntlArg, fcntl};
    use xsr_xen_backend::Gather;

    use super::*;
    use crate::sink::FdSink;
    use crate::source::FdSource;

    fn write_all<F: AsFd>(descriptor: &Descriptor<F>, octets: &[u8]) -> io::Result<()> {
        let mut list = Gather::new();
        list.push(octets);
        let mut rest = list.unwritten();
        while !rest.is_empty() {
            descriptor.write(|fd, call| rest.write_some(fd, call))?;
        }
        Ok(())
    }

    /// Every kind of writing end: a pipe both ways, a socket.
    fn writers(cancel: &Cancel) -> [(Descriptor<OwnedFd>, OwnedFd); 3] {
        let (pipe_out, pipe_in) = io::pipe().unwrap();
        let (once_out, once_in) = io::pipe().unwrap();
        let (socket_out, socket_in) = UnixStream::pair().unwrap();
        let cancellable = |fd: OwnedFd| Descriptor::cancellable(fd, cancel.clone(), true).unwrap();
        let again = cancellable(pipe_in.into());
        assert!(matches!(again.way, Way::Pipe(_, Some(_))));
        let once = Descriptor {
            fd: OwnedFd::from(once_in),
            way: Way::Pipe(cancel.clone(), None),
            pace: None,
            read_limit: None,
        };
        [
            (again, pipe_out.into()),
            (once, once_out.into()),
            (cancellable(socket_in.into()), socket_out.into()),
        ]
    }

    fn pattern(octets: usize) -> Vec<u8> {
        (0..=250_u8).cycle().take(octets).collect()
    }

    #[test]
    fn what_is_written_arrives_through_a_slow_reader() {
        let octets = pattern(1 << 20);
        for (writer, reader) in writers(&Cancel::new()) {
            thread::scope(|scope| {
                scope.spawn(|| {
                    write_all(&writer, &octets).unwrap();
                    drop(writer);
                });
                let mut arrived = Vec::new();
                let mut room = [0; 5000];
                let mut source = FdSource::cancellable(reader, Cancel::new()).unwrap();
                loop {
                    match source.read(&mut room).unwrap() {
                        0 => break,
                        n => arrived.extend_from_slice(&room[..n]),
                    }
                }
                assert!(arrived == octets);
            });
        }
    }

    #[test]
    fn a_wait_ends_when_it_is_cancelled() {
        let octets = pattern(1 << 20);
        for i in 0..3 {
            let cancel = Cancel::new();
            let [writer, ..] = {
                let mut all = writers(&cancel);
                all.rotate_left(i);
                all
            };
            let (writer, _reader) = writer;
            let fd = writer.fd.try_clone().unwrap();
            let (result, took) = thread::scope(|scope| {
                let writing = scope.spawn(|| {
                    let result = write_all(&writer, &octets);
                    (result, Instant::now())
                });
                // Until it is full, which nobody changes any more.
                let full = || poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], 0_u8);
                while full().unwrap() != 0 {
                    thread::yield_now();
                }
                let asked = Instant::now();
                cancel.cancel();
                let (result, ended) = writing.join().unwrap();
                (result, ended - asked)
            });
            assert!(Cancelled::is(&result.unwrap_err()));
            // The promise is 100 ms; a machine under load may add its own.
            assert!(took < Duration::from_secs(2), "{took:?}");
        }
    }

    #[test]
    fn a_write_ends_when_nothing_is_taken_for_too_long() {
        let octets = pattern(1 << 20);
        for (mut writer, reader) in writers(&Cancel::new()) {
            writer.keep_pace(Arc::new(Pace::new(Duration::from_millis(50))));
            let error = write_all(&writer, &octets).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            let said = "the other end has taken nothing for 0.05 s";
            assert_eq!(error.to_string(), said);
            drop(reader);
        }
    }

    /// A reader that takes a little now and then never takes nothing for as long as may be.
    #[test]
    fn a_write_ends_when_too_little_is_taken_of_a_suspended_guest() {
        let octets = pattern(4 << 20);
        for (mut writer, reader) in writers(&Cancel::new()) {
            let pace = Arc::new(Pace::new(Duration::from_millis(200)));
            pace.suspended();
            writer.keep_pace(pace);
            let (given_up, ended) = std::sync::mpsc::channel::<()>();
            thread::scope(|scope| {
                scope.spawn(move || {
                    let mut reader = std::fs::File::from(reader);
                    let mut room = [0; 8192];
                    // A quarter of what is asked for.
                    let tick = Duration::from_millis(30);
                    while ended.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                        reader.read_exact(&mut room).unwrap();
                    }
                });
                let error = write_all(&writer, &octets).unwrap_err();
                drop(given_up);
                let said = error.to_string();
                assert!(said.contains("too slowly"), "{said}");
            });
        }
    }

    #[test]
    fn a_read_ends_when_nothing_comes_for_too_long_unless_the_limit_is_lifted() {
        let (pipe, pipe_in) = io::pipe().unwrap();
        let (socket, socket_in) = UnixStream::pair().unwrap();
        let ends = [
            (OwnedFd::from(pipe), OwnedFd::from(pipe_in)),
            (OwnedFd::from(socket), OwnedFd::from(socket_in)),
        ];
        for (fd, other) in ends {
            let limit = Arc::new(ReadLimit::new(Duration::from_millis(50)));
            let source = FdSource::cancellable(fd, Cancel::new()).unwrap();
            let mut source = source.give_up_after(Arc::clone(&limit));
            let error = source.read(&mut [0; 10]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let said = "the other end has sent nothing for 0.05 s";
            assert_eq!(error.to_string(), said);
            limit.lift();
            std::fs::File::from(other).write_all(b"more").unwrap();
            assert_eq!(source.read(&mut [0; 10]).unwrap(), 4);
        }
    }

    #[test]
    fn what_has_less_room_than_poll_wants_is_written_to_once_more() {
        for (mut writer, _reader) in writers(&Cancel::new()) {
            writer.keep_pace(Arc::new(Pace::new(Duration::from_millis(1))));
            // It is full.
            write_all(&writer, &pattern(1 << 20)).unwrap_err();
            if matches!(writer.way, Way::Pipe(_, None)) {
                // A write would block there.
                continue;
            }
            for (takes, expected) in [(2, Ok(7)), (3, Err(io::ErrorKind::TimedOut))] {
                let mut calls = 0;
                let written = writer.write(|_, _| {
                    calls += 1;
                    match calls == takes {
                        true => Ok(7),
                        false => Err(io::ErrorKind::WouldBlock.into()),
                    }
                });
                assert_eq!(written.map_err(|error| error.kind()), expected);
            }
        }
    }

    #[test]
    fn a_read_that_waits_ends_when_it_is_cancelled() {
        let (pipe, _pipe_in) = io::pipe().unwrap();
        let (socket, _socket_in) = UnixStream::pair().unwrap();
        for fd in [OwnedFd::from(pipe), OwnedFd::from(socket)] {
            let cancel = Cancel::new();
            let mut source = FdSource::cancellable(fd, cancel.clone()).unwrap();
            thread::scope(|scope| {
                let reading = scope.spawn(move || source.read(&mut [0; 10]));
                cancel.cancel();
                assert!(Cancelled::is(&reading.join().unwrap().unwrap_err()));
            });
        }
    }

    #[test]
    fn a_descriptor_that_does_not_block_is_waited_for_and_left_as_it_is() {
        let octets = pattern(1 << 20);
        for cancel in [None, Some(Cancel::new())] {
            let (reader, writer) = UnixStream::pair().unwrap();
            reader.set_nonblocking(true).unwrap();
            writer.set_nonblocking(true).unwrap();
            let mut sink = match &cancel {
                None => FdSink::new(&writer),
                Some(cancel) => FdSink::cancellable(&writer, cancel.clone()).unwrap(),
            };
            let mut source = match &cancel {
                None => FdSource::new(&reader),
                Some(cancel) => FdSource::cancellable(&reader, cancel.clone()).unwrap(),
            };
            thread::scope(|scope| {
                scope.spawn(|| sink.write_all(&octets).unwrap());
                let mut arrived = vec![0; octets.len()];
                source.read_exact(&mut arrived).unwrap();
                assert!(arrived == octets);
            });
        }
        // Nor does a blocking pipe become one that does not, for those who share it.
        let (_reader, writer) = io::pipe().unwrap();
        let mut sink = FdSink::cancellable(&writer, Cancel::new()).unwrap();
        sink.write_all(b"some").unwrap();
        let flags = fcntl(&writer, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn a_file_and_a_pipe_that_nobody_reads_say_what_they_say() {
        let file = tempfile::tempfile().unwrap();
        let cancel = Cancel::new();
        let mut sink = FdSink::cancellable(&file, cancel.clone()).unwrap();
        sink.write_all(b"some").unwrap();
        cancel.cancel();
        assert!(Cancelled::is(&sink.write_all(b"more").unwrap_err()));
        assert_eq!(file.metadata().unwrap().len(), 4);
        for (writer, reader) in writers(&Cancel::new()) {
            drop(reader);
            let error = write_all(&writer, b"some").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
