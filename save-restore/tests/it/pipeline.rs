//! Parallel restores: the result does not depend on the number of threads, on whether pages are
//! written or mapped, or on the kind of source.

use std::io::{self, Seek, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::common::faulty::Faulty;
use crate::common::*;
use xsr_format::frame::{PAGE_SIZE, Pfn};
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::restore::RestoreStats;
use xsr_save_restore::source::{CopySource, FdSource, PageSource};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{RestoreError, RestoreRequest, Rings};
use xsr_xen_backend::mock::{GuestSpec, MockHost};
use xsr_xen_backend::{DomId, GuestKind, Host};

/// The number of threads, and whether pages are mapped.
type How = (usize, bool);

const ALL: [How; 6] = [
    (1, false),
    (2, false),
    (8, false),
    (1, true),
    (2, true),
    (8, true),
];

fn restore_how<S: PageSource>(
    to: &MockHost,
    (kind, vcpus, pages): Shape,
    source: S,
    (threads, maps): How,
) -> (DomId, Result<RestoreStats, RestoreError>) {
    let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = Faulty::watching(to.domain(domid).unwrap()).mapping(maps);
    let real = to.domain(domid).unwrap();
    let rings = Rings {
        store_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: real.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    };
    let mut toolstack = DirectToolstack(real.as_ref());
    let result = RecordReader::new(source, ReadOptions::default())
        .map_err(RestoreError::from)
        .and_then(|reader| {
            let mut go_on = |_: &_| ControlFlow::Continue(());
            RestoreRequest::new(&domain, rings)
                .threads(NonZeroUsize::new(threads))
                .observe(&mut go_on)
                .read_stream(reader, &mut toolstack)
        });
    (domid, result.map(|(restored, _)| restored.stats))
}

fn destroy(host: &MockHost, domid: DomId) {
    host.domain(domid).unwrap().destroy().unwrap();
}

/// As a file, positioned at its start.
fn file_of(stream: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(stream).unwrap();
    file.rewind().unwrap();
    file
}

#[test]
fn memory_and_counts_are_the_same_with_any_number_of_threads_either_way_from_anything() {
    let from = host(80);
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let plain = save_to_vec(&from, made, &options(2)).unwrap();
        let shape = shape(&plain, spec.kind, spec.vcpus);
        let mut expected = None;
        for (n, how) in ALL.into_iter().enumerate() {
            // Identical hosts: with the same order of calls, the same frames.
            let to = host(81);
            let (domid, result) = match n % 3 {
                0 => restore_how(&to, shape, CopySource(&*plain), how),
                1 => restore_how(&to, shape, FdSource::new(file_of(&plain)), how),
                _ => {
                    let (reader, mut writer) = io::pipe().unwrap();
                    let plain = &plain;
                    std::thread::scope(|scope| {
                        scope.spawn(move || writer.write_all(plain).unwrap());
                        restore_how(&to, shape, FdSource::new(reader), how)
                    })
                }
            };
            let stats = result.unwrap();
            unpause(&to, domid);
            let back = save_to_vec(&to, domid, &options(1)).unwrap();
            let got = (stats, to.memory_digest(domid).unwrap(), back);
            match &expected {
                None => {
                    assert_same_guest(&spec.name, &plain, &got.2);
                    expected = Some(got);
                }
                Some(expected) => {
                    assert_eq!(got.0, expected.0, "{} {how:?}", spec.name);
                    assert_eq!(got.1.differences(&expected.1), [], "{} {how:?}", spec.name);
                    assert!(got.2 == expected.2, "{} {how:?}", spec.name);
                }
            }
        }
    }
}

/// PAGE_DATA of whole pages, each filled with a byte.
fn record(pages: &[(u64, u8)]) -> Vec<u8> {
    let count = u32::try_from(pages.len()).unwrap();
    let mut out = Vec::new();
    for word in [1, 8 + count * (8 + 4096), count, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for (pfn, _) in pages {
        out.extend_from_slice(&pfn.to_le_bytes());
    }
    for (_, byte) in pages {
        out.extend_from_slice(&[*byte; PAGE_SIZE]);
    }
    out
}

/// A stream does not mark the end of a pass over memory. Here every batch shares pages with earlier
/// ones: large ones that are slow, small ones that overtake them.
#[test]
fn of_a_page_that_comes_many_times_the_last_version_stays() {
    let from = host(82);
    let made = from
        .create_guest(&GuestSpec::new("pvh", GuestKind::Pvh, 8))
        .unwrap();
    let plain = save_to_vec(&from, made, &options(1)).unwrap();
    let shape = shape(&plain, GuestKind::Pvh, 1);
    let (_, end) = memory_of(&plain);
    let mut last = [0_u8; 1024];
    let mut more = Vec::new();
    for round in 0..60_u64 {
        let byte = u8::try_from(round + 1).unwrap();
        let pages: Vec<(u64, u8)> = match round % 3 {
            0 => (0..1024).map(|pfn| (pfn, byte)).collect(),
            // One page of each piece, in reverse order, and one of them twice.
            1 => [1023, 700, 300, 5, 5, 5].map(|pfn| (pfn, byte)).to_vec(),
            _ => (round..round + 300).map(|pfn| (pfn, byte)).collect(),
        };
        for (pfn, byte) in &pages {
            last[usize::try_from(*pfn).unwrap()] = *byte;
        }
        more.extend(record(&pages));
    }
    // Twice in one record, with different contents: the later one stays.
    more.extend(record(&[(9, 0xaa), (10, 0xbb), (9, 0xcc)]));
    (last[9], last[10]) = (0xcc, 0xbb);
    let stream = [&plain[..end], &more, &plain[end..]].concat();
    let to = host(83);
    for repeat in 0..4 {
        for how in ALL {
            let (domid, result) = match repeat % 2 {
                0 => restore_how(&to, shape, CopySource(&*stream), how),
                _ => restore_how(&to, shape, FdSource::new(file_of(&stream)), how),
            };
            result.unwrap();
            unpause(&to, domid);
            let back = save_to_vec(&to, domid, &options(1)).unwrap();
            let pages = take_apart(&back).pages;
            for (pfn, byte) in (0..).zip(last) {
                let page = pages[&Pfn(pfn)].1.unwrap();
                assert!(*page == [byte; PAGE_SIZE], "{how:?}: pfn {pfn:#x}");
            }
            destroy(&to, domid);
        }
    }
}

#[test]
fn verification_and_version_2_do_not_depend_on_threads() {
    let (from, to) = (host(84), host(85));
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let plain = save_to_vec(&from, made, &options(1)).unwrap();
        let shape = shape(&plain, spec.kind, spec.vcpus);
        let (memory, tail) = memory_of(&plain);
        let mut again = plain[memory..tail].to_vec();
        *again.last_mut().unwrap() ^= 1;
        let verify = [0x0d, 0, 0, 0, 0, 0, 0, 0];
        let verified = [&plain[..tail], &verify, &again, &plain[tail..]].concat();
        let old = as_version_2(&plain);
        for how in ALL {
            let (domid, result) = restore_how(&to, shape, CopySource(&*verified), how);
            assert_eq!(
                result.unwrap().verify_mismatches,
                1,
                "{} {how:?}",
                spec.name
            );
            destroy(&to, domid);
            let (domid, result) = restore_how(&to, shape, FdSource::new(file_of(&old)), how);
            result.unwrap();
            destroy(&to, domid);
        }
    }
}

