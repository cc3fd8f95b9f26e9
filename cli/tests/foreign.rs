//! Images of other toolstacks, and files that are no images: what is read, what is taken over
//! of the domain, what is said of the rest.
//!
//! The images are made by `tools/legacy_image.py` and `tools/foreign_image.py`, which know
//! nothing of the code here. They need `python3`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{arg, backend, image, ran, run, scratch, xsr};
use tempfile::TempDir;
use xsr_xen_backend::mock::MockHost;

const UUID: &str = "1f2e3d4c-0000-1111-2222-333344445555";

/// Run one of the writers; `None` where there is no `python3`, which is said.
fn tool(name: &str, options: &[&str], to: &Path) -> Option<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tools")
        .join(name);
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
            eprintln!("SKIPPED: images are made by python3, which cannot be run: {e}");
            None
        }
    }
}

/// A layer of an image of a real Xen, in a file.
fn layer(dir: &TempDir, name: &str, layer: &str) -> PathBuf {
    let to = dir.path().join(format!("{name}.{layer}"));
    run(["cat", "--layer", layer, arg(&image(name)), "-o", arg(&to)]).code(0);
    to
}

/// The UUID in the configuration that is kept with a domain.
fn kept_uuid(host: &Path, name: &str) -> String {
    let host = MockHost::open(host).unwrap();
    let domid = host.find(name).unwrap();
    let config = host.userdata_get(domid, "libxl-json").unwrap().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["c_info"]["uuid"].as_str().unwrap().to_owned()
}

/// Images of `xm save` and of XenServer before 6.5: PV and HVM, of either width, without
/// extended info as Xen 3.0 had it; the guest is the one in the legacy stream.
#[test]
fn images_of_old_toolstacks_are_read() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (stream, old, out, plain) = (at("stream"), at("old"), at("out"), at("plain"));
    for (what, legacy, options) in [
        ("xend", "--kind pv64 --qemu none", "--kind pv"),
        ("xend", "--kind pv32 --width 32 --qemu none", "--kind pv"),
        (
            "xend",
            "--kind hvm --qemu none",
            "--kind hvm --qemu QEVM123",
        ),
        (
            "xend",
            "--kind pv64 --qemu none --no-extended-info --vcpus 1",
            "--kind pv",
        ),
        ("xenserver", "--kind pv64 --width 32 --qemu none", ""),
        (
            "xenserver",
            "--kind pv32 --width 32 --qemu none --no-last-checkpoint",
            "",
        ),
        (
            "xenserver",
            "--kind hvm --width 32 --qemu none",
            "--qemu QEVM123",
        ),
    ] {
        let legacy: Vec<&str> = legacy.split(' ').collect();
        if tool("legacy_image.py", &legacy, &stream).is_none() {
            return;
        }
        let mut options: Vec<&str> = options.split_whitespace().collect();
        options.extend([what, arg(&stream)]);
        tool("foreign_image.py", &options, &old).unwrap();
        // A suspend VDI is larger than what is in it.
        if what == "xenserver" {
            let mut octets = fs::read(&old).unwrap();
            octets.resize(octets.len() + 9000, 0);
            fs::write(&old, octets).unwrap();
        }
        run(["verify", arg(&old)]).code(0).stdout_has(match what {
            "xend" => "inside: xend, legacy stream",
            _ => "inside: xapi (XenServer before 6.5)",
        });
        run([
            "convert",
            "--force",
            "--to",
            "libxc",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0);
        let guest = match legacy.contains(&"hvm") {
            true => "hvm",
            false => "pv",
        };
        let mut args = vec!["convert", "--force", "--to", "libxc", "--guest", guest];
        let hvm = [
            fs::read(&stream).unwrap(),
            b"QemuDeviceModelRecord".to_vec(),
        ]
        .concat();
        if guest == "hvm" {
            fs::write(&stream, hvm).unwrap();
        }
        args.extend([arg(&stream), "-o", arg(&plain)]);
        run(&args).code(0);
        assert!(
            fs::read(&out).unwrap() == fs::read(&plain).unwrap(),
            "{what} {legacy:?}: another guest"
        );
        // Cut off anywhere, it is truncated, or its signature is.
        let whole = fs::read(&old).unwrap();
        for end in [10, 18, 100, whole.len() / 2] {
            fs::write(at("cut"), &whole[..end]).unwrap();
            run(["verify", arg(&at("cut"))])
                .code(2)
                .stdout_has("truncated");
        }
    }
}

