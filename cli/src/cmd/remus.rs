//! `xsr remus`, like `xl remus`: a domain runs here, and a recent state of it is kept on another
//! host, to run there when this host is lost.
//!
//! Which host has the domain in the end: the secondary runs its copy when the connection breaks,
//! unless it has been told to drop it ([`Withdrawal`]). So the primary lets the domain run only if
//! it knows nothing to the contrary; docs/migration.md has the table.
//!
//! C implementation: `main_remus` in `tools/xl/xl_migrate.c`, `tools/libs/light/libxl_remus.c`.

mod emulators;
mod fate;
mod report;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::time::Duration;

use anyhow::{Context as _, Error, Result};
use xsr_save_restore::migrate::checkpoints::{
    CheckpointParties, CheckpointRequest, CheckpointStream, Complete, Stop,
};
use xsr_save_restore::migrate::connection::{Connection, Wait};
use xsr_save_restore::migrate::messages::{LastWords, Outcome, Withdrawal};
use xsr_save_restore::migrate::ownership::protect::{
    self, Fate, ProtectorAction, ProtectorEnd, Why,
};
use xsr_save_restore::migrate::protect::{Ended, ProtectRequest, Protected, Protection};
use xsr_save_restore::migrate::{BoxError, Event, Observer, Step};
use xsr_save_restore::pace::Pace;
use xsr_save_restore::progress::Cancelled;
use xsr_save_restore::save::{BUFFER_BYTES, CheckpointedStats};
use xsr_save_restore::{SaveError, SaveOptions, SaveRequest};
use xsr_xen_backend::Domain;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore, DomainStoreError};

use self::emulators::DeviceModel;
use self::fate::{Aftermath, End};
use self::report::Teller;
use crate::args::{OnLoss, RemusArgs};
use crate::backend::workload;
use crate::backend::{self, Found, Hypervisor};
use crate::cmd::migrate::{away, can_suspend};
use crate::cmd::save::direct;
use crate::cmd::save::{Form, Job};
use crate::condition::Condition;
use crate::exit::{self, BadUsage, Code};
use crate::interrupt::Interrupt;
use crate::left::{self, Left};
use crate::terminal::Terminal;
use crate::transport::Link;
use crate::watch::Watch;

/// How long to wait for the secondary to answer or to read: the time that libxl gives a guest to
/// suspend.
const ANSWER: Duration = Duration::from_secs(60);

/// How long to wait for the reader of `--stats` before a failure is reported.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

/// Protect a domain.
///
/// After any failure it continues here, unless the secondary reports that it runs there, or, with
/// `--on-loss pause`, that is unknown.
pub(crate) fn run(args: &RemusArgs, terminal: &Terminal) -> Result<Code> {
    refuse(args)?;
    let mut watch = Watch::start(terminal, args.progress, "protecting")?;
    let result = protect(args, terminal, &mut watch);
    watch.end(result)
}

/// Refuses options that xl refuses, and options that are not supported.
fn refuse(args: &RemusArgs) -> Result<()> {
    refuse_direct_colo(args.connection.direct && args.colo)?;
    let unprotected = args.blackhole || args.no_network_buffer || args.no_disk_buffer;
    let why = if args.userspace_colo_proxy && !args.colo {
        "-p is for COLO: add -c"
    } else if args.colo && (unprotected || args.buffer.is_some() || args.no_buffer) {
        "-b, -n, -d, --buffer and --no-buffer are for Remus: drop -c"
    } else if unprotected && !args.allow_unsafe {
        "-b, -n and -d do not protect the domain: add -F if that is what you want"
    } else {
        return Ok(());
    };
    Err(Error::new(BadUsage(why.to_owned())))
}

/// Refuses COLO without libxl, at either end.
pub(crate) fn refuse_direct_colo(asked: bool) -> Result<()> {
    match asked {
        true => {
            let why = "COLO needs libxl, which --direct does without: drop --direct";
            Err(Error::new(BadUsage(why.to_owned())))
        }
        false => Ok(()),
    }
}

