//! Tests with every real image truncated at every byte: the walk reports what is missing, and
//! where, for the step with the cut, and reads everything before it.
//!
//! For each cut, only the step with the cut is read again, from a walk that was cloned before it.
//! At the boundaries of records, and one byte to either side, the in-memory reader must give the
//! same result.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom};

use crate::support::drive::{Cause, Failure};
use crate::support::images::{self, Image};
use xsr_format::error::{Place, Position, ReadError};
use xsr_format::read::ReadOptions;
use xsr_format::slice::SliceReader;
use xsr_format::walk::{Content, Walk};

/// An image that can be truncated at any point while it is being read.
#[derive(Clone)]
struct Cut<'a> {
    image: &'a [u8],
    at: usize,
    end: &'a Cell<usize>,
}

impl Read for Cut<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let left = &self.image[self.at.min(self.end.get())..self.end.get()];
        let bytes = room.len().min(left.len());
        room[..bytes].copy_from_slice(&left[..bytes]);
        self.at += bytes;
        Ok(bytes)
    }
}

impl Seek for Cut<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => at as usize,
            SeekFrom::End(back) => self.end.get().saturating_add_signed(back as isize),
            SeekFrom::Current(by) => self.at.saturating_add_signed(by as isize),
        };
        self.at = at;
        Ok(at as u64)
    }
}

/// A step that has been taken: its position, and for a batch the number of bytes before its pages.
struct Taken {
    position: Position,
    before_pages: Option<usize>,
}

fn take(walk: &mut Walk<Cut<'_>>) -> Result<Option<Taken>, ReadError> {
    let Some(step) = walk.next_step()? else {
        return Ok(None);
    };
    let before_pages = match step.content {
        Content::PageData(body) => Some(16 + 8 * body.entries().len()),
        _ => None,
    };
    Ok(Some(Taken {
        position: step.position,
        before_pages,
    }))
}

/// Cuts one image everywhere. Returns the number of cuts.
fn cut_everywhere(image: &Image) -> usize {
    let whole = image.bytes.len();
    let end = Cell::new(whole);
    let source = Cut {
        image: &image.bytes,
        at: 0,
        end: &end,
    };
    for cut in 0..8 {
        end.set(cut);
        let error = Walk::open_seeking(source.clone(), ReadOptions::default())
            .and_then(|mut walk| walk.next_step().map(|_| ()))
            .unwrap_err();
        assert!(error.is_bad_image());
    }
    end.set(whole);
    let mut walk = Walk::open_seeking(source, ReadOptions::default()).unwrap();
    let (mut count, mut batches) = (8, 0);
    let mut boundaries = Vec::new();
    loop {
        end.set(whole);
        let before = walk.clone();
        let Some(taken) = take(&mut walk).unwrap() else {
            break;
        };
        // A step ends where the next one begins.
        let next = match take(&mut walk.clone()).unwrap() {
            Some(next) => next.position.offset as usize,
            None => walk.offset() as usize,
        };
        batches += usize::from(taken.before_pages.is_some());
        let start = taken.position.offset as usize;
        let pages = taken.before_pages.map(|bytes| start + bytes);
        for cut in start.max(8)..next {
            end.set(cut);
            // If a batch has its entries, its pages are the next to be missing.
            let mut short = match pages {
                Some(pages) if cut >= pages => walk.clone(),
                _ => before.clone(),
            };
            let failure = match take(&mut short) {
                Ok(_) => panic!("{}, cut at {cut}: accepted", image.name),
                Err(e) => Failure::from(e),
            };
            check(&failure, &taken.position, cut, next);
            count += 1;
        }
        // The in-memory reader must start at the beginning, so it is not tried at all boundaries.
        let near = taken.before_pages.is_none() || batches < 8 || batches % 32 == 0;
        if near && matches!(taken.position.place, Place::Record { .. }) {
            boundaries.push(start);
        }
    }
    let libxc = boundaries[0] - 40;
    for boundary in boundaries {
        for cut in boundary - 1..=boundary + 1 {
            end.set(cut);
            in_memory_says_the_same(image, libxc, &end);
        }
    }
    count
}

/// Checks that the failure and the missing bytes are in the step that was cut.
#[track_caller]
fn check(failure: &Failure, expected: &Position, cut: usize, next: usize) {
    let Cause::Truncated(needed) = failure.cause else {
        panic!("cut at {cut}: {failure:?}");
    };
    assert!(needed > 0 && cut + needed as usize <= next, "{failure:?}");
    let at = failure.position.offset as usize;
    match (failure.position.place, expected.place) {
        // A single step, but two structures.
        (Place::XlOptionalData, Place::XlHeader) => assert_eq!(at, 48),
        (Place::DomainHeader, Place::ImageHeader) => {
            assert_eq!(at, expected.offset as usize + 24);
        }
        (Place::Record { index: got, kind }, Place::Record { index, .. }) => {
            assert_eq!((got, at), (index, expected.offset as usize));
            assert_eq!(kind.is_some(), cut >= at + 8);
        }
        (Place::LibxlRecord { index: got, kind }, Place::LibxlRecord { index, .. }) => {
            assert_eq!((got, at), (index, expected.offset as usize));
            assert_eq!(kind.is_some(), cut >= at + 8);
        }
        (got, place) => {
            assert_eq!(got, place);
            assert_eq!(at, expected.offset as usize);
        }
    }
}

/// The in-memory reader of the libxc stream and the walk, for a truncated image.
fn in_memory_says_the_same(image: &Image, libxc: usize, end: &Cell<usize>) {
    let options = ReadOptions {
        offset: libxc as u64,
        ..ReadOptions::default()
    };
    let by_slice = SliceReader::new(&image.bytes[libxc..end.get()], options)
        .and_then(|mut slice| slice.try_for_each(|record| record.map(drop)))
        .map_err(Failure::from)
        .unwrap_err();
    let source = Cut {
        image: &image.bytes,
        at: 0,
        end,
    };
    let mut walk = Walk::open_seeking(source, ReadOptions::default()).unwrap();
    let by_walk = loop {
        match take(&mut walk) {
            Ok(step) => assert!(step.is_some()),
            Err(e) => break Failure::from(e),
        }
    };
    assert_eq!(by_slice, by_walk);
}

fn committed(name: &str) {
    let image = images::committed().into_iter().find(|i| i.name == name);
    let image = image.unwrap();
    let cuts = cut_everywhere(&image);
    // After the image of a migration come messages between its two ends.
    let talk = if name.ends_with("-live") { 44 } else { 0 };
    assert_eq!(cuts, image.bytes.len() - talk);
}

#[test]
fn tpv() {
    committed("4.17-tpv");
}

#[test]
fn tpv_live() {
    committed("4.17-tpv-live");
}

#[test]
fn tpvh() {
    committed("4.17-tpvh");
}

#[test]
fn tpvh_live() {
    committed("4.17-tpvh-live");
}

#[test]
#[ignore = "minutes, and some hundred MiB: cargo test -p xsr-format --test it -- --ignored"]
fn shared_images() {
    for path in images::shared() {
        let image = images::load(&path);
        let cuts = cut_everywhere(&image);
        eprintln!("{}: {cuts} cuts", image.name);
    }
}
