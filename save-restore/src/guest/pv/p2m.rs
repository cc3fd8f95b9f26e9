//! The p2m of a PV guest: found and mapped on save, built and written back on
//! restore.
//!
//! A guest publishes it in shared_info, as a list that is linear in its address
//! space (`p2m_cr3`, `p2m_vaddr`) or as a tree of three levels
//! (`pfn_to_mfn_frame_list_list`).
//!
//! C implementation: `xg_sr_save_x86_pv.c:map_p2m_leaves`;
//! `xg_sr_restore_x86_pv.c:expand_p2m`, `update_guest_p2m`.

mod find;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use xsr_format::frame::{Gfn, Mfn, PAGE_SIZE, Page, PageType, Pfn};
use xsr_format::record::pv::PvInfo;
use xsr_xen_backend::{Access, Domain, ForeignPages, M2p};

use self::find::Place;
use crate::bitmap::PfnBitmap;
use crate::error::{GuestError, RestoreError, SaveError};
use crate::guest::GoOn;

/// Entries of the p2m in one frame: 512 or 1024.
pub(crate) const fn entries_per_frame(info: PvInfo) -> u64 {
    PAGE_SIZE as u64 / info.width() as u64
}

/// Frames that are mapped and queried at once.
const BATCH: usize = 1024;

/// Frames of a guest's tables, mapped a batch at a time and read as one contiguous table. The guest
/// decides how many there are: up to eight million.
#[derive(Debug)]
struct Tables(Vec<ForeignPages>);

impl Tables {
    /// Maps frames; `go_on` is called before each batch.
    fn map(domain: &dyn Domain, mfns: &[u64], go_on: &mut GoOn<'_>) -> Result<Self, SaveError> {
        let mut tables = Vec::with_capacity(mfns.len().div_ceil(BATCH));
        for mfns in mfns.chunks(BATCH) {
            go_on()?;
            let gfns: Vec<Gfn> = mfns.iter().copied().map(Gfn).collect();
            tables.push(domain.map(&gfns, Access::Read)?.all_mapped()?);
        }
        Ok(Self(tables))
    }

    /// The 64-bit word at `index`.
    fn read_u64(&self, index: usize) -> Option<u64> {
        const WORDS: usize = BATCH * PAGE_SIZE / 8;
        self.0.get(index / WORDS)?.read_u64(index % WORDS)
    }
}

/// Calls `of` for each, in order; `go_on` is called before each batch.
fn each<T>(
    items: impl Iterator<Item = T>,
    go_on: &mut GoOn<'_>,
    mut of: impl FnMut(T) -> Result<u64, SaveError>,
) -> Result<Vec<u64>, SaveError> {
    let mut all = Vec::with_capacity(items.size_hint().0);
    for item in items {
        if all.len().is_multiple_of(BATCH) {
            go_on()?;
        }
        all.push(of(item)?);
    }
    Ok(all)
}

/// Word `index` (of the guest's width) from the first of some pages on.
fn word(pages: &Tables, info: PvInfo, index: u64) -> Option<u64> {
    match info {
        PvInfo::Bits64 => pages.read_u64(usize::try_from(index).ok()?),
        PvInfo::Bits32 => {
            let pair = pages.read_u64(usize::try_from(index / 2).ok()?)?;
            let value = (pair >> (index % 2 * 32)) & 0xffff_ffff;
            // A 32-bit guest's "no frame" is widened.
            Some(if value == 0xffff_ffff {
                u64::MAX
            } else {
                value
            })
        }
    }
}

fn bad(what: &'static str, value: u64) -> SaveError {
    GuestError::P2m { what, value }.into()
}

/// The p2m of a guest that is being saved, mapped.
#[derive(Debug)]
pub(crate) struct P2m {
    leaves: Tables,
    place: Place,
    /// pfns of the leaves, in order.
    pub(crate) frames: Vec<Pfn>,
    info: PvInfo,
}

impl P2m {
    /// Finds and maps the p2m that `shared` (the shared_info page) describes. `go_on` is called
    /// after each batch.
    pub(crate) fn find(
        domain: &dyn Domain,
        m2p: &M2p,
        info: PvInfo,
        shared: &Page,
        go_on: &mut GoOn<'_>,
    ) -> Result<Self, SaveError> {
        let place = Place::find(domain, m2p, info, shared, go_on)?;
        Self::map(domain, m2p, info, place, go_on)
    }

