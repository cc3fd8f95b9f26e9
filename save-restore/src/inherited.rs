//! Inherited descriptors: those that the parent process left open for this one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size};

/// A new descriptor for the open file of `fd`, a number from a command line.
///
/// Other code in this process may use the same number, so the inherited descriptor itself is not
/// touched. The new one is closed when a program is started. It is passed through a socket of this
/// process to itself, which works on any Linux.
///
/// # Errors
///
/// EBADF if there is no such descriptor.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let (to, from) = UnixStream::pair()?;
    sendmsg::<UnixAddr>(
        to.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &[ControlMessage::ScmRights(&[fd])],
        MsgFlags::empty(),
        None,
    )?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        &from,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::other("no descriptor came"))
}

/// As [`inherited`], for a stream. Increases a pipe's capacity from the initial 64 KiB, for fewer
/// switches between two processes. If that is not allowed, nothing changes.
///
/// # Errors
///
/// As [`inherited`].
pub fn inherited_stream(fd: RawFd) -> io::Result<OwnedFd> {
    const BYTES: usize = 1 << 20;
    let stream = inherited(fd)?;
    if fcntl_getpipe_size(&stream).is_ok_and(|bytes| bytes < BYTES)
        && let Err(error) = fcntl_setpipe_size(&stream, BYTES)
    {
        tracing::debug!(%error, "the pipe keeps its size");
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;

    #[test]
    fn it_is_the_same_open_file_and_the_number_stays() {
        let mut file = tempfile::tempfile().unwrap();
        let mut own = File::from(inherited(file.as_raw_fd()).unwrap());
        own.write_all(b"stream").unwrap();
        assert_eq!(file.stream_position().unwrap(), 6, "one offset");
        drop(own);
        file.write_all(b"s").unwrap();
        let (mut read, write) = io::pipe().unwrap();
        let own = inherited(write.as_raw_fd()).unwrap();
        let flags = fcntl(&own, FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
        drop((own, write));
        assert_eq!(read.read(&mut [0]).unwrap(), 0, "nothing holds the pipe");
    }

    #[test]
    fn a_number_of_nothing_is_refused() {
        for fd in [-1, 1 << 20] {
            let error = inherited(fd).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EBADF as i32));
        }
    }
}
