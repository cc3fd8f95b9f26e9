//! Compares two images, part by part. Page contents are in [`super::pages`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use anyhow::Result;
use serde_json::Value;
use xsr_format::cpu_policy::CpuPolicy;
use xsr_format::fields::hvm::{HvmDifference, HvmRecord, HvmRecordKind, diff_contexts, param_name};
use xsr_format::fields::{self, FieldDifference, Layout, pv};
use xsr_format::record::RecordKind;
use xsr_format::record::pv::PvInfo;
use xsr_format::record::x86::CpuidLeaf;
use xsr_format::wrapper::libxl::{EmulatorInstance, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use super::difference::{Difference, LeftOut, Section, What};
use super::expected::Expected;
use super::image::Image;
use super::pages::{PageDiff, Side};
use crate::text::{Count, hex};

/// The most differences of one part that are listed. Further ones are only counted.
const MOST_LISTED: usize = 1 << 16;

/// The differences found so far.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// What a restore rewrites, if that is expected.
    expected: Option<Expected>,
    listed: Vec<Difference>,
    left_out: Vec<LeftOut>,
    /// How many of each part are listed, with expected ones counted separately.
    counts: BTreeMap<(Section, bool), usize>,
}

impl Found {
    /// No differences yet. With `expected`, expected ones will be marked.
    pub(crate) fn new(expected: Option<Expected>) -> Self {
        Self {
            expected,
            ..Self::default()
        }
    }

    /// The differences by part, and how many are not listed.
    pub(crate) fn finish(mut self) -> (Vec<Difference>, Vec<LeftOut>) {
        self.listed.sort_by_key(|difference| difference.section);
        self.left_out.sort_by_key(|left_out| left_out.section);
        (self.listed, self.left_out)
    }

    fn push(&mut self, section: Section, what: What) {
        let difference = Difference {
            section,
            what,
            expected: None,
        };
        match &self.expected {
            None => self.keep(difference),
            Some(expected) => {
                for part in expected.mark(difference) {
                    self.keep(part);
                }
            }
        }
    }

    fn keep(&mut self, difference: Difference) {
        let part = (difference.section, difference.expected.is_some());
        let count = self.counts.entry(part).or_default();
        if *count < MOST_LISTED {
            *count += 1;
            self.listed.push(difference);
            return;
        }
        let Difference {
            section,
            what,
            expected,
        } = difference;
        let pages = what.pages().unwrap_or(0);
        let same =
            |left_out: &&mut LeftOut| (left_out.section, left_out.expected) == (section, expected);
        match self.left_out.iter_mut().find(same) {
            Some(left_out) => {
                left_out.differences += 1;
                left_out.pages += pages;
            }
            None => self.left_out.push(LeftOut {
                section,
                differences: 1,
                pages,
                expected,
            }),
        }
    }

    /// A named value, unless it is the same in both.
    fn field<T: PartialEq + Display>(
        &mut self,
        section: Section,
        field: impl Into<String>,
        a: Option<T>,
        b: Option<T>,
    ) {
        if a != b {
            let (field, a, b) = (
                field.into(),
                a.map(|a| a.to_string()),
                b.map(|b| b.to_string()),
            );
            self.push(section, What::Field { field, a, b });
        }
    }

    /// Bytes without known fields, from the first difference on.
    fn bytes(&mut self, section: Section, name: impl Into<String>, a: &[u8], b: &[u8]) {
        let alike = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        if a.len() == b.len() && alike == a.len() {
            return;
        }
        let field = format!("{} from byte {alike:#x} on", name.into());
        let show = |bytes: &[u8]| Some(fields::Value::Bytes(&bytes[alike..]).to_string());
        let (a, b) = (show(a), show(b));
        self.push(section, What::Field { field, a, b });
    }

    /// Two blobs of one layout. Field names get a prefix.
    fn blobs(&mut self, section: Section, prefix: &str, layout: &Layout, a: &[u8], b: &[u8]) {
        for difference in fields::diff(layout, a, b) {
            self.named(section, prefix, &difference);
        }
    }

    fn named(&mut self, section: Section, prefix: &str, difference: &FieldDifference<'_>) {
        let (field, a, b) = match difference {
            FieldDifference::Field { a, b } => {
                (a.name.clone(), a.value.to_string(), b.value.to_string())
            }
            FieldDifference::Bytes { offset, a, b } => {
                let last = offset + a.len().saturating_sub(1);
                (
                    format!("bytes {offset:#x}–{last:#x}"),
                    fields::Value::Bytes(a).to_string(),
                    fields::Value::Bytes(b).to_string(),
                )
            }
            FieldDifference::Length { a, b } => ("length".to_owned(), a.to_string(), b.to_string()),
        };
        let field = format!("{prefix}{field}");
        let (a, b) = (Some(a), Some(b));
        self.push(section, What::Field { field, a, b });
    }
}

