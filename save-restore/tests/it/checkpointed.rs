//! Saves with checkpoints: each checkpoint is the guest as it was when it suspended, and the guest
//! keeps running, whatever fails.

use std::io;
use std::ops::ControlFlow;

use crate::common::faulty::{Fault, Faulty, turns};
use crate::common::stream::{Upset, Upsetting, When};
use crate::common::*;
use xsr_format::error::ReadErrorCause;
use xsr_save_restore::SaveError;
use xsr_save_restore::SaveRequest;
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::save::{BUFFER_BYTES, CheckpointedStats, Checkpoints};
use xsr_save_restore::sink::{CopySink, PageSink};
use xsr_save_restore::toolstack::{
    CheckpointToolstack, Epoch, NextEpoch, SaveToolstack, ToolstackError,
};
use xsr_xen_backend::mock::{GuestSpec, MemoryDigest, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

/// Which callback fails, in which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// Nothing was done.
    Suspend(u64),
    /// The guest has suspended, and then something failed.
    SuspendLate(u64),
    Postcopy(u64),
    PostcopyLate(u64),
    /// It says that the guest runs, although it does not.
    PostcopyPretends(u64),
    Checkpoint(u64),
}

/// Takes this many checkpoints of a guest that works between them.
struct Remus<'a> {
    host: &'a MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    work: Workload,
    last: u64,
    /// How much is buffered while the guest is suspended: nothing, a part, all.
    buffer_bytes: usize,
    wrong: Option<Wrong>,
    log: Vec<&'static str>,
    /// Memory at each suspend.
    digests: Vec<MemoryDigest>,
    epochs: Vec<Epoch>,
}

impl<'a> Remus<'a> {
    fn new(host: &'a MockHost, domid: DomId, domain: &'a dyn Domain, last: u64) -> Self {
        let work = WorkloadSpec {
            table_permille: 100,
            balloon_permille: 50,
            ..WorkloadSpec::writes(domid.0.into(), 1, 400)
        };
        Self {
            host,
            domid,
            domain,
            work: host.workload(domid, &work).unwrap(),
            last,
            buffer_bytes: [0, 100_000, BUFFER_BYTES][usize::from(domid.0) % 3],
            wrong: None,
            log: Vec::new(),
            digests: Vec::new(),
            epochs: Vec::new(),
        }
    }

    /// The number of the current epoch.
    fn number(&self) -> u64 {
        self.epochs.len() as u64 + 1
    }

    fn refuse(&self, wrong: Wrong) -> Result<(), ToolstackError> {
        match self.wrong == Some(wrong) {
            true => Err(ToolstackError::new("a callback", "no")),
            false => Ok(()),
        }
    }
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ToolstackError {
    ToolstackError::new("the hypervisor", error)
}

impl SaveToolstack for Remus<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.log.push("suspend");
        self.refuse(Wrong::Suspend(self.number()))?;
        self.domain.suspend().map_err(refused)?;
        self.refuse(Wrong::SuspendLate(self.number()))?;
        let digest = self.host.memory_digest(self.domid).unwrap();
        self.digests.push(digest);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.log.push("resume");
        self.domain.resume().map_err(refused)
    }

    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.log.push(if on { "log on" } else { "log off" });
        Ok(())
    }
}

impl CheckpointToolstack for Remus<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.log.push("postcopy");
        self.refuse(Wrong::Postcopy(self.number()))?;
        if self.wrong != Some(Wrong::PostcopyPretends(self.number())) {
            self.domain.resume().map_err(refused)?;
        }
        self.refuse(Wrong::PostcopyLate(self.number()))
    }

    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.log.push("checkpoint");
        assert_eq!(epoch.number, self.number());
        let shutdown = self.host.domain(self.domid).unwrap().info().unwrap();
        assert_eq!(shutdown.shutdown, None, "the guest runs");
        assert!(self.host.is_log_dirty(self.domid).unwrap());
        self.refuse(Wrong::Checkpoint(epoch.number))?;
        self.epochs.push(*epoch);
        self.work.step(300).unwrap();
        Ok(match epoch.number == self.last {
            true => NextEpoch::Finish,
            false => NextEpoch::Continue,
        })
    }
}

