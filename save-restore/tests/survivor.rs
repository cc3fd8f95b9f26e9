//! The sender of a stream with checkpoints is cut off anywhere: the survivor is the guest
//! of the last checkpoint that was complete, in memory and registers, and no mixture.
//!
//! `XSR_CUTS` is how many random octets are tried per guest, `XSR_SEED` which.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use common::*;
use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::RecordKind;
use xsr_save_restore::restore::RestoreOptions;
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending, Survivor};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::save::{BUFFER_OCTETS, Checkpoints, save_checkpointed};
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, CheckpointToolstack, DirectToolstack, Epoch,
    MissingStaticData, NextEpoch, RestoreToolstack, SaveToolstack, ToolstackError,
};
use xsr_save_restore::{RestoreError, restore_checkpointed};
use xsr_xen_backend::mock::{GuestSpec, MemoryDigest, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host, VcpuBlob};

const EPOCHS: usize = 4;
const CHECKPOINT: u32 = 0xe;

/// Takes checkpoints of a guest that works between them.
struct Primary<'a> {
    domain: &'a dyn Domain,
    kind: GuestKind,
    work: Workload,
    epoch: u8,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ToolstackError {
    ToolstackError::new("the hypervisor", error)
}

impl SaveToolstack for Primary<'_> {
    /// The guest's first vcpu has another register in each epoch.
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.domain.suspend().map_err(refused)?;
        self.epoch += 1;
        // Behind 512 octets of FPU state in either. Of a PV vcpu flags come first, which
        // must say that it is online; an HVM context has two descriptors and a header
        // before it.
        if self.kind == GuestKind::Pv {
            let mut state = self.domain.vcpu_state(0, VcpuBlob::Basic).unwrap();
            state[512] |= 1 << 5;
            state[520] = self.epoch;
            self.domain
                .set_vcpu_state(0, VcpuBlob::Basic, &state)
                .unwrap();
        } else {
            let mut context = self.domain.hvm_context().unwrap();
            let header = u32::from_le_bytes(context[4..8].try_into().unwrap()) as usize;
            let cpu = 8 + header;
            assert_eq!(context[cpu..cpu + 2], [2, 0], "the CPU record");
            context[cpu + 8 + 512] = self.epoch;
            self.domain.set_hvm_context(&context).unwrap();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.domain.resume().map_err(refused)
    }

    fn switch_qemu_logdirty(&mut self, _: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

impl CheckpointToolstack for Primary<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.resume()
    }

    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.work.step(200).unwrap();
        Ok(match epoch.number == EPOCHS as u64 {
            true => NextEpoch::Finish,
            false => NextEpoch::Continue,
        })
    }
}

/// A stream of checkpoints.
fn protect(spec: &GuestSpec) -> Vec<u8> {
    let from = host(300);
    let domid = from.create_guest(spec).unwrap();
    let domain = from.domain(domid).unwrap();
    let work = WorkloadSpec {
        table_permille: 100,
        balloon_permille: 50,
        ..WorkloadSpec::writes(7, 1, 300)
    };
    let mut primary = Primary {
        domain: domain.as_ref(),
        kind: spec.kind,
        work: from.workload(domid, &work).unwrap(),
        epoch: 0,
    };
    let mut sink = CopySink(Vec::new());
    save_checkpointed(
        domain.as_ref(),
        from.xen_version().unwrap(),
        &mut primary,
        &mut sink,
        &options(1),
        Checkpoints {
            policy: &mut XenPolicy,
            buffer_octets: BUFFER_OCTETS,
        },
        &mut |_| ControlFlow::Continue(()),
    )
    .unwrap();
    sink.0
}

/// The first `checkpoints` as a plain stream.
fn plain(stream: &[u8], checkpoints: usize) -> Vec<u8> {
    let mut plain = stream[..40].to_vec();
    let mut left = checkpoints;
    for (at, kind, octets) in record_offsets(stream) {
        match kind {
            CHECKPOINT => left -= 1,
            _ => plain.extend_from_slice(&stream[at..at + octets]),
        }
        if left == 0 {
            break;
        }
    }
    plain.extend_from_slice(&[0; 8]);
    plain
}

