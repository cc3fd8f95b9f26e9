//! Tests of the writer: its bytes match the specification (as the independent builder implements
//! it), and reading them returns the input.

use proptest::prelude::*;
use xsr_format::error::{DecodeError, Length, WriteError};
use xsr_format::frame::{PAGE_SIZE, Page, PageEntry, PageType, Pfn};
use xsr_format::image::{DomainHeader, GuestType};
use xsr_format::record::dirty_pfns::{DirtyPfnsError, DirtyPfnsHead, dirty_pfns};
use xsr_format::record::hvm::HvmParam;
use xsr_format::record::pv::{PvInfo, p2m_frame_count, vcpu_basic_bytes};
use xsr_format::record::x86::TscInfo;
use xsr_format::record::{Body, MAX_BODY, RecordKind};
use xsr_format::slice::{SliceReader, SliceRecord};
use xsr_format::write::{RecordWriter, page_data_head};

use crate::support::build::*;
use crate::support::drive::strict;

fn writer(guest_type: GuestType) -> RecordWriter<Vec<u8>> {
    let domain = DomainHeader {
        guest_type,
        xen_major: 4,
        xen_minor: 17,
    };
    RecordWriter::new(Vec::new(), domain).unwrap()
}

/// A record to be written and read again.
#[derive(Clone, Debug)]
enum Item {
    Cpuid(Vec<[u32; 6]>),
    Msrs(Vec<(u32, u64)>),
    Batch(Vec<(u64, u8)>),
    Tsc([u32; 3], u64),
    Context(Vec<u8>),
    Params(Vec<(u64, u64)>),
    Optional(u32, Vec<u8>),
    Verify,
}

impl Item {
    fn write(&self, out: &mut RecordWriter<Vec<u8>>) {
        match self {
            Self::Cpuid(leaves) => {
                let bytes: Vec<u8> = leaves
                    .iter()
                    .flatten()
                    .flat_map(|w| w.to_le_bytes())
                    .collect();
                out.cpuid_policy(&bytes)
            }
            Self::Msrs(msrs) => {
                let bytes: Vec<u8> = msrs
                    .iter()
                    .flat_map(|(i, v)| [&i.to_le_bytes()[..], &[0; 4], &v.to_le_bytes()].concat())
                    .collect();
                out.msr_policy(&bytes)
            }
            Self::Batch(entries) => {
                let pages: Vec<Page> = entries
                    .iter()
                    .filter(|(_, ty)| PageType::from_nibble(*ty).has_data())
                    .map(|(pfn, _)| [(pfn & 0xff) as u8; PAGE_SIZE])
                    .collect();
                let entries: Vec<PageEntry> = entries
                    .iter()
                    .map(|(pfn, ty)| PageEntry {
                        pfn: Pfn(*pfn),
                        page_type: PageType::from_nibble(*ty),
                    })
                    .collect();
                out.page_data(&entries, &pages.iter().collect::<Vec<_>>())
            }
            Self::Tsc([mode, khz, incarnation], nsec) => out.tsc_info(TscInfo {
                mode: *mode,
                khz: *khz,
                nsec: *nsec,
                incarnation: *incarnation,
            }),
            Self::Context(blob) => out.hvm_context(blob),
            Self::Params(params) => {
                let params: Vec<HvmParam> = params
                    .iter()
                    .map(|(index, value)| HvmParam {
                        index: *index,
                        value: *value,
                    })
                    .collect();
                out.hvm_params(&params)
            }
            Self::Optional(kind, body) => out.record(RecordKind(*kind), &[body]),
            Self::Verify => out.verify(),
        }
        .unwrap();
    }

