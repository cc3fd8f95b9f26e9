//! `xsr remus`: what `xl remus` does. A domain runs here and is kept on another host as it
//! was a moment ago, to run on there when this host is lost.
//!
//! Who has the domain in the end: the other end runs its copy when the connection breaks
//! off, unless it has been told to forget it ([`handshake::withdraw`]). So this end lets
//! the domain run only where nothing else is known; docs/migration.md has the table.
//!
//! C implementation: `main_remus` in `tools/xl/xl_migrate.c`,
//! `tools/libs/light/libxl_remus.c`.

mod colo;
mod fate;
mod report;
mod stream;
mod toolstack;

use std::cell::RefCell;
use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::save::{BUFFER_OCTETS, CheckpointedStats, Checkpoints, save_checkpointed};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{SaveError, SaveOptions, save_colo};
use xsr_xen_backend::Domain;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};

use self::colo::Ear;
use self::fate::{End, Fate, Here};
use self::report::Teller;
use self::stream::Stream;
use self::toolstack::{Complete, DeviceModel, Protector, Stop};
use crate::args::{OnLoss, RemusArgs};
use crate::backend::{self, Found, Hypervisor};
use crate::cmd::migrate::can_suspend;
use crate::cmd::save::{Form, Job};
use crate::colo::Hearing;
use crate::exit::{BadUsage, Code};
use crate::handshake::{self, Message, Outcome, Patience};
use crate::left::{self, Left};
use crate::terminal::Terminal;
use crate::transport::Link;
use crate::watch::Watch;
use crate::workload;

/// How long the other end may take to say what becomes of its copy when the connection is lost:
/// what it has said by then is on its way.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How long the other end may take to answer, and read nothing, as libxl gives a guest to
/// suspend.
const ANSWER: Duration = Duration::from_secs(60);

/// How long whoever reads `--stats` may take where there is a failure to be told.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

/// Protect a domain.
///
/// Whatever fails, it runs on here, unless the other end says that it runs there, or, with
/// `--on-loss pause`, nobody can know.
pub(crate) fn run(args: &RemusArgs, terminal: &Terminal) -> Result<Code> {
    refuse(args)?;
    let mut watch = Watch::start(terminal, args.progress, "protecting")?;
    let result = protect(args, terminal, &mut watch);
    watch.end(result)
}

