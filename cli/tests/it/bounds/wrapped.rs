//! The same for wrappers, other toolstacks' formats, and images that come through a pipe.

use std::fs::{self, File};
use std::io::{BufWriter, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::common::image;
use crate::foreign::xva::{VM, member};

/// Most bytes of another toolstack's text.
const LONG: usize = 16 << 20;

/// A hole in a file that is being written.
fn hole(out: &mut BufWriter<File>, bytes: u64) {
    let bytes = i64::try_from(bytes).unwrap();
    out.seek(SeekFrom::Current(bytes)).unwrap();
}

/// A small libxl stream, or the libxc stream in it.
fn stream(layer: &str) -> Vec<u8> {
    let out = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(["cat", "--layer", layer])
        .arg(image("tpvh"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    out.stdout
}

/// A legacy stream, made with these options; `None` without python3.
fn legacy(options: &[&str]) -> Option<Vec<u8>> {
    let directory = scratch();
    let to = directory.path().join("legacy");
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/legacy_image.py");
    let made = Command::new("python3")
        .arg(tool)
        .args(options)
        .arg("-o")
        .arg(&to)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status();
    match made {
        Ok(status) => assert!(status.success(), "{options:?}"),
        Err(error) => {
            eprintln!("SKIPPED: images are made by python3, which cannot be run: {error}");
            return None;
        }
    }
    Some(fs::read(to).unwrap())
}

/// Run the commands for wrappers on a file.
#[track_caller]
fn few(name: &str, verdict: i32, pages: u64, make: impl FnOnce(&Path)) {
    let directory = scratch();
    let path = directory.path().join(name);
    make(&path);
    let hostile = Hostile {
        path,
        pages,
        window: 0,
        verdict,
    };
    check(&directory, &hostile, Commands::Few);
}

/// Text of about this length between two others.
fn text(before: &str, between: &str, after: &str) -> String {
    let times = (LONG - 100) / between.len();
    format!("{before}{}{after}", between.repeat(times))
}

#[test]
fn long_xml_of_libvirt() {
    let inside = stream("libxl");
    for (name, xml) in [
        ("entities", text("<domain><name>", "&", "</name></domain>")),
        ("elements", text("<domain>", "<a/>", "</domain>")),
        ("deep", text("<domain>", "<a>", "")),
        (
            "devices",
            text("<domain><devices>", "<disk/>", "</devices></domain>"),
        ),
        (
            "attributes",
            text("<domain><devices><disk ", "a='' ", "/></devices></domain>"),
        ),
    ] {
        few(&format!("libvirt-{name}"), 2, 1 << 14, |path| {
            let mut out = b"libvirt-xml\n \0 \r".to_vec();
            out.extend(2_u32.to_le_bytes());
            out.extend((xml.len() as u32 + 1).to_le_bytes());
            out.extend([0; 40]);
            out.extend(xml.as_bytes());
            out.push(0);
            out.extend(&inside);
            fs::write(path, out).unwrap();
        });
    }
}

#[test]
fn long_expressions_of_xend() {
    let Some(inside) = legacy(&["--kind", "pv64", "--qemu", "none"]) else {
        return;
    };
    for (name, config) in [
        ("atoms", text("(domain ", "a ", ")")),
        ("lists", text("(domain ", "()", ")")),
        ("settings", text("(domain ", "(a b)", ")")),
        ("devices", text("(domain ", "(device (vif))", ")")),
        ("deep", text("", "(", "")),
    ] {
        few(&format!("xend-{name}"), 2, 1 << 10, |path| {
            let mut out = b"LinuxGuestRecord".to_vec();
            out.extend((config.len() as u32).to_be_bytes());
            out.extend(config.as_bytes());
            out.extend(&inside);
            fs::write(path, out).unwrap();
        });
    }
}

#[test]
fn long_text_of_xl() {
    let Some(inside) = legacy(&["--kind", "pv64", "--qemu", "none"]) else {
        return;
    };
    for (name, verdict, bytes) in [("signs", 0, 1 << 20), ("longer", 2, LONG)] {
        few(&format!("xl-text-{name}"), verdict, 1 << 10, |path| {
            let config = format!("disk=[{}]\n", "a,".repeat(bytes / 2 - 20));
            let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
            let length = config.len() as u32 + 1;
            for word in [0x0102_0304, 0, 0, length + 4, length] {
                out.extend(u32::to_le_bytes(word));
            }
            out.extend(config.as_bytes());
            out.push(0);
            out.extend(&inside);
            fs::write(path, out).unwrap();
        });
    }
}

/// A suspend image of xapi: what `more` writes follows the guest.
fn xapi(path: &Path, more: impl FnOnce(&mut BufWriter<File>)) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(b"XenSavedDomv2-\n").unwrap();
    record(&mut out, 0xf0, 0);
    out.write_all(&stream("libxc")).unwrap();
    more(&mut out);
    record(&mut out, 0xffff, 0);
    out.flush().unwrap();
}

/// The header of one of xapi's records.
fn record(out: &mut BufWriter<File>, kind: u64, bytes: u64) {
    out.write_all(&kind.to_le_bytes()).unwrap();
    out.write_all(&bytes.to_le_bytes()).unwrap();
}

const DESCRIPTION: u64 = 0xf;
const QEMU: u64 = 0xf01;
const UEFI_VARIABLES: u64 = 0xf11;

#[test]
fn long_and_many_records_of_xapi() {
    const PAGES: u64 = 1 << 14;
    for (name, kind) in [("qemu", QEMU), ("variables", UEFI_VARIABLES)] {
        few(&format!("xapi-{name}"), 0, PAGES, |path| {
            xapi(path, |out| {
                record(out, kind, 120 << 20);
                hole(out, 120 << 20);
            });
        });
    }
    few("xapi-many", 2, PAGES, |path| {
        xapi(path, |out| {
            for _ in 0..3_000_000 {
                record(out, DESCRIPTION, 0);
            }
        });
    });
    // Nothing of the second is kept.
    few("xapi-repeated", 2, PAGES, |path| {
        xapi(path, |out| {
            for _ in 0..2 {
                record(out, UEFI_VARIABLES, 120 << 20);
                hole(out, 120 << 20);
            }
        });
    });
}

#[test]
fn state_of_a_device_model_up_to_the_end_of_a_legacy_file() {
    let Some(inside) = legacy(&["--kind", "hvm", "--qemu", "old"]) else {
        return;
    };
    for (name, verdict, bytes) in [("most", 0, 60_u64 << 20), ("more", 2, 200 << 20)] {
        few(&format!("legacy-{name}"), verdict, 1 << 10, |path| {
            fs::write(path, &inside).unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(inside.len() as u64 + bytes).unwrap();
        });
    }
}

#[test]
fn many_checkpoints_of_a_legacy_file() {
    let options = "--kind hvm --qemu remus --checkpoints 60 --compress";
    let options: Vec<&str> = options.split(' ').collect();
    let Some(inside) = legacy(&options) else {
        return;
    };
    few("legacy-checkpoints", 0, 1 << 10, |path| {
        fs::write(path, &inside).unwrap();
    });
}

/// The largest disk in a small file: an image and zeros.
#[test]
fn a_large_disk() {
    const BLOCK: u64 = 256 << 20;
    const BLOCKS: u32 = 2040 * 4;
    let sealed = |bytes: &mut [u8], at: usize| {
        let sum = bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    };
    let inside = stream("libxl");
    few("vhd", 0, 1 << 14, |path| {
        let mut footer = [0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[16..24].copy_from_slice(&512_u64.to_be_bytes());
        footer[48..56].copy_from_slice(&(BLOCK * u64::from(BLOCKS)).to_be_bytes());
        footer[60..64].copy_from_slice(&3_u32.to_be_bytes());
        sealed(&mut footer, 64);
        let mut header = [0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[16..24].copy_from_slice(&1536_u64.to_be_bytes());
        header[28..32].copy_from_slice(&BLOCKS.to_be_bytes());
        header[32..36].copy_from_slice(&(BLOCK as u32).to_be_bytes());
        sealed(&mut header, 36);
        let table = vec![0xff; 4 * BLOCKS as usize];
        let file = File::create(path).unwrap();
        file.write_all_at(&footer, 0).unwrap();
        file.write_all_at(&header, 512).unwrap();
        file.write_all_at(&table, 1536).unwrap();
        let first = (1536 + table.len() as u64).next_multiple_of(512);
        file.write_all_at(&((first / 512) as u32).to_be_bytes(), 1536)
            .unwrap();
        // All sectors of the first block count.
        file.write_all_at(&vec![0xff; 64 << 10], first).unwrap();
        file.write_all_at(&inside, first + (64 << 10)).unwrap();
        file.set_len(first + (64 << 10) + BLOCK).unwrap();
    });
}

/// Archives of xapi: an image in the longest blocks, with a gap; a description that is deep and
/// long; members that have nothing to do with the memory.
#[test]
fn archives() {
    const BLOCK: usize = 16 << 20;
    let xml = member("ova.xml", VM.as_bytes());
    few("xva-blocks", 0, 1 << 14, |path| {
        xapi(path, |out| {
            record(out, UEFI_VARIABLES, 120 << 20);
            hole(out, 120 << 20);
        });
        let disk = fs::read(path).unwrap();
        let mut out = BufWriter::new(File::create(path).unwrap());
        out.write_all(&xml).unwrap();
        for (number, block) in disk.chunks(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                let name = format!("Ref:4/{number:08}");
                out.write_all(&member(&name, block)).unwrap();
            }
        }
        out.flush().unwrap();
    });
    few("xva-description", 2, 1, |path| {
        let text = "<value><struct>".repeat(LONG / 15);
        fs::write(path, member("ova.xml", text.as_bytes())).unwrap();
    });
    few("xva-members", 2, 1, |path| {
        let mut out = BufWriter::new(File::create(path).unwrap());
        out.write_all(&xml).unwrap();
        let other = member("Ref:3/00000000", b"");
        for _ in 0..500_000 {
            out.write_all(&other).unwrap();
        }
        out.flush().unwrap();
    });
}

#[test]
fn compressed_in_layers_with_small_windows() {
    let directory = scratch();
    let path = |n: usize| directory.path().join(format!("small{n}"));
    large(&path(0));
    for n in 1..=4 {
        zstd(&path(n - 1), &path(n), 17);
    }
    let hostile = Hostile {
        path: path(4),
        pages: 1,
        window: MIB,
        verdict: 0,
    };
    check(&directory, &hostile, Commands::Few);
}

/// From a pipe nothing can be read twice.
#[test]
fn through_a_pipe() {
    type Make = fn(&Path);
    let kinds: [(&str, u64, Make); 3] = [
        ("large", 1, large),
        ("emulator", 1, |path| {
            let mut image = hvm(path);
            image.pages(&[NOTAB]);
            image.end(|image| emulator(image, 120 << 20));
        }),
        ("scattered", 60_000, |path| {
            let mut image = hvm(path);
            for n in 0..60_000 {
                image.pages(&[n * 7919 % 60_000 * 33_000]);
            }
            image.end(|_| {});
        }),
    ];
    for (name, pages, make) in kinds {
        let directory = scratch();
        let path = directory.path().join(name);
        make(&path);
        let out = directory.path().join("out");
        let host = format!("--backend=mock:{}", directory.path().join("host").display());
        for args in [
            vec!["verify", "-"],
            vec!["inspect", "--pages", "-"],
            vec!["cat", "-", "-f", "-o", arg(&out)],
            vec!["convert", "-", "-f", "-o", arg(&out)],
            vec!["restore", "-p", &host, "-"],
        ] {
            let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
            let came = run_with(REST + 8 * pages, &args, Some(&path));
            let good = !came.ran_out() && !came.stderr.contains("panicked");
            // The mock machine may have too little memory for the guest.
            let most = i32::from(args[0] == "restore");
            let good = good && came.code.is_some_and(|code| code <= most);
            assert!(good, "{name} {args:?}: {:?} {}", came.code, came.stderr);
        }
    }
}
