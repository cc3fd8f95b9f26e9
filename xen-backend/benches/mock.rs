//! Benchmarks of the mock machine, which show how much of a measured save or restore is the
//! engine's own cost: mapping batches like a saver and a restorer, populating, creating guests.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark fails by panicking, and criterion's macros document nothing"
)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use xsr_format::frame::{Gfn, Mfn};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{Access, Domain, GuestKind, Host};

/// Frames of a batch, as in a PAGE_DATA record.
const BATCH: u64 = 1024;

fn gfns(domain: &dyn Domain, kind: GuestKind) -> Vec<Gfn> {
    if kind != GuestKind::Pv {
        return (4096..4096 + BATCH).map(Gfn).collect();
    }
    let m2p = domain.pv().unwrap().m2p().unwrap();
    let mut frames: Vec<(u64, Gfn)> = (0..=m2p.max_mfn().0)
        .filter_map(|mfn| Some((m2p.pfn(Mfn(mfn))?.0, Gfn(mfn))))
        .filter(|(pfn, _)| (4096..4096 + BATCH).contains(pfn))
        .collect();
    frames.sort_unstable_by_key(|(pfn, _)| *pfn);
    frames.into_iter().map(|(_, gfn)| gfn).collect()
}

fn map(c: &mut Criterion) {
    let mut group = c.benchmark_group("map 1024 frames");
    group.throughput(Throughput::Bytes(BATCH << 12));
    for (max_run, kind) in [
        (32, GuestKind::Pv),
        (1, GuestKind::Pv),
        (32, GuestKind::Pvh),
    ] {
        let config = HostConfig {
            max_run,
            ..HostConfig::default()
        };
        let host = MockHost::ephemeral(&config).unwrap();
        let spec = GuestSpec::new("guest", kind, 64);
        let domain = host.domain(host.create_guest(&spec).unwrap()).unwrap();
        let gfns = gfns(&*domain, kind);
        for access in [Access::Read, Access::Write] {
            group.bench_function(format!("{kind:?}, runs of {max_run}, {access:?}"), |b| {
                b.iter(|| {
                    let pages = domain.map(&gfns, access).unwrap();
                    pages
                        .iter()
                        .fold(0, |sum, (_, page)| sum ^ black_box(page.read_entry(0)))
                });
            });
        }
    }
    group.finish();
}

fn populate(c: &mut Criterion) {
    let mut group = c.benchmark_group("populate 1024 pages");
    group.throughput(Throughput::Elements(BATCH));
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        group.bench_function(format!("{kind:?}"), |b| {
            b.iter_batched(
                || {
                    let domid = host.create_domain(kind, 1, BATCH).unwrap();
                    let gfns: Vec<Gfn> = (0..BATCH).map(Gfn).collect();
                    (Destroyed(host.domain(domid).unwrap()), gfns)
                },
                |(domain, mut gfns)| {
                    domain.0.populate(0, &mut gfns).unwrap();
                    domain
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// A domain that is destroyed when it is dropped.
struct Destroyed(Box<dyn Domain>);

impl Drop for Destroyed {
    fn drop(&mut self) {
        self.0.destroy().unwrap();
    }
}

fn create(c: &mut Criterion) {
    let mut group = c.benchmark_group("make a guest of 256 MiB");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(256 << 20));
    for kind in [GuestKind::Pv, GuestKind::Hvm] {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        group.bench_function(format!("{kind:?}"), |b| {
            b.iter(|| {
                let spec = GuestSpec::new("guest", kind, 256);
                Destroyed(host.domain(host.create_guest(&spec).unwrap()).unwrap())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, map, populate, create);
criterion_main!(benches);
