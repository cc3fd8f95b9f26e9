//! Mapped images whose index is in the xl header (docs/mapped.md, place 2), as the save helper
//! writes them under xl: every command that reads images reads them.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use xsr_format::layout::write::{Trailer, digest};
use xsr_format::layout::{Mapped, Room};
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::xl::XlHeader;

use crate::common::{arg, backend, host_with, image, run, scratch};

/// By how much the index makes the xl header longer.
const LONGER: u64 = 32 * 4096;

/// Moves the index of a mapped image into its xl header.
fn with_index_in_header(mapped: &[u8]) -> Vec<u8> {
    let index = Mapped::open(&mut Cursor::new(mapped)).unwrap().unwrap();
    let footer = index.footer();
    let old = XlHeader::read(mapped, ReadOptions::default()).unwrap();
    let plain = footer.plain_header(&old).unwrap();
    // Pages stay aligned.
    let after = plain.bytes().next_multiple_of(8);
    let bytes = old.bytes() + LONGER - after;
    let (header, Room { from, to }) = plain.with_room(bytes).unwrap().unwrap();
    assert_eq!(to, old.bytes() + LONGER);
    let end = usize::try_from(footer.image_end).unwrap();
    let rest = &mapped[usize::try_from(old.bytes()).unwrap()..end];
    let mut file = [&header.encode(), rest].concat();
    // The libxl END record, 8 bytes, follows the libxc stream.
    let image_end = file.len() as u64 - 8;
    let mut entries = index.entries().to_vec();
    for entry in &mut entries {
        entry.offset += LONGER;
    }
    let range = |from: u64, to: u64| {
        let [from, to] = [from, to].map(|at| usize::try_from(at).unwrap());
        &file[from..to]
    };
    let mut other = vec![range(0, from)];
    let mut at = to;
    for entry in &entries {
        other.push(range(at, entry.offset));
        at = entry.end();
    }
    other.push(range(at, image_end));
    let trailer = Trailer {
        room: Some(Room { from, to }),
        blanks: 0,
        image_end,
        moved: footer.moved,
        index: &entries,
        page_digests: None,
        rest_digest: digest(&other),
    };
    assert!(trailer.fits());
    let index = trailer.encode_index();
    let bytes = [&index[..], &trailer.encode_footer(&index)].concat();
    let at = usize::try_from(trailer.index_offset()).unwrap();
    file[at..at + bytes.len()].copy_from_slice(&bytes);
    file
}

/// An image with an emulator-less libxl stream, mapped so, and the plain one.
fn images(dir: &Path) -> (PathBuf, PathBuf) {
    let (plain, mapped) = (dir.join("plain.save"), dir.join("in-header.save"));
    let at = dir.join("mapped.save");
    // Bytes after the end of an image are not part of it.
    let bytes = fs::read(image("tpvh-live")).unwrap();
    let verdict = run(["verify", "--json", arg(&image("tpvh-live"))]).json();
    let end = usize::try_from(verdict["bytes"].as_u64().unwrap()).unwrap();
    fs::write(&plain, &bytes[..end]).unwrap();
    let line = ["convert", "-f", "--layout", "mapped", "-o"];
    run(line.into_iter().chain([arg(&at), arg(&plain)])).code(0);
    fs::write(&mapped, with_index_in_header(&fs::read(&at).unwrap())).unwrap();
    (plain, mapped)
}

#[test]
fn commands_read_an_image_whose_index_is_in_the_header() {
    let dir = scratch();
    let (plain, mapped) = images(dir.path());
    let deep = run(["verify", "--deep", arg(&mapped)]).code(0);
    let deep = deep.stdout_has("mapped layout, index of");
    deep.stdout_has("digests of records, all of them fit");
    let of_plain = fs::read(&plain).unwrap();
    let out = dir.path().join("out");
    for line in [
        ["convert", "-f", "--layout", "stream"].as_slice(),
        &["cat", "-f", "--layer", "xl"],
    ] {
        run(line.iter().copied().chain(["-o", arg(&out), arg(&mapped)])).code(0);
        assert!(fs::read(&out).unwrap() == of_plain, "{line:?}");
    }
    run(["diff", arg(&plain), arg(&mapped)]).code(0);
    // Mapped again, its index is after the image.
    let again = dir.path().join("again.save");
    let line = [
        "convert",
        "--layout",
        "mapped",
        "-o",
        arg(&again),
        arg(&mapped),
    ];
    run(line).code(0);
    run(["verify", "--deep", arg(&again)]).code(0);
    run(["convert", "-f", "-o", arg(&out), arg(&again)]).code(0);
    assert!(fs::read(&out).unwrap() == of_plain);

    for pfn in ["0", "0x100", "0x3ff"] {
        let show = |file: &Path| {
            let shown = run(["inspect", "--json", "--page", pfn, arg(file)]).code(0);
            shown.json()
        };
        let (of_plain, of_mapped) = (show(&plain), show(&mapped));
        assert_eq!(of_mapped["layout"], "mapped");
        for field in ["pfn", "type", "contents"] {
            assert_eq!(of_plain[field], of_mapped[field], "{pfn}");
        }
    }
    let host = host_with("pvh", dir.path());
    run(["restore", &backend(&host), arg(&mapped)]).code(0);
    let edit = ["edit", "--name", "x", "-o", arg(&out), arg(&mapped)];
    assert_ne!(run(edit).code, 0);
}

#[test]
fn damage_to_an_image_whose_index_is_in_the_header_is_found() {
    let dir = scratch();
    let (_, mapped) = images(dir.path());
    let mut file = fs::read(&mapped).unwrap();
    let index = Mapped::open(&mut Cursor::new(&file)).unwrap().unwrap();
    let room = index.footer().room.unwrap();
    let entry = index.entries().iter().find(|entry| entry.pages > 0);
    let data = entry.unwrap().data_offset();
    let bad = dir.path().join("bad.save");
    for (at, why) in [
        (data, "PAGE_DATA number"),
        (room.from, "the bytes before the index"),
        (room.to + 30, "other than PAGE_DATA"),
        (room.to - 1, "the digest of index and footer"),
        (room.to - 300, "index"),
    ] {
        let at = usize::try_from(at).unwrap();
        file[at] ^= 1;
        fs::write(&bad, &file).unwrap();
        run(["verify", "--deep", arg(&bad)]).code(2).stdout_has(why);
        file[at] ^= 1;
    }
    // A save that was not finished: the room is zeros.
    let [from, to] = [room.from, room.to].map(|at| usize::try_from(at).unwrap());
    file[from..to].fill(0);
    fs::write(&bad, &file).unwrap();
    run(["verify", arg(&bad)])
        .code(2)
        .stdout_has("was never finished");
    run(["verify", "--ignore-index", arg(&bad)]).code(0);
}
