//! Reader of libxc streams in memory: the same rules as [`crate::read`], without copying.

use zerocopy::FromBytes;

use crate::decoder::Decoder;
use crate::error::{Place, Position, ReadError, ReadErrorCause};
use crate::frame::{PAGE_SIZE, Page, WirePageEntry};
use crate::image::{DomainHeader, ImageHeader, WireDomainHeader, WireImageHeader};
use crate::read::ReadOptions;
use crate::record::page_data::{Entries, WirePageDataHead};
use crate::record::{Record, RecordKind, WireRecordHeader, padding};

/// Reader of a libxc stream in a slice.
///
/// ```
/// use xsr_format::{ReadOptions, SliceReader, SliceRecord};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// for record in SliceReader::new(&image, ReadOptions::default())? {
///     if let SliceRecord::PageData(batch) = record? {
///         for (entry, page) in batch.entries.iter().zip(batch.pages) {
///             println!("pfn {} starts with {:#x}", entry.pfn, page[0]);
///         }
///     }
/// }
/// # Ok::<(), xsr_format::ReadError>(())
/// ```
#[derive(Clone, Debug)]
pub struct SliceReader<'a> {
    rest: &'a [u8],
    decoder: Decoder,
    offset: u64,
    index: u64,
    current: Position,
    over: bool,
}

/// A record of a stream in memory.
#[derive(Clone, Copy, Debug)]
pub enum SliceRecord<'a> {
    /// A batch of pages.
    PageData(PageData<'a>),
    /// Any other record.
    Record(Record<'a>),
}

/// A PAGE_DATA record in memory.
#[derive(Clone, Copy, Debug)]
pub struct PageData<'a> {
    /// The entries, in the order of the stream.
    pub entries: Entries<'a>,
    /// A page for each entry with data, in the same order.
    pub pages: &'a [Page],
}

/// Splits `bytes` off the front of `rest`.
fn take<'a>(rest: &mut &'a [u8], bytes: u64) -> Result<&'a [u8], ReadErrorCause> {
    let split = usize::try_from(bytes)
        .ok()
        .and_then(|n| rest.split_at_checked(n));
    let Some((head, tail)) = split else {
        return Err(ReadErrorCause::Truncated {
            needed: bytes.saturating_sub(rest.len() as u64),
        });
    };
    *rest = tail;
    Ok(head)
}

fn take_as<'a, T>(rest: &mut &'a [u8]) -> Result<&'a T, ReadErrorCause>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    let bytes = size_of::<T>() as u64;
    let truncated = ReadErrorCause::Truncated {
        needed: bytes.saturating_sub(rest.len() as u64),
    };
    let (value, tail) = T::ref_from_prefix(rest).map_err(|_| truncated)?;
    *rest = tail;
    Ok(value)
}

impl<'a> SliceReader<'a> {
    /// Reads the headers of a stream.
    ///
    /// # Errors
    ///
    /// An error in the headers.
    pub fn new(stream: &'a [u8], options: ReadOptions) -> Result<Self, ReadError> {
        let mut rest = stream;
        let mut offset = options.offset;
        let image = take_as::<WireImageHeader>(&mut rest)
            .and_then(|image| {
                ImageHeader::decode(image, options.lenient)?;
                Ok(image)
            })
            .map_err(|cause| ReadError::at(Place::ImageHeader, offset, cause))?;
        offset = offset.saturating_add(ImageHeader::BYTES as u64);
        let decoder = take_as::<WireDomainHeader>(&mut rest)
            .and_then(|domain| Ok(Decoder::new(image, domain, options.lenient)?))
            .map_err(|cause| ReadError::at(Place::DomainHeader, offset, cause))?;
        let current = Position {
            place: Place::DomainHeader,
            offset,
        };
        offset = offset.saturating_add(DomainHeader::BYTES as u64);
        Ok(Self {
            rest,
            decoder,
            offset,
            index: 0,
            current,
            over: false,
        })
    }

    /// The image header.
    pub fn image(&self) -> ImageHeader {
        self.decoder.image
    }

    /// The domain header.
    pub fn domain(&self) -> DomainHeader {
        self.decoder.domain
    }

    /// Whether static data is complete.
    pub fn static_data_over(&self) -> bool {
        self.decoder.order.static_data_over()
    }

    /// Bytes of the file consumed so far, including those before the stream.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Position of the record that was read last, or of the domain header before the first.
    pub fn position(&self) -> Position {
        self.current
    }

    /// The bytes after the records read so far.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next record, or `None` after END.
    ///
    /// # Errors
    ///
    /// The stream is truncated or a rule is broken. After an error every further call returns
    /// `None`.
    pub fn next_record(&mut self) -> Result<Option<SliceRecord<'a>>, ReadError> {
        if self.over {
            return Ok(None);
        }
        let index = self.index;
        self.current = Position {
            place: Place::Record { index, kind: None },
            offset: self.offset,
        };
        let before = self.rest.len();
        let record = self.step().map_err(|cause| {
            self.over = true;
            let position = self.current;
            ReadError { position, cause }
        })?;
        let read = before.saturating_sub(self.rest.len()) as u64;
        self.offset = self.offset.saturating_add(read);
        self.index = self.index.saturating_add(1);
        Ok(Some(record))
    }

    fn step(&mut self) -> Result<SliceRecord<'a>, ReadErrorCause> {
        let header = take_as::<WireRecordHeader>(&mut self.rest)?;
        let kind = self.decoder.kind(header);
        self.current.place = Place::Record {
            index: self.index,
            kind: Some(kind),
        };
        let length = self.decoder.admit(header)?;
        if kind == RecordKind::PAGE_DATA {
            return self.page_data(length);
        }
        let bytes = u64::from(length);
        let body = take(&mut self.rest, bytes.saturating_add(padding(bytes)))?;
        let Some((raw, pad)) = body.split_at_checked(length as usize) else {
            return Err(ReadErrorCause::Bug(
                "a record's body is shorter than its length",
            ));
        };
        let record = self.decoder.body(kind, raw, pad)?;
        self.over = kind == RecordKind::END;
        Ok(SliceRecord::Record(record))
    }

    fn page_data(&mut self, length: u32) -> Result<SliceRecord<'a>, ReadErrorCause> {
        // A truncated stream lacks the rest of the record, including padding.
        let whole = u64::from(length).saturating_add(padding(u64::from(length)));
        let rest = whole.saturating_sub(WirePageDataHead::BYTES as u64);
        let head = take_as::<WirePageDataHead>(&mut self.rest);
        let head = head.map_err(|cause| cause.truncated_before(rest))?;
        let bytes = head.entry_bytes(length, self.decoder.context())?;
        let rest = rest.saturating_sub(bytes);
        let raw = take(&mut self.rest, bytes).map_err(|cause| cause.truncated_before(rest))?;
        let wire = <[WirePageEntry]>::ref_from_bytes(raw)
            .map_err(|_| ReadErrorCause::Bug("page entries are not of eight bytes each"))?;
        let (entries, pages) = self.decoder.entries(wire, length)?;
        let raw = take(&mut self.rest, pages.saturating_mul(PAGE_SIZE as u64))?;
        let pages = <[Page]>::ref_from_bytes(raw)
            .map_err(|_| ReadErrorCause::Bug("page data are not whole pages"))?;
        Ok(SliceRecord::PageData(PageData { entries, pages }))
    }
}

impl<'a> Iterator for SliceReader<'a> {
    type Item = Result<SliceRecord<'a>, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}
