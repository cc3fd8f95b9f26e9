//! Guests that change the description of their memory during a save: the p2m moves and grows, pages
//! disappear and return between two looks. Such a guest arrives as it was when it suspended.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use crate::common::faulty::Faulty;
use crate::common::*;
use xsr_format::frame::Gfn;
use xsr_format::record::RecordKind;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::SaveStats;
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::sink::{CopySink, PageSink};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack, ToolstackError};
use xsr_save_restore::{Live, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MockHost, P2mStyle, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, Errno, GuestKind, Host};

/// This many passes, whatever is dirty.
struct Passes(u32);

impl PrecopyPolicy for Passes {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        match stats.iteration < self.0 {
            true => PrecopyDecision::Continue,
            false => PrecopyDecision::StopAndCopy,
        }
    }
}

/// PV guests of every layout, with holes for new pages.
fn pv_specs() -> Vec<GuestSpec> {
    let spec = |width, p2m, memory| GuestSpec {
        width,
        p2m: Some(p2m),
        vcpus: 2,
        ballooned_pages: 200,
        ..GuestSpec::new(format!("pv{width}-{p2m:?}"), GuestKind::Pv, memory)
    };
    vec![
        spec(8, P2mStyle::Linear, 9),
        spec(8, P2mStyle::Tree, 9),
        spec(4, P2mStyle::Linear, 8),
        spec(4, P2mStyle::Tree, 9),
    ]
}

fn live(
    host: &MockHost,
    domain: &dyn Domain,
    sink: &mut dyn PageSink,
    threads: usize,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<SaveStats, SaveError> {
    let mut toolstack = DirectToolstack(domain);
    let how = Live {
        policy: &mut Passes(3),
        verify: false,
    };
    let saved = SaveRequest::new(domain, host.xen_version().unwrap())
        .options(&options(threads))
        .live(how)
        .observe(progress)
        .write_stream(&mut toolstack, sink)?;
    let stats = saved.stats();
    saved.keep_suspended();
    Ok(stats)
}

/// The stream, restored on another host, equals the suspended source, except for the rings of an
/// HVM guest, which a restore clears.
fn assert_arrives(from: &MockHost, source: DomId, stream: &[u8], spec: &GuestSpec, what: &str) {
    let to = host(96);
    let shape = (spec.kind, spec.vcpus, spec.memory_mib * 256 + 4000);
    let (domid, result) = restore_stream(&to, shape, CopySource(stream));
    result.unwrap_or_else(|e| panic!("{} {what}: {e}", spec.name));
    let [left, arrived] = [(from, source), (&to, domid)].map(|(h, d)| h.memory_digest(d).unwrap());
    let rings: Vec<_> = take_apart(stream).rings().collect();
    let mut differ = left.differences(&arrived);
    differ.retain(|pfn| !rings.contains(pfn));
    assert_eq!(differ, [], "{} {what}", spec.name);
}

/// The number of X86_PV_P2M_FRAMES records in a stream.
fn p2m_records(stream: &[u8]) -> usize {
    let frames = RecordKind::X86_PV_P2M_FRAMES.0;
    record_offsets(stream)
        .iter()
        .filter(|r| r.1 == frames)
        .count()
}

/// An action of a guest at a moment of its own.
type Act<'a> = &'a dyn Fn(&mut Workload) -> bool;

/// When: at the n-th event of a phase.
type Moment = (Phase, usize);

fn acting_at(
    host: &MockHost,
    domid: DomId,
    threads: usize,
    moments: &[Moment],
    act: Act<'_>,
) -> Result<(Vec<u8>, SaveStats, usize), SaveError> {
    let work = WorkloadSpec {
        table_permille: 200,
        balloon_permille: 100,
        ..WorkloadSpec::writes(4, 1, 600)
    };
    let mut work = host.workload(domid, &work).unwrap();
    let (mut phase, mut n, mut acted) = (Phase::Tail, 0, 0);
    let mut progress = |progress: &Progress| {
        n = if progress.phase == phase { n + 1 } else { 0 };
        phase = progress.phase;
        if moments.contains(&(phase, n)) && act(&mut work) {
            acted += 1;
        }
        work.step(64).unwrap();
        ControlFlow::Continue(())
    };
    let domain = host.domain(domid).unwrap();
    let mut sink = CopySink(Vec::new());
    let stats = live(host, domain.as_ref(), &mut sink, threads, &mut progress)?;
    Ok((sink.0, stats, acted))
}

#[test]
fn a_p2m_that_moves_is_followed() {
    let act = |work: &mut Workload| (0..5).all(|_| work.move_p2m_leaf().unwrap());
    let mut resent = 0;
    for spec in pv_specs() {
        // In the middle of the first pass, after the last, and before the guest is asked to
        // suspend.
        for moments in [
            &[(Phase::Precopy, 1)][..],
            &[(Phase::Precopy, 2), (Phase::Precopy, 4)],
            &[(Phase::Suspend, 0)],
            &[(Phase::Setup, 0), (Phase::Precopy, 0), (Phase::Suspend, 0)],
        ] {
            let threads = moments.len();
            let host = host(83);
            let domid = host.create_guest(&spec).unwrap();
            let (stream, _, acted) = acting_at(&host, domid, threads, moments, &act).unwrap();
            let what = format!("{moments:?} with {threads} threads");
            assert_eq!(acted, moments.len(), "{} {what}", spec.name);
            assert!(!host.is_log_dirty(domid).unwrap());
            resent += p2m_records(&stream) - 1;
            assert_arrives(&host, domid, &stream, &spec, &what);
        }
    }
    eprintln!("X86_PV_P2M_FRAMES was sent again {resent} times");
    assert!(resent >= 20, "{resent}");
}

#[test]
fn a_p2m_that_grows_is_followed() {
    let mut grown = 0;
    for spec in pv_specs() {
        for pfns in [7, 1500] {
            let refused = Mutex::new(0);
            let act = |work: &mut Workload| match work.grow_p2m(pfns) {
                Ok(acted) => acted,
                // The mock's kernel does not support this (see `grow_p2m`).
                Err(error) if error.errno == Errno::EOPNOTSUPP => {
                    *refused.lock().unwrap() += 1;
                    false
                }
                Err(error) => panic!("{error}"),
            };
            for moments in [
                &[(Phase::Precopy, 4)][..],
                &[(Phase::Precopy, 1), (Phase::Suspend, 0)],
            ] {
                let host = host(84);
                let domid = host.create_guest(&spec).unwrap();
                let (stream, _, acted) = acting_at(&host, domid, 2, moments, &act).unwrap();
                let what = format!("by {pfns} at {moments:?}");
                let asked = acted + std::mem::take(&mut *refused.lock().unwrap());
                assert_eq!(asked, moments.len(), "{} {what}", spec.name);
                // The announcement must come before any pfn beyond the previous one.
                assert_eq!(p2m_records(&stream), 1 + acted, "{} {what}", spec.name);
                assert_arrives(&host, domid, &stream, &spec, &what);
                grown += acted;
            }
        }
    }
    eprintln!("the p2m grew {grown} times");
    assert!(grown >= 15, "{grown}");
}

#[test]
fn a_p2m_that_only_counts_its_generation_up_is_the_same() {
    let host = host(85);
    let spec = &pv_specs()[0];
    let domid = host.create_guest(spec).unwrap();
    let act = |work: &mut Workload| work.bump_p2m_generation().unwrap();
    let moments = [(Phase::Precopy, 1), (Phase::Suspend, 0)];
    let (stream, _, acted) = acting_at(&host, domid, 2, &moments, &act).unwrap();
    assert_eq!((acted, p2m_records(&stream)), (2, 1));
    assert_arrives(&host, domid, &stream, spec, "bumped");
}

/// A toolstack whose guest acts while it is suspending.
struct Late<'a> {
    inner: DirectToolstack<'a>,
    act: &'a mut dyn FnMut(),
}

