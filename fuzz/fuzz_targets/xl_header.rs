//! Fuzz target for the xl header: what is read is written again byte for byte, nothing is read
//! beyond it, and its accessors are consistent.

#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::xl::XlHeader;

/// Panics if more is requested than there is.
struct Guarded<'a>(&'a [u8]);

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.0.len(), "read beyond the header");
        self.0.read(room)
    }
}

fuzz_target!(|bytes: &[u8]| {
    let read = |lenient| {
        let options = ReadOptions {
            lenient,
            ..ReadOptions::default()
        };
        XlHeader::read(bytes, options)
    };
    let (strict, lenient) = (read(false), read(true));
    if let Ok(header) = &strict {
        assert_eq!(lenient.as_ref().ok(), Some(header));
    }
    match lenient {
        Err(e) => {
            assert!(e.is_bad_image());
            assert!(e.position.offset <= bytes.len() as u64);
            drop(e.to_string());
        }
        Ok(header) => {
            let encoded = header.encode();
            assert_eq!(header.bytes(), encoded.len() as u64);
            assert_eq!(encoded, bytes[..encoded.len()]);
            let options = ReadOptions {
                lenient: true,
                ..ReadOptions::default()
            };
            let again = XlHeader::read(Guarded(&encoded), options);
            assert_eq!(again.as_ref().ok(), Some(&header));
            // The optional data consist of the length field, the configuration and the tail.
            let config = header.config().map_or(0, <[u8]>::len);
            let tail = header.optional_tail().len();
            let optional = encoded.len() - XlHeader::FIXED_BYTES;
            assert!(optional == 0 || optional == 4 + config + tail);
            if let Ok(Some(json)) = header.json() {
                assert!(!json.contains('\0'));
                assert_eq!(json.len() + 1, config);
            }
        }
    }
});
