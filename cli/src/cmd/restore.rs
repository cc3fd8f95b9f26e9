//! `xsr restore`: what `xl restore` does. A domain is made, filled from an image, and
//! let run.
//!
//! C implementation: `create_domain` in `tools/xl/xl_vmcontrol.c`.

pub(crate) mod checkpoints;
mod colo;
mod direct;
mod made;
mod source;
mod survey;

use std::io::{Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::image::GuestType;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::walk::{Around, Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::pace::ReadLimit;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{DomId, GuestKind, Host};

pub(crate) use self::made::{About, Made};
use self::source::ImageSource;
use self::survey::Survey;
pub(crate) use self::survey::config_for;
use crate::args::{RestoreArgs, RestoreKind};
use crate::backend;
use crate::config::{self, Config};
use crate::exit::{BadImage, BadUsage, Code, LeftBehind};
use crate::file::Input;
use crate::left;
use crate::stdout;
use crate::terminal::Terminal;
use crate::text::{Count, size};
use crate::watch::Watch;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    file: &'a str,
    pages: u64,
    superpages_1gib: u64,
    superpages_2mib: u64,
    seconds: f64,
}

/// Restore a domain. Whatever fails, the domain is destroyed again.
pub(crate) fn run(args: &RestoreArgs, terminal: &Terminal) -> Result<Code> {
    let mut watch = Watch::start(terminal, args.progress, "restoring")?;
    let result = restore(args, terminal, &mut watch);
    watch.end(result)
}

fn restore(args: &RestoreArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    if args.direct {
        return direct::restore(args, terminal, watch);
    }
    let started = Instant::now();
    let input = Input::open(&args.file, args.lenient)?;
    backend::check(&args.backend.backend)?;
    watch.expect_octets(input.length);
    let restoring = || format!("restoring {}", input.name);
    // The image first: one that cannot be restored makes no host.
    let cancel = watch.interrupt().cancel().clone();
    let image = Image::open(&input, args.lenient, &Overrides::from(args), cancel)
        .map_err(|error| input.blame(error))
        .with_context(restoring)?;
    let host = backend::open_or_create(&args.backend.backend)?;
    let made = image
        .build(&host, Named::AsItSays, args.threads.threads, watch)
        .and_then(|made| input.finish(0).map(|_| made))
        .map_err(|error| input.blame(error))
        .with_context(restoring)?;
    if !args.paused {
        made.unpause()?;
    }
    watch.clear();
    // From here on the domain lives, whatever becomes of what is said about it.
    report(args, terminal, &input, made.keep(), started)?;
    Ok(Code::Fine)
}

/// Say what was done.
fn report(
    args: &RestoreArgs,
    terminal: &Terminal,
    input: &Input,
    about: About,
    started: Instant,
) -> Result<()> {
    let About { name, domid, stats } = about;
    let fate = if args.paused { "paused" } else { "running" };
    let seconds = started.elapsed().as_secs_f64();
    terminal.note(&format!(
        "{name} restored from {} as {domid}: {} of memory, {}, in {seconds:.1} s; it is {fate}",
        input.name,
        size(stats.pages * 4096),
        superpages(&stats),
    ));
    if args.json {
        let document = Report {
            name: &name,
            domid,
            domain: fate,
            file: &input.name,
            pages: stats.pages,
            superpages_1gib: stats.superpages_1gib,
            superpages_2mib: stats.superpages_2mib,
            seconds,
        };
        stdout::report(
            terminal,
            &format!("{name} restored; it is {fate}"),
            &document,
        );
    }
    Ok(())
}

/// The superpages that a domain got, in words.
pub(crate) fn superpages(stats: &RestoreStats) -> String {
    let gibs = Count(stats.superpages_1gib, "1 GiB superpage");
    let small = Count(stats.superpages_2mib, "2 MiB superpage");
    match stats.superpages_1gib {
        0 => small.to_string(),
        _ => format!("{gibs}, {small}"),
    }
}

/// What the command line says of a domain whose image does not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    name: Option<String>,
    kind: Option<GuestKind>,
    vcpus: Option<u32>,
    memory_kib: Option<u64>,
    /// What to call a domain that has no name at all.
    fallback: String,
}