    fn build(&self, stream: Stream) -> Stream {
        match self {
            Self::Cpuid(leaves) => stream.with(CPUID_POLICY, |o| {
                leaves.iter().flatten().fold(o, |o, w| o.u32(*w))
            }),
            Self::Msrs(msrs) => stream.with(MSR_POLICY, |o| {
                msrs.iter().fold(o, |o, (i, v)| o.u32(*i).u32(0).u64(*v))
            }),
            Self::Batch(entries) => stream.pages(entries),
            Self::Tsc([mode, khz, incarnation], nsec) => stream.with(TSC_INFO, |o| {
                o.u32(*mode).u32(*khz).u64(*nsec).u32(*incarnation).u32(0)
            }),
            Self::Context(blob) => stream.with(HVM_CONTEXT, |o| o.bytes(blob)),
            Self::Params(params) => stream.params(params),
            Self::Optional(kind, body) => stream.with(*kind, |o| o.bytes(body)),
            Self::Verify => stream.empty(VERIFY),
        }
    }

    fn is(&self, record: &SliceRecord<'_>) -> bool {
        let record = match (self, record) {
            (Self::Batch(entries), SliceRecord::PageData(data)) => {
                let got: Vec<(u64, u8)> = data
                    .entries
                    .iter()
                    .map(|e| (e.pfn.0, e.page_type.nibble()))
                    .collect();
                let mut pages = data.pages.iter();
                return got == *entries
                    && data
                        .entries
                        .iter()
                        .filter(|e| e.page_type.has_data())
                        .all(|e| *pages.next().unwrap() == [(e.pfn.0 & 0xff) as u8; PAGE_SIZE])
                    && pages.next().is_none();
            }
            (_, SliceRecord::Record(record)) => record,
            _ => return false,
        };
        match (self, record.body) {
            (Self::Cpuid(leaves), Body::CpuidPolicy(policy)) => policy
                .iter()
                .map(|l| [l.leaf, l.subleaf, l.eax, l.ebx, l.ecx, l.edx])
                .eq(leaves.iter().copied()),
            (Self::Msrs(msrs), Body::MsrPolicy(policy)) => policy
                .iter()
                .map(|m| (m.index, m.flags, m.value))
                .eq(msrs.iter().map(|(i, v)| (*i, 0, *v))),
            (Self::Tsc([mode, khz, incarnation], nsec), Body::TscInfo(got)) => {
                (got.mode, got.khz, got.incarnation, got.nsec) == (*mode, *khz, *incarnation, *nsec)
            }
            (Self::Context(blob), Body::HvmContext(got)) => got == blob,
            (Self::Params(params), Body::HvmParams(got)) => got
                .iter()
                .map(|p| (p.index, p.value))
                .eq(params.iter().copied()),
            (Self::Optional(kind, body), Body::Optional(got)) => {
                record.kind.0 == *kind && got == body
            }
            (Self::Verify, Body::Verify) => true,
            _ => false,
        }
    }
}

fn blob() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 1..70)
}

fn static_item() -> impl Strategy<Value = Item> {
    prop_oneof![
        prop::collection::vec(any::<[u32; 6]>(), 1..5).prop_map(Item::Cpuid),
        prop::collection::vec(any::<(u32, u64)>(), 1..5).prop_map(Item::Msrs),
        (any::<u32>(), blob()).prop_map(|(kind, body)| Item::Optional(kind | 1 << 31, body)),
    ]
}

fn entry() -> impl Strategy<Value = (u64, u8)> {
    let ty = prop_oneof![0_u8..5, 9_u8..16];
    let pfn = prop_oneof![0..1_u64 << 52, Just((1 << 52) - 1)];
    (pfn, ty)
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        prop::collection::vec(entry(), 1..6).prop_map(Item::Batch),
        (0..4_u32, any::<[u32; 2]>(), any::<u64>())
            .prop_map(|(mode, [khz, n], nsec)| Item::Tsc([mode, khz, n], nsec)),
        blob().prop_map(Item::Context),
        prop::collection::vec(any::<(u64, u64)>(), 1..5).prop_map(Item::Params),
        (any::<u32>(), blob()).prop_map(|(kind, body)| Item::Optional(kind | 1 << 31, body)),
        Just(Item::Verify),
    ]
}

