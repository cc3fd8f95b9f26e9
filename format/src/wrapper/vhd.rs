//! Dynamic VHDs, in which xapi exports suspend VDIs: a reader of the disk inside.
//!
//! | location | content |
//! |---|---|
//! | byte 0 | copy of the footer: `conectix`, big-endian fields, a checksum |
//! | given in the footer | header: `cxsparse`, location of the table, size of blocks |
//! | given in the header | table: the sector of each block, or all ones for zeros |
//! | each block | bitmap in whole sectors, then the sectors; a 0 bit means zeros |
//!
//! A disk of fixed size needs no reader, because it begins with its contents. A differencing disk
//! cannot be read without its parent.
//!
//! Specification: Virtual Hard Disk Image Format Specification 1.0.

use std::io::{self, Read, Seek, SeekFrom};

use thiserror::Error;

/// The magic at the start of a dynamic VHD.
pub const MAGIC: [u8; 8] = *b"conectix";

const HEADER_MAGIC: [u8; 8] = *b"cxsparse";
const SECTOR: u64 = 512;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// Maximum size of a block; all known ones have 2 MiB.
const MAX_BLOCK: u32 = 256 << 20;
/// Maximum number of blocks: with 2 MiB each, enough for the largest disk, 2 TiB.
const MAX_BLOCKS: u32 = 1 << 20;
/// The most bytes of a disk: 2040 GiB.
const MAX_SIZE: u64 = 2040 << 30;

/// An invalid VHD.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VhdError {
    /// The source failed, or ended.
    #[error("reading failed")]
    Io(#[from] io::Error),
    /// It is not a dynamic disk.
    #[error("it is a VHD of type {0}, expected 3 (dynamic)")]
    Type(u32),
    /// It is a differencing disk.
    #[error("it is a differencing VHD, which cannot be read without its parent")]
    Differencing,
    /// A structure whose magic or checksum is wrong.
    #[error("its {what} is damaged: the {why} is wrong")]
    Damaged {
        /// The structure.
        what: &'static str,
        /// What is wrong: magic or checksum.
        why: &'static str,
    },
    /// An implausible number.
    #[error("its header says {what} {got}, expected at most {max}")]
    TooLarge {
        /// What it counts.
        what: &'static str,
        /// The value found.
        got: u32,
        /// The limit.
        max: u32,
    },
}

/// The disk in a dynamic VHD.
#[derive(Debug)]
pub struct Vhd<R> {
    source: R,
    /// The sector of each block.
    table: Vec<u32>,
    block_bytes: u64,
    bitmap_bytes: u64,
    size: u64,
    at: u64,
    /// The bitmap that was read last, and the sector of its block.
    bitmap: (u32, Vec<u8>),
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let end = at.saturating_add(4);
    let word = bytes.get(at..end).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_be_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let low = number(bytes, at.saturating_add(4));
    u64::from(number(bytes, at)) << 32 | u64::from(low)
}

/// Whether the checksum at `at` matches the other bytes.
fn is_whole(bytes: &[u8], at: usize) -> bool {
    let others = bytes
        .iter()
        .enumerate()
        .filter(|(i, _)| !(at..at.saturating_add(4)).contains(i));
    let sum = others.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
    !sum == number(bytes, at)
}

