//! A command that a test stops at a phase of its work, by `XSR_MOCK_PHASES`
//! (`xen-backend/src/mock/phases.rs`), and sends signals to.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::Ran;

/// The limit for any wait.
const LATE: Duration = Duration::from_secs(60);

/// Names the socket.
const VARIABLE: &str = "XSR_MOCK_PHASES";

/// A command that announces its phases, in its own process group.
#[derive(Debug)]
pub(crate) struct Staged {
    child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
    /// The phases; the command waits at each one. Closed when the command has ended.
    phases: Receiver<String>,
    go_on: Sender<()>,
    passed: Vec<String>,
    waits: bool,
}

/// The command, with its socket in `directory`.
pub(crate) fn staged<S: AsRef<OsStr>>(
    directory: &Path,
    args: impl IntoIterator<Item = S>,
) -> Staged {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsr"));
    command.args(args);
    staged_command(directory, command)
}

/// Any command that announces its phases.
pub(crate) fn staged_command(directory: &Path, mut command: Command) -> Staged {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = directory.join(format!("phases-{number}"));
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = command
        .env_remove("XSR_BACKEND")
        .env_remove("XSR_LOG")
        .env(VARIABLE, &path)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (tell, phases) = channel();
    let (go_on, gone_on) = channel();
    thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        serve(&socket, &tell, &gone_on);
    });
    let stderr = BufReader::new(child.stderr.take().unwrap());
    Staged {
        child,
        stderr,
        said: String::new(),
        phases,
        go_on,
        passed: Vec::new(),
        waits: false,
    }
}

fn serve(mut socket: &UnixStream, tell: &Sender<String>, gone_on: &Receiver<()>) {
    let mut lines = BufReader::new(socket);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let phase = line.split(' ').next().unwrap().to_owned();
        // A test that has stopped listening must not block the command.
        if tell.send(phase).is_ok() {
            gone_on.recv().unwrap_or_default();
        }
        if socket.write_all(b"\n").is_err() {
            return;
        }
    }
}

impl Staged {
    /// Let it go on if it waits.
    pub(crate) fn release(&mut self) {
        if std::mem::take(&mut self.waits) {
            self.go_on.send(()).unwrap();
        }
    }

    /// Let it run to the `nth` occurrence of `phase` (from 1), and hold it there. False: it ended
    /// before.
    #[track_caller]
    pub(crate) fn hold(&mut self, phase: &str, nth: usize) -> bool {
        let mut left = nth;
        loop {
            self.release();
            match self.phases.recv_timeout(LATE) {
                Ok(now) => {
                    self.waits = true;
                    self.passed.push(now.clone());
                    left -= usize::from(now == phase);
                    if left == 0 {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => panic!("waited for {phase}: {:?}", self.passed),
            }
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Send a signal, to its whole process group or to it alone.
    pub(crate) fn signal(&self, signal: Signal, group: bool) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        // The child has not been waited for, so its process id cannot have been reused.
        match group {
            true => killpg(pid, signal).unwrap(),
            false => kill(pid, signal).unwrap(),
        }
    }

    /// The same by the signal's number, to it alone.
    pub(crate) fn signal_number(&self, number: u32) {
        super::signal_number(self.child.id(), number);
    }

    /// Wait until stderr has `word` in a line, or is closed. Returns the line.
    pub(crate) fn until_said(&mut self, word: &str) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.stderr.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            self.said.push_str(&line);
            if line.contains(word) {
                return Some(line);
            }
        }
    }

    /// Wait for its end while it is held.
    #[track_caller]
    pub(crate) fn end_held(mut self) -> Ran {
        let said = self.until_said("\0");
        assert_eq!(said, None);
        self.end().0
    }

    /// Let it run to its end. Returns the outcome, and the phases that it passed.
    #[track_caller]
    pub(crate) fn end(mut self) -> (Ran, Vec<String>) {
        while self.hold("", 1) {}
        let mut stdout = String::new();
        let mut pipe = self.child.stdout.take().unwrap();
        pipe.read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut self.said).unwrap();
        let status = self.child.wait().unwrap();
        let ran = Ran {
            code: status.code().unwrap_or(-1),
            stdout,
            stderr: self.said,
        };
        (ran, self.passed)
    }
}