/// Compares everything except the pages.
pub(crate) fn compare(a: &Image, b: &Image, found: &mut Found) -> Result<()> {
    headers(a, b, found);
    config(a, b, found);
    records(a, b, found);
    emulators(a, b, found);
    cpu_policy(a, b, found);
    tsc(a, b, found);
    p2m(a, b, found);
    start_info(a, b, found)?;
    shared_info(a, b, found);
    vcpus(a, b, found);
    hvm(a, b, found);
    Ok(())
}

/// A difference that [`super::pages::compare`] found. If start_info is the same page in both, it
/// has already been compared field by field.
pub(crate) fn page(diff: PageDiff, start_info: Option<u64>, found: &mut Found) {
    let (first, last) = match diff {
        PageDiff::OnlyIn(only) => {
            let (a, b) = match only.side {
                Side::A => (Some(only.page_type), None),
                Side::B => (None, Some(only.page_type)),
            };
            let (first_pfn, last_pfn) = (only.first, only.last);
            let what = What::Types {
                first_pfn,
                last_pfn,
                a,
                b,
            };
            return found.push(Section::Pfns, what);
        }
        PageDiff::Types(differs) => {
            let what = What::Types {
                first_pfn: differs.first,
                last_pfn: differs.last,
                a: Some(differs.a),
                b: Some(differs.b),
            };
            return found.push(Section::PageTypes, what);
        }
        PageDiff::Contents(first, last) => (first, last),
    };
    let mut contents = |first_pfn: u64, last_pfn: u64| {
        if first_pfn <= last_pfn {
            let what = What::Contents {
                first_pfn,
                last_pfn,
            };
            found.push(Section::PageContents, what);
        }
    };
    match start_info.filter(|pfn| (first..=last).contains(pfn)) {
        None => contents(first, last),
        Some(pfn) => {
            if pfn > first {
                contents(first, pfn - 1);
            }
            contents(pfn + 1, last);
        }
    }
}

fn headers(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::Headers;
    let layers = |image: &Image| match (&image.xl, image.libxl) {
        (Some(_), _) => "xl",
        (None, Some(_)) => "libxl",
        (None, None) => "libxc",
    };
    found.field(S, "outermost layer", Some(layers(a)), Some(layers(b)));
    if let (Some(a), Some(b)) = (&a.xl, &b.xl) {
        let (order_a, order_b) = (a.byte_order(), b.byte_order());
        found.field(S, "xl byte order", Some(order_a), Some(order_b));
        let flags = |name: &str, a: u32, b: u32, found: &mut Found| {
            found.field(S, name, Some(hex(a.into())), Some(hex(b.into())));
        };
        let (mandatory_a, mandatory_b) = (a.mandatory_flags(), b.mandatory_flags());
        flags("xl mandatory flags", mandatory_a, mandatory_b, found);
        flags(
            "xl optional flags",
            a.optional_flags(),
            b.optional_flags(),
            found,
        );
        let what = "xl optional data after the configuration,";
        found.bytes(S, what, a.unknown_tail(), b.unknown_tail());
    }
    if let (Some(a), Some(b)) = (a.libxl, b.libxl) {
        found.field(S, "libxl byte order", Some(a.order), Some(b.order));
        let (converted_a, converted_b) = (a.legacy_converted, b.legacy_converted);
        let name = "libxl converted from legacy";
        found.field(S, name, Some(converted_a), Some(converted_b));
    }
    if let (Some((image_a, domain_a)), Some((image_b, domain_b))) = (a.libxc, b.libxc) {
        let (version_a, version_b) = (image_a.version.number(), image_b.version.number());
        found.field(S, "libxc version", Some(version_a), Some(version_b));
        found.field(
            S,
            "libxc byte order",
            Some(image_a.order),
            Some(image_b.order),
        );
        let (type_a, type_b) = (domain_a.guest_type, domain_b.guest_type);
        found.field(S, "guest type", Some(type_a), Some(type_b));
        let xen = |d: xsr_format::image::DomainHeader| format!("{}.{}", d.xen_major, d.xen_minor);
        found.field(S, "Xen version", Some(xen(domain_a)), Some(xen(domain_b)));
    }
}

