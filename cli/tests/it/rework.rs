//! `export` (memory taken out of an image) and `edit` (its configuration changed). The expected
//! results come from a scan of the stream written here, from the specification's tables, and from
//! the options.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::common::{arg, image, layers, run, scratch};

const PAGE: usize = 4096;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The last contents of each pfn that has any, and the number of replacements.
fn last_pages(bytes: &[u8]) -> (BTreeMap<u64, &[u8]>, usize) {
    let (_, libxc, _) = layers(bytes);
    let mut pages = BTreeMap::new();
    let mut replaced = 0;
    // After the image header (24 bytes) and the domain header (16).
    let mut at = libxc + 40;
    loop {
        let (kind, length) = (u32_at(bytes, at), u32_at(bytes, at + 4));
        let body = at + 8;
        match kind {
            0 => return (pages, replaced),
            // PAGE_DATA: a count, the entries, the pages of entries with data.
            1 => {
                let count = u32_at(bytes, body);
                let mut data = body + 8 + 8 * count;
                for i in 0..count {
                    let entry = u64_at(bytes, body + 8 + 8 * i);
                    let pfn = entry & ((1 << 52) - 1);
                    // BROKEN, XALLOC and XTAB are the last three types.
                    if entry >> 60 >= 0xd {
                        pages.remove(&pfn);
                        continue;
                    }
                    let page = &bytes[data..data + PAGE];
                    replaced += usize::from(pages.insert(pfn, page).is_some());
                    data += PAGE;
                }
                assert_eq!(data, body + length);
            }
            _ => {}
        }
        at = body + length.next_multiple_of(8);
    }
}

#[test]
fn raw_memory_has_the_last_version_of_each_page_at_its_address() {
    let dir = scratch();
    for (name, live) in [("tpv", false), ("tpv-live", true), ("tpvh-live", true)] {
        let saved = fs::read(image(name)).unwrap();
        let (pages, replaced) = last_pages(&saved);
        assert_eq!(replaced > 0, live, "{name}: {replaced}");
        let raw = dir.path().join(name);
        run([
            "export",
            "--format",
            "raw",
            "--sparse",
            arg(&image(name)),
            arg(&raw),
        ])
        .code(0);
        // A PVH guest's last pages are the firmware's, just below 4 GiB, so compare only the pages,
        // not gigabytes of hole.
        let file = fs::File::open(&raw).unwrap();
        for (pfn, page) in &pages {
            let mut found = vec![1; PAGE];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, pfn * PAGE as u64)
                .unwrap();
            assert!(found == **page, "{name}: pfn {pfn:#x}");
        }
        let metadata = file.metadata().unwrap();
        assert!(metadata.len() > pages.last_key_value().unwrap().0 * PAGE as u64);
        assert!(metadata.blocks() * 512 <= (pages.len() * PAGE) as u64 + (1 << 20));
    }
}

#[test]
fn a_core_has_its_sections_and_the_pages_in_order() {
    let dir = scratch();
    for (name, option, list, step) in [
        // A PV core lists {pfn, gmfn}, a translated guest's core lists pfns.
        ("tpv", "--format=elf", ".xen_p2m", 16),
        ("tpv", "--pfn-list", ".xen_pfn", 8),
        ("tpvh-live", "--format=elf", ".xen_pfn", 8),
    ] {
        let saved = fs::read(image(name)).unwrap();
        let (pages, _) = last_pages(&saved);
        let path = dir.path().join("core");
        run(["export", "-f", option, arg(&image(name)), arg(&path)]).code(0);
        let core = fs::read(&path).unwrap();
        assert_eq!(&core[..5], b"\x7fELF\x02");
        // Section headers: e_shoff, e_shnum, e_shstrndx of the ELF-64 header.
        let headers = usize::try_from(u64_at(&core, 0x28)).unwrap();
        let count = usize::from(u16::from_le_bytes([core[0x3c], core[0x3d]]));
        let names = usize::from(u16::from_le_bytes([core[0x3e], core[0x3f]]));
        let place = |n: usize| {
            let header = headers + 64 * n;
            let offset = usize::try_from(u64_at(&core, header + 24)).unwrap();
            let size = usize::try_from(u64_at(&core, header + 32)).unwrap();
            (u32_at(&core, header), offset..offset + size)
        };
        let (_, strings) = place(names);
        let sections: BTreeMap<String, _> = (1..count)
            .map(|n| {
                let (name, range) = place(n);
                let name = &core[strings.clone()][name..];
                let end = name.iter().position(|byte| *byte == 0).unwrap();
                (String::from_utf8(name[..end].to_vec()).unwrap(), range)
            })
            .collect();
        let contents = &core[sections[".xen_pages"].clone()];
        assert_eq!(contents.len(), pages.len() * PAGE);
        for (found, (pfn, page)) in contents.chunks(PAGE).zip(&pages) {
            assert!(found == *page, "{name}: pfn {pfn:#x}");
        }
        let listed = core[sections[list].clone()].chunks(step);
        assert!(
            listed
                .map(|entry| u64_at(entry, 0))
                .eq(pages.keys().copied())
        );
        assert!(sections.contains_key(".xen_prstatus") && sections.contains_key(".note.Xen"));
    }
}

