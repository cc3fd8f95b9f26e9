//! `xsr restore`, like `xl restore`: a domain is created, filled from an image, and started.
//!
//! C implementation: `create_domain` in `tools/xl/xl_vmcontrol.c`.

pub(crate) mod checkpoints;
mod colo;
mod direct;
mod made;
mod plan;
mod settings;
mod source;
pub(crate) mod survey;

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::detect::Detected;
use xsr_format::error::ReadErrorCause;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::walk::{Around, Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::{CpuCheck, RestoreError, RestoreRequest};
use xsr_xen_backend::DomId;

pub(crate) use self::made::{About, Made};
use self::plan::RestorePlan;
pub(crate) use self::plan::{Overrides, config_for};
pub(crate) use self::source::{ImageSource, of_old_sender};
use crate::args::RestoreArgs;
use crate::backend::{self, Hypervisor};
use crate::cpu;
use crate::exit::{BadImage, Code};
use crate::file::Input;
use crate::mapped;
use crate::origin;
use crate::peel::LeftOut;
use crate::stdout;
use crate::terminal::Terminal;
use crate::text::{Count, shown_name, size};
use crate::verdict;
use crate::watch::Watch;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct RestoreReport<'a> {
    name: &'a str,
    domid: DomId,
    /// `running` or `paused`.
    domain: &'static str,
    file: &'a str,
    pages: u64,
    superpages_1gib: u64,
    superpages_2mib: u64,
    seconds: f64,
    /// State that came with the image and was not restored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<LeftOut>,
}

/// Restore a domain. After any failure, the domain is destroyed again.
pub(crate) fn run(args: &RestoreArgs, terminal: &Terminal) -> Result<Code> {
    let mut watch = Watch::start(terminal, args.progress, "restoring")?;
    let result = restore(args, terminal, &mut watch);
    watch.end(result)
}

fn restore(args: &RestoreArgs, terminal: &Terminal, watch: &mut Watch) -> Result<Code> {
    let started = Instant::now();
    let backend = &args.backend.backend;
    let input = Input::open(&args.file, args.lenient)?;
    check_index(&input, args)?;
    let direct = match args.direct {
        true => Some(Hypervisor::direct(backend)?),
        false => {
            backend::check(backend)?;
            None
        }
    };
    watch.expect_bytes(input.length);
    let restoring = || format!("restoring {}", input.name);
    // The image is opened first, so that a bad image does not create a host.
    let cancel = watch.interrupt().cancel().clone();
    let overrides = Overrides::of(args)?;
    let mut image = Image::open(&input, args.lenient, &overrides, cancel)
        .map_err(|error| input.blame(error))
        .with_context(restoring)?;
    let host = match direct {
        Some(host) => {
            image.check_direct().with_context(restoring)?;
            host
        }
        None => Hypervisor::open_or_create(backend, false)?,
    };
    let new_uuid = image.new_uuid();
    let made = image
        .build(
            &host,
            Named::AsItSays,
            args.threads.threads,
            cpu::check(args.force),
            watch,
        )
        .and_then(|made| input.finish(0).map(|_| made))
        .map_err(|error| too_small(&input, args.lenient, input.blame(error)))
        .map_err(|error| cpu::advise(error, cpu::RESTORE))
        .with_context(restoring)?;
    if watch.interrupt().cancel().is_cancelled() {
        return Err(made.given_up(RestoreError::Aborted.into())).with_context(restoring);
    }
    if !args.paused {
        made.unpause()?;
    }
    watch.clear();
    // From here on the domain stays, even if it cannot be reported.
    let about = made.keep();
    origin::warn_of_losses(&input, true);
    if let Some(uuid) = new_uuid {
        let name = &about.name;
        terminal.note(&format!("{name} is a clone: it has a new UUID, {uuid}"));
    }
    report(args, terminal, &input, about, started)?;
    Ok(Code::Fine)
}

/// Checks that a mapped image is complete: an unfinished one must not become a guest.
fn check_index(input: &Input, args: &RestoreArgs) -> Result<()> {
    if !args.ignore_index {
        mapped::index_of(input, args.lenient)?;
    }
    Ok(())
}

/// The error if filling the domain failed. If the configuration allows less memory than the guest
/// has, the message is that of `xsr verify`, and the image is to blame.
fn too_small(input: &Input, lenient: bool, error: Error) -> Error {
    let most = match error.downcast_ref() {
        Some(RestoreError::NoMemory {
            tot_pages,
            max_pages,
            ..
        }) if tot_pages >= max_pages => *max_pages,
        _ => return error,
    };
    let again = || survey::of(&input.again()?.unwrapped(lenient)?, lenient);
    let words = match input.is_repeatable().then(again) {
        Some(Ok(found)) if found.populated_pages > most => {
            verdict::too_many_pages(found.populated_pages, most)
        }
        Some(_) => return error,
        None => BadImage(format!(
            "the guest has more pages than the {most} that its configuration allows"
        )),
    };
    Error::new(words)
}

/// Report the new domain.
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
        let document = RestoreReport {
            name: &name,
            domid,
            domain: fate,
            file: &input.name,
            pages: stats.pages,
            superpages_1gib: stats.superpages_1gib,
            superpages_2mib: stats.superpages_2mib,
            seconds,
            left_out: input.left_out(),
        };
        stdout::report(
            terminal,
            &format!("{name} restored; it is {fate}"),
            &document,
        );
    }
    Ok(())
}

