//! Tests of the named fields of the blobs in real images.

use std::collections::HashMap;

use xsr_format::fields::hvm::{HvmContext, HvmRecordKind as Kind, param_name};
use xsr_format::fields::{Layout, Value, fields, pv, x86};
use xsr_format::frame::Pfn;
use xsr_format::read::ReadOptions;
use xsr_format::record::{Body, RecordKind};
use xsr_format::slice::{SliceReader, SliceRecord};

use crate::support::images;

/// The records of an image except PAGE_DATA, and the contents of its pages.
struct Contents {
    raw: Vec<(RecordKind, Vec<u8>)>,
    params: HashMap<u64, u64>,
    pages: HashMap<Pfn, Vec<u8>>,
}

impl Contents {
    fn of(name: &str) -> Self {
        let images = images::committed();
        let image = images
            .into_iter()
            .find(|image| image.name == name)
            .unwrap()
            .bytes;
        let libxl = image
            .windows(8)
            .position(|bytes| bytes == b"LibxlFmt")
            .unwrap();
        let options = ReadOptions::default();
        let mut reader = SliceReader::new(&image[libxl + 24..], options).unwrap();
        let mut contents = Self {
            raw: Vec::new(),
            params: HashMap::new(),
            pages: HashMap::new(),
        };
        while let Some(record) = reader.next_record().unwrap() {
            match record {
                SliceRecord::PageData(data) => {
                    let with_data = data
                        .entries
                        .iter()
                        .filter(|entry| entry.page_type.has_data());
                    for (entry, page) in with_data.zip(data.pages) {
                        contents.pages.insert(entry.pfn, page.to_vec());
                    }
                }
                SliceRecord::Record(record) => {
                    if let Body::HvmParams(params) = &record.body {
                        contents
                            .params
                            .extend(params.iter().map(|p| (p.index, p.value)));
                    }
                    contents.raw.push((record.kind, record.raw.to_vec()));
                }
            }
        }
        contents
    }

    fn raw(&self, kind: RecordKind) -> &[u8] {
        let found = self.raw.iter().find(|(of, _)| *of == kind);
        &found.unwrap_or_else(|| panic!("no {kind}")).1
    }
}

/// A number in a blob, by name.
fn number(layout: &Layout, blob: &[u8], name: &str) -> u64 {
    let field = fields(layout, blob).find(|field| field.name == name);
    match field.unwrap_or_else(|| panic!("no {name}")).value {
        Value::Hex(value) | Value::Dec(value) => value,
        other => panic!("{name} is {other}"),
    }
}

/// vcpu 0's edx gives the start_info page, which begins with its magic. The fields of start_info
/// and shared_info are consistent.
#[test]
fn a_pv_image_says_what_its_guest_is() {
    for name in ["4.17-tpv", "4.17-tpv-live"] {
        let contents = Contents::of(name);
        let vcpu = &contents.raw(RecordKind::X86_PV_VCPU_BASIC)[8..];
        assert_eq!(vcpu.len(), pv::VCPU_CONTEXT_64.bytes);
        let register = |name| number(&pv::VCPU_CONTEXT_64, vcpu, name);
        // Selectors of a 64-bit PV kernel, from Xen's headers.
        assert_eq!(register("user_regs.cs"), 0xe033);
        assert_eq!(register("user_regs.ss"), 0xe02b);
        assert_eq!(register("ctrlreg[3]") & 0xfff, 0);

        let start_info = &contents.pages[&Pfn(register("user_regs.rdx"))];
        let magic = fields(&pv::START_INFO_64, start_info).next().unwrap();
        assert_eq!(magic.value.to_string(), "\"xen-3.0-x86_64\"");
        let info = |name| number(&pv::START_INFO_64, start_info, name);
        assert_eq!(info("nr_pages"), 1024, "4 MiB");
        for name in ["store_mfn", "console.mfn"] {
            assert!(
                contents.pages.contains_key(&Pfn(info(name))),
                "{name} is a pfn in an image"
            );
        }

        let shared_info = contents.raw(RecordKind::SHARED_INFO);
        let info = |name| number(&pv::SHARED_INFO_64, shared_info, name);
        assert_eq!(info("arch.max_pfn"), 1024);
        assert_eq!(info("arch.p2m_cr3"), 0, "a frame-list tree");
        // The only frame in an image that still belongs to the source machine.
        assert_ne!(info("arch.pfn_to_mfn_frame_list_list"), 0);
        assert!(info("wc_sec") > 1_600_000_000, "some time after 2020");
        assert_eq!(info("vcpu_info[0].time.version") % 2, 0);

        let tsc = contents.raw(RecordKind::X86_TSC_INFO);
        assert!(number(&x86::TSC_INFO, tsc, "khz") > 100_000);
        let extended = &contents.raw(RecordKind::X86_PV_VCPU_EXTENDED)[8..];
        assert_eq!(number(&pv::VCPU_EXTENDED, extended, "size"), 64);
        let xsave = &contents.raw(RecordKind::X86_PV_VCPU_XSAVE)[8..];
        assert_eq!(
            fields(&pv::VCPU_XSAVE, xsave).count(),
            2,
            "16 bytes: two masks"
        );
    }
}

#[test]
fn a_pvh_image_has_a_context_of_known_records() {
    for name in ["4.17-tpvh", "4.17-tpvh-live"] {
        let contents = Contents::of(name);
        let context = contents.raw(RecordKind::HVM_CONTEXT);
        let records = HvmContext::records(context).unwrap();
        let body = |kind| {
            records
                .iter()
                .find(|record| record.kind == kind)
                .unwrap()
                .body
        };
        assert_eq!(records[0].kind, Kind::HEADER);
        let header = |name| number(Kind::HEADER.layout(24).unwrap(), records[0].body, name);
        assert_eq!((header("magic"), header("version")), (0x5438_1286, 1));

        for record in &records {
            let layout = record.kind.layout(record.body.len());
            let layout = layout.unwrap_or_else(|| panic!("{} has no fields", record.kind));
            let varies = [Kind::CPU_XSAVE, Kind::CPU_MSR].contains(&record.kind);
            assert!(
                record.body.len() == layout.bytes || varies,
                "{}: {} bytes, not {}",
                record.kind,
                record.body.len(),
                layout.bytes
            );
        }

        const PAGED: u64 = 0x8000_0001;
        let cpu = body(Kind::CPU);
        let register = |name| number(Kind::CPU.layout(cpu.len()).unwrap(), cpu, name);
        assert_eq!(register("cr0") & PAGED, PAGED);
        assert_eq!(register("msr_efer") & 0x500, 0x500, "long mode");
        assert_eq!(register("flags"), 1, "FPU initialised");
        let lapic = number(
            Kind::LAPIC.layout(24).unwrap(),
            body(Kind::LAPIC),
            "apic_base_msr",
        );
        assert_eq!(lapic & !0xfff, 0xfee0_0000);
        let version = number(
            Kind::LAPIC_REGS.layout(1024).unwrap(),
            body(Kind::LAPIC_REGS),
            "version",
        );
        assert_eq!(version & 0xff, 0x14, "what Xen's local APIC says it is");

        let param = |name: &str| {
            let named = |index: &&u64| param_name(**index) == Some(name);
            contents.params[contents.params.keys().find(named).unwrap()]
        };
        assert!(
            contents
                .params
                .keys()
                .all(|index| param_name(*index).is_some())
        );
        assert_eq!(param("STORE_PFN"), 0xfeffc);
        assert_ne!(param("CONSOLE_PFN"), 0);
    }
}