/// What xl refuses, and what it has that this has not.
fn refuse(args: &RemusArgs) -> Result<()> {
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

/// How long the domain runs from one checkpoint to the next, as xl has it.
fn interval(milliseconds: Option<u32>, colo: bool) -> Duration {
    Duration::from_millis(match (milliseconds, colo) {
        (None | Some(0), false) => 200,
        (None | Some(0), true) => 5000,
        (Some(milliseconds), _) => milliseconds.into(),
    })
}

/// How long to wait for what becomes of the copy at the other end: one that is to give the domain
/// back may have a checkpoint to apply before it hears that.
fn last_words(lost: bool, answer: Duration) -> Duration {
    match lost {
        true => answer.min(LAST_WORDS),
        false => answer,
    }
}

/// What the receiver is told, in xl's words.
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
    let host = Hypervisor::open(&args.backend.backend)?;
    let found = Found::find(&*host, &args.domain, "remus")?;
    found.must_have_name(&*host, &args.backend.backend)?;
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
    can_suspend(primary.domain, primary.name, &args.backend.backend)
        .with_context(|| format!("protecting {}", primary.name))?;
    let _working = workload::start(&host, domid)?;
    let mut teller = Teller::new(args, terminal, primary.name, domid)?;
    let mut link = match args.blackhole {
        true => None,
        false => {
            let interrupt = watch.interrupt();
            let options = receiver_options(args);
            let answer = primary.answer();
            let reached =
                Link::to_receiver(&args.connection, &args.host, &options, interrupt, answer)
                    .map_err(|error| (error, String::new()))
                    .and_then(
                        |link| match Message::Banner.expect(&link.from, interrupt, answer) {
                            Ok(()) => Ok(link),
                            Err(error) => Err((error, link.hang_up())),
                        },
                    );
            match reached {
                Ok(link) => Some(link),
                Err((error, _)) if error.is::<BadUsage>() => return Err(error),
                Err(_) if interrupt.cancel().is_cancelled() => {
                    teller.done(&End::Asked, &CheckpointedStats::default(), 0)?;
                    return Ok(Code::Fine);
                }
                Err((error, hung_up)) => {
                    let end = End::Failed(error);
                    return Err(primary.ended(end, Fate::Here, 0, &hung_up, None));
                }
            }
        }
    };
    watch.step("banner");
    let sent = match primary.send(link.as_ref(), watch, &mut teller) {
        // Before there was anything to take back.
        Err(_) if watch.interrupt().cancel().is_cancelled() => {
            drop(link.map(Link::hang_up));
            teller.done(&End::Asked, &CheckpointedStats::default(), 0)?;
            return Ok(Code::Fine);
        }
        sent => sent?,
    };
    let Protected {
        mut end,
        complete,
        lost,
        stats,
        stream_octets,
        heard,
    } = sent;
    watch.clear();
    // Before anybody is waited for: from now on the other end may run the domain.
    let stands_still = lost && complete > 0 && args.on_loss == OnLoss::Pause;
    if stands_still && let Err(error) = primary.pause() {
        // It is tried once more, and said, where nobody can know in the end.
        tracing::warn!(%error, "the domain could not be paused yet");
    }
    let fate = match &mut link {
        None => Fate::Here,
        Some(link) => {
            let outcome = link.say_no_more().and_then(|()| {
                let patience = Patience::Until(Instant::now() + last_words(lost, primary.answer()));
                match heard {
                    None => handshake::outcome(&link.from, patience),
                    Some(heard) => handshake::outcome_behind(heard, &link.from, patience),
                }
            });
            match outcome {
                Ok(Outcome::Runs) => Fate::There,
                Ok(Outcome::GivenBack { status }) => {
                    // A receiver that fails closes the connection first: a write that fails
                    // then says less than its status.
                    if matches!(end, End::Receiver) || lost && matches!(end, End::Failed(_)) {
                        end = End::Failed(Error::msg(handshake::status_words(status)));
                    }
                    Fate::Here
                }
                // It never had all of a checkpoint.
                Err(_) if complete == 0 => Fate::Here,
                Err(error) => {
                    tracing::info!(%error, lost, "nothing is known of the other end");
                    Fate::Unknown
                }
            }
        }
    };
    let stopped = match fate {
        Fate::There => Some(primary.stop()),
        Fate::Here if stands_still && primary.here() != Here::Gone => {
            let unpaused = primary.domain.unpause();
            let name = primary.name;
            unpaused.with_context(|| format!("{name} runs nowhere else: unpausing it"))?;
            None
        }
        _ => None,
    };
    let hung_up = link.map(Link::hang_up);
    if let (End::Asked | End::Enough, Fate::Here) = (&end, fate)
        && !matches!(primary.here(), Here::Over(_) | Here::Gone)
    {
        teller.done(&end, &stats, stream_octets)?;
        return Ok(Code::Fine);
    }
    let hung_up = hung_up.unwrap_or_default();
    if let Err(error) = teller.printed(Some(STATS_PATIENCE)) {
        tracing::warn!(%error, "--stats");
    }
    Err(primary.ended(end, fate, complete, &hung_up, stopped))
}

/// What protecting a domain came to, at this end.
struct Protected {
    end: End,
    /// Checkpoints that the other end can have.
    complete: u64,
    /// Whether the connection is lost.
    lost: bool,
    stats: CheckpointedStats,
    stream_octets: u64,
    /// Under COLO, what the other end has said since its last whole word.
    heard: Option<Vec<u8>>,
}

/// The domain that is protected.
struct Primary<'a> {
    args: &'a RemusArgs,
    host: &'a dyn DomainStore,
    which: DomainRef,
    domain: &'a dyn Domain,
    name: &'a str,
}

