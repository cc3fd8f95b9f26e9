//! Fuzz target for the libxc readers: for any bytes, the in-memory reader and the streaming reader
//! return the same records, and the same error at the same position, in every way of reading.
//! Neither reads beyond END. Lenient differs from strict only where a reserved field is set.

#![no_main]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Cursor, Read};
use std::mem::discriminant;

use libfuzzer_sys::fuzz_target;
use xsr_format::error::{DecodeError, Position, ReadError};
use xsr_format::frame::{PAGE_SIZE, PageEntry};
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::record::Record;
use xsr_format::slice::{SliceReader, SliceRecord};

/// A reader's results, reduced to one number for each record.
#[derive(Default)]
struct Said {
    records: Vec<(Position, u64)>,
    /// The offset after END, or the error.
    end: Option<Result<u64, ReadError>>,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn record(record: &Record<'_>) -> u64 {
    hash((record.kind, record.raw, discriminant(&record.body)))
}

fn batch(entries: impl Iterator<Item = PageEntry>) -> u64 {
    hash(entries.collect::<Vec<_>>())
}

fn by_slice(bytes: &[u8], options: ReadOptions, with_pages: bool) -> Said {
    let mut said = Said::default();
    let mut read = || -> Result<u64, ReadError> {
        let mut reader = SliceReader::new(bytes, options)?;
        while let Some(next) = reader.next_record()? {
            let what = match next {
                SliceRecord::Record(it) => record(&it),
                SliceRecord::PageData(data) => {
                    let pages = with_pages.then(|| hash(data.pages.as_flattened()));
                    hash((batch(data.entries.iter()), pages))
                }
            };
            said.records.push((reader.position(), what));
        }
        Ok(reader.offset())
    };
    let end = read();
    said.end = Some(end);
    said
}

fn by_stream<R: Read>(reader: Result<RecordReader<R>, ReadError>, with_pages: bool) -> Said {
    let mut said = Said::default();
    let read = || -> Result<u64, ReadError> {
        let mut reader = reader?;
        let mut data = Vec::new();
        loop {
            match reader.next_record()? {
                None => return Ok(reader.offset()),
                Some(Incoming::Record(it)) => {
                    let what = record(&it);
                    said.records.push((reader.position(), what));
                }
                Some(Incoming::PageData(mut body)) => {
                    let entries = batch(body.entries().iter());
                    let mut pages = None;
                    if with_pages {
                        data.clear();
                        let mut page = [0; PAGE_SIZE];
                        while body.read_page(&mut page)? {
                            data.extend_from_slice(&page);
                        }
                        pages = Some(hash(data.as_slice()));
                    }
                    said.records.push((body.position(), hash((entries, pages))));
                }
            }
        }
    };
    let end = read();
    said.end = Some(end);
    said
}

#[track_caller]
fn same(a: &Said, b: &Said) {
    match (a.end.as_ref(), b.end.as_ref()) {
        (Some(Ok(a)), Some(Ok(b))) => assert_eq!(a, b),
        (Some(Err(a)), Some(Err(b))) => {
            assert_eq!(a.position, b.position);
            assert_eq!(a.to_string(), b.to_string());
        }
        (a, b) => panic!("{a:?} and {b:?}"),
    }
    assert_eq!(a.records, b.records);
}

/// Panics if more is requested than the stream has.
struct Guarded<'a>(&'a [u8]);

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.0.len(), "read beyond END");
        self.0.read(room)
    }
}

fn judged(bytes: &[u8], lenient: bool) -> Said {
    let options = ReadOptions {
        lenient,
        ..ReadOptions::default()
    };
    let said = by_slice(bytes, options, true);
    same(&by_stream(RecordReader::new(bytes, options), true), &said);
    let without = by_slice(bytes, options, false);
    let seeking = RecordReader::seeking(Cursor::new(bytes), options);
    let mut skipped = by_stream(seeking, false);
    trim(&mut skipped, &without);
    same(&skipped, &without);
    if let Some(Ok(end)) = &said.end {
        let exact = Guarded(&bytes[..usize::try_from(*end).unwrap()]);
        same(&by_stream(RecordReader::new(exact, options), true), &said);
    }
    said
}

/// A reader that skips pages returns a batch before it notices that its pages are missing.
fn trim(skipped: &mut Said, whole: &Said) {
    if let Some(Err(e)) = &whole.end {
        skipped
            .records
            .retain(|(position, _)| *position != e.position);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (strict, lenient) = (judged(bytes, false), judged(bytes, true));
    match &strict.end {
        Some(Err(e))
            if matches!(
                e.decode(),
                Some(DecodeError::ReservedNotZero { .. } | DecodeError::PageEntryReserved { .. })
            ) =>
        {
            assert!(lenient.records.starts_with(&strict.records));
        }
        _ => same(&strict, &lenient),
    }
});
