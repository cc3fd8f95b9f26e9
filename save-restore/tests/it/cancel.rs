//! Cancelling a save: the guest runs again at once, whatever the save was doing: within 100 ms,
//! with the log off and no page mapped.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;
use nix::poll::{PollFd, PollFlags, poll};
use xsr_save_restore::progress::{Cancel, Phase, Progress};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::sink::{FdSink, PageSink};
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{Live, SaveError, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, GuestKind, Host};

/// The documented limit.
const PROMISE: Duration = Duration::from_millis(100);

/// Serialises tests that count the mappings of this process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Mappings of the machines' memory in this process.
fn mapped() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("memfd:")).count()
}

fn run(
    host: &MockHost,
    domid: DomId,
    live: bool,
    sink: &mut dyn PageSink,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<(), SaveError> {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = DirectToolstack(domain.as_ref());
    let xen = host.xen_version().unwrap();
    let options = options(2);
    let domain = domain.as_ref();
    let saved = match live {
        false => SaveRequest::new(domain, xen)
            .options(&options)
            .observe(progress)
            .write_stream(&mut toolstack, sink)?,
        true => {
            let how = Live {
                policy: &mut XenPolicy,
                verify: true,
            };
            SaveRequest::new(domain, xen)
                .options(&options)
                .live(how)
                .observe(progress)
                .write_stream(&mut toolstack, sink)?
        }
    };
    saved.resume().unwrap();
    Ok(())
}

/// The guest is as it was before the save, and so is this process.
fn assert_given_back(host: &MockHost, domid: DomId, mapped_before: usize, what: &str) {
    let info = host.domain(domid).unwrap().info().unwrap();
    assert_eq!((info.shutdown, info.paused), (None, false), "{what}");
    assert!(!host.is_log_dirty(domid).unwrap(), "{what}");
    assert_eq!(mapped(), mapped_before, "{what}");
}

#[test]
fn a_save_that_is_cancelled_at_any_event_gives_the_guest_back_at_once() {
    let _alone = alone();
    let host = host(80);
    let (mut points, mut slowest) = (0, Duration::ZERO);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let before = mapped();
        for live in [false, true] {
            let null = fs::OpenOptions::new().write(true).open("/dev/null");
            let null = null.unwrap();
            let attempt = |at: usize| {
                let cancel = Cancel::new();
                let mut work = host
                    .workload(domid, &WorkloadSpec::writes(1, 1, 500))
                    .unwrap();
                let (mut events, mut asked) = (Vec::new(), None);
                let mut step = |progress: &Progress| {
                    if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                        work.step(200).unwrap();
                    }
                    if events.len() == at {
                        asked = Some(Instant::now());
                        cancel.cancel();
                    }
                    events.push((progress.phase, progress.iteration));
                    cancel.check()
                };
                let mut sink = FdSink::cancellable(&null, cancel.clone()).unwrap();
                let result = run(&host, domid, live, &mut sink, &mut step);
                let took = asked.map(|asked| asked.elapsed());
                drop(work);
                (result, took, events)
            };
            let (result, _, events) = attempt(usize::MAX);
            result.unwrap();
            // A PV guest's tables are read in batches.
            let setup = events.iter().filter(|(phase, _)| *phase == Phase::Setup);
            let (setup, pv) = (setup.count(), spec.kind == GuestKind::Pv);
            assert!(setup > 3 || !pv, "{}: {setup}", spec.name);
            let mut phases: Vec<Phase> = events.iter().map(|(phase, _)| *phase).collect();
            phases.dedup();
            let all: &[Phase] = match live {
                false => &[Phase::Setup, Phase::Suspend, Phase::Pages, Phase::Tail],
                true => &[
                    Phase::Setup,
                    Phase::Precopy,
                    Phase::Suspend,
                    Phase::StopAndCopy,
                    Phase::Verify,
                    Phase::Tail,
                ],
            };
            assert_eq!(phases, all, "{}", spec.name);
            // Where a phase or pass begins and ends, and some in between: most events are about
            // empty ranges of pfns.
            let many = events.len();
            let edge = |at: usize| {
                let neighbours = at.saturating_sub(2)..(at + 3).min(many);
                neighbours.into_iter().any(|n| events[n] != events[at])
            };
            for at in (0..many).filter(|at| *at < 3 || edge(*at) || at % 397 == 0) {
                let what = format!("{} live {live}, event {at} of {many}", spec.name);
                let took = (0..5).map(|_| {
                    let (result, took, _) = attempt(at);
                    assert!(matches!(result, Err(SaveError::Aborted)), "{what}");
                    assert_given_back(&host, domid, before, &what);
                    took.unwrap()
                });
                // Another attempt only if the machine was busy with something else.
                let took = took.into_iter().find(|took| *took < PROMISE);
                slowest = slowest.max(took.unwrap_or_else(|| panic!("{what}: too slow")));
                points += 1;
            }
        }
    }
    eprintln!("cancelled at {points} events, the guest back after {slowest:?} at most");
    assert!(points > 150, "{points}");
}

