//! Placement of pages in a mapped image that is being written: records and slots, and how they
//! change when a page comes again or disappears.
//!
//! Specification: `docs/mapped.md`, "A live save".

use std::collections::BTreeSet;

use xsr_format::frame::{PAGE_SIZE, PageEntry, PageType, Pfn};
use xsr_format::layout::index::IndexEntry;
use xsr_format::layout::{MAX_RECORDS, data_offset, pads};
use xsr_format::record::MAX_BATCH;

/// Marks a pfn without a slot, and a slot without a pfn.
const NONE: u32 = u32::MAX;

const PAGE: u64 = PAGE_SIZE as u64;

/// Why something cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unplaceable {
    /// More pages or records than an index has room for.
    TooLarge,
    /// The part before memory has changed its length, and the first record cannot compensate for
    /// that.
    FrontMoved,
}

/// A PAGE_DATA record.
#[derive(Debug)]
pub(super) struct Record {
    /// Where it begins.
    pub(super) offset: u64,
    /// The number of entries, pads included.
    entries: u32,
    /// The most real entries that it can have.
    real: u32,
    /// The pfns that it was created for, ascending without a gap; empty if it was created for pages
    /// that came later.
    home: std::ops::Range<u32>,
    /// Its first slot, and the number of its slots.
    first_slot: u32,
    slots: u32,
    /// Slots at its beginning that were given up for the part before memory.
    dead: u32,
    /// Its entry in the index; `None` if the file does not hold its final form yet.
    pub(super) index: Option<IndexEntry>,
    /// The digests of its pages, if they are requested.
    pub(super) page_digests: Vec<u8>,
}

impl Record {
    /// The position of its first slot, given up or not.
    fn base(&self) -> u64 {
        // Slots that are given up become part of the head, so that the other slots keep their
        // places.
        let head = data_offset(self.offset, u64::from(self.entries));
        head - u64::from(self.dead) * PAGE
    }

    /// Where the data begins.
    pub(super) fn data(&self) -> u64 {
        data_offset(self.offset, u64::from(self.entries))
    }

    /// The number of its pages.
    pub(super) fn pages(&self) -> u32 {
        self.slots - self.dead
    }

    /// Its slots that exist.
    pub(super) fn slots(&self) -> std::ops::Range<u32> {
        self.first_slot + self.dead..self.first_slot + self.slots
    }

    fn end(&self) -> u64 {
        self.data() + u64::from(self.pages()) * PAGE
    }
}

/// The final form of a record.
#[derive(Debug)]
pub(super) struct Final {
    /// Its number.
    pub(super) number: usize,
    /// Number of pads.
    pub(super) pads: u64,
    /// The entries after them.
    pub(super) entries: Vec<PageEntry>,
}

/// A record that begins with a batch.
#[derive(Debug)]
pub(super) struct NewRecord {
    pub(super) number: usize,
    pub(super) offset: u64,
    pub(super) pads: u64,
}

/// Where the pages of a batch go.
#[derive(Debug, Default)]
pub(in crate::save) struct Placed {
    /// The slot of each page with contents, in the order of the entries, and its place in the file.
    pub(super) slots: Vec<(u32, u64)>,
    /// The record that consists of exactly this batch; `None` if the batch goes into slots that
    /// other batches share.
    pub(super) whole: Option<NewRecord>,
}

/// A page that moves from one slot to another: the slots, and their places in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) from: (u32, u64),
    pub(super) to: (u32, u64),
}

/// The places of all records and slots.
#[derive(Debug)]
pub(super) struct Places {
    /// Where memory begins; where the next record begins.
    start: u64,
    next: u64,
    pub(super) records: Vec<Record>,
    /// The number of slots so far.
    slots: u32,
    /// Pages may come again, so that the tables below are kept.
    live: bool,
    /// For each pfn: its slot, its type.
    slot_of: Vec<u32>,
    types: Vec<PageType>,
    /// For each slot: its pfn.
    pfn_of: Vec<u32>,
    free: BTreeSet<u32>,
    /// The records that were created for a range of pfns, in ascending order of the ranges.
    homes: Vec<usize>,
}

impl Places {
    /// The places of an image whose memory begins at `start`, a multiple of 8. If it is not `live`,
    /// each page comes once.
    pub(super) fn new(start: u64, live: bool) -> Self {
        Self {
            start,
            next: start,
            records: Vec::new(),
            slots: 0,
            live,
            slot_of: Vec::new(),
            types: Vec::new(),
            pfn_of: Vec::new(),
            free: BTreeSet::new(),
            homes: Vec::new(),
        }
    }

