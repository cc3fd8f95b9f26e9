//! Tests that each single flipped bit is found, and reported with its record and pfns.
//!
//! `XSR_FLIPS` is the number of flips in each image; `XSR_SEED` selects them.

use xsr_format::layout::check::{Damage, check};
use xsr_format::layout::{LayoutError, Mapped};

use super::*;
use crate::support::mutate::Numbers;

fn damages(file: &[u8]) -> Vec<Damage> {
    let mut source = Cursor::new(file);
    let mapped = Mapped::open(&mut source).unwrap().unwrap();
    let mut found = Vec::new();
    check(&mapped, &mut source, |damage| {
        found.push(damage);
        Ok::<(), LayoutError>(())
    })
    .unwrap();
    found
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn a_whole_image_is_not_damaged() {
    for (name, image) in small() {
        for digests in [false, true] {
            assert_eq!(damages(&mapped(&image, digests)), [], "{name}");
        }
    }
}

#[test]
fn every_flipped_bit_is_found_and_named() {
    // An eighth of the requested number in each of eight images: a thousand by default.
    let flips = number("XSR_FLIPS", 1000).div_ceil(8);
    let mut numbers = Numbers(number("XSR_SEED", 17));
    for (name, image) in small() {
        for digests in [false, true] {
            let mut file = mapped(&image, digests);
            let footer = &file[file.len() - FOOTER..];
            let (image_end, index) = (word(footer, 24) as usize, word(footer, 32) as usize);
            let records: Vec<(usize, usize, usize, u64, u64)> = file[index..file.len() - FOOTER]
                .chunks(INDEX_ENTRY)
                .map(|e| {
                    let (offset, data) = (word(e, 0) as usize, word(e, 8) as usize);
                    let end = data + 4096 * half(e, 40) as usize;
                    (offset, data, end, word(e, 16), word(e, 24))
                })
                .collect();
            for _ in 0..flips.div_ceil(2) {
                let at = numbers.below(image_end);
                let bit = 1 << numbers.below(8);
                file[at] ^= bit;
                let found = damages(&file);
                assert_eq!(found.len(), 1, "{name}: {at:#x}: {found:?}");
                let said = found[0].to_string();
                let hit = records
                    .iter()
                    .enumerate()
                    .find(|(_, r)| (r.0..r.2).contains(&at));
                match (&found[0], hit) {
                    (Damage::Rest { .. }, None) => {}
                    (Damage::Record { number, pages, .. }, Some((i, record))) => {
                        assert_eq!(*number, i as u64, "{name}: {at:#x}");
                        let (first, last) = (record.3, record.4);
                        assert!(
                            said.contains(&format!("bytes {:#x} to", record.0)),
                            "{said}"
                        );
                        assert!(said.contains(&format!("{first:#x}")), "{said}");
                        assert!(said.contains(&format!("{last:#x}")), "{said}");
                        let in_data = at >= record.1;
                        match pages.as_deref() {
                            None => assert!(!digests),
                            Some([]) => assert!(digests && !in_data, "{said}"),
                            Some([(pfn, place)]) => {
                                let page = *place as usize..*place as usize + 4096;
                                assert!(digests && page.contains(&at), "{said}: {at:#x}");
                                let pfn = format!("pfn {pfn} at byte {place:#x}");
                                assert!(said.contains(&pfn), "{said}");
                            }
                            Some(more) => panic!("{more:?}"),
                        }
                    }
                    (damage, hit) => panic!("{name}: {at:#x}: {damage:?}, {hit:?}"),
                }
                file[at] ^= bit;
            }
        }
    }
}

#[test]
fn damage_between_image_and_index_is_named() {
    let file = mapped(&again().bytes(), true);
    let footer = &file[file.len() - FOOTER..];
    let (image_end, digests) = (word(footer, 24) as usize, word(footer, 48) as usize);
    for (at, expected) in [
        (image_end, "the bytes before the index, from"),
        (digests - 1, "the bytes before the index, from"),
    ] {
        let mut file = file.clone();
        file[at] ^= 1;
        let found = damages(&file);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().contains(expected), "{found:?}");
    }
    // A flip in a page's digest: the page no longer matches, nor does the table.
    let mut file = file.clone();
    file[digests] ^= 1;
    let said: Vec<String> = damages(&file).iter().map(Damage::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("changed are pfn"), "{said:?}");
    assert!(said[1].contains("the page digests at byte"), "{said:?}");
}
