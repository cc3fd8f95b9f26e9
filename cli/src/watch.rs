//! Progress of a save, restore or migration: a bar on the terminal, JSON lines for a program
//! (`--progress-fd`, docs/json.md), and requests to interrupt it.

mod meter;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::storage::file::Inherited;

use crate::args::ProgressArg;
use crate::backend::phase;
use crate::exit::{self, BadUsage, Code};
use crate::interrupt::Interrupt;
use crate::left;
use crate::painter::Painter;
use crate::stdout::Versioned;
use crate::terminal::Terminal;

pub(crate) use self::meter::{Meter, SessionProgress, advice};

/// The shortest time between two lines of one phase and pass.
const BETWEEN: Duration = Duration::from_millis(100);

/// How long the last lines wait for a stalled reader, in milliseconds.
const PATIENCE: u16 = 500;

/// One line for `--progress-fd`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    event: &'static str,
    /// Seconds since the command began.
    seconds: f64,
    #[serde(flatten)]
    about: About<'a>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum About<'a> {
    Progress(ProgressLine),
    Step { step: &'static str },
    End { code: u8, error: Option<&'a str> },
}

/// The engine's progress, with the names of docs/json.md.
#[derive(Debug, Serialize)]
struct ProgressLine {
    phase: &'static str,
    iteration: u32,
    pages_done: u64,
    pages_total: Option<u64>,
    bytes_done: u64,
    bytes_total: Option<u64>,
    page_data_bytes: u64,
    bytes_per_second: f64,
    dirty_pages_per_second: f64,
    dirty_pages: Option<u64>,
    estimated_seconds: Option<f64>,
    estimated_downtime_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<SessionProgress>,
}

impl From<&Progress> for ProgressLine {
    fn from(progress: &Progress) -> Self {
        let seconds = |time: Option<Duration>| time.as_ref().map(Duration::as_secs_f64);
        Self {
            phase: phase_name(progress.phase),
            iteration: progress.iteration,
            pages_done: progress.pages_done,
            pages_total: progress.pages_total,
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            page_data_bytes: progress.bytes,
            bytes_per_second: progress.bytes_per_second,
            dirty_pages_per_second: progress.dirty_pages_per_second,
            dirty_pages: progress.dirty_count,
            estimated_seconds: seconds(progress.estimated_time),
            estimated_downtime_seconds: seconds(progress.estimated_downtime),
            session: None,
        }
    }
}

/// A phase's name in docs/json.md.
fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Setup => "setup",
        Phase::Precopy => "precopy",
        Phase::Suspend => "suspend",
        Phase::Pages => "pages",
        Phase::StopAndCopy => "stop_and_copy",
        Phase::Verify => "verify",
        Phase::Tail => "tail",
        Phase::Checkpoint => "checkpoint",
        _ => "other",
    }
}

/// All observers of a command.
#[derive(Debug)]
pub(crate) struct Watch {
    what: &'static str,
    terminal: Terminal,
    painter: Option<Painter>,
    /// The terminal has stalled: nothing more is drawn.
    stalled: bool,
    bytes_total: Option<u64>,
    lines: Option<Lines>,
    interrupt: Interrupt,
    /// When the guest was asked to suspend.
    suspended: Option<Instant>,
    /// The session of a sender.
    meter: Option<Meter>,
}

impl Watch {
    /// Observe a command. Called before the command does anything.
    ///
    /// # Errors
    ///
    /// `--progress-fd` is not a descriptor that can be written to.
    pub(crate) fn start(terminal: &Terminal, arg: ProgressArg, what: &'static str) -> Result<Self> {
        Self::start_with(terminal, arg, what, Interrupt::of_process)
    }

    /// The same, with the interrupt that `catch` returns.
    pub(crate) fn start_with(
        terminal: &Terminal,
        arg: ProgressArg,
        what: &'static str,
        catch: impl FnOnce() -> Result<Interrupt>,
    ) -> Result<Self> {
        left::writes();
        Ok(Self {
            what,
            terminal: terminal.clone(),
            painter: None,
            stalled: false,
            bytes_total: None,
            // Opened first: later the number may belong to a file of our own.
            lines: arg.progress_fd.map(Lines::open).transpose()?,
            interrupt: catch()?,
            suspended: None,
            meter: None,
        })
    }

    /// Show what a session carries, too.
    pub(crate) fn measure(&mut self, meter: Option<Meter>) {
        self.meter = meter;
    }

    /// What the session has carried from its beginning, if there is one.
    pub(crate) fn session(&self) -> Option<SessionProgress> {
        self.meter.as_ref().map(Meter::whole)
    }

    /// The interrupt of the command.
    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Set the name of the current work.
    pub(crate) fn now(&mut self, what: &'static str) {
        self.clear();
        self.what = what;
        self.bytes_total = None;
    }

    /// Set the size of the image that is read, which gives the bar an end.
    pub(crate) fn expect_bytes(&mut self, bytes: Option<u64>) {
        self.bytes_total = bytes;
    }

