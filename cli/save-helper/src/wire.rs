//! The pipes to libxl: requests on stdout, answers on stdin.
//!
//! A message is a u16 length and that many bytes: a u16 number and the arguments, packed, in the
//! machine's byte order. Strings are a u32 length, which counts the NUL, and the bytes. An answer
//! is one `int`.
//!
//! | number | message | arguments | answer |
//! |---|---|---|---|
//! | 1 | log | u32 level, u32 errno or ~0, string context, string text | |
//! | 2 | progress | string context, string what, u64 done, u64 total | |
//! | 3 | suspend | | 0 failed; COLO's restore: 2 the sender is gone |
//! | 4 | postcopy | | 0 failed; COLO's restore: 2 the sender is gone |
//! | 5 | checkpoint | | save: 0 was the last, below it failed; restore: 0 failed, 2 sender gone |
//! | 6 | wait_checkpoint | | COLO; save: 0 was the last, below it failed; restore: as 5 |
//! | 7 | switch_qemu_logdirty | u32 domid, u32 enable | 0 fine |
//! | 8 | static_data_done | u32 missing | 0 fine |
//! | 9 | restore_results | u64 store frame, u64 console frame | |
//! | 10 | complete | i32 result, i32 errno | any |
//!
//! C implementation: `libxl_save_msgs_gen.pl`, and `helper_transmitmsg` and
//! `helper_getreply` in `libxl_save_helper.c`.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use xsr_save_restore::progress::Cancel;

/// Message numbers; also bits of the callback mask.
pub(crate) mod number {
    pub(crate) const LOG: u16 = 1;
    pub(crate) const PROGRESS: u16 = 2;
    pub(crate) const SUSPEND: u16 = 3;
    pub(crate) const POSTCOPY: u16 = 4;
    pub(crate) const CHECKPOINT: u16 = 5;
    pub(crate) const WAIT_CHECKPOINT: u16 = 6;
    pub(crate) const SWITCH_QEMU_LOGDIRTY: u16 = 7;
    pub(crate) const STATIC_DATA_DONE: u16 = 8;
    pub(crate) const RESTORE_RESULTS: u16 = 9;
    pub(crate) const COMPLETE: u16 = 10;
}

/// The levels of `xentoollog_level` that we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Debug = 1,
    Info = 5,
    Warn = 7,
    Error = 8,
}

/// The longest string that is sent. Two of them fit a message with room to spare.
const LONGEST: usize = 16 << 10;

/// The direction in which libxl cannot be reached any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Sending fails.
    Request,
    /// No answer comes.
    Reply,
}

/// The two pipes.
pub(crate) struct Wire {
    to: Mutex<Box<dyn Write + Send>>,
    from: Mutex<Box<dyn Read + Send>>,
    lost: OnceLock<Lost>,
    complete: AtomicBool,
    cancel: Cancel,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire")
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

/// A message being built.
#[derive(Debug)]
struct Message(Vec<u8>);

impl Message {
    fn new(number: u16) -> Self {
        Self(number.to_ne_bytes().to_vec())
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn i32(mut self, value: i32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// A string without its NULs, truncated if it is too long.
    fn string(self, text: &str) -> Self {
        let end = text.floor_char_boundary_at(LONGEST);
        let bytes: Vec<u8> = text[..end].bytes().filter(|b| *b != 0).collect();
        let length = u32::try_from(bytes.len() + 1).unwrap_or(u32::MAX);
        let mut message = self.u32(length);
        message.0.extend(bytes);
        message.0.push(0);
        message
    }
}

/// `str::floor_char_boundary`, which our oldest supported compiler lacks.
trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, at: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_at(&self, at: usize) -> usize {
        let at = at.min(self.len());
        (0..=at)
            .rev()
            .find(|at| self.is_char_boundary(*at))
            .unwrap_or(0)
    }
}

impl Wire {
    /// stdin and stdout.
    pub(crate) fn stdio() -> Self {
        Self::new(Box::new(io::stdin()), Box::new(io::stdout()))
    }

    /// Any two streams.
    pub(crate) fn new(from: Box<dyn Read + Send>, to: Box<dyn Write + Send>) -> Self {
        Self {
            to: Mutex::new(to),
            from: Mutex::new(from),
            lost: OnceLock::new(),
            complete: AtomicBool::new(false),
            cancel: Cancel::new(),
        }
    }

    /// Set when libxl is gone or asks to stop: the work is of no use any more.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Whether libxl is gone, and in which direction that was noticed first.
    pub(crate) fn lost(&self) -> Option<Lost> {
        self.lost.get().copied()
    }

    /// Whether libxl has been told the result.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    fn note(&self, lost: Lost) {
        self.lost.get_or_init(|| lost);
        self.cancel.cancel();
    }

    /// Send a message as a whole, from any thread.
    fn send(&self, message: &Message) -> io::Result<()> {
        let length = u16::try_from(message.0.len()).map_err(io::Error::other)?;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(&message.0);
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&bytes)
            .and_then(|()| to.flush())
            .inspect_err(|_| self.note(Lost::Request))
    }

