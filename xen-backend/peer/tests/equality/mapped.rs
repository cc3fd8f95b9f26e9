//! Images in the mapped layout: each engine restores one to the same machine as the stream that it
//! was made from. To both it is an ordinary stream with entries of type XTAB.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};

use xsr_format::layout::MappedWriter;
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{CopyError, Layer, transcode};
use xsr_format::walk::Walk;
use xsr_xen_backend::GuestKind;
use xsr_xen_backend::mock::MockHost;

use super::{MIB, PAGE_DATA, PAGE_SIZE, driver, helpers, records, save, working};
use crate::driver::Whose;

/// The stream with its page data in the mapped layout, and the trailer.
fn mapped(stream: &[u8]) -> Vec<u8> {
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut writer = MappedWriter::new(Vec::new(), true);
    let to = Layer::Libxc;
    transcode(&mut walk, &mut writer, to, None, |source, bytes, sink| {
        let mut room = Vec::new();
        let mut pages = source.take(bytes);
        pages.read_to_end(&mut room).map_err(CopyError::Read)?;
        sink.write_all(&room).map_err(CopyError::Write)?;
        Ok(room.len() as u64)
    })
    .unwrap();
    writer.finish().unwrap().0
}

/// The stream before the trailer, which begins after END.
fn stream_of(file: &[u8]) -> &[u8] {
    let magic = file.windows(8).rposition(|bytes| bytes == b"XSRmapTr");
    &file[..magic.unwrap()]
}

fn restores(kind: GuestKind, width: u8, live: bool) {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    let image = match live {
        false => {
            let domid = driver::with_guest(&source, kind, width, MIB).unwrap();
            save(&helpers, Whose::Ours, &source, domid)
        }
        true => {
            let domid = working(&source, kind, width);
            let path = scratch.path().join("live");
            let stream = File::create(&path).unwrap();
            let run = helpers.save_live(Whose::Ours, &source, domid, stream, true);
            assert!(run.unwrap().succeeded());
            fs::read(&path).unwrap()
        }
    };
    let suspended = MockHost::open(&source).unwrap();
    let sent = suspended
        .memory_digest(suspended.find("peer").unwrap())
        .unwrap();
    let file = mapped(&image);
    let batches = records(stream_of(&file));
    let batches = batches.iter().filter(|(kind, ..)| *kind == PAGE_DATA);
    let aligned = batches.clone().filter(|(_, at, record)| {
        let count = u32::from_le_bytes(record[8..12].try_into().unwrap());
        (at + 16 + 8 * usize::try_from(count).unwrap()).is_multiple_of(PAGE_SIZE)
    });
    assert!(aligned.count() >= 8, "of {}", batches.count());
    for whose in [Whose::Stock, Whose::Ours, Whose::OursByCalls] {
        let mut asked = Vec::new();
        for (name, bytes) in [("plain", &image), ("mapped", &file)] {
            let dir = scratch.path().join(format!("{name}-{whose:?}"));
            let empty = driver::empty(&dir, kind, width, MIB).unwrap();
            let path = scratch.path().join("image");
            fs::write(&path, bytes).unwrap();
            let stream = File::options().read(true).write(true).open(&path).unwrap();
            let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
            assert!(run.succeeded(), "{whose:?}, {name}: {run:#?}");
            let host = MockHost::open(&dir).unwrap();
            let arrived = host.memory_digest(empty.domid).unwrap();
            assert_eq!(sent.differences(&arrived), [], "{whose:?}, {name}");
            asked.push(run.numbers());
        }
        assert_eq!(asked[0], asked[1], "{whose:?}: what libxl is asked");
    }
}

#[test]
fn mapped_pv() {
    restores(GuestKind::Pv, 8, false);
    restores(GuestKind::Pv, 8, true);
}

#[test]
fn mapped_pv_of_32_bits() {
    restores(GuestKind::Pv, 4, false);
    restores(GuestKind::Pv, 4, true);
}

#[test]
fn mapped_pvh() {
    restores(GuestKind::Pvh, 8, false);
    restores(GuestKind::Pvh, 8, true);
}

#[test]
fn mapped_hvm() {
    restores(GuestKind::Hvm, 8, false);
    restores(GuestKind::Hvm, 8, true);
}