/// Name, UUID, vcpus and memory come from where the other toolstack says them, into inspect,
/// into a restored domain and into an image of xl; devices are named.
#[test]
fn identity_is_taken_over() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (old, out) = (at("named.after.nothing"), at("out.save"));
    let stream = at("stream");
    let from = image("tpv");
    let legacy = ["--from", arg(&from), "--qemu", "none"];
    if tool("legacy_image.py", &legacy, &stream).is_none() {
        return;
    }
    let (libxl, libxc) = (layer(&dir, "tpv", "libxl"), layer(&dir, "tpv", "libxc"));
    for (what, stream, device) in [
        ("xend", &stream, Some("vbd xvda:disk phy:vg/disk")),
        ("libvirt", &libxl, Some("disk file xvda /images/a.img")),
        ("xapi", &libxc, None),
    ] {
        let options = [what, arg(stream), "--name", "my-vm"];
        tool("foreign_image.py", &options, &old).unwrap();
        let report = run(["inspect", "--json", arg(&old)]).code(0).json();
        assert_eq!(report["guest"]["name"], "my-vm", "{what}");
        assert_eq!(report["guest"]["uuid"], UUID, "{what}");
        assert_eq!(report["guest"]["max_memory_kib"], 4096, "{what}");
        assert_eq!(report["origin"]["vcpus"], 1, "{what}");
        let text = run(["inspect", arg(&old)]).code(0).stdout_has("my-vm");
        // All of it can be had.
        let config = run(["cat", "--layer", "config", arg(&old)]).code(0).stdout;
        assert_eq!(
            report["origin"]["text"].as_str().unwrap().trim(),
            config.trim()
        );
        let host = at(what);
        run(["restore", &backend(&host), arg(&old)]).code(0);
        assert_eq!(kept_uuid(&host, "my-vm"), UUID, "{what}");
        let ran = run([
            "convert",
            "--force",
            "--to",
            "xl",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0);
        if let Some(device) = device {
            text.stdout_has(device);
            ran.stderr_has(device).stderr_has("not carried over");
        }
        let made = run(["inspect", "--json", arg(&out)]).code(0).json();
        assert_eq!(made["guest"]["name"], "my-vm", "{what}");
        assert_eq!(made["guest"]["uuid"], UUID, "{what}");
        // From a pipe, too, since nothing is left open.
        let mut piped = xsr(["restore", &backend(&at(&format!("{what}-pipe"))), "-"]);
        piped.write_stdin(fs::read(&old).unwrap());
        ran_well(piped);
        // Where the target has no place for it, that is said.
        run([
            "convert",
            "--force",
            "--to",
            "libxl",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0)
        .stderr_has("name and UUID");
    }
}

fn ran_well(command: assert_cmd::Command) {
    ran(command).code(0);
}

/// State that no image of xl has a place for is named: by verify, inspect, convert and restore,
/// in text and JSON.
#[test]
fn what_is_left_out_is_named() {
    let dir = scratch();
    let (old, out) = (dir.path().join("old"), dir.path().join("out"));
    let libxc = layer(&dir, "tpvh", "libxc");
    let options = [
        "xapi",
        arg(&libxc),
        "--kind",
        "hvm",
        "--varstored",
        "1234",
        "--swtpm",
        "12",
    ];
    if tool("foreign_image.py", &options, &old).is_none() {
        return;
    }
    let check = |left: &serde_json::Value| {
        assert_eq!(left[0]["record"], "Varstored");
        assert_eq!(left[0]["bytes"], 4);
        assert_eq!(left[1]["record"], "Swtpm");
    };
    run(["verify", arg(&old)])
        .code(0)
        .stdout_has("Varstored (UEFI variables, 4 bytes");
    run(["inspect", arg(&old)])
        .code(0)
        .stdout_has("Swtpm: state of a virtual TPM");
    check(&run(["inspect", "--json", arg(&old)]).code(0).json()["left_out"]);
    let ran = run(["convert", "--json", arg(&old), "-o", arg(&out)]).code(0);
    check(&ran.json()["left_out"]);
    ran.stderr_has("Varstored").stderr_has("Swtpm");
    let host = backend(&dir.path().join("host"));
    run(["restore", &host, "--type", "pvh", arg(&old)])
        .code(0)
        .stderr_has("Varstored");
}

/// The text that xl of Xen 4.1 to 4.4 kept is a configuration like any other.
#[test]
fn the_text_of_old_xl_is_a_configuration() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let from = image("tpv");
    let text = format!("name = \"old\"\nbuilder='generic'\nmemory = 4\nuuid = '{UUID}'\n");
    let options = ["--from", arg(&from), "--xl", &text, "--qemu", "none"];
    if tool("legacy_image.py", &options, &at("old.save")).is_none() {
        return;
    }
    let (old, new) = (at("old.save"), at("new.save"));
    let host = at("host");
    run(["inspect", arg(&old)]).code(0).stdout_has(UUID);
    run(["restore", &backend(&host), arg(&old)]).code(0);
    assert_eq!(kept_uuid(&host, "old"), UUID);
    // Options have the last word.
    let args = [
        "restore",
        &backend(&host),
        "--name",
        "other",
        "--memory",
        "8M",
        "--vcpus",
        "1",
    ];
    run(args.iter().copied().chain([arg(&old)])).code(0);
    assert_ne!(kept_uuid(&host, "other"), UUID, "a clone is another domain");
    // It stays a text when it is edited, and is read again.
    run(["edit", "--name", "a \"b\"", arg(&old), "-o", arg(&new)]).code(0);
    let report = run(["inspect", "--json", arg(&new)]).code(0).json();
    assert_eq!(report["guest"]["name"], "a \"b\"");
    assert_eq!(report["guest"]["uuid"], UUID);
    run(["verify", arg(&new)]).code(0);
}

