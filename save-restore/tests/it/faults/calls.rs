//! Every hypercall fails in turn, in each way that Xen has for it.

use std::io;

use xsr_save_restore::error::GuestError;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::{RestoreError, SaveError};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{BackendError, Errno, Host, MapError};

use crate::common::faulty::{Call, Fault, Faulty, Struck, turns};
use crate::faults::*;

/// The error names the call that failed, and why; for a mapping, a populate or a release also the
/// frame.
fn assert_names(
    struck: Struck,
    fault: Fault,
    backend: Option<&BackendError>,
    map: Option<&MapError>,
    other: Option<u64>,
    what: &str,
) {
    match (fault, backend, map, other) {
        (Fault::Errno(errno) | Fault::Late(errno), Some(error), ..) => {
            assert_eq!((error.op, error.errno), (struck.op, errno), "{what}");
        }
        // With more threads the fault met another call, one that succeeds or fails as a whole.
        (_, Some(error), ..) if struck.frame.is_none() => {
            assert_eq!(error.op, struck.op, "{what}");
        }
        (Fault::Frame(_, errno), _, Some(error), _) => {
            assert_eq!(
                (Some(error.gfn), error.errno),
                (struck.frame, errno),
                "{what}"
            );
        }
        (Fault::Short(_), .., Some(frame)) => {
            assert_eq!(Some(frame), struck.frame.map(|gfn| gfn.0), "{what}");
        }
        _ => panic!("{what}: another error"),
    }
}

/// Faults that a save survives: a frame that disappears while the guest runs is sent once it is
/// suspended; a dirty log that something holds is taken over; and once all is done, the log that
/// cannot be switched off.
fn save_survives(mode: Mode, fault: Fault, op: &str) -> bool {
    mode == Mode::Live
        && match op {
            "map" => matches!(fault, Fault::Frame(..)),
            "enable_log_dirty" | "disable_log_dirty" => true,
            _ => false,
        }
}

struct Attempt {
    result: Result<(), SaveError>,
    struck: Option<Struck>,
}

/// Saves with a fault; afterwards the guest runs, whatever the result.
fn attempt_save(
    guest: &Guest<'_>,
    before: &Source<'_>,
    to: &MockHost,
    threads: usize,
    domain: &Faulty,
    what: &str,
) -> Attempt {
    let (host, domid) = (guest.host, guest.domid);
    let real = host.domain(domid).unwrap();
    let mut toolstack = Toolstack::new(real.as_ref());
    let mut sink = CopySink(Vec::new());
    let result = guest.save(threads, domain, &mut toolstack, &mut sink, &mut go_on);
    let struck = domain.struck();
    let result = result.map(|saved| {
        // The stream is complete despite the fault.
        if struck.is_some() {
            assert_arrives(host, domid, to, guest.spec, &sink.0);
        }
        saved.resume().unwrap();
    });
    toolstack.assert_undone(what);
    let refused = |fault: &Struck| fault.op == "disable_log_dirty";
    if struck.as_ref().is_some_and(refused) && host.is_log_dirty(domid).unwrap() {
        // The only call that could switch it off was refused.
        real.disable_log_dirty().unwrap();
    }
    guest.assert_runs(before, what);
    Attempt { result, struck }
}

fn check_failed_save(mode: Mode, fault: Fault, attempt: Attempt, what: &str) -> bool {
    let Some(struck) = attempt.struck else {
        attempt.result.unwrap();
        return false;
    };
    match &attempt.result {
        Ok(()) => assert!(save_survives(mode, fault, struck.op), "{what}: no error"),
        Err(SaveError::Backend(error)) => {
            assert_names(struck, fault, Some(error), None, None, what);
        }
        Err(SaveError::Map(error)) => assert_names(struck, fault, None, Some(error), None, what),
        Err(other) => panic!("{what}: {other}"),
    }
    true
}

#[test]
fn a_save_survives_every_call_that_fails() {
    let to = host(21);
    let mut points = Points::default();
    with_guests(20, |guest, before| {
        let name = &guest.spec.name;
        let faulty = |at, fault| Faulty::new(guest.host.domain(guest.domid).unwrap(), at, fault);
        let watching = Faulty::watching(guest.host.domain(guest.domid).unwrap());
        let attempt = attempt_save(guest, before, &to, 1, &watching, name);
        attempt.result.unwrap();
        for (at, call) in turns(&watching.trace()) {
            let faults = call.faults().into_iter().enumerate();
            for (nth, fault) in faults.filter(|(nth, _)| takes(guest.spec.kind, call.op, at + nth))
            {
                let what = format!("{name} call {at} {} {fault}", call.op);
                // Now and then with preparation on other threads.
                let threads = if nth % 5 == 4 { 3 } else { 1 };
                let domain = faulty(at, fault);
                let attempt = attempt_save(guest, before, &to, threads, &domain, &what);
                if check_failed_save(guest.mode, fault, attempt, &what) {
                    points.add(what);
                }
            }
        }
    });
    points.report("calls of a save", 950);
}

/// A superpage that is not available is replaced by small pages; an image may name a ring page that
/// it does not hold.
fn restore_survives(fault: Fault, spec: &GuestSpec, call: Call) -> bool {
    match fault {
        Fault::Short(_) => call.op == "populate",
        Fault::Frame(_, Errno::EINVAL) => spec.kind.is_translated() && call.frames == 1,
        _ => false,
    }
}

