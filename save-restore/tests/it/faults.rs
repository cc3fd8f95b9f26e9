//! Fault injection: calls, mapped frames, reads and writes of the stream, and callbacks fail in
//! turn, and a cancel comes at each event. After each fault, the engine's promises about failures
//! are checked.
//!
//! Guests are as small as possible, so that every call can have its turn. With one thread a run
//! makes the same calls every time. More threads meet the same points, although their number is
//! then only about the same.

mod calls;
mod cancel;
mod storage;
mod streams;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::common::options;
use crate::common::watch::{Source, Toolstack};
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::sink::PageSink;
use xsr_save_restore::source::{CopySource, PageSource};
use xsr_save_restore::toolstack::{RestoreToolstack, SaveToolstack};
use xsr_save_restore::{
    Live, RestoreError, RestoreRequest, Restored, Rings, SaveError, SaveRequest, Saved,
};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MemoryDigest, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, Errno, GuestKind, Host};

/// A small host.
fn host(seed: u64) -> MockHost {
    let config = HostConfig {
        seed,
        memory_pages: 64 << 8,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

/// A small guest of each kind.
fn guests() -> Vec<GuestSpec> {
    let spec = |name: &str, kind| GuestSpec::new(name, kind, 4);
    vec![
        GuestSpec {
            vcpus: 2,
            offline_vcpus: 1,
            ..spec("pv64", GuestKind::Pv)
        },
        GuestSpec {
            width: 4,
            ..spec("pv32", GuestKind::Pv)
        },
        spec("hvm", GuestKind::Hvm),
        GuestSpec {
            vcpus: 2,
            ..spec("pvh", GuestKind::Pvh)
        },
    ]
}

/// How to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stopped,
    Live,
}

impl Mode {
    const ALL: [Self; 2] = [Self::Stopped, Self::Live];
}

/// Distinct points at which something failed.
#[derive(Default)]
struct Points(BTreeSet<String>);

impl Points {
    fn add(&mut self, point: impl Display) {
        self.0.insert(point.to_string());
    }

    /// Prints their number, which must not fall below `least`.
    fn report(&self, what: &str, least: usize) {
        eprintln!("{}: {} distinct fault points", what, self.0.len());
        assert!(self.0.len() >= least, "{what}: {} points", self.0.len());
    }
}

/// Whether a guest takes fault number `nth` of a call. HVM and PVH guests make the same calls, and
/// their saves are slow because of the gap below their last pfn. So they share the faults of their
/// own calls, and leave half of those that PV guests meet as well to PV guests.
fn takes(kind: GuestKind, op: &str, nth: usize) -> bool {
    let period = if op.contains("hvm") { 2 } else { 4 };
    match kind {
        GuestKind::Pv => true,
        GuestKind::Hvm => nth.is_multiple_of(period),
        GuestKind::Pvh => nth % period == period / 2,
    }
}

/// At which of `count` events to stop: only at some of the many similar ones in the middle.
fn some_events(count: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |at| *at < 6 || at + 12 > count || at % 149 == 0)
}

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// What a guest does after each pass of a live save. It keeps its pages.
const WORK: WorkloadSpec = WorkloadSpec {
    table_permille: 100,
    ..WorkloadSpec::writes(5, 1, 80)
};

/// A guest that also gives pages back and takes some.
const BALLOON: WorkloadSpec = WorkloadSpec {
    balloon_permille: 200,
    ..WORK
};

/// Two passes: all pages, and then the dirty ones. More passes would add nothing new.
struct TwoPasses;

impl PrecopyPolicy for TwoPasses {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        match stats.iteration {
            0 | 1 => PrecopyDecision::Continue,
            _ => PrecopyDecision::StopAndCopy,
        }
    }
}

/// A guest to save, and how to save it.
#[derive(Clone, Copy)]
struct Guest<'a> {
    host: &'a MockHost,
    domid: DomId,
    spec: &'a GuestSpec,
    mode: Mode,
    work: &'a WorkloadSpec,
}

