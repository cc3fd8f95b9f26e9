//! Images in the mapped layout: each engine restores one to the same machine as the stream that it
//! was made from. To both it is an ordinary stream with entries of type XTAB.

use std::fs::{self, File};
use std::io::{Cursor, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::Command;

use xsr_format::byte_order::ByteOrder;
use xsr_format::layout::check::{Damage, check};
use xsr_format::layout::find::read_page;
use xsr_format::layout::{LayoutError, Mapped, MappedWriter};
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{CopyError, Layer, transcode};
use xsr_format::walk::Walk;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;
use xsr_xen_backend::GuestKind;
use xsr_xen_backend::mock::{MockHost, Stepped, WorkloadSpec};

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

/// What xl and libxl write around the libxc stream: before it, and after it.
fn around() -> (Vec<u8>, Vec<u8>) {
    let mut before = XlHeader::new("{\"c_info\": {}}").unwrap().encode();
    let header = LibxlHeader {
        order: ByteOrder::Little,
        legacy_converted: false,
    };
    let mut libxl = LibxlWriter::new(Vec::new(), header).unwrap();
    libxl.write(&LibxlRecord::LibxcContext).unwrap();
    let context = libxl.sink_mut().len();
    libxl.write(&LibxlRecord::End).unwrap();
    let mut libxl = libxl.into_sink();
    let after = libxl.split_off(context);
    before.extend(libxl);
    (before, after)
}

/// Xen's `verify-stream-v2`, from the package of Xen's helper, accepts an image.
fn xen_verifies(image: &Path) {
    let helper = std::env::var_os("XSR_PEER_HELPER").unwrap();
    let bin = Path::new(&helper).parent().unwrap();
    let output = Command::new("python3")
        .arg(bin.join("verify-stream-v2"))
        .args(["-f", "xl", "-i"])
        .arg(image)
        .env("PYTHONPATH", bin.join("../lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A live save with our helper into a file that xl has begun is, to Xen's engine, a still save of the
/// guest as it suspended, whatever it did meanwhile.
fn live_under_xl(kind: GuestKind, width: u8, work: WorkloadSpec) {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    let stepped = Stepped {
        work: work.clone(),
        operations: Some(640),
    };
    let domid = driver::with_working_guest(&source, kind, width, MIB, Some(stepped)).unwrap();
    let image = scratch.path().join("image");
    let (before, after) = around();
    let mut file = File::create(&image).unwrap();
    file.write_all(&before).unwrap();
    let mut mapping = helpers.clone();
    for variable in ["XSR_LAYOUT=mapped", "XSR_PAGE_DIGESTS=1"] {
        let (name, value) = variable.split_once('=').unwrap();
        mapping.environment.push((name.into(), value.into()));
    }
    let stream = file.try_clone().unwrap();
    let run = mapping.save_live(Whose::Ours, &source, domid, stream, true);
    let run = run.unwrap();
    assert!(run.succeeded(), "{work:?}: {run:#?}");
    file.write_all(&after).unwrap();
    xen_verifies(&image);

    // Xen's engine saves the suspended guest.
    let still = scratch.path().join("still");
    let run = helpers.save(Whose::Stock, &source, domid, File::create(&still).unwrap());
    assert!(run.unwrap().succeeded());
    let still = fs::read(still).unwrap();

    let bytes = fs::read(&image).unwrap();
    let mut reader = Cursor::new(&bytes);
    let index = Mapped::open(&mut reader).unwrap().expect("an index");
    let complain = |damage: Damage| -> Result<(), LayoutError> { panic!("{damage}") };
    check(&index, &mut reader, complain).unwrap();
    let from = index.footer().room.unwrap().to + 24;
    let [start, end] = [from, index.footer().image_end].map(|at| usize::try_from(at).unwrap());
    let others = |stream: &[u8]| -> Vec<Vec<u8>> {
        let records = records(stream).into_iter();
        let others = records.filter(|(kind, ..)| *kind != PAGE_DATA);
        others.map(|(.., record)| record.to_vec()).collect()
    };
    assert!(others(&still) == others(&bytes[start..end]), "{work:?}");
    let mut words = index.in_order(&mut reader).unwrap().into_iter();
    for (kind, _, record) in records(&still) {
        if kind != PAGE_DATA {
            continue;
        }
        let count = u32::from_le_bytes(record[8..12].try_into().unwrap());
        let (entries, pages) = record[16..].split_at(8 * usize::try_from(count).unwrap());
        let mut pages = pages.chunks(PAGE_SIZE);
        for raw in entries.as_chunks::<8>().0 {
            let (entry, at) = words.next().unwrap();
            let raw = u64::from_le_bytes(*raw);
            assert_eq!((entry.pfn.0, entry.page_type.has_data()), {
                let pfn = raw & ((1 << 52) - 1);
                (pfn, raw >> 60 < 0xd)
            });
            if entry.page_type.has_data() {
                let page = read_page(&mut reader, at).unwrap();
                assert!(pages.next().unwrap() == page, "{work:?}: pfn {}", entry.pfn);
            }
        }
    }
    assert_eq!(words.next(), None);

    let suspended = MockHost::open(&source).unwrap();
    let sent = suspended.memory_digest(domid).unwrap();
    for whose in [Whose::Stock, Whose::Ours] {
        let dir = scratch.path().join(format!("to-{whose:?}"));
        let empty = driver::empty(&dir, kind, width, MIB).unwrap();
        let mut stream = File::options().read(true).write(true).open(&image).unwrap();
        stream.seek(SeekFrom::Start(from)).unwrap();
        let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
        assert!(run.succeeded(), "{whose:?}: {run:#?}");
        let host = MockHost::open(&dir).unwrap();
        let arrived = host.memory_digest(empty.domid).unwrap();
        assert_eq!(sent.differences(&arrived), [], "{whose:?}, {work:?}");
    }
}

/// Under every workload: writes to a part of memory and to all of it, ballooning, and page tables
/// that change in a PV guest.
fn live_under_xl_with_any_work(kind: GuestKind, width: u8) {
    let writes = WorkloadSpec::writes(7, 1, 400);
    let all = WorkloadSpec::writes(8, 1, u64::MAX);
    let balloon = WorkloadSpec {
        balloon_permille: 300,
        ..WorkloadSpec::writes(9, 1, 4000)
    };
    let tables = WorkloadSpec {
        table_permille: 200,
        balloon_permille: 100,
        ..WorkloadSpec::writes(10, 1, 4000)
    };
    live_under_xl(kind, width, writes);
    live_under_xl(kind, width, all);
    live_under_xl(kind, width, balloon);
    if kind == GuestKind::Pv {
        live_under_xl(kind, width, tables);
    }
}

#[test]
fn live_mapped_pv() {
    live_under_xl_with_any_work(GuestKind::Pv, 8);
}

#[test]
fn live_mapped_pv_of_32_bits() {
    live_under_xl_with_any_work(GuestKind::Pv, 4);
}

#[test]
fn live_mapped_pvh() {
    live_under_xl_with_any_work(GuestKind::Pvh, 8);
}

#[test]
fn live_mapped_hvm() {
    live_under_xl_with_any_work(GuestKind::Hvm, 8);
}
