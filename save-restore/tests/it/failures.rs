//! Failures of a save or a restore: the guest that was being saved keeps running, and a failed
//! restore leaves no running domain.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::common::*;
use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::error::GuestError;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{
    DirectToolstack, MissingStaticData, RestoreToolstack, SaveToolstack, ToolstackError,
};
use xsr_save_restore::{Live, RestoreError, RestoreRequest, Rings, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MockHost, WorkloadEnd, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host, ShutdownReason};

/// Small guests: every call of a save and a restore can be made to fail in turn.
fn small() -> Vec<GuestSpec> {
    vec![
        GuestSpec {
            vcpus: 2,
            ..GuestSpec::new("pv64", GuestKind::Pv, 8)
        },
        GuestSpec {
            width: 4,
            ..GuestSpec::new("pv32", GuestKind::Pv, 8)
        },
    ]
}

fn go_on(_: &xsr_save_restore::progress::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The guest runs on the source, and can be saved to the same bytes as before.
fn assert_runs_on(host: &MockHost, domid: DomId, before: &[u8], what: &str) {
    let info = host.domain(domid).unwrap().info().unwrap();
    assert_eq!((info.shutdown, info.paused), (None, false), "{what}");
    let after = save_to_vec(host, domid, &options(1)).unwrap();
    assert!(before == after, "{what}: the guest has changed");
}

/// Takes some bytes, then fails.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.0);
        self.0 -= n;
        match n {
            0 => Err(io::ErrorKind::StorageFull.into()),
            n => Ok(n),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_save_that_is_stopped_in_any_phase_resumes_the_guest() {
    let host = host(22);
    let domid = host.create_guest(&specs()[0]).unwrap();
    let before = save_to_vec(&host, domid, &options(1)).unwrap();
    for phase in [Phase::Setup, Phase::Suspend, Phase::Pages, Phase::Tail] {
        let domain = host.domain(domid).unwrap();
        let mut toolstack = DirectToolstack(domain.as_ref());
        let mut stop = |progress: &xsr_save_restore::progress::Progress| match progress.phase {
            at if at == phase => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let xen = host.xen_version().unwrap();
        let mut sink = CopySink(io::sink());
        let result = SaveRequest::new(domain.as_ref(), xen)
            .options(&options(2))
            .observe(&mut stop)
            .write_stream(&mut toolstack, &mut sink);
        assert!(matches!(
            result.map(|_| ()).unwrap_err(),
            SaveError::Aborted
        ));
        assert_runs_on(&host, domid, &before, &format!("{phase:?}"));
    }
}

#[test]
fn a_save_that_is_dropped_resumes_the_guest_and_one_that_is_kept_does_not() {
    let host = host(23);
    for spec in small() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let xen = host.xen_version().unwrap();
        let shutdown = || domain.info().unwrap().shutdown;
        let mut toolstack = DirectToolstack(domain.as_ref());
        let mut sink = CopySink(io::sink());
        let saved = SaveRequest::new(domain.as_ref(), xen)
            .options(&options(1))
            .observe(&mut go_on)
            .write_stream(&mut toolstack, &mut sink);
        let saved = saved.unwrap();
        assert!(shutdown().is_some());
        drop(saved);
        assert!(shutdown().is_none());
        let saved = SaveRequest::new(domain.as_ref(), xen)
            .options(&options(1))
            .observe(&mut go_on)
            .write_stream(&mut toolstack, &mut sink);
        saved.unwrap().keep_suspended();
        assert!(shutdown().is_some());
    }
}

/// A toolstack of which one callback fails, and which counts the others.
struct Failing<'a> {
    domain: &'a dyn Domain,
    fails: &'static str,
    log: Vec<&'static str>,
}

impl Failing<'_> {
    fn note(&mut self, what: &'static str) -> Result<(), ToolstackError> {
        self.log.push(what);
        match what == self.fails {
            true => Err(ToolstackError::new(what, "no")),
            false => Ok(()),
        }
    }
}

