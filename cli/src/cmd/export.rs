//! `xsr export`: writes a guest's memory from an image, as an ELF core (in `xl dump-core`'s layout,
//! or for gdb) or as raw physical memory.
//!
//! If a stream has several versions of a page, the last one counts. So the image is read twice:
//! once to find the last version of each page, once to copy the pages in the order of their pfns.
//! Only the map of the pages is kept in memory.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write};
use std::mem;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Error, Result, bail};
use clap::ValueEnum as _;
use serde::Serialize;
use xsr_format::core_dump::{CoreDump, vcpu_context_of_hvm};
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::fields::pv::VCPU_CONTEXT_64;
use xsr_format::fields::{self, Layout, Value};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::guest_image::GuestImage;
use xsr_format::image::GuestType;
use xsr_format::record::pv::PvInfo;
use xsr_format::walk::Content;
use xsr_save_restore::storage::StorageCursor;

use crate::args::images::{ExportArgs, ExportFormat};
use crate::exit::{BadImage, BadUsage, Code};
use crate::file::Input;
use crate::image::{FileStep, Reading};
use crate::output::{Existing, Output, OutputPlan, Sink};
use crate::page_map::{PageMap, Run, runs_of};
use crate::stdout::report;
use crate::terminal::Terminal;
use crate::text::size;

mod gdb;

use gdb::{Paging, Vcpu};

const PAGE: u64 = PAGE_SIZE as u64;
/// The zeros that raw memory may hold in addition to four times the guest's memory: holes for
/// devices.
const MOST_ZEROS: u64 = 8 << 30;
/// Pages per copy.
const STEP: u64 = 256;

/// Export a guest's memory.
pub(crate) fn run(args: &ExportArgs, terminal: &Terminal) -> Result<Code> {
    let usage = |why: &str| Err(Error::new(BadUsage(why.to_owned())));
    if (args.sparse || args.no_sparse) && args.format != ExportFormat::Raw {
        return usage("--sparse and --no-sparse are for --format raw: a core has no holes");
    }
    if args.pfn_list && args.format != ExportFormat::Elf {
        return usage("--pfn-list is for --format elf: the others have no list of pages");
    }
    if args.vcpu.is_some() && args.format != ExportFormat::Gdb {
        return usage("--vcpu is for --format gdb: the others are not of one address space");
    }
    // Checked before anything is read, above all before an image is unwrapped.
    let output = Output::open(&OutputPlan {
        path: (args.output.as_deref().or(args.out.as_deref())).unwrap_or(Path::new("-")),
        inputs: &[&args.file],
        existing: Existing::forced(args.overwrite.force),
        only_copy: false,
    })?;
    output.check_json(args.json)?;
    let name = output.name().to_owned();
    let input = Input::open_seekable(&args.file, args.lenient, terminal)?;
    input.seekable("export reads an image twice")?;
    let mut contents = Contents::default();
    contents.core.translated = args.pfn_list;
    let reading = Reading {
        lenient: args.lenient,
    };
    let bar = input.follow(terminal, "reading");
    let walked = reading.over(&input, &mut |step| {
        contents.step(&step)?;
        Ok(())
    })?;
    if let Some(guest) = walked.guest {
        contents.take_guest(guest);
    }
    drop(bar);
    let bar = output.follow(terminal, "exporting", Some(contents.pages() * PAGE));
    let started = Instant::now();
    let (written, _) = output.fill(|sink| {
        match args.format {
            ExportFormat::Elf => contents.elf(&input.image, sink),
            ExportFormat::Gdb => contents.gdb(&input.image, sink, args.vcpu.unwrap_or(0)),
            ExportFormat::Raw => contents.raw(&input.image, sink, !args.no_sparse),
        }
        .with_context(|| format!("exporting {}", input.name))
    })?;
    drop(bar);
    let pages = contents.pages();
    let done = format!(
        "{} of memory of {} exported to {name}",
        size(pages * PAGE),
        input.name,
    );
    terminal.note(&done);
    if args.json {
        let document = ExportReport {
            file: &input.name,
            format: args
                .format
                .to_possible_value()
                .map_or_else(String::new, |value| value.get_name().to_owned()),
            pages,
            bytes: written,
            seconds: started.elapsed().as_secs_f64(),
        };
        report(terminal, &done, &document);
    }
    tracing::debug!(written, "bytes");
    Ok(Code::Fine)
}

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct ExportReport<'a> {
    file: &'a str,
    format: String,
    pages: u64,
    bytes: u64,
    seconds: f64,
}

