//! Consistent verdicts: every command reads a stream with repeated records in the same way, and
//! `verify` agrees with `restore`.

mod configuration;

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{arg, backend, image, layers, run, scratch};

/// A record of the libxc stream, as `(kind, body)`.
type Rec = (u32, Vec<u8>);

const P2M_FRAMES: u32 = 3;
const HVM_CONTEXT: u32 = 9;
const HVM_PARAMS: u32 = 10;
const END: u32 = 0;

/// Split the libxc stream of an image, change its records, and join it again.
fn changed(from: &str, to: &Path, change: impl FnOnce(&mut Vec<Rec>)) {
    let bytes = fs::read(image(from)).unwrap();
    let (_, libxc, _) = layers(&bytes);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = libxc + 40;
    let mut records = Vec::new();
    loop {
        let (kind, length) = (word(at), word(at + 4) as usize);
        records.push((kind, bytes[at + 8..at + 8 + length].to_vec()));
        at += 8 + length.next_multiple_of(8);
        if kind == END {
            break;
        }
    }
    change(&mut records);
    let mut out = bytes[..libxc + 40].to_vec();
    for (kind, body) in records {
        out.extend(record(kind, &body));
    }
    out.extend_from_slice(&bytes[at..]);
    fs::write(to, out).unwrap();
}

fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    out.extend(body);
    out.resize(8 + body.len().next_multiple_of(8), 0);
    out
}

fn find(records: &[Rec], kind: u32) -> usize {
    records.iter().position(|(k, _)| *k == kind).unwrap()
}

/// An entry of an HVM context.
fn entry(kind: u16, instance: u16, body: &[u8]) -> Vec<u8> {
    let mut out = [kind.to_le_bytes(), instance.to_le_bytes()].concat();
    out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    out.extend(body);
    out
}

/// The entries of an HVM context, each with its head.
fn entries(mut context: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    while !context.is_empty() {
        let length = u32::from_le_bytes(context[4..8].try_into().unwrap()) as usize;
        let (entry, rest) = context.split_at(8 + length);
        out.push(entry.to_vec());
        context = rest;
    }
    out
}

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.save"))
}

/// A second X86_PV_P2M_FRAMES replaces entries instead of adding more.
#[test]
fn a_repeated_p2m_overwrites() {
    let dir = scratch();
    let twice = path(dir.path(), "twice");
    changed("tpv", &twice, |records| {
        let at = find(records, P2M_FRAMES);
        records.insert(at, records[at].clone());
    });
    let good = image("tpv");
    run(["verify", arg(&twice)]).code(0);
    let ran = run(["diff", "--json", arg(&good), arg(&twice)]).code(1);
    let differences = ran.json()["differences"].as_array().unwrap().clone();
    let sections: Vec<_> = differences.iter().map(|d| &d["section"]).collect();
    assert_eq!(sections, ["records"], "{differences:?}");
}

/// Several HVM_PARAMS merge, parameter by parameter, in every command.
#[test]
fn several_hvm_params_merge() {
    let dir = scratch();
    let split = path(dir.path(), "split");
    let mut count = 0;
    changed("tpvh", &split, |records| {
        let at = find(records, HVM_PARAMS);
        let body = records[at].1.clone();
        let params: Vec<&[u8]> = body[8..].chunks(16).collect();
        count = params.len();
        let of = |params: &[&[u8]]| {
            let count = u64::try_from(params.len()).unwrap().to_le_bytes().to_vec();
            [count, params.concat()].concat()
        };
        // The first half has another value for parameter 1 (or the one that is first).
        let mut other = params[0].to_vec();
        other[8] ^= 0xff;
        records[at].1 = of(&[&[other.as_slice()], &params[1..]].concat());
        records.insert(at + 1, (HVM_PARAMS, of(&params[..1])));
    });
    let good = image("tpvh");
    let ran = run(["diff", "--json", arg(&good), arg(&split)]).code(1);
    let differences = ran.json()["differences"].as_array().unwrap().clone();
    let sections: Vec<_> = differences.iter().map(|d| &d["section"]).collect();
    assert_eq!(sections, ["records"], "{differences:?}");
    let params =
        |file: &Path| run(["inspect", "--json", arg(file)]).code(0).json()["hvm_params"].clone();
    assert_eq!(params(&split), params(&good));
    assert_eq!(params(&good).as_array().unwrap().len(), count);

    // Restoring it gives the same guest.
    let (host, again) = (dir.path().join("host"), path(dir.path(), "again"));
    run(["restore", &backend(&host), arg(&split)]).code(0);
    run(["save", &backend(&host), "tpvh", arg(&again)]).code(0);
    let ran = run([
        "diff",
        "--json",
        "--after-restore",
        arg(&split),
        arg(&again),
    ])
    .code(1);
    let differences = ran.json()["differences"].as_array().unwrap().clone();
    let unexpected = differences.iter().filter(|d| d["expected"].is_null());
    assert!(
        unexpected.clone().all(|d| d["section"] == "records"),
        "{differences:?}"
    );
}