impl Primary<'_> {
    /// Send checkpoints for as long as it goes well and nobody asks to stop. Then take the
    /// domain back, as far as the connection still carries that.
    fn send(
        &self,
        link: Option<&Link>,
        watch: &mut Watch,
        teller: &mut Teller<'_>,
    ) -> Result<Protected> {
        let null = File::options().write(true).open("/dev/null");
        let null = null.context("/dev/null")?;
        let interrupt = watch.interrupt().clone();
        let to = link.map_or(&null, |link| &link.to);
        let stream = Stream::new(to, &interrupt, self.answer())?;
        let job = Job {
            host: self.host,
            which: self.which,
            domain: self.domain,
            form: Form::Xl,
            options: SaveOptions {
                threads: self.args.threads.threads,
            },
        };
        let watch = RefCell::new(watch);
        let mut observe = |complete: &Complete| {
            let mut watch = watch.borrow_mut();
            if complete.epoch.number == 1 {
                watch.step("protected");
            }
            if self.args.stats {
                watch.clear();
            }
            teller.checkpoint(complete)
        };
        let mut protector = Protector {
            direct: DirectToolstack(self.domain),
            libxl: job.begin(&stream)?,
            stream: &stream,
            emulators: DeviceModel::of(
                self.domain.info()?.kind,
                backend::emulators(self.host, self.which)?,
            ),
            from: link.map(|link| &link.from),
            interrupt: interrupt.clone(),
            interval: interval(self.args.interval, self.args.colo),
            epochs: self.args.epochs,
            observe: &mut observe,
            complete: 0,
            stop: None,
        };
        let mut progress = |progress: &_| watch.borrow_mut().progress(progress);
        let xen = self.host.xen_version()?;
        let mut policy = XenPolicy;
        let (result, secondary) = match link {
            Some(link) if self.args.colo => {
                let hearing = Hearing::new(&link.from, interrupt.clone(), self.answer())?;
                let ear = Ear::new(hearing);
                let mut primary = colo::Primary::new(&mut protector, &stream, &ear);
                let result = save_colo(
                    self.domain,
                    xen,
                    &mut primary,
                    &mut &stream,
                    &mut &ear,
                    &job.options,
                    &mut policy,
                    &mut progress,
                );
                let place = primary.place();
                let said = result.as_ref().err().and_then(|_| ear.given_up());
                (result, Some((place, said, ear.into_rest())))
            }
            _ => {
                let how = Checkpoints {
                    policy: &mut policy,
                    buffer_octets: self.buffer_octets(),
                };
                let result = save_checkpointed(
                    self.domain,
                    xen,
                    &mut protector,
                    &mut &stream,
                    &job.options,
                    how,
                    &mut progress,
                );
                (result, None)
            }
        };
        let (complete, stop) = (protector.complete, protector.stop);
        let (secondary, said, heard) = match secondary {
            Some((place, said, heard)) => (Some(place), said, Some(heard)),
            None => (None, None, None),
        };
        let (end, stats) = match (result, stop) {
            (Ok(stats), Some(Stop::Enough)) => (End::Enough, stats),
            (Ok(stats), Some(Stop::Receiver)) => (End::Receiver, stats),
            (Ok(stats), _) => (End::Asked, stats),
            (Err(SaveError::Aborted), _) => (End::Asked, CheckpointedStats::default()),
            (Err(error), _) => {
                let error = said.map_or_else(|| error.into(), Error::from);
                (End::Failed(error), CheckpointedStats::default())
            }
        };
        let mut lost = stream.failed() || matches!(end, End::Receiver);
        if link.is_some() && complete > 0 && !lost && self.here().is_taken_back() {
            // One that takes nothing any more is not waited for.
            interrupt.cut_when_still();
            let withdrawn = match secondary {
                None => handshake::withdraw(&mut &stream),
                Some(place) => place.withdraw(&stream),
            };
            match withdrawn {
                Ok(()) => watch.borrow_mut().step("withdrawn"),
                Err(error) => {
                    tracing::info!(%error, "the domain could not be taken back");
                    lost = true;
                }
            }
        }
        Ok(Protected {
            end,
            complete,
            lost,
            stats,
            stream_octets: stream.octets(),
            heard,
        })
    }

    /// How long the other end is waited for.
    fn answer(&self) -> Duration {
        let seconds = self.args.answer_timeout;
        seconds.map_or(ANSWER, |seconds| Duration::from_secs(seconds.into()))
    }

    fn buffer_octets(&self) -> usize {
        match (self.args.no_buffer, self.args.buffer) {
            (true, _) => 0,
            (false, None) => BUFFER_OCTETS,
            (false, Some(size)) => usize::try_from(size.kib << 10).unwrap_or(usize::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_is_given_the_time_to_apply_a_checkpoint() {
        assert_eq!(last_words(false, ANSWER), ANSWER);
        assert_eq!(last_words(true, ANSWER), LAST_WORDS);
        let second = Duration::from_secs(1);
        assert_eq!(last_words(true, second), second);
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