impl<R: Read + Seek> Vhd<R> {
    /// Reads the footer's copy, the header and the table.
    ///
    /// # Errors
    ///
    /// [`VhdError`]
    pub fn open(mut source: R) -> Result<Self, VhdError> {
        let damaged = |what, why| Err(VhdError::Damaged { what, why });
        let mut footer = [0; 512];
        source.seek(SeekFrom::Start(0))?;
        source.read_exact(&mut footer)?;
        if !footer.starts_with(&MAGIC) {
            return damaged("footer", "magic");
        }
        if !is_whole(&footer, 64) {
            return damaged("footer", "checksum");
        }
        match number(&footer, 60) {
            DYNAMIC => {}
            DIFFERENCING => return Err(VhdError::Differencing),
            other => return Err(VhdError::Type(other)),
        }
        let mut header = [0; 1024];
        source.seek(SeekFrom::Start(long(&footer, 16)))?;
        source.read_exact(&mut header)?;
        if !header.starts_with(&HEADER_MAGIC) {
            return damaged("header", "magic");
        }
        if !is_whole(&header, 36) {
            return damaged("header", "checksum");
        }
        let (blocks, block) = (number(&header, 28), number(&header, 32));
        let limits = [
            ("a number of blocks of", blocks, MAX_BLOCKS),
            ("a block size of", block, MAX_BLOCK),
        ];
        for (what, got, max) in limits {
            if got > max || (what.ends_with("size of") && got < 4096) {
                return Err(VhdError::TooLarge { what, got, max });
            }
        }
        source.seek(SeekFrom::Start(long(&header, 16)))?;
        let mut table = Vec::new();
        for _ in 0..blocks {
            let mut entry = [0; 4];
            source.read_exact(&mut entry)?;
            table.push(u32::from_be_bytes(entry));
        }
        let block_bytes = u64::from(block);
        let size = long(&footer, 48);
        if size > MAX_SIZE {
            return damaged("footer", "size of the disk");
        }
        // What follows the last block that was written is zeros, of which no reader needs any.
        let used = table.iter().rposition(|sector| *sector != UNUSED);
        let used = used.map_or(0, |last| (last as u64).saturating_add(1));
        let bitmap_bits = block_bytes.div_ceil(SECTOR);
        Ok(Self {
            source,
            table,
            block_bytes,
            bitmap_bytes: bitmap_bits.div_ceil(8).next_multiple_of(SECTOR),
            size: size.min(used.saturating_mul(block_bytes)),
            at: 0,
            bitmap: (UNUSED, Vec::new()),
        })
    }

    /// Whether the sector at byte `within` of the block was written, and for how many bytes from
    /// there the answer is the same.
    fn is_written(&mut self, block: u32, within: u64) -> io::Result<(bool, u64)> {
        if self.bitmap.0 != block {
            let start = u64::from(block).saturating_mul(SECTOR);
            self.source.seek(SeekFrom::Start(start))?;
            // At most 64 KiB, as MAX_BLOCK needs.
            let mut bits = vec![0; usize::try_from(self.bitmap_bytes).unwrap_or(0)];
            self.source.read_exact(&mut bits)?;
            self.bitmap = (block, bits);
        }
        let bit = |sector: u64| {
            let byte = usize::try_from(sector >> 3).ok();
            let byte = byte.and_then(|at| self.bitmap.1.get(at));
            byte.is_some_and(|byte| {
                byte & 0x80_u8.rotate_right(u32::try_from(sector & 7).unwrap_or(0)) != 0
            })
        };
        let first = within.checked_div(SECTOR).unwrap_or(0);
        let end = self.block_bytes.div_ceil(SECTOR);
        let written = bit(first);
        let other = (first..end).find(|sector| bit(*sector) != written);
        let until = other.unwrap_or(end).saturating_mul(SECTOR);
        Ok((written, until.saturating_sub(within)))
    }
}

/// The table entry of a block that was never written.
const UNUSED: u32 = u32::MAX;