fn run(
    remus: &mut Remus<'_>,
    sink: &mut dyn PageSink,
    threads: usize,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<CheckpointedStats, SaveError> {
    let (domain, xen) = (remus.domain, remus.host.xen_version().unwrap());
    let mut policy = XenPolicy;
    let buffer_bytes = remus.buffer_bytes;
    SaveRequest::new(domain, xen)
        .options(&options(threads))
        .observe(progress)
        .write_checkpoints(
            remus,
            sink,
            Checkpoints {
                policy: &mut policy,
                buffer_bytes,
            },
        )
}

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The guest runs, and nothing of the save remains.
fn assert_runs(host: &MockHost, domid: DomId, what: &str) {
    let info = host.domain(domid).unwrap().info().unwrap();
    assert_eq!((info.shutdown, info.paused), (None, false), "{what}");
    assert!(!host.is_log_dirty(domid).unwrap(), "{what}");
    assert_eq!(host.mapped_pages(), 0, "{what}");
}

const HEADERS: usize = 24 + 16;
const END: [u8; 8] = [0; 8];
const CHECKPOINT: [u8; 8] = [0xe, 0, 0, 0, 0, 0, 0, 0];

/// The records of a stream, unchanged.
fn records(stream: &[u8]) -> Vec<&[u8]> {
    let mut rest = &stream[HEADERS..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        let (record, behind) = rest.split_at(8 + length.next_multiple_of(8));
        records.push(record);
        rest = behind;
    }
    records
}

/// A plain stream of the first `epochs`: their records without those of checkpoints, and an END.
fn plain(stream: &[u8], epochs: u64) -> Vec<u8> {
    let mut plain = stream[..HEADERS].to_vec();
    let mut left = epochs;
    for record in records(stream) {
        match record == CHECKPOINT {
            true => left -= 1,
            false => plain.extend_from_slice(record),
        }
        if left == 0 {
            break;
        }
    }
    plain.extend_from_slice(&END);
    plain
}

#[test]
fn every_checkpoint_is_the_guest_as_it_suspended() {
    const EPOCHS: u64 = 4;
    for (spec, threads) in specs().into_iter().zip([1, 2, 8].into_iter().cycle()) {
        let from = host(200);
        let domid = from.create_guest(&spec).unwrap();
        let domain = from.domain(domid).unwrap();
        let mut remus = Remus::new(&from, domid, domain.as_ref(), EPOCHS);
        let mut sink = CopySink(Vec::new());
        let stats = run(&mut remus, &mut sink, threads, &mut go_on).unwrap();
        assert_runs(&from, domid, &spec.name);
        let stream = sink.0;

        assert_eq!(stats.checkpoints, EPOCHS);
        let paused: std::time::Duration =
            remus.epochs.iter().map(|epoch| epoch.suspended_for).sum();
        assert_eq!(stats.stream.suspended_for, paused);
        for epoch in &remus.epochs[1..] {
            // The pages that the guest has written, and no others.
            let pages = 50..2000;
            assert!(pages.contains(&epoch.pages), "{}: {epoch:?}", spec.name);
        }
        let mut order: Vec<&str> = ["suspend", "postcopy", "checkpoint"].repeat(4);
        if spec.kind != GuestKind::Pv {
            order.insert(0, "log on");
            order.push("log off");
        }
        assert_eq!(remus.log, order, "{}", spec.name);

        for (at, left) in remus.digests.iter().enumerate() {
            let plain = plain(&stream, at as u64 + 1);
            let to = host(201);
            let pages = take_apart(&plain).pages.len() as u64;
            let shape = (spec.kind, spec.vcpus, pages);
            let source = xsr_save_restore::source::CopySource(plain.as_slice());
            let (there, result) = restore_stream(&to, shape, source);
            result.unwrap();
            let arrived = to.memory_digest(there).unwrap();
            let rings: Vec<_> = take_apart(&plain).rings().collect();
            let mut differ = left.differences(&arrived);
            differ.retain(|pfn| !rings.contains(pfn));
            assert_eq!(differ, [], "{}: epoch {}", spec.name, at + 1);
        }
        // They are not all the same.
        for pair in remus.digests.windows(2) {
            assert!(pair[0].differences(&pair[1]).len() > 50, "{}", spec.name);
        }
    }
}

/// Keeps what it receives, and counts what comes while the guest is suspended.
struct WhileAsleep<'a> {
    domain: &'a dyn Domain,
    bytes: Vec<u8>,
    asleep: usize,
}

