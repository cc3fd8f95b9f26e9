//! Formats of files that are not saved domains: cores, disks, archives, images of other virtual
//! machines, text. An error message names the format and says what to do with the file.
//!
//! A format is named only where a whole magic matches; two bytes at the start of a file are never
//! enough. Formats whose magic is further in (a partition table, a file system) are tried last,
//! because page contents may look like one by chance.

use std::fmt;

/// How many bytes are needed: btrfs has the magic that is furthest in.
pub const ENOUGH: usize = 0x1_0048;

/// How far into a file that begins with something else an image's magic is searched for.
pub const SEARCHED: usize = 1 << 20;

/// A format that is not a saved domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Its name, with an article.
    pub name: &'static str,
    /// What a program can advise to do with it.
    pub kind: ForeignKind,
}

/// Kinds of formats, by what can be done with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForeignKind {
    /// A virtual machine of KVM.
    KvmGuest,
    /// A save that was never completed.
    IncompleteSave,
    /// The state of a device model, without the guest's memory.
    DeviceModelState,
    /// A virtual machine of VirtualBox.
    VirtualBoxState,
    /// Memory as a core dump, without the state that a restore needs.
    CoreDump,
    /// Memory in another form, without the state that a restore needs.
    Memory,
    /// A dump of Windows without its memory.
    Minidump,
    /// A dump of Linux that has to be put in order.
    FlattenedDump,
    /// A disk, or the contents of one, on which there may be an image.
    Disk,
    /// A disk image that is not raw.
    DiskImage,
    /// A disk image in the form in which xapi exports its suspend images.
    Vhd,
    /// An archive, in which there may be an image.
    Archive,
    /// A tar archive, in which there may be an image.
    Tar,
    /// An archive without members.
    EmptyArchive,
    /// Compressed data that must be decompressed first.
    Compressed(ForeignCompression),
    /// Encrypted data that must be decrypted first.
    Encrypted(Encryption),
    /// Text that encodes other data.
    Base64,
    /// A configuration, which goes beside an image.
    Configuration,
    /// A configuration of libxl, which goes beside an image.
    JsonConfiguration,
    /// A description of a domain whose image is in another file.
    Description,
    /// The same, as libvirt writes it. libvirt keeps it with the image.
    XmlDescription,
    /// A pointer to a file that Git LFS keeps.
    LfsPointer,
    /// Anything else.
    Other,
}

/// Compressions that are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForeignCompression {
    /// lzip.
    Lzip,
    /// lzop.
    Lzop,
    /// Framed snappy.
    Snappy,
    /// compress (`.Z`).
    Compress,
    /// The old format of lzma.
    Lzma,
    /// zlib.
    Zlib,
}

/// Encryptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Encryption {
    /// age.
    Age,
    /// OpenPGP.
    Pgp,
    /// openssl enc.
    OpenSsl,
    /// openssl enc, in base64.
    OpenSslBase64,
    /// A volume of LUKS.
    Luks,
}