/// Another name makes a clone; so does xl's way, a configuration before the image. The options
/// that xl has are taken.
#[test]
fn a_domain_is_restored_beside_its_original() {
    let dir = scratch();
    let host = dir.path().join("host");
    let (image, backend) = (image("tpv"), backend(&host));
    run(["restore", &backend, "-e", "-d", "-V", arg(&image)]).code(0);
    let uuid = kept_uuid(&host, "tpv");
    run(["restore", &backend, arg(&image)])
        .code(1)
        .stderr_has("--name")
        .stderr_has("xsr edit --name");
    run(["restore", &backend, "-p", "--name", "tpv2", arg(&image)]).code(0);
    assert_ne!(kept_uuid(&host, "tpv2"), uuid);
    let config = dir.path().join("clone.cfg");
    fs::write(&config, "name = 'tpv3'\ntype = 'pv'\nmemory = 8\n").unwrap();
    run(["restore", &backend, arg(&config), arg(&image)]).code(0);
    assert_ne!(kept_uuid(&host, "tpv3"), uuid);
    fs::write(&config, "name = ").unwrap();
    run(["restore", &backend, arg(&config), arg(&image)])
        .code(64)
        .stderr_has("clone.cfg")
        .stderr_has("line 1");
    for bad in ["", "42", "a/b", "a\nb"] {
        run(["restore", &backend, "--name", bad, arg(&image)]).code(64);
    }
}

