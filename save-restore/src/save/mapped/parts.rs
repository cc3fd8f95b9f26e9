//! Everything of a mapped image except page data, kept in memory until the image is finished.

use std::io::{self, Write};
use std::sync::Mutex;

use xsr_format::layout::Room;
use xsr_format::layout::index::{Footer, IndexEntry, PAGE_DIGEST_BYTES};
use xsr_format::record::MAX_BATCH;
use xsr_format::wrapper::xl::XlHeader;
use xsr_xen_backend::Gather;

use super::lock;
use crate::error::SaveError;
use crate::sink::PageSink;

/// Everything except page data.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// The xl header, if the index goes into it; it has its room once memory begins.
    xl: Option<XlHeader>,
    /// That room.
    pub(super) room: Option<Room>,
    /// The beginning of what precedes memory, which never changes.
    head: Vec<u8>,
    /// The rest of what precedes memory, which is written anew when the guest moves its tables.
    start: Vec<u8>,
    /// What follows memory.
    pub(super) tail: Vec<u8>,
    current: Part,
    /// The number of blanks that were added to the configuration.
    pub(super) blanks: u32,
}

/// How much memory a guest has.
#[derive(Clone, Copy, Debug)]
pub(in crate::save) struct Extent {
    /// Whether it runs while it is saved, so that pages may come again.
    pub(in crate::save) live: bool,
    /// Its pages now.
    pub(in crate::save) pages: u64,
    /// The most pages that it can have before the save is over.
    pub(in crate::save) most_pages: u64,
    /// Its possible pfns.
    pub(in crate::save) pfns: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::save) enum Part {
    #[default]
    Head,
    Start,
    Tail,
}

impl Parts {
    /// Selects a part, and empties it.
    pub(super) fn begin(&mut self, part: Part) {
        self.current = part;
        self.bytes().clear();
    }

    fn bytes(&mut self) -> &mut Vec<u8> {
        match self.current {
            Part::Head => &mut self.head,
            Part::Start => &mut self.start,
            Part::Tail => &mut self.tail,
        }
    }

    /// Puts the index into this header.
    pub(super) fn set_header(&mut self, header: XlHeader) {
        self.xl = Some(header);
    }

    /// Makes room for the index of a guest in the xl header, if it goes there.
    pub(super) fn reserve(&mut self, guest: &Extent, page_digests: bool) -> Result<(), SaveError> {
        let Some(header) = &self.xl else {
            return Ok(());
        };
        let batches = |pages: u64| pages.div_ceil(MAX_BATCH as u64);
        let mut records = batches(guest.pfns);
        if guest.live {
            // Pages that had no data before, and pfns that have lost theirs, get more records.
            let more = batches(guest.most_pages).saturating_mul(2);
            records = records.saturating_add(more).saturating_add(256);
        }
        let mut bytes = records.saturating_mul(IndexEntry::BYTES as u64);
        if page_digests {
            let pages = guest.most_pages.min(guest.pfns);
            bytes = bytes.saturating_add(pages.saturating_mul(PAGE_DIGEST_BYTES as u64));
        }
        bytes = bytes.saturating_add(Footer::BYTES as u64);
        let refused = |why: String| {
            let remedy = match page_digests {
                true => "leave out the page digests",
                false => "save it with the layout stream",
            };
            io::Error::other(format!(
                "the index of the mapped image does not fit into the xl header ({why}): {remedy}"
            ))
        };
        let made = header.with_room(bytes);
        let made = made.map_err(|error| refused(error.to_string()))?;
        let (header, room) = made.ok_or_else(|| refused("it has no configuration".to_owned()))?;
        self.xl = Some(header);
        self.room = Some(room);
        Ok(())
    }

    /// Where memory begins.
    pub(super) fn front(&self) -> u64 {
        let xl = self.xl.as_ref().map_or(0, XlHeader::bytes);
        xl + (self.head.len() + self.start.len()) as u64
    }

    /// What precedes memory; the room for the index is zeros.
    pub(super) fn front_bytes(&self) -> Vec<u8> {
        let xl = self.xl.as_ref().map(XlHeader::encode);
        [xl.as_deref().unwrap_or_default(), &self.head, &self.start].concat()
    }

    /// Divides what precedes memory into what comes before the room for the index and what comes
    /// after it.
    pub(super) fn around_room<'f>(&self, front: &'f [u8]) -> (&'f [u8], &'f [u8]) {
        let Some(room) = self.room else {
            return (front, &[]);
        };
        let at = |offset: u64| {
            usize::try_from(offset)
                .unwrap_or(front.len())
                .min(front.len())
        };
        (&front[..at(room.from)], &front[at(room.to)..])
    }
}

/// The sink of a [`MappedImage`](super::MappedImage) for everything except page data.
#[derive(Debug)]
pub struct MappedSink<'i> {
    pub(super) parts: &'i Mutex<Parts>,
}

impl Write for MappedSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(self.parts).bytes().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl PageSink for MappedSink<'_> {
    fn write_gather(&mut self, list: &Gather<'_>) -> io::Result<()> {
        list.copy_to(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_room_holds_the_index_of_the_guest_and_has_a_limit() {
        let extent = |gib: u64, live| Extent {
            live,
            pages: gib << 18,
            most_pages: gib << 18,
            pfns: (gib << 18) + 1,
        };
        let reserve = |extent: &Extent, page_digests| {
            let mut parts = Parts::default();
            parts.set_header(XlHeader::new("{}").unwrap());
            parts.reserve(extent, page_digests)?;
            assert_eq!(parts.front(), parts.room.unwrap().to);
            Ok::<_, SaveError>(parts.room.unwrap())
        };
        let still = reserve(&extent(1, false), false).unwrap();
        assert_eq!((still.from, still.to), (56, 56 + 257 * 80 + 160));
        let live = reserve(&extent(1, true), false).unwrap();
        assert!(live.to - live.from > 3 * 256 * 80);
        let digests = reserve(&extent(1, false), true).unwrap();
        assert_eq!(digests.to - still.to, 16 << 18);
        // The header has at most 16 MiB of optional data.
        reserve(&extent(256, true), false).unwrap();
        for (extent, digests, remedy) in [
            (extent(4, false), true, "leave out the page digests"),
            (extent(1024, false), false, "layout stream"),
        ] {
            let error = reserve(&extent, digests).unwrap_err();
            let words = crate::text::chain(&error);
            assert!(words.contains(remedy), "{words}");
        }
    }
}
