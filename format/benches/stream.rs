//! Throughput of the libxc layer alone, in memory: reading from a slice and from a
//! `Read`, writing, and `memcpy` of the same bytes beside them.
//!
//! `cargo xtask bench` runs this; figures are in `docs/performance.md`.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    reason = "a benchmark fails by panicking; criterion's macros make public items"
)]

use std::hint::black_box;
use std::io::{self, Read, Write};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use xsr_format::frame::{PAGE_SIZE, Page, PageEntry, PageType, Pfn};
use xsr_format::image::{DomainHeader, GuestType};
use xsr_format::read::{Incoming, ReadOptions, RecordReader};
use xsr_format::record::MAX_BATCH;
use xsr_format::slice::SliceReader;
use xsr_format::write::RecordWriter;

const BATCHES: u64 = 64;

fn write_stream(sink: impl Write, page: &Page) {
    let domain = DomainHeader {
        guest_type: GuestType::X86_HVM,
        xen_major: 4,
        xen_minor: 17,
    };
    let pages = vec![page; MAX_BATCH];
    let mut writer = RecordWriter::new(sink, domain).unwrap();
    writer.static_data_end().unwrap();
    for batch in 0..BATCHES {
        let entries: Vec<PageEntry> = (0..MAX_BATCH as u64)
            .map(|i| PageEntry {
                pfn: Pfn(batch * MAX_BATCH as u64 + i),
                page_type: PageType::NOTAB,
            })
            .collect();
        writer.page_data(&entries, &pages).unwrap();
    }
    writer.hvm_context(&[0; 64]).unwrap();
    writer.end().unwrap();
}

/// Hands out bytes without knowing that they are in memory, as a pipe does.
struct Opaque<'a>(&'a [u8]);

impl Read for Opaque<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

fn stream(c: &mut Criterion) {
    let page = [0x5a; PAGE_SIZE];
    let mut bytes = Vec::new();
    write_stream(&mut bytes, &page);
    let mut group = c.benchmark_group("stream");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.sample_size(20);

    let mut copy = bytes.clone();
    group.bench_function("memcpy", |b| {
        b.iter(|| copy.copy_from_slice(black_box(&bytes)));
    });
    group.bench_function("read slice (page data not touched)", |b| {
        b.iter(|| {
            let reader = SliceReader::new(black_box(&bytes), ReadOptions::default()).unwrap();
            reader.fold(0_u64, |n, record| n + u64::from(record.is_ok()))
        });
    });
    group.bench_function("read stream (page data skipped by reading)", |b| {
        b.iter(|| {
            let source = Opaque(black_box(&bytes));
            let mut reader = RecordReader::new(source, ReadOptions::default()).unwrap();
            while reader.next_record().unwrap().is_some() {}
        });
    });
    group.bench_function("read stream (each page copied out)", |b| {
        let mut room = [0; PAGE_SIZE];
        b.iter(|| {
            let source = Opaque(black_box(&bytes));
            let mut reader = RecordReader::new(source, ReadOptions::default()).unwrap();
            while let Some(incoming) = reader.next_record().unwrap() {
                if let Incoming::PageData(mut body) = incoming {
                    while body.read_page(&mut room).unwrap() {}
                }
            }
        });
    });
    group.bench_function("write (to memory)", |b| {
        b.iter(|| {
            let mut sink = io::Cursor::new(copy.as_mut_slice());
            write_stream(&mut sink, black_box(&page));
        });
    });
    group.finish();
}

criterion_group!(benches, stream);
criterion_main!(benches);