/// Asserts that `verify` and `restore` give the same verdict, with the same words.
fn both_say(file: &Path, words: &str) {
    run(["verify", arg(file)]).code(2).stdout_has(words);
    let dir = scratch();
    let host = dir.path().join("host");
    run(["restore", &backend(&host), arg(file)])
        .code(2)
        .stderr_has(words);
}

#[test]
fn an_hvm_context_that_xen_cannot_frame_is_bad() {
    let dir = scratch();
    let file = path(dir.path(), "context");
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        changed("tpvh", &file, |records| {
            let at = find(records, HVM_CONTEXT);
            let mut list = entries(&records[at].1);
            change(&mut list);
            records[at].1 = list.concat();
        });
    };
    let cpu = |list: &[Vec<u8>]| list.iter().find(|e| e[0] == 2).unwrap().clone();
    with(&|list| drop(list.pop()));
    both_say(&file, "the context has no END");
    with(&|list| drop(list.remove(0)));
    both_say(&file, "expected HEADER");
    with(&|list| list[0][8] ^= 1);
    both_say(&file, "magic");
    with(&|list| {
        let last = list.len() - 2;
        list[last].truncate(20);
        list.truncate(last + 1);
    });
    both_say(&file, "are left");
    with(&|list| {
        let mut cpu = cpu(list);
        cpu[2] = 200;
        list.insert(2, cpu);
    });
    both_say(&file, "CPU (instance 200)");
    with(&|list| list.insert(2, cpu(list)));
    both_say(&file, "CPU (instance 0) comes twice");
    with(&|list| list[1] = entry(2, 0, &[0; 900]));
    both_say(&file, "has 900 bytes");
    // What Xen ignores is not bad.
    with(&|list| list.push(vec![1, 2, 3]));
    run(["verify", arg(&file)]).code(0);
}

#[test]
fn state_that_the_domain_cannot_hold_is_bad() {
    let dir = scratch();
    let file = path(dir.path(), "state");
    // A vcpu that no guest has, and one that this domain lacks.
    for (vcpu, words) in [(0xffff_fffe_u32, "expected at most 8191"), (1, "vcpu 1")] {
        changed("tpv", &file, |records| {
            let at = find(records, 4);
            let mut second = records[at].clone();
            second.1[..4].copy_from_slice(&vcpu.to_le_bytes());
            records.insert(at + 1, second);
        });
        both_say(&file, words);
    }
    // A pfn that no x86 guest has. (The pages of tpvh are not bounded by a p2m.)
    changed("tpvh", &file, |records| {
        let at = find(records, 1);
        let count = u64::from_le_bytes(records[at].1[..8].try_into().unwrap());
        let last = usize::try_from(8 * count).unwrap();
        let entry = 1_u64 << 40 | 0xf << 60;
        records[at].1[last..last + 8].copy_from_slice(&entry.to_le_bytes());
        // This last entry has no contents now: drop those that it may have had.
        let entries = records[at].1[8..last + 8].chunks(8);
        let with = entries.filter(|e| e[7] >> 4 < 0xd).count();
        records[at].1.truncate(last + 8 + with * 4096);
    });
    both_say(&file, "beyond 0xffffffffff");
}

#[test]
fn the_guest_type_is_part_of_the_verdict() {
    let dir = scratch();
    let file = path(dir.path(), "type");
    let mut bytes = fs::read(image("tpv")).unwrap();
    let (_, libxc, _) = layers(&bytes);
    bytes[libxc + 24] = 0x41;
    fs::write(&file, bytes).unwrap();
    both_say(&file, "the guest is of type 0x41, which is unknown");
}

/// Linux uses one page of invalid entries for all ranges without memory.
#[test]
fn a_p2m_frame_may_stand_for_ranges_without_memory_only() {
    let dir = scratch();
    let file = path(dir.path(), "p2m");
    let with = |ranges: usize, frame: Option<u64>| {
        changed("tpv", &file, |records| {
            let at = find(records, P2M_FRAMES);
            let body = &mut records[at].1;
            let own = body[8..16].try_into().map(u64::from_le_bytes).unwrap();
            for _ in 0..ranges {
                body.extend(frame.unwrap_or(own).to_le_bytes());
            }
            let last = u32::try_from((body.len() - 8) / 8 * 512 - 1).unwrap();
            body[4..8].copy_from_slice(&last.to_le_bytes());
        });
    };
    with(100, Some(0x2bc));
    run(["verify", arg(&file)]).code(0);
    let host = dir.path().join("host");
    run(["restore", &backend(&host), arg(&file)]).code(0);
    with(1, None);
    both_say(&file, "frames 0 and 2 of the p2m are both at pfn");
}

