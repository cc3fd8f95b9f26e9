//! Equality tests of Xen's own engine and ours on equal machines: both write the same bytes, each
//! restores the other's images to the same machine, and where one fails, so does the other.
//!
//! `cargo xtask peer test` runs them. Without the variables that it sets there is no stock helper
//! to compare with, and the tests print that.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "equality/colo.rs"]
mod colo;
#[path = "../driver/mod.rs"]
mod driver;
#[path = "equality/failures.rs"]
mod failures;
#[path = "equality/mapped.rs"]
mod mapped;

use std::fs::{self, File};
use std::path::Path;

use driver::{Helpers, Whose};
use xsr_xen_backend::mock::{GrantEntry, MemoryDigest, MockHost, Stepped, WorkloadSpec};
use xsr_xen_backend::{DomId, GuestKind, Host as _};

/// Memory of the guests: more than one batch, and not a whole number of batches.
const MIB: u64 = 33;
/// The type of a PAGE_DATA record.
const PAGE_DATA: u32 = 1;
/// The type of a PV guest's SHARED_INFO record.
const SHARED_INFO: u32 = 7;
const PAGE_SIZE: usize = 4096;

fn helpers() -> Option<Helpers> {
    let helpers = Helpers::from_env();
    if helpers.is_none() {
        eprintln!("SKIPPED: there is no helper of Xen's; run `cargo xtask peer test`");
    }
    helpers
}

/// The records of a stream: type, offset and bytes; the headers are the first element.
fn records(stream: &[u8]) -> Vec<(u32, usize, &[u8])> {
    let word = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap());
    let mut records = vec![(u32::MAX, 0, &stream[..40])];
    let mut at = 40;
    while at < stream.len() {
        let end = at + 8 + usize::try_from(word(at + 4)).unwrap().next_multiple_of(8);
        records.push((word(at), at, &stream[at..end]));
        at = end;
    }
    records
}

/// Fail at the first record that differs.
#[track_caller]
fn assert_same(stock: &[u8], ours: &[u8]) {
    if stock == ours {
        return;
    }
    let (stock, ours) = (records(stock), records(ours));
    for ((kind, at, a), (other, _, b)) in stock.iter().zip(&ours) {
        assert_eq!(
            kind, other,
            "record at {at:#x}: stock {kind:#x}, ours {other:#x}"
        );
        if let Some(first) = (0..a.len().max(b.len())).find(|i| a.get(*i) != b.get(*i)) {
            let around = |record: &[u8]| {
                record[first & !15..]
                    .iter()
                    .take(48)
                    .copied()
                    .collect::<Vec<u8>>()
            };
            panic!(
                "record {kind:#x} at {at:#x}, {} and {} bytes, from byte {first} on:\nstock {:02x?}\nours  {:02x?}",
                a.len(),
                b.len(),
                around(a),
                around(b)
            );
        }
    }
    panic!("stock has {} records, ours {}", stock.len(), ours.len());
}

/// The state of a machine's only domain.
#[derive(Debug)]
struct Held {
    memory: MemoryDigest,
    /// The console's and xenstore's grant entries: the frames of the rings, which are machine
    /// frames for a PV guest, and the domains that may map them.
    grants: [GrantEntry; 2],
    /// Our engine's image of the domain: page types, p2m, vcpus, parameters and shared info, none
    /// of which depends on the machine.
    image: Vec<u8>,
}

fn held(helpers: &Helpers, dir: &Path, domid: DomId, width: u8) -> Held {
    let host = MockHost::open(dir).unwrap();
    let memory = host.memory_digest(domid).unwrap();
    let grants = host.grants(domid).unwrap().map(Option::unwrap);
    let domain = host.domain(domid).unwrap();
    domain.unpause().unwrap();
    drop(domain);
    drop(host);
    let mut image = save(helpers, Whose::Ours, dir, domid);
    let machines: Vec<u64> = memory
        .pages()
        .iter()
        .filter(|page| page.contents.is_none())
        .map(|page| page.pfn.0)
        .collect();
    clear_pages(&mut image, &machines);
    clear_shared_info(&mut image, width);
    Held {
        memory,
        grants,
        image,
    }
}

