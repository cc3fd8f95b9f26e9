//! `xsr save`, like `xl save`: a domain is suspended and written to an image. Then it is destroyed,
//! or continues.
//!
//! C implementation: `save_domain` in `tools/xl/xl_saverestore.c`.

pub(crate) mod direct;
mod onto;
mod report;
pub(crate) mod sink;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::wrapper::libxl::{LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::at_freeze::{self, FrozenGuest, Program};
use xsr_save_restore::progress::{Cancel, Progress};
use xsr_save_restore::save::mapped::{MappedImage, MappedOptions};
use xsr_save_restore::save::precopy::{OnTimeout, PrecopyPolicy, TargetPolicy, XenPolicy};
use xsr_save_restore::sink::{FdSink, PageSink};
use xsr_save_restore::storage::onto::OntoWriter;
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack, ToolstackError, suspend_guest};
use xsr_save_restore::{Live, SaveError, SaveOptions, SaveRequest, Saved};
use xsr_xen_backend::Domain;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore};
use xsr_xen_backend::mock::phase;

use self::onto::Base;
pub(crate) use self::report::MemoryReport;
use self::report::SaveReport;
use self::sink::ImageSink;
use crate::args::images::LayoutArg;
use crate::args::{OnTimeoutArg, SaveArgs, TargetArgs};
use crate::backend::workload;
use crate::backend::{self, Found, Hypervisor, LIBXL_HEADER, domain_command, name_of};
use crate::cmd::migrate::can_suspend;
use crate::condition::Condition;
use crate::config;
use crate::exit::{Aftermath, BadUsage, Code, NotDurable};
use crate::left;
use crate::output::{Existing, Output, OutputPlan};
use crate::pack::Packing;
use crate::stdout::report;
use crate::terminal::Terminal;
use crate::text::{shown_name, shown_path};
use crate::watch::Watch;

/// The error for options that have no meaning without `--live`.
pub(crate) const FOR_LIVE: &str =
    "--max-downtime, --timeout and --on-timeout are for a live save: add --live";

/// The error for `--onto` with another layout.
const ONTO_NEEDS_MAPPED: &str =
    "--onto is for --layout mapped, in which pages have places: leave --layout stream out";

/// The error for `--page-digests` with another layout.
pub(crate) const PAGE_DIGESTS_NEED_MAPPED: &str =
    "--page-digests is for --layout mapped: a stream has no digests";

/// The error for a limit without a program.
pub(crate) const LIMIT_NEEDS_AT_FREEZE: &str =
    "--at-freeze-limit is for the program of --at-freeze: name one";

/// The error for a program with a pipe or a device.
pub(crate) const AT_FREEZE_NEEDS_FILE: &str =
    "--at-freeze is for a save to a file: nothing else is there when it is told so";

/// Save a domain.
///
/// A failure before the image is complete and has its name leaves the domain running and no file,
/// except [`NotDurable`], after which both exist. A later failure is reported, and the image stays.
pub(crate) fn run(args: &SaveArgs, terminal: &Terminal) -> Result<Code> {
    let live = args.live.then(|| match args.target.is_given() {
        true => target_policy(&args.target),
        false => Box::new(XenPolicy),
    });
    if live.is_none() && args.target.is_given() {
        return Err(anyhow::Error::new(BadUsage(FOR_LIVE.to_owned())));
    }
    if args.onto.is_some() && args.layout != LayoutArg::Mapped {
        return Err(Error::new(BadUsage(ONTO_NEEDS_MAPPED.to_owned())));
    }
    if args.page_digests && args.layout != LayoutArg::Mapped {
        return Err(Error::new(BadUsage(PAGE_DIGESTS_NEED_MAPPED.to_owned())));
    }
    let packing = Packing::of(&args.pack, args.layout)?;
    if args.at_freeze_limit.is_some() && args.at_freeze.is_none() {
        return Err(Error::new(BadUsage(LIMIT_NEEDS_AT_FREEZE.to_owned())));
    }
    let limit = args.at_freeze_limit.map(u64::from).map(Duration::from_secs);
    let limit = limit.unwrap_or(at_freeze::DEFAULT_LIMIT);
    let mut watch = Watch::start(terminal, args.progress, "saving")?;
    let cancel = watch.interrupt().cancel().clone();
    let program = (args.at_freeze.as_deref()).map(|path| freeze_program(path, limit, cancel));
    let mut program = match program.transpose() {
        Ok(program) => program,
        Err(error) => return watch.end(Err(error)),
    };
    let result = save(
        args,
        packing.as_ref(),
        live,
        &mut program,
        terminal,
        &mut watch,
    );
    if let Some(program) = &mut program {
        program.conclude();
    }
    watch.end(result)
}

