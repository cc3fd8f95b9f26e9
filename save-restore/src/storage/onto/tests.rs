//! What is shared and what is written.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Mutex;

use proptest::prelude::*;
use xsr_format::frame::{PageEntry, PageType, Pfn};

use super::*;
use crate::storage::testing::FakeStorage;
use crate::storage::{Create, Opened, Storage as _, StorageName};

/// A writer that can share, as XFS can: it copies, and notes what.
#[derive(Debug)]
struct Sharing<'w> {
    to: &'w dyn StorageWriter,
    shared: Mutex<Vec<(Range<u64>, u64)>>,
    written: Mutex<Vec<Range<u64>>>,
}

impl<'w> Sharing<'w> {
    fn new(to: &'w dyn StorageWriter) -> Self {
        Self {
            to,
            shared: Mutex::default(),
            written: Mutex::default(),
        }
    }
}

impl Write for Sharing<'_> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        unreachable!("slots have no order")
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for Sharing<'_> {
    fn name(&self) -> String {
        self.to.name()
    }

    fn shape(&self) -> Shape {
        self.to.shape()
    }

    fn is_straight(&self) -> bool {
        false
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        let range = offset..offset + bytes.len() as u64;
        self.written.lock().unwrap().push(range);
        self.to.write_all_at(bytes, offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.to.read_exact_at(buffer, offset)
    }

    fn punch(&self, range: Range<u64>) -> Result<(), StorageError> {
        self.to.punch(range)
    }

    fn set_length(&self, length: u64) -> Result<(), StorageError> {
        self.to.set_length(length)
    }

    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: Range<u64>,
        to: u64,
    ) -> Result<(), StorageError> {
        let aligned = |offset: u64| offset.is_multiple_of(PAGE);
        assert!(aligned(range.start) && aligned(to) && range.end <= base.length());
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        base.read_exact_at(&mut bytes, range.start)?;
        self.to.write_all_at(&bytes, to)?;
        self.shared.lock().unwrap().push((range, to));
        Ok(())
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.to.sync()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn commit(self: Box<Self>, _: Durability) -> Result<(), StorageError> {
        unreachable!("the test commits")
    }
}

/// The offset of a page: the first is behind a head.
fn at(page: u64) -> u64 {
    (page + 1) * PAGE
}

fn page(of: u8) -> Page {
    [of; PAGE_SIZE]
}

/// A storage with the image `base` of these pages, its reader, and a new image.
fn begun(pages: &[u8]) -> (FakeStorage, Box<dyn StorageReader>, Box<dyn StorageWriter>) {
    let storage = FakeStorage::default();
    let [base, new] = ["base", "new"].map(|name| StorageName::new(name).unwrap());
    let writer = storage.create(&base, &Create::slots()).unwrap();
    for (number, of) in pages.iter().enumerate() {
        writer.write_all_at(&page(*of), at(number as u64)).unwrap();
    }
    writer.commit(Durability::Process).unwrap();
    let Opened::Random(reader) = storage.open(&base).unwrap() else {
        panic!("it can be read only once");
    };
    let new = storage.create(&new, &Create::slots()).unwrap();
    (storage, reader, new)
}

/// The digests of these pages, in records of two.
fn digests(pages: &[u8]) -> BasePages {
    let entries = |count: usize| {
        let page_type = PageType::NOTAB;
        let entry = |pfn| PageEntry {
            pfn: Pfn(pfn),
            page_type,
        };
        (0..count as u64).map(entry).collect::<Vec<_>>()
    };
    let mut index = Vec::new();
    for (number, pages) in pages.chunks(2).enumerate() {
        // Only the place of the data counts.
        let data = at(number as u64 * 2);
        let entries = entries(pages.len());
        let head = 16 + 8 * entries.len() as u64;
        index.push(IndexEntry::of(data - head, 0, &entries, [0; 32]));
    }
    let all: Vec<u8> = pages
        .iter()
        .flat_map(|of| page_digest(&page(*of)))
        .collect();
    BasePages::new(&index, &all)
}

