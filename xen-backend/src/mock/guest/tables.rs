//! Page tables of a PV guest that is being built: they hold pfns until they are written out.

use std::collections::BTreeMap;

use xsr_format::frame::{PAGE_SIZE, Page};

use crate::mock::layout::write_word;
use crate::mock::pagetable::{ACCESSED, DIRTY, PRESENT, RW, USER};

/// Flags of an entry that refers to a lower table.
const TABLE: u64 = PRESENT | RW | USER | ACCESSED | DIRTY;

/// One table.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) level: u8,
    /// Flags, and the pfn in place of the mfn.
    entries: [u64; 512],
}

/// A guest's tables by pfn.
#[derive(Debug)]
pub(super) struct TableSet {
    tables: BTreeMap<u64, Table>,
    next_pfn: u64,
    /// Three levels, the top one with four entries.
    pae: bool,
}

impl TableSet {
    /// An empty set, whose tables will be placed at `first_pfn` and up.
    pub(super) fn new(first_pfn: u64, width: u8) -> Self {
        Self {
            tables: BTreeMap::new(),
            next_pfn: first_pfn,
            pae: width == 4,
        }
    }

    /// The level of a top-level table.
    pub(super) fn top_level(&self) -> u8 {
        if self.pae { 3 } else { 4 }
    }

    /// The first pfn above the tables.
    pub(super) fn end(&self) -> u64 {
        self.next_pfn
    }

    /// Whether the set has a table at `pfn`.
    pub(super) fn contains(&self, pfn: u64) -> bool {
        self.tables.contains_key(&pfn)
    }

    /// The tables by pfn.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Table)> {
        self.tables.iter().map(|(pfn, table)| (*pfn, table))
    }

    /// A new, empty table.
    pub(super) fn add(&mut self, level: u8) -> u64 {
        let pfn = self.next_pfn;
        self.next_pfn += 1;
        let table = Table {
            level,
            entries: [0; 512],
        };
        self.tables.insert(pfn, table);
        pfn
    }

    fn table(&mut self, pfn: u64) -> &mut Table {
        self.tables
            .get_mut(&pfn)
            .expect("only tables of the set refer to each other")
    }

    /// Set an entry of the table at `pfn`.
    pub(super) fn set(&mut self, pfn: u64, index: usize, target: u64, flags: u64) {
        self.table(pfn).entries[index] = target << 12 | flags;
    }

    /// Make entry `index` of `table` refer to the lower table `target`.
    pub(super) fn link(&mut self, table: u64, index: usize, target: u64) {
        let flags = match (self.pae, self.table(table).level) {
            (true, 3) => PRESENT,
            (true, _) => TABLE & !USER,
            (false, _) => TABLE,
        };
        self.set(table, index, target, flags);
    }

    /// Copy entries of one table to another of the same level.
    pub(super) fn share(&mut self, from: u64, to: u64, slots: std::ops::Range<usize>) {
        let shared = self.table(from).entries[slots.clone()].to_vec();
        self.table(to).entries[slots].copy_from_slice(&shared);
    }

    /// The table that entry `index` of `table` refers to, if any.
    pub(super) fn target(&mut self, table: u64, index: usize) -> Option<u64> {
        let entry = self.table(table).entries[index];
        (entry & PRESENT != 0).then_some((entry & !(0xfff | 0xfff << 52)) >> 12)
    }

    /// Map `address` to `pfn` below the top-level table `root`, and add tables as needed.
    pub(super) fn map(&mut self, root: u64, address: u64, pfn: u64, flags: u64) {
        let mut table = root;
        for level in (2..=self.top_level()).rev() {
            let index = slot(address, level);
            table = match self.target(table, index) {
                Some(lower) => lower,
                None => {
                    let lower = self.add(level - 1);
                    self.link(table, index, lower);
                    lower
                }
            };
        }
        self.set(table, slot(address, 1), pfn, flags | PRESENT);
    }
}

/// The entry of a table of `level` that covers `address`.
fn slot(address: u64, level: u8) -> usize {
    let index = address >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff;
    usize::try_from(index).unwrap_or(0)
}

impl Table {
    /// The table's contents in memory: pfns replaced by mfns, and `read_only` frames mapped
    /// read-only. A pfn without a frame is not mapped.
    pub(super) fn write_out(
        &self,
        mfn: impl Fn(u64) -> Option<u64>,
        read_only: impl Fn(u64) -> bool,
    ) -> Page {
        let mut page = [0; PAGE_SIZE];
        for (index, entry) in self.entries.iter().enumerate() {
            if entry & PRESENT == 0 {
                continue;
            }
            let flags = entry & (0xfff | 0xfff << 52);
            let pfn = (entry & !(0xfff | 0xfff << 52)) >> 12;
            let flags = match self.level == 1 && read_only(pfn) {
                true => flags & !RW,
                false => flags,
            };
            if let Some(mfn) = mfn(pfn) {
                write_word(&mut page, index * 8, 8, mfn << 12 | flags);
            }
        }
        page
    }
}
