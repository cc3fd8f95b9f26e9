//! `xsr inspect`: the contents of an image, in the order of the file, and the guest's properties.

mod facts;
mod host;
mod named;
mod page;
mod print;
mod report;

use anyhow::{Context as _, Result};
use xsr_format::byte_order::ByteOrder;
use xsr_format::fields::hvm::{HvmContext, param_name};
use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_format::guest_image::GuestImage;
use xsr_format::image::{DomainHeader, GuestType, ImageHeader};
use xsr_format::record::page_data::Entries;
use xsr_format::record::pv::PvInfo;
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::walk::Content;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use self::facts::{PageFacts, RecordFacts, kind_name, type_facts};
use self::report::{
    ContextEntry, InspectReport, LibxcReport, LibxlReport, PagesReport, Param, Row, XlReport,
};
use crate::args::InspectArgs;
use crate::config::{self, Config};
use crate::exit::{self, BadImage, Code};
use crate::file::Input;
use crate::image::{self, At, FileStep, Reading, Walked};
use crate::mapped;
use crate::origin::Origin;
use crate::page_map::{PageMap, runs_of};
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::verdict::{self, Warning};

/// A longer configuration is shown as its length alone. No real configuration is that long, and
/// small JSON can be large when it is pretty-printed.
const MOST_SHOWN: usize = 100 << 10;

/// The most rows, and the most runs of pages in them, that are listed. Further ones are only
/// counted.
const MOST_ROWS: usize = 1 << 18;
const MOST_RUNS: usize = 1 << 20;
/// Fields of blobs are named only in this many rows from the first, and at most this many fields.
const MOST_NAMED: usize = 1 << 15;
const MOST_FIELDS: usize = 1 << 18;

/// Inspect one image. If it is bad, what could be read is shown before the error.
pub(crate) fn run(args: &InspectArgs, terminal: &Terminal) -> Result<Code> {
    if let Some(pfn) = args.page {
        return page::run(args, pfn, terminal);
    }
    let input = Input::open(&args.file, args.lenient)?;
    // A bad index is reported at the end, because the image's contents are still worth seeing.
    let index = match args.ignore_index {
        true => Ok(None),
        false => mapped::index_of(&input, args.lenient),
    };
    let reading = Reading {
        lenient: args.lenient,
    };
    let mut inspection = Inspection::new(&input.name, args.pages, args.fields);
    let mut walked = Walked {
        guest: None,
        bytes: 0,
    };
    let mut visit = |step: FileStep<'_, '_>| {
        inspection.step(&step)?;
        Ok(())
    };
    let end = reading.walk(&input, &mut visit, &mut walked);
    inspection.take_guest(walked.guest.as_ref());
    let end = end.and_then(|()| {
        if args.fields {
            inspection.start_info(&input)?;
        }
        (input.finish(walked.bytes)).with_context(|| input.name.clone())
    });
    let verdict = inspection.verdict(walked.guest.as_ref(), input.origin());
    let (mut report, any) = inspection.finish();
    report.layers = input.layers().to_vec();
    if let Some(origin) = input.origin() {
        report.said_by(origin);
    }
    report.left_out = input.left_out();
    report.notes = input.notes();
    let index = index.map(|index| {
        report.mapped = index.as_ref().map(mapped::MappedFacts::of);
        report.layout = index.as_ref().map(mapped::words);
    });
    let end = end.and_then(|trailing| index.map(|()| trailing));
    let end = end.and_then(|trailing| {
        let warnings = verdict.with_context(|| input.name.clone())?;
        Ok((trailing, warnings))
    });
    let code = match end {
        Ok((trailing, warnings)) => {
            report.bytes = walked.bytes;
            // The bytes after a mapped image are its index.
            let behind = trailing.filter(|_| report.mapped.is_none());
            let behind = behind.unwrap_or_default();
            report.trailing_bytes = behind.bytes;
            let behind = verdict::trailing(walked.bytes, &behind);
            let warnings = warnings.into_iter().chain(behind);
            report.warnings = warnings.map(|warning| warning.0).collect();
            Code::Fine
        }
        Err(e) if !any => return Err(e),
        Err(e) => {
            report.bytes = input.length.unwrap_or(0);
            report.error = Some(exit::words(e.chain().skip(1)));
            terminal.error(&e);
            exit::code_of(&e)
        }
    };
    let mut out = Results::new();
    match args.json {
        true => out.json(&report)?,
        false => print::print(&report, out.width(), &mut out)?,
    }
    out.finish()?;
    Ok(code)
}

/// A report being built.
struct Inspection {
    report: InspectReport,
    /// Whether to list every page entry.
    list: bool,
    /// Runs listed so far.
    listed: usize,
    /// Whether to name every field of the blobs.
    fields: bool,
    /// Fields named so far.
    named: usize,
    /// The width of a PV guest.
    info: PvInfo,
    map: PageMap,
    /// The start_info page of a PV guest.
    start_info: Option<Pfn>,
    /// Whether the image had any content.
    any: bool,
    /// The first thing that makes the image bad apart from the rules of the format.
    bad: Option<String>,
    config: Option<Config>,
    headers: Option<(ImageHeader, DomainHeader)>,
}

