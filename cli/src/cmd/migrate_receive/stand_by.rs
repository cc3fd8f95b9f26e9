//! `xsr migrate-receive -r`, the secondary of Remus: the domain is kept at the last complete
//! checkpoint, and runs once the sender is lost. With `--colo` it runs from the first checkpoint
//! on, and each checkpoint makes it equal to the sender's again.
//!
//! The sender may still be told that this end runs the domain, or that it has dropped its copy, by
//! the messages that end a migration. (xl has no such messages.)
//!
//! C implementation: `migrate_receive` in `tools/xl/xl_migrate.c`, for
//! `LIBXL_CHECKPOINTED_STREAM_REMUS`.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_save_restore::migrate::connection::{Connection, ConnectionReader, Wait};
use xsr_save_restore::migrate::ownership::protect::{StandbyAction, StandbyEnd};
use xsr_save_restore::migrate::standby::{Kept, KeptUntil, StandbyRequest, StoodBy};
use xsr_save_restore::migrate::{BoxError, Event};
use xsr_save_restore::pace::ReadLimit;
use xsr_save_restore::restore::checkpoint::CheckpointOptions;
use xsr_xen_backend::DomId;

use super::{Receiver, failed};
use crate::backend::workload;
use crate::cmd::restore::checkpoints::{StandBy, Survival};
use crate::cmd::restore::{About, Image, ImageSource, Made};
use crate::cpu;
use crate::exit::{self, Code, LeftBehind, Withdrawn};
use crate::interrupt::Interrupt;
use crate::stdout;
use crate::text::size;
use crate::watch::Watch;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct StandbyReport<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    from: &'a str,
    checkpoint: u64,
    most_kept_bytes: u64,
    most_spilt_bytes: u64,
    pages: u64,
    page_data_bytes: u64,
    seconds: f64,
}

impl Receiver<'_> {
    /// Keep checkpoints until the sender is lost; then run the last one.
    pub(super) fn stand_by(&self, watch: &mut Watch, started: Instant) -> Result<Code> {
        let interrupt = watch.interrupt().clone();
        let watch = RefCell::new(watch);
        let mut observe = |event: Event| {
            if let Event::Done(step) = event {
                watch.borrow_mut().step(step.name());
            }
        };
        let mut standing = StandingBy {
            receiver: self,
            watch: &watch,
            interrupt: &interrupt,
            name: String::new(),
            made: None,
            came_to: None,
            about: None,
        };
        let StoodBy { end, causes } = StandbyRequest::new()
            .answer_timeout(self.answer())
            .observer(&mut observe)
            .run(&*self.connection, &mut standing);
        let why = |action: StandbyAction| {
            let cause = causes.iter().find(|cause| cause.action == action);
            cause.map_or_else(String::new, |cause| exit::words_of(&*cause.error))
        };
        let StandingBy {
            name,
            came_to,
            about,
            ..
        } = standing;
        match (end, came_to, about) {
            (StandbyEnd::Runs, Some(Ok(survival)), Some(about)) => {
                self.report(&about, &survival, started);
                Ok(Code::Fine)
            }
            (StandbyEnd::CouldNotRun, Some(Ok(survival)), _) => Err(failed(format!(
                "{name} is here, as checkpoint {}, and could not be run: {}",
                survival.checkpoint,
                why(StandbyAction::Run)
            ))),
            (_, Some(Err(error)), _) => {
                let left = (end == StandbyEnd::LeftBehind).then(|| why(StandbyAction::Destroy));
                if !error.is::<Withdrawn>() {
                    self.tell_why(&exit::words(error.chain()));
                }
                Err(not_taken_over(&name, &error, left))
            }
            (..) => Err(failed(format!(
                "standing by: {}; the sender keeps its domain",
                why(StandbyAction::SayBanner)
            ))),
        }
    }

    fn keep(&self) -> CheckpointOptions {
        let bytes = |size: crate::args::MemorySize| size.kib << 10;
        let mut keep = CheckpointOptions::default();
        if let Some(memory) = self.args.checkpoint_memory {
            keep.memory_bytes = usize::try_from(bytes(memory)).unwrap_or(usize::MAX);
        }
        keep.file_bytes = self.args.checkpoint_file.map(bytes);
        keep
    }

    fn report(&self, about: &About, survival: &Survival, started: Instant) {
        let About { name, domid, stats } = about;
        let domain = if self.args.paused {
            "paused"
        } else {
            "running"
        };
        let page_data_bytes = stats.pages * 4096;
        self.terminal.say(&format!(
            "migrate-receive: {name} is {domain}, as {domid}: {} of memory in {} checkpoints",
            size(page_data_bytes),
            survival.checkpoint,
        ));
        if self.args.json {
            let document = StandbyReport {
                name,
                domid: *domid,
                domain,
                from: &self.from,
                checkpoint: survival.checkpoint,
                most_kept_bytes: survival.most_kept_bytes,
                most_spilt_bytes: survival.most_spilt_bytes,
                pages: stats.pages,
                page_data_bytes,
                seconds: started.elapsed().as_secs_f64(),
            };
            stdout::report(self.terminal, &format!("{name} is {domain}"), &document);
        }
    }
}

