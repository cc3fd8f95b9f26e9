//! `xsr inspect`: what is in an image, in the order of the file, and what it says of
//! the guest.

mod facts;
mod named;
mod print;
mod report;

use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use xsr_format::byte_order::ByteOrder;
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind, param_name};
use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_format::image::{DomainHeader, GuestType, ImageHeader};
use xsr_format::record::page_data::Entries;
use xsr_format::record::pv::PvInfo;
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use self::facts::{Facts, PageFacts, kind_name, type_facts};
use self::report::{
    ContextEntry, LibxcReport, LibxlReport, PagesReport, Param, Report, Row, XlReport,
};
use crate::args::InspectArgs;
use crate::config::{self, Config};
use crate::exit::{self, Code};
use crate::file::Input;
use crate::image::{self, At, Event, Reading};
use crate::origin::Origin;
use crate::page_map::{PageMap, runs_of};
use crate::stdout::Results;
use crate::terminal::Terminal;

/// Inspect one image. Of a bad one, what could be read is shown before the error.
pub(crate) fn run(args: &InspectArgs, terminal: &Terminal) -> Result<Code> {
    let input = Input::open(&args.file, args.lenient)?;
    let reading = Reading {
        lenient: args.lenient,
    };
    let mut inspection = Inspection::new(&input.name, args.pages, args.fields);
    let end = reading.over(&input, &mut |event| {
        inspection.event(event);
        Ok(())
    });
    let end = end.and_then(|octets| {
        if args.fields {
            inspection.start_info(&input)?;
        }
        let behind = input.finish(octets).with_context(|| input.name.clone())?;
        inspection.report.trailing_octets = behind.unwrap_or(0);
        Ok(octets)
    });
    let (mut report, any) = inspection.finish();
    report.layers = input.layers().to_vec();
    if let Some(origin) = input.origin() {
        report.said_by(origin);
    }
    report.left_out = input.left_out();
    report.notes = input.notes();
    let code = match end {
        Ok(octets) => {
            report.octets = octets;
            Code::Fine
        }
        Err(e) if !any => return Err(e),
        Err(e) => {
            report.octets = input.length.unwrap_or(0);
            report.error = Some(exit::words(e.chain().skip(1)));
            terminal.error(&e);
            exit::code_of(&e)
        }
    };
    let mut out = Results::new();
    match args.json {
        true => out.json(&report)?,
        false => print::print(&report, &mut out)?,
    }
    out.finish()?;
    Ok(code)
}

/// A report in the making.
struct Inspection {
    report: Report,
    /// List every page entry.
    list: bool,
    /// Name every field of the blobs.
    fields: bool,
    /// Of a PV guest, its width.
    info: PvInfo,
    map: PageMap,
    /// Where the start_info of a PV guest is.
    start_info: Option<Pfn>,
    /// Whether anything came.
    any: bool,
}

impl Inspection {
    fn new(file: &str, list: bool, fields: bool) -> Self {
        Self {
            report: Report {
                file: file.to_owned(),
                ..Report::default()
            },
            list,
            fields,
            info: PvInfo::Bits64,
            map: PageMap::default(),
            start_info: None,
            any: false,
        }
    }

    fn event(&mut self, event: Event<'_>) {
        self.any = true;
        match event {
            Event::Xl(header) => self.xl(header),
            Event::Libxl(header) => self.libxl(header),
            Event::Libxc(image, domain) => self.libxc(image, domain),
            Event::LibxlRecord(at, record) => self.libxl_record(at, record),
            Event::Record(at, record) => self.record(at, record),
            Event::Pages(at, entries) => self.pages(at, entries),
        }
    }

