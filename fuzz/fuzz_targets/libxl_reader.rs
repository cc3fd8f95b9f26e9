//! Fuzz target for whole files: the walk gives the same result for a seekable source; it reads
//! nothing beyond the last record; and for a libxl stream its result equals that of the libxl
//! reader and the fold of the records, driven by hand.

#![no_main]

use std::io::{self, Cursor, Read};

use libfuzzer_sys::fuzz_target;
use xsr_format::error::{Position, ReadError};
use xsr_format::guest_image::GuestImage;
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::{LibxlReader, LibxlRecord};

/// The position of each step, the libxl records, and the final error.
#[derive(Default)]
struct Said {
    steps: Vec<Position>,
    records: Vec<LibxlRecord>,
    checkpointed: bool,
    offset: u64,
    error: Option<ReadError>,
}

fn walk<R: Read>(walk: Result<Walk<R>, ReadError>) -> Said {
    let mut said = Said::default();
    let read = || -> Result<(), ReadError> {
        let mut walk = walk?;
        while let Some(step) = walk.next_step()? {
            said.steps.push(step.position);
            match step.content {
                Content::LibxlRecord(record) => said.records.push(record),
                Content::Record(record) if record.kind == RecordKind::CHECKPOINT => {
                    said.checkpointed = true;
                }
                Content::XlHeader(header) => drop(header.encode()),
                _ => {}
            }
            said.offset = walk.offset();
        }
        assert!(walk.next_step()?.is_none());
        Ok(())
    };
    said.error = read().err();
    said
}

#[track_caller]
fn same_error(a: Option<&ReadError>, b: Option<&ReadError>) {
    let shown = |e: &ReadError| (e.position, e.to_string());
    assert_eq!(a.map(shown), b.map(shown));
}

/// The libxl records of a stream without checkpoints, read by hand.
fn by_hand(
    bytes: &[u8],
    options: ReadOptions,
    records: &mut Vec<LibxlRecord>,
) -> Result<(), ReadError> {
    let mut libxl = LibxlReader::new(bytes, options)?;
    while let Some(record) = libxl.next_record()? {
        let is_context = matches!(record, LibxlRecord::LibxcContext);
        records.push(record);
        if is_context {
            let start = libxl.offset();
            let inner = ReadOptions {
                offset: start,
                ..options
            };
            let mut libxc = RecordReader::new(libxl.source_mut(), inner)?;
            let mut guest = GuestImage::new(libxc.domain().guest_type);
            while let Some((position, incoming)) = libxc.next_record_at()? {
                let applied = match incoming {
                    Incoming::PageData(body) => guest.apply_pages(body.entries().iter()),
                    Incoming::Record(record) => guest.apply(&record),
                };
                applied.map_err(|e| ReadError {
                    position,
                    cause: e.into(),
                })?;
            }
            let bytes = libxc.offset() - start;
            libxl.advance(bytes);
        }
    }
    Ok(())
}

/// Panics if more is requested than the file has.
struct Guarded<'a>(&'a [u8]);

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.0.len(), "read beyond the last record");
        self.0.read(room)
    }
}

fuzz_target!(|bytes: &[u8]| {
    for lenient in [false, true] {
        let options = ReadOptions {
            lenient,
            ..ReadOptions::default()
        };
        let said = walk(Walk::open(bytes, options));
        let seeking = walk(Walk::open_seeking(Cursor::new(bytes), options));
        assert_eq!(said.steps, seeking.steps);
        assert_eq!(said.records, seeking.records);
        same_error(said.error.as_ref(), seeking.error.as_ref());
        if said.error.is_none() {
            let exact = Guarded(&bytes[..usize::try_from(said.offset).unwrap()]);
            let exact = walk(Walk::open(exact, options));
            assert_eq!(said.steps, exact.steps);
            same_error(None, exact.error.as_ref());
        }
        if bytes.starts_with(b"LibxlFmt") && !said.checkpointed {
            let mut records = Vec::new();
            let error = by_hand(bytes, options, &mut records).err();
            assert_eq!(said.records, records);
            same_error(said.error.as_ref(), error.as_ref());
        }
    }
});
