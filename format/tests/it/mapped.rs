//! Tests of the mapped layout: it matches `docs/mapped.md` byte for byte, a stream reader sees the
//! same image, and wrong indexes and flipped bits are found.

mod damage;
mod layout;
mod lies;

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};

use crate::support::build::{END, HVM, HVM_CONTEXT, Stream, hvm_context};
use crate::support::images;
use crate::support::mapped::{convert, mapped, streamed};
use crate::support::mutate::cut_down;
use xsr_format::layout::MappedWriter;
use xsr_format::read::ReadOptions;
use xsr_format::walk::{Content, Walk};

const INDEX_ENTRY: usize = 80;
const FOOTER: usize = 160;

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn half(bytes: &[u8], at: usize) -> u64 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()).into()
}

/// Small images of all kinds, by name: real ones, shortened, and made-up ones.
fn small() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for image in images::committed() {
        all.push((
            format!("{}, cut", image.name),
            cut_down(&image.bytes, 3, 40),
        ));
    }
    for (name, stream) in [
        ("pv64", Stream::whole_pv(3, false, 8)),
        ("pv32", Stream::whole_pv(3, false, 4)),
        ("hvm", Stream::whole_hvm(3, false)),
        ("again", again()),
    ] {
        all.push((name.to_owned(), stream.bytes()));
    }
    all
}

/// A stream in which pages are repeated with other contents and types, as by a live save.
fn again() -> Stream {
    let first: Vec<_> = (0..1024_u64)
        .map(|pfn| (pfn << 8 | 1, u8::from(pfn % 5 == 0) * 15))
        .collect();
    Stream::new(3, HVM, false)
        .policies()
        .pages(&first)
        .pages(&[(3 << 20, 0), (4 << 20, 0xf)])
        // Before, between and after those of the first record; one is removed, one is added.
        .pages(&[(0, 0), (1 << 8 | 1, 0xf), (5 << 8 | 1, 0), (9 << 8 | 1, 0)])
        .pages(&[(0, 0), (3 << 20, 0xd)])
        .tsc()
        .with(HVM_CONTEXT, |o| o.bytes(&hvm_context()))
        .params(&[(1, 0xfeffc), (2, 5)])
        .empty(END)
}

/// The final state of each pfn in a walk through an image: its type, and the offset of its
/// contents.
fn last_words(image: &[u8]) -> BTreeMap<u64, (u8, Option<u64>)> {
    let mut words = BTreeMap::new();
    let mut walk = Walk::open_seeking(Cursor::new(image), ReadOptions::default()).unwrap();
    while let Some(step) = walk.next_step().unwrap() {
        let Content::PageData(body) = step.content else {
            continue;
        };
        let mut data = step.position.offset + 16 + 8 * body.entries().len() as u64;
        for entry in body.entries().iter() {
            let has_data = entry.page_type.has_data();
            let place = has_data.then_some(data);
            words.insert(entry.pfn.0, (entry.page_type.nibble(), place));
            data += if has_data { 4096 } else { 0 };
        }
    }
    words
}