    /// The p2m that `shared` describes now; `None` if nothing has changed.
    pub(crate) fn find_again(
        &self,
        domain: &dyn Domain,
        m2p: &M2p,
        shared: &Page,
        go_on: &mut GoOn<'_>,
    ) -> Result<Option<Self>, SaveError> {
        let place = Place::find(domain, m2p, self.info, shared, go_on)?;
        match place == self.place {
            true => Ok(None),
            false => Self::map(domain, m2p, self.info, place, go_on).map(Some),
        }
    }

    fn map(
        domain: &dyn Domain,
        m2p: &M2p,
        info: PvInfo,
        place: Place,
        go_on: &mut GoOn<'_>,
    ) -> Result<Self, SaveError> {
        let mut p2m = Self {
            leaves: Tables::map(domain, &place.leaves, go_on)?,
            place,
            frames: Vec::new(),
            info,
        };
        let mut frames = Vec::with_capacity(p2m.place.leaves.len());
        for mfns in p2m.place.leaves.chunks(BATCH) {
            go_on()?;
            for mfn in mfns {
                let pfn = p2m.pfn(m2p, Mfn(*mfn));
                frames.push(pfn.ok_or_else(|| bad("a frame of the p2m itself", *mfn))?);
            }
        }
        p2m.frames = frames;
        Ok(p2m)
    }

    /// The last pfn of the guest.
    pub(crate) fn max_pfn(&self) -> Pfn {
        self.place.max_pfn
    }

    /// The frame of `pfn` in the guest's table, if it has one.
    pub(crate) fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        if pfn > self.place.max_pfn {
            return None;
        }
        word(&self.leaves, self.info, pfn.0)
            .filter(|mfn| *mfn != u64::MAX)
            .map(Mfn)
    }

    /// The pfn of `mfn`, if Xen's table and the guest's agree on it.
    pub(crate) fn pfn(&self, m2p: &M2p, mfn: Mfn) -> Option<Pfn> {
        let pfn = m2p.pfn(mfn)?;
        (self.mfn(pfn)? == mfn).then_some(pfn)
    }
}

/// pfns of a chunk.
const CHUNK: usize = 4096;

/// What is known of a pfn, in one word: bits 52–63 its place in the chunk, bits 48–51 its type,
/// bits 0–47 its frame (all ones if it has none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known(u64);

const _: () = assert!(CHUNK == 1 << 12);

impl Known {
    const NO_FRAME: u64 = (1 << 48) - 1;

    fn new(at: usize, page_type: PageType, mfn: Mfn) -> Self {
        // No frame of x86 has more than 40 bits.
        let frame = mfn.0.min(Self::NO_FRAME);
        Self((at as u64) << 52 | u64::from(page_type.nibble()) << 48 | frame)
    }

    fn at(self) -> usize {
        usize::try_from(self.0 >> 52).unwrap_or(CHUNK)
    }

    fn page_type(self) -> PageType {
        let [.., byte, _] = self.0.to_le_bytes();
        PageType::from_nibble(byte & 0xf)
    }

    fn mfn(self) -> Option<Mfn> {
        let frame = self.0 & Self::NO_FRAME;
        (frame != Self::NO_FRAME).then_some(Mfn(frame))
    }
}

/// What is known of the pfns of a chunk, ascending. Where nothing is, it is an ordinary page
/// without a frame.
type Chunk = Vec<Known>;

/// Where a chunk has what is known of a pfn, or would have it.
fn search(chunk: &[Known], at: usize) -> Result<usize, usize> {
    // Where all pfns before it are known, too, which is usual, it is at its own place. It cannot be
    // behind that.
    match chunk.get(at) {
        Some(known) if known.at() == at => Ok(at),
        _ => chunk[..chunk.len().min(at)].binary_search_by_key(&at, |known| known.at()),
    }
}

