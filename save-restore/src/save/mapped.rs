//! Saving into the mapped layout: each page has a slot, which is overwritten if the page is sent
//! again.
//!
//! Everything except page data is small and kept in memory until the end. All threads write pages.
//! One thread decides where they go, in the order of the batches, so that a still save does not
//! depend on the number of threads.
//!
//! Specification: `docs/mapped.md`. C implementation: none.

mod parts;
mod places;

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

use xsr_format::error::WriteError;
use xsr_format::frame::{PAGE_SIZE, Page, PageEntry};
use xsr_format::layout::index::IndexEntry;
use xsr_format::layout::write::{Trailer, digest, is_zero, page_digest, record_head};
use xsr_format::wrapper::xl::XlHeader;

use crate::error::{GuestError, SaveError};
use crate::pipeline;
use crate::save::batch::Batch;
use crate::save::mapped::parts::Parts;
use crate::save::mapped::places::{NewRecord, Placed, Places, Record, Unplaceable};
use crate::storage::{StorageError, StorageWriter};

pub use self::parts::MappedSink;
pub(in crate::save) use self::parts::{Extent, Part};

/// How to write an image in the mapped layout.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct MappedOptions {
    /// Whether it contains the digest of each page, besides those of records: 16 bytes for each.
    pub page_digests: bool,
    /// Whether nothing of ours follows the image: neither the index nor the footer. The image is
    /// then not synced either.
    pub without_index: bool,
}

/// Statistics of the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MappedStats {
    /// Length of the image in bytes.
    pub image_bytes: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Number of pages.
    pub pages: u64,
    /// Of those, pages of zeros, which are holes.
    pub zero_pages: u64,
    /// Pages that were moved at the end to slots that had become free.
    pub moved_pages: u64,
    /// Whether the file has its index. It is missing if the options say so, and in an xl header that
    /// it outgrew: a live save of a guest that took much new memory.
    pub has_index: bool,
}

/// An image in the mapped layout that is being written.
///
/// The wrapper of the libxc stream is written to [`sink`](Self::sink), before and after the save.
/// [`finish`](Self::finish) completes the image, which no longer needs the guest.
#[derive(Debug)]
pub struct MappedImage<'w> {
    writer: &'w dyn StorageWriter,
    options: MappedOptions,
    parts: Mutex<Parts>,
    state: Mutex<State>,
    /// Buffers of batches that were written, for reuse.
    buffers: Mutex<Vec<Vec<u8>>>,
}

#[derive(Debug, Default)]
struct State {
    /// `None` until the first page comes.
    places: Option<Places>,
    /// One bit for each slot that is not a hole.
    written: Vec<u64>,
    /// The guest is suspended: a hole would make it wait for the disk.
    frozen: bool,
    /// Ranges of zeros that were written meanwhile, which become holes at the end.
    zeroed: Vec<Range<u64>>,
    /// Slots that were never written hold something else than zeros.
    stale: bool,
}

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

const UNBEGUN: &str = "a mapped image is finished before its pages came";

fn is_written(written: &[u64], slot: u32) -> bool {
    let word = written.get(slot as usize / 64);
    word.is_some_and(|word| word >> (slot % 64) & 1 == 1)
}

impl State {
    fn places(&mut self) -> Result<&mut Places, SaveError> {
        let bug = WriteError::Bug(UNBEGUN);
        self.places.as_mut().ok_or(SaveError::from(bug))
    }

    fn is_written(&self, slot: u32) -> bool {
        is_written(&self.written, slot)
    }

