//! Superpages of a restored guest: from a file, those that looking ahead shows, up to 1 GiB, and
//! smaller ones if the machine has none; from a pipe, those that a single record shows.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::common::faulty::{Fault, Faulty, Which};
use crate::common::*;
use xsr_format::frame::{Gfn, PageEntry, PageType, Pfn};
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::write::page_data_head;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::source::{FdSource, PageSource, StoredSource};
use xsr_save_restore::storage::testing::FakeStorage;
use xsr_save_restore::storage::{Create, Durability, Storage as _, StorageCursor};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{RestoreRequest, Rings};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{Access, DomId, Domain, GuestKind, Host};

/// Pages in a 1 GiB superpage.
const GIB: u64 = 1 << 18;

/// A guest of 8 MiB.
const SMALL: u64 = 2048;

/// A PVH guest with 8 MiB of contents, from pfn 0 on, as a stream.
fn small_guest() -> Vec<u8> {
    let from = host(101);
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 8);
    let made = from.create_guest(&spec).unwrap();
    save_to_vec(&from, made, &options(1)).unwrap()
}

/// `stream`, with pages without contents after its memory, this many in each record.
fn with_empty_pages(stream: &[u8], entries: &[PageEntry], record: usize) -> Vec<u8> {
    let (_, end) = memory_of(stream);
    let mut out = stream[..end].to_vec();
    for entries in entries.chunks(record) {
        out.extend(page_data_head(entries).unwrap());
    }
    out.extend(&stream[end..]);
    out
}

fn empty(pfns: impl Iterator<Item = u64>, page_type: PageType) -> Vec<PageEntry> {
    let entry = |pfn| PageEntry {
        pfn: Pfn(pfn),
        page_type,
    };
    pfns.map(entry).collect()
}

/// 2 GiB, of which the first 8 MiB have contents.
fn two_gibs(small: &[u8]) -> Vec<u8> {
    with_empty_pages(small, &empty(SMALL..2 * GIB, PageType::XALLOC), 1024)
}

fn file_of(stream: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    // Bytes before the stream do not belong to it.
    file.write_all(&[0xa5; 100]).unwrap();
    file.write_all(stream).unwrap();
    file.seek(io::SeekFrom::Start(100)).unwrap();
    file
}

/// Restores `stream`; populate call number `short`, from 0, allocates nothing. The guest then has
/// exactly the memory of [`small_guest`].
fn restored(
    to: &MockHost,
    stream: &[u8],
    source: impl PageSource,
    short: Option<usize>,
) -> RestoreStats {
    let (kind, vcpus, pages) = shape(stream, GuestKind::Pvh, 1);
    let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
    let real = to.domain(domid).unwrap();
    let rings = Rings {
        store_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    };
    let inner = to.domain(domid).unwrap();
    let domain = match short {
        None => Faulty::watching(inner),
        Some(at) => Faulty::new(inner, at, Fault::Short(Which::First)),
    };
    let reader = RecordReader::new(source, ReadOptions::default()).unwrap();
    let mut toolstack = DirectToolstack(real.as_ref());
    let mut go_on = |_: &_| ControlFlow::Continue(());
    let (restored, _) = RestoreRequest::new(&domain, rings)
        .threads(NonZeroUsize::new(2))
        .observe(&mut go_on)
        .read_stream(reader, &mut toolstack)
        .unwrap();
    if short.is_some() {
        assert_eq!(domain.struck().map(|struck| struck.op), Some("populate"));
    }
    assert_contents(real.as_ref(), stream);
    let stats = restored.stats;
    let got = stats.superpages_1gib * GIB + stats.superpages_2mib * 512 + stats.small_pages;
    assert_eq!(got - stats.released, real.info().unwrap().tot_pages);
    real.destroy().unwrap();
    stats
}

/// The first 8 MiB are unchanged; the ring pages, which a restore clears, are above.
fn assert_contents(domain: &dyn Domain, stream: &[u8]) {
    let taken = take_apart(stream);
    let gfns: Vec<Gfn> = (0..SMALL).map(Gfn).collect();
    let pages = domain
        .map(&gfns, Access::Read)
        .unwrap()
        .all_mapped()
        .unwrap();
    let mut compared = 0;
    for ((_, page), pfn) in pages.iter().zip(0..) {
        if let Some((_, Some(contents))) = taken.pages.get(&Pfn(pfn)) {
            assert!(*page.to_page() == **contents, "pfn {pfn}");
            compared += 1;
        }
    }
    assert!(compared > 1000, "{compared}");
}