    /// Where the next record begins.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The position of a slot in the file.
    fn place(&self, slot: u32) -> u64 {
        let record = &self.records[self.record_of(slot)];
        record.base() + u64::from(slot - record.first_slot) * PAGE
    }

    /// The number of the record that contains this slot.
    fn record_of(&self, slot: u32) -> usize {
        // Records without slots have the number of the next slot.
        let after = self
            .records
            .partition_point(|record| record.first_slot <= slot);
        let before = self.records[..after].iter();
        let with_slots = before.rev().position(|record| record.slots > 0);
        after - 1 - with_slots.expect("a slot is in a record")
    }

    /// The record that was created for this pfn, if there is one, must be written again.
    fn touch_home(&mut self, pfn: u32) {
        let starts_before = |number: &usize| self.records[*number].home.start <= pfn;
        let after = self.homes.partition_point(starts_before);
        if let Some(home) = after.checked_sub(1).map(|at| self.homes[at])
            && self.records[home].home.contains(&pfn)
        {
            self.touch(home);
        }
    }

    fn touch(&mut self, number: usize) {
        let record = &mut self.records[number];
        record.index = None;
        record.page_digests.clear();
    }

    fn add(
        &mut self,
        home: std::ops::Range<u32>,
        real: usize,
        slots: usize,
    ) -> Result<usize, Unplaceable> {
        let narrow = |n: u64| u32::try_from(n).map_err(|_| Unplaceable::TooLarge);
        if self.records.len() as u64 >= MAX_RECORDS {
            return Err(Unplaceable::TooLarge);
        }
        let after = self.slots.checked_add(narrow(slots as u64)?);
        // The largest number is reserved for [`NONE`].
        let after = after.filter(|after| *after < NONE);
        let pads = match slots {
            0 => 0,
            _ => pads(self.next, real as u64),
        };
        let record = Record {
            offset: self.next,
            entries: narrow(real as u64 + pads)?,
            real: narrow(real as u64)?,
            home,
            first_slot: self.slots,
            slots: narrow(slots as u64)?,
            dead: 0,
            index: None,
            page_digests: Vec::new(),
        };
        self.next = record.end();
        self.slots = after.ok_or(Unplaceable::TooLarge)?;
        if self.live {
            self.pfn_of.resize(self.slots as usize, NONE);
        }
        if !record.home.is_empty() {
            self.homes.push(self.records.len());
        }
        self.records.push(record);
        Ok(self.records.len() - 1)
    }

    /// Assigns places to the pages of a batch. `awaited` are those of its pfns that cannot be sent
    /// now, and whether each will most likely have a page later.
    pub(super) fn place_batch(
        &mut self,
        entries: &[PageEntry],
        awaited: &[(Pfn, bool)],
    ) -> Result<Placed, Unplaceable> {
        let pfns: Result<Vec<u32>, _> = entries.iter().map(|e| narrow(e.pfn)).collect();
        let pfns = pfns?;
        let named = u32::try_from(self.slot_of.len()).unwrap_or(NONE);
        let Some(&first) = pfns.first() else {
            return Ok(Placed::default());
        };
        let in_order = pfns
            .iter()
            .zip(first..)
            .all(|(pfn, expected)| *pfn == expected);
        match !self.live || in_order && first == named {
            true => self.place_new(entries, &pfns, awaited),
            false => self.place_again(entries, &pfns, awaited),
        }
    }

