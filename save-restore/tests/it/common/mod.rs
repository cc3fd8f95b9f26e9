//! Common parts of the engine's tests: mock hosts, saving to memory, restoring from it, and parsing
//! streams.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its part; a test fails by panicking"
)]

pub(crate) mod faulty;
pub(crate) mod stream;
pub(crate) mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use xsr_format::fields::{Layout, Value, diff, fields, pv};
use xsr_format::frame::{Page, PageType, Pfn};
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::hvm::HvmParam;
use xsr_format::record::{Body, RecordKind};
use xsr_format::slice::{SliceReader, SliceRecord};
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::sink::{CopySink, PageSink};
use xsr_save_restore::source::{CopySource, PageSource};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{
    RestoreError, RestoreRequest, Restored, Rings, SaveError, SaveOptions, SaveRequest,
};
use xsr_xen_backend::mock::{GuestSpec, P2mStyle};
use xsr_xen_backend::mock::{HostConfig, MockHost};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

/// A new host, with frames scattered by `seed`. Its dirty log reports new pages, as today's does;
/// `balloon.rs` has hosts whose log does not.
pub(crate) fn host(seed: u64) -> MockHost {
    let config = HostConfig {
        seed,
        logs_new_pages: true,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

/// The same, but its dirty log does not report new pages.
#[allow(dead_code, reason = "not every test has a guest that balloons")]
pub(crate) fn host_with_an_older_log(seed: u64) -> MockHost {
    let config = HostConfig {
        seed,
        logs_new_pages: false,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

/// One guest of every kind.
pub(crate) fn specs() -> Vec<GuestSpec> {
    let spec = |name: &str, kind, memory| GuestSpec::new(name, kind, memory);
    vec![
        GuestSpec {
            vcpus: 3,
            offline_vcpus: 1,
            ballooned_pages: 100,
            ..spec("pv64-linear", GuestKind::Pv, 16)
        },
        GuestSpec {
            p2m: Some(P2mStyle::Tree),
            ..spec("pv64-tree", GuestKind::Pv, 9)
        },
        GuestSpec {
            width: 4,
            vcpus: 2,
            ballooned_pages: 7,
            ..spec("pv32-tree", GuestKind::Pv, 13)
        },
        GuestSpec {
            width: 4,
            p2m: Some(P2mStyle::Linear),
            ..spec("pv32-linear", GuestKind::Pv, 8)
        },
        GuestSpec {
            vcpus: 2,
            ..spec("hvm", GuestKind::Hvm, 16)
        },
        spec("pvh", GuestKind::Pvh, 11),
    ]
}

pub(crate) fn options(threads: usize) -> SaveOptions {
    SaveOptions {
        threads: NonZeroUsize::new(threads),
    }
}

/// Saves to memory; the domain continues to run.
pub(crate) fn save_to_vec(
    host: &dyn Host,
    domid: DomId,
    options: &SaveOptions,
) -> Result<Vec<u8>, SaveError> {
    let mut sink = CopySink(Vec::new());
    save_to(host, domid, options, &mut sink)?;
    Ok(sink.0)
}

/// Saves; the domain continues to run.
pub(crate) fn save_to(
    host: &dyn Host,
    domid: DomId,
    options: &SaveOptions,
    sink: &mut dyn PageSink,
) -> Result<(), SaveError> {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = DirectToolstack(domain.as_ref());
    let saved = SaveRequest::new(domain.as_ref(), host.xen_version().unwrap())
        .options(options)
        .observe(&mut |_| ControlFlow::Continue(()))
        .write_stream(&mut toolstack, sink)?;
    saved.resume().unwrap();
    Ok(())
}

/// The domain that a stream's guest needs: kind, vcpus (the libxc stream of a translated guest
/// contains neither of the two), pages.
pub(crate) type Shape = (GuestKind, u32, u64);

/// The shape of the guest in a stream.
pub(crate) fn shape(stream: &[u8], kind: GuestKind, vcpus: u32) -> Shape {
    let reader = SliceReader::new(stream, ReadOptions::default()).unwrap();
    let mut pages = 0;
    for record in reader {
        match record.unwrap() {
            SliceRecord::PageData(data) => {
                let populated = |e: &xsr_format::frame::PageEntry| e.page_type.is_populated();
                pages += data.entries.iter().filter(populated).count() as u64;
            }
            SliceRecord::Record(_) => {}
        }
    }
    (kind, vcpus, pages)
}

/// Restores into a new domain of `host`, which stays paused.
pub(crate) fn restore_stream<S: PageSource>(
    host: &dyn Host,
    shape: Shape,
    source: S,
) -> (DomId, Result<RestoreStats, RestoreError>) {
    let (domid, _, result) = try_restore(host, shape, source);
    (domid, result.map(|restored| restored.stats))
}

/// As [`restore_stream`]; returns the result of the restore, and the store and console ports that
/// it was given.
pub(crate) fn restore_reporting<S: PageSource>(
    host: &dyn Host,
    shape: Shape,
    source: S,
) -> (DomId, Restored, [u32; 2]) {
    let (domid, ports, result) = try_restore(host, shape, source);
    (domid, result.unwrap(), ports)
}

fn try_restore<S: PageSource>(
    host: &dyn Host,
    (kind, vcpus, pages): Shape,
    source: S,
) -> (DomId, [u32; 2], Result<Restored, RestoreError>) {
    let domid = host.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = host.domain(domid).unwrap();
    let ports = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let rings = Rings {
        store_port: ports[0],
        store_domid: DomId(0),
        console_port: ports[1],
        console_domid: DomId(0),
    };
    let mut toolstack = DirectToolstack(domain.as_ref());
    let result = RecordReader::new(source, ReadOptions::default())
        .map_err(RestoreError::from)
        .and_then(|reader| {
            RestoreRequest::new(domain.as_ref(), rings)
                .threads(NonZeroUsize::new(2))
                .read_stream(reader, &mut toolstack)
        });
    (domid, ports, result.map(|(restored, _)| restored))
}

/// As [`restore_stream`], from memory.
pub(crate) fn restore_from(
    host: &dyn Host,
    stream: &[u8],
    kind: GuestKind,
    vcpus: u32,
) -> (DomId, RestoreStats) {
    let shape = shape(stream, kind, vcpus);
    let (domid, result) = restore_stream(host, shape, CopySource(stream));
    (domid, result.unwrap())
}

/// Starts a domain that was restored.
pub(crate) fn unpause(host: &MockHost, domid: DomId) -> Box<dyn Domain> {
    let domain = host.domain(domid).unwrap();
    domain.unpause().unwrap();
    domain
}

/// A parsed stream: the last version of each page, and every other record.
pub(crate) struct Taken<'a> {
    pub(crate) pages: BTreeMap<Pfn, (PageType, Option<&'a Page>)>,
    pub(crate) records: Vec<(RecordKind, &'a [u8])>,
    pub(crate) p2m_frames: Vec<Pfn>,
    /// Bytes in a PV guest's word.
    pub(crate) width: u8,
    /// The pfn of a PV guest's start_info.
    pub(crate) start_info: Option<Pfn>,
    params: Vec<HvmParam>,
}

impl Taken<'_> {
    pub(crate) fn start_info_layout(&self) -> &'static Layout {
        match self.width {
            4 => &pv::START_INFO_32,
            _ => &pv::START_INFO_64,
        }
    }

    pub(crate) fn shared_info_layout(&self) -> &'static Layout {
        match self.width {
            4 => &pv::SHARED_INFO_32,
            _ => &pv::SHARED_INFO_64,
        }
    }

    /// How many pages have contents.
    pub(crate) fn data_pages(&self) -> u64 {
        self.pages
            .values()
            .filter(|(_, page)| page.is_some())
            .count() as u64
    }

    /// The pages of an HVM guest that a restore clears: xenstore, ioreq, buffered
    /// ioreq and console rings.
    pub(crate) fn rings(&self) -> impl Iterator<Item = Pfn> {
        let rings = self
            .params
            .iter()
            .filter(|p| [1, 5, 6, 17].contains(&p.index));
        rings.map(|param| Pfn(param.value))
    }
}

/// The kinds of the records, in order.
pub(crate) fn kinds(taken: &Taken<'_>) -> Vec<RecordKind> {
    taken.records.iter().map(|(kind, _)| *kind).collect()
}

pub(crate) fn take_apart(stream: &[u8]) -> Taken<'_> {
    let mut taken = Taken {
        pages: BTreeMap::new(),
        records: Vec::new(),
        p2m_frames: Vec::new(),
        width: 8,
        start_info: None,
        params: Vec::new(),
    };
    for record in SliceReader::new(stream, ReadOptions::default()).unwrap() {
        match record.unwrap() {
            SliceRecord::PageData(data) => {
                let mut pages = data.pages.iter();
                for entry in data.entries.iter() {
                    let page = entry.page_type.has_data().then(|| pages.next().unwrap());
                    taken.pages.insert(entry.pfn, (entry.page_type, page));
                }
            }
            SliceRecord::Record(record) => {
                match record.body {
                    Body::PvInfo(info) => taken.width = info.width(),
                    Body::P2mFrames(frames) => taken.p2m_frames.extend(frames.frames()),
                    Body::HvmParams(params) => taken.params.extend(params.iter()),
                    Body::Vcpu(vcpu)
                        if record.kind == RecordKind::X86_PV_VCPU_BASIC && vcpu.vcpu == 0 =>
                    {
                        taken.start_info = Some(suspend_record(taken.width, vcpu.state));
                    }
                    _ => {}
                }
                taken.records.push((record.kind, record.raw));
            }
        }
    }
    taken
}

/// The pfn in edx of vcpu 0.
fn suspend_record(width: u8, context: &[u8]) -> Pfn {
    let (layout, name) = match width {
        4 => (&pv::VCPU_CONTEXT_32, "user_regs.edx"),
        _ => (&pv::VCPU_CONTEXT_64, "user_regs.rdx"),
    };
    let field = fields(layout, context).find(|field| field.name == name);
    match field.unwrap().value {
        Value::Hex(pfn) => Pfn(pfn),
        other => panic!("{name} is {other}"),
    }
}

/// Fields of start_info that the new host sets.
const START_INFO: &[&str] = &[
    "nr_pages",
    "shared_info",
    "flags",
    "store_mfn",
    "store_evtchn",
    "console.mfn",
    "console.evtchn",
];

/// Fields of shared_info that the new host sets, among them event channels, which are reset, and
/// where the guest publishes its p2m anew.
const SHARED_INFO: &[&str] = &[
    "wc_version",
    "wc_sec",
    "wc_nsec",
    "wc_sec_hi",
    "arch.pfn_to_mfn_frame_list_list",
    "arch.p2m_cr3",
    "evtchn_pending",
    "evtchn_mask",
];

/// Asserts that two streams hold the same guest, except for what a restore rewrites.
pub(crate) fn assert_same_guest(name: &str, a: &[u8], b: &[u8]) {
    let (a, b) = (take_apart(a), take_apart(b));
    assert_eq!(kinds(&a), kinds(&b), "{name}: records and their order");
    let rewritten: BTreeSet<Pfn> = a.p2m_frames.iter().copied().chain(a.rings()).collect();
    for (pfn, page) in &a.pages {
        let other = b.pages.get(pfn);
        // The new host lists no pfn after the last page with memory.
        if page.0 == PageType::XTAB && other.is_none() {
            continue;
        }
        let other = other.unwrap_or_else(|| panic!("{name}: pfn {pfn} is missing"));
        assert_eq!(page.0, other.0, "{name}: type of pfn {pfn}");
        if Some(*pfn) == a.start_info {
            let layout = a.start_info_layout();
            let [a, b] = [page.1, other.1].map(|page| page.unwrap().as_slice());
            assert_fields(name, layout, a, b, START_INFO);
        } else if !rewritten.contains(pfn) {
            assert!(page.1 == other.1, "{name}: contents of pfn {pfn}");
        }
    }
    assert!(
        b.pages.keys().all(|pfn| a.pages.contains_key(pfn)),
        "{name}"
    );
    for ((kind, a_body), (_, b_body)) in a.records.iter().zip(&b.records) {
        match kind.name() {
            Some("SHARED_INFO") => {
                assert_fields(name, a.shared_info_layout(), a_body, b_body, SHARED_INFO);
            }
            // Xen counts migrations: u32 at 16.
            Some("X86_TSC_INFO") => {
                assert_eq!(a_body[..16], b_body[..16], "{name}");
                let count = |body: &[u8]| u32::from_le_bytes(body[16..20].try_into().unwrap());
                assert_eq!(count(a_body) + 1, count(b_body), "{name}");
            }
            // The pfns of start_info and of every table are the same.
            _ => assert!(a_body == b_body, "{name}: {kind}"),
        }
    }
}

fn assert_fields(name: &str, layout: &Layout, a: &[u8], b: &[u8], rewritten: &[&str]) {
    for difference in diff(layout, a, b) {
        let text = difference.to_string();
        assert!(
            rewritten.iter().any(|field| text.contains(field)),
            "{name}: {}: {text}",
            layout.name
        );
    }
}

/// Where the records of a stream begin: offset, kind, bytes with header and padding. Parsed by
/// hand, so that it does not depend on the reader.
pub(crate) fn record_offsets(stream: &[u8]) -> Vec<(usize, u32, usize)> {
    let word = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap());
    let mut records = Vec::new();
    let mut at = 40;
    while at < stream.len() {
        let bytes = 8 + usize::try_from(word(at + 4)).unwrap().next_multiple_of(8);
        records.push((at, word(at), bytes));
        at += bytes;
    }
    records
}

