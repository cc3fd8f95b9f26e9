//! `xsr restore`: what `xl restore` does. A domain is made, filled from an image, and
//! let run.
//!
//! C implementation: `create_domain` in `tools/xl/xl_vmcontrol.c`.

mod source;

use std::io::{Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::image::GuestType;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::{Body, RecordKind};
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{RestoreOptions, Restored};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

use self::source::ImageSource;
use crate::args::RestoreArgs;
use crate::backend;
use crate::config::{self, Config};
use crate::exit::{BadImage, BadUsage, Code};
use crate::file::Input;
use crate::image::{Event, Reading};
use crate::interrupt::Interrupt;
use crate::page_map::{PageMap, runs_of};
use crate::stdout::Results;
use crate::terminal::{Bar, Terminal};
use crate::text::size;

/// The control domain: the other end of the xenstore and console rings.
const DOM0: DomId = DomId(0);

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    file: &'a str,
    pages: u64,
    superpages: u64,
    seconds: f64,
}

/// Restore a domain. Whatever fails, the domain is destroyed again.
pub(crate) fn run(args: &RestoreArgs, terminal: &Terminal) -> Result<Code> {
    let interrupt = Interrupt::catch()?;
    let started = Instant::now();
    let input = Input::open(&args.file, args.lenient)?;
    let host = backend::open_or_create(&args.backend.backend)?;
    let bar = terminal.progress("restoring");
    let job = Job {
        host: &host,
        input: &input,
        lenient: args.lenient,
        bar: &bar,
        interrupt: Some(&interrupt),
    };
    let made = job
        .restore(&Overrides::from(args))
        .and_then(|made| job.input.finish(0).map(|_| made))
        .map_err(|error| input.blame(error))
        .with_context(|| format!("restoring {}", input.name))?;
    if !args.paused {
        made.unpause()?;
    }
    drop(bar);
    // From here on the domain lives, whatever becomes of what is said about it.
    let About { name, domid, stats } = made.keep();
    let fate = if args.paused { "paused" } else { "running" };
    let seconds = started.elapsed().as_secs_f64();
    terminal.note(&format!(
        "{name} restored from {} as {domid}: {} of memory in {seconds:.1} s; it is {fate}",
        input.name,
        size(stats.pages * 4096),
    ));
    if args.json {
        let mut out = Results::new();
        out.json(&Report {
            name: &name,
            domid,
            domain: fate,
            file: &input.name,
            pages: stats.pages,
            superpages: stats.superpages,
            seconds,
        })?;
        out.finish()?;
    }
    Ok(Code::Fine)
}

/// What the command line says of a domain whose image does not.
#[derive(Clone, Debug, Default)]
struct Overrides {
    name: Option<String>,
    vcpus: Option<u32>,
    memory_kib: Option<u64>,
    /// What to call a domain that has no name at all.
    fallback: String,
}

impl From<&RestoreArgs> for Overrides {
    fn from(args: &RestoreArgs) -> Self {
        let stem = args
            .file
            .file_stem()
            .filter(|_| args.file != Path::new("-"));
        let fallback = stem.map(|stem| stem.to_string_lossy().into_owned());
        Self {
            name: args.name.clone(),
            vcpus: args.vcpus,
            memory_kib: args.memory.map(|memory| memory.kib),
            fallback: fallback.unwrap_or_else(|| "restored".to_owned()),
        }
    }
}

/// One restore.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) host: &'a MockHost,
    pub(crate) input: &'a Input,
    pub(crate) lenient: bool,
    pub(crate) bar: &'a Bar,
    pub(crate) interrupt: Option<&'a Interrupt>,
}

/// What to build, and the configuration to keep with it.
struct Plan {
    json: String,
    name: String,
    kind: GuestKind,
    vcpus: u32,
    max_pages: u64,
}