    /// A batch of pfns that directly follow all earlier ones.
    fn place_new(
        &mut self,
        entries: &[PageEntry],
        pfns: &[u32],
        awaited: &[(Pfn, bool)],
    ) -> Result<Placed, Unplaceable> {
        let reserved = |pfn: Pfn| awaited.contains(&(pfn, true));
        let mut has_slot = entries.iter().map(|e| e.page_type.has_data());
        let data = has_slot.by_ref().filter(|has| *has).count();
        let kept = awaited.iter().filter(|(_, has_page)| *has_page).count();
        let slot = self.slots;
        let home = match (pfns.first(), pfns.last()) {
            (Some(first), Some(last)) if self.live => *first..*last + 1,
            _ => 0..0,
        };
        let number = self.add(home, entries.len(), data + kept)?;
        let (offset, base) = (self.records[number].offset, self.records[number].base());
        let mut placed = Placed {
            slots: Vec::with_capacity(data),
            // A record that waits for pages is written at the end.
            whole: (kept == 0).then(|| NewRecord {
                number,
                offset,
                pads: u64::from(self.records[number].entries) - entries.len() as u64,
            }),
        };
        let mut next = slot;
        for (entry, pfn) in entries.iter().zip(pfns) {
            let own = match entry.page_type.has_data() {
                true => {
                    placed
                        .slots
                        .push((next, base + u64::from(next - slot) * PAGE));
                    Some(next)
                }
                false if reserved(entry.pfn) => Some(next),
                false => None,
            };
            next += u32::from(own.is_some());
            if self.live {
                self.slot_of.push(own.unwrap_or(NONE));
                self.types.push(entry.page_type);
                if let Some(own) = own {
                    self.pfn_of[own as usize] = *pfn;
                }
            }
        }
        Ok(placed)
    }

    /// A batch in which some pfns have come before.
    fn place_again(
        &mut self,
        entries: &[PageEntry],
        pfns: &[u32],
        awaited: &[(Pfn, bool)],
    ) -> Result<Placed, Unplaceable> {
        let most = pfns.iter().max().map_or(0, |pfn| *pfn as usize + 1);
        if most > self.slot_of.len() {
            self.slot_of.resize(most, NONE);
            self.types.resize(most, PageType::XTAB);
        }
        let comes_later = |pfn: Pfn| awaited.iter().any(|(later, _)| *later == pfn);
        let mut fresh = Vec::new();
        for (entry, &pfn) in entries.iter().zip(pfns) {
            // Sent once the guest is suspended: its slot is kept until then.
            if comes_later(entry.pfn) {
                continue;
            }
            let at = pfn as usize;
            let had = self.slot_of[at];
            if self.types[at] != entry.page_type {
                self.types[at] = entry.page_type;
                self.touch_home(pfn);
            }
            match (entry.page_type.has_data(), had) {
                (true, NONE) => match self.free.pop_first() {
                    Some(slot) => self.give(slot, pfn),
                    None => fresh.push(pfn),
                },
                (true, slot) => self.touch(self.record_of(slot)),
                (false, NONE) => {}
                (false, slot) => {
                    self.touch(self.record_of(slot));
                    self.slot_of[at] = NONE;
                    self.pfn_of[slot as usize] = NONE;
                    self.free.insert(slot);
                }
            }
        }
        self.append(&fresh)?;
        let with_data = entries
            .iter()
            .zip(pfns)
            .filter(|(e, _)| e.page_type.has_data());
        let slots = with_data.map(|(_, pfn)| {
            let slot = self.slot_of[*pfn as usize];
            (slot, self.place(slot))
        });
        Ok(Placed {
            slots: slots.collect(),
            whole: None,
        })
    }

    /// Assigns a free slot to `pfn`.
    fn give(&mut self, slot: u32, pfn: u32) {
        self.slot_of[pfn as usize] = slot;
        self.pfn_of[slot as usize] = pfn;
        self.touch(self.record_of(slot));
    }

    /// Appends a record with a slot for each of these pfns.
    fn append(&mut self, pfns: &[u32]) -> Result<(), Unplaceable> {
        for pfns in pfns.chunks(MAX_BATCH) {
            let slot = self.slots;
            self.add(0..0, pfns.len(), pfns.len())?;
            for (slot, pfn) in (slot..).zip(pfns) {
                self.give(slot, *pfn);
            }
        }
        Ok(())
    }

    /// All pages have come. The part before memory ends at `front`: the first record makes room for
    /// it. Pages at the end move to free slots; the file ends with the last remaining page, and
    /// everything else follows it. Returns the pages that move, in this order;
    /// [`finals`](Self::finals) returns what to write then.
    pub(super) fn settle(&mut self, front: u64) -> Result<Vec<Move>, Unplaceable> {
        let mut moves = Vec::new();
        if !self.live {
            return match front == self.start {
                true => Ok(moves),
                false => Err(Unplaceable::FrontMoved),
            };
        }
        if front != self.start && !self.records.is_empty() {
            self.make_room(front, &mut moves)?;
        }
        self.start = front;
        // The last page moves to the first free slot.
        while let Some(last) = self.slots.checked_sub(1) {
            let number = self.record_of(last);
            let record = &self.records[number];
            if last - record.first_slot < record.dead {
                break;
            }
            if !self.free.remove(&last) {
                let Some(to) = self.free.pop_first() else {
                    break;
                };
                moves.push(self.shift(last, to));
            }
            self.slots = last;
            self.pfn_of.truncate(last as usize);
            self.touch(number);
            self.records[number].slots -= 1;
        }
        let is_last = |record: &Record| record.pages() > 0;
        let kept = self
            .records
            .iter()
            .rposition(is_last)
            .map_or(0, |at| at + 1);
        self.records.truncate(kept);
        self.next = self.records.last().map_or(front, Record::end);
        Ok(moves)
    }

