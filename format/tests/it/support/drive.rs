//! Drivers that read a stream and reduce the results to comparable values.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Seek};

use xsr_format::error::{DecodeError, Position, ReadError, ReadErrorCause};
use xsr_format::frame::PAGE_SIZE;
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::record::{Record, RecordKind};
use xsr_format::slice::{SliceReader, SliceRecord};

pub(crate) const STRICT: ReadOptions = ReadOptions {
    lenient: false,
    offset: 0,
};
pub(crate) const LENIENT: ReadOptions = ReadOptions {
    lenient: true,
    offset: 0,
};

/// The comparable cause of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Io(io::ErrorKind),
    Truncated(u64),
    Decode(DecodeError),
    Other(String),
}

/// Position and cause of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) position: Position,
    pub(crate) cause: Cause,
}

impl From<ReadError> for Failure {
    fn from(e: ReadError) -> Self {
        let cause = match e.cause {
            ReadErrorCause::Io(e) => Cause::Io(e.kind()),
            ReadErrorCause::Truncated { needed } => Cause::Truncated(needed),
            ReadErrorCause::Decode(e) => Cause::Decode(e),
            other => Cause::Other(other.to_string()),
        };
        Self {
            position: e.position,
            cause,
        }
    }
}

/// A record that a reader returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) position: Position,
    pub(crate) kind: RecordKind,
    /// Hash of its contents; for PAGE_DATA, of the entries.
    pub(crate) said: u64,
    /// Hash of the pages, if they were read.
    pub(crate) pages: Option<u64>,
}

/// All results of a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) seen: Vec<Seen>,
    /// The offset after END.
    pub(crate) end: Result<u64, Failure>,
}

impl Outcome {
    pub(crate) fn kinds(&self) -> Vec<u32> {
        self.seen.iter().map(|s| s.kind.0).collect()
    }

    /// Removes the contents of pages, for comparison with a reader that skipped them.
    pub(crate) fn without_pages(mut self) -> Self {
        self.seen.iter_mut().for_each(|s| s.pages = None);
        self
    }

    pub(crate) fn failure(self) -> Failure {
        self.end.expect_err("the stream should be refused")
    }

    pub(crate) fn decode(self) -> DecodeError {
        match self.failure().cause {
            Cause::Decode(e) => e,
            other => panic!("{other:?} is no rule that was broken"),
        }
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Hash of a record's bytes and of its decoded body.
fn said(record: &Record<'_>) -> u64 {
    hash((record.raw, std::mem::discriminant(&record.body)))
}

/// What to do with page data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Read each page separately.
    Read,
    /// Let the reader skip all.
    Skip,
    /// Read the first page, skip the others.
    First,
    /// Take all pages from the source at once.
    Source,
}

pub(crate) fn by_slice(stream: &[u8], options: ReadOptions) -> Outcome {
    let mut seen = Vec::new();
    let end = (|| {
        let mut reader = SliceReader::new(stream, options)?;
        while let Some(record) = reader.next_record()? {
            let position = reader.position();
            seen.push(match record {
                SliceRecord::PageData(data) => {
                    let entries: Vec<_> = data.entries.iter().collect();
                    Seen {
                        position,
                        kind: RecordKind::PAGE_DATA,
                        said: hash(entries),
                        pages: Some(hash(data.pages.as_flattened())),
                    }
                }
                SliceRecord::Record(record) => Seen {
                    position,
                    kind: record.kind,
                    said: said(&record),
                    pages: None,
                },
            });
        }
        Ok::<_, ReadError>(reader.offset())
    })();
    let end = end.map_err(Failure::from);
    Outcome { seen, end }
}

pub(crate) fn by_stream(source: impl Read, options: ReadOptions, pages: Pages) -> Outcome {
    let mut seen = Vec::new();
    let end = RecordReader::new(source, options).and_then(|r| drain(r, pages, &mut seen));
    let end = end.map(|(offset, _)| offset).map_err(Failure::from);
    Outcome { seen, end }
}

pub(crate) fn by_seeking(source: impl Read + Seek, options: ReadOptions, pages: Pages) -> Outcome {
    let mut seen = Vec::new();
    let end = RecordReader::seeking(source, options).and_then(|r| drain(r, pages, &mut seen));
    let end = end.map(|(offset, _)| offset).map_err(Failure::from);
    Outcome { seen, end }
}

/// Reads to END. Returns the offset after it, and the source.
pub(crate) fn drain<R: Read>(
    mut reader: RecordReader<R>,
    pages: Pages,
    seen: &mut Vec<Seen>,
) -> Result<(u64, R), ReadError> {
    // A batch counts only after its pages have been read: the in-memory reader notices immediately
    // that they are missing, this one only when it reaches them.
    let mut held: Option<Seen> = None;
    loop {
        let next = reader.next_record();
        let lacks_pages = |held: &Seen| matches!(&next, Err(e) if e.position == held.position);
        if held.as_ref().is_some_and(lacks_pages) {
            held = None;
        }
        seen.extend(held.take());
        match next? {
            None => break,
            Some(Incoming::PageData(mut body)) => {
                let position = body.position();
                let said = hash(body.entries().iter().collect::<Vec<_>>());
                let mut data = Vec::new();
                let mut page = [0; PAGE_SIZE];
                match pages {
                    Pages::Skip => {}
                    Pages::Read => {
                        while body.read_page(&mut page)? {
                            data.extend_from_slice(&page);
                        }
                    }
                    Pages::First => {
                        body.read_page(&mut page)?;
                    }
                    Pages::Source => {
                        let count = body.pages();
                        body.with_source(count, |source, bytes| {
                            data.resize(usize::try_from(bytes).unwrap(), 0);
                            source.read_exact(&mut data)
                        })?;
                        assert_eq!(body.pages_left(), 0);
                    }
                }
                let read = matches!(pages, Pages::Read | Pages::Source);
                held = Some(Seen {
                    position,
                    kind: RecordKind::PAGE_DATA,
                    said,
                    pages: read.then(|| hash(data.as_slice())),
                });
            }
            Some(Incoming::Record(record)) => {
                let (kind, said) = (record.kind, said(&record));
                seen.push(Seen {
                    position: reader.position(),
                    kind,
                    said,
                    pages: None,
                });
            }
        }
    }
    Ok((reader.offset(), reader.into_source()))
}

/// The result on which both readers agree, in every way of reading.
pub(crate) fn agreed(stream: &[u8], options: ReadOptions) -> Outcome {
    let outcome = by_slice(stream, options);
    same(&by_stream(stream, options, Pages::Read), &outcome);
    let skipped = outcome.clone().without_pages();
    same(&by_stream(stream, options, Pages::Skip), &skipped);
    let seeking = by_seeking(io::Cursor::new(stream), options, Pages::Skip);
    same(&seeking, &skipped);
    outcome
}

/// Like `assert_eq`, but does not print equal records.
#[track_caller]
pub(crate) fn same(got: &Outcome, expected: &Outcome) {
    for (got, expected) in got.seen.iter().zip(&expected.seen) {
        assert_eq!(got, expected);
    }
    assert_eq!(got.end, expected.end);
    assert_eq!(got.seen.len(), expected.seen.len(), "{:?}", got.end);
}

/// The outcome in strict mode.
pub(crate) fn strict(stream: &[u8]) -> Outcome {
    agreed(stream, STRICT)
}

/// The outcome in lenient mode.
pub(crate) fn lenient(stream: &[u8]) -> Outcome {
    agreed(stream, LENIENT)
}