impl Job<'_> {
    /// Restore an image of xl, which says itself what to build.
    pub(crate) fn restore_xl(&self) -> Result<Made> {
        self.restore(&Overrides::default())
    }

    fn restore(&self, overrides: &Overrides) -> Result<Made> {
        let options = ReadOptions {
            lenient: self.lenient,
            offset: 0,
        };
        let walk = Walk::open(ImageSource::new(&self.input.file), options)?;
        let (reader, around) = walk.into_libxc()?;
        let plan = match around.xl() {
            Some(header) => Plan::from_header(header, overrides)?,
            None => self.plan(overrides, reader.offset())?,
        };
        let mut made = self.make(&plan)?;
        // Records of emulators may come on either side of the libxc stream.
        let mut emulators: Vec<LibxlRecord> = around
            .before()
            .iter()
            .filter(|r| of_emulator(r))
            .cloned()
            .collect();
        let (restored, source) = self.libxc(&made, reader)?;
        made.about.stats = restored.stats;
        let offset = source.offset();
        let mut walk = around.resume(source, offset);
        while let Some(step) = walk.next_step()? {
            // What nobody needs to understand is not kept.
            if let Content::LibxlRecord(record) = step.content
                && of_emulator(&record)
            {
                emulators.push(record);
            }
        }
        backend::store_emulators(self.host, made.about.domid, &emulators)?;
        Ok(made)
    }

    fn libxc<'s>(
        &self,
        made: &Made,
        reader: RecordReader<ImageSource<'s>>,
    ) -> Result<(Restored, ImageSource<'s>)> {
        let domain = made.domain.as_ref();
        let options = RestoreOptions {
            store_port: domain.alloc_unbound_port(DOM0)?,
            store_domid: DOM0,
            console_port: domain.alloc_unbound_port(DOM0)?,
            console_domid: DOM0,
        };
        let total = self.input.length.unwrap_or(0);
        let mut toolstack = DirectToolstack(domain);
        let done =
            xsr_save_restore::restore(domain, reader, &mut toolstack, &options, &mut |progress| {
                self.bar.show(progress.octets, total, progress.octets);
                match self.interrupt {
                    Some(interrupt) => interrupt.check(),
                    None => ControlFlow::Continue(()),
                }
            })?;
        Ok(done)
    }

    /// Make the domain of a plan: paused, without memory.
    fn make(&self, plan: &Plan) -> Result<Made> {
        let name = &plan.name;
        if self.host.find(name).is_ok() {
            return Err(Error::msg(format!(
                "a domain named {name:?} exists already; destroy it first, or restore on another host"
            )));
        }
        let domid = self
            .host
            .create_domain(plan.kind, plan.vcpus, plan.max_pages)
            .with_context(|| format!("making {name}"))?;
        let made = Made {
            domain: self.host.domain(domid)?,
            about: About {
                name: name.clone(),
                domid,
                stats: RestoreStats::default(),
            },
            keep: false,
        };
        self.host.rename(domid, name)?;
        backend::store_config(self.host, domid, &plan.json)?;
        Ok(made)
    }

    /// A plan for an image without configuration: from the command line, and what
    /// that leaves open from the image, read once more for it. The file stands at
    /// `offset` before and after.
    fn plan(&self, overrides: &Overrides, offset: u64) -> Result<Plan> {
        if !self.input.is_repeatable() {
            let why = "the image has no configuration and is read twice, to find out what the \
                       domain needs: give it as a file";
            return Err(Error::new(BadUsage(why.to_owned())));
        }
        let found = Survey::of(&self.input.again()?, self.lenient)?;
        if self.input.length.is_some() {
            let mut file = &self.input.file;
            file.seek(SeekFrom::Start(offset))?;
        }
        let vcpus = overrides.vcpus.unwrap_or(found.vcpus.max(1));
        let memory_kib = overrides.memory_kib.unwrap_or(found.memory.populated() * 4);
        let name = overrides.name.as_ref().unwrap_or(&overrides.fallback);
        let kind = found.kind()?;
        Ok(Plan {
            json: config::make(name, &config::uuid(name, 0), kind, vcpus, memory_kib),
            name: name.clone(),
            kind,
            vcpus,
            max_pages: config::max_pages(memory_kib),
        })
    }
}

