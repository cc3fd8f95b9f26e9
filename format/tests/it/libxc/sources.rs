//! Tests of the reader with slow, interrupted, failing, lying and endless sources, and of how much
//! it requests.

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use xsr_format::error::{DecodeError, Place, ReadErrorCause};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, RecordReader};
use xsr_format::record::RecordKind;

use crate::support::build::*;
use crate::support::drive::*;

/// Fails the test if more is requested than the stream has; there are more bytes after END.
struct Guarded<'a> {
    left: &'a [u8],
    largest: usize,
}

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.left.len(), "read beyond END");
        self.largest = self.largest.max(room.len());
        self.left.read(room)
    }
}

const ALL_WAYS: [Pages; 4] = [Pages::Read, Pages::Skip, Pages::First, Pages::Source];

fn streams() -> Vec<Stream> {
    vec![
        Stream::whole_pv(3, false, 8),
        Stream::whole_pv(2, true, 4),
        Stream::whole_hvm(3, true),
        Stream::whole_hvm(2, false),
    ]
}

#[test]
fn never_reads_beyond_end() {
    for stream in streams() {
        let bytes = stream.bytes();
        for pages in ALL_WAYS {
            let source = Guarded {
                left: &bytes,
                largest: 0,
            };
            let reader = RecordReader::new(source, STRICT).unwrap();
            let (offset, source) = drain(reader, pages, &mut Vec::new()).unwrap();
            assert_eq!(offset, bytes.len() as u64);
            assert!(source.left.is_empty());
        }
    }
}

#[test]
fn the_source_comes_back_right_behind_end() {
    let mut bytes = Stream::whole_hvm(3, false).bytes();
    bytes.extend_from_slice(b"emulator records");
    let reader = RecordReader::new(&bytes[..], STRICT).unwrap();
    let (_, rest) = drain(reader, Pages::Skip, &mut Vec::new()).unwrap();
    assert_eq!(rest, b"emulator records");
    let mut slice = xsr_format::slice::SliceReader::new(&bytes, STRICT).unwrap();
    while slice.next_record().unwrap().is_some() {}
    assert_eq!(slice.rest(), b"emulator records");
}

/// Returns one byte at a time, interrupted before each.
struct Trickle<'a>(&'a [u8], bool);

impl Read for Trickle<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let some = room.len().min(1);
        self.0.read(&mut room[..some])
    }
}

#[test]
fn one_byte_at_a_time_and_interrupted() {
    for stream in streams() {
        let bytes = stream.bytes();
        let expected = strict(&bytes);
        let read = by_stream(Trickle(&bytes, false), STRICT, Pages::Read);
        assert_eq!(read, expected);
        let expected = expected.without_pages();
        for pages in [Pages::Skip, Pages::First] {
            assert_eq!(by_stream(Trickle(&bytes, false), STRICT, pages), expected);
        }
    }
}

/// Fails after some bytes.
struct Failing<'a>(&'a [u8]);

impl Read for Failing<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.0.read(room)? {
            0 => Err(io::ErrorKind::ConnectionReset.into()),
            n => Ok(n),
        }
    }
}

#[test]
fn a_failing_source_is_not_a_bad_image() {
    let bytes = Stream::whole_hvm(3, false).bytes();
    for cut in 0..bytes.len() {
        let failed = by_stream(Failing(&bytes[..cut]), STRICT, Pages::Read);
        let ended = by_stream(&bytes[..cut], STRICT, Pages::Read);
        assert_eq!(failed.seen, ended.seen);
        let (failed, ended) = (failed.failure(), ended.failure());
        assert_eq!(failed.position, ended.position);
        assert_eq!(failed.cause, Cause::Io(io::ErrorKind::ConnectionReset));
        assert!(matches!(ended.cause, Cause::Truncated(_)));
    }
    let error = RecordReader::new(Failing(&[]), STRICT).unwrap_err();
    assert!(!error.is_bad_image());
    assert!(error.decode().is_none());
}