#[test]
fn a_restore_reports_every_call_that_fails_and_leaves_a_domain_to_destroy() {
    let (from, to) = (host(22), host(23));
    let free = to.free_pages();
    let mut points = Points::default();
    // Pages are written for one guest, and mapped for the next.
    let ways = [false, true].into_iter().cycle();
    let modes = Mode::ALL.into_iter().cycle();
    for ((spec, mode), maps) in guests().into_iter().zip(modes).zip(ways) {
        let domid = from.create_guest(&spec).unwrap();
        let real = from.domain(domid).unwrap();
        let mut toolstack = Toolstack::new(real.as_ref());
        let mut sink = CopySink(Vec::new());
        let guest = Guest {
            host: &from,
            domid,
            spec: &spec,
            mode,
            work: &BALLOON,
        };
        let saved = guest.save(1, real.as_ref(), &mut toolstack, &mut sink, &mut go_on);
        saved.unwrap().keep_suspended();
        let left = from.memory_digest(domid).unwrap();
        let attempt = |domain: &Faulty, domid, rings: Rings, what: &str| {
            let real = to.domain(domid).unwrap();
            let mut toolstack = Toolstack::new(real.as_ref());
            let source = CopySource(&*sink.0);
            let result = try_restore(domain, source, &mut toolstack, rings, &mut go_on);
            if result.is_ok() {
                assert_same(&left, &to.memory_digest(domid).unwrap(), what);
            }
            assert_destroyable(&to, domid, free, what);
            result
        };
        let (new, rings) = make_room(&to, &spec);
        let watching = Faulty::watching(to.domain(new).unwrap()).mapping(maps);
        attempt(&watching, new, rings, "none").unwrap();
        for (at, call) in turns(&watching.trace()) {
            let faults = call.faults().into_iter().enumerate();
            for (_, fault) in faults.filter(|(nth, _)| takes(spec.kind, call.op, at + nth)) {
                let what = format!("{} {mode:?} call {at} {} {fault}", spec.name, call.op);
                let (new, rings) = make_room(&to, &spec);
                let domain = Faulty::new(to.domain(new).unwrap(), at, fault).mapping(maps);
                let result = attempt(&domain, new, rings, &what);
                let struck = domain.struck().unwrap();
                let check = |backend, map, frame| {
                    assert_names(struck, fault, backend, map, frame, &what);
                };
                match &result {
                    Ok(_) => assert!(restore_survives(fault, &spec, call), "{what}: no error"),
                    Err(RestoreError::Backend(error)) => check(Some(error), None, None),
                    Err(RestoreError::Map(error)) => check(None, Some(error), None),
                    Err(RestoreError::CpuPolicy(error)) => check(Some(&error.cause), None, None),
                    Err(
                        RestoreError::VcpuState { cause, .. }
                        | RestoreError::HvmContext { cause, .. }
                        | RestoreError::HvmParam { cause, .. }
                        | RestoreError::TscInfo { cause, .. },
                    ) => check(Some(cause), None, None),
                    Err(RestoreError::NoMemory { pfn, .. }) => check(None, None, Some(pfn.0)),
                    Err(RestoreError::NotReleased { gfn, .. }) => check(None, None, Some(gfn.0)),
                    Err(other) => panic!("{what}: {other}"),
                }
                points.add(what);
            }
        }
    }
    points.report("calls of a restore", 450);
}

/// Another program destroys the domain in the middle of a save.
#[test]
fn a_domain_that_is_destroyed_meanwhile_ends_the_save() {
    let mut points = Points::default();
    for (spec, mode) in guests()
        .iter()
        .flat_map(|s| Mode::ALL.map(|mode| (s, mode)))
    {
        let (result, events) = destroyed_at(spec, mode, usize::MAX);
        result.unwrap();
        for at in some_events(events) {
            let what = format!("{} {mode:?} event {at}", spec.name);
            let (result, _) = destroyed_at(spec, mode, at);
            let error = result.unwrap_err();
            let gone = |error: &SaveError| match error {
                SaveError::Backend(error) => error.errno == Errno::ESRCH,
                SaveError::Toolstack(error) => error.to_string().contains("ESRCH"),
                SaveError::Guest(GuestError::Destroyed) => true,
                _ => false,
            };
            match &error {
                SaveError::NotResumed { cause, .. } => assert!(gone(cause), "{what}: {error}"),
                error => assert!(gone(error), "{what}: {error}"),
            }
            points.add(what);
        }
    }
    points.report("domain destroyed", 100);
}

/// Saves a guest that is destroyed at event number `at`; returns the result and the number of
/// events.
fn destroyed_at(spec: &GuestSpec, mode: Mode, at: usize) -> (Result<(), SaveError>, usize) {
    let host = host(24);
    let free = host.free_pages();
    let domid = host.create_guest(spec).unwrap();
    let real = host.domain(domid).unwrap();
    let mut toolstack = Toolstack::new(real.as_ref());
    let mut sink = CopySink(io::sink());
    let mut events = 0;
    let mut destroy = |_: &Progress| {
        if events == at {
            real.destroy().unwrap();
        }
        events += 1;
        ControlFlow::Continue(())
    };
    let guest = Guest {
        host: &host,
        domid,
        spec,
        mode,
        work: &WORK,
    };
    let result = guest.save(2, real.as_ref(), &mut toolstack, &mut sink, &mut destroy);
    let result = result.map(Saved::keep_suspended);
    assert_eq!(host.mapped_pages(), 0, "{} {mode:?} {at}", spec.name);
    if events > at {
        assert_eq!(host.free_pages(), free, "{} {mode:?} {at}", spec.name);
    }
    (result, events)
}