/// The p2m of a guest that is being restored, and the type of each page.
///
/// Takes some eight bytes for each page that has been populated, and at most 24 for each 4096 pfns
/// up to the last of those.
#[derive(Default)]
pub(crate) struct NewP2m {
    chunks: Vec<Chunk>,
    /// Frames that were given back, and the pfns that had them.
    released: BTreeMap<Mfn, Pfn>,
}

/// The p2m of a guest that is being restored. One thread fills it while others look up frames: a
/// pfn that has a frame keeps it.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedP2m(Arc<RwLock<NewP2m>>);

impl SharedP2m {
    /// For looking up frames.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, NewP2m> {
        // No thread panics in the middle of a change.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For changes.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, NewP2m> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NewP2m {
    fn place(pfn: Pfn) -> (usize, usize) {
        // pfns of PV streams are below 2^32: X86_PV_P2M_FRAMES holds no larger.
        let pfn = usize::try_from(pfn.0).unwrap_or(usize::MAX);
        (pfn / CHUNK, pfn % CHUNK)
    }

    fn get(&self, pfn: Pfn) -> Option<Known> {
        let (chunk, at) = Self::place(pfn);
        let chunk = self.chunks.get(chunk)?;
        search(chunk, at).ok().map(|index| chunk[index])
    }

    fn set(&mut self, pfn: Pfn, page_type: PageType, mfn: Mfn) {
        let (chunk, at) = Self::place(pfn);
        if chunk >= self.chunks.len() {
            self.chunks.resize(chunk + 1, Vec::new());
        }
        let chunk = &mut self.chunks[chunk];
        let known = Known::new(at, page_type, mfn);
        match search(chunk, at) {
            Ok(index) => chunk[index] = known,
            Err(index) => {
                if chunk.len() == chunk.capacity() {
                    let more = (chunk.len() / 4).max(4).min(CHUNK - chunk.len());
                    chunk.reserve_exact(more);
                }
                chunk.insert(index, known);
            }
        }
    }