proptest! {
    #[test]
    fn hvm_streams(
        before in prop::collection::vec(static_item(), 0..4),
        after in prop::collection::vec(item(), 0..8),
    ) {
        let mut items = before;
        let statics = items.len();
        items.extend(after);
        // Records that every stream must have.
        items.push(Item::Batch(vec![(7, 0)]));
        items.push(Item::Context(vec![9]));
        let mut out = writer(GuestType::X86_HVM);
        let mut built = Stream::new(3, HVM, false);
        for (index, item) in items.iter().enumerate() {
            if index == statics {
                out.static_data_end().unwrap();
                built = built.empty(STATIC_DATA_END);
            }
            item.write(&mut out);
            built = item.build(built);
        }
        out.end().unwrap();
        let bytes = out.into_sink();
        prop_assert_eq!(&bytes, &built.empty(END).bytes());
        prop_assert_eq!(strict(&bytes).end, Ok(bytes.len() as u64));
        let records: Vec<_> = SliceReader::new(&bytes, Default::default())
            .unwrap()
            .map(Result::unwrap)
            .filter(|record| !matches!(
                record,
                SliceRecord::Record(r) if matches!(r.body, Body::StaticDataEnd | Body::End)
            ))
            .collect();
        prop_assert_eq!(records.len(), items.len());
        for (item, record) in items.iter().zip(&records) {
            prop_assert!(item.is(record), "{item:?} was read as {record:?}");
        }
    }

    #[test]
    fn pv_streams(
        wide: bool,
        start in 0_u32..5000,
        more in 0_u32..5000,
        msrs in 0_usize..4,
        extended in 0_usize..=128,
        xsave in 16_usize..900,
        vcpus in 1_u32..4,
    ) {
        let (info, width) = match wide {
            true => (PvInfo::Bits64, 8),
            false => (PvInfo::Bits32, 4),
        };
        let end = start + more;
        let frames: Vec<u64> = (0..p2m_frame_count(start, end, info)).map(|i| i * 3).collect();
        let mut out = writer(GuestType::X86_PV);
        out.pv_info(info).unwrap();
        out.static_data_end().unwrap();
        let pfns: Vec<Pfn> = frames.iter().map(|f| Pfn(*f)).collect();
        out.p2m_frames(info, start, end, &pfns).unwrap();
        Item::Batch(vec![(u64::from(end), 0), (0, 0xf)]).write(&mut out);
        out.shared_info(&[0x42; PAGE_SIZE]).unwrap();
        let mut built = Stream::new(3, PV, false)
            .pv_info(width)
            .empty(STATIC_DATA_END)
            .p2m(start, end, &frames)
            .pages(&[(u64::from(end), 0), (0, 0xf)])
            .with(SHARED_INFO, |o| o.fill(0x42, 4096));
        for vcpu in 0..vcpus {
            for (kind, bytes) in [
                (VCPU_BASIC, vcpu_basic_bytes(info)),
                (VCPU_EXTENDED, extended),
                (VCPU_XSAVE, xsave),
                (VCPU_MSRS, msrs * 16),
            ] {
                out.vcpu_state(RecordKind(kind), info, vcpu, &vec![0x5a; bytes]).unwrap();
                if bytes != 0 {
                    built = built.vcpu(kind, vcpu, bytes);
                }
            }
        }
        out.checkpoint().unwrap();
        out.end().unwrap();
        let bytes = out.into_sink();
        prop_assert_eq!(&bytes, &built.empty(CHECKPOINT).empty(END).bytes());
        prop_assert_eq!(strict(&bytes).end, Ok(bytes.len() as u64));
    }
}