/// The first error in the order of the stream is reported, with the same text, and the domain can
/// be destroyed.
#[test]
fn what_is_said_of_a_bad_stream_does_not_depend_on_threads() {
    let (from, to) = (host(86), host(87));
    let free = to.free_pages();
    for spec in specs() {
        let made = from.create_guest(&spec).unwrap();
        let plain = save_to_vec(&from, made, &options(1)).unwrap();
        let shape = shape(&plain, spec.kind, spec.vcpus);
        let mut bad: Vec<Vec<u8>> = [2, 5, 11]
            .map(|n| plain[..plain.len() * n / 12].to_vec())
            .to_vec();
        if !spec.kind.is_translated() {
            // Every page table names an impossible pfn, and the stream ends early.
            bad.push(with_bad_tables(&plain));
        }
        for (n, stream) in bad.iter().enumerate() {
            let mut said: Option<String> = None;
            for how in ALL {
                let results = [
                    restore_how(&to, shape, CopySource(&**stream), how),
                    restore_how(&to, shape, FdSource::new(file_of(stream)), how),
                ];
                for (domid, result) in results {
                    let error = result.unwrap_err();
                    assert!(error.is_bad_image(), "{} {n}: {error}", spec.name);
                    let text = error.to_string();
                    let first = said.get_or_insert_with(|| text.clone());
                    assert_eq!(*first, text, "{} {n} {how:?}", spec.name);
                    destroy(&to, domid);
                }
            }
        }
    }
    assert_eq!(to.free_pages(), free);
}

fn with_bad_tables(stream: &[u8]) -> Vec<u8> {
    let mut out = stream[..stream.len() * 11 / 12].to_vec();
    for (at, kind, bytes) in record_offsets(stream) {
        if kind != 1 || at + bytes > out.len() {
            continue;
        }
        let word = |at: usize| u64::from_le_bytes(stream[at..at + 8].try_into().unwrap());
        let count = usize::try_from(word(at + 8) & 0xffff_ffff).unwrap();
        let mut page = at + 16 + 8 * count;
        for n in 0..count {
            let page_type = word(at + 16 + 8 * n) >> 60;
            if matches!(page_type, 1..=4 | 9..=12) {
                let pte = 0xffff_ffff_u64 << 12 | 1;
                out[page + 8..page + 16].copy_from_slice(&pte.to_le_bytes());
            }
            page += PAGE_SIZE * usize::from(page_type < 0xd);
        }
    }
    out
}

#[test]
fn a_restore_whose_source_stalls_ends_soon_after_it_is_cancelled() {
    let (from, to) = (host(88), host(89));
    let free = to.free_pages();
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 8);
    let made = from.create_guest(&spec).unwrap();
    let plain = save_to_vec(&from, made, &options(1)).unwrap();
    let shape = shape(&plain, spec.kind, spec.vcpus);
    for how in ALL {
        let (reader, mut writer) = io::pipe().unwrap();
        let cancel = Cancel::new();
        let source = FdSource::cancellable(reader, cancel.clone()).unwrap();
        let (domid, result, took) = std::thread::scope(|scope| {
            let (to, plain) = (&to, &plain);
            let sender = scope.spawn(move || {
                // Once all of it is in the pipe, no more bytes come.
                writer.write_all(&plain[..plain.len() / 2]).unwrap();
                let asked = Instant::now();
                cancel.cancel();
                (writer, asked)
            });
            let (domid, result) = restore_how(to, shape, source, how);
            let ended = Instant::now();
            let (writer, asked) = sender.join().unwrap();
            drop(writer);
            (domid, result, ended - asked)
        });
        assert!(matches!(result, Err(RestoreError::Aborted)), "{how:?}");
        // The promise is 100 ms; a machine under load may add its own.
        assert!(took < Duration::from_secs(2), "{took:?}");
        destroy(&to, domid);
        assert_eq!(to.free_pages(), free);
    }
}
