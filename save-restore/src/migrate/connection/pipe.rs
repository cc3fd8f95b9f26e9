//! A connection over two descriptors: the stdin and stdout of a command, or of this process.
//!
//! C implementation: `tools/xl/xl_migrate.c:create_migration_child`.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use xsr_xen_backend::Gather;

use super::fd::Descriptors;
use super::{Connection, ConnectionError, Delivery, Peer, Received, Wait};

/// A pair of descriptors, one for each direction.
///
/// ```
/// use std::process::{Command, Stdio};
/// use xsr_save_restore::migrate::connection::{Connection as _, PipeConnection, Received, Wait};
///
/// let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
/// let (to, from) = cat.stdin.take().zip(cat.stdout.take()).expect("both are pipes");
/// let mut connection = PipeConnection::new(from.into(), to.into(), "cat")?;
/// connection.write(b"hello", &Wait::forever())?;
/// let mut room = [0; 16];
/// assert_eq!(connection.read(&mut room, &Wait::forever())?, Received::Bytes(5));
/// connection.finish_writing()?;
/// assert_eq!(connection.read(&mut room, &Wait::forever())?, Received::Closed);
/// assert!(cat.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PipeConnection {
    descriptors: Descriptors,
    name: String,
}

impl PipeConnection {
    /// Read from `from`, write to `to`; `name` is what the peer is called.
    ///
    /// O_NONBLOCK is left as it is on both: other processes may share them.
    ///
    /// # Errors
    ///
    /// A descriptor's type could not be determined.
    pub fn new(from: OwnedFd, to: OwnedFd, name: impl Into<String>) -> io::Result<Self> {
        Ok(Self {
            descriptors: Descriptors::new(from, to)?,
            name: name.into(),
        })
    }
}

impl Connection for PipeConnection {
    fn read(&self, room: &mut [u8], wait: &Wait<'_>) -> Result<Received, ConnectionError> {
        self.descriptors.read(room, wait)
    }

    fn peek(&self, room: &mut [u8]) -> Result<usize, ConnectionError> {
        self.descriptors.peek(room)
    }

    fn write(&self, bytes: &[u8], wait: &Wait<'_>) -> Result<usize, ConnectionError> {
        self.descriptors.write(bytes, wait)
    }

    fn write_gather(&self, list: &Gather<'_>, wait: &Wait<'_>) -> Result<(), ConnectionError> {
        self.descriptors.write_gather(list, wait)
    }

    fn finish_writing(&mut self) -> Result<(), ConnectionError> {
        self.descriptors.close_writing();
        Ok(())
    }

    /// What is in the pipe is known at both of its ends, as long as this one is open.
    fn delivery(&self) -> Delivery {
        let Some(to) = self.descriptors.to() else {
            return Delivery::Unknown;
        };
        match rustix::io::ioctl_fionread(to) {
            Ok(0) => Delivery::Read,
            Ok(_) => Delivery::Pending,
            Err(_) => Delivery::Unknown,
        }
    }

    fn give_up_on_silence(&self, _: Duration) -> Result<bool, ConnectionError> {
        Ok(false)
    }

    fn peer(&self) -> Peer {
        Peer::Named(self.name.clone())
    }

    fn clock(&self) -> Duration {
        self.descriptors.clock()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.descriptors.from().as_fd())
    }
}
