//! `xsr migrate-receive -r`: the other end of Remus. The domain is kept at the last
//! checkpoint that is complete, and runs once the sender is lost. With `--colo` it runs from
//! the first checkpoint on, and is made the sender's again by each.
//!
//! What the sender may still hear is that this end runs the domain, or that it has none any
//! more: the words of a migration's end. (xl says nothing, and listens to nothing.)
//!
//! C implementation: `migrate_receive` in `tools/xl/xl_migrate.c`, for
//! `LIBXL_CHECKPOINTED_STREAM_REMUS`.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::{Error, Result};
use serde::Serialize;
use xsr_save_restore::restore::checkpoint::CheckpointOptions;
use xsr_xen_backend::DomId;

use super::{Receiver, failed};
use crate::cmd::restore::checkpoints::{StandBy, Survival};
use crate::cmd::restore::{About, Image};
use crate::exit::{self, Code, LeftBehind, Withdrawn};
use crate::file::Input;
use crate::handshake::{self, Message};
use crate::stdout;
use crate::text::size;
use crate::watch::Watch;
use crate::workload;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    from: &'a str,
    checkpoint: u64,
    most_kept_octets: u64,
    most_spilt_octets: u64,
    pages: u64,
    page_data_octets: u64,
    seconds: f64,
}

impl Receiver<'_> {
    /// Keep checkpoints until the sender is lost; then run the last.
    pub(super) fn stand_by(
        &self,
        input: &Input,
        watch: &mut Watch,
        started: Instant,
    ) -> Result<Code> {
        let (args, terminal) = (self.args, self.terminal);
        Message::Banner
            .send(self.to, self.answer())
            .map_err(|error| {
                let cause = exit::words(error.chain());
                failed(format!("standing by: {cause}; the sender keeps its domain"))
            })?;
        watch.step("banner");
        let cancel = watch.interrupt().cancel().clone();
        let mut name = String::new();
        let keep = self.keep();
        let limit = self.read_limit();
        let ready = |name: &str| {
            // A sender may be silent between two checkpoints for as long as it likes.
            limit.lift();
            terminal.say(&format!(
                "migrate-receive: the first checkpoint of {name} is complete"
            ));
        };
        let watching = RefCell::new(&mut *watch);
        let made = Image::open_migration(input, cancel, &limit).and_then(|image| {
            name = image.name().to_owned();
            terminal.say(&format!("migrate-receive: standing by for {name}"));
            let how = StandBy {
                input,
                limit: &limit,
                host: self.host,
                threads: args.threads.threads,
                keep: &keep,
                watch: &watching,
                first: &ready,
            };
            if !args.colo {
                return image.stand_by(&how);
            }
            let work = args.dirty_rate.map(workload::at_rate);
            image.run_beside(&how, self.to, work)
        });
        let (made, survival) = made.map_err(|error| self.not_taken_over(&name, &error))?;
        let Survival {
            checkpoint, why, ..
        } = &survival;
        watch.clear();
        watch
            .interrupt()
            .too_late(format!("the sender is lost: {name} is being started here"));
        terminal.say(&format!(
            "migrate-receive: the sender of {name} is lost ({why}); it goes on here from \
             checkpoint {checkpoint}"
        ));
        // As xl: it matters more that it runs than what it is called.
        if let Err(error) = made.rename_in() {
            let error = exit::words(error.chain());
            tracing::error!(error, "{name} keeps its other name");
        }
        let unpaused = match (args.paused, args.colo) {
            (true, false) => Ok(()),
            (false, false) => made.unpause(),
            (paused, true) => made.run_alone(paused),
        };
        // From here on the domain stays: it may be all there is.
        let about = made.keep();
        if let Err(error) = unpaused {
            let cause = exit::words(error.chain());
            return Err(failed(format!(
                "{name} is here, as checkpoint {checkpoint}, and could not be run: {cause}"
            )));
        }
        watch.step("took_over");
        if let Err(error) = handshake::report_running(self.to, self.answer()) {
            tracing::debug!(%error, "the sender is lost indeed");
        }
        self.report(input, &about, &survival, started)?;
        Ok(Code::Fine)
    }

    fn keep(&self) -> CheckpointOptions {
        let octets = |size: crate::args::MemorySize| size.kib << 10;
        let mut keep = CheckpointOptions::default();
        if let Some(memory) = self.args.checkpoint_memory {
            keep.memory_octets = usize::try_from(octets(memory)).unwrap_or(usize::MAX);
        }
        keep.file_octets = self.args.checkpoint_file.map(octets);
        keep
    }

    /// There is no domain here, and the sender may know.
    fn not_taken_over(&self, name: &str, error: &Error) -> Error {
        let left = error.is::<LeftBehind>();
        let told = handshake::report_failed(self.to, self.answer()).and_then(|()| match left {
            // As long as there is a copy the sender does not hear that there is none.
            true => Ok(()),
            false => Message::Go.send(self.to, self.answer()),
        });
        if let Err(error) = told {
            tracing::debug!(%error, "the sender could not be told");
        }
        let cause = exit::words(error.chain());
        let of = match name {
            "" => String::new(),
            name => format!(" for {name}"),
        };
        failed(match error.is::<Withdrawn>() {
            _ if left => format!("standing by{of}: {cause}"),
            true => format!("standing by{of}: {cause}, and keeps the domain; there is none here"),
            false => format!("standing by{of}: {cause}; it does not run here"),
        })
    }

    fn report(
        &self,
        input: &Input,
        about: &About,
        survival: &Survival,
        started: Instant,
    ) -> Result<()> {
        let About { name, domid, stats } = about;
        let domain = if self.args.paused {
            "paused"
        } else {
            "running"
        };
        let page_data_octets = stats.pages * 4096;
        self.terminal.say(&format!(
            "migrate-receive: {name} is {domain}, as {domid}: {} of memory in {} checkpoints",
            size(page_data_octets),
            survival.checkpoint,
        ));
        if self.args.json {
            let document = Report {
                name,
                domid: *domid,
                domain,
                from: &input.name,
                checkpoint: survival.checkpoint,
                most_kept_octets: survival.most_kept_octets,
                most_spilt_octets: survival.most_spilt_octets,
                pages: stats.pages,
                page_data_octets,
                seconds: started.elapsed().as_secs_f64(),
            };
            stdout::report(self.terminal, &format!("{name} is {domain}"), &document);
        }
        Ok(())
    }
}