impl Guest<'_> {
    /// Saves over `domain`. The guest works after each pass of a live save.
    fn save<'t>(
        &self,
        threads: usize,
        domain: &dyn Domain,
        toolstack: &'t mut dyn SaveToolstack,
        sink: &mut dyn PageSink,
        progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Saved<'t>, SaveError> {
        let xen = self.host.xen_version().unwrap();
        let options = options(threads);
        if self.mode == Mode::Stopped {
            return SaveRequest::new(domain, xen)
                .options(&options)
                .observe(progress)
                .write_stream(toolstack, sink);
        }
        let mut work = self.host.workload(self.domid, self.work).unwrap();
        let mut step = |event: &Progress| {
            if event.phase == Phase::Precopy && event.pass_is_complete() {
                match work.step(100) {
                    Err(error) if error.errno == Errno::ESRCH => {}
                    done => assert!(done.is_ok(), "{done:?}"),
                }
            }
            progress(event)
        };
        let live = Live {
            policy: &mut TwoPasses,
            verify: false,
        };
        SaveRequest::new(domain, xen)
            .options(&options)
            .live(live)
            .observe(&mut step)
            .write_stream(toolstack, sink)
    }

    /// After a save that failed or was not kept: the guest runs as before.
    fn assert_runs(&self, before: &Source<'_>, what: &str) {
        match self.mode {
            Mode::Stopped => before.assert_unchanged(what),
            Mode::Live => before.assert_runs(what),
        }
    }
}

/// Each small guest for each mode, on a host of its own, running.
fn with_guests(seed: u64, mut check: impl FnMut(&Guest<'_>, &Source<'_>)) {
    let host = host(seed);
    for (spec, mode) in guests()
        .iter()
        .flat_map(|s| Mode::ALL.map(|mode| (s, mode)))
    {
        let spec = GuestSpec {
            name: format!("{}-{mode:?}", spec.name),
            ..spec.clone()
        };
        let domid = host.create_guest(&spec).unwrap();
        let guest = Guest {
            host: &host,
            domid,
            spec: &spec,
            mode,
            work: &WORK,
        };
        check(&guest, &Source::of(&host, domid));
        host.domain(domid).unwrap().destroy().unwrap();
    }
}

/// A new domain for a guest of `spec`, as a toolstack creates it.
fn make_room(host: &MockHost, spec: &GuestSpec) -> (DomId, Rings) {
    let pages = spec.memory_mib * 256 + 256;
    let domid = host.create_domain(spec.kind, spec.vcpus, pages).unwrap();
    let domain = host.domain(domid).unwrap();
    let port = || domain.alloc_unbound_port(DomId(0)).unwrap();
    let rings = Rings {
        store_port: port(),
        store_domid: DomId(0),
        console_port: port(),
        console_domid: DomId(0),
    };
    (domid, rings)
}

/// Restore over `domain`.
fn try_restore<S: PageSource>(
    domain: &dyn Domain,
    source: S,
    toolstack: &mut dyn RestoreToolstack,
    rings: Rings,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Restored, RestoreError> {
    let reader = RecordReader::new(source, ReadOptions::default())?;
    let (restored, _) = RestoreRequest::new(domain, rings)
        // So that the calls come in a fixed order.
        .threads(NonZeroUsize::new(1))
        .observe(progress)
        .read_stream(reader, toolstack)?;
    Ok(restored)
}

/// A stream that was saved despite the fault holds the guest of the suspended source.
fn assert_arrives(from: &MockHost, domid: DomId, to: &MockHost, spec: &GuestSpec, stream: &[u8]) {
    let (new, rings) = make_room(to, spec);
    let domain = to.domain(new).unwrap();
    let mut toolstack = Toolstack::new(domain.as_ref());
    let source = CopySource(stream);
    try_restore(domain.as_ref(), source, &mut toolstack, rings, &mut go_on).unwrap();
    let left = from.memory_digest(domid).unwrap();
    assert_same(&left, &to.memory_digest(new).unwrap(), &spec.name);
    domain.destroy().unwrap();
}

fn assert_same(left: &MemoryDigest, arrived: &MemoryDigest, what: &str) {
    assert_eq!(arrived.differences(left), [], "{what}: memory");
}

/// A domain that a failed restore has left can only be destroyed, and then nothing of it remains.
fn assert_destroyable(host: &MockHost, domid: DomId, free: u64, what: &str) {
    assert_eq!(host.mapped_pages(), 0, "{what}: pages are still mapped");
    let domain = host.domain(domid).unwrap();
    let info = domain.info().unwrap();
    assert_eq!((info.paused, info.shutdown), (true, None), "{what}");
    domain.destroy().unwrap();
    assert_eq!(host.free_pages(), free, "{what}: memory is lost");
}
