//! What `xsr remus` says of checkpoints, to people and programs.

use std::io::Write as _;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use xsr_save_restore::save::CheckpointedStats;
use xsr_xen_backend::DomId;

use super::End;
use super::toolstack::Complete;
use crate::args::RemusArgs;
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::{Count, size};

/// A line of `--stats --json` (docs/json.md).
#[derive(Debug, Serialize)]
struct Line {
    checkpoint: u64,
    dirty_pages: u64,
    page_data_octets: u64,
    pause_seconds: f64,
    checkpoint_seconds: f64,
    buffered_octets: u64,
}

/// What `--json` prints at the end (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `running`.
    domain: &'static str,
    host: &'a str,
    /// `interrupted` or `epochs`.
    ended: &'static str,
    checkpoints: u64,
    dirty_pages: u64,
    pause_seconds: f64,
    longest_pause_seconds: f64,
    longest_checkpoint_seconds: f64,
    stream_octets: u64,
    seconds: f64,
}

/// Says what happens.
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
}

impl<'a> Teller<'a> {
    pub(super) fn new(
        args: &'a RemusArgs,
        terminal: &'a Terminal,
        name: &'a str,
        domid: DomId,
    ) -> Self {
        Self {
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
        }
    }

    /// A checkpoint is complete.
    pub(super) fn checkpoint(&mut self, complete: &Complete) -> Result<()> {
        let epoch = &complete.epoch;
        let line = Line {
            checkpoint: epoch.number,
            dirty_pages: epoch.pfns,
            page_data_octets: epoch.pages * 4096,
            pause_seconds: epoch.suspended_for.as_secs_f64(),
            checkpoint_seconds: complete.after.as_secs_f64(),
            buffered_octets: epoch.buffered_octets,
        };
        self.checkpoints = epoch.number;
        self.dirty_pages += line.dirty_pages;
        self.pause += line.pause_seconds;
        self.longest_pause = self.longest_pause.max(line.pause_seconds);
        self.longest_checkpoint = self.longest_checkpoint.max(line.checkpoint_seconds);
        if self.args.stats {
            let mut out = Results::new();
            match self.args.json {
                true => out.json_line(&line)?,
                false => writeln!(
                    out,
                    "checkpoint {}: {}, paused {:.1} ms, complete after {:.1} ms",
                    line.checkpoint,
                    Count(line.dirty_pages, "dirty page"),
                    line.pause_seconds * 1000.0,
                    line.checkpoint_seconds * 1000.0,
                )?,
            }
            out.finish()?;
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

    /// It has ended in good order.
    pub(super) fn done(
        &self,
        end: &End,
        stats: &CheckpointedStats,
        stream_octets: u64,
    ) -> Result<()> {
        tracing::debug!(?stats, "protected");
        let name = self.name;
        self.terminal.note(&format!(
            "{name} runs on here, unprotected: {}, {} sent, paused {:.1} ms at most",
            Count(self.checkpoints, "checkpoint"),
            size(stream_octets),
            self.longest_pause * 1000.0,
        ));
        if self.args.json {
            let report = Report {
                name,
                domid: self.domid,
                domain: "running",
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
                stream_octets,
                seconds: self.started.elapsed().as_secs_f64(),
            };
            let mut out = Results::new();
            match self.args.stats {
                true => out.json_line(&report)?,
                false => out.json(&report)?,
            }
            out.finish()?;
        }
        Ok(())
    }
}