/// The program of `--at-freeze`.
///
/// # Errors
///
/// [`BadUsage`]: another user could replace it.
pub(crate) fn freeze_program(path: &Path, limit: Duration, cancel: Cancel) -> Result<Program> {
    let program = Program::new(path, limit, cancel, Box::new(left::Programs));
    program.map_err(|why| Error::new(BadUsage(format!("--at-freeze {why}"))))
}

fn save(
    args: &SaveArgs,
    packing: Option<&Packing>,
    live: Option<Box<dyn PrecopyPolicy>>,
    program: &mut Option<Program>,
    terminal: &Terminal,
    watch: &mut Watch,
) -> Result<Code> {
    let started = Instant::now();
    let backend = &args.backend.backend;
    let host = Hypervisor::open(backend, args.direct)?;
    let Found {
        domain: which,
        name,
        handle,
        lock: _lock,
    } = Found::find(&host, &args.domain, "save")?;
    let domain = host.open(which)?;
    if args.direct {
        direct::refuse(args, &*host, which, &name)?;
    }
    can_suspend(&*domain, &handle, backend)
        .with_context(|| format!("saving {}", shown_name(&name)))?;
    let output = output(args, packing, &*domain)?;
    let mut base = args.onto.as_deref().map(Base::open).transpose()?;
    let onto = base.as_mut().map(|base| base.writer(&output)).transpose()?;
    let after = aftermath(&*host, which, &name, &output);
    if let Some(program) = program {
        if !output.is_new_file() {
            return Err(Error::new(BadUsage(AT_FREEZE_NEEDS_FILE.to_owned())));
        }
        program.is_about(FrozenGuest {
            domid: which.domid,
            name: name.clone(),
            uuid: domain.info()?.uuid.to_string(),
            file: std::path::absolute(&args.file)?,
        });
    }
    // From here on a signal breaks off in good order.
    left::guest::leaving(&host, which, &name, None);
    let _working = workload::start(&host, which.domid)?;
    let mut toolstack = Stopping {
        domain: &*domain,
        limit: args.suspend.limit(),
        cancel: watch.interrupt().cancel().clone(),
    };
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
    let live = live.map(|policy| LiveSave {
        policy,
        verify: false,
    });
    let saving = format!("saving {name} to {}", output.name());
    let failed = |error: Error| after(error.context(saving.clone()));
    let image = (args.layout == LayoutArg::Mapped).then(|| {
        let mut options = MappedOptions::default();
        options.page_digests = args.page_digests;
        MappedImage::new(
            match &onto {
                Some(onto) => onto,
                None => output.writer(),
            },
            options,
        )
    });
    let cancel = watch.interrupt().cancel().clone();
    let packer = packing.map(|packing| packing.start(&output, cancel.clone()));
    let packer = packer.transpose()?;
    let written = match &image {
        None => {
            let file = match &packer {
                Some(packer) => packer.file()?,
                None => output.file(),
            };
            let sink = FdSink::cancellable(file, cancel.clone())?;
            job.write(&mut toolstack, sink, live, program.as_mut(), watch)
        }
        Some(image) => job.write_mapped(&mut toolstack, image, live, program.as_mut(), watch),
    };
    let (written, packed) = match (written, packer) {
        (Ok(written), None) => (written, None),
        // The domain is resumed before the message says so.
        (Ok(written), Some(packer)) => match packer.finish() {
            Ok(packed) => (written, Some(packed.bytes)),
            Err(error) => {
                drop(written);
                return Err(failed(error));
            }
        },
        (Err(error), None) => return Err(failed(error)),
        (Err(error), Some(packer)) => return Err(failed(packer.blame(error))),
    };
    watch.clear();
    if cancel.is_cancelled() {
        drop(written);
        let aborted = Error::new(SaveError::Aborted).context(format!("saving {name}"));
        return Err(after(aborted));
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
    let mut memory = MemoryReport::of(&written);
    memory.file_bytes = packed;
    let mut held = Held::Suspended(written);
    if let Some(image) = image {
        // If the domain continues, it need not wait for more than its last page.
        if ending.is_copy() {
            held = Held::Released(held.release(&ending, watch).map_err(&failed)?);
        }
        phase("mapped-image");
        let finished = image.finish(args.threads.threads, &mut || cancel.check());
        match finished {
            Ok(stats) => {
                memory.is_mapped(&stats);
                memory.shared_pages = onto.as_ref().map(OntoWriter::shared_pages);
                memory.written_pages = onto.as_ref().map(OntoWriter::written_pages);
            }
            Err(error) => {
                // The domain is resumed before the message says so.
                drop(held);
                return Err(failed(error.into()));
            }
        }
    }
    drop(onto);
    let finished = output.finish();
    if let Some(program) = program {
        let is_there = finished.as_ref().err().is_none_or(Error::is::<NotDurable>);
        program.is_saved = is_there;
        memory.at_freeze_seconds = program.took.map(|time| time.as_secs_f64());
    }
    if let Err(error) = finished {
        drop(held);
        return Err(after(error));
    }
    let fate = held.release(&ending, watch)?;
    ending.tell(memory, fate);
    Ok(Code::Fine)
}

/// A domain whose image is being completed.
#[derive(Debug)]
enum Held<'t> {
    /// It is suspended until then.
    Suspended(Written<'t>),
    /// It has been released already.
    Released(Fate),
}

impl Held<'_> {
    /// Releases the domain as the command line says, unless that has been done.
    fn release(self, ending: &Ending<'_>, watch: &Watch) -> Result<Fate> {
        match self {
            Self::Suspended(written) => ending.release(written, watch),
            Self::Released(fate) => Ok(fate),
        }
    }
}

