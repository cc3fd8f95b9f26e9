//! `xsr demo`: a full round trip on mock machines. Domains of every kind are saved on one machine,
//! their images verified, restored on another, saved there, and compared page by page.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::statvfs::statvfs;
use serde::Serialize;
use tempfile::TempDir;
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{CpuCheck, SaveOptions};
use xsr_xen_backend::domain_store::DomainRef;
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{DomId, GuestKind};

use super::{diff, mock, restore, save};
use crate::args::{DemoArgs, ProgressArg};
use crate::backend::{self, Hypervisor};
use crate::config;
use crate::exit::Code;
use crate::file::Input;
use crate::image::Reading;
use crate::left::Left;
use crate::output::{Existing, Output, OutputPlan};
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::size;
use crate::watch::Watch;

/// A domain of the demo.
struct Guest {
    name: &'static str,
    /// The name of its kind for the user.
    what: &'static str,
    kind: GuestKind,
    width: u8,
    memory_mib: u64,
    vcpus: u32,
}

const GUESTS: [Guest; 4] = [
    Guest {
        name: "web",
        what: "PV 64-bit",
        kind: GuestKind::Pv,
        width: 8,
        memory_mib: 256,
        vcpus: 4,
    },
    Guest {
        name: "mail",
        what: "PV 32-bit",
        kind: GuestKind::Pv,
        width: 4,
        memory_mib: 64,
        vcpus: 1,
    },
    Guest {
        name: "database",
        what: "PVH",
        kind: GuestKind::Pvh,
        width: 8,
        memory_mib: 256,
        vcpus: 2,
    },
    Guest {
        name: "desktop",
        what: "HVM",
        kind: GuestKind::Hvm,
        width: 8,
        memory_mib: 128,
        vcpus: 2,
    },
];

/// The most space that the demo's files need: both machines and two images.
const ROOM: u64 = 2 << 30;

/// Run the demo. Nothing is left on the disk, whatever happens.
pub(crate) fn run(args: &DemoArgs, terminal: &Terminal) -> Result<Code> {
    let no_lines = ProgressArg { progress_fd: None };
    let watch = Watch::start(terminal, no_lines, "making")?;
    let started = Instant::now();
    let (left, place) = Left::directory(scratch, TempDir::path)?;
    left.until_the_end();
    let mut demo = Demo {
        one: host(&place.path().join("one"), 1)?,
        other: host(&place.path().join("other"), 2)?.into(),
        dir: place.path(),
        terminal,
        watch,
    };
    let mut out: Box<dyn Write> = match args.json {
        true => Box::new(io::sink()),
        false => Box::new(Results::new()),
    };
    let mut report = DemoReport::default();
    writeln!(
        out,
        "Two mock machines in {}; {} domains on the first.\n",
        place.path().display(),
        GUESTS.len()
    )?;
    let domains = demo.make()?;
    writeln!(
        out,
        "{:<9} {:<10} {:>9}  {:>24}  {:>8}  {:>24}  pages compared",
        "domain", "kind", "memory", "save", "verify", "restore"
    )?;
    let mut totals = Row::default();
    for (guest, domid) in GUESTS.iter().zip(domains) {
        let row = demo.domain(guest, domid)?;
        let memory = size(guest.memory_mib << 20);
        writeln!(
            out,
            "{:<9} {:<10} {memory:>9}  {:>24}  {:>8}  {:>24}  {}, all the same",
            guest.name,
            guest.what,
            speed(row.bytes, row.save),
            milliseconds(row.verify),
            speed(row.bytes, row.restore),
            row.compared
        )?;
        out.flush()?;
        report.domains.push(Came::of(guest, &row));
        totals.add(&row);
    }
    let (saving, restoring) = (
        speed(totals.bytes, totals.save),
        speed(totals.bytes, totals.restore),
    );
    writeln!(
        out,
        "\nEvery domain came back on the other machine. All {} pages are identical, except those \
         that a restore always rewrites (docs/images.md).\nSaved {} in {saving}, restored in \
         {restoring}; {:.1} s in all.",
        totals.compared,
        size(totals.bytes),
        started.elapsed().as_secs_f64()
    )?;
    out.flush()?;
    if args.json {
        report.pages_compared = totals.compared;
        report.seconds = started.elapsed().as_secs_f64();
        let mut out = Results::new();
        out.json(&report)?;
        out.finish()?;
    }
    let path = place.path().to_owned();
    drop(demo);
    place
        .close()
        .with_context(|| format!("removing {}", path.display()))?;
    Ok(Code::Fine)
}