/// Bodies of the records of a type.
fn records(bytes: &[u8], wanted: usize) -> Vec<&[u8]> {
    let mut at = layers(bytes).1 + 40;
    let mut found = Vec::new();
    loop {
        let (kind, length) = (u32_at(bytes, at), u32_at(bytes, at + 4));
        let body = &bytes[at + 8..at + 8 + length];
        if kind == wanted {
            found.push(body);
        }
        if kind == 0 {
            return found;
        }
        at += 8 + length.next_multiple_of(8);
    }
}

/// The loaded segments of a core: address, physical address, contents.
fn pieces(core: &[u8]) -> Vec<(u64, u64, &[u8])> {
    let count = u16::from_le_bytes([core[0x38], core[0x39]]);
    (0..usize::from(count))
        .map(|n| 64 + 56 * n)
        .filter(|at| u32_at(core, *at) == 1)
        .map(|at| {
            let [offset, address, physical, bytes] =
                [8, 16, 24, 32].map(|field| u64_at(core, at + field));
            let offset = usize::try_from(offset).unwrap();
            let bytes = usize::try_from(bytes).unwrap();
            (address, physical, &core[offset..offset + bytes])
        })
        .collect()
}

/// The instruction pointer of a suspended guest is after its hypercall instruction. The bytes
/// before it, found by the core's addresses alone, show whether those are right.
#[test]
fn a_core_for_gdb_has_the_memory_where_the_guest_has_it() {
    /// `syscall`, `vmcall`, `vmmcall`.
    const CALLS: [&[u8]; 3] = [&[0x0f, 0x05], &[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xd9]];
    let dir = scratch();
    for name in ["tpv", "tpv-live", "tpvh-live"] {
        let saved = fs::read(image(name)).unwrap();
        let (pages, _) = last_pages(&saved);
        let path = dir.path().join("core");
        run([
            "export",
            "-f",
            "--format",
            "gdb",
            arg(&image(name)),
            arg(&path),
        ])
        .code(0);
        let core = fs::read(&path).unwrap();
        let pieces = pieces(&core);
        assert!(!pieces.is_empty());
        for (_, physical, contents) in &pieces {
            for (page, pfn) in contents.chunks(PAGE).zip(physical / PAGE as u64..) {
                assert!(pages[&pfn] == page, "{name}: pfn {pfn:#x}");
            }
        }
        // rip: in vcpu_guest_context_t after the record's vcpu, in the CPU record (type 2) of the
        // HVM context.
        let (rip, gs_base) = match records(&saved, 9).first() {
            Some(context) => {
                let mut at = 0;
                loop {
                    let kind = u16::from_le_bytes([context[at], context[at + 1]]);
                    if kind == 2 {
                        // The guest is in ring 0, so gs_base is its kernel's.
                        assert_eq!(context[at + 8 + 736] & 3, 0);
                        break (u64_at(context, at + 8 + 640), u64_at(context, at + 8 + 840));
                    }
                    at += 8 + u32_at(context, at + 4);
                }
            }
            None => {
                let context = &records(&saved, 4)[0][8..];
                (u64_at(context, 648), u64_at(context, 5152))
            }
        };
        // The note: header (12 bytes), name (8), then pr_reg at 112; rip is 17th, gs_base 23rd.
        let notes = usize::try_from(u64_at(&core, 64 + 8)).unwrap();
        assert_eq!(u64_at(&core, notes + 20 + 112 + 16 * 8), rip, "{name}");
        assert_eq!(u64_at(&core, notes + 20 + 112 + 22 * 8), gs_base, "{name}");
        let before = |bytes: usize| {
            let from = rip - bytes as u64;
            pieces.iter().find_map(|(address, _, contents)| {
                let at = usize::try_from(from.checked_sub(*address)?).ok()?;
                contents.get(at..at + bytes)
            })
        };
        assert!(
            CALLS.iter().any(|call| before(call.len()) == Some(*call)),
            "{name}: {rip:#x}: {:x?}",
            before(3)
        );
    }
}