#[test]
fn what_the_base_has_is_shared_in_runs_and_the_rest_is_written() {
    let base = [1, 2, 3, 4, 5, 6];
    for by_digest in [true, false] {
        let (_, reader, new) = begun(&base);
        let sharing = Sharing::new(&*new);
        let how = match by_digest {
            true => Recognise::Digests(digests(&base)),
            false => Recognise::Contents,
        };
        let onto = OntoWriter::new(&sharing, &*reader, how).unwrap();
        sharing.shared.lock().unwrap().clear();
        // The fourth has changed; the last is beyond the base.
        let pages = [1, 2, 3, 9, 5, 6, 7].map(page);
        onto.write_all_at(pages.as_flattened(), at(0)).unwrap();
        // The head of a record is no page.
        onto.write_all_at(&[8; 100], at(7)).unwrap();
        let shared = [(at(0)..at(3), at(0)), (at(4)..at(6), at(4))];
        assert_eq!(*sharing.shared.lock().unwrap(), shared);
        let written = [at(3)..at(4), at(6)..at(7), at(7)..at(7) + 100];
        assert_eq!(*sharing.written.lock().unwrap(), written);
        assert_eq!((onto.shared_pages(), onto.written_pages()), (5, 2));
        let mut got = vec![0; 7 * PAGE_SIZE];
        onto.read_exact_at(&mut got, at(0)).unwrap();
        assert!(got == pages.as_flattened());
    }
}

#[test]
fn by_its_digest_a_page_is_found_at_another_place() {
    let base = [1, 2, 3, 4, 4, 4];
    let (_, reader, new) = begun(&base);
    let sharing = Sharing::new(&*new);
    let how = Recognise::Digests(digests(&base));
    let onto = OntoWriter::new(&sharing, &*reader, how).unwrap();
    sharing.shared.lock().unwrap().clear();
    // One page further, and the equal ones where they are.
    let pages = [7, 1, 2, 4, 4, 4].map(page);
    onto.write_all_at(pages.as_flattened(), at(0)).unwrap();
    let shared = [(at(0)..at(2), at(1)), (at(3)..at(6), at(3))];
    assert_eq!(*sharing.shared.lock().unwrap(), shared);
}

#[test]
fn a_storage_that_cannot_share_is_refused_and_stays_empty() {
    let (storage, reader, new) = begun(&[1, 2]);
    let refused = OntoWriter::new(&*new, &*reader, Recognise::Contents);
    let Err(StorageError::Unsupported { what, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert!(what.contains("cannot share"), "{what}");
    new.commit(Durability::Process).unwrap();
    let lengths: Vec<u64> = (storage.list().unwrap().iter().map(|entry| entry.length)).collect();
    assert_eq!(lengths, [at(2), 0]);
}

proptest! {
    /// Whatever the base has, the new image is what was written.
    #[test]
    fn the_new_image_is_what_was_written(
        base in prop::collection::vec(0_u8..6, 1..24),
        writes in prop::collection::vec((0_u64..24, prop::collection::vec(0_u8..6, 1..8)), 1..12),
        by_digest in any::<bool>(),
    ) {
        let (_, reader, new) = begun(&base);
        let sharing = Sharing::new(&*new);
        let how = match by_digest {
            true => Recognise::Digests(digests(&base)),
            false => Recognise::Contents,
        };
        let onto = OntoWriter::new(&sharing, &*reader, how).unwrap();
        let mut expected = vec![0_u8; 32];
        let mut length = 0;
        for (first, pages) in writes {
            for (page, of) in pages.iter().enumerate() {
                expected[usize::try_from(first).unwrap() + page] = *of;
            }
            length = length.max(first + pages.len() as u64);
            let pages: Vec<Page> = pages.into_iter().map(page).collect();
            onto.write_all_at(pages.as_flattened(), at(first)).unwrap();
        }
        let mut got = vec![0; usize::try_from(length * PAGE).unwrap()];
        onto.read_exact_at(&mut got, at(0)).unwrap();
        for (page, of) in got.as_chunks::<PAGE_SIZE>().0.iter().zip(expected) {
            prop_assert!(page.iter().all(|byte| *byte == of));
        }
    }
}
