//! Invalid checkpoints, and checkpoints that cannot be applied: the secondary does not take over.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{RestoreError, RestoreRequest, Rings};
use xsr_xen_backend::{DomId, Domain, Host};

use crate::common::faulty::Faulty;
use crate::common::*;
use crate::survivor::kit::*;

#[test]
fn a_checkpoint_is_kept_in_memory_up_to_the_limit_and_in_a_file_beyond() {
    let spec = &guests()[2];
    let stream = protect(spec);
    let shape = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
    let to = host(302);
    let keep = |memory_bytes| {
        let mut secondary = Secondary::default();
        let keep = in_memory(memory_bytes);
        let (_, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &keep);
        let survivor = result.unwrap();
        (survivor.most_kept_bytes, survivor.most_spilt_bytes)
    };
    let (most, spilt) = keep(64 << 20);
    assert!(most > 100_000, "{most}");
    assert_eq!(spilt, 0);
    assert_eq!(keep(50_000), (most, most - 50_000));
    assert_eq!(keep(0), (most, most));
    // The file has a limit of its own.
    let limited = |file_bytes| {
        let mut secondary = Secondary::default();
        let keep = CheckpointOptions {
            file_bytes: Some(file_bytes),
            ..in_memory(50_000)
        };
        let (_, result) = survive(&to, shape, stream.as_slice(), &mut secondary, &keep);
        result.map(|survivor| survivor.most_spilt_bytes)
    };
    assert_eq!(limited(most - 50_000).unwrap(), most - 50_000);
    let error = limited(most - 50_001).unwrap_err();
    assert!(matches!(error, RestoreError::Spill { .. }), "{error}");
    let said = format!("50000 bytes in memory and {} in the file", most - 50_001);
    assert!(error.to_string().contains(&said), "{error}");
    // If there is no room for it, the secondary does not take over: the sender is alive.
    let nowhere = CheckpointOptions {
        memory_bytes: 0,
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
        let buffered = Buffered::clone(&secondary.buffered);
        let source = WithDisk::new(stream.as_slice(), &ends(&stream), &buffered);
        let (domid, result) = survive(&to, shape, source, &mut secondary, &keep);
        // All writes of the last epoch have arrived, and none of them is on the disk.
        let disk: Disk = (1..lost).flat_map(disk_writes).collect();
        assert_eq!(secondary.disk, disk);
        assert_eq!(*buffered.borrow(), disk_writes(lost));
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
    // An unknown kind that must not be skipped.
    broken[second] = 0x7e;
    let mut secondary = Secondary::default();
    let (_, result) = survive(&to, shape, broken.as_slice(), &mut secondary, &keep);
    let error = result.unwrap_err();
    assert!(matches!(error, RestoreError::Stream(_)), "{error}");
    assert!(error.to_string().contains("0x"), "{error}");
    assert_eq!(secondary.checkpoints, 1);

    // With an END, the last checkpoint is the guest, and the source is positioned after it.
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
    let rings = Rings {
        store_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    };
    let reader = RecordReader::new(CopySource(stream.as_slice()), ReadOptions::default()).unwrap();
    let mut checkpoints = 0;
    let result = RestoreRequest::new(domain.as_ref(), rings)
        .threads(NonZeroUsize::new(2))
        .keep(&in_memory(0))
        .observe(&mut |progress| {
            let now = progress.phase == xsr_save_restore::progress::Phase::Checkpoint;
            checkpoints += u32::from(now);
            match checkpoints > 3 {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
        .read_checkpoints(reader, &mut DirectToolstack(domain.as_ref()));
    assert!(matches!(result, Err(RestoreError::Aborted)), "{result:?}");
    assert_eq!(to.mapped_pages(), 0);
}

#[test]
fn a_checkpoint_that_cannot_be_applied_never_becomes_a_guest() {
    let to = host(306);
    let keep = in_memory(64 << 20);
    let (mut mixtures, mut survived) = (0, 0);
    for spec in [&guests()[0], &guests()[2]] {
        let stream = protect(spec);
        let (kind, vcpus, pages) = shape(&plain(&stream, 4), spec.kind, spec.vcpus);
        let attempt = |faulty: &dyn Fn(Box<dyn Domain>) -> Faulty| {
            let domid = to.create_domain(kind, vcpus, pages + 256).unwrap();
            let domain = faulty(to.domain(domid).unwrap());
            let mut secondary = Secondary::default();
            let result = survive_in(&to, &domain, stream.as_slice(), &mut secondary, &keep);
            // Reading its state destroys it.
            let state = result.is_ok().then(|| state_of(&to, domid));
            if state.is_none() {
                to.domain(domid).unwrap().destroy().unwrap();
            }
            let result = result.map(|survivor| survivor.checkpoints);
            (domain, secondary, result, state)
        };
        let (watching, _, result, expected) = attempt(&Faulty::watching);
        assert_eq!(result.unwrap(), EPOCHS as u64);
        let expected = expected.unwrap();
        let trace = watching.trace();
        let mut epochs = std::collections::BTreeSet::new();
        for (at, call) in (0..).zip(&trace) {
            // That call is made by the test itself.
            if call.op == "alloc_unbound_port" {
                continue;
            }
            for fault in call.faults().into_iter().step_by(4) {
                let (domain, secondary, result, state) =
                    attempt(&|domain| Faulty::new(domain, at, fault));
                let what = format!("{}: call {at} {call:?} {fault}: {result:?}", spec.name);
                if domain.struck().is_none() {
                    continue;
                }
                // A fault that can be survived leaves no trace in the guest.
                if let Some(state) = state {
                    assert_eq!(expected.memory.differences(&state.memory), [], "{what}");
                    assert_eq!(expected.other_records(&state), [], "{what}");
                    survived += 1;
                    continue;
                }
                // The toolstack does not learn of a guest that could be run.
                assert_eq!(secondary.results, 0, "{what}");
                if let Err(RestoreError::NotApplied { checkpoint, .. }) = &result {
                    assert_eq!(*checkpoint, secondary.checkpoints, "{what}");
                    assert!(*checkpoint > 1, "{what}");
                    epochs.insert(*checkpoint);
                    mixtures += 1;
                }
            }
        }
        assert_eq!(epochs.len(), EPOCHS - 1, "{}: {epochs:?}", spec.name);
    }
    eprintln!("{mixtures} checkpoints could not be applied, {survived} faults were got over");
}
