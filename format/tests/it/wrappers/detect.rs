//! Tests of format detection from a file's first bytes.

use proptest::prelude::*;
use xsr_format::detect::{Compression, Detected, ENOUGH, detect};
use xsr_format::legacy::detect::{LegacyStart, ToolstackWidth};

use crate::support::images::{self, Image};

const NAMED: [(&[u8], Detected); 5] = [
    (b"Xen saved domain, xl format\n \0 \r", Detected::Xl),
    (b"libvirt-xml\n \0 \r", Detected::Libvirt),
    (b"XenSavedDomv2-\n", Detected::Xapi),
    (b"LibxlFmt", Detected::Libxl),
    (b"\xff\xff\xff\xff\xff\xff\xff\xffXENF", Detected::Libxc),
];

#[test]
fn real_images_and_the_streams_in_them_are_recognised() {
    for Image { name, bytes: image } in images::committed() {
        let libxl = image
            .windows(8)
            .position(|bytes| bytes == b"LibxlFmt")
            .unwrap();
        for (at, what) in [
            (0, Detected::Xl),
            (libxl, Detected::Libxl),
            (libxl + 24, Detected::Libxc),
        ] {
            assert_eq!(detect(&image[at..]), what, "{name} from {at}");
            assert_eq!(detect(&image[at..at + ENOUGH]), what, "{name} from {at}");
            assert!(what.is_readable());
        }
    }
}

/// The reader then reports a truncated file, which is more helpful than "unknown".
#[test]
fn a_file_that_ends_inside_a_name_is_what_the_name_begins() {
    for (magic, what) in NAMED {
        assert!(magic.len() <= ENOUGH);
        for end in 1..=magic.len() {
            let found = detect(&magic[..end]);
            // "L", "X" and "Xen" begin several formats; four bytes begin only one.
            assert!(found == what || end < 4, "{:?} is {found:?}", &magic[..end]);
            assert_ne!(found, Detected::Unknown);
        }
        let mut longer = magic.to_vec();
        longer.extend([0xaa; 40]);
        assert_eq!(detect(&longer), what);
        // The last byte of the magic counts.
        longer[magic.len() - 1] ^= 1;
        assert_ne!(detect(&longer), what);
    }
}

#[test]
fn compressed_files_are_named() {
    for (magic, compression, name) in [
        (&b"\x1f\x8b\x08\x00"[..], Compression::Gzip, "gzip"),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd, "zstd"),
        (b"\xfd7zXZ\x00", Compression::Xz, "xz"),
        (b"\x04\x22\x4d\x18", Compression::Lz4, "lz4"),
        (b"BZh9", Compression::Bzip2, "bzip2"),
    ] {
        let what = detect(magic);
        assert_eq!(what, Detected::Compressed(compression));
        assert_eq!(what.to_string(), format!("compressed with {name}"));
        assert!(!what.is_readable());
    }
}

#[test]
fn legacy_streams_are_what_is_left_if_possible() {
    let legacy = |width, p2m_size| Detected::Legacy(LegacyStart { width, p2m_size });
    for (bytes, what) in [
        // 64-bit toolstack, 32-bit toolstack with a PV and with an HVM guest.
        (
            &b"\x00\x80\x00\x00\x00\x00\x00\x00"[..],
            legacy(ToolstackWidth::Bits64, 0x8000),
        ),
        (
            b"\x00\x80\x00\x00\xff\xff\xff\xff",
            legacy(ToolstackWidth::Bits32, 0x8000),
        ),
        (
            b"\x00\x80\x00\x00\x00\x04\x00\x00",
            legacy(ToolstackWidth::Bits32, 0x8000),
        ),
        // Too short to detect; no magic; all ones without XENF; zeros.
        (b"\x00\x80\x00\x00\x00\x00\x00", Detected::Unknown),
        (b"\x9d\x81sh\xf0\x0a\x9b\x80", Detected::Unknown),
        (b"\xff\xff\xff\xff\xff\xff\xff\xffXENG", Detected::Unknown),
        (&[0; 64], Detected::Unknown),
        (b"", Detected::Empty),
    ] {
        assert_eq!(detect(bytes), what, "{bytes:02x?}");
        assert!(!what.is_readable());
    }
}

#[test]
fn what_is_recognised_but_not_read_is_named() {
    for (bytes, words) in [
        (NAMED[1].0, &["libvirt"][..]),
        (NAMED[2].0, &["xapi"]),
        (
            b"\x00\x80\x00\x00\x00\x00\x00\x00",
            &["legacy", "0x8000", "64-bit"],
        ),
        (b"", &["empty"]),
        (b"hello, world", &["text"]),
    ] {
        let text = detect(bytes).to_string();
        for word in words {
            assert!(text.contains(word), "{text} lacks {word}");
        }
    }
}

proptest! {
    /// No input panics, and bytes beyond the first few never matter for readable formats. (They do
    /// for naming others: text, for example, must be text to its end.)
    #[test]
    fn any_bytes_are_something(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
        let what = detect(&bytes);
        let start = detect(&bytes[..bytes.len().min(ENOUGH)]);
        prop_assert_eq!(what.is_readable(), start.is_readable());
        if what.is_readable() {
            prop_assert_eq!(what, start);
        }
        prop_assert_eq!(what == Detected::Empty, bytes.is_empty());
    }
}