/// After an error in the middle of a stream, reading cannot continue.
#[test]
fn no_going_on_after_an_error() {
    let bytes = Stream::whole_hvm(3, false).without(HVM_CONTEXT).bytes();
    let mut reader = RecordReader::new(&bytes[..], STRICT).unwrap();
    while let Ok(record) = reader.next_record() {
        assert!(record.is_some());
    }
    for _ in 0..2 {
        let error = reader.next_record().unwrap_err();
        assert!(matches!(error.cause, ReadErrorCause::Io(_)));
    }
    let mut slice = xsr_format::slice::SliceReader::new(&bytes, STRICT).unwrap();
    while let Ok(record) = slice.next_record() {
        assert!(record.is_some());
    }
    assert!(slice.next_record().unwrap().is_none());
    assert_eq!(slice.count(), 0);
}

/// Claims to have read more than fits in the buffer.
struct Boastful;

impl Read for Boastful {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        room.fill(0xff);
        Ok(room.len() + 1)
    }
}

struct BoastfulAfter<'a>(io::Chain<&'a [u8], Boastful>);

impl Read for BoastfulAfter<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

#[test]
fn a_source_that_claims_too_much_is_not_believed() {
    let bytes = Stream::whole_hvm(3, false).bytes();
    for cut in [0, 30, 44, 200, 400, bytes.len() - 100] {
        for pages in [Pages::Read, Pages::Skip] {
            let source = BoastfulAfter(bytes[..cut].chain(Boastful));
            let cause = by_stream(source, STRICT, pages).failure().cause;
            assert_eq!(cause, Cause::Io(io::ErrorKind::Other), "{cut}");
        }
    }
    // Also while pages are skipped, not only when the next record is read.
    let batch = Stream::whole_hvm(3, false).offsets()[3];
    let source = BoastfulAfter(bytes[..batch + 100].chain(Boastful));
    let failure = by_stream(source, STRICT, Pages::Skip).failure();
    assert_eq!(failure.position.offset, batch as u64);
}

/// An impossible length for a record's kind is reported as such, not as a truncated stream, because
/// it is checked before the body is read.
#[test]
fn wrong_lengths_are_found_before_the_body() {
    let begin = Stream::new(3, PV, false).pv_info(8).policies().bytes();
    for (kind, length) in [
        (VERIFY, 64),
        (SHARED_INFO, 4096 + (1 << 20)),
        (P2M_FRAMES, 100 << 20),
        (TSC_INFO, 24 + 32),
    ] {
        let mut bytes = begin.clone();
        bytes.extend(Bytes::new(false).u32(kind).u32(length).fill(1, 10).bytes);
        let mut reader = RecordReader::new(&bytes[..], STRICT).unwrap();
        let error = loop {
            match reader.next_record() {
                Ok(record) => assert!(record.is_some()),
                Err(e) => break e,
            }
        };
        let got = u64::from(length);
        assert!(
            matches!(error.decode(), Some(DecodeError::BodyLength { got: g, .. }) if *g == got),
            "{kind}: {error}"
        );
    }
}

/// A length is only a claim. Memory grows with the bytes that arrive, in steps of 1 MiB, not with
/// the claimed length.
#[test]
fn hostile_lengths_with_bounded_memory() {
    const STEP: usize = 1 << 20;
    let stream = Stream::new(3, PV, false).pv_info(8).policies();
    let begin = stream.bytes();
    let at = begin.len();
    let max: u32 = 128 << 20;
    for (kind, max) in [(HVM_CONTEXT, 16 << 20), (0x8000_0000, max)] {
        let guest = if kind == HVM_CONTEXT { HVM } else { PV };
        let mut bytes = match guest {
            PV => begin.clone(),
            _ => headers(3, HVM, false),
        };
        let at = if guest == PV { at } else { bytes.len() };
        bytes.extend(Bytes::new(false).u32(kind).u32(max).fill(1, 10).bytes);
        let source = Asked::new(&bytes);
        let mut reader = RecordReader::new(source, STRICT).unwrap();
        let error = loop {
            match reader.next_record() {
                Ok(record) => assert!(record.is_some()),
                Err(e) => break e,
            }
        };
        assert_eq!(error.position.offset, at as u64);
        let needed = u64::from(max) - 10;
        assert!(matches!(error.cause, ReadErrorCause::Truncated { needed: n } if n == needed));
        assert!(reader.into_source().largest <= STEP);
    }
    // A batch that claims as many entries as the body's length permits.
    let mut bytes = Stream::new(3, HVM, false).policies().bytes();
    let count = (max - 8) / 8;
    bytes.extend(
        Bytes::new(false)
            .u32(PAGE_DATA)
            .u32(max)
            .u32(count)
            .u32(0)
            .bytes,
    );
    bytes.extend(Bytes::new(false).u64(0xf << 60).bytes);
    let outcome = strict(&bytes).failure();
    assert_eq!(outcome.cause, Cause::Truncated(u64::from(count) * 8 - 8));
    let mut reader = RecordReader::new(Asked::new(&bytes), STRICT).unwrap();
    while reader.next_record().is_ok() {}
    assert!(reader.into_source().largest <= STEP);
}