    fn xl(&mut self, header: &XlHeader) {
        let json = header.json().ok().flatten();
        self.report.xl = Some(XlReport {
            byte_order: order(header.byte_order()),
            mandatory_flags: header.mandatory_flags(),
            optional_flags: header.optional_flags(),
            config_octets: header.config().map_or(0, <[u8]>::len),
            config: json.and_then(|json| serde_json::from_str(json).ok()),
        });
        if let Some(origin) = Origin::of_xl(header) {
            self.report.said_by(&origin);
        }
        // What xl itself would not accept is still worth inspecting.
        if let Some(config) = json.and_then(|json| Config::parse(json).ok()) {
            let guest = &mut self.report.guest;
            guest.name = Some(config.name);
            guest.uuid = config.uuid;
            guest.kind = Some(config::kind_name(config.kind));
            guest.max_memory_kib = Some(config.max_memory_kib);
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
        // PVH is saved as HVM: only the configuration tells them apart.
        guest.kind = guest.kind.or(match domain.guest_type {
            GuestType::X86_PV => Some("pv"),
            GuestType::X86_HVM => Some("hvm"),
            _ => None,
        });
    }

    fn row(&mut self, stream: &'static str, at: At, kind: String, facts: Facts) {
        self.report.records.push(Row {
            stream,
            index: at.index,
            offset: at.offset,
            kind,
            octets: at.length,
            facts,
        });
    }

    fn libxl_record(&mut self, at: At, record: &LibxlRecord) {
        let kind = record.kind();
        let name = kind
            .name()
            .map_or_else(|| crate::text::hex(u64::from(kind.0)), str::to_owned);
        if self.fields {
            self.report.fields.extend(named::of_libxl(record));
        }
        self.row("libxl", at, name, Facts::of_libxl(record));
    }

    fn record(&mut self, at: At, record: &Record<'_>) {
        let mut facts = Facts::of(record);
        match record.body {
            Body::PvInfo(info) => {
                self.report.guest.bits = Some(info.width() * 8);
                self.info = info;
            }
            Body::Vcpu(vcpu) if record.kind == RecordKind::X86_PV_VCPU_BASIC => {
                let vcpus = &mut self.report.guest.vcpus;
                *vcpus = (*vcpus).max(vcpu.vcpu.saturating_add(1));
                if vcpu.vcpu == 0 {
                    self.start_info = image::start_info(vcpu.state, self.info);
                }
            }
            Body::HvmContext(context) => {
                self.hvm_context(context);
                facts = Facts::HvmContext {
                    entries: self.report.hvm_context.len(),
                };
            }
            Body::HvmParams(params) => {
                self.report.hvm_params = params
                    .iter()
                    .map(|param| Param {
                        index: param.index,
                        name: param_name(param.index),
                        value: param.value,
                    })
                    .collect();
            }
            _ => {}
        }
        if self.fields {
            self.report
                .fields
                .extend(named::of_record(record, self.info));
        }
        self.row("libxc", at, kind_name(record.kind), facts);
    }

    fn hvm_context(&mut self, context: &[u8]) {
        let mut entries = Vec::new();
        for record in HvmContext::new(context) {
            match record {
                Ok(record) => entries.push(ContextEntry {
                    code: record.kind.0,
                    name: record.kind.name(),
                    instance: record.instance,
                    octets: record.body.len(),
                }),
                // The format leaves the context to Xen: the image is not bad for it.
                Err(e) => tracing::warn!("{e}; what comes behind is left out"),
            }
        }
        let vcpus = entries.iter().filter(|e| e.code == HvmRecordKind::CPU.0);
        self.report.guest.vcpus = u32::try_from(vcpus.count()).unwrap_or(u32::MAX);
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
        (input.file.read_exact_at(&mut page, offset))
            .with_context(|| format!("{}: start_info, pfn {pfn}", input.name))?;
        let named = named::of_start_info(&page, self.info);
        self.report.fields.push(named);
        Ok(())
    }

    fn pages(&mut self, at: At, entries: Entries<'_>) {
        for run in runs_of(entries.iter(), at.page_data(entries)) {
            self.map.insert(run);
        }
        let facts = PageFacts::new(entries, self.list);
        if !self.list
            && let Some(row) = self.report.records.last_mut()
            && let Facts::Pages(before) = &mut row.facts
        {
            before.join(&facts);
            row.octets += at.length;
            return;
        }
        let kind = kind_name(RecordKind::PAGE_DATA);
        self.row("libxc", at, kind, Facts::Pages(facts));
    }

    /// The report, and whether there is anything in it.
    fn finish(mut self) -> (Report, bool) {
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
