//! Live saves: a guest that writes meanwhile arrives as it was when it suspended.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use crate::common::*;
use xsr_format::frame::{PageType, Pfn};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::SaveStats;
use xsr_save_restore::save::precopy::{
    OnTimeout, PrecopyDecision, PrecopyPolicy, PrecopyStats, TargetPolicy, XenPolicy,
};
use xsr_save_restore::sink::{CopySink, PageSink};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Live, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

/// Saves live, over `domain`; the guest stays suspended.
fn live_over(
    host: &MockHost,
    domain: &dyn Domain,
    sink: &mut dyn PageSink,
    threads: usize,
    live: Live<'_>,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<SaveStats, SaveError> {
    let mut toolstack = DirectToolstack(domain);
    let xen = host.xen_version().unwrap();
    let saved = SaveRequest::new(domain, xen)
        .options(&options(threads))
        .live(live)
        .observe(progress)
        .write_stream(&mut toolstack, sink)?;
    let stats = saved.stats();
    saved.keep_suspended();
    Ok(stats)
}

/// As Xen does it: with its policy, and without verification.
fn live(
    host: &MockHost,
    domid: DomId,
    threads: usize,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> (Vec<u8>, SaveStats) {
    let domain = host.domain(domid).unwrap();
    let mut sink = CopySink(Vec::new());
    let how = Live {
        policy: &mut XenPolicy,
        verify: false,
    };
    let stats = live_over(host, domain.as_ref(), &mut sink, threads, how, progress).unwrap();
    assert!(!host.is_log_dirty(domid).unwrap());
    (sink.0, stats)
}

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The stream, restored on another host, is the memory of the suspended source.
fn assert_arrives(from: &MockHost, source: DomId, stream: &[u8], spec: &GuestSpec) {
    let to = host(99);
    let shape = shape_of_live(stream, spec);
    let (domid, result) = restore_stream(&to, shape, CopySource(stream));
    result.unwrap();
    let differ = differences((from, source), (&to, domid), stream);
    assert_eq!(differ, [], "{}", spec.name);
}

/// The pages that arrived changed, except the rings of an HVM guest, which a restore clears.
fn differences(from: (&MockHost, DomId), to: (&MockHost, DomId), stream: &[u8]) -> Vec<Pfn> {
    let [left, arrived] = [from, to].map(|(host, domid)| host.memory_digest(domid).unwrap());
    let rings: Vec<Pfn> = take_apart(stream).rings().collect();
    let mut differ = left.differences(&arrived);
    differ.retain(|pfn| !rings.contains(pfn));
    differ
}

/// Room for the guest: a page that comes twice counts once.
fn shape_of_live(stream: &[u8], spec: &GuestSpec) -> Shape {
    let pages = take_apart(stream).pages.len() as u64;
    (
        spec.kind,
        spec.vcpus,
        pages.min(spec.memory_mib * 256 + 1000),
    )
}

#[test]
fn a_guest_that_writes_nothing_is_sent_once() {
    let host = host(60);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let plain = save_to_vec(&host, domid, &options(1)).unwrap();
        let (stream, stats) = live(&host, domid, 2, &mut go_on);
        // Only what a suspending kernel writes itself comes twice.
        assert!(
            stats.pages - take_apart(&plain).data_pages() < 10,
            "{stats:?}"
        );
        assert!((1..=2).contains(&stats.iterations), "{stats:?}");
        assert_arrives(&host, domid, &stream, &spec);
    }
}

#[test]
fn a_guest_that_writes_all_the_time_arrives_as_it_was_when_it_suspended() {
    for (spec, threads) in specs().into_iter().zip([1, 2, 8].into_iter().cycle()) {
        let host = host(61);
        let domid = host.create_guest(&spec).unwrap();
        let work = WorkloadSpec {
            table_permille: 100,
            ..WorkloadSpec::writes(7, 50_000, 800)
        };
        let work = host.workload(domid, &work).unwrap().run_in_background();
        // The guest makes progress in every pass, however short the pass is.
        let (mut runs, mut seen) = (true, 0);
        let mut wait = |progress: &Progress| {
            runs &= progress.phase != Phase::Suspend;
            while runs && progress.phase == Phase::Precopy && work.operations() < seen + 50 {
                std::thread::yield_now();
            }
            seen = work.operations();
            ControlFlow::Continue(())
        };
        let (stream, stats) = live(&host, domid, threads, &mut wait);
        work.stop().unwrap();
        assert!(stats.iterations >= 2, "{}: {stats:?}", spec.name);
        assert_arrives(&host, domid, &stream, &spec);
    }
}

