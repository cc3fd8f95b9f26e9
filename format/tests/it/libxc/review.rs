//! Tests for points from the review of the format's draft B on xen-devel in February 2014, one for
//! each that concerns the libxc stream. (Detection of legacy images is tested in its own module.)

use xsr_format::error::DecodeError as D;
use xsr_format::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};
use xsr_format::image::{DomainHeader, GuestType};
use xsr_format::record::hvm::HvmParam;
use xsr_format::record::pv::{PvInfo, p2m_frame_count};
use xsr_format::record::x86::TscInfo;
use xsr_format::record::{Body, RecordKind};
use xsr_format::slice::{SliceReader, SliceRecord};
use xsr_format::write::RecordWriter;

use crate::support::build::*;
use crate::support::drive::{lenient, strict};

/// Sets each reserved bit of a stream. Strict refuses it with field and byte; lenient continues,
/// and nothing else changes.
#[test]
fn reserved_and_padding_fields_are_zero_or_refused() {
    let stream = Stream::whole_hvm(3, false);
    let good = stream.bytes();
    let at = stream.offsets();
    let record = |kind| at[stream.kinds().iter().position(|k| *k == kind).unwrap()];
    // Byte and bit of each reserved field.
    let mut bits: Vec<(usize, u8)> = Vec::new();
    let mut field = |bytes: std::ops::Range<usize>| {
        bits.extend(bytes.flat_map(|o| (0..8).map(move |bit| (o, 1 << bit))));
    };
    field(16..17); // image options 8–15
    field(18..24); // image reserved
    field(30..32); // domain reserved
    field(record(PAGE_DATA) + 12..record(PAGE_DATA) + 16);
    field(record(PAGE_DATA) + 22..record(PAGE_DATA) + 23); // pfn bits 48–55, see below
    field(record(TSC_INFO) + 28..record(TSC_INFO) + 32);
    field(record(HVM_CONTEXT) + 1101..record(HVM_CONTEXT) + 1104); // padding
    field(record(HVM_PARAMS) + 12..record(HVM_PARAMS) + 16);
    bits.extend((1..8).map(|bit| (17, 1 << bit))); // image options 1–7
    let expected = lenient(&good);
    for (byte, bit) in bits {
        let mut bad = good.clone();
        bad[byte] |= bit;
        if byte == record(PAGE_DATA) + 22 && bit < 0x10 {
            continue; // bits 48–51 belong to the pfn
        }
        let error = strict(&bad).decode();
        match &error {
            D::ReservedNotZero { .. } | D::PageEntryReserved { .. } => {}
            other => panic!("byte {byte} bit {bit:#x}: {other}"),
        }
        let mut outcome = lenient(&bad);
        // The raw bytes of the record necessarily differ.
        outcome
            .seen
            .iter_mut()
            .zip(&expected.seen)
            .for_each(|(got, want)| {
                assert_eq!(got.position, want.position);
                got.said = want.said;
            });
        assert_eq!(outcome, expected, "byte {byte} bit {bit:#x}");
    }
}

/// … and the writer never sets one: its output is read in strict mode.
#[test]
fn reserved_and_padding_fields_are_zero_on_save() {
    let domain = DomainHeader {
        guest_type: GuestType::X86_HVM,
        xen_major: 4,
        xen_minor: 17,
    };
    let mut out = RecordWriter::new(Vec::new(), domain).unwrap();
    out.static_data_end().unwrap();
    let entry = PageEntry {
        pfn: PageEntry::MAX_PFN,
        page_type: PageType::XTAB,
    };
    out.page_data(&[entry], &[]).unwrap();
    out.tsc_info(TscInfo::default()).unwrap();
    for length in 1..=16 {
        out.hvm_context(&vec![0xff; length]).unwrap();
    }
    let (index, value) = (u64::MAX, u64::MAX);
    out.hvm_params(&[HvmParam { index, value }]).unwrap();
    out.end().unwrap();
    let stream = out.into_sink();
    assert_eq!(strict(&stream).end, Ok(stream.len() as u64));
}

/// The identifying header is always big endian. The rest is in the order that its option bit gives,
/// and has the same meaning in both.
#[test]
fn both_byte_orders_are_read() {
    for version in [2, 3] {
        let little = Stream::whole_pv(version, false, 8);
        let big = Stream::whole_pv(version, true, 8);
        assert_eq!(little.bytes()[..16], big.bytes()[..16]);
        assert_ne!(little.bytes()[24..], big.bytes()[24..]);
        for (little, big) in [
            (little, big),
            (
                Stream::whole_hvm(version, false),
                Stream::whole_hvm(version, true),
            ),
        ] {
            assert_eq!(meaning(&little.bytes()), meaning(&big.bytes()));
        }
    }
}

