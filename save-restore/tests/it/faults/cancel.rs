//! A cancel at each event, and callbacks that fail.

use std::io;

use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::{RestoreError, SaveError};

use crate::common::record_offsets;
use crate::common::watch::Refusal;
use crate::faults::*;

/// Breaks at event number `at`; counts them.
fn breaking(at: usize, events: &mut usize) -> impl FnMut(&Progress) -> ControlFlow<()> {
    move |_| {
        *events += 1;
        match *events > at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn a_save_that_is_cancelled_at_any_event_leaves_the_guest_running() {
    let mut points = Points::default();
    with_guests(30, |guest, before| {
        let domain = guest.host.domain(guest.domid).unwrap();
        let cancel = |at: usize| {
            let what = format!("{} event {at}", guest.spec.name);
            let mut toolstack = Toolstack::new(domain.as_ref());
            let mut sink = CopySink(io::sink());
            let mut events = 0;
            let result = guest.save(
                1 + at % 3,
                domain.as_ref(),
                &mut toolstack,
                &mut sink,
                &mut breaking(at, &mut events),
            );
            let result = result.map(|saved| saved.resume().unwrap());
            toolstack.assert_undone(&what);
            guest.assert_runs(before, &what);
            (what, result, events)
        };
        let (_, result, events) = cancel(usize::MAX);
        result.unwrap();
        for at in some_events(events) {
            let (what, result, events) = cancel(at);
            let error = result.unwrap_err();
            assert!(matches!(error, SaveError::Aborted), "{what}: {error}");
            assert_eq!(events, at + 1, "{what}: asked again");
            points.add(what);
        }
    });
    points.report("cancels of a save", 100);
}

#[test]
fn a_restore_that_is_cancelled_at_any_event_leaves_a_domain_to_destroy() {
    let (from, to) = (host(31), host(32));
    let free = to.free_pages();
    let mut points = Points::default();
    for spec in guests() {
        let domid = from.create_guest(&spec).unwrap();
        let stream = crate::common::save_to_vec(&from, domid, &options(1)).unwrap();
        let cancel = |at: usize| {
            let what = format!("{} event {at}", spec.name);
            let (new, rings) = make_room(&to, &spec);
            let domain = to.domain(new).unwrap();
            let mut toolstack = Toolstack::new(domain.as_ref());
            let mut events = 0;
            let result = try_restore(
                domain.as_ref(),
                CopySource(&*stream),
                &mut toolstack,
                rings,
                &mut breaking(at, &mut events),
            );
            assert_destroyable(&to, new, free, &what);
            (what, result, events)
        };
        let (_, result, events) = cancel(usize::MAX);
        result.unwrap();
        for at in some_events(events) {
            let (what, result, _) = cancel(at);
            let error = result.unwrap_err();
            assert!(matches!(error, RestoreError::Aborted), "{what}: {error}");
            points.add(what);
        }
    }
    points.report("cancels of a restore", 45);
}

/// A record may have sixteen million entries: it is no reason to be deaf.
#[test]
fn a_restore_is_asked_whether_to_go_on_in_the_midst_of_a_long_record() {
    const ENTRIES: u64 = 200_000;
    let (from, to) = (host(37), host(38));
    let spec = guests()
        .into_iter()
        .find(|spec| spec.kind == GuestKind::Pvh);
    let spec = spec.unwrap();
    let domid = from.create_guest(&spec).unwrap();
    let short = crate::common::save_to_vec(&from, domid, &options(1)).unwrap();
    let pages = record_offsets(&short).into_iter().find(|r| r.1 == 0x01);
    let (at, ..) = pages.unwrap();
    // Pages without contents, the same sixteen again and again.
    let mut record = vec![1, 0, 0, 0];
    record.extend(u32::try_from(8 + 8 * ENTRIES).unwrap().to_le_bytes());
    record.extend(ENTRIES.to_le_bytes());
    record.extend((0..ENTRIES).flat_map(|n| ((0xe_u64 << 60) | (n % 16)).to_le_bytes()));
    let long = [&short[..at], &record, &short[at..]].concat();
    let events_of = |stream: &[u8], at: usize| {
        let (new, rings) = make_room(&to, &spec);
        let domain = to.domain(new).unwrap();
        let mut toolstack = Toolstack::new(domain.as_ref());
        let mut events = 0;
        let result = try_restore(
            domain.as_ref(),
            CopySource(stream),
            &mut toolstack,
            rings,
            &mut breaking(at, &mut events),
        );
        domain.destroy().unwrap();
        (result, events)
    };
    let (result, few) = events_of(&short, usize::MAX);
    result.unwrap();
    let (result, many) = events_of(&long, usize::MAX);
    result.unwrap();
    // One for each 32768 entries.
    assert!(many >= few + 6, "{few} events, then {many}");
    let (result, events) = events_of(&long, 4);
    assert!(matches!(result, Err(RestoreError::Aborted)));
    assert_eq!(events, 5);
}

#[test]
fn a_save_survives_every_callback_that_fails() {
    let mut points = Points::default();
    with_guests(33, |guest, before| {
        let domain = guest.host.domain(guest.domid).unwrap();
        let domain = domain.as_ref();
        for (at, how) in (0..).flat_map(|at| [(at, Refusal::Before), (at, Refusal::After)]) {
            let mut toolstack = Toolstack::failing(domain, at, how);
            let mut sink = CopySink(io::sink());
            let result = guest.save(1, domain, &mut toolstack, &mut sink, &mut go_on);
            let result = result.map(Saved::resume);
            let Some(asked) = toolstack.log.get(at).copied() else {
                result.unwrap().unwrap();
                break;
            };
            let what = format!("{} callback {at} {asked} {how:?}", guest.spec.name);
            match (asked, result) {
                // The image is complete all the same.
                ("logdirty off", Ok(Ok(()))) => toolstack.assert_undone(&what),
                ("resume", Ok(Err(error))) => {
                    assert!(error.to_string().contains("resume"), "{what}: {error}");
                    if how == Refusal::Before {
                        domain.resume().unwrap();
                    }
                }
                (_, Err(SaveError::Toolstack(error))) => {
                    assert_eq!(error.what, asked, "{what}");
                    // A callback that was refused, or not called, does not need undoing.
                    let undone = (asked, how) == ("suspend", Refusal::After);
                    let resumed = toolstack.log.contains(&"resume");
                    assert_eq!(resumed, undone, "{what}: {:?}", toolstack.log);
                }
                (_, Ok(result)) => panic!("{what}: {result:?}"),
                (_, Err(error)) => panic!("{what}: {error}"),
            }
            guest.assert_runs(before, &what);
            points.add(what);
        }
    });
    points.report("callbacks of a save", 44);
}

#[test]
fn a_restore_reports_every_callback_that_fails() {
    let (from, to) = (host(34), host(35));
    let free = to.free_pages();
    let mut points = Points::default();
    for spec in guests() {
        let domid = from.create_guest(&spec).unwrap();
        let stream = crate::common::save_to_vec(&from, domid, &options(1)).unwrap();
        for (at, how) in (0..).flat_map(|at| [(at, Refusal::Before), (at, Refusal::After)]) {
            let (new, rings) = make_room(&to, &spec);
            let domain = to.domain(new).unwrap();
            let mut toolstack = Toolstack::failing(domain.as_ref(), at, how);
            let result = try_restore(
                domain.as_ref(),
                CopySource(&*stream),
                &mut toolstack,
                rings,
                &mut go_on,
            );
            let asked = toolstack.log.get(at).copied();
            let what = format!("{} callback {at} {asked:?} {how:?}", spec.name);
            assert_destroyable(&to, new, free, &what);
            let Some(asked) = asked else {
                result.unwrap();
                break;
            };
            match result.unwrap_err() {
                RestoreError::Toolstack(error) => assert_eq!(error.what, asked, "{what}"),
                error => panic!("{what}: {error}"),
            }
            points.add(what);
        }
    }
    points.report("callbacks of a restore", 14);
}
