//! `xsr convert`: streams of each version and byte order, made from the specification's numbers,
//! become version 3, little endian, byte for byte as the same numbers give it; and each wrapper
//! becomes any other.

#[allow(dead_code, reason = "the whole vocabulary of format's tests")]
#[path = "../../../format/tests/it/support/build.rs"]
mod build;

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::common::{arg, backend, image, layers, run, scratch, xsr};
use build::{Rec, STATIC_DATA_END, Stream};

/// The stream in version 3, little endian.
fn expected(version: u32, make: &dyn Fn(u32, bool) -> Stream, before_end: usize) -> Vec<u8> {
    let mut stream = make(version, false);
    if version < 3 {
        stream.version = 3;
        let end = Rec {
            kind: STATIC_DATA_END,
            body: Vec::new(),
        };
        stream.records.insert(before_end, end);
    }
    stream.bytes()
}

/// Version 2 gets its STATIC_DATA_END, after X86_PV_INFO if there is one. Big endian is swapped,
/// except for blobs and pages.
#[test]
fn every_version_and_byte_order_becomes_version_3_little_endian() {
    let dir = scratch();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    type Make = &'static dyn Fn(u32, bool) -> Stream;
    let kinds: [(&str, Make, usize); 3] = [
        ("pv64", &|version, big| Stream::whole_pv(version, big, 8), 1),
        ("pv32", &|version, big| Stream::whole_pv(version, big, 4), 1),
        ("hvm", &|version, big| Stream::whole_hvm(version, big), 0),
    ];
    for (kind, make, before_end) in kinds {
        for version in [2, 3] {
            for big in [false, true] {
                let bytes = make(version, big).bytes();
                fs::write(&source, &bytes).unwrap();
                run(["convert", "-f", arg(&source), "-o", arg(&out)]).code(0);
                let what = format!("{kind}, version {version}, big endian: {big}");
                let got = fs::read(&out).unwrap();
                assert!(got == expected(version, make, before_end), "{what}");
                run(["verify", arg(&out)]).code(0);
                // The same as a filter.
                let mut filter = xsr(["convert", "-", "-o", "-"]);
                let piped = filter.write_stdin(bytes).output().unwrap();
                assert!(piped.status.success(), "{what}: {piped:?}");
                assert!(piped.stdout == got, "{what}: other bytes from a pipe");
            }
        }
    }
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn libvirt(libxl: &[u8]) -> Vec<u8> {
    libvirt_with("<domain type='xen'><name>tpvh</name></domain>", libxl)
}

/// A libvirt image with this XML.
fn libvirt_with(xml: &str, libxl: &[u8]) -> Vec<u8> {
    let xml = [xml.as_bytes(), b"\0"].concat();
    let mut out = b"libvirt-xml\n \0 \r".to_vec();
    out.extend(2_u32.to_le_bytes());
    out.extend(u32::try_from(xml.len()).unwrap().to_le_bytes());
    out.extend([0; 40]);
    out.extend(xml);
    out.extend(libxl);
    out
}

fn xapi(libxc: &[u8]) -> Vec<u8> {
    let mut out = b"XenSavedDomv2-\n".to_vec();
    for (kind, length, body) in [
        (0x0f_u64, 10_u64, b"((time x))".as_slice()),
        (0xf0, 0, libxc),
        (0xffff, 0, b""),
    ] {
        out.extend(kind.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(body);
    }
    out
}

/// The libxc stream in an image.
fn libxc_of(path: &Path) -> Vec<u8> {
    let ran = xsr(["cat", "--layer", "libxc", arg(path)])
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    ran.stdout
}

/// From every wrapper to every layer: the libxc stream does not change.
#[test]
fn what_stands_around_a_stream_is_exchanged_for_any_layer() {
    let dir = scratch();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let plain = fs::read(image("tpvh")).unwrap();
    let (libxl, libxc, end) = layers(&plain);
    let inner = &plain[libxc..end];
    let wrapped = [
        ("xl", plain.clone()),
        ("libxl", plain[libxl..].to_vec()),
        ("libxc", inner.to_vec()),
        ("xz", xz(&plain)),
        ("libvirt", libvirt(&plain[libxl..])),
        ("libvirt in gzip", gzip(&libvirt(&plain[libxl..]))),
        ("xapi", xapi(inner)),
        ("xapi in xz", xz(&xapi(inner))),
    ];
    for (name, bytes) in wrapped {
        fs::write(&source, bytes).unwrap();
        for to in ["libxc", "libxl", "xl"] {
            run(["convert", "-f", "--to", to, arg(&source), "-o", arg(&out)]).code(0);
            run(["verify", arg(&out)])
                .code(0)
                .stdout_has(&format!("{to} image"));
            assert!(libxc_of(&out) == inner, "{name} to {to}: another stream");
        }
    }
}

/// A damaged xz file is bad, and the message says what is damaged.
#[test]
fn a_damaged_xz_file_is_bad() {
    let dir = scratch();
    let source = dir.path().join("source");
    let good = xz(&fs::read(image("tpvh")).unwrap());
    fs::write(&source, &good).unwrap();
    run(["verify", arg(&source)])
        .code(0)
        .stdout_has("inside: xz");
    fs::write(&source, &good[..good.len() / 2]).unwrap();
    run(["verify", arg(&source)])
        .code(2)
        .stdout_has("its xz data end too early, at byte 0x");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x40;
    fs::write(&source, &flipped).unwrap();
    run(["verify", arg(&source)]).code(2).stdout_has("BAD");
}

/// Compressed data are read to their end, however much follows the image, because their checksum is
/// there, and a truncation shows there. The bytes after the image are counted exactly.
#[test]
fn compressed_data_are_judged_to_their_end() {
    let dir = scratch();
    let (source, host) = (dir.path().join("source"), dir.path().join("host"));
    let plain = fs::read(image("tpv")).unwrap();
    let (libxl, libxc, end) = layers(&plain);
    let zstd = |bytes: &[u8]| {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    };
    let lz4 = |bytes: &[u8]| {
        let info = lz4_flex::frame::FrameInfo::new().content_checksum(true);
        let mut out = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    // More than any buffer holds, and incompressible.
    let mut noise = 1_u32;
    let mut behind = vec![0; 2_100_000];
    for byte in &mut behind {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = noise.to_be_bytes()[0];
    }
    let long = [plain.clone(), behind.clone()].concat();
    let twice = [plain.clone(), plain.clone()].concat();
    let of_libvirt = [libvirt(&plain[libxl..]), behind.clone()].concat();
    // The wrapper of the stream ends before the compressed data do.
    let of_xapi = [xapi(&plain[libxc..end]), behind.clone()].concat();
    let cases: [(&str, Vec<u8>, Option<usize>); 7] = [
        ("gzip", gzip(&long), Some(behind.len())),
        ("zstd", zstd(&long), Some(behind.len())),
        ("lz4", lz4(&long), Some(behind.len())),
        ("xz", xz(&long), Some(behind.len())),
        ("two images in gzip", gzip(&twice), Some(plain.len())),
        ("libvirt in gzip", gzip(&of_libvirt), Some(behind.len())),
        ("xapi in gzip in zstd", zstd(&gzip(&of_xapi)), None),
    ];
    for (name, file, count) in cases {
        fs::write(&source, &file).unwrap();
        let verdict = run(["verify", "--json", arg(&source)]).code(0).json();
        let inspected = run(["inspect", "--json", arg(&source)]).code(0).json();
        if let Some(count) = count {
            assert_eq!(verdict["trailing_bytes"], count, "{name}");
            assert_eq!(inspected["trailing_bytes"], count, "{name}");
            let warnings = verdict["warnings"].to_string();
            let another = name.starts_with("two");
            assert_eq!(warnings.contains("like another image"), another, "{name}");
        }
        let mut flipped = file.clone();
        let at = flipped.len() - 6;
        flipped[at] ^= 0x10;
        let cut = &file[..file.len() - 3];
        for bad in [flipped.as_slice(), cut] {
            fs::write(&source, bad).unwrap();
            run(["verify", arg(&source)]).code(2).stdout_has("data");
            let mut piped = xsr(["verify", "-"]);
            piped.write_stdin(bad);
            crate::common::ran(piped).code(2).stdout_has("data");
            run(["restore", &backend(&host), "--name", "bad", arg(&source)]).code(2);
            assert!(crate::common::state(&host, "bad").is_none(), "{name}");
        }
    }
    // After an uncompressed header, without reading it.
    fs::write(&source, of_libvirt).unwrap();
    let verdict = run(["verify", "--json", arg(&source)]).code(0).json();
    assert_eq!(verdict["trailing_bytes"], behind.len());
}

/// Damage in compressed data shows first as a bad image; their checksum shows that it is the
/// compressed data's.
#[test]
fn damaged_compressed_data_are_blamed_before_the_image() {
    let dir = scratch();
    let source = dir.path().join("source");
    let plain = fs::read(image("tpvh")).unwrap();
    let (libxl, libxc, _) = layers(&plain);
    let mut damaged = plain.clone();
    // The type of the first record of the libxc stream, after its two headers.
    damaged[libxc + 40] ^= 0x40;
    let whole = [damaged.clone(), vec![7; 1 << 20]].concat();
    assert!(libxl < libxc);
    let mut file = gzip(&whole);
    fs::write(&source, &file).unwrap();
    let said = run(["verify", arg(&source)]).code(2).stdout;
    assert!(!said.contains("gzip data"), "{said}");
    // Replace the checksum by a wrong one.
    let at = file.len() - 8;
    file[at] ^= 1;
    fs::write(&source, &file).unwrap();
    for command in ["verify", "inspect"] {
        let ran = run([command, arg(&source)]).code(2);
        let said = ran.stdout + &ran.stderr;
        assert!(said.contains("a checksum of its gzip data"), "{said}");
    }
}

/// What libvirt says about a domain besides its devices is carried over or reported. If it cannot
/// be understood, no name and no UUID are invented.
#[test]
fn libvirts_settings_are_carried_over_named_or_refused() {
    let dir = scratch();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let host = backend(&dir.path().join("host"));
    let plain = fs::read(image("tpv")).unwrap();
    let (libxl, ..) = layers(&plain);
    let xml = "<!DOCTYPE domain><domain type='xen'><name>web</name><cpu mode='host-model'/>
        <clock offset='variable' adjustment='3600' basis='utc'/>
        <on_poweroff>preserve</on_poweroff><on_reboot>destroy</on_reboot></domain>";
    fs::write(&source, libvirt_with(xml, &plain[libxl..])).unwrap();
    let convert = [
        "convert",
        "--json",
        "--to",
        "xl",
        arg(&source),
        "-o",
        arg(&out),
    ];
    let ran = run(convert).code(0).stderr_has("cpu mode='host-model'");
    let warnings = ran.json()["warnings"].to_string();
    assert!(warnings.contains("cpu mode='host-model'"), "{warnings}");
    let config = run(["cat", "--layer", "config", arg(&out)]).code(0).stdout;
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["c_info"]["name"], "web");
    assert_eq!(config["b_info"]["rtc_timeoffset"], 3600);
    assert_eq!(config["on_poweroff"], "preserve");
    assert_eq!(config["on_reboot"], "destroy");
    let origin = run(["inspect", "--json", arg(&source)]).code(0).json();
    assert_eq!(origin["origin"]["settings"][0], "cpu mode='host-model'");

    let deep = format!("<domain>{}", "<a>".repeat(100));
    for xml in ["<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>", &deep] {
        fs::write(&source, libvirt_with(xml, &plain[libxl..])).unwrap();
        let convert = ["convert", "-f", "--to", "xl", arg(&source), "-o", arg(&out)];
        run(convert).code(2).stderr_has("--config");
        run(["restore", &host, arg(&source)])
            .code(2)
            .stderr_has("--name");
        // Conversions that need no name succeed.
        let convert = [
            "convert",
            "-f",
            "--to",
            "libxl",
            arg(&source),
            "-o",
            arg(&out),
        ];
        run(convert).code(0).stderr_has("could not be understood");
    }
    run(["restore", &host, "--name", "mine", arg(&source)]).code(0);
}

/// A bad compressed image is detected while it is copied, with the same message as from verify.
#[test]
fn a_bad_image_in_compressed_data_is_judged_as_it_is_copied() {
    let dir = scratch();
    let source = dir.path().join("source");
    let mut plain = fs::read(image("tpv")).unwrap();
    let (_, libxc, _) = layers(&plain);
    plain[libxc + 40] ^= 0x40;
    fs::write(&source, gzip(&plain)).unwrap();
    let verdict = run(["verify", arg(&source)]).code(2).stdout;
    let words = verdict
        .trim_end()
        .split(": BAD: ")
        .nth(1)
        .unwrap()
        .to_owned();
    run(["diff", arg(&source), arg(&source)])
        .code(2)
        .stderr_has(&words);
    fs::write(&source, gzip(b"")).unwrap();
    let verdict = run(["verify", arg(&source)]).code(2);
    assert!(!verdict.stdout.contains("truncated"), "{verdict:?}");
}