fn config(a: &Image, b: &Image, found: &mut Found) {
    let (Some(a), Some(b)) = (&a.xl, &b.xl) else {
        return; // The header comparison already reports that one has no xl header.
    };
    let json = |xl: &XlHeader| -> Option<Value> { serde_json::from_str(xl.json().ok()??).ok() };
    match (json(a), json(b)) {
        (Some(a), Some(b)) => json_values("", &a, &b, found),
        // Too long to parse, or not UTF-8: only the bytes can be compared.
        _ if a.json().is_err() || b.json().is_err() => {
            let bytes = |xl: &XlHeader| xl.config().unwrap_or_default().to_vec();
            found.bytes(Section::Config, "text", &bytes(a), &bytes(b));
        }
        _ => {
            let text = |config: Option<&[u8]>| config.map(|text| text.escape_ascii().to_string());
            let (a, b) = (text(a.config()), text(b.config()));
            found.field(Section::Config, "text", a, b);
        }
    }
}

fn json_values(at: &str, a: &Value, b: &Value, found: &mut Found) {
    let inside = |key: &dyn Display| match at {
        "" => key.to_string(),
        _ => format!("{at}.{key}"),
    };
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => json_values(&inside(key), a, b, found),
                    (a, b) => found.field(Section::Config, inside(key), a, b),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                json_values(&format!("{at}[{i}]"), a, b, found);
            }
        }
        _ => found.field(Section::Config, at, Some(a), Some(b)),
    }
}

fn records(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::Records;
    let count = |image: &Image| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for name in &image.sequence {
            *counts.entry(name.clone()).or_default() += 1;
        }
        counts
    };
    let (counts_a, counts_b) = (count(a), count(b));
    if counts_a == counts_b {
        let first = a.sequence.iter().zip(&b.sequence).position(|(a, b)| a != b);
        if let Some(i) = first {
            let (a, b) = (a.sequence.get(i), b.sequence.get(i));
            found.field(S, "the first record out of order", a, b);
        }
    } else {
        let names: BTreeSet<&String> = counts_a.keys().chain(counts_b.keys()).collect();
        for name in names {
            found.field(S, name, counts_a.get(name), counts_b.get(name));
        }
    }
    // Records whose contents are unknown. Records of one name are compared in order: the first with
    // the first, the second with the second.
    let (others_a, others_b) = (by_name(a), by_name(b));
    for (name, bodies) in others_a {
        let others = others_b.get(name).into_iter().flatten();
        for (body_a, body_b) in bodies.into_iter().zip(others) {
            found.bytes(S, name, body_a, body_b);
        }
    }
}

/// The bodies of optional records, in order, for each name.
fn by_name(image: &Image) -> BTreeMap<&str, Vec<&[u8]>> {
    let mut bodies: BTreeMap<&str, Vec<&[u8]>> = BTreeMap::new();
    for (name, body) in &image.other {
        bodies.entry(name).or_default().push(body);
    }
    bodies
}

fn emulators(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::Emulators;
    type Keys = BTreeMap<(String, String), String>;
    type States<'a> = BTreeMap<String, &'a [u8]>;
    fn collect(image: &Image) -> (Keys, States<'_>) {
        let (mut keys, mut states) = (Keys::new(), States::new());
        let name = |e: &EmulatorInstance| format!("{} {}", e.id, e.index);
        for record in &image.emulators {
            match record {
                LibxlRecord::EmulatorXenstoreData { emulator, data } => {
                    for (key, value) in data.iter() {
                        let key = key.escape_ascii().to_string();
                        let value = value.escape_ascii().to_string();
                        keys.insert((name(emulator), key), value);
                    }
                }
                LibxlRecord::EmulatorContext { emulator, state } => {
                    states.insert(format!("{} context", name(emulator)), state);
                }
                LibxlRecord::Optional { kind, body } => {
                    states.insert(kind.to_string(), body);
                }
                _ => {}
            }
        }
        (keys, states)
    }
    let ((keys_a, states_a), (keys_b, states_b)) = (collect(a), collect(b));
    let names: BTreeSet<_> = keys_a.keys().chain(keys_b.keys()).collect();
    for key in names {
        let name = format!("{} xenstore {}", key.0, key.1);
        found.field(S, name, keys_a.get(key), keys_b.get(key));
    }
    let names: BTreeSet<_> = states_a.keys().chain(states_b.keys()).collect();
    for name in names {
        match (states_a.get(name), states_b.get(name)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) => {
                let first = a.iter().zip(*b).take_while(|(a, b)| a == b).count();
                let tail = |state: &[u8]| {
                    let length = Count(state.len(), "byte");
                    let rest = state.get(first..).unwrap_or_default();
                    format!(
                        "{length}, from {first:#x} on {}",
                        fields::Value::Bytes(rest)
                    )
                };
                found.field(S, name, Some(tail(a)), Some(tail(b)));
            }
            (a, b) => {
                let length =
                    |state: Option<&&[u8]>| state.map(|s| Count(s.len(), "byte").to_string());
                found.field(S, name, length(a), length(b));
            }
        }
    }
}

