//! A connection over two descriptors: the stdin and stdout of a command, or of this process.
//!
//! C implementation: `tools/xl/xl_migrate.c:create_migration_child`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::fd::{Descriptors, FdConnection, Transport};
use super::{Delivery, Peer};

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
pub type PipeConnection = FdConnection<Pipe>;

/// The state of a connection over two pipes.
#[derive(Debug)]
pub struct Pipe {
    name: String,
}

impl PipeConnection {
    /// A connection that reads from `from` and writes to `to`; `name` is the peer's name.
    ///
    /// O_NONBLOCK is not changed on either: other processes may share them.
    ///
    /// # Errors
    ///
    /// A descriptor's type could not be determined.
    pub fn new(from: OwnedFd, to: OwnedFd, name: impl Into<String>) -> io::Result<Self> {
        Ok(Self {
            descriptors: Descriptors::new(from, to)?,
            transport: Pipe { name: name.into() },
        })
    }
}

impl Transport for Pipe {
    /// The contents of the pipe are known at both of its ends, while this one is open.
    fn delivery(&self, descriptors: &Descriptors) -> Delivery {
        let Some(to) = descriptors.to() else {
            return Delivery::Unknown;
        };
        match rustix::io::ioctl_fionread(to) {
            Ok(0) => Delivery::Read,
            Ok(_) => Delivery::Pending,
            Err(_) => Delivery::Unknown,
        }
    }

    fn give_up_on_silence(&self, _: &Descriptors, _: Duration) -> io::Result<bool> {
        Ok(false)
    }

    fn peer(&self) -> Peer {
        Peer::Named(self.name.clone())
    }
}
