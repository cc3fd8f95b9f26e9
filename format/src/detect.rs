//! What is in a file, told from its first octets.
//!
//! A pure function on a prefix that the caller has peeked at: nothing is consumed.
//! Whatever names itself is recognised by that name; a legacy libxc stream has none
//! and is what is left when its first words are possible (see
//! [`legacy::detect`](crate::legacy::detect)).
//!
//! | first octets | what it is |
//! |---|---|
//! | `Xen saved domain, xl format\n \0 \r` | xl |
//! | `libvirt-xml\n \0 \r` | libvirt |
//! | `XenSavedDomv2-\n` | xapi |
//! | `LibxlFmt` | libxl stream |
//! | FF × 8, `XENF` | libxc stream |
//! | a compressor's magic | compressed |
//! | possible legacy words | legacy stream |

use std::fmt;

use crate::legacy::detect::{self as legacy, LegacyStart};
use crate::wrapper::{libvirt, xapi, xl};

/// How many octets to peek at: with so many (or all there are, of a shorter file)
/// the answer is final. More are not looked at.
pub const ENOUGH: usize = 32;

const LIBXL: &[u8] = b"LibxlFmt";
const LIBXC: &[u8] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF";

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detected {
    /// A file of `xl save`.
    Xl,
    /// A file of libvirt's xl driver.
    Libvirt,
    /// A suspend image of xapi.
    Xapi,
    /// A libxl stream, version 2.
    Libxl,
    /// A libxc stream, version 2 or 3.
    Libxc,
    /// A libxc stream of Xen 4.5 or earlier.
    Legacy(LegacyStart),
    /// Something compressed.
    Compressed(Compression),
    /// Nothing: the file is empty.
    Empty,
    /// None of these.
    Unknown,
}

/// How something is compressed.
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

    /// The first octets of such a file.
    const fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => b"\x1f\x8b\x08",
            Self::Zstd => b"\x28\xb5\x2f\xfd",
            Self::Xz => b"\xfd7zXZ\0",
            Self::Lz4 => b"\x04\x22\x4d\x18",
            Self::Bzip2 => b"BZh",
        }
    }

    /// The command that decompresses it to its standard output.
    pub const fn command(self) -> &'static str {
        match self {
            Self::Gzip => "gzip -dc",
            Self::Zstd => "zstd -dc --long=31",
            Self::Xz => "xz -dc",
            Self::Lz4 => "lz4 -dc",
            Self::Bzip2 => "bzip2 -dc",
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

/// Tell what a file is from its first [`ENOUGH`] octets, or all it has.
///
/// A file that ends inside a name is taken for what that name begins (for the
/// longest such name): its reader then says that, and where, it is truncated.
pub fn detect(prefix: &[u8]) -> Detected {
    if prefix.is_empty() {
        return Detected::Empty;
    }
    let named = [
        (xl::MAGIC.as_slice(), Detected::Xl),
        (libvirt::MAGIC.as_slice(), Detected::Libvirt),
        (xapi::MAGIC.as_slice(), Detected::Xapi),
        (LIBXL, Detected::Libxl),
        (LIBXC, Detected::Libxc),
    ];
    for (magic, what) in named {
        if prefix.starts_with(magic) || magic.starts_with(prefix) {
            return what;
        }
    }
    for compression in Compression::ALL {
        if prefix.starts_with(compression.magic()) {
            return Detected::Compressed(compression);
        }
    }
    match prefix.first_chunk() {
        Some(first) => match legacy::detect(*first) {
            Ok(start) => Detected::Legacy(start),
            Err(_) => Detected::Unknown,
        },
        None => Detected::Unknown,
    }
}

impl Detected {
    /// Whether it is an image of today, as [`Walk`](crate::walk::Walk) reads them.
    pub const fn is_readable(self) -> bool {
        matches!(self, Self::Xl | Self::Libxl | Self::Libxc)
    }
}

impl fmt::Display for Detected {
    /// A name, and what can be done with it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xl => f.write_str("domain saved by xl"),
            Self::Libxl => f.write_str("bare libxl stream"),
            Self::Libxc => f.write_str("bare libxc stream"),
            Self::Libvirt => f.write_str(
                "domain saved by libvirt (virsh restores it; a libxl stream is inside, which \
                 xsr cat takes out)",
            ),
            Self::Xapi => f.write_str(
                "suspend image of xapi (xe resumes it; a libxc stream is inside, which xsr cat \
                 takes out)",
            ),
            Self::Legacy(start) => write!(
                f,
                "legacy libxc stream of {:#x} frames, written by a {} (xsr convert, or Xen's \
                 convert-legacy-stream, makes today's of it)",
                start.p2m_size, start.width
            ),
            Self::Compressed(compression) => write!(
                f,
                "compressed with {compression} (decompress it first: {} FILE | …)",
                compression.command()
            ),
            Self::Empty => f.write_str("empty file"),
            Self::Unknown => f.write_str(
                "neither a saved domain nor anything one is wrapped in (or damaged in its \
                 first octets)",
            ),
        }
    }
}