fn cpu_policy(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::CpuPolicy;
    let leaves = |image: &Image| -> BTreeMap<(u32, u32), CpuidLeaf> {
        let leaves = image.guest.cpuid().iter();
        leaves
            .map(|leaf| ((leaf.leaf, leaf.subleaf), *leaf))
            .collect()
    };
    let (leaves_a, leaves_b) = (leaves(a), leaves(b));
    let keys: BTreeSet<_> = leaves_a.keys().chain(leaves_b.keys()).collect();
    for key in keys {
        let name = match *key {
            (leaf, CpuPolicy::NO_SUBLEAF) => format!("CPUID {leaf:#x}"),
            (leaf, subleaf) => format!("CPUID {leaf:#x}.{subleaf:#x}"),
        };
        let (a, b) = (leaves_a.get(key), leaves_b.get(key));
        let register = |found: &mut Found, register: &str, a: Option<u32>, b: Option<u32>| {
            let hex = |value: Option<u32>| value.map(|value| hex(value.into()));
            found.field(S, format!("{name} {register}"), hex(a), hex(b));
        };
        register(found, "eax", a.map(|l| l.eax), b.map(|l| l.eax));
        register(found, "ebx", a.map(|l| l.ebx), b.map(|l| l.ebx));
        register(found, "ecx", a.map(|l| l.ecx), b.map(|l| l.ecx));
        register(found, "edx", a.map(|l| l.edx), b.map(|l| l.edx));
    }
    let msrs = |image: &Image| -> BTreeMap<u32, (u32, u64)> {
        let msrs = image.guest.msrs().iter();
        msrs.map(|msr| (msr.index, (msr.flags, msr.value)))
            .collect()
    };
    let (msrs_a, msrs_b) = (msrs(a), msrs(b));
    let indices: BTreeSet<_> = msrs_a.keys().chain(msrs_b.keys()).collect();
    for index in indices {
        let value = |msrs: &BTreeMap<u32, (u32, u64)>| {
            msrs.get(index).map(|(flags, value)| match flags {
                0 => hex(*value),
                flags => format!("{} (flags {flags:#x})", hex(*value)),
            })
        };
        let name = format!("MSR {index:#x}");
        found.field(S, name, value(&msrs_a), value(&msrs_b));
    }
}

fn tsc(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::Tsc;
    if let (Some(a), Some(b)) = (a.guest.tsc(), b.guest.tsc()) {
        found.field(S, "mode", Some(a.mode), Some(b.mode));
        found.field(S, "khz", Some(a.khz), Some(b.khz));
        found.field(S, "nsec", Some(a.nsec), Some(b.nsec));
        found.field(S, "incarnation", Some(a.incarnation), Some(b.incarnation));
    }
}

fn p2m(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::P2m;
    let width = |pv: Option<PvInfo>| pv.map(|pv| u32::from(pv.width()) * 8);
    found.field(
        S,
        "guest bits",
        width(a.guest.pv_info()),
        width(b.guest.pv_info()),
    );
    if let (Some(a), Some(b)) = (a.guest.p2m(), b.guest.p2m()) {
        found.field(S, "first pfn", Some(a.first_pfn), Some(b.first_pfn));
        found.field(S, "last pfn", Some(a.max_pfn), Some(b.max_pfn));
        for index in 0..a.frames.len().max(b.frames.len()) {
            let (a, b) = (a.frames.get(index), b.frames.get(index));
            if a != b {
                found.field(S, format!("p2m_frames[{index}]"), a, b);
            }
        }
    }
}