/// What edit writes can be restored: names and UUIDs that cannot be are refused, and a file
/// that is no configuration is named.
#[test]
fn edit_refuses_what_nobody_could_restore() {
    let dir = scratch();
    let (image, out) = (image("tpv"), dir.path().join("out"));
    for (option, value) in [
        ("--uuid", "foo"),
        ("--uuid", "1f2e3d4c00001111222233334444555"),
        ("--name", ""),
        ("--name", "42"),
        ("--name", "a/b"),
        ("--name", "esc\u{1b}[31m"),
    ] {
        run(["edit", option, value, arg(&image), "-o", arg(&out)])
            .code(64)
            .stderr_has(option);
        assert!(!out.exists(), "{option} {value:?}");
    }
    run([
        "edit",
        "--name",
        "my web",
        "--uuid",
        UUID,
        arg(&image),
        "-o",
        arg(&out),
    ])
    .code(0);
    let report = run(["inspect", "--json", arg(&out)]).code(0).json();
    assert_eq!(report["guest"]["name"], "my web");
    let config = dir.path().join("new.json");
    for (text, says) in [
        ("name = 'x'\nmemory = 4\n", "xl's own format"),
        ("{}", "c_info.type"),
        ("{", "not valid JSON"),
    ] {
        fs::write(&config, text).unwrap();
        run([
            "edit",
            "--force",
            "--config",
            arg(&config),
            arg(&image),
            "-o",
            arg(&out),
        ])
        .code(64)
        .stderr_has("new.json")
        .stderr_has("xsr cat --layer config")
        .stderr_has(says);
    }
    // What cat takes out, edit takes in.
    let json = run(["cat", "--layer", "config", arg(&image)])
        .code(0)
        .stdout;
    fs::write(&config, json).unwrap();
    run([
        "edit",
        "--force",
        "--config",
        arg(&config),
        arg(&image),
        "-o",
        arg(&out),
    ])
    .code(0);
    run(["restore", &backend(&dir.path().join("host")), arg(&out)]).code(0);
}