#[test]
fn dirty_pfn_lists() {
    let list = dirty_pfns(&[Pfn(1), Pfn(u64::MAX)]).unwrap();
    let built = Bytes::new(false)
        .u32(DIRTY_PFNS)
        .u32(16)
        .u64(1)
        .u64(u64::MAX);
    assert_eq!(list, built.bytes);
    assert_eq!(dirty_pfns(&[]).unwrap(), [15, 0, 0, 0, 0, 0, 0, 0]);
    let (head, body) = list.split_at(DirtyPfnsHead::BYTES);
    let head = DirtyPfnsHead::decode(head.try_into().unwrap()).unwrap();
    assert_eq!(head.body_bytes as usize, body.len());
    assert!(DirtyPfnsHead::pfns(body).eq([Pfn(1), Pfn(u64::MAX)]));
    assert!(DirtyPfnsHead::pfns(&body[..15]).eq([Pfn(1)]));
}

#[test]
fn the_head_of_a_list_is_strict_and_bounded() {
    let list = dirty_pfns(&[Pfn(7), Pfn(1 << 40)]).unwrap();
    let (head, body) = list.split_at(8);
    assert_eq!(head, [0xf, 0, 0, 0, 16, 0, 0, 0]);
    let head = DirtyPfnsHead::decode(head.try_into().unwrap()).unwrap();
    assert_eq!(head.body_bytes, 16);
    let pfns: Vec<Pfn> = DirtyPfnsHead::pfns(body).collect();
    assert_eq!(pfns, [Pfn(7), Pfn(1 << 40)]);
    let decode = |kind: u32, length: u32| {
        let head = [kind.to_le_bytes(), length.to_le_bytes()].concat();
        DirtyPfnsHead::decode(head.try_into().unwrap())
    };
    assert_eq!(decode(0xe, 8), Err(DirtyPfnsError::Kind(RecordKind(0xe))));
    assert_eq!(decode(0xf, 12), Err(DirtyPfnsError::Length(12)));
    let most = MAX_BODY & !7;
    decode(0xf, most).unwrap();
    assert_eq!(decode(0xf, most + 8), Err(DirtyPfnsError::Length(most + 8)));
    assert_eq!(decode(0xf, u32::MAX), Err(DirtyPfnsError::Length(u32::MAX)));
}

/// Erratum 1: readers tolerate records without content, writers omit them.
#[test]
fn records_without_content_are_not_written() {
    let mut out = writer(GuestType::X86_PV);
    let before = out.sink_mut().len();
    out.hvm_params(&[]).unwrap();
    out.cpuid_policy(&[]).unwrap();
    out.msr_policy(&[]).unwrap();
    let kind = RecordKind::X86_PV_VCPU_XSAVE;
    out.vcpu_state(kind, PvInfo::Bits64, 0, &[]).unwrap();
    assert_eq!(out.sink_mut().len(), before);

    let mut pv = Stream::whole_pv(3, false, 8);
    let at = pv.records.len() - 1;
    for kind in [VCPU_EXTENDED, VCPU_XSAVE, VCPU_MSRS, VCPU_BASIC] {
        let empty = Stream::new(3, PV, false).vcpu(kind, 0, 0).records.remove(0);
        pv.records.insert(at, empty);
    }
    assert!(strict(&pv.bytes()).end.is_ok());
    let hvm = Stream::whole_hvm(3, false)
        .without(END)
        .params(&[])
        .empty(END);
    assert!(strict(&hvm.bytes()).end.is_ok());
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, WriteError>, kind: u32, expected: DecodeError) {
    match result.unwrap_err() {
        WriteError::Encode { kind: got, cause } => {
            assert_eq!((got, cause), (RecordKind(kind), expected));
        }
        other => panic!("{other}"),
    }
}