const PAGE_DATA: u32 = 1;

/// Where the memory of a stream begins and ends.
pub(crate) fn memory_of(stream: &[u8]) -> (usize, usize) {
    let records = record_offsets(stream);
    let mut memory = records.iter().filter(|(_, kind, _)| *kind == PAGE_DATA);
    let first = memory.next().unwrap();
    let last = memory.next_back().unwrap_or(first);
    (first.0, last.0 + last.2)
}

/// The head of each PAGE_DATA record (count and entries), with the number of records
/// before it.
pub(crate) fn batches(stream: &[u8]) -> Vec<(usize, &[u8])> {
    let count = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap());
    (record_offsets(stream).into_iter().enumerate())
        .filter(|(_, (_, kind, _))| *kind == PAGE_DATA)
        .map(|(n, (at, _, _))| {
            let entries = 8 * usize::try_from(count(at + 8)).unwrap();
            (n, &stream[at + 8..at + 16 + entries])
        })
        .collect()
}

/// A version 3 stream as Xen before 4.14 would have written it: without the CPU
/// policy and STATIC_DATA_END.
pub(crate) fn as_version_2(stream: &[u8]) -> Vec<u8> {
    let mut out = stream[..40].to_vec();
    out[15] = 2;
    for (at, kind, bytes) in record_offsets(stream) {
        if !(0x10..=0x12).contains(&kind) {
            out.extend_from_slice(&stream[at..at + bytes]);
        }
    }
    out
}

/// Every page that a stream names, each time that it does, in order.
pub(crate) fn versions(stream: &[u8]) -> impl Iterator<Item = (Pfn, PageType)> {
    let mut versions = Vec::new();
    for (_, head) in batches(stream) {
        for bytes in head[8..].as_chunks().0 {
            let entry = u64::from_le_bytes(*bytes);
            let nibble = u8::try_from(entry >> 60).unwrap();
            let pfn = Pfn(entry & ((1 << 52) - 1));
            versions.push((pfn, PageType::from_nibble(nibble)));
        }
    }
    versions.into_iter()
}

/// PAGE_DATA records that mark each of `pfns` as absent.
pub(crate) fn absent_record(pfns: &[Pfn]) -> Vec<u8> {
    let mut out = Vec::new();
    for pfns in pfns.chunks(1024) {
        let count = u32::try_from(pfns.len()).unwrap();
        for word in [PAGE_DATA, 8 + 8 * count, count, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for pfn in pfns {
            out.extend_from_slice(&(0xf << 60 | pfn.0).to_le_bytes());
        }
    }
    out
}
