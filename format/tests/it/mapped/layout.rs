//! Tests of the written layout, against the document and a walk through a plain stream.

use std::io::{self, Seek, SeekFrom};

use xsr_format::frame::Pfn;
use xsr_format::layout::find::read_page;
use xsr_format::layout::index::PAGE_DIGEST_BYTES;
use xsr_format::layout::{Mapped, leading_pads, pads};

use super::*;
use crate::support::images;

/// Checks every byte of trailer and pads without using the crate.
fn check_by_hand(name: &str, file: &[u8], has_digests: bool) {
    let footer = &file[file.len() - FOOTER..];
    assert_eq!(&footer[..8], b"XSRmapFt", "{name}");
    assert_eq!(half(footer, 8), 1, "{name}: version");
    assert_eq!(half(footer, 12), u64::from(has_digests), "{name}: flags");
    assert_eq!(half(footer, 16), 1, "{name}: place");
    let image_end = word(footer, 24) as usize;
    let (index_at, records) = (word(footer, 32) as usize, word(footer, 40) as usize);
    let pages = word(footer, 56) as usize;
    let trailer = (image_end + 8).next_multiple_of(4096);
    assert_eq!(&file[image_end..image_end + 8], b"XSRmapTr", "{name}");
    assert!(
        file[image_end + 8..trailer].iter().all(|b| *b == 0),
        "{name}"
    );
    let digests_at = match has_digests {
        true => {
            assert_eq!(index_at, trailer + 16 * pages, "{name}");
            let digests = &file[trailer..index_at];
            assert_eq!(footer[64..96], *blake3::hash(digests).as_bytes(), "{name}");
            trailer
        }
        false => {
            assert_eq!(index_at, trailer, "{name}");
            assert_eq!(footer[64..96], [0; 32], "{name}");
            0
        }
    };
    assert_eq!(word(footer, 48) as usize, digests_at, "{name}");
    assert_eq!(
        index_at + INDEX_ENTRY * records + FOOTER,
        file.len(),
        "{name}"
    );
    let of_index = blake3::hash(&file[index_at..file.len() - 32]);
    assert_eq!(footer[128..], *of_index.as_bytes(), "{name}");

    let mut rest = blake3::Hasher::new();
    let (mut at, mut number) = (0, 0);
    for entry in file[index_at..file.len() - FOOTER].chunks(INDEX_ENTRY) {
        let (offset, data) = (word(entry, 0) as usize, word(entry, 8) as usize);
        let (count, pads, pages) = (half(entry, 32), half(entry, 36), half(entry, 40));
        let end = data + 4096 * pages as usize;
        rest.update(&file[at..offset]);
        at = end;
        assert_eq!(half(file, offset), 1, "{name}: no PAGE_DATA at {offset:#x}");
        assert_eq!(half(file, offset + 4) as usize, end - offset - 8, "{name}");
        assert_eq!(half(file, offset + 8), count, "{name}");
        assert_eq!(data, offset + 16 + 8 * count as usize, "{name}");
        assert!(pages == 0 || data % 4096 == 0, "{name}: data at {data:#x}");
        assert!(
            pads <= 511 && count - pads <= 1024,
            "{name}: {count}, {pads}"
        );
        assert!(pages > 0 || pads == 0, "{name}: pads without pages");
        let words: Vec<u64> = (0..count as usize)
            .map(|i| word(file, offset + 16 + 8 * i))
            .collect();
        let (padding, real) = words.split_at(pads as usize);
        let pfn = |word: &u64| word & ((1 << 52) - 1);
        assert!(
            padding
                .iter()
                .all(|word| *word == 0xf << 60 | pfn(&real[0])),
            "{name}"
        );
        assert_eq!(
            word(entry, 16),
            real.iter().map(pfn).min().unwrap(),
            "{name}"
        );
        assert_eq!(
            word(entry, 24),
            real.iter().map(pfn).max().unwrap(),
            "{name}"
        );
        assert_eq!(half(entry, 44), 0, "{name}");
        assert_eq!(
            entry[48..],
            *blake3::hash(&file[offset..end]).as_bytes(),
            "{name}"
        );
        for page in file[data..end].chunks(4096).filter(|_| has_digests) {
            let digest = &file[digests_at + 16 * number..][..16];
            assert_eq!(
                digest,
                &blake3::hash(page).as_bytes()[..16],
                "{name}: page {number}"
            );
            number += 1;
        }
    }
    rest.update(&file[at..image_end]);
    assert_eq!(footer[96..128], *rest.finalize().as_bytes(), "{name}");
}

#[test]
fn each_byte_of_pads_and_trailer_is_what_the_document_says() {
    for (name, image) in small() {
        for digests in [false, true] {
            let file = mapped(&image, digests);
            check_by_hand(&name, &file, digests);
            assert_eq!(
                streamed(&file)[..],
                streamed(&mapped(&file, false))[..],
                "{name}"
            );
        }
    }
    for image in images::committed() {
        check_by_hand(&image.name, &mapped(&image.bytes, true), true);
    }
}

#[test]
fn the_stream_comes_back_byte_for_byte() {
    for (name, image) in small() {
        let back = streamed(&mapped(&image, true));
        // An xl header keeps its blanks, which only the footer identifies.
        let blanks = back.len() - image.len();
        assert!(blanks < 8, "{name}");
        match image.starts_with(b"Xen") {
            true => {
                let stream = 48 + half(&image, 44) as usize;
                assert_eq!(back[stream + blanks..], image[stream..], "{name}");
            }
            false => assert!(back == image, "{name}"),
        }
    }
}

