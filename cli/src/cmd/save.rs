//! `xsr save`: what `xl save` does. A domain is suspended and written to an image;
//! then it is gone, or runs on.
//!
//! C implementation: `save_domain` in `tools/xl/xl_saverestore.c`.

mod direct;
pub(crate) mod sink;

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::frame::PAGE_SIZE;
use xsr_format::wrapper::libxl::{LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::progress::OnProgress;
use xsr_save_restore::save::precopy::{OnTimeout, PrecopyPolicy, TargetPolicy, XenPolicy};
use xsr_save_restore::sink::{FdSink, PageSink};
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack};
use xsr_save_restore::{Live, SaveError, SaveOptions, Saved};
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};
use xsr_xen_backend::{DomId, Domain, DomainInfo};

use self::sink::ImageSink;
use crate::args::{OnTimeoutArg, SaveArgs, TargetArgs};
use crate::backend::{self, Found, Hypervisor, LIBXL_HEADER, domain_command, name_of};
use crate::cmd::migrate::can_suspend;
use crate::condition::Condition;
use crate::config;
use crate::exit::{Aftermath, BadUsage, Code, NotDurable};
use crate::left;
use crate::output::{Existing, Output, Plan};
use crate::stdout::report;
use crate::terminal::Terminal;
use crate::text::{Count, shown_name, shown_path, size};
use crate::watch::Watch;
use crate::workload;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `destroyed`, `running` or `paused`.
    domain: &'static str,
    file: String,
    #[serde(flatten)]
    memory: MemoryReport,
    /// How long the domain stood still; of one that runs again.
    #[serde(skip_serializing_if = "Option::is_none")]
    downtime_seconds: Option<f64>,
    seconds: f64,
}

/// What a report says of the memory that was sent.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MemoryReport {
    iterations: u32,
    pages: u64,
    page_data_bytes: u64,
    stream_bytes: u64,
}

impl MemoryReport {
    /// Of a save whose stream had so many bytes.
    pub(crate) fn of(written: &Written<'_>) -> Self {
        let stats = written.saved.stats();
        Self {
            iterations: stats.iterations,
            pages: stats.pages,
            page_data_bytes: stats.pages * PAGE_SIZE as u64,
            stream_bytes: written.bytes,
        }
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of memory", size(self.page_data_bytes))?;
        match self.iterations {
            0 => Ok(()),
            n => write!(f, " in {} and a stop", Count(n, "pass")),
        }
    }
}

/// Save a domain.
///
/// Until the image is complete and has its name, whatever fails leaves the domain
/// running and no file, except for [`NotDurable`], after which both are there. After that, a failure
/// is reported, and the image stays.
pub(crate) fn run(args: &SaveArgs, terminal: &Terminal) -> Result<Code> {
    let live = args.live.then(|| match args.target.is_given() {
        true => target_policy(&args.target),
        false => Box::new(XenPolicy),
    });
    if live.is_none() && args.target.is_given() {
        let why = "--max-downtime, --timeout and --on-timeout are for a live save: add --live";
        return Err(anyhow::Error::new(BadUsage(why.to_owned())));
    }
    let mut watch = Watch::start(terminal, args.progress, "saving")?;
    let result = save(args, live, terminal, &mut watch);
    watch.end(result)
}

fn save(
    args: &SaveArgs,
    live: Option<Box<dyn PrecopyPolicy>>,
    terminal: &Terminal,
    watch: &mut Watch,
) -> Result<Code> {
    let started = Instant::now();
    let backend = &args.backend.backend;
    let host = match args.direct {
        true => Hypervisor::direct(backend)?,
        false => Hypervisor::open(backend)?,
    };
    let Found {
        domain: which,
        name,
        handle,
        lock: _lock,
    } = Found::find(&*host, &args.domain, "save")?;
    let domain = host.open(which)?;
    if args.direct {
        direct::refuse(args, &*host, which, &name)?;
    }
    can_suspend(&*domain, &handle, backend)
        .with_context(|| format!("saving {}", shown_name(&name)))?;
    let output = output(args, &*domain)?;
    let after = aftermath(&*host, which, &name, &output);
    // From here on a signal breaks off in good order.
    left::guest::leaving(&host, which, &name, None);
    let _working = workload::start(&host, which.domid)?;
    let mut toolstack = DirectToolstack(&*domain);
    let job = Job {
        host: &*host,
        which,
        domain: &*domain,
        form: match args.direct {
            true => Form::Bare,
            false => Form::Xl,
        },
        options: SaveOptions {
            threads: args.threads.threads,
        },
    };
    let written = job
        .write(
            &mut toolstack,
            FdSink::cancellable(output.file(), watch.interrupt().cancel().clone())?,
            live.map(|policy| LiveSave {
                policy,
                verify: false,
            }),
            watch,
        )
        .with_context(|| format!("saving {name} to {}", output.name()))
        .map_err(&after)?;
    watch.clear();
    if watch.interrupt().cancel().is_cancelled() {
        drop(written);
        let aborted = Error::new(SaveError::Aborted).context(format!("saving {name}"));
        return Err(after(aborted));
    }
    if let Err(error) = output.finish() {
        drop(written);
        return Err(after(error));
    }
    let ending = Ending {
        args,
        terminal,
        started,
        name: &name,
        handle: &handle,
        host: &*host,
        which,
        domain: &*domain,
    };
    ending.conclude(written, watch)?;
    Ok(Code::Fine)
}

