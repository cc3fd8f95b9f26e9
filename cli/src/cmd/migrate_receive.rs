//! `xsr migrate-receive`, like `xl migrate-receive`: a domain is received under another name,
//! paused, and runs once the sender has let go of it. [`ReceiveRequest`] implements that. This file
//! has its effects on the domain, and the messages for the user.
//!
//! C implementation: `migrate_receive` in `tools/xl/xl_migrate.c`.

mod stand_by;

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_save_restore::migrate::connection::{Connection, ConnectionReader, ConnectionWriter, Wait};
use xsr_save_restore::migrate::messages::Reason;
use xsr_save_restore::migrate::ownership::plain::{ReceiverAction, ReceiverEnd};
use xsr_save_restore::migrate::receive::{Arrived, Arriving, ReceiveRequest};
use xsr_save_restore::migrate::{BoxError, Cause, Event, Step};
use xsr_xen_backend::DomId;

use crate::args::{Endpoint, ReceiveArgs};
use crate::backend::Hypervisor;
use crate::cmd::remus::refuse_direct_colo;
use crate::cmd::restore::{About, Image, ImageSource, Made, Named, of_old_sender, superpages};
use crate::cpu;
use crate::exit::{self, BadUsage, Code, Migration};
use crate::interrupt::Interrupt;
use crate::left::Left;
use crate::stdout;
use crate::terminal::Terminal;
use crate::text::{shown_name, size};
use crate::transport::{Link, Listener};
use crate::watch::Watch;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct ReceiveReport<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    from: &'a str,
    pages: u64,
    page_data_bytes: u64,
    superpages_1gib: u64,
    superpages_2mib: u64,
    verify_mismatches: u64,
    seconds: f64,
}

/// Receive a domain.
///
/// After a failure before the sender has let go of its own, the domain here is destroyed. After
/// that it runs here, or is destroyed and given back.
pub(crate) fn run(args: &ReceiveArgs, terminal: &Terminal) -> Result<Code> {
    refuse_direct_colo(args.direct && args.colo)?;
    let standing_by = args.remus || args.colo;
    if standing_by && matches!(args.listen, Some(Endpoint::Tls(_))) {
        let why = "-r and --colo take no tls: address: after a lost connection the session would \
                   wait for another one, and the domain would not run on here meanwhile; use ssh";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    // A receiver that the sender has started shares its terminal, and the sender shows progress.
    let shown = match args.listen {
        Some(_) => terminal.clone(),
        None => terminal.without_progress(),
    };
    let mut watch = match standing_by {
        false => Watch::start(&shown, args.progress, "receiving")?,
        // A lost session is what it stands by for, so it must survive a hangup.
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
    // The sender is told the result, and a socket is removed.
    Left::work().until_the_end();
    let host = Hypervisor::open_or_create(&args.backend.backend, args.direct)?;
    let answer = Duration::from_secs(args.answer_timeout.into());
    let link = match &args.listen {
        None if args.offer.session => Link::offered(&args.offer, answer, watch.interrupt())?,
        None => Link::stdio()?,
        Some(endpoint) => {
            let listener = Listener::bind(endpoint, args.offer.tls.as_deref())?;
            terminal.say(&format!("migrate-receive: waiting at {}", listener.name()));
            listener.accept(answer, watch.interrupt())?
        }
    };
    // Until the session is closed.
    let _beside = link.beside;
    let started = Instant::now();
    let receiver = Receiver {
        args,
        host: &host,
        terminal,
        from: link.name,
        connection: link.connection.into(),
    };
    if args.remus || args.colo {
        return receiver.stand_by(watch, started);
    }
    let About { name, domid, stats } = receiver.receive(watch)?;
    watch.clear();
    let domain = if args.paused { "paused" } else { "running" };
    let seconds = started.elapsed().as_secs_f64();
    let page_data_bytes = stats.pages * 4096;
    terminal.say(&format!(
        "migrate-receive: {name} is {domain}, as {domid}: {} of memory, {}, in {seconds:.1} s",
        size(page_data_bytes),
        superpages(&stats),
    ));
    if args.json {
        let document = ReceiveReport {
            name: &name,
            domid,
            domain,
            from: &receiver.from,
            pages: stats.pages,
            page_data_bytes,
            superpages_1gib: stats.superpages_1gib,
            superpages_2mib: stats.superpages_2mib,
            verify_mismatches: stats.verify_mismatches,
            seconds,
        };
        stdout::report(terminal, &format!("{name} is {domain}"), &document);
    }
    Ok(Code::Fine)
}

/// The receiver's side of a migration.
struct Receiver<'a> {
    args: &'a ReceiveArgs,
    host: &'a Hypervisor,
    terminal: &'a Terminal,
    /// The sender's name.
    from: String,
    connection: Arc<dyn Connection>,
}

impl Receiver<'_> {
    /// The whole exchange with the sender.
    fn receive(&self, watch: &mut Watch) -> Result<About> {
        let interrupt = watch.interrupt().clone();
        let watch = RefCell::new(watch);
        let ready_said = Cell::new(false);
        let mut observe = |event: Event| {
            let Event::Done(step) = event else { return };
            if step == Step::Go {
                let why = "the sender has let go of the domain: it is being started";
                interrupt.too_late(why.to_owned());
            }
            ready_said.set(ready_said.get() || step == Step::Ready);
            watch.borrow_mut().step(step.name());
        };
        let mut coming = Coming {
            receiver: self,
            watch: &watch,
            made: None,
            name: String::new(),
            about: None,
        };
        let arrived = ReceiveRequest::new()
            .idle_timeout(self.answer())
            .go_timeout(self.answer())
            .cancel(interrupt.cancel())
            .observer(&mut observe)
            .run(&*self.connection, &mut coming);
        coming.ended(arrived, ready_said.get())
    }

    /// Tell the sender the reason, if it does not see this end's stderr.
    fn tell_why(&self, cause: &str) {
        /// How long to wait while the sender does not read.
        const WAIT: Duration = Duration::from_secs(1);
        if self.args.listen.is_none() {
            return;
        }
        if let Err(error) = Reason::write(cause, self.writer().within(WAIT)) {
            tracing::debug!(%error, "the other end could not be told why");
        }
    }

    /// A writer of messages to the sender.
    fn writer(&self) -> ConnectionWriter<'_> {
        ConnectionWriter::new(&*self.connection, Wait::forever()).within(self.answer())
    }

    /// How long to wait for the sender.
    fn answer(&self) -> Duration {
        Duration::from_secs(self.args.answer_timeout.into())
    }
}

