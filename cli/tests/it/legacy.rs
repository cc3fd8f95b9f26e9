//! Legacy images, and images with other toolstacks' wrappers: converted, verified, restored,
//! compared.
//!
//! The legacy images are made by `tools/legacy_image.py`, which shares no code with xsr, and
//! reports itself what the guest's final memory is. It needs `python3`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{arg, image, run, scratch, xsr};
use serde_json::Value;
use xsr_format::frame::Page;
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};

/// Make a legacy image; `None`, with a message, if there is no `python3`.
fn generate(to: &Path, options: &[&str]) -> Option<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/legacy_image.py");
    let output = Command::new("python3")
        .arg(script)
        .args(options)
        .arg("-o")
        .arg(to)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{output:?}");
            Some(())
        }
        Err(e) => {
            eprintln!("SKIPPED: legacy images are made by python3, which cannot be run: {e}");
            None
        }
    }
}

/// The type of each pfn, and the CRC-32 of its contents.
type Memory = BTreeMap<u64, (u64, Option<u64>)>;

/// The guest's final memory according to an image.
fn memory(image: &Path) -> Memory {
    let mut walk = Walk::open(File::open(image).unwrap(), ReadOptions::default()).unwrap();
    let mut memory = Memory::new();
    while let Some(step) = walk.next_step().unwrap() {
        let Content::PageData(mut body) = step.content else {
            continue;
        };
        let entries: Vec<_> = body.entries().iter().collect();
        for entry in entries {
            let mut page: Page = [0; 4096];
            let crc = entry.page_type.has_data().then(|| {
                assert!(body.read_page(&mut page).unwrap());
                let mut crc = flate2::Crc::new();
                crc.update(&page);
                u64::from(crc.sum())
            });
            memory.insert(entry.pfn.0, (entry.page_type.nibble().into(), crc));
        }
    }
    memory
}

/// The guest's final memory according to the generator.
fn expected(json: &Path) -> Memory {
    let value: Value = serde_json::from_reader(File::open(json).unwrap()).unwrap();
    let pages = value["pages"].as_object().unwrap();
    pages
        .iter()
        .map(|(pfn, page)| {
            let page_type = page[0].as_u64().unwrap();
            (pfn.parse().unwrap(), (page_type, page[1].as_u64()))
        })
        .collect()
}

/// Each kind, from a file and from a pipe: the guest's memory is as the generator made it.
#[test]
fn every_kind_of_legacy_image_keeps_its_memory() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (legacy, json, out) = (at("g.legacy"), at("g.json"), at("g.out"));
    for line in [
        "--kind hvm --toolstack --verify",
        "--kind hvm --width 32 --live --filler 3 --filler-batch",
        "--kind hvm --tmem --qemu old",
        "--kind hvm --checkpoints 4 --compress --qemu remus",
        "--kind hvm --checkpoints 3 --compress --cut-checkpoint --pages 900",
        "--kind pv64 --xsave 832 --vcpus 5 --shuffle --unknown-block",
        "--kind pv64 --width 32 --no-last-checkpoint",
        "--kind pv64 --checkpoints 4 --compress --xsave 64",
        "--kind pv32 --width 32 --checkpoints 3 --cut-checkpoint",
        "--kind pv32 --no-vcpu-info --vcpus 1",
        "--kind pv32 --width 32 --no-extended-info --seed 4",
    ] {
        let mut options: Vec<&str> = line.split(' ').collect();
        options.extend(["--expect", arg(&json)]);
        if generate(&legacy, &options).is_none() {
            return;
        }
        let mut args = vec!["convert", arg(&legacy), "-f", "-o", arg(&out)];
        if line.contains("no-extended-info") {
            // The kind of guest is not stored in such a stream.
            args.extend(["--guest", "pv", "--width", "32"]);
        }
        run(&args).code(0);
        let whole = fs::read(&out).unwrap();
        assert!(memory(&out) == expected(&json), "{line}: other memory");
        run(["verify", arg(&out)]).code(0);
        args[1] = "-";
        let mut piped = xsr(&args);
        piped.write_stdin(fs::read(&legacy).unwrap());
        crate::common::ran(piped).code(0);
        let from_pipe = fs::read(&out).unwrap();
        assert!(
            memory(&out) == expected(&json),
            "{line}: other memory from a pipe"
        );
        if !line.contains("--checkpoints") {
            assert!(from_pipe == whole, "{line}: other bytes from a pipe");
        }
        if !line.contains("no-extended-info") {
            run(["verify", arg(&legacy)])
                .code(0)
                .stdout_has("legacy stream");
        }
    }
}

