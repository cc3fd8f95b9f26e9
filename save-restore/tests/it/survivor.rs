//! Cutting off the sender of a stream with checkpoints at any point: the survivor is the guest of
//! the last complete checkpoint, in memory and registers, never a mixture.
//!
//! `XSR_CUTS` is the number of random bytes to try per guest, `XSR_SEED` their seed.

mod colo;
mod kit;
mod refused;

use crate::common::*;
use kit::*;
use xsr_save_restore::RestoreError;
use xsr_save_restore::source::CopySource;
use xsr_xen_backend::Host;

#[test]
fn a_sender_that_is_cut_off_anywhere_leaves_the_last_complete_checkpoint() {
    let (cuts, mut seed) = (number("XSR_CUTS", 8), number("XSR_SEED", 1));
    let (mut runs, mut discarded) = (0_u64, 0);
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
        let complete = ends(&stream);
        assert_eq!(complete.len(), EPOCHS, "{name}");
        let mut at: Vec<usize> = records.iter().map(|(at, ..)| *at).collect();
        at.push(stream.len());
        let bytes = stream.len() as u64;
        at.extend((0..cuts).map(|_| usize::try_from(random(&mut seed) % bytes).unwrap()));
        for (turn, at) in at.into_iter().enumerate() {
            let what = format!("{name}: cut at byte {at} of {}", stream.len());
            let keep = in_memory([0, 4109, 64 << 20][turn % 3]);
            let mut secondary = Secondary::default();
            let buffered = Buffered::clone(&secondary.buffered);
            let (domid, result) = match turn % 2 {
                0 => {
                    let source = WithDisk::new(&stream[..at], &complete, &buffered);
                    let (domid, result) = survive(&to, shapes, source, &mut secondary, &keep);
                    (domid, result.map(|s| (s.checkpoints, is_loss(&s.ending))))
                }
                _ => {
                    let source = WithDisk::new(Breaks(&stream[..at]), &complete, &buffered);
                    let (domid, result) = survive(&to, shapes, source, &mut secondary, &keep);
                    (domid, result.map(|s| (s.checkpoints, is_loss(&s.ending))))
                }
            };
            runs += 1;
            let last = complete.iter().filter(|end| **end <= at).count();
            assert_eq!(secondary.checkpoints, last as u64, "{what}");
            // The disk holds what came up to that checkpoint; the rest has arrived but is not on
            // the disk.
            let end = last.checked_sub(1).map_or(0, |last| complete[last]);
            let writes = all_writes(&complete);
            let (kept, rest): (Vec<_>, Vec<_>) = writes.partition(|(bytes, _)| *bytes <= end);
            let disk: Disk = kept.into_iter().map(|(_, write)| write).collect();
            assert_eq!(secondary.disk, disk, "{what}");
            let come = rest.into_iter().filter(|(bytes, _)| *bytes <= at);
            let come: Vec<_> = come.map(|(_, write)| write).collect();
            assert_eq!(*buffered.borrow(), come, "{what}");
            discarded += come.len();
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
    assert!(discarded > 0);
    eprintln!("{runs} senders were cut off, {discarded} disk writes discarded");
}
