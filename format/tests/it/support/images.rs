//! Images from a real Xen: the committed ones, and the larger ones of the project's shared
//! directory if it exists.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ruzstd::decoding::StreamingDecoder;

/// A decompressed image.
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Images of the lab's tiny guest, which are part of the repository.
pub(crate) fn committed() -> Vec<Image> {
    let images = paths(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images"));
    assert!(images.len() >= 4, "the committed images are missing");
    images.iter().map(|path| load(path)).collect()
}

/// Compressed images in the shared directory: more guests, too large to commit.
pub(crate) fn shared() -> Vec<PathBuf> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/images");
    let images = paths(&shared);
    if images.is_empty() {
        eprintln!("SKIPPED: no images in {}", shared.display());
    }
    images
}

fn paths(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(".save.zst"))
        .collect();
    paths.sort();
    paths
}

pub(crate) fn load(path: &Path) -> Image {
    let name = path.file_name().unwrap().to_string_lossy();
    let mut bytes = Vec::new();
    StreamingDecoder::new(File::open(path).unwrap())
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    Image {
        name: name.trim_end_matches(".save.zst").to_owned(),
        bytes,
    }
}
