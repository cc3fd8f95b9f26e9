//! Fuzz target for the index and footer of a mapped image: for any bytes, unchanged or with a
//! matching digest, reading fails or returns an index that obeys every rule; a page that is found
//! is inside the image.

#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use xsr_format::frame::{PageEntry, Pfn};
use xsr_format::layout::check::check;
use xsr_format::layout::index::{Footer, IndexEntry};
use xsr_format::layout::{LayoutError, MAX_ENTRIES, MAX_REAL, Mapped};
use xsr_format::wrapper::xl::XlHeader;

/// Turns the last bytes into a footer with a matching digest, so that the checks after the digest
/// are reached.
fn seal(bytes: &mut [u8], place: u8) {
    let Some(at) = bytes.len().checked_sub(Footer::BYTES) else {
        return;
    };
    bytes[at..at + 8].copy_from_slice(b"XSRmapFt");
    // Version 1, a flag or none, the place, few blanks.
    bytes[at + 8..at + 12].copy_from_slice(&[1, 0, 0, 0]);
    bytes[at + 12] &= 1;
    bytes[at + 13..at + 20].copy_from_slice(&[0, 0, 0, place, 0, 0, 0]);
    bytes[at + 20] &= 7;
    bytes[at + 21..at + 24].fill(0);
    // As many entries as fit, directly before the footer.
    let most = at / IndexEntry::BYTES;
    let records = usize::from(bytes[at + 40]).min(most);
    bytes[at + 40..at + 48].copy_from_slice(&(records as u64).to_le_bytes());
    let index = at - records * IndexEntry::BYTES;
    bytes[at + 32..at + 40].copy_from_slice(&(index as u64).to_le_bytes());
    let digest = blake3::hash(&bytes[index..at + 128]);
    bytes[at + 128..at + 160].copy_from_slice(digest.as_bytes());
}

/// The same with index and footer in an xl header, of which these bytes are the end: a
/// configuration of 4 bytes precedes them. A stream follows that has no records.
fn seal_in_header(bytes: &[u8]) -> Vec<u8> {
    let room = bytes.len() & !7;
    let mut header = XlHeader::new("{ }").map_or(Vec::new(), |header| header.encode());
    header.resize(56, 0);
    header.extend_from_slice(&bytes[..room]);
    let optional = u32::try_from(header.len() - 48).unwrap_or(0);
    header[44..48].copy_from_slice(&optional.to_le_bytes());
    let at = header.len().saturating_sub(Footer::BYTES);
    if at > 56 {
        let end = header.len() as u64 + 8;
        header[at + 24..at + 32].copy_from_slice(&end.to_le_bytes());
        seal(&mut header, 2);
    }
    header.extend([0; 8]);
    header
}

fn read(bytes: &[u8]) {
    let mut source = Cursor::new(bytes);
    let mapped = match Mapped::open(&mut source) {
        Ok(Some(mapped)) => mapped,
        Ok(None) => return,
        Err(error) => {
            // The source is in memory, so reading it never fails.
            assert!(error.is_bad_image() && !matches!(error, LayoutError::Io(_)));
            drop(error.to_string());
            return;
        }
    };
    let footer = *mapped.footer();
    match footer.room {
        None => assert!(footer.image_end < footer.index_offset),
        Some(room) => {
            assert!(room.from <= footer.index_offset && footer.index_offset < room.to);
            assert!(room.to <= footer.image_end && footer.image_end <= bytes.len() as u64);
        }
    }
    assert!(footer.index_offset < bytes.len() as u64);
    let mut before = 0;
    for entry in mapped.entries() {
        assert!(before <= entry.offset && entry.end() + 8 <= footer.image_end);
        assert!(entry.pages == 0 || entry.data_offset() % 4096 == 0);
        assert!(entry.first_pfn <= entry.last_pfn && entry.last_pfn <= PageEntry::MAX_PFN);
        assert!(entry.entries <= MAX_ENTRIES && entry.entries - entry.pads <= MAX_REAL);
        before = entry.end();
    }
    let ends = mapped.entries().iter().take(16);
    let ends: Vec<Pfn> = ends
        .flat_map(|entry| [entry.first_pfn, entry.last_pfn])
        .collect();
    for pfn in ends {
        if let Ok(Some(found)) = mapped.find(&mut source, pfn) {
            assert_eq!(found.entry.pfn, pfn);
            let data = found.data.unwrap_or(0);
            assert!(data % 4096 == 0 && data < footer.image_end);
        }
    }
    let checked = check(&mapped, &mut source, |damage| {
        drop(damage.to_string());
        Ok::<(), LayoutError>(())
    });
    assert!(checked.is_ok(), "{checked:?}");
}

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let mut sealed = bytes.to_vec();
    seal(&mut sealed, 1);
    read(&sealed);
    read(&seal_in_header(bytes));
});
