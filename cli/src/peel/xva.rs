//! XVA archives (`xe vm-export`): a reader of the memory of the suspended VM inside.
//!
//! An XVA is a tar archive. Its first member, `ova.xml`, describes the VM and names the suspend VDI
//! ([`SuspendDisk`]). Each disk is a directory of numbered blocks:
//!
//! | member | content |
//! |---|---|
//! | `Ref:24/00000000` | the first block, 1 MiB |
//! | `Ref:24/00000000.xxhash` | its XXH64 in hexadecimal (older hosts: `.checksum`, its SHA-1) |
//! | `Ref:24/00000003` | the fourth block: the two between them are zeros |
//! | `Ref:24/00000004` | an empty block, which was written to keep the connection alive |
//!
//! A block is passed on only once its checksum has been compared. Disks before the suspend VDI are
//! skipped; nothing after the end of the image is read.
//!
//! Implementation: `ocaml/xapi/stream_vdi.ml` of xen-api (`send_one`, `recv_all_vdi`).

use std::error::Error as StdError;
use std::fmt;
use std::hash::Hasher as _;
use std::io::{self, ErrorKind, Read};

use anyhow::Result;
use sha1::{Digest as _, Sha1};
use tar::Header;
use twox_hash::XxHash64;
use xsr_save_restore::RestoreError;

use super::compression::{Notes, note};
use super::{Source, bad};
use crate::interrupt::Interrupt;
use crate::origin::SuspendDisk;

/// The most bytes of `ova.xml`. That of a VM with many snapshots has some hundred KiB.
const MAX_XML: u64 = 16 << 20;
/// The longest block. xapi's have 1 MiB.
const MAX_BLOCK: u64 = 16 << 20;
/// The longest checksum, in hexadecimal digits.
const MAX_CHECKSUM: u64 = 64;
/// The largest disk: 2040 GiB, as for a VHD.
const MAX_DISK: u64 = 2040 << 30;
/// The size of a header; contents are padded to a multiple of it.
const RECORD: u64 = 512;
/// Bytes that are skipped between two looks for a signal.
const STRIDE: u64 = 16 << 20;

/// What is wrong with an archive.
#[derive(Debug)]
struct Broken {
    what: String,
    /// The offset in the archive.
    at: u64,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the XVA archive is damaged at byte {:#x}: {}",
            self.at, self.what
        )
    }
}

impl StdError for Broken {}

/// Whether an error is about a damaged archive.
pub(super) fn is_broken(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn StdError + Send + Sync>::is::<Broken>)
}

/// The header of a member.
#[derive(Debug)]
struct Member {
    name: String,
    bytes: u64,
}

impl Member {
    /// The number of a block of the disk in this directory.
    fn block_of(&self, disk: &str) -> Option<u64> {
        let number = self.name.strip_prefix(disk)?.strip_prefix('/')?;
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| number.parse().ok()).flatten()
    }

    /// Bytes up to the next header.
    fn padded(&self) -> u64 {
        self.bytes.next_multiple_of(RECORD)
    }
}

/// The suspend VDI in an XVA.
pub(super) struct Xva {
    archive: Archive,
    /// The directory of the disk.
    disk: String,
    /// A header that has been read too early.
    next: Option<Member>,
    /// The number of the last block.
    last: Option<u64>,
    /// The length of the first block, which is that of each block that is missing.
    step: Option<u64>,
    /// Bytes of the disk so far, with those that have not been passed on yet.
    size: u64,
    /// Zeros that come before the block.
    zeros: u64,
    block: Vec<u8>,
    /// Bytes of the block that have been passed on.
    used: usize,
    /// A block without a checksum was reported.
    unchecked: bool,
    over: bool,
    notes: Notes,
}

