//! What people do with an image: memory taken out of it (`export`), its configuration
//! changed (`edit`). What is expected comes from a scan of the stream written here, from
//! the specification's tables, and from what the options say.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use common::{arg, image, layers, run, scratch};

const PAGE: usize = 4096;

fn u32_at(octets: &[u8], at: usize) -> usize {
    u32::from_le_bytes(octets[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(octets: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(octets[at..at + 8].try_into().unwrap())
}

/// The last contents of each pfn that has any, and how many times one was replaced.
fn last_pages(octets: &[u8]) -> (BTreeMap<u64, &[u8]>, usize) {
    let (_, libxc, _) = layers(octets);
    let mut pages = BTreeMap::new();
    let mut replaced = 0;
    // Behind the image header (24 octets) and the domain header (16).
    let mut at = libxc + 40;
    loop {
        let (kind, length) = (u32_at(octets, at), u32_at(octets, at + 4));
        let body = at + 8;
        match kind {
            0 => return (pages, replaced),
            // PAGE_DATA: a count, the entries, the pages of those that have data.
            1 => {
                let count = u32_at(octets, body);
                let mut data = body + 8 + 8 * count;
                for i in 0..count {
                    let entry = u64_at(octets, body + 8 + 8 * i);
                    let pfn = entry & ((1 << 52) - 1);
                    // BROKEN, XALLOC and XTAB are the last three types.
                    if entry >> 60 >= 0xd {
                        pages.remove(&pfn);
                        continue;
                    }
                    let page = &octets[data..data + PAGE];
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
        // A PVH guest's last pages are those of the firmware, just below 4 GiB: look at the
        // places that matter, not at gigabytes of hole.
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
    for name in ["tpv", "tpvh-live"] {
        let saved = fs::read(image(name)).unwrap();
        let (pages, _) = last_pages(&saved);
        let path = dir.path().join("core");
        run(["export", arg(&image(name)), arg(&path)]).code(0);
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
                let end = name.iter().position(|octet| *octet == 0).unwrap();
                (String::from_utf8(name[..end].to_vec()).unwrap(), range)
            })
            .collect();
        let contents = &core[sections[".xen_pages"].clone()];
        assert_eq!(contents.len(), pages.len() * PAGE);
        for (found, (pfn, page)) in contents.chunks(PAGE).zip(&pages) {
            assert!(found == *page, "{name}: pfn {pfn:#x}");
        }
        // A PV core lists {pfn, gmfn}, one of a translated guest pfns.
        let (list, step) = match name {
            "tpv" => (".xen_p2m", 16),
            _ => (".xen_pfn", 8),
        };
        let listed = core[sections[list].clone()].chunks(step);
        assert!(
            listed
                .map(|entry| u64_at(entry, 0))
                .eq(pages.keys().copied())
        );
        assert!(sections.contains_key(".xen_prstatus") && sections.contains_key(".note.Xen"));
    }
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
    let [from, to] = [&before, &after].map(|octets| layers(octets).1);
    assert!(before[from..] == after[to..], "the streams differ");

    // An optional record comes, and goes.
    let note = dir.path().join("note");
    fs::write(&note, "twelve octets").unwrap();
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
    // What nobody may drop.
    run(["edit", "--drop", "0x1", "-o", arg(&without), arg(&with)]).code(64);
}

/// What is in the blobs has names: those of Xen's headers, of CPUID leaves and of MSRs.
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
    run(["inspect", "--fields", arg(&image("tpv"))])
        .code(0)
        .stdout_has("highest basic leaf and vendor")
        .stdout_has("PLATFORM_INFO")
        .stdout_has("Configuration");
}