/// Records the size of the largest buffer it was given.
struct Asked<'a> {
    left: &'a [u8],
    largest: usize,
}

impl<'a> Asked<'a> {
    fn new(left: &'a [u8]) -> Self {
        Self { left, largest: 0 }
    }
}

impl Read for Asked<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.largest = self.largest.max(room.len());
        self.left.read(room)
    }
}

/// Invalid input is refused before the rest of its bytes is awaited.
#[test]
fn refused_before_it_is_waited_for() {
    let begin = Stream::new(3, HVM, false).policies();
    let bytes = begin.bytes();
    for (kind, length) in [
        (0x13, 8),
        (TSC_INFO, (128 << 20) + 1),
        (SHARED_INFO, 4096),
        (STATIC_DATA_END, 0),
        (END, 0),
        (CPUID_POLICY, 24),
        (PAGE_DATA, 7),
    ] {
        let header = Bytes::new(false).u32(kind).u32(length).bytes;
        let source = Guarded {
            left: &[bytes.clone(), header].concat(),
            largest: 0,
        };
        let failure = by_stream(source, STRICT, Pages::Skip).failure();
        assert!(matches!(failure.cause, Cause::Decode(_)));
        assert_eq!(failure.position.offset, bytes.len() as u64);
    }
    // Not an image: the rest of the headers is not awaited either.
    let source = Guarded {
        left: &[0; 24],
        largest: 0,
    };
    let failure = by_stream(source, STRICT, Pages::Skip).failure();
    assert_eq!(failure.position.place, Place::ImageHeader);
}

/// Counts bytes that are read and those that are only skipped.
struct Counted<'a> {
    inner: Cursor<&'a [u8]>,
    read: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(room)?;
        self.read += n as u64;
        Ok(n)
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

#[test]
fn seeking_touches_no_page_that_nobody_wants() {
    for stream in streams() {
        let bytes = stream.bytes();
        let outcome = strict(&bytes);
        let data: u64 = xsr_format::slice::SliceReader::new(&bytes, STRICT)
            .unwrap()
            .map(|record| match record.unwrap() {
                xsr_format::slice::SliceRecord::PageData(data) => data.pages.len() as u64,
                xsr_format::slice::SliceRecord::Record(_) => 0,
            })
            .sum();
        assert!(data >= 3);
        let source = Counted {
            inner: Cursor::new(&bytes),
            read: 0,
        };
        let reader = RecordReader::seeking(source, STRICT).unwrap();
        let mut seen = Vec::new();
        let (offset, source) = drain(reader, Pages::Skip, &mut seen).unwrap();
        assert_eq!(seen, outcome.clone().without_pages().seen);
        assert_eq!(source.read, offset - data * PAGE_SIZE as u64);
        assert_eq!(source.inner.position(), bytes.len() as u64);
        for pages in ALL_WAYS {
            let got = by_seeking(Cursor::new(&bytes), STRICT, pages);
            assert_eq!(got.without_pages(), outcome.clone().without_pages());
        }
    }
}

/// A stream that begins in the middle of a file.
#[test]
fn seeking_from_the_middle_of_a_file() {
    let stream = Stream::whole_hvm(3, false).bytes();
    let file = [vec![0x11; 777], stream.clone()].concat();
    let mut cursor = Cursor::new(&file);
    cursor.set_position(777);
    let options = xsr_format::read::ReadOptions {
        offset: 777,
        ..STRICT
    };
    let outcome = by_seeking(cursor, options, Pages::First);
    assert_eq!(outcome.end, Ok(file.len() as u64));
    let plain = strict(&stream);
    for (moved, plain) in outcome.seen.iter().zip(&plain.seen) {
        assert_eq!(moved.position.offset, plain.position.offset + 777);
    }
}

