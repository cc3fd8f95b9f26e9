//! Images written by a real Xen: restored into the mock machine and saved again, they hold the same
//! guest, except for what a restore rewrites.
//!
//! The tiny guests' images are in the repository. The others (a Linux kernel under PV and PVH,
//! SeaBIOS under HVM) are read from the directory that `XSR_IMAGES` names, or from
//! `../shared/images` beside the workspace. If they are absent, the test prints that.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::common::*;
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;
use xsr_xen_backend::GuestKind;

/// The libxc stream in a file that xl wrote.
fn libxc_stream(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).unwrap();
    let mut image = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file)
        .unwrap()
        .read_to_end(&mut image)
        .unwrap();
    let walk = Walk::open(image.as_slice(), ReadOptions::default()).unwrap();
    let (reader, _) = walk.into_libxc().unwrap();
    // Headers of 24 and 16 bytes have been read.
    let start = usize::try_from(reader.offset()).unwrap() - 40;
    let mut reader = reader;
    while reader.next_record().unwrap().is_some() {}
    let end = usize::try_from(reader.offset()).unwrap();
    image[start..end].to_vec()
}

fn comes_back(path: &Path, kind: GuestKind) {
    let name = path.file_name().unwrap().to_string_lossy();
    let stream = libxc_stream(path);
    let host = host(7);
    let (domid, stats) = restore_from(&host, &stream, kind, 1);
    unpause(&host, domid);
    let back = save_to_vec(&host, domid, &options(2)).unwrap();
    assert_same_guest(&name, &stream, &back);
    if !name.contains("live") {
        assert_same_batches(&name, &stream, &back);
    }
    eprintln!("{name}: {stats:?}");
}

/// Memory is divided into records as Xen divides it: the same records before it, the same entries
/// in each, up to the last page that has memory.
fn assert_same_batches(name: &str, xens: &[u8], ours: &[u8]) {
    let (xens, ours) = (batches(xens), batches(ours));
    let (last, complete) = ours.split_last().unwrap();
    assert_eq!(complete, &xens[..complete.len()], "{name}");
    let xens_last = &xens[complete.len()];
    assert_eq!(last.0, xens_last.0, "{name}");
    // All except the count, which is smaller where the image continues.
    assert_eq!(last.1[8..], xens_last.1[8..last.1.len()], "{name}");
    assert!(!ours.is_empty() && ours.len() <= xens.len(), "{name}");
}

fn kind(name: &str) -> GuestKind {
    match name {
        name if name.contains("pvh") => GuestKind::Pvh,
        name if name.contains("pv") => GuestKind::Pv,
        _ => GuestKind::Hvm,
    }
}

fn images(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "zst"))
        .collect();
    paths.sort();
    paths
}

#[test]
fn tiny_guests_of_a_real_xen_come_back() {
    let images = images(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../format/tests/images"));
    assert_eq!(images.len(), 4, "{images:?}");
    for path in images {
        comes_back(&path, kind(&path.to_string_lossy()));
    }
}

#[test]
fn linux_and_seabios_guests_of_a_real_xen_come_back() {
    let directory = std::env::var_os("XSR_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/images"),
        PathBuf::from,
    );
    let images: Vec<PathBuf> = images(&directory)
        .into_iter()
        .filter(|path| !path.to_string_lossy().contains("-tp"))
        .collect();
    if images.is_empty() {
        eprintln!(
            "SKIPPED: no images of real guests in {}; set XSR_IMAGES",
            directory.display()
        );
    }
    for path in images {
        comes_back(&path, kind(&path.file_name().unwrap().to_string_lossy()));
    }
}