/// The domain while it is being received.
struct Coming<'c, 'w> {
    receiver: &'c Receiver<'c>,
    watch: &'c RefCell<&'w mut Watch>,
    /// The domain, until it is kept. Dropping it destroys it.
    made: Option<Made>,
    name: String,
    about: Option<About>,
}

impl Arriving for Coming<'_, '_> {
    fn receive_image(&mut self, from: &mut ConnectionReader<'_>) -> Result<(), BoxError> {
        self.receive(from).map_err(exit::boxed)
    }

    fn take_name(&mut self) -> Result<(), BoxError> {
        Ok(self.made()?.rename_in()?)
    }

    fn run(&mut self) -> Result<(), BoxError> {
        if !self.receiver.args.paused {
            self.made()?.unpause()?;
        }
        // From here on the domain stays, even if it cannot be reported.
        self.about = self.made.take().map(Made::keep);
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        if let Some(made) = self.made.take() {
            made.destroy()?;
        }
        Ok(())
    }
}

impl Coming<'_, '_> {
    /// Create the domain, paused, from the whole image.
    fn receive(&mut self, from: &mut ConnectionReader<'_>) -> Result<()> {
        let Receiver {
            args,
            host,
            terminal,
            connection,
            from: name,
        } = self.receiver;
        let cancel = self.watch.borrow().interrupt().cancel().clone();
        let idle = self.receiver.answer();
        let (converted, known) = of_old_sender(connection, from, name, cancel.clone(), idle)?;
        let source = match &converted {
            Some(converted) => ImageSource::new(&converted.image, cancel)?,
            None => ImageSource::over(from).behind(known),
        };
        let made = Image::open_migration(source)
            .and_then(|mut image| {
                terminal.say(&format!(
                    "migrate-receive: receiving {}",
                    shown_name(image.name())
                ));
                if args.direct {
                    image.check_direct()?;
                }
                let mut watch = self.watch.borrow_mut();
                let cpu = cpu::check(args.force);
                image.build(host, Named::Incoming, args.threads.threads, cpu, &mut watch)
            })
            .and_then(|made| match &converted {
                // The converter has read the whole image, and nothing after it.
                Some(converted) => converted.finish(0).map(|_| made),
                None => Ok(made),
            })
            .map_err(|error| match &converted {
                Some(converted) => converted.blame(error),
                None => error,
            })
            .map_err(|error| cpu::advise(error, cpu::RECEIVE))?;
        made.name().clone_into(&mut self.name);
        self.made = Some(made);
        Ok(())
    }

    fn made(&self) -> Result<&Made> {
        self.made.as_ref().context("no domain was made")
    }

    /// The result, in words.
    fn ended(self, arrived: Arrived, ready_said: bool) -> Result<About> {
        use ReceiverAction as A;
        let (mut first, mut untold, mut left) = (None, None, None);
        for Cause { action, error } in arrived.causes {
            let why = match action {
                A::SayRuns | A::SayFailed | A::GiveBack => &mut untold,
                A::Destroy => &mut left,
                _ => &mut first,
            };
            why.get_or_insert(error);
        }
        let words = |error: Option<&BoxError>| {
            error.map_or_else(String::new, |error| exit::words_of(&**error))
        };
        let (name, first) = (&self.name, first.as_ref());
        let cause = words(first);
        let untold = words(untold.as_ref());
        // When the sender keeps its domain or has it back, and does not see this end's stderr. If
        // it has hung up, it knows that itself.
        let hung_up = first.is_some_and(|error| exit::ends_early_of(&**error));
        if matches!(arrived.end, ReceiverEnd::Destroyed { .. }) && !hung_up {
            self.receiver.tell_why(&cause);
        }
        let kept = if ready_said {
            format!("receiving {name}: {cause}")
        } else {
            let broke = match hung_up {
                true => ", but the sender hung up or the connection broke",
                false => "",
            };
            format!("receiving a domain: {cause}{broke}; the sender keeps it")
        };
        Err(failed(match (arrived.end, self.about) {
            (ReceiverEnd::Runs { told: true }, Some(about)) => return Ok(about),
            (ReceiverEnd::Runs { .. }, about) => {
                let state = match self.receiver.args.paused {
                    true => "is paused here",
                    false => "started here",
                };
                let words = format!(
                    "{name} has been received and {state}, but the sender could not be told: \
                     {untold}; destroy what it has left, {name}--migratedaway"
                );
                match about {
                    // It was received, so this is no failure: a user who tried again would have
                    // the domain twice.
                    Some(about) => {
                        self.receiver
                            .terminal
                            .always(&format!("xsr: migrate-receive: {words}"));
                        return Ok(about);
                    }
                    None => words,
                }
            }
            (ReceiverEnd::LeftPaused, _) => format!(
                "{kept}; it is paused here and must not run: {}",
                words(left.as_ref())
            ),
            (ReceiverEnd::Destroyed { .. }, _) if !ready_said => kept,
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