/// What has become of a domain.
#[derive(Clone, Copy, Debug)]
struct Fate {
    /// `destroyed`, `running` or `paused`.
    domain: &'static str,
    /// How long it was suspended, if it runs again.
    downtime: Option<Duration>,
}

/// Open the output for the image, after checking that the image would not be lost there.
fn output(args: &SaveArgs, packing: Option<&Packing>, domain: &dyn Domain) -> Result<Output> {
    let plan = OutputPlan {
        path: &args.file,
        inputs: &args.onto.as_deref().map_or(Vec::new(), |base| vec![base]),
        existing: Existing::Replace,
        only_copy: !args.checkpoint && !args.paused,
    };
    let mapped = args.layout == LayoutArg::Mapped;
    let output = match mapped {
        true => Output::open_slots(&plan)?,
        false => Output::open(&plan)?,
    };
    output.check_json(args.json)?;
    // Zero pages take no space in slots, and their number is not known yet; nor is what compression
    // saves.
    let is_compressed = packing.is_some_and(Packing::is_compressed);
    if !args.force && !mapped && !is_compressed {
        output.check_room(least_bytes(domain.info()?.tot_pages))?;
    }
    Ok(output)
}

/// The least size of the image of a domain with so many pages, in bytes: their contents. A sixteenth is subtracted for
/// pages that the domain gives back meanwhile, and for the toolstack's pages, which are not in an
/// image.
pub(crate) const fn least_bytes(pages: u64) -> u64 {
    let bytes = pages.saturating_mul(PAGE_SIZE as u64);
    bytes - bytes / 16
}

/// Adds to a failed save what has become of the domain and of the file.
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
        match condition.fate() {
            Some(fate) => Aftermath::of(error, format!("{name} {fate}, {after}")),
            None => Aftermath::of(error, after.clone()),
        }
    }
}

