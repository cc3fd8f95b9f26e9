//! xapi's suspend images.

use std::io::Read;

use xsr_format::wrapper::xapi::{MAGIC, XapiKind, XapiSource};

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