/// The writer refuses what no reader would accept, and leaves the sink unchanged.
#[test]
fn bad_records_are_refused() {
    let mut out = writer(GuestType::X86_PV);
    let before = out.sink_mut().clone();
    let entry = |pfn, ty| PageEntry {
        pfn: Pfn(pfn),
        page_type: PageType::from_nibble(ty),
    };
    let body = |expected, got| DecodeError::BodyLength { expected, got };

    refused(page_data_head(&[]), PAGE_DATA, DecodeError::PageCountZero);
    let many = vec![entry(0, 15); 1025];
    let expected = body(Length::AtMost(1024 * 8), 1025 * 8);
    refused(page_data_head(&many), PAGE_DATA, expected);
    assert!(page_data_head(&many[..1024]).is_ok());
    let expected = DecodeError::PageTypeUnknown {
        index: 1,
        pfn: Pfn(3),
        got: PageType::from_nibble(6),
    };
    refused(
        page_data_head(&[entry(1, 0), entry(3, 6)]),
        PAGE_DATA,
        expected,
    );
    let expected = DecodeError::PageBeyondP2m {
        index: 0,
        pfn: Pfn(1 << 52),
        max: PageEntry::MAX_PFN,
    };
    refused(page_data_head(&[entry(1 << 52, 0)]), PAGE_DATA, expected);
    let expected = body(Length::Exactly(4096), 0);
    refused(out.page_data(&[entry(0, 0)], &[]), PAGE_DATA, expected);

    let info = PvInfo::Bits64;
    let expected = DecodeError::P2mRange { start: 2, end: 1 };
    refused(out.p2m_frames(info, 2, 1, &[]), P2M_FRAMES, expected);
    let expected = body(Length::Exactly(16), 8);
    refused(
        out.p2m_frames(info, 0, 512, &[Pfn(0)]),
        P2M_FRAMES,
        expected,
    );

    for (kind, got, expected) in [
        (VCPU_BASIC, 0xaf0, Length::Exactly(0x1430)),
        (VCPU_EXTENDED, 129, Length::AtMost(128)),
        (VCPU_XSAVE, 15, Length::AtLeast(16)),
        (VCPU_MSRS, 8, Length::MultipleOf(16)),
    ] {
        let result = out.vcpu_state(RecordKind(kind), info, 0, &vec![0; got]);
        let expected = DecodeError::BlobLength {
            kind: RecordKind(kind),
            expected,
            got: got as u64,
        };
        refused(result, kind, expected);
    }
    refused(
        out.hvm_context(&[]),
        HVM_CONTEXT,
        body(Length::AtLeast(1), 0),
    );
    let expected = body(Length::MultipleOf(24), 25);
    refused(out.cpuid_policy(&[0; 25]), CPUID_POLICY, expected);
    let expected = body(Length::MultipleOf(16), 8);
    refused(out.msr_policy(&[0; 8]), MSR_POLICY, expected);
    let large = vec![0; (128 << 20) + 1];
    let expected = body(Length::AtMost(128 << 20), (128 << 20) + 1);
    refused(out.hvm_context(&large), HVM_CONTEXT, expected);
    assert_eq!(*out.sink_mut(), before);
}

/// A sink that is full.
#[derive(Debug)]
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let some = bytes.len().min(self.0);
        self.0 -= some;
        match some {
            0 => Err(std::io::ErrorKind::StorageFull.into()),
            _ => Ok(some),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_sink_is_reported() {
    let domain = DomainHeader {
        guest_type: GuestType::X86_HVM,
        xen_major: 4,
        xen_minor: 17,
    };
    let write = |room| -> Result<(), WriteError> {
        let mut out = RecordWriter::new(Full(room), domain)?;
        out.static_data_end()?;
        let entry = PageEntry {
            pfn: Pfn(0),
            page_type: PageType::NOTAB,
        };
        out.page_data(&[entry], &[&[0; PAGE_SIZE]])?;
        out.end()
    };
    for room in (0..40 + 8 + 24).chain([4167, 4168, 4175]) {
        match write(room).unwrap_err() {
            WriteError::Io(e) => assert_eq!(e.kind(), std::io::ErrorKind::StorageFull),
            other => panic!("{other}"),
        }
    }
    write(40 + 8 + 24 + 4096 + 8).unwrap();
}