/// No toolstack: suspends the guest within a time, or until the command is interrupted.
pub(crate) struct Stopping<'a> {
    pub(crate) domain: &'a dyn Domain,
    pub(crate) limit: Duration,
    pub(crate) cancel: Cancel,
}

impl SaveToolstack for Stopping<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        suspend_guest(self.domain, self.limit, &self.cancel)
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        DirectToolstack(self.domain).resume()
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        DirectToolstack(self.domain).switch_qemu_logdirty(on)
    }
}

/// A save whose image is complete and has its name.
struct Ending<'a> {
    args: &'a SaveArgs,
    terminal: &'a Terminal,
    started: Instant,
    name: &'a str,
    /// What commands accept for the domain.
    handle: &'a str,
    host: &'a dyn DomainStore,
    which: DomainRef,
    domain: &'a dyn Domain,
}

impl Ending<'_> {
    /// Whether the domain runs on once it is saved.
    fn is_copy(&self) -> bool {
        self.args.checkpoint && !self.args.paused
    }

    /// Destroys, resumes or pauses the domain, as the command line says.
    fn release(&self, written: Written<'_>, watch: &Watch) -> Result<Fate> {
        let Self {
            args,
            name,
            handle,
            host,
            which,
            domain,
            ..
        } = *self;
        let resume = |written: Written<'_>| {
            let resumed = written.saved.resume();
            match (resumed, Condition::in_store(host, which)) {
                // Another program has resumed it.
                (Err(_), Condition::Runs) => Ok(()),
                (resumed, _) => resumed,
            }
        };
        let mut downtime = None;
        let domain = match (args.paused, args.checkpoint) {
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
        Ok(Fate { domain, downtime })
    }

    /// Reports the save.
    fn tell(&self, memory: MemoryReport, fate: Fate) {
        let Self {
            args,
            terminal,
            started,
            name,
            which,
            ..
        } = *self;
        let elapsed = started.elapsed();
        let file = match args.file.as_os_str() == "-" {
            true => "stdout".to_owned(),
            false => shown_path(&args.file),
        };
        let Fate { domain, downtime } = fate;
        let stood = downtime.map_or_else(String::new, |time| {
            format!(", paused for {} ms", time.as_millis())
        });
        terminal.note(&format!(
            "{name} saved to {file}: {memory}, {:.1} s{stood}; the domain is {domain}",
            elapsed.as_secs_f64()
        ));
        if args.json {
            let done = format!(
                "{} saved to {file}; the domain is {domain}",
                shown_name(name)
            );
            let document = SaveReport {
                name,
                domid: which.domid,
                domain,
                file: args.file.display().to_string(),
                memory,
                downtime_seconds: downtime.map(|time| time.as_secs_f64()),
                seconds: elapsed.as_secs_f64(),
            };
            report(terminal, &done, &document);
        }
    }
}

/// The policy with the target from the command line.
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

/// Parameters of a live save.
pub(crate) struct LiveSave {
    /// When to suspend the domain.
    pub(crate) policy: Box<dyn PrecopyPolicy>,
    /// Whether to send all memory again, for the receiver to compare.
    pub(crate) verify: bool,
}

/// The layers around the libxc stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As in xl: its header with the configuration, and the libxl stream.
    Xl,
    /// None.
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

/// A complete image of a domain that is still suspended: see [`Saved`].
#[derive(Debug)]
#[must_use = "dropping it resumes the domain"]
pub(crate) struct Written<'a> {
    pub(crate) saved: Saved<'a>,
    /// The size of the image in bytes.
    bytes: u64,
}

/// The destination of the libxc stream.
enum To<'s, 'w> {
    /// Sequential bytes.
    Stream(&'s mut dyn PageSink),
    /// Slots of a mapped image.
    Slots(&'s MappedImage<'w>),
}

/// Write xl's header and the beginning of the libxl stream.
fn begin<S: Write>(header: &XlHeader, mut sink: S) -> Result<LibxlWriter<S>> {
    header.write(&mut sink)?;
    let mut libxl = LibxlWriter::new(sink, LIBXL_HEADER)?;
    libxl.write(&LibxlRecord::LibxcContext)?;
    Ok(libxl)
}

impl Job<'_> {
    /// Write everything before the libxc stream: xl's header with the configuration, and the
    /// beginning of the libxl stream.
    pub(crate) fn begin<S: Write>(&self, sink: S) -> Result<LibxlWriter<S>> {
        begin(&self.header()?, sink)
    }