impl SaveToolstack for Late<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        (self.act)();
        self.inner.suspend()
    }
    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.inner.resume()
    }
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.inner.switch_qemu_logdirty(on)
    }
}

#[test]
fn a_p2m_that_moves_before_a_plain_save_suspends_the_guest_is_followed() {
    for spec in pv_specs() {
        let host = host(86);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let work = WorkloadSpec::writes(1, 1, 300);
        let mut work = host.workload(domid, &work).unwrap();
        let mut act = || assert!((0..3).all(|_| work.move_p2m_leaf().unwrap()));
        let mut toolstack = Late {
            inner: DirectToolstack(domain.as_ref()),
            act: &mut act,
        };
        let mut sink = CopySink(Vec::new());
        let saved = SaveRequest::new(domain.as_ref(), host.xen_version().unwrap())
            .options(&options(1))
            .observe(&mut |_| ControlFlow::Continue(()))
            .write_stream(&mut toolstack, &mut sink);
        saved.unwrap().keep_suspended();
        assert_eq!(p2m_records(&sink.0), 2, "{}", spec.name);
        assert_arrives(&host, domid, &sink.0, &spec, "late");
    }
}

#[test]
fn memory_added_at_the_end_of_a_translated_guest_arrives() {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        for moment in [(Phase::Precopy, 2), (Phase::Suspend, 0)] {
            let host = host(87);
            let spec = GuestSpec::new(format!("{kind:?}"), kind, 8);
            let domid = host.create_guest(&spec).unwrap();
            let domain = host.domain(domid).unwrap();
            let end = domain.maximum_gfn().unwrap().unwrap().0 + 1;
            let at = Gfn(end.next_multiple_of(512) + 512);
            let (mut phase, mut n) = (Phase::Setup, 0);
            let mut add = |progress: &Progress| {
                n = if progress.phase == phase { n + 1 } else { 0 };
                phase = progress.phase;
                if (phase, n) == moment {
                    assert_eq!(domain.populate(0, &mut [at]).unwrap(), 1);
                }
                ControlFlow::Continue(())
            };
            let mut sink = CopySink(Vec::new());
            live(&host, domain.as_ref(), &mut sink, 2, &mut add).unwrap();
            assert_eq!(domain.maximum_gfn().unwrap(), Some(at));
            assert_arrives(&host, domid, &sink.0, &spec, "added");
            let parts = take_apart(&sink.0);
            let last = parts.pages.last_key_value().unwrap();
            assert_eq!((last.0.0, last.1.1.is_some()), (at.0, true));
        }
    }
}