/// The parts of an image that go into an export.
#[derive(Debug, Default)]
struct Contents {
    map: PageMap,
    core: CoreDump,
    /// Registers of a PV guest's vcpus.
    vcpus: BTreeMap<u32, Vec<u8>>,
    /// The vcpus of an HVM or PVH guest, for gdb.
    hvm_vcpus: Vec<Vcpu>,
}

impl Contents {
    fn step(&mut self, step: &FileStep<'_, '_>) -> Result<(), BadImage> {
        match &step.content {
            Content::Headers(_, domain) => {
                self.core.hvm = domain.guest_type == GuestType::X86_HVM;
                self.core.xen = (domain.xen_major, domain.xen_minor);
            }
            Content::PageData(body) => {
                for run in runs_of(body.entries().iter(), body.pages_offset()) {
                    self.map.insert(run)?;
                }
            }
            Content::XlHeader(_)
            | Content::LibxlHeader(_)
            | Content::LibxlRecord(_)
            | Content::Record(_) => {}
        }
        Ok(())
    }

    /// Take over what the records say about the guest.
    fn take_guest(&mut self, guest: GuestImage) {
        self.core.bits_32 = guest.pv_info() == Some(PvInfo::Bits32);
        self.core.shared_info = guest
            .shared_info()
            .map_or_else(Vec::new, |page| page.to_vec());
        // The context has been checked: it has each vcpu once, and at most 128.
        self.hvm_vcpus = HvmContext::new(guest.hvm_context())
            .map_while(Result::ok)
            .filter(|record| record.kind == HvmRecordKind::CPU)
            .map(|record| Vcpu {
                number: record.instance.into(),
                context: vcpu_context_of_hvm(record.body),
                paging: paging_of_hvm(record.body),
            })
            .collect();
        let vcpus = guest.into_vcpus().into_iter();
        self.vcpus = vcpus
            .map(|(number, vcpu)| (number, vcpu.basic))
            .filter(|(_, basic)| !basic.is_empty())
            .collect();
    }

    /// The pages that have contents, ascending.
    fn runs(&self) -> impl Iterator<Item = Run> {
        self.map.runs().filter(|run| run.page_type.has_data())
    }

    fn pages(&self) -> u64 {
        self.runs().map(|run| run.pages()).sum()
    }

    /// Write an ELF core. Returns the number of bytes written.
    fn elf(&mut self, image: &StorageCursor, out: &mut Sink<'_>) -> Result<u64> {
        let mut core = mem::take(&mut self.core);
        core.pages = self.pages();
        core.vcpus = match core.hvm {
            true => (mem::take(&mut self.hvm_vcpus).into_iter())
                .map(|vcpu| vcpu.context)
                .collect(),
            false => mem::take(&mut self.vcpus).into_values().collect(),
        };
        let mut head = BufWriter::new(&mut *out);
        core.write_head(&mut head)?;
        for run in self.runs() {
            for pfn in run.first..=run.last {
                head.write_all(&core.entry(pfn))?;
            }
        }
        io::copy(&mut io::repeat(0).take(core.padding()), &mut head)?;
        head.flush()?;
        drop(head);
        for run in self.runs() {
            copy(image, run.offset, run.pages() * PAGE, out)?;
        }
        Ok(core.pages_offset() + core.pages * PAGE)
    }

    /// Write a core for gdb. Returns the number of bytes written.
    fn gdb(&mut self, image: &StorageCursor, out: &mut Sink<'_>, view: u32) -> Result<u64> {
        let vcpus: Vec<Vcpu> = match self.core.hvm {
            true => mem::take(&mut self.hvm_vcpus),
            false if self.core.bits_32 => bail!(
                "--format gdb has the registers of 64 bits, and this is a PV guest of 32: take \
                 --format elf or raw"
            ),
            false => (mem::take(&mut self.vcpus).into_iter())
                .map(|(number, context)| Vcpu {
                    number,
                    paging: Paging::Four(word(&VCPU_CONTEXT_64, &context, "ctrlreg[3]")),
                    context,
                })
                .collect(),
        };
        let head = gdb::head(&vcpus, view, &self.map, image)?;
        out.write_all(&head)?;
        for run in self.runs() {
            copy(image, run.offset, run.pages() * PAGE, out)?;
        }
        Ok(head.len() as u64 + self.pages() * PAGE)
    }

