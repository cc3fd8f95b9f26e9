//! `xsr migrate-receive`: what `xl migrate-receive` does. A domain is received under
//! another name, paused, and runs once the sender has let go of it.
//!
//! C implementation: `migrate_receive` in `tools/xl/xl_migrate.c`.

mod stand_by;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_save_restore::pace::ReadLimit;
use xsr_xen_backend::DomId;
use xsr_xen_backend::mock::MockHost;

use crate::args::ReceiveArgs;
use crate::backend;
use crate::cmd::restore::{About, Image, Made, Named, of_old_sender, superpages};
use crate::exit::{self, Code, Migration};
use crate::file::Input;
use crate::handshake::{self, Message};
use crate::interrupt::Interrupt;
use crate::left::Left;
use crate::stdout;
use crate::terminal::Terminal;
use crate::text::size;
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
    let host = backend::open_or_create(&args.backend.backend)?;
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
    host: &'a MockHost,
    terminal: &'a Terminal,
    to: &'a std::fs::File,
}

impl Receiver<'_> {
    /// All that the two ends say to each other.
    fn receive(&self, input: &Input, watch: &mut Watch) -> Result<About> {
        let sender_has_it = |error: Error| {
            let cause = exit::words(error.chain());
            let broke = match exit::ends_early(&error) {
                true => ", but the sender hung up or the connection broke",
                false => "",
            };
            failed(format!(
                "receiving a domain: {cause}{broke}; the sender keeps it"
            ))
        };
        Message::Banner
            .send(self.to, self.answer())
            .map_err(sender_has_it)?;
        watch.step("banner");
        let cancel = watch.interrupt().cancel().clone();
        let limit = self.read_limit();
        let (converted, known) =
            of_old_sender(input, cancel.clone(), &limit).map_err(sender_has_it)?;
        let image = converted.as_ref().unwrap_or(input);
        let made = Image::open_migration_behind(known, image, cancel, &limit)
            .and_then(|image| {
                self.terminal
                    .say(&format!("migrate-receive: receiving {}", image.name()));
                image.build(self.host, Named::Incoming, self.args.threads.threads, watch)
            })
            .and_then(|made| match &converted {
                // What converts it has read all of it, and nothing of what follows.
                Some(converted) => converted.finish(0).map(|_| made),
                None => Ok(made),
            })
            .map_err(|error| sender_has_it(image.blame(error)))?;
        watch.step("received");
        Message::Ready
            .send(self.to, self.answer())
            .map_err(sender_has_it)?;
        watch.step("ready");
        let interrupt = watch.interrupt();
        if let Err(error) = Message::Go.expect(&input.file, interrupt, self.answer()) {
            return Err(self.give_back(made, &error));
        }
        interrupt.too_late("the sender has let go of the domain: it is being started".to_owned());
        watch.step("go");
        if let Err(error) = self.start(&made) {
            return Err(self.give_back(made, &error));
        }
        // The domain is here now, whatever becomes of what is said about it.
        let about = made.keep();
        if let Err(error) = handshake::report_running(self.to, self.answer()) {
            let (name, cause) = (&about.name, exit::words(error.chain()));
            return Err(failed(format!(
                "{name} has been received and started here, but the sender could not be told: \
                 {cause}; destroy what it has left, {name}--migratedaway"
            )));
        }
        watch.step("report");
        Ok(about)
    }

    /// How long the sender is waited for.
    fn answer(&self) -> Duration {
        Duration::from_secs(self.args.answer_timeout.into())
    }

    /// How long it may send nothing in the image.
    fn read_limit(&self) -> Arc<ReadLimit> {
        Arc::new(ReadLimit::new(self.answer()))
    }

    /// Give the domain its name and let it run.
    fn start(&self, made: &Made) -> Result<()> {
        self.host
            .rename(made.domid(), made.name())
            .context("giving the domain its name")?;
        match self.args.paused {
            true => Ok(()),
            false => made.unpause(),
        }
    }

    /// Destroy the domain, and let the sender have its own back.
    fn give_back(&self, made: Made, error: &Error) -> Error {
        let name = made.name().to_owned();
        let mut words = format!("receiving {name}: {}", exit::words(error.chain()));
        let told = handshake::report_failed(self.to, self.answer());
        if let Err(error) = made.destroy() {
            let cause = exit::words(error.chain());
            words = format!("{words}; it is paused here and must not run: {cause}");
            return failed(words);
        }
        match told.and_then(|()| Message::Go.send(self.to, self.answer())) {
            Ok(()) => failed(format!("{words}; the sender has it back")),
            Err(error) => {
                let cause = exit::words(error.chain());
                failed(format!(
                    "{words}; it is destroyed here, and the sender could not be told ({cause})"
                ))
            }
        }
    }
}

fn failed(words: String) -> Error {
    Error::new(Migration {
        words,
        undecided: false,
    })
}