    /// Show the engine's progress.
    pub(crate) fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        phase(phase_name(progress.phase));
        if progress.phase == Phase::Suspend {
            self.suspended.get_or_insert_with(Instant::now);
        }
        if self.painter.is_none() && !self.stalled {
            self.painter = Painter::start(&self.terminal, self.what);
        }
        let session = self.meter.as_mut().map(|meter| meter.look(progress));
        if let Some(painter) = &self.painter {
            painter.show(progress, self.bytes_total, session);
        }
        if let Some(lines) = &mut self.lines {
            lines.progress(progress, session);
        }
        self.interrupt.cancel().check()
    }

    /// When the guest was asked to suspend; `None` if it was not.
    pub(crate) fn suspended(&self) -> Option<Instant> {
        self.suspended
    }

    /// Report a step outside the engine.
    pub(crate) fn step(&mut self, step: &'static str) {
        self.clear();
        phase(step);
        tracing::info!("{step}");
        if let Some(lines) = &mut self.lines {
            lines.always("step", About::Step { step });
        }
    }

    /// Remove the bar for now.
    pub(crate) fn clear(&mut self) {
        if let Some(painter) = self.painter.take() {
            self.stalled |= !painter.clear();
        }
    }

    /// The command has ended. Returns `result` unchanged.
    pub(crate) fn end(&mut self, result: Result<Code>) -> Result<Code> {
        self.clear();
        let Some(lines) = &mut self.lines else {
            return result;
        };
        let (code, error) = match &result {
            Ok(code) => (*code, None),
            Err(e) => (exit::code_of(e), Some(exit::words(e.chain()))),
        };
        let end = About::End {
            code: code.number(),
            error: error.as_deref(),
        };
        lines.always("end", end);
        lines.last();
        result
    }
}

/// JSON lines for a descriptor. A slow reader misses lines that later ones supersede, and delays
/// nothing. After its end is closed, nothing more is written.
#[derive(Debug)]
struct Lines {
    out: Option<File>,
    began: Instant,
    /// Lines that could not be written yet.
    waiting: VecDeque<Vec<u8>>,
    /// Phase and pass of the last line, and when it was written.
    last: Option<(Phase, u32, Instant)>,
}

impl Lines {
    fn open(fd: u32) -> Result<Self> {
        Inherited::of(fd).map_err(|e| Error::new(BadUsage(format!("--progress-fd {fd}: {e}"))))?;
        // A file description of our own, so that other holders of the descriptor can keep it
        // blocking.
        let out = OpenOptions::new()
            .append(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(format!("/proc/self/fd/{fd}"))
            .map_err(|e| {
                Error::new(BadUsage(format!(
                    "--progress-fd {fd}: {e}; give a pipe or file, say {fd}>progress.jsonl \
                     (a socket cannot be opened again)"
                )))
            })?;
        Ok(Self {
            out: Some(out),
            began: Instant::now(),
            waiting: VecDeque::new(),
            last: None,
        })
    }

    fn progress(&mut self, progress: &Progress, session: Option<SessionProgress>) {
        let now = Instant::now();
        let news = match self.last {
            None => true,
            Some((phase, iteration, _)) => {
                (phase, iteration) != (progress.phase, progress.iteration)
            }
        };
        let due = self.last.is_none_or(|(.., then)| now - then >= BETWEEN);
        if !news && !due && !progress.pass_is_complete() {
            return;
        }
        self.last = Some((progress.phase, progress.iteration, now));
        self.flush();
        if news || self.waiting.is_empty() {
            let line = ProgressLine {
                session,
                ..progress.into()
            };
            self.always("progress", About::Progress(line));
        }
    }

    /// Write a line that must not be dropped.
    fn always(&mut self, event: &'static str, about: About<'_>) {
        let line = Line {
            event,
            seconds: self.began.elapsed().as_secs_f64(),
            about,
        };
        match serde_json::to_vec(&Versioned::new(&line)) {
            Ok(mut bytes) => {
                bytes.push(b'\n');
                self.waiting.push_back(bytes);
            }
            Err(error) => tracing::warn!(%error, "a line of progress could not be made"),
        }
        self.flush();
    }

    /// Write waiting lines, as far as the reader takes them.
    fn flush(&mut self) {
        while let (Some(out), Some(line)) = (&mut self.out, self.waiting.front_mut()) {
            match out.write(line) {
                Ok(n) if n == line.len() => {
                    self.waiting.pop_front();
                }
                Ok(n) => {
                    line.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::info!(%error, "the reader of the progress has gone");
                    self.out = None;
                }
            }
        }
        if self.out.is_none() {
            self.waiting.clear();
        }
    }

    /// After the last line: give a slow reader a moment.
    fn last(&mut self) {
        self.flush();
        while let (Some(out), false) = (&self.out, self.waiting.is_empty()) {
            let mut fds = [PollFd::new(
                std::os::fd::AsFd::as_fd(out),
                PollFlags::POLLOUT,
            )];
            match poll(&mut fds, PollTimeout::from(PATIENCE)) {
                Ok(1..) => self.flush(),
                _ => {
                    tracing::info!(
                        lines = self.waiting.len(),
                        "the reader of the progress stalls"
                    );
                    return;
                }
            }
        }
    }
}