/// Saves with `operations` of the guest after each pass, and none in between: the dirty sets are
/// the same every time.
fn stepped(
    spec: &GuestSpec,
    threads: usize,
    work: &WorkloadSpec,
    operations: u64,
) -> (MockHost, DomId, Vec<u8>) {
    let host = host(62);
    let domid = host.create_guest(spec).unwrap();
    let mut work = host.workload(domid, work).unwrap();
    let mut step = |progress: &Progress| {
        if progress.phase == Phase::Precopy && progress.pass_is_complete() {
            work.step(operations).unwrap();
        }
        ControlFlow::Continue(())
    };
    let (stream, _) = live(&host, domid, threads, &mut step);
    (host, domid, stream)
}

#[test]
fn a_stepped_guest_gives_the_same_bytes_with_any_number_of_threads() {
    let work = WorkloadSpec {
        table_permille: 50,
        ..WorkloadSpec::writes(3, 1, 500)
    };
    for spec in specs() {
        let (host, domid, one) = stepped(&spec, 1, &work, 300);
        for threads in [2, 8] {
            let (_, _, many) = stepped(&spec, threads, &work, 300);
            assert!(one == many, "{} with {threads} threads", spec.name);
        }
        assert_arrives(&host, domid, &one, &spec);
        // Later versions of a page do occur.
        let named: u64 = batches(&one)
            .iter()
            .map(|(_, head)| head.len() as u64 / 8 - 1)
            .sum();
        assert!(named > take_apart(&one).pages.len() as u64, "{}", spec.name);
    }
}

#[test]
fn pages_that_were_given_back_are_gone_and_those_taken_again_are_there() {
    let mut released = 0;
    for balloon_permille in [200, 1000] {
        let work = WorkloadSpec {
            balloon_permille,
            ..WorkloadSpec::writes(5, 1, 400)
        };
        for spec in specs() {
            let (host, domid, stream) = stepped(&spec, 2, &work, 200);
            let to = crate::common::host(98);
            let shape = shape_of_live(&stream, &spec);
            let (new, result) = restore_stream(&to, shape, CopySource(&*stream));
            let stats = result.unwrap();
            let differ = differences((&host, domid), (&to, new), &stream);
            assert_eq!(differ, [], "{}", spec.name);
            let pages =
                |host: &MockHost, domid| host.domain(domid).unwrap().info().unwrap().tot_pages;
            assert_eq!(pages(&to, new), pages(&host, domid), "{}", spec.name);
            // Each of them had memory first, and has none in the end.
            let has_data: BTreeSet<Pfn> = versions(&stream)
                .filter(|(_, page_type)| page_type.is_populated())
                .map(|(pfn, _)| pfn)
                .collect();
            let gone = take_apart(&stream).pages;
            let gone = gone.iter().filter(|(pfn, (page_type, _))| {
                *page_type == PageType::XTAB && has_data.contains(pfn)
            });
            assert!(stats.released >= gone.count() as u64, "{}", spec.name);
            released += stats.released;
        }
    }
    assert!(released > 500, "{released} pages were given back");
}

/// A page table that is absent (XTAB) in its first entry, because it could not be sent while the
/// guest ran, keeps the memory that it got because of other tables.
#[test]
fn a_page_that_is_absent_first_and_comes_later_stays() {
    for spec in specs() {
        let host = host(70);
        let domid = host.create_guest(&spec).unwrap();
        let plain = save_to_vec(&host, domid, &options(1)).unwrap();
        let (first, _) = memory_of(&plain);
        // Every page is marked absent before any of them comes.
        let named: Vec<Pfn> = take_apart(&plain).pages.keys().copied().collect();
        let absent = absent_record(&named);
        let stream = [&plain[..first], &absent, &plain[first..]].concat();
        let to = crate::common::host(71);
        let shape = shape_of_live(&stream, &spec);
        let (new, result) = restore_stream(&to, shape, CopySource(&*stream));
        assert_eq!(result.unwrap().released, 0, "{}", spec.name);
        unpause(&to, new);
        let back = save_to_vec(&to, new, &options(1)).unwrap();
        assert_same_guest(&spec.name, &plain, &back);
    }
}

