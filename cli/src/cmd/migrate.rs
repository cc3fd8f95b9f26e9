//! `xsr migrate`, like `xl migrate`: a domain is sent to another host while it runs, suspended, and
//! started there.
//!
//! At any time at most one host may run the domain. Until "go" is sent it is the source; once the
//! receiver has read it, the receiver. Between the two, and until the report, the domain is
//! suspended here and only the report decides: docs/migration.md has the table. [`MigrateRequest`]
//! implements that. This file has its effects on the domain, and the messages for the user.
//!
//! C implementation: `migrate_domain` in `tools/xl/xl_migrate.c`.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, bail};
use serde::Serialize;
use xsr_save_restore::SaveOptions;
use xsr_save_restore::migrate::connection::{Connection, ConnectionWriter};
use xsr_save_restore::migrate::ownership::plain::SenderEnd;
use xsr_save_restore::migrate::send::{self, Departing, MigrateRequest, TakenBack};
use xsr_save_restore::migrate::{BoxError, Event, Step};
use xsr_save_restore::pace::Pace;
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack, ToolstackError};
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};
use xsr_xen_backend::{DomId, Domain};

use crate::args::{Backend, CompressArg, MigrateArgs, SessionArgs};
use crate::backend::workload;
use crate::backend::{self, Found, Hypervisor, name_of};
use crate::cmd::save::direct;
use crate::cmd::save::{Form, Job, LiveSave, MemoryReport, Stopping, Written, target_policy};
use crate::condition::Condition;
use crate::exit::{self, BadUsage, Code, Migration};
use crate::left::{self, Left};
use crate::stdout;
use crate::terminal::Terminal;
use crate::transport::Link;
use crate::watch::{Meter, SessionProgress, Watch, advice};

/// The suffix of the name of a domain that the destination has been told to run. As in xl.
pub(crate) const MIGRATED_AWAY_SUFFIX: &str = "--migratedaway";

/// The name of a domain that the destination has been told to run.
pub(crate) fn away(name: &str) -> String {
    format!("{name}{MIGRATED_AWAY_SUFFIX}")
}

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct MigrateReport<'a> {
    name: &'a str,
    domid: DomId,
    /// `migrated`.
    domain: &'static str,
    host: &'a str,
    #[serde(flatten)]
    memory: MemoryReport,
    downtime_seconds: f64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<SessionProgress>,
}

/// Migrate a domain.
///
/// After a failure before the receiver is told to run the domain, it continues here under its name.
/// After a later failure, before the receiver's report, it stays suspended here under another name,
/// and the result is [`Code::Undecided`].
pub(crate) fn run(args: &MigrateArgs, terminal: &Terminal) -> Result<Code> {
    refuse(args)?;
    let mut watch = Watch::start(terminal, args.progress, "migrating")?;
    let result = migrate(args, terminal, &mut watch);
    watch.end(result)
}

/// Refuses options of xl that are not supported.
fn refuse(args: &MigrateArgs) -> Result<()> {
    let why = if args.config.is_some() {
        "-C: the configuration that the domain was made with is sent, and no other"
    } else if args.preserve_domid {
        "-D: the domain gets the next free number on the other host, not the one it has here"
    } else if args.no_live && args.debug {
        "--debug is for a live migration: drop --no-live"
    } else if args.no_live && args.target.is_given() {
        "--max-downtime, --timeout and --on-timeout are for a live migration: drop --no-live"
    } else {
        return Ok(());
    };
    Err(Error::new(BadUsage(why.to_owned())))
}