/// Cancels once `writer` is full; returns how long the save took from there.
fn cancel_when_full(
    host: &MockHost,
    domid: DomId,
    live: bool,
    writer: &OwnedFd,
) -> (Result<(), SaveError>, Duration) {
    let cancel = Cancel::new();
    let token = cancel.clone();
    thread::scope(|scope| {
        let canceller = scope.spawn(move || {
            let full = || poll(&mut [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)], 0_u8);
            while full().unwrap() != 0 {
                thread::yield_now();
            }
            let asked = Instant::now();
            token.cancel();
            asked
        });
        let mut sink = FdSink::cancellable(writer, cancel.clone()).unwrap();
        // The token alone must stop it.
        let mut go_on = |_: &Progress| ControlFlow::Continue(());
        let result = run(host, domid, live, &mut sink, &mut go_on);
        let ended = Instant::now();
        (result, ended - canceller.join().unwrap())
    })
}

#[test]
fn a_save_whose_reader_has_stalled_can_be_cancelled() {
    let _alone = alone();
    let host = host(81);
    let mut slowest = Duration::ZERO;
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let before = mapped();
        for (live, socket) in [(false, false), (true, false), (false, true), (true, true)] {
            let what = format!("{} live {live} socket {socket}", spec.name);
            let took = (0..5).map(|_| {
                let (_reader, writer): (OwnedFd, OwnedFd) = if socket {
                    let (reader, writer) = UnixStream::pair().unwrap();
                    (reader.into(), writer.into())
                } else {
                    let (reader, writer) = io::pipe().unwrap();
                    (reader.into(), writer.into())
                };
                let (result, took) = cancel_when_full(&host, domid, live, &writer);
                assert!(matches!(result, Err(SaveError::Aborted)), "{what}");
                assert_given_back(&host, domid, before, &what);
                took
            });
            let took = took.into_iter().find(|took| *took < PROMISE);
            slowest = slowest.max(took.unwrap_or_else(|| panic!("{what}: too slow")));
        }
    }
    eprintln!("cancelled with the reader stalled, the guest back after {slowest:?} at most");
}

#[test]
fn a_sink_is_no_worse_for_being_cancellable() {
    let _alone = alone();
    let host = host(82);
    let spec: &GuestSpec = &specs()[0];
    let domid = host.create_guest(spec).unwrap();
    let plain = save_to_vec(&host, domid, &options(1)).unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let arrived = thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut arrived = Vec::new();
            io::Read::read_to_end(&mut reader, &mut arrived).map(|_| arrived)
        });
        let mut sink = FdSink::cancellable(&writer, Cancel::new()).unwrap();
        let mut go_on = |_: &Progress| ControlFlow::Continue(());
        run(&host, domid, false, &mut sink, &mut go_on).unwrap();
        drop(sink);
        drop(writer);
        receiver.join().unwrap().unwrap()
    });
    assert!(plain == arrived);
}