    /// xl's header with the configuration.
    fn header(&self) -> Result<XlHeader> {
        let json = match backend::config(self.host, self.which)? {
            Some(json) => json,
            None => self.made_up_config()?,
        };
        Ok(XlHeader::new(&self.present(json)?)?)
    }

    /// A configuration with what xenstore has of the domain: a rename without libxl changes
    /// nothing else, and `xl mem-set` and `xl vcpu-set` do not, either.
    fn present(&self, json: String) -> Result<String> {
        let json = match self.host.name(self.which)? {
            Some(name) => config::renamed(&json, &name)?,
            None => json,
        };
        Ok(match self.host.extent(self.which)? {
            Some(now) => config::with_extent(&json, &now)?,
            None => json,
        })
    }

    /// Write the image. Afterwards the domain is suspended, and dropping the result resumes it.
    pub(crate) fn write<'t>(
        &self,
        toolstack: &'t mut dyn SaveToolstack,
        sink: impl PageSink,
        live: Option<LiveSave>,
        program: Option<&mut Program>,
        watch: &mut Watch,
    ) -> Result<Written<'t>> {
        let mut sink = ImageSink::new(sink);
        if self.form == Form::Bare {
            let saved = self.run(toolstack, To::Stream(&mut sink), live, program, watch)?;
            let bytes = sink.bytes();
            return Ok(Written { saved, bytes });
        }
        let emulators = backend::emulators(self.host, self.which)?;
        let mut libxl = self.begin(sink)?;
        let saved = self.run(
            toolstack,
            To::Stream(libxl.sink_mut()),
            live,
            program,
            watch,
        )?;
        for record in &emulators {
            libxl.write(record)?;
        }
        libxl.write(&LibxlRecord::End)?;
        let bytes = libxl.into_sink().bytes();
        Ok(Written { saved, bytes })
    }

    /// Write the image into slots. As [`Self::write`]; the caller finishes it.
    pub(crate) fn write_mapped<'t>(
        &self,
        toolstack: &'t mut dyn SaveToolstack,
        image: &MappedImage<'_>,
        live: Option<LiveSave>,
        program: Option<&mut Program>,
        watch: &mut Watch,
    ) -> Result<Written<'t>> {
        // Known once the image is finished.
        let bytes = 0;
        if self.form == Form::Bare {
            let saved = self.run(toolstack, To::Slots(image), live, program, watch)?;
            return Ok(Written { saved, bytes });
        }
        let emulators = backend::emulators(self.host, self.which)?;
        let (header, blanks) = self.header()?.aligned()?;
        image.set_blanks(blanks);
        let mut libxl = begin(&header, image.sink())?;
        let saved = self.run(toolstack, To::Slots(image), live, program, watch)?;
        for record in &emulators {
            libxl.write(record)?;
        }
        libxl.write(&LibxlRecord::End)?;
        Ok(Written { saved, bytes })
    }

    /// Write the libxc stream.
    fn run<'t>(
        &self,
        toolstack: &'t mut dyn SaveToolstack,
        to: To<'_, '_>,
        live: Option<LiveSave>,
        program: Option<&mut Program>,
        watch: &mut Watch,
    ) -> Result<Saved<'t>> {
        let mut live = live;
        let mut progress = |progress: &Progress| watch.progress(progress);
        let mut request = SaveRequest::new(self.domain, self.host.xen_version()?)
            .options(&self.options)
            .observe(&mut progress);
        if let Some(live) = &mut live {
            request = request.live(Live {
                policy: &mut *live.policy,
                verify: live.verify,
            });
        }
        if let Some(program) = program {
            request = request.at_freeze(program);
        }
        Ok(match to {
            To::Stream(sink) => request.write_stream(toolstack, sink)?,
            To::Slots(image) => request.write_mapped(toolstack, image)?,
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
