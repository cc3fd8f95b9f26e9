//! The conversation with xenopsd: its two pipes, and what has been said so far.
//!
//! A thread reads xenopsd's lines (`done`, `restore:xenguest`, `abort`) as they arrive. An abort,
//! the end of the pipe or an unexpected line therefore ends the work at any time: the thread sets
//! the [`Cancel`] that the engine and the stream check. The first reason to end is kept.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use xsr_save_restore::progress::Cancel;

use crate::guardian::{Link, Note};
use crate::line::Line;

/// How long xenopsd may take to answer `prepare:`. It only writes 16 bytes into the stream.
const PREPARE_LIMIT: Duration = Duration::from_secs(120);
/// How long xenopsd may leave the pipe full before this process gives up on the `error:` line.
const ERROR_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for room in the pipe before checking the reasons to end again.
const LOOK_EVERY_MS: u8 = 20;
/// The most bytes that xenopsd may send without a line end.
const LONGEST: usize = 128;

/// Why the work was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// xenopsd has cancelled the task: this is not a failure.
    Aborted,
    /// xenopsd has closed a pipe: it has given up without saying so.
    HungUp,
    /// xenopsd said something unexpected, or answered too late.
    Protocol(String),
    /// A signal asked this process to stop.
    Signal,
}

impl End {
    /// The reason as text for the `error:` line.
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
    /// A question to xenopsd is unanswered.
    asked: bool,
    /// xenopsd has said that the stream of a restore begins.
    restore: bool,
    /// xenopsd has been told the result: whatever it does from now on is not a reason to end.
    told: bool,
    end: Option<End>,
}

/// The state of the conversation, and the pipe to xenopsd. A thread reads the other pipe.
pub(crate) struct Control {
    to: File,
    /// Held while a line is written.
    writing: Mutex<()>,
    /// The link to the process that outlives this one.
    guardian: Option<Link>,
    state: Mutex<State>,
    changed: Condvar,
    cancel: Cancel,
    /// Whether this is a restore. Saves and restores expect different lines.
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
    /// Lines are written to `to`, which is a pipe.
    pub(crate) fn new(to: File, restore: bool, guardian: Option<Link>) -> Arc<Self> {
        Arc::new(Self {
            to,
            writing: Mutex::default(),
            guardian,
            state: Mutex::default(),
            changed: Condvar::new(),
            cancel: Cancel::new(),
            restore,
        })
    }