impl SaveToolstack for Failing<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.note("suspend")?;
        if self.fails != "pretend" {
            self.domain.suspend().unwrap();
        }
        if self.fails == "suspend half-way" {
            return Err(ToolstackError::new("suspend", "a disk would not go quiet"));
        }
        Ok(())
    }
    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.note("resume")?;
        self.domain.resume().unwrap();
        Ok(())
    }
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.note(if on { "logdirty on" } else { "logdirty off" })
    }
}

impl RestoreToolstack for Failing<'_> {
    fn static_data_done(&mut self, _: MissingStaticData) -> Result<(), ToolstackError> {
        self.note("static data done")
    }
    fn restore_results(
        &mut self,
        store: Option<Gfn>,
        console: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        assert!(store.is_some() && console.is_some());
        self.note("restore results")
    }
}

fn save_with(
    host: &MockHost,
    domid: DomId,
    fails: &'static str,
    room: usize,
) -> (Result<(), SaveError>, Vec<&'static str>) {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = Failing {
        domain: domain.as_ref(),
        fails,
        log: Vec::new(),
    };
    let xen = host.xen_version().unwrap();
    let mut sink = CopySink(Full(room));
    let result = SaveRequest::new(domain.as_ref(), xen)
        .options(&options(1))
        .observe(&mut go_on)
        .write_stream(&mut toolstack, &mut sink);
    let result = result.map(drop);
    (result, toolstack.log)
}

#[test]
fn a_guest_that_somebody_else_has_suspended_is_left_alone() {
    let host = host(37);
    let domid = host.create_guest(&small()[0]).unwrap();
    host.domain(domid).unwrap().suspend().unwrap();
    let (result, log) = save_with(&host, domid, "", usize::MAX);
    let error = result.unwrap_err();
    assert!(error.to_string().contains("suspended already"), "{error}");
    assert_eq!(log, [""; 0]);
    assert!(
        host.domain(domid)
            .unwrap()
            .info()
            .unwrap()
            .shutdown
            .is_some()
    );
}

/// How a guest disappears while it is being saved.
#[derive(Clone, Copy, Debug)]
enum Goes {
    ShutsDown(ShutdownReason),
    Destroyed,
    /// Another program resumes it after it has suspended.
    Resumed,
    /// And then it shuts down.
    ResumedAndShutsDown(ShutdownReason),
}

/// The guest shuts itself down.
fn shut_down(mock: &MockHost, domid: DomId, reason: ShutdownReason) {
    let mut work = WorkloadSpec::writes(1, 1000, 16);
    work.end = Some(WorkloadEnd { after: 0, reason });
    mock.workload(domid, &work).unwrap().step(1).unwrap();
}

/// A save, live or still, over either interface of the machine, of a guest that disappears when the
/// save reaches a phase; returns its error.
fn save_of_one_that_goes(
    spec: &GuestSpec,
    (live, by_calls): (bool, bool),
    when: Phase,
    goes: Goes,
) -> (MockHost, DomId, SaveError) {
    let mock = host(41);
    let domid = mock.create_guest(spec).unwrap();
    let face: Box<dyn Host> = match by_calls {
        true => Box::new(mock.as_xen().unwrap()),
        false => Box::new(mock.clone()),
    };
    let domain = face.domain(domid).unwrap();
    let mut went = false;
    let mut progress = |progress: &Progress| {
        if progress.phase == when && !std::mem::replace(&mut went, true) {
            match goes {
                Goes::Destroyed => mock.domain(domid).unwrap().destroy().unwrap(),
                Goes::ShutsDown(reason) => shut_down(&mock, domid, reason),
                Goes::Resumed => mock.domain(domid).unwrap().resume().unwrap(),
                Goes::ResumedAndShutsDown(reason) => {
                    mock.domain(domid).unwrap().resume().unwrap();
                    shut_down(&mock, domid, reason);
                }
            }
        }
        ControlFlow::Continue(())
    };
    let (xen, options) = (mock.xen_version().unwrap(), options(2));
    let mut toolstack = DirectToolstack(domain.as_ref());
    let mut sink = CopySink(Vec::new());
    let result = match live {
        false => SaveRequest::new(domain.as_ref(), xen)
            .options(&options)
            .observe(&mut progress)
            .write_stream(&mut toolstack, &mut sink),
        true => SaveRequest::new(domain.as_ref(), xen)
            .options(&options)
            .live(Live {
                policy: &mut XenPolicy,
                verify: false,
            })
            .observe(&mut progress)
            .write_stream(&mut toolstack, &mut sink),
    };
    let error = result.map(drop).unwrap_err();
    assert!(went, "{when:?} was never reached");
    (mock, domid, error)
}