fn migrate(args: &MigrateArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    let started = Instant::now();
    Left::work().until_the_end();
    let direct = args.connection.direct;
    let host = Hypervisor::open(&args.backend.backend, direct)?;
    let found = Found::find(&host, &args.domain, "migrate")?;
    let migrating = || format!("migrating {}", found.name);
    if direct {
        direct::check_sent(&*host, found.domain, &found.name, terminal).with_context(migrating)?;
    }
    found.check_leaves(&host)?;
    let sender = Sender {
        args,
        host: &*host,
        which: found.domain,
        domain: &*host.open(found.domain)?,
        name: &found.name,
    };
    let to = Some(left::guest::Sent {
        host: args.host.clone(),
        protected: false,
    });
    left::guest::leaving(&host, found.domain, sender.name, to);
    can_suspend(sender.domain, sender.name, &args.backend.backend).with_context(migrating)?;
    let working = workload::start(&host, found.domain.domid)?;
    let options = [
        (args.connection.no_wait, "-e"),
        (args.debug, "-d"),
        (args.paused, "-p"),
        (args.force, "--force"),
    ];
    let options = options.into_iter().filter_map(|(on, o)| on.then_some(o));
    let options: Vec<&str> = options.collect();
    let (interrupt, limit) = (watch.interrupt(), sender.answer());
    let link = Link::for_migration(args, &options, terminal, interrupt, limit).map_err(
        |error| match error.is::<BadUsage>() {
            true => error,
            false => sender.failed(Failure::Here(exit::words(error.chain())), ""),
        },
    )?;
    watch.measure(link.monitor.clone().map(Meter::new));
    let sent = sender.send(&*link.connection, watch);
    let session = watch.session();
    watch.clear();
    drop(working);
    let sent = sent.map_err(|failure| match failure {
        Failure::Here(cause) => Failure::Here(match link.reason() {
            None => cause,
            Some(why) => format!("the other end has failed: {why}: {cause}"),
        }),
        failure => failure,
    });
    let hung_up = link.hang_up();
    let Sent { memory, downtime } = sent.map_err(|failure| sender.failed(failure, &hung_up))?;
    let (seconds, downtime) = (started.elapsed().as_secs_f64(), downtime.as_secs_f64());
    terminal.note(&format!(
        "{} migrated to {}: {memory}, {seconds:.1} s, paused for {:.0} ms",
        sender.name,
        args.host,
        downtime * 1000.0
    ));
    if let Some(session) = &session {
        terminal.note(&carried(session, &args.session));
    }
    if args.json {
        let document = MigrateReport {
            name: sender.name,
            domid: found.domain.domid,
            domain: "migrated",
            host: &args.host,
            memory,
            downtime_seconds: downtime,
            seconds,
            session,
        };
        stdout::report(
            terminal,
            &format!("{} migrated to {}", sender.name, args.host),
            &document,
        );
    }
    Ok(Code::Fine)
}

/// What a session has carried, what has limited it, and what may help.
fn carried(session: &SessionProgress, asked: &SessionArgs) -> String {
    let compresses = !matches!(asked.compress, None | Some(CompressArg::None));
    let advice = advice(session.limited_by, compresses, asked.bandwidth.is_some());
    let advice = advice.map_or_else(String::new, |advice| format!("; {advice}"));
    format!("the session: {}{advice}", session.words().join(", "))
}

/// Refuse a domain that cannot be asked to suspend now.
pub(crate) fn can_suspend(domain: &dyn Domain, name: &str, backend: &Backend) -> Result<()> {
    match Condition::of(domain).refusal(name, backend) {
        None => Ok(()),
        Some(why) => bail!("{why}"),
    }
}

/// The result of a successful migration.
struct Sent {
    memory: MemoryReport,
    /// From asking the domain to suspend until the receiver's report that it runs.
    downtime: Duration,
}

/// The result of a failed migration, and which host has the domain.
enum Failure {
    /// The destination does not run the domain, and will not.
    Here(String),
    /// The destination was told to run it, and it is unknown whether it does.
    Undecided(String),
    /// The destination runs it, and the domain here could not be destroyed.
    There(String),
}

/// The domain's toolstack. From the moment the domain is suspended, the receiver must read at a
/// minimum rate.
struct Paced<'a> {
    direct: Stopping<'a>,
    pace: &'a Pace,
}

impl SaveToolstack for Paced<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.direct.suspend()?;
        self.pace.suspended();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.pace.resumed();
        self.direct.resume()
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.direct.switch_qemu_logdirty(on)
    }
}

/// The source's side of a migration.
struct Sender<'a> {
    args: &'a MigrateArgs,
    host: &'a dyn DomainStore,
    which: DomainRef,
    domain: &'a dyn Domain,
    name: &'a str,
}