impl io::Write for WhileAsleep<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.domain.info().unwrap().shutdown.is_some() {
            self.asleep += bytes.len();
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_fits_the_buffer_is_sent_while_the_guest_runs() {
    for spec in specs() {
        let mut runs = [0, 200_000, BUFFER_BYTES].map(|buffer_bytes| {
            let host = host(207);
            let domid = host.create_guest(&spec).unwrap();
            let domain = host.domain(domid).unwrap();
            let mut remus = Remus::new(&host, domid, domain.as_ref(), 3);
            remus.buffer_bytes = buffer_bytes;
            let mut sink = CopySink(WhileAsleep {
                domain: domain.as_ref(),
                bytes: Vec::new(),
                asleep: 0,
            });
            run(&mut remus, &mut sink, 2, &mut go_on).unwrap();
            let buffered = remus.epochs.iter().map(|epoch| epoch.buffered_bytes);
            (sink.0.bytes, sink.0.asleep, buffered.collect::<Vec<_>>())
        });
        let name = &spec.name;
        // The same bytes, in any case.
        assert!(runs[0].0 == runs[1].0 && runs[0].0 == runs[2].0, "{name}");
        let [none, some, all] = runs
            .each_mut()
            .map(|run| (run.1, std::mem::take(&mut run.2)));
        assert_eq!(none.1, [0; 3], "{name}");
        assert_eq!(all.0, 0, "{name}");
        assert_eq!(none.0 as u64, all.1.iter().sum::<u64>(), "{name}");
        assert!(0 < some.0 && some.0 < none.0, "{name}: {some:?} {none:?}");
        assert!(some.1.iter().all(|bytes| *bytes <= 200_000), "{name}");
        let sum = some.0 as u64 + some.1.iter().sum::<u64>();
        assert_eq!(sum, none.0 as u64, "{name}");
    }
}

#[test]
fn the_stream_is_in_order_and_ends_behind_a_checkpoint() {
    let host = host(202);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let mut remus = Remus::new(&host, domid, domain.as_ref(), 3);
        let mut sink = CopySink(Vec::new());
        run(&mut remus, &mut sink, 2, &mut go_on).unwrap();
        let mut stream = sink.0;
        let all = records(&stream);
        assert_eq!(all.last(), Some(&CHECKPOINT.as_slice()));
        assert_eq!(all.iter().filter(|r| **r == CHECKPOINT).count(), 3);
        assert!(!all.contains(&END.as_slice()));
        // The strict reader reports only the missing END.
        let read = |stream: &[u8]| {
            let options = xsr_format::read::ReadOptions::default();
            let mut records = xsr_format::slice::SliceReader::new(stream, options).unwrap();
            records.find_map(Result::err)
        };
        let error = read(&stream).unwrap();
        let truncated = matches!(error.cause, ReadErrorCause::Truncated { needed: 8 });
        assert!(truncated, "{error:?}");
        stream.extend_from_slice(&END);
        assert!(read(&stream).is_none(), "{}", spec.name);
    }
}

#[test]
fn a_callback_that_fails_in_any_epoch_leaves_the_guest_running() {
    use Wrong::*;
    type InEpoch = fn(u64) -> Wrong;
    let host = host(203);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let kinds: [(InEpoch, bool); 6] = [
            (Suspend, false),
            (SuspendLate, true),
            (Postcopy, true),
            (PostcopyLate, false),
            (PostcopyPretends, true),
            (Checkpoint, false),
        ];
        for (wrong, resumes) in kinds {
            for epoch in 1..=3 {
                let mut remus = Remus::new(&host, domid, domain.as_ref(), 4);
                remus.wrong = Some(wrong(epoch));
                remus.buffer_bytes = [0, BUFFER_BYTES][usize::from(epoch == 2)];
                let what = format!("{}: {:?}", spec.name, remus.wrong);
                let mut sink = CopySink(Vec::new());
                let result = run(&mut remus, &mut sink, 2, &mut go_on);
                let expected = match (&result, wrong(epoch)) {
                    (Err(SaveError::Guest(_)), PostcopyPretends(_)) => true,
                    (Err(SaveError::Toolstack(_)), other) => other != PostcopyPretends(epoch),
                    _ => false,
                };
                assert!(expected, "{what}: {result:?}");
                let resumed = remus.log.iter().filter(|call| **call == "resume").count();
                assert_eq!(resumed, usize::from(resumes), "{what}");
                assert_runs(&host, domid, &what);
                // Checkpoints that were complete stay complete, also what was kept of them.
                let complete = records_complete(&sink.0);
                let behind = matches!(wrong(epoch), Suspend(_) | SuspendLate(_));
                assert_eq!(complete, epoch - u64::from(behind), "{what}");
            }
        }
    }
}

/// CHECKPOINT records in a stream that breaks off between two records.
fn records_complete(stream: &[u8]) -> u64 {
    records(stream)
        .iter()
        .filter(|record| **record == CHECKPOINT)
        .count() as u64
}

