//! Detection of a file's format from its first bytes.
//!
//! A pure function of a prefix that the caller has peeked at: nothing is consumed. Formats with a
//! magic are recognised by it. A legacy libxc stream has none, and is detected last, if its first
//! words are possible (see [`legacy::detect`](crate::legacy::detect)).
//!
//! | first bytes | format |
//! |---|---|
//! | `Xen saved domain, xl format\n \0 \r` | xl |
//! | `libvirt-xml\n \0 \r` | libvirt |
//! | `XenSavedDomv2-\n` | xapi |
//! | `XenSavedDomain\n` | xapi, before XenServer 6.5 |
//! | `LinuxGuestRecord` | xend |
//! | `LibxlFmt` | libxl stream |
//! | FF × 8, `XENF` | libxc stream |
//! | `ova.xml\0` | XVA: the name of a tar archive's first member |
//! | a compressor's magic | compressed |
//! | another program's magic | that program's format: see [`foreign`] |
//! | possible legacy words | legacy stream |

use std::fmt;

use self::foreign::Foreign;
use crate::legacy::detect::{self as legacy, LegacyStart};
use crate::wrapper::{libvirt, xapi, xend, xl};

pub mod foreign;

/// How many bytes to peek at: with this many (or the whole of a shorter file) the answer is final
/// for every readable format. To name other formats, peek at [`foreign::ENOUGH`].
pub const ENOUGH: usize = 32;

const LIBXL: &[u8] = b"LibxlFmt";
const LIBXL_WITH_VERSION: &[u8] = b"LibxlFmt\0\0\0\x02";
const LZ4_LEGACY: &[u8] = b"\x02\x21\x4c\x18";
const XVA: &[u8] = b"ova.xml\0";
const LIBXC: &[u8] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF";

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detected {
    /// A file of `xl save`.
    Xl,
    /// A file of libvirt's xl driver.
    Libvirt,
    /// A suspend image of xapi.
    Xapi,
    /// A suspend image of xapi, from XenServer before 6.5.
    XapiLegacy,
    /// A file of `xm save`.
    Xend,
    /// A VM that xapi exported, in which there may be a suspend image.
    Xva,
    /// A libxl stream, version 2.
    Libxl,
    /// A libxc stream, version 2 or 3.
    Libxc,
    /// A libxc stream of Xen 4.5 or earlier.
    Legacy(LegacyStart),
    /// A compressed file.
    Compressed(Compression),
    /// A file that is encrypted by age.
    Encrypted,
    /// A known format that is not a saved domain.
    Foreign(Foreign),
    /// Nothing: the file is empty.
    Empty,
    /// None of these.
    Unknown,
}

/// A compression format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// xz.
    Xz,
    /// LZ4 frame.
    Lz4,
    /// bzip2.
    Bzip2,
}

impl Compression {
    const ALL: [Self; 5] = [Self::Gzip, Self::Zstd, Self::Xz, Self::Lz4, Self::Bzip2];

    /// The format's magic.
    const fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => b"\x1f\x8b\x08",
            Self::Zstd => b"\x28\xb5\x2f\xfd",
            Self::Xz => b"\xfd7zXZ\0",
            Self::Lz4 => b"\x04\x22\x4d\x18",
            Self::Bzip2 => b"BZh",
        }
    }

    /// Whether a file begins as this format does.
    fn begins(self, prefix: &[u8]) -> bool {
        if !prefix.starts_with(self.magic()) {
            return false;
        }
        match (self, prefix.get(3..)) {
            // Three of the flag bits are reserved.
            (Self::Gzip, Some([flags, ..])) => flags & 0xe0 == 0,
            // A digit, then the mark of a block or of the end; a short file may hold only a part of
            // it.
            (Self::Bzip2, Some([level, rest @ ..])) => {
                let rest = rest.get(..6).unwrap_or(rest);
                let marks = [b"1AY&SY", b"\x17rE8P\x90"];
                level.is_ascii_digit() && marks.iter().any(|mark| mark.starts_with(rest))
            }
            _ => true,
        }
    }

    /// Skippable frames of zstd and lz4 have the same magic, so what follows them decides.
    fn behind_skippable(mut prefix: &[u8]) -> Option<Self> {
        loop {
            let (head, rest) = prefix.split_first_chunk::<8>()?;
            let [kind, 0x2a, 0x4d, 0x18, length @ ..] = head else {
                return None;
            };
            if kind & 0xf0 != 0x50 {
                return None;
            }
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            prefix = match rest.get(length..) {
                Some(rest) if !rest.is_empty() => rest,
                // Zstd's reader will report what follows.
                _ => return Some(Self::Zstd),
            };
            let next = [Self::Zstd, Self::Lz4];
            if let Some(found) = next.into_iter().find(|found| found.begins(prefix)) {
                return Some(found);
            }
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
        })
    }
}