/// All that a guest is: memory, and the records behind it (registers, devices, clock).
struct State {
    memory: MemoryDigest,
    records: Vec<(RecordKind, Vec<u8>)>,
}

impl State {
    /// The kinds of the records that are not the same in both. A PV guest's shared info
    /// is left out: it names frames, which are others in each domain.
    fn other_records(&self, other: &Self) -> Vec<RecordKind> {
        let kinds = |state: &Self| -> Vec<_> { state.records.iter().map(|r| r.0).collect() };
        assert_eq!(kinds(self), kinds(other));
        let pairs = self.records.iter().zip(&other.records);
        pairs
            .filter(|(a, b)| a != b && a.0 != RecordKind::SHARED_INFO)
            .map(|(a, _)| a.0)
            .collect()
    }
}

/// What a restored domain holds. The domain is gone then.
fn state_of(host: &MockHost, domid: DomId) -> State {
    let memory = host.memory_digest(domid).unwrap();
    let domain = unpause(host, domid);
    let saved = save_to_vec(host, domid, &options(1)).unwrap();
    let records = take_apart(&saved).records;
    let records = records.iter().map(|(kind, raw)| (*kind, raw.to_vec()));
    let records = records.collect();
    domain.destroy().unwrap();
    State { memory, records }
}

/// A restorer's toolstack that counts, and may find the other side gone.
#[derive(Default)]
struct Secondary {
    checkpoints: u64,
    lost_at: Option<u64>,
    fails_at: Option<u64>,
    results: u32,
}

impl RestoreToolstack for Secondary {
    fn static_data_done(&mut self, _: MissingStaticData) -> Result<(), ToolstackError> {
        Ok(())
    }

    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        self.results += 1;
        Ok(())
    }
}

impl CheckpointRestoreToolstack for Secondary {
    fn checkpoint(&mut self, _: u64) -> Result<Arrival, ToolstackError> {
        let number = self.checkpoints + 1;
        if self.lost_at == Some(number) {
            return Ok(Arrival::Lost);
        }
        if self.fails_at == Some(number) {
            return Err(ToolstackError::new("a callback", "no"));
        }
        self.checkpoints = number;
        Ok(Arrival::Whole { octets: 0 })
    }
}

/// Gives its octets, then fails.
struct Breaks<'a>(&'a [u8]);

impl Read for Breaks<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.0.is_empty() && !room.is_empty() {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => self.0.read(room),
        }
    }
}

/// Restore into a new domain, which is there afterwards, whatever came of it.
fn survive<R: Read>(
    host: &MockHost,
    (kind, vcpus, pages): Shape,
    source: R,
    toolstack: &mut Secondary,
    keep: &CheckpointOptions,
) -> (DomId, Result<Survivor<CopySource<R>>, RestoreError>) {
    let domid = host.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = host.domain(domid).unwrap();
    let [store_port, console_port] = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let options = RestoreOptions {
        store_port,
        store_domid: DomId(0),
        console_port,
        console_domid: DomId(0),
        threads: NonZeroUsize::new(2),
    };
    let reader = RecordReader::new(CopySource(source), ReadOptions::default());
    let result = reader.map_err(RestoreError::from).and_then(|reader| {
        restore_checkpointed(
            domain.as_ref(),
            reader,
            toolstack,
            &options,
            keep,
            &mut |_| ControlFlow::Continue(()),
        )
    });
    assert_eq!(host.mapped_pages(), 0);
    (domid, result)
}

fn guests() -> Vec<GuestSpec> {
    vec![
        GuestSpec {
            vcpus: 2,
            ..GuestSpec::new("pv64", GuestKind::Pv, 8)
        },
        GuestSpec {
            width: 4,
            ..GuestSpec::new("pv32", GuestKind::Pv, 8)
        },
        GuestSpec::new("hvm", GuestKind::Hvm, 8),
        GuestSpec::new("pvh", GuestKind::Pvh, 8),
    ]
}

fn in_memory(memory_octets: usize) -> CheckpointOptions {
    CheckpointOptions {
        memory_octets,
        ..CheckpointOptions::default()
    }
}