#[test]
fn a_sink_that_fails_anywhere_leaves_the_guest_running() {
    let host = host(204);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        let mut remus = Remus::new(&host, domid, domain.as_ref(), 3);
        let mut sink = CopySink(Vec::new());
        run(&mut remus, &mut sink, 1, &mut go_on).unwrap();
        drop(remus);
        // Some in the first pass, most in later epochs.
        let all = sink.0.len();
        let mut complete = HEADERS;
        for record in records(&sink.0) {
            complete += record.len();
            if record == CHECKPOINT {
                break;
            }
        }
        let first = complete / 2;
        let rest = (complete - 16..all).step_by((all - complete) / 12);
        let mut failed = 0;
        for at in [0, HEADERS, first].into_iter().chain(rest) {
            let mut remus = Remus::new(&host, domid, domain.as_ref(), 3);
            let upset = Upset::Errno(nix::libc::EPIPE);
            let mut sink = CopySink(Upsetting::new(io::sink(), When::Byte(at), upset));
            let result = run(&mut remus, &mut sink, 2, &mut go_on);
            let what = format!("{}: byte {at} of {all}", spec.name);
            match result {
                Err(SaveError::Stream(_)) => failed += 1,
                // The guest has written less this time.
                Ok(_) => assert!(!sink.0.happened(), "{what}"),
                Err(other) => panic!("{what}: {other}"),
            }
            assert_runs(&host, domid, &what);
        }
        assert!(failed > 8, "{}: {failed}", spec.name);
    }
}

#[test]
fn a_save_that_is_cancelled_in_any_phase_of_any_epoch_leaves_the_guest_running() {
    let host = host(205);
    for spec in specs() {
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        for phase in [
            Phase::Suspend,
            Phase::StopAndCopy,
            Phase::Tail,
            Phase::Checkpoint,
        ] {
            for epoch in 1..=3 {
                let mut remus = Remus::new(&host, domid, domain.as_ref(), 4);
                let (mut seen, mut before) = (0, Phase::Setup);
                let mut stop = |progress: &Progress| {
                    if progress.phase == phase && before != phase {
                        seen += 1;
                    }
                    before = progress.phase;
                    match seen == epoch {
                        true => ControlFlow::Break(()),
                        false => ControlFlow::Continue(()),
                    }
                };
                let mut sink = CopySink(io::sink());
                let result = run(&mut remus, &mut sink, 2, &mut stop);
                let what = format!("{}: {phase:?} {epoch}", spec.name);
                assert!(matches!(result, Err(SaveError::Aborted)), "{what}");
                assert_eq!(remus.number(), epoch, "{what}");
                assert_runs(&host, domid, &what);
            }
        }
    }
}

#[test]
fn a_call_that_fails_anywhere_leaves_the_guest_running() {
    let host = host(206);
    let mut points = 0;
    for spec in [
        GuestSpec::new("pv", GuestKind::Pv, 8),
        GuestSpec::new("hvm", GuestKind::Hvm, 8),
    ] {
        let domid = host.create_guest(&spec).unwrap();
        let watching = Faulty::watching(host.domain(domid).unwrap());
        let mut remus = Remus::new(&host, domid, &watching, 2);
        let mut sink = CopySink(io::sink());
        run(&mut remus, &mut sink, 1, &mut go_on).unwrap();
        drop(remus);
        for (at, call) in turns(&watching.trace()) {
            let faults = call.faults();
            let late = faults.iter().find(|fault| matches!(fault, Fault::Late(_)));
            for fault in faults.first().into_iter().chain(late) {
                let faulty = Faulty::new(host.domain(domid).unwrap(), at, *fault);
                let mut remus = Remus::new(&host, domid, &faulty, 2);
                let mut sink = CopySink(io::sink());
                let result = run(&mut remus, &mut sink, 1, &mut go_on);
                drop(remus);
                let what = format!("{}: call {at} {call:?} {fault}: {result:?}", spec.name);
                points += usize::from(faulty.struck().is_some());
                assert!(
                    !matches!(result, Err(SaveError::NotResumed { .. })),
                    "{what}"
                );
                if host.is_log_dirty(domid).unwrap() {
                    // Only if exactly this call failed.
                    let struck = faulty.struck().unwrap();
                    assert_eq!(struck.op, "disable_log_dirty", "{what}");
                    host.domain(domid).unwrap().disable_log_dirty().unwrap();
                }
                assert_runs(&host, domid, &what);
            }
        }
    }
    eprintln!("{points} calls failed");
    assert!(points > 50, "{points}");
}
