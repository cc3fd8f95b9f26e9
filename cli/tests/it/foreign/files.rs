//! Messages about files that are not images, and about compressed files.

use std::fs;

use crate::common::{arg, image, ran, run, scratch, xsr};

/// The type of a file that is not a saved domain is reported.
#[test]
fn what_is_no_image_is_named() {
    let dir = scratch();
    let path = dir.path().join("file");
    let at = |offset: usize, magic: &[u8]| {
        let mut bytes = vec![0; offset + magic.len() + 600];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    };
    let image = fs::read(image("tpv")).unwrap();
    let zip = b"PK\x03\x04\x14\0\0\0\x08\0\xa8\x0d\xd9\x2f\0\x5c".to_vec();
    let cases: [(Vec<u8>, &str); 27] = [
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
        ("QUJD".repeat(20).into_bytes(), "base64 -d"),
        (vec![0xff; 65536], "65536 bytes of 0xff"),
        (
            b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl".to_vec(),
            "age -d",
        ),
        (b"-----BEGIN PGP MESSAGE-----\n\nhQ".to_vec(), "gpg -d"),
        (
            b"Salted__\x01\x02\x03\x04\x05\x06\x07\x08".to_vec(),
            "openssl enc -d",
        ),
        ([vec![7; 512], image.clone()].concat(), "begins at byte 512"),
        ([vec![0; 700_000], image].concat(), "tail -c +700001"),
        (b"BZhello".to_vec(), "text"),
    ];
    for (bytes, name) in cases {
        // In this last case, a VHD, the magic is at the very end.
        let bytes = match name {
            "only" => [vec![1; 4096], b"conectix".to_vec(), vec![0; 504]].concat(),
            _ => bytes,
        };
        let name = if name == "only" { "VHD" } else { name };
        fs::write(&path, &bytes).unwrap();
        run(["verify", arg(&path)])
            .code(2)
            .stdout_has("BAD")
            .stdout_has(name);
        let mut piped = xsr(["inspect", "-"]);
        piped.write_stdin(bytes);
        let piped = ran(piped).code(2);
        if name != "VHD" {
            piped.stderr_has(name);
        }
    }
}

/// Compressed files are judged as by their own tools.
#[test]
fn compressed_files_are_judged_as_their_tools_judge_them() {
    let dir = scratch();
    let path = dir.path().join("file");
    let bytes = fs::read(image("tpv")).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 3);
    let gzip = |bytes: &[u8]| {
        use std::io::Write as _;
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let lz4 = |bytes: &[u8]| {
        use std::io::Write as _;
        let mut out = lz4_flex::frame::FrameEncoder::new(Vec::new());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(bytes, level)
    };
    // LZ4's legacy format: blocks of at most 8 MiB, each with its length.
    let lz4_legacy = |bytes: &[u8]| {
        let block = lz4_flex::block::compress(bytes);
        let length = u32::try_from(block.len()).unwrap().to_le_bytes();
        [b"\x02\x21\x4c\x18".as_slice(), &length, &block].concat()
    };
    let skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc".as_slice();
    let zeros = [0; 5000].as_slice();
    let (g, l, z) = (gzip(&bytes), lz4(&bytes), zstd(&bytes));
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
        ("old lz4", lz4_legacy(&bytes)),
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
        assert!(cat.stdout == bytes, "{name}: other bytes");
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
        // An lz4 frame may lack a checksum: then the image inside is bad.
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