/// splitmix64
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn a_sender_that_is_cut_off_anywhere_leaves_the_last_complete_checkpoint() {
    let (cuts, mut seed) = (number("XSR_CUTS", 8), number("XSR_SEED", 1));
    let mut runs = 0_u64;
    for spec in guests() {
        let name = &spec.name;
        let stream = protect(&spec);
        let to = host(301);
        let mut expected = Vec::new();
        let mut shapes = (spec.kind, spec.vcpus, 0);
        for checkpoints in 1..=EPOCHS {
            let plain = plain(&stream, checkpoints);
            let pages = take_apart(&plain).pages.len() as u64;
            shapes.2 = shapes.2.max(pages);
            let (domid, result) = restore_stream(&to, shapes, CopySource(plain.as_slice()));
            result.unwrap();
            expected.push(state_of(&to, domid));
        }
        for pair in expected.windows(2) {
            assert_ne!(pair[0].memory.differences(&pair[1].memory), [], "{name}");
            assert_ne!(pair[0].other_records(&pair[1]), [], "{name}");
        }
        let records = record_offsets(&stream);
        let complete: Vec<usize> = (records.iter().filter(|(_, kind, _)| *kind == CHECKPOINT))
            .map(|(at, _, octets)| at + octets)
            .collect();
        assert_eq!(complete.len(), EPOCHS, "{name}");
        let mut at: Vec<usize> = records.iter().map(|(at, ..)| *at).collect();
        at.push(stream.len());
        let octets = stream.len() as u64;
        at.extend((0..cuts).map(|_| usize::try_from(random(&mut seed) % octets).unwrap()));
        for (turn, at) in at.into_iter().enumerate() {
            let what = format!("{name}: cut at octet {at} of {}", stream.len());
            let keep = in_memory([0, 4109, 64 << 20][turn % 3]);
            let mut secondary = Secondary::default();
            let (domid, result) = match turn % 2 {
                0 => {
                    let (domid, result) =
                        survive(&to, shapes, &stream[..at], &mut secondary, &keep);
                    (domid, result.map(|s| (s.checkpoints, is_loss(&s.ending))))
                }
                _ => {
                    let source = Breaks(&stream[..at]);
                    let (domid, result) = survive(&to, shapes, source, &mut secondary, &keep);
                    (domid, result.map(|s| (s.checkpoints, is_loss(&s.ending))))
                }
            };
            runs += 1;
            let last = complete.iter().filter(|end| **end <= at).count();
            assert_eq!(secondary.checkpoints, last as u64, "{what}");
            let Some(expected) = last.checked_sub(1).map(|last| &expected[last]) else {
                assert!(matches!(result, Err(RestoreError::Stream(_))), "{what}");
                assert_eq!(secondary.results, 0, "{what}");
                to.domain(domid).unwrap().destroy().unwrap();
                continue;
            };
            assert_eq!(result.unwrap(), (last as u64, true), "{what}");
            assert_eq!(secondary.results, 1, "{what}");
            let survivor = state_of(&to, domid);
            let differ = expected.memory.differences(&survivor.memory);
            assert_eq!(differ, [], "{what}");
            assert_eq!(expected.other_records(&survivor), [], "{what}");
        }
    }
    eprintln!("{runs} senders were cut off");
}

fn is_loss<S>(ending: &Ending<S>) -> bool {
    matches!(ending, Ending::SourceLost(_))
}