#[test]
fn a_guest_that_goes_away_is_said_to_have_gone_and_is_left_as_it_is() {
    let reasons = [
        ShutdownReason::Poweroff,
        ShutdownReason::Reboot,
        ShutdownReason::Crash,
    ];
    let specs = [
        GuestSpec::new("pv", GuestKind::Pv, 8),
        GuestSpec::new("pvh", GuestKind::Pvh, 8),
    ];
    for (at, spec) in specs.iter().enumerate() {
        for by_calls in [false, true] {
            let shut_down = [
                (false, Phase::Setup),
                (false, Phase::Suspend),
                (true, Phase::Setup),
                (true, Phase::Precopy),
                (true, Phase::Suspend),
            ];
            for (n, (live, when)) in shut_down.into_iter().enumerate() {
                let reason = reasons[(n + at) % reasons.len()];
                let how = (live, by_calls);
                let went = save_of_one_that_goes(spec, how, when, Goes::ShutsDown(reason));
                let (mock, domid, error) = went;
                let what = format!("{spec:?} {how:?} {when:?}: {error}");
                assert!(
                    matches!(&error, SaveError::Guest(GuestError::ShutDown { reason: said })
                        if *said == reason),
                    "{what}"
                );
                let said = format!("has shut down ({reason})");
                assert!(error.to_string().contains(&said), "{what}");
                let info = mock.domain(domid).unwrap().info().unwrap();
                assert_eq!(info.shutdown, Some(reason), "{what}");
            }
            let destroyed = [
                (false, Phase::Setup),
                (false, Phase::Suspend),
                (false, Phase::Pages),
                (false, Phase::Tail),
                (true, Phase::Precopy),
                (true, Phase::StopAndCopy),
            ];
            for (live, when) in destroyed {
                let how = (live, by_calls);
                let (_, _, error) = save_of_one_that_goes(spec, how, when, Goes::Destroyed);
                let what = format!("{spec:?} {how:?} {when:?}: {error}");
                assert!(
                    matches!(&error, SaveError::Guest(GuestError::Destroyed)),
                    "{what}"
                );
            }
        }
    }
}

/// Changes by another program are not undone, and the error does not call it suspended.
#[test]
fn a_guest_that_is_resumed_meanwhile_runs_on_or_has_gone() {
    let suspended = [
        (false, Phase::Pages),
        (false, Phase::Tail),
        (true, Phase::StopAndCopy),
        (true, Phase::Tail),
    ];
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let spec = GuestSpec::new("web", kind, 8);
        for (live, when) in suspended {
            for by_calls in [false, true] {
                let how = (live, by_calls);
                let (mock, domid, error) = save_of_one_that_goes(&spec, how, when, Goes::Resumed);
                let what = format!("{kind:?} {how:?} {when:?}: {error}");
                assert!(
                    !matches!(&error, SaveError::NotResumed { .. } | SaveError::Aborted),
                    "{what}"
                );
                let info = mock.domain(domid).unwrap().info().unwrap();
                assert_eq!(info.shutdown, None, "{what}");
                let reason = ShutdownReason::Crash;
                let goes = Goes::ResumedAndShutsDown(reason);
                let (mock, domid, error) = save_of_one_that_goes(&spec, how, when, goes);
                let what = format!("{kind:?} {how:?} {when:?}: {error}");
                assert!(
                    matches!(&error, SaveError::Guest(GuestError::ShutDown { reason: said })
                        if *said == reason),
                    "{what}"
                );
                let info = mock.domain(domid).unwrap().info().unwrap();
                assert_eq!(info.shutdown, Some(reason), "{what}");
            }
        }
    }
}