/// The time between two checkpoints, as in xl.
fn interval(milliseconds: Option<u32>, colo: bool) -> Duration {
    Duration::from_millis(match (milliseconds, colo) {
        (None | Some(0), false) => 200,
        (None | Some(0), true) => 5000,
        (Some(milliseconds), _) => milliseconds.into(),
    })
}

/// The receiver's options, in xl's notation.
fn receiver_options(args: &RemusArgs) -> Vec<&str> {
    let mut options = match (args.colo, &args.network_script) {
        (false, _) => vec!["-r"],
        (true, None) => vec!["--colo"],
        (true, Some(script)) => vec!["--colo", "--coloft-script", script],
    };
    if args.userspace_colo_proxy {
        options.push("--userspace-colo-proxy");
    }
    if args.connection.no_wait {
        options.push("-e");
    }
    options
}

fn protect(args: &RemusArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    Left::work().until_the_end();
    let direct = args.connection.direct;
    let host = Hypervisor::open(&args.backend.backend, direct)?;
    let found = Found::find(&host, &args.domain, "remus")?;
    let protecting = || format!("protecting {}", found.name);
    if direct {
        direct::check_sent(&*host, found.domain, &found.name, terminal).with_context(protecting)?;
    }
    found.check_leaves(&host)?;
    let domid = found.domain.domid;
    let primary = Primary {
        args,
        host: &*host,
        which: found.domain,
        domain: &*host.open(found.domain)?,
        name: &found.name,
    };
    let to = (!args.blackhole).then(|| left::guest::Sent {
        host: args.host.clone(),
        protected: true,
    });
    left::guest::leaving(&host, found.domain, primary.name, to);
    can_suspend(primary.domain, primary.name, &args.backend.backend).with_context(protecting)?;
    let _working = workload::start(&host, domid)?;
    let mut teller = Teller::new(args, terminal, primary.name, domid)?;
    let interrupt = watch.interrupt().clone();
    let answer = primary.answer();
    let mut link = None;
    if !args.blackhole {
        let options = receiver_options(args);
        let reached = Link::to_receiver(&args.connection, &args.host, &options, &interrupt, answer);
        link = match reached {
            Ok(link) => Some(link),
            Err(error) if error.is::<BadUsage>() => return Err(error),
            Err(_) if interrupt.cancel().is_cancelled() => {
                return primary.interrupted(&mut teller);
            }
            Err(error) => {
                return Err(primary.ended(&Aftermath {
                    end: End::Failed(error),
                    fate: Fate::Here,
                    complete: 0,
                    hung_up: "",
                    causes: &[],
                }));
            }
        };
    }
    let pace = Pace::new(answer);
    let wait = Wait::forever()
        .unless(interrupt.cut())
        .counting(interrupt.carried());
    let watch = RefCell::new(watch);
    let mut protecting = Protecting {
        primary: &primary,
        watch: &watch,
        teller: &mut teller,
        interrupt: &interrupt,
        pace: &pace,
        wait,
        end: End::Asked,
        complete: 0,
        lost: false,
        given_up: false,
        stats: CheckpointedStats::default(),
        stream_bytes: 0,
    };
    let mut observe = |event: Event| match event {
        // A secondary that has stopped reading is not waited for.
        Event::Protecting(ProtectorAction::Withdraw) => interrupt.cut_when_still(),
        Event::Protecting(ProtectorAction::AwaitLastWords { .. }) => watch.borrow_mut().clear(),
        // Reported with the checkpoint, which under COLO the secondary must have loaded first.
        Event::Done(Step::Protected) => {}
        Event::Done(step) => watch.borrow_mut().step(step.name()),
        _ => {}
    };
    let Protection {
        end,
        outcome,
        reason,
        causes,
    } = match &mut link {
        Some(link) => ProtectRequest::new(match args.on_loss {
            OnLoss::Run => protect::OnLoss::Run,
            OnLoss::Pause => protect::OnLoss::Pause,
        })
        .answer_timeout(answer)
        .sending(wait.keeping(&pace))
        .cancel(interrupt.cancel())
        .observer(&mut observe)
        .run(&mut *link.connection, &mut protecting),
        None => protecting.without_receiver(&mut observe),
    };
    let Protecting {
        end: mut why,
        complete,
        lost,
        given_up,
        stats,
        stream_bytes,
        ..
    } = protecting;
    watch.borrow_mut().clear();
    let mut causes = causes;
    if let Some(at) = causes
        .iter()
        .position(|cause| cause.action == ProtectorAction::AwaitBanner)
        && end.why != Why::Asked
    {
        why = End::Failed(Error::from_boxed(causes.remove(at).error));
    }
    let lost = lost
        || causes
            .iter()
            .any(|cause| cause.action == ProtectorAction::Withdraw);
    // A failing receiver closes the connection first, so its status says more than a failed write.
    if let Some(outcome @ Outcome::GivenBack { .. }) = outcome
        && (matches!(why, End::Receiver) || (lost || given_up) && matches!(why, End::Failed(_)))
    {
        why = End::Failed(match reason {
            Some(reason) => Error::msg(format!("the other end has failed: {reason}")),
            None => Error::msg(outcome),
        });
    }
    for cause in &causes {
        let (action, why) = (cause.action, exit::words_of(&*cause.error));
        tracing::info!(?action, why, "it could not be done");
    }
    let hung_up = link.map(Link::hang_up).unwrap_or_default();
    if end.is_success()
        && let Some(domain) = primary.runs_on()
    {
        teller.done(&why, domain, &stats, stream_bytes)?;
        return Ok(Code::Fine);
    }
    if let Err(error) = teller.printed(Some(STATS_PATIENCE)) {
        tracing::warn!(%error, "--stats");
    }
    Err(primary.ended(&Aftermath {
        end: why,
        fate: end.fate,
        complete,
        hung_up: &hung_up,
        causes: &causes,
    }))
}