/// A file that is no saved domain is named.
#[test]
fn what_is_no_image_is_named() {
    let dir = scratch();
    let path = dir.path().join("file");
    let at = |offset: usize, magic: &[u8]| {
        let mut octets = vec![0; offset + magic.len() + 600];
        octets[offset..offset + magic.len()].copy_from_slice(magic);
        octets
    };
    let image = fs::read(image("tpv")).unwrap();
    let zip = b"PK\x03\x04\x14\0\0\0\x08\0\xa8\x0d\xd9\x2f\0\x5c".to_vec();
    let cases: [(Vec<u8>, &str); 22] = [
        (
            at(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0"),
            "ELF core",
        ),
        (at(0, b"QFI\xfb\0\0\0\x03"), "qcow2"),
        (at(0, b"KDMV\x01\0\0\0"), "VMDK"),
        (at(0, b"QEVM\0\0\0\x03"), "qemu"),
        (at(0, b"vhdxfile"), "VHDX"),
        (at(600, b"conectix"), "only"),
        (at(0, b"LibvirtQemudSave\x02\0\0\0"), "QEMU driver"),
        (at(257, b"ustar"), "tar archive"),
        (at(0, b"ova.xml\0"), "XVA"),
        (zip, "zip archive"),
        (at(0, b"PAGEDU64"), "Windows"),
        (at(0, b"EMiL\x01\0\0\0"), "LiME"),
        (at(0, b"KDUMP   \x06\0\0\0"), "kdump"),
        (at(0, b"BZh91AY&SY"), "bzip2 -dc"),
        (at(510, b"\x55\xaa"), "MBR"),
        (at(0x8001, b"CD001"), "ISO 9660"),
        (b"<domain type='xen'/>".to_vec(), "XML"),
        (b"{\"a\": 1}\n".to_vec(), "JSON"),
        (vec![0; 65536], "only zeros, 65536"),
        ([vec![7; 512], image.clone()].concat(), "begins at byte 512"),
        ([vec![0; 700_000], image].concat(), "tail -c +700001"),
        (b"BZhello".to_vec(), "text"),
    ];
    for (octets, name) in cases {
        // The last case of a VHD has its magic at the very end.
        let octets = match name {
            "only" => [vec![1; 4096], b"conectix".to_vec(), vec![0; 504]].concat(),
            _ => octets,
        };
        let name = if name == "only" { "VHD" } else { name };
        fs::write(&path, &octets).unwrap();
        run(["verify", arg(&path)])
            .code(2)
            .stdout_has("BAD")
            .stdout_has(name);
        let mut piped = xsr(["inspect", "-"]);
        piped.write_stdin(octets);
        let piped = ran(piped).code(2);
        if name != "VHD" {
            piped.stderr_has(name);
        }
    }
}

/// Compressed files, as their own tools judge them.
#[test]
fn compressed_files_are_judged_as_their_tools_judge_them() {
    let dir = scratch();
    let path = dir.path().join("file");
    let octets = fs::read(image("tpv")).unwrap();
    let (first, second) = octets.split_at(octets.len() / 3);
    let gzip = |octets: &[u8]| {
        use std::io::Write as _;
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(octets).unwrap();
        out.finish().unwrap()
    };
    let lz4 = |octets: &[u8]| {
        use std::io::Write as _;
        let mut out = lz4_flex::frame::FrameEncoder::new(Vec::new());
        out.write_all(octets).unwrap();
        out.finish().unwrap()
    };
    let zstd = |octets: &[u8]| {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(octets, level)
    };
    // LZ4's old format: blocks of 8 MiB at most, each with its length.
    let lz4_legacy = |octets: &[u8]| {
        let block = lz4_flex::block::compress(octets);
        let length = u32::try_from(block.len()).unwrap().to_le_bytes();
        [b"\x02\x21\x4c\x18".as_slice(), &length, &block].concat()
    };
    let skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc".as_slice();
    let zeros = [0; 5000].as_slice();
    let (g, l, z) = (gzip(&octets), lz4(&octets), zstd(&octets));
    let good: Vec<(&str, Vec<u8>)> = vec![
        ("two gzip members", [gzip(first), gzip(second)].concat()),
        ("padded gzip", [&g, zeros].concat()),
        ("gzip and garbage", [&g, b"garbage".as_slice()].concat()),
        ("two lz4 frames", [lz4(first), lz4(second)].concat()),
        (
            "lz4 skipped",
            [skipped, &lz4(first), skipped, &lz4(second), skipped].concat(),
        ),
        ("lz4 with an empty frame", [lz4(b""), l.clone()].concat()),
        ("padded lz4", [&l, zeros].concat()),
        ("old lz4", lz4_legacy(&octets)),
        ("old lz4 and new", [lz4_legacy(first), lz4(second)].concat()),
        ("two zstd frames", [zstd(first), zstd(second)].concat()),
        (
            "zstd skipped",
            [skipped, &zstd(first), skipped, &zstd(second)].concat(),
        ),
        ("padded zstd", [&z, zeros].concat()),
    ];
    for (name, file) in good {
        fs::write(&path, &file).unwrap();
        let ran = run(["verify", arg(&path)]);
        assert_eq!(ran.code, 0, "{name}: {ran:?}");
        let cat = xsr(["cat", "--layer", "xl", arg(&path)]).output().unwrap();
        assert!(cat.stdout == octets, "{name}: other octets");
        if name.contains("padded") {
            ran.stdout_has("5000 bytes of zeros");
        } else if name.contains("garbage") {
            ran.stdout_has("is ignored, as gzip does");
        }
    }
    for (name, file) in [("gzip", &g), ("lz4", &l), ("zstd", &z)] {
        fs::write(&path, &file[..file.len() / 2]).unwrap();
        for command in ["verify", "inspect"] {
            let ran = run([command, arg(&path)]).code(2);
            let said = ran.stdout + &ran.stderr;
            for word in [arg(&path), "truncated", "copy it again", "at byte 0x"] {
                assert!(said.contains(word), "{name}: no {word:?} in {said}");
            }
        }
        let mut flipped = file.clone();
        let at = flipped.len() - 6;
        flipped[at] ^= 0x10;
        fs::write(&path, flipped).unwrap();
        // An lz4 frame need not have a checksum: then the image inside is bad.
        run(["verify", arg(&path)]).code(2).stdout_has("BAD");
        if name != "gzip" {
            fs::write(&path, [file, b"garbage".as_slice()].concat()).unwrap();
            run(["verify", arg(&path)])
                .code(2)
                .stdout_has(&format!("neither {name} data nor padding"));
        }
    }
    let mut flipped = g;
    let at = flipped.len() - 6;
    flipped[at] ^= 0x10;
    fs::write(&path, flipped).unwrap();
    run(["verify", arg(&path)]).code(2).stdout_has("checksum");
}
