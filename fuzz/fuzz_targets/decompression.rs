//! Fuzz target for compressed files: the output does not depend on the size of reads; errors are
//! reported as damage, since the source never fails; and data compressed here decompresses to the
//! original. `cargo xtask fuzz` limits single allocations and the process's memory, so a bomb that
//! takes more is a finding.

#![no_main]

use std::io::{self, Cursor, Read, Write};

use libfuzzer_sys::fuzz_target;
use xsr_format::detect::{Compression, Detected, detect};

/// As in the command, whose source file is compiled into this target.
type Source = Box<dyn Read + Send>;

/// The command's words about an invalid image.
mod exit {
    /// The program that undoes a compression, for a message.
    pub(crate) fn decompressor(_: xsr_format::detect::Compression) -> &'static str {
        "another program"
    }

    /// The image is invalid.
    #[derive(Debug)]
    pub(crate) struct BadImage(pub(crate) String);

    impl std::fmt::Display for BadImage {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(&self.0)
        }
    }

    impl std::error::Error for BadImage {}

    /// The command line is wrong.
    #[derive(Debug)]
    pub(crate) struct BadUsage(pub(crate) String);

    impl std::fmt::Display for BadUsage {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(&self.0)
        }
    }

    impl std::error::Error for BadUsage {}
}

#[allow(dead_code, unused_imports, reason = "the command uses all of it")]
#[path = "../../cli/src/age.rs"]
mod age;

#[path = "../../cli/src/peel/compression.rs"]
mod compression;
#[allow(dead_code, reason = "the command uses all of it")]
#[path = "../../cli/src/peel/packed.rs"]
mod packed;
#[allow(dead_code, unused_imports, reason = "the command uses all of it")]
#[path = "../../cli/src/text.rs"]
mod text;
#[path = "../../cli/src/peel/zstd.rs"]
mod zstd;

/// Bytes of output that are looked at: a bomb never ends.
const LIMIT: u64 = 4 << 20;

/// The first bytes of output, read in steps of `step`, and the error that ended them.
fn out_of(compression: Compression, bytes: &[u8], step: usize) -> (Vec<u8>, Option<String>) {
    let mut out = Vec::new();
    let source: Source = Box::new(Cursor::new(bytes.to_vec()));
    let (notes, windows) = (
        compression::Notes::default(),
        compression::Windows::default(),
    );
    let decoder = match compression::decompressed(compression, source, &notes, &windows) {
        Ok((decoder, _)) => decoder,
        Err(e) => return (out, Some(e.to_string())),
    };
    let mut decoder = decoder.take(LIMIT);
    let mut room = vec![0; step];
    let error = loop {
        match decoder.read(&mut room) {
            Ok(0) => break None,
            Ok(n) => out.extend_from_slice(&room[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                assert!(compression::is_damage(&e), "{e:?}");
                break Some(e.to_string());
            }
        }
    };
    (out, error)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut out = lz4_flex::frame::FrameEncoder::new(Vec::new());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fuzz_target!(|bytes: &[u8]| {
    if let Detected::Compressed(compression) = detect(bytes) {
        let (whole, error) = out_of(compression, bytes, 64 << 10);
        let (pieces, again) = out_of(compression, bytes, 4093);
        // If the file is damaged, smaller reads may return more bytes before the error.
        assert_eq!(error.is_some(), again.is_some());
        let common = whole.len().min(pieces.len());
        assert!(whole[..common] == pieces[..common]);
        if error.is_none() {
            assert_eq!(whole.len(), pieces.len());
        }
    }
    for (compression, packed) in [
        (Compression::Gzip, gzip(bytes)),
        (Compression::Lz4, lz4(bytes)),
    ] {
        let (out, error) = out_of(compression, &packed, 64 << 10);
        assert_eq!(error, None);
        assert!(out == bytes, "{compression}: other bytes come back");
        // A truncated file is damaged.
        if let Some((_, short)) = packed.split_last() {
            let (out, _) = out_of(compression, short, 64 << 10);
            assert!(bytes.starts_with(&out));
        }
    }
});