impl<R: Read + Seek> Read for Vhd<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let (block, within) = match (
            self.at.checked_div(self.block_bytes),
            self.at.checked_rem(self.block_bytes),
        ) {
            (Some(block), Some(within)) => (block, within),
            _ => return Ok(0),
        };
        let entry = usize::try_from(block)
            .ok()
            .and_then(|block| self.table.get(block));
        let (Some(entry), true) = (entry.copied(), self.at < self.size) else {
            return Ok(0);
        };
        if room.is_empty() {
            return Ok(0);
        }
        let (written, alike) = match entry {
            UNUSED => (false, self.block_bytes),
            sector => self.is_written(sector, within)?,
        };
        let left = self
            .block_bytes
            .saturating_sub(within)
            .min(self.size.saturating_sub(self.at))
            .min(alike);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(room.len());
        let (room, _) = room.split_at_mut(most);
        let n = match written {
            false => {
                room.fill(0);
                most
            }
            true => {
                let start = u64::from(entry)
                    .saturating_mul(SECTOR)
                    .saturating_add(self.bitmap_bytes)
                    .saturating_add(within);
                self.source.seek(SeekFrom::Start(start))?;
                self.source.read(room)?
            }
        };
        self.at = self.at.saturating_add(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )]

    use std::io::Cursor;

    use super::*;

    fn summed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        let sum = bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }

    /// Three blocks of 4 KiB: the second is stored before the first, the third does not exist.
    fn disk(kind: u32) -> Vec<u8> {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(&MAGIC);
        footer[16..24].copy_from_slice(&512_u64.to_be_bytes());
        footer[48..56].copy_from_slice(&10_000_u64.to_be_bytes());
        footer[60..64].copy_from_slice(&kind.to_be_bytes());
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(&HEADER_MAGIC);
        header[16..24].copy_from_slice(&1536_u64.to_be_bytes());
        header[28..32].copy_from_slice(&3_u32.to_be_bytes());
        header[32..36].copy_from_slice(&4096_u32.to_be_bytes());
        let mut table: Vec<u8> = [13_u32, 4, u32::MAX].map(u32::to_be_bytes).concat();
        table.resize(512, 0xff);
        let block = |byte| [vec![0xff; 512], vec![byte; 4096]].concat();
        [
            summed(footer, 64),
            summed(header, 36),
            table,
            block(2),
            block(1),
        ]
        .concat()
    }

    #[test]
    fn blocks_are_read_in_the_order_of_the_table() {
        let mut contents = Vec::new();
        let mut disk = Vhd::open(Cursor::new(disk(DYNAMIC))).unwrap();
        disk.read_to_end(&mut contents).unwrap();
        // Not to the end of the disk: the last block was never written.
        let expected = [vec![1; 4096], vec![2; 4096]].concat();
        assert!(contents == expected);
    }

    #[test]
    fn a_sector_whose_bit_is_clear_reads_as_zeros() {
        let mut disk = disk(DYNAMIC);
        // Sectors 0, 3, 4 and 7 of the first block, all sectors of the second.
        let (first, second) = (13 * 512, 4 * 512);
        disk[first] = 0b0110_0110;
        disk[second..second + 512].fill(0);
        let mut expected = Vec::new();
        for byte in [0, 1, 1, 0, 0, 1, 1, 0] {
            expected.extend([byte; 512]);
        }
        expected.resize(8192, 0);
        // With reads of any size.
        for step in [1, 511, 513, 100_000] {
            let mut open = Vhd::open(Cursor::new(disk.clone())).unwrap();
            let (mut contents, mut room) = (Vec::new(), vec![7; step]);
            loop {
                match open.read(&mut room).unwrap() {
                    0 => break,
                    n => contents.extend_from_slice(&room[..n]),
                }
            }
            assert!(contents == expected, "{step}");
        }
    }

    #[test]
    fn what_is_no_dynamic_vhd_is_refused() {
        let open = |disk: Vec<u8>| Vhd::open(Cursor::new(disk)).err().unwrap();
        assert!(matches!(open(disk(4)), VhdError::Differencing));
        assert!(matches!(open(disk(2)), VhdError::Type(2)));
        for at in [20, 530] {
            let mut disk = disk(DYNAMIC);
            disk[at] ^= 1;
            assert!(matches!(open(disk), VhdError::Damaged { .. }), "{at}");
        }
        for end in [0, 100, 600, 1540] {
            assert!(matches!(
                open(disk(DYNAMIC)[..end].to_vec()),
                VhdError::Io(_)
            ));
        }
    }
}