/// What `--json` prints (docs/json.md).
#[derive(Debug, Default, Serialize)]
struct DemoReport {
    domains: Vec<Came>,
    pages_compared: u64,
    seconds: f64,
}

/// A domain after the round trip.
#[derive(Debug, Serialize)]
struct Came {
    name: &'static str,
    kind: &'static str,
    bits: u8,
    memory_kib: u64,
    page_data_bytes: u64,
    save_seconds: f64,
    verify_seconds: f64,
    restore_seconds: f64,
    pages_compared: u64,
}

impl Came {
    fn of(guest: &Guest, row: &Row) -> Self {
        Self {
            name: guest.name,
            kind: config::kind_name(guest.kind),
            bits: guest.width * 8,
            memory_kib: guest.memory_mib << 10,
            page_data_bytes: row.bytes,
            save_seconds: row.save.as_secs_f64(),
            verify_seconds: row.verify.as_secs_f64(),
            restore_seconds: row.restore.as_secs_f64(),
            pages_compared: row.compared,
        }
    }
}

/// A temporary directory, in memory if there is room, so that disks do not affect the figures.
fn scratch() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let room = |path: &Path| {
        let stat = statvfs(path).ok()?;
        Some(stat.blocks_available() * stat.fragment_size())
    };
    let dir = match room(memory).is_some_and(|bytes| bytes >= ROOM) {
        true => memory.to_owned(),
        false => std::env::temp_dir(),
    };
    if let Some(bytes) = room(&dir).filter(|bytes| *bytes < ROOM) {
        bail!(
            "the demo needs {} in {}, where {} are left; set TMPDIR to a directory with more",
            size(ROOM),
            dir.display(),
            size(bytes)
        );
    }
    tempfile::Builder::new()
        .prefix(&format!("xsr-demo-{}-", std::process::id()))
        .tempdir_in(&dir)
        .with_context(|| dir.display().to_string())
}

fn host(dir: &Path, seed: u64) -> Result<MockHost> {
    // Another seed gives another order of machine frames, so that no page keeps its mfn.
    let config = HostConfig {
        seed,
        memory_pages: (1 << 30) >> 12,
        ..HostConfig::default()
    };
    Ok(MockHost::create(dir, &config)?)
}

/// The machines, and the directory of the images.
struct Demo<'a> {
    one: MockHost,
    other: Hypervisor,
    dir: &'a Path,
    terminal: &'a Terminal,
    watch: Watch,
}

/// Times and sizes of one domain.
#[derive(Default)]
struct Row {
    /// Bytes of page contents.
    bytes: u64,
    save: Duration,
    verify: Duration,
    restore: Duration,
    /// Pages whose contents were compared.
    compared: u64,
}

impl Row {
    fn add(&mut self, row: &Self) {
        self.bytes += row.bytes;
        self.save += row.save;
        self.verify += row.verify;
        self.restore += row.restore;
        self.compared += row.compared;
    }
}

