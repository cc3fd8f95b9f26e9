//! The save helper under Remus, on both sides, with the test in the place of libxl, which writes
//! and reads its own records of each checkpoint on the same descriptor.

use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::{RestoreRequest, Rings};
use xsr_xen_backend::mock::{MemoryDigest, WorkloadSpec};

use super::*;

/// The callbacks that libxl has for Remus. Primary: suspend, postcopy, checkpoint and the log.
/// Secondary: checkpoint, static data and results.
const REMUS_SAVE: &str = "184";
const REMUS_RESTORE: &str = "800";

/// What libxl writes after each checkpoint of a guest without device model: an empty record of type
/// 4.
const CHECKPOINT_END: [u8; 8] = [4, 0, 0, 0, 0, 0, 0, 0];

/// A descriptor that helper and libxl share, with one file offset.
fn shared(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// A host with a domain that works while it is protected, and the helper's arguments.
fn primary(dir: &Path, kind: GuestKind) -> (PathBuf, DomId, String) {
    let (path, domid) = super::host(dir, kind, 8);
    let host = MockHost::open(&path).unwrap();
    let spec = serde_json::to_vec(&WorkloadSpec::writes(1, 1, 300)).unwrap();
    host.userdata_store(domid, "mock-workload", &spec).unwrap();
    let args = format!("--save-domain 7 -1 {} 1 {REMUS_SAVE} 1", domid.0);
    (path, domid, args)
}

/// A host with a domain to restore into, and the helper's arguments.
fn secondary(dir: &Path, kind: GuestKind) -> (PathBuf, DomId, String) {
    let path = dir.join("host");
    let host = MockHost::create(&path, &HostConfig::default()).unwrap();
    let domid = host.create_domain(kind, 2, 4096 + 256).unwrap();
    let domain = host.domain(domid).unwrap();
    let [store, console] = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let args = format!(
        "--restore-domain 7 -1 {} {store} 0 {console} 0 {REMUS_RESTORE} 1",
        domid.0
    );
    (path, domid, args)
}

/// The state of a domain, once no process has its host open.
fn digest(path: &Path, domid: DomId) -> MemoryDigest {
    let host = MockHost::open(path).unwrap();
    host.memory_digest(domid).unwrap()
}

/// The result of a plain restore of a stream's first `checkpoints`.
fn by_the_engine(kind: GuestKind, stream: &[u8], checkpoints: usize) -> MemoryDigest {
    let (mut plain, mut rest) = (stream[..40].to_vec(), &stream[40..]);
    let mut left = checkpoints;
    while left > 0 {
        let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        let (record, behind) = rest.split_at(8 + length.next_multiple_of(8));
        rest = behind;
        if record[0] == 0xe {
            rest = rest.strip_prefix(&CHECKPOINT_END).unwrap();
            left -= 1;
        } else {
            plain.extend_from_slice(record);
        }
    }
    plain.extend_from_slice(&[0; 8]);
    let dir = scratch();
    let (path, domid, args) = secondary(dir.path(), kind);
    let port = |at: usize| args.split(' ').nth(at).unwrap().parse().unwrap();
    let host = MockHost::open(&path).unwrap();
    let domain = host.domain(domid).unwrap();
    let rings = Rings {
        store_port: port(4),
        store_domid: DomId(0),
        console_port: port(6),
        console_domid: DomId(0),
    };
    let source = CopySource(plain.as_slice());
    RestoreRequest::new(domain.as_ref(), rings)
        .read_stream(
            RecordReader::new(source, ReadOptions::default()).unwrap(),
            &mut DirectToolstack(domain.as_ref()),
        )
        .unwrap();
    host.memory_digest(domid).unwrap()
}

#[test]
fn remus_asks_in_libxls_order_and_its_survivor_is_the_last_checkpoint() {
    for kind in [GuestKind::Pv, GuestKind::Hvm] {
        let dir = scratch();
        let (path, domid, args) = primary(dir.path(), kind);
        let name = dir.path().join("stream");
        let mut libxl = shared(&name);
        let child = start(&path, &args, libxl.try_clone().unwrap());
        let mut ends = Vec::new();
        let run = play(child, |number| match number {
            POSTCOPY => Some(1),
            CHECKPOINT => {
                libxl.write_all(&CHECKPOINT_END).unwrap();
                let at = fs::metadata(&name).unwrap().len();
                ends.push(usize::try_from(at).unwrap());
                Some(i32::from(ends.len() < 3))
            }
            other => fine(other),
        });
        assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
        let mut order = [SUSPEND, POSTCOPY, CHECKPOINT].repeat(3);
        if kind == GuestKind::Hvm {
            order.insert(0, LOGDIRTY);
            order.push(LOGDIRTY);
        }
        order.push(COMPLETE);
        assert_eq!(run.numbers(), order, "{kind:?}");
        let steps: Vec<&str> = run.progress.iter().map(|step| step.0.as_str()).collect();
        assert!(steps.contains(&"Checkpointed save"), "{steps:?}");
        assert!(!steps.contains(&"End of stream"), "{steps:?}");
        let host = MockHost::open(&path).unwrap();
        assert_eq!(host.domain(domid).unwrap().info().unwrap().shutdown, None);

        // Cut off before the first checkpoint is complete, in the third, within libxl's part of the
        // third, and right after it.
        let bytes = fs::read(&name).unwrap();
        assert_eq!(bytes.len(), ends[2]);
        let expected = [1, 2, 3].map(|last| by_the_engine(kind, &bytes, last));
        assert!(expected[1].differences(&expected[2]).len() > 20);
        let cuts: [(usize, usize, usize); 5] = [
            (ends[0] - 16, 0, 0),
            (ends[0] - 1, 1, 0),
            (ends[2] - 16, 2, 2),
            (ends[2] - 1, 3, 2),
            (ends[2], 3, 3),
        ];
        for (at, asked, last) in cuts {
            let dir = scratch();
            let (path, domid, args) = secondary(dir.path(), kind);
            let cut = dir.path().join("cut");
            fs::write(&cut, &bytes[..at]).unwrap();
            let mut libxl = shared(&cut);
            let child = start(&path, &args, libxl.try_clone().unwrap());
            let run = play(child, |number| match number {
                CHECKPOINT => {
                    let mut record = [0; 8];
                    // 2: to libxl, a missing record means failover.
                    Some(match libxl.read_exact(&mut record) {
                        Ok(()) if record == CHECKPOINT_END => 1,
                        Ok(()) => 0,
                        Err(_) => 2,
                    })
                }
                other => fine(other),
            });
            let mut order = vec![STATIC_DATA_DONE];
            order.extend(vec![CHECKPOINT; asked]);
            order.extend([RESTORE_RESULTS, COMPLETE]);
            assert_eq!(run.numbers(), order, "{kind:?}: {run:?}");
            let Some(last) = last.checked_sub(1) else {
                assert_eq!(run.completed().0, -1);
                continue;
            };
            assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
            run.logged(5, &format!("the guest is checkpoint {}", last + 1));
            let differ = expected[last].differences(&digest(&path, domid));
            assert_eq!(differ, [], "{kind:?}, cut at {at}");
        }
    }
}

#[test]
fn what_libxl_answers_to_a_checkpoint_decides() {
    let dir = scratch();
    let (path, domid, args) = primary(dir.path(), GuestKind::Pvh);
    let stream = dir.path().join("stream");
    let save = |postcopy: i32, answers: &[i32]| {
        let mut answers = answers.iter();
        let child = start(&path, &args, File::create(&stream).unwrap());
        play(child, |number| match number {
            POSTCOPY => Some(postcopy),
            CHECKPOINT => answers.next().copied(),
            other => fine(other),
        })
    };
    let shutdown = || {
        let host = MockHost::open(&path).unwrap();
        host.domain(domid).unwrap().info().unwrap().shutdown
    };
    assert_eq!(save(1, &[-1]).completed(), (-1, Errno::EIO));
    assert_eq!(shutdown(), None);
    // libxl resumes the guest, which it failed to do at the checkpoint.
    assert_eq!(save(0, &[]).completed(), (-1, Errno::EIO));
    assert_eq!(shutdown(), Some(ShutdownReason::Suspend));
    let host = MockHost::open(&path).unwrap();
    host.domain(domid).unwrap().resume().unwrap();
    drop(host);
    assert_eq!(save(1, &[1, 0]).completed(), (0, Errno::from_raw(0)));
    assert_eq!(shutdown(), None);

    // The secondary: 0 means failure, 2 that the sender is gone, which only a guest that has had a
    // checkpoint survives.
    for (answers, retval) in [([0, 1], -1), ([2, 1], -1), ([1, 2], 0), ([1, 0], -1)] {
        let dir = scratch();
        let (path, _, args) = secondary(dir.path(), GuestKind::Pvh);
        let mut answers = answers.into_iter();
        let child = start(&path, &args, File::open(&stream).unwrap());
        let run = play(child, |number| match number {
            CHECKPOINT => answers.next(),
            other => fine(other),
        });
        assert_eq!(run.completed().0, retval, "{run:?}");
        let asked = run.numbers().iter().filter(|n| **n == CHECKPOINT).count();
        assert_eq!(asked, 2 - answers.count());
    }
}