/// The first line of a file of age.
const AGE: &[u8] = b"age-encryption.org/v1\n";

/// Detects a file's format from its first [`ENOUGH`] bytes, or all it has.
///
/// A file that ends inside a magic is detected as the format with that magic (the longest that
/// fits). Its reader then reports where the file is truncated.
///
/// ```
/// use xsr_format::detect::{Compression, Detected, detect};
///
/// assert_eq!(detect(b"LibxlFmt\0\0\0\x02"), Detected::Libxl);
/// let Detected::Compressed(compression) = detect(b"\x28\xb5\x2f\xfd....") else { panic!() };
/// assert_eq!(compression, Compression::Zstd);
/// assert_eq!(compression.to_string(), "zstd");
/// ```
pub fn detect(prefix: &[u8]) -> Detected {
    if prefix.is_empty() {
        return Detected::Empty;
    }
    let named = [
        (xl::MAGIC.as_slice(), Detected::Xl),
        (libvirt::MAGIC.as_slice(), Detected::Libvirt),
        (xapi::MAGIC.as_slice(), Detected::Xapi),
        (xapi::LEGACY_MAGIC.as_slice(), Detected::XapiLegacy),
        (xend::MAGIC.as_slice(), Detected::Xend),
        (LIBXL, Detected::Libxl),
        (LIBXC, Detected::Libxc),
        (AGE, Detected::Encrypted),
    ];
    for (magic, what) in named {
        if prefix.starts_with(magic) || magic.starts_with(prefix) {
            return what;
        }
    }
    if prefix.starts_with(XVA) {
        return Detected::Xva;
    }
    for compression in Compression::ALL {
        if compression.begins(prefix) {
            return Detected::Compressed(compression);
        }
    }
    if let Some(compression) = Compression::behind_skippable(prefix) {
        return Detected::Compressed(compression);
    }
    // LZ4's old format, whose frames have no header.
    if prefix.starts_with(LZ4_LEGACY) {
        return Detected::Compressed(Compression::Lz4);
    }
    if let Some(foreign) = foreign::by_its_start(prefix) {
        return Detected::Foreign(foreign);
    }
    match legacy::detect_in(prefix) {
        Some(start) => Detected::Legacy(start),
        None => match foreign::by_the_rest(prefix) {
            Some(foreign) => Detected::Foreign(foreign),
            None => Detected::Unknown,
        },
    }
}

/// Finds the first image inside other data: the offset of its magic, and its format. Legacy streams
/// have no magic and are not found; nor are compressed images.
pub fn find(bytes: &[u8]) -> Option<(usize, Detected)> {
    let magics = [
        (xl::MAGIC.as_slice(), Detected::Xl),
        (libvirt::MAGIC.as_slice(), Detected::Libvirt),
        (xapi::MAGIC.as_slice(), Detected::Xapi),
        (xapi::LEGACY_MAGIC.as_slice(), Detected::XapiLegacy),
        (xend::MAGIC.as_slice(), Detected::Xend),
        (LIBXL_WITH_VERSION, Detected::Libxl),
        (LIBXC, Detected::Libxc),
    ];
    (0..bytes.len()).find_map(|at| {
        let rest = bytes.get(at..)?;
        let (_, what) = magics.iter().find(|(magic, _)| rest.starts_with(magic))?;
        Some((at, *what))
    })
}

impl Detected {
    /// Whether [`Walk`](crate::walk::Walk) reads the format directly.
    pub const fn is_readable(self) -> bool {
        matches!(self, Self::Xl | Self::Libxl | Self::Libxc)
    }
}

impl fmt::Display for Detected {
    /// The format's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xl => f.write_str("domain saved by xl"),
            Self::Libxl => f.write_str("bare libxl stream"),
            Self::Libxc => f.write_str("bare libxc stream"),
            Self::Libvirt => f.write_str("domain saved by libvirt"),
            Self::Xapi => f.write_str("suspend image of xapi"),
            Self::XapiLegacy => f.write_str("suspend image of XenServer before 6.5"),
            Self::Xend => f.write_str("domain saved by xend, with xm save"),
            Self::Xva => f.write_str("VM exported by xapi (XVA)"),
            Self::Legacy(start) => write!(
                f,
                "legacy libxc stream of {:#x} frames, written by a {}",
                start.p2m_size, start.width
            ),
            Self::Compressed(compression) => write!(f, "compressed with {compression}"),
            Self::Encrypted => f.write_str("encrypted with age"),
            Self::Foreign(foreign) => write!(f, "it is {foreign}"),
            Self::Empty => f.write_str("the file is empty"),
            Self::Unknown => f.write_str(
                "it begins like nothing that is known here (or it is damaged in its first bytes)",
            ),
        }
    }
}
