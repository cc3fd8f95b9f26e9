//! xapi's suspend images.

use std::io::Read;

use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::wrapper::xapi::{MAGIC, XapiError, XapiKind, XapiSource};

/// A caller that keeps them needs room for one of each type.
#[test]
fn the_state_of_a_device_comes_once() {
    let records = |kinds: &[XapiKind]| {
        let mut image = MAGIC.to_vec();
        for kind in kinds {
            for word in [kind.0, 3] {
                image.extend(word.to_le_bytes());
            }
            image.extend(b"abc");
        }
        image
    };
    let failed = |kinds: &[XapiKind]| {
        let image = records(kinds);
        let mut source = XapiSource::behind(&[], &image[..]).unwrap();
        let error = source.read_to_end(&mut Vec::new()).unwrap_err();
        let error = error.into_inner().unwrap().downcast::<ReadError>().unwrap();
        error.cause
    };
    let states = [
        XapiKind::DEMU,
        XapiKind::VARSTORED,
        XapiKind::SWTPM0,
        XapiKind::SWTPM,
    ];
    // One of each: the image ends then, where the next record is due.
    let ends = failed(&states);
    assert!(
        matches!(ends, ReadErrorCause::Truncated { needed: 16 }),
        "{ends:?}"
    );
    for kind in states {
        let cause = failed(&[kind, XapiKind::XENOPS, kind]);
        let repeated = ReadErrorCause::from(XapiError::RepeatedState { kind });
        assert_eq!(cause.to_string(), repeated.to_string());
    }
}

/// An image that ends inside an emulator's state, whose padding is then never due.
#[test]
fn a_source_that_failed_gives_no_more() {
    const BYTES: u64 = 5;
    for had in 0..BYTES {
        let mut image = MAGIC.to_vec();
        for word in [XapiKind::QEMU_XEN.0, BYTES] {
            image.extend(word.to_le_bytes());
        }
        image.extend(vec![0x71; had as usize]);
        let mut source = XapiSource::behind(&[], &image[..]).unwrap();
        let mut stream = Vec::new();
        let error = source.read_to_end(&mut stream).unwrap_err();
        assert!(error.to_string().contains("ends inside it"), "{error}");
        assert_eq!(
            stream.split_off(stream.len() - had as usize),
            vec![0x71; had as usize]
        );
        let again = source.read(&mut [0; 16]).unwrap_err();
        assert!(format!("{again:?}").contains("failed earlier"), "{again:?}");
    }
}
