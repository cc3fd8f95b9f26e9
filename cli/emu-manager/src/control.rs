//! The conversation with xenopsd: its two pipes, and what has been said so far.
//!
//! A thread reads xenopsd's lines (`done`, `restore:xenguest`, `abort`) as they come, so that
//! an abort, the end of the pipe or nonsense ends the work at any time: it sets the [`Cancel`] that
//! the engine and the stream look at. The first such reason is kept.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use xsr_save_restore::progress::Cancel;

use crate::line::Line;

/// How long xenopsd may take to answer `prepare:`. It only writes 16 bytes into the stream.
const PREPARE_LIMIT: Duration = Duration::from_secs(120);
/// The most bytes that xenopsd may send without a line end.
const LONGEST: usize = 128;

/// Why the work is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// xenopsd has cancelled the task: this is not a failure.
    Aborted,
    /// xenopsd has closed a pipe: it has given up, without a word.
    HungUp,
    /// xenopsd said something that it never says, or was too late.
    Protocol(String),
    /// A signal asked this process to stop.
    Signal,
}

impl End {
    /// For the `error:` line.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Aborted => "aborted by xenopsd".to_owned(),
            Self::HungUp => "xenopsd closed the control pipe".to_owned(),
            Self::Protocol(text) => text.clone(),
            Self::Signal => "a signal asked the emu-manager to stop".to_owned(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// A question that xenopsd has not answered.
    asked: bool,
    /// xenopsd has said where the stream of a restore begins.
    restore: bool,
    /// The result is out: what xenopsd does from now on is its own affair.
    told: bool,
    end: Option<End>,
}

/// The two pipes.
pub(crate) struct Control {
    to: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    changed: Condvar,
    cancel: Cancel,
    /// Whether this is a restore: each has lines of its own.
    restore: bool,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Lines go to `to`.
    pub(crate) fn new(to: Box<dyn Write + Send>, restore: bool) -> Arc<Self> {
        Arc::new(Self {
            to: Mutex::new(to),
            state: Mutex::default(),
            changed: Condvar::new(),
            cancel: Cancel::new(),
            restore,
        })
    }

    /// Read xenopsd's lines from `from`, on a thread of its own.
    ///
    /// # Errors
    ///
    /// There can be no thread.
    pub(crate) fn listen(self: &Arc<Self>, mut from: impl Read + Send + 'static) -> io::Result<()> {
        let control = Arc::clone(self);
        thread::Builder::new()
            .name("xenopsd".to_owned())
            .spawn(move || control.end_with(control.read(&mut from)))?;
        Ok(())
    }

    /// Set once the work is of no use any more.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Why it is of no use any more.
    pub(crate) fn end(&self) -> Option<End> {
        self.state().end.clone()
    }