#[test]
fn a_page_that_goes_between_two_looks_is_put_off() {
    let mut deferred = 0;
    for mut spec in pv_specs() {
        spec.ballooned_pages = 0;
        for threads in [1, 2] {
            let host = host(88);
            let domid = host.create_guest(&spec).unwrap();
            let work = WorkloadSpec {
                table_permille: 300,
                balloon_permille: 600,
                ..WorkloadSpec::writes(6, 1, 1500)
            };
            let work = Arc::new(Mutex::new(host.workload(domid, &work).unwrap()));
            let worker = Arc::clone(&work);
            let domain = Faulty::meddled(host.domain(domid).unwrap(), move || {
                worker.lock().unwrap().step(256).unwrap();
            });
            let mut sink = CopySink(Vec::new());
            let mut go_on = |_: &Progress| ControlFlow::Continue(());
            let stats = live(&host, &domain, &mut sink, threads, &mut go_on).unwrap();
            deferred += stats.deferred;
            // There was no hole at the start, so any deferred page was caught while it moved.
            assert!(stats.deferred > 0, "{}: {stats:?}", spec.name);
            assert_arrives(&host, domid, &sink.0, &spec, "meddled with");
            // Contents first and absent in the end, and the reverse.
            let counts = work.lock().unwrap().counts();
            assert!(counts.given_back > 100 && counts.taken > 100, "{counts:?}");
            let [gone, back] = changes(&sink.0);
            assert!(gone > 0 && back > 0, "{}: {gone} {back}", spec.name);
        }
    }
    eprintln!("{deferred} pfns were put off");
}

/// How many pfns of a stream are absent in the end after having had contents, and how many have
/// contents after having been absent.
fn changes(stream: &[u8]) -> [usize; 2] {
    let mut state = std::collections::BTreeMap::new();
    let mut changed = [
        std::collections::BTreeSet::new(),
        std::collections::BTreeSet::new(),
    ];
    for (_, head) in batches(stream) {
        for entry in head[8..].chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap());
            let (pfn, data) = (entry & ((1 << 52) - 1), entry >> 60 < 0xd);
            if let Some(before) = state.insert(pfn, data)
                && before != data
            {
                changed[usize::from(data)].insert(pfn);
            }
        }
    }
    changed.map(|set| set.iter().filter(|pfn| state.contains_key(pfn)).count())
}

#[test]
fn a_p2m_that_shrinks_is_named_and_the_guest_runs_on() {
    let mut tried = 0;
    for spec in pv_specs() {
        let host = host(89);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let mut work = host
            .workload(domid, &WorkloadSpec::writes(1, 1, 300))
            .unwrap();
        // Only what was added last is removed again.
        match work.grow_p2m(3000) {
            Ok(grown) => assert!(grown),
            Err(error) => {
                assert_eq!(error.errno, Errno::EOPNOTSUPP, "{}", spec.name);
                continue;
            }
        }
        tried += 1;
        let (mut at, mut shrunk) = (0, false);
        let mut shrink = |progress: &Progress| {
            if progress.phase == Phase::Precopy {
                at += 1;
                if at == 2 {
                    shrunk = work.shrink_p2m(1500).unwrap();
                }
            }
            ControlFlow::Continue(())
        };
        let mut sink = CopySink(io::sink());
        let error = live(&host, domain.as_ref(), &mut sink, 1, &mut shrink).unwrap_err();
        assert!(shrunk);
        assert!(error.to_string().contains("p2m shrank"), "{error}");
        let info = domain.info().unwrap();
        assert_eq!((info.shutdown, info.paused), (None, false));
        assert!(!host.is_log_dirty(domid).unwrap());
        // Once it is small, it can be saved.
        let stream = save_to_vec(&host, domid, &options(1)).unwrap();
        assert_eq!(p2m_records(&stream), 1);
    }
    assert_eq!(tried, 3);
}
