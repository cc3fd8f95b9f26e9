//! The mapped layout on the command line: every image can be mapped and converted back, all
//! commands read it, and an error in one is reported once and clearly. The layout in the file is
//! checked here against its document (docs/mapped.md), without the library.
//!
//! `XSR_FLIPS` is the number of bits flipped in an image.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::common::{arg, backend, create, host_with, image, run, scratch, xsr};

const FOOTER: usize = 160;

fn word(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn half(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// The end of the image in a mapped file, and the offset of its index.
fn ends(file: &[u8]) -> (usize, usize) {
    let footer = &file[file.len() - FOOTER..];
    assert_eq!(&footer[..8], b"XSRmapFt");
    (word(footer, 24), word(footer, 32))
}

/// Map an image.
fn map(image: &Path, directory: &Path, options: &[&str]) -> PathBuf {
    let to = directory.join("mapped.save");
    let mut line = vec!["convert", "-f", "--layout", "mapped", "-o", arg(&to)];
    line.extend(options);
    line.push(arg(image));
    run(line).code(0);
    to
}

/// A mapped image goes through every command that reads images.
fn is_the_same_image(original: &Path, directory: &Path) {
    let mut bytes = fs::read(original).unwrap();
    // Bytes after the end of an image are not part of it.
    let verdict = run(["verify", "--json", arg(original)]).code(0).json();
    bytes.truncate(verdict["bytes"].as_u64().unwrap() as usize);
    for options in [
        &[][..],
        &["--page-digests"],
        &["--no-sparse", "--page-digests"],
    ] {
        let mapped = map(original, directory, options);
        let deep = run(["verify", "--deep", arg(&mapped)]).code(0);
        let digests = match options.contains(&"--page-digests") {
            true => "digests of records and pages, all of them fit",
            false => "digests of records, all of them fit",
        };
        let deep = deep
            .stdout_has("mapped layout, index of")
            .stdout_has(digests);
        assert!(!deep.stdout.contains("after the end"), "{deep:?}");
        let back = directory.join("back.save");
        run(["convert", "-f", arg(&mapped), "-o", arg(&back)]).code(0);
        assert!(
            fs::read(&back).unwrap() == bytes,
            "{original:?}, {options:?}"
        );
    }
    let mapped = map(original, directory, &[]);
    run(["diff", arg(original), arg(&mapped)]).code(0);
    run(["inspect", arg(&mapped)])
        .code(0)
        .stdout_has("layout  mapped layout, index of");
    // cat of both layers, and export: nothing of the layout is left.
    for line in [
        &["cat", "-f"][..],
        &["cat", "-f", "--layer", "xl"],
        &["cat", "-f", "--layer", "config"],
        &["export", "-f", "--format", "elf"],
    ] {
        let of = |file: &Path| {
            let out = directory.join("out");
            let mut line = line.to_vec();
            line.extend(["-o", arg(&out), arg(file)]);
            run(line).code(0);
            fs::read(&out).unwrap()
        };
        assert!(of(original) == of(&mapped), "{original:?}: {line:?}");
    }
}

#[test]
fn images_of_every_kind_are_mapped_and_come_back() {
    for kind in ["pv", "pv32", "hvm", "pvh"] {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let plain = dir.path().join("plain.save");
        run(["save", &backend(&host), "web", arg(&plain)]).code(0);
        is_the_same_image(&plain, dir.path());
        // Restoring it gives the same guest.
        let mapped = map(&plain, dir.path(), &[]);
        run(["restore", &backend(&host), arg(&mapped)]).code(0);
        let again = dir.path().join("again.save");
        run(["save", &backend(&host), "web", arg(&again)]).code(0);
        run(["diff", "--after-restore", arg(&plain), arg(&again)]).code(0);
    }
}

#[test]
fn images_of_a_real_xen_are_mapped_and_come_back() {
    let dir = scratch();
    for name in ["tpv", "tpv-live", "tpvh", "tpvh-live"] {
        is_the_same_image(&image(name), dir.path());
    }
    for path in crate::common::real_images(dir.path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.contains("-t") {
            continue;
        }
        is_the_same_image(&path, dir.path());
    }
}

#[test]
fn zero_pages_are_holes_unless_they_are_not_wanted() {
    let dir = scratch();
    let plain = image("tpvh");
    let holes = map(&plain, dir.path(), &[]);
    let (bytes, found) = (fs::read(&holes).unwrap(), fs::metadata(&holes).unwrap());
    let full = dir.path().join("full.save");
    let line = [
        "convert",
        "--layout",
        "mapped",
        "--no-sparse",
        "-o",
        arg(&full),
        arg(&plain),
    ];
    run(line).code(0);
    assert!(fs::read(&full).unwrap() == bytes);
    assert_eq!(found.len(), bytes.len() as u64);
    let zeros = bytes
        .chunks(4096)
        .filter(|page| page.iter().all(|b| *b == 0))
        .count() as u64;
    assert!(zeros > 100);
    let most = found.len() - zeros * 4096 + (256 << 10);
    assert!(
        found.blocks() * 512 <= most,
        "{} of {most}",
        found.blocks() * 512
    );
    assert!(fs::metadata(&full).unwrap().blocks() * 512 >= found.len());
    // The report counts them.
    let out = dir.path().join("again");
    let line = [
        "convert",
        "--json",
        "--layout",
        "mapped",
        "-o",
        arg(&out),
        arg(&plain),
    ];
    let report = run(line).code(0).json();
    assert_eq!(report["layout"], "mapped");
    assert!(
        report["zero_pages"].as_u64().unwrap() >= zeros - 2,
        "{report}"
    );
    assert_eq!(report["bytes"], bytes.len());
}

/// A pipe has no offsets, and a stream no digests.
#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    let plain = image("tpv");
    for out in ["-", "/dev/null"] {
        run([
            "convert",
            "-f",
            "--layout",
            "mapped",
            "-o",
            out,
            arg(&plain),
        ])
        .code(64)
        .stderr_has("--layout stream");
    }
    for option in ["--page-digests", "--no-sparse"] {
        run(["convert", option, "-o", "/dev/null", arg(&plain)])
            .code(64)
            .stderr_has("is for --layout mapped");
    }
    let dir = scratch();
    let mapped = map(&plain, dir.path(), &[]);
    let out = dir.path().join("edited");
    run(["edit", "--name", "other", "-o", arg(&out), arg(&mapped)])
        .code(64)
        .stderr_has("xsr convert --layout stream makes one that can be edited");
    assert!(!out.exists());
}

/// From a pipe, or compressed, it has no index: it is read like any other stream.
#[test]
fn a_mapped_image_in_a_pipe_is_a_stream() {
    let dir = scratch();
    let plain = image("tpv");
    let mapped = fs::read(map(&plain, dir.path(), &[])).unwrap();
    for line in [
        &["verify", "-"][..],
        &["verify", "--deep", "-"],
        &["inspect", "-"],
    ] {
        let output = xsr(line).write_stdin(mapped.clone()).output().unwrap();
        assert!(output.status.success(), "{line:?}: {output:?}");
    }
    let output = xsr(["cat", "-"])
        .write_stdin(mapped.clone())
        .output()
        .unwrap();
    let bare = xsr(["cat", arg(&plain)]).output().unwrap();
    assert!(output.stdout == bare.stdout && !bare.stdout.is_empty());
    // Without the footer, the blanks in the configuration are normal blanks.
    let output = xsr(["convert", "-", "-o", "-"])
        .write_stdin(mapped)
        .output()
        .unwrap();
    let back = dir.path().join("back.save");
    fs::write(&back, output.stdout).unwrap();
    run(["diff", arg(&plain), arg(&back)]).code(0);
}

#[test]
fn deep_says_where_there_are_no_digests() {
    run(["verify", "--deep", arg(&image("tpv"))])
        .code(0)
        .stdout_has("the image has no digests")
        .stdout_has("xsr convert --layout mapped");
}

/// Truncated at every boundary: one error, and a file that has the whole stream is read on request.
#[test]
fn a_cut_image_is_refused_by_all_who_rely_on_it() {
    let dir = scratch();
    let plain = image("tpvh");
    let whole = fs::read(map(&plain, dir.path(), &["--page-digests"])).unwrap();
    let (image_end, index) = ends(&whole);
    let digests = word(&whole, whole.len() - FOOTER + 48);
    let path = dir.path().join("cut.save");
    let host = dir.path().join("host");
    for (length, expected) in [
        (100, "truncated"),
        (image_end / 2, "truncated"),
        (image_end - 8, "truncated"),
        (image_end - 1, "truncated"),
        (image_end, "are missing: the file was cut off"),
        (image_end + 3, "are incomplete"),
        (image_end + 8, "are incomplete"),
        (digests, "are incomplete"),
        (digests + 16, "are incomplete"),
        (index, "are incomplete"),
        (index + 40, "are incomplete"),
        (whole.len() - FOOTER, "are incomplete"),
        (whole.len() - 1, "are incomplete"),
    ] {
        fs::write(&path, &whole[..length]).unwrap();
        let is_whole_stream = length >= image_end;
        let ran = run(["verify", arg(&path)]).code(2);
        assert_eq!(ran.stdout.lines().count(), 1, "{ran:?}");
        ran.stdout_has(expected);
        let restore = ["restore", &backend(&host), arg(&path)];
        run(restore).code(2).stderr_has(expected);
        assert_eq!(crate::common::state(&host, "tpvh"), None);
        run(["inspect", arg(&path)]).code(2).stderr_has(expected);
        let out = dir.path().join("out");
        run(["convert", "-f", "-o", arg(&out), arg(&path)])
            .code(2)
            .stderr_has(expected);
        let code = if is_whole_stream { 0 } else { 2 };
        let deep = run(["verify", "--ignore-index", arg(&path)]).code(code);
        assert!(!is_whole_stream || deep.stdout.contains("good"), "{deep:?}");
        if is_whole_stream {
            let line = [
                "convert",
                "-f",
                "--ignore-index",
                "-o",
                arg(&out),
                arg(&path),
            ];
            run(line).code(0);
            run(["diff", arg(&plain), arg(&out)]).code(0);
        }
    }
    // The last of them is restored with `--ignore-index`.
    let restore = ["restore", "--ignore-index", &backend(&host), arg(&path)];
    run(restore).code(0);
}

/// A wrong digest, an entry that breaks a rule, the trailer of another image.
#[test]
fn an_index_that_lies_is_one_error() {
    let dir = scratch();
    let whole = fs::read(map(&image("tpvh"), dir.path(), &[])).unwrap();
    let (_, index) = ends(&whole);
    let path = dir.path().join("lies.save");
    let cases: [(&str, usize, u8); 4] = [
        ("does not fit: they are damaged", index + 50, 1),
        ("does not fit: they are damaged", whole.len() - 1, 1),
        ("entry 1 of the index", index + 80 + 5, 0x40),
        ("version 0x3, expected 1", whole.len() - FOOTER + 8, 2),
    ];
    for (expected, at, bits) in cases {
        let mut file = whole.clone();
        file[at] ^= bits;
        fs::write(&path, file).unwrap();
        let ran = run(["verify", arg(&path)]).code(2);
        assert_eq!(ran.stdout.lines().count(), 1, "{ran:?}");
        ran.stdout_has(expected).stdout_has("--ignore-index");
        run(["verify", "--deep", arg(&path)])
            .code(2)
            .stdout_has(expected);
        run(["inspect", "--page", "1", arg(&path)])
            .code(2)
            .stderr_has(expected);
        run(["inspect", "--ignore-index", "--page", "1", arg(&path)]).code(0);
        run(["verify", "--ignore-index", arg(&path)]).code(0);
        // Commands that never use an index still read it.
        run(["diff", arg(&image("tpvh")), arg(&path)]).code(0);
    }
    // The trailer of another image.
    let other = fs::read(map(&image("tpvh-live"), dir.path(), &[])).unwrap();
    let (end, from) = ends(&other);
    let own = ends(&whole).0;
    assert_ne!(end, own);
    let spliced = [&whole[..own], &other[end..]].concat();
    assert!(from < other.len());
    fs::write(&path, spliced).unwrap();
    run(["verify", arg(&path)])
        .code(2)
        .stdout_has("the footer at byte");
}

/// The same image with another index, whose digest fits: `change` gets the entries and the footer.
fn with_index(whole: &[u8], change: impl FnOnce(&mut Vec<u8>, &mut [u8])) -> Vec<u8> {
    let (_, index) = ends(whole);
    let mut entries = whole[index..whole.len() - FOOTER].to_vec();
    let mut footer = whole[whole.len() - FOOTER..].to_vec();
    change(&mut entries, &mut footer);
    let digest = xsr_format::layout::write::digest(&[&entries, &footer[..128]]);
    footer[128..].copy_from_slice(&digest);
    [&whole[..index], &entries, &footer].concat()
}

/// An index that fits in itself, but contradicts the stream: each command that relies on it says so,
/// and the others read the stream.
#[test]
fn an_index_that_contradicts_the_stream_is_used_by_no_command() {
    let dir = scratch();
    let plain = image("tpvh-live");
    let whole = fs::read(map(&plain, dir.path(), &[])).unwrap();
    let another_pfn = with_index(&whole, |entries, _| {
        let at = entries.len() - 80 + 24;
        let pfn = word(entries, at) as u64 + 1;
        entries[at..at + 8].copy_from_slice(&pfn.to_le_bytes());
    });
    // The last record has no entry, and an index out of order would have `cat` and `convert` write
    // the other records alone.
    let hidden = with_index(&whole, |entries, footer| {
        let last = entries.split_off(entries.len() - 80);
        let records = word(footer, 40) as u64 - 1;
        let pages = (word(footer, 56) - half(&last, 40)) as u64;
        footer[40..48].copy_from_slice(&records.to_le_bytes());
        footer[56..64].copy_from_slice(&pages.to_le_bytes());
        footer[12] |= 2;
    });
    let [path, out] = ["forged.save", "out"].map(|name| dir.path().join(name));
    let host = dir.path().join("host");
    for (forged, words) in [
        (another_pfn, "its highest pfn is"),
        (hidden, "PAGE_DATA records, but the image has more"),
    ] {
        fs::write(&path, forged).unwrap();
        let refuses = |line: &[&str]| {
            let mut line = line.to_vec();
            line.push(arg(&path));
            let ran = run(&line).code(2);
            let said = format!("{}{}", ran.stdout, ran.stderr);
            assert!(
                said.contains(words) && said.contains("--ignore-index"),
                "{said}"
            );
            line.insert(1, "--ignore-index");
            run(line).code(0)
        };
        refuses(&["verify"]);
        refuses(&["inspect"]);
        refuses(&["convert", "-f", "-o", arg(&out)]);
        run(["diff", arg(&plain), arg(&out)]).code(0);
        let to = backend(&host);
        refuses(&["restore", &to]);
        fs::remove_dir_all(&host).unwrap();
        for line in [&["cat"][..], &["export", "--format", "elf"]] {
            let of = |file: &Path| {
                let mut line = line.to_vec();
                line.extend(["-f", "-o", arg(&out), arg(file)]);
                run(line).code(0);
                fs::read(&out).unwrap()
            };
            assert!(of(&path) == of(&plain), "{line:?}");
        }
        run(["diff", arg(&plain), arg(&path)]).code(0);
        run(["edit", "--name", "other", "-f", "-o", arg(&out), arg(&path)]).code(64);
    }
}

/// A file with another kind of index after it is read as before.
#[test]
fn another_trailer_is_trailing_bytes() {
    let dir = scratch();
    let whole = fs::read(map(&image("tpv"), dir.path(), &[])).unwrap();
    let (image_end, _) = ends(&whole);
    let path = dir.path().join("foreign.save");
    let mut file = whole[..image_end].to_vec();
    file.resize(image_end.next_multiple_of(4096) + 4096, 0);
    file.extend(b"XSRindex\0\0\0\0\0\0\0\0");
    fs::write(&path, file).unwrap();
    run(["verify", arg(&path)])
        .code(0)
        .stdout_has("after the end of the image");
    run(["diff", arg(&image("tpv")), arg(&path)]).code(0);
    run(["inspect", "--page", "1", arg(&path)]).code(0);
    // Its pads are removed, too.
    let out = dir.path().join("out");
    run(["convert", "-f", "-o", arg(&out), arg(&path)]).code(0);
    let (back, plain) = (fs::read(&out).unwrap(), fs::read(image("tpv")).unwrap());
    assert!(back.len() - plain.len() < 8);
}

#[test]
fn a_flipped_bit_is_named_to_record_and_page() {
    let flips = std::env::var("XSR_FLIPS").map_or(12, |n| n.parse().unwrap());
    let dir = scratch();
    let mut file = fs::read(map(&image("tpv-live"), dir.path(), &["--page-digests"])).unwrap();
    let (image_end, index) = ends(&file);
    let path = dir.path().join("flipped.save");
    let records: Vec<(usize, usize, usize)> = file[index..file.len() - FOOTER]
        .chunks(80)
        .map(|e| (word(e, 0), word(e, 8), word(e, 8) + 4096 * half(e, 40)))
        .collect();
    let mut at = 12_345_usize;
    for flip in 0..flips {
        at = at
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // Not in the first bytes, which decide how the file is read at all.
        let byte = 64 + (at >> 20) % (image_end - 64);
        file[byte] ^= 1 << (flip % 8);
        fs::write(&path, &file).unwrap();
        let ran = run(["verify", "--deep", arg(&path)]).code(2);
        match records
            .iter()
            .find(|(from, _, to)| (*from..*to).contains(&byte))
        {
            None => ran.stdout_has("the headers and records other than PAGE_DATA"),
            Some((from, data, _)) if byte >= *data => {
                let page = byte - (byte - data) % 4096;
                ran.stdout_has(&format!("(bytes {from:#x} to"))
                    .stdout_has(&format!("at byte {page:#x}"))
                    .stdout_has(", pfns 0x")
            }
            Some((from, ..)) => ran
                .stdout_has(&format!("(bytes {from:#x} to"))
                .stdout_has("a type or pfn, was changed"),
        };
        file[byte] ^= 1 << (flip % 8);
    }
    // Two at once: both are listed, in JSON too.
    for (_, data, _) in records.iter().filter(|(_, data, end)| data < end).take(2) {
        file[*data] ^= 1;
    }
    fs::write(&path, &file).unwrap();
    run(["verify", "--deep", arg(&path)])
        .code(2)
        .stdout_has("(1 more)")
        .stdout_has("\n  damaged: PAGE_DATA number");
    let json = run(["verify", "--deep", "--json", arg(&path)])
        .code(2)
        .json();
    assert_eq!(json["damage"].as_array().unwrap().len(), 2, "{json}");
    assert_eq!(json["digests_checked"], true);
}

/// A page is the same from a mapped image and from a plain one; only its offset differs.
#[test]
fn one_page_is_shown() {
    let dir = scratch();
    for name in ["tpv", "tpvh-live"] {
        let plain = image(name);
        let mapped = map(&plain, dir.path(), &[]);
        let show = |file: &Path, pfn: u64, options: &[&str]| {
            let pfn = format!("{pfn:#x}");
            let mut line = vec!["inspect", "--json", "--page", pfn.as_str()];
            line.extend(options);
            line.push(arg(file));
            run(line).code(0).json()
        };
        let bytes = fs::read(&mapped).unwrap();
        for pfn in [0, 1, 0x100, 0x3ff] {
            let of_plain = show(&plain, pfn, &[]);
            let of_mapped = show(&mapped, pfn, &[]);
            let ignoring = show(&mapped, pfn, &["--ignore-index"]);
            assert_eq!(of_mapped["layout"], "mapped");
            assert_eq!(
                (&of_plain["layout"], &ignoring["layout"]),
                (&"stream".into(), &"stream".into())
            );
            for field in ["pfn", "type", "contents"] {
                assert_eq!(of_plain[field], of_mapped[field], "{name}: {pfn:#x}");
                assert_eq!(ignoring[field], of_mapped[field], "{name}: {pfn:#x}");
            }
            assert_eq!(ignoring["offset"], of_mapped["offset"]);
            let Some(at) = of_mapped["offset"].as_u64() else {
                assert!(of_mapped["contents"].is_null());
                continue;
            };
            assert_eq!(at % 4096, 0);
            let page = &bytes[at as usize..][..4096];
            let digits: String = page.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(of_mapped["contents"], digits);
        }
        run(["inspect", "--page", "1", arg(&mapped)])
            .code(0)
            .stdout_has("pfn 0x1, ");
        run(["inspect", "--page", "99999999", arg(&mapped)])
            .code(1)
            .stderr_has("does not mention pfn");
        run(["inspect", "--page", "99999999", arg(&plain)])
            .code(1)
            .stderr_has("does not mention pfn");
    }
    run(["inspect", "--page", "x", "-"])
        .code(64)
        .stderr_has("decimal or with 0x");
    let mut piped = xsr(["inspect", "--page", "1", "-"]);
    let output = piped
        .write_stdin(fs::read(image("tpv")).unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}

/// Legacy images and images of other versions can be mapped as they can be converted to streams.
#[test]
fn what_is_converted_on_the_way_is_mapped_too() {
    let dir = scratch();
    let host = dir.path().join("host");
    create(&host, "web", "pvh");
    let plain = dir.path().join("plain.save");
    run(["save", &backend(&host), "web", arg(&plain)]).code(0);
    for to in ["libxc", "libxl", "xl"] {
        let mapped = map(&plain, dir.path(), &["--to", to]);
        run(["verify", "--deep", arg(&mapped)])
            .code(0)
            .stdout_has(&format!("good, {to} image"));
        let back = dir.path().join("back");
        run(["convert", "-f", arg(&mapped), "-o", arg(&back)]).code(0);
        let direct = dir.path().join("direct");
        run(["convert", "-f", "--to", to, arg(&plain), "-o", arg(&direct)]).code(0);
        assert!(
            fs::read(&back).unwrap() == fs::read(&direct).unwrap(),
            "{to}"
        );
    }
}