    /// The frame of `pfn`, if it has one.
    pub(crate) fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        self.get(pfn)?.mfn()
    }

    /// The type that the stream last gave `pfn`; an ordinary page before.
    pub(crate) fn page_type(&self, pfn: Pfn) -> PageType {
        self.get(pfn).map_or(PageType::NOTAB, Known::page_type)
    }

    pub(crate) fn set_mfn(&mut self, pfn: Pfn, mfn: Mfn) {
        self.set(pfn, self.page_type(pfn), mfn);
    }

    /// `pfn` has given its frame back.
    pub(crate) fn clear_mfn(&mut self, pfn: Pfn) {
        if let Some(mfn) = self.mfn(pfn) {
            self.released.insert(mfn, pfn);
        }
        self.set_mfn(pfn, Mfn::INVALID);
    }

    /// The pfn that had `mfn`, if it was given back.
    pub(crate) fn released(&self, mfn: Mfn) -> Option<Pfn> {
        self.released.get(&mfn).copied()
    }

    /// Whether any of `count` pfns from `first` on has a frame.
    fn holds_any(&self, first: u64, count: u64) -> bool {
        let end = first.saturating_add(count);
        let mut pfn = first;
        while pfn < end {
            let (chunk, at) = Self::place(Pfn(pfn));
            let next = ((chunk + 1) * CHUNK) as u64;
            if let Some(chunk) = self.chunks.get(chunk) {
                let until = usize::try_from(end.min(next) - pfn).map_or(CHUNK, |n| at + n);
                let from = search(chunk, at).unwrap_or_else(|index| index);
                let mut known = chunk[from..].iter().take_while(|known| known.at() < until);
                if known.any(|known| known.mfn().is_some()) {
                    return true;
                }
            }
            pfn = next;
        }
        false
    }

    /// Records the type of `pfn`. If it has no memory and has had none, there is nothing to record.
    pub(crate) fn set_page_type(&mut self, pfn: Pfn, page_type: PageType) {
        let known = self.get(pfn);
        if page_type.is_populated() || known.is_some() {
            let mfn = known.and_then(Known::mfn).unwrap_or(Mfn::INVALID);
            self.set(pfn, page_type, mfn);
        }
    }

    /// Every pinned table: its level and frame, ascending by pfn.
    pub(crate) fn pinned(&self) -> impl Iterator<Item = (Pfn, u8, Option<Mfn>)> {
        self.chunks.iter().enumerate().flat_map(|(n, chunk)| {
            chunk.iter().filter_map(move |known| {
                let page_type = known.page_type();
                let level = page_type.table_level().filter(|_| page_type.is_pinned())?;
                Some((Pfn((n * CHUNK + known.at()) as u64), level, known.mfn()))
            })
        })
    }

    /// Writes the p2m into the guest's own, whose leaves are at the pfns `frames`, for the pfns
    /// `0..=max_pfn`. The part of the last leaf beyond them is not changed.
    ///
    /// One leaf may serve for several ranges in which the guest has no page, as Linux's page of
    /// missing entries does: it is written once.
    ///
    /// `go_on` is called after each batch.
    pub(crate) fn write_back(
        &self,
        domain: &dyn Domain,
        info: PvInfo,
        frames: &[Pfn],
        max_pfn: Pfn,
        go_on: &mut dyn FnMut() -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let fpp = entries_per_frame(info);
        let mut contents = Box::new([0; PAGE_SIZE]);
        let (mut written, mut in_use) = (PfnBitmap::default(), PfnBitmap::default());
        for (batch, leaves) in frames.chunks(BATCH).enumerate() {
            go_on()?;
            let mut due: Vec<(usize, Gfn)> = Vec::with_capacity(leaves.len());
            for (entry, pfn) in (batch * BATCH..).zip(leaves) {
                let first = entry as u64 * fpp;
                let used = self.holds_any(first, fpp);
                let again = !written.insert(*pfn);
                if again && (used || in_use.contains(*pfn)) {
                    return Err(GuestError::SharedLeaf { leaf: *pfn, entry }.into());
                }
                if used {
                    in_use.insert(*pfn);
                }
                if again {
                    continue;
                }
                let name = || format!("X86_PV_P2M_FRAMES entry {entry}");
                due.push((entry, self.ordinary_frame(*pfn, name)?));
            }
            if due.is_empty() {
                continue;
            }
            let gfns: Vec<Gfn> = due.iter().map(|(_, gfn)| *gfn).collect();
            let pages = domain.map(&gfns, Access::Write)?.all_mapped()?;
            for ((_, page), (entry, _)) in pages.iter().zip(&due) {
                let first = *entry as u64 * fpp;
                if first + fpp - 1 > max_pfn.0 {
                    // Entries after the last pfn are not changed.
                    page.copy_to(&mut contents);
                }
                self.fill_leaf(info, first, max_pfn, &mut contents);
                page.copy_from(&contents);
            }
        }
        Ok(())
    }

    fn fill_leaf(&self, info: PvInfo, first: u64, max_pfn: Pfn, leaf: &mut Page) {
        let width = usize::from(info.width());
        for (pfn, entry) in (first..=max_pfn.0).zip(leaf.chunks_exact_mut(width)) {
            // A 32-bit guest's "no frame" is the low half of ours.
            let mfn = self.mfn(Pfn(pfn)).unwrap_or(Mfn::INVALID);
            entry.copy_from_slice(&mfn.0.to_le_bytes()[..width]);
        }
    }

    /// The frame of a pfn that must be an ordinary page of the guest.
    pub(crate) fn ordinary_frame(
        &self,
        pfn: Pfn,
        field: impl FnOnce() -> String,
    ) -> Result<Gfn, GuestError> {
        let why = match (self.mfn(pfn), self.page_type(pfn)) {
            (Some(mfn), PageType::NOTAB) => return Ok(Gfn(mfn.0)),
            (None, _) => "the image holds no such page",
            (_, page_type) if page_type.table_level().is_some() => "that page is a page table",
            _ => "that page has no contents",
        };
        Err(GuestError::Frame {
            field: field(),
            frame: pfn.0,
            why,
        })
    }

    /// The frame of a pfn that must be a page table of `level`.
    pub(crate) fn table_frame(
        &self,
        pfn: Pfn,
        level: u8,
        field: impl FnOnce() -> String,
    ) -> Result<Mfn, GuestError> {
        let why = match (self.mfn(pfn), self.page_type(pfn).table_level()) {
            (Some(mfn), Some(found)) if found == level => return Ok(mfn),
            (None, _) => "the image holds no such page",
            _ => "that page is not a top-level page table",
        };
        Err(GuestError::Frame {
            field: field(),
            frame: pfn.0,
            why,
        })
    }
}