#[test]
fn callbacks_come_in_the_order_libxl_expects_whatever_fails() {
    let host = host(24);
    let hvm = host
        .create_guest(&GuestSpec::new("hvm", GuestKind::Hvm, 8))
        .unwrap();
    let pv = host
        .create_guest(&GuestSpec::new("pv", GuestKind::Pv, 8))
        .unwrap();
    let all = usize::MAX;

    let (result, log) = save_with(&host, hvm, "", all);
    result.unwrap();
    assert_eq!(log, ["logdirty on", "suspend", "logdirty off", "resume"]);
    let (result, log) = save_with(&host, hvm, "logdirty on", all);
    assert!(matches!(result, Err(SaveError::Toolstack(_))));
    assert_eq!(log, ["logdirty on"]);
    let (result, log) = save_with(&host, hvm, "suspend", all);
    assert!(matches!(result, Err(SaveError::Toolstack(_))));
    assert_eq!(log, ["logdirty on", "suspend", "logdirty off"]);
    let (result, log) = save_with(&host, hvm, "logdirty off", all);
    result.unwrap();
    assert_eq!(log, ["logdirty on", "suspend", "logdirty off", "resume"]);
    let (result, log) = save_with(&host, hvm, "", 5000);
    assert!(matches!(result, Err(SaveError::Stream(_))));
    assert_eq!(log, ["logdirty on", "suspend", "logdirty off", "resume"]);

    let (result, log) = save_with(&host, pv, "pretend", all);
    let error = result.unwrap_err();
    assert!(error.to_string().contains("has not suspended"), "{error}");
    assert_eq!(log, ["suspend"]);
    let (result, log) = save_with(&host, pv, "suspend half-way", all);
    assert!(matches!(result, Err(SaveError::Toolstack(_))));
    assert_eq!(log, ["suspend", "resume"], "the guest was asleep");
    assert!(host.domain(pv).unwrap().info().unwrap().shutdown.is_none());
    let (result, log) = save_with(&host, pv, "resume", 50_000);
    assert!(matches!(result, Err(SaveError::NotResumed { .. })));
    assert_eq!(log, ["suspend", "resume"]);
    assert!(host.domain(pv).unwrap().info().unwrap().shutdown.is_some());
}

fn rings_for(domain: &dyn Domain) -> Rings {
    Rings {
        store_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    }
}

#[test]
fn a_domain_without_room_says_so() {
    let (from, to) = (host(29), host(30));
    for spec in small() {
        let domid = from.create_guest(&spec).unwrap();
        let stream = save_to_vec(&from, domid, &options(1)).unwrap();
        let (kind, vcpus, pages) = shape(&stream, spec.kind, spec.vcpus);
        let (new, result) = restore_stream(&to, (kind, vcpus, pages - 512), CopySource(&*stream));
        let error = result.unwrap_err();
        assert!(matches!(error, RestoreError::NoMemory { .. }), "{error}");
        assert!(
            error.to_string().contains("give the domain more"),
            "{error}"
        );
        to.domain(new).unwrap().destroy().unwrap();
    }
}

#[test]
fn a_vcpu_that_the_domain_does_not_have_is_named() {
    let (from, to) = (host(31), host(32));
    let spec = &small()[0];
    let domid = from.create_guest(spec).unwrap();
    let stream = save_to_vec(&from, domid, &options(1)).unwrap();
    let shape = shape(&stream, spec.kind, 1);
    let (_, result) = restore_stream(&to, shape, CopySource(&*stream));
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("vcpu 1") && error.contains("VCPU_BASIC"),
        "{error}"
    );
}

