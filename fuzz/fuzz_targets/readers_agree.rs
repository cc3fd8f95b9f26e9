//! The streaming reader and the reader of slices say the same of any octets: the
//! same records, and the same error at the same place.

#![no_main]

use std::mem::discriminant;

use libfuzzer_sys::fuzz_target;
use xsr_format::error::ReadError;
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::slice::{SliceReader, SliceRecord};

fn refused_alike(stream: &ReadError, slice: &ReadError) {
    assert_eq!(stream.to_string(), slice.to_string());
    assert_eq!(stream.decode(), slice.decode());
    assert_eq!(stream.position, slice.position);
}

/// Take a step with both readers; whether there is another one to take.
fn step(stream: &mut RecordReader<&[u8]>, slice: &mut SliceReader<'_>) -> bool {
    let of_slice = slice.next_record();
    match (stream.next_record(), of_slice) {
        (Ok(None), Ok(None)) => false,
        (Err(a), Err(b)) => {
            refused_alike(&a, &b);
            false
        }
        (Ok(Some(Incoming::Record(a))), Ok(Some(SliceRecord::Record(b)))) => {
            assert_eq!((a.kind, a.raw), (b.kind, b.raw));
            assert_eq!(discriminant(&a.body), discriminant(&b.body));
            true
        }
        (Ok(Some(Incoming::PageData(mut a))), b) => {
            let mut page = [0; PAGE_SIZE];
            // A batch that is cut off: the stream shows its entries and fails at the
            // page, the slice never shows it.
            let batch = match &b {
                Ok(Some(SliceRecord::PageData(batch))) => Some(batch),
                Err(_) => None,
                other => panic!("a batch in the stream, {other:?} in the slice"),
            };
            if let Some(batch) = batch {
                assert!(a.entries().iter().eq(batch.entries.iter()));
            }
            let mut pages = 0;
            loop {
                match (a.read_page(&mut page), &b) {
                    (Ok(true), _) => {
                        assert!(batch.is_none_or(|batch| batch.pages[pages] == page));
                        pages += 1;
                    }
                    (Ok(false), Ok(_)) => {
                        assert_eq!(batch.map(|batch| batch.pages.len()), Some(pages));
                        return true;
                    }
                    // How much was missing depends on how much had been asked for.
                    (Err(a), Err(b)) => {
                        assert_eq!((a.decode(), a.position), (b.decode(), b.position));
                        return false;
                    }
                    (a, b) => panic!("the readers differ: {a:?}, {b:?}"),
                }
            }
        }
        (a, b) => panic!("the readers differ: {a:?}, {b:?}"),
    }
}

fuzz_target!(|octets: &[u8]| {
    let options = ReadOptions {
        lenient: octets.len() % 2 == 1,
        ..ReadOptions::default()
    };
    match (
        RecordReader::new(octets, options),
        SliceReader::new(octets, options),
    ) {
        (Ok(mut stream), Ok(mut slice)) => while step(&mut stream, &mut slice) {},
        (Err(a), Err(b)) => refused_alike(&a, &b),
        (a, b) => panic!("one reader refuses the headers: {a:?}, {b:?}"),
    }
});