    fn set_written(&mut self, slot: u32, written: bool) {
        let at = slot as usize / 64;
        if self.written.len() <= at {
            self.written.resize(at + 1, 0);
        }
        match written {
            true => self.written[at] |= 1 << (slot % 64),
            false => self.written[at] &= !(1 << (slot % 64)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics ends the save; the data is not used after that.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: StorageError) -> SaveError {
    SaveError::from(match error {
        StorageError::Io { source, .. } => source,
        other => io::Error::other(other),
    })
}

fn unplaceable(error: Unplaceable) -> SaveError {
    match error {
        Unplaceable::TooLarge => GuestError::TooLargeForLayout.into(),
        Unplaceable::FrontMoved => GuestError::P2mOutgrewLayout.into(),
    }
}

impl<'w> MappedImage<'w> {
    /// An image in an empty file that supports slots.
    pub fn new(writer: &'w dyn StorageWriter, options: MappedOptions) -> Self {
        Self {
            writer,
            options,
            parts: Mutex::default(),
            state: Mutex::new(State {
                stale: !writer.is_blank(),
                ..State::default()
            }),
            buffers: Mutex::default(),
        }
    }

    /// Sets the number of blanks that were added to the configuration in the xl header.
    pub fn set_blanks(&self, blanks: u32) {
        lock(&self.parts).blanks = blanks;
    }

    /// Puts the index into the optional data of this xl header, because another program will append
    /// to the image. The header precedes what is written to the sink.
    pub fn set_header(&self, header: XlHeader) {
        lock(&self.parts).set_header(header);
    }

    /// The sink for everything except page data, from the first byte of the file.
    pub fn sink(&self) -> MappedSink<'_> {
        MappedSink { parts: &self.parts }
    }

    /// What is written to the sink from now on replaces this part.
    pub(super) fn begin(&self, part: Part) {
        lock(&self.parts).begin(part);
    }

    /// Syncs what has been written.
    pub(super) fn sync(&self) -> Result<(), SaveError> {
        self.writer.sync().map_err(failed)
    }

    /// The guest is suspended from now on, after passes while it ran.
    pub(super) fn freeze(&self) {
        lock(&self.state).frozen = true;
    }

    /// Memory begins.
    pub(super) fn begin_memory(&self, guest: &Extent) -> Result<(), SaveError> {
        let start = {
            let mut parts = lock(&self.parts);
            parts.reserve(guest, self.options.page_digests)?;
            parts.front()
        };
        if !start.is_multiple_of(8) {
            let why = "the stream does not begin at a multiple of 8, and there is no \
                       configuration to pad";
            return Err(io::Error::other(why).into());
        }
        lock(&self.state).places = Some(Places::new(start, guest.live));
        // A write that extends the file makes XFS allocate more after it, and others wait.
        let memory = guest.pages.saturating_mul(PAGE_SIZE as u64);
        let length = start.saturating_add(memory).saturating_add(memory / 512);
        self.writer.set_length(length).map_err(failed)
    }

    /// Decides where the pages of a batch go. Batches must come in order.
    pub(super) fn place(&self, batch: &Batch) -> Result<Placed, SaveError> {
        let mut state = lock(&self.state);
        let placed = state
            .places()?
            .place_batch(batch.entries(), batch.deferred());
        placed.map_err(unplaceable)
    }

    /// Writes the pages of a batch to their slots; zeros become holes.
    pub(super) fn write(&self, batch: &Batch, placed: Placed) -> Result<(), SaveError> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        batch.copy_pages(&mut buffer);
        let (pages, _) = buffer.as_chunks::<PAGE_SIZE>();
        let pages: Vec<(&Page, (u32, u64))> =
            pages.iter().zip(placed.slots.iter().copied()).collect();
        let mut done = 0;
        let follows = |a: &(&Page, (u32, u64)), b: &(&Page, (u32, u64))| {
            a.1.0 + 1 == b.1.0 && a.1.1 + PAGE_SIZE as u64 == b.1.1 && is_zero(a.0) == is_zero(b.0)
        };
        for run in pages.chunk_by(follows) {
            let bytes = &buffer[done * PAGE_SIZE..(done + run.len()) * PAGE_SIZE];
            done += run.len();
            let zero = run.first().is_some_and(|(page, _)| is_zero(page));
            let slots = run.iter().map(|(_, slot)| *slot);
            match zero {
                true => self.write_zeros(slots)?,
                false => self.write_run(slots, bytes)?,
            }
        }
        if let Some(new) = placed.whole {
            self.write_whole(&new, batch.entries(), &buffer)?;
        }
        lock(&self.buffers).push(buffer);
        Ok(())
    }

    /// Writes the contents of neighbouring slots.
    fn write_run(
        &self,
        slots: impl Iterator<Item = (u32, u64)> + Clone,
        bytes: &[u8],
    ) -> Result<(), SaveError> {
        let Some((_, at)) = slots.clone().next() else {
            return Ok(());
        };
        self.writer.write_all_at(bytes, at).map_err(failed)?;
        let mut state = lock(&self.state);
        slots.for_each(|(slot, _)| state.set_written(slot, true));
        Ok(())
    }

    /// Makes holes of neighbouring slots.
    fn write_zeros(
        &self,
        slots: impl Iterator<Item = (u32, u64)> + Clone,
    ) -> Result<(), SaveError> {
        let (mut from, mut to) = (None, 0);
        let frozen;
        {
            let mut state = lock(&self.state);
            frozen = state.frozen;
            for (slot, at) in slots {
                if state.stale || state.is_written(slot) {
                    state.set_written(slot, false);
                    from.get_or_insert(at);
                    to = at + PAGE_SIZE as u64;
                }
            }
        }
        match from {
            None => Ok(()),
            // Everything in between is zeros, too.
            Some(from) if frozen => {
                self.write_zeros_to(from..to)?;
                let mut state = lock(&self.state);
                // A device has no holes.
                if !state.stale {
                    state.zeroed.push(from..to);
                }
                Ok(())
            }
            Some(from) => self.writer.punch(from..to).map_err(failed),
        }
    }

    fn write_zeros_to(&self, range: Range<u64>) -> Result<(), SaveError> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + ZEROS.len() as u64);
            let zeros = &ZEROS[..usize::try_from(end - at).unwrap_or(ZEROS.len())];
            self.writer.write_all_at(zeros, at).map_err(failed)?;
            at = end;
        }
        Ok(())
    }

    /// Writes the rest of a record whose pages have all been written.
    fn write_whole(
        &self,
        new: &NewRecord,
        entries: &[PageEntry],
        data: &[u8],
    ) -> Result<(), SaveError> {
        let head = record_head(new.pads, entries)?;
        self.writer
            .write_all_at(&head, new.offset)
            .map_err(failed)?;
        let (pages, _) = data.as_chunks::<PAGE_SIZE>();
        let digest = self.digest(&[&head, data]);
        let index = IndexEntry::of(new.offset, new.pads, entries, digest);
        let digests = self.page_digests(pages);
        let mut state = lock(&self.state);
        let record = &mut state.places()?.records[new.number];
        record.index = Some(index);
        record.page_digests = digests;
        Ok(())
    }

    /// The digest that the index shall have; zeros where there is no index.
    fn digest(&self, pieces: &[&[u8]]) -> [u8; 32] {
        match self.options.without_index {
            true => [0; 32],
            false => digest(pieces),
        }
    }

    fn page_digests(&self, pages: &[Page]) -> Vec<u8> {
        match self.options.page_digests {
            true => pages.iter().flat_map(page_digest).collect(),
            false => Vec::new(),
        }
    }

    /// Completes the file, once everything that belongs to the image has been written, and syncs
    /// all of it before the footer. Does not commit it. `go_on` is called between steps.
    ///
    /// # Errors
    ///
    /// The storage's; [`SaveError::Aborted`] if `go_on` says so.
    pub fn finish(
        self,
        threads: Option<std::num::NonZeroUsize>,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<MappedStats, SaveError> {
        let mut go_on = || super::go_on(go_on());
        let parts = std::mem::take(&mut *lock(&self.parts));
        let zeroed = {
            let mut state = lock(&self.state);
            state.frozen = false;
            std::mem::take(&mut state.zeroed)
        };
        for range in zeroed {
            self.writer.punch(range).map_err(failed)?;
            go_on()?;
        }
        let moved_pages = self.settle(parts.front(), &mut go_on)?;
        let memory_end = lock(&self.state).places()?.next();
        // The file ends with the last page, which may be a hole.
        self.writer.set_length(memory_end).map_err(failed)?;
        let (finals, in_order) = {
            let mut state = lock(&self.state);
            state.places()?.finals().map_err(unplaceable)?
        };
        let threads = pipeline::threads(threads);
        let pool = pipeline::pool(threads, pipeline::IN_FLIGHT);
        pipeline::ordered(
            pool.as_ref(),
            finals,
            |record| self.write_final(record.number, record.pads, &record.entries),
            |()| go_on(),
        )?;
        let mut state = std::mem::take(&mut *lock(&self.state));
        let State {
            places, written, ..
        } = &mut state;
        let places = places.as_mut().ok_or(WriteError::Bug(UNBEGUN))?;
        // Slots that no longer exist may still be marked.
        let slots = places.records.iter().flat_map(Record::slots);
        let written = slots.filter(|slot| is_written(written, *slot)).count() as u64;
        let mut index = Vec::with_capacity(places.records.len());
        let mut digests = Vec::new();
        for record in &mut places.records {
            let bug = WriteError::Bug("a record of a mapped image was not written");
            index.push(record.index.ok_or(SaveError::from(bug))?);
            digests.append(&mut record.page_digests);
        }
        let memory_end = places.next();
        let (front, tail) = (parts.front_bytes(), &parts.tail);
        let write = |bytes: &[u8], at| self.writer.write_all_at(bytes, at).map_err(failed);
        write(&front, 0)?;
        write(tail, memory_end)?;
        let image_end = memory_end + tail.len() as u64;
        let (before, after) = parts.around_room(&front);
        let trailer = Trailer {
            room: parts.room,
            blanks: parts.blanks,
            image_end,
            moved: !in_order,
            index: &index,
            page_digests: self.options.page_digests.then_some(&*digests),
            rest_digest: self.digest(&[before, after, tail]),
        };
        go_on()?;
        let has_index = !self.options.without_index && trailer.fits();
        if has_index {
            if trailer.room.is_none() {
                let magic = xsr_format::layout::TRAILER_MAGIC;
                write(&magic, image_end)?;
                if state.stale {
                    self.write_zeros_to(image_end + magic.len() as u64..trailer.offset())?;
                }
            }
            write(&digests, trailer.offset())?;
            let encoded = trailer.encode_index();
            write(&encoded, trailer.index_offset())?;
            self.writer.sync().map_err(failed)?;
            go_on()?;
            write(&trailer.encode_footer(&encoded), trailer.footer_offset())?;
        }
        let pages: u64 = index.iter().map(|entry| u64::from(entry.pages)).sum();
        Ok(MappedStats {
            image_bytes: image_end,
            file_bytes: match self.options.without_index {
                true => image_end,
                false => trailer.length(),
            },
            pages,
            zero_pages: pages - written,
            moved_pages,
            has_index,
        })
    }

    /// Moves the pages that have to move; returns their number.
    fn settle(
        &self,
        front: u64,
        go_on: &mut dyn FnMut() -> Result<(), SaveError>,
    ) -> Result<u64, SaveError> {
        let moves = {
            let mut state = lock(&self.state);
            state.places()?.settle(front).map_err(unplaceable)?
        };
        let mut page = [0; PAGE_SIZE];
        for step in &moves {
            let has_data = lock(&self.state).is_written(step.from.0);
            match has_data {
                true => {
                    let read = self.writer.read_exact_at(&mut page, step.from.1);
                    read.map_err(failed)?;
                    self.write_run([step.to].into_iter(), &page)?;
                }
                false => self.write_zeros([step.to].into_iter())?,
            }
            // That slot no longer exists.
            lock(&self.state).set_written(step.from.0, false);
            go_on()?;
        }
        Ok(moves.len() as u64)
    }

    /// Writes the head of a record whose pages are in the file, and computes its digests.
    fn write_final(
        &self,
        number: usize,
        pads: u64,
        entries: &[PageEntry],
    ) -> Result<(), SaveError> {
        let head = record_head(pads, entries)?;
        let (offset, data, pages) = {
            let mut state = lock(&self.state);
            let record = &state.places()?.records[number];
            (record.offset, record.data(), record.pages())
        };
        self.writer.write_all_at(&head, offset).map_err(failed)?;
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        // Without an index, nothing needs their digest.
        let pages = if self.options.without_index { 0 } else { pages };
        buffer.resize(pages as usize * PAGE_SIZE, 0);
        if pages > 0 {
            self.writer
                .read_exact_at(&mut buffer, data)
                .map_err(failed)?;
        }
        let digest = self.digest(&[&head, &buffer]);
        let index = IndexEntry::of(offset, pads, entries, digest);
        let digests = self.page_digests(buffer.as_chunks().0);
        lock(&self.buffers).push(buffer);
        let mut state = lock(&self.state);
        let record = &mut state.places()?.records[number];
        record.index = Some(index);
        record.page_digests = digests;
        Ok(())
    }
}