#[test]
fn verification_finds_nothing() {
    for spec in specs() {
        let host = host(63);
        let domid = host.create_guest(&spec).unwrap();
        let work = WorkloadSpec::writes(9, 20_000, 300);
        let work = host.workload(domid, &work).unwrap().run_in_background();
        let domain = host.domain(domid).unwrap();
        let mut sink = CopySink(Vec::new());
        let how = Live {
            policy: &mut XenPolicy,
            verify: true,
        };
        live_over(&host, domain.as_ref(), &mut sink, 2, how, &mut go_on).unwrap();
        work.stop().unwrap();
        let to = crate::common::host(97);
        let (_, result) = restore_stream(&to, shape_of_live(&sink.0, &spec), CopySource(&*sink.0));
        assert_eq!(result.unwrap().verify_mismatches, 0, "{}", spec.name);
    }
}

/// Requests `passes`, then gives up.
struct GivesUp(u32);

impl PrecopyPolicy for GivesUp {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        match stats.iteration < self.0 {
            true => PrecopyDecision::Continue,
            false => PrecopyDecision::Abort,
        }
    }
}

/// The guest runs, and its pages are not logged.
fn assert_runs(host: &MockHost, domid: DomId, what: &str) {
    let info = host.domain(domid).unwrap().info().unwrap();
    assert_eq!((info.shutdown, info.paused), (None, false), "{what}");
    assert!(!host.is_log_dirty(domid).unwrap(), "{what}");
}

#[test]
fn a_policy_that_gives_up_leaves_the_guest_running() {
    let host = host(64);
    let domid = host.create_guest(&specs()[0]).unwrap();
    let domain = host.domain(domid).unwrap();
    let work = WorkloadSpec::writes(9, 200_000, 2000);
    let work = host.workload(domid, &work).unwrap().run_in_background();
    for passes in [0, 1, 3] {
        let how = Live {
            policy: &mut GivesUp(passes),
            verify: false,
        };
        let mut sink = CopySink(io::sink());
        let error = live_over(&host, domain.as_ref(), &mut sink, 2, how, &mut go_on).unwrap_err();
        assert!(matches!(error, SaveError::PolicyAborted { .. }), "{error}");
        assert_runs(&host, domid, &error.to_string());
    }
    work.stop().unwrap();
}

#[test]
fn a_target_for_the_downtime_is_met_or_the_time_is_up() {
    for (on_timeout, rate) in [(OnTimeout::Cancel, 1000), (OnTimeout::StopAndCopy, 500_000)] {
        let host = host(65);
        let spec = &specs()[0];
        let domid = host.create_guest(spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let work = WorkloadSpec::writes(9, rate, 3000);
        let work = host.workload(domid, &work).unwrap().run_in_background();
        let mut sink = CopySink(Vec::new());
        let how = Live {
            policy: &mut TargetPolicy {
                max_downtime: Duration::from_millis(500),
                timeout: Some(Duration::from_secs(2)),
                on_timeout,
            },
            verify: false,
        };
        live_over(&host, domain.as_ref(), &mut sink, 2, how, &mut go_on).unwrap();
        work.stop().unwrap();
        assert_arrives(&host, domid, &sink.0, spec);
    }
}

#[test]
fn a_save_that_is_stopped_in_any_pass_leaves_the_guest_running() {
    let host = host(66);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        for (phase, iteration) in [
            (Phase::Setup, 0),
            (Phase::Precopy, 0),
            (Phase::Precopy, 1),
            (Phase::Suspend, 1),
            (Phase::StopAndCopy, 1),
            (Phase::Tail, 1),
        ] {
            let mut work = host
                .workload(domid, &WorkloadSpec::writes(1, 1, 500))
                .unwrap();
            let mut stop = |progress: &Progress| {
                if progress.phase == Phase::Precopy {
                    work.step(200).unwrap();
                }
                match progress.phase == phase && progress.iteration >= iteration {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let how = Live {
                policy: &mut XenPolicy,
                verify: false,
            };
            let mut sink = CopySink(io::sink());
            let result = live_over(&host, domain.as_ref(), &mut sink, 2, how, &mut stop);
            assert!(matches!(result, Err(SaveError::Aborted)), "{phase:?}");
            assert_runs(&host, domid, &format!("{} {phase:?}", spec.name));
        }
    }
}

#[test]
fn a_log_that_something_else_holds_is_taken_over() {
    let host = host(67);
    let spec = GuestSpec::new("hvm", GuestKind::Hvm, 8);
    let domid = host.create_guest(&spec).unwrap();
    host.hold_log_dirty(domid).unwrap();
    let (stream, _) = live(&host, domid, 1, &mut go_on);
    assert_arrives(&host, domid, &stream, &spec);
}