    /// The work is of no use any more, unless xenopsd has the result already.
    pub(crate) fn end_with(&self, end: End) {
        let mut state = self.state();
        if state.told {
            return;
        }
        state.end.get_or_insert(end);
        drop(state);
        self.cancel.cancel();
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Read lines until there is a reason to end.
    fn read(&self, from: &mut impl Read) -> End {
        let mut line = Vec::new();
        let mut room = [0; 256];
        loop {
            let read = match from.read(&mut room) {
                Ok(0) => return End::HungUp,
                Ok(n) => &room[..n],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return End::Protocol(format!("reading from xenopsd: {error}")),
            };
            for byte in read {
                match byte {
                    b'\n' => {
                        if let Err(end) = self.heard(&line) {
                            return end;
                        }
                        line.clear();
                    }
                    _ if line.len() == LONGEST => {
                        return End::Protocol(format!(
                            "xenopsd sent more than {LONGEST} bytes without a line end"
                        ));
                    }
                    byte => line.push(*byte),
                }
            }
        }
    }

    /// xenopsd has said this.
    fn heard(&self, line: &[u8]) -> Result<(), End> {
        let shown = || String::from_utf8_lossy(line).into_owned();
        tracing::debug!(line = shown(), "xenopsd");
        let mut state = self.state();
        match line {
            b"done" if std::mem::take(&mut state.asked) => {}
            b"done" => {
                let text = "xenopsd said \"done\" without having been asked";
                return Err(End::Protocol(text.to_owned()));
            }
            b"restore:xenguest" if self.restore && !state.restore => state.restore = true,
            // Its thread that reads the image may say one thing more.
            _ if state.end == Some(End::Aborted) => return Ok(()),
            b"abort" => {
                drop(state);
                self.end_with(End::Aborted);
                return Ok(());
            }
            _ => {
                let text = format!("xenopsd said {:?}, which is not expected", shown());
                return Err(End::Protocol(text));
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Write a line; what happens if xenopsd does not hear it.
    pub(crate) fn tell(&self, line: &Line<'_>) -> Result<(), End> {
        let bytes = line.encode();
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        let written = to.write_all(&bytes).and_then(|()| to.flush());
        drop(to);
        written.map_err(|_| {
            self.end_with(End::HungUp);
            End::HungUp
        })
    }

    /// Wait until `reached`, or until there is a reason to end, or for so long.
    fn wait(
        &self,
        what: &str,
        limit: Option<Duration>,
        reached: impl Fn(&State) -> bool,
    ) -> Result<(), End> {
        let began = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            if reached(&state) {
                return Ok(());
            }
            let left = limit.map(|limit| limit.saturating_sub(began.elapsed()));
            state = match left {
                None => {
                    let state = self.changed.wait(state);
                    state.unwrap_or_else(PoisonError::into_inner)
                }
                Some(Duration::ZERO) => {
                    drop(state);
                    let end = End::Protocol(format!(
                        "xenopsd did not answer {what} within {} s",
                        began.elapsed().as_secs()
                    ));
                    self.end_with(end.clone());
                    return Err(end);
                }
                Some(left) => {
                    let state = self.changed.wait_timeout(state, left);
                    state.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn ask(&self, line: &Line<'_>, what: &str, limit: Option<Duration>) -> Result<(), End> {
        {
            let mut state = self.state();
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            state.asked = true;
        }
        self.tell(line)?;
        self.wait(what, limit, |state| !state.asked)
    }

    /// xenopsd writes the head of the record; from then on the stream is ours.
    pub(crate) fn prepare(&self) -> Result<(), End> {
        self.ask(&Line::Prepare, "\"prepare:\"", Some(PREPARE_LIMIT))
    }

    /// xenopsd suspends the guest. It may take more than 20 minutes over that, and then hangs up
    /// by itself.
    pub(crate) fn suspend(&self) -> Result<(), End> {
        self.ask(&Line::Suspend, "\"suspend:\"", None)
    }

    /// Whether xenopsd has said where the stream of a restore begins, and so waits for a line.
    pub(crate) fn restore_begun(&self) -> bool {
        self.state().restore
    }

    /// Wait until xenopsd has read the head of the record of a restore.
    pub(crate) fn wait_for_restore(&self) -> Result<(), End> {
        self.wait("", None, |state| state.restore)
    }

    /// The work is done. From now on xenopsd may close the pipes.
    ///
    /// # Errors
    ///
    /// There was a reason to end before; nothing has been said then.
    pub(crate) fn result(&self, line: &Line<'_>) -> Result<(), End> {
        {
            let mut state = self.state();
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            state.told = true;
        }
        self.tell(line)
    }

    /// It failed. xenopsd may have gone already.
    pub(crate) fn failed(&self, text: &str) {
        self.state().told = true;
        if self.tell(&Line::Error(text)).is_err() {
            tracing::debug!("xenopsd does not hear that it failed: {text}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::PipeWriter;

    use super::*;

    fn control(restore: bool) -> (Arc<Control>, PipeWriter, io::PipeReader) {
        let (out, to) = io::pipe().unwrap();
        let (from, say) = io::pipe().unwrap();
        let control = Control::new(Box::new(to), restore);
        control.listen(from).unwrap();
        (control, say, out)
    }

    fn ended(control: &Control) -> End {
        control.wait("", None, |_| false).unwrap_err()
    }

    #[test]
    fn a_question_is_answered_once() {
        let (control, mut say, mut out) = control(false);
        say.write_all(b"do").unwrap();
        thread::spawn(move || {
            let mut room = [0; 64];
            let n = out.read(&mut room).unwrap();
            assert_eq!(&room[..n], b"prepare:xenguest\n");
            say.write_all(b"ne\n").unwrap();
            let n = out.read(&mut room).unwrap();
            assert_eq!(&room[..n], b"suspend:\n");
            say.write_all(b"done\ndone\n").unwrap();
            out.read_exact(&mut room[..1]).ok();
        });
        assert_eq!(control.prepare(), Ok(()));
        // The second answer may be there before the first is seen.
        let answer = control.suspend();
        let end = ended(&control);
        assert!(answer.is_ok() || answer == Err(end.clone()));
        assert!(matches!(&end, End::Protocol(text) if text.contains("without")));
        assert!(control.cancel().is_cancelled());
    }

    #[test]
    fn the_first_reason_to_end_is_kept() {
        let (control, mut say, _out) = control(false);
        say.write_all(b"abort\n").unwrap();
        drop(say);
        assert_eq!(ended(&control), End::Aborted);
        control.end_with(End::Signal);
        assert_eq!(control.end(), Some(End::Aborted));
        assert_eq!(control.prepare(), Err(End::Aborted));
        assert_eq!(control.result(&Line::Saved), Err(End::Aborted));
    }

    #[test]
    fn a_restore_may_begin_after_it_was_aborted() {
        let (control, mut say, _out) = control(true);
        say.write_all(b"abort\n").unwrap();
        assert_eq!(control.wait_for_restore(), Err(End::Aborted));
        assert!(!control.restore_begun());
        say.write_all(b"tea\nrestore:xenguest\n").unwrap();
        while !control.restore_begun() {
            thread::yield_now();
        }
        assert_eq!(control.end(), Some(End::Aborted));
    }

    #[test]
    fn nonsense_and_silence_end_it() {
        for (restore, bytes) in [
            (false, &b"tea:two sugars\n"[..]),
            (false, b"restore:xenguest\n"),
            (true, b"restore:vgpu\n"),
            (true, b"restore:xenguest\nrestore:xenguest\n"),
            (true, b"done\n"),
            (true, &[b'x'; 129]),
            (false, b"\n"),
        ] {
            let (control, mut say, _out) = control(restore);
            say.write_all(bytes).unwrap();
            let end = ended(&control);
            assert!(matches!(end, End::Protocol(_)), "{bytes:?}: {end:?}");
        }
        let (control, say, _out) = control(true);
        drop(say);
        assert_eq!(control.wait_for_restore(), Err(End::HungUp));
        let (control, _say, _out) = self::control(false);
        let waited = control.wait("tea", Some(Duration::ZERO), |_| false);
        assert!(matches!(waited, Err(End::Protocol(text)) if text.contains("tea")));
    }

    #[test]
    fn a_reader_that_is_gone_ends_it_and_nothing_after_the_result_does() {
        let (control, _say, out) = control(false);
        drop(out);
        assert_eq!(control.tell(&Line::Progress(3)), Err(End::HungUp));
        assert!(control.cancel().is_cancelled());
        let (control, say, _out) = self::control(true);
        assert_eq!(control.result(&Line::Saved), Ok(()));
        drop(say);
        control.end_with(End::Signal);
        assert_eq!(control.end(), None);
        assert!(!control.cancel().is_cancelled());
    }
}
