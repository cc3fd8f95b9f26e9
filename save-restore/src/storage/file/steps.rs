//! The steps of writing a file, each of which a test can make fail.

use std::fmt;
use std::io;

/// One system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The temporary file is created.
    Make,
    /// It is locked.
    Lock,
    /// Bytes are written.
    Write,
    /// Bytes are read back.
    Read,
    /// A hole is made.
    Punch,
    /// Its length is set.
    SetLength,
    /// A range of another file is shared.
    Clone,
    /// What was written is made durable.
    Sync,
    /// It gets its name.
    Rename,
    /// It gets its name if there is no file of that name.
    RenameNew,
    /// It gets a second name.
    Link,
    /// The directory is made durable.
    SyncDirectory,
    /// It is removed.
    Remove,
}

/// Called before each step.
pub(super) trait Steps: fmt::Debug + Send + Sync {
    /// An error replaces the step.
    fn before(&self, step: Step) -> io::Result<()>;

    /// How many of `bytes` one write takes.
    fn most(&self, bytes: usize) -> usize;
}

/// Performs every step.
#[derive(Debug)]
pub(super) struct NoFaults;

impl Steps for NoFaults {
    fn before(&self, _: Step) -> io::Result<()> {
        Ok(())
    }

    fn most(&self, bytes: usize) -> usize {
        bytes
    }
}