/// The number of the first `populate` call: the restore of any stream begins with the same calls.
fn first_populate(to: &MockHost, stream: &[u8]) -> usize {
    let (kind, vcpus, pages) = shape(stream, GuestKind::Pvh, 1);
    let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
    let real = to.domain(domid).unwrap();
    let domain = Faulty::watching(to.domain(domid).unwrap());
    let reader = RecordReader::new(FdSource::new(file_of(stream)), ReadOptions::default());
    let rings = Rings {
        store_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    };
    let mut toolstack = DirectToolstack(real.as_ref());
    let mut go_on = |_: &_| ControlFlow::Continue(());
    let result = RestoreRequest::new(&domain, rings)
        .threads(NonZeroUsize::new(1))
        .observe(&mut go_on)
        .read_stream(reader.unwrap(), &mut toolstack);
    result.unwrap();
    real.destroy().unwrap();
    let trace = domain.trace();
    trace.iter().position(|call| call.op == "populate").unwrap()
}

#[test]
fn whole_gigabytes_of_a_file_become_superpages() {
    let to = host(102);
    let small = small_guest();
    let plain = restored(&to, &small, FdSource::new(file_of(&small)), None);
    assert_eq!((plain.superpages_1gib, plain.superpages_2mib), (0, 4));

    let stream = two_gibs(&small);
    let stats = restored(&to, &stream, FdSource::new(file_of(&stream)), None);
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (2, 0));
    assert_eq!(stats.small_pages, plain.small_pages);

    // All except one page, which the guest gives back in the end.
    let gone = empty(GIB + 7..GIB + 8, PageType::XTAB);
    let stream = with_empty_pages(&stream, &gone, 1);
    let stats = restored(&to, &stream, FdSource::new(file_of(&stream)), None);
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (1, 511));
    assert_eq!(
        (stats.small_pages, stats.released),
        (plain.small_pages + 512, 1)
    );
}

#[test]
fn an_image_without_a_descriptor_shows_its_gigabytes() {
    let stream = two_gibs(&small_guest());
    let storage = FakeStorage::new();
    let name = "web.save".parse().unwrap();
    let mut writer = storage.create(&name, &Create::stream()).unwrap();
    writer.write_all(&stream).unwrap();
    writer.commit(Durability::Process).unwrap();
    let cursor = StorageCursor::new(storage.open(&name).unwrap()).unwrap();
    let source = StoredSource::new(&cursor, Cancel::default()).unwrap();
    let stats = restored(&host(104), &stream, source, None);
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (2, 0));
}

#[test]
fn a_pipe_shows_no_gigabyte() {
    let to = host(103);
    let stream = two_gibs(&small_guest());
    let (reader, mut writer) = io::pipe().unwrap();
    let stats = std::thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&stream).unwrap());
        restored(&to, &stream, FdSource::new(reader), None)
    });
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (0, 1024));
}

#[test]
fn where_no_superpage_is_to_be_had_smaller_ones_do() {
    let small = small_guest();
    let stream = two_gibs(&small);
    // Frames for all of it, but only one whole gigabyte: Xen uses some of the first.
    let config = HostConfig {
        memory_pages: 2 * GIB + 8192,
        ..HostConfig::default()
    };
    let to = MockHost::ephemeral(&config).unwrap();
    let stats = restored(&to, &stream, FdSource::new(file_of(&stream)), None);
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (1, 512));

    let to = host(104);
    let first = first_populate(&to, &small);
    let plain = restored(&to, &small, FdSource::new(file_of(&small)), None);
    let less = restored(&to, &small, FdSource::new(file_of(&small)), Some(first));
    assert_eq!(less.superpages_2mib, plain.superpages_2mib - 1);
    assert_eq!(less.small_pages, plain.small_pages + 512);
    // One of 1 GiB fails, but the 2 MiB ones that replace it do not.
    let stats = restored(&to, &stream, FdSource::new(file_of(&stream)), Some(first));
    assert_eq!((stats.superpages_1gib, stats.superpages_2mib), (1, 512));
    assert_eq!(stats.small_pages, plain.small_pages);
}

#[test]
fn a_file_shows_superpages_that_records_cut() {
    let to = host(105);
    let small = small_guest();
    let stream = with_empty_pages(&small, &empty(SMALL..2 * SMALL, PageType::XALLOC), 300);
    let (reader, mut writer) = io::pipe().unwrap();
    let piped = std::thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&stream).unwrap());
        restored(&to, &stream, FdSource::new(reader), None)
    });
    assert_eq!(piped.superpages_2mib, 4);
    let stats = restored(&to, &stream, FdSource::new(file_of(&stream)), None);
    assert_eq!(stats.superpages_2mib, 8);
    assert_eq!(stats.pages, piped.pages);
}