/// A stream without pages is not converted, because the image could not be restored.
#[test]
fn a_legacy_image_without_pages_is_refused() {
    let dir = scratch();
    let (legacy, out) = (dir.path().join("g.legacy"), dir.path().join("g.out"));
    for kind in ["pv64", "hvm"] {
        let options = ["--kind", kind, "--no-pages", "--filler-batch"];
        if generate(&legacy, &options).is_none() {
            return;
        }
        run(["convert", "-f", arg(&legacy), "-o", arg(&out)])
            .code(2)
            .stderr_has("the pages end, and none has come");
        assert!(!out.exists());
        run(["verify", arg(&legacy)]).code(2);
    }
}

/// A guest that was saved, written as a legacy image, restored from that and saved again is the
/// same guest.
#[test]
fn a_legacy_image_is_restored_as_it_is() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let path = |name: &str| arg(&at(name)).to_owned();
    for (kind, width) in [("pv", "64"), ("pv32", "32"), ("hvm", "64"), ("pvh", "32")] {
        let host = path(&format!("host-{kind}"));
        let backend = format!("mock:{host}");
        run([
            "mock", "create", "web", "--host", &host, "--type", kind, "--memory", "8M",
        ])
        .code(0);
        run(["save", "--backend", &backend, "web", &path("web.save")]).code(0);
        let legacy = at("web.legacy");
        if generate(&legacy, &["--from", &path("web.save"), "--width", width]).is_none() {
            return;
        }
        let name = ["--name", "web", "--vcpus", "1", "--memory", "8M"];
        run(["restore", "--backend", &backend, &path("web.legacy")]
            .into_iter()
            .chain(name))
        .code(0);
        run(["save", "--backend", &backend, "web", &path("again.save")]).code(0);
        let ran = run([
            "diff",
            "--after-restore",
            "--json",
            &path("web.save"),
            &path("again.save"),
        ]);
        let report = ran.json();
        assert!(
            report["pages_compared"].as_u64().unwrap() > 1000,
            "{kind}: {report}"
        );
        for difference in report["differences"].as_array().unwrap() {
            // Things that a legacy stream has no place for, and changes by the test itself.
            let section = difference["section"].as_str().unwrap();
            let field = difference["field"].as_str().unwrap_or_default();
            assert!(
                difference["expected"].is_string()
                    || LOST.contains(&section)
                    || field.ends_with("extended length")
                    || (section == "hvm_params" && difference["b"].is_null()),
                "{kind}: {difference}"
            );
        }
    }
}

/// What version 1 cannot hold: the policies (the restore gives the guest the one that libxl invents
/// for images from before Xen 4.14), how the image was made, and that there is no device model, for
/// which it then has an empty record. (Its extended state of a vcpu has 128 bytes, of which Xen has
/// since come to write 64.)
const LOST: [&str; 10] = [
    "emulators",
    "cpu_policy",
    "cpuid",
    "msr",
    "msrs",
    "headers",
    "records",
    "config",
    "configuration",
    "libxl",
];

/// Under the script's name, with libxl's arguments, including descriptors.
#[test]
fn the_name_of_xens_script_takes_its_arguments() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let legacy = at("g.legacy");
    if generate(
        &legacy,
        &[
            "--kind",
            "hvm",
            "--toolstack",
            "--xl",
            "name = 'x'\nbuilder = 'hvm'",
        ],
    )
    .is_none()
    {
        return;
    }
    let link = at("convert-legacy-stream");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_xsr"), &link).unwrap();
    // libxl passes descriptors, and abbreviates --guest-type to --guest.
    let status = Command::new("sh")
        .args([
            "-c",
            r#""$0" --in 5 --out 6 --width 64 --guest hvm --format libxl --xl 5<"$1" 6>"$2""#,
        ])
        .arg(&link)
        .args([&legacy, &at("by-descriptor")])
        .status()
        .unwrap();
    assert!(status.success());
    let status = Command::new(&link)
        .arg("-i")
        .arg(&legacy)
        .arg("-o")
        .arg(at("by-name"))
        .args(["-w", "64", "-g", "hvm", "-f", "libxl", "-x"])
        .status()
        .unwrap();
    assert!(status.success());
    let converted = fs::read(at("by-name")).unwrap();
    assert!(converted == fs::read(at("by-descriptor")).unwrap());
    run(["verify", arg(&at("by-name"))])
        .code(0)
        .stdout_has("xl image of an x86 HVM guest");
    // From a pipe, which is read only to the stream's end.
    let mut child = Command::new("sh")
        .args([
            "-c",
            r#""$0" -i 0 -o /dev/null -w 64 -g hvm -f libxl -x && cat"#,
        ])
        .arg(&link)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = fs::read(&legacy).unwrap();
    let feeder = std::thread::spawn(move || {
        stdin.write_all(&bytes).unwrap();
        stdin.write_all(b"and more").unwrap();
    });
    let mut rest = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut rest)
        .unwrap();
    feeder.join().unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(rest, "and more");
    let bad = Command::new(&link).args(["-i", "x"]).output().unwrap();
    assert_eq!(bad.status.code(), Some(1));
}