/// The protected domain.
struct Primary<'a> {
    args: &'a RemusArgs,
    host: &'a dyn DomainStore,
    which: DomainRef,
    domain: &'a dyn Domain,
    name: &'a str,
}

impl Primary<'_> {
    /// The user has asked to stop before there was a connection.
    fn interrupted(&self, teller: &mut Teller<'_>) -> Result<Code> {
        match self.runs_on() {
            Some(domain) => {
                teller.done(&End::Asked, domain, &CheckpointedStats::default(), 0)?;
                Ok(Code::Fine)
            }
            None => Err(self.ended(&Aftermath {
                end: End::Asked,
                fate: Fate::Here,
                complete: 0,
                hung_up: "",
                causes: &[],
            })),
        }
    }

    /// The domain's state, not that of a later domain with its number.
    fn condition(&self) -> Condition {
        Condition::in_store(self.host, self.which)
    }

    /// The state of the domain, if it continues here: `running` or `paused`.
    fn runs_on(&self) -> Option<&'static str> {
        match self.condition() {
            Condition::Runs => Some("running"),
            Condition::Paused => Some("paused"),
            Condition::Suspended | Condition::Down(_) | Condition::Gone | Condition::Unknown(_) => {
                None
            }
        }
    }

    /// A handle on the domain; `None` if it has been destroyed.
    fn handle(&self) -> Result<Option<Box<dyn Domain>>> {
        match self.host.open(self.which) {
            Ok(domain) => Ok(Some(domain)),
            Err(DomainStoreError::Gone { .. } | DomainStoreError::Replaced { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Pauses the domain, once.
    fn pause(&self) -> Result<()> {
        // A hypervisor counts pauses: each one must be undone.
        if self.condition() == Condition::Paused {
            return Ok(());
        }
        match self.handle()? {
            Some(domain) => domain.pause().context("pausing it"),
            None => Ok(()),
        }
    }

    /// Unpauses the domain.
    fn unpause(&self) -> Result<()> {
        match self.handle()? {
            Some(domain) => domain.unpause().context("unpausing it"),
            None => Ok(()),
        }
    }

    /// The secondary runs the domain, so it must not run here.
    fn stop(&self) -> Result<()> {
        self.pause()?;
        if self.condition() == Condition::Gone {
            return Ok(());
        }
        let renamed = self.host.rename(self.which, self.name, &away(self.name));
        renamed.context("renaming it")
    }

    /// How long to wait for the secondary.
    fn answer(&self) -> Duration {
        let seconds = self.args.answer_timeout;
        seconds.map_or(ANSWER, |seconds| Duration::from_secs(seconds.into()))
    }

    fn buffer_bytes(&self) -> usize {
        match (self.args.no_buffer, self.args.buffer) {
            (true, _) => 0,
            (false, None) => BUFFER_BYTES,
            (false, Some(size)) => usize::try_from(size.kib << 10).unwrap_or(usize::MAX),
        }
    }
}

/// The domain while it is protected.
struct Protecting<'a, 'w, 't> {
    primary: &'a Primary<'a>,
    watch: &'a RefCell<&'w mut Watch>,
    teller: &'a mut Teller<'t>,
    interrupt: &'a Interrupt,
    pace: &'a Pace,
    wait: Wait<'a>,
    /// Why the protection ended.
    end: End,
    /// The number of checkpoints that the secondary may have.
    complete: u64,
    /// Whether the connection is lost.
    lost: bool,
    /// Whether the secondary has sent its failure in place of an answer.
    given_up: bool,
    stats: CheckpointedStats,
    stream_bytes: u64,
}

impl Protected for Protecting<'_, '_, '_> {
    fn protect(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> Ended {
        let stream = CheckpointStream::new(connection, self.wait.keeping(self.pace));
        self.send(&stream, Some(connection), complete)
    }

    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(self.primary.pause()?)
    }

    fn unpause(&mut self) -> Result<(), BoxError> {
        Ok(self.primary.unpause()?)
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        Ok(self.primary.stop()?)
    }
}

impl Protecting<'_, '_, '_> {
    /// Without a secondary, to measure the cost.
    fn without_receiver(&mut self, observer: &mut dyn Observer) -> Protection {
        observer.observe(Event::Done(Step::Banner));
        let mut complete = || {};
        let ended = match File::options().write(true).open("/dev/null") {
            Ok(null) => self.send(&CheckpointStream::to_nothing(&null), None, &mut complete),
            Err(error) => self.ended(
                Err(Error::new(error).context("/dev/null")),
                false,
                None,
                LastWords::default(),
            ),
        };
        Protection {
            end: ProtectorEnd {
                fate: Fate::Here,
                why: ended.why,
                here: ended.here,
            },
            outcome: None,
            reason: None,
            causes: Vec::new(),
        }
    }

    /// Send checkpoints until something fails or the user asks to stop.
    fn send(
        &mut self,
        stream: &CheckpointStream<'_>,
        connection: Option<&dyn Connection>,
        complete: &mut dyn FnMut(),
    ) -> Ended {
        let mut heard = LastWords::default();
        let mut withdrawal = Some(Withdrawal::Remus);
        let sent = self.checkpoints(stream, connection, complete, &mut withdrawal, &mut heard);
        self.stream_bytes = stream.bytes();
        self.ended(sent, stream.failed(), withdrawal, heard)
    }

    fn ended(
        &mut self,
        sent: Result<(End, CheckpointedStats)>,
        failed: bool,
        withdrawal: Option<Withdrawal>,
        heard: LastWords,
    ) -> Ended {
        (self.end, self.stats) = match sent {
            Ok(sent) => sent,
            Err(error) if is_abort(&error) => (End::Asked, CheckpointedStats::default()),
            Err(error) => (End::Failed(error), CheckpointedStats::default()),
        };
        self.lost = failed || matches!(self.end, End::Receiver);
        Ended {
            why: self.end.why(),
            lost: self.lost,
            here: self.primary.condition().here(),
            withdrawal,
            heard,
        }
    }

    /// Send checkpoints. Returns why there are no more, and statistics of those that were sent.
    fn checkpoints(
        &mut self,
        stream: &CheckpointStream<'_>,
        connection: Option<&dyn Connection>,
        completed: &mut dyn FnMut(),
        withdrawal: &mut Option<Withdrawal>,
        heard: &mut LastWords,
    ) -> Result<(End, CheckpointedStats)> {
        let Primary {
            args,
            host,
            which,
            domain,
            ..
        } = *self.primary;
        let job = Job {
            host,
            which,
            domain,
            form: Form::Xl,
            options: SaveOptions {
                threads: args.threads.threads,
            },
        };
        let (watch, teller) = (self.watch, &mut *self.teller);
        let mut observe = |complete: &Complete| {
            if complete.epoch.number == 1 {
                watch.borrow_mut().step(Step::Protected.name());
            }
            if args.stats {
                watch.borrow_mut().clear();
            }
            teller.checkpoint(complete).map_err(exit::boxed)
        };
        let kind = domain.info()?.kind;
        let mut progress = |progress: &_| watch.borrow_mut().progress(progress);
        let save = SaveRequest::new(domain, host.xen_version()?)
            .options(&job.options)
            .observe(&mut progress);
        let mut request = CheckpointRequest::new(domain, save)
            .interval(interval(args.interval, args.colo))
            .epochs(args.epochs)
            .buffer_bytes(self.primary.buffer_bytes());
        if args.colo {
            request = request.colo(self.wait, self.primary.answer());
        }
        let parties = CheckpointParties {
            libxl: job.begin(stream)?,
            stream,
            connection,
            pace: self.pace,
            emulators: &mut DeviceModel::of(kind, backend::emulators(host, which)?),
            stopping: self.interrupt,
            completed,
            observe: &mut observe,
        };
        let sent = request.run(parties);
        (*withdrawal, *heard) = (sent.withdrawal, sent.heard);
        self.complete = sent.complete;
        self.given_up = sent.given_up.is_some();
        match (sent.ended, sent.given_up) {
            (Ok(stop), _) => Ok((
                match stop {
                    Stop::Enough => End::Enough,
                    Stop::Receiver => End::Receiver,
                    Stop::Asked => End::Asked,
                },
                sent.stats,
            )),
            (Err(_), Some(said)) => Err(said.into()),
            (Err(error), None) => Err(error.into()),
        }
    }
}

