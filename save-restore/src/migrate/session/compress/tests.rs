//! What is compressed, and when `auto` does it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

fn text() -> Vec<u8> {
    let lines = (0..).flat_map(|n: u32| format!("line {n}\n").into_bytes());
    lines.take(CHUNK).collect()
}

/// Bytes without a pattern.
fn noise() -> Vec<u8> {
    let next = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        Some(state.to_le_bytes()[3])
    };
    let mut state = 0x9E37_79B9_7F4A_7C15;
    std::iter::from_fn(|| next(&mut state))
        .take(CHUNK)
        .collect()
}

#[test]
fn contents_travel_in_their_shortest_form() {
    let mut compressor = Compressor::new();
    let zstd = Policy::new(Compression::Zstd(3));
    let contents = text();
    let Contents::Zstd { length, frame } = compressor.pack(&contents, &zstd) else {
        panic!("it is compressible");
    };
    assert_eq!(length, contents.len());
    assert!(frame.len() < contents.len() / 4);
    let unpacked = Decompressor::new().unpack(0, length, frame).unwrap();
    assert!(unpacked == contents);
    let noise = noise();
    assert_eq!(compressor.pack(&noise, &zstd), Contents::Plain(&noise));
    assert_eq!(compressor.pack(b"x", &zstd), Contents::Plain(b"x"));
    let zeroes = vec![0; CHUNK];
    assert_eq!(compressor.pack(&zeroes, &zstd), Contents::Zeroes(CHUNK));
    let none = Policy::new(Compression::None);
    assert_eq!(compressor.pack(&zeroes, &none), Contents::Plain(&zeroes));
}

#[test]
fn a_frame_of_another_length_than_stated_is_refused() {
    let mut compressor = Compressor::new();
    let contents = text();
    let zstd = Policy::new(Compression::Zstd(1));
    let Contents::Zstd { length, frame } = compressor.pack(&contents, &zstd) else {
        panic!("it is compressible");
    };
    let mut decompressor = Decompressor::new();
    for wrong in [1, length - 1] {
        let refused = decompressor.unpack(7, wrong, frame);
        assert_eq!(refused, Err(Malformed::Compressed(7)));
    }
    let cut = decompressor.unpack(7, length, &frame[..frame.len() - 1]);
    assert_eq!(cut, Err(Malformed::Compressed(7)));
}

/// Sends chunks; returns how many of the last 100 were compressed.
fn with_auto(policy: &Policy, write: Duration, compress: Duration) -> u32 {
    let mut compressed = 0;
    for n in 0..1000 {
        let left = match policy.level(CHUNK) {
            None => CHUNK,
            Some(_) => {
                compressed += u32::from(n >= 900);
                policy.compressed(CHUNK, CHUNK / 4, compress);
                CHUNK / 4
            }
        };
        policy.written(left, write * u32::try_from(left / 1024).unwrap());
    }
    compressed
}

#[test]
fn auto_compresses_where_the_link_is_slower_and_only_there() {
    let slow = Duration::from_micros(8);
    let fast = Duration::from_nanos(300);
    let compress = Duration::from_micros(256);
    let policy = Policy::new(Compression::Auto);
    assert_eq!(with_auto(&policy, slow, compress), 100);
    // The link has become faster, then slower again; only probes are left in between.
    assert!(with_auto(&policy, fast, compress) <= PROBE);
    assert_eq!(with_auto(&policy, slow, compress), 100);
}

proptest! {
    #[test]
    fn any_bytes_are_decompressed_or_refused(
        length in 1_usize..=CHUNK,
        frame in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(bytes) = Decompressor::new().unpack(0, length, &frame) {
            prop_assert_eq!(bytes.len(), length);
        }
    }
}
