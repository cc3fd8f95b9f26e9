//! Seeds for the fuzzers of legacy and wrapped images: legacy streams made by
//! `tools/legacy_image.py`, and other toolstacks' headers and records and compressed files made
//! from the seeds of real images.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// Small legacy streams of every kind.
const LEGACY: [&str; 12] = [
    "--kind hvm --toolstack --verify",
    "--kind hvm --width 32 --live --filler 3 --filler-batch",
    "--kind hvm --tmem --qemu old",
    "--kind hvm --checkpoints 3 --compress --qemu remus",
    "--kind hvm --checkpoints 2 --cut-checkpoint",
    "--kind pv64 --xsave 64 --vcpus 3 --shuffle --unknown-block",
    "--kind pv64 --width 32 --no-last-checkpoint",
    "--kind pv64 --checkpoints 3 --compress --xsave 64",
    "--kind pv32 --width 32 --checkpoints 2 --cut-checkpoint",
    "--kind pv32 --no-vcpu-info --vcpus 1",
    "--kind pv32 --width 32 --no-extended-info",
    "--kind pv64 --verify",
];

/// Programs that compress from standard input to standard output.
const COMPRESSORS: [(&str, &[&str]); 5] = [
    ("gzip", &["-c"]),
    ("zstd", &["-qc"]),
    ("zstd", &["-qc", "--ultra", "-22", "--long=27"]),
    ("lz4", &["-qc"]),
    ("xz", &["-qc"]),
];

/// Writes the additional seeds that the target needs besides those of real images. Returns their
/// number.
///
/// # Errors
///
/// An installed program fails, or a seed cannot be written.
pub(super) fn write(target: &str, corpus: &Path) -> Result<usize> {
    match target {
        "legacy" => legacy(corpus),
        "wrappers" => toolstacks(corpus),
        "decompression" => compressed(corpus),
        _ => Ok(0),
    }
}

fn legacy(corpus: &Path) -> Result<usize> {
    let script = workspace::root().join("tools/legacy_image.py");
    let mut count = 0;
    for (i, line) in LEGACY.iter().enumerate() {
        let path = corpus.join(format!("seed-legacy-{i}"));
        if !path.exists() {
            let made = Command::new("python3")
                .arg(&script)
                .args(line.split(' '))
                .args(["--pages", "3", "-o"])
                .arg(&path)
                .status();
            match made {
                Ok(status) => ensure!(status.success(), "{} {line}: {status}", script.display()),
                Err(e) => {
                    eprintln!("no seeds of legacy streams: python3: {e}");
                    return Ok(count);
                }
            }
        }
        count += 1;
    }
    Ok(count)
}

/// The seeds of real images in `corpus` for one layer, with their names.
fn of_layer(corpus: &Path, layer: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(corpus).with_context(|| format!("cannot list {}", corpus.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("seed-") && name.ends_with(layer) {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.push((name.into_owned(), bytes));
        }
    }
    Ok(found)
}

fn put(corpus: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = corpus.join(name);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn toolstacks(corpus: &Path) -> Result<usize> {
    let mut count = 0;
    for (name, libxl) in of_layer(corpus, "-libxl")? {
        let xml = b"<domain type='xen'><name>guest</name></domain>\0";
        let mut out = b"libvirt-xml\n \0 \r".to_vec();
        out.extend(2_u32.to_le_bytes());
        out.extend(u32::try_from(xml.len())?.to_le_bytes());
        out.extend([0; 40]);
        out.extend_from_slice(xml);
        out.extend(libxl);
        put(corpus, &format!("{name}-libvirt"), &out)?;
        count += 1;
    }
    for (name, libxc) in of_layer(corpus, "-libxc")? {
        put(corpus, &format!("{name}-xapi"), &xapi(0xf0, &libxc))?;
        count += 1;
    }
    legacy(corpus)?;
    for i in 0..LEGACY.len() {
        let path = corpus.join(format!("seed-legacy-{i}"));
        if let Ok(legacy) = fs::read(&path) {
            put(
                corpus,
                &format!("seed-legacy-{i}-in-xapi"),
                &xapi(0xf2, &legacy),
            )?;
            count += 1;
        }
    }
    Ok(count)
}

/// Wraps a stream in xapi's records.
fn xapi(kind: u64, stream: &[u8]) -> Vec<u8> {
    let mut out = b"XenSavedDomv2-\n".to_vec();
    let records: [(u64, &[u8], bool); 5] = [
        (0x0f, b"((time x))", true),
        (kind, stream, false),
        (0xf01, b"state", true),
        (0xf11, b"uefi", true),
        (0xffff, b"", true),
    ];
    for (kind, body, sized) in records {
        out.extend(kind.to_le_bytes());
        let length = if sized { body.len() as u64 } else { 0 };
        out.extend(length.to_le_bytes());
        out.extend_from_slice(body);
    }
    out
}

fn compressed(corpus: &Path) -> Result<usize> {
    let mut count = 0;
    for (name, _) in of_layer(corpus, "-libxc")? {
        for (i, (program, options)) in COMPRESSORS.iter().enumerate() {
            let plain = fs::File::open(corpus.join(&name))
                .with_context(|| format!("cannot open the seed {name}"))?;
            let made = Command::new(program)
                .args(*options)
                .stdin(Stdio::from(plain))
                .stderr(Stdio::inherit())
                .output();
            let Ok(made) = made else {
                eprintln!("no seeds that {program} made: it is not there");
                continue;
            };
            ensure!(made.status.success(), "{program}: {}", made.status);
            put(corpus, &format!("{name}-{program}-{i}"), &made.stdout)?;
            count += 1;
        }
    }
    Ok(count)
}
