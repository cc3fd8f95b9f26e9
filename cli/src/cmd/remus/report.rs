//! Reports of `xsr remus` about checkpoints, as text and JSON.

use std::io::{self, Write as _};
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use xsr_save_restore::migrate::checkpoints::Complete;
use xsr_save_restore::save::CheckpointedStats;
use xsr_xen_backend::DomId;

use super::End;
use crate::args::RemusArgs;
use crate::stdout::{self, Results, Versioned};
use crate::terminal::Terminal;
use crate::text::{Count, size};

/// A line of `--stats --json` (docs/json.md).
#[derive(Debug, Serialize)]
struct Line {
    checkpoint: u64,
    dirty_pages: u64,
    page_data_bytes: u64,
    pause_seconds: f64,
    checkpoint_seconds: f64,
    buffered_bytes: u64,
}

/// The `--json` document at the end (docs/json.md).
#[derive(Debug, Serialize)]
struct RemusReport<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    /// Whether a checkpoint was complete on the secondary. The domain is not protected any more.
    was_protected: bool,
    host: &'a str,
    /// `interrupted` or `epochs`.
    ended: &'static str,
    checkpoints: u64,
    dirty_pages: u64,
    pause_seconds: f64,
    longest_pause_seconds: f64,
    longest_checkpoint_seconds: f64,
    stream_bytes: u64,
    seconds: f64,
}

/// The most lines that wait for their reader.
const WAITING: usize = 256;

/// Prints lines on its own thread, so that a slow or stalled reader does not delay checkpoints.
/// Lines in excess of the queue are dropped.
#[derive(Debug)]
struct Printer {
    lines: SyncSender<String>,
    thread: JoinHandle<Result<()>>,
    dropped: u64,
}

impl Printer {
    fn start() -> io::Result<Self> {
        let (lines, waiting) = mpsc::sync_channel::<String>(WAITING);
        let thread = thread::Builder::new()
            .name("stats".to_owned())
            .spawn(move || {
                for line in waiting {
                    let mut out = Results::new();
                    writeln!(out, "{line}")?;
                    out.finish()?;
                }
                Ok(())
            })?;
        Ok(Self {
            lines,
            thread,
            dropped: 0,
        })
    }

    fn print(&mut self, line: String) {
        // A printer that has failed reports its error at the end.
        if self.lines.try_send(line).is_err() {
            self.dropped += 1;
        }
    }