/// Where the image goes, once it is sure that it would not be lost there.
fn output(args: &SaveArgs, domain: &dyn Domain) -> Result<Output> {
    let output = Output::open(&Plan {
        path: &args.file,
        inputs: &[],
        existing: Existing::Replace,
        only_copy: !args.checkpoint && !args.paused,
    })?;
    output.check_json(args.json)?;
    if !args.force {
        output.check_room(least_bytes(&domain.info()?))?;
    }
    Ok(output)
}

/// As many bytes as an image of the domain will have at least: the contents of its pages. A
/// sixteenth is left for pages that the domain gives back meanwhile, and for those of the
/// toolstack, which are not in an image.
pub(crate) fn least_bytes(domain: &DomainInfo) -> u64 {
    let bytes = domain.tot_pages.saturating_mul(PAGE_SIZE as u64);
    bytes - bytes / 16
}

/// Adds to a failure of a save what became of the domain and of the file.
fn aftermath<'a>(
    host: &'a dyn DomainStore,
    which: DomainRef,
    name: &'a str,
    output: &Output,
) -> impl Fn(Error) -> Error + use<'a> {
    let (file, after) = (output.name().to_owned(), output.aftermath());
    move |error| {
        let condition = Condition::in_store(host, which);
        let name = shown_name(name);
        if error.is::<NotDurable>() {
            let after = match condition {
                Condition::Runs => {
                    format!("{name} runs on here: do not restore {file} while it does")
                }
                Condition::Gone => format!("{name} is gone here"),
                _ => format!("{name} may be here still: do not restore {file} while it is"),
            };
            return Aftermath::of(error, after);
        }
        let fate = match condition {
            Condition::Paused => "stays paused",
            Condition::Runs => "runs on",
            Condition::Suspended => "is left suspended",
            Condition::Down(_) => "is left shut down: start it anew, or destroy it",
            Condition::Gone => "is gone",
            Condition::Unknown(_) => return Aftermath::of(error, after.clone()),
        };
        Aftermath::of(error, format!("{name} {fate}, {after}"))
    }
}

/// A save whose image is complete and has its name.
struct Ending<'a> {
    args: &'a SaveArgs,
    terminal: &'a Terminal,
    started: Instant,
    name: &'a str,
    /// What commands take for the domain.
    handle: &'a str,
    host: &'a dyn DomainStore,
    which: DomainRef,
    domain: &'a dyn Domain,
}

impl Ending<'_> {
    /// Do with the domain what the command line says, and say what was done.
    fn conclude(&self, written: Written<'_>, watch: &Watch) -> Result<()> {
        let Self {
            args,
            terminal,
            started,
            name,
            handle,
            host,
            which,
            domain,
        } = *self;
        let memory = MemoryReport::of(&written);
        let mut downtime = None;
        let resume = |written: Written<'_>| {
            let resumed = written.saved.resume();
            match (resumed, Condition::in_store(host, which)) {
                // Another program has resumed it.
                (Err(_), Condition::Runs) => Ok(()),
                (resumed, _) => resumed,
            }
        };
        let fate = match (args.paused, args.checkpoint) {
            (true, _) => {
                domain.pause().context("pausing the domain")?;
                resume(written)?;
                "paused"
            }
            (false, true) => {
                resume(written)?;
                downtime = watch.suspended().map(|then| then.elapsed());
                "running"
            }
            (false, false) => {
                written.saved.keep_suspended();
                backend::destroy(host, which, name).map_err(|error| {
                    let error = Error::new(error).context(format!("destroying {name}"));
                    let destroy = domain_command(&args.backend.backend, "destroy", handle);
                    let after = format!(
                        "the image is complete, and {} is still here, suspended; before the image \
                         is restored: `{destroy}`",
                        shown_name(name)
                    );
                    Aftermath::of(error, after)
                })?;
                "destroyed"
            }
        };
        let elapsed = started.elapsed();
        let file = match args.file.as_os_str() == "-" {
            true => "stdout".to_owned(),
            false => shown_path(&args.file),
        };
        let stood = downtime.map_or_else(String::new, |time| {
            format!(", paused for {} ms", time.as_millis())
        });
        terminal.note(&format!(
            "{name} saved to {file}: {memory}, {:.1} s{stood}; the domain is {fate}",
            elapsed.as_secs_f64()
        ));
        if args.json {
            let done = format!("{} saved to {file}; the domain is {fate}", shown_name(name));
            let document = Report {
                name,
                domid: which.domid,
                domain: fate,
                file: args.file.display().to_string(),
                memory,
                downtime_seconds: downtime.map(|time| time.as_secs_f64()),
                seconds: elapsed.as_secs_f64(),
            };
            report(terminal, &done, &document);
        }
        Ok(())
    }
}

