//! Waiting for a descriptor whose other end may be slow or may never move, without side effects on
//! other processes.
//!
//! O_NONBLOCK belongs to the open file, which may be shared with other processes (a shell's
//! stdout), so it is never set on a descriptor that was passed in. Where another process has set
//! it, EAGAIN is waited out. Without a [`Cancel`], the kernel is simply called. With one, no call
//! blocks:
//!
//! | the descriptor is | a write | a read |
//! |---|---|---|
//! | a pipe | on a second, non-blocking open file of the same pipe | after poll(2) |
//! | a socket | `sendmsg` with MSG_DONTWAIT | after poll(2) |
//! | anything else (files) | just done | just done |
//!
//! If /proc does not allow a second open file, a write to a pipe is at most PIPE_BUF bytes after
//! poll(2).
//!
//! The last row is for files and block devices, which never wait for another end. It also covers
//! terminals, to which no image is saved.

use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, open, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::{Mode, SFlag, fstat};
use xsr_xen_backend::WriteCall;

use crate::pace::{Overdue, Pace, ReadLimit};
use crate::progress::{Cancel, Cancelled};

/// How long a wait may last before the token is checked again, in milliseconds.
const LOOK_EVERY_MS: u8 = 20;

/// The room that a pipe has at least when poll(2) calls it writable.
const PIPE_BUF: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// A descriptor, and how to wait for it.
#[derive(Debug)]
pub(crate) struct Descriptor<F> {
    fd: F,
    way: Way,
}

/// How long one call may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit<'a> {
    /// Time without a single byte transferred.
    pub(crate) idle: Option<Duration>,
    /// Time since the start, whatever is transferred.
    pub(crate) at_most: Option<Duration>,
    /// In addition to the descriptor's own token.
    pub(crate) cancel: Option<&'a Cancel>,
    /// How fast the other end must take what is written.
    pub(crate) pace: Option<&'a Pace>,
    /// How long the other end may send nothing.
    pub(crate) silence: Option<&'a ReadLimit>,
    /// When the wait began.
    pub(crate) began: Instant,
}