impl Xva {
    /// Reads `ova.xml`.
    ///
    /// # Errors
    ///
    /// The source failed; the archive is damaged; it holds no memory, or that of several VMs.
    pub(super) fn open(source: Source, notes: &Notes) -> Result<Self> {
        let mut archive = Archive { source, at: 0 };
        let start = archive.member().map_err(super::unwrapped)?;
        let Some(xml) = start.filter(|member| member.name == "ova.xml") else {
            return Err(bad(
                "an XVA archive begins with ova.xml, and this one does not".to_owned(),
            ));
        };
        let text = archive.contents(&xml, MAX_XML).map_err(super::unwrapped)?;
        let disk = SuspendDisk::in_ova_xml(&String::from_utf8_lossy(&text)).map_err(bad)?;
        tracing::info!("the memory of {} is in {}", disk.vm, disk.directory);
        Ok(Self {
            archive,
            disk: disk.directory,
            next: None,
            last: None,
            step: None,
            size: 0,
            zeros: 0,
            block: Vec::new(),
            used: 0,
            unchecked: false,
            over: false,
            notes: Notes::clone(notes),
        })
    }

    /// Reads up to the next block of the disk, and the block. Returns whether there is one.
    fn advance(&mut self) -> io::Result<bool> {
        loop {
            let next = match self.next.take() {
                Some(next) => Some(next),
                None => self.archive.member()?,
            };
            let Some(member) = next else {
                return match self.last {
                    None => Err(self.archive.broken(format!(
                        "it ends, and has no block of {}, which holds the memory",
                        self.disk
                    ))),
                    Some(_) => Ok(false),
                };
            };
            match member.block_of(&self.disk) {
                Some(number) => {
                    self.block(number, &member)?;
                    return Ok(true);
                }
                // The disks come one after the other.
                None if self.last.is_some() => return Ok(false),
                None => self.archive.skip(member.padded())?,
            }
        }
    }

    fn block(&mut self, number: u64, member: &Member) -> io::Result<()> {
        let expected = self.last.map_or(0, |last| last.saturating_add(1));
        let Some(missing) = number.checked_sub(expected) else {
            let what = format!("block {number} comes after block {expected} or a later one");
            return Err(self.archive.broken(what));
        };
        self.block = self.archive.contents(member, MAX_BLOCK)?;
        self.used = 0;
        let step = *self.step.get_or_insert(member.bytes);
        self.zeros = missing.saturating_mul(step);
        self.size = (self.size)
            .saturating_add(self.zeros)
            .saturating_add(member.bytes);
        if self.size > MAX_DISK {
            let what = format!("block {number} is beyond the end of the largest disk, 2040 GiB");
            return Err(self.archive.broken(what));
        }
        self.last = Some(number);
        self.next = self.archive.member()?;
        let checksum = match &self.next {
            Some(next) => next.name.strip_prefix(&member.name).and_then(Checksum::of),
            None => None,
        };
        match (checksum, self.next.take()) {
            (Some(checksum), Some(next)) => {
                let text = self.archive.contents(&next, MAX_CHECKSUM)?;
                let expected = String::from_utf8_lossy(&text);
                let got = checksum.hex(&self.block);
                if !expected.trim().eq_ignore_ascii_case(&got) {
                    return Err(self.archive.broken(format!(
                        "block {} has the {} {got}, expected {}; copy or export it again",
                        member.name,
                        checksum.name(),
                        expected.trim().escape_debug()
                    )));
                }
            }
            (_, next) => {
                self.next = next;
                if !std::mem::replace(&mut self.unchecked, true) {
                    let name = member.name.escape_debug();
                    let text = format!(
                        "the XVA has no checksum that is known here for block {name}; later ones \
                         may lack it, too"
                    );
                    note(&self.notes, text);
                }
            }
        }
        Ok(())
    }
}

impl Read for Xva {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while !room.is_empty() && !self.over {
            if self.zeros > 0 {
                let most = usize::try_from(self.zeros).unwrap_or(usize::MAX);
                let n = most.min(room.len());
                room[..n].fill(0);
                self.zeros -= n as u64;
                return Ok(n);
            }
            let rest = &self.block[self.used..];
            if !rest.is_empty() {
                let n = rest.len().min(room.len());
                room[..n].copy_from_slice(&rest[..n]);
                self.used += n;
                return Ok(n);
            }
            match self.advance() {
                Ok(true) => {}
                Ok(false) => self.over = true,
                Err(error) => {
                    // The archive cannot be followed after an error.
                    self.over = error.kind() != ErrorKind::Interrupted;
                    return Err(error);
                }
            }
        }
        Ok(0)
    }
}