    /// Wait until everything is printed, but no longer than `patience`. Returns the number of
    /// dropped lines.
    fn finish(self, patience: Option<Duration>) -> Result<u64> {
        drop(self.lines);
        if let Some(patience) = patience {
            let until = Instant::now() + patience;
            while !self.thread.is_finished() {
                if Instant::now() >= until {
                    anyhow::bail!("its reader has gone");
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        let printed = self.thread.join();
        printed.map_err(|_| anyhow::anyhow!("the thread that prints panicked"))??;
        Ok(self.dropped)
    }
}

/// Reports events.
pub(super) struct Teller<'a> {
    args: &'a RemusArgs,
    terminal: &'a Terminal,
    name: &'a str,
    domid: DomId,
    started: Instant,
    checkpoints: u64,
    dirty_pages: u64,
    pause: f64,
    longest_pause: f64,
    longest_checkpoint: f64,
    /// With `--stats`.
    printer: Option<Printer>,
}

impl<'a> Teller<'a> {
    pub(super) fn new(
        args: &'a RemusArgs,
        terminal: &'a Terminal,
        name: &'a str,
        domid: DomId,
    ) -> Result<Self> {
        Ok(Self {
            args,
            terminal,
            name,
            domid,
            started: Instant::now(),
            checkpoints: 0,
            dirty_pages: 0,
            pause: 0.0,
            longest_pause: 0.0,
            longest_checkpoint: 0.0,
            printer: args.stats.then(Printer::start).transpose()?,
        })
    }

    /// Report a complete checkpoint.
    pub(super) fn checkpoint(&mut self, complete: &Complete) -> Result<()> {
        let epoch = &complete.epoch;
        let line = Line {
            checkpoint: epoch.number,
            dirty_pages: epoch.pfns,
            page_data_bytes: epoch.pages * 4096,
            pause_seconds: epoch.suspended_for.as_secs_f64(),
            checkpoint_seconds: complete.after.as_secs_f64(),
            buffered_bytes: epoch.buffered_bytes,
        };
        self.checkpoints = epoch.number;
        self.dirty_pages += line.dirty_pages;
        self.pause += line.pause_seconds;
        self.longest_pause = self.longest_pause.max(line.pause_seconds);
        self.longest_checkpoint = self.longest_checkpoint.max(line.checkpoint_seconds);
        if let Some(printer) = &mut self.printer {
            printer.print(match self.args.json {
                true => serde_json::to_string(&Versioned::new(&line)).context("making JSON")?,
                false => format!(
                    "checkpoint {}: {}, paused {:.1} ms, complete after {:.1} ms",
                    line.checkpoint,
                    Count(line.dirty_pages, "dirty page"),
                    line.pause_seconds * 1000.0,
                    line.checkpoint_seconds * 1000.0,
                ),
            });
        }
        if epoch.number == 1 {
            let (name, host) = (self.name, &self.args.host);
            self.terminal.say(&match self.args.blackhole {
                true => format!("remus: {name} has its first checkpoint, and no protection (-b)"),
                false => format!("remus: {name} is protected by {host}"),
            });
        }
        Ok(())
    }

    /// Wait until all lines of `--stats` are printed, but no longer than `patience`.
    ///
    /// # Errors
    ///
    /// They cannot be printed, or were not in time.
    pub(super) fn printed(&mut self, patience: Option<Duration>) -> Result<()> {
        let printer = self.printer.take();
        let dropped = printer.map_or(Ok(0), |printer| printer.finish(patience))?;
        if dropped > 0 {
            let lines = Count(dropped, "line");
            tracing::warn!("{lines} of --stats were read too slowly, and not printed");
        }
        Ok(())
    }

    /// Report a successful end, with the domain `running` or `paused` here.
    pub(super) fn done(
        &mut self,
        end: &End,
        domain: &'static str,
        stats: &CheckpointedStats,
        stream_bytes: u64,
    ) -> Result<()> {
        tracing::debug!(?stats, "protected");
        let name = self.name;
        let was_protected = self.checkpoints > 0 && !self.args.blackhole;
        let done = format!(
            "{name} {} here, and {}",
            match domain {
                "paused" => "stays paused",
                _ => "runs on",
            },
            match was_protected {
                true => "is no longer protected",
                false => "was never protected",
            }
        );
        // Printed even if it runs in the background or as a service.
        self.terminal.say(&format!(
            "remus: {done}: {}, {} sent, paused {:.1} ms at most",
            Count(self.checkpoints, "checkpoint"),
            size(stream_bytes),
            self.longest_pause * 1000.0,
        ));
        if let Err(error) = self.printed(None) {
            stdout::unreported(self.terminal, &done, &error);
        }
        if self.args.json {
            let report = RemusReport {
                name,
                domid: self.domid,
                domain,
                was_protected,
                host: &self.args.host,
                ended: match end {
                    End::Enough => "epochs",
                    _ => "interrupted",
                },
                checkpoints: self.checkpoints,
                dirty_pages: self.dirty_pages,
                pause_seconds: self.pause,
                longest_pause_seconds: self.longest_pause,
                longest_checkpoint_seconds: self.longest_checkpoint,
                stream_bytes,
                seconds: self.started.elapsed().as_secs_f64(),
            };
            let mut out = Results::new();
            let written = match self.args.stats {
                true => out.json_line(&report),
                false => out.json(&report),
            };
            if let Err(error) = written.and_then(|()| out.finish()) {
                stdout::unreported(self.terminal, &done, &error);
            }
        }
        Ok(())
    }
}
