//! The streaming reader and the reader of slices say the same of any octets: the
//! same records, and the same error at the same place.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xsr_format::error::{DecodeError, Position, ReadError};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::slice::{SliceReader, SliceRecord};

/// What either reader made of one step.
#[derive(Debug, PartialEq)]
enum Step {
    /// A record, and its body as the reader understands it.
    Record(String),
    /// A batch: its entries, and its pages.
    PageData(String, Vec<u8>),
    /// The end of the stream.
    End,
    /// What is wrong, and where; of a truncated stream not how much is missing, because
    /// one reader asks for a body and its padding at once and the other does not.
    Error(Position, Option<DecodeError>),
}

fn error(error: &ReadError) -> Step {
    Step::Error(error.position, error.decode().cloned())
}

fn next_of_stream(reader: &mut RecordReader<&[u8]>) -> Step {
    let mut body = match reader.next_record() {
        Ok(None) => return Step::End,
        Ok(Some(Incoming::Record(record))) => return Step::Record(format!("{record:?}")),
        Ok(Some(Incoming::PageData(body))) => body,
        Err(e) => return error(&e),
    };
    let entries = format!("{:?}", body.entries());
    let mut pages = Vec::new();
    let mut page = [0; PAGE_SIZE];
    loop {
        match body.read_page(&mut page) {
            Ok(true) => pages.extend_from_slice(&page),
            Ok(false) => return Step::PageData(entries, pages),
            Err(e) => return error(&e),
        }
    }
}

fn next_of_slice(reader: &mut SliceReader<'_>) -> Step {
    match reader.next_record() {
        Ok(None) => Step::End,
        Ok(Some(SliceRecord::Record(record))) => Step::Record(format!("{record:?}")),
        Ok(Some(SliceRecord::PageData(batch))) => {
            Step::PageData(format!("{:?}", batch.entries), batch.pages.concat())
        }
        Err(e) => error(&e),
    }
}

fuzz_target!(|octets: &[u8]| {
    let options = ReadOptions {
        lenient: octets.len() % 2 == 1,
        ..ReadOptions::default()
    };
    let (mut stream, mut slice) = match (
        RecordReader::new(octets, options),
        SliceReader::new(octets, options),
    ) {
        (Ok(stream), Ok(slice)) => (stream, slice),
        (Err(a), Err(b)) => return assert_eq!(error(&a), error(&b)),
        (a, b) => panic!("one reader refuses the headers: {a:?}, {b:?}"),
    };
    loop {
        let step = next_of_stream(&mut stream);
        assert_eq!(step, next_of_slice(&mut slice));
        if matches!(step, Step::End | Step::Error(..)) {
            return;
        }
    }
});