fn start_info(a: &Image, b: &Image, found: &mut Found) -> Result<()> {
    let (Some(pfn_a), Some(pfn_b)) = (a.start_info(), b.start_info()) else {
        return Ok(());
    };
    // A different pfn is reported as a different edx of vcpu 0.
    if let (Some(page_a), Some(page_b)) = (a.page(pfn_a)?, b.page(pfn_b)?) {
        let layout = match a.guest.pv_info() {
            Some(PvInfo::Bits32) => &pv::START_INFO_32,
            _ => &pv::START_INFO_64,
        };
        let (page_a, page_b) = (page_a.as_slice(), page_b.as_slice());
        found.blobs(Section::StartInfo, "", layout, page_a, page_b);
    }
    Ok(())
}

fn shared_info(a: &Image, b: &Image, found: &mut Found) {
    let layout = match a.guest.pv_info() {
        Some(PvInfo::Bits32) => &pv::SHARED_INFO_32,
        _ => &pv::SHARED_INFO_64,
    };
    if let (Some(page_a), Some(page_b)) = (a.guest.shared_info(), b.guest.shared_info()) {
        found.blobs(Section::SharedInfo, "", layout, page_a, page_b);
    }
}

fn vcpus(a: &Image, b: &Image, found: &mut Found) {
    let bits = a.guest.pv_info();
    let pairs = (a.guest.vcpus().iter())
        .filter_map(|(number, a)| Some((number, a, b.guest.vcpus().get(number)?)));
    let blobs = pairs.flat_map(|(number, a, b)| {
        let both = a
            .blobs()
            .filter_map(|(kind, a)| Some((kind, a, b.blob(kind)?)));
        both.map(move |(kind, a, b)| (number, kind, a, b))
    });
    // If only one has the blob, the list of records shows it.
    for (vcpu, kind, state_a, state_b) in blobs.filter(|(.., b)| !b.is_empty()) {
        let (part, layout) = match (kind, bits) {
            (RecordKind::X86_PV_VCPU_BASIC, Some(PvInfo::Bits32)) => ("", &pv::VCPU_CONTEXT_32),
            (RecordKind::X86_PV_VCPU_BASIC, _) => ("", &pv::VCPU_CONTEXT_64),
            (RecordKind::X86_PV_VCPU_EXTENDED, _) => ("extended ", &pv::VCPU_EXTENDED),
            (RecordKind::X86_PV_VCPU_XSAVE, _) => ("xsave ", &pv::VCPU_XSAVE),
            _ => ("MSRs ", &pv::VCPU_MSRS),
        };
        let prefix = format!("vcpu {vcpu} {part}");
        found.blobs(Section::Vcpus, &prefix, layout, state_a, state_b);
    }
}

fn hvm(a: &Image, b: &Image, found: &mut Found) {
    const S: Section = Section::HvmContext;
    let (context_a, context_b) = (a.guest.hvm_context(), b.guest.hvm_context());
    if !context_a.is_empty() && !context_b.is_empty() {
        match diff_contexts(context_a, context_b) {
            Ok(differences) => {
                for difference in &differences {
                    hvm_record(difference, found);
                }
            }
            // The format leaves the context to Xen, so this does not make an image bad.
            Err(e) => {
                tracing::warn!("{e}; the contexts are compared as bytes");
                found.bytes(S, "bytes", context_a, context_b);
            }
        }
    }
    let hex_values = |image: &Image| -> BTreeMap<u64, String> {
        let params = image.guest.hvm_params().iter();
        params.map(|p| (p.index, hex(p.value))).collect()
    };
    let (params_a, params_b) = (hex_values(a), hex_values(b));
    let indices: BTreeSet<u64> = params_a.keys().chain(params_b.keys()).copied().collect();
    for index in indices {
        let name = param_name(index).map_or_else(|| format!("parameter {index}"), str::to_owned);
        let (a, b) = (params_a.get(&index), params_b.get(&index));
        found.field(Section::HvmParams, name, a, b);
    }
}

fn hvm_record(difference: &HvmDifference<'_>, found: &mut Found) {
    const S: Section = Section::HvmContext;
    let name = |kind: HvmRecordKind, instance: u16| format!("{kind} {instance}");
    let there = |record: &HvmRecord<'_>| Some(Count(record.body.len(), "byte").to_string());
    match difference {
        HvmDifference::OnlyInA(record) => {
            found.field(S, name(record.kind, record.instance), there(record), None);
        }
        HvmDifference::OnlyInB(record) => {
            found.field(S, name(record.kind, record.instance), None, there(record));
        }
        HvmDifference::Fields {
            kind,
            instance,
            differences,
        } => {
            let prefix = format!("{} ", name(*kind, *instance));
            for difference in differences {
                found.named(S, &prefix, difference);
            }
        }
    }
}
