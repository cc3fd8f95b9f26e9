//! Fuzz target for the headers and records of other toolstacks: libvirt's header is written as it
//! was read; xapi's records give the same libxl stream for any size of reads, with the libxc stream
//! in it byte for byte, and nothing is read after the last record.

#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use xsr_format::detect::{Detected, detect};
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;
use xsr_format::wrapper::libvirt::LibvirtHeader;
use xsr_format::wrapper::xapi::{XapiRecord, XapiSource};

/// Panics if more is requested than the file has.
struct Guarded<'a>(&'a [u8]);

impl Read for Guarded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() <= self.0.len(), "read beyond the last record");
        self.0.read(room)
    }
}

fn libvirt(bytes: &[u8]) {
    for lenient in [false, true] {
        let options = ReadOptions { lenient, offset: 0 };
        let mut rest = bytes;
        let header = LibvirtHeader::read(&mut rest, options);
        let (known, mut behind) = bytes.split_at(bytes.len().min(16));
        let again = LibvirtHeader::read_behind(known, &mut behind, options);
        match (header, again) {
            (Ok(header), Ok(again)) => {
                assert_eq!(header, again);
                let used = bytes.len() - rest.len();
                assert_eq!(rest, behind);
                assert_eq!(header.bytes(), used as u64);
                let encoded = header.encode();
                match lenient {
                    false => assert_eq!(encoded, bytes[..used]),
                    true => assert_eq!(encoded.len(), used),
                }
            }
            (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
            (a, b) => panic!("{a:?} or {b:?}"),
        }
    }
}

/// The libxl stream made of xapi's records, read in steps of `step`.
fn xapi<R: Read>(source: R, step: usize) -> (Vec<u8>, Vec<XapiRecord>, Option<String>) {
    let mut out = Vec::new();
    let mut source = match XapiSource::behind(&[], source) {
        Ok(source) => source,
        Err(e) => return (out, Vec::new(), Some(e.to_string())),
    };
    let mut room = vec![0; step];
    let error = loop {
        match source.read(&mut room) {
            Ok(0) => break None,
            Ok(n) => out.extend_from_slice(&room[..n]),
            Err(e) => break Some(e.to_string()),
        }
    };
    assert!(source.read(&mut room).is_err() || error.is_none());
    (out, source.records().to_vec(), error)
}

fuzz_target!(|bytes: &[u8]| {
    libvirt(bytes);
    let said = xapi(bytes, 64 << 10);
    assert_eq!(said, xapi(bytes, 13));
    let (stream, records, error) = said;
    if let (None, Some(last)) = (&error, records.last()) {
        let end = usize::try_from(last.offset).unwrap() + 16;
        assert_eq!(xapi(Guarded(&bytes[..end]), 64 << 10).2, None);
    }
    if !stream.is_empty() {
        assert_eq!(detect(&stream), Detected::Libxl);
        let options = ReadOptions::default();
        let mut walk = Walk::open(stream.as_slice(), options).unwrap();
        while let Ok(Some(_)) = walk.next_step() {}
        // A valid stream is as long as what the walk has read.
        if walk.next_step().is_ok_and(|step| step.is_none()) {
            assert_eq!(walk.offset(), stream.len() as u64);
        }
    }
});