    /// Reads xenopsd's lines from `from`, on a thread of its own.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub(crate) fn listen(self: &Arc<Self>, mut from: impl Read + Send + 'static) -> io::Result<()> {
        let control = Arc::clone(self);
        thread::Builder::new()
            .name("xenopsd".to_owned())
            .spawn(move || control.end_with(control.read(&mut from)))?;
        Ok(())
    }

    /// The token that is set once the work has been ended.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Why the work was ended, if it was.
    pub(crate) fn end(&self) -> Option<End> {
        self.state().end.clone()
    }

    /// Ends the work for this reason, unless xenopsd already has the result.
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
        // No panic can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads lines until there is a reason to end.
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

    /// Handles a line from xenopsd.
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
            // xenopsd's thread that reads the image may still send one line.
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

    /// Writes a line if the pipe has room for it, because xenopsd may not be reading. Returns
    /// whether it was written.
    fn write_now(&self, line: &Line<'_>) -> io::Result<bool> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // A pipe that polls as writable takes any line as a whole.
        match self.wait_for_room(0)? {
            true => (&self.to).write_all(&line.encode()).map(|()| true),
            false => Ok(false),
        }
    }

    /// Whether a line can be written within this many milliseconds. True if xenopsd has closed the
    /// pipe: the write then fails.
    fn wait_for_room(&self, milliseconds: u8) -> io::Result<bool> {
        let mut to = [PollFd::new(self.to.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut to, milliseconds) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes a line, waiting for room while `patient` is true. Returns whether it was written.
    fn write(&self, line: &Line<'_>, patient: impl Fn() -> bool) -> io::Result<bool> {
        while !self.write_now(line)? {
            if !patient() {
                return Ok(false);
            }
            self.wait_for_room(LOOK_EVERY_MS)?;
        }
        Ok(true)
    }

    fn not_heard(&self, error: io::Error) -> End {
        let end = match error.kind() {
            io::ErrorKind::BrokenPipe => End::HungUp,
            _ => End::Protocol(format!("writing to xenopsd: {error}")),
        };
        self.end_with(end.clone());
        end
    }

    /// Writes an optional line: it is dropped if the pipe has no room for it.
    ///
    /// # Errors
    ///
    /// xenopsd has closed the pipe.
    pub(crate) fn tell(&self, line: &Line<'_>) -> Result<(), End> {
        let written = self.write_now(line);
        written.map(drop).map_err(|error| self.not_heard(error))
    }

    /// Makes this process end in good order if the guardian is killed.
    ///
    /// # Errors
    ///
    /// See [`Link::follow`].
    pub(crate) fn follow_guardian(&self) -> io::Result<()> {
        self.guardian.as_ref().map_or(Ok(()), Link::follow)
    }

    /// Leaves a note for the guardian.
    fn note(&self, note: Note) {
        if let Some(guardian) = &self.guardian {
            guardian.note(note);
        }
    }

    /// Waits until `reached`, a reason to end, or the time limit.
    fn wait(
        &self,
        what: &str,
        limit: Option<Duration>,
        reached: impl Fn(&State) -> bool,
    ) -> Result<(), End> {
        let began = Instant::now();
        let mut state = self.state();
        loop {
            // An answer counts even if a reason to end came directly after it: the answer may be
            // that the guest is suspended, and then the guest must be resumed.
            if reached(&state) {
                return Ok(());
            }
            if let Some(end) = &state.end {
                return Err(end.clone());
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
        let written = self.write(line, || self.end().is_none());
        match written.map_err(|error| self.not_heard(error))? {
            true => self.wait(what, limit, |state| !state.asked),
            false => self.wait(what, limit, |_| false),
        }
    }

    /// Has xenopsd write the head of the record; from then on the stream is ours.
    pub(crate) fn prepare(&self) -> Result<(), End> {
        self.ask(&Line::Prepare, "\"prepare:\"", Some(PREPARE_LIMIT))
    }

    /// The guest runs while it is saved, although xenopsd does not know.
    pub(crate) fn goes_live(&self) {
        self.note(Note::Live);
    }

    /// Has xenopsd suspend the guest. xenopsd may take more than 20 minutes, and hangs up by itself
    /// when it gives up.
    pub(crate) fn suspend(&self) -> Result<(), End> {
        self.note(Note::Suspending);
        self.ask(&Line::Suspend, "\"suspend:\"", None)
    }

    /// Whether a question to xenopsd is unanswered.
    pub(crate) fn is_asked(&self) -> bool {
        self.state().asked
    }

    /// Whether xenopsd has said that the stream of a restore begins, and so waits for a line.
    pub(crate) fn restore_begun(&self) -> bool {
        self.state().restore
    }

    /// Waits until xenopsd has read the head of the record of a restore.
    pub(crate) fn wait_for_restore(&self) -> Result<(), End> {
        self.wait("", None, |state| state.restore)
    }

    /// Tells xenopsd the result. From then on xenopsd may close the pipes.
    ///
    /// # Errors
    ///
    /// The reason to end, earlier or during the call: xenopsd does not have the result.
    pub(crate) fn result(&self, line: &Line<'_>) -> Result<(), End> {
        loop {
            let mut state = self.state();
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            // Before the write: a process that is killed here may already have told xenopsd.
            self.note(Note::Result);
            match self.write_now(line) {
                Ok(true) => {
                    state.told = true;
                    drop(state);
                    self.note(Note::Told);
                    return Ok(());
                }
                Ok(false) => drop(state),
                Err(error) => {
                    drop(state);
                    return Err(self.not_heard(error));
                }
            }
            self.wait_for_room(LOOK_EVERY_MS)
                .map_err(|error| self.not_heard(error))?;
        }
    }

    /// Tells xenopsd that the work failed. xenopsd may already have gone.
    pub(crate) fn failed(&self, text: &str) {
        self.state().told = true;
        let until = Instant::now() + ERROR_LIMIT;
        let written = self.write(&Line::Error(text), || Instant::now() < until);
        if !matches!(written, Ok(true)) {
            tracing::debug!("xenopsd does not hear that it failed: {text}");
        }
        self.note(Note::Told);
    }

    /// Ends as xenopsd expects, without another line.
    pub(crate) fn silent(&self) {
        self.note(Note::Told);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::{PipeWriter, Write as _};
    use std::os::fd::OwnedFd;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    fn control(restore: bool) -> (Arc<Control>, PipeWriter, io::PipeReader) {
        let (out, to) = io::pipe().unwrap();
        let (from, say) = io::pipe().unwrap();
        let control = Control::new(OwnedFd::from(to).into(), restore, None);
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
        // The second answer may arrive before the first has been seen.
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
        assert!(!control.is_asked());
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

    /// Fills the pipe to xenopsd.
    fn fill(control: &Control) {
        let flags = OFlag::from_bits_retain(fcntl(&control.to, FcntlArg::F_GETFL).unwrap());
        let set = |flags| fcntl(&control.to, FcntlArg::F_SETFL(flags)).unwrap();
        set(flags | OFlag::O_NONBLOCK);
        let full = loop {
            if let Err(error) = (&control.to).write(&[b'x'; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        set(flags);
    }

    #[test]
    fn an_xenopsd_that_does_not_read_loses_progress_and_can_still_end_it() {
        let questions = [Control::prepare, Control::suspend, |control: &Control| {
            control.result(&Line::Saved)
        }];
        for question in questions {
            let (control, mut say, mut out) = control(false);
            fill(&control);
            assert_eq!(control.tell(&Line::Progress(3)), Ok(()));
            let asking = Arc::clone(&control);
            let asked = thread::spawn(move || question(&asking));
            say.write_all(b"abort\n").unwrap();
            assert_eq!(asked.join().unwrap(), Err(End::Aborted));
            drop(control);
            drop(say);
            let mut heard = Vec::new();
            out.read_to_end(&mut heard).unwrap();
            assert!(heard.iter().all(|byte| *byte == b'x'), "nothing else");
        }
    }

    #[test]
    fn a_result_waits_for_room() {
        let (control, _say, mut out) = control(false);
        fill(&control);
        let telling = Arc::clone(&control);
        let told = thread::spawn(move || telling.result(&Line::Saved));
        let mut heard = Vec::new();
        while !heard.ends_with(b"result:0 0\n") {
            let mut room = [0; 4096];
            let n = out.read(&mut room).unwrap();
            heard.extend(&room[..n]);
        }
        assert_eq!(told.join().unwrap(), Ok(()));
    }

    #[test]
    fn a_descriptor_that_cannot_be_written_ends_it() {
        let control = Control::new(File::open("/dev/null").unwrap(), false, None);
        let end = control.tell(&Line::Progress(3)).unwrap_err();
        let text = "writing to xenopsd: Bad file descriptor";
        assert!(
            matches!(&end, End::Protocol(said) if said.contains(text)),
            "{end:?}"
        );
        assert!(control.cancel().is_cancelled());
        assert_eq!(control.prepare(), Err(end.clone()));
        assert_eq!(control.result(&Line::Saved), Err(end));
        for question in [Control::prepare, |control: &Control| {
            control.result(&Line::Saved)
        }] {
            let control = Control::new(File::open("/dev/null").unwrap(), false, None);
            let end = question(&control).unwrap_err();
            assert!(
                matches!(&end, End::Protocol(said) if said.contains(text)),
                "{end:?}"
            );
        }
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