impl std::fmt::Debug for NewP2m {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewP2m")
            .field("chunks", &self.chunks.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_far_pfn_costs_one_word() {
        let mut p2m = NewP2m::default();
        p2m.set_mfn(Pfn(u64::from(u32::MAX)), Mfn(5));
        p2m.set_page_type(Pfn(3), PageType::L4TAB_PINNED);
        for chunk in 0..1000 {
            p2m.set_page_type(Pfn(5000 + chunk * 4096), PageType::XTAB);
        }
        assert_eq!(p2m.chunks.iter().flatten().count(), 2);
        assert_eq!(p2m.mfn(Pfn(u64::from(u32::MAX))), Some(Mfn(5)));
        assert_eq!(p2m.mfn(Pfn(3)), None);
        assert_eq!(p2m.pinned().collect::<Vec<_>>(), [(Pfn(3), 4, None)]);
    }

    /// Against plain maps, in an order that looks random and in any number of chunks.
    #[test]
    fn what_is_known_of_a_pfn_is_kept() {
        const TYPES: [PageType; 4] = [
            PageType::NOTAB,
            PageType::L1TAB,
            PageType::L4TAB_PINNED,
            PageType::XTAB,
        ];
        let mut p2m = NewP2m::default();
        let mut plain: BTreeMap<u64, (PageType, Option<u64>)> = BTreeMap::new();
        let mut state = 1_u64;
        for n in 0..40_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let pfn = (state >> 33) % 10_000;
            let known = plain.get(&pfn).copied();
            match n % 3 {
                0 => {
                    p2m.set_mfn(Pfn(pfn), Mfn(state >> 24));
                    let page_type = known.map_or(PageType::NOTAB, |(page_type, _)| page_type);
                    plain.insert(pfn, (page_type, Some(state >> 24)));
                }
                1 => {
                    let page_type = TYPES[(state >> 60) as usize % 4];
                    p2m.set_page_type(Pfn(pfn), page_type);
                    if known.is_some() || page_type.is_populated() {
                        plain.insert(pfn, (page_type, known.and_then(|(_, mfn)| mfn)));
                    }
                }
                _ => {
                    let (page_type, mfn) = known.unwrap_or((PageType::NOTAB, None));
                    assert_eq!(p2m.page_type(Pfn(pfn)), page_type);
                    assert_eq!(p2m.mfn(Pfn(pfn)), mfn.map(Mfn));
                    let count = state >> 57;
                    let any = plain
                        .range(pfn..pfn + count)
                        .any(|(_, (_, mfn))| mfn.is_some());
                    assert_eq!(p2m.holds_any(pfn, count), any);
                }
            }
        }
        let pinned = plain
            .iter()
            .filter(|(_, (page_type, _))| page_type.is_pinned());
        assert!(
            p2m.pinned()
                .map(|(pfn, ..)| pfn.0)
                .eq(pinned.map(|(pfn, _)| *pfn))
        );
        let room: usize = p2m.chunks.iter().map(Vec::capacity).sum();
        assert!(
            room * 4 <= plain.len() * 5 + 64,
            "{room} for {}",
            plain.len()
        );
    }

    #[test]
    fn a_leaf_keeps_what_is_beyond_the_last_pfn() {
        let mut p2m = NewP2m::default();
        p2m.set_mfn(Pfn(1024), Mfn(0x1_2345));
        for (info, fpp) in [(PvInfo::Bits32, 1024), (PvInfo::Bits64, 512)] {
            let width = usize::from(info.width());
            let mut leaf = [0xaa; PAGE_SIZE];
            p2m.fill_leaf(info, 1024 / fpp * fpp, Pfn(1025), &mut leaf);
            assert_eq!(leaf[..4], 0x1_2345_u32.to_le_bytes());
            assert!(leaf[width..2 * width].iter().all(|o| *o == 0xff));
            assert!(leaf[2 * width..].iter().all(|o| *o == 0xaa));
        }
    }
}