    /// The page in slot `from` moves to `to`, which is free.
    fn shift(&mut self, from: u32, to: u32) -> Move {
        let pfn = self.pfn_of[from as usize];
        self.pfn_of[from as usize] = NONE;
        self.give(to, pfn);
        Move {
            from: (from, self.place(from)),
            to: (to, self.place(to)),
        }
    }

    /// The first record begins at `front` from now on: it gets fewer pads, or gives up slots.
    fn make_room(&mut self, front: u64, moves: &mut Vec<Move>) -> Result<(), Unplaceable> {
        let record = &self.records[0];
        let base = record.base();
        if front < self.start {
            return Err(Unplaceable::FrontMoved);
        }
        let mut dead = 0;
        // `room` entries fit before the data; at least `left` are needed.
        let entries = loop {
            let left = record.slots.checked_sub(dead).filter(|left| *left > 0);
            let left = left.ok_or(Unplaceable::FrontMoved)?;
            let head = (base + u64::from(dead) * PAGE).checked_sub(front + 16);
            match head.map(|head| head / 8) {
                Some(room) if room >= u64::from(left) => break room,
                _ => dead += 1,
            }
        };
        let first = record.first_slot;
        let given_up: Vec<u32> = (first..first + dead).collect();
        self.free.retain(|slot| !given_up.contains(slot));
        for from in given_up {
            if self.pfn_of[from as usize] == NONE {
                continue;
            }
            let to = match self.free.pop_first() {
                Some(to) => to,
                None => {
                    let to = self.slots;
                    self.add(0..0, 1, 1)?;
                    to
                }
            };
            moves.push(self.shift(from, to));
        }
        self.touch(0);
        let record = &mut self.records[0];
        record.offset = front;
        record.entries = u32::try_from(entries).map_err(|_| Unplaceable::TooLarge)?;
        record.real = record.real.min(record.entries);
        record.dead = dead;
        Ok(())
    }

    /// After [`settle`](Self::settle): the records whose final form the file does not hold yet,
    /// including those for pfns that no other record names, which are added here. Also returns
    /// whether a still save would have its records in the same order.
    pub(super) fn finals(&mut self) -> Result<(Vec<Final>, bool), Unplaceable> {
        if !self.live {
            return Ok((Vec::new(), true));
        }
        let mut named = vec![false; self.slot_of.len()];
        let mut finals = Vec::new();
        let mut order = Order::default();
        for number in 0..self.records.len() {
            let entries = self.entries(number);
            for entry in &entries {
                // Each pfn once, except the one that fills a record without pfns of its own.
                if let Ok(pfn) = usize::try_from(entry.pfn.0)
                    && self.is_so(*entry)
                {
                    named[pfn] = true;
                }
            }
            order.comes(&entries);
            let record = &self.records[number];
            if record.index.is_none() {
                finals.push(Final {
                    number,
                    pads: u64::from(record.entries) - entries.len() as u64,
                    entries,
                });
            }
        }
        let absent = (0..named.len()).filter(|pfn| !named[*pfn]);
        let absent: Vec<PageEntry> = absent.map(|pfn| self.entry(pfn)).collect();
        let group = |entry: &PageEntry| entry.pfn.0 / MAX_BATCH as u64;
        for entries in absent.chunk_by(|a, b| group(a) == group(b)) {
            let number = self.add(0..0, entries.len(), 0)?;
            order.comes(entries);
            finals.push(Final {
                number,
                pads: 0,
                entries: entries.to_vec(),
            });
        }
        Ok((finals, order.is_still(named.len() as u64)))
    }

    fn entry(&self, pfn: usize) -> PageEntry {
        PageEntry {
            pfn: Pfn(pfn as u64),
            page_type: self.types[pfn],
        }
    }

    /// Whether this is the final type of the pfn.
    fn is_so(&self, entry: PageEntry) -> bool {
        let at = usize::try_from(entry.pfn.0).unwrap_or(usize::MAX);
        self.types.get(at) == Some(&entry.page_type)
    }