/// The configuration that a restore would make for an image that has none. The image is
/// read for it.
pub(crate) fn config_for(input: &Input, file: &Path, lenient: bool) -> Result<String> {
    if !input.is_repeatable() {
        let why = "the image has no configuration and is read twice, to find out what the \
                   domain needs: give it as a file, or a configuration with --config";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    let found = Survey::of(&input.again()?.unwrapped(lenient)?, lenient)?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    let kind = found.kind()?;
    let memory_kib = found.memory.populated() * 4;
    let uuid = config::uuid(&name, 0);
    Ok(config::make(
        &name,
        &uuid,
        kind,
        found.vcpus.max(1),
        memory_kib,
    ))
}

/// Whether a record holds what an emulator wants back.
fn of_emulator(record: &LibxlRecord) -> bool {
    matches!(
        record,
        LibxlRecord::EmulatorXenstoreData { .. } | LibxlRecord::EmulatorContext { .. }
    )
}

impl Plan {
    /// What the configuration in xl's header asks for.
    fn from_header(header: &XlHeader, overrides: &Overrides) -> Result<Self> {
        let given =
            overrides.name.is_some() || overrides.vcpus.is_some() || overrides.memory_kib.is_some();
        if given {
            let why = "the image has a configuration, which says name, vcpus and memory; \
                       --name, --vcpus and --memory are for images without";
            return Err(Error::new(BadUsage(why.to_owned())));
        }
        let json = header.json().map_err(|e| bad(&e.to_string()))?;
        let json = json.ok_or_else(|| bad("there is no JSON configuration in the xl header"))?;
        let config = Config::parse(json)?;
        Ok(Self {
            json: json.to_owned(),
            max_pages: config.max_pages(),
            name: config.name,
            kind: config.kind,
            vcpus: config.vcpus,
        })
    }
}

fn bad(what: &str) -> Error {
    Error::new(BadImage(what.to_owned()))
}

/// What an image shows of the domain that it needs.
#[derive(Debug, Default)]
struct Survey {
    guest_type: Option<GuestType>,
    vcpus: u32,
    memory: PageMap,
    /// Whether an emulator has state in it, which PVH guests have not.
    emulated: bool,
}

impl Survey {
    fn of(input: &Input, lenient: bool) -> Result<Self> {
        let mut survey = Self::default();
        Reading { lenient }.over(input, &mut |event| {
            survey.event(event);
            Ok(())
        })?;
        Ok(survey)
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Libxc(_, domain) => self.guest_type = Some(domain.guest_type),
            Event::LibxlRecord(_, LibxlRecord::EmulatorContext { .. }) => self.emulated = true,
            Event::Pages(at, entries) => {
                for run in runs_of(entries.iter(), at.page_data(entries)) {
                    self.memory.insert(run);
                }
            }
            Event::Record(_, record) => match record.body {
                Body::Vcpu(vcpu) if record.kind == RecordKind::X86_PV_VCPU_BASIC => {
                    self.vcpus = self.vcpus.max(vcpu.vcpu.saturating_add(1));
                }
                Body::HvmContext(context) => {
                    let cpus = HvmContext::new(context)
                        .filter_map(Result::ok)
                        .filter(|record| record.kind == HvmRecordKind::CPU);
                    self.vcpus = u32::try_from(cpus.count()).unwrap_or(u32::MAX);
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn kind(&self) -> Result<GuestKind> {
        match self.guest_type {
            Some(GuestType::X86_PV) => Ok(GuestKind::Pv),
            Some(GuestType::X86_HVM) if self.emulated => Ok(GuestKind::Hvm),
            Some(GuestType::X86_HVM) => Ok(GuestKind::Pvh),
            Some(other) => Err(bad(&format!(
                "{other}: this version restores x86 PV and HVM"
            ))),
            None => Err(bad("there is no libxc stream in it")),
        }
    }
}

/// A domain that has been made. Destroyed on drop, unless it is kept.
pub(crate) struct Made {
    domain: Box<dyn Domain>,
    about: About,
    keep: bool,
}

/// What there is to say of a domain that has been made.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) domid: DomId,
    /// What the restore took.
    pub(crate) stats: RestoreStats,
}

impl Made {
    /// Let the domain run.
    pub(crate) fn unpause(&self) -> Result<()> {
        self.domain
            .unpause()
            .with_context(|| format!("unpausing {}", self.about.name))
    }

    /// The domain stays.
    pub(crate) fn keep(mut self) -> About {
        self.keep = true;
        self.about.clone()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.domain.destroy() {
            let name = &self.about.name;
            tracing::error!(%error, name, "the domain could not be destroyed: destroy it by hand");
        }
    }
}