impl Demo<'_> {
    fn make(&self) -> Result<Vec<DomId>> {
        let mut made = Vec::new();
        let bar = self.terminal.progress("making");
        for (i, guest) in (0_u64..).zip(&GUESTS) {
            let spec = GuestSpec {
                width: guest.width,
                vcpus: guest.vcpus,
                seed: i,
                ..GuestSpec::new(guest.name, guest.kind, guest.memory_mib)
            };
            bar.steps(i, GUESTS.len() as u64);
            made.push(mock::create_guest(&self.one, &spec)?);
            if self.watch.interrupt().cancel().is_cancelled() {
                bail!("interrupted");
            }
        }
        Ok(made)
    }

    /// Save, verify, restore, save again, compare.
    fn domain(&mut self, guest: &Guest, domid: DomId) -> Result<Row> {
        let name = guest.name;
        let image = self.dir.join(format!("{name}.save"));
        let again = self.dir.join(format!("{name}.again.save"));
        let started = Instant::now();
        let one = Hypervisor::from(self.one.clone());
        let bytes = self.save(&one, domid, &image)?;
        let save = started.elapsed();

        let started = Instant::now();
        let reading = Reading { lenient: false };
        reading.over(&Input::open(&image, false)?, &mut |_| Ok(()))?;
        let verify = started.elapsed();

        let started = Instant::now();
        let restored = self.restore(&image)?;
        let restore = started.elapsed();

        self.save(&self.other.clone(), restored, &again)?;
        let comparison = diff::files(&image, &again, self.terminal)?;
        if comparison.differ() {
            bail!(
                "{name} came back with differences: this is a bug in xsr. To see the differences, use \
                 `xsr diff --after-restore` after saving, restoring and saving such a domain"
            );
        }
        remove(&image)?;
        remove(&again)?;
        Ok(Row {
            bytes,
            save,
            verify,
            restore,
            compared: comparison.pages_compared,
        })
    }

    /// Save a domain, which is then destroyed. Returns its bytes of page data.
    fn save(&mut self, host: &Hypervisor, domid: DomId, to: &Path) -> Result<u64> {
        let domain = host.domain(domid)?;
        let which = DomainRef::from(&domain.info()?);
        let output = Output::open(&OutputPlan {
            path: to,
            inputs: &[],
            existing: Existing::Replace,
            only_copy: true,
        })?;
        let mut toolstack = DirectToolstack(&*domain);
        let job = save::Job {
            host: &**host,
            which,
            domain: &*domain,
            form: save::Form::Xl,
            options: SaveOptions::default(),
        };
        self.watch.now("saving");
        let cancel = self.watch.interrupt().cancel().clone();
        let sink = FdSink::cancellable(output.file(), cancel)?;
        let written = job.write(&mut toolstack, sink, None, None, &mut self.watch)?;
        self.watch.clear();
        output.finish()?;
        let bytes = written.saved.stats().pages * 4096;
        written.saved.keep_suspended();
        backend::destroy(&**host, which, "the domain")?;
        Ok(bytes)
    }

    fn restore(&mut self, from: &Path) -> Result<DomId> {
        let input = Input::open(from, false)?;
        self.watch.now("restoring");
        self.watch.expect_bytes(input.length);
        let cancel = self.watch.interrupt().cancel().clone();
        let image = restore::Image::open(&input, false, &restore::Overrides::default(), cancel)?;
        let made = image.build(
            &self.other,
            restore::Named::AsItSays,
            None,
            CpuCheck::Refuse,
            &mut self.watch,
        )?;
        self.watch.clear();
        made.unpause()?;
        Ok(made.keep().domid)
    }
}

fn remove(image: &Path) -> Result<()> {
    fs::remove_file(image).with_context(|| image.display().to_string())
}

fn seconds(duration: Duration) -> String {
    format!("{:.3} s", duration.as_secs_f64())
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

fn speed(bytes: u64, duration: Duration) -> String {
    let microseconds = duration.as_micros().max(1);
    let rate = u128::from(bytes) * 1_000_000 / microseconds;
    let rate = size(u64::try_from(rate).unwrap_or(u64::MAX));
    format!("{} ({rate}/s)", seconds(duration))
}
