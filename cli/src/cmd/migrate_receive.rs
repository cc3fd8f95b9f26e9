//! `xsr migrate-receive`: what `xl migrate-receive` does. A domain is received under
//! another name, paused, and runs once the sender has let go of it. What is done next is decided
//! by [`xsr_save_restore::migrate::ownership::plain::Receiver`]; here it is done.
//!
//! C implementation: `migrate_receive` in `tools/xl/xl_migrate.c`.

mod stand_by;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_save_restore::migrate::ownership::plain::{
    self, ReceiverAction, ReceiverEnd, ReceiverEvent,
};
use xsr_save_restore::pace::ReadLimit;
use xsr_xen_backend::DomId;

use crate::args::ReceiveArgs;
use crate::backend::Hypervisor;
use crate::cmd::restore::{About, Image, Made, Named, of_old_sender, superpages};
use crate::exit::{self, Code, Migration};
use crate::file::Input;
use crate::handshake::{self, Message};
use crate::interrupt::Interrupt;
use crate::left::Left;
use crate::stdout;
use crate::terminal::Terminal;
use crate::text::{shown_name, size};
use crate::transport::{Link, Listener};
use crate::watch::Watch;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    from: &'a str,
    pages: u64,
    page_data_octets: u64,
    superpages_1gib: u64,
    superpages_2mib: u64,
    verify_mismatches: u64,
    seconds: f64,
}

/// Receive a domain.
///
/// Whatever fails before the sender has let go of its own, the domain here is destroyed.
/// After that it runs here, or is destroyed and given back.
pub(crate) fn run(args: &ReceiveArgs, terminal: &Terminal) -> Result<Code> {
    let standing_by = args.remus || args.colo;
    // What the sender has started shares its terminal, and the sender shows progress.
    let shown = match args.listen {
        Some(_) => terminal.clone(),
        None => terminal.without_progress(),
    };
    let mut watch = match standing_by {
        false => Watch::start(&shown, args.progress, "receiving")?,
        // A session that breaks off is what it stands by for.
        true => Watch::start_with(
            &shown,
            args.progress,
            "standing by",
            Interrupt::catch_without_hangup,
        )?,
    };
    let result = receive(args, terminal, &mut watch);
    watch.end(result)
}

fn receive(args: &ReceiveArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    // The sender hears how it ends, and a socket goes.
    Left::work().until_the_end();
    // Before anybody is let send a domain that there is no host for.
    let host = Hypervisor::open_or_create(&args.backend.backend)?;
    let mut link = match &args.listen {
        None => Link::stdio()?,
        Some(endpoint) => {
            let listener = Listener::bind(endpoint)?;
            terminal.say(&format!("migrate-receive: waiting at {}", listener.name()));
            listener.accept(watch.interrupt())?
        }
    };
    let started = Instant::now();
    let from = std::mem::take(&mut link.name);
    let receiver = Receiver {
        args,
        host: &host,
        terminal,
        to: &link.to,
    };
    let input = Input::of_connection(link.from, from);
    if args.remus || args.colo {
        return receiver.stand_by(&input, watch, started);
    }
    let About { name, domid, stats } = receiver.receive(&input, watch)?;
    watch.clear();
    let domain = if args.paused { "paused" } else { "running" };
    let seconds = started.elapsed().as_secs_f64();
    let page_data_octets = stats.pages * 4096;
    terminal.say(&format!(
        "migrate-receive: {name} is {domain}, as {domid}: {} of memory, {}, in {seconds:.1} s",
        size(page_data_octets),
        superpages(&stats),
    ));
    if args.json {
        let document = Report {
            name: &name,
            domid,
            domain,
            from: &input.name,
            pages: stats.pages,
            page_data_octets,
            superpages_1gib: stats.superpages_1gib,
            superpages_2mib: stats.superpages_2mib,
            verify_mismatches: stats.verify_mismatches,
            seconds,
        };
        stdout::report(terminal, &format!("{name} is {domain}"), &document);
    }
    Ok(Code::Fine)
}

/// One migration, at this end.
struct Receiver<'a> {
    args: &'a ReceiveArgs,
    host: &'a Hypervisor,
    terminal: &'a Terminal,
    to: &'a std::fs::File,
}

impl Receiver<'_> {
    /// All that the two ends say to each other.
    fn receive(&self, input: &Input, watch: &mut Watch) -> Result<About> {
        let mut course = Course {
            receiver: self,
            input,
            watch,
            made: None,
            name: String::new(),
            about: None,
            ready_said: false,
            causes: Vec::new(),
            untold: None,
            left: None,
        };
        let end = plain::Receiver::new().drive(|action| course.perform(action));
        course.ended(end)
    }

    /// Tell the sender why, where it does not see this end's stderr.
    fn tell_why(&self, cause: &str) {
        if self.args.listen.is_some() {
            handshake::say_why(self.to, cause);
        }
    }

    /// How long the sender is waited for.
    fn answer(&self) -> Duration {
        Duration::from_secs(self.args.answer_timeout.into())
    }

    /// How long it may send nothing in the image.
    fn read_limit(&self) -> Arc<ReadLimit> {
        Arc::new(ReadLimit::new(self.answer()))
    }
}

/// A migration that is under way: what the machine asks for, done.
struct Course<'c> {
    receiver: &'c Receiver<'c>,
    input: &'c Input,
    watch: &'c mut Watch,
    /// Until it is kept. Dropping it destroys the domain.
    made: Option<Made>,
    name: String,
    about: Option<About>,
    ready_said: bool,
    /// What failed first, and then.
    causes: Vec<Error>,
    /// The sender could not be told.
    untold: Option<Error>,
    /// The domain could not be destroyed.
    left: Option<Error>,
}