#[test]
fn a_core_for_gdb_that_cannot_be_made_is_refused() {
    let dir = scratch();
    let (saved, out) = (image("tpv"), dir.path().join("core"));
    let export = ["export", "--format"];
    let with = |more: &[&str]| run(export.iter().chain(more).chain(&[arg(&saved), arg(&out)]));
    with(&["gdb", "--vcpu", "1"])
        .code(1)
        .stderr_has("the image has no vcpu 1 (--vcpu): it has 0");
    with(&["gdb", "--pfn-list"]).code(64);
    with(&["elf", "--vcpu", "0"]).code(64);
    with(&["gdb", "--sparse"]).code(64);
    // cr3 points to a frame that is not in the image.
    let mut bytes = fs::read(&saved).unwrap();
    let at = {
        let context = records(&bytes, 4)[0].as_ptr() as usize;
        context - bytes.as_ptr() as usize + 8 + 4984 + 24
    };
    bytes[at..at + 8].copy_from_slice(&0x7_7777_7000_u64.to_le_bytes());
    let bad = dir.path().join("bad.save");
    fs::write(&bad, bytes).unwrap();
    run(["export", "--format", "gdb", arg(&bad), arg(&out)])
        .code(1)
        .stderr_has("pfn 0x777777, which the vcpu's cr3 names, is not in the image");
    assert!(!out.exists(), "a failure leaves no file");
}

#[test]
fn an_edit_changes_what_it_says_and_nothing_else() {
    let dir = scratch();
    let original = image("tpv");
    let edited = dir.path().join("edited.save");
    let uuid = "00112233-4455-6677-8899-aabbccddeeff";
    let options = ["--name", "other", "--uuid", uuid, "-o", arg(&edited)];
    run(["edit"].iter().chain(&options).chain(&[arg(&original)])).code(0);
    let report = run(["diff", "--json", arg(&original), arg(&edited)])
        .code(1)
        .json();
    let fields: Vec<&str> = report["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|difference| difference["field"].as_str().unwrap_or_default())
        .collect();
    assert_eq!(fields, ["c_info.name", "c_info.uuid"], "{report}");
    let [before, after] = [&original, &edited].map(|path| fs::read(path).unwrap());
    let [from, to] = [&before, &after].map(|bytes| layers(bytes).1);
    assert!(before[from..] == after[to..], "the streams differ");

    // An optional record is added, and dropped.
    let note = dir.path().join("note");
    fs::write(&note, "twelve bytes").unwrap();
    let with = dir.path().join("with.save");
    let add = format!("0x80000007:{}", arg(&note));
    run(["edit", "--add", &add, "-o", arg(&with), arg(&original)]).code(0);
    run(["verify", arg(&with)]).code(0);
    run(["inspect", arg(&with)])
        .code(0)
        .stdout_has("0x80000007");
    let without = dir.path().join("without.save");
    run([
        "edit",
        "--drop",
        "0x80000007",
        "-o",
        arg(&without),
        arg(&with),
    ])
    .code(0);
    assert!(fs::read(&without).unwrap() == before);
    // Records that must not be dropped.
    run(["edit", "--drop", "0x1", "-o", arg(&without), arg(&with)]).code(64);
}

/// Fields of blobs are named as in Xen's headers, CPUID leaves and MSRs.
#[test]
fn the_fields_of_blobs_have_names() {
    let of = |name: &str| run(["inspect", "--fields", "--json", arg(&image(name))]).json();
    let value = |report: &serde_json::Value, of: &str, name: &str| -> String {
        let named = report["fields"].as_array().unwrap();
        let blob = named.iter().find(|blob| blob["of"] == of);
        let fields = blob.unwrap_or_else(|| panic!("no {of}"))["fields"].clone();
        let found = fields
            .as_array()
            .unwrap()
            .iter()
            .find(|f| f["name"] == name);
        let found = found.unwrap_or_else(|| panic!("no {name} in {of}: {fields}"));
        found["value"].as_str().unwrap().to_owned()
    };
    let hvm = of("tpvh");
    assert!(value(&hvm, "HVM_CONTEXT CPU 0", "rip").starts_with("0x"));
    assert!(value(&hvm, "HVM_PARAMS", "STORE_PFN").starts_with("0x"));
    assert!(value(&hvm, "X86_CPUID_POLICY 0x0", "text").len() == 14);
    let pv = of("tpv");
    assert!(value(&pv, "X86_PV_VCPU_BASIC vcpu 0", "user_regs.rip").starts_with("0x"));
    assert!(
        value(&pv, "SHARED_INFO", "arch.max_pfn")
            .parse::<u64>()
            .unwrap()
            > 0
    );
    assert_eq!(value(&pv, "start_info", "magic"), "\"xen-3.0-x86_64\"");
    let features = value(&pv, "X86_CPUID_POLICY 0x1", "edx features");
    assert!(features.starts_with("fpu, "), "{features}");
    assert!(features.contains("sse2"), "{features}");
    run(["inspect", "--fields", arg(&image("tpv"))])
        .code(0)
        .stdout_has("highest basic leaf and vendor")
        .stdout_has("PLATFORM_INFO")
        .stdout_has("Configuration");
}
