//! Fuzz target for legacy streams: a seekable source gives the same pieces and the same error; the
//! converted bytes do not depend on the size of reads, and are an image that the reader of version
//! 3 accepts.

#![no_main]

use std::io::{self, Cursor, Read};

use libfuzzer_sys::fuzz_target;
use xsr_format::error::{DecodeError, Position, ReadError, ReadErrorCause};
use xsr_format::legacy::convert::{Summary, survey};
use xsr_format::legacy::{
    Checkpoints, Converted, LegacyGuest, LegacyOptions, LegacyReader, Target,
};
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;

/// The pieces, and the final error.
type Pieces = (Vec<(Position, String)>, Option<String>);

fn pieces<R: Read>(reader: Result<LegacyReader<R>, ReadError>) -> Pieces {
    let mut said = Vec::new();
    let read = || -> Result<(), ReadError> {
        let mut reader = reader?;
        while let Some(item) = reader.next_item()? {
            said.push((reader.position(), format!("{item:?}")));
        }
        Ok(())
    };
    let error = read().err().map(|e| format!("{:?} {e}", e.position));
    (said, error)
}

/// The converted bytes, read in steps of `step`, the summary, and the final error.
fn converted(
    bytes: &[u8],
    options: LegacyOptions,
    target: Target,
    step: usize,
) -> (Vec<u8>, Option<Summary>, Option<String>) {
    let mut out = Vec::new();
    let spool = Box::new(Cursor::new(Vec::new()));
    let made = LegacyReader::new(bytes, options)
        .and_then(|reader| Converted::new(reader, target, Some(spool)));
    let mut source = match made {
        Ok(source) => source,
        Err(e) => return (out, None, Some(e.to_string())),
    };
    let mut room = vec![0; step];
    let error = loop {
        match source.read(&mut room) {
            Ok(0) => break None,
            Ok(n) => out.extend_from_slice(&room[..n]),
            Err(e) => break Some(e.to_string()),
        }
    };
    (out, Some(source.summary().clone()), error)
}

/// Reads an image to its end.
fn walked(bytes: &[u8]) -> Result<u64, ReadError> {
    let options = ReadOptions::default();
    let mut walk = Walk::open(bytes, options)?;
    while walk.next_step()?.is_some() {}
    Ok(walk.offset())
}

/// Whether the error concerns the guest's state, not the structure of the stream.
fn is_of_contents(error: &ReadError) -> bool {
    matches!(
        error.cause,
        ReadErrorCause::Decode(
            DecodeError::HvmContext(_)
                | DecodeError::VcpuNumber { .. }
                | DecodeError::HvmParamIndex { .. }
                | DecodeError::PfnRange { .. }
                | DecodeError::P2mGap { .. }
                | DecodeError::P2mLeafShared { .. }
                | DecodeError::StateTooLong { .. }
                | DecodeError::TscMode { .. }
        )
    )
}

fn check(bytes: &[u8], options: LegacyOptions) {
    let said = pieces(LegacyReader::new(bytes, options));
    let seeking = pieces(LegacyReader::seeking(Cursor::new(bytes), options));
    assert_eq!(said, seeking);
    for target in [
        Target::Libxl,
        Target::Libxc {
            device_model: false,
        },
    ] {
        let whole = converted(bytes, options, target, 64 << 10);
        let pieces = converted(bytes, options, target, 997);
        assert!(whole == pieces, "it depends on how it is read");
        let (image, Some(summary), None) = whole else {
            continue;
        };
        match walked(&image) {
            Ok(end) => assert_eq!(end, image.len() as u64),
            // Contents of records are passed on unchanged; a restore refuses them.
            Err(e) if is_of_contents(&e) => continue,
            Err(e) => panic!("converted to what is no image: {e}"),
        }
        // Without a spool, as for a file.
        let found = survey(Cursor::new(bytes), options).unwrap();
        assert_eq!(found.complete, summary.checkpoints);
        assert_eq!(found.incomplete.is_some(), summary.incomplete.is_some());
        let options = LegacyOptions {
            checkpoints: Checkpoints::UpTo(found.complete),
            ..options
        };
        let reader = LegacyReader::new(bytes, options).unwrap();
        let mut plain = Converted::new(reader, target, None).unwrap();
        let copied = io::copy(&mut plain, &mut io::sink());
        assert!(copied.is_ok(), "{copied:?} without a spool");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let options = LegacyOptions::default();
    check(bytes, options);
    for guest in [LegacyGuest::Pv, LegacyGuest::Hvm] {
        let told = LegacyReader::new(bytes, options).map(|reader| reader.guest());
        if told.ok() != Some(guest) {
            let options = LegacyOptions {
                guest: Some(guest),
                lenient: true,
                device_model: false,
                ..options
            };
            check(bytes, options);
        }
    }
});