impl Foreign {
    /// Whether the format is an archive: an image found further in is a member of it.
    pub fn is_archive(&self) -> bool {
        matches!(
            self.kind,
            ForeignKind::Archive | ForeignKind::Tar | ForeignKind::EmptyArchive
        )
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Offset, magic, name, kind.
type Known = (usize, &'static [u8], &'static str, ForeignKind);

use Encryption::{Age, Luks, OpenSsl, OpenSslBase64, Pgp};
use ForeignCompression::{Compress, Lzip, Lzma, Lzop, Snappy, Zlib};
use ForeignKind::{
    Archive, Base64, Compressed, Configuration, CoreDump, Description, DeviceModelState, Disk,
    DiskImage, EmptyArchive, Encrypted, FlattenedDump, IncompleteSave, JsonConfiguration, KvmGuest,
    LfsPointer, Memory, Minidump, Other, Tar, Vhd, VirtualBoxState, XmlDescription,
};

/// Formats with a magic at the start.
const AT_START: &[Known] = &[
    (0, b"QFI\xfb", "a qcow2 disk image", DiskImage),
    (0, b"QED\0", "a QED disk image", DiskImage),
    (0, b"KDMV", "a VMDK disk image", DiskImage),
    (0, b"COWD", "a VMDK disk image", DiskImage),
    (
        0,
        b"# Disk DescriptorFile",
        "the descriptor of a VMDK disk image",
        DiskImage,
    ),
    (
        0,
        b"<<< Oracle V",
        "a VDI disk image of VirtualBox",
        DiskImage,
    ),
    (0, b"<<< Sun ", "a VDI disk image of VirtualBox", DiskImage),
    (
        0,
        b"<<< innotek ",
        "a VDI disk image of VirtualBox",
        DiskImage,
    ),
    (
        0,
        b"<<< QEMU VM Virtual Disk Image >>>",
        "a VDI disk image",
        DiskImage,
    ),
    (0, b"conectix", "a VHD disk image", Vhd),
    (0, b"vhdxfile", "a VHDX disk image", DiskImage),
    (
        0,
        b"WithoutFreeSpace",
        "a disk image of Parallels",
        DiskImage,
    ),
    (
        0,
        b"WithouFreSpacExt",
        "a disk image of Parallels",
        DiskImage,
    ),
    (
        0,
        b"LibvirtQemudSave",
        "a domain saved by libvirt's QEMU driver",
        KvmGuest,
    ),
    (
        0,
        b"LibvirtQemudPart",
        "a save of libvirt's QEMU driver that was never completed",
        IncompleteSave,
    ),
    (0, b"QEVM\0\0\0\x02", "a migration stream of qemu", KvmGuest),
    (0, b"QEVM\0\0\0\x03", "a migration stream of qemu", KvmGuest),
    (
        0,
        b"QemuDeviceModelRecord",
        "the state of a device model",
        DeviceModelState,
    ),
    (0, b"PK\x03\x04", "a zip archive", Archive),
    (0, b"PK\x05\x06", "an empty zip archive", EmptyArchive),
    (0, b"PK\x07\x08", "a zip archive", Archive),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", Archive),
    (0, b"Rar!\x1a\x07", "a rar archive", Archive),
    (0, b"MSCF\0\0\0\0", "a cabinet archive", Archive),
    (0, b"070701", "a cpio archive", Archive),
    (0, b"070702", "a cpio archive", Archive),
    (0, b"070707", "a cpio archive", Archive),
    (0, b"!<arch>\n", "an ar archive (a .deb is one)", Other),
    (0, b"\xed\xab\xee\xdb", "an rpm package", Other),
    (
        0,
        b"LZIP\x01",
        "data compressed with lzip",
        Compressed(Lzip),
    ),
    (0, b"LZIP\0", "data compressed with lzip", Compressed(Lzip)),
    (
        0,
        b"\x89LZO\0\r\n\x1a\n",
        "data compressed with lzop",
        Compressed(Lzop),
    ),
    (
        0,
        b"\xff\x06\0\0sNaPpY",
        "data compressed with snappy",
        Compressed(Snappy),
    ),
    (
        0,
        b"\x1f\x9d\x90",
        "data of compress (.Z)",
        Compressed(Compress),
    ),
    (0, b"hibr", "a hibernation file of Windows", Memory),
    (0, b"HIBR", "a hibernation file of Windows", Memory),
    (0, b"wake", "a hibernation file of Windows", Memory),
    (0, b"WAKE", "a hibernation file of Windows", Memory),
    (0, b"RSTR", "a hibernation file of Windows", Memory),
    (0, b"MDMP\x93\xa7", "a minidump of Windows", Minidump),
    (0, b"PAGEDUMP", "a crash dump of Windows (32-bit)", Memory),
    (0, b"PAGEDU64", "a crash dump of Windows (64-bit)", Memory),
    (0, b"EMiL\x01\0\0\0", "a memory dump of LiME", Memory),
    (0, b"AVML\x02\0\0\0", "a memory dump of AVML", Memory),
    (0, b"KDUMP   ", "a kdump of Linux", CoreDump),
    (0, b"DISKDUMP", "a diskdump of Linux", CoreDump),
    (
        0,
        b"makedumpfile\0",
        "a flattened kdump of Linux",
        FlattenedDump,
    ),
    (
        0,
        b"\x7fVirtualBox SavedState V",
        "a saved state of VirtualBox",
        VirtualBoxState,
    ),
    (
        0,
        b"\xd0\xbe\xd2\xbe",
        "a suspended state or snapshot of VMware",
        Memory,
    ),
    (
        0,
        b"\xd1\xba\xd1\xba",
        "a suspended state or snapshot of VMware",
        Memory,
    ),
    (
        0,
        b"\xd2\xbe\xd2\xbe",
        "a suspended state or snapshot of VMware",
        Memory,
    ),
    (
        0,
        b"\xd3\xbe\xd3\xbe",
        "a suspended state or snapshot of VMware",
        Memory,
    ),
    (
        0,
        b"\xed\xeb\x0f\xf0",
        "a core of `xm dump-core` of Xen 3.0 (PV)",
        CoreDump,
    ),
    (
        0,
        b"\xee\xeb\x0f\xf0",
        "a core of `xm dump-core` of Xen 3.0 (HVM)",
        CoreDump,
    ),
    (
        0,
        b"\x53\xff\0\xf0\x53\xff\0\xf0",
        "raw physical memory of a PC",
        Memory,
    ),
    (0, b"<?xml ", "an XML document", Description),
    (0, b"<!DOCTYPE", "a document in HTML or XML", Other),
    (0, b"hsqs", "a squashfs file system", Disk),
    (0, b"XFSB\0\0", "an XFS file system", Disk),
    (
        0,
        b"LUKS\xba\xbe",
        "an encrypted volume (LUKS)",
        Encrypted(Luks),
    ),
    (
        0,
        b"age-encryption.org/v1",
        "a file encrypted with age",
        Encrypted(Age),
    ),
    (
        0,
        b"-----BEGIN AGE ENCRYPTED FILE-----",
        "a file encrypted with age",
        Encrypted(Age),
    ),
    (
        0,
        b"-----BEGIN PGP ",
        "a file armoured by PGP",
        Encrypted(Pgp),
    ),
    (
        0,
        b"Salted__",
        "a file encrypted with openssl enc",
        Encrypted(OpenSsl),
    ),
    (
        0,
        b"U2FsdGVkX1",
        "a file encrypted with openssl enc -a",
        Encrypted(OpenSslBase64),
    ),
    (
        0,
        b"version https://git-lfs.github.com/spec/v1",
        "a pointer of Git LFS",
        LfsPointer,
    ),
    (0, b"MZ", "a program of Windows or DOS", Other),
    (0, b"%PDF-", "a PDF document", Other),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", Other),
    (0, b"\xff\xd8\xff", "a JPEG picture", Other),
    (0, b"SQLite format 3\0", "an SQLite database", Other),
    (0, b"#!", "a script", Other),
];

/// Formats with a magic further in.
const FURTHER_IN: &[Known] = &[
    (257, b"ustar", "a tar archive", Tar),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI disk image", DiskImage),
    (512, b"LABELONE", "a physical volume of LVM", Disk),
    (0, b"LABELONE", "a physical volume of LVM", Disk),
    (512, b"EFI PART", "a disk with partitions (GPT)", Disk),
    (4096, b"EFI PART", "a disk with partitions (GPT)", Disk),
    (3, b"NTFS    ", "an NTFS file system", Disk),
    (0x36, b"FAT1", "a FAT file system", Disk),
    (0x52, b"FAT32   ", "a FAT file system", Disk),
    (0x8001, b"CD001", "a CD or DVD image (ISO 9660)", Disk),
    (0x8001, b"BEA01", "a DVD image (UDF)", Disk),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system", Disk),
    (4086, b"SWAPSPACE2", "a swap area of Linux", Other),
    (4086, b"S1SUSPEND", "a hibernation image of Linux", Memory),
    (4086, b"LINHIB0001", "a hibernation image of Linux", Memory),
];

fn has(prefix: &[u8], at: usize, magic: &[u8]) -> bool {
    prefix.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

fn known(table: &[Known], prefix: &[u8]) -> Option<Foreign> {
    table
        .iter()
        .find(|(at, magic, ..)| has(prefix, *at, magic))
        .map(|(_, _, name, kind)| Foreign { name, kind: *kind })
}

/// Detects a format by its first bytes.
pub(super) fn by_its_start(prefix: &[u8]) -> Option<Foreign> {
    elf(prefix).or_else(|| known(AT_START, prefix))
}

/// Detects a format by a magic further in, or by looking like text.
pub(super) fn by_the_rest(prefix: &[u8]) -> Option<Foreign> {
    known(FURTHER_IN, prefix)
        .or_else(|| partitions(prefix))
        .or_else(|| ext(prefix))
        .or_else(|| lzma(prefix))
        .or_else(|| zlib(prefix))
        .or_else(|| text(prefix))
}

/// Detects a format by the last 512 bytes of a file: a VHD of fixed size has its magic only there.
pub fn by_its_end(last: &[u8]) -> Option<Foreign> {
    last.starts_with(b"conectix").then_some(Foreign {
        name: "a VHD disk image",
        kind: Vhd,
    })
}

/// An ELF file: its layout tells which program made it.
fn elf(prefix: &[u8]) -> Option<Foreign> {
    const CORE_TYPE: u16 = 4;
    if !prefix.starts_with(b"\x7fELF") {
        return None;
    }
    let word = |at: usize| {
        let end = at.checked_add(2)?;
        let word: [u8; 2] = prefix.get(at..end)?.try_into().ok()?;
        Some(match prefix.get(5) {
            Some(2) => u16::from_be_bytes(word),
            _ => u16::from_le_bytes(word),
        })
    };
    let headers = match prefix.get(4) {
        Some(1) => word(44),
        _ => word(56),
    };
    let (name, kind) = match (word(16), headers) {
        (Some(CORE_TYPE), Some(0)) => ("an ELF core of a Xen guest", CoreDump),
        (Some(CORE_TYPE), _) => ("an ELF core with program headers", CoreDump),
        _ => ("an ELF program, library or object", Other),
    };
    Some(Foreign { name, kind })
}

/// A boot sector: its mark, and entries that are each used or empty.
fn partitions(prefix: &[u8]) -> Option<Foreign> {
    const ENTRIES: usize = 446;
    const BYTES: usize = 16;
    let table = prefix.get(ENTRIES..510)?;
    let marked = has(prefix, 510, b"\x55\xaa");
    let possible = table
        .chunks_exact(BYTES)
        .all(|entry| matches!(entry.first(), Some(0 | 0x80)));
    (marked && possible).then_some(Foreign {
        name: "a disk with a boot sector (MBR)",
        kind: Disk,
    })
}

/// The superblock of ext2, 3 or 4. Its magic has only two bytes, so the fields next to it are
/// checked as well.
fn ext(prefix: &[u8]) -> Option<Foreign> {
    const SUPERBLOCK: usize = 1024;
    let block = prefix.get(SUPERBLOCK..)?;
    let small = |at: usize, most: u8| {
        let value = block.get(at).copied().unwrap_or(u8::MAX);
        let end = at.saturating_add(4);
        let rest = block.get(at.saturating_add(1)..end).unwrap_or(b"\xff");
        value <= most && rest.iter().all(|byte| *byte == 0)
    };
    // s_magic, s_log_block_size, s_first_data_block, s_rev_level.
    let found = has(block, 0x38, b"\x53\xef") && small(24, 6) && small(20, 1) && small(76, 1);
    found.then_some(Foreign {
        name: "an ext2, ext3 or ext4 file system",
        kind: Disk,
    })
}

/// The old lzma format has no magic: properties, dictionary size, size.
fn lzma(prefix: &[u8]) -> Option<Foreign> {
    let (head, size) = prefix.get(..13)?.split_at(5);
    let (properties, dictionary) = head.split_first()?;
    let dictionary = u32::from_le_bytes(dictionary.try_into().ok()?);
    let size = u64::from_le_bytes(size.try_into().ok()?);
    let possible = *properties == 0x5d
        && dictionary >= 1 << 12
        && dictionary.count_ones() <= 2
        && (size == u64::MAX || (1..1 << 45).contains(&size));
    possible.then_some(Foreign {
        name: "data compressed with lzma",
        kind: Compressed(Lzma),
    })
}

/// The only magic of zlib is a checksum of five bits, so only the usual settings are accepted.
fn zlib(prefix: &[u8]) -> Option<Foreign> {
    let found = [b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"]
        .iter()
        .any(|magic| prefix.starts_with(*magic));
    // The type of the first block: 0, 1 or 2.
    let possible = prefix
        .get(2)
        .is_some_and(|byte| byte >> 1 & 3 != 3 && *byte != 0);
    (found && possible).then_some(Foreign {
        name: "data compressed with zlib, by its first two bytes",
        kind: Compressed(Zlib),
    })
}

/// Lines of equal length that use only base64's alphabet.
fn is_base64(text: &[u8]) -> bool {
    const SHORTEST: usize = 60;
    let digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    let lines = text.split(|byte| *byte == b'\n');
    let mut lines = lines.map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    first.len() >= SHORTEST
        && first.iter().all(digit)
        && lines.all(|line| line.len() <= first.len() && line.iter().all(digit))
}

/// Text, and its kind.
fn text(prefix: &[u8]) -> Option<Foreign> {
    const LOOKED_AT: usize = 4096;
    let looked_at = prefix.get(..LOOKED_AT).unwrap_or(prefix);
    let start = looked_at.trim_ascii_start();
    let printable = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..);
    if start.is_empty() || !looked_at.iter().all(printable) {
        return None;
    }
    // In any character set, most of it is ASCII.
    let ascii = looked_at.iter().filter(|byte| byte.is_ascii()).count();
    if ascii < looked_at.len().div_ceil(2) {
        return None;
    }
    let (name, kind) = match start {
        [b'<', ..] => ("an XML document", XmlDescription),
        [b'{' | b'[', ..] => ("JSON", JsonConfiguration),
        [b'(', ..] => ("an s-expression, as xend kept configurations", Description),
        _ if is_base64(start) => ("base64 text", Base64),
        _ => ("text", Configuration),
    };
    Some(Foreign { name, kind })
}