/// An image in libvirt's header, in xapi's records or compressed is the same image.
#[test]
fn wrapped_images_are_seen_through() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let plain = image("tpvh");
    let (libxl, libxc) = (at("libxl"), at("libxc"));
    for (layer, to) in [("libxl", &libxl), ("libxc", &libxc)] {
        let ran = xsr(["cat", "--layer", layer, arg(&plain)])
            .output()
            .unwrap();
        assert!(ran.status.success());
        fs::write(to, ran.stdout).unwrap();
    }
    let bytes = fs::read(&plain).unwrap();
    assert!(bytes.ends_with(&fs::read(&libxl).unwrap()));
    let mut libvirt = b"libvirt-xml\n \0 \r".to_vec();
    let xml = b"<domain type='xen'><name>tpvh</name></domain>\0";
    libvirt.extend(2_u32.to_le_bytes());
    libvirt.extend(u32::try_from(xml.len()).unwrap().to_le_bytes());
    libvirt.extend([0; 40]);
    libvirt.extend(xml);
    libvirt.extend(fs::read(&libxl).unwrap());
    fs::write(at("libvirt"), libvirt).unwrap();
    let mut xapi = b"XenSavedDomv2-\n".to_vec();
    let record = |out: &mut Vec<u8>, kind: u64, body: &[u8], length: u64| {
        out.extend(kind.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(body);
    };
    record(&mut xapi, 0x0f, b"((time x))", 10);
    record(&mut xapi, 0xf0, &fs::read(&libxc).unwrap(), 0);
    record(&mut xapi, 0xf01, b"state", 5);
    record(&mut xapi, 0xf11, b"uefi", 4);
    record(&mut xapi, 0xffff, b"", 0);
    fs::write(at("xapi"), &xapi).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bytes).unwrap();
    fs::write(at("gzip"), gzip.finish().unwrap()).unwrap();
    let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
    lz4.write_all(&bytes).unwrap();
    fs::write(at("lz4"), lz4.finish().unwrap()).unwrap();
    let zstd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../format/tests/images");
    fs::copy(zstd.join("4.17-tpvh.save.zst"), at("zstd")).unwrap();
    for name in ["libvirt", "xapi", "gzip", "lz4", "zstd"] {
        let wrapped = at(name);
        run(["verify", arg(&wrapped)])
            .code(0)
            .stdout_has("good")
            .stdout_has(&format!("inside: {name}"));
        let ran = xsr(["cat", arg(&wrapped)]).output().unwrap();
        assert!(
            ran.stdout == fs::read(&libxc).unwrap(),
            "{name}: other bytes"
        );
        // Differences are only in the wrapper; xapi's gains the emulator's state.
        let ran = run(["diff", "--json", arg(&plain), arg(&wrapped)]).json();
        for difference in ran["differences"].as_array().unwrap() {
            let section = difference["section"].as_str().unwrap();
            assert!(
                !["pages", "hvm_context", "hvm_params"].contains(&section),
                "{name}: {difference}"
            );
        }
        // Truncated, it is bad, and the message says what is missing.
        let whole = fs::read(&wrapped).unwrap();
        fs::write(at("cut"), &whole[..whole.len() * 2 / 3]).unwrap();
        run(["verify", arg(&at("cut"))]).code(2).stdout_has("BAD");
    }
    // What follows the guest is checked, too.
    xapi.truncate(xapi.len() - 8);
    fs::write(at("cut"), &xapi).unwrap();
    run(["verify", arg(&at("cut"))]).code(2).stdout_has("xapi");
}