impl Course<'_> {
    /// Do it, and say what came of it.
    fn perform(&mut self, action: ReceiverAction) -> ReceiverEvent {
        let Err(error) = self.attempt(action) else {
            return ReceiverEvent::Done;
        };
        match action {
            ReceiverAction::SayRuns | ReceiverAction::SayFailed | ReceiverAction::GiveBack => {
                self.untold.get_or_insert(error);
                ReceiverEvent::PeerLost
            }
            ReceiverAction::Destroy => {
                self.left = Some(error);
                ReceiverEvent::Failed
            }
            ReceiverAction::SayBanner | ReceiverAction::SayReady | ReceiverAction::AwaitGo => {
                self.causes.push(error);
                ReceiverEvent::PeerLost
            }
            _ => {
                self.causes.push(error);
                ReceiverEvent::Failed
            }
        }
    }

    fn attempt(&mut self, action: ReceiverAction) -> Result<()> {
        let Receiver { args, to, .. } = *self.receiver;
        let limit = self.receiver.answer();
        match action {
            ReceiverAction::SayBanner => {
                Message::Banner.send(to, limit)?;
                self.watch.step("banner");
            }
            ReceiverAction::Receive => {
                let made = self.receive_image()?;
                made.name().clone_into(&mut self.name);
                self.made = Some(made);
                self.watch.step("received");
            }
            ReceiverAction::SayReady => {
                Message::Ready.send(to, limit)?;
                self.ready_said = true;
                self.watch.step("ready");
            }
            ReceiverAction::AwaitGo => {
                let interrupt = self.watch.interrupt();
                Message::Go.expect(&self.input.file, interrupt, limit)?;
                interrupt.too_late(
                    "the sender has let go of the domain: it is being started".to_owned(),
                );
                self.watch.step("go");
            }
            ReceiverAction::RenameIn => self.made()?.rename_in()?,
            ReceiverAction::Run => {
                if !args.paused {
                    self.made()?.unpause()?;
                }
                // The domain is here now, whatever becomes of what is said about it.
                self.about = self.made.take().map(Made::keep);
            }
            ReceiverAction::SayRuns => {
                handshake::report_running(to, limit)?;
                self.watch.step("report");
            }
            ReceiverAction::SayFailed => handshake::report_failed(to, limit)?,
            ReceiverAction::Destroy => {
                if let Some(made) = self.made.take() {
                    made.destroy()?;
                }
            }
            ReceiverAction::GiveBack => Message::Go.send(to, limit)?,
            ReceiverAction::End(_) => {}
        }
        Ok(())
    }

    /// The domain, paused, with all of the image.
    fn receive_image(&mut self) -> Result<Made> {
        let Receiver {
            args,
            host,
            terminal,
            ..
        } = *self.receiver;
        let cancel = self.watch.interrupt().cancel().clone();
        let limit = self.receiver.read_limit();
        let (converted, known) = of_old_sender(self.input, cancel.clone(), &limit)?;
        let image = converted.as_ref().unwrap_or(self.input);
        Image::open_migration_behind(known, image, cancel, &limit)
            .and_then(|image| {
                terminal.say(&format!(
                    "migrate-receive: receiving {}",
                    shown_name(image.name())
                ));
                image.build(host, Named::Incoming, args.threads.threads, self.watch)
            })
            .and_then(|made| match &converted {
                // What converts it has read all of it, and nothing of what follows.
                Some(converted) => converted.finish(0).map(|_| made),
                None => Ok(made),
            })
            .map_err(|error| image.blame(error))
    }

    fn made(&self) -> Result<&Made> {
        self.made.as_ref().context("no domain was made")
    }

    /// What it came to, in words.
    fn ended(self, end: ReceiverEnd) -> Result<About> {
        let words = |error: Option<&Error>| {
            error.map_or_else(String::new, |error| exit::words(error.chain()))
        };
        let (name, first) = (&self.name, self.causes.first());
        let cause = words(first);
        let untold = words(self.untold.as_ref());
        // Where the sender keeps its domain, or has it back, and does not see this end's stderr.
        if matches!(end, ReceiverEnd::Destroyed { .. }) {
            self.receiver.tell_why(&cause);
        }
        let kept = if self.ready_said {
            format!("receiving {name}: {cause}")
        } else {
            let broke = match first.is_some_and(exit::ends_early) {
                true => ", but the sender hung up or the connection broke",
                false => "",
            };
            format!("receiving a domain: {cause}{broke}; the sender keeps it")
        };
        Err(failed(match (end, self.about) {
            (ReceiverEnd::Runs { told: true }, Some(about)) => return Ok(about),
            (ReceiverEnd::Runs { .. }, _) => format!(
                "{name} has been received and started here, but the sender could not be told: \
                 {untold}; destroy what it has left, {name}--migratedaway"
            ),
            (ReceiverEnd::LeftPaused, _) => format!(
                "{kept}; it is paused here and must not run: {}",
                words(self.left.as_ref())
            ),
            (ReceiverEnd::Destroyed { .. }, _) if !self.ready_said => kept,
            (ReceiverEnd::Destroyed { given_back: true }, _) => {
                format!("{kept}; the sender has it back")
            }
            (ReceiverEnd::Destroyed { given_back: false }, _) => {
                format!("{kept}; it is destroyed here, and the sender could not be told ({untold})")
            }
        }))
    }
}

fn failed(words: String) -> Error {
    Error::new(Migration {
        words,
        undecided: false,
    })
}