impl Sender<'_> {
    /// The whole exchange with the receiver.
    fn send(&self, connection: &dyn Connection, watch: &mut Watch) -> Result<Sent, Failure> {
        let interrupt = watch.interrupt().clone();
        let pace = Pace::new(self.answer());
        let mut toolstack = Paced {
            direct: Stopping {
                domain: self.domain,
                limit: self.args.suspend.limit(),
                cancel: interrupt.cancel().clone(),
            },
            pace: &pace,
        };
        let watch = RefCell::new(watch);
        let mut downtime = Duration::ZERO;
        let mut observe = |event: Event| {
            let Event::Done(step) = event else { return };
            let mut watch = watch.borrow_mut();
            watch.step(step.name());
            if step == Step::Report {
                let suspended = watch.suspended();
                downtime = suspended.map(|then| then.elapsed()).unwrap_or_default();
            }
        };
        let mut leaving = Leaving {
            sender: self,
            watch: &watch,
            toolstack: Some(&mut toolstack),
            written: None,
            let_go: false,
            memory: None,
        };
        let send::Sent { end, causes } = MigrateRequest::new()
            .answer_timeout(self.answer())
            .pace(&pace)
            .cancel(interrupt.cancel())
            .observer(&mut observe)
            .run(connection, &mut leaving);
        let memory = leaving.memory;
        let mut causes = causes.iter().map(|cause| exit::words_of(&*cause.error));
        let why = match (causes.next(), causes.next()) {
            // The first is the failure, the second one of the cleanup.
            (Some(why), Some(then)) => format!("{why}; and then: {then}"),
            (Some(why), None) => why,
            (None, _) => "it was given up".to_owned(),
        };
        match (end, memory) {
            (SenderEnd::Moved, Some(memory)) => Ok(Sent { memory, downtime }),
            (SenderEnd::MovedNotDestroyed | SenderEnd::Moved, _) => Err(Failure::There(why)),
            (SenderEnd::Undecided, _) => Err(Failure::Undecided(why)),
            (SenderEnd::Here | SenderEnd::HereSuspended | SenderEnd::GuestGone, _) => {
                Err(Failure::Here(why))
            }
        }
    }

    /// How long to wait for the receiver.
    fn answer(&self) -> Duration {
        Duration::from_secs(self.args.answer_timeout.into())
    }

    fn away(&self) -> String {
        away(self.name)
    }

    /// Take the domain back: it continues here under its name, or under the other name if it cannot
    /// be renamed.
    fn take_back(&self) -> Result<()> {
        let renamed = self.host.rename(self.which, &self.away(), self.name);
        // Not by its number alone, which may have been reused by now.
        let resumed = match Condition::in_store(self.host, self.which) {
            Condition::Gone => return Ok(()),
            // Left as it is, and reported. Another program may have resumed it.
            Condition::Down(_) | Condition::Runs => Ok(()),
            _ => self.resume(),
        };
        let renamed = renamed.context("giving the domain its name back");
        match (renamed, resumed) {
            (Ok(()), resumed) => resumed,
            (renamed, Ok(())) => renamed,
            (Err(name), Err(error)) => Err(error.context(exit::words(name.chain()))),
        }
    }

    fn resume(&self) -> Result<()> {
        let domain = self.host.open(self.which)?;
        Ok(DirectToolstack(&*domain).resume()?)
    }

    /// The error for a failure: what happened, which host has the domain, and what to do.
    fn failed(&self, failure: Failure, ended: &str) -> Error {
        let (name, host, away) = (self.name, &self.args.host, self.away());
        let backend = &self.args.backend.backend;
        let here = |verb: &str, rest: &str| backend::domain_command(backend, verb, rest);
        let (cause, undecided) = match &failure {
            Failure::Undecided(cause) => (cause, true),
            Failure::Here(cause) | Failure::There(cause) => (cause, false),
        };
        let begin = format!("migrating {name} to {host}: {cause}{ended}");
        let words = match failure {
            Failure::Here(_) => {
                let now = name_of(self.host, self.which);
                // A domain that is gone has no name any more.
                let now = match Condition::in_store(self.host, self.which) {
                    Condition::Gone => Condition::Gone.after_failure(name, backend),
                    condition => condition.after_failure(now.as_deref().unwrap_or(name), backend),
                };
                format!("{begin}; {now}")
            }
            Failure::There(_) => format!(
                "{begin}; {name} runs at the other end, and {away} here must not run again: `{}`",
                here("destroy", &away)
            ),
            Failure::Undecided(_) => format!(
                "{begin}\n\
                 {host} had been told to run {name}, and has not said what came of it. It may \
                 run there. Here it is suspended, as {away}. It must never run at both ends: \
                 look at the other one, once its migrate-receive has ended.\n\
                 If {name} is there, running or paused, it has moved. Destroy what is here:\n    \
                 {}\n\
                 If it is not there, or as {name}--incoming, destroy that there, and let it run \
                 on here:\n    {} && \\\n    {}",
                here("destroy", &away),
                here("rename", &format!("{away} {name}")),
                here("resume", name),
            ),
        };
        Error::new(Migration { words, undecided })
    }
}