#[test]
fn parameters_and_p2m_frames_that_cannot_be_are_refused_as_they_come() {
    let (from, to) = (host(35), host(36));
    let pvh = from
        .create_guest(&GuestSpec::new("pvh", GuestKind::Pvh, 8))
        .unwrap();
    let stream = save_to_vec(&from, pvh, &options(1)).unwrap();
    let params = record_offsets(&stream).into_iter().find(|r| r.1 == 0x0a);
    let (at, ..) = params.unwrap();
    for index in [256_u64, 1 << 32] {
        let mut bad = stream.clone();
        bad[at + 16..at + 24].copy_from_slice(&index.to_le_bytes());
        let shape = shape(&bad, GuestKind::Pvh, 1);
        let (_, result) = restore_stream(&to, shape, CopySource(&*bad));
        let error = result.unwrap_err();
        assert!(
            error.is_bad_image() && error.to_string().contains("no parameter"),
            "{error}"
        );
    }
    let pv = from.create_guest(&small()[0]).unwrap();
    let mut stream = save_to_vec(&from, pv, &options(1)).unwrap();
    let frames = record_offsets(&stream).into_iter().find(|r| r.1 == 0x03);
    let (at, _, bytes) = frames.unwrap();
    // The same number of frames, for a range far up.
    let first = 0xffff_0000_u32;
    let last = first + u32::try_from((bytes - 16) / 8 * 512 - 1).unwrap();
    stream[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
    stream[at + 12..at + 16].copy_from_slice(&last.to_le_bytes());
    let (_, result) = restore_stream(&to, (GuestKind::Pv, 2, 10_000), CopySource(&*stream));
    let error = result.unwrap_err();
    assert!(
        error.is_bad_image() && error.to_string().contains("P2M_FRAMES"),
        "{error}"
    );
}

#[test]
fn a_toolstack_that_refuses_static_data_ends_the_restore() {
    let (from, to) = (host(33), host(34));
    let domid = from.create_guest(&small()[0]).unwrap();
    let stream = save_to_vec(&from, domid, &options(1)).unwrap();
    let new = to.create_domain(GuestKind::Pv, 2, 10_000).unwrap();
    let domain = to.domain(new).unwrap();
    let rings = rings_for(domain.as_ref());
    let mut toolstack = Failing {
        domain: domain.as_ref(),
        fails: "static data done",
        log: Vec::new(),
    };
    let reader = RecordReader::new(CopySource(&*stream), ReadOptions::default()).unwrap();
    let result = RestoreRequest::new(domain.as_ref(), rings)
        .threads(NonZeroUsize::new(2))
        .observe(&mut go_on)
        .read_stream(reader, &mut toolstack);
    assert!(matches!(result, Err(RestoreError::Toolstack(_))));
    assert_eq!(domain.info().unwrap().tot_pages, 0, "before any memory");
    assert_eq!(toolstack.log, ["static data done"]);
    let reader = RecordReader::new(CopySource(&*stream), ReadOptions::default()).unwrap();
    let mut stop = |_: &xsr_save_restore::progress::Progress| ControlFlow::Break(());
    let mut toolstack = DirectToolstack(domain.as_ref());
    let result = RestoreRequest::new(domain.as_ref(), rings)
        .threads(NonZeroUsize::new(2))
        .observe(&mut stop)
        .read_stream(reader, &mut toolstack);
    assert!(matches!(result, Err(RestoreError::Aborted)));
}

#[test]
fn a_restore_tells_where_the_rings_are_when_all_else_is_done() {
    let (from, to) = (host(38), host(39));
    for spec in small() {
        let domid = from.create_guest(&spec).unwrap();
        let stream = save_to_vec(&from, domid, &options(1)).unwrap();
        for fails in ["", "restore results"] {
            let (kind, vcpus, pages) = shape(&stream, spec.kind, spec.vcpus);
            let new = to.create_domain(kind, vcpus, pages).unwrap();
            let domain = to.domain(new).unwrap();
            let rings = rings_for(domain.as_ref());
            let mut toolstack = Failing {
                domain: domain.as_ref(),
                fails,
                log: Vec::new(),
            };
            let reader = RecordReader::new(CopySource(&*stream), ReadOptions::default()).unwrap();
            let result = RestoreRequest::new(domain.as_ref(), rings)
                .threads(NonZeroUsize::new(2))
                .observe(&mut go_on)
                .read_stream(reader, &mut toolstack);
            match fails {
                "" => drop(result.unwrap()),
                _ => assert!(matches!(result, Err(RestoreError::Toolstack(_)))),
            }
            assert_eq!(toolstack.log, ["static data done", "restore results"]);
        }
    }
}