    /// Send a message and wait for its answer.
    fn ask(&self, message: &Message) -> io::Result<i32> {
        let mut from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(message)?;
        let mut answer = [0; 4];
        from.read_exact(&mut answer)
            .inspect_err(|_| self.note(Lost::Reply))?;
        Ok(i32::from_ne_bytes(answer))
    }

    /// Log a line. `errno` only if the text does not name it.
    pub(crate) fn log(&self, level: Level, text: &str) -> io::Result<()> {
        let message = Message::new(number::LOG)
            .u32(level as u32)
            .u32(u32::MAX)
            .string("xsr")
            .string(text);
        self.send(&message)
    }

    /// Report the progress of `what`; 0 of 0 for a point that has been reached.
    pub(crate) fn progress(&self, what: &str, done: u64, total: u64) -> io::Result<()> {
        let message = Message::new(number::PROGRESS)
            .string("xsr")
            .string(what)
            .u64(done)
            .u64(total);
        self.send(&message)
    }

    /// Ask libxl to suspend the guest. 0: it failed.
    pub(crate) fn suspend(&self) -> io::Result<i32> {
        self.ask(&Message::new(number::SUSPEND))
    }

    /// Ask libxl to resume the guest. 0: it failed.
    pub(crate) fn postcopy(&self) -> io::Result<i32> {
        self.ask(&Message::new(number::POSTCOPY))
    }

    /// Ask libxl for its part of a CHECKPOINT record that has been written or read.
    pub(crate) fn checkpoint(&self) -> io::Result<i32> {
        self.ask(&Message::new(number::CHECKPOINT))
    }

    /// Both guests run: wait until a new checkpoint is due, or requested.
    pub(crate) fn wait_checkpoint(&self) -> io::Result<i32> {
        self.ask(&Message::new(number::WAIT_CHECKPOINT))
    }

    /// Ask libxl to switch the device model's log-dirty mode. 0: done.
    pub(crate) fn switch_qemu_logdirty(&self, domid: u16, enable: bool) -> io::Result<i32> {
        let message = Message::new(number::SWITCH_QEMU_LOGDIRTY)
            .u32(domid.into())
            .u32(enable.into());
        self.ask(&message)
    }

    /// Tell libxl which static data the stream lacked (bit 0: CPUID, bit 1: MSRs). 0: fine.
    pub(crate) fn static_data_done(&self, missing: u32) -> io::Result<i32> {
        self.ask(&Message::new(number::STATIC_DATA_DONE).u32(missing))
    }

    /// Tell libxl the frames of the rings.
    pub(crate) fn restore_results(&self, store: u64, console: u64) -> io::Result<()> {
        let message = Message::new(number::RESTORE_RESULTS)
            .u64(store)
            .u64(console);
        self.send(&message)
    }

    /// Tell libxl that the job has ended, and its result.
    pub(crate) fn complete(&self, retval: i32, errno: i32) -> io::Result<()> {
        let message = Message::new(number::COMPLETE).i32(retval).i32(errno);
        self.ask(&message)?;
        self.complete.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::Arc;

    use super::*;

    /// What was written, for tests.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn wire(answers: &[i32]) -> (Wire, Written) {
        let answers: Vec<u8> = answers.iter().flat_map(|a| a.to_ne_bytes()).collect();
        let written = Written::default();
        let from = Box::new(io::Cursor::new(answers));
        (Wire::new(from, Box::new(written.clone())), written)
    }

    #[test]
    fn messages_are_packed_as_libxl_unpacks_them() {
        let (wire, written) = wire(&[]);
        wire.log(Level::Info, "hi").unwrap();
        // length, number, level, errno, "xsr\0", "hi\0"
        let mut expected = vec![25, 0, 1, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        expected.extend(b"\x04\0\0\0xsr\0\x03\0\0\0hi\0");
        assert_eq!(*written.0.lock().unwrap(), expected);
    }

    #[test]
    fn answers_are_ints() {
        let (wire, written) = wire(&[1, -3]);
        assert_eq!(wire.suspend().unwrap(), 1);
        assert_eq!(wire.switch_qemu_logdirty(5, true).unwrap(), -3);
        let expected = [2, 0, 3, 0, 10, 0, 7, 0, 5, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(*written.0.lock().unwrap(), expected);
    }

    #[test]
    fn a_peer_that_is_gone_cancels_the_work() {
        let (wire, _) = wire(&[]);
        assert!(wire.lost().is_none() && !wire.cancel().is_cancelled());
        assert!(wire.suspend().is_err());
        assert_eq!(wire.lost(), Some(Lost::Reply));
        assert!(wire.cancel().is_cancelled());
        assert!(wire.complete(0, 0).is_err() && !wire.is_complete());
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let (wire, written) = wire(&[]);
        wire.log(Level::Error, &"é".repeat(LONGEST)).unwrap();
        wire.log(Level::Error, &format!("x{}", "é".repeat(LONGEST)))
            .unwrap();
        let bytes = written.0.lock().unwrap();
        assert!(bytes.len() < 2 * (LONGEST + 64));
    }
}