/// The example of `docs/mapped.md`, and every possible record.
#[test]
fn pads_align_the_data_of_any_record() {
    assert_eq!(pads(2224, 1024), 232);
    for offset in (0..8192).step_by(8) {
        for real in [1, 2, 510, 511, 512, 1022, 1023, 1024] {
            let pads = pads(offset, real);
            assert!(pads < 512);
            assert_eq!((offset + 16 + 8 * (real + pads)) % 4096, 0);
        }
    }
}

/// Looking up a pfn gives the same result as a walk, also for pfns without a page.
#[test]
fn every_page_is_found_where_a_walk_finds_it() {
    let real = images::committed()
        .into_iter()
        .map(|image| (image.name, image.bytes));
    for (name, image) in small().into_iter().chain(real) {
        let file = mapped(&image, false);
        let mut source = Cursor::new(&file[..]);
        let index = Mapped::open(&mut source).unwrap().unwrap();
        let words = last_words(&file);
        // All pfns of a small image, and a sample of a large one, including the last of all
        // batches.
        let step = words.len().div_ceil(2000);
        for (pfn, (page_type, data)) in words.iter().step_by(step) {
            let found = index.find(&mut source, Pfn(*pfn)).unwrap().unwrap();
            assert_eq!(found.entry.pfn, Pfn(*pfn));
            assert_eq!(
                (found.entry.page_type.nibble(), found.data),
                (*page_type, *data),
                "{name}: {pfn:#x}"
            );
            if let Some(data) = data {
                let page = read_page(&mut source, *data).unwrap();
                assert_eq!(page[..], file[*data as usize..][..4096]);
            }
        }
        let last = *words.keys().last().unwrap();
        for absent in [last + 1, u64::MAX >> 12] {
            assert_eq!(
                index.find(&mut source, Pfn(absent)).unwrap(),
                None,
                "{name}"
            );
        }
    }
}

/// Counts the bytes read from a file.
struct Counted<'f> {
    file: Cursor<&'f [u8]>,
    read: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(room)?;
        self.read += n as u64;
        Ok(n)
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[test]
fn a_page_costs_the_index_and_less_than_20_kib() {
    for image in images::committed()
        .into_iter()
        .filter(|image| !image.name.contains("live"))
    {
        let file = mapped(&image.bytes, true);
        let index = word(&file[file.len() - FOOTER..], 40) * INDEX_ENTRY as u64;
        let words = last_words(&file);
        let with_data = words
            .iter()
            .filter_map(|(pfn, (_, data))| Some((*pfn, (*data)?)));
        for (pfn, data) in with_data.step_by(97) {
            let file = Cursor::new(&file[..]);
            let mut source = Counted { file, read: 0 };
            let mapped = Mapped::open(&mut source).unwrap().unwrap();
            let found = mapped.find(&mut source, Pfn(pfn)).unwrap().unwrap();
            assert_eq!(found.data, Some(data));
            read_page(&mut source, data).unwrap();
            let most = index + (20 << 10);
            assert!(
                source.read <= most,
                "{}: {} of {most}",
                image.name,
                source.read
            );
        }
    }
}

/// Only zero pages are left out, and they read as zeros.
#[test]
fn zero_pages_are_holes() {
    struct Holes(Vec<u8>, u64);
    impl Write for Holes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl xsr_format::layout::SparseWrite for Holes {
        fn skip(&mut self, bytes: u64) -> io::Result<()> {
            self.1 += bytes;
            self.0.resize(self.0.len() + bytes as usize, 0);
            Ok(())
        }
    }
    for image in images::committed() {
        let mut writer = MappedWriter::new(Holes(Vec::new(), 0), true);
        convert(&image.bytes, &mut writer);
        let (Holes(file, left_out), written) = writer.finish().unwrap();
        assert!(file == mapped(&image.bytes, true), "{}", image.name);
        let words = last_words(&file);
        let zeros = words.values().filter_map(|(_, data)| *data);
        let zeros = zeros
            .filter(|at| file[*at as usize..][..4096] == [0; 4096])
            .count() as u64;
        assert!(zeros > 0 && written.zero_pages >= zeros, "{}", image.name);
        let between = left_out - 4096 * written.zero_pages;
        assert!(between < 4096, "{}: {between}", image.name);
        assert_eq!(written.file_bytes, file.len() as u64);
    }
}

/// A whole batch of pages adds at most 0.1 % to its size.
#[test]
fn a_mapped_image_is_hardly_longer() {
    for image in images::committed()
        .into_iter()
        .filter(|i| i.name.contains("tpvh"))
    {
        let file = mapped(&image.bytes, false);
        let image_end = word(&file[file.len() - FOOTER..], 24) as f64;
        let over = image_end / image.bytes.len() as f64 - 1.0;
        assert!(over < 0.0025, "{}: {over}", image.name);
        eprintln!("{}: {:.4} % over", image.name, over * 100.0);
    }
}

#[test]
fn pads_are_told_from_entries() {
    use xsr_format::frame::{PageEntry, PageType};
    let entry = |pfn, page_type| PageEntry {
        pfn: Pfn(pfn),
        page_type,
    };
    let (x, n) = (PageType::XTAB, PageType::NOTAB);
    for (entries, expected) in [
        (vec![], 0),
        (vec![entry(5, n)], 0),
        (vec![entry(5, x)], 0),
        (vec![entry(5, x), entry(6, n)], 0),
        (vec![entry(5, x), entry(5, n)], 1),
        (vec![entry(5, x), entry(5, x), entry(6, n)], 1),
        (vec![entry(5, x), entry(5, x), entry(5, n), entry(5, x)], 2),
    ] {
        assert_eq!(
            leading_pads(entries.iter().copied()),
            expected,
            "{entries:?}"
        );
    }
}

const _: () = assert!(PAGE_DIGEST_BYTES == 16);