/// A stream's contents as numbers, independent of the byte order.
fn meaning(stream: &[u8]) -> Vec<String> {
    let reader = SliceReader::new(stream, Default::default()).unwrap();
    let mut out = vec![format!("{:?}", reader.domain())];
    for record in reader {
        out.push(match record.unwrap() {
            SliceRecord::PageData(data) => {
                let entries: Vec<_> = data.entries.iter().collect();
                let firsts: Vec<_> = data.pages.iter().map(|p| p[0]).collect();
                format!("{entries:?} {firsts:?}")
            }
            SliceRecord::Record(record) => match record.body {
                Body::PvInfo(info) => format!("{info:?}"),
                Body::P2mFrames(f) => {
                    format!(
                        "{:?} {:?} {:?}",
                        f.start,
                        f.end,
                        f.frames().collect::<Vec<_>>()
                    )
                }
                Body::Vcpu(v) => format!("{} {} {}", record.kind, v.vcpu, v.state.len()),
                Body::TscInfo(info) => format!("{info:?}"),
                Body::HvmParams(p) => format!("{:?}", p.iter().collect::<Vec<_>>()),
                Body::CpuidPolicy(p) => format!("{:?}", p.iter().collect::<Vec<_>>()),
                Body::MsrPolicy(p) => format!("{:?}", p.iter().collect::<Vec<_>>()),
                _ => format!("{} {}", record.kind, record.raw.len()),
            },
        });
    }
    out
}

/// The numbers read equal those given to the builder, in both byte orders.
#[test]
fn both_byte_orders_say_what_was_put_in() {
    for big in [false, true] {
        let said = meaning(&Stream::whole_pv(3, big, 8).bytes()).join("\n");
        for expected in [
            "GuestType(1), xen_major: 4, xen_minor: 17",
            "Bits64",
            "CpuidLeaf { leaf: 0, subleaf: 1, eax: 2, ebx: 3, ecx: 4, edx: 5 }, CpuidLeaf { leaf: 6,",
            "MsrEntry { index: 206, flags: 0, value: 7 }",
            "Pfn(0x0) Pfn(0x7) [Pfn(0x0)]",
            "PageEntry { pfn: Pfn(0x7), page_type: PageType(0xc, L4TAB (pinned)) }] [6, 7]",
            "TscInfo { mode: 1, khz: 2500000, nsec: 99, incarnation: 3 }",
            "X86_PV_VCPU_MSRS 0 32",
        ] {
            assert!(said.contains(expected), "{expected} is not in\n{said}");
        }
        let said = meaning(&Stream::whole_hvm(3, big).bytes()).join("\n");
        let expected = "[HvmParam { index: 1, value: 1044476 }, HvmParam { index: 2, value: 5 }]";
        assert!(said.contains(expected), "{expected} is not in\n{said}");
    }
}

/// PV and HVM (also PVH) have a number each. Any other guest type can be represented, and its
/// stream inspected with any records.
#[test]
fn guest_types_are_open() {
    for guest in [3, 0x40, u32::MAX] {
        let stream = Stream::new(3, guest, false)
            .with(0x8000_0001, |o| o.u32(1))
            .empty(STATIC_DATA_END)
            .pages(&[(1, 0), (2, 0xf)])
            .with(SHARED_INFO, |o| o.fill(0, 4096))
            .empty(END)
            .bytes();
        assert_eq!(strict(&stream).end, Ok(stream.len() as u64));
        let reader = SliceReader::new(&stream, Default::default()).unwrap();
        let guest_type = reader.domain().guest_type;
        assert_eq!(guest_type, GuestType(guest));
        assert_eq!(
            guest_type.to_string(),
            format!("unknown guest type {guest:#x}")
        );
    }
    assert_eq!(GuestType::X86_PV, GuestType(1));
    assert_eq!(GuestType::X86_HVM, GuestType(2));
}