/// The domain's superpages, in words.
pub(crate) fn superpages(stats: &RestoreStats) -> String {
    let gibs = Count(stats.superpages_1gib, "1 GiB superpage");
    let small = Count(stats.superpages_2mib, "2 MiB superpage");
    match stats.superpages_1gib {
        0 => small.to_string(),
        _ => format!("{gibs}, {small}"),
    }
}

/// The domain's name while it is being built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// Its final name.
    AsItSays,
    /// A temporary name ([`INCOMING`]), until the sender has let go of it.
    Incoming,
    /// The same for a domain that runs when the sender is lost, even if it cannot have its final
    /// name.
    StandingBy,
}

/// The suffix of the name of a domain that is being received. C:
/// `tools/xl/xl_vmcontrol.c:create_domain`.
pub(crate) const INCOMING: &str = "--incoming";

/// An image that has been read up to the libxc stream.
pub(crate) struct Image<'a> {
    reader: RecordReader<ImageSource<'a>>,
    around: Around<ImageSource<'a>>,
    plan: RestorePlan,
}

/// The longest name that a peer may give its domain, in bytes.
const LONGEST_NAME: usize = 1024;

impl<'a> Image<'a> {
    /// Read the headers, and determine what the domain needs.
    pub(crate) fn open(
        input: &'a Input,
        lenient: bool,
        overrides: &Overrides,
        cancel: Cancel,
    ) -> Result<Self> {
        let options = ReadOptions { lenient, offset: 0 };
        let source = ImageSource::new(&input.image, cancel)?;
        let walk = Walk::open(source, options)?;
        let (reader, around) = walk.into_libxc()?;
        let plan = RestorePlan::of(
            Some(input),
            around.xl(),
            overrides,
            lenient,
            reader.domain().guest_type,
        )?;
        plan.check(reader.image(), reader.domain())?;
        Ok(Self {
            reader,
            around,
            plan,
        })
    }

    /// Read the headers of a sender's image, and determine what the domain needs.
    pub(crate) fn open_migration(source: ImageSource<'a>) -> Result<Self> {
        let walk =
            Walk::open(source, ReadOptions::default()).map_err(|error| match error.cause {
                // The message must not speak of an empty file.
                ReadErrorCause::Unreadable(Detected::Empty) => {
                    Error::msg("the sender hung up before it sent anything")
                }
                _ => Error::new(error),
            })?;
        let (reader, around) = walk.into_libxc()?;
        let header = around
            .xl()
            .ok_or_else(|| bad("the sender sent no xl header, and so no configuration"))?;
        let plan = RestorePlan::of(
            None,
            Some(header),
            &Overrides::default(),
            false,
            reader.domain().guest_type,
        )?;
        plan.check(reader.image(), reader.domain())?;
        // Checked before the name is shown anywhere.
        if plan.name.len() > LONGEST_NAME || plan.name.contains(char::is_control) {
            let name = shown_name(&plan.name);
            return Err(bad(&format!(
                "the sender names its domain {name}: a name has at most {LONGEST_NAME} bytes and \
                 no control characters"
            )));
        }
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

    /// The new UUID of a domain whose name differs from the image's.
    pub(crate) fn new_uuid(&self) -> Option<String> {
        self.plan.new_uuid.clone()
    }

    /// Refuses a domain that only libxl can create (`--direct`).
    ///
    /// # Errors
    ///
    /// What libxl is needed for, and what to do.
    pub(crate) fn check_direct(&mut self) -> Result<()> {
        direct::check(&mut self.plan)
    }

    /// Create the domain and fill it. It is paused afterwards.
    pub(crate) fn build(
        mut self,
        host: &Hypervisor,
        named: Named,
        threads: Option<NonZeroUsize>,
        cpu: CpuCheck,
        watch: &mut Watch,
    ) -> Result<Made> {
        let mut made = self.plan.make(host, named)?;
        // Emulator records may come before or after the libxc stream.
        let mut emulators = self.around.take_before();
        emulators.retain(of_emulator);
        let rings = made.rings()?;
        let domain = made.domain.as_ref();
        let mut toolstack = made.toolstack();
        let (restored, source) = RestoreRequest::new(domain, rings)
            .threads(threads)
            .cpu(cpu)
            .observe(&mut |progress| watch.progress(progress))
            .read_stream(self.reader, &mut toolstack)?;
        let offset = source.offset();
        let mut walk = self.around.resume(source, offset);
        while let Some(step) = walk.next_step()? {
            // Records that are not needed are dropped.
            if let Content::LibxlRecord(record) = step.content
                && of_emulator(&record)
            {
                emulators.push(record);
            }
        }
        backend::store_emulators(made.store(), made.which(), &emulators)?;
        made.connect(&restored)?;
        Ok(made)
    }
}

/// Whether a record holds an emulator's state.
fn of_emulator(record: &LibxlRecord) -> bool {
    matches!(
        record,
        LibxlRecord::EmulatorXenstoreData { .. } | LibxlRecord::EmulatorContext { .. }
    )
}

fn bad(what: &str) -> Error {
    Error::new(BadImage(what.to_owned()))
}