    /// The real entries of a record in its final form.
    fn entries(&self, number: usize) -> Vec<PageEntry> {
        let record = &self.records[number];
        let data: Vec<u32> = record
            .slots()
            .map(|slot| self.pfn_of[slot as usize])
            .collect();
        let absent = record.home.clone();
        let absent: Vec<u32> = absent
            .filter(|pfn| self.slot_of[*pfn as usize] == NONE)
            .collect();
        let at_home = data.is_sorted() && data.iter().all(|pfn| record.home.contains(pfn));
        let most = record.real as usize;
        let mut pfns = absent;
        pfns.truncate(most - data.len());
        pfns.extend(data);
        if at_home {
            pfns.sort_unstable();
        }
        if pfns.is_empty() {
            // Its pfns have pages elsewhere. It is filled with an entry that a later record
            // overrides.
            let pfn = self.pfn_of.last().map_or(0, |pfn| u64::from(*pfn));
            let page_type = PageType::XTAB;
            return vec![PageEntry {
                pfn: Pfn(pfn),
                page_type,
            }];
        }
        pfns.into_iter()
            .map(|pfn| self.entry(pfn as usize))
            .collect()
    }
}

fn narrow(pfn: Pfn) -> Result<u32, Unplaceable> {
    let narrow = u32::try_from(pfn.0).ok().filter(|pfn| *pfn < NONE);
    narrow.ok_or(Unplaceable::TooLarge)
}

/// Whether the records are those of a still save: pfns ascend from 0 without a gap, in batches of
/// 1024.
#[derive(Debug, Default)]
struct Order {
    pfns: u64,
    /// A smaller batch has come, which must be the last one.
    ended: bool,
    broken: bool,
}

impl Order {
    fn comes(&mut self, entries: &[PageEntry]) {
        let in_order = entries
            .iter()
            .zip(self.pfns..)
            .all(|(e, pfn)| e.pfn.0 == pfn);
        self.broken |= self.ended || !in_order;
        self.pfns += entries.len() as u64;
        self.ended = entries.len() < MAX_BATCH;
    }

    fn is_still(&self, pfns: u64) -> bool {
        !self.broken && self.pfns == pfns
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn batch(first: u64, count: u64) -> Vec<PageEntry> {
        let page = |pfn| PageEntry {
            pfn: Pfn(pfn),
            page_type: PageType::NOTAB,
        };
        (first..first + count).map(page).collect()
    }

    /// What stands before memory grows: the first record has fewer pads, then gives up slots, and
    /// no page is lost or named twice.
    #[test]
    fn the_first_record_makes_room() {
        const START: u64 = 2224;
        for growth in [0, 8, 1856, 1864, 4096, 10_000, 40_000] {
            let mut places = Places::new(START, true);
            for first in [0, 1024, 2048] {
                places.place_batch(&batch(first, 1024), &[]).unwrap();
            }
            // Its pages stay where they are, unless their slots are given up.
            let base = places.place(0);
            let front = START + growth;
            let moves = places.settle(front).unwrap();
            let (finals, in_order) = places.finals().unwrap();
            assert_eq!(places.records[0].offset, front);
            assert_eq!(in_order, moves.is_empty(), "{growth}");
            assert_eq!(moves.is_empty(), growth <= 1856, "{growth}");
            assert!(places.records[0].data().is_multiple_of(PAGE));
            assert!(places.records[0].data() >= base);
            let mut named = vec![0; 3072];
            let mut before = front;
            for (number, record) in places.records.iter().enumerate() {
                assert!(
                    record.offset == before && record.entries <= 1535,
                    "{record:?}"
                );
                before = record.end();
                let entries = places.entries(number);
                assert!(entries.len() as u64 <= u64::from(record.entries));
                for entry in entries {
                    named[usize::try_from(entry.pfn.0).unwrap()] += 1;
                }
            }
            assert!(named.iter().all(|times| *times == 1), "{growth}");
            assert!(growth == 0 || finals.iter().any(|f| f.number == 0));
        }
        let mut places = Places::new(START, true);
        places.place_batch(&batch(0, 4), &[]).unwrap();
        assert_eq!(places.settle(START - 8), Err(Unplaceable::FrontMoved));
        assert_eq!(
            places.settle(START + (1 << 20)),
            Err(Unplaceable::FrontMoved)
        );
    }
}