impl Overrides {
    /// Which of them were given, as options.
    fn given(&self) -> Vec<&'static str> {
        [
            ("--name", self.name.is_some()),
            ("--type", self.kind.is_some()),
            ("--vcpus", self.vcpus.is_some()),
            ("--memory", self.memory_kib.is_some()),
        ]
        .into_iter()
        .filter_map(|(option, given)| given.then_some(option))
        .collect()
    }
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
            kind: args.kind.map(|kind| match kind {
                RestoreKind::Pv => GuestKind::Pv,
                RestoreKind::Hvm => GuestKind::Hvm,
                RestoreKind::Pvh => GuestKind::Pvh,
            }),
            vcpus: args.vcpus,
            memory_kib: args.memory.map(|memory| memory.kib),
            fallback: fallback.unwrap_or_else(|| "restored".to_owned()),
        }
    }
}

/// What to build, and the configuration to keep with it.
#[derive(Debug)]
struct Plan {
    json: String,
    name: String,
    kind: GuestKind,
    vcpus: u32,
    max_pages: u64,
    /// Whether the name is the image's own, and not to be chosen.
    name_is_given: bool,
}

/// What a domain is called while it is being built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// What it will be called.
    AsItSays,
    /// Until the sender has let go of it, something else ([`INCOMING`]).
    Incoming,
}

/// What the name of a domain ends with that is being received. C:
/// `tools/xl/xl_vmcontrol.c:create_domain`.
pub(crate) const INCOMING: &str = "--incoming";

/// An image that has been read as far as the libxc stream.
pub(crate) struct Image<'a> {
    reader: RecordReader<ImageSource<'a>>,
    around: Around<ImageSource<'a>>,
    plan: Plan,
}

impl<'a> Image<'a> {
    /// Read the headers, and find out what the domain needs.
    pub(crate) fn open(
        input: &'a Input,
        lenient: bool,
        overrides: &Overrides,
        cancel: Cancel,
    ) -> Result<Self> {
        let options = ReadOptions { lenient, offset: 0 };
        let source = ImageSource::new(&input.file, cancel)?;
        let walk = Walk::open(source, options)?;
        let (reader, around) = walk.into_libxc()?;
        let plan = match around.xl() {
            Some(header) => Plan::from_header(header, overrides)?,
            None => Plan::made_up(
                input,
                lenient,
                overrides,
                reader.offset(),
                reader.domain().guest_type,
            )?,
        };
        Ok(Self {
            reader,
            around,
            plan,
        })
    }

    /// As [`Image::open`], of a stream that must have a configuration.
    pub(crate) fn open_migration(
        input: &'a Input,
        cancel: Cancel,
        limit: &Arc<ReadLimit>,
    ) -> Result<Self> {
        let source = ImageSource::limited(&input.file, cancel, limit)?;
        let walk = Walk::open(source, ReadOptions::default())?;
        let (reader, around) = walk.into_libxc()?;
        let header = around
            .xl()
            .ok_or_else(|| bad("the sender sent no xl header, and so no configuration"))?;
        let plan = Plan::from_header(header, &Overrides::default())?;
        Ok(Self {
            reader,
            around,
            plan,
        })
    }

    /// The name that the domain will have.
    pub(crate) fn name(&self) -> &str {
        &self.plan.name
    }