/// Ranges are inclusive, so the last possible frame is not a special case.
#[test]
fn inclusive_ranges_at_the_edge() {
    let last = u32::MAX;
    // A p2m of the last frame, of the last two p2m frames, and of all frames.
    assert_eq!(p2m_frame_count(last, last, PvInfo::Bits64), 1);
    assert_eq!(p2m_frame_count(last - 512, last, PvInfo::Bits64), 2);
    assert_eq!(p2m_frame_count(0, last, PvInfo::Bits64), 1 << 23);
    assert_eq!(p2m_frame_count(0, last, PvInfo::Bits32), 1 << 22);
    assert_eq!(p2m_frame_count(0, 0, PvInfo::Bits32), 1);
    assert_eq!(p2m_frame_count(511, 512, PvInfo::Bits64), 2);
    assert_eq!(p2m_frame_count(511, 512, PvInfo::Bits32), 1);

    let whole = Stream::whole_pv(3, false, 8);
    let mut stream = Stream::new(3, PV, false)
        .pv_info(8)
        .policies()
        .p2m(last - 512, last, &[5, PageEntry::MAX_PFN.0])
        .pages(&[(u64::from(last), 0)]);
    let at = whole.kinds().iter().position(|k| *k == TSC_INFO).unwrap();
    stream.records.extend_from_slice(&whole.records[at..]);
    let bytes = stream.bytes();
    assert_eq!(strict(&bytes).end, Ok(bytes.len() as u64));
    let p2m = SliceReader::new(&bytes, Default::default())
        .unwrap()
        .find_map(|record| match record.unwrap() {
            SliceRecord::Record(record) => match record.body {
                Body::P2mFrames(frames) => Some(frames),
                _ => None,
            },
            SliceRecord::PageData(_) => None,
        })
        .unwrap();
    assert_eq!(p2m.start, Pfn(u64::from(last) - 512));
    assert_eq!(p2m.end, Pfn(u64::from(last)));
    assert_eq!(p2m.first_frame, (1 << 23) - 2);

    // A pfn beyond the range is refused, even at the edge.
    let beyond = u64::from(last) + 1;
    let index = stream.kinds().iter().position(|k| *k == PAGE_DATA).unwrap();
    stream.records[index] = Stream::new(3, PV, false)
        .pages(&[(beyond, 0xf)])
        .records
        .remove(0);
    let expected = D::PageBeyondP2m {
        index: 0,
        pfn: Pfn(beyond),
        max: Pfn(u64::from(last)),
    };
    assert_eq!(strict(&stream.bytes()).decode(), expected);

    // An HVM guest's pfns extend to the last that an entry can hold.
    let mut stream = Stream::whole_hvm(3, false);
    let edge = Stream::new(3, HVM, false).pages(&[((1 << 52) - 1, 0), ((1 << 52) - 1, 0xf)]);
    stream.records.splice(3..5, edge.records);
    assert_eq!(strict(&stream.bytes()).end, Ok(stream.bytes().len() as u64));
    assert_eq!(PageEntry::MAX_PFN.checked_add(u64::MAX), None);
}

/// Apart from headers first and END last, only real dependencies order the records. (`order.rs`
/// tests each permitted order.)
#[test]
fn only_real_dependencies_are_ordered() {
    // The specification wants HVM_PARAMS before HVM_CONTEXT; Xen writes them after it.
    let stream = Stream::whole_hvm(3, false);
    let context = stream
        .kinds()
        .iter()
        .position(|k| *k == HVM_CONTEXT)
        .unwrap();
    let mut swapped = stream.clone();
    swapped.records.swap(context, context + 1);
    for stream in [stream, swapped] {
        assert_eq!(strict(&stream.bytes()).end, Ok(stream.bytes().len() as u64));
    }
    // A tail record on which no other depends may come first.
    let mut stream = Stream::whole_hvm(3, false);
    let tsc = stream.records.remove(5);
    assert_eq!(tsc.kind, TSC_INFO);
    stream.records.insert(0, tsc);
    assert_eq!(strict(&stream.bytes()).end, Ok(stream.bytes().len() as u64));
}

/// New information comes in optional records, which every reader skips, so the version does not
/// change.
#[test]
fn unknown_optional_records_are_passed_over() {
    for kind in [0x8000_0000, 0x8000_0001, 0x8000_0013, u32::MAX] {
        for length in [0, 1, 8, 4097] {
            let plain = Stream::whole_pv(3, false, 8);
            for at in 0..plain.records.len() {
                let mut stream = plain.clone();
                let body = vec![0xee; length];
                stream.records.insert(at, Rec { kind, body });
                let outcome = strict(&stream.bytes());
                assert_eq!(outcome.end, Ok(stream.bytes().len() as u64));
                assert_eq!(outcome.kinds(), stream.kinds());
            }
        }
    }
    let bytes = Stream::new(3, HVM, false)
        .with(0x8000_0042, |o| o.u8(7))
        .bytes();
    let record = SliceReader::new(&bytes, Default::default())
        .unwrap()
        .next_record()
        .unwrap();
    let Some(SliceRecord::Record(record)) = record else {
        panic!("no record");
    };
    assert_eq!(record.kind, RecordKind(0x8000_0042));
    assert!(matches!(record.body, Body::Optional([7])));
}

/// Written streams have version 3, little endian, and only known records, so a stock Xen can
/// restore them.
#[test]
fn written_streams_stay_restorable_by_a_stock_xen() {
    let domain = DomainHeader {
        guest_type: GuestType::X86_PV,
        xen_major: 4,
        xen_minor: 17,
    };
    let stream = RecordWriter::new(Vec::new(), domain).unwrap().into_sink();
    assert_eq!(stream, headers(3, PV, false));
    assert_eq!(PAGE_SIZE, 4096);
    assert!(RecordKind::ALL.iter().all(|kind| !kind.is_optional()));
    assert_eq!(RecordKind::ALL.len(), 19);
}