/// The error if no domain is taken over because of `error`. `left`: what remains of it.
fn not_taken_over(name: &str, error: &Error, left: Option<String>) -> Error {
    let cause = exit::words(error.chain());
    let of = match name {
        "" => String::new(),
        name => format!(" for {name}"),
    };
    failed(match (left, error.is::<Withdrawn>()) {
        (Some(left), _) => format!("standing by{of}: {left}: {cause}"),
        (None, true) => {
            format!("standing by{of}: {cause}, and keeps the domain; there is none here")
        }
        (None, false) => format!("standing by{of}: {cause}; it does not run here"),
    })
}

/// Destroy the domain that was created. `came_to` says whether something is left that this function
/// cannot reach.
fn destroy(made: Option<Made>, came_to: Option<&Result<Survival>>) -> Result<(), BoxError> {
    match (made, came_to) {
        (Some(made), _) => made.give_up().map_err(|left| left.0.into()),
        (None, Some(Err(error))) if error.is::<LeftBehind>() => {
            Err("what was made of it could not be destroyed".into())
        }
        (None, _) => Ok(()),
    }
}

/// The domain that is kept.
struct StandingBy<'s, 'w> {
    receiver: &'s Receiver<'s>,
    watch: &'s RefCell<&'w mut Watch>,
    interrupt: &'s Interrupt,
    name: String,
    /// The domain, until it is kept. Dropping it destroys it.
    made: Option<Made>,
    /// The result of keeping checkpoints.
    came_to: Option<Result<Survival>>,
    about: Option<About>,
}

impl StandingBy<'_, '_> {
    fn keep_checkpoints(
        &mut self,
        connection: &dyn Connection,
        complete: &mut dyn FnMut(),
    ) -> Result<Survival> {
        let Receiver { args, terminal, .. } = *self.receiver;
        let (watch, keep) = (self.watch, self.receiver.keep());
        let limit = ReadLimit::new(self.receiver.answer());
        let wait = Wait::forever()
            .unless(self.interrupt.cancel())
            .silent_for(&limit);
        let complete = RefCell::new(complete);
        let first = |name: &str| {
            // Between two checkpoints a sender may be silent for any time.
            limit.lift();
            (complete.borrow_mut())();
            terminal.say(&format!(
                "migrate-receive: the first checkpoint of {name} is complete"
            ));
        };
        let reader = ConnectionReader::new(connection, wait)?;
        let mut image = Image::open_migration(ImageSource::over(reader))?;
        image.name().clone_into(&mut self.name);
        if args.direct {
            image.check_direct()?;
        }
        terminal.say(&format!("migrate-receive: standing by for {}", self.name));
        let how = StandBy {
            connection,
            wait,
            host: self.receiver.host,
            threads: args.threads.threads,
            cpu: cpu::check(args.force),
            keep: &keep,
            progress: &|progress| watch.borrow_mut().progress(progress),
            first: &first,
        };
        if !args.colo {
            return image.stand_by(&how, &mut self.made);
        }
        let work = args.dirty_rate.map(workload::at_rate);
        image.run_beside(&how, work, &mut self.made)
    }

    fn made(&self) -> Result<&Made> {
        self.made.as_ref().context("no domain was made")
    }
}

impl Kept for StandingBy<'_, '_> {
    fn keep(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> KeptUntil {
        let came_to = self
            .keep_checkpoints(connection, complete)
            .map_err(|error| cpu::advise(error, cpu::RECEIVE));
        let until = match &came_to {
            Ok(_) => KeptUntil::Lost,
            Err(error) if error.is::<Withdrawn>() => KeptUntil::Withdrawn,
            Err(_) => KeptUntil::Failed,
        };
        self.came_to = Some(came_to);
        until
    }

    fn take_name(&mut self) -> Result<(), BoxError> {
        let name = &self.name;
        self.watch.borrow_mut().clear();
        self.interrupt
            .too_late(format!("the sender is lost: {name} is being started here"));
        if let Some(Ok(Survival {
            checkpoint, why, ..
        })) = &self.came_to
        {
            self.receiver.terminal.always(&format!(
                "migrate-receive: the sender of {name} is lost ({why}); it goes on here from \
                 checkpoint {checkpoint}"
            ));
        }
        let made = self.made()?;
        // As in xl: it must run, even under the wrong name.
        Ok(made.rename_in().inspect_err(|error| {
            let error = exit::words(error.chain());
            tracing::error!(error, "{name} keeps its other name");
        })?)
    }

    fn run(&mut self) -> Result<(), BoxError> {
        let args = self.receiver.args;
        let made = self.made()?;
        let ran = match (args.paused, args.colo) {
            (true, false) => Ok(()),
            (false, false) => made.unpause(),
            (paused, true) => made.run_alone(paused),
        };
        // From here on the domain stays: it may be the only copy.
        self.about = self.made.take().map(Made::keep);
        Ok(ran?)
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        destroy(self.made.take(), self.came_to.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The function that created it could not destroy it, and returned no domain.
    #[test]
    fn what_its_maker_left_is_not_said_to_be_gone() {
        let error = || Error::msg("the name is taken");
        destroy(None, None).expect("nothing was made");
        destroy(None, Some(&Err(error()))).expect("nothing was made");
        let left = error().context(LeftBehind("d7, made for web, is left here".to_owned()));
        let came_to = Err(left);
        let said = destroy(None, Some(&came_to)).expect_err("it is there");
        let Err(error) = came_to else { unreachable!() };
        let words = not_taken_over("", &error, Some(said.to_string())).to_string();
        assert_eq!(
            words,
            "standing by: what was made of it could not be destroyed: d7, made for web, is left \
             here: the name is taken"
        );
    }
}