fn batches(stream: &[u8], mut look: impl FnMut(&mut xsr_format::read::PageDataBody<'_, &[u8]>)) {
    let mut reader = RecordReader::new(stream, STRICT).unwrap();
    while let Some(incoming) = reader.next_record().unwrap() {
        if let Incoming::PageData(mut body) = incoming {
            look(&mut body);
        }
    }
    assert_eq!(reader.offset(), stream.len() as u64);
}

/// However much of a batch is read, and in which way, the next record is found.
#[test]
fn page_data_taken_in_every_way() {
    let entries: Vec<(u64, u8)> = (0..7).map(|pfn| (pfn, 0)).collect();
    let whole = Stream::whole_hvm(3, false);
    let mut stream = whole.clone();
    stream.records[3] = Stream::new(3, HVM, false).pages(&entries).records.remove(0);
    let bytes = stream.bytes();
    for by_page in 0..=7_u64 {
        for at_once in 0..=8_u64 {
            let mut first = true;
            batches(&bytes, |body| {
                if !std::mem::take(&mut first) {
                    return;
                }
                assert_eq!((body.pages(), body.pages_left()), (7, 7));
                assert_eq!(u64::from(body.length()), 8 + 7 * 8 + 7 * 4096);
                assert_eq!(body.entries().len(), 7);
                assert!(!body.entries().is_empty());
                let mut page = [0xee; PAGE_SIZE];
                for pfn in 0..by_page {
                    assert!(body.read_page(&mut page).unwrap());
                    assert!(page.iter().all(|byte| u64::from(*byte) == pfn));
                    assert_eq!(body.pages_left(), 6 - pfn);
                }
                let expected = at_once.min(7 - by_page);
                let taken = body
                    .with_source(at_once, |source, bytes| {
                        let mut data = vec![0; bytes as usize];
                        source.read_exact(&mut data)?;
                        Ok(data)
                    })
                    .unwrap();
                assert_eq!(taken.len() as u64, expected * 4096);
                for (page, pfn) in taken.chunks(4096).zip(by_page..) {
                    assert!(page.iter().all(|byte| u64::from(*byte) == pfn));
                }
                assert_eq!(body.pages_left(), 7 - by_page - expected);
                let none_left = body.pages_left() == 0;
                assert_eq!(!body.read_page(&mut page).unwrap(), none_left);
            });
        }
    }
}

#[test]
fn with_source_reports_what_went_wrong() {
    let bytes = Stream::whole_hvm(3, false).bytes();
    for (kind, truncated) in [
        (io::ErrorKind::UnexpectedEof, true),
        (io::ErrorKind::BrokenPipe, false),
    ] {
        let mut reader = RecordReader::new(&bytes[..], STRICT).unwrap();
        let error = loop {
            if let Some(Incoming::PageData(mut body)) = reader.next_record().unwrap() {
                let position = body.position();
                let error = body
                    .with_source(2, |_, bytes| {
                        assert_eq!(bytes, 2 * 4096);
                        Err::<(), _>(kind.into())
                    })
                    .unwrap_err();
                assert_eq!(error.position, position);
                break error;
            }
        };
        match error.cause {
            ReadErrorCause::Truncated { needed } => assert!(truncated && needed == 2 * 4096),
            ReadErrorCause::Io(e) => assert_eq!(e.kind(), kind),
            other => panic!("{other}"),
        }
        assert!(reader.next_record().is_err(), "there is no going on");
    }
}

/// A restorer may release the source in the middle of a batch, and take it back.
#[test]
fn positions_and_offsets_while_reading() {
    let stream = Stream::whole_hvm(3, false);
    let bytes = stream.bytes();
    let offsets = stream.offsets();
    let mut reader = RecordReader::new(&bytes[..], STRICT).unwrap();
    assert_eq!(reader.offset(), 40);
    assert_eq!(reader.position().place, Place::DomainHeader);
    for (index, kind) in stream.kinds().into_iter().enumerate() {
        assert!(reader.next_record().unwrap().is_some());
        let position = reader.position();
        assert_eq!(position.offset, offsets[index] as u64);
        let place = Place::Record {
            index: index as u64,
            kind: Some(RecordKind(kind)),
        };
        assert_eq!(position.place, place);
        if kind != PAGE_DATA {
            assert_eq!(reader.offset(), offsets[index + 1] as u64);
        }
    }
    let debug = format!("{reader:?}");
    assert!(debug.contains("offset") && debug.len() < 300, "{debug}");
}
