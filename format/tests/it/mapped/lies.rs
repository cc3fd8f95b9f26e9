//! Tests of a wrong index, a missing footer and a truncated file: each gives one clear error.

use xsr_format::frame::Pfn;
use xsr_format::layout::{LayoutError, Mapped};

use super::*;

fn open(file: &[u8]) -> Result<Option<Mapped>, LayoutError> {
    Mapped::open(&mut Cursor::new(file))
}

/// Updates the digest of index and footer.
fn seal(file: &mut [u8]) {
    let end = file.len();
    let index = word(file, end - FOOTER + 32) as usize;
    let digest = blake3::hash(file.get(index..end - 32).unwrap_or_default());
    file[end - 32..].copy_from_slice(digest.as_bytes());
}

/// The error for a file after a change, with a matching digest.
fn said_of(file: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut file = file.to_vec();
    change(&mut file);
    seal(&mut file);
    match open(&file) {
        Ok(_) => "good".to_owned(),
        Err(error) => {
            assert!(error.is_bad_image());
            error.to_string()
        }
    }
}

fn set_word(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn set_half(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn an_index_that_lies_is_an_error_that_says_how() {
    let file = mapped(&again().bytes(), true);
    let end = file.len();
    let footer = end - FOOTER;
    let index = word(&file, footer + 32) as usize;
    let image_end = word(&file, footer + 24);
    let second = index + INDEX_ENTRY;
    assert_eq!(said_of(&file, |_| {}), "good");
    type Change = Box<dyn FnOnce(&mut Vec<u8>)>;
    let word_is = |at: usize, value: u64| -> Change { Box::new(move |f| set_word(f, at, value)) };
    let half_is = |at: usize, value: u32| -> Change { Box::new(move |f| set_half(f, at, value)) };
    let (offset, data) = (word(&file, index), word(&file, index + 8));
    let moved = move |by: u64| -> Change {
        Box::new(move |f| {
            set_word(f, second, by);
            let entries = half(f, second + 32);
            set_word(f, second + 8, by + 16 + 8 * entries);
        })
    };
    let cases: Vec<(&str, Change)> = vec![
        // Beyond the file, before it, unsorted, overlapping.
        ("entry 1 of the index", moved(1 << 40)),
        ("ends at byte 0x1", moved(1 << 40)),
        ("unsorted, or records overlap", moved(offset)),
        ("unsorted, or records overlap", moved(data + 8)),
        (
            "begins at byte 0x8, expected 0x28 or later",
            word_is(index, 8),
        ),
        ("offset of its data is", word_is(index + 8, data + 4096)),
        ("expected a multiple of 8", word_is(index, offset + 1)),
        ("highest pfn", word_is(index + 24, 1 << 52)),
        ("highest pfn", word_is(index + 16, u64::MAX)),
        ("number of pads is 0x600", half_is(index + 36, 1536)),
        ("number of entries", half_is(index + 32, 0)),
        ("number of entries", half_is(index + 32, u32::MAX)),
        ("number of pages", half_is(index + 40, 2000)),
        ("number of pages", half_is(index + 40, 0)),
        ("reserved field is 0x1", half_is(index + 44, 1)),
        // With one page less, the data stay where they were.
        (
            "that the number of pages is",
            half_is(index + 40, half(&file, index + 40) as u32 - 1),
        ),
        ("version 0x2, expected 1", half_is(footer + 8, 2)),
        ("flags 0x4, expected 0 to 3", half_is(footer + 12, 4)),
        ("place 0x2", half_is(footer + 16, 2)),
        ("blanks 0x8", half_is(footer + 20, 8)),
        (
            "that the image ends at byte",
            word_is(footer + 24, image_end + 4096),
        ),
        (
            "that the image ends at byte",
            word_is(footer + 24, u64::MAX),
        ),
        (
            "that the index begins at byte",
            word_is(footer + 32, index as u64 - 80),
        ),
        (
            "that the index begins at byte",
            word_is(footer + 32, u64::MAX),
        ),
        ("that the index begins at byte", word_is(footer + 40, 3)),
        ("has 4194305 entries", word_is(footer + 40, (1 << 22) + 1)),
        (
            "has 18446744073709551615 entries",
            word_is(footer + 40, u64::MAX),
        ),
        ("that the page digests begin", word_is(footer + 48, 0)),
        (
            "that the page digests begin",
            word_is(footer + 56, u64::MAX),
        ),
    ];
    for (expected, change) in cases {
        let said = said_of(&file, change);
        assert!(said.contains(expected), "{said}; expected {expected}");
        assert!(said.contains("at byte 0x"), "{said}");
    }
}

/// A record with unaligned data, built by hand because no writer makes one.
#[test]
fn data_that_is_not_aligned_is_an_error() {
    let file = mapped(&Stream::whole_hvm(3, false).bytes(), false);
    let index = word(&file, file.len() - FOOTER + 32) as usize;
    let said = said_of(&file, |file| {
        let (entries, pads) = (half(file, index + 32), half(file, index + 36));
        let data = word(file, index + 8);
        set_half(file, index + 32, entries as u32 - 1);
        set_half(file, index + 36, pads as u32 - 1);
        set_word(file, index + 8, data - 8);
    });
    assert!(said.contains("its data is at byte 0x"), "{said}");
    assert!(said.contains("expected a multiple of 4096"), "{said}");
}

#[test]
fn a_flipped_bit_of_index_or_footer_is_found() {
    for digests in [false, true] {
        let file = mapped(&again().bytes(), digests);
        let index = word(&file, file.len() - FOOTER + 32) as usize;
        for at in index..file.len() {
            let mut file = file.clone();
            file[at] ^= 1 << (at % 8);
            match open(&file) {
                Err(error) => assert!(error.is_bad_image(), "{at:#x}: {error}"),
                // Without the magic there is no footer.
                Ok(found) => {
                    let footer = file.len() - FOOTER;
                    assert!(
                        found.is_none() && (footer..footer + 8).contains(&at),
                        "{at:#x}"
                    );
                }
            }
        }
    }
}

/// An index whose entries obey all rules, but describe other records.
#[test]
fn a_record_that_is_not_what_the_index_says_is_an_error() {
    let file = mapped(&again().bytes(), false);
    let index = word(&file, file.len() - FOOTER + 32) as usize;
    let record = word(&file, index) as usize;
    let pads = half(&file, index + 36) as usize;
    let find = |file: &[u8], pfn: u64| {
        let mut source = Cursor::new(file);
        let mapped = Mapped::open(&mut source).unwrap().unwrap();
        mapped.find(&mut source, Pfn(pfn)).unwrap_err().to_string()
    };
    for (at, value, what) in [
        (record, 2, "type is 0x2, but the index says 0x1"),
        (record + 4, 8, "length is 0x8"),
        (record + 8, 1, "count is 0x1"),
        (record + 16, 77, "number of pads is 0x0"),
        (record + 16 + 8 * pads, 0, "number of pads"),
    ] {
        let mut file = file.clone();
        set_half(&mut file, at, value);
        let said = find(&file, 2 << 8 | 1);
        assert!(said.contains(what), "{said}; expected {what}");
        let place = format!("PAGE_DATA at byte {record:#x} (entry 0 of the index)");
        assert!(said.contains(&place), "{said}");
    }
    let mut wrong = file.clone();
    set_word(&mut wrong, index + 24, 1 << 30);
    seal(&mut wrong);
    let said = find(&wrong, 2 << 8 | 1);
    assert!(said.contains("highest pfn is"), "{said}");
}

/// At any length but its own a file has no footer, or one that does not match.
#[test]
fn a_cut_file_is_never_taken_for_a_whole_one() {
    let file = mapped(&Stream::whole_hvm(3, false).bytes(), true);
    for length in 0..file.len() {
        if let Ok(Some(_)) = open(&file[..length]) {
            panic!("cut to {length} bytes, it is taken");
        }
    }
    let longer = [&file[..], &[0; 8]].concat();
    assert!(open(&longer).unwrap().is_none());
}