#[test]
fn a_checkpoint_is_kept_in_memory_up_to_the_limit_and_in_a_file_beyond() {
    let spec = &guests()[2];
    let stream = protect(spec);
    let shape = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
    let to = host(302);
    let keep = |memory_octets| {
        let mut secondary = Secondary::default();
        let keep = in_memory(memory_octets);
        let (_, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &keep);
        let survivor = result.unwrap();
        (survivor.most_kept_octets, survivor.most_spilt_octets)
    };
    let (most, spilt) = keep(64 << 20);
    assert!(most > 100_000, "{most}");
    assert_eq!(spilt, 0);
    assert_eq!(keep(50_000), (most, most - 50_000));
    assert_eq!(keep(0), (most, most));
    // Where there is no room for it, nobody takes over: the sender is well.
    let nowhere = CheckpointOptions {
        memory_octets: 0,
        directory: "/nonexistent".into(),
        ..CheckpointOptions::default()
    };
    let mut secondary = Secondary::default();
    let (_, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &nowhere);
    let error = result.unwrap_err();
    assert!(matches!(error, RestoreError::Spill { .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    assert_eq!(secondary.results, 0);
}

#[test]
fn the_toolstack_decides_whether_a_checkpoint_counts() {
    let spec = &guests()[0];
    let stream = protect(spec);
    let shape = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
    let to = host(303);
    let keep = in_memory(64 << 20);
    let (reference, result) = restore_stream(&to, shape, CopySource(&*plain(&stream, 2)));
    result.unwrap();
    let expected = state_of(&to, reference);
    for lost in 1..=3 {
        let mut secondary = Secondary {
            lost_at: Some(lost),
            ..Secondary::default()
        };
        let (domid, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &keep);
        if lost == 1 {
            assert!(matches!(result, Err(RestoreError::NoCheckpoint)));
            continue;
        }
        let survivor = result.unwrap();
        assert_eq!(survivor.checkpoints, lost - 1);
        assert!(matches!(survivor.ending, Ending::ToolstackLost));
        if lost == 3 {
            let survivor = state_of(&to, domid);
            assert_eq!(expected.memory.differences(&survivor.memory), []);
            assert_eq!(expected.other_records(&survivor), []);
        }
    }
    for fails in 1..=3 {
        let mut secondary = Secondary {
            fails_at: Some(fails),
            ..Secondary::default()
        };
        let (_, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &keep);
        assert!(matches!(result, Err(RestoreError::Toolstack(_))));
        assert_eq!(secondary.results, 0);
    }
}

#[test]
fn a_stream_that_goes_on_wrongly_is_an_error_and_nobody_takes_over() {
    let spec = &guests()[3];
    let stream = protect(spec);
    let shape = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
    let to = host(304);
    let keep = in_memory(1000);
    let records = record_offsets(&stream);
    let mut ends = records.iter().filter(|(_, kind, _)| *kind == CHECKPOINT);
    let (second, ..) = *ends.nth(1).unwrap();
    let mut broken = stream.clone();
    // A kind that nobody knows, and that must not be skipped.
    broken[second] = 0x7e;
    let mut secondary = Secondary::default();
    let (_, result) = survive(&to, shape, broken.as_slice(), &mut secondary, &keep);
    let error = result.unwrap_err();
    assert!(matches!(error, RestoreError::Stream(_)), "{error}");
    assert!(error.to_string().contains("0x"), "{error}");
    assert_eq!(secondary.checkpoints, 1);

    // With an END, the last checkpoint is the guest, and the source stands behind it.
    let mut ended = stream.clone();
    ended.extend_from_slice(&[0; 8]);
    ended.extend_from_slice(b"more");
    let mut secondary = Secondary::default();
    let (_, result) = survive(&to, shape, ended.as_slice(), &mut secondary, &keep);
    let survivor = result.unwrap();
    assert_eq!(survivor.checkpoints, EPOCHS as u64);
    let Ending::Ended(CopySource(rest)) = survivor.ending else {
        panic!("{:?}", survivor.ending);
    };
    assert_eq!(rest, b"more");
}

#[test]
fn a_restore_that_is_stopped_takes_over_nothing() {
    let spec = &guests()[2];
    let stream = protect(spec);
    let (kind, vcpus, pages) = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
    let to = host(305);
    let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = to.domain(domid).unwrap();
    let options = RestoreOptions {
        store_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
        threads: NonZeroUsize::new(2),
    };
    let reader = RecordReader::new(CopySource(stream.as_slice()), ReadOptions::default()).unwrap();
    let mut checkpoints = 0;
    let result = restore_checkpointed(
        domain.as_ref(),
        reader,
        &mut DirectToolstack(domain.as_ref()),
        &options,
        &in_memory(0),
        &mut |progress| {
            let now = progress.phase == xsr_save_restore::progress::Phase::Checkpoint;
            checkpoints += u32::from(now);
            match checkpoints > 3 {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        },
    );
    assert!(matches!(result, Err(RestoreError::Aborted)), "{result:?}");
    assert_eq!(to.mapped_pages(), 0);
}