/// The restore writes the p2m into pages of the guest.
#[test]
fn a_p2m_frame_is_a_page_of_the_image() {
    let dir = scratch();
    let file = path(dir.path(), "p2m");
    let with = |frame: u64| {
        changed("tpv", &file, |records| {
            let at = find(records, P2M_FRAMES);
            records[at].1[8..16].copy_from_slice(&frame.to_le_bytes());
        });
    };
    with(0x20_0000_0120);
    both_say(
        &file,
        "X86_PV_P2M_FRAMES entry 0 names frame 0x2000000120: the image holds no such page",
    );
    // The top-level table of its page tables.
    let pages = run(["inspect", "--pages", arg(&image("tpv"))])
        .code(0)
        .stdout;
    let table = pages.lines().find_map(|line| {
        let (first, page_type) = line.trim().strip_prefix("0x")?.split_once(' ')?;
        let first = first.split('–').next()?;
        (page_type.trim() == "L1TAB").then(|| first.to_owned())
    });
    let pfn = table.expect("a PV guest has tables");
    with(u64::from_str_radix(&pfn, 16).unwrap());
    both_say(&file, "that page is a page table");
}

#[test]
fn what_is_odd_is_a_warning() {
    let dir = scratch();
    let file = path(dir.path(), "odd");
    let mut bytes = fs::read(image("tpv")).unwrap();
    bytes.extend(bytes.clone());
    fs::write(&file, bytes).unwrap();
    let warning = "begin like another image";
    run(["verify", arg(&file)]).code(0).stdout_has(warning);
    run(["inspect", arg(&file)]).code(0).stdout_has(warning);
    let warnings = |command: &str| {
        let ran = run([command, "--json", arg(&file)]).code(0);
        let warnings = ran.json()["warnings"].as_array().unwrap().clone();
        warnings[0].as_str().unwrap().to_owned()
    };
    assert_eq!(warnings("verify"), warnings("inspect"));
    changed("tpvh", &file, |records| {
        records.insert(0, (0x8000_0001, vec![1, 2, 3]));
        let at = find(records, HVM_CONTEXT);
        let end = records[at].1.len() - 8;
        let unknown = entry(99, 0, &[1; 16]);
        records[at].1.splice(end..end, unknown);
        let at = find(records, HVM_PARAMS);
        records.remove(at);
    });
    run(["verify", arg(&file)])
        .code(0)
        .stdout_has("1 optional record")
        .stdout_has("unknown type 99")
        .stdout_has("no HVM_PARAMS");
}

/// The restore names a parameter that it refuses, and `verify` warns of it.
#[test]
fn an_unknown_hvm_parameter_is_named() {
    let dir = scratch();
    let file = path(dir.path(), "param");
    changed("tpvh", &file, |records| {
        let at = find(records, HVM_PARAMS);
        let body = &mut records[at].1;
        let count = u32::from_le_bytes(body[..4].try_into().unwrap());
        body[..4].copy_from_slice(&(count + 1).to_le_bytes());
        body.extend(200_u64.to_le_bytes());
        body.extend(7_u64.to_le_bytes());
    });
    run(["verify", arg(&file)])
        .code(0)
        .stdout_has("HVM_PARAMS: parameter 0xc8 is unknown");
    let host = dir.path().join("host");
    run(["restore", &backend(&host), arg(&file)])
        .code(1)
        .stderr_has("HVM_PARAMS: parameter 0xc8 (unknown) was refused with the value 0x7");
}

