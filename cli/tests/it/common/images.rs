//! Images of tiny guests, and scratch directories, shared by the tests of the command and of the
//! save helper.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "no test uses all of it; a test fails by panicking"
)]

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};

/// A directory for a test, removed afterwards.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The directory with the images of tiny guests, written by a real Xen and decompressed:
/// `4.17-{tpv,tpvh}{,-live}.save`.
pub(crate) fn images() -> PathBuf {
    let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
    fs::create_dir_all(&to).unwrap();
    // The packages that share this file are at different depths.
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let from = (package.ancestors())
        .map(|directory| directory.join("format/tests/images"))
        .find(|directory| directory.is_dir())
        .unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "zst") {
            decompress(&path, &to);
        }
    }
    to
}

/// One of [`images`].
pub(crate) fn image(name: &str) -> PathBuf {
    images().join(format!("4.17-{name}.save"))
}

/// Decompress a file into a directory, unless that has been done. Returns the new path.
pub(crate) fn decompress(path: &Path, directory: &Path) -> PathBuf {
    let to = directory.join(path.file_stem().unwrap());
    if !to.exists() {
        // Other tests may do the same at this moment: each renames a complete file.
        let mut whole = tempfile::NamedTempFile::new_in(directory).unwrap();
        let compressed = File::open(path).unwrap();
        let mut bytes = ruzstd::decoding::StreamingDecoder::new(compressed).unwrap();
        io::copy(&mut bytes, &mut whole).unwrap();
        whole.persist(&to).unwrap();
    }
    to
}

/// The offsets of an xl image's libxl stream and libxc stream, and of the libxc stream's end.
pub(crate) fn layers(image: &[u8]) -> (usize, usize, usize) {
    let mut walk = Walk::open(image, ReadOptions::default()).unwrap();
    let (mut libxl, mut libxc, mut end) = (0, 0, 0);
    while let Some(step) = walk.next_step().unwrap() {
        let offset = usize::try_from(step.position.offset).unwrap();
        match step.content {
            Content::LibxlHeader(_) => libxl = offset,
            Content::Headers(..) => libxc = offset,
            Content::Record(record) => end = offset + 8 + record.raw.len().next_multiple_of(8),
            _ => {}
        }
    }
    (libxl, libxc, end)
}