/// The policy with the target that the command line gives.
pub(crate) fn target_policy(args: &TargetArgs) -> Box<dyn PrecopyPolicy> {
    let mut policy = TargetPolicy::default();
    if let Some(milliseconds) = args.max_downtime {
        policy.max_downtime = Duration::from_millis(milliseconds.into());
    }
    if let Some(seconds) = args.timeout {
        policy.timeout = Some(Duration::from_secs(seconds.into()));
    }
    if args.on_timeout == Some(OnTimeoutArg::Cancel) {
        policy.on_timeout = OnTimeout::Cancel;
    }
    Box::new(policy)
}

/// How to save a domain that runs.
pub(crate) struct LiveSave {
    /// When to suspend it.
    pub(crate) policy: Box<dyn PrecopyPolicy>,
    /// Whether to send all memory again, for the other end to compare.
    pub(crate) verify: bool,
}

/// What is written around the libxc stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// What xl writes: its header with the configuration, the libxl stream.
    Xl,
    /// Nothing.
    Bare,
}

/// What to save.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) host: &'a dyn DomainStore,
    pub(crate) which: DomainRef,
    pub(crate) domain: &'a dyn Domain,
    pub(crate) form: Form,
    pub(crate) options: SaveOptions,
}

/// An image that is complete, of a domain that is still suspended: see [`Saved`].
#[derive(Debug)]
#[must_use = "dropping it resumes the domain"]
pub(crate) struct Written<'a> {
    pub(crate) saved: Saved<'a>,
    /// Bytes of the image.
    bytes: u64,
}

impl Job<'_> {
    /// Write what stands before the libxc stream: xl's header with the configuration, and
    /// the beginning of the libxl stream.
    pub(crate) fn begin<S: Write>(&self, mut sink: S) -> Result<LibxlWriter<S>> {
        let json = match backend::config(self.host, self.which)? {
            Some(json) => json,
            None => self.made_up_config()?,
        };
        XlHeader::new(&json)?.write(&mut sink)?;
        let mut libxl = LibxlWriter::new(sink, LIBXL_HEADER)?;
        libxl.write(&LibxlRecord::LibxcContext)?;
        Ok(libxl)
    }

    /// Write the image. The domain is suspended afterwards, and runs on when the answer is
    /// dropped.
    pub(crate) fn write<'t>(
        &self,
        toolstack: &'t mut dyn SaveToolstack,
        sink: impl PageSink,
        live: Option<LiveSave>,
        watch: &mut Watch,
    ) -> Result<Written<'t>> {
        let mut sink = ImageSink::new(sink);
        if self.form == Form::Bare {
            let saved = self.run(toolstack, &mut sink, live, watch)?;
            let bytes = sink.bytes();
            return Ok(Written { saved, bytes });
        }
        let emulators = backend::emulators(self.host, self.which)?;
        let mut libxl = self.begin(sink)?;
        let saved = self.run(toolstack, libxl.sink_mut(), live, watch)?;
        for record in &emulators {
            libxl.write(record)?;
        }
        libxl.write(&LibxlRecord::End)?;
        let bytes = libxl.into_sink().bytes();
        Ok(Written { saved, bytes })
    }

    /// Write the libxc stream.
    fn run<'t>(
        &self,
        toolstack: &'t mut dyn SaveToolstack,
        sink: &mut dyn PageSink,
        live: Option<LiveSave>,
        watch: &mut Watch,
    ) -> Result<Saved<'t>> {
        let (domain, xen, options) = (self.domain, self.host.xen_version()?, &self.options);
        let progress: &mut OnProgress<'_> = &mut |progress| watch.progress(progress);
        Ok(match live {
            None => xsr_save_restore::SaveRequest::new(domain, xen)
                .options(options)
                .observe(progress)
                .write_stream(toolstack, sink)?,
            Some(mut live) => {
                let live = Live {
                    policy: &mut *live.policy,
                    verify: live.verify,
                };
                xsr_save_restore::SaveRequest::new(domain, xen)
                    .options(options)
                    .live(live)
                    .observe(progress)
                    .write_stream(toolstack, sink)?
            }
        })
    }

    /// A configuration for a domain that has none.
    fn made_up_config(&self) -> Result<String> {
        let info = self.domain.info()?;
        let name = name_of(self.host, self.which)?;
        let uuid = match info.uuid.is_nil() {
            true => config::uuid(&name, 0),
            false => info.uuid.to_string(),
        };
        let (vcpus, kib) = (info.max_vcpu_id + 1, info.tot_pages * 4);
        Ok(config::make(&name, &uuid, info.kind, vcpus, kib))
    }
}