/// For a truncated file, every command reports the same number of missing bytes.
#[test]
fn every_command_counts_the_same_missing_bytes() {
    let bytes = fs::read(image("tpv")).unwrap();
    let (_, libxc, _) = layers(&bytes);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // Offsets and lengths of PAGE_DATA and of the vcpu's registers.
    let mut places = Vec::new();
    let mut at = libxc + 40;
    while word(at) != END {
        let length = 8 + (word(at + 4) as usize).next_multiple_of(8);
        if [1, 4].contains(&word(at)) {
            places.push((at, length));
        }
        at += length;
    }
    let dir = scratch();
    let good = image("tpv");
    for (at, length) in places {
        for cut in [10, 30, 2000, length / 2 + 77, length - 1] {
            if cut >= length {
                continue;
            }
            let file = path(dir.path(), "cut");
            fs::write(&file, &bytes[..at + cut]).unwrap();
            let words = format!("{} bytes more were expected", length - cut);
            let (host, out) = (dir.path().join("host"), dir.path().join("out"));
            let host = backend(&host);
            run(["verify", arg(&file)]).code(2).stdout_has(&words);
            let says = |args: &[&str]| drop(run(args).code(2).stderr_has(&words));
            says(&["inspect", arg(&file)]);
            says(&["convert", "--to", "libxc", arg(&file), "-o", arg(&out)]);
            says(&["edit", "--name", "other", arg(&file), "-o", arg(&out)]);
            says(&["cat", arg(&file)]);
            says(&["restore", &host, arg(&file)]);
            says(&["restore", &host, "--threads", "1", arg(&file)]);
            says(&["diff", arg(&good), arg(&file)]);
            says(&["export", arg(&file), "-o", arg(&out)]);
        }
    }
}

/// The total size of the records that a restore keeps is bounded.
#[test]
fn emulators_records_are_bounded() {
    let dir = scratch();
    let file = path(dir.path(), "emulators");
    let bytes = fs::read(image("tpvh")).unwrap();
    let (.., end) = layers(&bytes);
    let mut out = bytes[..end].to_vec();
    let mut body = [2_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
    body.resize(40 << 20, 0);
    for _ in 0..4 {
        out.extend(record(3, &body));
    }
    out.extend(record(0, &[]));
    fs::write(&file, out).unwrap();
    both_say(&file, "more than a restore keeps");
}

/// The number of records is bounded, however short they are, because the memory for each is longer
/// than it is.
#[test]
fn tiny_records_are_bounded_in_number() {
    let dir = scratch();
    let file = path(dir.path(), "tiny");
    let tsc = (8, vec![0; 24]);
    changed("tpvh", &file, |records| {
        let at = find(records, HVM_PARAMS);
        records.splice(at..at, std::iter::repeat_n(tsc.clone(), 1 << 17));
    });
    let words = "more than 131072 records other than PAGE_DATA";
    both_say(&file, words);
    run(["inspect", arg(&file)]).code(2).stderr_has(words);
    run(["diff", arg(&file), arg(&file)])
        .code(2)
        .stderr_has(words);

    changed("tpvh", &file, |records| {
        let at = find(records, HVM_CONTEXT);
        let mut list = entries(&records[at].1);
        let end = list.pop().unwrap();
        let unknown = (0..=u16::MAX).map(|instance| entry(0x7000, instance, &[]));
        list.extend(unknown);
        list.push(end);
        records[at].1 = list.concat();
    });
    both_say(&file, "expected at most 65536 entries");

    // Of eight bytes each, around the libxc stream.
    let bytes = fs::read(image("tpvh")).unwrap();
    let (.., end) = layers(&bytes);
    let mut out = bytes[..end].to_vec();
    out.extend(record(0x8000_0001, &[]).repeat(300_000));
    out.extend(record(0, &[]));
    fs::write(&file, out).unwrap();
    both_say(&file, "more than a restore keeps");
}

/// `diff` compares the bytes of optional records, because it knows nothing else of them. The number
/// of bytes is bounded.
#[test]
fn optional_records_of_many_bytes_are_good_and_not_compared() {
    let dir = scratch();
    let file = path(dir.path(), "long");
    changed("tpvh", &file, |records| {
        let at = find(records, HVM_PARAMS);
        let body = vec![0; 20 << 20];
        records.splice(at..at, std::iter::repeat_n((0x8000_0001, body), 2));
    });
    run(["verify", arg(&file)]).code(0);
    run(["diff", arg(&file), arg(&file)])
        .code(1)
        .stderr_has("too many bytes in optional records");
}

#[test]
fn raw_memory_has_holes_unless_asked_otherwise() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = scratch();
    let raw = dir.path().join("raw");
    run([
        "export",
        "--format",
        "raw",
        arg(&image("tpvh")),
        "-o",
        arg(&raw),
    ])
    .code(0);
    let made = fs::metadata(&raw).unwrap();
    assert!(
        made.len() > 0xf000_0000 && made.blocks() * 512 < 64 << 20,
        "{made:?}"
    );
    // One page far beyond all others: with zeros, the file would have terabytes.
    let far = path(dir.path(), "far");
    changed("tpvh", &far, |records| {
        let at = find(records, 1);
        let entry = 1_u64 << 36;
        records[at].1[8..16].copy_from_slice(&entry.to_le_bytes());
    });
    run([
        "export",
        "--format",
        "raw",
        "--no-sparse",
        arg(&far),
        "--force",
        "-o",
        arg(&raw),
    ])
    .code(1)
    .stderr_has("probably damaged");
}
