//! Live migrations of a working guest: every kind of guest, with 1, 2 and 8 threads, over a file, a
//! pipe, a socket pair and a reader that returns one byte at a time. The memory that arrives equals
//! the memory of the suspended guest.

use std::io::{self, BufReader, Read, Seek};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use crate::common::stream::OneByte;
use crate::common::{options, restore_stream};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::SaveStats;
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::{CopySink, FdSink, PageSink};
use xsr_save_restore::source::{CopySource, FdSource, PageSource};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Live, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, P2mStyle, WorkloadSpec};
use xsr_xen_backend::{DomId, GuestKind, Host};

const THREADS: [usize; 3] = [1, 2, 8];

fn host(seed: u64) -> MockHost {
    let config = HostConfig {
        seed,
        memory_pages: 64 << 8,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

fn guests() -> [GuestSpec; 4] {
    [
        GuestSpec {
            vcpus: 2,
            ballooned_pages: 40,
            ..GuestSpec::new("pv64", GuestKind::Pv, 6)
        },
        GuestSpec {
            width: 4,
            ballooned_pages: 9,
            p2m: Some(P2mStyle::Tree),
            ..GuestSpec::new("pv32", GuestKind::Pv, 6)
        },
        GuestSpec::new("hvm", GuestKind::Hvm, 6),
        GuestSpec {
            vcpus: 2,
            ..GuestSpec::new("pvh", GuestKind::Pvh, 6)
        },
    ]
}

/// Writes, page tables that change, pages that come and go.
const WORK: WorkloadSpec = WorkloadSpec {
    table_permille: 100,
    balloon_permille: 100,
    ..WorkloadSpec::writes(11, 40_000, 400)
};

/// Saves live; the guest stays suspended.
fn save(
    host: &MockHost,
    domid: DomId,
    threads: usize,
    sink: &mut dyn PageSink,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> SaveStats {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = DirectToolstack(domain.as_ref());
    let live = Live {
        policy: &mut XenPolicy,
        verify: false,
    };
    let (xen, options) = (host.xen_version().unwrap(), options(threads));
    let domain = domain.as_ref();
    let saved = SaveRequest::new(domain, xen)
        .options(&options)
        .live(live)
        .observe(progress)
        .write_stream(&mut toolstack, sink)
        .unwrap();
    let stats = saved.stats();
    saved.keep_suspended();
    stats
}

/// A working guest that makes progress in every pass, however short the pass is.
fn save_at_work(host: &MockHost, domid: DomId, threads: usize, sink: &mut dyn PageSink) {
    let work = host.workload(domid, &WORK).unwrap().run_in_background();
    let mut seen = 0;
    let mut wait = |progress: &Progress| {
        // Work done before the log was on does not count, nor work in progress then.
        if progress.phase == Phase::Precopy && progress.pages_done == 0 {
            seen = work.operations();
        }
        if progress.phase == Phase::Precopy && progress.pass_is_complete() {
            while work.operations() == seen {
                thread::yield_now();
            }
            seen = work.operations();
            while work.operations() < seen + 100 {
                thread::yield_now();
            }
        }
        ControlFlow::Continue(())
    };
    let stats = save(host, domid, threads, sink, &mut wait);
    let counts = work.stop().unwrap().counts();
    assert!(stats.iterations >= 2, "{stats:?}");
    assert!(counts.writes > 0 && counts.given_back + counts.taken > 0);
}

/// One cell: a guest is migrated from one host to another while it works.
struct Cell<'a> {
    from: &'a MockHost,
    to: &'a MockHost,
    spec: &'a GuestSpec,
    threads: usize,
}

impl Cell<'_> {
    fn run(&self, way: &str, go: impl FnOnce(&Self, DomId) -> DomId) {
        let what = format!("{}, {} threads, {way}", self.spec.name, self.threads);
        let made = self.from.create_guest(self.spec).unwrap();
        let arrived = go(self, made);
        let left = self.from.memory_digest(made).unwrap();
        let there = self.to.memory_digest(arrived).unwrap();
        assert_eq!(there.differences(&left), [], "{what}");
        assert_eq!([self.from, self.to].map(MockHost::mapped_pages), [0, 0]);
        // It continues to work on the destination.
        self.to.domain(arrived).unwrap().unpause().unwrap();
        let mut work = self.to.workload(arrived, &WORK).unwrap();
        assert_eq!(work.step(200).unwrap(), 200, "{what}");
        self.from.domain(made).unwrap().destroy().unwrap();
        self.to.domain(arrived).unwrap().destroy().unwrap();
    }

    fn save(&self, made: DomId, sink: &mut dyn PageSink) {
        save_at_work(self.from, made, self.threads, sink);
    }

    fn restore(&self, source: impl PageSource) -> DomId {
        let pages = self.spec.memory_mib * 256;
        let shape = (self.spec.kind, self.spec.vcpus, pages);
        let (domid, result) = restore_stream(self.to, shape, source);
        result.unwrap();
        domid
    }

    /// Both ends at the same time.
    fn through(&self, made: DomId, into: impl AsFd + Send, from: impl PageSource) -> DomId {
        thread::scope(|scope| {
            scope.spawn(move || self.save(made, &mut FdSink::new(into)));
            self.restore(from)
        })
    }
}

#[test]
fn a_guest_at_work_arrives_whatever_it_is_and_however_it_goes() {
    let (from, to) = (host(50), host(51));
    let mut cells = 0;
    for spec in &guests() {
        for threads in THREADS {
            let cell = Cell {
                from: &from,
                to: &to,
                spec,
                threads,
            };
            cell.run("file", |cell, made| {
                let mut file = tempfile::tempfile().unwrap();
                cell.save(made, &mut FdSink::new(&file));
                file.rewind().unwrap();
                cell.restore(FdSource::new(&file))
            });
            cell.run("pipe", |cell, made| {
                let (reader, writer) = io::pipe().unwrap();
                cell.through(made, writer, FdSource::new(reader))
            });
            cell.run("socket pair", |cell, made| {
                let (one, other) = UnixStream::pair().unwrap();
                cell.through(made, one, FdSource::new(other))
            });
            cell.run("one byte at a time", |cell, made| {
                let (reader, writer) = io::pipe().unwrap();
                let reader = OneByte(BufReader::new(reader));
                cell.through(made, writer, CopySource(reader))
            });
            cells += 4;
        }
    }
    eprintln!("{cells} live migrations under work");
    assert_eq!(cells, 48);
}

/// A sink of some kind for a save, and what has arrived at its other end.
fn collect(way: &str, save: impl FnOnce(&mut dyn PageSink)) -> Vec<u8> {
    let gather = |mut from: Box<dyn Read + Send>| {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        bytes
    };
    match way {
        "memory" => {
            let mut sink = CopySink(Vec::new());
            save(&mut sink);
            sink.0
        }
        "file" => {
            let mut file = tempfile::tempfile().unwrap();
            save(&mut FdSink::new(&file));
            file.rewind().unwrap();
            gather(Box::new(file))
        }
        "pipe" => {
            let (reader, writer) = io::pipe().unwrap();
            thread::scope(|scope| {
                let bytes = scope.spawn(move || gather(Box::new(reader)));
                save(&mut FdSink::new(writer));
                bytes.join().unwrap()
            })
        }
        _ => {
            let (reader, writer) = UnixStream::pair().unwrap();
            thread::scope(|scope| {
                let bytes = scope.spawn(move || gather(Box::new(reader)));
                save(&mut FdSink::new(writer));
                bytes.join().unwrap()
            })
        }
    }
}

#[test]
fn a_stepped_guest_gives_the_same_bytes_whatever_takes_them_and_with_any_threads() {
    for spec in &guests() {
        let bytes = |way: &str, threads| {
            let host = host(52);
            let domid = host.create_guest(spec).unwrap();
            let mut work = host.workload(domid, &WORK).unwrap();
            let mut step = |progress: &Progress| {
                if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                    work.step(150).unwrap();
                }
                ControlFlow::Continue(())
            };
            let bytes = collect(way, |sink| {
                let stats = save(&host, domid, threads, sink, &mut step);
                assert_eq!(stats.iterations, 5, "{way}: {stats:?}");
            });
            (bytes, host.memory_digest(domid).unwrap())
        };
        let (one, left) = bytes("memory", 1);
        for threads in THREADS {
            for way in ["memory", "file", "pipe", "socket pair"] {
                let (many, there) = bytes(way, threads);
                let what = format!("{}, {threads} threads, {way}", spec.name);
                assert!(one == many, "{what}: other bytes");
                assert_eq!(there.differences(&left), [], "{what}");
            }
        }
        let to = host(53);
        let shape = (spec.kind, spec.vcpus, spec.memory_mib * 256);
        let (domid, result) = restore_stream(&to, shape, CopySource(&*one));
        result.unwrap();
        let arrived = to.memory_digest(domid).unwrap();
        assert_eq!(arrived.differences(&left), [], "{}", spec.name);
    }
}