    /// Write physical memory: each page at its own address.
    fn raw(&self, image: &StorageCursor, out: &mut Sink<'_>, sparse: bool) -> Result<u64> {
        let sparse = sparse && out.takes_holes();
        // Pages without contents after the last one with contents are part of the guest's memory.
        // The format has no pfn beyond 2^40, so no address overflows.
        let end = self
            .map
            .runs()
            .last()
            .map_or(0, |run| (run.last + 1) * PAGE);
        let held = self.pages() * PAGE;
        if end - held > MOST_ZEROS + 4 * held {
            let (end, held) = (size(end), size(held));
            let why = format!(
                "the guest's last page is at {end}, but it has only {held} of memory: the image is \
                 probably damaged"
            );
            match sparse {
                true => tracing::warn!("{why}"),
                false => bail!("{why}; a file with holes (without --no-sparse) takes little room"),
            }
        }
        let mut at = 0;
        for run in self.runs() {
            gap(out, run.first * PAGE - at, sparse)?;
            match sparse {
                true => without_zeros(image, run, out)?,
                false => copy(image, run.offset, run.pages() * PAGE, out)?,
            }
            at = (run.last + 1) * PAGE;
        }
        gap(out, end - at, sparse)?;
        if sparse {
            out.file().set_len(end).context("a sparse file")?;
        }
        Ok(end)
    }
}

/// The number in a field of a blob; 0 if the blob has no such field.
fn word(layout: &Layout, blob: &[u8], name: &str) -> u64 {
    let field = fields::fields(layout, blob).find(|field| field.name == name);
    match field.map(|field| field.value) {
        Some(Value::Hex(number)) => number,
        _ => 0,
    }
}

/// How the vcpu of a CPU record (`struct hvm_hw_cpu`) translates addresses.
fn paging_of_hvm(cpu: &[u8]) -> Paging {
    let layout = HvmRecordKind::CPU.layout(cpu.len());
    let register = |name| layout.map_or(0, |layout| word(layout, cpu, name));
    Paging::of_registers(
        register("cr0"),
        register("cr3"),
        register("cr4"),
        register("msr_efer"),
    )
}

/// Copy a part of the image.
fn copy(mut image: &StorageCursor, offset: u64, bytes: u64, out: &mut Sink<'_>) -> Result<()> {
    image.seek(SeekFrom::Start(offset))?;
    let copied = out.copy(image, bytes)?;
    match copied == bytes {
        true => Ok(()),
        false => Err(Error::from(io::Error::from(io::ErrorKind::UnexpectedEof))),
    }
}

/// Leave a hole, or write zeros.
fn gap(out: &mut Sink<'_>, bytes: u64, sparse: bool) -> Result<()> {
    match (bytes, sparse) {
        (0, _) => Ok(()),
        (_, true) => out.leave_hole(bytes).context("leaving a hole in the file"),
        (_, false) => Ok(out.write_zeros(bytes)?),
    }
}

/// Copy a run, with holes in place of zero pages.
fn without_zeros(image: &StorageCursor, run: Run, out: &mut Sink<'_>) -> Result<()> {
    let mut room = vec![0; usize::try_from(STEP * PAGE)?];
    let mut first = run.first;
    while first <= run.last {
        let pages = STEP.min(run.last - first + 1);
        let room = &mut room[..usize::try_from(pages * PAGE)?];
        image.read_exact_at(room, run.offset + (first - run.first) * PAGE)?;
        for page in room.chunks(PAGE_SIZE) {
            match page.iter().all(|byte| *byte == 0) {
                true => gap(out, PAGE, true)?,
                false => out.write_all(page)?,
            }
        }
        first += pages;
    }
    Ok(())
}