/// Clear pages in an image whose contents depend on the machine, as the frames in a PV guest's p2m
/// do.
fn clear_pages(image: &mut [u8], pfns: &[u64]) {
    let mut places = Vec::new();
    for (kind, at, record) in records(image) {
        if kind != PAGE_DATA {
            continue;
        }
        let count = u32::from_le_bytes(record[8..12].try_into().unwrap());
        let count = usize::try_from(count).unwrap();
        let (entries, _) = record[16..16 + count * 8].as_chunks::<8>();
        let mut page = at + 16 + count * 8;
        for entry in entries.iter().copied().map(u64::from_le_bytes) {
            // Broken, allocated only, or absent: without contents.
            if entry >> 60 >= 0xd {
                continue;
            }
            if pfns.contains(&(entry & ((1 << 52) - 1))) {
                places.push(page);
            }
            page += PAGE_SIZE;
        }
    }
    for page in places {
        image[page..page + PAGE_SIZE].fill(0);
    }
}

/// Clear the machine frames in a PV guest's shared info: `pfn_to_mfn_frame_list_list` and `p2m_cr3`
/// (`xen/include/public/arch-x86/xen.h`).
fn clear_shared_info(image: &mut [u8], width: u8) {
    let fields: &[(usize, usize)] = match width {
        4 => &[(2320, 4)],
        _ => &[(3096, 8), (3112, 8)],
    };
    let places: Vec<usize> = records(image)
        .iter()
        .filter(|(kind, ..)| *kind == SHARED_INFO)
        .map(|(_, at, _)| at + 8)
        .collect();
    for at in places {
        for (field, bytes) in fields {
            image[at + field..at + field + bytes].fill(0);
        }
    }
}

/// Save the guest of the machine.
fn save(helpers: &Helpers, whose: Whose, dir: &Path, domid: DomId) -> Vec<u8> {
    if whose == Whose::Stock {
        let host = MockHost::open(dir).unwrap();
        host.domain(domid).unwrap().suspend().unwrap();
    }
    let path = dir.with_extension("image");
    let stream = File::create(&path).unwrap();
    let run = helpers.save(whose, dir, domid, stream).unwrap();
    assert!(run.succeeded(), "{whose:?}: {run:#?}");
    fs::read(path).unwrap()
}

/// Checks equality in both directions.
fn equal(kind: GuestKind, width: u8) {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str| scratch.path().join(name);
    let mut images = Vec::new();
    for whose in [Whose::Stock, Whose::Ours, Whose::OursByCalls] {
        let dir = place(&format!("from-{whose:?}"));
        let domid = driver::with_guest(&dir, kind, width, MIB).unwrap();
        images.push(save(&helpers, whose, &dir, domid));
    }
    assert_same(&images[0], &images[1]);
    assert_same(&images[0], &images[2]);
    let source = place("from-Ours");
    let suspended = MockHost::open(&source).unwrap();
    let domid = suspended.find("peer").unwrap();
    let sent = suspended.memory_digest(domid).unwrap();
    let mut arrived = Vec::new();
    for whose in [Whose::Stock, Whose::Ours, Whose::OursByCalls] {
        let dir = place(&format!("to-{whose:?}"));
        let empty = driver::empty(&dir, kind, width, MIB).unwrap();
        let path = place("image");
        fs::write(&path, &images[0]).unwrap();
        let stream = File::options().read(true).write(true).open(&path).unwrap();
        let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
        assert!(run.succeeded(), "{whose:?}: {run:#?}");
        let held = held(&helpers, &dir, empty.domid, width);
        let [console, store] = held.grants;
        let rings = [store.gfn, console.gfn].map(u64::to_ne_bytes);
        assert_eq!(run.rings().unwrap(), rings.concat(), "{whose:?}");
        assert_eq!([store.backend, console.backend], [DomId(0); 2]);
        arrived.push((run.numbers(), held));
    }
    let [(asked_stock, stock), ours @ ..] = &arrived[..] else {
        unreachable!("one for each");
    };
    for (asked_ours, ours) in ours {
        assert_eq!(asked_stock, asked_ours, "what libxl is asked");
        assert_eq!(stock.memory.differences(&ours.memory), []);
        assert_eq!(sent.differences(&ours.memory), []);
        if kind.is_translated() {
            assert_eq!(stock.grants, ours.grants);
        }
        assert_same(&stock.image, &ours.image);
    }
}