impl Inspection {
    fn new(file: &str, list: bool, fields: bool) -> Self {
        Self {
            report: InspectReport {
                file: file.to_owned(),
                ..InspectReport::default()
            },
            list,
            listed: 0,
            fields,
            named: 0,
            info: PvInfo::Bits64,
            map: PageMap::default(),
            start_info: None,
            any: false,
            bad: None,
            config: None,
            headers: None,
        }
    }

    fn step(&mut self, step: &FileStep<'_, '_>) -> Result<(), BadImage> {
        self.any = true;
        let at = At::of(step);
        match &step.content {
            Content::XlHeader(header) => self.xl(header),
            Content::LibxlHeader(header) => self.libxl(*header),
            Content::Headers(image, domain) => self.libxc(*image, *domain),
            Content::LibxlRecord(record) => self.libxl_record(at, record),
            Content::Record(record) => self.record(at, record),
            Content::PageData(body) => self.pages(at, body.entries(), body.pages_offset())?,
        }
        Ok(())
    }

    fn xl(&mut self, header: &XlHeader) {
        let json = header.json().ok().flatten();
        let host_uses = json.map(host::uses).unwrap_or_default();
        self.report.xl = Some(XlReport {
            byte_order: order(header.byte_order()),
            mandatory_flags: header.mandatory_flags(),
            optional_flags: header.optional_flags(),
            config_bytes: header.config().map_or(0, <[u8]>::len),
            config: json
                .filter(|json| json.len() <= MOST_SHOWN)
                .and_then(|json| serde_json::from_str(json).ok()),
            host_uses: host_uses.listed,
            host_uses_left_out: host_uses.left_out,
        });
        if let Some(origin) = Origin::of_xl(header) {
            self.report.said_by(&origin);
        }
        match verdict::config_of(header) {
            Ok(Some((_, config))) => {
                let guest = &mut self.report.guest;
                guest.name = Some(config.name.clone());
                guest.uuid.clone_from(&config.uuid);
                guest.kind = Some(config::kind_name(config.kind));
                guest.max_memory_kib = Some(config.max_memory_kib);
                self.config = Some(config);
            }
            Ok(None) => {}
            // An image that a restore would refuse is still worth inspecting.
            Err(bad) => self.bad = Some(bad.0),
        }
    }

    fn libxl(&mut self, header: LibxlHeader) {
        self.report.libxl = Some(LibxlReport {
            version: LibxlHeader::VERSION,
            byte_order: order(header.order),
            legacy_converted: header.legacy_converted,
        });
    }

    fn libxc(&mut self, image: ImageHeader, domain: DomainHeader) {
        self.headers = Some((image, domain));
        self.report.libxc = Some(LibxcReport {
            version: image.version.number(),
            byte_order: order(image.order),
            guest_type: domain.guest_type.to_string(),
            xen_major: domain.xen_major,
            xen_minor: domain.xen_minor,
        });
        let guest = &mut self.report.guest;
        if !domain.is_converted() {
            guest.xen = Some(format!("{}.{}", domain.xen_major, domain.xen_minor));
        }
        // PVH is saved as HVM: only the configuration distinguishes them.
        guest.kind = guest.kind.or(match domain.guest_type {
            GuestType::X86_PV => Some("pv"),
            GuestType::X86_HVM => Some("hvm"),
            _ => None,
        });
    }

    fn row(&mut self, stream: &'static str, at: At, kind: String, facts: RecordFacts) {
        if self.report.records.len() >= MOST_ROWS {
            self.report.records_left_out += 1;
            return;
        }
        self.report.records.push(Row {
            stream,
            index: at.index,
            offset: at.offset,
            kind,
            bytes: at.length,
            facts,
        });
    }

    fn libxl_record(&mut self, at: At, record: &LibxlRecord) {
        let kind = record.kind();
        let name = kind
            .name()
            .map_or_else(|| crate::text::hex(u64::from(kind.0)), str::to_owned);
        if self.names_fields() {
            let most = MOST_FIELDS - self.named;
            self.name(named::of_libxl(record, most));
        }
        self.row("libxl", at, name, RecordFacts::of_libxl(record));
    }

    fn record(&mut self, at: At, record: &Record<'_>) {
        let mut facts = RecordFacts::of(record);
        match record.body {
            Body::PvInfo(info) => {
                self.report.guest.bits = Some(info.width() * 8);
                self.info = info;
            }
            Body::HvmContext(context) => {
                self.hvm_context(context);
                facts = RecordFacts::HvmContext {
                    entries: self.report.hvm_context.len(),
                };
            }
            _ => {}
        }
        if self.names_fields() {
            self.name(named::of_record(record, self.info));
        }
        self.row("libxc", at, kind_name(record.kind), facts);
    }