/// Endless decompressed data take no more memory than anything else, and nothing is decompressed
/// before it is read.
#[test]
fn a_decompression_bomb_is_bounded() {
    let dir = scratch();
    let bomb = |prefix: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(prefix).unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..512 {
            gzip.write_all(&zeros).unwrap();
        }
        gzip.finish().unwrap()
    };
    let file: PathBuf = dir.path().join("bomb");
    // Half a gibibyte of zeros, alone and after an image.
    fs::write(&file, bomb(b"")).unwrap();
    assert!(fs::metadata(&file).unwrap().len() < 1 << 20);
    limited(&file).stdout_has("BAD");
    fs::write(&file, bomb(&fs::read(image("tpv")).unwrap())).unwrap();
    limited(&file).stdout_has("after the end");
    // Layer upon layer.
    let mut bytes = fs::read(image("tpv")).unwrap();
    for _ in 0..6 {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&bytes).unwrap();
        bytes = gzip.finish().unwrap();
    }
    fs::write(&file, bytes).unwrap();
    limited(&file).stdout_has("more than 4 layers");
}

/// Verify with 256 MiB of address space, which must hold the program and its threads.
fn limited(file: &Path) -> crate::common::Ran {
    let output = Command::new("sh")
        .args(["-c", r#"ulimit -v 262144; exec "$0" verify "$1""#])
        .arg(env!("CARGO_BIN_EXE_xsr"))
        .arg(file)
        .output()
        .unwrap();
    let ran = crate::common::Ran {
        code: output.status.code().expect("it was not killed"),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    assert!(!ran.stderr.contains("alloc"), "{ran:?}");
    ran
}

/// Version 2 and big endian become version 3, little endian; bare, libxl and xl each become the
/// others.
#[test]
fn layers_are_put_on_and_taken_off() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    for name in ["tpv", "tpvh-live"] {
        let plain = image(name);
        for (from, to) in [
            ("xl", "libxc"),
            ("libxc", "xl"),
            ("xl", "libxl"),
            ("libxl", "xl"),
        ] {
            let source = match from {
                "xl" => plain.clone(),
                other => at(other),
            };
            run([
                "convert",
                "-f",
                "--to",
                to,
                arg(&source),
                "-o",
                arg(&at(to)),
            ])
            .code(0);
            run(["verify", arg(&at(to))])
                .code(0)
                .stdout_has(&format!("{to} image"));
            assert!(memory(&at(to)) == memory(&plain), "{name}: {from} to {to}");
        }
        // A version 3 image of Xen, converted to the same format, does not change.
        run(["convert", "-f", arg(&plain), "-o", arg(&at("same"))]).code(0);
        // (What a live save leaves after the end is not part of it.)
        let same = fs::read(at("same")).unwrap();
        assert!(fs::read(&plain).unwrap().starts_with(&same));
    }
}

/// A legacy stream in xapi's records, followed by the emulator's state in a record of its own.
#[test]
fn a_legacy_stream_in_xapis_records_is_read() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (legacy, json, out) = (at("g.legacy"), at("g.json"), at("g.out"));
    for line in [
        "--kind hvm --qemu none --seed 3 --tmem",
        "--kind pv64 --vcpus 2 --xsave 64",
        "--kind pv32 --width 32",
    ] {
        let mut options: Vec<&str> = line.split(' ').collect();
        options.extend(["--expect", arg(&json)]);
        if generate(&legacy, &options).is_none() {
            return;
        }
        let mut xapi = b"XenSavedDomv2-\n".to_vec();
        let legacy_bytes = fs::read(&legacy).unwrap();
        for (kind, length, body) in [
            (0x0f_u64, 10_u64, b"((time x))".as_slice()),
            (0xf2, 0, &legacy_bytes),
            (0xf01, 5, b"state"),
            (0xffff, 0, b""),
        ] {
            xapi.extend(kind.to_le_bytes());
            xapi.extend(length.to_le_bytes());
            xapi.extend(body);
        }
        let wrapped = at("xapi");
        fs::write(&wrapped, &xapi).unwrap();
        let ran = run(["verify", arg(&wrapped)])
            .code(0)
            .stdout_has("inside: xapi");
        let warned = ran.stderr.contains("of transcendent memory left out");
        assert_eq!(warned, line.contains("--tmem"), "{ran:?}");
        run(["convert", "-f", arg(&wrapped), "-o", arg(&out)]).code(0);
        assert!(memory(&out) == expected(&json), "{line}: other memory");
        for cut in [xapi.len() - 8, xapi.len() / 2, 60] {
            fs::write(&wrapped, &xapi[..cut]).unwrap();
            let ran = run(["verify", arg(&wrapped)]).code(2).stdout_has("BAD");
            // The header of the last record is truncated; the record before it is not bad.
            assert!(!ran.stdout.contains("Qemu_xen"), "{ran:?}");
        }
    }
}