#[test]
fn pv() {
    equal(GuestKind::Pv, 8);
}

#[test]
fn pv_of_32_bits() {
    equal(GuestKind::Pv, 4);
}

#[test]
fn pvh() {
    equal(GuestKind::Pvh, 8);
}

#[test]
fn hvm() {
    equal(GuestKind::Hvm, 8);
}

/// A guest that writes between the passes of a live save, and changes its page tables if it has
/// any.
fn working(dir: &Path, kind: GuestKind, width: u8) -> DomId {
    let work = WorkloadSpec {
        table_permille: 100,
        ..WorkloadSpec::writes(7, 1, 4000)
    };
    let stepped = Stepped {
        work,
        operations: Some(640),
    };
    driver::with_working_guest(dir, kind, width, MIB, Some(stepped)).unwrap()
}

/// Checks that a live save writes the same bytes, while the guest makes the same writes between its
/// passes.
fn equal_live(kind: GuestKind, width: u8) {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut images = Vec::new();
    let mut left = Vec::new();
    for whose in [Whose::Stock, Whose::Ours, Whose::OursByCalls] {
        let dir = scratch.path().join(format!("{whose:?}"));
        let domid = working(&dir, kind, width);
        let path = scratch.path().join("image");
        let stream = File::create(&path).unwrap();
        let run = helpers.save_live(whose, &dir, domid, stream, true).unwrap();
        assert!(run.succeeded(), "{whose:?}: {run:#?}");
        images.push((run.numbers(), fs::read(&path).unwrap()));
        let host = MockHost::open(&dir).unwrap();
        assert!(!host.is_log_dirty(domid).unwrap(), "{whose:?}");
        left.push(host.memory_digest(domid).unwrap());
    }
    let [(asked, stock), ours @ ..] = &images[..] else {
        unreachable!("one for each");
    };
    // All of memory, plus the pages written before five of the passes.
    let pages = usize::try_from(MIB << 8).unwrap();
    assert!(
        stock.len() > (pages + 5 * 500) * PAGE_SIZE,
        "{} bytes",
        stock.len()
    );
    for ((asked_ours, ours), left_ours) in ours.iter().zip(&left[1..]) {
        assert_eq!(asked, asked_ours, "what libxl is asked");
        assert_eq!(left[0].differences(left_ours), []);
        assert_same(stock, ours);
    }
    for whose in [Whose::Stock, Whose::Ours] {
        let dir = scratch.path().join(format!("to-{whose:?}"));
        let empty = driver::empty(&dir, kind, width, MIB).unwrap();
        let path = scratch.path().join("image");
        let stream = File::options().read(true).write(true).open(&path).unwrap();
        let run = helpers.restore(whose, &dir, &empty, stream).unwrap();
        assert!(run.succeeded(), "{whose:?}: {run:#?}");
        let host = MockHost::open(&dir).unwrap();
        let arrived = host.memory_digest(empty.domid).unwrap();
        assert_eq!(left[0].differences(&arrived), [], "{whose:?}");
    }
}

#[test]
fn pv_live() {
    equal_live(GuestKind::Pv, 8);
}

#[test]
fn pv_of_32_bits_live() {
    equal_live(GuestKind::Pv, 4);
}

#[test]
fn pvh_live() {
    equal_live(GuestKind::Pvh, 8);
}

#[test]
fn hvm_live() {
    equal_live(GuestKind::Hvm, 8);
}