    /// Make the domain and fill it. It is paused then.
    pub(crate) fn build(
        self,
        host: &MockHost,
        named: Named,
        threads: Option<NonZeroUsize>,
        watch: &mut Watch,
    ) -> Result<Made> {
        let mut made = self.plan.make(host, named)?;
        // Records of emulators may come on either side of the libxc stream.
        let mut emulators: Vec<LibxlRecord> = self
            .around
            .before()
            .iter()
            .filter(|r| of_emulator(r))
            .cloned()
            .collect();
        let options = made.options(threads)?;
        let domain = made.domain.as_ref();
        let mut toolstack = DirectToolstack(domain);
        let (restored, source) = xsr_save_restore::restore(
            domain,
            self.reader,
            &mut toolstack,
            &options,
            &mut |progress| watch.progress(progress),
        )?;
        made.about.stats = restored.stats;
        let offset = source.offset();
        let mut walk = self.around.resume(source, offset);
        while let Some(step) = walk.next_step()? {
            // What nobody needs to understand is not kept.
            if let Content::LibxlRecord(record) = step.content
                && of_emulator(&record)
            {
                emulators.push(record);
            }
        }
        backend::store_emulators(host, made.about.domid, &emulators)?;
        Ok(made)
    }
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
        if !overrides.given().is_empty() {
            let why = "the image has a configuration, which says name, type, vcpus and memory; \
                       --name, --type, --vcpus and --memory are for images without";
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
            name_is_given: true,
        })
    }

    /// A plan for an image without configuration: from the command line, and what
    /// that leaves open from the image, read once more for it. The file stands at
    /// `offset` before and after.
    fn made_up(
        input: &Input,
        lenient: bool,
        overrides: &Overrides,
        offset: u64,
        guest_type: GuestType,
    ) -> Result<Self> {
        let Overrides {
            kind,
            vcpus,
            memory_kib,
            ..
        } = *overrides;
        let (kind, vcpus, memory_kib) = match (kind, vcpus, memory_kib) {
            (Some(kind), Some(vcpus), Some(memory_kib)) => (kind, vcpus, memory_kib),
            _ if !input.is_repeatable() => {
                let why = "the image has no configuration, so it is read twice to find out what \
                           the domain needs: give it as a file, or say --type, --vcpus and \
                           --memory";
                return Err(Error::new(BadUsage(why.to_owned())));
            }
            _ => {
                let found = Survey::of(&input.again()?, lenient)?;
                if input.length.is_some() {
                    let mut file = &input.file;
                    file.seek(SeekFrom::Start(offset))?;
                }
                (
                    kind.map_or_else(|| found.kind(), Ok)?,
                    vcpus.unwrap_or(found.vcpus.max(1)),
                    memory_kib.unwrap_or(found.memory.populated() * 4),
                )
            }
        };
        let is_pv = guest_type == GuestType::X86_PV;
        if is_pv != (kind == GuestKind::Pv) {
            let why = format!(
                "--type {}: the image is of an {guest_type} guest",
                config::kind_name(kind)
            );
            return Err(Error::new(BadUsage(why)));
        }
        let name = overrides.name.as_ref().unwrap_or(&overrides.fallback);
        Ok(Self {
            json: config::make(name, &config::uuid(name, 0), kind, vcpus, memory_kib),
            name: name.clone(),
            kind,
            vcpus,
            max_pages: config::max_pages(memory_kib),
            name_is_given: false,
        })
    }

    /// Make the domain: paused, without memory.
    fn make(&self, host: &MockHost, named: Named) -> Result<Made> {
        let name = &self.name;
        if host.find(name).is_ok() {
            let another = match (named, self.name_is_given) {
                (_, false) => "give this one another with --name",
                (Named::AsItSays, true) => "destroy it first, or restore on another host",
                (Named::Incoming, true) => "destroy or rename it first, or migrate elsewhere",
            };
            return Err(Error::msg(format!(
                "a domain named {name:?} exists already; {another}"
            )));
        }
        let at_first = match named {
            Named::AsItSays => name.clone(),
            Named::Incoming => format!("{name}{INCOMING}"),
        };
        if named == Named::Incoming && host.find(&at_first).is_ok() {
            return Err(Error::msg(format!(
                "a domain named {at_first:?} exists: a migration that broke off left it; see \
                 that the sender still has its own, then destroy this one"
            )));
        }
        let (left, number) = left::guest::arriving(host, name);
        let domid = host
            .create_domain(self.kind, self.vcpus, self.max_pages)
            .with_context(|| format!("making {name}"))?;
        number.get_or_init(|| domid);
        let domain = host.domain(domid).map_err(|error| {
            let left = format!("{domid}, made for {name}, is left here: destroy it by hand");
            Error::new(error).context(LeftBehind(left))
        })?;
        let made = Made::new(domain, domid, name, left);
        let named = match host.rename(domid, &at_first) {
            Err(e) if !self.name_is_given => {
                Err(Error::new(e).context("give the domain a name with --name"))
            }
            result => result.map_err(Error::from),
        };
        match named.and_then(|()| backend::store_config(host, domid, &self.json)) {
            Ok(()) => Ok(made),
            Err(error) => Err(made.given_up(error)),
        }
    }
}

fn bad(what: &str) -> Error {
    Error::new(BadImage(what.to_owned()))
}