/// Whether the user asked to stop, and nothing else went wrong: the domain runs on.
fn is_abort(error: &Error) -> bool {
    // [`SaveError::NotResumed`] has no source, whatever came before it.
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(Cancelled::is) || matches!(cause.downcast_ref(), Some(SaveError::Aborted))
    })
}

#[cfg(test)]
mod tests {
    use xsr_save_restore::toolstack::ToolstackError;

    use super::*;

    #[test]
    fn an_abort_is_no_failure_and_a_failure_no_abort() {
        let cancelled = || Error::new(io::Error::other(Cancelled));
        assert!(is_abort(&cancelled()));
        assert!(is_abort(&cancelled().context("beginning the stream")));
        assert!(is_abort(&SaveError::Aborted.into()));
        assert!(!is_abort(&Error::new(io::Error::other("disk full"))));
        let suspended = SaveError::NotResumed {
            cause: Box::new(SaveError::Aborted),
            resume: ToolstackError::new("resuming it", "the disk is full"),
            known: true,
        };
        assert!(!is_abort(&suspended.into()));
    }

    #[test]
    fn intervals_are_xls() {
        let milliseconds = |given, colo| interval(given, colo).as_millis();
        assert_eq!(milliseconds(None, false), 200);
        assert_eq!(milliseconds(Some(0), false), 200);
        assert_eq!(milliseconds(Some(1), false), 1);
        assert_eq!(milliseconds(None, true), 5000);
        assert_eq!(milliseconds(Some(20), true), 20);
    }
}