/// The domain while it is being sent.
struct Leaving<'l, 't, 'd, 'w> {
    sender: &'l Sender<'l>,
    watch: &'l RefCell<&'w mut Watch>,
    toolstack: Option<&'t mut Paced<'d>>,
    /// The written image. Dropping this resumes the domain.
    written: Option<Written<'t>>,
    /// Only [`Sender::take_back`] resumes the domain.
    let_go: bool,
    memory: Option<MemoryReport>,
}

impl Departing for Leaving<'_, '_, '_, '_> {
    fn send_image(&mut self, to: &mut ConnectionWriter<'_>) -> Result<(), BoxError> {
        self.send(to).map_err(exit::boxed)
    }

    fn rename_away(&mut self) -> Result<(), BoxError> {
        let sender = self.sender;
        sender
            .host
            .rename(sender.which, sender.name, &sender.away())
            .context("renaming the domain before the other end is told to run it")?;
        // From here on only the receiver's answer decides whether it is resumed.
        if let Some(written) = self.written.take() {
            written.saved.keep_suspended();
        }
        self.let_go = true;
        self.watch.borrow().interrupt().too_late(format!(
            "{} has been told to run {}: waiting for its report, see docs/migration.md",
            sender.args.host, sender.name
        ));
        Ok(())
    }

    fn take_back(&mut self) -> Result<TakenBack, BoxError> {
        // This resumes the domain, if it is suspended.
        drop(self.written.take());
        if self.let_go {
            self.sender.take_back()?;
        }
        match Condition::in_store(self.sender.host, self.sender.which) {
            Condition::Suspended => Err("it is still suspended".into()),
            Condition::Down(_) | Condition::Gone => Ok(TakenBack::Gone),
            Condition::Runs | Condition::Paused | Condition::Unknown(_) => Ok(TakenBack::Runs),
        }
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        let sender = self.sender;
        Ok(backend::destroy(sender.host, sender.which, sender.name)?)
    }
}

impl Leaving<'_, '_, '_, '_> {
    /// Afterwards the domain is suspended, and dropping `written` resumes it.
    fn send(&mut self, to: &mut ConnectionWriter<'_>) -> Result<()> {
        let sender = self.sender;
        let job = Job {
            host: sender.host,
            which: sender.which,
            domain: sender.domain,
            form: Form::Xl,
            options: SaveOptions {
                threads: sender.args.threads.threads,
            },
        };
        let live = (!sender.args.no_live).then(|| LiveSave {
            policy: target_policy(&sender.args.target),
            verify: sender.args.debug,
        });
        let toolstack = self.toolstack.take().context("the image is sent once")?;
        let written = job.write(toolstack, to, live, None, &mut self.watch.borrow_mut())?;
        self.memory = Some(MemoryReport::of(&written));
        self.written = Some(written);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::*;
    use crate::args::{Cli, Command};

    /// The domain was destroyed, and a later one has its number.
    #[test]
    fn another_domain_with_the_number_is_not_resumed() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
        let spec = GuestSpec::new("web--migratedaway", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        domain.suspend().expect("it suspends");
        let which = DomainStore::find(&host, "web--migratedaway").expect("the domain");
        let cli = Cli::parse_from(["xsr", "migrate", "web", "other"]);
        let Command::Migrate(args) = &cli.command else {
            unreachable!("it is migrate")
        };
        let mut another = which;
        another.uuid.0[0] ^= 1;
        for (which, condition) in [(another, Condition::Suspended), (which, Condition::Runs)] {
            let sender = Sender {
                args,
                host: &host,
                which,
                domain: domain.as_ref(),
                name: "web",
            };
            sender
                .take_back()
                .expect("there is nothing more to be done");
            assert_eq!(Condition::of(domain.as_ref()), condition);
        }
    }
}