/// A kind of checksum.
#[derive(Clone, Copy, Debug)]
enum Checksum {
    Sha1,
    Xxh64,
}

impl Checksum {
    /// The kind, by the end of the member's name.
    fn of(extension: &str) -> Option<Self> {
        match extension {
            ".checksum" => Some(Self::Sha1),
            ".xxhash" => Some(Self::Xxh64),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA-1",
            Self::Xxh64 => "XXH64",
        }
    }

    fn hex(self, block: &[u8]) -> String {
        match self {
            Self::Sha1 => (Sha1::digest(block).iter())
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            Self::Xxh64 => {
                let mut hash = XxHash64::with_seed(0);
                hash.write(block);
                format!("{:016X}", hash.finish())
            }
        }
    }
}

/// The members of a tar archive, read in their order.
struct Archive {
    source: Source,
    at: u64,
}

impl Archive {
    fn broken(&self, what: String) -> io::Error {
        io::Error::new(ErrorKind::InvalidData, Broken { what, at: self.at })
    }

    /// The next member; `None` at the end.
    fn member(&mut self) -> io::Result<Option<Member>> {
        let mut bytes = Vec::new();
        self.source.by_ref().take(RECORD).read_to_end(&mut bytes)?;
        if bytes.is_empty() || bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if bytes.len() < 512 {
            return Err(self.cut());
        }
        let header = Header::from_byte_slice(&bytes);
        // The sum of all bytes, of which those of the checksum count as blanks.
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let sum = sum(&bytes[..148]) + sum(&bytes[156..]) + 8 * u32::from(b' ');
        let (Ok(expected), Ok(size)) = (header.cksum(), header.entry_size()) else {
            return Err(self.broken("this is not the header of a member".to_owned()));
        };
        if sum != expected {
            return Err(self.broken("the checksum of a member's header is wrong".to_owned()));
        }
        if size > i64::MAX as u64 {
            return Err(self.broken(format!("a member has {size} bytes")));
        }
        self.at += RECORD;
        let file = header.entry_type().is_file() || header.entry_type().is_contiguous();
        Ok(Some(Member {
            // Other types have no contents of a disk, whatever their name is.
            name: match file {
                true => String::from_utf8_lossy(&header.path_bytes()).into_owned(),
                false => String::new(),
            },
            bytes: size,
        }))
    }

    /// The contents of a member, and its padding.
    fn contents(&mut self, member: &Member, max: u64) -> io::Result<Vec<u8>> {
        if member.bytes > max {
            let Member { name, bytes } = member;
            let name = name.escape_debug();
            return Err(self.broken(format!("{name} has {bytes} bytes, expected at most {max}")));
        }
        let mut contents = Vec::new();
        self.source
            .by_ref()
            .take(member.bytes)
            .read_to_end(&mut contents)?;
        self.at = self.at.saturating_add(contents.len() as u64);
        if (contents.len() as u64) < member.bytes {
            return Err(self.cut());
        }
        self.skip(member.padded() - member.bytes)?;
        Ok(contents)
    }

    fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let mut step = self.source.by_ref().take(bytes.min(STRIDE));
            let skipped = io::copy(&mut step, &mut io::sink())?;
            self.at = self.at.saturating_add(skipped);
            bytes -= skipped;
            if skipped == 0 {
                return Err(self.cut());
            }
            // There may be disks of any size before the memory.
            let interrupt = Interrupt::of_process().map_err(io::Error::other)?;
            if interrupt.cancel().is_cancelled() {
                return Err(io::Error::other(RestoreError::Aborted));
            }
        }
        Ok(())
    }

    fn cut(&self) -> io::Error {
        self.broken("it ends inside a member; the file is truncated: copy it again".to_owned())
    }
}