    fn names_fields(&self) -> bool {
        self.fields && self.report.records.len() < MOST_NAMED && self.named < MOST_FIELDS
    }

    fn name(&mut self, named: Vec<named::Named>) {
        self.named += named.iter().map(|named| named.fields.len()).sum::<usize>();
        self.report.fields.extend(named);
    }

    /// A restore's verdict: warnings, or why it would refuse the image.
    fn verdict(
        &self,
        guest: Option<&GuestImage>,
        origin: Option<&Origin>,
    ) -> Result<Vec<Warning>, BadImage> {
        if let Some(bad) = &self.bad {
            return Err(BadImage(bad.clone()));
        }
        let (Some((image, domain)), Some(guest)) = (self.headers, guest) else {
            return Ok(Vec::new());
        };
        let kind = self.config.as_ref().map(|config| config.kind);
        verdict::check_headers(image, domain, kind)?;
        let origin = origin.or(self.report.origin.as_ref());
        if let (Some(origin), None) = (origin, &self.config) {
            verdict::check_origin(origin, domain.guest_type)?;
        }
        verdict::check_guest(guest, self.map.populated(), self.config.as_ref())?;
        let page = |pfn| self.map.get(pfn).map(|(page_type, _)| page_type);
        verdict::check_p2m(guest, |pfn| page(pfn).filter(|found| found.is_populated()))?;
        let mut warnings = verdict::warnings(image, guest);
        let problems = origin.into_iter().flat_map(Origin::problems_in_words);
        warnings.extend(problems.map(Warning));
        Ok(warnings)
    }

    /// Take over what all records together say about the guest.
    fn take_guest(&mut self, guest: Option<&GuestImage>) {
        let Some(guest) = guest else { return };
        self.report.guest.vcpus = guest.vcpu_numbers().map(|_| 1).sum();
        self.report.hvm_params = (guest.hvm_params().iter())
            .map(|param| Param {
                index: param.index,
                name: param_name(param.index),
                value: param.value,
            })
            .collect();
        self.start_info = image::start_info(guest);
    }

    fn hvm_context(&mut self, context: &[u8]) {
        let mut entries = Vec::new();
        for record in HvmContext::new(context) {
            match record {
                Ok(record) => entries.push(ContextEntry {
                    code: record.kind.0,
                    name: record.kind.name(),
                    instance: record.instance,
                    bytes: record.body.len(),
                }),
                // The format leaves the context to Xen, so this does not make the image bad.
                Err(e) => tracing::warn!("{e}; what follows is left out"),
            }
        }
        self.report.hvm_context = entries;
    }

    /// The fields of start_info, once all pages have been seen.
    fn start_info(&mut self, input: &Input) -> Result<()> {
        let Some(pfn) = self.start_info else {
            return Ok(());
        };
        if input.length.is_none() {
            tracing::warn!(
                "start_info is left out: it is in a page, and a pipe's pages are gone; inspect \
                 a file, one that is not compressed"
            );
            return Ok(());
        }
        let Some((_, Some(offset))) = self.map.get(pfn) else {
            return Ok(());
        };
        let mut page = [0; PAGE_SIZE];
        (input.image.read_exact_at(&mut page, offset))
            .with_context(|| format!("{}: start_info, pfn {pfn}", input.name))?;
        let named = named::of_start_info(&page, self.info);
        self.report.fields.push(named);
        Ok(())
    }

    fn pages(&mut self, at: At, entries: Entries<'_>, data: u64) -> Result<(), BadImage> {
        for run in runs_of(entries.iter(), data) {
            self.map.insert(run)?;
        }
        let facts = PageFacts::new(entries, self.list && self.listed < MOST_RUNS);
        self.listed += facts.runs.as_ref().map_or(0, Vec::len);
        if facts.runs.is_none()
            && let Some(row) = self.report.records.last_mut()
            && let RecordFacts::Pages(before) = &mut row.facts
            && self.report.records_left_out == 0
        {
            before.join(&facts);
            row.bytes += at.length;
            return Ok(());
        }
        let kind = kind_name(RecordKind::PAGE_DATA);
        self.row("libxc", at, kind, RecordFacts::Pages(facts));
        Ok(())
    }

    /// The report, and whether it has any content.
    fn finish(mut self) -> (InspectReport, bool) {
        let counts = self.map.counts();
        let populated = self.map.populated();
        self.report.pages = PagesReport {
            pfns: counts.total(),
            populated,
            last_pfn: self.map.runs().last().map(|run| run.last),
            types: type_facts(&counts),
        };
        self.report.guest.populated_kib = populated * 4;
        (self.report, self.any)
    }
}

fn order(order: ByteOrder) -> &'static str {
    match order {
        ByteOrder::Little => "little",
        ByteOrder::Big => "big",
    }
}