impl Limit<'_> {
    /// No limit.
    fn none() -> Self {
        Self {
            idle: None,
            at_most: None,
            cancel: None,
            pace: None,
            silence: None,
            began: Instant::now(),
        }
    }

    /// The time at which it ends, whatever is transferred.
    fn until(&self) -> Option<Instant> {
        self.began.checked_add(self.at_most?)
    }

    /// The time at which a wait that began at `since` ends, for a read or a write.
    pub(crate) fn ends(&self, since: Instant, writing: bool) -> Option<Instant> {
        let after = |limit: Option<Duration>| since.checked_add(limit?);
        let pace = self.pace.filter(|_| writing);
        let silence = self.silence.filter(|_| !writing);
        [
            self.until(),
            after(self.idle),
            after(pace.map(Pace::patience)),
            pace.and_then(Pace::due),
            after(silence.and_then(ReadLimit::limit)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Which limit the other end has reached, once one is reached.
    pub(crate) fn reached(&self, writing: bool) -> Overdue {
        if let (true, Some(pace)) = (writing, self.pace) {
            return pace.broken();
        }
        let at_most = self
            .until()
            .filter(|until| Instant::now() >= *until)
            .and(self.at_most);
        let silence = self.silence.and_then(ReadLimit::limit);
        let idle = self.idle.or(silence).unwrap_or_default();
        match (writing, at_most) {
            (true, at_most) => Overdue::NothingTaken(at_most.unwrap_or(idle)),
            (false, Some(limit)) => Overdue::NoAnswer(limit),
            (false, None) => Overdue::NothingSent(idle),
        }
    }
}

/// How calls are kept from blocking.
#[derive(Debug)]
enum Way {
    /// They are not kept from blocking.
    Blocking,
    /// Calls on this descriptor do not block.
    Never(Cancel),
    Socket(Cancel),
    /// With an open file of our own for the writing end, if there could be one.
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
    /// Waits without a limit.
    pub(crate) fn blocking(fd: F) -> Self {
        Self {
            fd,
            way: Way::Blocking,
        }
    }

    /// Waits until `cancel` is set. `writing`: the descriptor is for writing.
    pub(crate) fn cancellable(fd: F, cancel: Cancel, writing: bool) -> io::Result<Self> {
        let mode = SFlag::from_bits_truncate(fstat(fd.as_fd())?.st_mode) & SFlag::S_IFMT;
        let way = match mode {
            SFlag::S_IFSOCK => Way::Socket(cancel),
            SFlag::S_IFIFO if writing => Way::Pipe(cancel, reopen(fd.as_fd())),
            SFlag::S_IFIFO => Way::Pipe(cancel, None),
            _ => Way::Never(cancel),
        };
        Ok(Self { fd, way })
    }

    /// The token that stops a wait.
    pub(crate) fn cancel(&self) -> Option<&Cancel> {
        self.way.cancel()
    }

    /// Fails with [`Cancelled`] once the token is set.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.way.cancel() {
            Some(cancel) if cancel.is_cancelled() => Err(io::Error::other(Cancelled)),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`], and also checks the token of one call.
    fn check_both(&self, limit: &Limit<'_>) -> io::Result<()> {
        if limit.cancel.is_some_and(Cancel::is_cancelled) {
            return Err(io::Error::other(Cancelled));
        }
        self.check()
    }

    /// Waits until a call will not block, even if only to fail (true), or until it is time to give
    /// up, if there is such a time (false). Polls at least once.
    fn wait(
        &self,
        what: PollFlags,
        due: &dyn Fn() -> Option<Instant>,
        limit: &Limit<'_>,
    ) -> io::Result<bool> {
        loop {
            self.check_both(limit)?;
            let left = due().map(|due| due.saturating_duration_since(Instant::now()));
            let timeout = match (self.way.cancel(), left) {
                (None, None) => PollTimeout::NONE,
                (_, left) => {
                    // A fraction of a millisecond is rounded up.
                    let left = left.map_or(u128::MAX, |left| left.as_micros().div_ceil(1000));
                    PollTimeout::from(
                        u8::try_from(left).map_or(LOOK_EVERY_MS, |left| left.min(LOOK_EVERY_MS)),
                    )
                }
            };
            match poll(&mut [PollFd::new(self.fd.as_fd(), what)], timeout) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Calls `write` until it has taken some bytes, with the descriptor and the kind of call to
    /// make. Returns the number of bytes that were taken.
    ///
    /// # Errors
    ///
    /// [`Cancelled`]; the error of `write`, except EINTR and EAGAIN.
    pub(crate) fn write(
        &self,
        write: impl FnMut(BorrowedFd<'_>, WriteCall) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.write_within(&Limit::none(), write)
    }

    /// As [`Self::write`], within a limit for this call.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_within(
        &self,
        limit: &Limit<'_>,
        mut write: impl FnMut(BorrowedFd<'_>, WriteCall) -> io::Result<usize>,
    ) -> io::Result<usize> {
        // Counts from the first time that there was no room; once bytes are taken, a new call
        // begins.
        let mut since = None;
        let mut room = || {
            let since = *since.get_or_insert_with(Instant::now);
            self.wait(PollFlags::POLLOUT, &|| limit.ends(since, true), limit)
        };
        let mut ready = true;
        loop {
            self.check_both(limit)?;
            if self.overdue(limit) {
                return Err(limit.reached(true).into());
            }
            let result = match &self.way {
                Way::Blocking | Way::Never(_) => write(self.fd.as_fd(), WriteCall::Writev),
                Way::Socket(_) => write(self.fd.as_fd(), WriteCall::SendDontWait),
                Way::Pipe(_, Some(own)) => write(own.as_fd(), WriteCall::Writev),
                Way::Pipe(_, None) => match room()? {
                    true => write(self.fd.as_fd(), WriteCall::AtMost(PIPE_BUF)),
                    false => return Err(limit.reached(true).into()),
                },
            };
            match result {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // poll(2) asks for more room in a socket than a write does, so a socket that is
                    // read slowly has had one last try.
                    if !ready {
                        return Err(limit.reached(true).into());
                    }
                    ready = room()?;
                }
                result => {
                    if let (Some(pace), Ok(n)) = (limit.pace, &result) {
                        pace.took(*n as u64);
                    }
                    return result;
                }
            }
        }
    }

    /// Whether the other end has taken too little of what it was sent while a guest is suspended.
    /// (A descriptor that never waits has no other end.)
    fn overdue(&self, limit: &Limit<'_>) -> bool {
        let pace = match self.way {
            Way::Blocking | Way::Never(_) => None,
            Way::Socket(_) | Way::Pipe(..) => limit.pace,
        };
        let due = pace.and_then(Pace::due);
        due.is_some_and(|due| Instant::now() >= due)
    }

    /// Calls `read` until it has read some bytes or reached the end; returns its answer.
    ///
    /// # Errors
    ///
    /// [`Cancelled`]; the error of `read`, except EINTR and EAGAIN.
    pub(crate) fn read(
        &self,
        read: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.read_within(&Limit::none(), read)
    }

    /// As [`Self::read`], within a limit for this call.
    ///
    /// # Errors
    ///
    /// An [`Overdue`]; as [`Self::read`].
    pub(crate) fn read_within(
        &self,
        limit: &Limit<'_>,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let due = || limit.ends(limit.began, false);
        let come = || match self.wait(PollFlags::POLLIN, &due, limit)? {
            true => Ok(()),
            false => Err(io::Error::from(limit.reached(false))),
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

    /// Looks at the bytes that a socket or a pipe has to read, without waiting and without
    /// consuming them. Returns how many bytes were copied to `room`: 0 at the end, and for other
    /// descriptors.
    ///
    /// # Errors
    ///
    /// The kernel's error; EAGAIN if nothing has arrived.
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

/// The writing end of a pipe, opened once more: another open file, with an O_NONBLOCK of its own.
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

    fn write_all<F: AsFd>(descriptor: &Descriptor<F>, bytes: &[u8]) -> io::Result<()> {
        write_all_within(&Limit::none(), descriptor, bytes)
    }

    fn write_all_within<F: AsFd>(
        limit: &Limit<'_>,
        descriptor: &Descriptor<F>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut list = Gather::new();
        list.push(bytes);
        let mut rest = list.unwritten();
        while !rest.is_empty() {
            descriptor.write_within(limit, |fd, call| rest.write_some(fd, call))?;
        }
        Ok(())
    }

    /// The limit that the other end must keep to.
    fn paced(pace: &Pace) -> Limit<'_> {
        Limit {
            pace: Some(pace),
            ..Limit::none()
        }
    }

    /// Every kind of writing end: a pipe with and without reopening, a socket.
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
        };
        [
            (again, pipe_out.into()),
            (once, once_out.into()),
            (cancellable(socket_in.into()), socket_out.into()),
        ]
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..=250_u8).cycle().take(bytes).collect()
    }

    #[test]
    fn what_is_written_arrives_through_a_slow_reader() {
        let bytes = pattern(1 << 20);
        for (writer, reader) in writers(&Cancel::new()) {
            thread::scope(|scope| {
                scope.spawn(|| {
                    write_all(&writer, &bytes).unwrap();
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
                assert!(arrived == bytes);
            });
        }
    }

    #[test]
    fn a_wait_ends_when_it_is_cancelled() {
        let bytes = pattern(1 << 20);
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
                    let result = write_all(&writer, &bytes);
                    (result, Instant::now())
                });
                // Until it is full; from then on that does not change.
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
        let bytes = pattern(1 << 20);
        for (writer, reader) in writers(&Cancel::new()) {
            let pace = Pace::new(Duration::from_millis(50));
            let error = write_all_within(&paced(&pace), &writer, &bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            let said = "the other end has taken nothing for 0.05 s";
            assert_eq!(error.to_string(), said);
            drop(reader);
        }
    }

    /// A reader that takes a little now and then never exceeds the time without a byte.
    #[test]
    fn a_write_ends_when_too_little_is_taken_of_a_suspended_guest() {
        let bytes = pattern(4 << 20);
        for (writer, reader) in writers(&Cancel::new()) {
            let pace = Pace::new(Duration::from_millis(200));
            pace.suspended();
            let (given_up, ended) = std::sync::mpsc::channel::<()>();
            thread::scope(|scope| {
                scope.spawn(move || {
                    let mut reader = std::fs::File::from(reader);
                    let mut room = [0; 8192];
                    // A quarter of the required rate.
                    let tick = Duration::from_millis(30);
                    while ended.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                        reader.read_exact(&mut room).unwrap();
                    }
                });
                let error = write_all_within(&paced(&pace), &writer, &bytes).unwrap_err();
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
            let silence = ReadLimit::new(Duration::from_millis(50));
            let limit = Limit {
                silence: Some(&silence),
                ..Limit::none()
            };
            let source = Descriptor::cancellable(fd, Cancel::new(), false).unwrap();
            let mut room = [0; 10];
            let mut read =
                || source.read_within(&limit, |fd| Ok(nix::unistd::read(fd, &mut room)?));
            let error = read().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let said = "the other end has sent nothing for 0.05 s";
            assert_eq!(error.to_string(), said);
            silence.lift();
            std::fs::File::from(other).write_all(b"more").unwrap();
            assert_eq!(read().unwrap(), 4);
        }
    }

    #[test]
    fn what_has_less_room_than_poll_wants_is_written_to_once_more() {
        for (writer, _reader) in writers(&Cancel::new()) {
            let pace = Pace::new(Duration::from_millis(1));
            let limit = paced(&pace);
            // The pipe is full now.
            write_all_within(&limit, &writer, &pattern(1 << 20)).unwrap_err();
            if matches!(writer.way, Way::Pipe(_, None)) {
                // A write would block there.
                continue;
            }
            for (takes, expected) in [(2, Ok(7)), (3, Err(io::ErrorKind::TimedOut))] {
                let mut calls = 0;
                let written = writer.write_within(&limit, |_, _| {
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
        let bytes = pattern(1 << 20);
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
                scope.spawn(|| sink.write_all(&bytes).unwrap());
                let mut arrived = vec![0; bytes.len()];
                source.read_exact(&mut arrived).unwrap();
                assert!(arrived == bytes);
            });
        }
        // Nor does a blocking pipe become a non-blocking one for those that share it.
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
